"""LoRA: every scheme of names merges to W + scale B A, comes out again to the bit, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from common import TINY, TINY_INPAINT, manifest
from safetensors.torch import save_file
from torch import Tensor

from sd.adapters.lora import merged_weight
from sd.adapters.lora_formats import layers_of, read_lora
from sd.adapters.lora_names import LayerNames
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.key_maps import diffusers_sources
from sd.config import SD1, SD2
from sd.models.build import build
from sd.pipeline import StableDiffusion

RANK = 3
ATTENTION = ("attn1", "attn2")


@pytest.fixture
def model(tiny) -> StableDiffusion:
    return StableDiffusion(TINY, **{name: copy.deepcopy(network) for name, network in tiny.items()})


def places(networks) -> dict[tuple[str, str], tuple[int, ...]]:
    """What LoRAs may change: the matrices and kernels of U-Net and text encoder, without the tables."""
    return {
        (network, key): tuple(weight.shape)
        for network in ("unet", "text_encoder")
        for key, weight in networks[network].named_parameters()
        if weight.dim() > 1 and key not in ("token.weight", "position.weight")
    }


def weight_of(layer: tuple[str, str] | None) -> tuple[str, str]:
    assert layer is not None
    return layer[0], f"{layer[1]}.weight"


TINY_PLACES = places(build(TINY))
FULL_NAMES = LayerNames(SD1, layers_of(list(places(build(SD1)))))
THEIRS = diffusers_sources(
    TINY, {n: [k for m, k in TINY_PLACES if m == n] for n in ("unet", "text_encoder")} | {"vae": []}
)


def path(place: tuple[str, str]) -> str:
    """A weight's module in diffusers or transformers 5."""
    return THEIRS[place[0]][place[1]].key.removesuffix(".weight")


def kohya(place, te: str = "lora_te_text_model_"):
    return {"unet": "lora_unet_", "text_encoder": te}[place[0]] + path(place).replace(".", "_")


def processor(place) -> tuple[str, str, str]:
    """diffusers before PEFT: attentions in processors, text projections as linear layers, the rest as lora."""
    own, module = path(place), f"{place[0]}.{path(place)}"
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        if place[0] == "unet" and own.endswith(f".{layer}"):
            base = f"{module.removesuffix(layer)}processor.{layer.removesuffix('.0')}_lora"
            return f"{base}.down.weight", f"{base}.up.weight", f"{base}.alpha"
    if place[0] == "text_encoder":
        module = f"text_encoder.text_model.{own}"
        return f"{module}.lora_linear_layer.down.weight", f"{module}.lora_linear_layer.up.weight", f"{module}.alpha"
    return f"{module}.lora.down.weight", f"{module}.lora.up.weight", f"{module}.alpha"


def oldest_text(place) -> tuple[str, str, str]:
    own = path(place)
    for layer in ("q", "k", "v", "out"):
        if own.endswith(f".{layer}_proj"):
            base = f"text_encoder.text_model.{own.removesuffix(f'{layer}_proj')}to_{layer}_lora"
            return f"{base}.down.weight", f"{base}.up.weight", f"{base}.alpha"
    return processor(place)


def suffixed(name: Callable, *ends: str) -> Callable:
    return lambda place: tuple(f"{name(place)}.{end}" for end in ends)


KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT = ("lora_A.weight", "lora_B.weight", "alpha")
SCHEMES: dict[str, Callable] = {
    "kohya": suffixed(kohya, *KOHYA),
    "kohya te1": suffixed(lambda place: kohya(place, "lora_te1_text_model_"), *KOHYA),
    "kohya, transformers 5": suffixed(lambda place: kohya(place, "lora_te_"), *KOHYA),
    "diffusers": suffixed(lambda p: f"{p[0]}.{path(p)}", *PEFT),
    "diffusers, transformers 4": suffixed(
        lambda p: f"{p[0]}.{'text_model.' * (p[0] == 'text_encoder')}{path(p)}", *PEFT
    ),
    "diffusers, lora.down": suffixed(lambda p: f"{p[0]}.{path(p)}", "lora.down.weight", "lora.up.weight", "alpha"),
    "processors": processor,
    "processors without their word": lambda p: tuple(key.replace("processor.", "") for key in processor(p)),
    "processors, U-Net alone": lambda p: tuple(key.removeprefix("unet.") for key in processor(p)),
    "processors, oldest text": oldest_text,
    "PEFT": suffixed(lambda p: f"base_model.model.{path(p)}", *PEFT),
    "PEFT with the adapter's name": suffixed(
        lambda p: f"base_model.model.{path(p)}", "lora_A.default.weight", "lora_B.default.weight", "alpha"
    ),
    "PEFT within diffusers": suffixed(lambda p: f"{p[0]}.base_model.model.{path(p)}", *PEFT),
}


