"""Figures of attention maps: of each word, of one word by step, level, head and block, and of points of the image.

The maps are those of attention.py. Every figure names the model and, where it has several, the parts of its U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from .attention import AttentionMaps, WordMaps
from .drawing import above, beside, boxed, captioned, dotted, figure, overlay, scaled, strip
from .text import Word

COLUMNS = 7  # maps per row of a figure


def places(maps: AttentionMaps) -> list[tuple[str, int]]:
    """Parts and levels with attention, in the order of the forward pass: ("down", 1), ("mid", 1), ..."""
    return list(dict.fromkeys((site.part, site.level) for site in maps.sites))


def _of(maps: AttentionMaps) -> str:
    return f" of {maps.network}" if maps.network else ""


def _grid_size(maps: AttentionMaps, level: int) -> str:
    h, w = (-(-side // 2**level) for side in maps.size)
    return f"{h}x{w}"


def draw_words(
    image: Image.Image,
    names: Sequence[str],
    maps: Sequence[Tensor],
    title: str,
    note: str,
    boxes: Mapping[int, tuple[float, float, float, float]] | None = None,
    width: int = 150,
) -> Image.Image:
    """The image, then one named heat map (h, w) per word; `boxes` maps the index of a word to a box drawn on its map.

    Each map has its own scale: brightness compares places, not words.
    """
    cells = [captioned(scaled(image, width), "image")]
    for i, (name, values) in enumerate(zip(names, maps, strict=True)):
        heat = overlay(image, values, width)
        cells.append(captioned(boxed(heat, boxes[i]) if boxes and i in boxes else heat, name))
    lines = -(-len(cells) // COLUMNS)
    columns = -(-len(cells) // lines)
    rows = [beside(cells[i : i + columns], gap=10) for i in range(0, len(cells), columns)]
    return figure(title, above(rows, gap=14), note)


def draw_word_maps(
    seen: WordMaps,
    prompt: str,
    notes: Mapping[int, str] | None = None,
    boxes: Mapping[int, tuple[float, float, float, float]] | None = None,
) -> Image.Image:
    """The image and the attention map of each word; `notes` maps the index of a word to a line below its name."""
    return draw_words(
        seen.image,
        noted(seen.words, notes),
        [seen.of(i) for i in range(len(seen.words))],
        f"Cross-attention{_of(seen.maps)}: where each word is attended to",
        f'"{prompt}": mean over all steps, layers and heads. Each map runs from zero (dark) to its maximum (light).',
        boxes,
    )


def noted(words: Sequence[Word], notes: Mapping[int, str] | None) -> list[str]:
    """The words, each followed by its note if there is one."""
    return [word.text + (f"\n{notes[i]}" if notes and i in notes else "") for i, word in enumerate(words)]


def draw_breakdown(seen: WordMaps, word: int, moments: int = 5, width: int = 110) -> Image.Image:
    """The maps of one word by step and by head (columns), for each part and level of the U-Net (rows).

    Also by block, for transformers that have several blocks one after another.
    """
    calls = seen.maps.calls
    moments = min(moments, calls)
    chunks = [range(i * calls // moments, (i + 1) * calls // moments) for i in range(moments)]
    rows = places(seen.maps)
    names = [f"{part}, level {level}\n{_grid_size(seen.maps, level)}" for part, level in rows]

    def cell(**which: Any) -> Image.Image:
        return overlay(seen.image, seen.of(word, **which), width)

    by_step = [[cell(parts=(part,), levels=(level,), calls=chunk) for chunk in chunks] for part, level in rows]
    heads = min(max(site.heads for site in seen.maps.sites), 8)
    own = {(site.part, site.level): site.heads for site in seen.maps.sites}
    by_head = [
        [cell(parts=(part,), levels=(level,), heads=(head,)) for head in range(min(own[part, level], heads))]
        for part, level in rows
    ]
    strips = [
        strip(by_step, [f"steps {chunk[0] + 1} to {chunk[-1] + 1}" for chunk in chunks], names, width),
        strip(by_head, [f"head {head + 1}" for head in range(heads)], names, width),
    ]
    note = (
        "Top: mean over the heads, early steps on the left. Bottom: mean over the steps for each head; the heads of a "
        "layer attend to different things."
    )
    depths = {place: 1 + max(s.block for s in seen.maps.sites if (s.part, s.level) == place) for place in rows}
    deep = [place for place in rows if depths[place] > 1]
    if deep:
        by_block = [
            [cell(parts=(part,), levels=(level,), blocks=(block,)) for block in range(depths[part, level])]
            for part, level in deep
        ]
        columns = [f"block {block + 1}" for block in range(max(map(len, by_block)))]
        strips.append(strip(by_block, columns, [names[rows.index(place)] for place in deep], width))
        note = note.replace("Bottom:", "Middle:") + (
            " Bottom: mean over steps and heads for each block of a transformer."
        )
    return figure(
        f'One word, "{seen.words[word].text}", by step, level and head{_of(seen.maps)}', above(strips, gap=26), note
    )


def draw_self_maps(
    image: Image.Image, maps: AttentionMaps, points: Sequence[tuple[float, float]], width: int = 150
) -> Image.Image:
    """For each point (columns), the image with a ring around it, then its map for each part and level of the U-Net."""
    rows = [[dotted(scaled(image, width), point) for point in points]]
    names = ["point"]
    for part, level in places(maps):
        mean = maps.mean(parts=(part,), levels=(level,))
        rows.append([dotted(overlay(image, mean[i], width), point) for i, point in enumerate(points)])
        names.append(f"{part}, level {level}\n{_grid_size(maps, level)}")
    return figure(
        f"Self-attention{_of(maps)}: where a point attends",
        strip(rows, [f"point {i + 1}" for i in range(len(points))], names, width),
        "Every position attends to all positions. Light areas get most attention from the ringed point: mean over all "
        "steps and heads, at each level of the U-Net.",
    )
