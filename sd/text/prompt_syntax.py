r"""Weighted prompts, and prompts of any length, in the syntax of AUTOMATIC1111's web UI, where most prompts come from.

    (word)          multiplies the weight by 1.1; nested brackets multiply
    [word]          divides it by 1.1
    (word:1.3)      multiplies it by 1.3; square brackets take no number
    \( \) \[ \] \\  the character itself; a bracket that is never closed extends to the end of the prompt
    BREAK           in a long prompt: starts a new chunk

    prompt -> parts, each a text and its weight -> tokens -> chunks of 75 -> contexts, weighted -> one long context

A weight w multiplies the output vectors of the text encoder for the tokens of its part. The whole chunk is then
rescaled to its previous mean, as the U-Net has never seen another one: z' = w z, z'' = z' mean(z) / mean(z').

The text encoder takes 77 tokens. A longer prompt is split into chunks of 75 tokens, each with its own start and end and
encoded independently; the U-Net attends to all of them, 77 k tokens. A chunk that would end in the middle of a phrase
ends at the last comma instead, if that is at most 20 tokens back.

Differences from the web UI: BREAK also works inside brackets (there it becomes the word "break"); the mean is that of
each text, not of all texts of a batch. Not supported: prompt editing `[from:to:when]`, alternation `[a|b]` and `AND`.

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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tokenizer import Note, Tokenizer, warn

ROUND, SQUARE = 1.1, 1 / 1.1  # factor of the weight for a pair of brackets
COMMA = 267  # the token of a comma at the end of a word, in CLIP's table
BACK = 20  # tokens: how far back the comma may be at which a chunk ends
MAX_CHUNKS = 100  # per prompt: 7,500 tokens
MAX_OPEN = 100  # open brackets: 1.1 ** 100 is 13,780

TOKENS = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\bBREAK\b")
EDITING = re.compile(r"\[[^][]*(?:\||:\s*[.\d]+\s*\])")  # alternation, or editing with a time at its end


class Part(NamedTuple):
    """A piece of a prompt with one weight."""

    text: str | None  # None starts a new chunk
    weight: float


class Chunk(NamedTuple):
    """Tokens that are encoded together, at most 75, and the weight of each."""

    ids: list[int]
    weights: list[float]


def parse(prompt: str, breaks: bool = False) -> list[Part]:
    """Parse a weighted prompt into parts, in order; adjacent text of the same weight is one part.

    With `breaks`, the word BREAK is a part without text; otherwise it is text. Raises ValueError for weights that are
    not numbers, and for more than 100 open brackets.
    """
    texts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # index of the first part in each open bracket

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
    """The parts of a long prompt that has no weights: the texts between BREAKs."""
    first, *rest = BREAK.split(prompt)
    return [Part(first, 1.0), *(Part(part, 1.0) for text in rest for part in (None, text))]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight {text!r} in the prompt is not a number") from None


def chunks(tokenizer: Tokenizer, prompt: str, weighted: bool, long: bool, note: Note = warn) -> list[Chunk]:
    """The tokens of a prompt with their weights: one chunk or, if `long`, as many as needed, at least one.

    weighted   brackets are weights; otherwise they are text, and all weights are 1
    long       BREAK and the length limit start new chunks; otherwise tokens that do not fit are dropped, with a `note`
    """
    if weighted and EDITING.search(prompt):
        note("prompt editing ([from:to:when] or [a|b]) is not supported: it is read as text")
    ids: list[int] = []
    weights: list[float] = []
    if not long:
        for text, weight in parse(prompt) if weighted else [Part(prompt, 1.0)]:
            new = tokenizer.encode(text or "")
            ids += new
            weights += [weight] * len(new)
        fitting = tokenizer.fitting(ids, note)
        return [Chunk(fitting, weights[: len(fitting)])]

    room = tokenizer.length - 2
    own = {first: 1 + len(rest) for first, *rest in tokenizer.added.values()}  # the vectors of one word stay together
    done: list[Chunk] = []
    comma = -1

    def begin(carried: int | None = None) -> None:
        """Start a new chunk, with the tokens of this one from index `carried` on, if given."""
        nonlocal ids, weights, comma
        carried = len(ids) if carried is None else carried
        done.append(Chunk(ids[:carried], weights[:carried]))
        if len(done) > MAX_CHUNKS:
            raise ValueError(f"the prompt has more than {MAX_CHUNKS} chunks of {room} tokens: shorten it")
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


class Rows(NamedTuple):
    """The chunks of several prompts as the input of the text encoder."""

    ids: Tensor  # (B k, M), the k chunks of each prompt in order
    weights: Tensor  # (B k, M)


def rows(tokenizer: Tokenizer, prompts: Sequence[str], weighted: bool, long: bool, note: Note = warn) -> Rows:
    """The tokens and weights of B prompts, k chunks each: shorter prompts are padded with chunks of the empty text."""
    split = [chunks(tokenizer, prompt, weighted, long, note) for prompt in prompts]
    count = max(map(len, split), default=1)
    padded = [chunk for found in split for chunk in (*found, *[Chunk([], [])] * (count - len(found)))]
    weights = torch.ones(len(padded), tokenizer.length, device="cpu")
    for row, chunk in zip(weights, padded, strict=True):
        row[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights, device="cpu")
    return Rows(tokenizer.rows([chunk.ids for chunk in padded]), weights)


def emphasised(context: Tensor, weights: Tensor) -> Tensor:
    """Multiply the vectors of contexts (B, M, D) by weights (B, M), and restore the mean of each context.

    Computed in float32. Contexts whose weights are all 1 are unchanged. Raises ValueError if no finite number is left,
    because weights are too large or cancel out.
    """
    z = context.float()
    weighted = z * weights[:, :, None]
    weighted = weighted * (z.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True))
    plain = (weights == 1).all(dim=1)[:, None, None]
    out = torch.where(plain, context, weighted.to(context.dtype))
    if not math.isfinite(float(out.float().abs().sum())):
        raise ValueError("the weights of this prompt leave no finite numbers: use weights between 0 and 2")
    return out


def same_length(contexts: Sequence[Tensor], empty: Callable[[], Tensor]) -> list[Tensor]:
    """Pad contexts (B, k M, D) of different k to the length of the longest.

    empty   returns the context (1, M, D) of the empty text, which they are padded with; called only if needed
    """
    length = max(context.shape[1] for context in contexts)
    if all(context.shape[1] == length for context in contexts):
        return list(contexts)
    padding = empty()
    M = padding.shape[1]
    if any(context.shape[1] % M for context in contexts):
        raise ValueError(f"contexts must be multiples of {M} long, got {[c.shape[1] for c in contexts]}")
    return [torch.cat([x, padding.to(x).repeat(x.shape[0], (length - x.shape[1]) // M, 1)], dim=1) for x in contexts]


def plain(prompt: str) -> str:
    """A weighted prompt without its brackets and numbers."""
    return "".join(text or "" for text, _ in parse(prompt))
