"""How the things look: one function a kind, painting into a frame of half-size 1 with the ground at v = 1."""

from __future__ import annotations

import math
from collections.abc import Callable

from .canvas import Frame, Point, Tones, mix


def house(f: Frame, t: Tones) -> None:
    """Coloured walls, a dark roof, a smoking chimney."""
    for i, (u, v, radius) in enumerate(((0.62, -0.98, 0.13), (0.74, -1.2, 0.17), (0.94, -1.44, 0.2))):
        f.ellipse(u, v, radius * 1.1, radius, t.white, opacity=0.75 - 0.17 * i)
    f.box(0.4, -0.85, 0.66, -0.3, t.dark, t.ink)
    f.box(-0.8, -0.15, 0.8, 1, t.base, t.ink)
    f.box(0.42, -0.1, 0.77, 0.97, t.dark)
    f.polygon([(-1, -0.08), (-0.52, -0.86), (0.52, -0.86), (1, -0.08)], t.roof, t.ink)
    f.box(-0.19, 0.32, 0.19, 1, t.dark_wood, t.ink)
    f.ellipse(0.09, 0.68, 0.05, 0.05, t.window)
    for u in (-0.5, 0.5):
        f.box(u - 0.19, 0.18, u + 0.19, 0.58, t.window, t.ink)
        f.stroke([(u, 0.18), (u, 0.58)], 0.06, t.ink)


def castle(f: Frame, t: Tones) -> None:
    """Two towers with pointed roofs, battlements and a gate."""
    f.stroke([(0, -1), (0, -0.3)], 0.07, t.dark_wood)
    f.polygon([(0.03, -1), (0.42, -0.86), (0.03, -0.72)], t.base, t.ink)
    f.box(-0.6, -0.02, 0.6, 1, t.base, t.ink)
    for u in (-0.42, -0.14, 0.14, 0.42):
        f.box(u - 0.09, -0.18, u + 0.09, 0.02, t.base, t.ink)
    for u in (-0.68, 0.68):
        f.box(u - 0.25, -0.28, u + 0.25, 1, t.base, t.ink)
        f.box(u + 0.08, -0.25, u + 0.22, 0.97, t.dark)
        f.polygon([(u - 0.33, -0.26), (u, -0.92), (u + 0.33, -0.26)], t.roof, t.ink)
        f.box(u - 0.09, 0.0, u + 0.09, 0.3, t.window, t.ink)
    f.ellipse(0, 0.58, 0.22, 0.22, t.dark_wood, t.ink)
    f.box(-0.22, 0.58, 0.22, 1, t.dark_wood, t.ink)
    f.ellipse(0, 0.6, 0.17, 0.17, t.dark_wood)


def tree(f: Frame, t: Tones) -> None:
    """A round leafy crown on a trunk."""
    f.polygon([(-0.13, 0), (0.13, 0), (0.16, 0.8), (0.3, 1), (-0.3, 1), (-0.16, 0.8)], t.wood, t.dark_wood)
    f.blob(((0, -0.52, 0.47), (-0.45, -0.12, 0.44), (0.45, -0.12, 0.44), (0, 0.02, 0.44)), t.dark, t.ink)
    f.blob(((-0.04, -0.56, 0.37), (-0.47, -0.18, 0.34), (0.34, -0.2, 0.34), (-0.05, -0.08, 0.36)), t.base)
    for u, v, radius in ((-0.14, -0.68, 0.15), (-0.55, -0.26, 0.13), (0.28, -0.3, 0.12)):
        f.ellipse(u, v, radius * 1.2, radius, t.light)


def flower(f: Frame, t: Tones) -> None:
    """One big blossom on a stem with two leaves."""
    f.stroke([(0, 0), (0.03, 0.5), (0, 1)], 0.13, t.dark_leaf)
    for side in (-1, 1):
        leaf = [(0, 0.92), (side * 0.3, 0.84), (side * 0.66, 0.42), (side * 0.2, 0.54)]
        f.polygon(leaf, t.leaf, t.dark_leaf)
    petals = [_turned(i / 7) for i in range(7)]
    f.blob([(0.44 * u, -0.36 + 0.44 * v, 0.24) for u, v in petals], t.base, t.ink)
    for u, v in petals:
        f.stroke([(0.24 * u, -0.36 + 0.24 * v), (0.5 * u, -0.36 + 0.5 * v)], 0.1, t.dark)
    f.ellipse(0, -0.36, 0.24, 0.24, t.dark_wood)
    f.ellipse(-0.03, -0.39, 0.16, 0.16, t.wood)


