"""Prompts that change during the steps, or consist of several: what guides each step (`Plan`).

Prompt editing, `[a:b:0.5]` and `[a|b]`, and AND, in the web UI's syntax (text/prompt_syntax.py).

>>> from sd.text.prompt_editing import Stage
>>> _texts_at([[Subprompt([Stage(4, "a red dog"), Stage(10, "a blue dog")], 1.0)]], step=5)
(('a blue dog',),)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .conditioning import Composition, Conditioning, Guide
from .params import ResolvedParams, TextToImage
from .text.prompt_editing import text_at
from .text.prompt_syntax import Subprompt, read_negative, read_prompt

if TYPE_CHECKING:
    from .pipeline import StableDiffusion

Texts = tuple[tuple[str, ...], ...]  # of a step: for each prompt, those between its ANDs


class Pass(NamedTuple):
    """What prompts that change during the steps need to know of a run."""

    steps: int  # of the whole grid
    taken: int  # of these: the last ones
    first_pass: int = 0  # steps of the pass whose image this one refines, 0 if there is none
    size: tuple[int, int] = (0, 0)  # (height, width) of the images, in pixels


class Plan:
    """Prompts of which some change during the steps or consist of several, and their contexts."""

    def __init__(
        self,
        model: StableDiffusion,
        request: TextToImage,
        params: ResolvedParams,
        prompts: Sequence[str] | Tensor,
        negatives: Sequence[str] | Tensor,
        run: Pass,
        note: Callable[[str], object],
    ) -> None:
        """Prompts and negatives may be contexts (B, M, D). Raises ValueError for prompts that cannot be read."""
        self._model, self._request, self._params = model, request, params
        self._given = [x if isinstance(x, Tensor) else None for x in (prompts, negatives)]
        self._prompts: list[list[Subprompt]] = []
        self._negatives: list[list[Subprompt]] = []
        if not isinstance(prompts, Tensor):
            self._prompts = [read_prompt(text, run.steps, run.first_pass, note) for text in prompts]
        if not isinstance(negatives, Tensor):
            stages = [read_negative(text, run.steps, run.first_pass, note) for text in negatives]
            self._negatives = [[Subprompt(each, 1.0)] for each in stages]
        self._composed = any(len(parts) > 1 or parts[0].weight != 1 for parts in self._prompts)
        self._conds: dict[tuple[str, bool], Conditioning] = {}  # of each text, and whether it is negative

    @property
    def is_plain(self) -> bool:
        """Whether each prompt is one text in all steps."""
        return all(map(_is_plain, [*self._prompts, *self._negatives]))

    def first_texts(self) -> list[Sequence[str] | Tensor]:
        """The texts of the first step of prompts and negatives, or the contexts that were given."""
        return [
            [parts[0].stages[0].text for parts in texts] if context is None else context
            for context, texts in zip(self._given, (self._prompts, self._negatives), strict=True)
        ]

    def note_late_edits(self, run: Pass, note: Callable[[str], object]) -> None:
        """Note edits that come after the steps that are taken."""
        for part in (part for parts in (*self._prompts, *self._negatives) for part in parts):
            if 0 < run.taken < run.steps and part.stages[-1].text != text_at(part.stages, run.taken - 1):
                note(f"{run.taken} of {run.steps} steps are taken, and an edit of the prompt comes after them")

    def guides(
        self,
        taken: int,
        encode: Callable[[Sequence[tuple[str, bool]]], list[Conditioning]],
        nothing: Callable[[Conditioning, int], Conditioning],
    ) -> list[Guide]:
        """The guide of each step that is taken.

        encode    texts, and whether each is negative -> the conditioning that each has alone, contexts of one length
        nothing   another conditioning and a number of images -> zeros of the same length for those
        """
        guided = (self._params.is_guided and self._model.config.unet.guidance is None) or self._composed
        keys = [
            (_texts_at(self._prompts, step), _texts_at(self._negatives, step) if guided else None)
            for step in range(max(taken, 1))
        ]
        texts = dict.fromkeys(
            (text, bool(negative))
            for key in keys
            for negative, side in enumerate(key)
            for parts in side or ()
            for text in parts
        )
        given = [Conditioning(context) for context in self._given if context is not None]
        empty = [key for key in texts if key[1] and self._model.config.zero_empty and not key[0].strip()]
        rest = [key for key in texts if key not in empty]
        alike = of_one_length(self._model, [*given, *encode(rest)], self._request.clip_skip)
        padded = iter(alike)
        self._given = [None if context is None else next(padded).context for context in self._given]
        self._conds = dict(zip(rest, padded, strict=True)) | {key: nothing(alike[0], 1) for key in empty}
        made = {key: Guide(self._cond(key[0]), self._uncond(key[1])) for key in dict.fromkeys(keys)}
        return [made[key] for key in keys]

    def _cond(self, texts: Texts) -> Conditioning | Composition:
        if self._given[0] is not None:
            return Conditioning(self._given[0]).repeat_each(self._params.n)
        if not self._composed:
            return self._stacked(texts)
        # a prompt with fewer parts than another one repeats its first, with the weight 0
        count = max(map(len, texts))
        conds = [self._stacked([parts[k : k + 1] or parts for parts in texts]) for k in range(count)]
        weights = [[parts[k].weight if k < len(parts) else 0.0 for parts in self._prompts] for k in range(count)]
        table = torch.tensor(weights, device="cpu").repeat_interleave(self._params.n, dim=1).to(self._model.device)
        return Composition(tuple(conds), table)

    def _uncond(self, texts: Texts | None) -> Conditioning | None:
        if texts is None:
            return None
        if (context := self._given[1]) is not None:
            return Conditioning(context).repeat_each(self._params.n) if len(context) > 1 else Conditioning(context)
        return self._stacked(texts, negative=True) if len(texts) > 1 else self._conds[texts[0][0], True]

    def _stacked(self, texts: Sequence[Sequence[str]], negative: bool = False) -> Conditioning:
        """The conditionings of the first text of each prompt, for all of its images."""
        return Conditioning.joined([self._conds[parts[0], negative] for parts in texts]).repeat_each(self._params.n)


def of_one_length(model: StableDiffusion, parts: Sequence[Conditioning], clip_skip: int | None) -> list[Conditioning]:
    """Conditionings, padded to the longest context."""
    contexts = model.same_length(*(part.context for part in parts), clip_skip=clip_skip)
    return [part._replace(context=context) for part, context in zip(parts, contexts, strict=True)]


def _is_plain(parts: Sequence[Subprompt]) -> bool:
    """Whether a prompt is one text in all steps."""
    return len(parts) == 1 and parts[0].weight == 1 and len(parts[0].stages) == 1


def _texts_at(prompts: Sequence[Sequence[Subprompt]], step: int) -> Texts:
    """The texts of a step, counted from 0."""
    return tuple(tuple(text_at(part.stages, step) for part in parts) for parts in prompts)
