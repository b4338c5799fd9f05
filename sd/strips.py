"""The VAE in strips, for pictures whose feature maps would not fit: the same numbers with a third of the memory.

Elsewhere large pictures are decoded in tiles that know nothing of each other, and their edges are blended. But what a
tile shares with the rest of the picture is little: a convolution looks one row beyond it, and GroupNorm needs the mean
and variance of the whole map. So each layer goes over the map twice, in strips of rows: once for the statistics, once
to normalise, activate and convolve. The result differs by rounding from that of the whole map, and there is no seam.

A map is kept only where it is read more than once later; the output of the last enlargement, the largest of all, is
computed again instead. (Attention is in the coarsest level alone and runs on the whole.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ResBlock, Upsample
from .vae import VAE

ROWS = 64  # of a strip of a map as wide as high; narrower ones get more


class Enlarged:
    """The output of an `Upsample` that is computed when rows of it are asked for."""

    def __init__(self, up: Upsample, x: Tensor) -> None:
        self.up, self.x = up, x
        self.shape = (x.shape[0], up.conv.out_channels, 2 * x.shape[2], 2 * x.shape[3])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop (B, C, stop - start, W)."""
        first, last = max((start - 1) // 2, 0), min(-(-(stop + 1) // 2), self.x.shape[2])  # of x: a row more each way
        near = F.interpolate(self.x[:, :, first:last], scale_factor=2.0, mode="nearest")
        return _convolved(self.up.conv, near, start - 2 * first, stop - 2 * first)
