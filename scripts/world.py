"""The world of the embedded model: small painted scenes with captions, as many as one likes.

A scene is a place with up to two things in it; a thing has a colour, a size and a position. Everything is drawn as
layers, each a mask of one shape filled with a colour gradient. Masks are drawn at four times the size and reduced,
which gives smooth edges.

    scene = random_scene(rng)      what there is
    caption(scene, rng)            one of many ways to say it
    draw(scene, rng)               one of many ways to paint it

`rng` is a `random.Random`: equal seeds give equal scenes, captions and pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # pixels
OVERSAMPLE = 4
HORIZON = 0.62  # height of the horizon, from the top; all lengths and positions are in units of the picture's side

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (217, 45, 50),
    "orange": (243, 137, 37),
    "yellow": (250, 211, 55),
    "green": (50, 160, 75),
    "blue": (45, 95, 215),
    "purple": (135, 65, 180),
    "pink": (245, 135, 180),
    "white": (244, 244, 240),
}
SIZES = {"small": 0.11, "": 0.17, "big": 0.25}  # half the height of a thing
COLUMNS = {"left": 0.26, "middle": 0.5, "right": 0.74}
NAMES = {  # what a thing may be called; the first name is the usual one
    "circle": ("circle", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "balloon": ("balloon",),
    "house": ("house", "cottage"),
    "tree": ("tree",),
    "boat": ("boat", "sailboat"),
}
STANDING = ("house", "tree", "boat")  # these stand on the ground, the others float


class Place(NamedTuple):
    """A background: sky from top to horizon, ground from horizon to bottom, what it is called, whether it is dark."""

    sky: tuple[Colour, Colour]
    ground: tuple[Colour, Colour]
    nouns: tuple[str, ...]
    phrases: tuple[str, ...]  # behind a thing


PLACES = {
    "meadow": Place(
        ((95, 165, 235), (205, 230, 245)),
        ((130, 195, 85), (70, 145, 60)),
        ("a meadow", "a green meadow"),
        ("in the meadow", "in a meadow", "on a green meadow", "on the grass"),
    ),
    "beach": Place(
        ((80, 180, 235), (220, 240, 245)),
        ((250, 228, 170), (228, 190, 120)),
        ("a beach", "a sandy beach"),
        ("on the beach", "at the beach", "on a sandy beach"),
    ),
    "snow": Place(
        ((150, 180, 210), (225, 232, 240)),
        ((250, 252, 255), (205, 220, 238)),
        ("a snowy landscape", "snow", "winter"),
        ("in the snow", "in a snowy landscape", "in winter"),
    ),
    "sea": Place(
        ((110, 185, 240), (240, 235, 215)),
        ((40, 130, 185), (15, 65, 130)),
        ("the sea", "the blue sea"),
        ("over the sea", "on the sea", "at sea", "by the sea"),
    ),
    "desert": Place(
        ((245, 175, 110), (253, 228, 175)),
        ((225, 160, 85), (175, 105, 55)),
        ("a desert", "the desert"),
        ("in the desert", "in a desert", "in the dunes"),
    ),
    "night": Place(
        ((12, 16, 52), (60, 60, 120)),
        ((28, 48, 62), (10, 22, 34)),
        ("night", "a night sky", "a starry night"),
        ("at night", "in the night", "under the stars", "on a starry night"),
    ),
}


class Thing(NamedTuple):
    """One thing: keys of NAMES, COLOURS, SIZES and COLUMNS, and whether it is high up in the picture."""

    kind: str
    colour: str
    size: str
    column: str
    top: bool = False


class Scene(NamedTuple):
    """A key of PLACES and what is there, from left to right."""

    place: str
    things: tuple[Thing, ...]


def random_scene(rng: Random) -> Scene:
    """Mostly one thing or two things, now and then an empty place."""
    place = rng.choice(list(PLACES))
    kind, colour = list(NAMES), list(COLOURS)
    n = rng.choices((0, 1, 2), (4, 61, 35))[0]
    if n < 2:
        column = rng.choices(list(COLUMNS), (1, 2, 1))[0]
        size = rng.choices(list(SIZES), (1, 2, 1))[0]
        one = Thing(rng.choice(kind), rng.choice(colour), size, column)
        top = one.kind not in STANDING and rng.random() < 0.2
        return Scene(place, (one._replace(top=top),) * n)
    columns = ("left", "right")
    sizes = [rng.choices(list(SIZES), (1, 3, 0.5))[0] for _ in columns]
    things = [Thing(rng.choice(kind), rng.choice(colour), *at) for at in zip(sizes, columns, strict=True)]
    return Scene(place, tuple(things))


def caption(scene: Scene, rng: Random) -> str:
    """The scene in plain English; it names every thing with its colour, and nearly always the place."""
    place = PLACES[scene.place]
    if not scene.things:
        return rng.choice(place.nouns)
    things = [_phrase(thing, rng, alone=len(scene.things) == 1) for thing in scene.things]
    if len(things) == 2:
        if rng.random() < 0.35:
            things = [f"{thing} on the {at.column}" for thing, at in zip(things, scene.things, strict=True)]
        if rng.random() < 0.5:
            things.reverse()
    text = " and ".join(things)
    way = rng.random()
    if way < 0.08:
        pass
    elif way < 0.18:
        text = f"{rng.choice(place.nouns)} with {text}"
    elif way < 0.24:
        text = f"{text}, {rng.choice(place.nouns)}"
    else:
        text = f"{text} {rng.choice(place.phrases)}"
    if rng.random() < 0.06:
        text = f"{rng.choice(('a picture of', 'a painting of', 'an image of'))} {text}"
    return text


def _phrase(thing: Thing, rng: Random, alone: bool) -> str:
    """One thing, such as "a small red house on the left"."""
    names = NAMES[thing.kind]
    name = names[0] if rng.random() < 0.8 else rng.choice(names)
    size = {"big": ("big", "big", "large"), "small": ("small", "small", "little"), "": ("",)}[thing.size]
    words = [rng.choice(size), thing.colour, name]
    text = " ".join(word for word in words if word)
    if rng.random() < 0.85:
        text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    if alone and rng.random() < 0.4:
        where = {"left": "on the left", "middle": "in the middle", "right": "on the right"}[thing.column]
        text += " at the top" if thing.top and rng.random() < 0.6 else f" {where}"
    elif thing.top and rng.random() < 0.6:
        text += rng.choice((" at the top", " in the sky"))
    return text


class Canvas:
    """A picture that is painted layer by layer. Points are (x, y) in [0, 1], y downwards."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.image = Image.new("RGB", (size, size))

    def layer(self, shape: Callable[[ImageDraw.ImageDraw, float], None], fill: Image.Image, opacity: float = 1) -> None:
        """Paint `fill` where `shape(draw, scale)` draws in white; scale turns our units into the mask's pixels."""
        side = self.size * OVERSAMPLE
        mask = Image.new("L", (side, side))
        shape(ImageDraw.Draw(mask), side)
        mask = mask.reduce(OVERSAMPLE)
        if opacity < 1:
            mask = mask.point([round(value * opacity) for value in range(256)])
        self.image.paste(fill, (0, 0), mask)

    def polygon(self, points: Sequence[Point], fill: Image.Image, opacity: float = 1) -> None:
        """A filled polygon."""
        self.layer(lambda d, s: d.polygon([(x * s, y * s) for x, y in points], fill=255), fill, opacity)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Image.Image, opacity: float = 1) -> None:
        """A filled ellipse with half axes rx and ry."""
        box = (x - rx, y - ry, x + rx, y + ry)
        self.layer(lambda d, s: d.ellipse([v * s for v in box], fill=255), fill, opacity)

    def vertical(self, top: Colour, bottom: Colour, start: float = 0, end: float = 1) -> Image.Image:
        """A fill that goes from one colour to another between two heights."""
        part = ((np.arange(self.size) + 0.5) / self.size - start) / (end - start)
        part = part.clip(0, 1)[:, None]
        column = (1 - part) * np.array(top) + part * np.array(bottom)
        rows = np.broadcast_to(column[:, None], (self.size, self.size, 3))
        return Image.fromarray(rows.round().astype(np.uint8))

    def plain(self, colour: Colour) -> Image.Image:
        """A fill of one colour."""
        return Image.new("RGB", (self.size, self.size), colour)


