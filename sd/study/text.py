"""What becomes of a prompt: words, tokens, embeddings, context.

    text -> ids          tokenizer.py: start, the tokens, end, padding up to 77; what does not fit is cut
    ids -> x             token embedding + position embedding: the same word is another vector in another place
    x -> context         text_encoder.py: causal attention, so a token knows what stands before it and nothing after

The last line explains much of what prompts do: in "a red house" the vector of "house" can know of the colour, while
the one of "red" cannot know whose colour it is.
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
from ..text.tokenizer import END_OF_WORD, Tokenizer
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
from .runs import SETTINGS, paint


class Token(NamedTuple):
    """One place of what the text encoder is given."""

    position: int
    id: int
    symbols: str  # as in the tokenizer's table; "</w>" ends a word
    role: str  # "start", "text", "end" or "padding"


class Word(NamedTuple):
    """A word of a prompt and where its tokens are."""

    text: str
    positions: list[int]


def tokens(tokenizer: Tokenizer, prompt: str) -> list[Token]:
    """The prompt as the text encoder sees it, all `tokenizer.length` places; what does not fit is not among them."""
    symbols = list(tokenizer.vocab)
    kept = tokenizer.encode(prompt)[: tokenizer.length - 2]
    spare = tokenizer.length - 2 - len(kept)
    ids = [tokenizer.start, *kept, tokenizer.end, *[tokenizer.pad] * spare]
    roles = ["start", *["text"] * len(kept), "end", *["padding"] * spare]
    symbols += [tokenizer.decode([id]) + END_OF_WORD for id in range(len(symbols), max(ids) + 1)]  # words of one's own
    return [Token(i, id, symbols[id], role) for i, (id, role) in enumerate(zip(ids, roles, strict=True))]


def words(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """The prompt's words with the positions of their tokens, those that were cut left out.

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
    """The positions of a word's tokens; of the first such word, or the `which`-th. ValueError if it is not there."""
    known = words(tokenizer, prompt)
    matches = [each.positions for each in known if each.text == word.lower()]
    if which >= len(matches):
        raise ValueError(f"the prompt has no word {word!r}: its words are {', '.join(each.text for each in known)}")
    return matches[which]


def token_similarity(text_encoder: TextEncoder, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Cosines between the token embeddings of some words (n, n); of several tokens the mean counts."""
    vectors = text_encoder.token.weight.detach().float().cpu()
    vectors = F.normalize(torch.stack([vectors[tokenizer.encode(text)].mean(0) for text in texts]), dim=-1)
    return vectors @ vectors.T


def position_similarity(text_encoder: TextEncoder) -> Tensor:
    """Cosines between the position embeddings (M, M), their mean taken away."""
    vectors = text_encoder.position.weight.detach().float().cpu()
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    return vectors @ vectors.T


def context_distance(model: StableDiffusion, one: str, other: str) -> list[float]:
    """How far the context vectors of two prompts are apart at each position, |a - b| / |a|."""
    a, b = model.encode_prompt([one, other]).float()
    return ((a - b).norm(dim=-1) / a.norm(dim=-1)).tolist()


class WordOrder(NamedTuple):
    """Two prompts of the same words, and what their order changes."""

    prompts: tuple[str, str]
    tokens: tuple[list[Token], list[Token]]
    distances: list[float]  # of the contexts, per position
    pictures: list[Image.Image]


def word_order(model: StableDiffusion, one: str, other: str, settings: SamplingParams = SETTINGS) -> WordOrder:
    """Contexts and pictures of two prompts that differ in the order of their words."""
    rows = tokens(model.tokenizer, one), tokens(model.tokenizer, other)
    return WordOrder((one, other), rows, context_distance(model, one, other), paint(model, [one, other], settings))


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
    """The places of a prompt as boxes with token and id, in lines; the padding is shortened."""
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
    lines, room = [[]], width
    for box in boxes:
        if box.width > room and lines[-1]:
            lines.append([])
            room = width
        lines[-1].append(box)
        room -= box.width + 4
    return above([beside(line, gap=4) for line in lines], gap=4)


def draw_tokens(tokenizer: Tokenizer, prompts: Sequence[str], width: int = 960) -> Image.Image:
    """For each prompt its places: start, tokens, end, padding, and what of it is cut."""
    blocks = []
    for prompt in prompts:
        lost, tail = tokenizer.cut(prompt)
        blocks.append(paragraph(f'"{prompt}"', width, SIZE, INK))
        blocks.append(token_row(tokens(tokenizer, prompt), width))
        if lost:
            blocks.append(paragraph(f'cut off, {lost} tokens: "{tail}"', width, SMALL, (170, 40, 40)))
        blocks.append(Image.new("RGB", (1, 10), PAPER))
    return figure(
        f"Tokens: a prompt as {tokenizer.length} numbers",
        above(blocks[:-1], gap=8),
        "A dot ends a word: frequent words are one token, rare ones a few. Below each token its id; every prompt is "
        f"filled up to {tokenizer.length} places, and of a longer one the rest is cut.",
    )


def _labelled(values: Tensor, names: Sequence[str], cell: int = 26) -> Image.Image:
    """A square heat map with names along its left side and its top, slanted by being short."""
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


def draw_embeddings(similar: Tensor, names: Sequence[str], positions: Tensor) -> Image.Image:
    """Which words have like vectors, and which positions."""
    left = captioned(_labelled(similar, names), "token embeddings: cosine between words")
    side = max(left.height - 30, 200)
    right = captioned(
        heat(positions, side, -1.0, 1.0, diverging=True), f"position embeddings, 0 to {len(positions) - 1}"
    )
    body = above([beside([left, right], gap=40, align="end"), scale_bar("-1", "1", diverging=True)], gap=16)
    return figure(
        "Embeddings: what the text encoder starts from",
        body,
        "Each token and each position has a vector of its own, learned in training. Red: two vectors point the same "
        "way; blue: opposite ways; white: they have nothing in common.",
    )


def draw_word_order(order: WordOrder, width: int = 300) -> Image.Image:
    """The tokens of both prompts, the distance of their contexts, and the pictures."""
    end = max(sum(token.role in ("start", "text") for token in row) for row in order.tokens) + 1
    columns = []
    top = max(order.distances[:end]) or 1.0
    for a, b, distance in zip(order.tokens[0][:end], order.tokens[1][:end], order.distances, strict=False):
        names = ["<start>" if t.role == "start" else "<end>" if t.role == "end" else t.symbols.removesuffix(END_OF_WORD)
                 for t in (a, b)]  # fmt: skip
        wide = max(text_width(name, SMALL) for name in [*names, "0.00"]) + 18
        colour = tuple(int(c) for c in coloured(np.array(0.5 + 0.4 * distance / top), DIVERGING))
        same = (250, 250, 250) if a.id == b.id else (255, 233, 196)
        boxes = [_cell([names[0]], same, wide, 38), _cell([names[1]], same, wide, 38)]
        boxes.append(_cell([f"{distance:.2f}"], colour, wide, 38))
        columns.append(above(boxes, gap=4))
    labels = above([_cell([name], PAPER, 150, 38) for name in ("first prompt", "second prompt", "distance")], gap=4)
    pictures = [
        captioned(scaled(image, width), f'"{prompt}"')
        for image, prompt in zip(order.pictures, order.prompts, strict=True)
    ]
    body = above([beside([labels, *columns], gap=4), beside(pictures, gap=30)], gap=22)
    return figure(
        "Word order",
        body,
        "Two prompts, place by place, and how far their context vectors are apart. Up to the first word that differs "
        "they are equal, as a token sees only what stands before it; after it none is.",
    )
