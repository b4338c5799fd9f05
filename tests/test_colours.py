"""Matching of colours."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sd.imaging.colours import match_colours


def picture(seed: int, mean: float, spread: float, size=(40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(3, 3))
    pixels = rng.normal(size=(size[1], size[0], 3)) @ (mix / np.linalg.norm(mix)) * spread + mean
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def moments(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    flat = np.asarray(image, float).reshape(-1, 3)
    return flat.mean(0), np.cov(flat.T)


def test_mean_and_covariance_become_those_of_the_other():
    image, other = picture(1, 100, 30), picture(2, 140, 40, (64, 64))
    mean, covariance = moments(match_colours(image, other))
    goal, goal_covariance = moments(other)
    assert np.abs(mean - goal).max() < 0.3
    assert np.linalg.norm(covariance - goal_covariance) < 0.05 * np.linalg.norm(goal_covariance)


def test_an_image_that_matches_does_not_change():
    image = picture(1, 128, 30)
    assert np.abs(np.asarray(match_colours(image, image), int) - np.asarray(image, int)).max() == 0


@pytest.mark.parametrize("mean", [5, 250])
def test_clipping_does_not_move_the_mean(mean):
    other = picture(2, mean, 60)
    assert np.abs(moments(match_colours(picture(1, 128, 40), other))[0] - moments(other)[0]).max() < 1


def test_flat_images_stay_flat():
    """The noise of one level in a flat image is not blown up to the contrast of the other."""
    flat = Image.new("RGB", (16, 16), (90, 90, 90))
    assert len(match_colours(flat, picture(1, 128, 30)).getcolors()) == 1
    speck = flat.copy()
    speck.putpixel((3, 3), (91, 90, 90))
    low, high = match_colours(speck, picture(1, 128, 30)).getchannel(0).getextrema()
    assert high - low <= 4
