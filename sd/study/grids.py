"""Grids of images over two settings, known as X/Y plots.

sheet = grid(model, "a red house", Axis("steps", (4, 8, 16)), Axis("sampler", ("ddim", "heun")))
draw_grid(sheet).save("grid.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..params import ImageToImage, SamplingParams
from ..pipeline import StableDiffusion
from ..settings import OneOf
from .drawing import figure, strip
from .runs import SETTINGS, spacing_of

AXES = ("sampler", "steps", "guidance", "seed", "strength", "prompt")


class Axis(NamedTuple):
    """A setting, one of AXES, and its values."""

    name: str
    values: Sequence[object]

    @classmethod
    def of(cls, text: str) -> Axis:
        """Parse "steps=4,8,16"; the values of prompts are separated by "|". Raises ValueError for anything else.

        >>> Axis.of("guidance=1,7.5")
        Axis(name='guidance', values=(1.0, 7.5))
        """
        name, found, values = text.partition("=")
        OneOf(AXES)("axis", name.strip())
        name = name.strip()
        words = [word.strip() for word in values.split("|" if name == "prompt" else ",")]
        if not found or not all(words):
            form = "prompt=TEXT|TEXT|..." if name == "prompt" else "NAME=VALUE,VALUE,..."
            raise ValueError(f"an axis is {form}, got {text!r}")
        kinds: dict[str, type[int] | type[float]] = {"steps": int, "seed": int, "guidance": float, "strength": float}
        kind = kinds.get(name, str)
        try:
            return cls(name, tuple(kind(word) for word in words))
        except ValueError:
            numbers = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"the values of {name} are {numbers}, got {values!r}") from None


class Grid(NamedTuple):
    """Images [row][column]: y varies by row, x by column."""

    x: Axis
    y: Axis
    images: list[list[Image.Image]]


def grid(
    model: StableDiffusion,
    prompt: str,
    x: Axis,
    y: Axis,
    settings: SamplingParams = SETTINGS,
    image: Image.Image | None = None,
) -> Grid:
    """Generate an image for each pair of values; `settings` has the other settings.

    `image` is the start of image to image, which the axis "strength" needs. Raises ValueError for invalid values
    before the first image is generated.
    """
    for axis in (x, y):
        OneOf(AXES)("axis", axis.name)
    if x.name == y.name:
        raise ValueError(f"a grid needs two different axes, got {x.name} twice")
    if image is None and "strength" in (x.name, y.name):
        raise ValueError("the axis strength needs an image to start from")

    for axis in (x, y):
        for value in axis.values if axis.name != "prompt" else ():
            given: dict[str, Any] = {axis.name: value}
            _ = ImageToImage.of("", image=Image.new("RGB", (8, 8)), **given)

    def generate(x_value: object, y_value: object) -> Image.Image:
        values: dict[str, Any] = {
            "prompt": prompt,
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "seed": settings.seed,
            x.name: x_value,
            y.name: y_value,
        }
        values["spacing"] = spacing_of(values["sampler"], settings.spacing)
        if image is None:
            return model.txt2img(**values)[0]
        return model.img2img(image=image, **values)[0]

    return Grid(x, y, [[generate(a, b) for a in x.values] for b in y.values])


def draw_grid(sheet: Grid, title: str = "", width: int = 128) -> Image.Image:
    """The images, with the values of x above and those of y on the left."""
    columns = [f"{sheet.x.name} {value}" if sheet.x.name != "prompt" else str(value) for value in sheet.x.values]
    rows = [f"{sheet.y.name} {value}" if sheet.y.name != "prompt" else str(value) for value in sheet.y.values]
    return figure(title or f"{sheet.x.name} and {sheet.y.name}", strip(sheet.images, columns, rows, width))
