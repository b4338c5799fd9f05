"""Tensors to pictures, and files that are whole or not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sd.image import grid, parameters, save_png, to_pil


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


def test_parameters_have_the_form_that_tools_read():
    text = parameters("a cat", "blurry", {"Steps": 20, "Sampler": "DDIM", "Seed": 7, "Model": 'a,"b'})
    assert text == 'a cat\nNegative prompt: blurry\nSteps: 20, Sampler: DDIM, Seed: 7, Model: "a,\\"b"'
    assert parameters("a", "", {"Steps": 1}) == "a\nSteps: 1"


@pytest.mark.parametrize("text", ["a cat", "naïve", "東京 🎨\nline", "\ud800 half a surrogate", None])
def test_png_carries_its_parameters(tmp_path, text):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (3, 3)), path, text)
    with Image.open(path) as image:
        image.load()
        assert image.text.get("parameters") == (text.replace("\ud800", "?") if text else None)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_no_file_is_replaced_and_none_is_left_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        save_png(Image.new("RGB", (3, 3)), path)
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_png(Image.new("RGB", (3, 3)), tmp_path / "b.png")
    assert len(list(tmp_path.iterdir())) == 1
