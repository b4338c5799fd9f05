"""The means of painting: colours under a light, a canvas of vector shapes, and a frame to place a thing on it.

Lengths and positions are in units of the picture's side, (0, 0) is the upper left corner and y goes down.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

WHITE: Colour = (255, 255, 255)
RGB: dict[str, Colour] = {  # of the words for colours
    "red": (220, 44, 44),
    "orange": (247, 132, 28),
    "yellow": (253, 214, 48),
    "green": (44, 158, 70),
    "blue": (44, 98, 220),
    "purple": (150, 72, 206),
    "pink": (248, 132, 188),
    "white": (250, 249, 246),
}


def mix(one: Colour, other: Colour, part: float) -> Colour:
    """The colour on the way from `one` (part 0) to `other` (part 1)."""
    red, green, blue = (round((1 - part) * a + part * b) for a, b in zip(one, other, strict=True))
    return red, green, blue


class Light(NamedTuple):
    """The light of a time: it mixes a part of its own colour into every other."""

    colour: Colour
    part: float

    def __call__(self, colour: Colour) -> Colour:
        """The day's colour in this light."""
        return mix(colour, self.colour, self.part)


THING_LIGHT = {  # less than on the ground, so that a colour stays what it is called
    "day": Light(WHITE, 0.0),
    "sunset": Light((150, 70, 110), 0.10),
    "night": Light((24, 28, 84), 0.11),
    "cloudy": Light((110, 118, 132), 0.08),
}


class Tones:
    """The tones a thing of one colour is painted in under the light of a time; `soft` makes the outlines lighter."""

    def __init__(self, colour: str, time: str, soft: bool = False) -> None:
        lit, base = THING_LIGHT[time], RGB[colour]
        white = colour == "white"
        self.base = lit(base)
        self.light = lit(WHITE if white else mix(base, (255, 250, 225), 0.38))
        self.dark = lit((196, 200, 218) if white else mix(base, (44, 16, 74), 0.28))
        self.roof = lit((104, 112, 146) if white else mix(base, (58, 26, 62), 0.55))
        grey, part = ((140, 144, 170), 0.38) if soft else ((110, 114, 142), 0.54)
        part *= 0.7 if time == "night" else 1  # the sky is dark, too
        self.ink = lit(grey if white else mix(base, (32, 14, 50), part))
        self.wood, self.dark_wood = lit((150, 98, 58)), lit((98, 60, 40))
        self.leaf, self.dark_leaf = lit((92, 170, 84)), lit((44, 110, 62))
        self.cream, self.white, self.grey = lit((250, 236, 206)), lit((250, 250, 250)), lit((168, 170, 184))
        self.black, self.rubber = lit((40, 32, 44)), lit((62, 58, 72))
        self.beak, self.blush = lit((250, 150, 40)), lit((246, 150, 150))
        dark = time in ("night", "sunset")
        self.window = (255, 226, 120) if dark else lit((150, 208, 238))
        self.spot = lit((196, 190, 204)) if white else self.white  # dots and patches that must show on the base


@cache
def gradient(stops: tuple[tuple[float, Colour], ...], width: int, height: int, bands: int) -> Image.Image:
    """A vertical gradient through (height, colour) stops; with `bands`, in that many even steps."""
    y = (np.arange(height) + 0.5) / height
    if bands:
        y = (np.floor(y * bands) + 0.5) / bands
    places, colours = zip(*stops, strict=True)
    column = np.stack([np.interp(y, places, channel) for channel in zip(*colours, strict=True)], axis=1)
    return Image.fromarray(np.repeat(column.round().astype(np.uint8)[:, None], width, axis=1))