def mix(a: Colour, b: Colour, part: float) -> Colour:
    """The colour on the way from a (part 0) to b (part 1)."""
    return tuple(round((1 - part) * x + part * y) for x, y in zip(a, b, strict=True))


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def draw(scene: Scene, rng: Random, size: int = SIZE) -> Image.Image:
    """Paint a scene; clouds, hills, stars and small shifts are drawn from `rng`."""
    canvas = Canvas(size)
    _paint_place(canvas, scene.place, rng)
    for thing in scene.things:
        _paint_thing(canvas, thing, scene.place, rng)
    return canvas.image


def _paint_place(canvas: Canvas, name: str, rng: Random) -> None:
    place = PLACES[name]
    tint = rng.uniform(-0.12, 0.12)  # brighter or darker days

    def shade(colour: Colour) -> Colour:
        return mix(colour, WHITE if tint > 0 else BLACK, abs(tint))

    canvas.image.paste(canvas.vertical(*map(shade, place.sky), end=HORIZON))
    if name == "night":
        for _ in range(rng.randint(14, 24)):
            r = rng.uniform(0.004, 0.009)
            canvas.ellipse(rng.random(), rng.uniform(0, 0.58), r, r, canvas.plain((250, 245, 215)))
    elif name != "desert":
        for _ in range(rng.randint(1, 3)):
            _paint_cloud(canvas, rng.random(), rng.uniform(0.06, 0.3), rng.uniform(0.04, 0.07), rng)
    if name == "desert":
        _paint_hills(canvas, mix(place.ground[0], place.sky[1], 0.35), 0.08, rng)
    elif name in ("meadow", "snow", "night"):
        _paint_hills(canvas, mix(place.ground[1], place.sky[1], 0.45 if name != "night" else 0.2), 0.1, rng)
    ground = canvas.vertical(*map(shade, place.ground), start=HORIZON)
    if name in ("sea", "beach"):
        water = canvas.vertical((60, 150, 195), (110, 200, 210), HORIZON - 0.08, HORIZON + 0.06)
        top = HORIZON - 0.08 if name == "beach" else HORIZON
        canvas.polygon([(0, top), (1, top), (1, 1), (0, 1)], water if name == "beach" else ground)
        if name == "beach":
            _paint_rolling(canvas, HORIZON + 0.05, 0.012, canvas.plain((245, 250, 250)), rng)
            _paint_rolling(canvas, HORIZON + 0.07, 0.012, ground, rng)
        else:
            for row in range(5):  # waves, wider towards us
                y = HORIZON + 0.04 + 0.07 * row
                for _ in range(3):
                    x, length = rng.random(), 0.04 + 0.012 * row
                    canvas.ellipse(x, y, length, 0.006, canvas.plain((150, 205, 230)), 0.55)
    else:
        _paint_rolling(canvas, HORIZON, 0.02, ground, rng)
    if name == "meadow":
        for _ in range(rng.randint(8, 14)):
            y = rng.uniform(HORIZON + 0.06, 0.97)
            r = 0.006 + 0.012 * (y - HORIZON)
            canvas.ellipse(rng.random(), y, r, r, canvas.plain(rng.choice(((255, 250, 240), (255, 225, 90)))))
    elif name == "snow":
        for _ in range(rng.randint(10, 18)):
            r = rng.uniform(0.005, 0.009)
            canvas.ellipse(rng.random(), rng.random(), r, r, canvas.plain(WHITE))


