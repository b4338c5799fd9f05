"""Whatever names and containers a file has for its networks, the same weights come out of it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from common import TINY, TINY_INPAINT, TINY_V2, manifest, tiny_state
from reference_weights import SCHEDULE, make_state_dict, save, with_ema
from safetensors.torch import save_file

from scripts import convert as program
from scripts.training.models import load_vae
from sd import StableDiffusion
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.convert import convert, describe_weights
from sd.checkpoints.detect import damaged_position_ids, identify
from sd.checkpoints.export import metadata, to_diffusers, to_original, to_own
from sd.checkpoints.inspect import inspect
from sd.checkpoints.key_maps import CLIP, OPENCLIP, UNET, VAE
from sd.checkpoints.layouts import AVERAGE, find_layouts
from sd.config import MODELS, POCKET, SD1, SD2
from sd.resources import resource

State = dict[str, torch.Tensor]


def renamed(state: State, *prefixes: tuple[str, str]) -> State:
    out = dict(state)
    for old, new in prefixes:
        out = {new + key.removeprefix(old) if key.startswith(old) else key: tensor for key, tensor in out.items()}
    return out


def only(state: State, prefix: str, new: str = "") -> State:
    return {new + key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def diffusers(state: State, config, network: str, prefix: str) -> State:
    """One network of an original state dict under diffusers' names."""
    files = to_diffusers(convert(state, config), config)
    (found,) = [tensors for name, tensors in files.items() if name.startswith(f"{network}/")]
    return {prefix + key: tensor for key, tensor in found.items()}


def diffusers_text(state: State) -> State:
    """The text encoder of SD 2 in small as transformers names it, behind the prefix of OpenCLIP."""
    return only(diffusers(state, TINY_V2, "text_encoder", ""), "text_model.", OPENCLIP)


def without(state: State, prefix: str) -> State:
    return {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}


