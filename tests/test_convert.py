"""Names: one to one with the original, in both directions, and strict about everything else."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import reference_weights as reference
import torch
from common import TINY, TINY_V2, Golden, error, manifest, tiny_state
from conftest import loaded
from safetensors.torch import save_file

from scripts import convert as program
from sd import StableDiffusion
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import CONFIG_KEY, detect
from sd.checkpoints.export import to_original, to_own
from sd.checkpoints.finite import FiniteCheck
from sd.checkpoints.key_maps import UNET, original_sources
from sd.checkpoints.loading import load_weights
from sd.conditioning import Conditioning
from sd.config import MODELS, SD1, SD1_INPAINT, SD2, SD2_INPAINT
from sd.models.build import build
from sd.models.layers import Attention

SCHEDULE_BUFFERS = 12


def meta(name: str, **changes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of a manifest without data."""
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in manifest(name).items()}


@pytest.mark.parametrize("name, config, unet", [("sd-v1", SD1, 686), ("tiny-v1", TINY, 212)])
def test_table_covers_the_checkpoint_one_to_one(name, config, unet):
    keys = {network: list(module.state_dict()) for network, module in build(config).items()}
    sources = original_sources(config, keys)
    theirs = [source.key for table in sources.values() for source in table.values()]
    assert len(theirs) == len(set(theirs))
    left = set(manifest(name)) - set(theirs)
    assert len(left) == SCHEDULE_BUFFERS + 1 and any(key.endswith("position_ids") for key in left)
    if name == "sd-v1":
        assert [len(sources[network]) for network in ("unet", "vae", "text_encoder")] == [686, 248, 196]
    assert sum(key.startswith(UNET) for key in theirs) == len(sources["unet"])


def test_every_weight_lies_where_the_table_says(tiny):
    """Tensor by tensor: a swap of two key biases, or of biases that are added, no output would ever show."""
    state = tiny_state()
    sources = original_sources(TINY, {name: network.state_dict() for name, network in tiny.items()})
    for name, network in tiny.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor.flatten(), state[sources[name][key].key].flatten()), key


# pairs that the weights' shapes and any output leave open, written down from the original's modules
SPOT_CHECKS = {
    "unet.down.0.res.0.conv1.bias": "model.diffusion_model.input_blocks.1.0.in_layers.2.bias",
    "unet.down.0.res.0.time.bias": "model.diffusion_model.input_blocks.1.0.emb_layers.1.bias",
    "unet.down.0.res.0.conv2.bias": "model.diffusion_model.input_blocks.1.0.out_layers.3.bias",
    "unet.down.0.down.bias": "model.diffusion_model.input_blocks.3.0.op.bias",
    "unet.down.1.res.0.skip.bias": "model.diffusion_model.input_blocks.4.0.skip_connection.bias",
    "unet.down.2.attn.1.blocks.0.attn1.k.weight": (
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn1.to_k.weight"
    ),
    "unet.mid.attn.blocks.0.attn2.out.bias": (
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.bias"
    ),
    "unet.up.3.up.conv.weight": "model.diffusion_model.output_blocks.2.1.conv.weight",
    "unet.up.2.up.conv.weight": "model.diffusion_model.output_blocks.5.2.conv.weight",
    "unet.up.0.res.2.norm1.weight": "model.diffusion_model.output_blocks.11.0.in_layers.0.weight",
    "unet.up.0.attn.2.blocks.0.ff.proj.weight": (
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight"
    ),
    "vae.encoder.mid.attn.attn.k.bias": "first_stage_model.encoder.mid.attn_1.k.bias",
    "vae.encoder.down.2.down.conv.bias": "first_stage_model.encoder.down.2.downsample.conv.bias",
    "vae.decoder.up.3.up.conv.bias": "first_stage_model.decoder.up.3.upsample.conv.bias",
    "vae.decoder.up.1.res.0.skip.weight": "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight",
    "vae.post_quant.weight": "first_stage_model.post_quant_conv.weight",
    "text_encoder.blocks.11.attn.k.bias": (
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.k_proj.bias"
    ),
    "text_encoder.norm.bias": "cond_stage_model.transformer.text_model.final_layer_norm.bias",
}


