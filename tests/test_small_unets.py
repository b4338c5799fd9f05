"""Distilled U-Nets: one block a level, no middle, fewer levels.

The JSON settings are those of BK-SDM (Nota AI), small-sd and tiny-sd (Segmind), and SDXS, with smaller widths.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from common import TINY_V2, error, manifest, tiny_state
from test_folders import assert_same, weights, write_folder
from test_layouts import only, without

from sd import StableDiffusion
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import identify
from sd.checkpoints.diffusers_config import from_diffusers
from sd.checkpoints.diffusers_export import to_diffusers_configs
from sd.checkpoints.export import to_diffusers, to_original, to_own
from sd.checkpoints.inspect import inspect
from sd.checkpoints.key_maps import UNET, sources
from sd.checkpoints.loading import load_weights
from sd.checkpoints.prediction import predicting
from sd.conditioning import Conditioning
from sd.config import SD1, SD1_INPAINT, SD2, SD2_V, SMALL, Config, UNetConfig
from sd.models.build import build, weight_shapes
from sd.study.network import draw_network, trace

THREE = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3, "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": None,
}  # fmt: skip
FOLDERS = {
    "base": {"block_out_channels": [32, 64, 96, 96]},
    "small": {"block_out_channels": [32, 64, 96, 96], "mid_block_type": None},
    "tiny": {"block_out_channels": [32, 64, 96], **THREE},
    "tiny v2": {
        "block_out_channels": [32, 64, 96], "attention_head_dim": [1, 2, 3], "use_linear_projection": True, **THREE,
    },
    "sdxs": {
        "block_out_channels": [32, 64, 96], "mid_block_type": None,
        "down_block_types": ["DownBlock2D", *THREE["down_block_types"][:2]],
        "up_block_types": [*THREE["up_block_types"][:2], "UpBlock2D"],
    },
}  # fmt: skip


def part(full: Config, name: str) -> Config:
    """A full-size model with one of these U-Nets."""
    levels = len(FOLDERS[name]["block_out_channels"])
    depth = (0, 1, 1) if name == "sdxs" else full.unet.depth[:levels]
    unet = full.unet
    unet = replace(unet, channels=unet.channels[:levels], heads=unet.heads[:levels], depth=depth, blocks=1)
    return replace(full, name=full.name + SMALL, unet=replace(unet, middle_depth=1 if name == "base" else None))


def folder_configs(config: Config) -> dict[str, dict]:
    files = json.loads(json.dumps(to_diffusers_configs(config)))
    configs = {name: files[f"{name}/config.json"] for name in ("unet", "vae", "text_encoder")}
    return {**configs, "scheduler": files["scheduler/scheduler_config.json"]}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_the_numbers_of_diffusers(name, size):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    arguments = {"layers_per_block": 1, "cross_attention_dim": 24, "attention_head_dim": 8} | FOLDERS[name]
    theirs = diffusers.UNet2DConditionModel(sample_size=16, **arguments).eval()
    for weight in theirs.parameters():
        weight.add_(torch.randn_like(weight) * 0.02)  # biases and norms too
    text = replace(SD1.text[0], width=24, heads=2)
    configs = folder_configs(replace(SD1, text=(text,), unet=replace(SD1.unet, context=24)))
    config = from_diffusers({**configs, "unet": json.loads(theirs.to_json_string())})
    state = {f"unet.{key}": weight for key, weight in theirs.state_dict().items()}
    states = convert(state, config, parts=["unet"])
    unet = load_weights(build(config)["unet"], states["unet"], torch.device("cpu"), torch.float32)
    x, t, context = torch.randn(2, 4, *size), torch.tensor([981.0, 5.0]), torch.randn(2, 77, 24)
    assert error(unet(x, t, Conditioning(context)), theirs(x, t, context).sample) < 1e-5


@pytest.mark.parametrize("name, count", [("base", 579_384_964), ("small", 482_346_884), ("tiny", 323_384_964)])
def test_published_parameter_counts(name, count):
    """0.58, 0.49 and 0.33 billion in the paper."""
    shapes = weight_shapes(part(SD1, name))["unet"]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count


@pytest.mark.parametrize("full", [SD1, SD1_INPAINT, SD2, SD2_V], ids=lambda config: config.name)
@pytest.mark.parametrize("name", FOLDERS)
def test_configs_there_and_back(full, name):
    config = part(full, name)
    assert Config.from_json(config.to_json()) == config
    assert from_diffusers(folder_configs(config)) == config
    assert config.unet.is_part_of(full.unet) and not full.unet.is_part_of(config.unet)


def test_lists_with_a_value_for_each_level_are_that_value():
    raw = folder_configs(part(SD1, "small"))
    unet = {"layers_per_block": [1] * 4, "cross_attention_dim": [768] * 4, "transformer_layers_per_block": [1] * 4,
            "only_cross_attention": [False] * 4, "attention_head_dim": [8] * 4}  # fmt: skip
    assert from_diffusers({**raw, "unet": raw["unet"] | unet}) == part(SD1, "small")
    for key, value in {"layers_per_block": [1, 1, 2, 2], "cross_attention_dim": [768, 768, 768, 1024]}.items():
        with pytest.raises(CheckpointError, match=f"unet/config.json has {key} .*expected one value for all levels"):
            from_diffusers({**raw, "unet": raw["unet"] | {key: value}})


def test_transformers_of_several_blocks():
    raw = folder_configs(SD1)
    config = from_diffusers({**raw, "unet": raw["unet"] | {"transformer_layers_per_block": [1, 2, 3, 4]}})
    assert config.unet.depth == (1, 2, 3, 0) and config.unet.middle_depth == 4
    assert from_diffusers({**raw, **folder_configs(config)}).unet == config.unet


# ------------------------------------------------------------------------------------------------------- single files

# as written by diffusers' script for the full-size network, from the folder of tiny-sd
SPACED = {
    "down.0.res.0.conv1": "input_blocks.1.0.in_layers.2", "down.0.down": "input_blocks.3.0.op",
    "down.1.res.0.conv1": "input_blocks.4.0.in_layers.2", "down.2.attn.0.norm": "input_blocks.7.1.norm",
    "up.2.res.0.conv2": "output_blocks.0.0.out_layers.3", "up.2.res.1.skip": "output_blocks.1.0.skip_connection",
    "up.2.attn.1.blocks.0.attn1.q": "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "up.2.up.conv": "output_blocks.2.1.conv", "up.1.res.0.conv1": "output_blocks.3.0.in_layers.2",
    "up.1.attn.1.norm": "output_blocks.4.1.norm", "up.1.up.conv": "output_blocks.5.2.conv",
    "up.0.res.1.conv1": "output_blocks.7.0.in_layers.2", "conv_in": "input_blocks.0.0", "conv_out": "out.2",
}  # fmt: skip


def test_numbers_with_gaps():
    keys = [f"{layer}.bias" for layer in SPACED if ".q" not in layer] + ["up.2.attn.1.blocks.0.attn1.q.weight"]
    found = sources("unet", "original-spaced", part(SD1, "tiny"), UNET, keys)
    assert {key.rpartition(".")[0]: source.key.rpartition(".")[0] for key, source in found.items()} == {
        ours: UNET + theirs for ours, theirs in SPACED.items()
    }


def full_size(config: Config, layout: str) -> dict[str, torch.Tensor]:
    """A file of this model without numbers: its U-Net in a layout, the rest original."""
    full = "sd-v1" if config.unet.context == 768 else "sd-v2-base"
    rest = {key: shape for key, (shape, _) in manifest(full).items() if not key.startswith(UNET)}
    rest.pop("alphas_cumprod", None)
    shapes = weight_shapes(config)["unet"]
    prefix = "" if layout == "diffusers" else UNET
    table = sources("unet", layout, config, prefix, shapes)
    rest |= {source.key: shapes[key] + (1,) * source.ones for key, source in table.items()}
    return {key: torch.empty(shape, device="meta") for key, shape in rest.items()}


@pytest.mark.parametrize("layout", ["original", "original-spaced", "diffusers"])
@pytest.mark.parametrize("full, name", [(SD1, name) for name in FOLDERS] + [(SD2, "tiny"), (SD2, "small")])
def test_a_file_is_recognised(full, name, layout):
    config = part(full, name)
    state = full_size(config, layout)
    found = identify(state)
    assert found.config == replace(
        config, unet=replace(config.unet, linear_projections=found.config.unet.linear_projections)
    )
    if layout != "diffusers":
        assert found.config == config and found.decided == (full == SD1)
    assert len(convert(state, found.config)["unet"]) == len(weight_shapes(config)["unet"])
    assert identify(state, full).config.unet == found.config.unet, "the model as given is that of the family"


def test_a_full_size_network_without_its_middle_is_damaged():
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest("sd-v1").items()}
    state = without(state, f"{UNET}middle_block.")
    assert identify(state).config == SD1
    with pytest.raises(CheckpointError, match=r"46 weights of \d+ missing"):
        convert(state)


def test_what_a_small_sd2_predicts_tells_its_size():
    eps = part(SD2, "tiny")
    assert predicting(eps, "v") == part(SD2_V, "tiny") and predicting(part(SD2_V, "tiny"), "eps") == eps


# ------------------------------------------------------------------------------------------------- a whole small model


@pytest.fixture(scope="module", params=["small", "tiny"])
def small(request) -> tuple[Config, dict[str, torch.Tensor]]:
    """The tiny model of the 2.x family with such a U-Net: config, and weights in our layout."""
    levels = 2 if request.param == "tiny" else 3
    unet = TINY_V2.unet
    unet = UNetConfig(
        channels=unet.channels[:levels], heads=unet.heads[:levels], depth=unet.depth[:levels], blocks=1,
        middle_depth=None, context=96, linear_projections=True,
    )  # fmt: skip
    config = replace(TINY_V2, name=TINY_V2.name + SMALL, unet=unet)
    generator = torch.Generator().manual_seed(0)
    state = to_own(convert(tiny_state("tiny-v2-v"), TINY_V2, parts=["text_encoder", "vae"]))
    shapes = weight_shapes(config)["unet"]
    state |= {f"unet.{key}": torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}
    return config, state


def test_every_layout_there_and_back(small, tmp_path):
    config, state = small
    path = write_folder(tmp_path / "model", state, config)
    assert_same(weights(path), state)
    with load_checkpoint(path) as checkpoint:
        assert replace(identify(checkpoint).config, name=config.name) == config
        report = inspect(checkpoint)
    assert report.supported and not report.missing and not report.unknown
    original = to_original(convert(state, config), config)
    assert f"{UNET}input_blocks.3.0.op.weight" in original, "numbered as by diffusers' script"
    assert_same(to_own(convert(original, identify(original, TINY_V2).config)), state)


def test_it_generates_trains_and_is_drawn(small, tmp_path):
    config, state = small
    model = StableDiffusion.load(write_folder(tmp_path / "model", state, config), device="cpu", dtype="float32")
    (image,) = model.txt2img("a", steps=2, height=64, width=64)
    assert image.size == (64, 64)
    unet = load_weights(build(config)["unet"], only(state, "unet."), torch.device("cpu"), torch.float32)
    with torch.enable_grad():
        unet.requires_grad_(True)
        out = unet(torch.randn(1, 4, 8, 8), torch.tensor([10.0]), Conditioning(torch.randn(1, 5, 96)))
        out.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in unet.parameters())
    assert draw_network(trace(unet, 8, 8), unet).height > 300


def test_a_control_network_adds_to_what_would_be_the_middle(small):
    config, state = small
    unet = load_weights(build(config)["unet"], only(state, "unet."), torch.device("cpu"), torch.float32)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([10.0]), Conditioning(torch.randn(1, 5, 96))
    side = 8 >> len(config.unet.channels) - 1
    middle = torch.ones(1, config.unet.channels[-1], side, side)
    assert torch.equal(unet(x, t, context, middle=0 * middle), unet(x, t, context))
    assert error(unet(x, t, context, middle=middle), unet(x, t, context)) > 1e-4


def test_diffusers_reads_what_is_written(small, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config, state = small
    path = write_folder(tmp_path / "model", state, config)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(path / "unet")
    expected = to_diffusers(convert(state, config), config)["unet/diffusion_pytorch_model.safetensors"]
    assert_same(theirs.state_dict(), expected)
