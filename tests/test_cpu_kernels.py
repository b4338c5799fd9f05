"""Fast paths against the plain formulas: what they change is rounding, and nobody who looks at weights can tell."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import reference_weights as reference
import torch
import torch.nn.functional as F
from common import error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sd.models.layers import FeedForward, Upsample
from sd.runtime import blockwise_attention, cpu_kernels, kernel_choice, packing
from sd.runtime.blockwise_attention import attention, blockwise
from sd.runtime.optimize import optimize, restore

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def upsampled(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


# name: the layer, the shape of its input, the plain formula
LAYERS = {
    "linear": (lambda: nn.Linear(48, 80), (2, 7, 48), F.linear),
    "linear without bias": (lambda: nn.Linear(48, 80, bias=False), (3, 48), F.linear),
    "3x3": (lambda: nn.Conv2d(32, 48, 3, padding=1), (2, 32, 9, 7), partial(F.conv2d, padding=1)),
    "1x1": (lambda: nn.Conv2d(32, 48, 1), (2, 32, 9, 7), F.conv2d),
    "halving": (lambda: nn.Conv2d(32, 32, 3, stride=2), (1, 32, 9, 8), partial(F.conv2d, stride=2)),
    "4 channels": (lambda: nn.Conv2d(4, 32, 3, padding=1), (1, 4, 8, 8), partial(F.conv2d, padding=1)),
    "upsampling": (lambda: Upsample(32), (2, 32, 5, 7), upsampled),
}


@pytest.fixture(autouse=True)
def fast_kernels():
    """Whichever are faster on this processor."""
    with kernel_choice.prefer("fast"):
        yield


def made(name, dtype=torch.float32):
    """A layer that is ready for inference, its weights as they are, and an input."""
    build, shape, formula = LAYERS[name]
    layer = optimize(build().requires_grad_(False).to(dtype).to(memory_format=torch.channels_last))
    for key, tensor in layer.state_dict().items():
        tensor.copy_(reference.normal(f"{name} {key}", tuple(tensor.shape)) / math.sqrt(tensor[0].numel() or 1))
    weights = {key.removeprefix("conv."): tensor.clone() for key, tensor in layer.state_dict().items()}
    x = reference.normal(f"{name} x", shape).to(dtype)
    return layer, weights, x, formula


def inner(layer):
    """The layer that has the weight."""
    return layer.conv if isinstance(layer, Upsample) else layer


def laid_out(layer):
    return "_packed" in inner(layer).__dict__


def formula_of(weights, x, formula):
    bias = weights.get("bias")
    return formula(x.double(), weights["weight"].double(), None if bias is None else bias.double())


needs_onednn = pytest.mark.skipif(
    not packing.onednn_dtypes(), reason="needs an x86 CPU with AVX and a torch that has oneDNN"
)


def only(dtype):
    if dtype not in packing.onednn_dtypes():
        pytest.skip(f"{dtype} has no fast path on this CPU")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_their_formula(name, dtype):
    layer, weights, x, formula = made(name, dtype)
    expected = formula_of(weights, x, formula)
    for _ in range(2):  # as it lays its weights out, and after
        assert error(layer(x), expected) < ROUNDING[dtype]
        assert layer(x).dtype == dtype
    assert laid_out(layer) == (dtype in packing.onednn_dtypes())


@pytest.mark.parametrize("name", LAYERS)
def test_other_shapes_and_strides_than_those_it_was_laid_out_for(name):
    layer, weights, x, formula = made(name)
    layer(x)
    more = torch.cat([x, 2 * x])
    assert error(layer(more), formula_of(weights, more, formula)) < 2e-6
    turned = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert error(layer(turned), formula_of(weights, x, formula)) < 2e-6
    if x.dim() == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        assert error(layer(last), formula_of(weights, x, formula)) < 2e-6
        assert layer(last).is_contiguous(memory_format=torch.channels_last)


CHANGES = {
    "zero": lambda layer: layer.weight[1:].zero_(),
    "data": lambda layer: layer.weight.data.mul_(0.5),
    "parameters": lambda layer: [p.mul_(0.5) for p in layer.parameters()],
    "numpy": lambda layer: layer.weight.numpy().__imul__(0.5),
    "state": lambda layer: layer.state_dict()["weight"].mul_(0.5),
    "load": lambda layer: layer.load_state_dict({k: v * 0.5 for k, v in layer.state_dict().items()}),
    "assign": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 0.5, requires_grad=False)),
}


@needs_onednn
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_changes_in_place_take_effect(name, change):
    """After a call, and through what was taken from the layer before it or after."""
    layer, weights, x, formula = made(name)
    layer(x)
    assert laid_out(layer)
    CHANGES[change](inner(layer))
    out = layer(x)
    assert laid_out(layer)
    changed = inner(layer).state_dict()
    assert not torch.equal(changed["weight"], weights["weight"])
    assert error(out, formula_of(changed, x, formula)) < 2e-6


@needs_onednn
@pytest.mark.parametrize("take", [lambda w: w, lambda w: w.data, lambda w: w[:1], lambda w: w.numpy()])
def test_a_weight_that_somebody_holds_is_not_packed(take):
    layer, _, x, formula = made("3x3")
    layer(x)
    held = take(layer.weight)
    for factor in (1.0, 0.5, 0.25):
        held[:1] *= factor
        out = layer(x)
        assert not laid_out(layer)
        assert error(out, formula_of(layer.state_dict(), x, formula)) < 2e-6
    del held
    layer(x)
    assert laid_out(layer)


@needs_onednn
@pytest.mark.parametrize("name", LAYERS)
def test_whoever_looks_finds_the_plain_weight(name):
    """Equal to the bit, with its strides, in its place."""
    layer, weights, x, _ = made(name)
    stride = inner(layer).weight.stride()
    out = layer(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), out)
    looks = (
        lambda y: y.state_dict(),
        lambda y: dict(y.named_parameters()),
        lambda y: pickle.loads(pickle.dumps(y)).state_dict(),
    )
    for look in looks:
        layer(x)
        assert laid_out(layer)
        found = look(inner(layer))
        assert list(found) == list(weights) and all(torch.equal(found[key], weights[key]) for key in weights)
        assert found["weight"].stride() == stride and not found["weight"].is_mkldnn
        del found
    assert torch.equal(layer.double()(x.double()).float(), layer(x.double()).float()) and not laid_out(layer)
    restore(layer)
    assert type(inner(layer)) in (nn.Linear, nn.Conv2d) and torch.equal(inner(layer).weight.float(), weights["weight"])


@needs_onednn
def test_training_after_inference():
    layer, _, x, _ = made("3x3")
    layer(x)
    layer.requires_grad_(True)
    with torch.enable_grad():
        layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0 and not laid_out(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.requires_grad_(False)(x).dtype == torch.bfloat16
    assert not laid_out(layer)


@needs_onednn
def test_threads_use_and_look_at_one_layer():
    layer, weights, x, formula = made("upsampling")
    expected = formula_of(weights, x, formula)

    def work(i):
        if i % 3 == 0:
            return torch.equal(layer.conv.weight, weights["weight"])
        with torch.no_grad():
            return error(layer(x), expected) < 2e-6

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(60)))


@pytest.mark.parametrize("name", LAYERS)
def test_where_plain_kernels_are_faster_layers_stay_as_they_are(name):
    with kernel_choice.prefer("plain"):
        layer, *_ = made(name)
    assert type(layer) in (nn.Linear, nn.Conv2d, Upsample) and type(inner(layer)) in (nn.Linear, nn.Conv2d)


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_feed_forward_layers_take_some_rows_at_a_time(dtype, monkeypatch):
    only(dtype)
    monkeypatch.setattr(cpu_kernels, "WIDE_FROM", 2**15)
    monkeypatch.setattr(cpu_kernels, "WIDE_BLOCK", 2**15)
    monkeypatch.setattr(cpu_kernels, "LEAST_ROWS", 16)
    layer = FeedForward(32).requires_grad_(False).to(dtype)
    x = reference.normal("x", (2, 150, 32)).to(dtype)
    expected = layer(x)
    optimize(layer)
    rows = []
    product = cpu_kernels.linear
    monkeypatch.setattr(cpu_kernels, "linear", lambda x, *more: rows.append(len(x)) or product(x, *more))
    assert error(layer(x), expected) < ROUNDING[dtype] and layer(x).shape == x.shape
    assert max(rows) == 2**15 // (256 * dtype.itemsize) and sum(rows) == 2 * 2 * 300

    seen = []
    hook = layer.proj.register_forward_hook(lambda module, given, out: seen.append(given[0].shape))
    assert error(layer(x), expected) < ROUNDING[dtype] and seen == [x.shape]  # whoever follows it sees one call
    hook.remove()
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        layer(given).sum().backward()
    assert given.grad.isfinite().all() and given.grad.norm() > 0
    assert type(restore(layer)) is FeedForward and torch.equal(layer(x), expected)


def test_measuring_draws_no_random_numbers(monkeypatch):
    monkeypatch.setattr(kernel_choice, "_measured", {})
    network = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3), Upsample(8)).requires_grad_(False)
    before = torch.get_rng_state()
    with kernel_choice.prefer(None):
        optimize(network)
    assert torch.equal(torch.get_rng_state(), before)
    kinds = {kind[0] for kind, _ in kernel_choice._measured}
    assert kinds == ({"linear", "convolution", "upsampling"} if packing.onednn_dtypes() else set())


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(96, 96), (192, 64)])
@pytest.mark.parametrize("name", ["3x3", "upsampling"])
def test_results_do_not_depend_on_earlier_sizes(name, channels, dtype):
    """Kernels are packed for a size of maps; after another size, the same bits, and no plain weight in between."""
    only(dtype)
    C = channels[0]
    layer = Upsample(C) if name == "upsampling" else nn.Conv2d(*channels, 3, padding=1)
    layer = optimize(layer.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False))
    maps = [reference.normal(f"{n}", (n % 3 + 1, C, n, n + 1)).to(dtype) for n in (4, 8, 12, 16, 40, 70)]
    first = []
    for x in maps:
        inner(layer).state_dict()  # restores the plain weight
        first.append(layer(x))
        assert laid_out(layer)
    for x, expected in zip(reversed(maps), reversed(first), strict=True):
        assert torch.equal(layer(x), expected) and laid_out(layer)


def test_the_compiler_is_not_imported_before_it_is_used():
    """It takes a second and 70 MB, and what torch computes with Python half of that: too much for the start."""
    code = (
        "import sys, torch, sd.pipeline; from sd.runtime.optimize import optimize;"
        "optimize(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv2d(8, 8, 3)));"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["linear", "3x3", "1x1", "upsampling"])
def test_a_network_compiled_by_its_user(name):
    layer, _, x, _ = made(name)
    network = nn.Sequential(layer, nn.SiLU())
    expected = network(x)
    compiled = torch.compile(network, backend="eager")
    for _ in range(2):
        assert error(compiled(x), expected) < 2e-6
        assert error(network(x), expected) < 2e-6
    whole = torch.compile(restore(network), backend="eager", fullgraph=True)
    assert error(whole(x), expected) < 2e-6


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_with_respect_to_the_input(name):
    layer, weights, x, formula = made(name)
    layer(x)  # laid out
    with torch.enable_grad():
        x = x.double().requires_grad_()
        formula_of(weights, x, formula).square().sum().backward()
        y = x.detach().float().requires_grad_()
        layer(y).square().sum().backward()
    assert error(y.grad, x.grad) < 2e-6


def test_no_rows_are_no_rows():
    layer = optimize(nn.Linear(8, 4).requires_grad_(False))
    for _ in range(2):  # before it is laid out, and after
        assert layer(torch.zeros(0, 8)).shape == (0, 4)
        layer(torch.ones(2, 8))
    for dtype in DTYPES:
        q, k = torch.zeros(1, 5, 64, dtype=dtype), torch.zeros(1, 600, 64, dtype=dtype)
        assert attention(q[:, :0], k, k, heads=2).shape == (1, 0, 64)
        assert attention(q[:0], k[:0], k[:0], heads=2).shape == (0, 5, 64)
        assert attention(q, k[:, :0], k[:, :0], heads=2).shape == (1, 5, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_context_for_all(dtype):
    """As scaled_dot_product_attention has it."""
    q, k, v = (reference.normal(name, (n, 600, 64)).to(dtype) for name, n in (("q", 3), ("k", 1), ("v", 1)))
    each = torch.cat([attention(one, k, v, heads=2) for one in q.split(1)])
    assert error(attention(q, k, v, heads=2), each) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_of_other_shapes(name):
    """A picture without a batch; and what is wrong is said in PyTorch's words, before and after laying out."""
    layer, weights, x, formula = made(name)
    wrong = {"linear": (3, 7), "linear without bias": (3, 7)}.get(name, (1, 7, 8, 8))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cannot be multiplied|to have \d+ channels"):
            layer(torch.ones(wrong))
        if name != "upsampling":
            assert error(layer(x[0]), formula_of(weights, x[0], formula)) < 2e-6
        layer(x)


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_functions(name):
    """Derivatives forward and backward, and many inputs at once; before and after laying out."""
    for use in (False, True):
        layer, weights, x, formula = made(name)
        if use:
            layer(x)
        there = reference.normal("tangent", tuple(x.shape))
        expected = formula(there, weights["weight"], None)
        assert error(torch.func.jvp(layer, (x,), (there,))[1], expected) < 2e-6
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, there)
            assert error(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, expected) < 2e-6
        plainly = partial(formula, weight=weights["weight"], bias=weights.get("bias"))
        ours, expected = (torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in (layer, plainly))
        assert error(ours, expected) < 1e-5
        many = torch.stack([x, 2 * x])
        assert error(torch.vmap(layer)(many)[1], layer(2 * x)) < 2e-6


