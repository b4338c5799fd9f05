"""Samplers against the original's runs and against what can be known without any network."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import GOLDENS, TINY, TINY_V2, Golden, error, gaussian_denoiser, tiny_state
from conftest import loaded

from sd.config import ScheduleConfig
from sd.denoiser import Denoiser
from sd.samplers import ADAMS_BASHFORTH, SAMPLERS, ddim, ddpm, euler, multistep_weights, sampler
from sd.schedule import CLEAN, SPACINGS, Level, Schedule

schedule = Schedule()


@pytest.fixture(scope="module")
def tiny_v2():
    return loaded(tiny_state("tiny-v2-v"), TINY_V2)


def run(golden, networks, levels, name, own=schedule, x=None, **options):
    """The tiny U-Net over these levels, checking that it is asked what the original asked it."""
    contexts = Golden(golden.case["contexts"])
    scale = golden.case["scale"]
    asked = []

    def unet(x, t, context):
        t = t.round() if golden.case.get("quantize") else t
        asked.append(float(t[0]))
        return networks["unet"](x, t, context)

    denoise = Denoiser(unet, own, contexts["cond"], contexts["uncond"], scale)
    steps = list(SAMPLERS[name].run(denoise, golden["x_T"] if x is None else x, levels, **options))
    assert asked == pytest.approx(golden.case["t_calls"], abs=1e-3)
    return steps


def k_goldens() -> list[str]:
    return sorted(path.stem for path in GOLDENS.glob("*.safetensors") if path.stem.startswith(("k_", "v_k_")))


K_NAMES = {"lms": "lms", "euler": "euler", "euler_ancestral": "euler_a", "heun": "heun", "dpm_2": "dpm2"} | {
    "dpm_2_ancestral": "dpm2_a", "dpmpp_2s_ancestral": "dpmpp_2s_a", "dpmpp_2m": "dpmpp_2m", "dpmpp_sde": "dpmpp_sde",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
}  # fmt: skip


@pytest.mark.parametrize("name", k_goldens())
def test_k_diffusion_samplers(tiny, tiny_v2, name):
    golden = Golden(name)
    networks, config = (tiny_v2, TINY_V2) if golden.case["manifest"] == "tiny-v2-v" else (tiny, TINY)
    own = Schedule(config.schedule)
    levels = [own.level_of_ratio(float(ratio)) for ratio in golden["sigmas"]]
    kind = next(word for word in golden.case["component"].split() if word.startswith("sample_"))
    entry = SAMPLERS[K_NAMES[kind.removeprefix("sample_")]]
    options = {"noise": golden.noise()} if entry.stochastic == "always" else {}
    if entry.midpoints:
        options["level_of_ratio"] = own.level_of_ratio
    x = levels[0].sigma * golden["x_T"]  # k-diffusion begins at sigma times the noise, and does not scale by alpha
    steps = run(golden, networks, levels, K_NAMES[kind.removeprefix("sample_")], own, x, **options)
    assert error(steps[-1].x, golden["out"]) < 1e-4
    for key, recorded in golden.tensors.items():
        step, _, number = key.rpartition("_")
        if step == "mid.after_step":
            reached = steps[int(number) - 1]
            assert error(reached.x / reached.level.alpha, recorded) < 1e-4, key
        if step == "mid.denoised_step":
            assert error(steps[int(number) - 1].x0, recorded) < 1e-4


@pytest.mark.parametrize("name", ["plms_s20", "plms_s50_scale3"])
def test_plms_of_the_original(tiny, name):
    golden = Golden(name)
    steps = run(golden, tiny, schedule.levels(golden.case["steps"], "leading"), "plms")
    assert error(steps[-1].x, golden["out"]) < 1e-4
    assert error(steps[0].x0, golden["mid.pred_x0_step_1"]) < 1e-4


@pytest.mark.parametrize("name", ["dpmsolver_s15", "v_dpmsolver_s12", "v_dpmsolver_s9"])
def test_dpm_solver_of_the_original(tiny, tiny_v2, name):
    """Its own grid: even in a continuous time in which ln(alpha) is interpolated; it ends at timestep 0."""
    golden = Golden(name)
    networks, config = (tiny_v2, TINY_V2) if golden.case["manifest"] == "tiny-v2-v" else (tiny, TINY)
    own = Schedule(config.schedule)
    levels = []
    for t in np.linspace(999, 0, golden.case["steps"] + 1):
        alpha = math.exp(np.interp(t, np.arange(1000), 0.5 * np.log(own.alpha_bar)))
        levels.append(Level(float(t), alpha, math.sqrt(1 - alpha**2)))
    steps = run(golden, networks, levels, "dpmpp_2m", own)
    assert error(steps[-1].x, golden["out"]) < 1e-4


def test_v_prediction_ddim(tiny_v2):
    golden = Golden("v_ddim_s15_eta0")
    own = Schedule(TINY_V2.schedule)
    levels = [own.level(t) for t in (*golden.case["t_calls"], 0)]
    steps = run(golden, tiny_v2, levels, "ddim", own)
    assert error(steps[-1].x, golden["out"]) < 1e-4


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


DETERMINISTIC = {"ddim": 1, "euler": 1, "heun": 2, "dpm2": 2, "dpmpp_2m": 2, "unipc": 2, "lms": 2}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_convergence(name):
    """Halving the steps divides the error by 2, or by 4 (lms, of order 4 in its later steps, starts with Euler's)."""
    std, order = 0.5, DETERMINISTIC[name]
    x = reference.normal("x", (1, 4, 8, 8)).double()
    options = {"level_of_ratio": schedule.level_of_ratio} if SAMPLERS[name].midpoints else {}
    errors = []
    for n in (50, 100, 200, 400):
        levels = schedule.levels(n, "karras")[:-1]  # the jump to clean is exact for no n
        *_, last = SAMPLERS[name].run(gaussian_denoiser(std), x, levels, **options)
        errors.append(error(last.x, exact_flow(x, levels[0], levels[-1], std)))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(got > order - 0.2 for got in orders), (errors, orders)
    assert order > 1 or all(got < 1.2 for got in orders), (errors, orders)


def test_unipc_corrects_what_dpmpp_2m_leaves():
    x = reference.normal("x", (1, 4, 8, 8)).double()
    levels = schedule.levels(25, "karras")[:-1]
    exact = exact_flow(x, levels[0], levels[-1], 0.5)
    errors = {}
    for name in ("dpmpp_2m", "unipc"):
        *_, last = SAMPLERS[name].run(gaussian_denoiser(0.5), x, levels)
        errors[name] = error(last.x, exact)
    assert errors["unipc"] < errors["dpmpp_2m"]


def test_euler_is_ddim():
    x, levels = reference.normal("x", (1, 4, 8, 8)), schedule.levels(9, "linspace")
    for a, b in zip(euler(gaussian_denoiser(0.5), x, levels), ddim(gaussian_denoiser(0.5), x, levels), strict=True):
        assert error(a.x, b.x) == 0


def test_multistep_weights_are_adams_bashforth_on_even_grids():
    for order, weights in enumerate(ADAMS_BASHFORTH, start=1):
        assert multistep_weights([-float(i) for i in range(order)], 0.0, 1.0) == pytest.approx(weights)


@pytest.mark.parametrize(
    "name, key, spacing",
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("dpmpp_2m exponential", "dpmpp_2m", "exponential"),
        ("DPM-Solver++", "dpmpp_2m", "karras"),
        ("Euler a", "euler_a", "linspace"),
        ("k_euler_ancestral", "euler_a", "linspace"),
        ("k_lms", "lms", "linspace"),
        ("LMS Karras", "lms", "karras"),
        ("k_dpm_2_a", "dpm2_a", "karras"),
        ("DPM++ 2S a Karras", "dpmpp_2s_a", "karras"),
        ("DPM++ SDE", "dpmpp_sde", "karras"),
        ("DPM++ 2M SDE", "dpmpp_2m_sde", "karras"),
        ("PNDM", "plms", "leading"),
        ("DDIM trailing", "ddim", "trailing"),
        ("UniPC", "unipc", "linspace"),
        ("heun", "heun", "linspace"),
    ],
)
def test_names_that_people_know(name, key, spacing):
    assert sampler(name) == SAMPLERS[key]._replace(spacing=spacing)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_on_every_grid(name, spacing):
    """Finite, the right number of evaluations, and ending at the last level, whatever the number of steps."""
    entry = SAMPLERS[name]
    rng = torch.Generator().manual_seed(0)
    for n, strength in ((1, 1.0), (2, 1.0), (3, 0.7), (14, 1.0), (15, 0.31), (40, 1.0), (999, 0.02), (10, 0.0)):
        levels = schedule.levels(n, spacing, strength)
        calls = []

        def denoise(x, level, calls=calls):
            calls.append(level)
            return gaussian_denoiser(0.5)(x, level)

        options = {"level_of_ratio": schedule.level_of_ratio} if entry.midpoints else {}
        if entry.stochastic == "always":
            options["noise"] = lambda x: torch.randn(x.shape, generator=rng)
        steps = list(entry.run(denoise, torch.randn(1, 4, 4, 4, generator=rng), levels, **options))
        taken = len(levels) - 1
        clean = taken > 0 and levels[-1].sigma == 0
        expected = entry.evaluations * taken - (clean and entry.evaluations == 2)
        if name == "plms" and taken:
            expected += not (clean and taken == 1)
        assert len(steps) == taken and len(calls) == expected, (n, strength)
        assert all(step.x.isfinite().all() for step in steps)
        assert not steps or steps[-1].level == levels[-1]


