"""Masks as annotation tools and paint programs save them: in files, and as images given to the model."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sd import StableDiffusion
from sd.imaging.files import ImageFileError, flatten_mask, read_mask
from sd.imaging.masks import prepare_mask

SHAPE = np.zeros((48, 64), dtype=bool)
SHAPE[10:30, 20:50] = True
RED, BLUE, DARK_RED = (255, 0, 0), (0, 0, 255), (128, 0, 0)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def grey(low: int, high: int, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.where(SHAPE, high, low).astype(dtype))


def colours(low: tuple[int, ...], high: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.where(SHAPE[..., None], high, low).astype(np.uint8))


def palette(low: tuple[int, ...], high: tuple[int, ...]) -> Image.Image:
    image = Image.fromarray(SHAPE.astype(np.uint8), "P")
    image.putpalette([*low, *high])
    return image


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return Image.open(buffer)


UNDERSTOOD: dict[str, tuple[Image.Image, str | None]] = {
    "black and white": (grey(0, 255), None),
    "0 and 1": (grey(0, 1), "the mask has the values 0 and 1: they are taken as labels, and 1 is generated"),
    "0 and 2": (grey(0, 2), "values 0 and 2"),
    "0 and 3": (grey(0, 3), "values 0 and 3"),
    "0 and 38": (grey(0, 38), "values 0 and 38"),  # the dark red of label palettes as grey
    "16-bit 0 and 1": (grey(0, 1, np.uint16), "values 0 and 1"),
    "16-bit 0 and 3": (grey(0, 3, np.uint16), "values 0 and 3"),
    "16-bit 0 and 255": (grey(0, 255, np.uint16), None),
    "16-bit 0 and 65535": (grey(0, 65535, np.uint16), None),
    "32-bit 0 and 1": (grey(0, 1, np.int32), "values 0 and 1"),
    "boolean": (Image.fromarray(SHAPE), None),
    "palette, black and white": (palette(BLACK, WHITE), None),
    "palette, black and red": (palette(BLACK, DARK_RED), "the mask is black and #800000: #800000 is generated"),
    "palette, red and blue": (palette(RED, BLUE), "values 0 and 1"),
    "palette, nearly the same": (palette(BLACK, (1, 1, 1)), "values 0 and 1"),
    "white on red": (colours(RED, WHITE), "the mask is white and #ff0000: white is generated"),
    "red on black": (colours(BLACK, RED), "the mask is black and #ff0000: #ff0000 is generated"),
    "white on red, JPEG": (jpeg(colours(RED, WHITE)), "the mask is white and #f"),
    "white on red, soft": (colours(RED, WHITE).filter(ImageFilter.GaussianBlur(0.5)), "the mask is white and #ff0000"),
    "alpha": (Image.fromarray(np.dstack([np.full((48, 64, 3), 90), 255 * SHAPE]).astype(np.uint8)), None),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
@pytest.mark.parametrize("how", ["read", "given"])
def test_forms_that_are_understood(tmp_path, name, how):
    image, words = UNDERSTOOD[name]
    if how == "read":
        path = tmp_path / ("mask.tif" if image.mode == "I" else "mask.png")
        image.save(path)
        read: Callable[[], Image.Image] = lambda: read_mask(path)  # noqa: E731
    else:
        read = lambda: flatten_mask(image)  # noqa: E731
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mask = np.asarray(prepare_mask(read(), (64, 48)))
    inner = np.asarray(Image.fromarray(SHAPE).convert("L").filter(ImageFilter.MinFilter(7))) > 0
    outer = np.asarray(Image.fromarray(SHAPE).convert("L").filter(ImageFilter.MaxFilter(7))) > 0
    assert (mask[inner] == 255).all() and (mask[~outer] == 0).all()
    if "JPEG" not in name and "soft" not in name:
        assert np.array_equal(mask == 255, SHAPE) and set(np.unique(mask)) == {0, 255}
    assert len(told) == (words is not None) and (words is None or words in str(told[0].message))


def classes(*values: int) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=np.uint8).repeat(16)[None].repeat(48, 0))


def photo() -> Image.Image:
    y, x = np.mgrid[:48, :64]
    return Image.fromarray(np.dstack([x * 4, y * 5, 255 - x * 3]).astype(np.uint8))


def holed() -> Image.Image:
    image = photo()
    image.putalpha(grey(255, 0))
    return image


AMBIGUOUS: dict[str, tuple[Image.Image, str]] = {
    "several labels": (classes(0, 1, 2, 3), "nearly black, with the values 0, 1, 2, 3, as labels of several classes"),
    "no background": (classes(1, 2), "nearly black, with the values 1, 2"),
    "red and blue": (colours(RED, BLUE), "and it is not clear which of them is meant: make the part to generate white"),
    "several colours": (
        Image.fromarray(np.array([BLACK, RED, BLUE, WHITE], dtype=np.uint8).repeat(16, 0)[None].repeat(48, 0)),
        "the mask has 4 colours, as labels of several classes: make the part to generate white and the rest black",
    ),
    "an image with a hole": (
        holed(),
        "an image with a transparent part, and it is not clear which of the two is meant",
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_masks_are_refused(tmp_path, name):
    image, words = AMBIGUOUS[name]
    image.save(tmp_path / "mask.png")
    with pytest.raises(ImageFileError, match=f"mask.png: .*{words}") as error:
        read_mask(tmp_path / "mask.png")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=words):
        prepare_mask(image, (64, 48))


@pytest.mark.filterwarnings("error")
def test_noise_is_no_label():
    few = grey(0, 0)
    few.putpixel((3, 3), 1)
    assert prepare_mask(few, (64, 48)).getextrema() == (0, 0)
    noisy = np.where(SHAPE, 250, 3).astype(np.uint8)
    noisy[::3] -= 2
    assert np.array_equal(np.asarray(prepare_mask(Image.fromarray(noisy), (64, 48))) == 255, SHAPE)


def test_what_masks_do_is_said(tiny_sd):
    """Also by the model itself."""
    for mask, words in (
        (grey(0, 0), "the mask is empty (all black): nothing is generated"),
        (grey(255, 255), "the mask is white everywhere: the whole image is generated"),
        (grey(0, 200), "the mask is nowhere white (at most 200 of 255): the result is blended with the image"),
        (grey(0, 1), "the mask has the values 0 and 1: they are taken as labels, and 1 is generated"),
    ):
        told: list[str] = []
        prepare_mask(mask, (64, 48), note=told.append)
        assert told == ([words] if "empty" not in words else [])
    image = Image.new("RGB", (64, 48), "grey")
    assert isinstance(tiny_sd, StableDiffusion)
    with pytest.warns(UserWarning, match="values 0 and 1: they are taken as labels"):
        made = tiny_sd.inpaint("a", image, grey(0, 1), steps=1, seed=0)[0]
    changed = (np.asarray(made) != np.asarray(image)).any(axis=-1)
    assert not changed[~SHAPE].any() and changed[SHAPE].mean() > 0.9
    with pytest.raises(ValueError, match="labels of several classes"):
        tiny_sd.inpaint("a", image, classes(0, 1, 2), steps=1)


def test_inverted_labels(tmp_path, capsys):
    """--invert-mask turns labels around, not their numbers."""
    from scripts import inpaint

    Image.new("RGB", (64, 48), "grey").save(tmp_path / "image.png")
    grey(0, 1).save(tmp_path / "mask.png")
    given = [
        "a",
        str(tmp_path / "image.png"),
        str(tmp_path / "mask.png"),
        "--invert-mask",
        "--steps",
        "1",
        "--seed",
        "1",
    ]
    assert inpaint.main([*given, "--out", str(tmp_path / "out.png"), "--height", "64", "--width", "64"]) == 0
    changed = (np.asarray(Image.open(tmp_path / "out.png")) != 128).any(axis=-1)
    assert not changed[SHAPE].any() and changed[~SHAPE].mean() > 0.9
    assert "values 0 and 1" in capsys.readouterr().err
