"""The world of the embedded model: small painted scenes with captions, as many as one likes.

    scene = random_scene(rng)      what there is: scenes.py
    caption(scene, rng)            one of many ways to say it: captions.py, with the words of words.py
    draw(scene, rng)               one of many ways to paint it: painting.py

A picture is painted on a canvas (canvas.py): sky and ground (landscape.py) with small things (scenery.py), then the
scene's things, as shapes (objects.py) or as pixel art (sprites.py).

`rng` is a `random.Random`: equal seeds give equal scenes, captions and pictures.
"""

from __future__ import annotations

from random import Random

from PIL import Image

from .captions import Told, caption, tell
from .painting import SIZE, box, draw
from .scenes import Scene, Thing, counterpart, held_out, random_scene
from .words import WORDS

__all__ = [
    "SIZE", "WORDS", "Scene", "Thing", "Told", "box", "caption", "counterpart", "draw", "example", "held_out",
    "random_scene", "tell",
]  # fmt: skip


def example(seed: int, size: int = SIZE, split: str = "train") -> tuple[Scene, Image.Image]:
    """Scene number `seed` of a split and its picture of `size` pixels a side: the same on every call."""
    rng = Random(seed)
    scene = random_scene(rng, split)
    return scene, draw(scene, rng, size)