def mushroom(f: Frame, t: Tones) -> None:
    """A dotted cap on a pale stem."""
    f.polygon([(-0.24, 0), (0.24, 0), (0.34, 0.92), (0.26, 1), (-0.26, 1), (-0.34, 0.92)], t.cream, t.ink)
    f.polygon([(0.06, 0), (0.24, 0), (0.33, 0.9), (0.24, 0.98), (0.1, 0.98)], mix(t.cream, t.dark_wood, 0.2))
    dome = [(0.98 * math.cos(a), 0.1 - 1.02 * math.sin(a)) for a in _steps(0, math.pi, 24)]
    rim = [(0.98 * math.cos(a), 0.1 + 0.2 * math.sin(a)) for a in _steps(math.pi, 0, 12)]
    f.polygon(dome + rim, t.base, t.ink)
    flank = [(0.93 * u, 0.1 + 0.93 * (v - 0.1)) for u, v in dome[:11]]
    f.polygon([*flank, *((0.72 * u, 0.14 + 0.86 * (v - 0.1)) for u, v in flank[::-1])], t.dark)
    for u, v, radius in ((-0.1, -0.56, 0.2), (-0.58, -0.14, 0.16), (0.52, -0.28, 0.17), (0.06, -0.02, 0.13)):
        f.ellipse(u, v, radius, radius * 0.92, t.spot)


def car(f: Frame, t: Tones) -> None:
    """A small round car, seen from its side."""
    cabin = [(-0.6, 0.24), (-0.44, -0.3), (-0.3, -0.4), (0.26, -0.4), (0.42, -0.3), (0.66, 0.24)]
    f.polygon(cabin, t.base, t.ink)
    f.polygon([(-0.43, 0.16), (-0.32, -0.24), (-0.04, -0.24), (-0.04, 0.16)], t.window, t.ink)
    f.polygon([(0.08, 0.16), (0.08, -0.24), (0.29, -0.24), (0.47, 0.16)], t.window, t.ink)
    body = [(-0.98, 0.72), (-0.98, 0.34), (-0.86, 0.2), (-0.6, 0.16), (0.66, 0.16), (0.9, 0.26), (0.98, 0.42)]
    f.polygon([*body, (0.98, 0.72)], t.base, t.ink)
    f.box(-0.94, 0.54, 0.94, 0.7, t.dark)
    f.ellipse(0.88, 0.42, 0.09, 0.1, t.spot)
    f.stroke([(-0.04, 0.3), (0.1, 0.3)], 0.07, t.ink)
    for u in (-0.52, 0.54):
        f.ellipse(u, 0.74, 0.26, 0.26, t.rubber)
        f.ellipse(u, 0.74, 0.12, 0.12, t.grey)


def boat(f: Frame, t: Tones) -> None:
    """A sailing boat: hull and jib in its colour, a cream main sail."""
    f.box(-0.06, -1, 0.04, 0.5, t.dark_wood)
    f.polygon([(0.1, -0.92), (0.5, -0.4), (0.82, 0.34), (0.1, 0.34)], t.cream, t.ink)
    f.polygon([(-0.12, -0.74), (-0.4, -0.3), (-0.72, 0.34), (-0.12, 0.34)], t.base, t.ink)
    f.polygon([(-0.06, -1), (-0.4, -0.9), (-0.06, -0.8)], t.base)
    f.polygon([(-1, 0.46), (1, 0.46), (0.84, 0.8), (0.66, 1), (-0.62, 1), (-0.82, 0.8)], t.base, t.ink)
    f.polygon([(-0.8, 0.76), (0.84, 0.76), (0.66, 0.97), (-0.62, 0.97)], t.dark)
    f.stroke([(-0.94, 0.54), (0.94, 0.54)], 0.09, t.spot)


