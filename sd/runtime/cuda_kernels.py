"""Faster layers for GPUs with CUDA, with the interface of those they replace; see `optimize`.

At batch size 1, eager PyTorch loses time in three places, which compilers for GPUs save:

    group norm     makes plain copies of channels-last maps     -> one or two Triton kernels, with the SiLU that follows
    GEGLU          GELU and product in two kernels              -> one Triton kernel (triton_kernels.py)
    q, k, v        three products of one input                  -> one product, where the weights lie in one piece

Which of them are used is measured at the first call of each kind, as on CPUs (kernel_choice.py). How much they gain on
a GPU has not been measured yet.

The plain layer runs wherever the fast one cannot: with gradients, function transforms, autocast, `torch.compile`, maps
in another layout, and inner layers that have a hook, a patched `forward` or another class. Without triton, only q, k
and v have a fast layer.

>>> layer = layers.ResBlock(32, 64, eps=1e-5).requires_grad_(False)
>>> x = torch.randn(1, 32, 4, 4)
>>> expected = layer(x)
>>> layer.__class__ = ResBlock  # as `optimize` does
>>> layer(x).equal(expected)  # plain on a CPU
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import layers
from .device import dtype_name
from .group_norm import group_norm
from .kernel_choice import PLAIN, Kind, fastest
from .packing import for_inference, watched

DTYPES = torch.float16, torch.bfloat16, torch.float32
FEW = 1024  # pixels up to which a single kernel for group norm is tried: it has few programs to run in parallel

_interpreted = False  # for tests: tensors on the CPU count as tensors on a GPU
_used: dict[Kind, str] = {}  # kind of call -> the kernel of the last one that was not within a recording


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm: for channels-last maps a Triton kernel where that is faster; else large maps in parts."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return _group_norm(self, x, silu=False)


class ResBlock(layers.ResBlock):
    """`layers.ResBlock`, with each normalisation and its activation in one kernel where that is faster."""

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, C_in, H, W), time (B, time width) or None -> (B, C_out, H, W)."""
        h = self.conv1(norm_silu(self.norm1, x))
        if self.time is not None:
            h += self.time(time)[:, :, None, None]
        h = self.conv2(norm_silu(self.norm2, h))
        return self.skip(x) + h


class FeedForward(layers.FeedForward):
    """`layers.FeedForward`, with GELU and product in one kernel where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.out(_geglu(self.proj(x)))


class Attention(layers.Attention):
    """`layers.Attention`, with one product for q, k and v, or for k and v of a context, where that is faster.

    `join` copies the three weights into one tensor, of which each parameter becomes a view. Other code sees no
    difference, and changing one of them in place takes effect. Where a parameter has been given other memory since (a
    merged LoRA, another device, a copy of the network), there are three products again.
    """

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, N, D), context (B, M, context width) or None for x itself -> (B, N, D)."""
        if torch.compiler.is_dynamo_compiling():
            return super().forward(x, context, causal)
        source = x if context is None else context
        whole = _joined([self.k, self.v] if context is not None else [self.q, self.k, self.v], source)
        if whole is None or type(x) is not Tensor or not for_inference(x):
            return super().forward(x, context, causal)

        def joined() -> Tensor:
            if context is None:
                q, k, v = F.linear(source, *whole).chunk(3, dim=-1)
            else:
                q, (k, v) = self.q(x), F.linear(source, *whole).chunk(2, dim=-1)
            return layers.attention(q, k, v, self.heads, causal)

        def plain() -> Tensor:
            return layers.attention(self.q(x), self.k(source), self.v(source), self.heads, causal)

        sizes = *x.shape, *(() if context is None else context.shape), self.heads
        kind = "causal q, k, v" if causal else "q, k, v", *sizes, "bias" if whole[1] is not None else "no bias"
        return self.out(_fastest(kind, x, {PLAIN: plain, "joined": joined}))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {  # plain class -> the one that replaces it
    layers.Attention: Attention,
    layers.FeedForward: FeedForward,
    layers.ResBlock: ResBlock,
    nn.GroupNorm: GroupNorm,
}


