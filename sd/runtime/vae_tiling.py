"""The VAE in strips of rows, for images whose feature maps would not fit: the same result in a fraction of the memory.

Large images are usually decoded in independent tiles whose edges are blended. But a tile needs little from outside: a
convolution looks one row further, and GroupNorm needs the mean and variance of the whole map. So every layer here goes
over its map twice in strips: once to measure, and once to normalise, activate and convolve. The result differs from
that of `VAE` by rounding, and there are no seams.

A map that is read again is kept. The results of upsampling are the largest maps of all: one of more than `KEPT` numbers
is computed each time that it is read. Attention occurs only in the coarsest level, which it sees as a whole. Within
`CircularPadding` (circular.py) the rows beyond an edge are those at the opposite one.

B batch, C channels, H x W pixels of a map, rows a to b of it without b.

>>> from sd.config import VAEConfig
>>> vae, z = VAE(VAEConfig(channels=(32, 64), blocks=1)), torch.randn(1, 4, 24, 16)
>>> with torch.no_grad():
...     torch.allclose(decode_in_strips(vae, z), vae.decode(z), atol=1e-4)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import ResBlock, Upsample
from ..models.vae import VAE, Downsample, Gaussian, Stage
from .circular import is_circular
from .cpu_kernels import moments

NUMBERS = 2**23  # of a strip in half precision, 16 MB; half as many in float32
KEPT = 2**27  # numbers in the largest upsampled map that is kept: 512 channels of 512x512 pixels
LEAST = 8  # rows of a strip: each strip computes up to two rows more than it gives


class Map(NamedTuple):
    """A feature map, or what gives its rows."""

    shape: tuple[int, int, int, int]  # B, C, H, W
    rows: Callable[[int, int], Tensor]  # a, b -> (B, C, b - a, W)
    bytes: int  # of one number

    def strips(self) -> Iterator[tuple[int, int]]:
        """The (a, b) that cover it."""
        B, C, H, W = self.shape
        step = max(2 * NUMBERS // (self.bytes * B * C * W), LEAST)
        return ((a, min(a + step, H)) for a in range(0, H, step))


def stored(x: Tensor) -> Map:
    """A map that is in memory."""
    B, C, H, W = x.shape
    return Map((B, C, H, W), lambda a, b: rows_of(x, a, b), x.element_size())


def rows_of(x: Tensor, a: int, b: int) -> Tensor:
    """Rows a to b of x (B, C, H, W), which is periodic where they lie outside."""
    H = x.shape[2]
    if a >= 0 and b <= H:
        return x[:, :, a:b]
    periods = range(a // H, -(-b // H))
    return torch.cat([x[:, :, max(a - i * H, 0) : min(b - i * H, H)] for i in periods], dim=2)


def within(a: int, b: int, height: int) -> tuple[int, int]:
    """Rows a to b without those beyond the edges of a map of this height; all of them if it wraps around."""
    return (a, b) if is_circular() else (max(a, 0), min(b, height))


def upsampled(up: Upsample, x: Tensor) -> Map:
    """The result of upsampling x, computed where it is read."""
    B, _, H, W = x.shape

    def rows(a: int, b: int) -> Tensor:
        first, last = within(a // 2 - 1, -(-b // 2) + 1, H)
        return up(rows_of(x, first, last))[:, :, a - 2 * first : b - 2 * first]

    return Map((B, up.conv.out_channels, 2 * H, 2 * W), rows, x.element_size())


def empty(x: Map, conv: nn.Conv2d) -> Tensor:
    """Memory for a map as high and wide as x, with the channels, device and precision of a convolution's output."""
    B, _, H, W = x.shape
    like = conv.bias
    assert like is not None
    return torch.empty(
        (B, conv.out_channels, H, W), device=like.device, dtype=like.dtype, memory_format=torch.channels_last
    )


