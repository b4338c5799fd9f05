"""The world: reproducible, split as promised, said in known words, and every attribute leaves its mark."""

from __future__ import annotations

import re
from itertools import product
from random import Random

import numpy as np
import pytest

from scripts.toy_world import (
    WORDS,
    Scene,
    Thing,
    box,
    caption,
    counterpart,
    draw,
    example,
    held_out,
    random_scene,
    tell,
)
from scripts.toy_world.captions import RELATIONS
from scripts.toy_world.scenes import (
    COLOURS,
    COLUMNS,
    FLOATING,
    GROUNDS,
    KINDS,
    SINGLE,
    SIZES,
    STANDING,
    STYLES,
    TIMES,
    kept_back,
)
from scripts.toy_world.sprites import LETTERS, SPRITES
from scripts.toy_world.words import (
    COLUMN_WORDS,
    FUNCTION_WORDS,
    GROUND_NOUNS,
    GROUND_WORDS,
    ISLAND_WORDS,
    JOINT_WORDS,
    NUMBER_WORDS,
    OVER_WORDS,
    RELATION_WORDS,
    ROW_WORDS,
    SIZE_WORDS,
    STYLE_PREFIXES,
    STYLE_SUFFIXES,
    TIME_NOUNS,
    TIME_WORDS,
)


def pixels(scene: Scene, seed: int = 0, size: int = 128) -> np.ndarray:
    return np.asarray(draw(scene, Random(seed), size), np.float32)


def test_equal_seeds_give_equal_scenes_images_and_captions() -> None:
    for seed in range(20):
        (one, picture), (two, again) = example(seed), example(seed)
        assert one == two and picture.tobytes() == again.tobytes()
        assert caption(one, Random(seed)) == caption(two, Random(seed))
    assert len({example(seed)[1].tobytes() for seed in range(20)}) == 20


def test_the_split_is_an_eighth_and_every_pair_is_trained_on() -> None:
    combinations = list(product(KINDS, COLOURS, GROUNDS))
    kept = [combination for combination in combinations if kept_back(*combination)]
    assert len(kept) * 8 == len(combinations)
    trained = set(combinations) - set(kept)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert {(c[first], c[second]) for c in trained} == {(c[first], c[second]) for c in combinations}


def test_splits_are_disjoint_and_all_is_both() -> None:
    rng = Random(0)
    assert not any(held_out(random_scene(rng, "train")) for _ in range(500))
    assert all(held_out(random_scene(rng, "unseen")) for _ in range(200))
    share = np.mean([held_out(random_scene(rng, "all")) for _ in range(4000)])
    assert 0.1 < share < 0.2
    with pytest.raises(ValueError, match="expected one of train"):
        random_scene(rng, "test")


def test_scenes_keep_their_own_rules() -> None:
    rng = Random(1)
    for scene in (random_scene(rng, "all") for _ in range(3000)):
        kinds = [thing.kind for thing in scene.things]
        assert not ("sun" in kinds and scene.time == "night")
        if scene.stacked:
            low, high = scene.things
            assert high.floats and not low.floats and (low.size, high.size) != ("big", "big")
        elif len(scene.things) == 2:
            assert [thing.column for thing in scene.things] == ["left", "right"]
        elif len(scene.things) == 3:
            assert scene.grouped and scene.things[0].size == "small"
            assert [thing.column for thing in scene.things] == ["left", "middle", "right"]
        assert not (scene.grouped and kinds[0] in SINGLE)


def test_groups_are_of_two_or_three_equal_things() -> None:
    tree = Thing("tree", "green", "small", "left")
    groups = [random_scene(Random(seed), "all") for seed in range(2000)]
    numbers = [len(scene.things) for scene in groups if scene.grouped]
    assert set(numbers) == {2, 3} and 0.1 < len(numbers) / len(groups) < 0.18
    for other in (tree._replace(colour="red"), tree._replace(kind="house"), tree._replace(size="big")):
        assert not Scene("flat", "day", "meadow", (tree, other._replace(column="right"))).grouped
    assert not Scene("flat", "day", "meadow", (tree,)).grouped and not Scene("flat", "day", "meadow").grouped


