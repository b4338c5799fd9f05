"""The forms in which programs save masks -> grey, white where the image is generated.

    strokes    on a transparent layer, all of one colour               their alpha is the mask
    labels     two values, as 0 and 1 or 0 and 3 of a class            the higher one is white
    colours    two, one of them black or white: white on red           white is white; on black, the colour
    grey       anything else; colours become their luminance (ITU-R 601)

Labels of several classes, two other colours, and an image with a transparent part are ambiguous, so they are refused.

>>> labels = Image.new("L", (8, 8))
>>> labels.paste(3, (0, 0, 8, 4))
>>> grey, notes = grey_mask(labels.convert("RGB"), None)
>>> grey.getextrema(), notes
((0, 255), ['the mask has the values 0 and 3: they are taken as labels, and 3 is generated'])
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

A_FEW = 16  # pixels; a value or colour of so few is noise and no label
NEARLY = 20  # of 255: masks saved as JPEG are not exactly black and white
HALF = 128  # two values are labels if the higher one is below this, and a soft mask otherwise
COLOURED = 60  # of 255: a larger difference between red, green and blue is not compression noise on grey
SAME = 48  # of 255: the noise of compression around the edges of a colour
LIGHT, DARK = 225, 30  # of 255: the least channel of white, the highest one of black
SEEN = 256  # side of the sample in which colours are looked for
SEVERAL = 16  # colours at most that may be labels of classes; an image has more
MAKE = "make the part to generate white and the rest black"

Pixels = NDArray[np.integer[Any]]


class Grey(NamedTuple):
    """A mask in mode L, and notes on how it was read."""

    mask: Image.Image
    notes: list[str]


def grey_mask(colours: Image.Image, alpha: Image.Image | None) -> Grey:
    """An RGB image and its alpha (mode L, or None) -> the mask. Raises ValueError for an ambiguous one."""
    if alpha is not None:
        strokes = alpha.point([0] * 128 + [255] * 128)
        counts = np.reshape(colours.histogram(strokes), (3, 256))  # histograms of red, green and blue
        if all(np.ptp(np.flatnonzero(count)) <= 3 for count in counts if count.any()):
            return Grey(alpha, [])
        black = Image.new("RGB", colours.size)
        black.paste(colours, mask=alpha)
        colours = black
    if not _is_coloured(colours):
        return _grey_labels(colours.convert("L"))
    few = colours.getcolors(SEVERAL)
    if alpha is not None and few is None:
        raise ValueError(
            "the mask is an image with a transparent part, and it is not clear which of the two is meant: save the "
            "mask alone, in black and white; or give this image as the one to change, without a mask"
        )
    if (found := _two_colours(colours)) is not None:
        return found
    if few is not None and len(few) > 2 and all(count > A_FEW for count, _ in few):
        raise ValueError(f"the mask has {len(few)} colours, as labels of several classes: {MAKE}")
    return Grey(
        colours.convert("L"), ["the mask has colours, and only their brightness is used: is it the right file?"]
    )


def palette_labels(image: Image.Image) -> Image.Image | None:
    """The indices 0 and 1 of an image in mode P whose two colours say nothing: neither is black or white."""
    used = image.getcolors(2)
    if used is None or len(used) != 2 or "transparency" in image.info:
        return None
    low, high = sorted(index for _, index in used if isinstance(index, int))
    palette = image.convert("RGB").getcolors(2) or []
    ends = [colour for _, colour in palette if isinstance(colour, tuple) and (_is_white(colour) or _is_black(colour))]
    if low != 0 or ends or len(palette) != 2:
        return None
    return image.point([0] * high + [1] * (256 - high), "L")


def _is_coloured(image: Image.Image) -> bool:
    red, green, blue = image.split()
    most = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    least = ImageChops.darker(ImageChops.darker(red, green), blue)
    return sum(ImageChops.subtract(most, least).histogram()[COLOURED:]) > image.width * image.height / 100


def _grey_labels(grey: Image.Image) -> Grey:
    counts = np.array(grey.histogram())
    values = np.flatnonzero(counts)
    high = int(values[-1])
    if high == 0 or counts[1:].sum() <= A_FEW:
        return Grey(grey, [])
    labels = values.tolist() in ([1], [0, high]) and high < HALF
    if labels:
        name = (
            "the value 1 only: it is taken as a label"
            if len(values) == 1
            else f"the values 0 and {high}: they are taken as labels"
        )
        white = grey.point([0] * high + [255] * (256 - high))
        return Grey(white, [f"the mask has {name}, and {high} is generated"])
    if high <= NEARLY and len(values) > 1:
        found = ", ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "")
        raise ValueError(f"the mask is nearly black, with the values {found}, as labels of several classes: {MAKE}")
    return Grey(grey, [])


def _two_colours(image: Image.Image) -> Grey | None:
    """The mask if an image has two colours, with soft edges or the noise of compression; None for other images."""
    sample = image.resize((min(image.width, SEEN), min(image.height, SEEN)), Image.Resampling.NEAREST)
    pixels = np.asarray(sample, dtype=np.int16).reshape(-1, 3)
    first = _commonest(pixels)
    rest = pixels[np.abs(pixels - first).max(axis=1) > COLOURED]
    if len(rest) <= A_FEW:
        return None
    second = _commonest(rest)
    line = (second - first).astype(np.float32)
    share = ((pixels - first) @ line / (line @ line)).clip(0, 1)
    distance = np.abs(pixels - first - share[:, None] * line).max(axis=1)
    at_ends = np.minimum(share, 1 - share) * np.abs(line).max() <= SAME
    if (distance <= SAME).mean() < 0.98 or at_ends.mean() < 0.9:
        return None
    white, other = (first, second) if _is_white(first) or _is_black(second) else (second, first)
    name = "#{:02x}{:02x}{:02x}".format(*other)
    if _is_white(white):
        note = f"the mask is white and {name}: white is generated"
    elif _is_black(other):
        name = "#{:02x}{:02x}{:02x}".format(*white)
        note = f"the mask is black and {name}: {name} is generated"
    else:
        both = "{} and #{:02x}{:02x}{:02x}".format(name, *white)
        raise ValueError(f"the mask has the colours {both}, and it is not clear which of them is meant: {MAKE}")
    line = (white - other).astype(np.float32)
    weights = line * (255 / float(line @ line))
    matrix = (*(float(weight) for weight in weights), -float(weights @ other))
    return Grey(image.convert("L", matrix), [note])


def _commonest(pixels: Pixels) -> Pixels:
    """The mean of the pixels (N, 3) around the most common colour."""
    bins = (pixels >> 5) @ np.array([64, 8, 1])
    most = pixels[bins == np.bincount(bins).argmax()].mean(axis=0)
    near = pixels[np.abs(pixels - most).max(axis=1) <= NEARLY]
    found: Pixels = np.rint(near.mean(axis=0)).astype(np.int16)
    return found


def _is_white(colour: Any) -> bool:
    return bool(min(colour) >= LIGHT)


def _is_black(colour: Any) -> bool:
    return bool(max(colour) <= DARK)
