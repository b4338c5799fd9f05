"""Figures: plots, heat maps and text by matplotlib, and sheets of images composed with Pillow.

Every function takes data and returns a new RGB image on white. `beside` and `above` compose larger figures from smaller
ones. Sizes are in pixels. In labels `x_{t}` writes a subscript and `10^{-3}` a superscript.

matplotlib is the extra `study`. It is imported where it is used, always through Figure objects with the Agg backend,
so the state of `pyplot` is neither read nor changed.

>>> maps = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]
>>> beside(maps, gap=6).width
134
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (33, 37, 45)
MUTED: Colour = (104, 111, 122)
LINE: Colour = (221, 225, 231)
SHADE: Colour = (244, 246, 249)
# distinguishable for colour-blind readers: Okabe and Ito 2008, "Color universal design"
SERIES: tuple[Colour, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (90, 90, 90), (0, 0, 0),
)  # fmt: skip
SEQUENTIAL, DIVERGING = "inferno", "RdBu_r"  # matplotlib's colour maps

SIZE, SMALL, LARGE = 15, 13, 21  # of letters, in pixels
DPI = 72  # at which a point is a pixel
MISSING = 'the figures need matplotlib: pip install "sd-from-scratch[study]" or pip install matplotlib'


def matplotlib_module(name: str) -> Any:
    """A module of matplotlib, such as "figure". ValueError that says what to install where matplotlib is missing."""
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ValueError(MISSING) from None


# ------------------------------------------------------------------------------------- text


def _markup(text: str) -> str:
    """A label in matplotlib's syntax: `x_{t}` becomes x$_{\\mathrm{t}}$, all other characters stand for themselves."""
    return re.sub(r"([_^])\{([\w.+ -]+)\}", r"$\1{\\mathrm{\2}}$", text.replace("$", r"\$"))


@lru_cache(maxsize=64)
def _font(size: float, bold: bool = False) -> Any:
    return matplotlib_module("font_manager").FontProperties(
        family="DejaVu Sans", size=size, weight="bold" if bold else "normal"
    )


@lru_cache(maxsize=1)
def _measure() -> Any:
    return matplotlib_module("backends.backend_agg").RendererAgg(8, 8, DPI)


@lru_cache(maxsize=4096)
def _extent(text: str, size: int, bold: bool = False) -> float:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return float(
            _measure().get_text_width_height_descent(_markup(text), _font(size, bold), "$" in _markup(text))[0]
        )


def text_width(text: str, size: int = SIZE, bold: bool = False) -> int:
    """Width of one line in pixels."""
    return math.ceil(_extent(text, size, bold)) if text else 0


def line_height(size: int = SIZE) -> int:
    """Height of a line in pixels."""
    return round(1.4 * size)


def write(
    image: Image.Image,
    xy: tuple[float, float],
    text: str,
    size: int = SIZE,
    colour: Colour = INK,
    align: str = "left",
    bold: bool = False,
) -> None:
    """One line onto an image; xy is its left end, middle or right end (`align`) at half its height."""
    if not text:
        return
    width, height = text_width(text, size, bold) + 4, 2 * line_height(size)
    figure_of, canvas_of = matplotlib_module("figure").Figure, matplotlib_module("backends.backend_agg").FigureCanvasAgg
    drawn = figure_of(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="none")
    drawn.text(2 / width, 0.5 - 0.36 * size / height, _markup(text), fontproperties=_font(size, bold), va="baseline")
    canvas = canvas_of(drawn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    mask = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., 3].copy())
    x = xy[0] - {"left": 0.0, "middle": 0.5, "right": 1.0}[align] * (width - 4) - 2
    image.paste(colour, (round(x), round(xy[1] - mask.height / 2)), mask)


