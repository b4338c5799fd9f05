"""Fast paths against the plain formulas: what they change is rounding, and nobody who looks at weights can tell."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import reference_weights as reference
import torch
import torch.nn.functional as F
from common import error
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sd.runtime import cpu_kernels as kernels
from sd.runtime.cpu_kernels import Conv2d, EnlargingConv2d, Linear, attention, plain

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def enlarged(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


# name: the layer, the shape of its input, the plain formula
LAYERS = {
    "linear": (lambda: Linear(48, 80), (2, 7, 48), F.linear),
    "linear without bias": (lambda: Linear(48, 80, bias=False), (3, 48), F.linear),
    "3x3": (lambda: Conv2d(32, 48, 3, padding=1), (2, 32, 9, 7), partial(F.conv2d, padding=1)),
    "1x1": (lambda: Conv2d(32, 48, 1), (2, 32, 9, 7), F.conv2d),
    "halving": (lambda: Conv2d(32, 32, 3, stride=2), (1, 32, 9, 8), partial(F.conv2d, stride=2)),
    "4 channels": (lambda: Conv2d(4, 32, 3, padding=1), (1, 4, 8, 8), partial(F.conv2d, padding=1)),
    "enlarging": (lambda: EnlargingConv2d(32), (2, 32, 5, 7), enlarged),
}


def made(name, dtype=torch.float32):
    """A layer that is ready for inference, its weights as they are, and an input."""
    build, shape, formula = LAYERS[name]
    layer = build().requires_grad_(False).to(dtype)
    for key, tensor in layer.state_dict().items():
        tensor.copy_(reference.normal(f"{name} {key}", tuple(tensor.shape)) / math.sqrt(tensor[0].numel() or 1))
    weights = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = reference.normal(f"{name} x", shape).to(dtype)
    return layer, weights, x, formula


def laid_out(layer):
    return layer.weight.is_mkldnn


def formula_of(weights, x, formula):
    bias = weights.get("bias")
    return formula(x.double(), weights["weight"].double(), None if bias is None else bias.double())


needs_onednn = pytest.mark.skipif(
    not kernels.onednn_dtypes(), reason="needs an x86 CPU with AVX and a torch that has oneDNN"
)


def only(dtype):
    if dtype not in kernels.onednn_dtypes():
        pytest.skip(f"{dtype} has no fast path on this CPU")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_their_formula(name, dtype):
    layer, weights, x, formula = made(name, dtype)
    expected = formula_of(weights, x, formula)
    for _ in range(2):  # as it lays its weights out, and after
        assert error(layer(x), expected) < ROUNDING[dtype]
        assert layer(x).dtype == dtype
    assert laid_out(layer) == (dtype in kernels.onednn_dtypes())


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


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_weights_can_be_read_copied_and_changed_as_ever(name, dtype):
    only(dtype)
    layer, weights, x, formula = made(name, dtype)
    out = layer(x)

    def same(state):
        return state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)

    assert laid_out(layer) and same(layer.state_dict()), "reading leaves the layout as it is"
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), out) and laid_out(layer)
    assert same(pickle.loads(pickle.dumps(layer)).state_dict())
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    assert same(torch.load(saved, weights_only=True))
    assert torch.equal(plain(layer).weight, weights["weight"]) and not laid_out(layer)

    layer(x)
    layer.load_state_dict({key: -tensor for key, tensor in weights.items()})
    assert error(layer(x), -out) < ROUNDING[dtype] and laid_out(layer)
    layer.load_state_dict(weights, assign=True)
    assert torch.equal(layer(x), out)

    wide = layer.double()
    assert not laid_out(wide) and error(wide(x.double()), formula_of(weights, x, formula)) < 1e-12
    assert same(wide.to(dtype).state_dict())


@needs_onednn
def test_changing_a_weight_that_is_laid_out_is_an_error():
    """In silence the change would be lost, or half of it."""
    layer, _, x, _ = made("enlarging")
    layer(x)
    with pytest.raises(RuntimeError):
        layer.weight.data[0] = 0
    with pytest.raises(RuntimeError):
        layer.weight.data.copy_(torch.zeros(32, 32, 3, 3))


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


def test_layers_that_are_trained_are_left_alone():
    for build, shape, _ in LAYERS.values():
        layer = build()
        x = torch.randn(shape)
        layer(x)
        with torch.enable_grad():
            layer(x).sum().backward()
        assert layer.weight.grad is not None and not laid_out(layer)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.requires_grad_(False)(x).dtype == torch.bfloat16
        assert not laid_out(layer)


def test_no_rows_are_no_rows():
    layer = Linear(8, 4).requires_grad_(False)
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
        if name != "enlarging":
            assert error(layer(x[0]), formula_of(weights, x[0], formula)) < 2e-6
        layer(x)


@pytest.mark.parametrize("name", LAYERS)
def test_biases_may_be_changed_and_trained_alone(name):
    layer, _, x, _ = made(name)
    if layer.bias is None:
        pytest.skip("it has none")
    out = layer(x)
    with torch.no_grad():
        layer.bias.add_(1)
    assert error(layer(x), out + 1) < 2e-6
    layer.bias.requires_grad_(True)
    with torch.enable_grad():
        layer(x).sum().backward()
    assert error(layer.bias.grad, torch.full_like(layer.bias, out.numel() / len(layer.bias))) < 1e-6


@needs_onednn
@pytest.mark.parametrize("name", LAYERS)
def test_training_after_painting(name):
    """Gradients never go astray: weights are plain by then, or an error says how to make them so."""
    layer, _, x, _ = made(name)
    out = layer(x)
    layer.train()
    assert not laid_out(layer)
    layer.requires_grad_(True)
    with torch.enable_grad():
        layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0

    layer, *_ = made(name)
    layer(x)
    layer.requires_grad_(True)
    assert error(layer(x), out) < 1e-6 and laid_out(layer)  # nobody wants gradients yet
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"call sd\.kernels\.plain\(network\)"):
        layer.train()(x)
    with torch.enable_grad():
        plain(layer)(x).sum().backward()
    assert layer.weight.requires_grad and layer.weight.grad.abs().sum() > 0


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


@pytest.mark.parametrize("name", LAYERS)
def test_other_weights_for_a_call(name):
    layer, weights, x, formula = made(name)
    out = layer(x)
    others = {key: 2 * tensor for key, tensor in weights.items()}
    assert error(torch.func.functional_call(layer, others, (x,)), 2 * out) < 2e-6
    assert error(layer(x), out) < 2e-6
    layer.weight = torch.nn.Parameter(-weights["weight"], requires_grad=False)
    assert error(layer(x), formula_of({**weights, "weight": -weights["weight"]}, x, formula)) < 2e-6


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
def test_graphs_are_of_the_usual_operators():
    """Compilers and tracers are given nothing of oneDNN's."""
    layer, _, x, _ = made("3x3")
    attend = torch.nn.Module()
    attend.forward = lambda x: attention(x, x, x, heads=2)
    for network, given in ((layer, x), (attend, torch.ones(1, 600, 64))):
        expected = plain(network)(given)
        plain(network)
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        assert error(compiled(given), expected) < 2e-6
        traced = torch.jit.trace(network, given, check_trace=False)
        assert error(traced(given), expected) < 2e-6 and "mkldnn" not in str(traced.inlined_graph)
    with FakeTensorMode():
        assert Conv2d(4, 8, 1).requires_grad_(False)(torch.empty(1, 4, 2, 2)).shape == (1, 8, 2, 2)


