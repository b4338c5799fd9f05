"""Samplers against the original's runs and against what can be known without any network."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import reference_weights as reference
import torch
from common import Golden, error, gaussian_denoiser

from sd.config import ScheduleConfig
from sd.denoiser import Denoiser
from sd.samplers import SAMPLERS, ddim, ddpm, sampler
from sd.schedule import CLEAN, Schedule

schedule = Schedule()


def run(golden, tiny, levels, name, own=schedule, **options):
    """The tiny U-Net over these levels, checking that it is asked what the original asked it."""
    contexts = Golden(golden.case["contexts"])
    scale = golden.case["scale"]
    asked = []

    def unet(x, t, context):
        asked.append(float(t[0]))
        return tiny["unet"](x, t, context)

    denoise = Denoiser(unet, own, contexts["cond"], contexts["uncond"], scale)
    steps = list(SAMPLERS[name].run(denoise, golden["x_T"], levels, **options))
    assert asked == golden.case["t_calls"]
    return steps


@pytest.mark.parametrize("name", ["ddim_s20_eta0", "ddim_s10_eta1", "ddim_s6_scale1"])
def test_ddim_of_the_original(tiny, name):
    golden = Golden(name)
    levels = [schedule.level(t) for t in golden.case["t_calls"]] + [schedule.level(0)]
    if 1000 % golden.case["steps"] == 0:
        assert levels == schedule.levels(golden.case["steps"], "leading")
    steps = run(golden, tiny, levels, "ddim", eta=golden.case["eta"], noise=golden.noise())
    assert error(steps[-1].x, golden["out"]) < 1e-4
    for key, recorded in golden.tensors.items():
        kind, _, number = key.rpartition("_")
        if kind == "mid.after_step":
            assert error(steps[int(number) - 1].x, recorded) < 1e-4
        if kind == "mid.pred_x0_step":
            assert error(steps[int(number) - 1].x0, recorded) < 1e-4


@pytest.mark.parametrize("name", ["ddpm_1000_from_100", "ddpm_t30", "ddpm_t50"])
def test_ddpm_of_the_original(tiny, name):
    golden = Golden(name)
    timesteps, total = golden.case["timesteps"], golden.case["schedule_steps"]
    own = Schedule(ScheduleConfig(steps=total))
    levels = own.levels(total, "leading", strength=timesteps / total)
    steps = run(golden, tiny, levels, "ddpm", own, noise=golden.noise())
    assert error(steps[-1].x, golden["out"]) < 1e-4
    # logged after the first step and after every t that divides as the case says
    t_calls = golden.case["t_calls"]
    every = {100: 25, 30: 7, 50: 12}[timesteps]
    logged = [i for i, t in enumerate(t_calls) if i == 0 or t % every == 0]
    for j in range(4):
        assert error(steps[logged[j]].x, golden[f"mid.logged_{j}"]) < 1e-4, (j, logged)


def test_ddim_is_exact_where_the_data_is_one_point():
    """If x0 is known, one step of any length lands on it."""
    x0 = reference.normal("x0", (1, 4, 8, 8))
    levels = [schedule.level(900), CLEAN]
    x = schedule.add_noise(x0, reference.normal("n", x0.shape), levels[0])
    (step,) = ddim(lambda x, level: x0, x, levels)
    assert error(step.x, x0) < 1e-6 and step.level == CLEAN and step.i == 0


def exact_flow(x, a, b, std):
    """The probability flow of Gaussian data scales x by the ratio of the marginal standard deviations."""
    marginal = [math.sqrt(level.alpha**2 * std**2 + level.sigma**2) for level in (a, b)]
    return x * (marginal[1] / marginal[0])


def test_ddim_converges_with_order_one():
    std = 0.5
    x = reference.normal("x", (1, 4, 8, 8)).double()
    errors = []
    for n in (50, 100, 200, 400):
        levels = schedule.levels(n, "karras")[:-1]  # the jump to clean is exact for no n
        *_, last = ddim(gaussian_denoiser(std), x, levels)
        errors.append(error(last.x, exact_flow(x, levels[0], levels[-1], std)))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(0.85 < order < 1.2 for order in orders), (errors, orders)


@pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", {"eta": 1.0})])
def test_stochastic_samplers_give_the_data_distribution(name, options):
    std = 0.5
    rng = torch.Generator().manual_seed(0)
    levels = schedule.levels(1000, "trailing")  # with few steps the variance comes out too small, by the theory too
    x = torch.randn(20000, generator=rng)
    noise = lambda like: torch.randn(like.shape, generator=rng)  # noqa: E731
    *_, last = SAMPLERS[name].run(gaussian_denoiser(std), x, levels, noise=noise, **options)
    expected = math.sqrt(levels[-1].alpha ** 2 * std**2 + levels[-1].sigma ** 2)
    assert abs(float(last.x.mean())) < 0.02
    assert float(last.x.std()) == pytest.approx(expected, rel=0.015)


def test_ddpm_is_ddim_with_eta_one():
    """On any subset of the timesteps; the two are written from different papers."""
    levels = [schedule.level(t) for t in (990, 700, 699, 320, 40, 3)] + [CLEAN]
    x = reference.normal("x", (2, 4, 8, 8)).double()
    draws = {i: reference.normal(f"n{i}", x.shape).double() for i in range(10)}
    runs = []
    for steps in (ddpm, lambda *args, **kw: ddim(*args, eta=1.0, **kw)):
        count = iter(range(10))
        noise = lambda like, count=count: draws[next(count)]  # noqa: E731
        runs.append([step.x for step in steps(gaussian_denoiser(0.5), x, levels, noise=noise)])
    assert all(error(a, b) < 1e-12 for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_counted_and_inputs_left_alone(name):
    levels = schedule.levels(7, SAMPLERS[name].spacing)
    x = reference.normal("x", (1, 4, 8, 8))
    kept, calls = x.clone(), []

    def denoise(x, level):
        calls.append(level)
        return gaussian_denoiser(0.5)(x, level)

    options = {"noise": torch.randn_like} if SAMPLERS[name].stochastic == "always" else {}
    steps = list(SAMPLERS[name].run(denoise, x, levels, **options))
    assert [step.i for step in steps] == list(range(7)) and len(calls) == 7
    assert [step.level for step in steps] == levels[1:] and torch.equal(x, kept)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_levels_to_walk_is_no_step(name):
    options = {"noise": torch.randn_like} if SAMPLERS[name].stochastic == "always" else {}
    assert list(SAMPLERS[name].run(gaussian_denoiser(1), torch.zeros(1), [CLEAN], **options)) == []


def test_refusals():
    with pytest.raises(ValueError, match="unknown sampler 'eulr', expected one of ddim"):
        sampler("eulr")
    with pytest.raises(ValueError, match="noise"):
        list(ddim(gaussian_denoiser(1), torch.zeros(1), schedule.levels(2), eta=0.5))
    assert sampler("DDIM").run is ddim
