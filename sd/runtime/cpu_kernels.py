"""Faster layers for x86 CPUs, with the interface of those they replace; `optimize` puts them into a network.

On an x86 CPU, where a step of Stable Diffusion 1.x is 1,600 GFLOP, three choices of PyTorch cost up to half of it:

    convolutions   reorder their weights at every call     -> packed once, by oneDNN (`Conv2d`; 1x1 as linear layers)
    linear layers  the same; in float32 they go to MKL     -> packed once, and through oneDNN (`Linear`)
    attention      reaches a sixth of the processor's peak -> two plain products, some queries at a time (`Attention`)

Which one is faster depends on the processor, so each is timed before it is used (`faster`).

A layer packs its weight at its first call without gradients and drops the plain one, so that memory holds one copy. The
packed tensor is private. Any look at the layer's parameters (`weight`, `parameters`, `state_dict`, `to`, copying) first
restores the plain weight, equal to the bit; the next call packs it again. While somebody else holds the plain weight,
or an alias of its memory, it is not packed: changes in place always take effect.

Within `torch.compile` a layer is called as it is, as compilers cannot look into oneDNN's tensors. For a graph without
breaks, `optimize.restore` the network first.

>>> layer = nn.Linear(8, 4).requires_grad_(False)
>>> weight, x = layer.weight.clone(), torch.randn(2, 8)
>>> layer.__class__ = Linear  # as `optimize` does
>>> with torch.no_grad(), prefer("packed"):
...     torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-5)
True
>>> layer.weight.equal(weight)
True
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..models import layers

Choice = Literal["packed", "plain"]

REPEATS = 3  # calls of which the fastest counts, where kernels are timed
MARGIN = 1.05  # how much faster a kernel has to be: kernels that are about equal must not change from run to run
# Sizes of the calls that are timed. Each stands for those up to the next: few, as each costs a millisecond or so.
ROWS_TIMED = 2, 128  # of a product
WIDTHS_TIMED = 4, 64, 256  # the geometric mean of the channels, in and out
SIDES_TIMED = 4, 16  # of a map
TOKENS_TIMED = 64, 256, 1024
BY_ROWS_FROM = 2**17  # scores of a head from which attention by rows is considered: below, its Python costs more
SCORES = 2**20  # how many of its scores a thread computes at a time: 2 to 4 MB, which stay in the cache
THREADS = 2, 4  # for so many threads at least and at most: below calls cost more than the cache saves, above it is full
# but so many queries at least, as the keys are brought into order for each product
ROWS = {torch.bfloat16: 512, torch.float32: 256}
LARGEST_EXPONENT = 100.0  # from 2^-100 to 2^100 numbers are exact, as the smallest float32 and bfloat16 is 2^-126
LARGEST_SUM = 126.0  # and the largest 2^127: of the values, each times such a power, over all keys
LANES = 16  # numbers in a vector register: a matrix is padded to whole ones

LARGE = 1024  # pixels from which GroupNorm goes another way in PyTorch, with sums that are too rough
PART = 2**18  # how many numbers it adds up at a time: 1 MB, which stays in the cache


@cache
def onednn_dtypes() -> frozenset[torch.dtype]:
    """The precisions in which oneDNN's operators with packed weights can be used: none but on x86 CPUs."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return frozenset()
    try:
        half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        _try_operators()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return frozenset()  # a torch that was built without them, or where they want other arguments
    return frozenset({torch.float32, torch.bfloat16} if half else {torch.float32})


def _try_operators() -> None:
    """Use each of oneDNN's operators once: they are for torch's own compiler, and may change with any version."""
    with torch.no_grad():
        x = torch.ones(1, LANES, 2, 2, device="cpu", dtype=torch.float32)
        weight, usual = torch.ones(LANES, LANES, device="cpu", dtype=torch.float32), ((0, 0), (1, 1), (1, 1), 1)
        _linear(x[..., 0, 0], _linear_weight(weight, 1), None)
        _convolution(x, _kernel(weight[..., None, None], *usual, x.shape), None, *usual)
        _shared(weight)