def _paint_cloud(canvas: Canvas, x: float, y: float, r: float, rng: Random) -> None:
    white = canvas.plain((255, 255, 255))

    def puffs(d: ImageDraw.ImageDraw, s: float) -> None:
        for dx, dy, part in ((-1.3, 0.25, 0.7), (0, 0, 1), (1.2, 0.2, 0.75)):
            px, py, pr = x + dx * r, y + dy * r, part * r
            d.ellipse([v * s for v in (px - pr * 1.2, py - 0.75 * pr, px + pr * 1.2, py + 0.75 * pr)], fill=255)

    canvas.layer(puffs, white, rng.uniform(0.6, 0.85))


def _paint_hills(canvas: Canvas, colour: Colour, height: float, rng: Random) -> None:
    phase, waves = rng.uniform(0, 2 * math.pi), rng.uniform(1.0, 1.8)
    xs = [i / 32 for i in range(33)]
    tops = [HORIZON - height * (0.45 + 0.4 * math.sin(2 * math.pi * waves * x + phase)) for x in xs]
    fill = canvas.vertical(mix(colour, WHITE, 0.1), colour, HORIZON - height, HORIZON)
    canvas.polygon([*zip(xs, tops, strict=True), (1, 1), (0, 1)], fill)


def _paint_rolling(canvas: Canvas, y: float, height: float, fill: Image.Image, rng: Random) -> None:
    """Ground with a gently curved upper edge."""
    phase = rng.uniform(0, 2 * math.pi)
    xs = [i / 24 for i in range(25)]
    canvas.polygon([*((x, y + height * math.sin(4 * x + phase)) for x in xs), (1, 1), (0, 1)], fill)


