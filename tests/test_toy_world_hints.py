"""Hints of drawn scenes: outlines and depth are those of the picture; edges are what Canny's detector finds."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from PIL import Image

from scripts.common.edges import agreement, grow
from scripts.toy_world import Scene, Thing, draw, example, random_scene
from scripts.toy_world.hints import depth, outlines
from scripts.toy_world.scenes import COLUMNS, STYLES
from sd.imaging import annotate

LOW, HIGH, SIGMA = 0.1, 0.2, 1.0

CASTLE = Scene("flat", "day", "meadow", (Thing("castle", "red", "big", "middle"),))


def found(scene: Scene, seed: int, **options) -> np.ndarray:
    """The outlines as (H, W) of bool."""
    pixels = np.asarray(outlines(scene, Random(seed), **options))
    assert pixels.dtype == np.uint8 and set(np.unique(pixels)) <= {0, 255}
    return pixels > 0


def edges(scene: Scene, seed: int) -> np.ndarray:
    return annotate.edges(np.asarray(draw(scene, Random(seed))) / 255, LOW, HIGH, SIGMA)


@pytest.mark.parametrize("style", STYLES)
def test_outlines_are_where_the_picture_has_edges(style: str) -> None:
    """With the same random numbers; with others they are elsewhere, as clouds, hills and the margin are."""
    rng, same, other = Random(f"outlines: {style}"), [], []
    for seed in range(12):
        scene = random_scene(rng)._replace(style=style)
        drawn = edges(scene, seed)
        same.append(agreement(drawn, found(scene, seed)))
        other.append(agreement(drawn, found(random_scene(rng), seed)))
    assert np.mean(same) > (0.72 if style == "watercolour" else 0.85)  # whose margin has no outline
    assert np.mean(same) > np.mean(other) + 0.2


@pytest.mark.parametrize("style", STYLES)
def test_outlines_of_things_alone(style: str) -> None:
    scene = CASTLE._replace(style=style)
    everything, things = found(scene, 3), found(scene, 3, landscape=False)
    assert not things[:40].any() and not things[:, :20].any() and not things[:, 108:].any()
    assert 0.02 < things.mean() < everything.mean()
    inside = (slice(50, 100), slice(40, 88))
    assert (things[inside] == everything[inside]).mean() > 0.97
    nothing = scene._replace(things=())
    assert (found(nothing, 3, landscape=False) == found(nothing, 3)).all()


def test_lines_are_thin_at_every_size() -> None:
    for size in (64, 128, 256):
        lines = found(CASTLE, 0, size=size)
        assert lines.shape == (size, size)
        core = lines & ~grow(~lines, 1)  # pixels whose neighbours are all lines
        assert core.mean() < 0.01


def test_shadows_and_glows_have_no_outline() -> None:
    sun = Scene("flat", "day", "sea", (Thing("sun", "yellow", "small", "middle"),))
    lines = found(sun, 0, landscape=False)
    rows = np.flatnonzero(lines.any(1))
    assert 30 < rows[-1] - rows[0] < 41  # the glow would be 48 pixels high


@pytest.mark.parametrize("style", STYLES)
def test_depth_is_grey_by_nearness(style: str) -> None:
    things = (Thing("house", "red", "big", "left"), Thing("balloon", "blue", "small", "right"))
    near = np.asarray(depth(Scene(style, "day", "meadow", things), Random(1)), int)
    assert near.shape == (128, 128)
    assert near[10, 64] == 0 and near[126, 64] > 230  # the sky, and the ground before our feet
    assert (np.diff(near[84:127, 118]) >= -8).all()  # a place without a thing, from the horizon to the lower edge
    house, balloon = near[80, 35], near[24, 93]
    assert abs(house - near[109, 60]) < 30  # as near as the ground that it stands on
    assert 0 < balloon < house
    assert np.ptp(near[75:90, 25:45]) < 12  # one plane


def test_a_hint_does_not_change_the_picture() -> None:
    for seed in range(6):
        scene, image = example(seed)
        again = Random(seed)
        random_scene(again)
        state = again.getstate()
        for make in (outlines, depth):
            assert make(scene, again).tobytes() == make(scene, _with(state)).tobytes()
            again.setstate(state)
        assert draw(scene, again).tobytes() == image.tobytes()


def _with(state: tuple) -> Random:
    rng = Random()
    rng.setstate(state)
    return rng


def test_columns_move_the_outlines() -> None:
    middles = []
    for column in COLUMNS:
        lines = found(CASTLE._replace(things=(CASTLE.things[0]._replace(column=column),)), 0, landscape=False)
        middles.append(np.flatnonzero(lines.any(0)).mean())
    assert middles == sorted(middles) and middles[2] - middles[0] > 50


# ------------------------------------------------------------------------------------------------ edges


def test_edges_between_colours_of_one_brightness() -> None:
    image = np.zeros((32, 32, 3))
    image[:, :16], image[:, 16:] = (0.8, 0.2, 0.2), (0.2, 0.8, 0.2)
    assert annotate.edges(image, LOW, HIGH, SIGMA)[1:-1, 15:17].any(1).all()  # none at the border
    assert not annotate.edges(image.mean(2), LOW, HIGH, SIGMA).any()


def test_agreement_is_the_harmonic_mean_of_both_shares() -> None:
    hint, lines = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    hint[5, :10] = True
    lines[7, :10] = lines[15, :10] = True
    assert agreement(hint, hint) == 1.0
    assert agreement(lines, hint) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert agreement(lines, hint, reach=1) == 0.0
    assert agreement(hint, ~hint & False) == 0.0 and agreement(hint & False, hint & False) == 1.0


def test_grow_reaches_so_many_pixels() -> None:
    marked = np.zeros((9, 9), bool)
    marked[4, 8] = True
    assert grow(marked, 2).sum() == 5 * 3 and grow(marked, 0).sum() == 1


def test_hints_are_grey_images() -> None:
    for make in (outlines, depth):
        image = make(CASTLE, Random(0), size=96)
        assert isinstance(image, Image.Image) and image.mode == "L" and image.size == (96, 96)
