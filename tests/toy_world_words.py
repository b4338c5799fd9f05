"""Prompts of the book and of the figures are to be sentences of the embedded model's world."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from scripts.toy_world.words import FUNCTION_WORDS, WORDS
from sd.conditioning import TextOutput
from sd.pipeline import StableDiffusion
from sd.prompts import TextBatch

KNOWN = {*WORDS, *FUNCTION_WORDS}


def strange_words(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A set that gets every word of the prompts encoded from now on which that world does not know."""
    found: set[str] = set()
    encode = StableDiffusion.encode_batches  # which `encode_prompt`, `conditioning` and runs call

    def heard(model: StableDiffusion, batches: Sequence[TextBatch], **options: Any) -> list[TextOutput]:
        texts = [text for batch in batches for text in batch.texts]
        found.update(word for text in texts for word in re.findall(r"[\w-]+", text) if word not in KNOWN)
        return encode(model, batches, **options)

    monkeypatch.setattr(StableDiffusion, "encode_batches", heard)
    return found
