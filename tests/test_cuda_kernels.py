"""Layers for GPUs against the plain ones, without a GPU: Triton's interpreter computes what its kernels would.

The interpreter has to be chosen before triton is imported, so it has a process of its own, which the functions
`..._errors` run in; with a GPU, they run there as well. What needs no kernel of Triton is tested in this process.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from unittest import mock

import pytest
import reference_weights as reference
import safetensors.torch
import test_changed_weights as changed
import torch
import torch.nn.functional as F
from common import error
from torch import nn

from sd.conditioning import Conditioning
from sd.config import UNetConfig, VAEConfig
from sd.models import layers
from sd.models.unet import UNet
from sd.models.vae import VAE
from sd.runtime import cuda_graphs, cuda_kernels
from sd.runtime.optimize import optimize, restore

CUDA = torch.device("cuda")
SMALL_UNET = UNetConfig(channels=(32, 96), heads=(2, 3), depth=(1, 1), blocks=1, context=16)
SMALL_VAE = VAEConfig(channels=(32, 96), blocks=1)
# Largest errors, relative; the interpreter rounds down in bfloat16, where a GPU rounds to nearest
ROUNDING = {torch.float32: 4e-7, torch.float16: 4e-4, torch.bfloat16: 4e-3}
DTYPES = list(ROUNDING)

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs triton (tests/requirements.txt)")


@contextmanager
def chosen(*names: str):
    """Take the first of these kernels that is a candidate; gives a count of what was taken."""
    taken: Counter[str] = Counter()

    def choose(kind, candidates, example):
        assert candidates[0] == "plain" and all(isinstance(word, str | int) for word in kind)
        name = next((name for name in names if name in candidates), "plain")
        taken[f"{kind[0]}: {name}"] += 1
        return name

    with mock.patch.object(cuda_kernels, "fastest", choose):
        yield taken


def as_on_gpu(network, memory_format=torch.channels_last):
    """A network in the layout of loaded weights, and a copy of it with the layers for GPUs."""
    plain = network.requires_grad_(False).eval().to(memory_format=memory_format)
    return plain, optimize(copy.deepcopy(plain), CUDA)


def filled(network, scale=1.0):
    """The network with weights that do not depend on the order of tests, and biases that are not zero."""
    for name, tensor in network.state_dict().items():
        usual = 1 + 0.1 * reference.normal(name, tuple(tensor.shape))
        fan = tensor[0].numel()
        tensor.copy_(reference.normal(name, tuple(tensor.shape)) * scale / math.sqrt(fan) if fan > 1 else usual)
    return network


# ------------------------------------------------------------------------------------- in the interpreter, or on a GPU


def start_interpreter():
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    cuda_kernels._interpreted = True


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function in the process of the interpreter."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_interpreter)
        pool.submit(int).result()
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


KERNELS = {  # name -> whether it is one kernel, whether SiLU follows
    "two kernels": (False, True),
    "one": (True, False),
    "two, without SiLU": (False, False),
    "one, with SiLU": (True, True),
}
USUAL = tuple(KERNELS)[:2]


def group_norm_errors(shape, groups, dtype, device="cpu", shift=0.5, zeros=0, kernels=USUAL):
    """Errors against float64, by kernel; the first rows of the map are zeros."""
    from sd.runtime import triton_kernels

    C = shape[1]
    x = reference.normal("x", shape) * torch.linspace(0.5, 2, shape[0])[:, None, None, None] + shift
    x[:, :, :zeros] = 0
    weight, bias = 1 + 0.2 * reference.normal("weight", (C,)), reference.normal("bias", (C,))
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = weight.to(device, dtype), bias.to(device, dtype)
    expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    errors = {}
    for name in kernels:
        whole, silu = KERNELS[name]
        y = triton_kernels.group_norm(x, groups, weight, bias, 1e-5, silu=silu, whole=whole)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        errors[name] = error(y, F.silu(expected) if silu else expected)
    return errors


def in_one_part(*given):
    """`group_norm_errors` where several tiles, one after the other, make a part."""
    from sd.runtime import triton_kernels

    with mock.patch.object(triton_kernels, "PROGRAMS", 1):
        return group_norm_errors(*given)


def geglu_errors(shape, dtype, device="cpu", scale=1.0):
    from sd.runtime import triton_kernels

    x = (scale * reference.normal("x", shape)).to(device, dtype)
    value, gate = x.double().chunk(2, dim=-1)
    y = triton_kernels.geglu(x)
    assert y.dtype == dtype and y.is_contiguous()
    return error(y, value * F.gelu(gate))


def geglu_of(values, gates, dtype):
    """GEGLU of each value with each gate: by the kernel, and by the plain operators."""
    from sd.runtime import triton_kernels

    x = torch.tensor([[value, gate] for value in values for gate in gates], dtype=dtype)
    value, gate = x.chunk(2, dim=-1)
    return triton_kernels.geglu(x), F.gelu(gate).mul_(value)


def network_errors(name, dtype, device, *kernels):
    """Error of a network with the layers for GPUs, the kernels that were taken, all its layers, error once restored."""
    network = filled((UNet(SMALL_UNET) if name == "U-Net" else VAE(SMALL_VAE)).requires_grad_(False))
    plain, fast = as_on_gpu(network.to(device, dtype))
    given = reference.normal("x", (1, 4, 8, 6)).to(device, dtype).contiguous(memory_format=torch.channels_last)
    used = fast
    if name == "U-Net":
        rest = torch.tensor([981.5]).to(device), Conditioning(reference.normal("c", (1, 77, 16)).to(device, dtype))
        run = [lambda net=net: net(given, *rest) for net in (plain, fast)]
    else:
        run = [lambda net=net: net.decode(given) for net in (plain, fast)]
        used = fast.decoder
    expected = run[0]()
    with chosen(*kernels) as taken:
        differs = error(run[1](), expected)
    layers_for_gpus = Counter(type(module).__name__ for module in used.modules())
    restore(fast)
    assert [type(module) for module in fast.modules()] == [type(module) for module in plain.modules()]
    return differs, taken, layers_for_gpus, error(run[1](), expected)


MAPS = {  # (B, C, H, W), groups, precisions: groups of the channels that SD 1 has, in few pixels
    "320": ((1, 320, 5, 7), 32, *DTYPES),
    "640": ((1, 640, 3, 3), 32, torch.float16),
    "960": ((1, 960, 2, 2), 32, torch.float32),
    "1280": ((1, 1280, 2, 2), 32, torch.float16),
    "1920": ((1, 1920, 2, 1), 32, torch.float32),
    "2560": ((1, 2560, 1, 1), 32, torch.float16),
    "VAE 128": ((1, 128, 13, 11), 32, torch.bfloat16),
    "VAE 256": ((1, 256, 3, 3), 32, torch.float32),
    "VAE 512": ((1, 512, 3, 3), 32, torch.float16),
    "one group, 22 parts": ((1, 24, 64, 43), 1, torch.float32),
    "6 groups": ((3, 90, 3, 5), 6, torch.float32),
    "one channel each": ((2, 32, 3, 1), 32, torch.float32),
}


@needs_triton
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.sampled(3)
def test_group_norm_is_its_formula(name, interpreted):
    shape, groups, *dtypes = MAPS[name]
    for dtype in dtypes:
        errors = interpreted(group_norm_errors, shape, groups, dtype)
        assert max(errors.values()) < ROUNDING[dtype], (dtype, errors)


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560, 128, 256, 512])
@pytest.mark.parametrize("batch, height, width", [(2, 1, 1), (1, 7, 11)])
def test_group_norm_of_all_channels(channels, batch, height, width, dtype, interpreted):
    shape = batch, channels, height, width
    errors = interpreted(group_norm_errors, shape, 32, dtype, "cpu", 0.5, 0, tuple(KERNELS))
    assert max(errors.values()) < ROUNDING[dtype]


@needs_triton
@pytest.mark.parametrize("zeros", [0, 1])
@pytest.mark.parametrize("parts", ["one part", "many"])
def test_group_norm_far_from_zero(parts, zeros, interpreted):
    """Where the mean is thousands of deviations, or the first rows differ from all others.

    With a sum of squares, the variance would be off by its own size.
    """
    function = in_one_part if parts == "one part" else group_norm_errors
    errors = interpreted(function, (1, 80, 20, 30), 8, torch.float32, "cpu", 4000.0, zeros)
    assert max(errors.values()) < 1e-6, errors


def constant_errors(value):
    from sd.runtime import triton_kernels

    x = torch.full((1, 64, 9, 9), value).contiguous(memory_format=torch.channels_last)
    bias = reference.normal("bias", (64,))
    out = [triton_kernels.group_norm(x, 32, torch.ones(64), bias, 1e-5, whole=whole) for whole in (False, True)]
    return [float((y - bias[:, None, None]).abs().max()) for y in out]


@needs_triton
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_group_norm_of_a_constant_is_the_bias(value, interpreted):
    assert max(interpreted(constant_errors, value)) < 1e-6


def not_numbers():
    from sd.runtime import triton_kernels

    x = torch.ones(1, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    x[0, 3, 5, 5] = math.nan
    one = torch.ones(64)
    norms = [triton_kernels.group_norm(x, 32, one, one, 1e-5, silu=True, whole=whole) for whole in (False, True)]
    tokens = torch.ones(3, 8)
    tokens[0, 2] = tokens[1, 5] = math.nan
    return [norm.isnan() for norm in norms], triton_kernels.geglu(tokens).isnan()


@needs_triton
def test_what_is_not_a_number_is_passed_on(interpreted):
    """To all of its group of two channels, and to its own place."""
    norms, tokens = interpreted(not_numbers)
    for norm in norms:
        assert norm[:, 2:4].all() and norm.sum() == norm[:, 2:4].numel()
    assert tokens.nonzero().tolist() == [[0, 2], [1, 1]]


@needs_triton
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 5, 2 * 1280), torch.float16), ((3, 2 * 5120), torch.bfloat16), ((1, 2, 2 * 2560), torch.float32),
        ((2, 33, 2 * 40), torch.float32), ((1, 1, 2 * 1), torch.float32), ((2, 70, 2 * 64), torch.float32),
    ],
)  # fmt: skip
def test_geglu_is_its_formula(shape, dtype, interpreted):
    assert interpreted(geglu_errors, shape, dtype) < ROUNDING[dtype]
    assert interpreted(geglu_errors, shape, dtype, "cpu", 20.0) < ROUNDING[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_geglu_at_extreme_values(dtype, interpreted):
    """The tails of the error function, the largest numbers, and those beyond them."""
    gates = [-6e4, -100, -10, -6, -5, -3, -1, -1e-4, 0, 1e-4, 1, 3, 5, 6, 10, 100, 6e4]
    values = [-6e4, -1.0, 0.0, 1e-4, 3.0, 6e4]
    ours, plain = interpreted(geglu_of, values, gates, dtype)
    finite = plain.isfinite()
    assert ours[~finite].equal(plain[~finite]) and (dtype == torch.float32) == bool(finite.all())
    torch.testing.assert_close(ours[finite], plain[finite], rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


@pytest.mark.exhaustive
@needs_triton
@pytest.mark.parametrize("name, kernel", [("U-Net", "triton"), ("VAE", "triton, one kernel")])
def test_networks_with_all_kernels(name, kernel, interpreted):
    kernels = "joined", kernel, "triton"
    differs, taken, all_layers, restored = interpreted(network_errors, name, torch.float32, "cpu", *kernels)
    assert differs < 5e-6 and restored == 0
    norms = [taken.pop(f"{kind}: {kernel}") for kind in ("group norm", "group norm and SiLU")]
    assert sum(norms) == all_layers["GroupNorm"] > 10
    assert taken.pop("q, k, v: joined") == all_layers["Attention"]
    assert taken == ({"GEGLU: triton": all_layers["FeedForward"]} if name == "U-Net" else {})


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["U-Net", "VAE"])
def test_networks_with_all_kernels_in_half_precision(name, dtype, interpreted):
    differs, *_, restored = interpreted(network_errors, name, dtype, "cpu", "joined", "triton")
    assert differs < 20 * ROUNDING[dtype] and restored == 0


# ------------------------------------------------------------------------------------- compiled, for GPUs


@pytest.mark.exhaustive
@needs_triton
@pytest.mark.parametrize("capability", [80, pytest.param(75, marks=pytest.mark.exhaustive)])
def test_kernels_compile_for_gpus(capability, tmp_path, monkeypatch):
    """To machine code, which needs no GPU; and numbers are read in large words where groups allow it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("triton was imported for interpreting")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sd.runtime import triton_kernels

    def compiled(kernel, **constants):
        kinds = {"partial": "*fp32", "eps": "fp32"} | dict.fromkeys(("x", "y", "weight", "bias"), "*fp16")
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(kernel, signature, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert made.asm["cubin"]
        return made.asm["ptx"]

    size, tile, lanes = triton_kernels.tile_of(1280, 32)
    sizes = {"CHANNELS": 1280, "SIZE": size, "TILE": tile, "LANES": lanes}
    made = [
        compiled(triton_kernels.partial_moments, **sizes),
        compiled(triton_kernels.normalise_part, SILU=True, **sizes),
        compiled(triton_kernels.normalise_whole, SILU=False, **sizes),
        compiled(triton_kernels.gated, WIDTH=1280, COLUMNS=256),
    ]
    assert all("ld.global.v4.b32" in ptx for ptx in made)
    # Triton compiles arguments in that are 1
    compiled(triton_kernels.partial_moments, pixels=1, share=1, **sizes)
    compiled(triton_kernels.normalise_part, pixels=1, share=1, SILU=True, **sizes)
    compiled(triton_kernels.normalise_whole, pixels=1, SILU=False, **sizes)
    compiled(triton_kernels.gated, rows=1, WIDTH=40, COLUMNS=64)


# ------------------------------------------------------------------------------------- which layers run, and when


@pytest.fixture
def as_gpu(monkeypatch):
    """Tensors of the CPU are taken for those of a GPU; triton's place is taken by plain operators."""

    class Kernels:
        @staticmethod
        def group_norm(x, groups, weight, bias, eps, silu=False, whole=False):
            y = F.group_norm(x, groups, weight, bias, eps)
            return F.silu(y) if silu else y

        @staticmethod
        def geglu(x):
            value, gate = x.chunk(2, dim=-1)
            return value * F.gelu(gate)

    monkeypatch.setattr(cuda_kernels, "_interpreted", True)
    monkeypatch.setattr(cuda_kernels, "_triton", lambda: Kernels)


def block():
    return filled(layers.ResBlock(32, 64, 1e-5))


def map_of(*shape):
    return reference.normal("x", shape).contiguous(memory_format=torch.channels_last)


def with_gradients(layer, x):
    with torch.enable_grad():
        return layer(x.clone().requires_grad_())


def with_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x).float()