def wrapped(text: str, width: int, size: int = SIZE) -> list[str]:
    """The lines of a text that is at most `width` pixels wide."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and text_width(longer, size) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def paragraph(
    text: str,
    width: int | None = None,
    size: int = SIZE,
    colour: Colour = INK,
    align: str = "left",
    bold: bool = False,
) -> Image.Image:
    """A text as an image, in lines of at most `width` pixels."""
    lines = wrapped(text, width, size) if width is not None else text.split("\n")
    wide = width if width is not None and align != "left" else max(text_width(line, size, bold) for line in lines) + 1
    image = Image.new("RGB", (max(wide, 1), line_height(size) * len(lines)), PAPER)
    x = {"left": 0, "middle": image.width / 2, "right": image.width}[align]
    for row, line in enumerate(lines):
        write(image, (x, (row + 0.5) * line_height(size)), line, size, colour, align, bold)
    return image


# ------------------------------------------------------------------------------------- composition


def _place(room: int, align: str) -> int:
    return {"start": 0, "middle": room // 2, "end": room}[align]


def beside(images: Sequence[Image.Image], gap: int = 16, align: str = "start") -> Image.Image:
    """Images from left to right; `align` ("start", "middle", "end") is of their heights."""
    height = max(image.height for image in images)
    sheet = Image.new("RGB", (sum(image.width for image in images) + gap * (len(images) - 1), height), PAPER)
    x = 0
    for image in images:
        sheet.paste(image, (x, _place(height - image.height, align)))
        x += image.width + gap
    return sheet


def above(images: Sequence[Image.Image], gap: int = 16, align: str = "start") -> Image.Image:
    """Images from top to bottom; `align` ("start", "middle", "end") is of their widths."""
    width = max(image.width for image in images)
    sheet = Image.new("RGB", (width, sum(image.height for image in images) + gap * (len(images) - 1)), PAPER)
    y = 0
    for image in images:
        sheet.paste(image, (_place(width - image.width, align), y))
        y += image.height + gap
    return sheet


def framed(image: Image.Image, margin: int = 24) -> Image.Image:
    """The image with white around it."""
    sheet = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), PAPER)
    sheet.paste(image, (margin, margin))
    return sheet


def figure(title: str, body: Image.Image, note: str = "") -> Image.Image:
    """A whole figure: a title, a note that says how to read it, and what it shows."""
    width = max(body.width, min(text_width(title, LARGE, bold=True) + 2, 900), 420 if note else 0)
    parts = [paragraph(title, width, LARGE, bold=True)]
    if note:
        parts.append(paragraph(note, width, SIZE, MUTED))
    return framed(above([above(parts, gap=4), body], gap=18))


def scaled(image: Image.Image, width: int, pixels: bool = False) -> Image.Image:
    """The image at this width; `pixels` keeps its pixels visible when it grows."""
    height = max(round(image.height * width / image.width), 1)
    if image.width == width:
        return image
    grows = Image.Resampling.NEAREST if pixels else Image.Resampling.BICUBIC
    return image.resize((width, height), grows if width > image.width else Image.Resampling.LANCZOS)


def captioned(image: Image.Image, below: str, size: int = SMALL, colour: Colour = INK) -> Image.Image:
    """The image with a centred text below it."""
    return above([image, paragraph(below, image.width, size, colour, align="middle")], gap=5, align="middle")


def strip(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    width: int = 128,
    gap: int = 6,
    pixels: bool = False,
) -> Image.Image:
    """Images in rows and columns at one width, with the columns' names above and the rows' names on the left."""
    cells = [[scaled(image, width, pixels) for image in row] for row in rows]
    body = above([beside(row, gap) for row in cells], gap)
    if columns:
        heads = [paragraph(name, width, SMALL, INK, align="middle") for name in columns]
        body = above([beside(heads, gap, align="end"), body], gap=5)
    if names:
        wide = min(max(text_width(line, SMALL) for name in names for line in name.split("\n")) + 2, 150)
        side = Image.new("RGB", (wide, body.height), PAPER)
        y = body.height - sum(row[0].height + gap for row in cells) + gap
        for name, row in zip(names, cells, strict=True):
            label = paragraph(name, wide, SMALL, INK, align="right")
            side.paste(label, (0, y + (row[0].height - label.height) // 2))
            y += row[0].height + gap
        body = beside([side, body], gap=10)
    return body


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    align: Sequence[str] | None = None,
    shaded: Sequence[int] = (),
    size: int = SMALL,
) -> Image.Image:
    """A table; `align` ("left", "middle", "right") per column, `shaded` the rows on a grey ground."""
    align = align or ["left"] * len(head)
    room, height = 22, round(1.75 * size)
    widths = [max(text_width(row[i], size) for row in [head, *rows]) + room for i in range(len(head))]
    sheet = Image.new("RGB", (sum(widths), height * (len(rows) + 1) + 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate([head, *rows]):
        y = number * height
        if number - 1 in shaded:
            draw.rectangle((0, y + 1, sheet.width, y + height), fill=SHADE)
        x = 0
        for cell, wide, side in zip(row, widths, align, strict=True):
            at = {"left": x + room / 2, "middle": x + wide / 2, "right": x + wide - room / 2}[side]
            write(sheet, (at, y + height / 2), cell, size, MUTED if number == 0 else INK, side)
            x += wide
        draw.line((0, y + height, sheet.width, y + height), fill=MUTED if number == 0 else LINE)
    return sheet


# ------------------------------------------------------------------------------------- heat maps


def coloured(values: np.ndarray, colormap: str = SEQUENTIAL) -> np.ndarray:
    """Values in [0, 1], of any shape -> colours (..., 3), uint8, by one of matplotlib's colour maps."""
    cmap = matplotlib_module("cm").ScalarMappable(cmap=colormap).get_cmap()
    return np.asarray(cmap(np.clip(values, 0, 1).astype(np.float64), bytes=True))[..., :3]


def heat(
    values: Tensor, width: int = 128, low: float | None = None, high: float | None = None, diverging: bool = False
) -> Image.Image:
    """(h, w) as colours, dark for `low` to light for `high` (its smallest and largest if not given), square pixels.

    `diverging` is for values around 0: blue below, red above, white at 0.
    """
    array = values.detach().float().cpu().numpy()
    high = float(np.abs(array).max() if diverging else array.max()) if high is None else high
    low = (-high if diverging else float(array.min())) if low is None else low
    part = (array - low) / max(high - low, 1e-12)
    return scaled(Image.fromarray(coloured(part, DIVERGING if diverging else SEQUENTIAL)), width, pixels=True)


