"""What encoded prompts are as inputs of the U-Net: for SDXL those of two text encoders, with a vector beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sd.conditioning import Conditioning, TextOutput
from sd.config import Config
from sd.params import SamplingParams
from sd.size_conditioning import size_embedding, sizes_for

from .cases import Case


def side_by_side(outputs: Sequence[TextOutput]) -> TextOutput:
    """What several text encoders say: hidden states (B, M, D) side by side, pooled output (B, P) of the last."""
    if len(outputs) == 1:
        return outputs[0]
    return TextOutput(torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled)


def flat(text: TextOutput) -> Tensor:
    """Both outputs as one tensor, to be compared: hidden (B, M, D), or with the pooled output (B, M D + P)."""
    return text.hidden if text.pooled is None else torch.cat([text.hidden.flatten(1), text.pooled], dim=1)


def prompt_and_negative(text: TextOutput, case: Case, config: Config) -> tuple[TextOutput, TextOutput | None]:
    """The prompt of an image and, with guidance, its empty negative prompt, from what was encoded of `PROMPTS`.

    The latter is zeros for a model that was trained so (`Config.zero_empty`): then only the prompt was encoded.
    """
    first, *others = (
        TextOutput(*(None if x is None else x[i : i + 1] for x in text))  # type: ignore[arg-type]
        for i in range(len(text.hidden))
    )
    if not case.guided:
        return first, None
    if config.zero_empty:
        return first, TextOutput(*(None if x is None else torch.zeros_like(x) for x in first))  # type: ignore[arg-type]
    return first, others[0]


def conditioning(text: TextOutput, case: Case, config: Config) -> Conditioning:
    """What the U-Net is told about an image of the case's size."""
    if text.pooled is None:
        return Conditioning(text.hidden)
    sizes = torch.tensor([sizes_for(config, SamplingParams(), case.size, case.size)])
    embedded = size_embedding(sizes).to(text.pooled).expand(len(text.pooled), -1)
    return Conditioning(text.hidden, torch.cat([text.pooled, embedded], dim=-1))
