"""What each error counts in training, and which noise: against their formulas."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from scripts.training.objective import retargeted
from sd.conditioning import Conditioning
from sd.config import SD1, ScheduleConfig
from sd.schedule import Schedule
from sd.training import (
    debiased_weight,
    diffusion_loss,
    huber,
    huber_scale,
    level_batch,
    masked,
    offset_noise,
    pyramid_noise,
    sample_losses,
    squared_error,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_huber_is_its_formula_between_square_and_absolute_value():
    out, target = torch.randn(2, 3, 4, 5, generator=rng(1)), torch.randn(2, 3, 4, 5, generator=rng(2))
    c = torch.tensor([0.1, 1.0])
    found = huber(c)(out, target)
    for i in range(2):
        for d, value in zip((out - target)[i].flatten().tolist(), found[i].flatten().tolist(), strict=True):
            expected = 2 * c[i].item() * (math.sqrt(d * d + c[i].item() ** 2) - c[i].item())
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
    small, large = torch.full((1, 1, 1, 1), 1e-3), torch.full((1, 1, 1, 1), 1e3)
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1)
    assert huber(one)(small, zero).item() == pytest.approx(1e-6, rel=0.1)
    assert huber(one)(large, zero).item() == pytest.approx(2e3, rel=1e-2)


def test_huber_scale_falls_from_one_to_c():
    schedule = Schedule()
    t = torch.arange(1000)
    scale = huber_scale(schedule, t, 0.1)
    assert (scale.diff() < 0).all()
    for step in (0, 400, 999):
        ratio = schedule.level(step).ratio
        assert scale[step].item() == pytest.approx(0.1 + 0.9 / (1 + ratio) ** 2, rel=1e-4)
    assert scale[0] > 0.9 and scale[999] < 0.11


def test_masked_loss_is_the_mean_over_the_area():
    """What is outside of the mask has no gradient; a small area counts as much as a large one."""
    schedule, context = Schedule(), Conditioning(torch.zeros(2, 1, 1))
    x0, noise = torch.randn(2, 4, 6, 6, generator=rng(1)), torch.randn(2, 4, 6, 6, generator=rng(2))
    t = torch.tensor([100, 800])
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, :2, :3] = 1
    mask[1, :, 3] = 0.5
    said = torch.randn(2, 4, 6, 6, generator=rng(3), requires_grad=True)
    with torch.enable_grad():
        loss = diffusion_loss(lambda *_: said, schedule, x0, context, t, noise, distance=masked(squared_error, mask))
        loss.backward()
    error = (said - noise).square().detach()
    expected = (error[0, :, :2, :3].mean() + error[1, :, 3].mean()) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    outside = (mask == 0).expand_as(said)
    assert (said.grad[outside] == 0).all() and (said.grad[~outside] != 0).all()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_debiased_weight_is_the_same_for_both_predictions(prediction):
    """The same guess of x0, said as eps or as v: the error of eps counts 1 / sqrt(SNR)."""
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    x0, noise, guess = (torch.randn(4, 4, 2, 2, generator=rng(i)) for i in (1, 2, 3))
    t, context = torch.tensor([0, 200, 600, 990]), Conditioning(torch.zeros(4, 1, 1))
    alpha, sigma = level_batch(schedule, t)[1:]

    def says(x, *_):
        return (x - alpha * guess) / sigma if prediction == "eps" else (alpha * x - guess) / sigma

    ratio = (alpha / sigma).flatten()
    expected = ((1 / ratio) * ratio**2 * (guess - x0).square().mean((1, 2, 3))).mean()
    loss = diffusion_loss(says, schedule, x0, context, t, noise, debiased_weight(schedule, t))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(("table", "words"), [((0.9, 0.5, 0.1), "a schedule of its own"), ((0.9, 0.5, 0.0), "")])
def test_a_table_is_not_rescaled(table, words):
    """One that ends in pure noise stays as it is, another one is refused."""
    config = replace(SD1, schedule=ScheduleConfig(steps=3, prediction="v", alpha_bar=table))
    args = Namespace(prediction=None, zero_snr=True)
    if words:
        with pytest.raises(ValueError, match=words):
            retargeted(config, args)
    else:
        assert retargeted(config, args) == config


def test_losses_of_samples_have_the_loss_as_their_mean():
    schedule, context, t = Schedule(), Conditioning(torch.zeros(3, 1, 1)), torch.tensor([5, 500, 900])
    x0, noise = torch.randn(3, 4, 2, 2, generator=rng(1)), torch.randn(3, 4, 2, 2, generator=rng(2))
    each = sample_losses(lambda x, *_: 0.5 * x, schedule, x0, context, t, noise)
    weight = torch.tensor([1.0, 0.0, 2.0])
    loss = diffusion_loss(lambda x, *_: 0.5 * x, schedule, x0, context, t, noise, weight)
    assert each.shape == (3,)
    assert loss.item() == pytest.approx((each * weight).mean().item())


def test_offset_noise_adds_one_number_per_image_and_channel():
    noise = torch.randn(50, 4, 8, 8, generator=rng(1))
    added = offset_noise(noise, 0.1, rng(2)) - noise
    assert added.flatten(2).std(2).max() < 1e-6
    assert added[:, :, 0, 0].std().item() == pytest.approx(0.1, rel=0.15)
    assert torch.equal(offset_noise(noise, 0.1, rng(2)), offset_noise(noise, 0.1, rng(2)))


def test_pyramid_noise_has_unit_variance_and_more_of_the_low_frequencies():
    noise = torch.randn(32, 4, 32, 48, generator=rng(1))
    found = pyramid_noise(noise, 0.7, rng(2))
    assert found.shape == noise.shape
    torch.testing.assert_close(found.std((1, 2, 3)), torch.ones(32))
    assert found.mean((2, 3)).std() > 5 * noise.mean((2, 3)).std()
    assert torch.equal(found, pyramid_noise(noise, 0.7, rng(2)))
    torch.testing.assert_close(pyramid_noise(noise, 0.0, rng(2)), noise / noise.std((1, 2, 3), keepdim=True))
