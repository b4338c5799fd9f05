"""Captions of scenes: many phrasings in plain English.

A caption names every thing of the scene; equal things in the plural, with or without their number. All other attributes
are optional: colours, sizes, positions, relations, ground, time and style; an image may show anything for an attribute
that is not mentioned. `tell` returns a caption together with the attributes that it mentions, for evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from .scenes import EXTRA, SWIMMING, Scene, Thing
from .words import (
    COLUMN_WORDS,
    GROUND_NOUNS,
    GROUND_WORDS,
    ISLAND_WORDS,
    JOINT_WORDS,
    NOUNS,
    NUMBER_WORDS,
    OVER_WORDS,
    PLAIN_PREFIXES,
    RELATION_WORDS,
    ROW_WORDS,
    SIZE_WORDS,
    SOME_WORDS,
    STYLE_PREFIXES,
    STYLE_SUFFIXES,
    TIME_NOUNS,
    TIME_WORDS,
    plural,
)

RELATIONS = ("left", "below", "beside")  # of a scene's first thing to its second


class Told(NamedTuple):
    """A caption and the attributes that it mentions."""

    text: str
    said: Scene  # with "" for attributes that are not mentioned; its things are in the order of the scene
    relation: str  # one of RELATIONS, or "" if none is mentioned
    numbers: tuple[int, ...] = ()  # of equal things: how many there may be, (2,) or (3,), or (2, 3) for "trees"


def caption(scene: Scene, rng: Random) -> str:
    """A random caption of the scene."""
    return tell(scene, rng).text


def tell(scene: Scene, rng: Random) -> Told:
    """A random caption of the scene, with the attributes that it mentions."""
    teller = _Teller(scene, rng)
    return Told(teller.text(), teller.said, teller.relation, teller.numbers)


class _Teller:
    """Builds one caption. `said` collects the attributes that it mentions; it starts with the kinds only."""

    def __init__(self, scene: Scene, rng: Random) -> None:
        self.scene, self.rng = scene, rng
        self.said = Scene("", "", "", tuple(Thing(thing.kind, "", "", "") for thing in scene.things))
        self.relation = ""
        self.numbers: tuple[int, ...] = ()

    def text(self) -> str:
        """The caption."""
        if self.scene.things and self.happens(0.1):  # nothing but the things: "a house", "red boat"
            return self.all_things(bare=0.35, colour=0.5, size=0.15)
        text = self.things() if self.scene.things else self.landscape()
        way = self.rng.random()
        if way < 0.3:
            return self.style(STYLE_PREFIXES) + text
        if way < 0.6:
            return text + self.style(STYLE_SUFFIXES)
        if way < 0.65:
            return self.rng.choice(PLAIN_PREFIXES) + text
        return text

    def landscape(self) -> str:
        """A place without things: "the sea at sunset", "a snowy night"."""
        way = self.rng.random()
        if way < 0.2 and self.place in JOINT_WORDS:
            return self.joint().removeprefix("on ")
        if way < 0.3:
            return self.ground(GROUND_NOUNS)
        if way < 0.4:
            return self.time(TIME_NOUNS)
        if way < 0.65:
            return f"{self.time(TIME_NOUNS)} {self.ground(OVER_WORDS)}"
        return f"{self.ground(GROUND_NOUNS)} {self.usual_time()}"

    def things(self) -> str:
        """Everything but the style."""
        time = self.usual_time() if self.happens(0.6) else ""
        ground = self.where() if self.happens(0.65) else ""
        if time and ground and self.happens(0.3) and self.place in JOINT_WORDS:
            time, ground = self.joint(), ""
        way = self.rng.random()
        if way < 0.06:  # the place comes first
            return _joined(f"{self.ground(GROUND_NOUNS)} with {self.arranged()}", time)
        if way < 0.12 and time:
            return _joined(f"{time}, {self.arranged()}", ground)
        if way < 0.4 and self.scene.stacked:  # the upper thing comes last
            self.relation = "below"
            link = self.rng.choice((", {} above it", " with {} above it", " and {} above it", ", above it {}"))
            return self.with_tail(self.phrase(0), ground, time) + link.format(self.phrase(1))
        return self.with_tail(self.arranged(), ground, time)

    def with_tail(self, text: str, ground: str, time: str) -> str:
        """The ground and the time, in either order, after the things."""
        tail = [part for part in (ground, time) if part]
        if self.happens(0.25):
            tail.reverse()
        for part in tail:
            text += (", " if self.happens(0.3) else " ") + part
        return text

    def arranged(self) -> str:
        """The things and where they are."""
        if self.scene.grouped:
            return self.group(row=0.2)
        if len(self.scene.things) == 1:
            return self.in_column(self.phrase(0, bare=0.2), 0.35)
        if self.scene.stacked:
            return self.stacked()
        way = self.rng.random()
        if way < 0.3:
            return self.all_things()
        one, two = self.phrase(0), self.phrase(1)
        if way < 0.5:
            self.note_columns()
            return self.in_any_order(f"{one} on the left", f"{two} on the right")
        alike = self.scene.things[0].floats == self.scene.things[1].floats
        if way >= 0.9 and alike:
            return f" {self.related('beside')} ".join(self.rng.sample((one, two), 2))
        if way < 0.7:
            return f"{one} {self.related('left')} {two}"
        return f"{two} {self.related('left', RELATION_WORDS['right'])} {one}"

    def stacked(self) -> str:
        """Two things, one above the other."""
        way = self.rng.random()
        if way < 0.15:
            return self.all_things()
        low, high = self.phrase(0), self.phrase(1)
        if way < 0.55:
            text = f"{low} {self.related('below')} {high}"
        else:
            text = f"{high} {self.related('below', RELATION_WORDS['above'])} {low}"
        return self.in_column(text, 0.2)

    def all_things(self, **shares: float) -> str:
        """The things without saying how they are arranged."""
        if self.scene.grouped:
            return self.group(**shares)
        return self.in_any_order(*(self.phrase(i, **shares) for i in range(len(self.scene.things))))

    def in_any_order(self, *things: str) -> str:
        """Phrases strung together."""
        return self.rng.choice((" and ", " and ", ", ")).join(self.rng.sample(things, len(things)))

    def group(self, bare: float = 0.3, colour: float = 0.7, size: float = 0.2, row: float = 0.0) -> str:
        """Equal things, such as "two red houses"; the shares are those without number, with colour, size and row."""
        things, (thing, *_) = self.scene.things, self.scene.things
        self.numbers = (2, 3) if self.happens(bare) else (len(things),)
        words = [self.usual(SOME_WORDS if len(self.numbers) > 1 else NUMBER_WORDS[len(things)], 0.6)]
        self.said = self.said._replace(things=self.said.things[: self.numbers[0]])
        same = range(self.numbers[0])
        if self.happens(size):
            words.append(self.rng.choice(SIZE_WORDS[thing.size]))
            for i in same:
                self.note_thing(i, size=thing.size)
        if self.happens(colour):
            words.append(thing.colour)
            for i in same:
                self.note_thing(i, colour=thing.colour)
        words.append(plural(self.usual(NOUNS[thing.kind], 0.8)))
        if len(self.numbers) == 1 and self.happens(row):
            words.append(self.rng.choice(ROW_WORDS[len(things)]))
        return " ".join(word for word in words if word)

    def phrase(self, i: int, bare: float = 0.03, colour: float = 0.88, size: float = 0.35) -> str:
        """Thing i, such as "a small red house"; the numbers are the shares without article, with colour, with size."""
        thing, words = self.scene.things[i], []
        if self.happens(size):
            words.append(self.rng.choice(SIZE_WORDS[thing.size]))
            self.note_thing(i, size=thing.size)
        coloured = self.happens(colour) and thing.kind not in EXTRA
        if coloured:
            words.append(thing.colour)
            self.note_thing(i, colour=thing.colour)
        text = " ".join((*words, self.usual(NOUNS.get(thing.kind, (thing.kind,)), 0.8)))
        if self.happens(bare):
            return text
        if thing.kind in ("sun", "moon") and not coloured:
            return f"the {text}"
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"

    def in_column(self, text: str, share: float) -> str:
        """The text, in some cases with the column that all things are in."""
        if not self.happens(share):
            return text
        self.note_columns()
        return f"{text} {self.usual(COLUMN_WORDS[self.scene.things[0].column])}"

    def related(self, relation: str, ways: tuple[str, ...] = ()) -> str:
        """Words for a relation of the first thing to the second; `ways` are for the second to the first."""
        self.relation = relation
        return self.rng.choice(ways or RELATION_WORDS[relation])

    def where(self) -> str:
        """The ground, as a place where the things are."""
        standing = {thing.kind for thing in self.scene.things if not thing.floats}
        if not standing:
            return self.ground(OVER_WORDS)
        if self.scene.ground == "sea" and not standing & set(SWIMMING):
            return self.ground({"sea": ISLAND_WORDS})
        return self.ground(GROUND_WORDS)

    def style(self, table: Mapping[str, tuple[str, ...]]) -> str:
        """The style, in words of a table."""
        self.said = self.said._replace(style=self.scene.style)
        return self.rng.choice(table[self.scene.style])

    def ground(self, table: Mapping[str, tuple[str, ...]]) -> str:
        """The ground, likewise."""
        self.said = self.said._replace(ground=self.scene.ground)
        return self.rng.choice(table[self.scene.ground])

    def time(self, table: Mapping[str, tuple[str, ...]]) -> str:
        """The time, likewise."""
        self.said = self.said._replace(time=self.scene.time)
        return self.rng.choice(table[self.scene.time])

    def usual_time(self) -> str:
        """The time, most often in the usual words."""
        self.said = self.said._replace(time=self.scene.time)
        return self.usual(TIME_WORDS[self.scene.time])

    def joint(self) -> str:
        """Ground and time in one."""
        self.said = self.said._replace(ground=self.scene.ground, time=self.scene.time)
        return self.rng.choice(JOINT_WORDS[self.place])

    @property
    def place(self) -> tuple[str, str]:
        """Ground and time."""
        return self.scene.ground, self.scene.time

    def note_thing(self, i: int, **words: str) -> None:
        """Note what is said of thing i."""
        things = list(self.said.things)
        things[i] = things[i]._replace(**words)
        self.said = self.said._replace(things=tuple(things))

    def note_columns(self) -> None:
        """Note that the columns are said."""
        for i, thing in enumerate(self.scene.things):
            self.note_thing(i, column=thing.column)

    def usual(self, ways: tuple[str, ...], share: float = 0.4) -> str:
        """The first way in `share` of the cases, otherwise any."""
        return ways[0] if self.happens(share) else self.rng.choice(ways)

    def happens(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.rng.random() < share


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)
