"""Drawing with Pillow alone: text, strips of pictures, tables, heat maps and plots.

Every function takes data and returns a new RGB picture on white, and larger figures are made of smaller ones with
`beside` and `above`. Sizes are in pixels. In labels `x_{t}` writes a subscript and `10^{-3}` a superscript; the font is
Pillow's own, which has no Greek letters, so labels use the code's names (alpha, sigma).

>>> maps = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]
>>> strip([maps], ("first", "second"), width=64, gap=6).width
134
>>> figure("Two maps", strip([maps], ("first", "second"))).mode
'RGB'
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (33, 37, 45)
MUTED: Colour = (104, 111, 122)
LINE: Colour = (221, 225, 231)
SHADE: Colour = (244, 246, 249)
# told apart by the colour-blind as well: Okabe and Ito 2008, "Color universal design"
SERIES: tuple[Colour, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (90, 90, 90), (0, 0, 0),
)  # fmt: skip
# colour ramps as stops at even distances: dark to light, and two hues around white
GLOW: tuple[Colour, ...] = ((13, 12, 44), (77, 25, 105), (160, 45, 104), (229, 92, 68), (250, 165, 56), (252, 248, 190))
DIVERGING: tuple[Colour, ...] = ((26, 76, 148), (120, 169, 213), (248, 248, 248), (227, 140, 108), (158, 30, 42))

SIZE, SMALL, LARGE = 16, 14, 22  # of letters
SMOOTH = 3  # lines are drawn so many times larger and reduced
SUBSCRIPT = 0.7  # of the size of what it belongs to
ROOM = 0.04  # of a plot's side at both ends, so that no line runs along the frame


# ------------------------------------------------------------------------------------- text


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font."""
    return ImageFont.load_default(size)


def _runs(text: str, size: int) -> list[tuple[str, int, int]]:
    """A line with its marks -> (letters, size, how far below the line they stand)."""
    small = max(round(SUBSCRIPT * size), 8)
    runs = []
    for plain, mark, raised in re.findall(r"(.*?)(?:([_^])\{([^}]*)\}|$)", text):
        runs.append((plain, size, 0))
        if mark:
            runs.append((raised, small, round(0.18 * size) if mark == "_" else -round(0.36 * size)))
    return [run for run in runs if run[0]]


def text_width(text: str, size: int = SIZE) -> int:
    """Width of one line in pixels."""
    return math.ceil(sum(font(each).getlength(letters) for letters, each, _ in _runs(text, size)))


def line_height(size: int = SIZE) -> int:
    """Height of a line in pixels."""
    return round(1.3 * size)


def write(
    draw: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    text: str,
    size: int = SIZE,
    colour: Colour = INK,
    align: str = "left",
    bold: bool = False,
) -> None:
    """One line onto a picture; xy is its left end, middle or right end (`align`) at half its height."""
    x, y = xy
    x -= {"left": 0.0, "middle": 0.5, "right": 1.0}[align] * text_width(text, size)
    for letters, each, drop in _runs(text, size):
        baseline = y + 0.36 * size + drop
        for shift in (0.0, 0.5) if bold else (0.0,):
            draw.text((x + shift, baseline), letters, fill=colour, font=font(each), anchor="ls")
        x += font(each).getlength(letters)


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
    """A text as a picture, in lines of at most `width` pixels."""
    lines = wrapped(text, width, size) if width is not None else text.split("\n")
    wide = width if width is not None and align != "left" else max(text_width(line, size) for line in lines) + 1
    image = Image.new("RGB", (max(wide, 1), line_height(size) * len(lines)), PAPER)
    x = {"left": 0, "middle": image.width / 2, "right": image.width}[align]
    for row, line in enumerate(lines):
        write(ImageDraw.Draw(image), (x, (row + 0.5) * line_height(size)), line, size, colour, align, bold)
    return image


# ------------------------------------------------------------------------------------- composition


def _place(room: int, align: str) -> int:
    return {"start": 0, "middle": room // 2, "end": room}[align]


def beside(images: Sequence[Image.Image], gap: int = 16, align: str = "start") -> Image.Image:
    """Pictures from left to right; `align` ("start", "middle", "end") is of their heights."""
    height = max(image.height for image in images)
    sheet = Image.new("RGB", (sum(image.width for image in images) + gap * (len(images) - 1), height), PAPER)
    x = 0
    for image in images:
        sheet.paste(image, (x, _place(height - image.height, align)))
        x += image.width + gap
    return sheet


def above(images: Sequence[Image.Image], gap: int = 16, align: str = "start") -> Image.Image:
    """Pictures from top to bottom; `align` ("start", "middle", "end") is of their widths."""
    width = max(image.width for image in images)
    sheet = Image.new("RGB", (width, sum(image.height for image in images) + gap * (len(images) - 1)), PAPER)
    y = 0
    for image in images:
        sheet.paste(image, (_place(width - image.width, align), y))
        y += image.height + gap
    return sheet


def framed(image: Image.Image, margin: int = 24) -> Image.Image:
    """The picture with white around it."""
    sheet = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), PAPER)
    sheet.paste(image, (margin, margin))
    return sheet


