r"""The prompt syntax of AUTOMATIC1111's web UI, where most prompts come from: the option `web_ui_prompts`.

    # ...           from there to the end of the line: a comment
    <lora:name:1>   a tag, which loads a file (prompt_tags.py)
    a AND b :0.5    several prompts at once, each with a weight (below)
    [a:b:0.4]       prompt editing and alternation, [a|b]: the prompt changes during the steps (prompt_editing.py)
    (word)          multiplies the weight by 1.1; nested brackets multiply
    [word]          divides it by 1.1
    (word:1.3)      multiplies it by 1.3; square brackets take no number
    \( \) \[ \] \\  the character itself; a bracket that is never closed extends to the end of the prompt
    BREAK           starts a new chunk

They are read in this order:

    prompt -> without comments and tags -> prompts between ANDs -> the text of each step -> parts, each a text and its
    weight -> tokens -> chunks of 75 -> contexts, weighted -> one long context

A weight w multiplies the output vectors of the text encoder for the tokens of its part. The whole chunk is then
rescaled to its previous mean, as the U-Net has never seen another one: z' = w z, z'' = z' mean(z) / mean(z').

The text encoder takes 77 tokens. A longer prompt is split into chunks of 75 tokens, each with its own start and end and
encoded independently; the U-Net attends to all of them, 77 k tokens. A chunk that would end in the middle of a phrase
ends at the last comma instead, if that is at most 20 tokens back.

AND is composable guidance (Liu et al. 2022, "Compositional visual generation with composable diffusion models"): the
network predicts for each prompt on its own, and the denoiser adds up the differences from the negative prompt. A
number after a colon at the end of a prompt is its weight, even without an AND, and even if it was not meant as one:
"..., aspect 16:9" has the weight 9, and a `note` says so. In a negative prompt AND is a word.

Differences from the web UI: BREAK also works inside brackets (there it becomes the word "break"); the mean is that of
each text, not of all texts of a batch; shorter contexts are filled up with that of the empty text, also between ANDs
(there the last vector is repeated, and a negative prompt of another length stays as it is); prompt_editing.py has one
more. Where its parser fails on brackets that do not match, it may read an edit beside them as text.

>>> for part in parse("a (red:1.3) house, [small]"):
...     print(repr(part.text), round(part.weight, 3))
'a ' 1.0
'red' 1.3
' house, ' 1.0
'small' 0.909
>>> read_prompt("a cat :1.2 AND a [red:blue:4] dog", steps=10)[1]
Subprompt(stages=[Stage(last=4, text=' a red dog'), Stage(last=10, text=' a blue dog')], weight=1.0)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..messages import one_line
from .prompt_editing import Stage, all_texts, changes, parse_editing, schedule
from .prompt_tags import take_tags, without_tags
from .tokenizer import Note, Tokenizer, warn

ROUND, SQUARE = 1.1, 1 / 1.1  # factor of the weight for a pair of brackets
COMMA = 267  # the token of a comma at the end of a word, in CLIP's table
BACK = 20  # tokens: how far back the comma may be at which a chunk ends
MAX_CHUNKS = 100  # per prompt: 7,500 tokens
MAX_OPEN = 100  # open brackets: 1.1 ** 100 is 13,780
MAX_AND = 32  # prompts joined by AND: the network is called for each of them

TOKENS = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\bBREAK\b")
AND = re.compile(r"\bAND\b")
COMMENT = re.compile(r"#[^\n]*")
EDITING = re.compile(r"\[[^][]*(?:\||:\s*[-+.\d]+\s*\])")  # alternation, or editing with a time at its end
WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


class Subprompt(NamedTuple):
    """One of the prompts between ANDs: its texts, one after another, and its weight."""

    stages: list[Stage]
    weight: float


def read_prompt(prompt: str, steps: int, first_pass: int = 0, note: Note = warn) -> list[Subprompt]:
    """The prompts between ANDs, at least one, with their texts in a run of so many steps (`schedule`).

    Raises ValueError for more than 32 of them, for the tag of a LoRA, and for brackets nested too deeply.
    """
    found = []
    texts = AND.split(without_tags(without_comments(prompt, note), note))
    if len(texts) > MAX_AND:
        raise ValueError(f"{len(texts)} prompts are joined by AND, at most {MAX_AND} can be")
    for text in texts:
        text, weight = _trailing_weight(text)
        if weight != 1 and len(texts) == 1:
            note(f"the prompt ends in a number after a colon: its weight is {weight:g}, as in the web UI")
        _note_unedited(text, note)
        found.append(Subprompt(schedule(text, steps, first_pass), weight))
    return found


def read_negative(prompt: str, steps: int, first_pass: int = 0, note: Note = warn) -> list[Stage]:
    """The texts of a negative prompt in a run of so many steps. Raises ValueError as `read_prompt`."""
    text = without_tags(without_comments(prompt, note), note)
    if AND.search(text):
        note("AND in the negative prompt is read as a word, as in the web UI")
    _note_unedited(text, note)
    return schedule(text.rstrip(), steps, first_pass)


def single_text(prompt: str, note: Note = warn) -> str:
    """The text of a prompt that is one text: without its comments and tags.

    Raises ValueError for a prompt that has several, because of AND, prompt editing or alternation.
    """
    text = without_tags(without_comments(prompt, note), note)
    (first, weight), *more = map(_trailing_weight, AND.split(text))
    if more or weight != 1 or changes(first):
        raise ValueError(
            "a prompt with AND, [a:b:0.5], [a|b] or a weight at its end has several contexts and cannot be "
            "encoded here: give it to txt2img or prepare"
        )
    return first


def check_prompt(prompt: str, negative: bool = False) -> None:
    """Raise the ValueError that a prompt leads to in a run, if any."""
    if negative:
        stages = read_negative(prompt, steps=1, note=lambda message: None)
        texts = [all_texts(stages[0].text)]
    else:
        read_prompt(prompt, steps=1, note=lambda message: None)
        texts = texts_of(prompt)
    for text in texts:
        parse(text)


def texts_of(prompt: str) -> list[str]:
    """What the prompts between ANDs say, each in all of its steps: for looking up words."""
    text, _ = take_tags(COMMENT.sub("", prompt))
    return [all_texts(_trailing_weight(part)[0]) for part in AND.split(text)]


def without_comments(prompt: str, note: Note) -> str:
    """A prompt without its comments; `note` receives what they are."""
    for match in COMMENT.finditer(prompt):
        note(f'from # on is a comment and left out: "{one_line(match.group(), 60)}"')
    return COMMENT.sub("", prompt)


def _note_unedited(text: str, note: Note) -> None:
    """Say that what looks like prompt editing is text, because a part of the prompt makes no sense for its parser."""
    if parse_editing(text) is None and EDITING.search(text):
        note("prompt editing is read as text, as in the web UI: there is a | outside of [a|b], or a lone backslash")


def _trailing_weight(text: str) -> tuple[str, float]:
    """A prompt without the weight at its end, and the weight, 1 if there is none."""
    text = text.rstrip()
    head, colon, tail = text.rpartition(":")
    if colon and WEIGHT.fullmatch(tail.strip()):
        if not math.isfinite(weight := float(tail)):
            raise ValueError(
                f"the weight at the end of the prompt has {len(tail.strip())} digits: use a number near 1, such as 1.2"
            )
        return head.rstrip(), weight
    return text, 1.0


class Part(NamedTuple):
    """A piece of a prompt with one weight."""

    text: str | None  # None starts a new chunk
    weight: float


class Chunk(NamedTuple):
    """Tokens that are encoded together, at most 75, and the weight of each."""

    ids: list[int]
    weights: list[float]


def parse(prompt: str) -> list[Part]:
    """The parts of a text, in order; adjacent text of the same weight is one part, and BREAK is one without text.

    Raises ValueError for weights that are not numbers, and for more than 100 open brackets.
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
            for i, text in enumerate([token[1:]] if escaped else BREAK.split(token)):
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight {text!r} in the prompt is not a number") from None


def chunks(tokenizer: Tokenizer, text: str) -> list[Chunk]:
    """The tokens of a text with their weights, in as many chunks as needed, at least one.

    Raises ValueError for more than 100 chunks, and as `parse`.
    """
    ids: list[int] = []
    weights: list[float] = []
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

    for part, weight in parse(text):
        if part is None:
            begin()
            continue
        new = tokenizer.encode(part)
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
    """The chunks of several texts as the input of the text encoder."""

    ids: Tensor  # (B k, M), the k chunks of each text in order
    weights: Tensor  # (B k, M)


def rows(tokenizer: Tokenizer, texts: Sequence[str], least: int = 1) -> Rows:
    """The tokens and weights of B texts, k chunks each: shorter ones are padded with chunks of the empty text.

    least   there are at least so many chunks
    """
    split = [chunks(tokenizer, text) for text in texts]
    count = max(least, *map(len, split)) if split else least
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
    """A text without its brackets, weights and BREAKs."""
    return "".join(text or "" for text, _ in parse(prompt))