def _linear_weight(weight: Tensor, rows: int | None = None) -> Tensor:
    """The weight (D_out, D_in) in the layout that is fastest for so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _kernel(kernel: Tensor, padding, stride, dilation, groups: int, shape: torch.Size) -> Tensor:
    """The kernel of a convolution in the layout that is fastest for inputs of this shape."""
    return torch._C._nn.mkldnn_reorder_conv2d_weight(kernel.to_mkldnn(), padding, stride, dilation, groups, shape)


def _convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, padding, stride, dilation, groups: int) -> Tensor:
    """F.conv2d with a packed kernel."""
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, padding, stride, dilation, groups, "none", [], "")


def _shared(tensor: Tensor) -> bool:
    """Whether another tensor, or an array, has the memory of this one."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor, and the storage's Python object


def _watched(*tensors: Tensor | None) -> bool:
    """Whether more than the result is wanted: gradients for any of these, other transforms, a graph for a compiler.

    oneDNN's operators know of none of these: in silence derivatives would be zero.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level >= 0:  # some may have tangents
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# ------------------------------------------------------------------------------------- which kernel

_forced: Choice | None = None
_measured: dict[tuple[object, ...], bool] = {}  # kind of call -> whether the packed kernel is the faster one
_measuring = threading.Lock()


@contextmanager
def prefer(choice: Choice | None) -> Iterator[None]:
    """Within this context every call takes the packed or the plain kernel, whichever is faster; None measures.

    For tests and comparisons. It holds for all threads of the process.
    """
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def faster(kind: tuple[object, ...], kernels: Callable[[], tuple[Callable[[], object], Callable[[], object]]]) -> bool:
    """Whether the packed kernel is the faster one for this kind of call: timed once in a process.

    `kernels` makes a small call of the kind: (packed, plain). The number of threads is part of the kind.
    """
    if _forced is not None:
        return _forced == "packed"
    key = (*kind, torch.get_num_threads())
    found = _measured.get(key)
    if found is None:
        with _measuring, torch.inference_mode(False), torch.no_grad():
            found = _measured.get(key)
            if found is None:
                packed, plain = kernels()
                found = _measured[key] = MARGIN * _seconds(packed) < _seconds(plain)
    return found


def _seconds(run: Callable[[], object]) -> float:
    """The time of the fastest of some calls."""
    run()
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


def _size(number: float, sizes: tuple[int, ...]) -> int:
    """The size that stands for this number: the largest that is not larger, or the smallest."""
    return max((size for size in sizes if size <= number), default=sizes[0])


# ------------------------------------------------------------------------------------- layers with packed weights

_packing = threading.RLock()  # weights are packed, and restored, by one thread at a time


class Packed(NamedTuple):
    """A weight in oneDNN's layout, and what it takes to restore the plain one."""

    kind: str  # for which kernel: "linear", "kernel", "enlarging"
    weight: Tensor
    shape: torch.Size  # the plain weight's
    stride: tuple[int, ...]
    plain: Tensor | None = None  # itself, where it cannot be computed from the packed one


