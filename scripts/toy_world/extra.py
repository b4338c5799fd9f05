"""Kinds of things that no scene of the world has, to teach them to a model that was trained on it.

Each kind has one fixed look, which the toy world draws in its three styles: as a shape by a painter like those of
objects.py, and as pixel art by two sprites like those of sprites.py. `scenes.scene_with` puts it into a scene.

The hut is round, has a dotted dome and a door: the model knows dots of mushrooms, and doors and windows of houses, but
nothing that has both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .canvas import Frame, Tones, mix


def hut(f: Frame, t: Tones) -> None:
    """A dotted dome for a roof, on lighter walls with a door and two windows."""
    f.polygon([(-0.74, -0.1), (0.74, -0.1), (0.78, 1), (-0.78, 1)], t.light, t.ink)
    f.polygon([(0.5, -0.1), (0.72, -0.1), (0.76, 0.97), (0.54, 0.97)], mix(t.light, t.base, 0.5))
    f.box(-0.19, 0.36, 0.19, 1, t.dark_wood, t.ink)
    for u in (-0.48, 0.48):
        f.box(u - 0.17, 0.3, u + 0.17, 0.64, t.window, t.ink)
    dome = [(math.cos(math.pi * i / 24), 0.02 - 0.98 * math.sin(math.pi * i / 24)) for i in range(25)]
    rim = [(-math.cos(math.pi * i / 12), 0.02 + 0.16 * math.sin(math.pi * i / 12)) for i in range(13)]
    f.polygon(dome + rim, t.base, t.ink)
    for u, v, radius in ((-0.1, -0.6, 0.2), (-0.6, -0.2, 0.16), (0.52, -0.34, 0.17), (0.04, -0.06, 0.13)):
        f.ellipse(u, v, radius, radius * 0.92, t.spot)


EXTRA_PAINTERS: dict[str, Callable[[Frame, Tones], None]] = {"hut": hut}
EXTRA_SPRITES = {
    "hut": (
        """
        ..kkkkk..
        .kbbssbk.
        kbbbssbdk
        kssbbbbdk
        kkkkkkkkk
        .kllllbk.
        .kykkkyk.
        .klkOkbk.
        .klkOkbk.
        """,
        """
        .....kkkkk.....
        ...kkbbbbbkk...
        ..kbbssbbbbbk..
        .kbbbssbbbssbk.
        .kbbbbbbbbssdk.
        kbssbbbbbbbbddk
        kbssbbssbbbbddk
        kkkkkkkkkkkkkkk
        .klllllllllbbk.
        .klyylllllyybk.
        .klyylkkklyybk.
        .klllkoookllbk.
        .klllkoookllbk.
        .klllkooykllbk.
        .kkkkkoookkkkk.
        """,
    ),
}
