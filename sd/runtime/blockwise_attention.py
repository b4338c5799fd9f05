"""Attention on x86 CPUs, computed in blocks of queries: on many processors faster than PyTorch's kernel.

On some processors, the fused kernel reaches a sixth of the peak with heads of width 40. Here a block of scores stays in
the cache between the two matrix products and the exponential. Which kernel is faster, and which size of blocks, is
measured for each kind of call (kernel_choice.py). B batch, N tokens, M tokens of the context, d width of a head.

    softmax(s) v = (exp(s) v) / (exp(s) 1)

takes one pass over the scores instead of three: the sum is one more column of v, and powers of 2 are faster than powers
of e. Without subtracting the maximum, exp and the sums could overflow; |q| |k| bounds the scores, and where the bound
is large (which is rare) the usual softmax is used.

In bfloat16, scores are rounded before the softmax: an error of 0.5 %, against 0.2 % in PyTorch's kernel, where they are
about 1, and more where they are larger. A whole U-Net in bfloat16 is 1.4 % off either way.

>>> q, k = torch.randn(1, 2, 600, 16), torch.randn(1, 2, 700, 16)
>>> torch.allclose(blockwise(q, k, k, Blocks(2**20, packed=True)), F.scaled_dot_product_attention(q, k, k), atol=1e-5)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import layers
from . import packing
from .device import DTYPES, dtype_name
from .kernel_choice import PLAIN, Kind, fastest
from .packing import LANES, for_inference, linear, pack_linear


class Blocks(NamedTuple):
    """How to divide attention."""

    scores: int  # how many a thread computes at a time: 0.5 to 4 MB, which should stay in its cache
    packed: bool  # whether oneDNN packs keys and values once for a head; if not, `bmm` takes some heads at a time


# Blocks can be smaller where the keys are packed once instead of for each block. In float32, `bmm` would use MKL.
KERNELS: dict[torch.dtype, dict[str, Blocks]] = {
    torch.bfloat16: {
        "blocks": Blocks(2**20, packed=False),
        "small blocks": Blocks(2**18, packed=False),
        "packed blocks": Blocks(2**20, packed=True),
        "small packed blocks": Blocks(2**18, packed=True),
    },
    torch.float32: {"packed blocks": Blocks(2**20, packed=True)},
}
PACKED_FROM = 512  # keys from which packing them is tried
THREADS = 2, 4  # the thread count is clamped to this range: with fewer, calls cost more than the cache saves
ROWS = 128  # at least, queries in a block, as each product reads all keys

LARGEST_EXPONENT = 100.0  # numbers from 2^-100 to 2^100 are exact, as the smallest of float32 and bfloat16 is 2^-126
LARGEST_SUM = 126.0  # and the largest 2^127: for the values, each times such a power, summed over all keys
# Limits of the example of a kind: queries, enough that packing the keys pays off as for all queries, and scores of all
# heads. Larger examples take longer and show nothing else.
EXAMPLE_QUERIES, EXAMPLE_SCORES = 1024, 2**20


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`layers.attention` by the fastest kernel: q (B, N, D), k and v (B, M, D) -> (B, N, D)."""
    if (
        type(q) is not Tensor
        or q.device.type != "cpu"
        or not for_inference(q, k, v)
        or q.dtype not in packing.onednn_dtypes()
        or not torch.backends.mkldnn.enabled
        or k.shape[0] != q.shape[0]
        or 0 in (q.numel(), k.shape[1])
    ):
        return layers.attention(q, k, v, heads)
    name = kernel_for(q.shape[0] * heads, q.shape[1], k.shape[1], q.shape[2] // heads, q.dtype)
    if name == PLAIN:
        return layers.attention(q, k, v, heads)
    blocks = KERNELS[q.dtype][name]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
    return blockwise(q, k, v, blocks).transpose(1, 2).flatten(-2)


@cache
def names(M: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels for M keys, which has to be that of a kind: all calls of a kind have the same kernels."""
    return PLAIN, *(name for name, blocks in KERNELS[dtype].items() if M >= PACKED_FROM or not blocks.packed)


def kernel_for(heads: int, N: int, M: int, d: int, dtype: torch.dtype) -> str:
    """The name of the kernel for N queries and M keys of width d, with this many heads in the whole batch."""
    kind = kind_of(heads, N, M, d, dtype)
    return fastest(kind, names(int(kind[4]), dtype), partial(_example, kind))


def kind_of(heads: int, N: int, M: int, d: int, dtype: torch.dtype) -> Kind:
    """The kind of a call (see `kernel_for`): the sizes of its example.

    They are rounded up to powers of two, so that kinds are few, and limited, so that large calls have small examples.
    """
    heads, N, M = (2 ** (size - 1).bit_length() for size in (heads, N, M))
    N = min(N, max(EXAMPLE_QUERIES, EXAMPLE_SCORES // M))
    heads = min(heads, max(1, EXAMPLE_SCORES // (N * M)))
    return ("attention", dtype_name(dtype), heads, N, M, d)


def _example(kind: Kind) -> Callable[[str], Tensor]:
    _, name, *sizes = kind
    dtype, (heads, N, M, d) = DTYPES[str(name)], map(int, sizes)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, d, generator=rng, device="cpu").to(dtype) for n in (N, M, M))

    def run(name: str) -> Tensor:
        if name == PLAIN:
            return F.scaled_dot_product_attention(q, k, v)
        return blockwise(q, k, v, KERNELS[dtype][name])

    return run


def blockwise(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for q (B, heads, N, d) and k, v (B, heads, M, d), some heads and queries at a time."""
    B, heads, N, d = q.shape
    M = k.shape[2]
    q, k, v = (x.reshape(B * heads, -1, d) for x in (q, k, v))
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (q, k)]
    bound = norms[0] * norms[1] * (d**-0.5 * math.log2(math.e))
    largest = torch.stack(torch.aminmax(v)).abs().amax().float().clamp(min=1)
    # False if there is a NaN
    small = bool((bound < LARGEST_EXPONENT) & (bound + torch.log2(M * largest) < LARGEST_SUM))
    q = q * (d**-0.5 * (math.log2(math.e) if small else 1.0))
    sums = v.new_zeros(B * heads, M, (d // LANES + 1) * LANES)  # v, a column of ones, zeros up to whole registers
    sums[..., :d], sums[..., d] = v, 1
    least, most = THREADS
    at_a_time = blocks.scores * min(max(torch.get_num_threads(), least), most)
    rows = min(N, max(ROWS, at_a_time // M))
    group = 1 if blocks.packed else max(1, min(B * heads, at_a_time // (rows * M)))
    out = q.new_empty(B * heads, N, sums.shape[-1])
    for i in range(0, B * heads, group):
        each = slice(i, i + group)
        times_keys, times_values = (_times(x[each], blocks.packed) for x in (k.transpose(1, 2), sums))
        for j in range(0, N, rows):
            scores = times_keys(q[each, j : j + rows])
            weights = scores.exp2_() if small else torch.softmax(scores, dim=-1, out=scores)
            out[each, j : j + rows] = times_values(weights)
    x = out[..., :d] / out[..., d : d + 1]
    return x.view(B, heads, N, d)


def _times(matrices: Tensor, packed: bool) -> Callable[[Tensor], Tensor]:
    """The function x (g, n, a) -> x @ matrices (g, a, b), for g = 1 if they are to be packed."""
    if not packed:
        return lambda x: torch.bmm(x, matrices)
    weight = pack_linear(matrices[0].t().contiguous())
    return lambda x: linear(x[0], weight, None).unsqueeze(0)