def overlay(image: Image.Image, values: Tensor, width: int = 160, high: float | None = None) -> Image.Image:
    """A heat map (h, w), from 0, over an image: grey and dark where there is little, light where much."""
    height = max(round(image.height * width / image.width), 1)
    array = values.detach().float().cpu().numpy()
    high = float(array.max()) if high is None else high
    field = Image.fromarray(array / max(high, 1e-12)).resize((width, height), Image.Resampling.BICUBIC)
    part = np.asarray(field).clip(0, 1)
    grey = np.asarray(scaled(image, width).convert("L"), np.float32)[..., None]
    shown = 0.55 * coloured(part) + 0.45 * grey * (0.35 + 0.65 * part[..., None])
    return Image.fromarray(shown.clip(0, 255).round().astype(np.uint8))


def boxed(image: Image.Image, box: tuple[float, float, float, float], colour: Colour = PAPER) -> Image.Image:
    """The image with a rectangle; left, top, right and bottom in parts of its sides."""
    image = image.copy()
    left, top, right, bottom = box
    corners = (left * image.width, top * image.height, right * image.width - 1, bottom * image.height - 1)
    ImageDraw.Draw(image).rectangle(corners, outline=colour, width=max(image.width // 100, 1))
    return image


def dotted(image: Image.Image, point: tuple[float, float], colour: Colour = (255, 255, 255)) -> Image.Image:
    """The image with a ring around a point, x and y in parts of its sides."""
    image = image.copy()
    x, y, r = point[0] * image.width, point[1] * image.height, max(image.width // 28, 3)
    draw = ImageDraw.Draw(image)
    draw.ellipse((x - r - 1, y - r - 1, x + r + 1, y + r + 1), outline=INK, width=4)
    draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=2)
    return image


def scale_bar(low: str, high: str, width: int = 160, diverging: bool = False) -> Image.Image:
    """What the colours of a heat map mean: a ramp between two labels."""
    part = np.tile(np.linspace(0, 1, width), (12, 1))
    colours = coloured(part, DIVERGING if diverging else SEQUENTIAL)
    ends = [paragraph(name, None, SMALL, MUTED) for name in (low, high)]
    return beside([ends[0], Image.fromarray(colours), ends[1]], gap=8, align="middle")


# ------------------------------------------------------------------------------------- plots


class Curve(NamedTuple):
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


class Axes(NamedTuple):
    """The labels and scales of a plot."""

    x_label: str = ""
    y_label: str = ""
    x_log: bool = False
    y_log: bool = False
    y_limits: tuple[float, float] | None = None
    title: str = ""


def plot(curves: Sequence[Curve], size: tuple[int, int] = (560, 340), axes: Axes | None = None) -> Image.Image:
    """Lines over two axes, with a legend on the right where there is more than one; `size` is of the inner area."""
    axes = axes or Axes()
    width, height = size
    left, top, right, bottom = 90, 70, 30, 60  # room for labels; what stays white is cut off
    legend = max(text_width(curve.label, SMALL) for curve in curves) + 60 if len(curves) > 1 else 0
    whole = (left + width + right + legend, top + height + bottom)
    canvas_of = matplotlib_module("backends.backend_agg").FigureCanvasAgg
    drawn = matplotlib_module("figure").Figure(figsize=(whole[0] / DPI, whole[1] / DPI), dpi=DPI, facecolor="white")
    canvas = canvas_of(drawn)
    ax = drawn.add_axes((left / whole[0], bottom / whole[1], width / whole[0], height / whole[1]))
    for i, curve in enumerate(curves):
        ax.plot(
            curve.x,
            curve.y,
            color=_shade(SERIES[i % len(SERIES)]),
            linewidth=2.2,
            marker="o" if curve.dots else None,
            markersize=7,
            markeredgecolor="white",
            label=_markup(curve.label),
        )
    if axes.x_log:
        ax.set_xscale("log")
    else:
        ax.margins(x=0)
    if axes.y_log:
        ax.set_yscale("log")
    if axes.y_limits:
        ax.set_ylim(*axes.y_limits)
    ax.set_axisbelow(True)
    ax.grid(color=_shade(LINE), linewidth=1)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set_color(_shade(MUTED))
    ax.tick_params(which="both", labelsize=SMALL, colors=_shade(MUTED))
    ax.set_xlabel(_markup(axes.x_label), fontproperties=_font(SMALL), color=_shade(INK))
    ax.set_ylabel(_markup(axes.y_label), fontproperties=_font(SMALL), color=_shade(INK))
    ax.set_title(_markup(axes.title), fontproperties=_font(SIZE, bold=True), color=_shade(INK), loc="left", pad=10)
    if legend:
        ax.legend(
            loc="center left", bbox_to_anchor=(1 + 16 / width, 0.5), prop=_font(SMALL), frameon=False, borderaxespad=0
        )
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    used = np.nonzero((np.asarray(image) != 255).any(axis=2))
    return image.crop((int(used[1].min()), int(used[0].min()), int(used[1].max()) + 1, int(used[0].max()) + 1))


def _shade(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
