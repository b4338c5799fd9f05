"""Tensors to images, and files that are whole or not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd.imaging.tensors import fit, frame, grid, to_pil, to_tensor


def test_rounding_and_clamping():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 2 * 100.4 / 255 - 1, 2 * 100.6 / 255 - 1])
    (image,) = to_pil(values.expand(1, 3, 1, 9))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255, 100, 101]


def test_every_byte_survives():
    byte = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    (image,) = to_pil(byte.float() / 127.5 - 1)
    assert np.array_equal(np.asarray(image)[..., 0], byte[0, 0].numpy())


def test_rows_are_rows():
    image = torch.full((1, 3, 4, 6), -1.0)
    image[0, 0, 1, 5] = 1
    (image,) = to_pil(image)
    assert image.size == (6, 4) and image.getpixel((5, 1)) == (255, 0, 0)


@pytest.mark.parametrize(
    "n, columns, size", [(1, None, (4, 6)), (4, None, (8, 12)), (5, None, (12, 12)), (3, 3, (12, 6))]
)
def test_grid(n, columns, size):
    sheet = grid([Image.new("RGB", (4, 6), (i + 1, 0, 0)) for i in range(n)], columns)
    assert sheet.size == size
    assert sorted(set(np.asarray(sheet)[..., 0].flatten().tolist()) - {0}) == list(range(1, n + 1))


def test_there_and_back():
    image = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    assert to_tensor(image).shape == (1, 3, 5, 7) and to_tensor(image).min() == -1
    assert to_pil(to_tensor(image))[0].tobytes() == image.tobytes()
    assert to_tensor(Image.new("L", (7, 5), 255)).eq(1).all() and to_tensor(Image.new("L", (7, 5))).shape == (
        1,
        1,
        5,
        7,
    )


SIDES = st.integers(1, 4000)
GRID = st.integers(1, 60).map(lambda n: 8 * n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIDES, SIDES, GRID, GRID)
@example(2894, 1927, 72, 88)  # where rounding led out of the image
@example(4000, 3000, 576, 256)
def test_any_image_is_brought_to_any_size(w, h, width, height):
    image = Image.new("L", (w, h), 7)
    assert fit(image, width, height).size == (width, height)
    framed, inside = frame(image, width, height)
    assert framed.size == (width, height) and framed.getextrema() == (7, 7)
    assert 0 <= inside.left < inside.right <= width and 0 <= inside.top < inside.bottom <= height
    aspect = max(w / h, h / w)
    if min(inside.size) > 8 and aspect < 20:  # proportions are kept, to a pixel
        assert abs(inside.size[0] / inside.size[1] / (w / h) - 1) < 1 / min(inside.size) + 0.01


def ramp(width, height):
    """Grey that says where a pixel was: its column."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


def test_the_middle_is_kept():
    cut = np.asarray(fit(ramp(200, 50), 48, 48)).astype(int)
    assert abs(cut[:, 0].mean() - 255 * 75 / 199) < 4 and abs(cut[:, -1].mean() - 255 * 124 / 199) < 4
    image = ramp(70, 60)
    assert fit(image, 64, 56).tobytes() == image.crop((3, 2, 67, 58)).tobytes()  # cut, not resampled
    assert fit(image, 70, 60).tobytes() == image.tobytes()


def test_frames_repeat_the_edges():
    image = ramp(60, 20)
    framed, inside = frame(image, 64, 64)
    assert inside.size == (60, 20) or inside.size == (64, 21)
    pixels = np.asarray(framed)
    assert (pixels[0] == pixels[inside.top]).all() and (pixels[:, 0] == 0).all() and (pixels[:, -1] == 255).all()
    same, box = frame(ramp(61, 62), 64, 64)  # a few pixels short: not resampled
    assert box.size == (61, 62) and same.crop(box).tobytes() == ramp(61, 62).tobytes()
    assert frame(ramp(10, 10), 64, 64)[1].size == (64, 64)
