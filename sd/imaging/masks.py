"""Masks: which part of a picture is painted anew, in pixels and in latents, and putting the result back.

A mask is 1 (white) where the picture is painted anew and 0 (black) where it stays, soft in between. The two kinds of
model are told about it in different ways:

    9 channels (Rombach et al. 2022, section 4.5; the inpainting checkpoints): the U-Net is given, behind x,
               mask (1)             the mask at latent size, by nearest pixel, 0 or 1
               masked latent (4)    the picture with the hole greyed, encoded
    4 channels (any other): x0 is known outside of the hole, see `denoiser.keep_known`

Either way the result is pasted into the picture through the mask, so that where the mask is 0 no pixel changes.

>>> mask = torch.zeros(1, 1, 64, 64)
>>> mask[..., 16:32, 16:32] = 1
>>> latent_mask(mask, 8).sum()
tensor(4.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from .files import flatten_mask
from .tensors import Box, frame, resize, to_tensor

MAX_ASPECT = 2.0  # of the part around a mask, as long as there is more of the picture to look at
A_FEW = 16  # pixels of value 1 in a mask without higher ones may be chance; more are labels, 0 and 1
NEARLY = 20  # of 255: masks saved as JPEG are not quite black and white


def prepare_mask(
    mask: Image.Image, size: tuple[int, int], blur: float = 0.0, note: Callable[[str], object] = warnings.warn
) -> Image.Image:
    """The mask (any mode; white is painted anew) at the picture's size, softened by `blur` pixels; mode L.

    What is nearly black or white becomes so. The blur reaches outwards only: the hole itself is painted in full.
    """
    if not 0 <= blur <= max(size):
        raise ValueError(f"mask blur must be from 0 to the picture's size in pixels, got {blur}")
    if not isinstance(mask, Image.Image):
        raise ValueError(f"mask must be a PIL picture (image_files.read_mask reads files), got {type(mask).__name__}")
    grey = flatten_mask(mask)
    if abs(grey.width * size[1] / (grey.height * size[0]) - 1) > 0.03:
        note(f"the mask is {grey.width}x{grey.height} and the image {size[0]}x{size[1]}: it is stretched")
    if grey.getextrema()[1] == 1 and np.count_nonzero(np.asarray(grey)) > A_FEW:  # the labels of annotation tools
        grey = grey.point(lambda value: 255 * value)
    values = np.asarray(resize(grey, *size))
    values = np.where(values <= NEARLY, 0, np.where(values >= 255 - NEARLY, 255, values)).astype(np.uint8)
    if blur:
        blurred = np.asarray(Image.fromarray(values).filter(ImageFilter.GaussianBlur(blur))).astype(np.uint16)
        # at a straight edge the blurred mask is a half, so twice of it falls from 1 to 0 on the outer side
        values = np.maximum(values, np.minimum(2 * blurred, values.max())).astype(np.uint8)
    return Image.fromarray(values)


def surroundings(mask: Image.Image, margin: int) -> Box | None:
    """What to look at to paint through a mask, with `margin` pixels on all sides of it; None for an empty mask.

    Of a long and narrow part more is looked at, as far as the picture reaches: models do not know such proportions.
    """
    found = mask.getbbox()
    if found is None:
        return None
    left, top, right, bottom = found
    box = Box(
        max(left - margin, 0), max(top - margin, 0), min(right + margin, mask.width), min(bottom + margin, mask.height)
    )
    aspect = box.size[0] / box.size[1]
    return widened(box, min(max(aspect, 1 / MAX_ASPECT), MAX_ASPECT), mask.size)


def widened(box: Box, aspect: float, size: tuple[int, int]) -> Box:
    """The box, grown evenly to the proportions width / height = aspect as far as the picture of this size reaches."""
    sides = []
    for low, high, wanted, limit in (
        (box.left, box.right, round(aspect * box.size[1]), size[0]),
        (box.top, box.bottom, round(box.size[0] / aspect), size[1]),
    ):
        length = min(max(high - low, wanted), limit)
        start = min(max(low - (length - (high - low)) // 2, 0), limit - length)
        sides.append((start, start + length))
    (left, right), (top, bottom) = sides
    return Box(left, top, right, bottom)


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """(B, 1, H, W) -> (B, 1, h, w), 0 or 1: the nearest (upper left) pixel of each latent, as 9-channel models know it.

    Parts so thin that they fall between those pixels are not lost: where none is near, every latent touched counts.
    """
    mask = (mask >= 0.5).to(mask.dtype)
    nearest = mask[..., ::factor, ::factor]
    near = F.max_pool2d(nearest, 3, stride=1, padding=1)
    return torch.where(near > 0, nearest, F.max_pool2d(mask, factor))


def hide(image: Tensor, mask: Tensor) -> Tensor:
    """The picture (B, 3, H, W) in [-1, 1] with the hole in the middle grey, 0."""
    return image * (mask < 0.5)


def conditioning(mask: Tensor, hidden: Tensor) -> Tensor:
    """What a model of 9 channels is given behind x: mask (B or 1, 1, h, w), hidden picture's latent (B, 4, h, w)."""
    return torch.cat([mask.to(hidden).expand(hidden.shape[0], -1, -1, -1), hidden], dim=1)


