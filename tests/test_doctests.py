"""The examples in the modules' docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    "config", "schedule", "samplers", "layers", "unet", "denoiser", "model", "pipeline", "inpainting", "text_encoder",
    "tokenizer", "vae", "image", "image_files", "preview", "settings", "device", "training", "kernels", "capture",
    "turns", "strips", "loading", "prompts", "lora", "files", "resources",
    *(f"checkpoints.{name}" for name in ("checkpoint", "identity", "convert", "keys", "weight_shapes", "census")),
]  # fmt: skip
MODULES += sorted(f"study.{path.stem}" for path in (ROOT / "sd" / "study").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with torch.enable_grad():  # as a reader has it
        results = doctest.testmod(importlib.import_module(f"sd.{name}"), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
