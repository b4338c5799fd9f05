"""Prompts of the book and of the figures are to be sentences of the embedded model's world."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from torch import Tensor

from scripts.toy_world.words import FUNCTION_WORDS, WORDS
from sd.pipeline import StableDiffusion

KNOWN = {*WORDS, *FUNCTION_WORDS}


def strange_words(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A set that gets every word of the prompts encoded from now on which that world does not know."""
    found: set[str] = set()
    encode = StableDiffusion.encode_prompt

    def heard(model: StableDiffusion, prompts: Sequence[str], **options: object) -> Tensor:
        found.update(word for prompt in prompts for word in re.findall(r"[\w-]+", prompt) if word not in KNOWN)
        return encode(model, prompts, **options)

    monkeypatch.setattr(StableDiffusion, "encode_prompt", heard)
    return found
