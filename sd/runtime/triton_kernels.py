"""Group normalisation with SiLU, and GEGLU, as Triton kernels for channels-last maps on a GPU; see cuda_kernels.py.

    group norm     y = (x - mean) / sqrt(var + eps) * weight + bias,  then  y * sigmoid(y) where SiLU follows
                   Wu and He 2018, "Group normalization"; mean and var over the pixels and channels of a group
    GEGLU          value * gate * (1 + erf(gate / sqrt(2))) / 2       Shazeer 2020, "GLU variants improve transformer"

Both are limited by memory bandwidth, so each number is read and written as few times as possible; all arithmetic is in
float32.

Variance. With plain sums of squares, all digits cancel where the mean is large. So each part of a map subtracts K, the
mean of its first rows, from every number: with s and q the sums of x - K and (x - K)^2 over n numbers, mean = K + s / n
and n var = q - s^2 / n. As the first rows are 1/T of the part, (mean - K)^2 is at most T var: the difference loses a
factor of T at most, however large the mean is. In the normalisation K is subtracted separately, too: near the mean this
is exact, while K + s / n would be rounded. The parts are combined in the same way, in a fixed order, so the same input
always gives the same bits.

Layout. A map (B, C, H, W) is channels-last in memory, so it is a contiguous (B, H W, C). A program works on tiles of
(rows, groups, lanes): pixels, a few adjacent groups, and the channels of a group. Lanes above C / groups are masked:
sizes in Triton are powers of two, and the groups of SD 1 have 10, 20, 30, 40, 60 or 80 channels.

This module imports triton, which comes with PyTorch on CUDA, so it is imported only when it is used. Triton compiles
each kernel once per machine for each number of channels and each precision.
"""

# mypy: allow-untyped-defs
# (Triton reads the annotations of kernels, and knows only its own.)

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# The kernels read these two, so they are compiled in.
NUMBERS = tl.constexpr(4096)  # in a tile: 16 for each of 256 threads
PARTS_AT_ONCE = tl.constexpr(16)  # how many partial results are read together
WARPS = 8  # in a program, of 32 threads each
LANES = 128  # at most, in a row of a tile, unless a single group has more
GROUPS = 8  # at most, in a tile: every program reads the partial results of all of them
PROGRAMS = 512  # about as many as keep any GPU busy (an H100 has 132 multiprocessors); the rounding depends on it
PARTS = 128  # at most, of a map: every program of the second kernel reads the results of all of them
COLUMNS = 1024  # at most, of a block in GEGLU


# ------------------------------------------------------------------------------------- kernels
# Kernels take pointers and sizes as separate arguments. Arguments in capitals are compiled in. So is an integer
# argument that equals 1, which then has no tensor methods. A mask must have the shape of the tile: conditions such as
# `group >= 0` are always true and only give it this shape.