def _paint_thing(canvas: Canvas, thing: Thing, place: str, rng: Random) -> None:
    r = SIZES[thing.size] * rng.uniform(0.93, 1.07)
    x = COLUMNS[thing.column] + rng.uniform(-0.03, 0.03)
    ground = 0.8 if place != "sea" or thing.kind != "boat" else 0.74
    if thing.top:
        y = 0.06 + r + rng.uniform(0, 0.03)
    elif thing.kind in STANDING or thing.kind == "square":
        y = ground + 0.06 * (r / SIZES["big"]) - r + rng.uniform(-0.02, 0.02)
    elif thing.kind == "balloon":
        y = 0.36 + rng.uniform(-0.04, 0.04)
    else:
        y = 0.5 + rng.uniform(-0.04, 0.04)
    base = COLOURS[thing.colour]
    if place == "night":
        base = mix(base, (20, 25, 60), 0.12)
    light, dark = mix(base, WHITE, 0.28), mix(base, (40, 20, 60), 0.25)
    fill = canvas.vertical(light, dark, y - r, y + r)
    if not thing.top and thing.kind != "boat" and (thing.kind in STANDING or thing.kind == "square"):
        canvas.ellipse(x, y + r, 0.85 * r, 0.12 * r, canvas.plain((25, 25, 45)), 0.3)
    PAINTERS[thing.kind](canvas, x, y, r, base, fill)