@needs_onednn
def test_two_threads_may_lay_out_the_same_layer(monkeypatch):
    layer, weights, x, formula = made("enlarging")
    both, times = threading.Barrier(2, timeout=5), []
    watched, lay_out = kernels._watched, EnlargingConv2d.lay_out

    def together(*tensors):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait()
        return watched(*tensors)

    monkeypatch.setattr(kernels, "_watched", together)
    monkeypatch.setattr(EnlargingConv2d, "lay_out", lambda *args: times.append(1) or lay_out(*args))
    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(torch.no_grad()(layer), [x, x]):
            assert error(out, formula_of(weights, x, formula)) < 2e-6
    assert len(times) == 1


@needs_onednn
@pytest.mark.parametrize("broken", [AttributeError, NotImplementedError, RuntimeError, TypeError])
def test_a_torch_whose_operators_want_something_else(broken, monkeypatch):
    def changed(*_):
        raise broken("_linear_pointwise() expected at most 5 arguments")

    monkeypatch.setattr(kernels, "_linear", changed)
    kernels.onednn_dtypes.cache_clear()
    try:
        layer, weights, x, formula = made("linear")
        assert error(layer(x), formula_of(weights, x, formula)) < 2e-6 and not laid_out(layer)
    finally:
        kernels.onednn_dtypes.cache_clear()