@needs_onednn
@pytest.mark.parametrize("broken", [AttributeError, NotImplementedError, RuntimeError, TypeError])
def test_a_torch_whose_operators_want_something_else(broken, monkeypatch):
    def changed(*_):
        raise broken("_linear_pointwise() expected at most 5 arguments")

    monkeypatch.setattr(packing, "linear", changed)
    packing.onednn_dtypes.cache_clear()
    try:
        layer, weights, x, formula = made("linear")
        assert error(layer(x), formula_of(weights, x, formula)) < 2e-6 and not laid_out(layer)
    finally:
        packing.onednn_dtypes.cache_clear()


def textbook(q, k, v):
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, M", [(1, 1), (64, 77), (700, 600), (2100, 1030)])
@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0, 1e4])
def test_blockwise_attention_whatever_the_scores(N, M, spread, dtype):
    """Small scores take the short way, large ones the usual softmax; with the largest, one key has all the weight."""
    only(dtype)
    q, k, v = (reference.normal(name, (1, n, 64)).to(dtype) for name, n in (("q", N), ("k", M), ("v", M)))
    q = q * spread
    expected = textbook(q, k, v)
    for blocks in blockwise_attention.KERNELS[dtype].values():
        out = blockwise(q[:, None], k[:, None], v[:, None], blocks)[:, 0]
        assert out.isfinite().all()
        if dtype == torch.float32:
            assert error(out, expected) < max(2e-6, 2e-7 * spread)
        elif spread <= 10:
            assert error(out, expected) < 0.06


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", [1e-4, 1.0, 1e6, 1e20])
def test_blockwise_attention_at_the_limit(value, sign, dtype):
    """Every score at the largest or smallest that takes the short way, and values far from 1: sums do not overflow."""
    only(dtype)
    score = math.sqrt(0.99 * blockwise_attention.LARGEST_EXPONENT * math.log(2) / 8)
    q, k = torch.full((1, 1, 40, 64), sign * score).to(dtype), torch.full((1, 1, 4096, 64), score).to(dtype)
    v = (value * (1 + 0.1 * reference.normal("v", (1, 1, 4096, 64)))).to(dtype)
    expected = v.double().mean(dim=2, keepdim=True).expand(-1, -1, 40, -1)
    for blocks in blockwise_attention.KERNELS[dtype].values():
        assert error(blockwise(q, k, v, blocks), expected) < max(ROUNDING[dtype], 2e-5)


