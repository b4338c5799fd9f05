"""Scenes of the toy world, their random distribution, and the combinations that are excluded from training.

A scene has a landscape (ground), a time, a style and up to two things, or a group of two or three equal ones. A thing
stands on the ground or floats in the sky, in the left, middle or right column. Two things are side by side (left and
right) or stacked (one above the other in the same column); a group of three fills all columns. A scene describes
everything that an image shows on purpose, so that a judge can check it.

Training excludes one in eight combinations of (kind, colour, ground), for example blue boats on the beach. For each
kind and colour at most one ground is missing, and for each kind and ground exactly one colour. So training has all
pairs, and only their combination is new.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

STYLES = ("flat", "watercolour", "pixel")
TIMES = ("day", "sunset", "night", "cloudy")
GROUNDS = ("meadow", "beach", "desert", "snow", "sea")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
STANDING = ("house", "castle", "tree", "flower", "mushroom", "car", "boat", "cat", "duck", "mountain")
FLOATING = ("balloon", "kite", "sun", "moon")
SWIMMING = ("boat", "duck")  # at sea these need no island
KINDS = STANDING + FLOATING
EXTRA = {"hut": "red"}  # kinds that no split has, each with its only colour; they stand (extra.py)
SIZES = ("small", "big")
COLUMNS = ("left", "middle", "right")
SINGLE = ("sun", "moon")  # there are no two of these
SPLITS = ("train", "unseen", "all")

# The weight of a colour is 1; usual colours of a kind have more, so that "a tree" without a colour tends to be green.
USUAL = {
    "house": {"red": 2, "white": 2},
    "tree": {"green": 6},
    "car": {"red": 2},
    "cat": {"orange": 2, "white": 2},
    "duck": {"yellow": 4},
    "mountain": {"blue": 2, "purple": 2},
    "mushroom": {"red": 3},
    "sun": {"yellow": 6, "orange": 3, "red": 2},
    "moon": {"white": 6, "yellow": 4},
}


class Thing(NamedTuple):
    """One thing, in words of KINDS, COLOURS, SIZES and COLUMNS."""

    kind: str
    colour: str
    size: str
    column: str

    @property
    def floats(self) -> bool:
        """Whether it is in the sky."""
        return self.kind in FLOATING

    def swims(self, ground: str) -> bool:
        """Whether it is in the water on this ground."""
        return ground == "sea" and self.kind in SWIMMING


class Scene(NamedTuple):
    """Words of STYLES, TIMES and GROUNDS and up to two things, or a group of two or three that differ in column only.

    Two things in the same column are stacked: the standing one comes first. Otherwise things come from left to right.
    """

    style: str
    time: str
    ground: str
    things: tuple[Thing, ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether the second thing is right above the first."""
        return len(self.things) == 2 and self.things[0].column == self.things[1].column

    @property
    def grouped(self) -> bool:
        """Whether it has several equal things: "two trees"."""
        return len(self.things) > 1 and len({thing._replace(column="") for thing in self.things}) == 1


def held_out(scene: Scene) -> bool:
    """Whether training excludes this scene, because one of its things has an excluded combination."""
    return any(kept_back(thing.kind, thing.colour, scene.ground) for thing in scene.things)


def kept_back(kind: str, colour: str, ground: str) -> bool:
    """Whether training excludes this combination: one in eight, spread like a Latin square, so that for any two words
    at most one in eight of the third is excluded. Of all such rules, this one excludes the fewest usual combinations.
    Kinds of EXTRA are in no split.
    """
    return kind in KINDS and (KINDS.index(kind) + COLOURS.index(colour) + GROUNDS.index(ground)) % 8 == 3


