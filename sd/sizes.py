"""Sizes of images and of their latents.

>>> from sd.config import SD1
>>> latent_shape(SD1), latent_shape(SD1, height=768), image_size(SD1, (1000, 700))
((4, 64, 64), (4, 96, 64), (424, 608))
"""

from __future__ import annotations

import math

from .config import Config
from .params import whole

MAX_SIDE = 16384  # pixels


def latent_shape(config: Config, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of an image, with the native size of the model for a side that is None.

    Raises ValueError, with the nearest valid sizes, for a side that is not a multiple of the VAE's factor.
    """
    factor = config.vae.factor
    sides = []
    for name, given in (("height", height), ("width", width)):
        side = config.size if given is None else whole(name, given)
        if side > MAX_SIDE:
            raise ValueError(f"{name} must be at most {MAX_SIDE}, got {side}")
        if side % factor or side < factor:
            lower, upper = max(side // factor, 1) * factor, max(-(-side // factor), 1) * factor
            near = f"{lower} or {upper}" if lower != upper else f"{lower}"
            raise ValueError(f"{name} must be a multiple of {factor}, got {side}: try {near}")
        sides.append(side // factor)
    return config.vae.latent_channels, sides[0], sides[1]


def image_size(
    config: Config, size: tuple[int, int], height: int | None = None, width: int | None = None, *, up: bool = False
) -> tuple[int, int]:
    """The (height, width) at which to generate an image of the given (width, height).

    Multiples of 8 with about the same proportions. The size of the image itself if that has from half to twice as many
    pixels as the native size, at which the model works best; otherwise as many pixels as the native size. A side that
    is given is used as it is. Sides are rounded down, so the image is cropped, or up, for an image that is padded.
    """
    factor, native = config.vae.factor, config.size
    wide, high = size
    if height is not None and width is not None:
        scale = 1.0
    elif height is not None:
        scale = height / high
    elif width is not None:
        scale = width / wide
    else:
        share = wide * high / native**2
        scale = 1.0 if 0.5 <= share <= 2 else share**-0.5

    def rounded(side: float) -> int:
        multiples = math.ceil(side / factor - 1e-6) if up else math.floor(side / factor + 1e-6)
        return min(max(multiples, 1), MAX_SIDE // factor) * factor

    height = rounded(high * scale) if height is None else height
    width = rounded(wide * scale) if width is None else width
    latent_shape(config, height, width)  # raises for a given side that is invalid
    return height, width
