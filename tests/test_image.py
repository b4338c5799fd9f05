"""Tensors to pictures, and files that are whole or not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sd.image import grid, to_pil


def test_rounding_and_clamping():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 2 * 100.4 / 255 - 1, 2 * 100.6 / 255 - 1])
    (image,) = to_pil(values.expand(1, 3, 1, 9))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255, 100, 101]


def test_every_byte_survives():
    byte = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    (image,) = to_pil(byte.float() / 127.5 - 1)
    assert np.array_equal(np.asarray(image)[..., 0], byte[0, 0].numpy())


def test_rows_are_rows():
    picture = torch.full((1, 3, 4, 6), -1.0)
    picture[0, 0, 1, 5] = 1
    (image,) = to_pil(picture)
    assert image.size == (6, 4) and image.getpixel((5, 1)) == (255, 0, 0)


@pytest.mark.parametrize(
    "n, columns, size", [(1, None, (4, 6)), (4, None, (8, 12)), (5, None, (12, 12)), (3, 3, (12, 6))]
)
def test_grid(n, columns, size):
    sheet = grid([Image.new("RGB", (4, 6), (i + 1, 0, 0)) for i in range(n)], columns)
    assert sheet.size == size
    assert sorted(set(np.asarray(sheet)[..., 0].flatten().tolist()) - {0}) == list(range(1, n + 1))