class _PackedLayer(nn.Module):
    """A layer that keeps its weight packed between calls, and plain for everybody else.

    While it is packed, `_parameters` has None in the weight's place, which keeps the order of the names. All ways to a
    parameter lead through `_parameters` or `__getattr__`.
    """

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        with _packing:
            self._unpack()
            return self.__dict__["_parameters"]

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        with _packing:
            self.__dict__.pop("_packed", None)
            self.__dict__["_parameters"] = parameters

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return self._plain_weight()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:  # for copying and pickling
        with _packing:
            return self.__dict__ | {"_parameters": dict(self._parameters)}

    def _plain_weight(self) -> Any:
        with _packing:
            self._unpack()
            return super().__getattr__("weight")

    def _unpack(self) -> None:
        """Restore the plain weight, equal to the bit and with its strides, and drop the packed one."""
        packed = self.__dict__.pop("_packed", None)
        if packed is None:
            return
        # Whatever the caller is in, the weight has to be a usual tensor; and functorch cannot look into oneDNN's.
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
            plain = packed.weight.to_dense().view(packed.shape) if packed.plain is None else packed.plain
            if plain.stride() != packed.stride:
                plain = torch.empty_strided(packed.shape, packed.stride, dtype=plain.dtype, device="cpu").copy_(plain)
            self.__dict__["_parameters"]["weight"] = nn.Parameter(plain, requires_grad=False)

    def known_plain(self, x: Tensor, kind: str) -> dict[str, nn.Parameter | None] | None:
        """The plain parameters, if the plain kernel was the faster one for such an input: the short way to it."""
        parameters: dict[str, nn.Parameter | None] = self.__dict__["_parameters"]
        known = self.__dict__.get("_plain_at") == (x.shape, kind) and _forced is None
        return parameters if known and parameters.get("weight") is not None else None

    def packed(self, x: Tensor, kind: str) -> Packed | None:
        """The weight packed for this kernel, and for inputs like x; None where the plain layer has to be used."""
        state = self.__dict__
        packed: Packed | None = state.get("_packed")
        weight: Tensor | None = state["_parameters"].get("weight") if packed is None else packed.weight
        if weight is None:  # another thread packs or restores it just now
            with _packing:
                packed = state.get("_packed")
                weight = state["_parameters"].get("weight") if packed is None else packed.weight
        if (
            type(weight) not in (Tensor, nn.Parameter)  # but computed from others, or a tensor without numbers
            or type(x) is not Tensor
            or x.device.type != "cpu"
            or x.dtype != weight.dtype
            or x.numel() == 0
            or _watched(x, weight, state["_parameters"].get("bias"))
            or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.enabled
        ):
            return None
        if packed is not None and packed.kind == kind and _forced is None:
            return packed
        if weight.device.type != "cpu" or weight.requires_grad or weight.dtype not in onednn_dtypes():
            return None
        if not self.faster(x, kind, weight.dtype):
            if packed is None and _forced is None:
                state["_plain_at"] = x.shape, kind
            return None
        if packed is not None and packed.kind == kind:
            return packed
        del weight
        return self._pack(x, kind)

    def faster(self, x: Tensor, kind: str, dtype: torch.dtype) -> bool:
        """Whether the packed kernel is the faster one for inputs like x."""
        raise NotImplementedError

    def pack(self, weight: Tensor, x: Tensor, kind: str) -> Packed:
        """The weight packed for this kernel, and for inputs like x."""
        raise NotImplementedError

    def _pack(self, x: Tensor, kind: str) -> Packed | None:
        """Pack the weight and drop the plain one; None, and all as before, if somebody else holds it."""
        with _packing, torch.inference_mode(False), torch.no_grad():
            packed: Packed | None = self.__dict__.get("_packed")
            if packed is not None and packed.kind == kind:  # by another thread
                return packed
            self._unpack()
            parameters = self.__dict__["_parameters"]
            weight = parameters["weight"]
            if weight is None or weight.__dict__ or weight.grad is not None or weight._backward_hooks:
                return None
            if weight.requires_grad or torch.is_inference(weight):
                return None
            data, reference = weight.data, weakref.ref(weight)
            parameters["weight"] = None
            del weight
            held = reference()
            if held is not None or _shared(data):
                parameters["weight"] = nn.Parameter(data, requires_grad=False) if held is None else held
                return None
            packed = self.__dict__["_packed"] = self.pack(data, x, kind)
            return packed