def test_attention_passes_on_what_is_not_a_number():
    q, k, v = (reference.normal(name, (1, 600, 64)) for name in "qkv")
    k[0, 3, 5] = math.nan
    for dtype in DTYPES:
        assert attention(q.to(dtype), k.to(dtype), v.to(dtype), heads=2)[..., :32].isnan().all()


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_never_holds_all_scores(dtype, fast, monkeypatch):
    """Of 8 heads and 4096 tokens, as in 512x512 pictures, they would be 134 million."""
    if not fast:
        monkeypatch.setattr(packing, "onednn_dtypes", frozenset)
    q, k, v = (reference.normal(name, (1, 4096, 8 * 40)).to(dtype) for name in "qkv")
    with Largest() as largest:
        attention(q, k, v, heads=8)
    most_threads = blockwise_attention.THREADS[1]
    at_most = most_threads * next(iter(blockwise_attention.KERNELS[dtype].values())).scores if fast else 2 * q.numel()
    assert q.numel() <= largest.numbers <= at_most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_of_one_pixel_are_good_for_every_size(dtype, layout):
    """Computed as linear layers, whose layout is not made for a size; the kernel comes back to the bit."""
    layer = optimize(nn.Conv2d(24, 40, 1).to(dtype).requires_grad_(False))
    kernel, bias = layer.weight.clone(), layer.bias.double()
    for size in ((2, 24, 5, 7), (1, 24, 16, 16), (3, 24, 1, 1)):
        x = reference.normal("x", size).to(dtype).contiguous(memory_format=layout)
        out = layer(x)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last) or layout != torch.channels_last
        assert error(out, F.conv2d(x.double(), kernel.double(), bias)) < ROUNDING[dtype]
    assert laid_out(layer) == (dtype in packing.onednn_dtypes())
    assert layer.state_dict()["weight"].equal(kernel)
    assert restore(layer).weight.equal(kernel) and layer.weight.shape == (40, 24, 1, 1)