def figure(title: str, body: Image.Image, note: str = "") -> Image.Image:
    """A whole figure: a title, a note that says how to read it, and what it shows."""
    width = max(body.width, min(text_width(title, LARGE) + 2, 900), 420 if note else 0)
    parts = [paragraph(title, width, LARGE, bold=True)]
    if note:
        parts.append(paragraph(note, width, SIZE, MUTED))
    return framed(above([above(parts, gap=4), body], gap=18))


def scaled(image: Image.Image, width: int, pixels: bool = False) -> Image.Image:
    """The picture at this width; `pixels` keeps its pixels visible when it grows."""
    height = max(round(image.height * width / image.width), 1)
    if image.width == width:
        return image
    grows = Image.Resampling.NEAREST if pixels else Image.Resampling.BICUBIC
    return image.resize((width, height), grows if width > image.width else Image.Resampling.LANCZOS)


def captioned(image: Image.Image, below: str, size: int = SMALL, colour: Colour = INK) -> Image.Image:
    """The picture with a centred text below it."""
    return above([image, paragraph(below, image.width, size, colour, align="middle")], gap=5, align="middle")


def strip(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    width: int = 128,
    gap: int = 6,
    pixels: bool = False,
) -> Image.Image:
    """Pictures in rows and columns at one width, with the columns' names above and the rows' names on the left."""
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
            write(draw, (at, y + height / 2), cell, size, MUTED if number == 0 else INK, side)
            x += wide
        draw.line((0, y + height, sheet.width, y + height), fill=MUTED if number == 0 else LINE)
    return sheet


# ------------------------------------------------------------------------------------- numbers as colours


def ramp(values: np.ndarray, stops: Sequence[Colour] = GLOW) -> np.ndarray:
    """Numbers in [0, 1], of any shape -> colours (..., 3) from 0 to 255."""
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(np.clip(values, 0, 1), places, [stop[i] for stop in stops]) for i in range(3)]
    return np.stack(channels, axis=-1)


def heat(
    values: Tensor, width: int = 128, low: float | None = None, high: float | None = None, diverging: bool = False
) -> Image.Image:
    """(h, w) as colours, dark for `low` to light for `high` (its smallest and largest if not given), square pixels.

    `diverging` is for numbers around 0: blue below, red above, white at 0.
    """
    numbers = values.detach().float().cpu().numpy()
    high = float(np.abs(numbers).max() if diverging else numbers.max()) if high is None else high
    low = (-high if diverging else float(numbers.min())) if low is None else low
    part = (numbers - low) / max(high - low, 1e-12)
    image = Image.fromarray(ramp(part, DIVERGING if diverging else GLOW).round().astype(np.uint8))
    return scaled(image, width, pixels=True)


def overlay(picture: Image.Image, values: Tensor, width: int = 160, high: float | None = None) -> Image.Image:
    """A heat map (h, w), from 0, over a picture: grey and dark where there is little, the ramp's light where much."""
    height = max(round(picture.height * width / picture.width), 1)
    numbers = values.detach().float().cpu().numpy()
    high = float(numbers.max()) if high is None else high
    field = Image.fromarray(numbers / max(high, 1e-12)).resize((width, height), Image.Resampling.BICUBIC)
    part = np.asarray(field).clip(0, 1)
    grey = np.asarray(scaled(picture, width).convert("L"), np.float32)[..., None]
    shown = 0.55 * ramp(part) + 0.45 * grey * (0.35 + 0.65 * part[..., None])
    return Image.fromarray(shown.clip(0, 255).round().astype(np.uint8))