def old_attention(state: State) -> State:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(mid_block\.attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.")
    return {pattern.sub(lambda m: f"{m[1]}{names[m[2]]}.", key): tensor for key, tensor in state.items()}


def attention_names(state: State, names: dict[str, str], *, linear: bool = False, half: str = "") -> State:
    """The layers of the VAE's attention by other names, in one half of it or both; its 1x1 convolutions as linear."""
    out = {}
    for key, tensor in state.items():
        head, mark, tail = key.partition(".mid.attn_1.")
        layer, _, leaf = tail.rpartition(".")
        if mark and layer in names and half in head:
            key = f"{head}{mark}{names[layer]}.{leaf}"
            tensor = tensor.flatten(1) if linear and tensor.dim() == 4 else tensor
        out[key] = tensor
    return out


NEW = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def resblock_names(state: State, pattern: str) -> State:
    """The layers of the U-Net's residual blocks whose keys match as diffusers names them."""
    names = {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
        "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    }  # fmt: skip
    layer = re.compile("|".join(map(re.escape, names)))
    return {
        layer.sub(lambda m: names[m[0]], key) if re.search(pattern, key) else key: tensor
        for key, tensor in state.items()
    }


def wrapped(state: State) -> State:
    """As torch.compile and DDP name weights: around the U-Net, half of the VAE, a layer of the text encoder."""
    names = ((UNET, "model._orig_mod.diffusion_model.module."), (f"{VAE}decoder.", f"{VAE}decoder._orig_mod."))
    return renamed(state, *names, (f"{CLIP}encoder.layers.1.", f"{CLIP}encoder.layers.1._orig_mod."))


def reshaped(state: State, pattern: str, shape: tuple[int, ...]) -> State:
    """Weights of two dimensions (with or without ones behind) with others."""
    return {k: t.reshape(*t.shape[:2], *shape) if re.search(pattern, k) else t for k, t in state.items()}


V1 = {
    "original": lambda s: s,
    "without text_model": lambda s: renamed(s, (CLIP, "cond_stage_model.transformer.")),
    "generative-models": lambda s: renamed(s, (CLIP, "conditioner.embedders.0.transformer.text_model.")),
    "stable-diffusion.cpp": lambda s: renamed(s, (CLIP, "te.text_model."), (VAE, "vae."), (UNET, "unet.")),
    "text encoder of diffusers": lambda s: renamed(s, (CLIP, "text_model.")),
    "text encoder of transformers 5.6": lambda s: renamed(s, (CLIP, "")),
    "U-Net without prefix": lambda s: renamed(s, (UNET, "")),
    "VAE without prefix": lambda s: renamed(s, (VAE, "")),
    "VAE of diffusers": lambda s: {**without(s, VAE), **diffusers(s, TINY, "vae", VAE)},
    "VAE of old diffusers": lambda s: {**without(s, VAE), **old_attention(diffusers(s, TINY, "vae", "vae."))},
    "U-Net of diffusers": lambda s: {**without(s, UNET), **diffusers(s, TINY, "unet", "unet.")},
    "attention of one dimension more": lambda s: reshaped(s, r"mid\.attn_1\.(q|k|v|proj_out)\.weight", (1,)),
    "attention as linear layers": lambda s: reshaped(s, r"mid\.attn_1\.(q|k|v|proj_out)\.weight", ()),
    "projections as linear layers": lambda s: reshaped(s, r"\.proj_(in|out)\.weight", ()),
    "leftovers": lambda s: {
        **s, "v_pred": torch.ones(0), "ztsnr": torch.ones(0), "denoiser.sigmas": torch.ones(9), "logvar": torch.ones(9),
        "edm_mean": torch.ones(4), "embedding_manager.x": torch.ones(2), "first_stage_model.loss.x": torch.ones(3),
        "global_step": torch.tensor(470000), "lvlb_weights": torch.ones(9),
    },
    "VAE with new names of attention": lambda s: attention_names(s, NEW),
    "VAE with new names, linear": lambda s: attention_names(s, NEW, linear=True),
    "VAE with old names, without prefix": lambda s: renamed(attention_names(s, OLD, linear=True), (VAE, "")),
    "VAE with two sets of names": lambda s: attention_names(attention_names(s, NEW, half="enc"), OLD, half="dec"),
    "VAE's middle of diffusers": lambda s: {
        **{key: tensor for key, tensor in s.items() if not re.match(rf"{VAE}\w+\.mid\.", key)},
        **{key: t for key, t in diffusers(s, TINY, "vae", VAE).items() if ".mid_block." in key},
    },
    "VAE of both diffusers": lambda s: {
        **without(s, VAE), **only(diffusers(s, TINY, "vae", ""), "encoder.", "vae.encoder."),
        **{k: t for k, t in old_attention(diffusers(s, TINY, "vae", "vae.")).items() if not k.startswith("vae.enc")},
    },
    "U-Net with blocks of diffusers": lambda s: resblock_names(s, r"input_blocks\.1\.0|middle_block\.2"),
    "U-Net's way up of diffusers": lambda s: {
        **{key: tensor for key, tensor in s.items() if "output_blocks." not in key},
        **{key: t for key, t in diffusers(s, TINY, "unet", UNET).items() if ".up_blocks." in key},
    },
    "wrapped": wrapped,
    "wrapped as a whole": lambda s: {f"module._orig_mod.{key}": tensor for key, tensor in s.items()},
    "whole CLIP": lambda s: {
        **s, f"{CLIP.removesuffix('text_model.')}vision_model.embeddings.class_embedding": torch.ones(4),
        f"{CLIP.removesuffix('text_model.')}visual_projection.weight": torch.ones(4, 4),
        f"{CLIP.removesuffix('text_model.')}logit_scale": torch.tensor(4.6, dtype=torch.float64),
    },
    "float position ids": lambda s: {**s, f"{CLIP}embeddings.position_ids": torch.linspace(0, 44, 77)[None]},
    "no position ids": lambda s: {key: tensor for key, tensor in s.items() if "position_ids" not in key},
}  # fmt: skip
V2 = {
    "original": lambda s: s,
    "generative-models": lambda s: renamed(s, (OPENCLIP, "conditioner.embedders.0.model.")),
    "OpenCLIP alone, beside": lambda s: renamed(s, (OPENCLIP, "")),
    "text encoder of diffusers": lambda s: {
        **without(s, "cond_stage_model."), **diffusers(s, TINY_V2, "text_encoder", "cond_stage_model.transformer."),
    },
    "projections as convolutions": lambda s: reshaped(s, r"\.\d\.proj_(in|out)\.weight", (1, 1)),
    "text encoder of diffusers behind OpenCLIP's prefix": lambda s: {
        **without(s, "cond_stage_model."), **diffusers(s, TINY_V2, "text_encoder", OPENCLIP),
    },
    "a layer of the text encoder of diffusers": lambda s: {
        **without(s, f"{OPENCLIP}transformer.resblocks.1."),
        **{k: t for k, t in diffusers_text(s).items() if ".encoder.layers.1." in k},
    },
    "no unused layer": lambda s: {key: tensor for key, tensor in s.items() if "resblocks.3." not in key},
}  # fmt: skip


@pytest.mark.parametrize("name, form", [("tiny-v1", form) for form in V1] + [("tiny-v2-v", form) for form in V2])
def test_every_form_gives_the_same_weights(name, form):
    state, config = tiny_state(name), TINY if name == "tiny-v1" else TINY_V2
    expected = to_own(convert(state, config))
    found = to_own(convert((V1 if name == "tiny-v1" else V2)[form](dict(state)), config))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    "form",
    [
        "VAE with two sets of names",
        "VAE's middle of diffusers",
        "U-Net with blocks of diffusers",
        "wrapped",
        "whole CLIP",
    ],
)
def test_mixed_names_go_back_to_the_original_ones(form):
    state = tiny_state()
    back = to_original(convert(V1[form](dict(state)), TINY), TINY)
    assert back.keys() == {key for key in state if not key.endswith(SCHEDULE)}
    assert all(torch.equal(tensor, state[key]) and tensor.shape == state[key].shape for key, tensor in back.items())


CLIP_TWICE = "cond_stage_model.transformer."


def twice(state: State, prefix: str, copy: str, scale: float = 2) -> State:
    """A network a second time, with other numbers."""
    return {**state, **{key: scale * tensor for key, tensor in only(state, prefix, copy).items()}}


@pytest.mark.parametrize(
    "prefix, copy, name, count",
    [
        (CLIP, CLIP_TWICE, "text encoder", 52),
        (CLIP, "conditioner.embedders.0.transformer.text_model.", "text encoder", 52),
        (VAE, "", "vae", 180),
        (UNET, "unet.", "U-Net", 324),
    ],
)
def test_of_two_copies_the_complete_one_is_taken(tmp_path, prefix, copy, name, count):
    """As merging scripts leave them: if both are complete, the one that the original code reads."""
    state = without(tiny_state(), f"{CLIP}embeddings.position_ids")
    expected = to_own(convert(state, TINY))
    both = twice(state, prefix, copy)
    states = convert(both, TINY)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in to_own(states).items())
    network = {"text encoder": "text_encoder", "U-Net": "unet"}.get(name, name)
    place = f"with the prefix {copy!r}" if copy else "without a prefix"
    said = f"{name}: found twice in the file; the one with the prefix {prefix!r} is used, "
    assert states[network].notes == (f"{said}{count} weights (of {count}) {place} are not",)
    # of an incomplete original, the copy is taken
    dropped = [key for key in state if key.startswith(prefix)][3::7]
    partial = {key: tensor for key, tensor in both.items() if key not in dropped}
    states = convert(partial, TINY)
    assert all(torch.equal(t, 2 * expected[f"{network}.{key}"]) for key, t in states[network].items())
    assert (
        f"is used, {count - len(dropped)} weights (of {count}) with the prefix {prefix!r} are not"
        in states[network].notes[0]
    )
    # of two incomplete ones, none
    neither = {key: tensor for key, tensor in partial.items() if key != copy + dropped[0].removeprefix(prefix)}
    del neither[[key for key in neither if key.startswith(copy) and (copy or "decoder." in key[:8])][5]]
    with pytest.raises(CheckpointError, match=rf"missing from the file: .* of a second {name} .*, also incomplete"):
        convert(neither, TINY)