class Linear(_PackedLayer, nn.Linear):
    """nn.Linear; faster on x86 CPUs when no gradients are wanted."""

    def faster(self, x: Tensor, kind: str, dtype: torch.dtype) -> bool:
        return _faster_linear(x.numel() // x.shape[-1], self.in_features, self.out_features, dtype)

    def pack(self, weight: Tensor, x: Tensor, kind: str) -> Packed:
        return Packed(kind, _linear_weight(weight, x.numel() // x.shape[-1]), weight.shape, weight.stride())

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        plain = self.known_plain(x, "linear")
        if plain is not None:
            return F.linear(x, plain["weight"], plain["bias"])
        usual = x.dim() > 0 and x.shape[-1] == self.in_features  # of others, PyTorch's operators say best what is wrong
        packed = self.packed(x, "linear") if usual else None
        if packed is None:
            return F.linear(x, self.weight, self.bias)
        return _linear(x, packed.weight, self.__dict__["_parameters"]["bias"])


def _faster_linear(rows: int, d_in: int, d_out: int, dtype: torch.dtype) -> bool:
    n, width = _size(rows, ROWS_TIMED), _size(math.sqrt(d_in * d_out), WIDTHS_TIMED)

    def kernels():
        x, weight = (torch.ones(rows, width, dtype=dtype, device="cpu") for rows in (n, width))
        packed = _linear_weight(weight, n)
        return lambda: _linear(x, packed, None), lambda: F.linear(x, weight)

    return faster(("linear", dtype, n, width), kernels)


class Conv2d(_PackedLayer, nn.Conv2d):
    """nn.Conv2d; faster on x86 CPUs when no gradients are wanted.

    Kernels of 1x1 are linear layers of pixels: packed as those they are good for images of any size, which as kernels
    they are not. (At 256x256 a step took half as long again where the one before was of 512x512.)
    """

    @property
    def by_pixel(self) -> bool:
        """Whether each pixel of the result depends on one pixel."""
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def faster(self, x: Tensor, kind: str, dtype: torch.dtype) -> bool:
        H, W = x.shape[-2:]
        if kind == "linear":
            return _faster_linear(x.shape[0] * H * W, self.in_channels, self.out_channels, dtype)
        if self.groups != 1 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        width = _size(math.sqrt(self.in_channels * self.out_channels), WIDTHS_TIMED)
        side = _size(math.sqrt(H * W), SIDES_TIMED)
        options = self.padding, self.stride, self.dilation, 1
        if kind == "enlarging":
            return _faster_enlarging(width, side, dtype)

        def kernels():
            x = torch.ones(1, width, side, side, dtype=dtype, device="cpu").to(memory_format=torch.channels_last)
            weight = torch.ones(width, width, *self.kernel_size, dtype=dtype, device="cpu").to(
                memory_format=torch.channels_last
            )
            packed, (padding, stride, dilation, groups) = _kernel(weight, *options, x.shape), options
            return (
                lambda: _convolution(x, packed, None, *options),
                lambda: F.conv2d(x, weight, None, stride, padding, dilation, groups),
            )

        return faster(("convolution", dtype, self.kernel_size, *options, width, side), kernels)

    def pack(self, weight: Tensor, x: Tensor, kind: str) -> Packed:
        if kind == "linear":
            packed = _linear_weight(weight.flatten(1), x.numel() // x.shape[1])
        elif kind == "enlarging":
            return Packed(kind, _places(weight, x.shape), weight.shape, weight.stride(), weight)
        else:
            packed = _kernel(weight, self.padding, self.stride, self.dilation, self.groups, x.shape)
        return Packed(kind, packed, weight.shape, weight.stride())

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        kind = "linear" if self.by_pixel else "kernel"
        plain = self.known_plain(x, kind)
        if plain is not None:
            return self._conv_forward(x, plain["weight"], plain["bias"])
        usual = x.dim() == 4 and x.shape[1] == self.in_channels
        packed = self.packed(x, kind) if usual else None
        if packed is None:
            return self._conv_forward(x, self.weight, self.bias)
        bias = self.__dict__["_parameters"]["bias"]
        if kind == "linear":
            return _linear(x.permute(0, 2, 3, 1).contiguous(), packed.weight, bias).permute(0, 3, 1, 2)
        return _convolution(x, packed.weight, bias, self.padding, self.stride, self.dilation, self.groups)


class Upsample(layers.Upsample):
    """`layers.Upsample` with 4/9 of the arithmetic on x86 CPUs, when no gradients are wanted.

    Of the nine pixels that a kernel sees in a doubled map only four differ. So each pixel of the result is a 2x2
    convolution of the small map by sums of the kernel's rows and columns. A doubled pixel has four places, hence four
    kernels, which are one of four times the channels. By rows, for a kernel a, b, c:

        row 2i     sees rows i - 1, i, i of the small map: a, b + c
        row 2i + 1 sees rows i, i, i + 1:                  a + b, c
    """

    @torch.compiler.disable
    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size); twice the size where none is given."""
        conv = self.conv
        usual = x.dim() == 4 and type(conv) is Conv2d and x.shape[1] == conv.in_channels
        usual = usual and not (conv._forward_hooks or conv._forward_pre_hooks or "forward" in conv.__dict__)
        if (
            not usual
            or torch.compiler.is_compiling()
            or tuple(size or ()) not in ((), (2 * x.shape[2], 2 * x.shape[3]))
        ):
            return super().forward(x, size)
        packed = conv.packed(x, "enlarging")
        if packed is None:
            return super().forward(x, size)
        return _enlarged(x, packed.weight, conv.__dict__["_parameters"]["bias"])


def _places(weight: Tensor, shape: torch.Size) -> Tensor:
    """The four 2x2 kernels, one above the other, of a 3x3 kernel (C, C, 3, 3), packed for inputs of this shape."""
    C_out, C_in = weight.shape[:2]
    sums = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]).float()  # (place, of 2, of 3)
    kernels = torch.einsum("ral,scm,oilm->rsoiac", sums, sums, weight.float()).reshape(4 * C_out, C_in, 2, 2)
    return _kernel(kernels.to(weight.dtype), (1, 1), (1, 1), (1, 1), 1, shape)


def _enlarged(x: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    """The 3x3 convolution of the doubled x (B, C, H, W) by the kernels of the four places: (B, C_out, 2 H, 2 W)."""
    B, _, H, W = x.shape
    x = _convolution(x, places, None if bias is None else bias.repeat(4), (1, 1), (1, 1), (1, 1), 1)
    C = x.shape[1] // 4
    out = torch.empty((B, C, 2 * H, 2 * W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for place, part in enumerate(x.chunk(4, dim=1)):  # (B, C, H + 1, W + 1): a row and a column too many
        row, column = divmod(place, 2)
        out[:, :, row::2, column::2] = part[:, :, row : row + H, column : column + W]
    return out


def _faster_enlarging(channels: int, side: int, dtype: torch.dtype) -> bool:
    def kernels():
        x = torch.ones(1, channels, side, side, dtype=dtype, device="cpu").to(memory_format=torch.channels_last)
        weight = torch.ones(channels, channels, 3, 3, dtype=dtype, device="cpu").to(memory_format=torch.channels_last)
        places = _places(weight, x.shape)
        return (
            lambda: _enlarged(x, places, None),
            lambda: F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1),
        )

    return faster(("enlarging", dtype, channels, side), kernels)


# ------------------------------------------------------------------------------------- attention


class Attention(layers.Attention):
    """`layers.Attention` by rows, where that is faster."""

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, N, D), context (B, M, context width) or None for x itself -> (B, N, D)."""
        context = x if context is None else context
        return self.out(attention(self.q(x), self.k(context), self.v(context), self.heads, causal))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """`layers.attention`, by rows where that is faster: q (B, N, D), k and v (B, M, D) -> (B, N, D)."""
    N, M, d = q.shape[1], k.shape[1], q.shape[2] // heads
    if (
        causal
        or _watched(q, k, v)
        or type(q) is not Tensor
        or q.device.type != "cpu"
        or q.dtype not in onednn_dtypes()
        or not torch.backends.mkldnn.enabled
        or k.shape[0] != q.shape[0]
        or 0 in (q.numel(), M)
        or (N * M < BY_ROWS_FROM and _forced is None)
        or not _faster_by_rows(N, M, d, q.dtype)
    ):
        return layers.attention(q, k, v, heads, causal)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
    return _attention_by_rows(q, k, v).transpose(1, 2).flatten(-2)


def _faster_by_rows(N: int, M: int, d: int, dtype: torch.dtype) -> bool:
    N, M, d = _size(N, TOKENS_TIMED), _size(M, TOKENS_TIMED), _size(d, WIDTHS_TIMED[1:])

    def kernels():
        q, k = torch.ones(1, 2, N, d, dtype=dtype, device="cpu"), torch.ones(1, 2, M, d, dtype=dtype, device="cpu")
        return lambda: _attention_by_rows(q, k, k), lambda: F.scaled_dot_product_attention(q, k, k)

    return faster(("attention", dtype, N, M, d), kernels)


@torch.compiler.disable
def _attention_by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for q (B, heads, N, d) and k, v (B, heads, M, d) by the formula, some heads and queries at a time.

    softmax(s) v = (exp(s) v) / (exp(s) 1): one pass over the scores instead of three, the sum is one more column of v,
    and a power of 2 is faster than one of e. Without the maximum taken off, exp and the sums could overflow; |q| |k|
    bounds it, and where that is large (it hardly ever is) the usual softmax is taken.

    In bfloat16 scores are rounded before the softmax: an error of 0.5 % against 0.2 % in the fused kernel where they
    are about 1, more where they are larger. A whole U-Net in bfloat16 is 1.4 % off either way.
    """
    B, heads, N, d = q.shape
    M = k.shape[2]
    q, k, v = (x.reshape(B * heads, -1, d) for x in (q, k, v))
    bound = q.float().norm(dim=-1).amax() * k.float().norm(dim=-1).amax() * (d**-0.5 * math.log2(math.e))
    largest = torch.stack(torch.aminmax(v)).abs().amax().float().clamp(min=1)
    # not so if it is not a number
    small = bool((bound < LARGEST_EXPONENT) & (bound + torch.log2(M * largest) < LARGEST_SUM))
    q = q * (d**-0.5 * (math.log2(math.e) if small else 1.0))
    sums = v.new_zeros(B * heads, M, (d // LANES + 1) * LANES)  # v, a column of ones, zeros
    sums[..., :d], sums[..., d] = v, 1
    least, most = THREADS
    at_a_time = SCORES * min(max(torch.get_num_threads(), least), most)
    rows = min(N, max(ROWS[q.dtype], at_a_time // M))
    group = max(1, min(B * heads, at_a_time // (rows * M))) if q.dtype == torch.bfloat16 else 1
    out = q.new_empty(B * heads, N, sums.shape[-1])
    for i in range(0, B * heads, group):
        times_keys, times_values = _times(k[i : i + group].transpose(1, 2)), _times(sums[i : i + group])
        for j in range(0, N, rows):
            scores = times_keys(q[i : i + group, j : j + rows])
            weights = scores.exp2_() if small else torch.softmax(scores, dim=-1, out=scores)
            out[i : i + group, j : j + rows] = times_values(weights)
    x = out[..., :d] / out[..., d : d + 1]
    return x.view(B, heads, N, d)


def _times(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """The function x (g, n, a) -> x @ matrices (g, a, b); in float32 through oneDNN, for g = 1, as bmm takes MKL."""
    if matrices.dtype != torch.float32:
        return lambda x: torch.bmm(x, matrices)
    weight = _linear_weight(matrices[0].t().contiguous())
    return lambda x: _linear(x[0], weight, None).unsqueeze(0)


# ------------------------------------------------------------------------------------- normalisation


class GroupNorm(nn.GroupNorm):
    """Wu and He 2018, "Group normalization", on CPUs with exact sums in large float32 maps, faster in small bfloat16.

    PyTorch's kernel for channels-last tensors there adds up all pixels one after the other in float32. In a picture of
    512x512 with a flat half that is an error of 2e-3 in the output; parts added up in float64 leave 4e-7. (Far
    from zero digits are lost all the same: 5e-3 where the mean is a thousand deviations, as in no network.)

    In bfloat16 maps of fewer pixels than `LARGE` take it four to six times as long as in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        usual = torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != self.weight.dtype or _watched(x)
        if usual or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        if x.dtype == torch.bfloat16 and H * W < LARGE:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        if x.dtype != torch.float32 or H * W < LARGE:
            return super().forward(x)
        sums, squares = _sums(x)
        n, G = H * W * C // self.num_groups, self.num_groups
        mean = sums.view(B, G, -1).sum(dim=-1, keepdim=True) / n
        var = squares.view(B, G, -1).sum(dim=-1, keepdim=True) / n - mean**2
        scale = (var.clamp(min=0) + self.eps).rsqrt() * self.weight.view(G, -1)
        shift = self.bias.view(G, -1) - mean * scale
        return torch.addcmul(shift.float().view(B, C, 1, 1), x, scale.float().view(B, C, 1, 1))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of each channel of x (B, C, H, W): (B, C) in float64 on the CPU.

    On the CPU `var_mean` would take longer than the convolution that follows: 26 times as long as adding up by parts.
    """
    if x.device.type == "cpu":
        sums, squares = _sums(x)
        return sums / x[0, 0].numel(), squares / x[0, 0].numel()
    var, mean = (y.cpu().double() for y in torch.var_mean(x.float(), dim=(2, 3), correction=0))
    return mean, var + mean**2


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of x (B, C, H, W) and of its squares over all pixels, (B, C), added up in float64 by parts."""
    B, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view where x is channels-last
    sums, squares = pixels.new_zeros(2, B, C, dtype=torch.float64)
    for part in pixels.split(max(PART // (B * C), 1), dim=1):
        part = part.float()
        sums += part.sum(dim=1)
        squares += (part * part).sum(dim=1)
    return sums, squares
