"""The toy world of the embedded model: an unlimited number of small drawn scenes with captions.

    scene = random_scene(rng)      the content: scenes.py
    caption(scene, rng)            one of many descriptions: captions.py, with the words of words.py
    draw(scene, rng)               one of many drawings: painting.py

A scene is drawn on a canvas (canvas.py): sky and ground (landscape.py) with small details (scenery.py), then its things
as shapes (objects.py) or as pixel art (sprites.py). The world lacks the kinds of extra.py: they are to be learned.

`rng` is a `random.Random`: equal seeds give equal scenes, captions and images.
"""

from __future__ import annotations

from random import Random

from PIL import Image

from .captions import Told, caption, tell
from .painting import SIZE, box, draw
from .scenes import Scene, Thing, counterpart, held_out, random_scene, scene_with
from .words import WORDS

__all__ = [
    "SIZE", "WORDS", "Scene", "Thing", "Told", "box", "caption", "counterpart", "draw", "example", "held_out",
    "random_scene", "scene_with", "tell",
]  # fmt: skip


def example(seed: int, size: int = SIZE, split: str = "train") -> tuple[Scene, Image.Image]:
    """Scene number `seed` of a split and its image of size x size pixels: the same on every call."""
    rng = Random(seed)
    scene = random_scene(rng, split)
    return scene, draw(scene, rng, size)