def test_copies_are_said_of_by_everyone(tmp_path, capsys):
    save_file(twice(tiny_state(), CLIP, CLIP_TWICE), tmp_path / "a.safetensors")
    model = StableDiffusion.load(tmp_path / "a.safetensors", config=TINY, device="cpu", dtype="float32")
    assert torch.equal(parameters(model)["text_encoder.norm.bias"], tiny_state()[f"{CLIP}final_layer_norm.bias"])
    (said,) = [line for line in model.about if "twice" in line]
    with load_checkpoint(tmp_path / "a.safetensors") as file:
        report = inspect(file, TINY)
    assert said in report.notes and not report.unknown and not report.missing


def test_second_names_inside_a_block_are_said():
    both = {**attention_names(tiny_state(), NEW), **tiny_state()}
    (note,) = convert(both, TINY)["vae"].notes
    assert note.startswith("vae: 16 weights in the file under two names: first_stage_model.")
    with pytest.raises(CheckpointError, match=r"1 weight in the file that .* does not have: .*attn_1\.to_w"):
        convert({**tiny_state(), f"{VAE}decoder.mid.attn_1.to_w.weight": torch.ones(1)}, TINY)


@pytest.mark.parametrize(
    "part, form",
    [
        ("vae", lambda s: attention_names(only(s, VAE), NEW, linear=True)),
        ("vae", lambda s: {f"_orig_mod.{key}": tensor for key, tensor in only(s, VAE).items()}),
        ("text_encoder", lambda s: {f"module.text_model.{key}": tensor for key, tensor in only(s, CLIP).items()}),
        ("text_encoder", lambda s: {**only(s, CLIP, "text_model."), "vision_model.post_layernorm.bias": torch.ones(2)}),
        ("text_encoder", lambda s: twice(only(s, CLIP, "text_model."), "text_model.", "", 0.5)),
    ],
)
def test_forms_of_a_file_of_one_network(tmp_path, part, form):
    save_file({k: t.contiguous() for k, t in form(dict(tiny_state())).items()}, tmp_path / "part.safetensors")
    save_file(tiny_state(), tmp_path / "a.safetensors")
    options = {"config": TINY, "device": "cpu", "dtype": "float32", part: tmp_path / "part.safetensors"}
    model = StableDiffusion.load(tmp_path / "a.safetensors", **options)
    expected = to_own(convert(tiny_state(), TINY))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in parameters(model).items())


