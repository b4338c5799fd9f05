"""From the prompts of a request to what guides each step of a run: contexts, encoded once, before the first step.

    prompts -> texts of every step (text/prompt_syntax.py) -> contexts, one for each text -> `Guide` of every step

Without the web UI's syntax, and with it as long as no prompt changes or has an AND, all steps have the same guide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .conditioning import Composition, Conditioning
from .params import ResolvedParams, TextToImage
from .text.prompt_editing import text_at
from .text.prompt_syntax import Subprompt, read_negative, read_prompt

if TYPE_CHECKING:
    from .pipeline import StableDiffusion

Encode = Callable[[Sequence[str]], Tensor]  # B texts -> (B, M, D)
Texts = tuple[tuple[str, ...], ...]  # of a step: for each prompt, those between its ANDs


class Guide(NamedTuple):
    """What a denoiser is guided by: contexts (B, M, D), or a composition of several, and the negative ones."""

    cond: Tensor | Composition
    uncond: Tensor | None  # (1, M, D) for all images, or (B, M, D); None if the guidance needs none


class Pass(NamedTuple):
    """What prompts that change during the steps need to know of a run."""

    steps: int  # of the whole grid
    taken: int  # of these: the last ones
    first_pass: int = 0  # steps of the pass whose image this one refines, 0 if there is none


def guides(
    model: StableDiffusion, request: TextToImage, params: ResolvedParams, run: Pass, note: Callable[[str], object]
) -> list[Guide]:
    """The guide of each step that is taken, at least one; steps of equal guides share the same object.

    `note` receives what was left out of the prompts. Raises ValueError for prompts that cannot be read, and contexts
    that do not fit the model.
    """

    def encode(texts: Sequence[str]) -> Tensor:
        kind = model.encode_weighted if request.web_ui_prompts else model.encode_prompt
        if not params.exact:
            return kind(texts, clip_skip=request.clip_skip, note=note)
        each = [kind([text], clip_skip=request.clip_skip, note=note) for text in texts]
        return torch.cat(model.same_length(*each, clip_skip=request.clip_skip))

    prompts, negatives = request.prompt, request.negative
    assert negatives is not None  # a request makes "" of None
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if isinstance(prompts, Tensor):
        prompts = _own_context(model, "prompt", prompts)
    if isinstance(negatives, Tensor):
        negatives = _own_context(model, "negative", negatives)
    if request.web_ui_prompts:
        plan = _Plan(model, request, params, _read(prompts, run, note), _read(negatives, run, note, negative=True))
        if not plan.is_plain:
            plan.note_late_edits(run, note)
            return plan.guides(run.taken, encode)
        prompts, negatives = plan.first_texts()
    cond = prompts if isinstance(prompts, Tensor) else encode(prompts)
    uncond = None
    if params.is_guided and model.config.unet.guidance is None:
        uncond = negatives if isinstance(negatives, Tensor) else encode(negatives)
        if uncond.shape[1] != cond.shape[1]:
            cond, uncond = model.same_length(cond, uncond, clip_skip=request.clip_skip)
        if len(uncond) > 1:  # one for each prompt
            uncond = uncond.repeat_interleave(params.n, dim=0)
    return [Guide(cond.repeat_interleave(params.n, dim=0), uncond)] * max(run.taken, 1)


def is_empty(prompts: str | Sequence[str] | Tensor | None) -> bool:
    """Whether there is no prompt, or only empty texts."""
    return not isinstance(prompts, Tensor) and not any(prompts or ())


def _read(
    texts: Sequence[str] | Tensor, run: Pass, note: Callable[[str], object], negative: bool = False
) -> list[list[Subprompt]] | Tensor:
    """What texts say in each step; contexts stay."""
    if isinstance(texts, Tensor):
        return texts
    if negative:
        return [[Subprompt(read_negative(text, run.steps, run.first_pass, note), 1.0)] for text in texts]
    return [read_prompt(text, run.steps, run.first_pass, note) for text in texts]


class _Plan:
    """Prompts of which some change during the steps or consist of several, and their contexts."""

    def __init__(
        self,
        model: StableDiffusion,
        request: TextToImage,
        params: ResolvedParams,
        prompts: Sequence[Sequence[Subprompt]] | Tensor,
        negatives: Sequence[Sequence[Subprompt]] | Tensor,
    ) -> None:
        """Both may be contexts (B, M, D) in place of texts."""
        self._model, self._request, self._params = model, request, params
        self._given = [x if isinstance(x, Tensor) else None for x in (prompts, negatives)]
        self._prompts, self._negatives = ([] if isinstance(x, Tensor) else x for x in (prompts, negatives))
        self._composed = any(len(parts) > 1 or parts[0].weight != 1 for parts in self._prompts)
        self._contexts: dict[str, Tensor] = {}  # of each text, (1, M, D)

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

    def guides(self, taken: int, encode: Encode) -> list[Guide]:
        """The guide of each step."""
        guided = (self._params.is_guided and self._model.config.unet.guidance is None) or self._composed
        keys = [
            (_texts_at(self._prompts, step), _texts_at(self._negatives, step) if guided else None)
            for step in range(max(taken, 1))
        ]
        texts = dict.fromkeys(text for key in keys for side in key for parts in side or () for text in parts)
        given = [context for context in self._given if context is not None]
        # one by one, so that a text has the same context whatever stands beside it
        each = [encode([text]) for text in texts]
        padded = iter(self._model.same_length(*given, *each, clip_skip=self._request.clip_skip))
        self._given = [None if context is None else next(padded) for context in self._given]
        self._contexts = dict(zip(texts, padded, strict=True))
        made = {key: Guide(self._cond(key[0]), self._uncond(key[1])) for key in dict.fromkeys(keys)}
        return [made[key] for key in keys]

    def _cond(self, texts: Texts) -> Tensor | Composition:
        if self._given[0] is not None:
            return self._given[0].repeat_interleave(self._params.n, dim=0)
        if not self._composed:
            return self._stacked(texts)
        # a prompt with fewer parts than another one repeats its first, with the weight 0
        count = max(map(len, texts))
        conds = [self._stacked([parts[k : k + 1] or parts for parts in texts]) for k in range(count)]
        weights = [[parts[k].weight if k < len(parts) else 0.0 for parts in self._prompts] for k in range(count)]
        table = torch.tensor(weights, device="cpu").repeat_interleave(self._params.n, dim=1).to(self._model.device)
        return Composition(tuple(map(Conditioning, conds)), table)

    def _uncond(self, texts: Texts | None) -> Tensor | None:
        if texts is None:
            return None
        if (context := self._given[1]) is not None:
            return context.repeat_interleave(self._params.n, dim=0) if len(context) > 1 else context
        return self._stacked(texts) if len(texts) > 1 else self._contexts[texts[0][0]]

    def _stacked(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """The contexts of the first text of each prompt, for all of its images."""
        return torch.cat([self._contexts[parts[0]] for parts in texts]).repeat_interleave(self._params.n, dim=0)


def _own_context(model: StableDiffusion, name: str, context: Tensor) -> Tensor:
    """A context that was given as a prompt, on the model's device and in its precision.

    Raises ValueError for a tensor that is not a context of this model.
    """
    M, D = model.config.text[0].length, model.config.unet.context
    shape, dtype = tuple(context.shape), str(context.dtype).removeprefix("torch.")
    if len(shape) != 3 or 0 in shape or shape[1] % M or shape[2] != D or not context.is_floating_point():
        raise ValueError(f"{name} must be a context (B, k x {M}, {D}) of this model, got {shape} in {dtype}")
    return context.to(model.device, model.dtype)


def _is_plain(parts: Sequence[Subprompt]) -> bool:
    """Whether a prompt is one text in all steps."""
    return len(parts) == 1 and parts[0].weight == 1 and len(parts[0].stages) == 1


def _texts_at(prompts: Sequence[Sequence[Subprompt]], step: int) -> Texts:
    """The texts of a step, counted from 0."""
    return tuple(tuple(text_at(part.stages, step) for part in parts) for parts in prompts)
