"""How much memory a training step takes, by the accounting: of LoRAs, SDXL and inpainting."""

from __future__ import annotations

import pytest
import torch
from test_sdxl_training import checkpoint as xl  # noqa: F401
from test_train_scripts import photos, start  # noqa: F401

from scripts import train
from scripts.training import accounting, adapters
from scripts.training.accounting import StepMemory, blank_batch
from scripts.training.objective import LossParams, Objective
from scripts.training.recipe import Recipe
from sd import StableDiffusion
from sd.config import SD1, SDXL
from sd.models.build import build
from sd.resources import EMBEDDED, resource
from sd.training import checkpoint_activations


def memory_of(config, options, size=512, checkpointing=False):
    """The accounting of a LoRA's training step for a model of which nothing but the config exists."""
    args = train.parser().parse_words(["--lora", "16", "--out", "unused", *map(str, options)])
    networks = {name: network.to(torch.bfloat16).requires_grad_(False) for name, network in build(config).items()}
    model = StableDiffusion(config, **networks)
    recipe = Recipe(batch=1, ema=0.0, optimizer="adamw")
    with accounting.without_contents():
        for name in ("unet", *config.text_names):
            accounting.empty(getattr(model, name))
        target = adapters.Adapters(args, model, recipe)
        target.set_trainable()
    encoded = not args.train_text
    objective = Objective(model, LossParams(), target.modules, with_text=not encoded)
    if checkpointing:
        checkpoint_activations(objective)
    batch = blank_batch(model, size, 1, encoded)
    return accounting.estimate(objective, target, recipe, torch.bfloat16, batch)


@pytest.mark.exhaustive
def test_a_lora_for_sd1_fits_into_six_gigabytes():
    """At 512x512, batch 1, without checkpointing, with what libraries need."""
    found = memory_of(SD1, ())
    assert found.frozen == 2 * 859_520_964
    assert found.optimizer == pytest.approx(2 * found.trained, rel=1e-3)
    assert 3e9 < found.peak < found.needed < 4.5e9


@pytest.mark.exhaustive
def test_checkpointing_saves_most_of_the_activations():
    found = [memory_of(SD1, ("--train-text",), checkpointing=saving) for saving in (False, True)]
    rest = [each.peak - each.frozen - each.trained - each.optimizer for each in found]
    assert rest[1] < 0.4 * rest[0]


@pytest.mark.exhaustive
def test_a_lora_for_sdxl_fits_into_ten_gigabytes():
    assert memory_of(SDXL, (), size=1024, checkpointing=True).needed < 10e9


def test_accounting_counts_what_is_kept_for_the_backward_pass():
    """Ten layers, of each of which two activations are kept; all of it is freed afterwards."""
    with accounting.without_contents():
        weight, x = torch.empty(1000, 1000, requires_grad=True), torch.empty(1000, 1000)
        watch = accounting.Watch()
        for tensor in (weight, x):
            watch.add(tensor)
        with watch, torch.enable_grad():
            y = x
            for _ in range(10):
                y = torch.nn.functional.silu(y @ weight)
            assert watch.now == 22 * 4_000_000
            y.sum().backward()
            del y
        assert 22 * 4_000_000 < watch.peak <= 26 * 4_000_000
        assert watch.now == 3 * 4_000_000  # weight, gradient, input


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", [("--train-text",), ("--lora", 2, "--train-text"), ("--inpaint",)])
def test_the_memory_of_sdxl(what, xl, start, tmp_path):  # noqa: F811
    """Whose dropped captions are zeros; the VAE stays only for inpainting."""
    status, out, err = start(train, "--ckpt", xl, *what, "--device", "cpu", "--estimate-memory", "--out", tmp_path)
    assert status == 0 and not err and len(out) == 7


@pytest.mark.exhaustive
def test_inpainting_needs_the_vae_in_memory(start, tmp_path, monkeypatch):  # noqa: F811
    estimate, frozen = accounting.estimate, []

    def noted(*given):
        frozen.append(estimate(*given).frozen)
        return StepMemory(0, 0, 0, 0)

    monkeypatch.setattr(accounting, "estimate", noted)
    for more in ((), ("--inpaint",)):
        given = ("--ckpt", resource(EMBEDDED), "--device", "cpu", "--estimate-memory", "--out", tmp_path)
        assert start(train, *given, *more)[0] == 0
    model = StableDiffusion.load(device="cpu", dtype="float32")
    assert frozen[1] - frozen[0] == sum(p.nbytes for p in model.vae.parameters())


@pytest.mark.exhaustive
def test_the_program_tells_the_memory(photos, start, tmp_path):  # noqa: F811
    status, out, err = start(
        train, "--lora", 4, "--data", photos, "--device", "cpu", "--estimate-memory", "--out", tmp_path / "run"
    )
    assert status == 0, err
    assert out[0] == "LoRA of rank 4 (U-Net) for pocket, 8 of 128x128 pixels, bfloat16"
    assert out[1].startswith("frozen weights") and out[1].endswith("0.01 GB") and len(out) == 7
    assert not (tmp_path / "run" / "state.pt").exists()
