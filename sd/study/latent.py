"""The latent: the compressed image that diffusion works on, and the loss of compression.

Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1. The VAE compresses
8x8x3 values of an image into 4, so the U-Net processes 48 times fewer. The loss of the round trip is measured as

    PSNR = 10 log10(255² / mean((a - b)²))         in decibels; 30 is good, 40 is nearly indistinguishable
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
    """An image through the VAE and back."""

    image: Image.Image
    latent: Tensor  # (C, h, w), the mean, as the U-Net sees it
    spread: Tensor  # (C, h, w), the encoder's standard deviation
    decoded: Image.Image
    psnr: float  # decibels
    factor: float  # compression: values of the image / values of the latent


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB images of the same size, in decibels; infinite if they are equal.

    >>> round(psnr(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (5, 5, 5))), 2)
    34.15
    """
    if a.size != b.size:
        raise ValueError(f"expected two images of the same size, got {a.size} and {b.size}")
    one, other = (np.asarray(image.convert("RGB"), np.float64) for image in (a, b))
    error = float(((one - other) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def round_trip(model: StableDiffusion, image: Image.Image) -> RoundTrip:
    """Encode and decode an RGB image; its sides must be multiples of the VAE's factor."""
    gaussian = model.encode(image)
    decoded = model.decode(gaussian.mode())[0]
    numbers = image.width * image.height * model.config.vae.image_channels
    return RoundTrip(
        image,
        gaussian.mean[0],
        gaussian.std[0],
        decoded,
        psnr(image, decoded),
        numbers / gaussian.mean[0].numel(),
    )


def as_colours(latents: Tensor) -> list[Image.Image]:
    """The first three channels of latents (B, C, h, w) as red, green and blue; -3 to 3 maps to dark to light."""
    return to_pil(latents[:, :3].float() / 3)


def difference(a: Image.Image, b: Image.Image, gain: float = 4.0) -> Image.Image:
    """The difference b - a, amplified by `gain`, on middle grey."""
    one, other = (np.asarray(image.convert("RGB"), np.float32) for image in (a, b))
    return Image.fromarray((127.5 + gain * (other - one)).clip(0, 255).round().astype(np.uint8))


def draw_round_trip(trip: RoundTrip, width: int = 220, gain: float = 4.0) -> Image.Image:
    """The image, the channels of its latent, the decoded image, and the difference."""
    C, h, w = trip.latent.shape
    top = float(trip.latent.abs().max())
    small = (width - 8) // 2
    channels = [heat(channel, small, -top, top, diverging=True) for channel in trip.latent]
    pairs = [beside(channels[i : i + 2], gap=8) for i in range(0, C, 2)]
    latent = above(pairs, gap=8)
    W, H = trip.image.size
    images = [
        captioned(scaled(trip.image, width), f"image\n{H} x {W} x 3 values"),
        captioned(latent, f"latent, {C} channels\n{h} x {w} x {C} values"),
        captioned(scaled(trip.decoded, width), f"decoded\nPSNR {trip.psnr:.1f} dB"),
        captioned(scaled(difference(trip.image, trip.decoded, gain), width), f"difference\namplified {gain:g} times"),
    ]
    arrow = paragraph(">", None, 28, (150, 156, 166))
    row = [images[0], arrow, images[1], arrow, images[2], images[3]]
    body = above([beside(row, gap=14, align="middle"), scale_bar(f"-{top:.1f}", f"{top:.1f}", diverging=True)], gap=14)
    return figure(
        "The latent: a compressed image",
        body,
        f"The encoder compresses the image {trip.factor:.0f} times, the decoder reconstructs it. Each channel of the "
        "latent is a small map of the image. Diffusion works on the latent.",
    )