def test_plurals_are_said_with_and_without_their_number() -> None:
    tree = Thing("tree", "green", "small", "left")
    three = tuple(tree._replace(column=column) for column in COLUMNS)
    texts = {}
    for seed in range(400):
        told = tell(Scene("flat", "day", "meadow", three), Random(seed))
        assert "trees" in told.text.split() or "trees," in told.text.split()
        assert len(told.said.things) == told.numbers[0] and told.said.things[0].kind == "tree"
        texts[told.numbers] = texts.get(told.numbers, 0) + 1
        assert told.numbers == (3,) if {"three", "3"} & set(told.text.split()) else told.numbers == (2, 3)
    assert set(texts) == {(3,), (2, 3)} and min(texts.values()) > 80
    assert tell(Scene("flat", "day", "meadow", three[:1]), Random(0)).numbers == ()


def test_three_things_fit_into_the_image() -> None:
    for style in ("flat", "pixel"):
        empty = pixels(Scene(style, "cloudy", "snow"))
        tree = Thing("castle", "red", "small", "left")
        three = pixels(Scene(style, "cloudy", "snow", tuple(tree._replace(column=column) for column in COLUMNS)))
        columns = np.nonzero((np.abs(three - empty).max(2) > 60).any(0))[0]
        assert columns.min() > 2 and columns.max() < 125
        assert all(((third := columns // 43) == i).sum() > 25 for i in range(3)) and set(third) == {0, 1, 2}


def test_captions_name_every_thing_in_words_of_the_list() -> None:
    rng, used = Random(2), set()
    for _ in range(8000):
        scene = random_scene(rng, "all")
        words = re.findall(r"[\w-]+", caption(scene, rng))
        used |= set(words)
        said = {colour for colour in COLOURS if colour in words} - {"blue", "green"}  # those are also of sky and field
        assert said <= {thing.colour for thing in scene.things}
    assert used - set(FUNCTION_WORDS) == set(WORDS)


def spoken_of(text: str) -> set[str]:
    """What a caption says, found out from its words alone; longer phrases first, as "on the left of" is no column."""
    tables = [
        ("style", STYLE_PREFIXES), ("style", STYLE_SUFFIXES), ("time", TIME_WORDS), ("time", TIME_NOUNS),
        ("ground", GROUND_WORDS), ("ground", OVER_WORDS), ("ground", GROUND_NOUNS), ("column", COLUMN_WORDS),
        ("size", SIZE_WORDS), ("relation", RELATION_WORDS), ("relation", {"above": ("above it",)}),
        ("number", NUMBER_WORDS), ("row", ROW_WORDS), ("colour", {colour: (colour,) for colour in COLOURS}),
        ("ground", {"sea": ISLAND_WORDS}),
        ("time ground", JOINT_WORDS), ("time ground", {0: [way[3:] for ways in JOINT_WORDS.values() for way in ways]}),
    ]  # fmt: skip
    ways = {way.strip(" ,:"): about for about, table in tables for several in table.values() for way in several}
    found = set()
    for way in sorted(ways, key=len, reverse=True):
        rest = re.sub(rf"(?<!\w){re.escape(way)}(?!\w)", "|", text)
        if rest != text:
            found |= set(ways[way].split())
            text = rest
    return found


def test_told_is_what_the_words_say() -> None:
    rng, relations = Random(4), set()
    for _ in range(3000):
        scene = random_scene(rng, "all")
        told = tell(scene, rng)
        said = {name for name in ("style", "time", "ground") if getattr(told.said, name)}
        said |= {name for thing in told.said.things for name in ("colour", "size", "column") if getattr(thing, name)}
        said |= {name for name, is_said in (("relation", told.relation), ("number", len(told.numbers) == 1)) if is_said}
        assert spoken_of(told.text) - {"row"} == said, told
        relations.add(told.relation)
        for name in ("style", "time", "ground"):
            assert getattr(told.said, name) in ("", getattr(scene, name))
        for thing, true in zip(told.said.things, scene.things, strict=not told.numbers):
            assert thing.kind == true.kind and all(a in ("", b) for a, b in zip(thing, true, strict=True))
    assert relations == {"", *RELATIONS}


def test_sprites_are_square_cut_and_of_known_letters() -> None:
    assert set(SPRITES) == set(KINDS)
    for small, big in SPRITES.values():
        for text, side in ((small, 9), (big, 15)):
            rows = text.split()
            assert {len(row) for row in rows} == {side} and len(rows) <= side
            assert set("".join(rows)) <= set(LETTERS)


@pytest.mark.parametrize("size", [64, 128, 192])
@pytest.mark.parametrize("style", STYLES)
def test_every_size_is_drawn(style: str, size: int) -> None:
    scene = Scene(style, "day", "meadow", (Thing("house", "red", "big", "middle"),))
    picture = draw(scene, Random(0), size)
    assert picture.size == (size, size) and picture.mode == "RGB"


def test_styles_are_told_apart_by_rule() -> None:
    rng = Random(3)
    for _ in range(60):
        scene = random_scene(rng, "all")
        picture = np.asarray(draw(scene, rng), np.int32)
        blocks = picture.reshape(32, 4, 32, 4, 3)
        square = bool((blocks == blocks[:, :1, :, :1]).all())
        paper = min(picture[edge].mean() for edge in ((0,), (-1,), (slice(None), 0), (slice(None), -1))) > 240
        assert {"pixel": (True, False), "watercolour": (False, True), "flat": (False, False)}[scene.style] == (
            square,
            paper,
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize("style", STYLES)
def test_every_attribute_changes_the_image(style: str) -> None:
    """The least change of an attribute is far above the change of a seed's details, where the thing is."""
    for kind in KINDS:
        for colour, size in product(COLOURS, SIZES):
            thing = Thing(kind, colour, size, "middle")
            scene = Scene(style, "sunset", "meadow", (thing,))
            here = pixels(scene)
            other = COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)]
            recoloured = pixels(scene._replace(things=(thing._replace(colour=other),)))
            assert (np.abs(here - recoloured).max(2) > 25).mean() > 0.01, (kind, colour, other, size)


def test_grounds_and_times_differ_everywhere() -> None:
    for style in STYLES:
        pictures = {(g, t): pixels(Scene(style, t, g)) for g, t in product(GROUNDS, TIMES)}
        for (one, a), (two, b) in product(pictures.items(), repeat=2):
            if one != two:
                assert np.abs(a - b).mean() > 5, (one, two)


def test_columns_and_heights() -> None:
    empty = pixels(Scene("pixel", "cloudy", "snow"))
    for kinds, upper in ((STANDING, False), (FLOATING, True)):
        for kind, (i, column) in product(kinds, enumerate(COLUMNS)):
            scene = Scene("pixel", "cloudy", "snow", (Thing(kind, "red", "big", column),))
            y, x = np.nonzero(np.abs(pixels(scene) - empty).max(2) > 60)
            assert abs(x.mean() / 128 - (0.27, 0.5, 0.73)[i]) < 0.08  # a crescent and a castle lean
            assert (y.mean() < 64) == upper


def test_the_box_of_a_thing_has_it_inside() -> None:
    """The same landscape with and without it: hardly anything differs outside."""
    rng = Random(5)
    for _ in range(40):
        scene = random_scene(rng, "all")._replace(style=rng.choice(("flat", "pixel")))
        if len(scene.things) != 1 or scene.ground == "sea":
            continue
        seed = rng.random()
        one, none = (np.asarray(draw(each, Random(seed))).astype(int) for each in (scene, scene._replace(things=())))
        changed = np.abs(one - none).max(2) > 30  # not the halo of a moon
        left, top, right, bottom = (round(128 * side) for side in box(scene.things[0]))
        inside = changed[top:bottom, left:right].sum()
        assert inside > 100 and changed.sum() - inside <= 0.05 * changed.sum(), scene


def test_counterparts_have_the_same_things_otherwise() -> None:
    """Never the scene itself, never one that training does not see, and drawn and told like any other."""
    rng = Random(6)
    changed = {"number": 0, "column": 0, "colour": 0, "size": 0, "time": 0}
    for _ in range(600):
        scene = random_scene(rng, "train")
        other = counterpart(scene, rng)
        assert other != scene and not held_out(other)
        assert (other.style, other.ground) == (scene.style, scene.ground)
        if scene.grouped:
            assert other.grouped and {len(scene.things), len(other.things)} == {2, 3}
            assert {t.kind for t in other.things} == {t.kind for t in scene.things}
            changed["number"] += 1
            continue
        assert sorted(t.kind for t in other.things) == sorted(t.kind for t in scene.things)
        if not scene.things:
            changed["time"] += other.time != scene.time
            continue
        assert other.time == scene.time
        if len(scene.things) == 2:
            assert other.stacked == scene.stacked
            assert [t.column for t in other.things] == sorted((t.column for t in other.things), key=COLUMNS.index)
            for field in ("colour", "size"):
                assert sorted(getattr(t, field) for t in other.things) == sorted(
                    getattr(t, field) for t in scene.things
                )
        for field in ("column", "colour", "size"):
            changed[field] += {(t.kind, getattr(t, field)) for t in other.things} != {
                (t.kind, getattr(t, field)) for t in scene.things
            }
        assert tell(other, rng).text
    assert min(changed.values()) > 10, changed