@triton.jit
def _moments(x, first, last, CHANNELS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr):
    """K, mean - K and the sum of (x - mean)^2 of rows `first` to `last` of x (HW, CHANNELS), for TILE groups."""
    ROWS: tl.constexpr = NUMBERS // (TILE * LANES)
    row = tl.arange(0, ROWS)[:, None, None]
    group = tl.arange(0, TILE)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    at = x + group * SIZE + lane

    inside = (lane < SIZE) & (row < last - first) & (group >= 0)
    numbers = tl.load(at + (first + row).to(tl.int64) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    shift = tl.sum(tl.sum(numbers, axis=2), axis=0) / (SIZE * tl.minimum(last - first, ROWS))  # (TILE,)
    centre = shift[None, :, None]
    away = tl.where(inside, numbers - centre, 0.0)
    sums, squares = away, away * away
    for start in range(first + ROWS, last, ROWS):
        inside = (lane < SIZE) & (row < last - start) & (group >= 0)
        numbers = tl.load(at + (start + row).to(tl.int64) * CHANNELS, mask=inside, other=0.0).to(tl.float32)
        away = tl.where(inside, numbers - centre, 0.0)
        sums += away
        squares += away * away
    total = tl.sum(tl.sum(sums, axis=2), axis=0)
    mean = total / (SIZE * (last - first))
    return shift, mean, tl.maximum(tl.sum(tl.sum(squares, axis=2), axis=0) - total * mean, 0.0)


@triton.jit
def _apply(
    x, y, weight, bias, first, last, shift, mean, scale,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write (x - shift - mean) * scale * weight + bias, activated if SILU, to y, for rows `first` to `last`."""
    ROWS: tl.constexpr = NUMBERS // (TILE * LANES)
    row = tl.arange(0, ROWS)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    channel = tl.arange(0, TILE)[None, :, None] * SIZE + lane
    factor = tl.load(weight + channel, mask=lane < SIZE, other=0.0).to(tl.float32) * scale[None, :, None]
    offset = tl.load(bias + channel, mask=lane < SIZE, other=0.0).to(tl.float32)
    for start in range(first, last, ROWS):
        inside = (lane < SIZE) & (row < last - start) & (channel >= 0)
        at = (start + row).to(tl.int64) * CHANNELS + channel
        numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        numbers = (numbers - shift[None, :, None] - mean[None, :, None]) * factor + offset
        if SILU:
            numbers = numbers / (1.0 + tl.exp(-numbers))
        tl.store(y + at, numbers.to(y.dtype.element_ty), mask=inside)


@triton.jit
def partial_moments(
    x, partial, pixels, share,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Moments of one of the parts, of `share` rows each: `partial` (B, parts, groups, 3)."""
    part, tile, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = part * share
    x += image.to(tl.int64) * pixels * CHANNELS + tile * TILE * SIZE
    shift, mean, squares = _moments(x, first, tl.minimum(first + share, pixels), CHANNELS, SIZE, TILE, LANES)
    at = partial + ((image * tl.num_programs(0) + part) * (CHANNELS // SIZE) + tile * TILE + tl.arange(0, TILE)) * 3
    tl.store(at, shift)
    tl.store(at + 1, mean)
    tl.store(at + 2, squares)


@triton.jit
def normalise_part(
    x, y, weight, bias, partial, pixels, share, eps,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Combine the moments of all parts, and normalise one part."""
    part, tile, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(0)
    GROUPS: tl.constexpr = CHANNELS // SIZE
    group = tile * TILE + tl.arange(0, TILE)
    partial += image * parts * GROUPS * 3
    shift = tl.load(partial + group * 3)  # the K of the first part, used for all
    sums = tl.zeros((PARTS_AT_ONCE, TILE), tl.float32)
    squares = tl.zeros((PARTS_AT_ONCE, TILE), tl.float32)
    for some in range(0, parts, PARTS_AT_ONCE):
        one = (some + tl.arange(0, PARTS_AT_ONCE))[:, None]
        inside = (one < parts) & (group[None, :] >= 0)
        at = partial + (one * GROUPS + group[None, :]) * 3
        away = tl.load(at, mask=inside, other=0.0) - shift[None, :] + tl.load(at + 1, mask=inside, other=0.0)
        count = (tl.minimum(share, pixels - one * share) * SIZE).to(tl.float32)
        count = tl.where(inside, count, 0.0)
        sums += count * away
        squares += tl.load(at + 2, mask=inside, other=0.0) + count * away * away
    count = pixels * (SIZE * 1.0)
    total = tl.sum(sums, axis=0)
    mean = total / count
    variance = tl.maximum(tl.sum(squares, axis=0) - total * mean, 0.0) / count

    here = image.to(tl.int64) * pixels * CHANNELS + tile * TILE * SIZE
    first = part * share
    _apply(
        x + here, y + here, weight + tile * TILE * SIZE, bias + tile * TILE * SIZE, first,
        tl.minimum(first + share, pixels), shift, mean, 1.0 / tl.sqrt(variance + eps),
        SILU, CHANNELS, SIZE, TILE, LANES,
    )  # fmt: skip


@triton.jit
def normalise_whole(
    x, y, weight, bias, pixels, eps,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Moments and normalisation in one kernel, for small maps: a program reads all rows of its groups twice."""
    tile, image = tl.program_id(0), tl.program_id(1)
    here = image.to(tl.int64) * pixels * CHANNELS + tile * TILE * SIZE
    shift, mean, squares = _moments(x + here, 0, pixels, CHANNELS, SIZE, TILE, LANES)
    variance = squares / (pixels * (SIZE * 1.0))
    _apply(
        x + here, y + here, weight + tile * TILE * SIZE, bias + tile * TILE * SIZE, 0, pixels,
        shift, mean, 1.0 / tl.sqrt(variance + eps),
        SILU, CHANNELS, SIZE, TILE, LANES,
    )  # fmt: skip


@triton.jit
def gated(x, y, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """x (rows, 2 WIDTH) -> value * gelu(gate) in y (rows, WIDTH), for a block of rows and COLUMNS columns."""
    ROWS: tl.constexpr = NUMBERS // COLUMNS
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < WIDTH)
    value = tl.load(x + row * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * WIDTH + column, (value * gate).to(y.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------- calls


def tile_of(channels: int, groups: int) -> tuple[int, int, int]:
    """Channels per group, groups per tile and lanes per group.

    At the finest level of SD 1, where a group has 10 channels, 8 groups are read together: 160 bytes in a row.
    """
    size = channels // groups
    lanes = triton.next_power_of_2(size)
    tile = min(max(LANES // lanes, 1), GROUPS)
    while groups % tile:
        tile //= 2
    return size, tile, lanes


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, whole: bool = False
) -> Tensor:
    """F.group_norm, followed by SiLU if `silu`; weight and bias (C,) of the precision of x.

    x        (B, C, H, W), channels-last and not empty; the result is channels-last, too
    whole    use one kernel instead of two: for maps of few pixels
    """
    B, C, H, W = x.shape
    size, tile, lanes = tile_of(C, groups)
    pixels, tiles, rows = H * W, groups // tile, NUMBERS.value // (tile * lanes)
    sizes = {"CHANNELS": C, "SIZE": size, "TILE": tile, "LANES": lanes, "num_warps": WARPS}
    y = torch.empty_like(x)
    with _device_of(x):
        if whole:
            normalise_whole[(tiles, B)](x, y, weight, bias, pixels, eps, SILU=silu, **sizes)
            return y
        parts = min(max(PROGRAMS // (B * tiles), 1), PARTS, -(-pixels // rows))
        share = -(-pixels // parts)
        parts = -(-pixels // share)  # none of them empty
        partial = torch.empty((B, parts, groups, 3), dtype=torch.float32, device=x.device)
        grid = parts, tiles, B
        partial_moments[grid](x, partial, pixels, share, **sizes)
        normalise_part[grid](x, y, weight, bias, partial, pixels, share, eps, SILU=silu, **sizes)
    return y


def geglu(x: Tensor) -> Tensor:
    """x = (value, gate) (..., 2 F), contiguous and not empty -> value * gelu(gate) (..., F)."""
    width = x.shape[-1] // 2
    rows = x.numel() // x.shape[-1]
    columns = min(width & -width, COLUMNS)  # a power of two that divides the width: no column is masked
    columns = columns if columns >= 64 else min(triton.next_power_of_2(width), COLUMNS)
    y = x.new_empty((*x.shape[:-1], width))
    grid = -(-rows // (NUMBERS.value // columns)), -(-width // columns)
    with _device_of(x):
        gated[grid](x, y, rows, WIDTH=width, COLUMNS=columns, num_warps=WARPS)
    return y


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which the device of x is the current one, on which Triton launches its kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