def random_scene(rng: Random, split: str = "train") -> Scene:
    """A random scene: "train" without held-out combinations, "unseen" with at least one, "all" with or without.

    Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    while True:
        scene = _any_scene(rng)
        if split == "all" or held_out(scene) == (split == "unseen"):
            return scene


def scene_with(kind: str, rng: Random, split: str = "all") -> Scene:
    """A random scene with one thing of a kind of EXTRA, alone or with another thing beside or above it.

    It is a scene of the split in which this thing takes the place of one that stands.
    """
    while True:
        scene = random_scene(rng, split)
        standing = [i for i, thing in enumerate(scene.things) if not thing.floats]
        if standing and not scene.grouped:
            break
    things = list(scene.things)
    i = rng.choice(standing)
    things[i] = things[i]._replace(kind=kind, colour=EXTRA[kind])
    return scene._replace(things=tuple(things))


def counterpart(scene: Scene, rng: Random) -> Scene:
    """A similar scene with the same content in another arrangement.

    Two things swap their positions, colours or sizes; a single thing or a stack moves; of two equal things there are
    then three, and the other way round; without things the time changes. The counterpart of a scene that training may
    use is one that training may use.
    """
    if not scene.things:
        return scene._replace(time=rng.choice([time for time in TIMES if time != scene.time]))
    if scene.grouped:
        return scene._replace(things=_group(scene.things[0], 5 - len(scene.things)))
    one, *others = scene.things
    if not others or scene.stacked:
        column = rng.choice([column for column in COLUMNS if column != one.column])
        moved = scene._replace(things=tuple(thing._replace(column=column) for thing in scene.things))
        if not others:
            return moved
        ways = [moved]
    else:
        ways = [scene._replace(things=(others[0]._replace(column=one.column), one._replace(column=others[0].column)))]
    two = others[0]
    for field in ("colour", "size"):
        a, b = getattr(one, field), getattr(two, field)
        exchanged = scene._replace(things=(one._replace(**{field: b}), two._replace(**{field: a})))
        if a != b and held_out(exchanged) == held_out(scene):
            ways.append(exchanged)
    return rng.choice(ways)


def _any_scene(rng: Random) -> Scene:
    style, time, ground = rng.choice(STYLES), rng.choice(TIMES), rng.choice(GROUNDS)
    number = rng.choices((0, 1, 2, 3), (4, 36, 46, 14))[0]
    if number == 0:
        return Scene(style, time, ground)
    if number == 3:  # a group
        several = tuple(kind for kind in rng.choices((STANDING, FLOATING), (8, 2))[0] if kind not in SINGLE)
        return Scene(style, time, ground, _group(_thing(several, time, ground, "", rng), rng.choice((2, 3))))
    if number == 1:
        kinds = rng.choices((STANDING, FLOATING), (7, 3))[0]
        return Scene(style, time, ground, (_thing(kinds, time, ground, rng.choice(COLUMNS), rng),))
    stacked = rng.random() < 0.4
    both: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    if stacked:
        both, columns = (STANDING, FLOATING), (rng.choices(COLUMNS, (1, 2, 1))[0],) * 2
    else:
        both = rng.choices(
            ((STANDING, STANDING), (STANDING, FLOATING), (FLOATING, STANDING), (FLOATING, FLOATING)), (6, 1, 1, 1)
        )[0]
        columns = ("left", "right")
    while True:
        one, two = (_thing(kinds, time, ground, at, rng) for kinds, at in zip(both, columns, strict=True))
        twins = one.kind == two.kind and (one.floats or one.colour == two.colour)  # see groups
        crowded = stacked and one.size == two.size == "big"
        if not twins and not crowded:
            return Scene(style, time, ground, (one, two))


def _group(thing: Thing, number: int) -> tuple[Thing, ...]:
    """Two things like this one, left and right; or three small ones, as there is no room for big ones."""
    if number == 2:
        return tuple(thing._replace(column=column) for column in ("left", "right"))
    return tuple(thing._replace(column=column, size="small") for column in COLUMNS)


def _thing(kinds: tuple[str, ...], time: str, ground: str, column: str, rng: Random) -> Thing:
    kind = rng.choices(kinds, [_weight(kind, time, ground) for kind in kinds])[0]
    colour = rng.choices(COLOURS, [USUAL.get(kind, {}).get(colour, 1) for colour in COLOURS])[0]
    return Thing(kind, colour, rng.choices(SIZES, (2, 3))[0], column)


def _weight(kind: str, time: str, ground: str) -> float:
    """The weight of a kind: no sun at night; boats and ducks mostly at sea; the moon mostly at night."""
    if kind in SINGLE:
        return {"night": (0, 3), "sunset": (1, 1)}.get(time, (1.5, 0.5))[kind == "moon"]
    if kind in SWIMMING:
        return 4 if ground == "sea" else 0.7
    return 1
