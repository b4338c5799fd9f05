"""The words of captions: for everything in a scene the ways to say it, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .scenes import COLOURS, SINGLE

NOUNS = {  # the first one is the usual one
    "house": ("house", "cottage"),
    "castle": ("castle",),
    "tree": ("tree",),
    "flower": ("flower",),
    "mushroom": ("mushroom", "toadstool"),
    "car": ("car",),
    "boat": ("boat", "sailboat", "ship"),
    "cat": ("cat", "kitten"),
    "duck": ("duck",),
    "mountain": ("mountain",),
    "balloon": ("balloon", "hot air balloon"),
    "kite": ("kite",),
    "sun": ("sun",),
    "moon": ("moon", "crescent moon"),
}
NUMBER_WORDS = {2: ("two", "a pair of", "2"), 3: ("three", "3")}  # of equal things; the first one is the usual one
SOME_WORDS = ("", "some", "several")  # before a plural, for any number
ROW_WORDS = {2: ("side by side", "next to each other"), 3: ("in a row", "side by side")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
COLUMN_WORDS = {
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right side"),
}
TIME_WORDS = {  # the first one is the usual one
    "day": ("by day", "during the day", "on a clear day", "in daylight", "under a blue sky"),
    "sunset": ("at sunset", "at dusk", "in the evening", "under a sunset sky"),
    "night": ("at night", "by night", "under the stars", "on a starry night", "under a starry sky"),
    "cloudy": ("on a cloudy day", "under a cloudy sky", "under grey clouds", "under a gray sky", "in cloudy weather"),
}
TIME_NOUNS = {
    "day": ("a clear day", "a blue sky"),
    "sunset": ("sunset", "a sunset", "a sunset sky", "evening"),
    "night": ("night", "a starry night", "a night sky"),
    "cloudy": ("a cloudy day", "a cloudy sky", "grey clouds"),
}
GROUND_WORDS = {  # where something stands
    "meadow": ("on a meadow", "in a meadow", "in the meadow", "on the grass", "in a green field"),
    "beach": ("on the beach", "at the beach", "on a beach", "on a sandy beach"),
    "desert": ("in the desert", "in a desert", "in the dunes", "among the dunes"),
    "snow": ("in the snow", "in a snowy landscape", "on a snowy field", "in winter"),
    "sea": ("on the sea", "at sea", "in the sea", "on the water", "on the ocean"),
}
ISLAND_WORDS = ("on an island", "on a small island", "on an island in the sea", "in the sea", "at sea")
OVER_WORDS = {  # where something floats
    "meadow": ("over a meadow", "above the meadow", "over the grass"),
    "beach": ("over the beach", "above a beach", "above the beach"),
    "desert": ("over the desert", "above the desert", "over the dunes"),
    "snow": ("over the snow", "above the snow", "over a snowy landscape"),
    "sea": ("over the sea", "above the sea", "over the water", "over the ocean"),
}
GROUND_NOUNS = {
    "meadow": ("a meadow", "a green meadow", "a green field", "grass"),
    "beach": ("a beach", "the beach", "a sandy beach"),
    "desert": ("a desert", "the desert", "sand dunes"),
    "snow": ("snow", "a snowy landscape", "winter", "a snowy field"),
    "sea": ("the sea", "the ocean", "waves"),
}
JOINT_WORDS = {  # time and ground in one
    ("snow", "night"): ("on a snowy night", "on a winter night"),
    ("snow", "day"): ("on a clear winter day", "on a snowy day"),
    ("snow", "sunset"): ("on a winter evening", "on a snowy evening"),
    ("snow", "cloudy"): ("on a cloudy winter day", "on a grey winter day"),
    ("desert", "night"): ("on a desert night",),
}
STYLE_PREFIXES = {
    "flat": ("flat illustration of ", "a flat illustration of ", "a flat drawing of ", "flat art: ", "flat style: "),
    "watercolour": (
        "watercolour of ",
        "a watercolour of ",
        "a watercolour painting of ",
        "watercolour: ",
        "a watercolor of ",
        "watercolor painting of ",
    ),
    "pixel": ("pixel art of ", "pixel art: ", "a pixel art picture of ", "8-bit pixel art of ", "pixel art, "),
}
STYLE_SUFFIXES = {
    "flat": (", flat illustration", ", flat style", " in a flat style", ", flat art"),
    "watercolour": (" in watercolour", ", watercolour", ", in watercolour", " in watercolor", ", watercolor painting"),
    "pixel": (
        ", pixel art",
        " in pixel art",
        ", in pixel art",
        " as pixel art",
        ", 8-bit pixel art",
        ", made of pixels",
    ),
}
PLAIN_PREFIXES = ("a picture of ", "a painting of ", "an image of ", "a drawing of ")
RELATION_WORDS = {  # of the thing named first to the one named after it
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "below": ("under", "below", "beneath"),
    "above": ("above", "over"),
    "beside": ("next to", "beside"),
}
FUNCTION_WORDS = ("a", "an", "and", "as", "at", "by", "during", "in", "it", "made", "of", "on", "the", "to", "with")


def plural(noun: str) -> str:
    """The plural of a noun of NOUNS: they are all regular."""
    return f"{noun}s"


def _words() -> tuple[str, ...]:
    """All content words of the tables above, in alphabetical order."""
    ways = [*COLOURS, *ISLAND_WORDS, *PLAIN_PREFIXES, *SOME_WORDS]
    ways += [plural(noun) for kind, nouns in NOUNS.items() if kind not in SINGLE for noun in nouns]
    tables: tuple[Mapping[Any, tuple[str, ...]], ...] = (
        NOUNS, NUMBER_WORDS, ROW_WORDS, SIZE_WORDS, COLUMN_WORDS, TIME_WORDS, TIME_NOUNS, GROUND_WORDS, OVER_WORDS,
        GROUND_NOUNS, JOINT_WORDS, STYLE_PREFIXES, STYLE_SUFFIXES, RELATION_WORDS,
    )  # fmt: skip
    for table in tables:
        ways += [way for several in table.values() for way in several]
    return tuple(sorted(set(re.findall(r"[\w-]+", " ".join(ways))) - set(FUNCTION_WORDS)))


WORDS = _words()  # for the model card: what a prompt may speak of
