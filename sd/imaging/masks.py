"""Masks for inpainting, in pixels and in latents, and pasting the result into the original image.

A mask is 1 (white) where the image is generated and 0 (black) where it is kept, with soft values in between. There are
two kinds of model:

    9 channels (Rombach et al. 2022, section 4.5; the inpainting checkpoints): the input of the U-Net has, after x,
               mask (1)             the mask at latent size, by nearest pixel, 0 or 1
               masked latent (4)    the encoded image with the masked part grey
    4 channels (all others): x0 is known outside of the masked part, see `denoiser.keep_known`

With both, the result is pasted into the image through the mask: where the mask is 0, no pixel changes.

>>> mask = torch.zeros(1, 1, 64, 64)
>>> mask[..., 16:32, 16:32] = 1
>>> latent_mask(mask, 8).sum()
tensor(4.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from .files import flatten_mask
from .mask_forms import NEARLY
from .tensors import Box, frame, resize, to_tensor

MAX_ASPECT = 2.0  # of the region around a mask, if the image is large enough


def prepare_mask(
    mask: Image.Image, size: tuple[int, int], blur: float = 0.0, note: Callable[[str], object] = warnings.warn
) -> Image.Image:
    """The mask (any mode, white is generated) at the size of the image, blurred by `blur` pixels; mode L.

    Nearly black and nearly white values become black and white. The blur extends outwards only. `note` is called with
    warnings. Raises ValueError for a mask that is not an image or ambiguous (mask_forms.py), and for a blur that is not
    from 0 to the size of the image.
    """
    if not 0 <= blur <= max(size):
        raise ValueError(f"mask blur must be from 0 to the image's size in pixels, got {blur}")
    if not isinstance(mask, Image.Image):
        raise ValueError(f"mask must be a PIL image (imaging.files.read_mask reads files), got {type(mask).__name__}")
    grey = flatten_mask(mask, note)
    if abs(grey.width * size[1] / (grey.height * size[0]) - 1) > 0.03:
        note(f"the mask is {grey.width}x{grey.height} and the image {size[0]}x{size[1]}: it is stretched")
    values = np.asarray(resize(grey, *size))
    values = np.where(values <= NEARLY, 0, np.where(values >= 255 - NEARLY, 255, values)).astype(np.uint8)
    if values.min() == 255:
        note("the mask is white everywhere: the whole image is generated")
    elif 0 < (highest := values.max()) < 255:
        note(f"the mask is nowhere white (at most {highest} of 255): the result is blended with the image")
    if blur:
        blurred = np.asarray(Image.fromarray(values).filter(ImageFilter.GaussianBlur(blur))).astype(np.uint16)
        # at a straight edge the blurred mask is 0.5, so twice its value falls from 1 to 0 on the outer side
        values = np.maximum(values, np.minimum(2 * blurred, values.max())).astype(np.uint8)
    return Image.fromarray(values)


def surroundings(mask: Image.Image, margin: int) -> Box | None:
    """The bounding box of a mask, extended by `margin` pixels on all sides; None for an empty mask.

    A long and narrow box is widened as far as the image permits, because models are not trained on such proportions.
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
    """The box, extended evenly to the aspect ratio width / height = `aspect` within an image of this size."""
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
    """(B, 1, H, W) -> (B, 1, h, w), 0 or 1: the nearest (top left) pixel of each latent, as in training of such models.

    Parts so thin that they lie between those pixels are kept: where no such pixel is near, each latent touched counts.
    """
    mask = (mask >= 0.5).to(mask.dtype)
    nearest = mask[..., ::factor, ::factor]
    near = F.max_pool2d(nearest, 3, stride=1, padding=1)
    return torch.where(near > 0, nearest, F.max_pool2d(mask, factor))


def masked_image(image: Tensor, mask: Tensor) -> Tensor:
    """The image (B, 3, H, W) in [-1, 1] with the masked part set to 0, middle grey."""
    return image * (mask < 0.5)


def mask_channels(mask: Tensor, masked: Tensor) -> Tensor:
    """Mask (B or 1, 1, h, w), latents (B, 4, h, w) of the masked image -> inpainting models' `concat` (B, 5, h, w)."""
    return torch.cat([mask.to(masked).expand(masked.shape[0], -1, -1, -1), masked], dim=1)


def fill(image: Tensor, mask: Tensor) -> Tensor:
    """The image (B, 3, H, W) with its masked part (mask (B, 1, H, W)) filled smoothly with the surrounding colours.

    Uses a pyramid ("pull-push", Gortler et al. 1996, "The lumigraph"): each coarser level averages the known pixels and
    then fills the unknown pixels of the finer level.
    """
    known = 1 - mask
    if max(image.shape[-2:]) > 1 and known.min() < 1:
        half = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True, count_include_pad=False)
        share = half(known)
        mean = half(image * known) / share.clamp(min=1e-6)
        coarse = fill(mean, 1 - (2 * share).clamp(max=1))
        smooth = F.interpolate(coarse, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return torch.lerp(smooth, image, known)
    return image * known


class Canvas(NamedTuple):
    """A region of an image at the size that the model generates, and how to paste the result back."""

    image: Image.Image  # the whole image
    mask: Image.Image  # of the same size
    region: Box  # in the image
    inside: Box  # the region in the model's input; its edge pixels are repeated around it
    pixels: Tensor  # (1, 3, H, W) in [-1, 1], the model's input
    hole: Tensor  # (1, 1, H, W): 1 where the mask is above 0; pasting applies the soft values

    @classmethod
    def of(cls, image: Image.Image, mask: Image.Image, region: Box, width: int, height: int) -> Canvas:
        """From an RGB image and a mask (mode L) of the same size, the region, and the size of the model's input."""
        framed, inside = frame(image.crop(region), width, height)
        wide, high = inside.size
        anything = (to_tensor(mask.crop(region)) > -1).float()
        # a pixel is masked if any pixel below it is: interpolation would lose smaller holes
        less = F.adaptive_max_pool2d(anything, (min(high, region.size[1]), min(wide, region.size[0])))
        hole = torch.zeros(1, 1, height, width, dtype=torch.float32, device="cpu")
        hole[..., inside.top : inside.bottom, inside.left : inside.right] = F.interpolate(less, (high, wide))
        return cls(image, mask, region, inside, to_tensor(framed), hole)

    def filled(self) -> Tensor:
        """The pixels with the masked part filled by the surrounding colours."""
        return fill(self.pixels, self.hole)

    def paste(self, generated: Image.Image) -> Image.Image:
        """The image with the generated region pasted through the mask: where the mask is 0, no pixel changes."""
        result = self.image.copy()
        part = resize(generated.crop(self.inside), *self.region.size)
        result.paste(part, self.region[:2], self.mask.crop(self.region))
        return result
