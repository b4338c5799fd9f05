"""Skies and grounds: what is behind the things. Details are by lot, but there are always some of each."""

from __future__ import annotations

import math
from random import Random

from .canvas import WHITE, Colour, Light, Point, mix
from .scenery import SceneryCanvas

HORIZON = 0.62
Stops = tuple[tuple[float, Colour], ...]

SKIES: dict[str, Stops] = {
    "day": ((0.0, (84, 168, 240)), (HORIZON, (208, 236, 250))),
    "sunset": ((0.0, (104, 74, 156)), (0.26, (226, 106, 132)), (0.46, (252, 162, 98)), (HORIZON, (255, 216, 136))),
    "night": ((0.0, (14, 18, 60)), (HORIZON, (62, 66, 138))),
    "cloudy": ((0.0, (132, 142, 156)), (HORIZON, (204, 210, 216))),
}
GROUND_LIGHT = {
    "day": Light(WHITE, 0.0),
    "sunset": Light((206, 84, 96), 0.27),
    "night": Light((14, 20, 70), 0.58),
    "cloudy": Light((104, 114, 130), 0.24),
}
GROUNDS: dict[str, tuple[Colour, Colour]] = {  # far and near
    "meadow": ((164, 212, 104), (100, 178, 76)),
    "beach": ((252, 234, 182), (238, 206, 146)),
    "desert": ((242, 188, 116), (220, 148, 84)),
    "snow": ((246, 249, 254), (216, 228, 246)),
    "sea": ((84, 178, 208), (28, 104, 164)),
}


def paint_landscape(canvas: SceneryCanvas, ground: str, time: str, rng: Random) -> None:
    """The sky of a time and a ground under its light."""
    canvas.shade(SKIES[time])
    SKY_PAINTERS[time](canvas, rng)
    GROUND_PAINTERS[ground](canvas, time, rng)


def _wave(y: float, height: float, waves: float, rng: Random) -> list[Point]:
    """A rolling edge from left to right."""
    phase = rng.uniform(0, 2 * math.pi)
    return [(i / 24, y + height * math.sin(waves * 2 * math.pi * i / 24 + phase)) for i in range(25)]


def _below(edge: list[Point]) -> list[Point]:
    """The area under an edge."""
    return [*edge, (1.01, 1.01), (-0.01, 1.01)]


def _scattered(n: int, rng: Random) -> list[float]:
    """n places from 0 to 1 that keep a distance, in any order."""
    places = [(i + rng.uniform(0.15, 0.85)) / n for i in range(n)]
    rng.shuffle(places)
    return places


def _day(canvas: SceneryCanvas, rng: Random) -> None:
    for x in _scattered(3, rng)[: rng.randint(2, 3)]:
        canvas.cloud(x, rng.uniform(0.1, 0.42), rng.uniform(0.05, 0.08), (252, 253, 255), (214, 232, 246))


def _sunset(canvas: SceneryCanvas, rng: Random) -> None:
    for x in _scattered(4, rng):
        y, length = rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.18)
        canvas.ellipse(x, y, length, 0.017, (255, 190, 150), opacity=0.75)
        canvas.ellipse(x + 0.05, y + 0.025, length * 0.7, 0.013, (255, 214, 160), opacity=0.75)


def _night(canvas: SceneryCanvas, rng: Random) -> None:
    for x in _scattered(canvas.stars, rng):
        canvas.ellipse(x, rng.uniform(0.02, 0.52), 0.008, 0.008, (196, 196, 214))
    for x in _scattered(4, rng):
        canvas.star(x, rng.uniform(0.04, 0.44))


def _cloudy(canvas: SceneryCanvas, rng: Random) -> None:
    for y, light in ((0.42, (198, 204, 212)), (0.24, (180, 188, 198)), (0.05, (160, 169, 181))):
        dark = mix(light, (92, 102, 118), 0.22)
        for x in _scattered(2, rng):
            canvas.cloud(x, y + rng.uniform(-0.03, 0.03), rng.uniform(0.14, 0.17), light, dark)


SKY_PAINTERS = {"day": _day, "sunset": _sunset, "night": _night, "cloudy": _cloudy}


def _stops(ground: str, light: Light, start: float = HORIZON) -> Stops:
    far, near = GROUNDS[ground]
    return ((start, light(far)), (1.0, light(near)))


def _meadow(canvas: SceneryCanvas, time: str, rng: Random) -> None:
    light = GROUND_LIGHT[time]
    canvas.polygon(_below(_wave(HORIZON - 0.055, 0.035, 1.3, rng)), light((136, 190, 150)))
    canvas.polygon(_below(_wave(HORIZON - 0.01, 0.028, 1.0, rng)), light((128, 194, 104)))
    canvas.shade(_stops("meadow", light), _below(_wave(HORIZON + 0.035, 0.015, 0.8, rng)))
    for x in _scattered(4, rng):
        canvas.grass(x, rng.uniform(HORIZON + 0.1, 0.97), light((66, 142, 62)))
    for i, x in enumerate(_scattered(5, rng)):
        y = rng.uniform(HORIZON + 0.1, 0.97)
        canvas.ellipse(x, y, 0.018, 0.015, light((255, 252, 240) if i % 2 else (255, 232, 110)))