@pytest.mark.parametrize(
    "name, form",
    [
        ("tiny-v1", "original"),
        ("tiny-v1", "named by OpenCLIP"),
        ("tiny-v1", "projections as linear layers"),
        ("tiny-v2-v", "original"),
        ("tiny-v2-v", "text encoder of diffusers"),
        ("tiny-v2-v", "projections as convolutions"),
    ],
)
@pytest.mark.sampled(3)
def test_the_form_of_a_file_is_kept(tmp_path, monkeypatch, name, form):
    """Names of the text encoder, form of projections, activation: three facts, none of which follows from another."""
    monkeypatch.setitem(MODELS, name, TINY if name == "tiny-v1" else TINY_V2)
    config = MODELS[name]
    if form == "named by OpenCLIP":
        state = to_original(convert(tiny_state(), TINY), replace(TINY, text=(replace(TINY.text[0], names="openclip"),)))
        assert f"{OPENCLIP}transformer.resblocks.0.attn.in_proj_weight" in state
    else:
        state = (V1 if name == "tiny-v1" else V2)[form](dict(tiny_state(name)))
    a, b, c = (tmp_path / f"{letter}.safetensors" for letter in "abc")
    save_file({key: tensor.clone() for key, tensor in state.items()}, a)
    assert program.main([str(a), str(b), "--model", name]) == 0
    assert program.main([str(b), str(c), "--layout", "original"]) == 0
    with load_checkpoint(b) as own, load_checkpoint(c) as again:
        (text,) = identify(own).config.text
        assert text.activation == config.text[0].activation
        networks = (UNET, "cond_stage_model.")
        kept = {key: tuple(tensor.shape) for key, tensor in state.items() if key.startswith(networks)}
        assert {key: again.shape(key) for key in again if key in kept} == kept
        assert find_layouts(again)["text_encoder"].name == text.names == find_layouts(state)["text_encoder"].name


def test_no_two_networks_or_layouts_are_taken_for_each_other():
    for name in ("sd-v1", "sd-v1-full-ema", "sd-v1-inpainting", "sd-v2-768-v", "kl-f8-vae"):
        found = find_layouts(manifest(name))
        assert (AVERAGE in found) == ("full-ema" in name)
        if name == "kl-f8-vae":
            assert list(found) == ["vae"] and found["vae"].prefix == ""
        else:
            text = "openclip" if "v2" in name else "clip"
            assert [layout.name for layout in found.values()][:3] == [text, "original", "original"]


