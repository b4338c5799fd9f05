"""An object that the world lacks: its training images, and how well a model that was taught it obeys prompts with it.

    python scripts/evaluate.py --object hut --write outputs/hut                              the training images
    python scripts/evaluate.py --object hut --lora outputs/hut-lora/lora.safetensors         a LoRA of it
    python scripts/evaluate.py --object hut --embedding outputs/hut-word/hut.safetensors     a word of it

The objects are the kinds of toy_world/extra.py; scenes, captions and prompts with them are made as those of the world
are. Style, time and ground of a prompt's scene occur together in no training image. A judge of its own
(outputs/judge-hut.safetensors) knows the object beside the kinds of the world. What is measured:

    seen        prompts with the object: the judge sees it in the image
    object      all things that these prompts name are there, and so on: the attributes of scoring.py
    usual       usual prompts, which do not name it, before and with the LoRA: how much of the model it spoils
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image

from sd.files import exists

from ..toy_world import Scene, Told, draw, scene_with, tell
from ..toy_world.scenes import COLUMNS, GROUNDS, SIZES, STYLES, TIMES
from .scoring import Rate

IMAGES = 20  # for training
SAMPLER, STEPS = "dpmpp_2m", 20  # unless others are given: the model's own 50 steps take longer


class Example(NamedTuple):
    """A training image, its caption and its scene."""

    image: Image.Image
    caption: str
    scene: Scene


def examples(kind: str) -> list[Example]:
    """The training images of a kind of EXTRA: no two of one style, time and ground, which each caption names.

    So the word has to stand for the object only. Two of five images show another thing, too.
    """
    rng = Random(f"training images: {kind}")
    found: list[Example] = []
    while len(found) < IMAGES:
        i = len(found)
        place = (STYLES[i % 3], TIMES[i % 4], GROUNDS[i % 5])
        column, size, several = COLUMNS[(i + i // 3) % 3], SIZES[i % 7 % 2], i % 5 in (1, 3)
        scene = scene_with(kind, rng, "train")
        thing = next(thing for thing in scene.things if thing.kind == kind)
        if scene[:3] != place or thing.size != size or (len(scene.things) > 1) != several:
            continue
        if not several and thing.column != column:
            continue
        told = tell(scene, rng)
        while told.said[:3] != place:
            told = tell(scene, rng)
        found.append(Example(draw(scene, rng), told.text, scene))
    return found


def write_examples(kind: str, folder: Path) -> None:
    """Write the training images, with captions in text files beside them; the folder is made.

    Raises FileExistsError if it is there already.
    """
    if folder.exists():
        raise exists(folder)
    folder.mkdir(parents=True)
    for i, example in enumerate(examples(kind), 1):
        example.image.save(folder / f"{kind}-{i:02d}.webp", lossless=True, quality=80, method=4)
        (folder / f"{kind}-{i:02d}.txt").write_text(f"{example.caption}\n", encoding="utf-8")


def prompts(kind: str, n: int, word: str = "") -> list[Told]:
    """n captions of scenes with a thing of this kind, with their meaning; the same on every call.

    Style, time and ground of each scene occur together in no training image.

    word   is written in place of the kind's name, if not empty
    """
    trained = {example.scene[:3] for example in examples(kind)}
    rng = Random(f"evaluate: {kind}")
    found: list[Told] = []
    while len(found) < n:
        scene = scene_with(kind, rng, "train")
        if scene[:3] not in trained:
            told = tell(scene, rng)
            found.append(told._replace(text=renamed(told.text, kind, word or kind)))
    return found


def renamed(text: str, kind: str, word: str) -> str:
    """The text with `word` in place of the name of a kind, where that is a whole word.

    >>> renamed("a hut left of a white hutch", "hut", "<my-hut>")
    'a <my-hut> left of a white hutch'
    """
    return re.sub(rf"\b{re.escape(kind)}\b", lambda _: word, text)


def with_it(kind: str, seen: Sequence[Scene]) -> Rate:
    """In how many scenes there is a thing of this kind."""
    return Rate(sum(any(thing.kind == kind for thing in scene.things) for scene in seen), len(seen))