def test_spot_checks():
    sources = original_sources(SD1, {name: module.state_dict() for name, module in build(SD1).items()})
    for ours, theirs in SPOT_CHECKS.items():
        network, _, key = ours.partition(".")
        assert sources[network][key].key == theirs


def test_way_back_is_bit_identical(tiny):
    state = tiny_state()
    back = to_original({name: network.state_dict() for name, network in tiny.items()}, TINY)
    assert set(state) - set(back) == set(reference.SCHEDULE)
    for key, tensor in back.items():
        assert tensor.shape == state[key].shape and tensor.dtype == state[key].dtype, key
        assert torch.equal(tensor, state[key]), key


def test_own_layout_round_trip(tiny, tmp_path):
    own = to_own({name: network.state_dict() for name, network in tiny.items()})
    path = tmp_path / "tiny.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in own.items()}, path, {CONFIG_KEY: TINY.to_json()})
    with load_checkpoint(path) as checkpoint:
        assert detect(checkpoint) == TINY
        states = convert(checkpoint)
        for name, network in tiny.items():
            for key, tensor in network.state_dict().items():
                assert torch.equal(states[name][key], tensor)
    sd = StableDiffusion.load(path, device="cpu", dtype="float32")
    golden = Golden("tiny_v1_components")
    assert (
        error(sd.unet(golden["unet_x"], golden["unet_t"], Conditioning(golden["context"])), golden["unet_out"]) < 2e-5
    )


def test_detection():
    assert detect(meta("sd-v1")) == SD1
    assert detect(meta("sd-v1-full-ema")) == SD1
    key = UNET + "input_blocks.0.0.weight"
    assert detect({**meta("sd-v1"), key: torch.empty(320, 9, 3, 3, device="meta")}) == SD1_INPAINT
    wide = {k: torch.empty(v.shape[0], 1024, device="meta") for k, v in meta("sd-v1").items() if "attn2.to_k" in k}
    form = {"linear_projections": False}  # that and the names of the text encoder are still those of the file
    expected = replace(SD2_INPAINT, unet=replace(SD2_INPAINT.unet, **form), text=(replace(SD2.text[0], names="clip"),))
    assert detect({**meta("sd-v1"), **wide, key: torch.empty(320, 9, 3, 3, device="meta")}) == expected


def with_channels(n: int) -> dict[str, torch.Tensor]:
    return {**meta("sd-v1"), UNET + "input_blocks.0.0.weight": torch.empty(320, n, 3, 3, device="meta")}


def v2() -> dict[str, torch.Tensor]:
    return {
        key: torch.empty(t.shape[0], 1024, device="meta") if "attn2.to_k" in key else t
        for key, t in meta("sd-v1").items()
    }