LAYERS = {  # a layer, its input, how many kernels it takes
    "norm": (lambda: nn.GroupNorm(8, 32), lambda: map_of(2, 32, 5, 3), 1),
    "residual block": (block, lambda: map_of(2, 32, 5, 3), 2),
    "feed-forward": (lambda: layers.FeedForward(32), lambda: reference.normal("x", (2, 5, 32)), 1),
    "attention": (lambda: layers.Attention(32, 2), lambda: reference.normal("x", (2, 5, 32)), 1),
}
CALLS = {  # what the kernels cannot do: a call of a layer with the input x
    "gradients": with_gradients,
    "autocast": with_autocast,
    "another precision than the weights'": lambda layer, x: refused(layer, x.double()),
    "vmap": lambda layer, x: torch.vmap(layer)(x[None])[0],
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[0],
    "compiled": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
}


UNABLE = {*((name, way) for name in ("norm", "residual block") for way in ("vmap", "jvp")), ("attention", "jvp")}


def refused(layer, x):
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        layer(x)
    return torch.ones(1)


@pytest.mark.parametrize("way", [None, *CALLS])
@pytest.mark.parametrize("name", LAYERS)
def test_calls_that_kernels_cannot_do_are_plain(name, way, as_gpu):
    if (name, way) in UNABLE:
        pytest.skip("PyTorch's own layer cannot do it on a CPU")
    make, given, kernels = LAYERS[name]
    plain, fast = as_on_gpu(filled(make()))
    call = CALLS.get(way, lambda layer, x: layer(x))
    with chosen("triton", "joined") as taken:
        out = call(fast, given())
    assert sum(taken.values()) == (0 if way else kernels)
    assert error(out, call(plain, given())) < 1e-6