@pytest.mark.parametrize("name", ["sd-v1", "sd-v1-inpainting", "sd-v2-base", "sd-v2-768-v", "sd-v2-inpainting"])
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.exhaustive), torch.float16])
def test_every_full_size_manifest_is_complete(name, ema, dtype):
    """Names, shapes and types alone; test_full.py and test_full_sd2.py load such files."""
    keys = with_ema(manifest(name)) if ema else manifest(name)
    state = {k: torch.empty(s, dtype=dtype if d.is_floating_point else d, device="meta") for k, (s, d) in keys.items()}
    for weights in ("auto", "raw", *(["ema"] if ema else [])):
        states = convert(state, None, weights)
        assert [len(states[network]) for network in ("vae", "unet")] == [248, 686]
        assert all(tensor.is_meta and tensor.dtype == dtype for table in states.values() for tensor in table.values())


@pytest.mark.parametrize(
    "name, config", [("tiny-v1", TINY), ("tiny-v1-inpainting", TINY_INPAINT), ("tiny-v2-v", TINY_V2)]
)
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("ema", [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.sampled(3)
def test_every_small_manifest_loads_from_every_container(tmp_path, name, config, kind, ema):
    """In both precisions, with and without the moving average beside it."""
    state = make_state_dict(with_ema(manifest(name)))
    expected = to_own(convert(state, config, "ema" if ema else "raw"))
    state = {key: tensor for key, tensor in state.items() if ema or not key.startswith("model_ema.")}
    for dtype in (torch.float32, torch.float16):
        cast = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        if kind == "safetensors":
            save_file(cast, tmp_path / "a")
        else:
            torch.save({"state_dict": cast}, tmp_path / "a", _use_new_zipfile_serialization=kind == "zip")
        options = {"device": "cpu", "dtype": "float32", "weights": "ema" if ema else "auto"}
        model = StableDiffusion.load(tmp_path / "a", config=config, **options)
        for key, tensor in parameters(model).items():
            assert torch.equal(tensor, expected[key].to(dtype).float()), key


# ----------------------------------------------------------------------------------------------------- parts of a model


@pytest.fixture
def tiny_files(tmp_path):
    """tiny-v1 in parts: a VAE alone as it is trained, a text encoder alone, a U-Net alone, and the rest of each."""
    state = tiny_state()
    vae = {
        **only(state, VAE),
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
    }
    parts = {
        "vae.ckpt": vae, "text.safetensors": only(state, CLIP, "text_model."), "unet.safetensors": only(state, UNET),
        "no-vae.safetensors": without(state, VAE), "no-text.safetensors": without(state, "cond_stage_model."),
        "whole.safetensors": state,
    }  # fmt: skip
    for name, tensors in parts.items():
        save(tmp_path / name, {key: tensor.clone() for key, tensor in tensors.items()})
    return tmp_path


def parameters(model: StableDiffusion) -> State:
    return to_own({name: getattr(model, name).state_dict() for name in ("text_encoder", "vae", "unet")})


@pytest.mark.parametrize(
    "main, given",
    [
        ("whole.safetensors", {}),
        ("no-vae.safetensors", {"vae": "vae.ckpt"}),
        ("no-vae.safetensors", {"vae": "whole.safetensors"}),
        ("no-text.safetensors", {"text_encoder": "text.safetensors"}),
        ("unet.safetensors", {"vae": "vae.ckpt", "text_encoder": "whole.safetensors"}),
        ("whole.safetensors", {"vae": "vae.ckpt", "text_encoder": "text.safetensors"}),
    ],
)
def test_a_model_from_several_files(tiny_files, main, given):
    others = {name: tiny_files / file for name, file in given.items()}
    model = StableDiffusion.load(tiny_files / main, config=TINY, device="cpu", dtype="float32", **others)
    expected = to_own(convert(tiny_state(), TINY))
    for key, tensor in parameters(model).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("file", ["vae.ckpt", "vae of diffusers.safetensors", "whole.safetensors"])
def test_training_takes_any_vae(tiny_files, file, monkeypatch):
    """A VAE alone does not say which model it is for: --model or the model that it goes with does."""
    monkeypatch.setitem(MODELS, "tiny", TINY)
    save_file(diffusers(tiny_state(), TINY, "vae", ""), tiny_files / "vae of diffusers.safetensors")
    for config, vae in (
        load_vae(tiny_files / file, torch.device("cpu"), model="tiny"),
        load_vae(tiny_files / file, torch.device("cpu"), "tiny" if "whole" in file else None, goes_with=TINY),
    ):
        assert config == TINY
        assert torch.equal(vae.decoder.conv_in.weight, tiny_state()[f"{VAE}decoder.conv_in.weight"])
    if "whole" not in file:
        with pytest.raises(CheckpointError, match="a VAE alone: give the model that it belongs to"):
            load_vae(tiny_files / file, torch.device("cpu"))


def test_the_other_file_is_really_taken(tiny_files):
    other = {key: tensor * 2 for key, tensor in only(tiny_state(), VAE).items()}
    save_file(other, tiny_files / "double.safetensors")
    model = StableDiffusion.load(
        tiny_files / "whole.safetensors",
        config=TINY,
        device="cpu",
        dtype="float32",
        vae=tiny_files / "double.safetensors",
    )
    weight = "decoder.conv_in.weight"
    assert torch.equal(model.vae.state_dict()[weight], 2 * tiny_state()[VAE + weight])


@pytest.mark.parametrize(
    "main, given, words",
    [
        ("no-vae.safetensors", {}, "no-vae.safetensors: the file has no vae: give it with --vae"),
        ("no-text.safetensors", {}, "the file has no text encoder: give it with --text-encoder"),
        ("unet.safetensors", {}, "no text encoder and no vae: give it with --text-encoder and --vae"),
        ("unet.safetensors", {"vae": "vae.ckpt"}, "no text encoder: give it with --text-encoder"),
        ("no-vae.safetensors", {"vae": "text.safetensors"}, "text.safetensors: the file has no vae: give another one"),
        ("whole.safetensors", {"vae": "lora.safetensors"}, "lora.safetensors: this is a LoRA"),
        ("whole.safetensors", {"text_encoder": "emb.safetensors"}, "emb.safetensors: this is a textual inversion"),
        ("whole.safetensors", {"vae": "sdxl.safetensors"}, "sdxl.safetensors: the VAE of an SDXL model"),
    ],
)
def test_what_is_missing_is_said_with_the_option_that_gives_it(tiny_files, main, given, words):
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, tiny_files / "lora.safetensors")
    save_file({"emb_params": torch.ones(2, 64)}, tiny_files / "emb.safetensors")
    xl = {**only(tiny_state(), VAE, VAE), "conditioner.embedders.1.model.ln_final.weight": torch.ones(1280)}
    save_file(xl, tiny_files / "sdxl.safetensors")
    others = {name: tiny_files / file for name, file in given.items()}
    with pytest.raises(CheckpointError, match=re.escape(words)):
        StableDiffusion.load(tiny_files / main, config=TINY, device="cpu", dtype="float32", **others)


@pytest.mark.parametrize(
    "keys, words",
    [
        (only(manifest("sd-v1"), VAE), "a VAE alone: give it with --vae"),
        (manifest("kl-f8-vae"), "a VAE alone: give it with --vae"),
        (only(manifest("sd-v1"), CLIP), "a text encoder alone: give it with --text-encoder"),
        (only(manifest("sd-v2-base"), OPENCLIP), "a text encoder alone: give it with --text-encoder"),
        (without(manifest("sd-v1"), UNET), "no U-Net"),
        (only(manifest("sd-v1"), VAE + "decoder.", "decoder."), "half of a VAE|a VAE alone"),
    ],
)
def test_a_part_is_no_checkpoint(keys, words):
    state = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in keys.items()}
    with pytest.raises(CheckpointError, match=words):
        identify(state)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_of_ours_is_no_checkpoint_either(tiny_files, part):
    own = only(to_own(convert(tiny_state(), TINY)), f"{part}.", f"{part}.")
    save_file(own, tiny_files / "own.safetensors", {"sd.config": TINY.to_json()})
    flag = f"--{part.replace('_', '-')}"
    with pytest.raises(CheckpointError, match=f"own.safetensors: this is a .* alone: give it with {flag}"):
        StableDiffusion.load(tiny_files / "own.safetensors", device="cpu", dtype="float32")


