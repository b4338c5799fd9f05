"""Images in memory: PIL images <-> tensors in [-1, 1], resizing, grids.

Sizes of PIL images are (width, height), those of tensors height x width. Images are never stretched: they keep their
aspect ratio and are either cropped (`fit`) or padded (`frame`).

>>> image = Image.new("RGB", (60, 40), "orange")
>>> to_tensor(image).shape
torch.Size([1, 3, 40, 60])
>>> to_pil(to_tensor(image))[0] == image, fit(image, 32, 32).size, grid([image] * 4).size
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

CROP_NOTE = 0.9  # cropping to less than this share is worth a note
SLACK = 8  # pixels: crop smaller excess, because resampling by a few pixels only blurs


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clipped -> RGB images.

    Values are rounded; the original code truncates, which darkens images by half a step of 256.
    """
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (1, 3, H, W) float32 in [-1, 1]; greyscale (mode L) -> (1, 1, H, W)."""
    pixels = np.array(image, dtype=np.float32)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(pixels / 127.5 - 1)[None]


class Box(NamedTuple):
    """A rectangle in pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.right - self.left, self.bottom - self.top


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at this size, by Lanczos resampling; the same object if it has that size already."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at this size, its sides cropped evenly to the new aspect ratio."""
    spare = image.width - width, image.height - height
    scale = max(width / image.width, height / image.height)
    if all(0 <= pixels < SLACK for pixels in spare):
        scale = 1.0
    if scale == 1.0:
        left, top = spare[0] // 2, spare[1] // 2
        return image.crop((left, top, left + width, top + height))
    # rounding errors must not put the box outside of the image
    wide, high = min(width / scale, image.width), min(height / scale, image.height)
    x, y = (image.width - wide) / 2, (image.height - high) / 2
    box = (x, y, min(x + wide, image.width), min(y + high, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def kept_by_crop(size: tuple[int, int], wanted: tuple[int, int]) -> float:
    """The share of an image of a size (width, height) that `fit` keeps: 1 if the proportions are the same."""
    wider = (size[0] / size[1]) / (wanted[0] / wanted[1])
    return min(wider, 1 / wider)


def frame(image: Image.Image, width: int, height: int) -> tuple[Image.Image, Box]:
    """The whole image padded to this size by repeating its edge pixels, and its box in the result.

    It is resized only if it is larger, or smaller by `SLACK` pixels or more in both directions.
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
    """All images in one, row by row; nearly square unless `columns` is given; never with empty columns.

    Raises ValueError if there are no images.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    width, height = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for n, image in enumerate(images):
        sheet.paste(image, (n % columns * width, n // columns * height))
    return sheet