def join(attention: layers.Attention) -> None:
    """Make the weights of q, k and v (of k and v, where the context has another width) views of one tensor.

    Does nothing where they are not plain weights on a GPU, or where other code uses their memory.
    """
    parts = [attention.q, attention.k, attention.v]
    if attention.q.in_features != attention.k.in_features:
        del parts[0]
    with torch.inference_mode(False), torch.no_grad():
        for name in ("weight", "bias"):
            parameters: list[Any] = [getattr(part, name, None) for part in parts]
            if all(map(_can_be_joined, parameters)) and _alike(parameters):
                whole = torch.cat([parameter.data for parameter in parameters])
                for parameter, part in zip(parameters, whole.chunk(len(parts)), strict=True):
                    parameter.data = part


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU(norm(x)), in one kernel where `norm` is a `GroupNorm` for which that is faster."""
    if type(norm) is GroupNorm and not watched(norm):
        return _group_norm(norm, x, silu=True)
    return F.silu(norm(x), inplace=True)


def _group_norm(norm: GroupNorm, x: Tensor, silu: bool) -> Tensor:
    """x (B, C, H, W), normalised and, if `silu`, activated, by the fastest kernel."""

    def plain() -> Tensor:
        y = group_norm(norm, x)
        return F.silu(y, inplace=True) if silu else y

    if torch.compiler.is_dynamo_compiling() or not _ready(x, norm.weight, norm.bias):
        return plain()
    last = x.dim() == 4 and x.shape[1] == norm.num_channels and x.is_contiguous(memory_format=torch.channels_last)
    kernels = _triton() if last else None
    if kernels is None:
        return plain()
    given = x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu
    candidates = {PLAIN: plain, "triton": lambda: kernels.group_norm(*given)}
    if x.shape[2] * x.shape[3] <= FEW:
        candidates["triton, one kernel"] = lambda: kernels.group_norm(*given, whole=True)
    return _fastest(("group norm and SiLU" if silu else "group norm", *x.shape, norm.num_groups), x, candidates)


def _geglu(x: Tensor) -> Tensor:
    """value * gelu(gate) of x = (value, gate), (..., 2 F) -> (..., F), by the fastest kernel."""

    def plain() -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    if torch.compiler.is_dynamo_compiling() or not _ready(x) or not x.is_contiguous() or x.shape[-1] % 2:
        return plain()
    kernels = _triton()
    if kernels is None:
        return plain()
    return _fastest(("GEGLU", *x.shape), x, {PLAIN: plain, "triton": lambda: kernels.geglu(x)})


# ------------------------------------------------------------------------------------- conditions


@cache
def _triton() -> ModuleType | None:
    """The module triton_kernels; None where triton is missing or cannot be imported."""
    try:
        from . import triton_kernels
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None
    return triton_kernels


def _fastest(kind: Kind, x: Tensor, candidates: Mapping[str, Callable[[], Tensor]]) -> Tensor:
    """The result of the fastest candidate; of the plain one for new kinds while a CUDA graph is being recorded."""
    kind = *kind, dtype_name(x.dtype), _device_name(x.device)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return candidates[_used.get(kind, PLAIN)]()
    name = fastest(kind, tuple(candidates), lambda: lambda name: candidates[name]())
    _used[kind] = name
    return candidates[name]()


@cache
def _device_name(device: torch.device) -> str:
    """The name of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda or (_interpreted and x.device.type == "cpu")


def _ready(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether our own kernels can be used for x and these parameters."""
    return (
        type(x) is Tensor  # not a subclass, such as a fake tensor, or functorch's
        and _on_gpu(x)
        and x.dtype in DTYPES
        and x.numel() > 0
        and for_inference(x, *parameters)
        and not torch.is_autocast_enabled(x.device.type)
        and all(
            y is not None
            and type(y) in (Tensor, nn.Parameter)
            and (y.dtype, y.device) == (x.dtype, x.device)
            and y.is_contiguous()
            for y in parameters
        )
    )


def _alike(parameters: list[Tensor]) -> bool:
    """Whether parameters have the same shape, precision and device."""
    return len({(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters}) == 1


def _can_be_joined(parameter: Tensor | None) -> bool:
    """Whether a parameter is an ordinary one, on a GPU, whose memory no other code uses."""
    if type(parameter) is not nn.Parameter or not for_inference(parameter):
        return False
    storage = parameter.untyped_storage()
    return (
        type(parameter.data) is Tensor
        and _on_gpu(parameter)
        and parameter.is_contiguous()
        and not parameter.requires_grad
        and not torch.is_inference(parameter)
        and not parameter.is_shared()
        and storage.nbytes() == parameter.nbytes
        and torch._C._storage_Use_Count(storage._cdata) <= 2  # the parameter, and the storage's Python object
    )


def _joined(parts: list[nn.Linear], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of these layers as one, for inputs x; None where they are not adjacent in memory."""
    if any(type(part) is not nn.Linear or watched(part) for part in parts):
        return None
    weights, biases = [part.weight for part in parts], [part.bias for part in parts]
    if x.dim() == 0 or x.shape[-1] != parts[0].in_features or not _ready(x, *weights):
        return None
    weight = _one_piece(weights)
    if weight is None or all(bias is None for bias in biases):
        return None if weight is None else (weight, None)
    bias = _one_piece(biases) if _ready(x, *biases) else None
    return None if bias is None else (weight, bias)


def _one_piece(parts: Sequence[Tensor]) -> Tensor | None:
    """A view of these tensors (n, ...) as one, (sum of n, ...); None where they are not adjacent in one storage."""
    first, end = parts[0].detach(), parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.shape[1:] != first.shape[1:]:
            return None
        end += part.nbytes
    # adjacent by chance, in different storages: then the first storage ends before `end`
    start = first.data_ptr() - first.storage_offset() * first.element_size()
    if start + first.untyped_storage().nbytes() < end:
        return None
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
