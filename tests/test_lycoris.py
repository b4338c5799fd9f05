"""LyCORIS's kinds of adapters: each against its formula written out in numpy, and against the package where it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_lora import TINY_PLACES, kohya, saved, unchanged, weights
from torch import nn

from sd.adapters.changes import Generalized, Rotation
from sd.checkpoints.checkpoint import CheckpointError
from sd.pipeline import StableDiffusion

RANK, ALPHA = 4, 2.0
LINEAR = ("unet", "down.0.attn.0.blocks.0.attn2.k.weight")
KERNEL = ("unet", "down.1.res.0.conv1.weight")
POINTWISE = ("unet", "mid.attn.proj_in.weight")
PLACES = (LINEAR, KERNEL, POINTWISE)


@pytest.fixture
def model(adaptable) -> Iterator[StableDiffusion]:
    """One for all tests, which leave nothing behind."""
    yield adaptable
    adaptable.remove_lora()


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape) / 4


def loha(rng, w: np.ndarray):
    n = math.prod(w.shape[1:])
    a1, b1, a2, b2 = (random(rng, *s) for s in ((len(w), RANK), (RANK, n), (len(w), RANK), (RANK, n)))
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": ALPHA}
    return parts, ALPHA / RANK * (a1 @ b1) * (a2 @ b2)


def loha_tucker(rng, w: np.ndarray):
    if w.ndim < 4:
        return loha(rng, w)
    parts = {f"hada_t{i}": random(rng, RANK, RANK, *w.shape[2:]) for i in "12"}
    parts |= {f"hada_w{i}_a": random(rng, RANK, w.shape[0]) for i in "12"}
    parts |= {f"hada_w{i}_b": random(rng, RANK, w.shape[1]) for i in "12"}
    one, two = (
        sum(
            np.multiply.outer(np.outer(parts[f"hada_w{i}_a"][p], parts[f"hada_w{i}_b"][q]), parts[f"hada_t{i}"][p, q])
            for p in range(RANK)
            for q in range(RANK)
        )
        for i in "12"
    )
    return parts, one * two  # alpha is the rank if nobody says


def lokr(rng, w: np.ndarray):
    out, width, *kernel = w.shape
    small, a = random(rng, 4, 8), random(rng, out // 4, RANK)
    b = random(rng, RANK, width // 8 * math.prod(kernel))
    return {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": ALPHA}, ALPHA / RANK * np.kron(small, a @ b)


def lokr_full(rng, w: np.ndarray):
    """alpha has no effect if both are whole."""
    out, width, *kernel = w.shape
    small, large = random(rng, 8, 4), random(rng, out // 8, width // 4, *kernel)
    parts = {"lokr_w1": small, "lokr_w2": large, "alpha": 123.0}
    return parts, np.kron(small, large.reshape(len(large), -1))


def lokr_factored(rng, w: np.ndarray):
    """Both factors are products; a kernel is in Tucker form."""
    out, width, *kernel = w.shape
    parts = {"lokr_w1_a": random(rng, 4, RANK), "lokr_w1_b": random(rng, RANK, 4), "alpha": ALPHA}
    if kernel:
        a, b, t = random(rng, RANK, out // 4), random(rng, RANK, width // 4), random(rng, RANK, RANK, *kernel)
        parts |= {"lokr_t2": t}
        large = np.einsum("pqhw,po,qi->oihw", t, a, b)
    else:
        a, b = random(rng, out // 4, RANK), random(rng, RANK, width // 4)
        large = a @ b
    parts |= {"lokr_w2_a": a, "lokr_w2_b": b}
    small = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    return parts, ALPHA / RANK * np.kron(small, large.reshape(len(large), -1))


def lora(rng, w: np.ndarray):
    down, up = random(rng, RANK, *w.shape[1:]), random(rng, len(w), RANK)
    return (
        {"lora_down.weight": down, "lora_up.weight": up.reshape(len(w), RANK, *[1] * (w.ndim - 2)), "alpha": ALPHA},
        ALPHA / RANK * up @ down.reshape(RANK, -1),
    )


def dora(rng, w: np.ndarray, kind=lora):
    """Norms of rows."""
    parts, delta = kind(rng, w)
    merged = w.reshape(len(w), -1) + delta.reshape(len(w), -1)
    norms = np.abs(random(rng, len(w))) + 1
    parts["dora_scale"] = norms.reshape(-1, *[1] * (w.ndim - 1))
    return parts, norms[:, None] * merged / np.sqrt((merged**2).sum(axis=1, keepdims=True)) - w.reshape(len(w), -1)


def dora_columns(rng, w: np.ndarray):
    parts, delta = loha(rng, w)
    merged = w + delta.reshape(w.shape)
    norms = np.abs(random(rng, w.shape[1])) + 1
    parts["dora_scale"] = norms.reshape(1, -1, *[1] * (w.ndim - 2))
    squares = (merged**2).sum(axis=tuple(i for i in range(w.ndim) if i != 1), keepdims=True)
    return parts, parts["dora_scale"] * merged / np.sqrt(squares) - w


def dokr(rng, w: np.ndarray):
    return dora(rng, w, lokr)


def ia3(rng, w: np.ndarray):
    factors = random(rng, len(w))
    return {"weight": factors, "on_input": 0}, factors.reshape(-1, *[1] * (w.ndim - 1)) * w


def ia3_on_input(rng, w: np.ndarray):
    factors = random(rng, 1, w.shape[1], *[1] * (w.ndim - 2)) if w.ndim > 2 else random(rng, w.shape[1])
    return {"weight": factors, "on_input": 1}, factors * w


def full(rng, w: np.ndarray):
    diff = random(rng, *w.shape)
    return {"diff": diff}, diff


def glora(rng, w: np.ndarray):
    out, width, *kernel = w.shape
    ones = [1] * len(kernel)
    a1, a2 = random(rng, width, RANK, *ones), random(rng, RANK, width, *ones)
    b1, b2 = random(rng, out, RANK, *ones), random(rng, RANK, width, *kernel)
    inside = a1.reshape(width, RANK) @ a2.reshape(RANK, width)
    delta = np.einsum("oi...,ij->oj...", w, inside) + (b1.reshape(out, RANK) @ b2.reshape(RANK, -1)).reshape(w.shape)
    parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": ALPHA}
    return parts, ALPHA / RANK * delta


def glora_first(rng, w: np.ndarray):
    """The first version of the format: up and down under each other's names."""
    parts, delta = glora(rng, w)
    return {key.translate(str.maketrans("12", "21")): x for key, x in parts.items()}, delta


