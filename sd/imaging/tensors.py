"""Pictures in memory: PIL images <-> tensors in [-1, 1], bringing them to a size, grids.

Sizes are (width, height) in PIL's and height x width in tensors' order. Nothing is ever stretched: a picture keeps its
proportions and is either cut (`fit`) or framed (`frame`).

>>> picture = Image.new("RGB", (60, 40), "orange")
>>> to_tensor(picture).shape
torch.Size([1, 3, 40, 60])
>>> to_pil(to_tensor(picture))[0] == picture, fit(picture, 32, 32).size, grid([picture] * 4).size
(True, (32, 32), (120, 80))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SLACK = 8  # pixels: cut off rather than resampled away, as resampling by a few pixels only blurs


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], what lies outside being cut off -> RGB pictures.

    Rounded to the nearest of 256 values; the original truncates, which darkens by half a step.
    """
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (1, 3, H, W) float32 in [-1, 1]; grey (mode L) -> (1, 1, H, W)."""
    pixels = np.array(image, dtype=np.float32)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(pixels / 127.5 - 1)[None]


class Box(NamedTuple):
    """Part of a picture, in pixels; right and bottom are the first ones outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.right - self.left, self.bottom - self.top


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture at this size, smoothed as it needs to be; itself if it has the size already."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the picture that has these proportions, at this size."""
    spare = image.width - width, image.height - height
    scale = max(width / image.width, height / image.height)
    if all(0 <= pixels < SLACK for pixels in spare):
        scale = 1.0
    if scale == 1.0:
        left, top = spare[0] // 2, spare[1] // 2
        return image.crop((left, top, left + width, top + height))
    # rounding must not lead out of the picture
    wide, high = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    box = (left, top, min(left + wide, image.width), min(top + high, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def frame(image: Image.Image, width: int, height: int) -> tuple[Image.Image, Box]:
    """The whole picture within this size, its edge pixels repeated around it, and where in the result it is.

    It is only resized where it is larger, or where it would fill less than the frame by `SLACK` pixels or more.
    """
    spare = width - image.width, height - image.height
    if not all(pixels >= 0 for pixels in spare) or not any(pixels < SLACK for pixels in spare):
        scale = min(width / image.width, height / image.height)
        wide, high = (max(round(side * scale), 1) for side in image.size)
        image = resize(image, min(wide, width), min(high, height))
    left, top = (width - image.width) // 2, (height - image.height) // 2
    box = Box(left, top, left + image.width, top + image.height)
    edges = [(top, height - box.bottom), (left, width - box.right), (0, 0)]
    pixels = np.asarray(image)
    return Image.fromarray(np.pad(pixels, edges[: pixels.ndim], mode="edge")), box


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of all of them, row by row, as nearly square as can be unless `columns` is given."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for n, image in enumerate(images):
        sheet.paste(image, (n % columns * width, n // columns * height))
    return sheet
