"""Attention on x86 CPUs by its formula, a block of queries at a time: for many keys faster than PyTorch's fused kernel.

The fused kernel reaches a sixth of the processor's peak with heads of width 40. Here a block of scores stays in the
cache between two matrix products and the exponential. B batch, N tokens, M tokens of the context, d width of a head.

    softmax(s) v = (exp(s) v) / (exp(s) 1)

takes one pass over the scores instead of three: the sum is one more column of v, and a power of 2 is faster than one of
e. Without subtracting the maximum, exp and the sums could overflow; |q| |k| bounds the scores, and where the bound is
large (which is rare) the usual softmax is used.

In bfloat16, scores are rounded before the softmax: an error of 0.5 %, against 0.2 % in the fused kernel, where they are
about 1, and more where they are larger. A whole U-Net in bfloat16 is 1.4 % off either way.

>>> q, k = torch.randn(1, 2, 600, 16), torch.randn(1, 2, 700, 16)
>>> torch.allclose(blockwise(q, k, k), F.scaled_dot_product_attention(q, k, k), atol=1e-5)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import layers
from . import packing
from .kernel_choice import faster
from .packing import LANES, for_inference, linear, pack_linear

SCORES = 2**20  # how many of its scores a thread computes at a time: 2 to 4 MB, which stay in the cache
THREADS = 2, 4  # the thread count is clamped to this range: with fewer, calls cost more than the cache saves
ROWS = {torch.bfloat16: 512, torch.float32: 256}  # queries at least, as each product reorders the keys

LARGEST_EXPONENT = 100.0  # numbers from 2^-100 to 2^100 are exact, as the smallest of float32 and bfloat16 is 2^-126
LARGEST_SUM = 126.0  # and the largest 2^127: for the values, each times such a power, summed over all keys

# Heads, tokens and width of a head for which the two kernels are compared: those of a small map in a U-Net. Where
# blockwise attention is faster, it is so for the text's 77 keys, for larger maps and for wider heads as well.
EXAMPLE = 4, 1024, 64


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`layers.attention`, blockwise where that is faster: q (B, N, D), k and v (B, M, D) -> (B, N, D)."""
    if (
        type(q) is not Tensor
        or q.device.type != "cpu"
        or not for_inference(q, k, v)
        or q.dtype not in packing.onednn_dtypes()
        or not torch.backends.mkldnn.enabled
        or k.shape[0] != q.shape[0]
        or 0 in (q.numel(), k.shape[1])
        or not faster(("attention", q.dtype), partial(_example, q.dtype))
    ):
        return layers.attention(q, k, v, heads)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
    return blockwise(q, k, v).transpose(1, 2).flatten(-2)


def _example(dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    q = torch.ones(1, *EXAMPLE, dtype=dtype, device="cpu")
    return lambda: blockwise(q, q, q), lambda: F.scaled_dot_product_attention(q, q, q)


def blockwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for q (B, heads, N, d) and k, v (B, heads, M, d), some heads and queries at a time."""
    B, heads, N, d = q.shape
    M = k.shape[2]
    q, k, v = (x.reshape(B * heads, -1, d) for x in (q, k, v))
    bound = q.float().norm(dim=-1).amax() * k.float().norm(dim=-1).amax() * (d**-0.5 * math.log2(math.e))
    largest = torch.stack(torch.aminmax(v)).abs().amax().float().clamp(min=1)
    # false if one is not a number
    small = bool((bound < LARGEST_EXPONENT) & (bound + torch.log2(M * largest) < LARGEST_SUM))
    q = q * (d**-0.5 * (math.log2(math.e) if small else 1.0))
    sums = v.new_zeros(B * heads, M, (d // LANES + 1) * LANES)  # v, a column of ones, zeros up to whole registers
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
    """The function x (g, n, a) -> x @ matrices (g, a, b); in float32 through oneDNN, for g = 1, as bmm uses MKL."""
    if matrices.dtype != torch.float32:
        return lambda x: torch.bmm(x, matrices)
    weight = pack_linear(matrices[0].t().contiguous())
    return lambda x: linear(x[0], weight, None).unsqueeze(0)
