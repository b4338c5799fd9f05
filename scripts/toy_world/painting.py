"""Drawing a scene: the positions of its things, and the three styles.

flat         smooth shapes with dark outlines
watercolour  the same shapes, wobbling, in washes of uneven pigment with soft edges, on paper with a bare margin
pixel        32 x 32 square pixels; things are hand-made sprites
"""

from __future__ import annotations

from functools import cache
from random import Random

import numpy as np
from PIL import Image

from .canvas import Colour, Frame, Tones
from .extra import EXTRA_PAINTERS
from .landscape import paint_island, paint_landscape, paint_ripples
from .objects import PAINTERS
from .scenery import PixelCanvas, SceneryCanvas
from .scenes import Scene, Thing
from .sprites import palette, sprite

SIZE = 128  # pixels

# Positions of things, in units of the image's side
HALF = {"small": 0.14, "big": 0.22}  # half the larger side of a thing
COLUMN_X = {"left": 0.27, "middle": 0.5, "right": 0.73}
ROW_X = {"left": 0.19, "middle": 0.5, "right": 0.81}  # of three things
GROUND_Y = 0.85  # of the feet of what stands
SKY_Y = {"small": 0.19, "big": 0.25}  # of the middle of what floats
SHADOW: Colour = (30, 24, 60)

OVERSAMPLE = 3  # shapes are drawn larger and reduced, which smooths their edges
CELLS = 32  # pixels of pixel art per side
PAPER = np.array((252, 249, 241), np.float32)
FIELDS = 8  # different noise fields of a kind; shifts and flips make more of them


def draw(scene: Scene, rng: Random, size: int = SIZE) -> Image.Image:
    """Draw a scene as a square RGB image of `size` pixels; clouds, hills and small shifts are random."""
    return STYLE_PAINTERS[scene.style](scene, rng, size)


