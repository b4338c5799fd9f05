"""From the prompts of a request to what guides each step of a run: encoded once, before the first step.

    prompts -> texts of every step (text/prompt_syntax.py) -> conditionings, one for each text -> `Guide` of every step

Without the web UI's syntax, and with it as long as no prompt changes or has an AND, all steps have the same guide.

What a network is told about a text (`TextEncoding`):

    context   the hidden states of all text encoders, side by side
    vector    for SDXL: the pooled output of the last one, then the size conditioning, for each of the numbers in
              `Config.sizes` an embedding like that of a timestep (size_conditioning.py)

>>> from sd.text.prompt_editing import Stage
>>> _texts_at([[Subprompt([Stage(4, "a red dog"), Stage(10, "a blue dog")], 1.0)]], step=5)
(('a blue dog',),)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import prompt_checks
from .adapters.added import Adapters
from .conditioning import Composition, Conditioning, TextOutput
from .config import Config
from .models.text_encoder import TextEncoder, layers_of_clip_skip
from .params import ResolvedParams, SamplingParams, TextToImage
from .second_prompts import SecondTexts
from .size_conditioning import size_embedding, sizes_for
from .text.prompt_editing import text_at
from .text.prompt_syntax import Subprompt, emphasised, read_negative, read_prompt, rows, same_length, single_text
from .text.tokenizer import Note, Tokenizer, warn

if TYPE_CHECKING:
    from .pipeline import StableDiffusion

Encode = Callable[[Sequence[str], bool], Conditioning]  # B texts, and whether they are negative -> for B images
Texts = tuple[tuple[str, ...], ...]  # of a step: for each prompt, those between its ANDs


class TextEncoding:
    """The methods of `StableDiffusion` that encode texts."""

    config: Config
    _text_names: tuple[str, ...]
    tokenizers: tuple[Tokenizer, ...]  # one for each text encoder: they pad differently
    device: torch.device
    dtype: torch.dtype
    _adapters: Adapters

    def _use(self, name: str) -> AbstractContextManager[nn.Module]:
        raise NotImplementedError

    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        *,
        web_ui_prompts: bool = False,
        clip_skip: int | None = None,
        note: Note = warn,
    ) -> Tensor:
        """Encode one text, or B texts -> context (B, M, D). Tokens beyond M are dropped, with a `note`.

        web_ui_prompts   the web UI's syntax (text/prompt_syntax.py): nothing is dropped, contexts are (B, k M, D).
                         Raises ValueError for AND and prompt editing, with which a prompt has several contexts
        clip_skip        layer of the text encoder, counted from its end; None is the model's own

        SDXL's network also takes a vector: see `conditioning`.
        """
        return self.encode_texts(prompts, web_ui_prompts=web_ui_prompts, clip_skip=clip_skip, note=note).hidden

    def encode_texts(
        self,
        prompts: str | Sequence[str],
        *,
        second: Sequence[str] | None = None,
        web_ui_prompts: bool = False,
        clip_skip: int | None = None,
        note: Note = warn,
    ) -> TextOutput:
        """The same, and the pooled output (B, P) of the last text encoder, if it has one: that of the first chunk.

        second   B texts for the second text encoder, if they are others
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if web_ui_prompts:
            prompts = [single_text(p, note) for p in prompts]
            return self.encode_weighted(prompts, second=second, clip_skip=clip_skip, note=note)
        if second is not None:
            second = prompt_checks.second("second", second, prompts)
        first, *others = self.tokenizers
        note_others: Note = (lambda message: None) if second is None else note  # what does not fit is said once
        ids = [first(prompts, note), *(tokenizer(second or prompts, note_others) for tokenizer in others)]
        outputs = self._encode(ids, clip_skip, note)
        return _side_by_side(outputs) if len(outputs) > 1 else outputs[0]

    def encode_weighted(
        self,
        texts: Sequence[str],
        *,
        second: Sequence[str] | None = None,
        clip_skip: int | None = None,
        note: Note = warn,
    ) -> TextOutput:
        """Encode B texts with weights, `(word:1.2)`, `(word)`, `[word]`, and BREAKs; contexts are (B, k M, D).

        There are as many chunks k as the longest text needs; shorter ones are padded with those of the empty text. With
        several text encoders that is so for each, as a word of one tokenizer may be several tokens of another.
        """
        if second is not None:
            second = prompt_checks.second("second", second, texts)
        first, *others = self.tokenizers
        of_each = [(first, texts), *((tokenizer, second or texts) for tokenizer in others)]
        read = [rows(tokenizer, own) for tokenizer, own in of_each]
        most = max(len(ids) for ids, _ in read)
        if any(len(ids) < most for ids, _ in read):
            read = [rows(tokenizer, own, most // len(own)) for tokenizer, own in of_each]
        outputs = []
        for output, (_, weights) in zip(self._encode([ids for ids, _ in read], clip_skip, note), read, strict=True):
            context, pooled = output
            if (weights != 1).any():
                context = emphasised(context, weights.to(self.device))
            if texts:
                context = context.reshape(len(texts), -1, context.shape[-1])
                pooled = None if pooled is None else pooled[:: len(pooled) // len(texts)]
            outputs.append(TextOutput(context, pooled))
        return _side_by_side(outputs) if len(outputs) > 1 else outputs[0]

    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None, note: Note) -> list[TextOutput]:
        """Token ids (B, M) for each text encoder -> what it says."""
        config = self.config
        layers = None if clip_skip is None else layers_of_clip_skip(config.text, clip_skip, note)
        if any(tokenizer.added for tokenizer in self.tokenizers):
            self._adapters.words.keep()
        outputs = []
        for i, name in enumerate(self._text_names):
            layer = () if layers is None else (layers[i],)  # an encoder of one's own need not know about layers
            with torch.no_grad(), self._use(name) as encoder:
                outputs.append(cast(TextEncoder, encoder)(ids[i].to(self.device), *layer))
        return outputs

    def conditioning(
        self,
        prompts: str | Sequence[str],
        sizes: Sequence[float] | None = None,
        *,
        web_ui_prompts: bool = False,
        clip_skip: int | None = None,
        note: Note = warn,
    ) -> Conditioning:
        """What the network is told about one text, or about B texts; further arguments as for `encode_prompt`.

        sizes   the numbers of `Config.sizes`; by default those of an image of the native size
        """
        text = self.encode_texts(prompts, web_ui_prompts=web_ui_prompts, clip_skip=clip_skip, note=note)
        return self.with_sizes(text, sizes)

    def with_sizes(self, text: TextOutput, sizes: Sequence[float] | None = None) -> Conditioning:
        """The conditioning of encoded texts; `sizes` as for `conditioning`."""
        config = self.config
        if text.pooled is None:
            return Conditioning(text.hidden)
        if sizes is None:
            sizes = sizes_for(config, SamplingParams(), config.size, config.size)
        numbers = torch.tensor([sizes], dtype=torch.float32, device="cpu")
        embedded = size_embedding(numbers).to(text.pooled).expand(len(text.pooled), -1)
        return Conditioning(text.hidden, torch.cat([text.pooled, embedded], dim=-1))

    def zeroed(self, cond: Conditioning, empty: Sequence[bool] | Tensor) -> Conditioning:
        """A conditioning (B) with zeros in place of context and pooled text where `empty`; its sizes stay."""
        keep = ~torch.as_tensor(empty, device=self.device)
        context, vector = cond.context * keep[:, None, None], cond.vector
        if vector is not None:
            pooled = self.config.text[-1].pooled_width
            vector = torch.cat([vector[:, :pooled] * keep[:, None], vector[:, pooled:]], dim=-1)
        return cond._replace(context=context, vector=vector)

    def same_length(self, *contexts: Tensor, clip_skip: int | None = None) -> list[Tensor]:
        """Pad contexts (B, k M, D) of different k to the length of the longest, with that of the empty text."""
        return same_length(contexts, lambda: self.encode_prompt([""], clip_skip=clip_skip, note=lambda message: None))


def _side_by_side(outputs: Sequence[TextOutput]) -> TextOutput:
    """What several text encoders say about the same texts: hidden states side by side, and the last pooled output."""
    return TextOutput(torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled)


class Guide(NamedTuple):
    """What a denoiser is guided by: the prompts, each one or a composition of several, and the negative ones."""

    cond: Conditioning | Composition  # for B images
    uncond: Conditioning | None  # for B images, or one for all; None if the guidance needs none


class Pass(NamedTuple):
    """What prompts that change during the steps need to know of a run."""

    steps: int  # of the whole grid
    taken: int  # of these: the last ones
    first_pass: int = 0  # steps of the pass whose image this one refines, 0 if there is none
    size: tuple[int, int] = (0, 0)  # (height, width) of the images, in pixels


def guides(
    model: StableDiffusion, request: TextToImage, params: ResolvedParams, run: Pass, note: Callable[[str], object]
) -> list[Guide]:
    """The guide of each step that is taken, at least one; steps of equal guides share the same object.

    `note` receives what was left out of the prompts. Raises ValueError for prompts that cannot be read, and contexts
    that do not fit the model.
    """

    def encode(texts: Sequence[str], negative: bool, second: Sequence[str] | None = None) -> Conditioning:
        if params.exact and len(texts) > 1:
            pairs = zip(texts, [None] * len(texts) if second is None else [[text] for text in second], strict=True)
            each = [encode([text], negative, other) for text, other in pairs]
            return Conditioning.joined(_same_length(model, each, request.clip_skip))
        kind = model.encode_weighted if request.web_ui_prompts else model.encode_texts
        text = kind(texts, second=second, clip_skip=request.clip_skip, note=note)
        if text.pooled is None:
            return Conditioning(text.hidden)
        return model.with_sizes(text, sizes_for(model.config, params, *run.size, negative=negative))

    def nothing(like: Conditioning, count: int) -> Conditioning:
        hidden = like.context.new_zeros(count, *like.context.shape[1:])
        pooled = None if like.vector is None else hidden.new_zeros(count, model.config.text[-1].pooled_width)
        return model.with_sizes(TextOutput(hidden, pooled), sizes_for(model.config, params, *run.size, negative=True))

    prompts, negatives = request.prompt, request.negative
    assert negatives is not None  # a request makes "" of None
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if isinstance(prompts, Tensor):
        prompts = _own_context(model, "prompt", prompts)
    if isinstance(negatives, Tensor):
        negatives = _own_context(model, "negative", negatives)
    second = None
    if request.prompt_2 is not None or request.negative_2 is not None:
        second = SecondTexts.of(model.config, request, note)
    if request.web_ui_prompts:
        plan = _Plan(model, request, params, _read(prompts, run, note), _read(negatives, run, note, negative=True))
        if not plan.is_plain:
            if second is not None:
                second.check_unused()
            plan.note_late_edits(run, note)
            return plan.guides(run.taken, encode, nothing)
        prompts, negatives = plan.first_texts()
    others: list[list[str] | None] = [None, None]
    if second is not None:
        prompts, others[0] = second.beside(prompts, negative=False)
        negatives, others[1] = second.beside(negatives, negative=True)
    cond = Conditioning(prompts) if isinstance(prompts, Tensor) else encode(prompts, False, others[0])
    uncond = None
    if params.is_guided and model.config.unet.guidance is None:
        zeros: list[bool] = []  # which of them are zeros in place of the encoded empty text
        if model.config.zero_empty and not isinstance(negatives, Tensor):
            zeros = [not "".join(texts).strip() for texts in zip(negatives, others[1] or negatives, strict=True)]
        if zeros and all(zeros):
            uncond = nothing(cond, len(zeros))
        else:
            uncond = Conditioning(negatives) if isinstance(negatives, Tensor) else encode(negatives, True, others[1])
        if uncond.context.shape[1] != cond.context.shape[1]:
            cond, uncond = _same_length(model, [cond, uncond], request.clip_skip)
        if any(zeros) and not all(zeros):
            uncond = model.zeroed(uncond, zeros)
        if len(uncond.context) > 1:  # one for each prompt
            uncond = uncond.repeat_each(params.n)
    return [Guide(cond.repeat_each(params.n) if params.n > 1 else cond, uncond)] * max(run.taken, 1)


def _same_length(model: StableDiffusion, parts: Sequence[Conditioning], clip_skip: int | None) -> list[Conditioning]:
    """Conditionings whose contexts have the length of the longest."""
    contexts = model.same_length(*(part.context for part in parts), clip_skip=clip_skip)
    return [part._replace(context=context) for part, context in zip(parts, contexts, strict=True)]


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

    def guides(self, taken: int, encode: Encode, nothing: Callable[[Conditioning, int], Conditioning]) -> list[Guide]:
        """The guide of each step; `nothing` makes zeros with the length of another conditioning."""
        guided = (self._params.is_guided and self._model.config.unet.guidance is None) or self._composed
        keys = [
            (_texts_at(self._prompts, step), _texts_at(self._negatives, step) if guided else None)
            for step in range(max(taken, 1))
        ]
        texts = dict.fromkeys(
            (text, negative)
            for key in keys
            for negative, side in enumerate(key)
            for parts in side or ()
            for text in parts
        )
        given = [Conditioning(context) for context in self._given if context is not None]
        # one by one, so that a text has the same context whatever stands beside it
        empty = [key for key in texts if key[1] and self._model.config.zero_empty and not key[0].strip()]
        each = [encode([text], bool(negative)) for text, negative in texts if (text, negative) not in empty]
        alike = _same_length(self._model, [*given, *each], self._request.clip_skip)
        padded = iter(alike)
        self._given = [None if context is None else next(padded).context for context in self._given]
        for text, negative in texts:
            if (text, negative) not in empty:
                self._conds[text, bool(negative)] = next(padded)
        self._conds |= {(text, True): nothing(alike[0], 1) for text, _ in empty}
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


def _own_context(model: StableDiffusion, name: str, context: Tensor) -> Tensor:
    """A context that was given as a prompt, on the model's device and in its precision.

    Raises ValueError for a tensor that is not a context of this model.
    """
    if model.config.unet.vector is not None:
        raise ValueError(f"{name} must be a text for this model: its U-Net takes a pooled vector beside the context")
    prompt_checks.context(name, context, model.config.text[0].length, model.config.unet.context)
    return context.to(model.device, model.dtype)


def _is_plain(parts: Sequence[Subprompt]) -> bool:
    """Whether a prompt is one text in all steps."""
    return len(parts) == 1 and parts[0].weight == 1 and len(parts[0].stages) == 1


def _texts_at(prompts: Sequence[Sequence[Subprompt]], step: int) -> Texts:
    """The texts of a step, counted from 0."""
    return tuple(tuple(text_at(part.stages, step) for part in parts) for parts in prompts)