def factors(place, shape, alpha: float | None = 2.0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Random down, up and alpha for a weight, and what they add to it, computed in float64."""
    rng = torch.Generator().manual_seed(sum(map(ord, "".join(place))))
    out, width, *kernel = shape
    down = torch.randn(RANK, width, *kernel, generator=rng)
    up = torch.randn(out, RANK, *[1] * len(kernel), generator=rng)
    scale = 1.0 if alpha is None else alpha / RANK
    delta = scale * (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)
    return down, up, None if alpha is None else torch.tensor(alpha), delta


def lora_file(scheme: str, alpha: float | None = 2.0, shapes=TINY_PLACES) -> tuple[dict[str, Tensor], dict]:
    """A whole file under the names of a scheme, and what it adds to each weight."""
    tensors, deltas = {}, {}
    for place, shape in shapes.items():
        down, up, own_alpha, deltas[place] = factors(place, shape, alpha)
        keys = SCHEMES[scheme](place)
        tensors |= dict(zip(keys, (down, up, own_alpha), strict=True))
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}, deltas


def saved(tmp_path, tensors, name: str = "style.safetensors", metadata=None):
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
    else:
        torch.save(tensors, tmp_path / name)
    return tmp_path / name


def weights(model) -> dict[tuple[str, str], Tensor]:
    return {place: getattr(model, place[0]).get_parameter(place[1]).data for place in TINY_PLACES}


def unchanged(model, before: dict[tuple[str, str], Tensor]) -> bool:
    """Whether all weights are what they were, bit for bit."""
    after = weights(model)
    return all(torch.equal(after[place], before[place]) for place in before)


def same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def check(model, before, deltas, weight=1.0):
    after = weights(model)
    for place, delta in deltas.items():
        expected = before[place].double() + weight * delta
        assert torch.allclose(after[place].double(), expected, rtol=1e-6, atol=2e-6), place
        assert after[place].shape == before[place].shape and after[place].stride() == before[place].stride(), place


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.sampled(3)
def test_every_naming_scheme_merges_and_comes_out_again(scheme, model, tmp_path):
    tensors, deltas = lora_file(scheme)
    assert len(tensors) == 3 * len(TINY_PLACES)
    before, everything = weights(model), {id(p): p.data.clone() for p in model.unet.parameters()}
    assert model.add_lora(saved(tmp_path, tensors), 0.5) == "style"
    assert model.loras == {"style": 0.5}
    check(model, before, deltas, 0.5)
    model.remove_lora("style")
    assert unchanged(model, before) and model.loras == {}
    assert all(torch.equal(p.data, everything[id(p)]) for p in model.unet.parameters())


def test_names_of_the_original(model, tmp_path):
    """kohya's prefix, or none, before the names that a checkpoint has."""
    from sd.checkpoints.key_maps import original_sources

    sources = original_sources(
        TINY, {"unet": [k for n, k in TINY_PLACES if n == "unet"], "vae": [], "text_encoder": []}
    )
    for form in ("lora_unet_{flat}", "diffusion_model.{path}", "model.diffusion_model.{path}"):
        tensors, deltas = {}, {}
        for key, source in sources["unet"].items():
            old = source.key.removesuffix(".weight").removeprefix("model.diffusion_model.")
            name = form.format(path=old, flat=old.replace(".", "_"))
            down, up, alpha, deltas["unet", key] = factors(("unet", key), TINY_PLACES["unet", key])
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        before = weights(model)
        model.add_lora(saved(tmp_path, tensors))
        check(model, before, deltas)
        model.remove_lora()


@pytest.mark.parametrize("name", ["style.pt", "style.bin", "style.ckpt"])
def test_pickles_are_read_too(name, model, tmp_path):
    tensors, deltas = lora_file("kohya")
    before = weights(model)
    model.add_lora(saved(tmp_path, tensors, name))
    check(model, before, deltas)


# alpha


def test_alpha_is_the_rank_if_nobody_says(model, tmp_path):
    tensors, deltas = lora_file("kohya", alpha=None)
    before = weights(model)
    model.add_lora(saved(tmp_path, tensors))
    check(model, before, deltas)


def test_alpha_of_the_whole_file(model, tmp_path):
    tensors, _ = lora_file("kohya", alpha=None)
    before = weights(model)
    model.add_lora(saved(tmp_path, tensors | {"alpha": torch.tensor(2.0)}))
    check(model, before, lora_file("kohya")[1])


@pytest.mark.parametrize("where", ["metadata", "beside"])
def test_alpha_of_peft(where, model, tmp_path):
    settings = {"r": RANK, "lora_alpha": 2, "alpha_pattern": {"attn2.to_q": 6.0, "to_q": 2}, "use_rslora": False}
    tensors, deltas = lora_file("diffusers", alpha=None)
    if where == "metadata":
        settings = {
            f"{network}.{key}": value for network in ("unet", "text_encoder") for key, value in settings.items()
        }
        file = saved(tmp_path, tensors, metadata={"lora_adapter_metadata": json.dumps(settings)})
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        file = saved(tmp_path, tensors, "adapter_model.safetensors")
    before = weights(model)
    model.add_lora(file)
    scale = {place: 6 / RANK if path(place).endswith("attn2.to_q") else 2 / RANK for place in TINY_PLACES}
    check(model, before, {place: scale[place] * delta for place, delta in deltas.items()})


def test_patterns_of_peft_that_are_no_names_are_refused(model, tmp_path):
    """They may be any regular expression; one that is passed over would be the wrong strength, silently."""
    settings = {"unet.lora_alpha": 2, "unet.alpha_pattern": {r"^down_blocks\..*to_q": 6.0}}
    tensors, _ = lora_file("diffusers", alpha=None)
    file = saved(tmp_path, tensors, metadata={"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(CheckpointError, match=r"have the pattern .* expected the name of a layer"):
        model.add_lora(file)


def test_rank_stabilised(model, tmp_path):
    tensors, deltas = lora_file("diffusers", alpha=None)
    settings = {"unet.lora_alpha": 2, "unet.use_rslora": True}
    before = weights(model)
    model.add_lora(saved(tmp_path, tensors, metadata={"lora_adapter_metadata": json.dumps(settings)}))
    check(model, before, {p: (2 / RANK**0.5 if p[0] == "unet" else 1) * delta for p, delta in deltas.items()})


# kernels


def test_locon_with_a_kernel_in_the_middle(model, tmp_path):
    """up (mid (down x)): the kernel of the three convolutions one after the other."""
    place = "unet", "down.0.res.0.conv2.weight"
    out, width, *_ = TINY_PLACES[place]
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(RANK, width, 1, 1, generator=rng), torch.randn(out, RANK, 1, 1, generator=rng)
    mid = torch.randn(RANK, RANK, 3, 3, generator=rng)
    tensors = {f"{kohya(place)}.lora_{n}.weight": x for n, x in (("down", down), ("up", up), ("mid", mid))}
    before = weights(model)
    model.add_lora(saved(tmp_path, tensors | {f"{kohya(place)}.alpha": torch.tensor(1.5)}))
    x = torch.randn(1, width, 6, 6, generator=rng)
    conv = torch.nn.functional.conv2d
    expected = conv(x, before[place]) + 1.5 / RANK * conv(conv(conv(x, down), mid), up)
    assert torch.allclose(conv(x, weights(model)[place]), expected, rtol=1e-4, atol=1e-3)


def test_pointwise_convolutions_are_linear_layers_here(model, tmp_path):
    place = "unet", "mid.attn.proj_in.weight"
    down, up, alpha, delta = factors(place, TINY_PLACES[place])
    tensors = dict(zip(SCHEMES["kohya"](place), (down[:, :, None, None], up[:, :, None, None], alpha), strict=True))
    before = weights(model)
    model.add_lora(saved(tmp_path, tensors))
    check(model, before, {place: delta})


def test_first_layer_of_an_inpainting_model(tiny_inpaint, tmp_path):
    """Trained with 4 channels: the mask and the masked picture behind them are left alone."""
    place = "unet", "conv_in.weight"
    networks = {"unet": copy.deepcopy(tiny_inpaint.unet), "text_encoder": tiny_inpaint.text_encoder}
    down, up, alpha, delta = factors(place, TINY_PLACES[place])
    tensors = dict(zip(SCHEMES["kohya"](place), (down, up, alpha), strict=True))
    lora = read_lora(saved(tmp_path, tensors), TINY_INPAINT, networks)
    before = networks["unet"].conv_in.weight.data
    added = lora.changes[place].delta_of(before).double()
    assert torch.allclose(added[:, :4], delta, atol=1e-6) and not added[:, 4:].any()


# several, precision


def test_several_at_once_and_out_in_any_order(model, tmp_path):
    one, deltas = lora_file("kohya")
    two = {place: shape for place, shape in TINY_PLACES.items() if "attn" in place[1]}
    other, more = lora_file("diffusers", alpha=4.0, shapes=two)
    before = weights(model)
    files = [(saved(tmp_path, one, "one.safetensors"), 0.5), (saved(tmp_path, other, "two.safetensors"), -1.0)]
    assert model.add_loras(files) == ["one", "two"]
    check(model, before, {p: 0.5 * delta - more.get(p, 0) for p, delta in deltas.items()})
    model.remove_lora("one")
    check(model, before, {place: -delta for place, delta in more.items()})
    assert all(same(weights(model)[place], before[place]) != (place in two) for place in before)
    assert model.loras == {"two": -1.0}
    model.add_lora(files[0][0], 2.0)
    model.remove_lora()
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, tiny, tmp_path):
    model = StableDiffusion(TINY, **{name: copy.deepcopy(network).to(dtype) for name, network in tiny.items()})
    one, deltas = lora_file("kohya")
    before = weights(model)
    files = [(saved(tmp_path, one, f"{name}.safetensors"), 0.25) for name in ("one", "two")]
    model.add_loras(files)
    for place, delta in deltas.items():
        merged, exact = weights(model)[place], before[place].double() + 0.5 * delta
        assert merged.dtype == dtype
        # half a unit in the last place, and what float32 adds to it
        half = 0.5 * torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((merged.double() - exact).abs() <= half * 1.01 + 1e-6).all(), place
    model.remove_lora()
    assert unchanged(model, before)


def test_merged_for_good(model, tmp_path):
    tensors, deltas = lora_file("kohya")
    before = weights(model)
    file, other = saved(tmp_path, tensors), saved(tmp_path, tensors, "other.safetensors")
    model.add_loras([(file, 0.5)], removable=False)
    assert model.loras == {} and model._adapters.merged._before == {}
    check(model, before, deltas, 0.5)
    for_good = weights(model)
    model.add_lora(other, 1.0)
    model.add_loras([(file, 0.5)], removable=False)
    check(model, before, deltas, 2.0)
    model.remove_lora("other")
    check(model, before, deltas, 1.0)
    assert not torch.equal(for_good["unet", "conv_in.weight"], before["unet", "conv_in.weight"])


def test_what_float16_cannot_hold(tiny, tmp_path):
    model = StableDiffusion(TINY, **{name: copy.deepcopy(network).half() for name, network in tiny.items()})
    before = weights(model)
    with pytest.raises(ValueError, match=r"numbers beyond torch\.float16"):
        model.add_lora(saved(tmp_path, lora_file("kohya")[0]), 1e6)
    assert all(same(weights(model)[place], before[place]) for place in before) and model.loras == {}


def test_pictures(model, tmp_path):
    settings = {"height": 64, "width": 64, "steps": 2, "seed": 1}
    (before,) = model.txt2img("a cat", **settings)
    model.add_lora(saved(tmp_path, lora_file("kohya")[0]), 0.05)
    (merged,) = model.txt2img("a cat", **settings)
    model.remove_lora()
    (after,) = model.txt2img("a cat", **settings)
    assert before.tobytes() == after.tobytes() != merged.tobytes()


# What is refused


def without(tensors: dict, marker: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if marker not in key}


def cross_attention(width: int) -> dict[str, Tensor]:
    name = kohya(("unet", "down.0.attn.0.blocks.0.attn2.k.weight"))
    return {f"{name}.lora_down.weight": torch.zeros(4, width), f"{name}.lora_up.weight": torch.zeros(64, 4)}


def text_width(width: int) -> dict[str, Tensor]:
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    return {f"{name}.lora_down.weight": torch.zeros(4, width), f"{name}.lora_up.weight": torch.zeros(width, 4)}


NAME = kohya(("unet", "mid.attn.blocks.0.attn1.q.weight"))
PATH = path(("unet", "mid.attn.blocks.0.attn1.q.weight"))
GOOD = {f"{NAME}.lora_down.weight": torch.ones(4, 128), f"{NAME}.lora_up.weight": torch.ones(128, 4)}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (cross_attention(768), "made for Stable Diffusion 1.x, whose U-Net expects texts 768 wide, not 64"),
        (cross_attention(1024), "made for Stable Diffusion 2.x, whose U-Net expects texts 1024 wide"),
        (cross_attention(2048) | {"lora_te2_x.lora_down.weight": torch.zeros(1)}, "made for SDXL, .* 2048 wide"),
        (cross_attention(99), "made for another model, whose"),
        (text_width(1024), "made for Stable Diffusion 2.x, whose text encoder is 1024 wide, not 64"),
        (
            GOOD | {"lora_te2_text_model_x.alpha": torch.zeros(1)},
            r"a LoRA for SDXL .lora_te2_text_model_x.alpha., not for this model .tiny v1.: take one that",
        ),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 4)}, "a LoRA for Flux"),
        ({"transformer.single_transformer_blocks.0.x.lora_A.weight": torch.zeros(4, 4)}, "a LoRA for Flux or Hun"),
        (GOOD | {f"{NAME}.lora_up.weight": torch.ones(99, 4)}, "1 of 1 layers have the wrong shape: .* is for 99x128"),
        (GOOD | {f"{NAME}.lora_up.weight": torch.ones(128, 5)}, "have the wrong shape"),
        (GOOD | {f"{NAME}.lora_up.weight": torch.ones(128)}, "have the wrong shape"),
        (GOOD | {f"{NAME}.lora_mid.weight": torch.ones(4, 4)}, "have the wrong shape"),
        (GOOD | {f"{NAME}.lora_down.weight": torch.ones(4, 128, 3, 3)}, "is for 128x128x3x3, the model's is 128x128"),
        ({"lora_unet_nowhere.lora_up.weight": torch.zeros(1)}, "1 of 1 keys match no layer .* lora_unet_nowhere"),
        (without(GOOD, "up"), f"nothing to apply: 1 tensors without the other parts of its adapter .{NAME}.lora_down"),
        (GOOD | {f"{NAME}.alpha": torch.ones(2)}, "alpha is 2, expected one number"),
        (GOOD | {f"{NAME}.alpha": torch.tensor(float("nan"))}, "alpha of .* is not finite"),
        (
            GOOD | {f"{NAME}.lora_up.weight": torch.full((128, 4), float("inf"))},
            "not finite .NaN or infinite.: the file is",
        ),
        (GOOD | {f"{NAME}.lora_up.weight": torch.ones(128, 4, dtype=torch.int8)}, "whole numbers .int8., not weights"),
        (GOOD | {f"{NAME}.lora_A.weight": torch.zeros(4, 128)}, "two adapters for one weight: .* different numbers"),
        (GOOD | {f"unet.{PATH}.lora.down.weight": torch.zeros(4, 128)}, "two adapters for one weight: .* different"),
        (GOOD | {f"{NAME}.diff": torch.zeros(128, 128)}, "two adapters for one weight, .* and .* of"),
        ({f"{NAME}.diff": torch.full((128, 128), float("nan"))}, "not finite"),
        ({f"{NAME}.diff": torch.ones(64, 128)}, "1 of 1 layers have the wrong shape: .* is for 64x128"),
        (GOOD | {f"{NAME}.dora_scale": torch.ones(64)}, "have the wrong shape: .*dora_scale is 64"),
        ({f"{NAME}.oft_diag": torch.ones(8, 16, 16)}, "an OFT in LyCORIS's first format .* not supported"),
        ({f"base_model.model.{PATH}.oft_R.default.weight": torch.ones(8, 8)}, "an OFT of PEFT"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4)}, "not a LoRA .* a checkpoint is given with --ckpt"),
        ({"emb_params": torch.ones(1, 64)}, "an embedding with --embedding"),
        (
            {key.replace("0_self", "20_self"): x for key, x in text_width(64).items()},
            "nothing to apply: 2 tensors of text encoder layers after the last one that is run",
        ),
    ],
)
@pytest.mark.sampled(4)
def test_one_line_for_what_does_not_fit(tensors, message, model, tmp_path):
    before = weights(model)
    file = saved(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message) as refused:
        model.add_lora(file)
    assert str(refused.value).startswith(f"{file}: ") and "\n" not in str(refused.value)
    assert all(same(weights(model)[place], before[place]) for place in before)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "a"])