# ------------------------------------------------------------------------------------- errors on the way


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["linear", "3x3", "upsampling"])
def test_an_error_while_packing_loses_no_weight(name, raised, monkeypatch):
    layer, _, x, _ = made(name)
    before = copy.deepcopy(layer.state_dict())

    def failing(*_):
        raise raised

    packed_layer = inner(layer)
    with monkeypatch.context() as patch:
        patch.setattr(type(packed_layer), "pack", failing)
        with pytest.raises(raised):
            layer(x)
    after = layer.state_dict()
    assert list(after) == list(before) and all(after[key].equal(before[key]) for key in before)
    del after  # which holds the weight
    layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(packing.PackedWeight, "restored", failing)
        with pytest.raises(raised):
            _ = packed_layer.weight
    assert packed_layer.weight.equal(before["conv.weight" if layer is not packed_layer else "weight"])


def test_weights_that_other_processes_share_stay_plain():
    layer, _, x, _ = made("linear")
    layer.share_memory()
    layer(x)
    assert "_packed" not in layer.__dict__
    layer.weight.zero_()
    assert layer(x).equal(layer.bias.expand(2, 7, -1))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 32), (2, 32, 9), (2, 32, 3, 4, 5)])
def test_group_norm_of_other_shapes(shape, affine):
    layer, x = nn.GroupNorm(8, 32, affine=affine).requires_grad_(False), torch.randn(shape)
    expected = layer(x)
    with torch.no_grad():
        assert optimize(layer)(x).equal(expected)


def test_upsampling_by_another_kernel():
    layer = Upsample(32).requires_grad_(False)
    layer.conv = nn.Conv2d(32, 16, 5, padding=2).requires_grad_(False)
    x = torch.randn(1, 32, 6, 6)
    expected = layer(x)
    with torch.no_grad():
        assert error(optimize(layer)(x), expected) < 1e-5
