"""The tiny autoencoder in strips of rows: the same result for large images, in a part of the memory.

It has neither normalisation nor attention, so a row depends only on those around it: at full resolution, on one more to
each side for every 3x3 convolution. Only the full resolution is computed in strips. The maps of half the resolution,
with a quarter of the numbers, are kept whole. Within `CircularPadding` the rows beyond an edge are those at the
opposite one.

>>> from sd.config import TinyVAEConfig
>>> vae, z = TinyVAE(TinyVAEConfig()), torch.randn(1, 4, 24, 16)
>>> with torch.no_grad():
...     torch.allclose(decode_tiny_in_strips(vae, z), vae.decode(z), atol=1e-4)
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.taesd import NO_ENCODER, TinyVAE
from ..models.vae import Gaussian
from .vae_tiling import LEAST, rows_of, within

NUMBERS = 2**24  # of a strip: 32 to 64 MB
OF_BLOCK = 3  # rows to each side that a block sees: it has three convolutions


def decode_tiny_in_strips(vae: TinyVAE, z: Tensor) -> Tensor:
    """As `vae.decode`: latents (B, 4, h, w) -> image (B, 3, H, W), about [-1, 1], not clamped."""
    decoder = vae.decoder
    *coarse, finest = reversed(decoder.up)
    *whole, up = [decoder.first, *(layer for stage in coarse for layer in stage.layers())]
    if not coarse:
        return vae.decode(z)
    x = z
    for layer in whole:
        x = layer(x)
    B, C, H, W = x.shape  # of half the resolution
    reach = -(-(2 + OF_BLOCK * len(finest.blocks)) // 2)  # rows of x: the convolutions before and after the blocks
    image = x.new_empty(B, decoder.conv_out.out_channels, 2 * H, 2 * W)
    step = max(NUMBERS // (4 * B * C * W), LEAST)
    for a in range(0, H, step):
        b = min(a + step, H)
        first, last = within(a - reach, b + reach, H)
        rows = up(rows_of(x, first, last))
        for block in finest.blocks:
            rows = block(rows)
        image[:, :, 2 * a : 2 * b] = decoder.conv_out(rows)[:, :, 2 * (a - first) : 2 * (b - first)]
    return 2 * image - 1


def encode_tiny_in_strips(vae: TinyVAE, image: Tensor) -> Gaussian:
    """As `vae.encode`: image (B, 3, H, W) in [-1, 1] -> latents (B, 4, h, w) without spread."""
    encoder = vae.encoder
    if encoder is None:
        raise ValueError(NO_ENCODER)
    finest, *coarse = encoder.down
    if finest.down is None:
        return vae.encode(image)
    B, _, H, W = image.shape
    C = encoder.conv_in.out_channels
    reach = 2 + OF_BLOCK * len(finest.blocks)
    reach += reach % 2  # halving starts at an even row
    x = image.new_empty(B, C, H // 2, W // 2).contiguous(memory_format=torch.channels_last)
    step = max(NUMBERS // (2 * B * C * W), LEAST)
    for a in range(0, H // 2, step):
        b = min(a + step, H // 2)
        first, last = within(2 * a - reach, 2 * b + reach, H)
        rows = encoder.conv_in((rows_of(image, first, last) + 1) / 2)
        for block in finest.blocks:
            rows = block(rows)
        x[:, :, a:b] = finest.down(rows)[:, :, a - first // 2 : b - first // 2]
    for stage in coarse:
        for layer in stage.layers():
            x = layer(x)
    return vae.gaussian(encoder.conv_out(x))
