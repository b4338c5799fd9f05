"""The examples in the modules' docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for path in sorted((ROOT / "sd").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]


def test_the_mathematics_has_examples():
    for name in ("schedule", "samplers", "denoiser", "models.unet", "models.vae", "models.text_encoder"):
        assert f"sd.{name}" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with torch.enable_grad():  # as a reader has it
        results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