@pytest.mark.parametrize(
    "state, word",
    [
        ({"model.diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale": torch.empty(1)}, "Flux"),
        (with_channels(5), "depth"),
        (with_channels(7), "upscaling"),
        (with_channels(8), "pix2pix"),
        (v2(), "sd2-v"),
        ({"lora_unet_down_blocks_0.lora_up.weight": torch.empty(4, 4)}, "LoRA"),
        ({"encoder.layer.0.weight": torch.empty(3)}, "no Stable Diffusion U-Net"),
        (tiny_state(), "unknown kind"),
        ({}, "no Stable Diffusion U-Net"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_models_are_refused_by_name(state, word):
    with pytest.raises(CheckpointError, match=word) as caught:
        detect(state)
    assert "\n" not in str(caught.value)


def dropped(pattern: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tiny_state().items() if not re.match(pattern, key)}


BAD_KEY = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.mark.parametrize(
    "state, words",
    [
        (dropped(r"model\.diffusion_model\.out\.2\.bias"), "1 weight of 556 missing.*out.2.bias"),
        (dropped(r"model\.diffusion_model\.input_blocks\.1\."), "missing.*and .* more"),
        (dropped(r"first_stage_model"), "has no vae"),
        (dropped(r"cond_stage_model"), "has no text encoder"),
        ({**tiny_state(), BAD_KEY: torch.zeros(64, 64, 3)}, "1 weight of the wrong shape.*64x64x3, expected 64x64x3x3"),
        ({**tiny_state(), BAD_KEY: torch.zeros(())}, "a scalar"),
        ({**tiny_state(), "model.diffusion_model.extra.weight": torch.zeros(1)}, "1 weight in the file.*extra.weight"),
        ({**tiny_state(), **{f"x{i}": torch.zeros(1) for i in range(30)}}, "30 weights in the file.*and 20 more"),
    ],
    ids=["one", "block", "vae", "text", "shape", "scalar", "extra", "many"],
)
def test_strictness(state, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(state, TINY)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_ema_is_not_read_unless_asked():
    state = tiny_state("tiny-v1-full-ema")
    read = []

    class Spy(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    for weights, ema in (("auto", False), ("raw", False), ("ema", True)):
        states = convert(Spy(state), TINY, weights)
        read.clear()  # what detection and counting looked at
        assert all(tensor is not None for table in states.values() for tensor in table.values())
        assert any(key.startswith("model_ema.") for key in read) == ema


def test_ema_alone_is_taken_and_decay_alone_is_not_ema():
    state = tiny_state("tiny-v1-full-ema")
    only = {key: tensor for key, tensor in state.items() if not key.startswith(UNET)}
    key = "conv_in.weight"
    assert torch.equal(convert(only, TINY)["unet"][key], convert(state, TINY, "ema")["unet"][key])
    leftovers = {**tiny_state(), "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(1)}
    assert torch.equal(convert(leftovers, TINY)["unet"][key], tiny_state()[UNET + "input_blocks.0.0.weight"])
    with pytest.raises(CheckpointError, match="EMA"):
        convert(leftovers, TINY, "ema")
    with pytest.raises(ValueError, match="auto, raw, ema"):
        convert(leftovers, TINY, "best")


def test_text_encoder_without_text_model_in_its_keys():
    state = {key.replace("transformer.text_model.", "transformer."): t for key, t in tiny_state().items()}
    assert torch.equal(
        convert(state, TINY)["text_encoder"]["norm.bias"], convert(tiny_state(), TINY)["text_encoder"]["norm.bias"]
    )


def test_words_added_by_fine_tuning_are_left_out():
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state = {**tiny_state(), key: torch.cat([tiny_state()[key], torch.ones(2, 64)])}
    assert torch.equal(convert(state, TINY)["text_encoder"]["token.weight"], tiny_state()[key])
    with pytest.raises(CheckpointError, match="wrong shape"):
        convert({**state, key: state[key][:100]}, TINY)


def test_whole_numbers_are_no_weights():
    state = convert({key: tensor.to(torch.int8) for key, tensor in tiny_state().items()}, TINY)["unet"]
    with pytest.raises(CheckpointError, match="quantised"):
        load_weights(build(TINY)["unet"], state, torch.device("cpu"), torch.float32)


def test_openclip_names_and_its_golden():
    """SD 2 in small: fused q, k, v, bare tables, and the penultimate layer."""
    state = tiny_state("tiny-v2-v")
    networks, golden = loaded(state, TINY_V2), Golden("tiny_v2_components")
    q = networks["text_encoder"].blocks[0].attn.q.weight
    assert q.untyped_storage().nbytes() == q.nbytes, "a third must not keep the other two in memory"
    assert error(networks["text_encoder"](golden["ids"].long()).hidden, golden["context"]) < 1e-5
    assert (
        error(networks["unet"](golden["unet_x"], golden["unet_t"], Conditioning(golden["context"])), golden["unet_out"])
        < 2e-5
    )
    back = to_original({name: network.state_dict() for name, network in networks.items()}, TINY_V2)
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key]) and tensor.shape == state[key].shape, key
    left = {key for key in set(state) - set(back) - set(reference.SCHEDULE) if "resblocks.3." not in key}
    assert left == {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"}


def test_numbers_beyond_float16_are_refused():
    state = dict(tiny_state())
    state[BAD_KEY] = state[BAD_KEY] * 1e6
    states = convert(state, TINY)
    with pytest.raises(CheckpointError, match="too large for float16"):
        load_weights(build(TINY)["unet"], states["unet"], torch.device("cpu"), torch.float16)
    load_weights(build(TINY)["unet"], states["unet"], torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_that_are_none_are_found_while_loading(tmp_path, dtype):
    """In every precision, and named as what they are, with the file's names."""
    state = {key: tensor.clone() for key, tensor in tiny_state().items()}
    state[BAD_KEY].view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    state["model.diffusion_model.out.2.bias"][1] = math.nan
    state["first_stage_model.quant_conv.bias"][0] = math.nan
    save_file(state, tmp_path / "a.safetensors")
    options = {"config": TINY, "device": "cpu", "dtype": dtype}
    with pytest.raises(CheckpointError, match=r"1 weight with NaN or infinite numbers: first_stage_model\.quant_conv"):
        StableDiffusion.load(tmp_path / "a.safetensors", **options)
    # with low memory, networks are read when they are needed: the VAE after all steps
    with pytest.raises(CheckpointError, match=r"a\.safetensors: 1 weight with NaN .*quant_conv\.bias \(1 of 8\)"):
        StableDiffusion.load(tmp_path / "a.safetensors", low_memory=True, **options)
    state["first_stage_model.quant_conv.bias"][0] = 0
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="2 weights with NaN or infinite numbers: ") as caught:
        StableDiffusion.load(tmp_path / "b.safetensors", **options)
    assert f"{BAD_KEY} (3 of 36864)" in str(caught.value) and "out.2.bias (1 of 4)" in str(caught.value)
    assert "--dtype" not in str(caught.value), "which is not to blame"


@pytest.mark.parametrize("layout", ["sd", "original", "diffusers"])
def test_numbers_that_are_none_are_not_converted(tmp_path, monkeypatch, capsys, layout):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    state = {**tiny_state(), BAD_KEY: tiny_state()[BAD_KEY].clone()}
    state[BAD_KEY][0, 0, 0, 0] = math.inf
    save_file(state, tmp_path / "a.safetensors")
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    assert program.main([str(tmp_path / "a.safetensors"), str(out), "--model", "tiny", "--layout", layout]) == 1
    assert f"a.safetensors: 1 weight with NaN or infinite numbers: {BAD_KEY} (1 of 36864)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


def test_the_largest_numbers_of_a_precision():
    """65519 is rounded to 65504, the largest of float16; 65520 becomes infinite. A sum of them all would, too."""
    check = FiniteCheck(torch.float16)
    check.look("a", torch.full((1000,), 65519.0))
    check.look("b", torch.full((1000,), -65504.0).half())
    check.look("c", torch.ones(4).to(torch.float8_e4m3fn))
    check.look("d", torch.empty(0))
    check.finish()
    check.look("e", torch.tensor([1.0, -65520.0]))
    with pytest.raises(
        CheckpointError, match=r"1 weight with values too large for float16: e \(up to 6.552e\+04\); use bf"
    ):
        check.finish()
    check.look("f", torch.tensor([math.nan]).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=r"1 weight with NaN or infinite numbers: f \(1 of 1\)"):
        check.finish()


def test_nothing_is_initialised_and_kernels_are_channels_last():
    assert all(p.is_meta for network in build(SD1).values() for p in network.parameters())
    tiny = loaded(tiny_state(), TINY)
    for network in tiny.values():
        for key, p in network.named_parameters():
            assert not p.requires_grad and not p.is_meta
            assert p.dim() != 4 or p.is_contiguous(memory_format=torch.channels_last), key
        assert not any(module.training for module in network.modules())
    assert isinstance(tiny["unet"].mid.attn.blocks[0].attn1, Attention)
