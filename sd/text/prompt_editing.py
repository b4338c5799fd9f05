r"""Prompts that change during the steps, as in AUTOMATIC1111's web UI: prompt editing and alternation.

    [from:to:when]   "from", and "to" after the step `when`
    [to:when]        nothing, and "to" after that step
    [from::when]     "from", and nothing after that step
    [a|b|c]          in each step the next one; parts may be empty, as in [fe|]male

All parts may contain others. `when` is a number of steps if it is written as a whole number (12), and a share of them
if it has a decimal point (0.4, 1.0). A part with a weight in it, such as (b:1.2), can be edited and alternated, too.

The steps are those that the web UI takes, oddities included, so that its prompts give its images:

* It counts the steps from 0, and changes after the step of number `when`: [a:b:3] takes "a" in the steps 0 to 3, which
  are four, and [a|b] begins with "a" twice: a, a, b, a, b, ...
* In image to image the shares are those of the steps of the whole grid, but the count begins with the first step that
  is taken: at strength 0.5, [a:b:0.5] never reaches "b". With the spacing lcm all steps are taken, and it does.
* When the image of a first pass is refined at a higher resolution, the count of steps goes on: after a first pass of 20
  steps, whole numbers above 20 and shares above 1.0 belong to the second.
* Brackets that are not closed, colons too many and the like are text. But a `|` outside of [a|b] turns everything else
  in the prompt into text, too: `a [b:c:5] | d` is not edited. So does a backslash at its end.

One difference: there, samplers with two evaluations a step (Heun, DPM2, DPM++ 2S a, DPM++ SDE) have twice as many steps
as far as prompts are concerned. Here a step is a step, so [a:b:6] is their [a:b:12]. Shares are the same.

>>> schedule("a [red:blue:4] house", 10)
[Stage(last=4, text='a red house'), Stage(last=10, text='a blue house')]
>>> [stage.text for stage in schedule("[cat|dog]", 4)]
['cat', 'dog', 'cat', 'dog']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

MAX_DEPTH = 200  # brackets within brackets

# An escaped character, one that structures the prompt, or text without either; or a backslash that escapes nothing.
TOKENS = re.compile(r"\\.|[][():|]|[^][():|\\]+|(?P<alone>\\)")
WHEN = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


class Stage(NamedTuple):
    """The text of a prompt up to and including the step `last`, counted from 0 (the web UI's count, see above)."""

    last: int
    text: str


class Edit(NamedTuple):
    """[before:after:when]."""

    before: Nodes
    after: Nodes
    when: str  # the number as it is written: whether it has a point matters


class Alternation(NamedTuple):
    """[a|b|c]."""

    options: tuple[Nodes, ...]


Nodes = tuple["str | Edit | Alternation", ...]


def parse_editing(prompt: str) -> Nodes | None:
    """The edits and alternations of a prompt, between pieces of text; None if all of it is text (see above).

    Raises ValueError for more than 200 brackets within each other.
    """
    tokens = []
    for match in TOKENS.finditer(prompt):
        if match["alone"]:
            return None
        tokens.append(match.group())
    groups = _Groups(tokens)
    nodes: list[str | Edit | Alternation] = []
    i = 0
    while i < len(tokens):
        if tokens[i] == "|":
            return None
        if tokens[i] in "([" and (group := groups.at(i)) is not None:
            found, i = group
            nodes += found
        else:
            nodes.append(tokens[i])  # a bracket or a colon that belongs to nothing is text
            i += 1
    return tuple(nodes)


class _Groups:
    """Finds what is in the brackets of a prompt. Each bracket is read once, so that the time is linear."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._known: dict[int, tuple[Nodes, int] | None] = {}

    def at(self, start: int, depth: int = 0) -> tuple[Nodes, int] | None:
        """The nodes of the group that opens at a token, and the index after it; None if it is not well formed."""
        if start not in self._known:
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} brackets within each other: write \\( or \\[ where it is text")
            self._known[start] = self._read(start, depth)
        return self._known[start]

    def _read(self, start: int, depth: int) -> tuple[Nodes, int] | None:
        """Read a group up to its closing bracket: segments of nodes, separated by ":" or "|"."""
        opening = self._tokens[start]
        closing = ")" if opening == "(" else "]"
        segments: list[list[str | Edit | Alternation]] = [[]]
        separators: list[str] = []
        i = start + 1
        while i < len(self._tokens):
            token = self._tokens[i]
            if token == closing:
                nodes = _group(opening, segments, separators)
                return None if nodes is None else (nodes, i + 1)
            if token in ")]":
                return None
            if token in "([":
                inner = self.at(i, depth + 1)
                if inner is None:
                    return None
                found, i = inner
                segments[-1] += found
                continue
            if token in ":|":
                separators.append(token)
                segments.append([])
            else:
                segments[-1].append(token)
            i += 1
        return None


def _group(opening: str, segments: list[list[str | Edit | Alternation]], separators: list[str]) -> Nodes | None:
    """The nodes of a bracket that has these segments between its separators; None if it is not well formed."""
    kinds = set(separators)
    if opening == "(":
        if len(separators) > 1 or "|" in kinds:
            return None
        inner = segments[0] if not separators else [*segments[0], ":", *segments[1]]
        return ("(", *inner, ")")
    if not separators:
        return ("[", *segments[0], "]")
    if kinds == {"|"}:
        return (Alternation(tuple(map(tuple, segments))),)
    *parts, last = segments
    when = WHEN.fullmatch("".join(map(str, last))) if all(isinstance(node, str) for node in last) else None
    if "|" in kinds or when is None or len(parts) > 2:
        return None
    before = tuple(parts[0]) if len(parts) == 2 else ()
    return (Edit(before, tuple(parts[-1]), when[1]),)


def schedule(prompt: str, steps: int, first_pass: int = 0) -> list[Stage]:
    """The texts that a prompt has one after another in a run of `steps` steps; a single stage if it does not change.

    first_pass   the steps of the pass whose image this one refines, 0 if there is none

    `steps` is the number of the whole grid, from which image to image takes the last ones. Raises ValueError for more
    than 200 brackets within each other.
    """
    nodes = parse_editing(prompt)
    if nodes is None:
        return [Stage(steps, prompt)]
    ends = {steps}
    for node in _walk(nodes):
        if isinstance(node, Edit):
            ends.add(_end(node.when, steps, first_pass))
        else:
            ends.update(range(1, steps + 1))
    ends = {end for end in ends if end >= 1} or {steps}
    return [Stage(end, "".join(_texts(nodes, end, steps, first_pass))) for end in sorted(ends)]


def text_at(stages: Sequence[Stage], step: int) -> str:
    """The text of a step, counted from 0."""
    return next((stage.text for stage in stages if step <= stage.last), stages[-1].text)


def changes(prompt: str) -> bool:
    """Whether there is any prompt editing or alternation in a prompt."""
    return any(True for _ in _walk(parse_editing(prompt) or ()))


def all_texts(prompt: str) -> str:
    """Everything that a prompt says in any of its steps, for looking up its words."""

    def parts(nodes: Nodes) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, str):
                yield node
            else:
                for branch in _branches(node):
                    yield " "
                    yield from parts(branch)

    nodes = parse_editing(prompt)
    return prompt if nodes is None else "".join(parts(nodes))


def _branches(node: Edit | Alternation) -> tuple[Nodes, ...]:
    return (node.before, node.after) if isinstance(node, Edit) else node.options


def _walk(nodes: Nodes) -> Iterator[Edit | Alternation]:
    """Every edit and alternation, also within others."""
    for node in nodes:
        if not isinstance(node, str):
            yield node
            for branch in _branches(node):
                yield from _walk(branch)


def _end(when: str, steps: int, first_pass: int) -> int:
    """The last step before an edit, counted from 1 and at most `steps`; below 1 if the edit comes before the first."""
    number = float(when)
    # with a point it is a share of the steps, and shares above 1 are those of a second pass
    end = (number - (1 if first_pass else 0)) * steps if "." in when else number - first_pass
    return int(min(max(end, -1), steps))


def _texts(nodes: Iterable[str | Edit | Alternation], step: int, steps: int, first_pass: int) -> Iterator[str]:
    """The pieces of the text at a step, counted from 1."""
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, Edit):
            branch = node.before if step <= _end(node.when, steps, first_pass) else node.after
            yield from _texts(branch, step, steps, first_pass)
        else:
            yield from _texts(node.options[(step - 1) % len(node.options)], step, steps, first_pass)
