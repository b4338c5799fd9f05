"""From encoded prompts to inputs of the U-Net: for SDXL, the outputs of two text encoders and a vector."""

from __future__ import annotations

import torch
from torch import Tensor

from sd.conditioning import Conditioning, TextOutput
from sd.config import Config
from sd.params import SamplingParams
from sd.size_conditioning import sizes_for, with_sizes

from .cases import Case


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
    return with_sizes(text, sizes_for(config, SamplingParams(), case.size, case.size))
