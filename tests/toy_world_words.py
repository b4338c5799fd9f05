"""Prompts of the book and of the figures are to be sentences of the embedded model's world."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from scripts.toy_world.words import FUNCTION_WORDS, WORDS
from sd.conditioning import TextOutput
from sd.pipeline import StableDiffusion

KNOWN = {*WORDS, *FUNCTION_WORDS}


def strange_words(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A set that gets every word of the prompts encoded from now on which that world does not know."""
    found: set[str] = set()
    encode = StableDiffusion.encode_texts  # which `encode_prompt`, `conditioning` and runs call

    def heard(model: StableDiffusion, prompts: str | Sequence[str], **options: object) -> TextOutput:
        texts = [prompts] if isinstance(prompts, str) else prompts
        found.update(word for text in texts for word in re.findall(r"[\w-]+", text) if word not in KNOWN)
        return encode(model, prompts, **options)

    monkeypatch.setattr(StableDiffusion, "encode_texts", heard)
    return found