def test_a_vae_says_its_scale(tiny_files):
    """A VAE of ours carries its config; SDXL's, say, has the same weights and another scale."""
    config = replace(TINY, vae=replace(TINY.vae, scale=0.5))
    own = only(to_own(convert(tiny_state(), TINY)), "vae.", "vae.")
    save_file(own, tiny_files / "own.safetensors", {"sd.config": config.to_json()})
    whole = tiny_files / "whole.safetensors"
    options = {"config": TINY, "device": "cpu", "dtype": "float32"}
    other = StableDiffusion.load(whole, vae=tiny_files / "own.safetensors", **options)
    assert other.vae.config.scale == 0.5
    assert "the VAE that is given has the scale 0.5, the model's own 0.18215: it may not fit" in other.about
    same = StableDiffusion.load(whole, vae=tiny_files / "vae.ckpt", **options)
    assert same.vae.config.scale == 0.18215 and not any("scale" in line for line in same.about)


# ---------------------------------------------------------------------------------------------------- EMA, words, ids


def test_which_of_two_u_nets(tmp_path):
    full = tiny_state("tiny-v1-full-ema")
    assert describe_weights(tiny_state()) == ""
    assert describe_weights(full).startswith("U-Net: as trained (raw)")
    assert describe_weights(full, "ema").startswith("U-Net: its moving average (EMA)")
    average = without(full, UNET)
    assert describe_weights(average).endswith("the only one in the file")
    with pytest.raises(CheckpointError, match="only the moving average"):
        convert(average, TINY, "raw")
    raw, ema = (convert(full, TINY, weights)["unet"] for weights in ("raw", "ema"))
    assert torch.equal(convert(average, TINY)["unet"]["conv_in.weight"], ema["conv_in.weight"])
    assert not torch.equal(raw["conv_in.weight"], ema["conv_in.weight"])
    save_file(full, tmp_path / "full.safetensors")
    model = StableDiffusion.load(tmp_path / "full.safetensors", config=TINY, device="cpu", dtype="float32")
    assert torch.equal(model.unet.conv_in.weight, raw["conv_in.weight"])
    assert "U-Net: as trained (raw); --weights ema takes its moving average" in model.about


