"""Hints for control networks: images of any kind -> RGB at the size of the generated image.

Hints have dark backgrounds: edges and scribbles are white lines on black, depth is white where things are near. What is
transparent or lies outside of a hint is black: nothing is asked for there.

>>> placed(hint_image(Image.new("L", (40, 20), 255)), 32, 32, "pad").getpixel((0, 0))
(0, 0, 0)
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .files import flatten
from .tensors import fit, frame

BLACK = (0, 0, 0)
BRIGHT, DARK = 200, 60  # of 255
MOSTLY = 0.75  # share of bright pixels of black lines on white
COLOURED = 12  # difference of the channels of a pixel, of 255


def hint_image(image: Image.Image) -> Image.Image:
    """A hint of any mode (grey, 16 bits, transparent, a palette) as RGB. Raises ValueError if it cannot be read."""
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # PIL opens files lazily
        raise ValueError(f"the hint cannot be read: {error}") from None
    return flatten(image, BLACK)[0]


def placed(hint: Image.Image, width: int, height: int, how: str) -> Image.Image:
    """An RGB hint at this size: cropped like the image ("crop"), or whole with black around it ("pad")."""
    if how == "crop":
        return fit(hint, width, height)
    framed, inside = frame(hint, width, height)
    sheet = Image.new("RGB", (width, height), BLACK)
    sheet.paste(framed.crop(inside), inside[:2])
    return sheet


def looks_inverted(hint: Image.Image) -> bool:
    """Whether an RGB hint looks like black lines on white, where control networks expect white lines on black."""
    pixels = np.asarray(hint).astype(np.int16)
    if (pixels.max(axis=2) - pixels.min(axis=2)).max() > COLOURED:
        return False
    grey = pixels.mean(axis=2)
    bright, dark = (grey > BRIGHT).mean(), (grey < DARK).mean()
    return bool(bright > MOSTLY and dark > 0 and bright + dark > 0.9)