def fill(image: Tensor, mask: Tensor) -> Tensor:
    """The picture (B, 3, H, W) with the hole (mask (B, 1, H, W)) filled smoothly with the colours around it.

    By a pyramid ("pull-push", Gortler et al. 1996, "The lumigraph"): each coarser level averages the pixels that are
    known, and on the way back to the finer ones fills those that are not.
    """
    known = 1 - mask
    if max(image.shape[-2:]) > 1 and known.min() < 1:
        half = {"kernel_size": 2, "ceil_mode": True, "count_include_pad": False}
        share = F.avg_pool2d(known, **half)
        mean = F.avg_pool2d(image * known, **half) / share.clamp(min=1e-6)
        coarse = fill(mean, 1 - (2 * share).clamp(max=1))
        smooth = F.interpolate(coarse, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return torch.lerp(smooth, image, known)
    return image * known


class Canvas(NamedTuple):
    """The part of a picture that the model looks at, at the size that it paints at, and the way back."""

    picture: Image.Image  # all of it
    mask: Image.Image  # of its size
    region: Box  # the part, in the picture
    inside: Box  # the part, in what is painted; around it, its edge pixels repeated
    pixels: Tensor  # (1, 3, H, W) in [-1, 1]
    hole: Tensor  # (1, 1, H, W): 1 where the mask paints anything at all. How much of it is seen, pasting decides

    @classmethod
    def of(cls, picture: Image.Image, mask: Image.Image, region: Box, width: int, height: int) -> Canvas:
        """RGB picture and mask (mode L) of one size, the part to look at, and the size to paint at."""
        framed, inside = frame(picture.crop(region), width, height)
        wide, high = inside.size
        anything = (to_tensor(mask.crop(region)) > -1).float()
        # a pixel is painted if one under it is: smoothing would lose holes smaller than it
        less = F.adaptive_max_pool2d(anything, (min(high, region.size[1]), min(wide, region.size[0])))
        hole = torch.zeros(1, 1, height, width, dtype=torch.float32, device="cpu")
        hole[..., inside.top : inside.bottom, inside.left : inside.right] = F.interpolate(less, (high, wide))
        return cls(picture, mask, region, inside, to_tensor(framed), hole)

    def filled(self) -> Tensor:
        """The pixels, with the colours around it where the hole is."""
        return fill(self.pixels, self.hole)

    def paste(self, painted: Image.Image) -> Image.Image:
        """The picture with what was painted, seen through the mask: where that is 0, no pixel changes."""
        result = self.picture.copy()
        part = resize(painted.crop(self.inside), *self.region.size)
        result.paste(part, self.region[:2], self.mask.crop(self.region))
        return result
