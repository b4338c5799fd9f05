"""The examples in the modules' docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

MODULES = [
    "config", "schedule", "samplers", "layers", "unet", "denoiser", "model", "pipeline", "inpainting", "text_encoder",
    "tokenizer", "vae", "image", "image_files", "preview", "settings", "device", "training", "study.text",
    "study.latent", "study.network", "study.attention", "study.influence", "study.grids", "study.mixing",
    "study.editing",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with torch.enable_grad():  # as a reader has it
        results = doctest.testmod(importlib.import_module(f"sd.{name}"), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
