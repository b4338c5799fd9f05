"""The text encoder against transformers' CLIP: which layer is its output, normalised or not, pooled and projected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import TINY, error

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.convert import convert
from sd.checkpoints.key_maps import diffusers_sources
from sd.config import END, SD1, SD2, TextConfig
from sd.models.build import build
from sd.models.text_encoder import TextEncoder, TextOutput

SMALL = TextConfig(width=32, layers=4, heads=4)
OPENCLIP = replace(SMALL, activation="gelu", pad=0, names="openclip")
CONFIGS = {
    "SD 1: last layer, normalised": SMALL,
    "SD 2: last layer but one, normalised": replace(OPENCLIP, hidden_layer=-2),
    "SDXL, CLIP-L: last layer but one as it is": replace(SMALL, hidden_layer=-2, hidden_norm=False),
    "SDXL, bigG: the same, pooled and projected": replace(
        OPENCLIP, hidden_layer=-2, hidden_norm=False, pooled=True, projection=24
    ),
    "pooled alone": replace(SMALL, pooled=True),
}


def texts(pad: int) -> torch.Tensor:
    """Three texts of different lengths, each with its end token and padding."""
    ids = torch.randint(1, END - 1, (3, 77), generator=torch.Generator().manual_seed(0))
    for row, length in zip(ids, (1, 9, 76), strict=True):
        row[0], row[length], row[length + 1 :] = END - 1, END, pad
    return ids


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_are_those_of_transformers(config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = transformers.CLIPTextModelWithProjection if config.projection else transformers.CLIPTextModel
    theirs = kind(
        transformers.CLIPTextConfig(
            hidden_size=config.width, intermediate_size=4 * config.width, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, hidden_act=config.activation, eos_token_id=END,
            projection_dim=config.projection or config.width, initializer_factor=5.0,
        )
    ).eval()  # fmt: skip
    for name, weight in theirs.named_parameters():
        if "norm" in name:  # else they are ones and zeros, and a norm that is left out may go unnoticed
            torch.nn.init.normal_(weight, float(name.endswith("weight")), 0.3)
    encoder = TextEncoder(config)
    keys = [key for key in encoder.state_dict() if key != "projection.weight"]
    table = diffusers_sources(
        replace(TINY, text=(config,), unet=replace(TINY.unet, context=32)), {"text_encoder": keys}
    )
    state = {name.removeprefix("text_model."): weight for name, weight in theirs.state_dict().items()}
    own = {key: state[source.key] for key, source in table["text_encoder"].items()}
    encoder.load_state_dict(own | ({"projection.weight": state["text_projection.weight"]} if config.projection else {}))

    ids = texts(config.pad)
    with torch.no_grad():
        out, expected = encoder(ids), theirs(ids, output_hidden_states=True)
        hidden = expected.hidden_states[config.hidden_layer]
        norm = encoder.norm(hidden) if config.hidden_norm else hidden
    assert isinstance(out, TextOutput) and error(out.hidden, norm) < 1e-5
    if config.hidden_norm and config.hidden_layer == -1:
        assert error(out.hidden, expected.last_hidden_state) < 1e-5
    if not config.pooled:
        assert out.pooled is None
    else:
        pooled = expected.text_embeds if config.projection else expected.pooler_output
        assert out.pooled is not None and error(out.pooled, pooled) < 1e-5


def test_pooled_is_that_of_the_first_end_token():
    """Padding is the end token, too, in OpenAI's CLIP; words that were added have larger ids."""
    encoder = TextEncoder(replace(SMALL, pooled=True, vocab=END + 3))
    ids = texts(END)
    ids[1, 3] = END + 2
    with torch.no_grad():
        hidden, pooled = encoder(ids)
        alone = encoder(ids[1:2, :10]).pooled
    assert torch.equal(pooled, hidden[torch.arange(3), torch.tensor([1, 9, 76])])
    assert error(alone[0], pooled[1]) < 1e-5


def test_stable_diffusion_has_nothing_pooled():
    for known in (SD1, SD2):
        (text,) = known.text
        assert (text.hidden_layer, text.hidden_norm, text.pooled, text.projection) == (-1, True, False, None)


def test_two_encoders_side_by_side():
    """Their widths add up to the context's; each is a network of its own."""
    pair = (SMALL, replace(OPENCLIP, hidden_layer=-2, hidden_norm=False, pooled=True, projection=24))
    config = replace(TINY, text=pair, unet=replace(TINY.unet, context=64))
    assert list(build(config)) == ["text_encoder", "text_encoder_2", "vae", "unet"]
    assert type(config).from_json(config.to_json()) == config
    with pytest.raises(CheckpointError, match="has 2 text encoders, which is not supported yet"):
        convert({}, config)
    with pytest.raises(ValueError, match="context 32 wide, the text encoders' is 64"):
        replace(config, unet=replace(TINY.unet, context=32))
