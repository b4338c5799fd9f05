"""Hints for control networks: the outlines and the depth of a scene, drawn from the shapes themselves.

    draw(scene, Random(7))       the picture
    outlines(scene, Random(7))   white lines on black where its shapes end, at the same places
    depth(scene, Random(7))      grey by nearness: near is white, the sky is black

A hint is drawn as the picture is, by the same painters with the same random numbers, on a canvas that replaces what is
painted: for outlines each shape has one plain colour and a thin line around it, so that edges are where neighbouring
pixels differ; for depth its colour is its nearness. So a hint fits the picture exactly, in each of the three styles.

Where a shape ends but nothing shows it (two shapes of the same colour without an outline) there is no line. Shadows and
glows have none either.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image

from .canvas import Canvas, Colour, Point
from .landscape import HORIZON
from .painting import CELLS, OVERSAMPLE, SIZE, paint_pixels, paint_shapes, painted_area, wandered
from .scenery import PixelCanvas, SceneryCanvas
from .scenes import FLOATING, SINGLE, Scene

HINTS = ("edges", "depth")
THIN = 1 / (OVERSAMPLE * SIZE)  # the width of an outline before reduction: one pixel of a picture of usual size
SHOWS = 0.3  # the opacity that a shape needs for its end to be seen
INK: Colour = (1, 2, 3)  # no shape has this colour
# Nearness from 0 to 1: the sky is 0, the ground begins at `FAR` and ends at 1 at the lower edge
CLOUDS, CELESTIAL, ALOFT, FAR = 0.04, 0.08, 0.5, 0.15  # `CELESTIAL` are sun and moon, `ALOFT` is what floats


def outlines(scene: Scene, rng: Random, size: int = SIZE, landscape: bool = True) -> Image.Image:
    """White lines on black (mode L, size x size): the outlines of the picture that `draw` makes of equal arguments.

    landscape   False: only those of the things, if there are any, as somebody would sketch them
    """
    if scene.style == "pixel":
        cells = paint_pixels(_PixelOutlines(CELLS, landscape), scene, rng)
        ids = cells.resize((size, size), Image.Resampling.NEAREST)
        return Image.fromarray(np.where(_ends(np.asarray(ids)), np.uint8(255), np.uint8(0)))
    canvas = _Outlines(size * OVERSAMPLE, landscape)
    ids = paint_shapes(canvas, scene, rng, soft=False)
    if scene.style == "watercolour":
        ids = wandered(ids, rng)
    ends = _ends(np.asarray(ids)).reshape(size, OVERSAMPLE, size, OVERSAMPLE).sum((1, 3)) >= OVERSAMPLE
    if scene.style == "watercolour":
        ends &= painted_area(size, rng) > 0.5
    return Image.fromarray(np.where(ends, np.uint8(255), np.uint8(0)))


def depth(scene: Scene, rng: Random, size: int = SIZE) -> Image.Image:
    """Grey by nearness (mode L, size x size), of the picture that `draw` makes of equal arguments."""
    if scene.style == "pixel":
        near = paint_pixels(_PixelDepth(CELLS), scene, rng).resize((size, size), Image.Resampling.NEAREST)
    else:
        near = paint_shapes(_Depth(size * OVERSAMPLE), scene, rng, soft=False)
        near = (wandered(near, rng) if scene.style == "watercolour" else near).reduce(OVERSAMPLE)
    return near.convert("L")


def _ends(ids: np.ndarray) -> np.ndarray:
    """Where a pixel differs from the next one to the right or below: (H, W, 3) -> (H, W) of bool."""
    found = np.zeros(ids.shape[:2], bool)
    found[:, :-1] |= (ids[:, 1:] != ids[:, :-1]).any(2)
    found[:-1] |= (ids[1:] != ids[:-1]).any(2)
    return found


class _OutlinesOf(Canvas):
    """Shapes in plain colours with thin outlines. The first thing replaces the landscape, if that is left out."""

    landscape = True

    def polygon(self, points: Sequence[Point], fill: Colour, ink: Colour | None = None, opacity: float = 1) -> None:
        if opacity >= SHOWS:
            super().polygon(points, fill, INK if ink else None)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, ink: Colour | None = None, opacity: float = 1
    ) -> None:
        if opacity >= SHOWS:
            super().ellipse(x, y, rx, ry, fill, INK if ink else None)

    def stroke(self, points: Sequence[Point], width: float, fill: Colour, opacity: float = 1) -> None:
        if opacity >= SHOWS:
            super().stroke(points, width, fill)

    def shade(self, stops: tuple[tuple[float, Colour], ...], points: Sequence[Point] | None = None) -> None:
        """One colour in place of the gradient."""
        everything = [(-0.01, -0.01), (1.01, -0.01), (1.01, 1.01), (-0.01, 1.01)]
        super().polygon(points or everything, stops[-1][1])

    def begin(self, kind: str, foot: float) -> None:
        if not self.landscape:
            self.image.paste(INK, (0, 0, self.side, self.side))
            self.landscape = True


class _Outlines(_OutlinesOf, SceneryCanvas):
    def __init__(self, side: int, landscape: bool) -> None:
        super().__init__(side, THIN)
        self.landscape = landscape


class _PixelOutlines(_OutlinesOf, PixelCanvas):
    def __init__(self, side: int, landscape: bool) -> None:
        super().__init__(side)
        self.landscape = landscape


def _ground(y: float) -> float:
    """The nearness of the ground at a height of the picture."""
    return FAR + (1 - FAR) * min(max((y - HORIZON) / (1 - HORIZON), 0.0), 1.0)


def _grey(near: float) -> Colour:
    return (round(255 * near),) * 3


GROUND = tuple((y, _grey(_ground(y))) for y in (0.0, HORIZON, 1.0))


class _DepthOf(Canvas):
    """Shapes in the grey of their nearness. Of the landscape, a shape that goes down to the lower edge is ground, one
    that does not stands on it; what is painted before the ground is in the sky. A thing is as near as the ground at its
    foot.
    """

    _near: float | None = None  # of the present thing
    _sky = True

    def _grey(self, foot: float) -> Colour:
        if self._near is not None:
            return _grey(self._near)
        return _grey(CLOUDS if self._sky or foot < HORIZON - 0.1 else _ground(foot))

    def polygon(self, points: Sequence[Point], fill: Colour, ink: Colour | None = None, opacity: float = 1) -> None:
        foot = max(y for _, y in points)
        if opacity >= SHOWS and self._near is None and foot > 1:
            self.shade((), points)
        elif opacity >= SHOWS:
            super().polygon(points, self._grey(foot))

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, ink: Colour | None = None, opacity: float = 1
    ) -> None:
        if opacity >= SHOWS:
            super().ellipse(x, y, rx, ry, self._grey(y + ry))

    def stroke(self, points: Sequence[Point], width: float, fill: Colour, opacity: float = 1) -> None:
        if opacity >= SHOWS:
            super().stroke(points, width, self._grey(max(y for _, y in points)))

    def point(self, column: int, row: int, fill: Colour) -> None:
        super().point(column, row, self._grey((row + 1) / self.side))

    def shade(self, stops: tuple[tuple[float, Colour], ...], points: Sequence[Point] | None = None) -> None:
        if points is None:
            self.image.paste((0, 0, 0), (0, 0, self.side, self.side))
        else:
            self._sky = False
            super().shade(GROUND, points)

    def begin(self, kind: str, foot: float) -> None:
        self._near = (CELESTIAL if kind in SINGLE else ALOFT) if kind in FLOATING else _ground(foot)


class _Depth(_DepthOf, SceneryCanvas):
    pass


class _PixelDepth(_DepthOf, PixelCanvas):
    def sprite(self, letters: np.ndarray, colours: np.ndarray, left: int, top: int) -> None:
        super().sprite(letters, np.full_like(colours, self._grey(1)), left, top)