def box(thing: Thing) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a thing with its shadow and a small margin, as fractions of the side.

    Not of a group of three, which has more room.
    """
    r = HALF[thing.size]
    x, y = COLUMN_X[thing.column], SKY_Y[thing.size] if thing.floats else GROUND_Y - r
    room = 1.2 * r
    left, top, right, bottom = x - room, y - room, x + room, y + room
    return max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)


def _column_x(scene: Scene) -> dict[str, float]:
    return ROW_X if len(scene.things) == 3 else COLUMN_X


def _back_to_front(scene: Scene) -> list[Thing]:
    return sorted(scene.things, key=lambda thing: not thing.floats)


def paint_shapes(canvas: SceneryCanvas, scene: Scene, rng: Random, soft: bool) -> Image.Image:
    """The scene as shapes; `soft` is of the outlines."""
    paint_landscape(canvas, scene.ground, scene.time, rng)
    for thing in _back_to_front(scene):
        r = HALF[thing.size] * rng.uniform(0.97, 1.03)
        x = _column_x(scene)[thing.column] + rng.uniform(-0.012, 0.012)
        y = (SKY_Y[thing.size] if thing.floats else GROUND_Y - r) + rng.uniform(-0.012, 0.012)
        swims = thing.swims(scene.ground)
        canvas.begin(thing.kind, y + r)
        if not thing.floats and not swims:
            if scene.ground == "sea":
                paint_island(canvas, x, y + r, r * 1.05, scene.time)
            canvas.ellipse(x + 0.1 * r, y + r - 0.004, r * 0.95, 0.024, SHADOW, opacity=0.26)
        paint = EXTRA_PAINTERS.get(thing.kind) or PAINTERS[thing.kind]
        paint(Frame(canvas, x, y, r), Tones(thing.colour, scene.time, soft))
        if swims:
            paint_ripples(canvas, x, y + r, r, scene.time)
    return canvas.image


def _flat(scene: Scene, rng: Random, size: int) -> Image.Image:
    canvas = SceneryCanvas(size * OVERSAMPLE, line=0.011)
    return paint_shapes(canvas, scene, rng, soft=False).reduce(OVERSAMPLE)


@cache
def _noise(size: int, scale: float) -> list[np.ndarray]:
    """Smooth random fields (size, size) of standard deviation 1 that tile; `scale` is the relative blur."""
    frequency = np.fft.fftfreq(size, 1 / size)
    blur = np.exp(-2 * (np.pi * scale) ** 2 * (frequency[:, None] ** 2 + frequency[None] ** 2))
    blur[0, 0] = 0
    rng = np.random.default_rng(0)
    fields = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * blur).real for _ in range(FIELDS)]
    return [(field / field.std()).astype(np.float32) for field in fields]


def _field(size: int, scale: float, rng: Random) -> np.ndarray:
    """One of the fields, shifted at random."""
    field = rng.choice(_noise(size, scale))
    y, x = rng.randrange(size), rng.randrange(size)
    return np.roll(field[:: rng.choice((1, -1))], (y, x), (0, 1))


@cache
def _border(size: int) -> np.ndarray:
    """The distance to the nearest edge of the image (size, size), as a fraction of the side."""
    place = (np.arange(size, dtype=np.float32) + 0.5) / size
    edge = np.minimum(place, 1 - place)
    return np.minimum(edge[:, None], edge[None])


def wandered(image: Image.Image, rng: Random) -> Image.Image:
    """The image with the wandering edges of washes: each pixel is taken from a little beside itself."""
    side = image.width
    place = np.arange(side)
    dy, dx = (np.rint(0.005 * side * _field(side, 0.03, rng)).astype(np.intp) for _ in range(2))
    rows, columns = (place[:, None] + dy).clip(0, side - 1), (place[None] + dx).clip(0, side - 1)
    return Image.fromarray(np.asarray(image)[rows, columns])


def _inside(size: int, rng: Random) -> np.ndarray:
    """How far a place is from the bare margin of the paper, 0 to 1: (size, size)."""
    return ((_border(size) - 0.026 + 0.006 * _field(size, 0.045, rng)) / 0.02).clip(0, 1)


def painted_area(size: int, rng: Random) -> np.ndarray:
    """`_inside` of the watercolour whose edges `wandered` with the same random numbers just before: (size, size)."""
    for scale in (0.05, 0.01):
        _field(size, scale, rng)  # those of the pigment come first
    return _inside(size, rng)


def _watercolour(scene: Scene, rng: Random, size: int) -> Image.Image:
    side = size * OVERSAMPLE
    washed = wandered(paint_shapes(SceneryCanvas(side, line=0.009), scene, rng, soft=True), rng)
    pixels = np.asarray(washed.reduce(OVERSAMPLE), np.float32)
    # Pigment gathers where a wash ends: darker along edges, uneven inside, and it settles in the pores of the paper
    light = pixels.mean(2)
    edge = np.zeros_like(light)
    edge[1:-1, 1:-1] = np.abs(light[2:, 1:-1] - light[:-2, 1:-1]) + np.abs(light[1:-1, 2:] - light[1:-1, :-2])
    pigment = 0.88 + 0.05 * _field(size, 0.05, rng) + 0.025 * _field(size, 0.01, rng) + 0.0016 * edge
    inside = _inside(size, rng)
    pigment = (pigment + 0.2 * inside * (1 - inside)) * inside
    result = PAPER - (PAPER - pixels) * pigment[..., None]
    return Image.fromarray(result.clip(0, 255).astype(np.uint8))


def paint_pixels(canvas: PixelCanvas, scene: Scene, rng: Random) -> Image.Image:
    """The scene as pixel art, one pixel each."""
    paint_landscape(canvas, scene.ground, scene.time, rng)
    for thing in _back_to_front(scene):
        letters = sprite(thing.kind, thing.size)
        height, width = letters.shape
        left = round(_column_x(scene)[thing.column] * CELLS - width / 2)
        top = round(SKY_Y[thing.size] * CELLS - height / 2) if thing.floats else round(GROUND_Y * CELLS) - height
        middle, foot, half = (left + width / 2) / CELLS, (top + height) / CELLS, width / 2 / CELLS
        canvas.begin(thing.kind, foot)
        if thing.swims(scene.ground):
            paint_ripples(canvas, middle, foot + 0.02, half, scene.time)
        elif not thing.floats:
            if scene.ground == "sea":
                paint_island(canvas, middle, foot, 1.1 * half, scene.time)
            canvas.ellipse(middle + 0.015, foot - 0.01, 1.04 * half, 0.03, SHADOW, opacity=0.3)
        canvas.sprite(letters, palette(Tones(thing.colour, scene.time)), left, top)
    return canvas.image


def _pixel(scene: Scene, rng: Random, size: int) -> Image.Image:
    return paint_pixels(PixelCanvas(CELLS), scene, rng).resize((size, size), Image.Resampling.NEAREST)


STYLE_PAINTERS = {"flat": _flat, "watercolour": _watercolour, "pixel": _pixel}
