"""Hints for control networks: images of any kind -> RGB at the size of the generated image.

Hints have dark backgrounds: edges and scribbles are white lines on black, depth is white where things are near. What is
transparent or lies outside of a hint is black: nothing is asked for there.

>>> placed(hint_image(Image.new("L", (40, 20), 255)), 32, 32, "pad").getpixel((0, 0))
(0, 0, 0)
"""

from __future__ import annotations

from PIL import Image, ImageChops

from .files import flatten
from .tensors import fit, frame

BLACK = (0, 0, 0)
BRIGHT, DARK = 200, 60  # of 255
MOSTLY = 0.75  # share of bright pixels of black lines on white
LINES = 0.9  # share of bright and dark ones together
SHADED = 0.3  # share of all others in a picture
COLOURED = 12  # difference of the channels of a pixel, of 255


def hint_image(image: Image.Image, managed: bool = False) -> Image.Image:
    """A hint of any mode (grey, 16 bits, transparent, a palette) as RGB. Raises ValueError if it cannot be read.

    managed   whether to apply a colour profile in it: to pictures, but not to maps of edges, depth or directions
    """
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # PIL opens files lazily
        raise ValueError(f"cannot be read: {error}") from None
    return flatten(image, BLACK, managed)[0]


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
    red, *others = hint.split()
    if any(sum(ImageChops.difference(red, other).histogram()[COLOURED + 1 :]) for other in others):
        return False
    counts = hint.convert("L").histogram()
    bright, dark, count = sum(counts[BRIGHT + 1 :]), sum(counts[:DARK]), hint.width * hint.height
    return dark > 0 and bright > MOSTLY * count and bright + dark > LINES * count


def looks_shaded(hint: Image.Image) -> bool:
    """Whether much of an RGB hint is neither bright nor dark, as in a picture, and unlike lines on one colour."""
    counts = hint.convert("L").histogram()
    return sum(counts[DARK : BRIGHT + 1]) > SHADED * hint.width * hint.height
