"""Aspect-ratio buckets: images of similar proportions are trained at one size, so that little is cropped off.

All buckets have about the same area: that of a square of the side `size`, or a little less, because sides are multiples
of what the U-Net halves without rest. An image goes into the bucket that crops it least. It is resized until it covers
the bucket, never stretched, and what sticks out is cropped off evenly on both sides.

>>> bucket_shapes(128, 32)
((64, 192), (96, 160), (128, 128), (160, 96), (192, 64))
>>> place((300, 200), bucket_shapes(128, 32))
Placement(height=96, width=160, original=(200, 300), crop=(5, 0), kept=0.9, enlarged=False)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sd.config import Config
from sd.imaging.tensors import CROP_NOTE, SLACK, kept_by_crop
from sd.messages import counted

MAX_ASPECT = 3  # of a bucket: longer ones are hardly ever needed, and SD 1 repeats its subject in them
STEP = 64  # of the sides of buckets, in pixels, as in the training of SDXL and in kohya's scripts
LARGE = 512  # the native size from which models have that step
NAMED = 5  # cropped images that are named; the others are counted

Shape = tuple[int, int]  # (height, width) in pixels


class Placement(NamedTuple):
    """How an image gets the size of its bucket, all in pixels."""

    height: int
    width: int
    original: Shape  # (height, width) of the file
    crop: Shape  # what is cropped off (top, left) of the resized image
    kept: float  # the share of the image that is not cropped off
    enlarged: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers that SDXL is told, in the order of `sd.config.BASE_SIZES`."""
        return (*self.original, *self.crop, self.height, self.width)


def bucket_step(config: Config) -> int:
    """The step of the sides of a model's buckets: its U-Net halves all of them without rest."""
    whole = config.vae.factor * 2 ** (len(config.unet.channels) - 1)
    return max(STEP, whole) if config.size >= LARGE else whole


def bucket_shapes(size: int, step: int) -> tuple[Shape, ...]:
    """All buckets, by height: for each width, a multiple of `step`, the largest height with at most `size`² pixels.

    The proportions are at most `MAX_ASPECT` to 1. Raises ValueError if not even a square fits.
    """
    if size < step:
        raise ValueError(f"--size must be at least {step} for this model, got {size}")
    sides = range(step, size * MAX_ASPECT, step)
    wide = {(size * size // width // step * step, width) for width in sides if width * width >= size * size}
    wide.add((size // step * step,) * 2)
    found = {shape for height, width in wide for shape in ((height, width), (width, height)) if height}
    return tuple(sorted(shape for shape in found if max(shape) <= MAX_ASPECT * min(shape)))


def place(size: tuple[int, int], shapes: Sequence[Shape]) -> Placement:
    """The placement of an image of this size (width, height) in the bucket that crops it least, as `fit` does it."""
    height, width = max(shapes, key=lambda shape: (kept_by_crop(size, shape[::-1]), shape[0] * shape[1]))
    scale = max(width / size[0], height / size[1])
    if all(0 <= side - wanted < SLACK for side, wanted in zip(size, (width, height), strict=True)):
        scale = 1.0  # `fit` only crops such an image
    resized = round(size[0] * scale), round(size[1] * scale)
    crop = max(resized[1] - height, 0) // 2, max(resized[0] - width, 0) // 2
    kept = width * height / (size[0] * size[1] * scale**2)
    return Placement(height, width, (size[1], size[0]), crop, min(round(kept, 6), 1.0), scale > 1)


def summary(names: Sequence[str], placements: Sequence[Placement]) -> str:
    """One line on the images of folders: how many buckets, the largest crop, which are cropped much, how many enlarged.

    names, placements   of each image once
    """
    shapes = Counter((each.height, each.width) for each in placements)
    (height, width), _ = shapes.most_common(1)[0]
    where = f"of {width}x{height} pixels" if len(shapes) == 1 else f"most often {width}x{height} pixels"
    largest = 1 - min(each.kept for each in placements)
    parts = [
        f"{counted(len(names), 'image')} in {counted(len(shapes), 'bucket')}, {where}",
        f"largest crop {100 * largest:.0f} %",
    ]
    lost = sorted((each.kept, name) for name, each in zip(names, placements, strict=True) if each.kept < CROP_NOTE)
    if lost:
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        listed = ", ".join(f"{name} ({100 - 100 * kept:.0f} %)" for kept, name in lost[:NAMED])
        parts.append(f"cropped by more than {100 - 100 * CROP_NOTE:.0f} %: {listed}{more}")
    if enlarged := sum(each.enlarged for each in placements):
        parts.append(f"{enlarged} smaller than its bucket and enlarged")
    if len(names) == 1:
        parts.append("from one image a model learns little more than to repeat it")
    return "; ".join(parts)
