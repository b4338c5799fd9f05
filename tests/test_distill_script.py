"""distill.py as a user meets it: full weights and LoRAs, runs that stop and go on, options that cannot be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_train_scripts import QUICK, SMALL, interrupt_at, photos, same, start  # noqa: F401
from training_common import batch_of

from scripts import distill
from scripts.training.loop import Recipe
from scripts.training.models import write_model
from scripts.training.processes import Processes
from scripts.training.state import load_state
from sd import StableDiffusion
from sd.conditioning import Conditioning
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.models.vae import VAE
from sd.training import LoraParams, TrainableLora, lora_layers, solver_timesteps

KINDS = {
    "weights": (),
    "lora": ("--lora-rank", 2, "--method", "tcd", "--accumulate", 2),
    "told": ("--target", "student", "--guidance", 2, 6, "--huber", 0.01, "--solver-steps", 100, "--skip", 2),
}


def model_of(config) -> StableDiffusion:
    torch.manual_seed(0)
    parts = TextEncoder(config.text[0]), VAE(config.vae), UNet(config.unet)
    return StableDiffusion(config, *(part.requires_grad_(False).eval() for part in parts))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "small.safetensors"
    write_model(model_of(replace(SMALL, guidance=3.0)), path, torch.float32)
    return path


@pytest.fixture
def options(teacher, photos):  # noqa: F811
    return ("--ckpt", teacher, "--data", photos, *QUICK, "--log-every", 4, "--samples", 0, "--export-dtype", "float32")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("weights", "told"))]
)
def test_a_resumed_run_equals_an_uninterrupted_one(kind, options, start, tmp_path, monkeypatch):  # noqa: F811
    given = [*options, *KINDS[kind], "--steps", 2]
    assert start(distill, *given, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0)
        assert start(distill, *given, "--out", tmp_path / "parts")[0] == 130
    assert load_state(tmp_path / "parts" / "state.pt")["step"] == 1
    assert start(distill, "--out", tmp_path / "parts", "--resume")[0] == 0
    whole, parts = (load_state(tmp_path / folder / "state.pt") for folder in ("whole", "parts"))
    assert same(whole, parts) and whole["step"] == 2
    name = "lora.safetensors" if kind == "lora" else "model.safetensors"
    assert same(*(load_file(tmp_path / folder / name) for folder in ("whole", "parts")))


def test_weights_are_a_model_of_few_steps(teacher, options, start, tmp_path):  # noqa: F811
    """Its defaults are the sampler's steps, and no guidance; text encoder and VAE are the teacher's."""
    status, out, _ = start(distill, *options, "--lr", 1e-3, "--steps", 2, "--out", tmp_path)
    assert status == 0
    assert out[-1] == f"{tmp_path / 'model.safetensors'}: small LCM, for --ckpt of every program"
    model = StableDiffusion.load(tmp_path / "model.safetensors", device="cpu", dtype="float32")
    config = model.config
    assert (config.sampler, config.spacing, config.steps, config.guidance) == ("lcm", "lcm", 4, 1.0)
    before, after = load_file(teacher), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"unet"}
    # a distilled model is no teacher
    again = ["--ckpt", tmp_path / "model.safetensors", *options[2:], "--steps", 1, "--out", tmp_path / "again"]
    status, _, err = start(distill, *again)
    assert status == 1 and "small LCM is already a few-step model" in err[-1]


def test_a_lora_is_for_the_teacher(teacher, options, start, tmp_path):  # noqa: F811
    """Merged into it, it is what the run had: W + B A of the averaged A and B in its state."""
    given = ["--lora-rank", 2, "--lora-alpha", 1, "--method", "tcd", "--steps", 2, "--solver-steps", 8]
    status, out, _ = start(distill, *options, *given, "--out", tmp_path)
    assert status == 0 and out[-1].endswith("lora.safetensors: a LoRA of the U-Net, for --lora of every program")
    assert not (tmp_path / "model.safetensors").exists()
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "small TCD LoRA" and metadata["ss_network_dim"] == "2"
    model = StableDiffusion.load(teacher, device="cpu", dtype="float32")
    lora = TrainableLora(model.unet, lora_layers(model.unet), LoraParams(2, 1.0))
    average = load_state(tmp_path / "state.pt")["ema"]["average"]
    lora.load_state_dict({key.removeprefix("student.lora."): value for key, value in average.items()})
    expected = lora.merged(model.unet.state_dict())
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    with pytest.warns(UserWarning, match="lora is a TCD LoRA: 4 steps, sampler tcd, guidance 1"):
        model.add_lora(tmp_path / "lora.safetensors")
    assert model.defaults.spacing == "trailing"  # not the spacing of most TCD LoRAs: the grid has 8 timesteps
    for key, weight in model.unet.state_dict().items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-6)
    assert sum(not torch.equal(before[key], value) for key, value in expected.items()) == len(lora.names)


@pytest.mark.exhaustive
def test_an_inpainting_model_stays_one(photos, start, tmp_path):  # noqa: F811
    """Mask and masked latent go to the teacher, with and without the prompt, and to the student."""
    config = replace(SMALL, guidance=3.0, unet=replace(SMALL.unet, in_channels=9))
    write_model(model_of(config), tmp_path / "inpaint.safetensors", torch.float32)
    given = ["--ckpt", tmp_path / "inpaint.safetensors", "--data", photos, *QUICK, "--samples", 0, "--steps", 2]
    assert start(distill, *given, "--out", tmp_path / "out")[0] == 0
    assert StableDiffusion.load(tmp_path / "out" / "model.safetensors", device="cpu").is_inpainting


def test_a_range_of_guidance_is_told_to_the_student(options, start, tmp_path):  # noqa: F811
    assert start(distill, *options, *KINDS["told"], "--steps", 2, "--lr", 1e-2, "--out", tmp_path)[0] == 0
    model = StableDiffusion.load(tmp_path / "model.safetensors", device="cpu", dtype="float32")
    assert model.config.unet.guidance == 256 and model.config.guidance == 3.0  # the teacher's own
    assert model.unet.guidance.weight.abs().sum() > 0  # it began at zero
    x, cond = torch.randn(1, 4, 8, 8), Conditioning(torch.randn(1, 77, 32))
    low, high = (model.unet(x, torch.tensor([499.0]), cond.with_guidance(scale)) for scale in (2.0, 6.0))
    assert not torch.equal(low, high)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_target_is_the_average_and_the_teacher_stays(rank, teacher):
    """Of a student that has learned: its average is neither it nor the teacher."""
    model = StableDiffusion.load(teacher, device="cpu", dtype="float32")
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([20, 900]), Conditioning(torch.randn(2, 77, 32))
    before = model.unet(x, t, cond)
    args = distill.parser().parse_args(["--lora-rank", "2"] if rank else [])
    student = distill.make_student(args, model.unet, (3.0, 3.0), seed=0)
    of_teacher = student.without_lora if rank else model.unet
    objective = distill.Objective(student, of_teacher, model, "lcm", 1e-3)
    torch.testing.assert_close(objective.target(x, t, cond), before, rtol=1e-3, atol=1e-4)  # at first all are the same
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * p.requires_grad
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert all(name.startswith("student.lora." if rank else "student.unet.") for name in trained)
    objective.average = {name: p + 0.01 for name, p in trained.items()}
    expected = student.network({**objective.state_dict(), **objective.average})(x, t, cond)
    torch.testing.assert_close(objective.target(x, t, cond), expected, rtol=1e-3, atol=1e-4)
    for other in (student(x, t, cond), before):
        assert not torch.allclose(other, expected, atol=1e-2)
    torch.testing.assert_close(objective.networks["teacher"](x, t, cond), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lcm", "tcd"])
def test_items_that_fill_up_a_part_do_not_count(method, teacher):
    """Of three images for two processes with a batch of two, the second has one again, with the weight 0."""
    model = StableDiffusion.load(teacher, device="cpu", dtype="float32")
    student = distill.make_student(distill.parser().parse_args([]), model.unet, (3.0, 3.0), seed=0)
    with torch.no_grad():
        student.unet.conv_out.weight += 0.1
    objective = distill.Objective(student, model.unet, model, method, 1e-3)
    x0, noise = torch.randn(2, 4, 4, 8, 8)
    t, u, s = torch.tensor([[999, 500, 300, 900], [900, 400, 200, 800], [600, -1, 100, 0]])
    ids = model.tokenizer(["a", "b", "c", "a"])

    def loss(count: int, weight: list[float]) -> float:
        batch = batch_of(x0[:count], ids[:count], t[:count], noise[:count])._replace(weight=torch.tensor(weight))
        return objective(batch, u[:count], s[:count], torch.full((count,), 3.0)).item()

    alone = loss(3, [1.0] * 3)
    assert alone > 1e-3 and loss(4, [4 / 3] * 3 + [0.0]) == pytest.approx(alone, rel=1e-4)
    assert loss(4, [1.0] * 4) != pytest.approx(alone, rel=1e-2)


class Parts:
    """Batches without data."""

    def __init__(self, processes: Processes) -> None:
        self.recipe, self.processes, self.steps = Recipe(batch=500, accumulate=2), processes, 1000

    def draw(self, number: int, what: str, rows: int) -> torch.Tensor:
        return torch.rand(rows, 500, generator=torch.Generator().manual_seed(10_000 + number))

    def __call__(self, step: int):
        for number in (2 * step, 2 * step + 1):
            x = torch.zeros(500, 1, 1, 1)
            t = torch.randint(0, 1000, (500,), generator=torch.Generator().manual_seed(number))
            yield {"batch": batch_of(x, torch.zeros(500, 1), t, x)}


@pytest.mark.parametrize("skip", [1, 3])
def test_times_of_a_step(skip):
    """All t of the grid are as likely; u is `skip` places lower; s is uniform up to u, guidance in its range."""
    grid = solver_timesteps(model_of(SMALL).schedule, 10)
    batches = distill.SolverBatches(Parts(Processes(torch.device("cpu"))), grid, (2.0, 6.0), skip)
    parts = [part for step in range(4) for part in batches(step)]
    t = torch.cat([part["batch"].t for part in parts])
    u, s, guidance = (torch.cat([part[name] for part in parts]) for name in ("u", "s", "guidance"))
    assert len(t) == 4000 and set(t.tolist()) == set(grid[1:])
    assert all(abs((t == each).sum() - 400) < 90 for each in grid[1:])
    assert torch.equal(u, (t - 100 * skip).clamp(min=-1))
    assert (s <= u).all() and set(s.tolist()) == set(grid[: 11 - skip])
    top = s[t == 999]
    assert all(abs((top == each).sum() - len(top) / (11 - skip)) < 30 for each in grid[: 11 - skip])
    assert 2 <= guidance.min() < 2.1 and 5.9 < guidance.max() <= 6 and abs(guidance.mean() - 4) < 0.1
    assert same(list(batches(1)), list(batches(1))) and not same(list(batches(1)), list(batches(2)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--solver-steps", 7), "solver steps must divide the 1000 timesteps of the model, got 7"),
        (("--guidance", 6, 2), "--guidance must be one number from 0 to 100, or two, the lower first, got [6.0, 2.0]"),
        (("--guidance", 1, 2, 3), "--guidance must be one number"),
        (("--guidance", math.nan), "--guidance must be one number"),
        (("--lora-rank", 0), "--lora-rank must be at least 1, --lora-alpha above 0"),
        (("--lora-rank", 4, "--lora-alpha", 0), "--lora-rank must be at least 1, --lora-alpha above 0"),
        (("--lora-alpha", 2), "--lora-alpha goes with --lora-rank"),
        (("--lora-rank", 4, "--guidance", 2, 6), "a LoRA has no input for a range of guidance"),
        (("--huber", 0), "--huber above 0"),
        (("--skip", 0), "--phrasings, --skip and --substeps must be at least 1"),
        (("--substeps", 0), "--phrasings, --skip and --substeps must be at least 1"),
        (("--target", "average", "--ema", 0), "--target average needs an average of the weights: --ema above 0, or"),
        (("--method", "turbo"), "--method"),
        (("--data", "nowhere"), "--data nowhere: no such folder"),
        (("--ckpt", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_is_one_line(given, words, options, start, tmp_path):  # noqa: F811
    status, _, err = start(distill, *options, *given, "--out", tmp_path / "out")
    assert status != 0 and words in err[-1] and len([line for line in err if "rror" in line]) <= 1, err
    assert not list(tmp_path.glob("out/*.*"))