def test_an_incomplete_average_is_not_taken():
    full = tiny_state("tiny-v1-full-ema")
    gone = next(key for key in full if key.startswith("model_ema.") and key.endswith("out2bias"))
    del (partial := dict(full))[gone]
    assert convert(partial, TINY)["unet"]["conv_in.weight"] is not None
    with pytest.raises(CheckpointError, match=rf"1 weight of .* missing.*{gone}"):
        convert(partial, TINY, "ema")


def test_a_short_name_stands_in_front_too(tmp_path, monkeypatch):
    """Also where the message happens to begin with the same letter."""
    monkeypatch.chdir(tmp_path)
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, "t")
    with pytest.raises(CheckpointError, match=r"^t: this is a LoRA"):
        StableDiffusion.load("t", device="cpu")


def test_added_words_are_kept():
    """DreamBooth and textual inversion enlarge the vocabulary; nobody types the new words, but a copy has them, too."""
    key = f"{CLIP}embeddings.token_embedding.weight"
    state = {k: torch.empty(shape, dtype=dtype, device="meta") for k, (shape, dtype) in manifest("sd-v1").items()}
    config = identify({**state, key: torch.empty(49410, 768, device="meta")}).config
    assert config == replace(SD1, text=(replace(SD1.text[0], vocab=49410),))
    large = replace(TINY, text=(replace(TINY.text[0], vocab=49410),))
    tokens = torch.cat([tiny_state()[key], torch.ones(2, 64)])
    states = convert({**tiny_state(), key: tokens}, large)
    assert torch.equal(to_original(states, large)[key], tokens)


@pytest.mark.parametrize("words", [(49410, 49408), (49408, 49410), (49410, 49411)])
def test_the_vocabulary_is_that_of_the_text_encoder_that_is_taken(tmp_path, words):
    """Not that of the checkpoint whose text encoder is left out."""
    key = f"{CLIP}embeddings.token_embedding.weight"
    for name, rows in zip("ab", words, strict=True):
        more = torch.full((rows - 49408, 64), 2.0)
        save_file({**tiny_state(), key: torch.cat([tiny_state()[key], more])}, tmp_path / f"{name}.safetensors")
    config = replace(TINY, text=(replace(TINY.text[0], vocab=words[0]),))
    options = {"config": config, "device": "cpu", "dtype": "float32", "text_encoder": tmp_path / "b.safetensors"}
    model = StableDiffusion.load(tmp_path / "a.safetensors", **options)
    assert model.config.text[0].vocab == len(model.text_encoder.token.weight) == words[1]