def test_weights_that_are_no_numbers(weight, model, tmp_path):
    with pytest.raises(ValueError, match=r"must be a (finite )?number"):
        model.add_lora(saved(tmp_path, GOOD), weight)
    assert model.loras == {}


def test_names_are_taken_once(model, tmp_path):
    file = saved(tmp_path, GOOD)
    with pytest.raises(ValueError, match=f"{file}: 'style' is merged already"):
        model.add_loras([(file, 1), (file, 1)])
    assert model.loras == {}
    model.add_lora(file)
    with pytest.raises(ValueError, match="'style' is merged already"):
        model.add_lora(file)
    with pytest.raises(ValueError, match="no LoRA 'other' was added: style"):
        model.remove_lora("other")


@pytest.mark.parametrize("text", ["{", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1e999}', "[" * 100000])
def test_hostile_settings(text, model, tmp_path):
    with pytest.raises(CheckpointError, match="settings of its adapter"):
        model.add_lora(saved(tmp_path, GOOD, metadata={"lora_adapter_metadata": text}))


# Names at full size, on the meta device


@pytest.mark.parametrize("config, file", [(SD1, "sd-v1"), (SD2, "sd-v2-base")])
def test_every_matrix_of_the_original_unet_has_its_name(config, file):
    """kohya's prefix before the names of the key manifests: each leads to a weight of that shape."""
    shapes = places(build(config))
    known = LayerNames(config, layers_of(list(shapes)))
    prefix = "model.diffusion_model."
    theirs = {key.removeprefix(prefix): entry[0] for key, entry in manifest(file).items() if key.startswith(prefix)}
    matrices = {key: shape for key, shape in theirs.items() if len(shape) > 1 and key.endswith(".weight")}
    found = {
        weight_of(known.find("lora_unet_" + key.removesuffix(".weight").replace(".", "_"))): shape
        for key, shape in matrices.items()
    }
    assert len(found) == len(matrices) == sum(network == "unet" for network, _ in shapes)
    for place, shape in found.items():
        ours = shapes[place]
        assert tuple(shape[: len(ours)]) == ours and set(shape[len(ours) :]) <= {1}, place


@pytest.mark.parametrize("config, text_layers", [(SD1, 12), (SD2, 23)])
def test_every_module_of_diffusers_has_its_names(config, text_layers):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from scripts.benchmark.references import peers

    networks = build(config)
    shapes = places(networks)
    known = LayerNames(config, layers_of(list(shapes)))
    theirs = peers(networks, config, torch.float32)
    counts = {"attentions": 0, "convolutions": 0, "text": 0}
    for network, prefixes in (("unet", ["lora_unet_"]), ("text_encoder", ["lora_te_text_model_", "lora_te1_"])):
        for name, module in theirs[network].model.named_modules():
            if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                continue
            name = name.removeprefix("text_model.")
            names = [f"{network}.{name}", *(prefix + name.replace(".", "_") for prefix in prefixes)]
            (place,) = {weight_of(known.find(name)) for name in names}
            assert shapes[place] == tuple(module.weight.shape)[: len(shapes[place])] and place[0] == network
            kind = "text" if network == "text_encoder" else "attentions" if ".attentions." in name else "convolutions"
            counts[kind] += 1
    # what kohya's trainer says that it makes: 192 modules of the U-Net, 278 with convolutions, 72 of CLIP;
    # LoCon leaves out the four layers that belong to no block
    assert counts == {"attentions": 192, "convolutions": 278 - 192 + 4, "text": 6 * text_layers}


def cross_attention_at_full_size(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.zeros(2, width), f"{name}.lora_up.weight": torch.zeros(640, 2)}


@pytest.mark.parametrize(
    "config, width, message",
    [
        (SD1, 1024, "made for Stable Diffusion 2.x, whose U-Net expects texts 1024 wide, not 768 as in this model"),
        (SD2, 768, "made for Stable Diffusion 1.x, whose U-Net expects texts 768 wide, not 1024 as in this model"),
        (SD1, 2048, "made for SDXL, whose U-Net expects texts 2048 wide, not 768 as in this model"),
        (SD2, 2048, "made for SDXL"),
        (SD1, 768, None),
        (SD2, 1024, None),
    ],
)
def test_families_by_shape(config, width, message, tmp_path):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v"
    file = saved(tmp_path, cross_attention_at_full_size(name, width))
    if message is None:
        (target,) = read_lora(file, config, build(config)).changes
        assert target == ("unet", "down.1.attn.0.blocks.0.attn2.v.weight")
        return
    with pytest.raises(CheckpointError, match=message):
        read_lora(file, config, build(config))


# as they stand in published files, and the weights that they are for, written down from diffusers' and our modules
@pytest.mark.parametrize(
    "name, place",
    [
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", ("text_encoder", "blocks.11.fc1")),
        ("lora_te_text_model_encoder_layers_0_self_attn_out_proj", ("text_encoder", "blocks.0.attn.out")),
        ("lora_unet_down_blocks_0_attentions_1_proj_in", ("unet", "down.0.attn.1.proj_in")),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
         ("unet", "mid.attn.blocks.0.attn2.out")),
        ("lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj",
         ("unet", "up.2.attn.2.blocks.0.ff.proj")),
        ("lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_ff_net_2", ("unet", "up.0.attn.0.blocks.0.ff.out")),
        ("lora_unet_down_blocks_2_downsamplers_0_conv", ("unet", "down.2.down")),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", ("unet", "up.3.up.conv")),
        ("lora_unet_up_blocks_0_resnets_0_conv_shortcut", ("unet", "up.3.res.0.skip")),
        ("lora_unet_mid_block_resnets_1_time_emb_proj", ("unet", "mid.res.1.time")),
        ("lora_unet_time_embedding_linear_2", ("unet", "time.2")),
        ("lora_unet_conv_in", ("unet", "conv_in")),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", ("unet", "down.1.attn.0.blocks.0.attn1.q")),
        ("lora_unet_output_blocks_11_1_proj_out", ("unet", "up.0.attn.2.proj_out")),
        ("unet.up_blocks.2.attentions.1.transformer_blocks.0.attn1.processor.to_out_lora",
         ("unet", "up.1.attn.1.blocks.0.attn1.out")),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora",
         ("unet", "down.0.attn.0.blocks.0.attn2.k")),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", ("unet", "mid.attn.blocks.0.attn1.out")),
        ("text_encoder.text_model.encoder.layers.5.self_attn.to_q_lora", ("text_encoder", "blocks.5.attn.q")),
        ("text_encoder.text_model.encoder.layers.5.self_attn.v_proj", ("text_encoder", "blocks.5.attn.v")),
        ("base_model.model.text_model.encoder.layers.5.mlp.fc2", ("text_encoder", "blocks.5.fc2")),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.5.mlp.fc2", ("text_encoder", "blocks.5.fc2")),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", ("unet", "mid.attn.blocks.0.attn1.q")),
    ],
)  # fmt: skip
def test_names_of_published_files(name, place):
    assert FULL_NAMES.find(name) == place