def boxed(image: Image.Image, box: tuple[float, float, float, float], colour: Colour = PAPER) -> Image.Image:
    """The picture with a rectangle; left, top, right and bottom in parts of its sides."""
    image = image.copy()
    left, top, right, bottom = box
    corners = (left * image.width, top * image.height, right * image.width - 1, bottom * image.height - 1)
    ImageDraw.Draw(image).rectangle(corners, outline=colour, width=max(image.width // 100, 1))
    return image


def dotted(image: Image.Image, point: tuple[float, float], colour: Colour = (255, 255, 255)) -> Image.Image:
    """The picture with a ring around a point, x and y in parts of its sides."""
    image = image.copy()
    x, y, r = point[0] * image.width, point[1] * image.height, max(image.width // 28, 3)
    draw = ImageDraw.Draw(image)
    draw.ellipse((x - r - 1, y - r - 1, x + r + 1, y + r + 1), outline=INK, width=4)
    draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=2)
    return image


def scale_bar(low: str, high: str, width: int = 160, diverging: bool = False) -> Image.Image:
    """What the colours of a heat map mean: a ramp between two labels."""
    part = np.tile(np.linspace(0, 1, width), (12, 1))
    colours = ramp(part, DIVERGING if diverging else GLOW).round().astype(np.uint8)
    ends = [paragraph(name, None, SMALL, MUTED) for name in (low, high)]
    return beside([ends[0], Image.fromarray(colours), ends[1]], gap=8, align="middle")


# ------------------------------------------------------------------------------------- plots


class Curve(NamedTuple):
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False
    dashed: bool = False


class _Axis:
    """Numbers -> [0, 1] along one side, with its ticks."""

    def __init__(self, values: Sequence[float], log: bool, limits: tuple[float, float] | None, room: float) -> None:
        self.log = log
        low, high = limits or (min(values), max(values))
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        if limits is None:
            room *= self.high - self.low
            self.low, self.high = self.low - room, self.high + room
        self.high = self.high if self.high > self.low else self.low + 1

    def __call__(self, value: float) -> float:
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label) of round numbers."""
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            few = self.high - self.low < 2.5
            marks = [m * 10.0**d for d in decades for m in ((1, 2, 5) if few else (1,))]
            inside = [mark for mark in marks if self.low - 1e-9 <= math.log10(mark) <= self.high + 1e-9]
            skip = max(len(inside) // 7, 1)
            return [(mark, _number(mark)) for mark in inside[::skip]]
        span = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(span))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= span)
        first = math.ceil(self.low / step - 1e-9)
        values = [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(value, f"{value:.10g}") for value in values]


def _number(value: float) -> str:
    exponent = round(math.log10(value))
    if abs(math.log10(value) - exponent) < 1e-9 and not -2 <= exponent <= 3:
        return f"10^{{{exponent}}}"
    return f"{value:.10g}"


def plot(
    curves: Sequence[Curve],
    size: tuple[int, int] = (560, 340),
    x_label: str = "",
    y_label: str = "",
    x_log: bool = False,
    y_log: bool = False,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
    title: str = "",
) -> Image.Image:
    """Lines over two axes, with a legend on the right where there is more than one; `size` is of the inner area."""
    width, height = size
    x_axis = _Axis([x for curve in curves for x in curve.x], x_log, x_limits, ROOM if x_log else 0)
    y_axis = _Axis([y for curve in curves for y in curve.y], y_log, y_limits, ROOM)

    x_ticks, y_ticks = x_axis.ticks(), y_axis.ticks()
    left = max(text_width(name, SMALL) for _, name in y_ticks) + 10
    top, bottom = (30 if title else 0) + (26 if y_label else 10), 48 if x_label else 28
    inner = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAPER)
    draw = ImageDraw.Draw(inner)

    def at(x: float, y: float) -> tuple[float, float]:
        return x_axis(x) * (width - 1) * SMOOTH, (1 - y_axis(y)) * (height - 1) * SMOOTH

    for value, _ in x_ticks:
        place = x_axis(value) * (width - 1) * SMOOTH
        draw.line((place, 0, place, inner.height), fill=LINE, width=SMOOTH)
    for value, _ in y_ticks:
        place = (1 - y_axis(value)) * (height - 1) * SMOOTH
        draw.line((0, place, inner.width, place), fill=LINE, width=SMOOTH)
    for i, curve in enumerate(curves):
        colour = SERIES[i % len(SERIES)]
        points = [at(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
        pieces = [points[k : k + 2] for k in range(0, len(points) - 1, 2)] if curve.dashed else [points]
        for piece in pieces:
            draw.line(piece, fill=colour, width=round(2.2 * SMOOTH), joint="curve")
        if curve.dots:
            r = 4 * SMOOTH
            for x, y in points:
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=PAPER, width=SMOOTH)

    legend = None
    if len(curves) > 1:
        rows = []
        for i, curve in enumerate(curves):
            key = Image.new("RGB", (24, line_height(SMALL)), PAPER)
            ImageDraw.Draw(key).rectangle((0, key.height // 2 - 1, 23, key.height // 2 + 1), fill=SERIES[i % 8])
            rows.append(beside([key, paragraph(curve.label, None, SMALL)], gap=8, align="middle"))
        legend = above(rows, gap=4)

    last = text_width(x_ticks[-1][1], SMALL) // 2 if x_ticks else 0
    sheet = Image.new("RGB", (left + width + last + 4, top + height + bottom), PAPER)
    sheet.paste(inner.reduce(SMOOTH), (left, top))
    draw = ImageDraw.Draw(sheet)
    draw.line((left, top, left, top + height), fill=MUTED)
    draw.line((left, top + height, left + width, top + height), fill=MUTED)
    for value, name in x_ticks:
        write(draw, (left + x_axis(value) * (width - 1), top + height + 13), name, SMALL, MUTED, "middle")
    for value, name in y_ticks:
        write(draw, (left - 7, top + (1 - y_axis(value)) * (height - 1)), name, SMALL, MUTED, "right")
    if x_label:
        write(draw, (left + width / 2, top + height + 36), x_label, SMALL, INK, "middle")
    if y_label:
        write(draw, (0, top - 16), y_label, SMALL, INK)
    if title:
        write(draw, (0, 10), title, SIZE, INK, bold=True)
    return beside([sheet, legend], gap=22, align="middle") if legend is not None else sheet