def test_maps_of_other_layouts_and_shapes(as_gpu):
    plain, fast = as_on_gpu(filled(nn.GroupNorm(8, 32)))
    maps = (
        map_of(2, 32, 5, 3).contiguous(), map_of(2, 32, 5, 6)[..., ::2], map_of(1, 32, 3, 4)[:, :, 0],
        map_of(0, 32, 4, 4), map_of(2, 64, 4, 4)[:, ::2], map_of(2, 64, 4, 4)[:, :32], map_of(2, 32, 1, 1)[..., 0, 0],
    )  # fmt: skip
    with chosen("triton") as taken:
        for x in maps:
            assert fast(x).equal(plain(x))
        assert not taken
        with pytest.raises(RuntimeError, match=r"num_channels|shape"):
            fast(map_of(2, 48, 4, 4))


HOOKS = {
    "forward hook": lambda norm: norm.register_forward_hook(lambda module, given, out: 2 * out),
    "pre-hook": lambda norm: norm.register_forward_pre_hook(lambda module, given: (2 + given[0].abs(),)),
    "another forward": lambda norm: setattr(norm, "forward", lambda x: 2 * x),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_a_normalisation_are_called(hook, as_gpu):
    plain, fast = as_on_gpu(block())
    x = map_of(1, 32, 4, 4)
    unhooked = plain(x)
    for layer in (plain, fast):
        HOOKS[hook](layer.norm1)
    with chosen("triton"):
        assert error(fast(x), plain(x)) < 1e-6 and error(plain(x), unhooked) > 0.01


@pytest.mark.parametrize("part", ["norm1", "norm2", "conv1", "skip"])
def test_layers_that_were_replaced(part, as_gpu):
    plain, fast = as_on_gpu(block())
    for layer in (plain, fast):
        setattr(layer, part, nn.Sequential(getattr(layer, part), nn.Tanh()))
    x = map_of(1, 32, 4, 4)
    with chosen("triton"):
        assert error(fast(x), plain(x)) < 1e-6


def test_without_triton(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_interpreted", True)
    monkeypatch.setattr(cuda_kernels, "_triton", lambda: None)
    plain, fast = as_on_gpu(UNet(SMALL_UNET))
    given = map_of(1, 4, 8, 8), torch.tensor([5.0]), Conditioning(reference.normal("c", (1, 77, 16)))
    with chosen("triton", "joined") as taken:
        assert error(fast(*given), plain(*given)) < 1e-6
    assert set(taken) == {"q, k, v: joined"}


def test_whichever_is_the_fastest(as_gpu):
    """As it is measured, with a kernel that cannot be used here: it is never taken."""

    def fails(*_, **__):
        raise RuntimeError("no machine code for this GPU")

    cuda_kernels._triton().geglu = fails
    plain, fast = as_on_gpu(filled(UNet(SMALL_UNET)))
    given = map_of(1, 4, 4, 4), torch.tensor([5.0]), Conditioning(reference.normal("c", (1, 7, 16)))
    for _ in range(2):
        assert error(fast(*given), plain(*given)) < 1e-6


def test_nothing_is_measured_while_a_graph_is_recorded(as_gpu, monkeypatch):
    """A kind that was called before takes its kernel; a new one takes the plain one."""
    monkeypatch.setattr(cuda_kernels, "_used", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class OnGpu(torch.Tensor):
        is_cuda = True

    x = torch.ones(1).as_subclass(OnGpu)
    calls = []
    candidates = {"plain": lambda: calls.append("plain"), "fast": lambda: calls.append("fast")}
    with chosen("fast") as taken:
        cuda_kernels._fastest(("kind",), x, candidates)
        assert calls == ["plain"] and not taken
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        cuda_kernels._fastest(("kind",), x, candidates)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        cuda_kernels._fastest(("kind",), x, candidates)
        monkeypatch.setattr(cuda_kernels, "fastest", lambda *given: pytest.fail("measured"))
        cuda_kernels._fastest(("kind",), x, candidates)
    assert calls == ["plain", "fast", "fast", "fast"]


def test_steps_are_recorded_with_the_kernels(as_gpu):
    """All kernels are chosen before the recording, and the same ones are taken in it."""
    plain, fast = as_on_gpu(UNet(SMALL_UNET))
    counts = []

    def record(run, device):
        for _ in range(cuda_graphs.WARM_UP + 1):
            before = dict(taken)
            out = run()
            counts.append(Counter(taken) - Counter(before))
        return lambda: out.copy_(run()), out

    given = map_of(2, 4, 8, 8), torch.tensor([5.0, 5.0]), Conditioning(reference.normal("c", (2, 77, 16)))
    steps = cuda_graphs.Recorded(fast, record)
    with chosen("triton", "joined") as taken:
        assert error(steps(*given), plain(*given)) < 1e-6
    assert counts[0] == counts[-1] and len(counts[0]) == 4


# ------------------------------------------------------------------------------------- q, k and v in one piece


def attentions(qkv_bias=False, context_width=None):
    return as_on_gpu(filled(layers.Attention(64, 2, context_width, qkv_bias)))


def one_piece(attention, *names):
    return cuda_kernels._one_piece([getattr(attention, name).weight for name in names]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(t, marks=pytest.mark.exhaustive) for t in DTYPES[1:])])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("context_width", [None, 48, 64])
def test_one_product_for_q_k_and_v(context_width, qkv_bias, causal, dtype, as_gpu):
    plain = filled(layers.Attention(64, 2, context_width, qkv_bias)).to(dtype)
    plain, fast = as_on_gpu(plain)
    x = reference.normal("x", (2, 5, 64)).to(dtype)
    context = None if context_width is None else reference.normal("c", (2, 5, context_width)).to(dtype)
    with chosen("joined") as taken:
        out = fast(x, context, causal)
    assert sum(taken.values()) == 1
    assert error(out, plain(x, context, causal)) < 4 * ROUNDING[dtype]
    for name, tensor in plain.state_dict().items():
        assert fast.state_dict()[name].equal(tensor)


class Network(changed.Network):
    """With attention to itself and to a context, beside the layers that the ways of changing weights know."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = layers.Attention(32, 2), layers.Attention(32, 2, 24, qkv_bias=False)

    def forward(self, x):
        x = self.norm(self.pixel(self.conv_in(x))).flatten(2).transpose(1, 2)
        x = x + self.own(x)
        return self.linear(x + self.cross(x, x[..., :24].contiguous()))


@pytest.mark.parametrize("way", changed.WAYS)
def test_changes_of_weights_take_effect(way, as_gpu):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        plain, fast = as_on_gpu(Network())
    assert one_piece(fast.own, *"qkv") and one_piece(fast.cross, *"kv")
    x = torch.linspace(-1, 1, 4 * 8 * 16).view(1, 4, 8, 16)
    with chosen("joined"):
        before = fast(x)
        for net in (plain, fast):
            changed.WAYS[way](net)
        for _ in range(2 if "hook on" not in way else 1):
            expected, found = plain(x), fast(x)
            assert error(found, expected) < 1e-5
            assert error(expected, before) > 0.02


def replace_data(attention):
    attention.k.weight.data = attention.k.weight.data * 0.5


LATER = {  # what happens to a layer -> whether there still is one product
    "nothing": (lambda attention: attention, True),
    "in place": (lambda attention: attention.v.weight.mul_(0.5), True),
    "loaded": (
        lambda attention: attention.load_state_dict({k: v / 2 for k, v in attention.state_dict().items()}),
        True,
    ),
    "other data": (replace_data, False),
    "another precision and back": (lambda attention: attention.double().float(), False),
    "a hook": (lambda attention: attention.v.register_forward_hook(lambda *_: None), False),
    "another forward": (lambda attention: setattr(attention.v, "forward", attention.v.forward), False),
    "another layer": (lambda attention: setattr(attention, "q", filled(nn.Linear(64, 64, bias=False))), False),
    "another class": (lambda attention: setattr(attention.k, "__class__", type("Own", (nn.Linear,), {})), False),
}


@pytest.mark.parametrize("way", LATER)
def test_when_there_is_one_product(way, as_gpu):
    plain, fast = attentions()
    happens, joined = LATER[way]
    for attention in (plain, fast):
        happens(attention)
        attention.requires_grad_(False)
    x = reference.normal("x", (1, 5, 64))
    with chosen("joined") as taken:
        assert error(fast(x), plain(x)) < 1e-6
    assert bool(taken) == joined


def test_adjacent_addresses_are_not_one_piece():
    """Two tensors of a GPU may follow each other in memory by chance, and then belong to two allocations."""
    whole = torch.arange(6.0)
    storage = whole.untyped_storage()
    parts = [torch.empty(0).set_(storage, start, (3,)) for start in (0, 3)]
    assert cuda_kernels._one_piece(parts).equal(whole)
    assert cuda_kernels._one_piece(parts[::-1]) is None
    first = torch.from_numpy(whole.numpy()[:3])  # its storage ends where the other's begins
    second = torch.from_numpy(whole.numpy()[3:])
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    assert cuda_kernels._one_piece([first, second]) is None


def test_weights_that_somebody_else_uses_are_not_moved(as_gpu):
    plain = filled(layers.Attention(64, 2, qkv_bias=False)).requires_grad_(False)
    held = plain.v.weight.data
    fast = optimize(plain, CUDA)
    assert not one_piece(fast, *"qkv")
    held.zero_()
    with chosen("joined"):
        assert fast(reference.normal("x", (1, 5, 64))).equal(fast.out.bias.expand(1, 5, 64))


def test_trained_and_shared_weights_are_not_moved(as_gpu):
    for change in (lambda net: net.requires_grad_(True), lambda net: net.share_memory()):
        plain = layers.Attention(64, 2, qkv_bias=False).requires_grad_(False)
        change(plain)
        assert not one_piece(optimize(plain, CUDA), *"qkv")


def test_weights_in_one_piece_are_saved_and_copied(tmp_path, as_gpu):
    plain, fast = attentions(qkv_bias=True)
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(fast.state_dict(), file)
    read = safetensors.torch.load_file(file)
    x = reference.normal("x", (1, 5, 64))
    copied = copy.deepcopy(fast)
    copied.q.weight.zero_()
    assert all(tensor.equal(read[name]) for name, tensor in plain.state_dict().items())
    with chosen("joined"):
        assert error(fast(x), plain(x)) < 1e-6 and error(copied(x), plain(x)) > 1e-3
        assert restore(fast)(x).equal(plain(x)) and type(fast) is layers.Attention


def test_memory_of_a_network_that_moved_away_is_free(as_gpu):
    """Nothing but the parameters holds the memory of q, k and v."""
    _, fast = attentions()
    with chosen("joined"):
        fast(reference.normal("x", (1, 5, 64)))
    storage = fast.q.weight.untyped_storage()
    assert storage.nbytes() == 3 * 64 * 64 * 4
    held = torch._C._storage_Use_Count(storage._cdata)
    fast.double()
    assert torch._C._storage_Use_Count(storage._cdata) == held - 3 == 1


# ------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560, 128, 256, 512])
def test_group_norm_on_a_gpu(channels, dtype):
    for size in ((1, 1), (8, 8), (17, 33), (64, 64)):
        errors = group_norm_errors((2, channels, *size), 32, dtype, "cuda")
        assert max(errors.values()) < ROUNDING[dtype]
    assert max(group_norm_errors((1, channels, 64, 64), 32, torch.float32, "cuda", 4000.0).values()) < 2e-5


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu_on_a_gpu(dtype):
    for shape in ((2, 4096, 2 * 1280), (2, 1024, 2 * 2560), (2, 256, 2 * 5120), (3, 7, 2 * 40)):
        for scale in (1.0, 20.0):
            assert geglu_errors(shape, dtype, "cuda", scale) < ROUNDING[dtype]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["U-Net", "VAE"])
def test_networks_on_a_gpu(name, dtype):
    for kernel in ("triton", "triton, one kernel"):
        differs, taken, *_ = network_errors(name, dtype, "cuda", "joined", kernel, "triton")
        assert differs < 20 * max(ROUNDING[dtype], 1e-4) and taken  # convolutions in float32 may be in TF32


@pytest.mark.gpu
def test_kernels_in_a_recorded_step():
    """Whichever are the fastest here: as they are chosen before the recording, and as they are replayed."""
    plain, fast = as_on_gpu(filled(UNet(SMALL_UNET)).cuda().half())
    steps = cuda_graphs.Recorded(fast)
    for seed in "abc":
        given = reference.normal(seed, (2, 4, 64, 64)), reference.normal(f"context {seed}", (2, 77, 16))
        x, context = (tensor.cuda().half() for tensor in given)
        t = torch.tensor([981.0, 0.5], device="cuda")
        expected = plain(x.contiguous(memory_format=torch.channels_last), t, Conditioning(context))
        assert error(steps(x, t, Conditioning(context)), expected) < 20 * ROUNDING[torch.float16]
