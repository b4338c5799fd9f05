"""Training: losses against their closed forms, EMA, prompt dropout, a run that learns; the drawn world."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from scripts.train_vae import load_state, save_state
from scripts.world import COLOURS, NAMES, PLACES, Scene, Thing, caption, draw, example, random_scene
from sd.config import POCKET, ScheduleConfig, UNetConfig
from sd.schedule import Schedule
from sd.text_encoder import TextEncoder
from sd.training import (
    EMA,
    diffusion_loss,
    drop_prompts,
    initialise_text_encoder,
    initialise_unet,
    learning_rate,
    level_batch,
    vae_loss,
    velocity_weight,
)
from sd.unet import UNet


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_diffusion_loss_is_its_closed_form(prediction):
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    x0, noise = (torch.randn(3, 4, 2, 5, generator=rng(i)) for i in (1, 2))
    context = torch.randn(3, 7, 6, generator=rng(3))
    t = torch.tensor([0, 500, 999])
    calls = []

    def network(x, t, context):
        calls.append((x, t, context))
        return 0.5 * x + 0.1

    loss = diffusion_loss(network, schedule, x0, context, t, noise)

    expected = 0.0
    for i, step in enumerate(t.tolist()):  # sample by sample, with the scalar arithmetic of the schedule
        alpha_bar = float(np.prod(1 - schedule.betas[: step + 1]))
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x = alpha * x0[i] + sigma * noise[i]
        target = noise[i] if prediction == "eps" else alpha * noise[i] - sigma * x0[i]
        expected += (0.5 * x + 0.1 - target).square().mean().item() / 3
        torch.testing.assert_close(calls[0][0][i], x)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert calls[0][1] is t and calls[0][2] is context


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_diffusion_loss_of_the_truth_is_zero(prediction):
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    x0, noise = (torch.randn(2, 4, 3, 3, generator=rng(i)) for i in (1, 2))
    t = torch.tensor([3, 700])
    truth = schedule.target(x0, noise, level_batch(schedule, t))
    assert diffusion_loss(lambda *_: truth, schedule, x0, torch.zeros(2, 1, 1), t, noise).item() == 0


def test_level_batch_agrees_with_level():
    schedule = Schedule()
    batch = level_batch(schedule, torch.tensor([0, 17, 999]))
    assert batch.alpha.shape == batch.sigma.shape == (3, 1, 1, 1)
    for i, t in enumerate((0, 17, 999)):
        level = schedule.level(t)
        assert batch.alpha[i].item() == pytest.approx(level.alpha, rel=1e-6)
        assert batch.sigma[i].item() == pytest.approx(level.sigma, rel=1e-6)


def test_vae_loss_is_its_closed_form():
    image, decoded = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    mean, logvar = torch.full((2, 4, 1, 1), 2.0), torch.full((2, 4, 1, 1), math.log(0.25))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(2.0, 0.5), torch.distributions.Normal(0.0, 1.0))
    assert vae_loss(image, decoded, mean, logvar, 0.1).item() == pytest.approx(0.5 + 0.25 + 0.1 * kl.item(), rel=1e-6)
    assert vae_loss(image, image, torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1), 1.0).item() == 0


def test_ema_follows_its_formula():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = EMA(module, decay=0.5)
    expected = 0.0
    for n, value in enumerate((1.0, 4.0, -2.0, 3.0, 3.0, 8.0, 1.0, 1.0, 1.0), start=1):
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 1.0  # the weights themselves stay as they are

    other = EMA(nn.Linear(1, 1, bias=False), decay=0.5)
    other.load_state_dict(ema.state_dict())
    ema.update(module), other.update(module)
    assert other.average["weight"].item() == ema.average["weight"].item()
    with pytest.raises(ValueError, match="decay"):
        EMA(module, decay=1.0)


def test_prompts_are_dropped_at_the_given_rate():
    prompts = [f"prompt {i}" for i in range(5000)]
    kept = drop_prompts(prompts, 0.1, Random(0))
    assert all(b in ("", a) for a, b in zip(prompts, kept, strict=True))
    assert 400 < kept.count("") < 600
    assert drop_prompts(prompts, 0.0, Random(0)) == prompts


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 100, 2.0, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_weighted_loss_of_eps_is_the_loss_of_v():
    """The same guess of x0, said as eps and as v: with the weight both losses are equal."""
    eps, v = Schedule(ScheduleConfig(prediction="eps")), Schedule(ScheduleConfig(prediction="v"))
    x0, noise, guess = (torch.randn(3, 4, 2, 2, generator=rng(i)) for i in (1, 2, 3))
    t, context = torch.tensor([300, 600, 990]), torch.zeros(3, 1, 1)
    alpha, sigma = level_batch(eps, t)[1:]

    def says_eps(x, *_):
        return (x - alpha * guess) / sigma

    def says_v(x, *_):
        return (alpha * x - guess) / sigma

    weighted = diffusion_loss(says_eps, eps, x0, context, t, noise, velocity_weight(eps, t))
    expected = diffusion_loss(says_v, v, x0, context, t, noise)
    assert weighted.item() == pytest.approx(expected.item(), rel=1e-3)
    assert weighted.item() != pytest.approx(diffusion_loss(says_eps, eps, x0, context, t, noise).item(), rel=0.1)
    assert torch.equal(velocity_weight(v, t), torch.ones(3))


def test_a_new_unet_predicts_zero():
    torch.manual_seed(0)
    unet = UNet(replace(POCKET.unet, context=8))
    initialise_unet(unet)
    assert unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 8)).abs().max() == 0


def test_a_new_text_encoder_tells_prompts_apart():
    """The words must be as loud as the positions from the start, or the U-Net learns to ignore them."""
    torch.manual_seed(0)
    text_encoder = TextEncoder(POCKET.text)
    initialise_text_encoder(text_encoder)
    ids = torch.full((2, POCKET.text.length), POCKET.text.pad)
    ids[0, 1:6], ids[1, 1:6] = torch.arange(100, 105), torch.arange(200, 205)
    first, second = text_encoder(ids)
    assert (first[1:6] - second[1:6]).square().mean() > 0.5
    assert (first[-1] - second[-1]).square().mean() > 0.01  # the end knows what came before it


@torch.enable_grad()
def test_training_learns():
    """A tiny U-Net learns four latents by heart: the loss falls to a fraction."""
    torch.manual_seed(0)
    schedule = Schedule()
    config = UNetConfig(channels=(32, 64), heads=(1, 2), attention=(False, True), blocks=1, context=8)
    unet = UNet(config)
    initialise_unet(unet)
    x0, context = torch.randn(4, 4, 8, 8, generator=rng(1)), torch.randn(4, 3, 8, generator=rng(2))
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3, weight_decay=0.0)
    random = rng(3)
    losses = []
    for _ in range(80):
        t = torch.randint(200, 1000, (4,), generator=random)
        loss = diffusion_loss(unet, schedule, x0, context, t, torch.randn(x0.shape, generator=random))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=0.15)  # it begins with predicting zero, and noise has variance 1
    assert sum(losses[-10:]) / 10 < 0.35


def test_state_survives_being_written(tmp_path):
    path = tmp_path / "state.pt"
    for step in (1, 2):
        save_state({"step": step, "weights": {"a": torch.arange(3.0)}}, path)
    state = load_state(path)
    assert state["step"] == 2 and torch.equal(state["weights"]["a"], torch.arange(3.0))
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left
    path.write_bytes(b"not a state")
    with pytest.raises(ValueError, match=r"state\.pt: not a training state"):
        load_state(path)


def test_scenes_depend_on_the_seed_alone():
    for seed in range(3):
        (scene, image), (again, same) = example(seed), example(seed)
        assert scene == again and image.tobytes() == same.tobytes()
        assert image.size == (POCKET.size, POCKET.size)
    assert example(0)[1].tobytes() != example(1)[1].tobytes()


def test_captions_say_what_is_drawn():
    with_place = 0
    for seed in range(300):
        scene = random_scene(Random(seed))
        text = caption(scene, Random(seed))
        for thing in scene.things:
            assert any(f"{thing.colour} {name}" in text for name in NAMES[thing.kind]), (text, thing)
            assert ("big" in text or "large" in text) or thing.size != "big"
        place = PLACES[scene.place]
        with_place += any(words in text for words in (*place.nouns, *place.phrases))
    assert with_place > 240


@pytest.mark.parametrize("kind", NAMES)
def test_things_are_drawn_in_their_colour_at_their_place(kind):
    def pixels(*things: Thing) -> np.ndarray:
        return np.asarray(draw(Scene("meadow", things), Random(4)), dtype=float)

    bare = pixels()
    for colour in ("red", "blue"):
        for column, half in (("left", np.s_[:, 64:]), ("right", np.s_[:, :64])):
            image = pixels(Thing(kind, colour, "", column))
            changed = np.abs(image - bare).sum(-1) > 30
            assert 150 < changed.sum() < 4000
            assert changed[half].mean() < 0.02  # the other half is as it was
            distance = np.abs(image[changed] - COLOURS[colour]).sum(-1)
            assert np.quantile(distance, 0.2) < 90
