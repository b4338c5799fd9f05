"""From prompt to context: words, tokens, embeddings.

    text -> ids          tokenizer.py: start, tokens, end, padding up to 77; a longer prompt is truncated
    ids -> x             token embedding + position embedding: the vector of a word depends on its position
    x -> context         text_encoder.py: causal attention, so a token sees only the tokens before it

Causal attention explains much of how prompts behave: in "a red house" the vector of "house" can contain the colour,
but the vector of "red" cannot contain the house.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..models.text_encoder import TextEncoder
from ..params import SamplingParams
from ..pipeline import StableDiffusion
from ..text.tokenizer import Tokenizer
from ..text.vocabulary import END_OF_WORD
from .drawing import (
    DIVERGING,
    INK,
    LINE,
    MUTED,
    PAPER,
    SIZE,
    SMALL,
    above,
    beside,
    captioned,
    coloured,
    figure,
    heat,
    paragraph,
    scale_bar,
    scaled,
    text_width,
    write,
)
from .runs import SETTINGS, generate


class Token(NamedTuple):
    """One position of the text encoder's input."""

    position: int
    id: int
    symbols: str  # as in the vocabulary; "</w>" ends a word
    role: str  # "start", "text", "end" or "padding"


class Word(NamedTuple):
    """A word of a prompt and the positions of its tokens."""

    text: str
    positions: list[int]


def tokens(tokenizer: Tokenizer, prompt: str) -> list[Token]:
    """The prompt as the text encoder receives it, truncated and padded: `tokenizer.length` tokens."""
    symbols = list(tokenizer.vocab)
    kept = tokenizer.encode(prompt)[: tokenizer.length - 2]
    spare = tokenizer.length - 2 - len(kept)
    ids = [tokenizer.start, *kept, tokenizer.end, *[tokenizer.pad] * spare]
    roles = ["start", *["text"] * len(kept), "end", *["padding"] * spare]
    symbols += [tokenizer.decode([id]) + END_OF_WORD for id in range(len(symbols), max(ids) + 1)]  # textual inversion
    return [Token(i, id, symbols[id], role) for i, (id, role) in enumerate(zip(ids, roles, strict=True))]


