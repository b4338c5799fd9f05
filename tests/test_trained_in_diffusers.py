"""What train.py writes, in diffusers: the same final latents as ours, of whole runs with guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import TINY, error, tiny_state
from conftest import loaded
from sdxl_common import as_ours, finish
from test_train_scripts import photos, start  # noqa: F401

from scripts import convert as convert_script
from scripts import train
from scripts.training.models import write_model
from sd import StableDiffusion
from sd.checkpoints.convert import convert
from sd.params import SamplingParams, TextToImage

diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {"sampler": "ddim", "spacing": "trailing", "steps": 5, "guidance": 4.0, "height": 64, "width": 64, "seed": 3}
THEIRS = {"height": 64, "width": 64, "num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent"}
TRAINED = ("--steps", 2, "--batch", 2, "--lr", 0.05, "--size", 64, "--samples", 0, "--export-dtype", "float32")
TRAINED += ("--precision", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the tiny model as our file and as a folder of diffusers."""
    folder = tmp_path_factory.mktemp("models")
    state = tiny_state()
    model = StableDiffusion(TINY, **loaded(state, TINY))
    write_model(model, folder / "tiny.safetensors", torch.float32)
    convert_script.save("diffusers", folder / "diffusers", convert(state, TINY), TINY, {})
    return folder


def latents_of_both(model: StableDiffusion, pipe, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    run = model.prepare(TextToImage(prompt, SamplingParams(**SETTINGS), "blurry"))
    found = pipe(prompt, negative_prompt="blurry", latents=run.start.x.clone(), **THEIRS).images
    return finish(run), found


def pipeline(files: Path):
    options = {"safety_checker": None, "requires_safety_checker": False}
    return as_ours(diffusers.StableDiffusionPipeline.from_pretrained(files / "diffusers", **options))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "more",
    [
        ("--lora-layers", "all", "--conv-rank", 2, "--lora-alpha", 2, "--train-text"),
        ("--lora-names", "peft", "--train-text"),
        ("--lora-names", "peft", "--dora", "--lora-layers", "all"),
    ],
)
def test_a_lora(more, files, photos, start, tmp_path):  # noqa: F811
    given = ["--lora", 4, "--ckpt", files / "tiny.safetensors", "--data", photos, *TRAINED, *more]
    status, _, err = start(train, *given, "--out", tmp_path)
    assert status == 0, err
    model, pipe = StableDiffusion.load(files / "tiny.safetensors", device="cpu", dtype="float32"), pipeline(files)
    plain, theirs = latents_of_both(model, pipe, "a red picture")
    assert error(plain, theirs) < 1e-4
    model.add_lora(tmp_path / "lora.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    ours, theirs = latents_of_both(model, pipe, "a red picture")
    assert error(ours, theirs) < 2e-4
    assert error(ours, plain) > 0.05


@pytest.mark.parametrize("ending", ["safetensors", pytest.param("pt", marks=pytest.mark.exhaustive)])
def test_a_word(ending, files, photos, start, tmp_path):  # noqa: F811
    given = ["--train-word", "<cat-toy>", "--vectors", 3, "--init-word", "red cat", "--word-format", ending]
    given += ["--ckpt", files / "tiny.safetensors", "--data", photos, *TRAINED]
    status, _, err = start(train, *given, "--out", tmp_path)
    assert status == 0, err
    model, pipe = StableDiffusion.load(files / "tiny.safetensors", device="cpu", dtype="float32"), pipeline(files)
    prompt = "a <cat-toy> in the snow"
    plain, _ = latents_of_both(model, pipe, prompt)
    model.add_embedding(tmp_path / f"cat-toy.{ending}", "<cat-toy>")  # of a .pt the word is the file's name
    pipe.load_textual_inversion(str(tmp_path), weight_name=f"cat-toy.{ending}", token="<cat-toy>")
    ours, theirs = latents_of_both(model, pipe, prompt)
    assert error(ours, theirs) < 2e-4
    assert error(ours, plain) > 0.02
