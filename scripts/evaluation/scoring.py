"""How much of what a caption says is in a picture: captions as `world.tell` gives them, pictures as a judge sees them.

Only what is said is judged. Each thing of the caption is paired with one that is seen, so that as many kinds as are
possible are right, and then as many other attributes; of what is not found, all that is said is wrong.

    object    the kind is there
    colour, size, place (its column)    of the thing that it is paired with
    relation  left of: in a column further left; below: on the ground, and the other one above it, in the same column;
              beside: in another column
    ground, time, style
    all       everything that is said
    no more   nothing is there that the caption does not name; a caption names every thing. It is no part of `all`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from typing import NamedTuple

from ..toy_world import Scene, Thing, Told
from ..toy_world.scenes import COLUMNS

ATTRIBUTES = ("object", "colour", "size", "place", "relation", "ground", "time", "style", "all", "no more")
OF_THINGS = {"colour": "colour", "size": "size", "place": "column"}  # attribute -> field of Thing

Verdict = dict[str, list[bool]]  # for each attribute, whether each mention of it is right


class Rate(NamedTuple):
    """So many right of so many mentions."""

    right: int
    of: int

    def __str__(self) -> str:
        return f"{100 * self.right / self.of:.1f} %" if self.of else "-"


def verdict(told: Told, seen: Scene) -> Verdict:
    """What is right and wrong in one picture."""
    found = _things(told, seen.things)
    for name in ("ground", "time", "style"):
        said = getattr(told.said, name)
        found[name] = [said == getattr(seen, name)] if said else []
    found["all"] = [all(right for mentions in found.values() for right in mentions)]
    found["no more"] = [len(seen.things) <= len(told.said.things)]
    return found


def _things(told: Told, seen: tuple[Thing, ...]) -> Verdict:
    """The verdict on things alone, by the pairing that is best for the picture."""
    said = told.said.things
    nothing: tuple[Thing | None, ...] = (None,) * len(said)
    verdicts = [_paired(told, pairing) for pairing in permutations((*seen, *nothing), len(said))]
    return max(verdicts, key=lambda found: (sum(found["object"]), sum(map(sum, found.values()))))


def _paired(told: Told, pairing: tuple[Thing | None, ...]) -> Verdict:
    """The verdict if `pairing` has what is seen of each thing that is said."""
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
    """Over many pictures, the rate of each of ATTRIBUTES."""
    mentions: Verdict = {name: [] for name in ATTRIBUTES}
    for each, scene in zip(told, seen, strict=True):
        for name, right in verdict(each, scene).items():
            mentions[name] += right
    return {name: Rate(sum(right), len(right)) for name, right in mentions.items()}


def whole(scene: Scene) -> Told:
    """All that can be said of a scene, to judge the judge by."""
    return Told("", scene, "")