@pytest.mark.parametrize(
    "ids, damaged",
    [
        (torch.arange(77)[None], False),
        (torch.arange(77.0).half()[None], False),
        (torch.linspace(0, 44.3, 77)[None], True),
        (torch.zeros(1, 77, dtype=torch.int64), True),
    ],
)
def test_damaged_position_ids_are_said(tmp_path, ids, damaged):
    state = {**tiny_state(), f"{CLIP}embeddings.position_ids": ids}
    assert (damaged_position_ids(state) is not None) == damaged
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "a.safetensors")
    model = StableDiffusion.load(tmp_path / "a.safetensors", config=TINY, device="cpu", dtype="float32")
    assert any("position_ids" in line for line in model.about) == damaged
    written = to_original(convert(state, TINY), TINY)[f"{CLIP}embeddings.position_ids"]
    assert torch.equal(written, torch.arange(77)[None]) and written.dtype == torch.int64


def test_mixed_precisions_and_optimizer_states(tmp_path):
    state = {
        k: t.bfloat16() if k.startswith(UNET) else t.half() if k.startswith(VAE) else t for k, t in tiny_state().items()
    }
    torch.save(
        {"state_dict": state, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(9)}}}]}, tmp_path / "a.ckpt"
    )
    model = StableDiffusion.load(tmp_path / "a.ckpt", config=TINY, device="cpu", dtype="float32")
    assert torch.equal(model.unet.conv_in.weight, state[f"{UNET}input_blocks.0.0.weight"].float())


def test_names_of_the_unknown_are_said():
    with pytest.raises(CheckpointError, match=r"2 weights in the file that .* does not have: a.x, b.y"):
        convert({**tiny_state(), "a.x": torch.ones(1), "b.y": torch.ones(1)}, TINY)


def test_sd2_by_its_shapes():
    state = {k: torch.empty(shape, dtype=dtype, device="meta") for k, (shape, dtype) in manifest("sd-v2-base").items()}
    found = identify(state)
    assert found.config == SD2 and not found.decided
    # of the text encoder 23 blocks of 16 weights (4 of norms, 8 of q, k, v, out, 4 of the feed-forward), and 4
    assert [len(table) for table in convert(state, SD2).values()] == [23 * 16 + 4, 248, 686]


def test_files_of_version_0_1(tmp_path):
    """A transformer's only block was called "block", as in the first edition of the embedded model."""
    path = tmp_path / "old.safetensors"
    with load_checkpoint(resource("weights/pocket.safetensors")) as file:
        old = {re.sub(r"(?<=attn)((\.\d+)?)\.blocks\.0\.", r"\1.block.", key): file[key].clone() for key in file}
    save_file(old, path, {key: text for key, text in metadata(POCKET).items() if key != "sd.format"})
    with load_checkpoint(path) as file:
        assert find_layouts(file)["unet"].name == "own-0.1" and "sd.format" not in file.metadata
        states = convert(file)
        ours = states["unet"]["mid.attn.blocks.0.attn1.q.weight"]
        assert torch.equal(ours, file["unet.mid.attn.block.attn1.q.weight"])
        own = {key: tensor.clone() for key, tensor in to_own(states).items()}
        save_file(own, tmp_path / "new.safetensors", metadata(POCKET))
    with load_checkpoint(tmp_path / "new.safetensors") as file:
        assert find_layouts(file)["unet"].name == "own" and identify(file).config == POCKET
        again = convert(file)
        assert all(torch.equal(again["unet"][key], own[f"unet.{key}"]) for key in again["unet"])
        assert len(again["unet"]) == len(states["unet"])
    save_file(own, tmp_path / "later.safetensors", metadata(POCKET) | {"sd.format": "3"})
    with load_checkpoint(tmp_path / "later.safetensors") as file, pytest.raises(CheckpointError, match="the format 3"):
        identify(file)
