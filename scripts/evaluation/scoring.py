"""Scoring: how much of a caption is in an image. `toy_world.tell` gives captions; a judge sees scenes in images.

Only attributes that the caption mentions count. Each thing of the caption is paired with a thing in the image, so that
most kinds match, and then most other attributes; all attributes of a thing without partner are wrong.

    object    the kind is present, as often as the caption says
    number    of equal things: exactly as many as the caption says; for a plural without a number, two or three
    colour, size, place (its column)    of the paired thing
    relation  left of: in a column further left; below: on the ground, and the other one above it, in the same column;
              beside: in another column
    ground, time, style
    all       everything that the caption mentions
    no more   the image has no other things than the caption names (a caption names every thing); not part of `all`
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from typing import NamedTuple

from ..toy_world import Scene, Thing, Told
from ..toy_world.scenes import COLUMNS

ATTRIBUTES = ("object", "number", "colour", "size", "place", "relation", "ground", "time", "style", "all", "no more")
OF_THINGS = {"colour": "colour", "size": "size", "place": "column"}  # attribute -> field of Thing

Verdict = dict[str, list[bool]]  # for each attribute, whether each mention of it is right


class Rate(NamedTuple):
    """The number of right mentions, of all mentions."""

    right: int
    of: int

    def __str__(self) -> str:
        return f"{100 * self.right / self.of:.1f} %" if self.of else "-"


def verdict(told: Told, seen: Scene) -> Verdict:
    """Right or wrong for each mention in one image."""
    found = _things(told, seen.things)
    for name in ("ground", "time", "style"):
        said = getattr(told.said, name)
        found[name] = [said == getattr(seen, name)] if said else []
    found["all"] = [all(right for mentions in found.values() for right in mentions)]
    found["no more"] = [len(seen.things) <= max(told.numbers, default=len(told.said.things))]
    return found


def _things(told: Told, seen: tuple[Thing, ...]) -> Verdict:
    """The verdict on the things, by the best pairing."""
    said = told.said.things
    nothing: tuple[Thing | None, ...] = (None,) * len(said)
    verdicts = [_paired(told, pairing) for pairing in permutations((*seen, *nothing), len(said))]
    best = max(verdicts, key=lambda found: (sum(found["object"]), sum(map(sum, found.values()))))
    best["number"] = [sum(thing.kind == said[0].kind for thing in seen) in told.numbers] if told.numbers else []
    return best


def _paired(told: Told, pairing: tuple[Thing | None, ...]) -> Verdict:
    """The verdict on the things for one pairing: the thing in the image, or None, for each thing of the caption."""
    pairs = list(zip(told.said.things, pairing, strict=True))
    found = {"object": [thing is not None and thing.kind == said.kind for said, thing in pairs]}
    for name, field in OF_THINGS.items():
        mentioned = [(getattr(said, field), thing) for said, thing in pairs if getattr(said, field)]
        found[name] = [thing is not None and getattr(thing, field) == word for word, thing in mentioned]
    found["relation"] = [_related(told.relation, *pairing)] if told.relation else []
    return found


def _related(relation: str, one: Thing | None, two: Thing | None) -> bool:
    if one is None or two is None:
        return False
    if relation == "left":
        return COLUMNS.index(one.column) < COLUMNS.index(two.column)
    if relation == "below":
        return one.column == two.column and two.floats and not one.floats
    return one.column != two.column


def tally(told: Iterable[Told], seen: Iterable[Scene]) -> dict[str, Rate]:
    """The rate of each of ATTRIBUTES over many images."""
    mentions: Verdict = {name: [] for name in ATTRIBUTES}
    for each, scene in zip(told, seen, strict=True):
        for name, right in verdict(each, scene).items():
            mentions[name] += right
    return {name: Rate(sum(right), len(right)) for name, right in mentions.items()}


def whole(scene: Scene) -> Told:
    """A caption that mentions everything in a scene, to test the judge."""
    return Told("", scene, "", (len(scene.things),) if scene.grouped else ())
