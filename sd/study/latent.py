"""The latent: what diffusion works on in place of the picture, and what is lost on the way there and back.

Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1. The VAE makes 8x8x3
numbers of a picture into 4, so the U-Net has 48 times less to do; what the decoder cannot bring back is measured as

    PSNR = 10 log10(255² / mean((a - b)²))         in decibels; 30 is good, 40 hard to tell apart
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ..imaging.tensors import to_pil
from ..pipeline import StableDiffusion
from .drawing import above, beside, captioned, figure, heat, paragraph, scale_bar, scaled


class RoundTrip(NamedTuple):
    """A picture through the VAE and back."""

    picture: Image.Image
    latent: Tensor  # (C, h, w), the mean, as the U-Net sees it
    spread: Tensor  # (C, h, w), the encoder's standard deviation
    back: Image.Image
    psnr: float  # decibels
    factor: float  # numbers in the picture to numbers in the latent


def psnr(a: Image.Image, b: Image.Image) -> float:
    """How alike two RGB pictures of one size are, in decibels; infinite if they are equal.

    >>> round(psnr(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (5, 5, 5))), 2)
    34.15
    """
    if a.size != b.size:
        raise ValueError(f"pictures of one size are compared, got {a.size} and {b.size}")
    one, other = (np.asarray(image.convert("RGB"), np.float64) for image in (a, b))
    error = float(((one - other) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def round_trip(model: StableDiffusion, picture: Image.Image) -> RoundTrip:
    """Encode and decode an RGB picture whose sides are multiples of the VAE's factor."""
    gaussian = model.encode(picture)
    back = model.decode(gaussian.mode())[0]
    numbers = picture.width * picture.height * model.config.vae.image_channels
    return RoundTrip(
        picture,
        gaussian.mean[0],
        gaussian.std[0],
        back,
        psnr(picture, back),
        numbers / gaussian.mean[0].numel(),
    )


def as_colours(latents: Tensor) -> list[Image.Image]:
    """The first three channels of (B, C, h, w) as red, green and blue, -3 to 3 as dark to light."""
    return to_pil(latents[:, :3].float() / 3)


def difference(a: Image.Image, b: Image.Image, gain: float = 4.0) -> Image.Image:
    """b - a, `gain` times as strong, around grey."""
    one, other = (np.asarray(image.convert("RGB"), np.float32) for image in (a, b))
    return Image.fromarray((127.5 + gain * (other - one)).clip(0, 255).round().astype(np.uint8))


def draw_round_trip(trip: RoundTrip, width: int = 220, gain: float = 4.0) -> Image.Image:
    """The picture, the channels of its latent, the picture back again, and the difference."""
    C, h, w = trip.latent.shape
    top = float(trip.latent.abs().max())
    small = (width - 8) // 2
    channels = [heat(channel, small, -top, top, diverging=True) for channel in trip.latent]
    pairs = [beside(channels[i : i + 2], gap=8) for i in range(0, C, 2)]
    latent = above(pairs, gap=8)
    W, H = trip.picture.size
    pictures = [
        captioned(scaled(trip.picture, width), f"picture\n{H} x {W} x 3 numbers"),
        captioned(latent, f"latent, {C} channels\n{h} x {w} x {C} numbers"),
        captioned(scaled(trip.back, width), f"decoded\nPSNR {trip.psnr:.1f} dB"),
        captioned(scaled(difference(trip.picture, trip.back, gain), width), f"difference\n{gain:g} times as strong"),
    ]
    arrow = paragraph(">", None, 28, (150, 156, 166))
    row = [pictures[0], arrow, pictures[1], arrow, pictures[2], pictures[3]]
    body = above([beside(row, gap=14, align="middle"), scale_bar(f"-{top:.1f}", f"{top:.1f}", diverging=True)], gap=14)
    return figure(
        "The latent: the picture in fewer numbers",
        body,
        f"The encoder makes one number of every {trip.factor:.0f}, the decoder brings them back. Each channel of the "
        "latent is a small map of the picture: diffusion happens there.",
    )
