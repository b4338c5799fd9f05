"""From the prompts of a request to what guides each step of a run: encoded once, before the first step.

    prompts -> texts of every step -> conditionings, one for each text -> `Guide` of every step

Without the web UI's syntax, and with it as long as no prompt changes or has an AND, all steps have the same guide;
changing_prompts.py handles all other prompts.

What a network is told about a text (`TextEncoding`):

    context   the hidden states of all text encoders, side by side
    vector    for SDXL: the pooled output of the last one, then the size conditioning, for each of the numbers in
              `Config.sizes` an embedding like that of a timestep (size_conditioning.py)

A run encodes all of its texts in one call of `encode_batches`: with `low_memory` each text encoder takes its turn on
the device once, however many texts there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import prompt_checks
from .adapters.added import Adapters
from .changing_prompts import Pass, Plan, of_one_length
from .conditioning import Conditioning, Guide, TextOutput
from .config import Config
from .models.text_encoder import TextEncoder, layers_of_clip_skip
from .params import ResolvedParams, SamplingParams, TextToImage
from .second_prompts import SecondTexts
from .size_conditioning import sizes_for, with_sizes
from .text.prompt_syntax import Rows, emphasised, rows, same_length, single_text
from .text.tokenizer import Note, Tokenizer, warn

if TYPE_CHECKING:
    from .pipeline import StableDiffusion


class TextBatch(NamedTuple):
    """Texts that are encoded together."""

    texts: Sequence[str]
    second: Sequence[str] | None = None  # as many for the second text encoder, if it reads others

    def singly(self) -> list[TextBatch]:
        """Each text as a batch of its own."""
        second = [None] * len(self.texts) if self.second is None else [[text] for text in self.second]
        return [TextBatch([text], other) for text, other in zip(self.texts, second, strict=True)]


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

        second   B texts for the second text encoder, if it reads others
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if web_ui_prompts:
            prompts = [single_text(p, note) for p in prompts]
        if second is not None:
            second = prompt_checks.second("second", second, prompts)
        if web_ui_prompts:
            return self.encode_weighted(prompts, second=second, clip_skip=clip_skip, note=note)
        return self.encode_batches([TextBatch(prompts, second)], clip_skip=clip_skip, note=note)[0]

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
        return self.encode_batches([TextBatch(texts, second)], weighted=True, clip_skip=clip_skip, note=note)[0]

    def encode_batches(
        self, batches: Sequence[TextBatch], *, weighted: bool = False, clip_skip: int | None = None, note: Note = warn
    ) -> list[TextOutput]:
        """Encode several batches of texts, each as one: first all of them with one text encoder, then with the next.

        weighted   as `encode_weighted`, and the contexts of all batches have the length of the longest
        """
        if not batches:
            return []
        read: list[list[Rows]] = []
        if weighted:
            read = self._rows(batches)
            ids = [[tokens for tokens, _ in each] for each in read]
        else:  # what does not fit is said once, or for each of two texts
            ids = [
                [
                    tokenizer(texts if i == 0 else second or texts, note if i == 0 or second else _silent)
                    for i, tokenizer in enumerate(self.tokenizers)
                ]
                for texts, second in batches
            ]
        outputs = self._encode(ids, clip_skip, note)
        if weighted:
            outputs = [
                [self._emphasised(output, row.weights, len(texts)) for output, row in zip(own, each, strict=True)]
                for (texts, _), own, each in zip(batches, outputs, read, strict=True)
            ]
        return [TextOutput.joined(own) if len(own) > 1 else own[0] for own in outputs]

    def _rows(self, batches: Sequence[TextBatch], chunks: int = 1) -> list[list[Rows]]:
        """The tokens of each batch and their weights, for each text encoder: equally many chunks of all texts."""
        found = [
            [rows(tokenizer, second or texts if i else texts, chunks) for i, tokenizer in enumerate(self.tokenizers)]
            for texts, second in batches
        ]
        counts = {
            len(ids) // len(b.texts) for b, each in zip(batches, found, strict=True) for ids, _ in each if b.texts
        }
        return found if len(counts) < 2 else self._rows(batches, max(counts))

    def _encode(self, batches: Sequence[Sequence[Tensor]], clip_skip: int | None, note: Note) -> list[list[TextOutput]]:
        """For each batch the token ids (B, M) for each text encoder -> their outputs."""
        config = self.config
        layers = None if clip_skip is None else layers_of_clip_skip(config.text, clip_skip, note)
        if any(tokenizer.added for tokenizer in self.tokenizers):
            self._adapters.words.keep()
        outputs: list[list[TextOutput]] = [[] for _ in batches]
        for i, name in enumerate(self._text_names):
            layer = () if layers is None else (layers[i],)  # an encoder of one's own need not know about layers
            with torch.no_grad(), self._use(name) as encoder:
                for ids, found in zip(batches, outputs, strict=True):
                    found.append(cast(TextEncoder, encoder)(ids[i].to(self.device), *layer))
        return outputs

    def _emphasised(self, output: TextOutput, weights: Tensor, count: int) -> TextOutput:
        """The output of an encoder for the chunks of `count` texts, weighted -> that for these texts."""
        context, pooled = output
        if (weights != 1).any():
            context = emphasised(context, weights.to(self.device))
        if not count:
            return output
        chunks = len(context) // count
        return TextOutput(context.reshape(count, -1, context.shape[-1]), None if pooled is None else pooled[::chunks])

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
        if sizes is None:
            sizes = sizes_for(config, SamplingParams(), config.size, config.size)
        return with_sizes(text, sizes)

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
        return same_length(contexts, lambda: self.encode_prompt([""], clip_skip=clip_skip, note=_silent))


def _silent(message: str) -> None:
    """Discard a note."""


def guides(
    model: StableDiffusion, request: TextToImage, params: ResolvedParams, run: Pass, note: Callable[[str], object]
) -> list[Guide]:
    """The guide of each step that is taken, at least one; steps of equal guides share the same object.

    `note` receives what was left out of the prompts. Raises ValueError for prompts that cannot be read, and contexts
    that do not fit the model.
    """

    def encode(wanted: Sequence[tuple[TextBatch, bool]]) -> list[Conditioning]:
        """For each batch of texts, which are negative or not, its conditioning; contexts of one length."""
        if params.exact and any(len(batch.texts) > 1 for batch, _ in wanted):
            each = iter(encode([(one, negative) for batch, negative in wanted for one in batch.singly()]))
            return [Conditioning.joined([next(each) for _ in batch.texts]) for batch, _ in wanted]
        found = model.encode_batches(
            [batch for batch, _ in wanted], weighted=request.web_ui_prompts, clip_skip=request.clip_skip, note=note
        )
        if model.config.unet.vector is None:
            return [Conditioning(text.hidden) for text in found]
        return [
            model.with_sizes(text, sizes_for(model.config, params, *run.size, negative=negative))
            for text, (_, negative) in zip(found, wanted, strict=True)
        ]

    def encode_alone(texts: Sequence[tuple[str, bool]]) -> list[Conditioning]:
        return encode([(TextBatch([text]), negative) for text, negative in texts])

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
        plan = Plan(model, request, params, prompts, negatives, run, note)
        if not plan.is_plain:
            if second is not None:
                second.check_unused()
            plan.note_late_edits(run, note)
            return plan.guides(run.taken, encode_alone, nothing)
        prompts, negatives = plan.first_texts()
    others: list[list[str] | None] = [None, None]
    if second is not None:
        prompts, others[0] = second.beside(prompts, negative=False)
        negatives, others[1] = second.beside(negatives, negative=True)
    wanted = [] if isinstance(prompts, Tensor) else [(TextBatch(prompts, others[0]), False)]
    guided = params.is_guided and model.config.unet.guidance is None
    zeros: list[bool] = []  # which negative prompts are zeros in place of the encoded empty text
    if guided and not isinstance(negatives, Tensor):
        if model.config.zero_empty:
            zeros = [not "".join(texts).strip() for texts in zip(negatives, others[1] or negatives, strict=True)]
        if not zeros or not all(zeros):
            wanted.append((TextBatch(negatives, others[1]), True))
    encoded = iter(encode(wanted))
    cond = Conditioning(prompts) if isinstance(prompts, Tensor) else next(encoded)
    uncond = None
    if guided:
        if isinstance(negatives, Tensor):
            uncond = Conditioning(negatives)
        else:
            uncond = nothing(cond, len(zeros)) if zeros and all(zeros) else next(encoded)
        if uncond.context.shape[1] != cond.context.shape[1]:  # one of them was given
            cond, uncond = of_one_length(model, [cond, uncond], request.clip_skip)
        if any(zeros) and not all(zeros):
            uncond = model.zeroed(uncond, zeros)
        if len(uncond.context) > 1:  # one for each prompt
            uncond = uncond.repeat_each(params.n)
    return [Guide(cond.repeat_each(params.n) if params.n > 1 else cond, uncond)] * max(run.taken, 1)


def _own_context(model: StableDiffusion, name: str, context: Tensor) -> Tensor:
    """A context that was given as a prompt, on the model's device and in its precision.

    Raises ValueError for a tensor that is not a context of this model.
    """
    if model.config.unet.vector is not None:
        raise ValueError(f"{name} must be a text for this model: its U-Net also takes a vector (pooled text and sizes)")
    prompt_checks.context(name, context, model.config.text[0].length, model.config.unet.context)
    return context.to(model.device, model.dtype)