STOCHASTIC = [(name, {}) for name, entry in SAMPLERS.items() if entry.stochastic == "always"]


@pytest.mark.parametrize("name, options", [*STOCHASTIC, ("ddim", {"eta": 1.0})])
def test_stochastic_samplers_give_the_data_distribution(name, options):
    std = 0.5
    rng = torch.Generator().manual_seed(0)
    levels = schedule.levels(1000, "trailing")  # with few steps the variance comes out too small, by the theory too
    x = torch.randn(20000, generator=rng)
    noise = lambda like: torch.randn(like.shape, generator=rng)  # noqa: E731
    if SAMPLERS[name].midpoints:
        options = {"level_of_ratio": schedule.level_of_ratio}
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


def test_inputs_are_left_alone_and_steps_are_numbered():
    levels = schedule.levels(7, "leading")
    for name, entry in SAMPLERS.items():
        x = reference.normal("x", (1, 4, 8, 8))
        kept = x.clone()
        options = {"noise": lambda x: torch.ones_like(x)} if entry.stochastic == "always" else {}
        if entry.midpoints:
            options["level_of_ratio"] = schedule.level_of_ratio
        steps = list(entry.run(gaussian_denoiser(0.5), x, levels, **options))
        assert [step.i for step in steps] == list(range(7)) and torch.equal(x, kept), name
        assert [step.level for step in steps] == levels[1:], name


def test_refusals():
    with pytest.raises(ValueError, match="unknown sampler 'eulr', expected one of ddim"):
        sampler("eulr")
    with pytest.raises(ValueError, match="noise"):
        list(ddim(gaussian_denoiser(1), torch.zeros(1), schedule.levels(2), eta=0.5))
    assert sampler("DDIM").run is ddim