def _circle(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    canvas.ellipse(x, y, 0.9 * r, 0.9 * r, fill)
    canvas.ellipse(x - 0.32 * r, y - 0.4 * r, 0.2 * r, 0.14 * r, canvas.plain(WHITE), 0.55)


def _square(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    s = 0.85 * r
    y += r - s
    canvas.polygon([(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)], fill)
    canvas.polygon([(x - s, y - s), (x + s, y - s), (x + s, y - 0.78 * s), (x - s, y - 0.78 * s)],
                   canvas.plain(WHITE), 0.35)  # fmt: skip


def _triangle(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    canvas.polygon([(x, y - r), (x + 1.02 * r, y + 0.8 * r), (x - 1.02 * r, y + 0.8 * r)], fill)


def _star(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    corners = []
    for i in range(10):
        length = r * (1.05 if i % 2 == 0 else 0.47)
        angle = math.pi * i / 5
        corners.append((x + length * math.sin(angle), y - length * math.cos(angle)))
    canvas.polygon(corners, fill)


def _heart(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    corners = []
    for i in range(48):  # the well-known heart curve, 16 sin³ and its companion, scaled to our half height
        a = 2 * math.pi * i / 48
        height = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        corners.append((x + r * 16 * math.sin(a) ** 3 / 15.5, y - r * (height + 2.5) / 15.5))
    canvas.polygon(corners, fill)
    canvas.ellipse(x - 0.5 * r, y - 0.42 * r, 0.16 * r, 0.14 * r, canvas.plain(WHITE), 0.5)


def _balloon(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    line = canvas.plain((90, 80, 80))
    canvas.polygon([(x - 0.012, y), (x + 0.012, y), (x + 0.006, y + 1.5 * r), (x - 0.006, y + 1.5 * r)], line)
    canvas.polygon([(x, y + 0.68 * r), (x + 0.16 * r, y + 0.95 * r), (x - 0.16 * r, y + 0.95 * r)], fill)
    canvas.ellipse(x, y - 0.1 * r, 0.75 * r, 0.9 * r, fill)
    canvas.ellipse(x - 0.3 * r, y - 0.45 * r, 0.13 * r, 0.2 * r, canvas.plain(WHITE), 0.6)


def _house(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    w = 0.85 * r
    canvas.polygon([(x - w, y - 0.15 * r), (x + w, y - 0.15 * r), (x + w, y + r), (x - w, y + r)], fill)
    roof = canvas.plain(mix(base, (70, 40, 40), 0.6))
    canvas.polygon([(x - 1.15 * r, y - 0.1 * r), (x, y - r), (x + 1.15 * r, y - 0.1 * r)], roof)
    door = canvas.plain((95, 60, 40))
    canvas.polygon([(x - 0.16 * r, y + 0.4 * r), (x + 0.16 * r, y + 0.4 * r), (x + 0.16 * r, y + r),
                    (x - 0.16 * r, y + r)], door)  # fmt: skip
    for side in (-1, 1):
        cx, cy, s = x + side * 0.5 * r, y + 0.3 * r, 0.17 * r
        window = canvas.plain((255, 240, 170))
        canvas.polygon([(cx - s, cy - s), (cx + s, cy - s), (cx + s, cy + s), (cx - s, cy + s)], window)


def _tree(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    trunk = canvas.plain((110, 72, 45))
    canvas.polygon([(x - 0.12 * r, y), (x + 0.12 * r, y), (x + 0.17 * r, y + r), (x - 0.17 * r, y + r)], trunk)

    def crown(d: ImageDraw.ImageDraw, s: float) -> None:
        for dx, dy, part in ((0, -0.45, 0.55), (-0.4, -0.05, 0.48), (0.4, -0.05, 0.48), (0, 0.05, 0.45)):
            cx, cy, cr = x + dx * r, y + dy * r, part * r
            d.ellipse([v * s for v in (cx - cr, cy - cr, cx + cr, cy + cr)], fill=255)

    canvas.layer(crown, fill)


def _boat(canvas: Canvas, x: float, y: float, r: float, base: Colour, fill: Image.Image) -> None:
    mast = canvas.plain((105, 75, 55))
    canvas.polygon([(x - 0.04 * r, y - r), (x + 0.04 * r, y - r), (x + 0.04 * r, y + 0.6 * r),
                    (x - 0.04 * r, y + 0.6 * r)], mast)  # fmt: skip
    canvas.polygon([(x + 0.1 * r, y - 0.95 * r), (x + 0.85 * r, y + 0.4 * r), (x + 0.1 * r, y + 0.4 * r)], fill)
    canvas.polygon([(x - 0.1 * r, y - 0.75 * r), (x - 0.65 * r, y + 0.4 * r), (x - 0.1 * r, y + 0.4 * r)], fill)
    canvas.polygon([(x - r, y + 0.52 * r), (x + 1.05 * r, y + 0.52 * r), (x + 0.7 * r, y + r), (x - 0.7 * r, y + r)],
                   canvas.plain(mix(base, (60, 35, 30), 0.45)))  # fmt: skip


PAINTERS = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "balloon": _balloon,
    "house": _house,
    "tree": _tree,
    "boat": _boat,
}


def example(seed: int, size: int = SIZE) -> tuple[Scene, Image.Image]:
    """Scene number `seed` and its picture: the same on every call."""
    rng = Random(seed)
    scene = random_scene(rng)
    return scene, draw(scene, rng, size)