@pytest.mark.parametrize("config", [SD1, SD2, TINY])
def test_no_name_is_ambiguous(config):
    layers = layers_of(list(places(build(config))))
    one_by_one = [LayerNames(config, [layer]).paths for layer in layers]
    assert len(LayerNames(config, layers).paths) == sum(map(len, one_by_one))


def test_diffusers_reads_kohya_as_we_do(model, tmp_path):
    """What diffusers makes of a kohya file merges to the same weights."""
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    chosen = {p: shape for p, shape in TINY_PLACES.items() if "attn" in p[1] and ".ff." not in p[1]}
    tensors, deltas = lora_file("kohya", shapes=chosen)
    converted, alphas = conversion._convert_non_diffusers_lora_to_diffusers(dict(tensors))
    assert len(converted) == 2 * len(chosen) and len(alphas) == len(chosen)
    before = weights(model)
    model.add_lora(
        saved(tmp_path, converted | {k.replace(".down.weight", ""): torch.tensor(x) for k, x in alphas.items()})
    )
    check(model, before, deltas)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("scheme", ["kohya", "diffusers", "processors", "processors, oldest text"])
def test_diffusers_merges_the_same(scheme, tiny, model, tmp_path):
    """fuse_lora of a diffusers pipeline, where PEFT is installed, gives the same weights."""
    for package in ("diffusers", "transformers", "peft"):
        pytest.importorskip(package)
    from scripts.benchmark.references import peers, pipeline

    tensors, deltas = lora_file(scheme, alpha=2.0 if scheme == "kohya" else None)
    for key, tensor in tensors.items():
        if "attentions" in key and "proj_" in key and "ff" not in key and tensor.dim() == 2:
            tensors[key] = tensor[:, :, None, None]  # 1x1 convolutions there
    model.add_lora(saved(tmp_path, tensors), 0.5)
    copies = {name: copy.deepcopy(network) for name, network in tiny.items()}  # theirs are changed in place
    pipe = pipeline(peers(copies, TINY, torch.float32), TINY)
    pipe.load_lora_weights(dict(tensors))
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    theirs = {"unet": pipe.unet.state_dict(), "text_encoder": pipe.text_encoder.state_dict()}
    for place in deltas:
        key, ours = THEIRS[place[0]][place[1]].key, weights(model)[place]
        other = theirs[place[0]].get(key, theirs[place[0]].get(f"text_model.{key}")).reshape(ours.shape)
        assert (other - ours).abs().max() < 1e-6 * ours.abs().max(), place


def test_sum_keeps_the_layout():
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert merged_weight(weight, [], ("unet", "x")).is_contiguous(memory_format=torch.channels_last)


def test_an_interrupted_merge_changes_nothing(model, tmp_path, monkeypatch):
    """At any weight, in adding and in removing; after it, both can be repeated."""
    from sd.adapters import lora as merging

    before = {place: weight.clone() for place, weight in weights(model).items()}
    path = saved(tmp_path, lora_file(next(iter(SCHEMES)))[0])
    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return merged_weight(*args)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "merged_weight", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.add_lora(path)
    assert not model.loras and all(torch.equal(weight, before[place]) for place, weight in weights(model).items())
    model.add_lora(path)
    assert list(model.loras) == ["style"]
    model.remove_lora()
    assert all(torch.equal(weight, before[place]) for place, weight in weights(model).items())