def words(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """The words of a prompt with the positions of their tokens, without truncated words.

    >>> words(Tokenizer(), "a red triceratops")
    [Word(text='a', positions=[1]), Word(text='red', positions=[2]), Word(text='triceratops', positions=[3, 4, 5, 6])]
    """
    found: list[Word] = []
    pieces: list[Token] = []
    for token in tokens(tokenizer, prompt):
        if token.role == "text":
            pieces.append(token)
            if token.symbols.endswith(END_OF_WORD):
                text = tokenizer.decode([piece.id for piece in pieces])
                found.append(Word(text, [piece.position for piece in pieces]))
                pieces = []
    return found


def find_word(tokenizer: Tokenizer, prompt: str, word: str, which: int = 0) -> list[int]:
    """Positions of the tokens of a word, its `which`-th occurrence, from 0. ValueError if the prompt lacks it."""
    known = words(tokenizer, prompt)
    matches = [each.positions for each in known if each.text == word.lower()]
    if which >= len(matches):
        raise ValueError(f"the prompt has no word {word!r}: its words are {', '.join(each.text for each in known)}")
    return matches[which]


def token_similarity(text_encoder: TextEncoder, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Cosine similarity (n, n) of the token embeddings of n words; a word of several tokens has their mean."""
    vectors = text_encoder.token.weight.detach().float().cpu()
    vectors = F.normalize(torch.stack([vectors[tokenizer.encode(text)].mean(0) for text in texts]), dim=-1)
    return vectors @ vectors.T


def position_similarity(text_encoder: TextEncoder) -> Tensor:
    """Cosine similarity (M, M) of the position embeddings minus their mean."""
    vectors = text_encoder.position.weight.detach().float().cpu()
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    return vectors @ vectors.T


def context_distance(model: StableDiffusion, one: str, other: str, encoder: int | None = None) -> list[float]:
    """Relative distance |a - b| / |a| between the context vectors of two prompts, at each position.

    encoder   only this text encoder's part of the context, counted from 0: SDXL has two side by side
    """
    context = model.encode_prompt([one, other]).float()
    if encoder is not None:
        context = context.split([text.width for text in model.config.text], dim=-1)[encoder]
    a, b = context
    return ((a - b).norm(dim=-1) / a.norm(dim=-1)).tolist()


class WordOrder(NamedTuple):
    """Two prompts of the same words in different order, with contexts and images compared."""

    prompts: tuple[str, str]
    tokens: tuple[list[Token], list[Token]]
    distances: list[float]  # between the contexts, at each position
    images: list[Image.Image]
    each: list[list[float]]  # the same for each text encoder alone


def word_order(model: StableDiffusion, one: str, other: str, settings: SamplingParams = SETTINGS) -> WordOrder:
    """Compare contexts and images of two prompts that differ in the order of their words."""
    rows = tokens(model.tokenizer, one), tokens(model.tokenizer, other)
    each = [context_distance(model, one, other, encoder) for encoder in range(len(model.config.text))]
    images = generate(model, [one, other], settings)
    return WordOrder((one, other), rows, context_distance(model, one, other), images, each)


# ------------------------------------------------------------------------------------- drawings

ROLES = {"start": (226, 232, 240), "text": (255, 233, 196), "end": (226, 232, 240), "padding": (246, 247, 249)}


def _cell(lines: Sequence[str], fill: tuple[int, int, int], width: int, height: int = 58) -> Image.Image:
    image = Image.new("RGB", (width, height), fill)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, width - 1, height - 1), outline=LINE)
    dark = sum(fill) < 330
    heights = (0.3, 0.72) if len(lines) > 1 else (0.5,)
    for line, y, colour in zip(lines, heights, (INK, MUTED), strict=False):
        write(image, (width / 2, y * height), line, SMALL, PAPER if dark else colour, "middle")
    return image


def token_row(row: Sequence[Token], width: int = 960) -> Image.Image:
    """The tokens of a prompt as boxes with their ids, in lines; the padding is one box."""
    boxes = []
    padding = [token for token in row if token.role == "padding"]
    for token in row:
        if token.role == "padding" and token is not padding[0]:
            continue
        name = {"start": "<start>", "end": "<end>"}.get(token.role, token.symbols.replace(END_OF_WORD, "·"))
        lines = [name, str(token.id)]
        if token.role == "padding":
            lines = [f"{len(padding)} x padding", str(token.id)]
        boxes.append(_cell(lines, ROLES[token.role], max(text_width(line, SMALL) for line in lines) + 18))
    rows: list[list[Image.Image]] = [[]]
    room = width
    for box in boxes:
        if box.width > room and rows[-1]:
            rows.append([])
            room = width
        rows[-1].append(box)
        room -= box.width + 4
    return above([beside(boxes, gap=4) for boxes in rows], gap=4)


def draw_tokens(tokenizer: Tokenizer, prompts: Sequence[str], width: int = 960, of: str = "") -> Image.Image:
    """The tokens of each prompt: start, text, end, padding, and the truncated rest; `of` continues the title."""
    blocks = []
    for prompt in prompts:
        lost, tail = tokenizer.cut(prompt)
        blocks.append(paragraph(f'"{prompt}"', width, SIZE, INK))
        blocks.append(token_row(tokens(tokenizer, prompt), width))
        if lost:
            blocks.append(paragraph(f'truncated, {lost} tokens: "{tail}"', width, SMALL, (170, 40, 40)))
        blocks.append(Image.new("RGB", (1, 10), PAPER))
    return figure(
        f"Tokens: a prompt as {tokenizer.length} numbers{of}",
        above(blocks[:-1], gap=8),
        "A dot ends a word. A frequent word is one token, a rare word several. Ids are below the tokens. Every prompt "
        f"is padded or truncated to {tokenizer.length} tokens.",
    )


def _labelled(values: Tensor, names: Sequence[str], cell: int = 26) -> Image.Image:
    """A square heat map with names along its left and top side."""
    n = len(names)
    wide = max(text_width(name, SMALL) for name in names) + 8
    body = heat(values, n * cell, -1.0, 1.0, diverging=True)
    sheet = Image.new("RGB", (wide + n * cell, wide + n * cell), PAPER)
    sheet.paste(body, (wide, wide))
    top = Image.new("RGB", (n * cell, wide), PAPER).rotate(-90, expand=True)
    for i, name in enumerate(names):
        write(sheet, (wide - 6, wide + (i + 0.5) * cell), name, SMALL, INK, "right")
        write(top, (6, (i + 0.5) * cell), name, SMALL, INK)
    sheet.paste(top.rotate(90, expand=True), (wide, 0))
    return sheet


def draw_embeddings(similar: Tensor, names: Sequence[str], positions: Tensor, which: str = "") -> Image.Image:
    """Similarity of token embeddings and of position embeddings; `which` goes before "text encoder" in the title."""
    left = captioned(_labelled(similar, names), "token embeddings: cosine between words")
    side = max(left.height - 30, 200)
    right = captioned(
        heat(positions, side, -1.0, 1.0, diverging=True), f"position embeddings, 0 to {len(positions) - 1}"
    )
    body = above([beside([left, right], gap=40, align="end"), scale_bar("-1", "1", diverging=True)], gap=16)
    return figure(
        f"Embeddings: the input of the {which}text encoder",
        body,
        "Each token and each position has a learned vector. Red: two vectors point in the same direction; blue: in "
        "opposite directions; white: they are orthogonal.",
    )


def draw_word_order(order: WordOrder, width: int = 300) -> Image.Image:
    """The tokens of both prompts, the distances between their contexts, and the images."""
    end = max(sum(token.role in ("start", "text") for token in row) for row in order.tokens) + 1
    columns = []
    measured = order.each if len(order.each) > 1 else [order.distances]  # one row for each text encoder
    tops = [max(distances[:end]) or 1.0 for distances in measured]
    for a, b, *values in zip(order.tokens[0][:end], order.tokens[1][:end], *measured, strict=False):
        names = ["<start>" if t.role == "start" else "<end>" if t.role == "end" else t.symbols.removesuffix(END_OF_WORD)
                 for t in (a, b)]  # fmt: skip
        wide = max(text_width(name, SMALL) for name in [*names, "0.00"]) + 18
        same = (250, 250, 250) if a.id == b.id else (255, 233, 196)
        boxes = [_cell([names[0]], same, wide, 38), _cell([names[1]], same, wide, 38)]
        for distance, top in zip(values, tops, strict=True):
            red, green, blue = (int(c) for c in coloured(np.array(0.5 + 0.4 * distance / top), DIVERGING))
            boxes.append(_cell([f"{distance:.2f}"], (red, green, blue), wide, 38))
        columns.append(above(boxes, gap=4))
    which = [f"distance, encoder {i}" for i in range(1, len(measured) + 1)] if len(measured) > 1 else ["distance"]
    labels = above([_cell([name], PAPER, 150, 38) for name in ("first prompt", "second prompt", *which)], gap=4)
    images = [
        captioned(scaled(image, width), f'"{prompt}"')
        for image, prompt in zip(order.images, order.prompts, strict=True)
    ]
    body = above([beside([labels, *columns], gap=4), beside(images, gap=30)], gap=22)
    return figure(
        "Word order",
        body,
        "Two prompts, token by token, and the distance between their context vectors. The vectors are equal up to the "
        "first different word, because a token sees only the tokens before it; after that word none are equal.",
    )