def oft(rng, w: np.ndarray, limit: float = 0.0):
    blocks = random(rng, len(w) // 8, 8, 8)
    skew = blocks - blocks.transpose(0, 2, 1)
    if limit:
        skew *= min(1, limit * len(w) / np.sqrt((skew**2).sum()))
    eye = np.eye(8)
    rotated = [
        ((eye + q) @ np.linalg.inv(eye - q)).T @ rows
        for q, rows in zip(skew, w.reshape(len(blocks), 8, -1), strict=True)
    ]
    rescale = 1 + random(rng, len(w), *[1] * (w.ndim - 1))
    after = rescale * np.stack(rotated).reshape(w.shape)
    return {"oft_blocks": blocks, "rescale": rescale, "alpha": limit}, after - w


def oft_limited(rng, w: np.ndarray):
    return oft(rng, w, 0.001)


ALL = (
    loha, loha_tucker, lokr, lokr_full, lokr_factored, lora, dora, dora_columns, dokr, ia3, ia3_on_input, full, glora,
    glora_first, oft, oft_limited,
)  # fmt: skip


def tensor(x: np.ndarray | float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int64 if isinstance(x, int) else torch.float32)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_formulas(kind, model, tmp_path):
    """With weight 0.5 it is half of the change; without, the weights are what they were."""
    rng, tensors, deltas = np.random.default_rng(3), {}, {}
    before = weights(model)
    for place in PLACES:
        w = before[place].double().numpy()
        parts, delta = kind(rng, w)
        tensors |= {f"{kohya(place)}.{part}": tensor(x) for part, x in parts.items()}
        deltas[place] = torch.tensor(delta).reshape(w.shape)
    model.add_lora(saved(tmp_path, tensors), 0.5)
    after = weights(model)
    for place in PLACES:
        expected = before[place].double() + 0.5 * deltas[place]
        assert (after[place].double() - expected).abs().max() < 3e-6, place
        assert deltas[place].abs().max() > 0.01
    model.remove_lora()
    assert unchanged(model, before)


def test_several_are_computed_from_the_original_weight(model, tmp_path):
    """So their order does not matter, and one is removed without the other."""
    before = weights(model)[LINEAR]
    rng = np.random.default_rng(4)
    kinds = {kind.__name__: kind(rng, before.double().numpy()) for kind in (dora, ia3, lora)}
    files = {
        name: saved(
            tmp_path, {f"{kohya(LINEAR)}.{part}": tensor(x) for part, x in parts.items()}, f"{name}.safetensors"
        )
        for name, (parts, _) in kinds.items()
    }
    model.add_loras([(files["dora"], 0.5), (files["ia3"], -1.0)])
    model.add_lora(files["lora"], 2.0)
    weighted = {"dora": 0.5, "ia3": -1.0, "lora": 2.0}
    for names in (("dora", "ia3", "lora"), ("dora", "lora"), ("lora",)):
        expected = before.double() + sum(weighted[n] * torch.tensor(kinds[n][1]).reshape(before.shape) for n in names)
        assert set(model.loras) == set(names) and (weights(model)[LINEAR].double() - expected).abs().max() < 3e-6
        model.remove_lora(next(n for n in ("ia3", "dora", "lora") if n in names))
    assert torch.equal(weights(model)[LINEAR], before)


def test_norms_and_biases(model, tmp_path):
    """They are weights too: W + w D, removed to the bit; of a layer without bias they are named."""
    rng = torch.Generator().manual_seed(5)
    norm, layer = "down.0.attn.0.blocks.0.norm1", "down.0.attn.0.blocks.0.attn1.out"
    name, own = kohya(("unet", f"{LINEAR[1]}")).rpartition("_attn2")[0], "unet"
    keys = {
        f"{name}_norm1.w_norm": (own, f"{norm}.weight"), f"{name}_norm1.b_norm": (own, f"{norm}.bias"),
        f"{name}_attn1_to_out_0.diff_b": (own, f"{layer}.bias"),
        "lora_unet_conv_norm_out.diff": (own, "norm_out.weight"),
        "lora_te_text_model_final_layer_norm.w_norm": ("text_encoder", "norm.weight"),
    }  # fmt: skip
    parameters = {place: getattr(model, place[0]).get_parameter(place[1]) for place in keys.values()}
    before = {place: parameter.data.clone() for place, parameter in parameters.items()}
    tensors = {key: torch.randn(before[place].shape, generator=rng) for key, place in keys.items()}
    more = {f"{kohya(LINEAR)}.diff_b": torch.ones(64)}  # cross-attention keys have no bias
    with pytest.warns(UserWarning, match=r"1 of 6 tensors have no effect: 1 of biases that this model does not have"):
        model.add_lora(saved(tmp_path, tensors | more), 0.25)
    for key, place in keys.items():
        assert torch.allclose(parameters[place].data, before[place] + 0.25 * tensors[key], atol=1e-7)
    model.remove_lora()
    assert all(torch.equal(parameters[place].data, before[place]) for place in parameters)


def test_biases_and_magnitudes_of_peft(model, tmp_path):
    """lora_B.bias is scaled as the pair is; lora_magnitude_vector are norms of rows, however it is shaped."""
    place = ("unet", "down.0.attn.0.blocks.0.attn1.out.weight")
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    rng = torch.Generator().manual_seed(6)
    down, up, bias = (torch.randn(*s, generator=rng) / 4 for s in ((RANK, 64), (64, RANK), (64,)))
    norms = torch.rand(1, 64, generator=rng) + 1
    tensors = {
        f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up,
        f"{name}.lora_B.default.bias": bias, f"{name}.lora_magnitude_vector.default.weight": norms,
        f"{name}.alpha": torch.tensor(ALPHA),
    }  # fmt: skip
    before, own = weights(model)[place], model.unet.get_parameter(place[1].replace("weight", "bias"))
    own_before = own.data.clone()
    model.add_lora(saved(tmp_path, tensors))
    merged = before.double() + ALPHA / RANK * up.double() @ down.double()
    expected = norms.double().T * merged / merged.norm(dim=1, keepdim=True)
    assert torch.allclose(weights(model)[place].double(), expected, atol=1e-6)
    assert torch.allclose(own.data, own_before + ALPHA / RANK * bias, atol=1e-7)


def test_the_scalar_and_the_scale_of_lycoris(model, tmp_path):
    before = weights(model)[LINEAR]
    parts, delta = lora(np.random.default_rng(7), before.double().numpy())
    tensors = {f"{kohya(LINEAR)}.{part}": tensor(x) for part, x in parts.items()}
    for more, factor in (({"scalar": 0.5}, 0.5), ({"scale": 3.0}, 3.0 * RANK / ALPHA), ({"alpha": 0.0}, RANK / ALPHA)):
        file = saved(tmp_path, tensors | {f"{kohya(LINEAR)}.{part}": tensor(x) for part, x in more.items()})
        notes: list[str] = []
        model.add_lora(file, note=notes.append)
        assert ["1 layer has alpha 0" in note for note in notes] == [True] * ("alpha" in more)
        assert (weights(model)[LINEAR].double() - before - factor * torch.tensor(delta)).abs().max() < 3e-6, more
        model.remove_lora()


def test_butterflies_are_rotations():
    """Lengths of columns stay, and each of the m stages mixes outputs further apart."""
    rng = torch.Generator().manual_seed(8)
    weight = torch.randn(32, 5, generator=rng)
    change = Rotation({"oft_blocks": torch.randn(3, 4, 8, 8, generator=rng) / 4}, 0.0)
    assert Rotation.shape({"oft_blocks": (3, 4, 8, 8)}, (32, 5)) == (32, 5)
    assert Rotation.shape({"oft_blocks": (3, 4, 7, 7)}, (32, 5)) is None
    assert torch.allclose((weight + change.delta(weight)).norm(dim=0), weight.norm(dim=0), rtol=1e-5)
    for stages, reach in ((1, 8), (2, 16), (3, 32)):  # outputs that each one depends on
        first = Rotation({"oft_blocks": change.tensors["oft_blocks"][:stages]}, 0.0)
        mixed = (torch.eye(32) + first.delta(torch.eye(32))).abs() > 1e-6
        assert (mixed.sum(dim=0) == reach).all()
    assert Generalized.shape({"a1": (3, 3), "a2": (2, 2), "b1": (1, 1), "b2": (1, 1)}, (32, 5)) is None


def test_the_first_layer_of_an_inpainting_model(tiny_inpaint, tmp_path):
    """Changes for 4 channels are those of its first 4; a rotation of outputs, as (IA)3, has no number of inputs."""
    model = StableDiffusion(
        tiny_inpaint.config,
        **{name: copy.deepcopy(getattr(tiny_inpaint, name)) for name in ("text_encoder", "vae", "unet")},
    )
    place = ("unet", "conv_in.weight")
    for kind in (full, dora, ia3_on_input, loha):
        before = model.unet.conv_in.weight.data
        parts, delta = kind(np.random.default_rng(9), before[:, :4].double().numpy())
        file = saved(tmp_path, {f"{kohya(place)}.{part}": tensor(x) for part, x in parts.items()})
        model.add_lora(file)
        added = model.unet.conv_in.weight.data.double() - before
        assert (added[:, :4] - torch.tensor(delta).reshape(64, 4, 3, 3)).abs().max() < 3e-6 and not added[:, 4:].any()
        model.remove_lora()


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"lokr_w1": (4, 4), "lokr_w2": (5, 5)}, "is for 20x20, the model's is 64x64"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (3, 16)}, "match neither each other"),
        (
            {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 9)},
            "match neither each other",
        ),
        (
            {"a1.weight": (64, 2), "a2.weight": (2, 64), "b1.weight": (64, 2), "b2.weight": (2, 9)},
            "match neither each other",
        ),
        (
            {"lokr_w1": (4, 4), "lokr_w2_a": (2, 16), "lokr_w2_b": (2, 16), "lokr_t2": (2, 2, 1, 1, 1)},
            "match neither each other",
        ),
        ({"oft_blocks": (3, 8, 8)}, "match neither each other"),
        ({"oft_blocks": (8, 8)}, "match neither each other"),
        ({"weight": (9,), "on_input": ()}, "match neither each other"),
        ({"hada_w1_a": (64, 2), "hada_w1_b": (2, 64)}, "nothing to apply: 2 tensors without the other parts"),
        ({"lora_down.weight": (0, 64), "lora_up.weight": (64, 0)}, "nothing to apply: 2 tensors of rank 0"),
        ({"lora_down.weight": (64,), "lora_up.weight": (64, 2)}, "match neither each other"),
        ({"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "dora_scale": (1, 9)}, "dora_scale is 1x9"),
        ({"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "scale": (2,)}, "scale is 2, expected one number"),
        ({"diff": (64, 64), "diff_b": (9,)}, "diff_b is 9, not 64"),
    ],
)
def test_parts_that_do_not_fit(parts, message, model, tmp_path):
    name = kohya(("unet", "down.0.attn.0.blocks.0.attn1.out.weight"))
    file = saved(tmp_path, {f"{name}.{part}": torch.ones(shape) for part, shape in parts.items()})
    with pytest.raises(CheckpointError, match=message):
        model.add_lora(file)


# ------------------------------------------------------------------------------------------- the package itself

OF_PACKAGE = [
    ("LoConModule", {"use_tucker": True}), ("LoConModule", {"rs_lora": True}),
    ("LoConModule", {"weight_decompose": True}),
    ("LoConModule", {"weight_decompose": True, "wd_on_out": False}), ("LohaModule", {"use_tucker": True}),
    ("LohaModule", {"weight_decompose": True}), ("LokrModule", {"factor": 4}), ("LokrModule", {"use_tucker": True}),
    ("LokrModule", {"decompose_both": True, "factor": 8}), ("LokrModule", {"full_matrix": True}),
    ("LokrModule", {"weight_decompose": True, "wd_on_out": False}), ("IA3Module", {}),
    ("IA3Module", {"train_on_input": True}), ("FullModule", {}), ("NormModule", {}), ("GLoRAModule", {}),
    ("DiagOFTModule", {"rescaled": True}), ("DiagOFTModule", {"constraint": 0.01}),
    ("ButterflyOFTModule", {"rescaled": True}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", OF_PACKAGE, ids=lambda value: str(value))
def test_lycoris_merges_the_same(name, options, model, tmp_path):
    """Its modules with random numbers, saved and merged by us.

    For LoHa and LoKr, the merge of LyCORIS 4.1.3 multiplies by alpha / r twice, unlike the same module in training, and
    unlike the web UIs: so alpha is the rank there.
    """
    modules = pytest.importorskip("lycoris.modules")
    rng = torch.Generator().manual_seed(10)
    places = [("unet", "down.0.attn.0.blocks.0.norm1.weight")] if name == "NormModule" else PLACES
    tensors, expected = {}, {}
    for place in places:
        weight = model.unet.get_parameter(place[1])
        if weight.dim() == 1:
            layer: nn.Module = nn.LayerNorm(len(weight))
        elif weight.dim() == 2:
            layer = nn.Linear(weight.shape[1], weight.shape[0])
        else:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        layer.weight.data = weight.data.clone()
        alpha = RANK if name in ("LohaModule", "LokrModule") else ALPHA
        module = getattr(modules, name)("x", layer, 1.0, lora_dim=RANK, alpha=alpha, **options)
        for key, parameter in module.named_parameters():
            numbers = torch.randn(parameter.shape, generator=rng) / 4
            parameter.data = parameter.data * (1.5 + numbers) if key in ("dora_scale", "rescale") else numbers
        if name == "FullModule":
            kept = {"diff": module.weight.data}
        else:
            kept = {key: x.detach() for key, x in module.state_dict().items() if key != "dtype_tensor"}
        where = kohya(place) if place in TINY_PLACES else norm_name(place)
        tensors |= {f"{where}.{key}": x for key, x in kept.items()}
        expected[place] = module.get_merged_weight(1.0, weight.shape)[0].detach()
    if name == "NormModule":
        tensors = {key: x for key, x in tensors.items() if "w_norm" in key}
    model.add_lora(saved(tmp_path, tensors))
    for place, merged in expected.items():
        assert (model.unet.get_parameter(place[1]).data - merged).abs().max() < 1e-5, place


def norm_name(place: tuple[str, str]) -> str:
    return kohya(LINEAR).rpartition("_attn2")[0] + "_" + place[1].split(".")[-2]