def cat(f: Frame, t: Tones) -> None:
    """A sitting cat that looks at you."""
    tail = [(0.42, 0.86), (0.74, 0.8), (0.86, 0.5), (0.76, 0.2), (0.88, 0.02)]
    if f.canvas.line:
        f.stroke(tail, 0.2 + f.canvas.line / f.r, t.ink)
    f.stroke(tail, 0.19, t.base)
    f.ellipse(0, 0.56, 0.52, 0.46, t.base, t.ink)
    f.ellipse(0, 0.62, 0.25, 0.32, t.light)
    for side in (-1, 1):
        f.ellipse(side * 0.22, 0.92, 0.17, 0.1, t.base, t.ink)
        f.polygon([(side * 0.64, -0.36), (side * 0.6, -1), (side * 0.12, -0.7)], t.base, t.ink)
        f.polygon([(side * 0.52, -0.5), (side * 0.52, -0.8), (side * 0.28, -0.66)], t.blush)
    f.ellipse(0, -0.28, 0.66, 0.52, t.base, t.ink)
    for side in (-1, 1):
        f.ellipse(side * 0.27, -0.32, 0.11, 0.14, t.black)
        f.ellipse(side * 0.27 - 0.03, -0.37, 0.045, 0.05, t.white)
        f.ellipse(side * 0.42, -0.08, 0.11, 0.07, t.blush)
        f.stroke([(0, -0.02), (side * 0.07, 0.05), (side * 0.15, 0.02), (side * 0.18, -0.04)], 0.05, t.ink)
    f.polygon([(-0.09, -0.16), (0.09, -0.16), (0, -0.05)], t.black)


def duck(f: Frame, t: Tones) -> None:
    """A swimming duck, looking to the left."""
    f.polygon([(0.5, 0.3), (0.98, -0.06), (0.92, 0.5)], t.base, t.ink)
    f.ellipse(0.08, 0.5, 0.84, 0.5, t.base, t.ink)
    f.ellipse(-0.4, -0.3, 0.46, 0.46, t.base, t.ink)
    f.polygon([(-0.64, 0.04), (-0.1, 0.02), (0.3, 0.3), (-0.5, 0.5), (-0.68, 0.3)], t.base)
    f.polygon([(-0.72, -0.4), (-1, -0.22), (-1, -0.12), (-0.74, -0.06)], t.beak, t.dark_wood)
    f.ellipse(-0.5, -0.4, 0.09, 0.11, t.black)
    f.ellipse(-0.53, -0.44, 0.04, 0.045, t.white)
    wing = [(-0.16, 0.36), (0.1, 0.26), (0.72, 0.3), (0.6, 0.56), (0.34, 0.7), (0.02, 0.64)]
    f.polygon(wing, t.dark, t.ink)


def mountain(f: Frame, t: Tones) -> None:
    """Two peaks with snow caps and shaded flanks."""
    f.polygon([(0.04, 1), (0.3, 0.06), (0.46, -0.2), (0.56, -0.2), (0.76, 0.3), (1, 1)], t.base, t.ink)
    f.polygon([(0.54, -0.18), (0.75, 0.3), (0.97, 0.97), (0.56, 0.97), (0.62, 0.4), (0.5, 0.1)], t.dark)
    f.polygon([(0.34, 0.02), (0.47, -0.18), (0.55, -0.18), (0.66, 0.08), (0.55, 0.0), (0.46, 0.1)], t.white)
    left = [(-1, 1), (-0.72, 0.36), (-0.58, 0.2), (-0.26, -0.72)]
    f.polygon([*left, (-0.14, -0.72), (0.14, 0.04), (0.3, 0.24), (0.62, 1)], t.base, t.ink)
    f.polygon([(-0.15, -0.69), (0.13, 0.05), (0.29, 0.26), (0.59, 0.97), (0.02, 0.97), (0.1, 0.46), (-0.16, 0)], t.dark)
    cap = [(-0.26, -0.7), (-0.14, -0.7), (0.1, -0.08), (-0.02, -0.18), (-0.14, 0.04), (-0.28, -0.16), (-0.46, -0.06)]
    f.polygon(cap, t.white)
    f.polygon([(-0.16, -0.68), (0.1, -0.08), (-0.02, -0.18), (-0.1, -0.06)], mix(t.white, t.roof, 0.25))


