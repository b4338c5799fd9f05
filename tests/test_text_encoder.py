"""The text encoder against transformers' CLIP: which layer is its output, normalised or not, pooled; clip skip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import TINY, error, tiny_state
from safetensors.torch import save_file

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.convert import convert
from sd.checkpoints.key_maps import diffusers_sources
from sd.config import END, SD1, SD2, TextConfig
from sd.models.build import build
from sd.models.text_encoder import TextEncoder, TextOutput, layers_of_clip_skip
from sd.params import TextToImage, from_dict
from sd.pipeline import StableDiffusion

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


def with_weights_of_transformers(config: TextConfig):
    """Our encoder and theirs with the same random weights."""
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
    unet = replace(TINY.unet, context=32, vector=config.pooled_width or None)
    table = diffusers_sources(replace(TINY, text=(config,), unet=unet), {"text_encoder": keys})
    state = {name.removeprefix("text_model."): weight for name, weight in theirs.state_dict().items()}
    own = {key: state[source.key] for key, source in table["text_encoder"].items()}
    encoder.load_state_dict(own | ({"projection.weight": state["text_projection.weight"]} if config.projection else {}))
    return encoder, theirs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_are_those_of_transformers(config):
    encoder, theirs = with_weights_of_transformers(config)
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


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_clip_skip_is_a_layer_of_transformers(config):
    """Normalised where the model's own is; the pooled vector stays that of the last layer, and none runs in vain."""
    encoder, theirs = with_weights_of_transformers(config)
    ids = texts(config.pad)
    runs: list[int] = []
    for i, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    with torch.no_grad():
        expected, usual = theirs(ids, output_hidden_states=True), encoder(ids)
        for clip_skip in range(1, config.layers + 1):
            runs.clear()
            out = encoder(ids, *layers_of_clip_skip([config], clip_skip, note=pytest.fail))
            hidden = expected.hidden_states[-clip_skip]
            assert error(out.hidden, encoder.norm(hidden) if config.hidden_norm else hidden) < 1e-5
            assert len(runs) == (config.layers if config.pooled else config.layers - clip_skip + 1)
            assert out.pooled is usual.pooled is None or torch.equal(out.pooled, usual.pooled)
    assert config == encoder.config


def test_clip_skip_counts_the_published_layers():
    """SD 2 has 23 of 24: 2 is its own layer, in a file with all of them as in a folder; 1 is said to have no effect."""
    notes: list[str] = []
    (own,) = SD2.text
    assert [layers_of_clip_skip([own], n, notes.append)[0] for n in (2, 3, 24)] == [-1, -2, -23] and not notes
    assert layers_of_clip_skip([own], 1, notes.append) == (-1,)
    assert notes == ["clip skip 1 has no effect: this model lacks that layer and uses clip skip 2"]
    whole = replace(own, layers=24, hidden_layer=-2)
    assert [layers_of_clip_skip([whole], n, pytest.fail)[0] for n in (1, 2, 24)] == [-1, -2, -24]
    assert [layers_of_clip_skip([SD1.text[0]], n, pytest.fail)[0] for n in (1, 2, 12)] == [-1, -2, -12]
    for text, n, most in ((own, 25, 24), (SD1.text[0], 13, 12), (SMALL, 5, 4), (SMALL, 0, 4)):
        with pytest.raises(ValueError, match=rf"from 1 \(the last layer\) to {most}, .*; got {n}"):
            layers_of_clip_skip([text], n, notes.append)


def test_clip_skip_in_a_run(tiny_sd, tmp_path):
    """The prompt, the negative one and what fills them up; per request, with low memory as well."""
    settings = {"steps": 2, "seed": 1, "height": 64, "width": 64}
    ids = tiny_sd.tokenizer(["a cat", ""])
    cat, empty = tiny_sd.text_encoder(ids, hidden_layer=-2).hidden.split(1)
    assert torch.equal(tiny_sd.encode_prompt(["a cat", ""], clip_skip=2), torch.cat([cat, empty]))
    assert torch.equal(tiny_sd.encode_prompt("a cat", clip_skip=1), tiny_sd.encode_prompt("a cat"))
    request = TextToImage.of("a cat", "blue " * 80, web_ui_prompts=True, clip_skip=2, **settings)
    (guide, _) = tiny_sd.prepare(request).guides
    assert error(guide.cond.context, torch.cat([cat, empty], dim=1)) < 1e-5
    images = [tiny_sd.txt2img("a cat", clip_skip=n, **settings)[0].tobytes() for n in (None, 1, 2, None)]
    assert images[0] == images[1] == images[3] != images[2]
    (changing,) = tiny_sd.txt2img("[a cat|a cat]", clip_skip=2, web_ui_prompts=True, **settings)
    assert changing.tobytes() == images[2]
    assert from_dict(request.to_dict()) == request
    save_file(tiny_state(), tmp_path / "tiny.safetensors")
    low = StableDiffusion.load(
        tmp_path / "tiny.safetensors", config=TINY, device="cpu", dtype="float32", low_memory=True
    )
    assert error(low.encode_prompt("a cat", clip_skip=2), cat) < 1e-5
    (usual,), (skipped,) = (low.txt2img("a cat", clip_skip=n, **settings) for n in (None, 2))
    assert usual.tobytes() != skipped.tobytes()
    with pytest.raises(ValueError, match="clip_skip must be from 1"):
        tiny_sd.prepare(TextToImage.of("a cat", clip_skip=4, **settings))


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
    config = replace(TINY, text=pair, unet=replace(TINY.unet, context=64, vector=24))
    assert list(build(config)) == ["text_encoder", "text_encoder_2", "vae", "unet"]
    assert type(config).from_json(config.to_json()) == config
    with pytest.raises(CheckpointError, match="no text encoder and no second text encoder and no vae"):
        convert({"unet.conv_in.weight": torch.ones(1), "unet.down.0.res.0.norm1.weight": torch.ones(1)}, config)
    with pytest.raises(ValueError, match="only the last text encoder may have a pooled output"):
        replace(config, text=pair[::-1])
    with pytest.raises(ValueError, match="context 32 wide, the text encoders' is 64"):
        replace(config, unet=replace(config.unet, context=32))
