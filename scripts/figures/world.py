"""Default prompts of the figures: sentences of the embedded model's world, which other checkpoints understand too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from sd.config import POCKET, Config
from sd.study.attention import mass_inside
from sd.study.text import Word

from ..toy_world import Thing, box

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the sides

# PROMPT says everything about its scene, so the positions of its things are known. OTHER leaves some things open, and
# OPEN nearly everything.
PROMPT = "watercolour of a big red house to the left of a big blue tree on a meadow at sunset"
THINGS = {"house": Thing("house", "red", "big", "left"), "tree": Thing("tree", "blue", "big", "right")}
OTHER = "a pink cat to the left of a white duck on the beach"
OPEN = "a house and a tree"
CASTLE = "a purple castle at night"  # for the hint data/sample-edges.png ...
CASTLE_MORE = 5  # ... added to the seed: without the hint, the castle of this seed is elsewhere
EXCHANGED = (
    "watercolour of a red house and a blue tree at sunset",
    "watercolour of a blue house and a red tree at sunset",
)
# source, target, added to the seed, factors of words; for these seeds the target without editing changes the layout
EDITS: dict[str, tuple[str, str, int, dict[str, float]]] = {
    "a duck for the boat": ("a boat on the sea", "a duck on the sea", 1, {}),
    "a cat for the house": ("a red house on a meadow", "a red cat on a meadow", 1, {}),
    "a red house": ("a house and a tree on a meadow", "a red house and a tree on a meadow", 2, {}),
    "less of the duck": (OTHER, OTHER, 0, {"duck": 0.2}),
}
LONG = "a red triceratops in the snow, " + ", ".join(["a small blue boat on the sea at night under the stars"] * 8)


def object_words(words: Sequence[Word]) -> Iterator[tuple[int, Thing]]:
    """Index and thing of the words that name one of THINGS or its colour."""
    for number, word in enumerate(words):
        for thing in THINGS.values():
            if word.text in (thing.kind, thing.colour):
                yield number, thing


def boxes_of_words(
    prompt: str, config: Config, what: str, words: Sequence[Word], maps: Sequence[Tensor]
) -> tuple[dict[int, str], dict[int, Box]]:
    """Notes and boxes for the words that name a thing or its colour, by index: the share of the map in the thing's box.

    Empty unless the prompt is PROMPT and the model the embedded one: only then the positions of the things are known.
    """
    notes: dict[int, str] = {}
    boxes: dict[int, Box] = {}
    known = prompt == PROMPT and config.name == POCKET.name
    for number, thing in object_words(words) if known else ():
        mass = mass_inside(maps[number], box(thing))
        area = mass_inside(torch.ones(64, 64), box(thing))
        notes[number], boxes[number] = f"{mass:.0%} in its box\n({area:.0%} of the area)", box(thing)
        tqdm.write(
            f"{what}: {mass:.0%} of {words[number].text!r} is inside the box of the {thing.kind}, which is {area:.0%} "
            "of the image"
        )
    return notes, boxes