def textbook(q, k, v):
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, M", [(1, 1), (64, 77), (700, 600), (2100, 1030)])
@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0, 1e4])
def test_attention_by_rows_whatever_the_scores(N, M, spread, dtype):
    """Small scores take the short way, large ones the usual softmax; with the largest, one key has all the weight."""
    only(dtype)
    q, k, v = (reference.normal(name, (1, n, 64)).to(dtype) for name, n in (("q", N), ("k", M), ("v", M)))
    q = q * spread
    out = kernels._attention_by_rows(q[:, None], k[:, None], v[:, None])[:, 0]
    expected = textbook(q, k, v)
    assert out.isfinite().all()
    if dtype == torch.float32:
        assert error(out, expected) < max(2e-6, 2e-7 * spread)
    elif spread <= 10:
        assert error(out, expected) < 0.06


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", [1e-4, 1.0, 1e6, 1e20])
def test_attention_by_rows_at_the_limit(value, sign, dtype):
    """Every score at the largest or smallest that takes the short way, and values far from 1: sums do not overflow."""
    only(dtype)
    score = math.sqrt(0.99 * kernels.LARGEST_EXPONENT * math.log(2) / 8)
    q, k = torch.full((1, 1, 40, 64), sign * score).to(dtype), torch.full((1, 1, 4096, 64), score).to(dtype)
    v = (value * (1 + 0.1 * reference.normal("v", (1, 1, 4096, 64)))).to(dtype)
    expected = v.double().mean(dim=2, keepdim=True).expand(-1, -1, 40, -1)
    assert error(kernels._attention_by_rows(q, k, v), expected) < max(ROUNDING[dtype], 2e-5)


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
        monkeypatch.setattr(kernels, "onednn_dtypes", frozenset)
    q, k, v = (reference.normal(name, (1, 4096, 8 * 40)).to(dtype) for name in "qkv")
    with Largest() as largest:
        attention(q, k, v, heads=8)
    at_most = kernels.SCORES * kernels.THREADS[1] if fast else 2 * q.numel()  # however many threads there are
    assert q.numel() <= largest.numbers <= at_most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_of_one_pixel_are_good_for_every_size(dtype, layout):
    """Computed as linear layers, whose layout is not made for a size; the kernel comes back to the bit."""
    layer = Conv2d(24, 40, 1).to(dtype).requires_grad_(False)
    kernel, bias = layer.weight.clone(), layer.bias.double()
    for size in ((2, 24, 5, 7), (1, 24, 16, 16), (3, 24, 1, 1)):
        x = reference.normal("x", size).to(dtype).contiguous(memory_format=layout)
        out = layer(x)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last) or layout != torch.channels_last
        assert error(out, F.conv2d(x.double(), kernel.double(), bias)) < ROUNDING[dtype]
    assert layer.weight.is_mkldnn == (dtype in kernels.onednn_dtypes())
    assert layer.state_dict()["weight"].equal(kernel)
    assert plain(layer).weight.equal(kernel) and layer.weight.shape == (40, 24, 1, 1)