class Canvas:
    """A square picture of `side` pixels that is painted shape by shape.

    `line` is the width of the outlines; 0 paints none.
    """

    bands = 0  # steps in gradients; 0 is smooth

    def __init__(self, side: int, line: float = 0.0) -> None:
        self.side, self.line = side, line
        self.image = Image.new("RGB", (side, side))
        self._solid = ImageDraw.Draw(self.image)
        self._glazed = ImageDraw.Draw(self.image, "RGBA")

    def _brush(self, opacity: float, fill: Colour) -> tuple[ImageDraw.ImageDraw, tuple[int, ...]]:
        return (self._solid, fill) if opacity >= 1 else (self._glazed, (*fill, round(255 * opacity)))

    def polygon(self, points: Sequence[Point], fill: Colour, ink: Colour | None = None, opacity: float = 1) -> None:
        """A filled polygon; with `ink` and a line width, outlined."""
        s = self.side
        corners = [(x * s, y * s) for x, y in points]
        brush, colour = self._brush(opacity, fill)
        brush.polygon(corners, fill=colour)
        if ink and self.line:
            corners += corners[:2]
            self._solid.line(corners, ink, max(1, round(self.line * s)), joint="curve")

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, ink: Colour | None = None, opacity: float = 1
    ) -> None:
        """A filled ellipse with half axes rx and ry; with `ink` and a line width, outlined."""
        s, half = self.side, self.line / 2
        brush, colour = self._brush(opacity, fill)
        if ink and self.line:
            box = [(x - rx - half) * s, (y - ry - half) * s, (x + rx + half) * s, (y + ry + half) * s]
            self._solid.ellipse(box, fill=ink)
            rx, ry = max(rx - half, 0), max(ry - half, 0)
        left, top = round((x - rx) * s), round((y - ry) * s)
        box = [left, top, max(left, round((x + rx) * s) - 1), max(top, round((y + ry) * s) - 1)]  # these are included
        (brush.ellipse if box[2] - left > 1 and box[3] > top else brush.rectangle)(box, fill=colour)

    def stroke(self, points: Sequence[Point], width: float, fill: Colour, opacity: float = 1) -> None:
        """An open line."""
        s = self.side
        brush, colour = self._brush(opacity, fill)
        brush.line([(x * s, y * s) for x, y in points], colour, max(1, round(width * s)), joint="curve")

    def point(self, column: int, row: int, fill: Colour) -> None:
        """One pixel; what is outside is left out."""
        self._solid.point((column, row), fill)

    def shade(self, stops: tuple[tuple[float, Colour], ...], points: Sequence[Point] | None = None) -> None:
        """A vertical gradient over the whole picture, or inside a polygon."""
        s = self.side
        fill = gradient(stops, s, s, self.bands)
        if points is None:
            self.image.paste(fill)
            return
        top = max(0, int(min(y for _, y in points) * s))
        mask = Image.new("L", (s, s - top))
        ImageDraw.Draw(mask).polygon([(x * s, y * s - top) for x, y in points], fill=255)
        self.image.paste(fill.crop((0, top, s, s)), (0, top), mask)


class Frame:
    """A thing's own coordinates on a canvas: (0, 0) its middle, 1 half its size, v = 1 the ground it stands on."""

    def __init__(self, canvas: Canvas, x: float, y: float, r: float) -> None:
        self.canvas, self.x, self.y, self.r = canvas, x, y, r

    def polygon(self, points: Sequence[Point], fill: Colour, ink: Colour | None = None, opacity: float = 1) -> None:
        """A filled polygon."""
        self.canvas.polygon([(self.x + u * self.r, self.y + v * self.r) for u, v in points], fill, ink, opacity)

    def box(self, u0: float, v0: float, u1: float, v1: float, fill: Colour, ink: Colour | None = None) -> None:
        """A filled rectangle."""
        self.polygon([(u0, v0), (u1, v0), (u1, v1), (u0, v1)], fill, ink)

    def ellipse(
        self, u: float, v: float, ru: float, rv: float, fill: Colour, ink: Colour | None = None, opacity: float = 1
    ) -> None:
        """A filled ellipse."""
        r = self.r
        self.canvas.ellipse(self.x + u * r, self.y + v * r, ru * r, rv * r, fill, ink, opacity)

    def blob(self, circles: Sequence[tuple[float, float, float]], fill: Colour, ink: Colour | None = None) -> None:
        """Circles (u, v, radius) that melt into one shape with one outline."""
        if ink and self.canvas.line:
            edge = self.canvas.line / 2 / self.r
            for u, v, radius in circles:
                self.ellipse(u, v, radius + edge, radius + edge, ink)
        for u, v, radius in circles:
            inner = radius - self.canvas.line / 2 / self.r if ink else radius
            self.ellipse(u, v, inner, inner, fill)

    def stroke(self, points: Sequence[Point], width: float, fill: Colour, opacity: float = 1) -> None:
        """An open line; its width is in units of the frame."""
        r = self.r
        self.canvas.stroke([(self.x + u * r, self.y + v * r) for u, v in points], width * r, fill, opacity)
