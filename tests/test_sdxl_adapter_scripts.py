"""LoRA and embedding files with an SDXL model, by the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sdxl_common import (
    FC1,
    pair,
    tiny_xl,
    two,
    write_models,
)

from scripts import txt2img
from sd import StableDiffusion


@pytest.fixture(scope="module")
def shared() -> StableDiffusion:
    return tiny_xl()


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("tiny-sdxl"), shared)


@pytest.fixture
def generate(folder, tmp_path, capsys, monkeypatch):
    """Runs txt2img beside the files; gives status, lines of stdout and stderr, and the image."""
    monkeypatch.chdir(folder)
    name = f"lora_te2_text_model_{FC1}"
    lora = {f"{name}.lora_down.weight": torch.full((1, 96), 0.1), f"{name}.lora_up.weight": torch.ones(384, 1)}
    save_file(lora, folder / "ink.safetensors")
    save_file(lora, folder / "sdxl_lightning_4step_lora.safetensors")
    save_file(two(2), folder / "toy.safetensors")
    old = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(pair(old, 768, 128), folder / "old.safetensors")
    save_file({"emb_params": torch.zeros(1, 768)}, folder / "easy.safetensors")

    def run(*args: str):
        size = ["--height", "64", "--width", "64", "--seed", "1", "--dtype", "float32", "--device", "cpu"]
        steps = [] if "--steps" in args or "sdxl_lightning_4step_lora.safetensors" in args else ["--steps", "2"]
        status = txt2img.main([*args, *size, *steps, "--out", str(tmp_path / "out"), "--ckpt", "tiny.safetensors"])
        printed = capsys.readouterr()
        made = sorted((tmp_path / "out").glob("*.png")) if (tmp_path / "out").is_dir() else []
        return status, printed.out.splitlines(), printed.err.splitlines(), Image.open(made[-1]) if made else None

    return run


@pytest.mark.exhaustive
def test_loras_on_the_command_line(generate):
    _, _, _, plain = generate("a cat")
    status, out, err, merged = generate("a cat", "--lora", "ink.safetensors:0.5")
    assert (status, err) == (0, []) and "LoRA ink, weight 0.5" in out
    status, out, err, named = generate("a cat <lora:ink:0.5>", "--web-ui-prompts", "--lora-dir", ".")
    assert (status, err) == (0, []) and "LoRA ink, weight 0.5" in out
    assert plain.tobytes() != merged.tobytes() == named.tobytes()
    status, out, err, image = generate("a cat", "--lora", "sdxl_lightning_4step_lora.safetensors")
    line = "sdxl_lightning_4step_lora is an SDXL-Lightning LoRA: 4 steps, sampler euler, guidance 1"
    assert (status, err) == (0, []) and line in out
    assert "Steps: 4, Sampler: Euler" in image.text["parameters"]


@pytest.mark.exhaustive
def test_embeddings_on_the_command_line(generate):
    _, _, _, plain = generate("a toy")
    status, out, err, image = generate("a toy", "--embedding", "toy.safetensors")
    assert (status, err) == (0, []) and "embedding toy, vectors: 2" in out
    assert 'TI hashes: "toy: ' in image.text["parameters"] and image.tobytes() != plain.tobytes()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "args, message",
    [
        (("--lora", "old.safetensors"), "old.safetensors: made for Stable Diffusion 1.x, whose U-Net expects"),
        (("--embedding", "easy.safetensors"), "easy.safetensors: an embedding for Stable Diffusion 1.x: its vectors"),
    ],
)
def test_files_for_other_models_are_one_line(args, message, generate):
    status, _, err, image = generate("a cat", *args)
    assert status != 0 and len(err) == 1 and message in err[0] and image is None