def _beach(canvas: SceneryCanvas, time: str, rng: Random) -> None:
    light = GROUND_LIGHT[time]
    top = HORIZON - 0.06
    canvas.shade(((top, light((52, 140, 196))), (HORIZON + 0.1, light((118, 212, 214)))), _below([(0, top), (1, top)]))
    for x in _scattered(5, rng):
        y = rng.uniform(top + 0.025, HORIZON + 0.02)
        canvas.stroke([(x - 0.05, y), (x + 0.05, y)], 0.009, light((188, 228, 236)))
    foam = _wave(HORIZON + 0.075, 0.012, 1.4, rng)
    canvas.polygon(_below(foam), light((250, 253, 252)))
    canvas.polygon(_below([(x, y + 0.022) for x, y in foam]), light((226, 198, 144)))
    canvas.shade(_stops("beach", light), _below([(x, y + 0.038) for x, y in foam]))
    for i, x in enumerate(_scattered(3, rng)):
        y = rng.uniform(HORIZON + 0.2, 0.96)
        if i < 2:
            canvas.starfish(x, y, light((240, 140, 110)))
        else:
            canvas.ellipse(x, y, 0.017, 0.012, light((252, 246, 236)))


def _desert(canvas: SceneryCanvas, time: str, rng: Random) -> None:
    light = GROUND_LIGHT[time]
    for y, height, colour in ((HORIZON - 0.03, 0.05, (232, 170, 120)), (HORIZON + 0.02, 0.035, (226, 156, 94))):
        canvas.polygon(_below(_wave(y, height, 1.1, rng)), light(colour))
    for x in (rng.uniform(0.03, 0.12), rng.uniform(0.88, 0.97)):
        canvas.cactus(x, HORIZON + 0.08, rng.uniform(0.95, 1.1), light((84, 148, 92)))
    canvas.shade(_stops("desert", light), _below(_wave(HORIZON + 0.06, 0.02, 0.9, rng)))
    for i in range(3):
        canvas.stroke(_wave(HORIZON + 0.14 + 0.085 * i, 0.012, 1.6, rng), 0.012, light((206, 132, 76)))


def _snow(canvas: SceneryCanvas, time: str, rng: Random) -> None:
    light = GROUND_LIGHT[time]
    canvas.polygon(_below(_wave(HORIZON - 0.05, 0.04, 1.2, rng)), light((206, 220, 240)))
    for x in _scattered(4, rng):
        y, height = HORIZON + rng.uniform(0.01, 0.03), rng.uniform(0.15, 0.18)
        canvas.fir(x, y, height, light((74, 122, 116)), light((240, 246, 252)))
    canvas.shade(_stops("snow", light), _below(_wave(HORIZON + 0.035, 0.015, 0.9, rng)))
    for y in (0.78, 0.93):
        x = rng.uniform(0.1, 0.9)
        canvas.ellipse(x, y, 0.2, 0.014, light((202, 216, 240)))
    flakes = (214, 222, 246) if time == "night" else light(WHITE)
    for x in _scattered(8, rng):
        canvas.ellipse(x, rng.uniform(0.02, 0.98), 0.011, 0.011, flakes)


def _sea(canvas: SceneryCanvas, time: str, rng: Random) -> None:
    light = GROUND_LIGHT[time]
    stops = _stops("sea", light)
    if time == "sunset":  # the sky is mirrored far out
        stops = ((HORIZON, (250, 178, 120)), (HORIZON + 0.1, mix(stops[0][1], (250, 178, 120), 0.2)), stops[1])
    canvas.shade(stops, _below([(0, HORIZON), (1, HORIZON)]))
    crest = mix(light((150, 216, 228)), (255, 214, 150) if time == "sunset" else WHITE, 0.15)
    for row in range(5):
        for x in _scattered(3, rng):
            canvas.wave(x, HORIZON + 0.035 + 0.078 * row, row, crest)


def paint_island(canvas: SceneryCanvas, x: float, y: float, half: float, time: str) -> None:
    """A sandy island for what cannot swim."""
    light = GROUND_LIGHT[time]
    canvas.ellipse(x, y + 0.012, half * 1.14, 0.056, light((206, 240, 240)))
    canvas.ellipse(x, y, half, 0.046, light((226, 190, 132)))
    canvas.ellipse(x, y - 0.008, half, 0.04, light(GROUNDS["beach"][0]))


def paint_ripples(canvas: SceneryCanvas, x: float, y: float, half: float, time: str) -> None:
    """Water in front of what swims."""
    light = GROUND_LIGHT[time]
    canvas.ellipse(x, y + 0.006, half * 1.05, 0.026, light((58, 146, 190)))
    for side in (-1, 0, 1):
        middle = x + side * 0.62 * half
        points = [(middle + 0.3 * half * (i / 4 - 1), y - 0.016 + 0.014 * math.cos(i * math.pi / 4)) for i in range(9)]
        canvas.stroke(points, 0.014, light((196, 236, 240)))


GROUND_PAINTERS = {"meadow": _meadow, "beach": _beach, "desert": _desert, "snow": _snow, "sea": _sea}
