"""The schedule against the original's buffers and grids, and its algebra."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import GOLDENS, Golden, assert_close, error
from hypothesis import given
from hypothesis import strategies as st

from sd.config import ScheduleConfig
from sd.samplers import posterior
from sd.schedule import ALL_STEPS, CLEAN, SPACINGS, Schedule, ratios

SCHEDULES = json.loads((GOLDENS / "schedules.json").read_text())
schedule = Schedule()


def test_buffers_of_the_original():
    golden = Golden("schedule_buffers")
    bar = schedule.alpha_bar
    previous = np.append(1.0, bar[:-1])
    steps = [(schedule.level(t), schedule.level(t - 1)) for t in range(1000)]
    of_x0, of_x, std = np.array([posterior(a, b) for a, b in steps]).T
    variance = std**2
    ours = {
        "betas": schedule.betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": [a.alpha for a, _ in steps],
        "sqrt_one_minus_alphas_cumprod": [a.sigma for a, _ in steps],
        "log_one_minus_alphas_cumprod": [2 * math.log(a.sigma) for a, _ in steps],
        "sqrt_recip_alphas_cumprod": [1 / a.alpha for a, _ in steps],
        "sqrt_recipm1_alphas_cumprod": [a.ratio for a, _ in steps],
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": of_x0,
        "posterior_mean_coef2": of_x,
    }
    assert set(ours) == set(golden.tensors)
    for name, values in ours.items():
        np.testing.assert_allclose(np.asarray(values), golden[name].numpy(), rtol=3e-6, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", SCHEDULES["ddim"], ids=lambda case: str(case["steps"]))
def test_ddim_grids_of_the_original(case):
    """Equal wherever n divides 1000; elsewhere the original has another number of steps, or reads past the end."""
    n, timesteps = case["steps"], case["timesteps"]
    assert case["method"] == "uniform"
    ours = schedule.levels(n, "leading")
    if "error" in case:
        assert timesteps[-1] == 1000 and len(ours) == n + 1
        return
    levels = [schedule.level(t) for t in (*reversed(timesteps), 0)]
    if 1000 % n == 0:
        assert ours == levels
    assert_close([a.alpha**2 for a in levels[:-1]], case["alphas"][::-1], 1e-6)
    assert_close([b.alpha**2 for b in levels[1:]], case["alphas_prev"][::-1], 1e-6)
    for eta in (0.5, 1.0):
        # DDIM's std at eta 1 is the posterior's
        stds = [eta * posterior(a, b)[2] for a, b in pairwise(levels)]
        assert_close(stds, case[f"sigmas_eta{eta}"][::-1], 2e-5)


@pytest.mark.parametrize("n", SCHEDULES["ddim_step_counts_that_crash_the_original"])
def test_step_counts_that_crash_the_original(n):
    assert max(level.t for level in schedule.levels(n, "leading")) <= 999


@pytest.mark.parametrize("case", SCHEDULES["k"], ids=lambda case: str(case["steps"]))
def test_k_diffusion_grids(case):
    n = case["steps"]
    for spacing, name in (("linspace", "get_sigmas"), ("karras", "karras"), ("exponential", "exponential")):
        levels = schedule.levels(n, spacing)
        assert_close([a.ratio for a in levels], case[name], 2e-5)
        if f"{name}_t" in case:
            np.testing.assert_allclose([a.t for a in levels[:-1]], case[f"{name}_t"], atol=0.02)
    assert_close([*ratios(n, 0.1, 10.0, 7.0), 0.0], case["karras_0.1_10"], 2e-5)


def test_range_of_the_model():
    assert schedule.level(0).ratio == pytest.approx(SCHEDULES["sigma_min"], rel=2e-5)
    assert schedule.level(999).ratio == pytest.approx(SCHEDULES["sigma_max"], rel=1e-5)


@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.exhaustive), False], ids=["every", "some"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_numbers_of_steps(spacing, every):
    """Right length, falling all the way, inside the schedule, spread over it, ending (nearly) clean."""
    most = 50 if spacing == "lcm" else 1000
    for n in range(1, 1001) if every else (*range(1, 41), 50, 63, 100, 250, 333, 499, 500, 501, 998, 999, 1000):
        if n > most:
            break
        levels = schedule.levels(n, spacing)
        assert len(levels) == n + 1
        assert all(a.sigma > b.sigma for a, b in pairwise(levels)), n
        assert all(0 <= a.t <= 999 for a in levels[:-1]), n
        assert n == 1 or levels[0].t >= 999 - 1000 / n, f"{n} steps must begin near pure noise"
        assert levels[-1].sigma < 0.0292, n
        assert all(math.isclose(a.alpha**2 + a.sigma**2, 1.0) for a in levels), n


@given(st.integers(1, 1000), st.floats(0, 1), st.sampled_from([name for name in SPACINGS if name not in ALL_STEPS]))
def test_strength_keeps_the_last_steps(n, strength, spacing):
    whole, part = schedule.levels(n, spacing), schedule.levels(n, spacing, strength)
    assert len(part) == int(n * strength + 1e-9) + 1
    assert part == whole[-len(part) :]


def test_all_of_the_timesteps_are_the_training_grid():
    assert [a.t for a in schedule.levels(1000, "leading")] == [float(t) for t in range(999, -2, -1)]
    assert schedule.levels(1000, "leading")[-1] == CLEAN


@given(st.floats(0, 999))
def test_levels_between_timesteps(t):
    a = schedule.level(t)
    below, above = schedule.level(math.floor(t)), schedule.level(math.ceil(t))
    assert below.sigma <= a.sigma * (1 + 1e-12) and a.sigma <= above.sigma * (1 + 1e-12)
    assert schedule.level_of_ratio(a.ratio).t == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("t", [0, 3, 500.5, 999])
def test_targets_lead_back_to_x0(prediction, t):
    own = Schedule(ScheduleConfig(prediction=prediction))
    x0, noise = reference.normal("x0", (2, 4, 5, 5)), reference.normal("n", (2, 4, 5, 5))
    level = own.level(t)
    x = own.add_noise(x0, noise, level)
    assert error(own.to_x0(own.target(x0, noise, level), x, level), x0) < 1e-5
    if prediction == "v":
        assert error(own.target(x0, noise, level), level.alpha * noise - level.sigma * x0) == 0


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: schedule.levels(0), "steps"),
        (lambda: schedule.levels(1001), "1000"),
        (lambda: schedule.levels(2.5), "whole number"),
        (lambda: schedule.levels(10, "lineal"), "leading"),
        (lambda: schedule.levels(10, strength=1.5), "strength"),
        (lambda: schedule.levels(10, strength=math.nan), "strength"),
        (lambda: schedule.level(1000), "timestep"),
        (lambda: schedule.level(-0.5), "timestep"),
        (lambda: schedule.level(math.nan), "timestep"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_levels_are_floats():
    """Tensors or numpy scalars would make a sampling loop wait for the device or change its precision."""
    for spacing in SPACINGS:
        for level in schedule.levels(7, spacing):
            assert all(type(number) is float for number in level)
    assert torch.tensor(1.0, dtype=torch.bfloat16).mul(schedule.level(5).alpha).dtype == torch.bfloat16