def balloon(f: Frame, t: Tones) -> None:
    """A hot air balloon with stripes and a basket."""
    for side in (-1, 1):
        f.stroke([(side * 0.34, 0.3), (side * 0.15, 0.76)], 0.05, t.dark_wood)
    skirt = [(0.7, -0.28), (0.66, 0.0), (0.2, 0.56), (-0.2, 0.56), (-0.66, 0.0), (-0.7, -0.28)]
    top = [(0.7 * math.cos(a), -0.28 - 0.7 * math.sin(a)) for a in _steps(math.pi, 0, 24)]
    f.polygon(top + skirt[1:-1], t.base, t.ink)
    for part, tone in ((0.62, t.light), (0.24, t.base)):
        stripe = [(part * u, v) for u, v in top]
        f.polygon([(0.0, -0.94), *stripe[3:-3], (part * 0.6, 0.04), (part * 0.2, 0.53), (-part * 0.2, 0.53),
                   (-part * 0.6, 0.04)], tone)  # fmt: skip
    f.box(-0.2, 0.72, 0.2, 0.98, t.wood, t.dark_wood)


def kite(f: Frame, t: Tones) -> None:
    """A diamond in two tones with a tail of bows."""
    tail = [(-0.24, 0.34), (-0.1, 0.56), (-0.34, 0.74), (-0.2, 0.96)]
    f.stroke(tail, 0.06, t.dark_wood)
    for u, v in ((-0.12, 0.56), (-0.32, 0.76)):
        f.polygon([(u, v), (u - 0.2, v - 0.1), (u - 0.2, v + 0.1)], t.base, t.ink)
        f.polygon([(u, v), (u + 0.2, v - 0.1), (u + 0.2, v + 0.1)], t.base, t.ink)
    corners: list[Point] = [(0.42, -1), (0.72, -0.12), (-0.24, 0.4), (-0.62, -0.56)]
    middle = (0.22, -0.42)
    f.polygon(corners, t.base, t.ink)
    for i, tone in enumerate((t.dark, t.base, t.base, t.light)):
        f.polygon([corners[i], corners[(i + 1) % 4], middle], tone)
    f.polygon([middle, corners[0], corners[3]], t.light)
    f.polygon([middle, corners[1], corners[2]], t.dark)
    f.stroke([corners[0], corners[2]], 0.05, t.ink)
    f.stroke([corners[1], corners[3]], 0.05, t.ink)


def sun(f: Frame, t: Tones) -> None:
    """A smiling disc with pointed rays."""
    _glow(f, t)
    lengths = (0.96, 0.64) * 12
    corners = [_turned(i / 24) for i in range(24)]
    f.polygon([(n * u, n * v) for n, (u, v) in zip(lengths, corners, strict=True)], t.base, t.ink)
    f.ellipse(0, 0, 0.6, 0.6, t.base, t.ink)
    f.ellipse(-0.04, -0.04, 0.5, 0.5, t.light)
    for side in (-1, 1):
        f.ellipse(side * 0.19, -0.12, 0.075, 0.1, t.black)
        f.ellipse(side * 0.33, 0.08, 0.1, 0.065, t.blush)
    f.stroke([(0.18 * math.sin(a), 0.08 + 0.14 * math.cos(a)) for a in _steps(-1.3, 1.3, 8)], 0.065, t.black)


def moon(f: Frame, t: Tones) -> None:
    """A crescent with a soft glow."""
    _glow(f, t)
    outer = [(0.94 * math.cos(a) - 0.04, 0.94 * math.sin(a)) for a in _steps(0.9, 2 * math.pi - 0.9, 40)]
    inner = [(0.78 * math.cos(a) + 0.3, 0.74 * math.sin(a)) for a in _steps(2 * math.pi - 1.26, 1.26, 32)]
    f.polygon(outer + inner, t.base, t.ink)
    for u, v, radius in ((-0.66, -0.12, 0.12), (-0.52, 0.44, 0.14), (-0.4, -0.56, 0.09)):
        f.ellipse(u, v, radius, radius, t.dark)


def _glow(f: Frame, t: Tones) -> None:
    for i in range(5):
        f.ellipse(0, 0, 1.35 - 0.09 * i, 1.35 - 0.09 * i, t.light, opacity=0.055)


def _turned(part: float) -> Point:
    """The point at a part of a full turn on the unit circle, from the top clockwise."""
    return math.sin(2 * math.pi * part), -math.cos(2 * math.pi * part)


def _steps(start: float, stop: float, n: int) -> list[float]:
    return [start + (stop - start) * i / n for i in range(n + 1)]


PAINTERS: dict[str, Callable[[Frame, Tones], None]] = {
    painter.__name__: painter
    for painter in (house, castle, tree, flower, mushroom, car, boat, cat, duck, mountain, balloon, kite, sun, moon)
}