def activated(norm: nn.GroupNorm, x: Map) -> Callable[[Tensor], Tensor]:
    """The function rows -> SiLU(GroupNorm(rows)), with the mean and variance of the whole map."""
    B, C, H, _ = x.shape
    mean, square = torch.zeros(2, B, C, dtype=torch.float64, device="cpu")
    for a, b in x.strips():
        of_rows = moments(x.rows(a, b))
        mean += of_rows[0] * ((b - a) / H)
        square += of_rows[1] * ((b - a) / H)
    groups = (B, norm.num_groups, C // norm.num_groups)
    mean, square = (y.view(groups).mean(-1, keepdim=True).expand(groups) for y in (mean, square))
    var = (square - mean**2).clamp(min=0)
    # of each channel, as batch normalisation has them: it is one operation, where the formula would be several
    mean, var = (y.reshape(B, C).float().to(norm.weight.device) for y in (mean, var))
    weight, bias = norm.weight.float(), norm.bias.float()
    own = norm.weight.device.type != "mps"  # which cannot mix precisions there (PyTorch issue 154887)

    def ready(rows: Tensor) -> Tensor:
        given = rows if own else rows.float()
        each = [F.batch_norm(x, mean[i], var[i], weight, bias, eps=norm.eps) for i, x in enumerate(given.split(1))]
        return F.silu(each[0] if B == 1 else torch.cat(each), inplace=True).to(rows.dtype)

    return ready


def around(x: Map, a: int, b: int) -> tuple[Tensor, slice]:
    """The input of a 3x3 convolution for rows a to b (one more row on each side, if any), and their place in it.

    Beyond the edge of a map that does not wrap around, the convolution itself pads with zeros; where it does so
    elsewhere, rows are dropped.
    """
    first, last = within(a - 1, b + 1, x.shape[2])
    return x.rows(first, last), slice(a - first, b - first)


def res_block(res: ResBlock, x: Map, out: Tensor | None = None) -> Tensor:
    """A residual block of x; written over x where that is given as `out`."""
    h = empty(x, res.conv1)
    fresh = out is None
    out = torch.empty_like(h) if out is None else out
    ready = activated(res.norm1, x)
    for a, b in x.strips():
        rows, inner = around(x, a, b)
        h[:, :, a:b] = res.conv1(ready(rows))[:, :, inner]
        if fresh:
            out[:, :, a:b] = res.skip(rows[:, :, inner])
    x = stored(h)
    ready = activated(res.norm2, x)
    for a, b in x.strips():
        rows, inner = around(x, a, b)
        out[:, :, a:b] += res.conv2(ready(rows))[:, :, inner]
    return out


def next_map(res: ResBlock, x: Map, own: Tensor | None) -> Tensor:
    """A residual block of x. `own` is the memory of x, if it has any, and is written over where the shapes allow it."""
    return res_block(res, x, own if isinstance(res.skip, nn.Identity) else None)


def in_memory(x: Map, conv: nn.Conv2d) -> Tensor:
    """The map itself, computed strip by strip; `conv` is the layer whose result it is."""
    out = empty(x, conv)
    for a, b in x.strips():
        out[:, :, a:b] = x.rows(a, b)
    return out


def last_layers(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """SiLU(GroupNorm(x)), convolved."""
    source = stored(x)
    ready, out = activated(norm, source), empty(source, conv)
    for a, b in source.strips():
        rows, inner = around(source, a, b)
        out[:, :, a:b] = conv(ready(rows))[:, :, inner]
    return out


def halved(down: Downsample, x: Tensor) -> Tensor:
    """`down` of x, whose sides are even; each row of the result is made of three."""
    H, W = x.shape[-2:]
    out = empty(stored(x[:, :, : H // 2, : W // 2]), down.conv)
    for a, b in stored(out).strips():
        # past the edge of a map that does not wrap around, and nowhere else, its padding is seen
        out[:, :, a:b] = down(rows_of(x, *within(2 * a, 2 * b + 1, H)))
    return out


def decode_in_strips(vae: VAE, z: Tensor) -> Tensor:
    """As `vae.decode`: latents (B, 4, h, w) -> image (B, 3, H, W), about [-1, 1], not clamped."""
    decoder = vae.decoder
    x = decoder.mid(decoder.conv_in(vae.post_quant(z / vae.config.scale)))
    source, own = stored(x), cast("Tensor | None", x)  # the map, and its memory
    for stage in cast("Iterable[Stage]", reversed(decoder.up)):
        for res in cast("Iterable[ResBlock]", stage.res):
            x = own = next_map(res, source, own)
            source = stored(x)  # from here on, the memory of the one before is free
        if stage.up is not None:
            source, own = upsampled(stage.up, x), None
            if math.prod(source.shape) <= KEPT:
                x = own = in_memory(source, stage.up.conv)
                source = stored(x)
    return last_layers(decoder.norm_out, decoder.conv_out, x)


def encode_in_strips(vae: VAE, image: Tensor) -> Gaussian:
    """As `vae.encode`: image (B, 3, H, W) in [-1, 1] -> Gaussian over (B, 4, h, w)."""
    encoder = vae.encoder
    x = encoder.conv_in(image)
    for stage in cast("Iterable[Stage]", encoder.down):
        for res in cast("Iterable[ResBlock]", stage.res):
            x = next_map(res, stored(x), x)
        if stage.down is not None:
            x = halved(stage.down, x)
    return vae.gaussian(last_layers(encoder.norm_out, encoder.conv_out, encoder.mid(x)))
