r"""Prompts with weights, and prompts of any length, as AUTOMATIC1111's web UI reads them, where most of them come from.

    (word)          1.1 times the weight; brackets inside of brackets multiply
    [word]          1 / 1.1 times
    (word:1.3)      1.3 times; square brackets take no number
    \( \) \[ \] \\  the character itself; a bracket that is never closed reaches to the end of the prompt
    BREAK           in a long prompt: what follows begins a new chunk

    prompt -> parts, each a text and its weight -> tokens -> chunks of 75 -> contexts, weighted -> one long context

A weight w multiplies the vectors that the text encoder gives for the tokens of its part. Then the whole chunk is
brought back to the mean that it had, as the U-Net has never seen another one: z' = w z, z'' = z' mean(z) / mean(z').

The text encoder sees 77 places. A longer prompt is cut into chunks of 75 tokens, each with a start and an end of its
own, that know nothing of each other; the U-Net attends to all of them, 77 k places. A chunk that would end in the
middle of a phrase ends at the last comma instead, if that is at most 20 tokens back.

Where this differs: BREAK works inside of brackets, too (there it becomes the word "break"); the mean is each text's
own, not that of all texts encoded at once. Not here: prompt editing `[from:to:when]`, alternation `[a|b]` and `AND`.

>>> for part in parse("a (red:1.3) house, [small]"):
...     print(repr(part.text), round(part.weight, 3))
'a ' 1.0
'red' 1.3
' house, ' 1.0
'small' 0.909
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from .tokenizer import Note, Tokenizer, warn

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies a weight with
COMMA = 267  # the token of a comma at the end of a word, in CLIP's table
BACK = 20  # tokens: how far back a comma may be at which a chunk ends
MAX_CHUNKS = 100  # of a prompt: 7,500 tokens
MAX_OPEN = 100  # brackets: 1.1 to the power of that is 13,780

TOKENS = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\bBREAK\b")
EDITING = re.compile(r"\[[^][]*(?:\||:\s*[.\d]+\s*\])")  # alternation, or editing with a time at its end


class Part(NamedTuple):
    """A piece of a prompt, all of one weight."""

    text: str | None  # None where a new chunk is to begin
    weight: float


class Chunk(NamedTuple):
    """Tokens that the text encoder sees together, at most 75, and the weight of each."""

    ids: list[int]
    weights: list[float]


def parse(prompt: str, breaks: bool = False) -> list[Part]:
    """The parts of a prompt with weights, in order; neighbours of the same weight are one part.

    With `breaks` the word BREAK is a part without text; else it is text. Raises ValueError for weights that are no
    numbers, and for more than 100 brackets open at once.
    """
    texts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each open bracket's first part will be

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= factor

    for match in TOKENS.finditer(prompt):
        token, number = match.group(), match.group(1)
        if token in opened:
            opened[token].append(len(texts))
            if len(opened[token]) > MAX_OPEN:
                raise ValueError(rf"more than {MAX_OPEN} brackets open at once: write \{token} where it is text")
        elif number is not None and opened["("]:
            close("(", _number(number))
        elif token == ")" and opened["("]:
            close("(", ROUND)
        elif token == "]" and opened["["]:
            close("[", SQUARE)
        else:
            escaped = token[0] == "\\"
            for i, text in enumerate(BREAK.split(token) if breaks and not escaped else [token[escaped:]]):
                texts += [None, text] if i else [text]
                weights += [1.0, 1.0] if i else [1.0]
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        while opened[bracket]:
            close(bracket, factor)

    parts: list[Part] = []
    run: list[str] = []  # texts of one weight
    for text, weight, following in zip(texts, weights, [*weights, None][1:], strict=True):
        if text is not None:
            run.append(text)
        if run and (text is None or weight != following):
            parts.append(Part("".join(run), weight))
            run = []
        if text is None:
            parts.append(Part(None, 1.0))
    return parts


def _between_breaks(prompt: str) -> list[Part]:
    """The parts of a long prompt without weights."""
    first, *rest = BREAK.split(prompt)
    return [Part(first, 1.0), *(Part(part, 1.0) for text in rest for part in (None, text))]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight {text!r} in the prompt is not a number") from None


def chunks(tokenizer: Tokenizer, prompt: str, weighted: bool, long: bool, note: Note = warn) -> list[Chunk]:
    """The tokens of a prompt with their weights: one chunk, or if `long` as many as it needs, at least one.

    weighted   brackets mean weights; else they are text, and all weights are 1
    long       BREAK and the length begin new chunks; else what does not fit is left out, and `note` is told
    """
    if weighted and EDITING.search(prompt):
        note("prompt editing ([from:to:when] or [a|b]) is not supported: it is read as text")
    if not long:
        ids, weights = [], []
        for text, weight in parse(prompt) if weighted else [Part(prompt, 1.0)]:
            new = tokenizer.encode(text)
            ids += new
            weights += [weight] * len(new)
        fitting = tokenizer.fitting(ids, note)
        return [Chunk(fitting, weights[: len(fitting)])]

    room = tokenizer.length - 2
    own = {ids[0]: len(ids) for ids in tokenizer.added.values()}  # the vectors of one word stay together
    done: list[Chunk] = []
    ids, weights, comma = [], [], -1

    def begin(carried: int | None = None) -> None:
        """End the chunk, before the token `carried` if given, which begins the next one with all behind it."""
        nonlocal ids, weights, comma
        carried = len(ids) if carried is None else carried
        done.append(Chunk(ids[:carried], weights[:carried]))
        if len(done) > MAX_CHUNKS:
            raise ValueError(f"a prompt of more than {MAX_CHUNKS} chunks of {room} tokens: shorten it")
        ids, weights, comma = ids[carried:], weights[carried:], -1

    for text, weight in parse(prompt, breaks=True) if weighted else _between_breaks(prompt):
        if text is None:
            begin()
            continue
        new = tokenizer.encode(text)
        at = 0
        while at < len(new):
            count = own.get(new[at], 1)
            if new[at] == COMMA:
                comma = len(ids)
            elif len(ids) == room and comma >= 0 and room - comma <= BACK:
                begin(comma + 1)
            if len(ids) + count > room:
                begin()
            ids += new[at : at + count]
            weights += [weight] * count
            at += count
    if ids or not done:
        begin()
    return done


def emphasised(context: Tensor, weights: Tensor) -> Tensor:
    """Contexts (B, M, D) with each token's vector times its weight (B, M), brought back to the mean of each context.

    Computed in float32. Where all weights are 1 the numbers are as they were. Raises ValueError if the weights are so
    large, or cancel each other out so well, that no finite number is left.
    """
    z = context.float()
    weighted = z * weights[:, :, None]
    weighted = weighted * (z.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True))
    plain = (weights == 1).all(dim=1)[:, None, None]
    out = torch.where(plain, context, weighted.to(context.dtype))
    if not math.isfinite(float(out.float().abs().sum())):
        raise ValueError("the weights of this prompt leave no finite numbers: use some between 0 and 2")
    return out


def plain(prompt: str) -> str:
    """A prompt with weights without its brackets and numbers."""
    return "".join(text for text, _ in parse(prompt))
