"""Samplers against the original's runs and against what can be known without any network."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import GOLDENS, TINY, TINY_V2, Golden, error, gaussian_denoiser, increments, tiny_state
from conftest import loaded
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sd.conditioning import Conditioning
from sd.config import ScheduleConfig
from sd.denoiser import Denoiser
from sd.samplers import ADAMS_BASHFORTH, SAMPLERS, ddim, ddpm, dpmpp_sde, euler, find_sampler, multistep_weights
from sd.schedule import CLEAN, SPACINGS, Level, Levels, Schedule

schedule = Schedule()


@pytest.fixture(scope="module")
def tiny_v2():
    return loaded(tiny_state("tiny-v2-v"), TINY_V2)


def run(golden, networks, levels, name, own=schedule, x=None, **options):
    """The tiny U-Net over these levels, checking that it is asked what the original asked it."""
    contexts = Golden(golden.case["contexts"])
    scale = golden.case["scale"]
    asked = []

    def unet(x, t, conditioning):
        t = t.round() if golden.case.get("quantize") else t
        asked.append(float(t[0]))
        return networks["unet"](x, t, conditioning)

    denoise = Denoiser(unet, own, Conditioning(contexts["cond"]), Conditioning(contexts["uncond"]), scale)
    steps = list(SAMPLERS[name].run(denoise, golden["x_T"] if x is None else x, levels, **options))
    assert asked == pytest.approx(golden.case["t_calls"], abs=1e-3)
    return steps


def exhaustive(*names: str) -> list:
    """Cases that only --full runs."""
    return [pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


def k_goldens() -> list[str]:
    return sorted(path.stem for path in GOLDENS.glob("*.safetensors") if path.stem.startswith(("k_", "v_k_")))


K_NAMES = {"lms": "lms", "euler": "euler", "euler_ancestral": "euler_a", "heun": "heun", "dpm_2": "dpm2"} | {
    "dpm_2_ancestral": "dpm2_a", "dpmpp_2s_ancestral": "dpmpp_2s_a", "dpmpp_2m": "dpmpp_2m", "dpmpp_sde": "dpmpp_sde",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
}  # fmt: skip


# others of the same sampler, on another grid or of more steps
MORE_K = {"k_dpm_2_s10_karras", "k_dpmpp_2m_s20", "k_dpmpp_2m_s12", "k_euler_ancestral_s12", "k_euler_s12_karras"}
MORE_K |= {"k_heun_s10_karras", "k_lms_s12", "k_lms_s12_karras", "v_k_lms_s11"}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [*exhaustive(*sorted(MORE_K)), *sorted(set(k_goldens()) - MORE_K)])
def test_k_diffusion_samplers(tiny, tiny_v2, name):
    golden = Golden(name)
    networks, config = (tiny_v2, TINY_V2) if golden.case["manifest"] == "tiny-v2-v" else (tiny, TINY)
    own = Schedule(config.schedule)
    levels = Levels([own.level_of_ratio(float(ratio)) for ratio in golden["sigmas"]], own)
    kind = next(word for word in golden.case["component"].split() if word.startswith("sample_"))
    entry = SAMPLERS[K_NAMES[kind.removeprefix("sample_")]]
    noise = golden.noise()
    options = {"noise": increments(noise, levels) if entry.run is dpmpp_sde else noise} if entry.stochastic else {}
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


@pytest.mark.parametrize("name", ["plms_s20", *exhaustive("plms_s50_scale3")])
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


@pytest.mark.parametrize("name", [*exhaustive("ddim_s20_eta0"), "ddim_s10_eta1", "ddim_s6_scale1"])
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


@pytest.mark.parametrize("name", [*exhaustive("ddpm_1000_from_100"), "ddpm_t30", *exhaustive("ddpm_t50")])
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


DETERMINISTIC = {"ddim": 1, "euler": 1, "heun": 2, "dpm2": 2, "dpmpp_2m": 2, "plms": 2, "unipc": 3, "lms": 3}


def orders(errors):
    """The power of the step with which errors fall that were found with 1, 2, 4, ... times as many steps."""
    return [math.log2(abs(a / b)) for a, b in pairwise(errors)]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_convergence(name):
    """Halving the steps divides the error by 2, 4 or 8.

    lms, of order 4 in its later steps, starts with Euler's; plms, too, has lower orders first, and is meant for grids
    that are even in t.
    """
    std, order = 0.5, DETERMINISTIC[name]
    x = reference.normal("x", (1, 4, 8, 8)).double()
    errors = []
    for n in (50, 100, 200, 400):
        levels = schedule.levels(n, "karras")[:-1]  # the jump to clean is exact for no n
        *_, last = SAMPLERS[name].run(gaussian_denoiser(std), x, levels)
        errors.append(error(last.x, exact_flow(x, levels[0], levels[-1], std)))
    found = orders(errors)
    assert all(got > order - 0.2 for got in found), (errors, found)
    assert order > 1 or all(got < 1.2 for got in found), (errors, found)


def run_of(name, denoise, x, levels, noise=None, **options):
    """The steps of a sampler with all that it may want; `noise` draws unit normal numbers."""
    return SAMPLERS[name].run(denoise, x, levels, noise=noise, **options)


def spread(name, levels, std, **options):
    """For Gaussian data, what a run makes of its start and of its draws: (factor of x_T, deviation of what is added).

    All is linear in x_T and the draws, so a run over unit vectors, one for each, gives their coefficients.
    """
    units = iter(torch.eye(2 * len(levels), dtype=torch.float64))
    *_, last = run_of(name, gaussian_denoiser(std), next(units), levels, lambda like: next(units), **options)
    return float(last.x[0]), float(last.x[1:].norm())


def exact_spread(a, b, std):
    """The same of the stochastic equation of diffusion, backwards: cov(x_b, x_a) / var(x_a), and what is left of x_b.

    cov(x_b, x_a) = (alpha_a / alpha_b) var(x_b), as x_a comes of x_b by scaling and noise.
    """
    var_a, var_b = (level.alpha**2 * std**2 + level.sigma**2 for level in (a, b))
    factor = a.alpha / b.alpha * var_b / var_a
    return factor, math.sqrt(var_b - factor**2 * var_a)


FEW_STEP = ("lcm", "tcd")  # no solvers of an equation: see test_few_step.py
STOCHASTIC = [(name, {}) for name, entry in SAMPLERS.items() if entry.stochastic and name not in FEW_STEP]
STOCHASTIC += [("ddim", {"eta": 1.0})]
CONVERGENCE = {  # orders of the factor and of the deviation; None: exact at any number of steps
    "ddim": (None, 1),
    "ddpm": (None, 1),
    "euler_a": (None, 1),
    "dpm2_a": (1, 2),
    "dpmpp_2s_a": (1, 1.8),
    "dpmpp_sde": (None, 2),
    "dpmpp_2m_sde": (None, 2),
}


@pytest.mark.parametrize("name, options", STOCHASTIC)
def test_convergence_of_mean_and_deviation(name, options):
    std, errors = 0.5, []
    for n in (50, 100, 200, 400):
        levels = schedule.levels(n, "karras")[:-1]
        pairs = zip(spread(name, levels, std, **options), exact_spread(levels[0], levels[-1], std), strict=True)
        errors.append([got / exact - 1 for got, exact in pairs])
    expected = CONVERGENCE[name]
    for found, order in zip(zip(*errors, strict=True), expected, strict=True):
        if order is None:
            assert max(map(abs, found)) < 1e-11, found
        else:
            assert all(got > order - 0.1 for got in orders(found)), (found, orders(found))
            assert abs(found[-1]) < 0.02


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
        ("UniPC", "unipc", "karras"),
        ("uni_pc_bh2", "unipc", "karras"),
        ("EulerAncestralDiscreteScheduler", "euler_a", "linspace"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", "karras"),
        ("PNDMScheduler", "plms", "leading"),
        ("DDIMScheduler", "ddim", "leading"),
        ("heun", "heun", "linspace"),
    ],
)
def test_names_that_people_know(name, key, spacing):
    assert find_sampler(name) == SAMPLERS[key]._replace(spacing=spacing)


def expected_steps(n, spacing, strength):
    """How many steps are taken."""
    return n * (strength > 0) if spacing == "lcm" else int(n * strength + 1e-9)


def too_many(n, spacing, strength):
    """Whether the spacing has fewer timesteps, so that `levels` refuses."""
    return spacing == "lcm" and n > (int(50 * strength + 1e-9) if strength else 50)


def reached(name, levels):
    """The level after each step: that of the grid, but timestep 0 for clean data in tcd, unless it comes from there."""
    if name == "tcd" and len(levels) > 1 and levels[-1] == CLEAN and levels[-2].t >= 1:
        return [*levels[1:-1], schedule.level(0)]
    return levels[1:]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_on_every_grid(name, spacing):
    """Finite, the right number of evaluations, and ending at the last level, whatever the number of steps."""
    entry = SAMPLERS[name]
    rng = torch.Generator().manual_seed(0)
    for n, strength in ((1, 1.0), (2, 1.0), (3, 0.7), (14, 1.0), (15, 0.31), (40, 1.0), (999, 0.02), (10, 0.0)):
        if too_many(n, spacing, strength):
            continue
        levels = schedule.levels(n, spacing, strength)
        calls = []

        def denoise(x, level, calls=calls):
            calls.append(level)
            return gaussian_denoiser(0.5)(x, level)

        options = {}
        if entry.stochastic:
            options["noise"] = lambda x: torch.randn(x.shape, generator=rng)
        steps = list(entry.run(denoise, torch.randn(1, 4, 4, 4, generator=rng), levels, **options))
        taken = len(levels) - 1
        clean = taken > 0 and levels[-1].sigma == 0
        expected = entry.evaluations * taken - (clean and entry.evaluations == 2)
        if name == "plms" and taken:
            expected += not (clean and taken == 1)
        assert len(steps) == taken and len(calls) == expected, (n, strength)
        assert all(step.x.isfinite().all() for step in steps)
        assert [step.level for step in steps] == reached(name, levels)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(SAMPLERS)), st.sampled_from(SPACINGS), st.integers(1, 1000), st.floats(0, 1))
@example("dpmpp_sde", "karras", 1000, 1.0)
@example("lms", "exponential", 1000, 1.0)
@example("plms", "leading", 1000, 0.001)
@example("unipc", "leading", 15, 1.0)
@example("lcm", "lcm", 4, 1.0)
@example("tcd", "lcm", 50, 1.0)
@example("tcd", "karras", 1000, 1.0)
@example("ddim", "lcm", 4, 0.5)
def test_runs(name, spacing, n, strength):
    """As many steps, evaluations and draws as promised, and where all data is one point they end there.

    eps is then the same all the way, but for what the stochastic ones put in its place.
    """
    assume(not too_many(n, spacing, strength))
    entry, levels = SAMPLERS[name], schedule.levels(n, spacing, strength)
    ends = reached(name, levels)
    taken, a, b = len(levels) - 1, levels[0], [*levels[:1], *ends][-1]
    rng = torch.Generator().manual_seed(n)
    x0, eps = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64), torch.randn(3, generator=rng, dtype=torch.float64)
    asked, drawn = [], []

    def denoise(x, level):
        assert x.isfinite().all()
        asked.append(level)
        return x0

    def noise(like):
        drawn.append(1)
        return torch.randn(like.shape, generator=rng, dtype=like.dtype)

    steps = list(run_of(name, denoise, schedule.add_noise(x0, eps, a), levels, noise))
    assert taken == expected_steps(n, spacing, strength) and [step.level for step in steps] == ends
    full = taken - (levels[-1].sigma == 0 and taken > 0)  # steps that end with some noise
    extra = {1: name == "plms" and full > 0, 2: full}[entry.evaluations]
    assert len(asked) == taken + extra
    assert set(levels[:-1]) <= set(asked)
    if name == "tcd":  # all noise of timestep 0 is its own
        assert len(drawn) == sum(level.t > 1e-6 for level in ends)
    else:
        assert len(drawn) == (full * (2 if name == "dpmpp_sde" else 1) if entry.stochastic else 0)
    if taken and not (name == "lcm" and levels[-2].t < 1):  # where x0 is x: see test_few_step.py
        last = steps[-1].x
        end = b.alpha * x0 + b.sigma * eps
        # lms' weights lose digits where steps are many and short; c_skip of lcm is 0.0025 at timestep 1
        rounding = {"lms": 1e-5, "lcm": 0.02}.get(name, 1e-10)
        assert (last - end).abs().max() <= (6 * b.sigma if drawn else 0) + rounding
        assert all(error(step.x0, x0) < (0.02 if name == "lcm" else 1e-8) for step in steps)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(["ddim", "plms", "euler_a", "heun", "dpmpp_sde", "dpmpp_2m", "unipc", "lcm", "tcd"]),
    st.sampled_from(SPACINGS),
    st.integers(1, 60),
    st.floats(0, 1),
)
def test_what_the_network_predicts_is_no_matter(name, spacing, n, strength):
    """A network that gives the noise and one that gives the velocity of the same x0 lead to the same images."""
    assume(not too_many(n, spacing, strength))
    schedules = {prediction: Schedule(ScheduleConfig(prediction=prediction)) for prediction in ("eps", "v")}
    levels = schedule.levels(n, spacing, strength)
    x = reference.normal("x", (2, 4, 2, 2)).double()
    cond = Conditioning(torch.zeros(1, 77, 8, dtype=torch.float64))

    def network(prediction):
        def predict(x, t, conditioning):
            level = schedule.level(float(t[0]))
            x0 = torch.tanh(2 * x + t.view(-1, 1, 1, 1) / 1000)
            return schedules[prediction].target(x0, (x - level.alpha * x0) / level.sigma, level)

        return predict

    ends = []
    for prediction, own in schedules.items():
        denoise, rng = Denoiser(network(prediction), own, cond), torch.Generator().manual_seed(0)
        noise = lambda like, rng=rng: torch.randn(like.shape, generator=rng, dtype=like.dtype)  # noqa: E731
        steps = list(run_of(name, denoise, x, levels, noise))
        assert len(steps) == len(levels) - 1 == expected_steps(n, spacing, strength)
        assert all(step.x.isfinite().all() for step in steps)
        ends.append(steps[-1].x if steps else x)
    assert error(*ends) < 1e-7


MEMORYLESS = [
    ("ddim", {}), ("ddim", {"eta": 1.0}), ("ddpm", {}), ("euler", {}), ("euler_a", {}), ("heun", {}), ("dpm2", {}),
    ("dpm2_a", {}), ("dpmpp_2s_a", {}), ("dpmpp_sde", {}), ("lcm", {}), ("tcd", {}),
]  # fmt: skip
CHANGED = 3  # the step after which the caller changes x


def changed_run(name, denoise, levels, other, options=None):
    """The last state of a run in which the caller puts `other` in x's place, and the draws that were left then."""
    draws = [reference.normal(f"n{i}", (1, 4, 4, 4)).double() for i in range(2 * len(levels))]
    left = draws
    x = reference.normal("x", (1, 4, 4, 4)).double()
    for step in run_of(name, denoise, x, levels, lambda like: draws.pop(0), **(options or {})):
        if step.i == CHANGED and other is not None:
            step.x.copy_(other)
            left = list(draws)
    return step.x, left


@pytest.mark.parametrize("name, options", MEMORYLESS)
def test_a_caller_may_change_x_between_steps(name, options):
    """A sampler without memory then does what it does for a run that starts there."""
    levels, denoise = schedule.levels(8, "karras"), gaussian_denoiser(0.5)
    other = reference.normal("other", (1, 4, 4, 4)).double()
    end, left = changed_run(name, denoise, levels, other, options)
    *_, last = run_of(name, denoise, other.clone(), levels[CHANGED + 1 :], lambda like: left.pop(0), **options)
    assert torch.equal(end, last.x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_change_of_x_changes_the_end(name):
    levels, denoise = schedule.levels(8, "karras"), gaussian_denoiser(0.5)
    other = reference.normal("other", (1, 4, 4, 4)).double()
    assert error(changed_run(name, denoise, levels, other)[0], changed_run(name, denoise, levels, None)[0]) > 0.01


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])
def test_a_change_of_x_stays_though_the_network_be_blind_to_it(name):
    """What is changed is x itself, not merely what the network is shown. lcm keeps nothing of x but what this gives."""
    levels, x0 = schedule.levels(8, "karras")[:-1], torch.ones(1, 4, 4, 4, dtype=torch.float64)
    other = reference.normal("other", (1, 4, 4, 4)).double()
    ends = [changed_run(name, lambda x, level: x0, levels, change)[0] for change in (other, None)]
    assert error(*ends) > 1e-3


@pytest.mark.parametrize("name, options", STOCHASTIC)
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


def test_an_option_is_the_same_in_every_sampler_that_has_it():
    """It is one setting of requests and of the command line, whatever the sampler."""
    found = {}
    for entry in SAMPLERS.values():
        for name, option in entry.options.items():
            assert found.setdefault(name, option) == option, name


def test_inputs_are_left_alone_and_steps_are_numbered():
    levels = schedule.levels(7, "leading")
    for name, entry in SAMPLERS.items():
        x = reference.normal("x", (1, 4, 8, 8))
        kept = x.clone()
        options = {"noise": lambda x: torch.ones_like(x)} if entry.stochastic else {}
        steps = list(entry.run(gaussian_denoiser(0.5), x, levels, **options))
        assert [step.i for step in steps] == list(range(7)) and torch.equal(x, kept), name
        assert [step.level for step in steps] == reached(name, levels), name


def test_refusals():
    with pytest.raises(ValueError, match="unknown sampler 'eulr', expected one of ddim"):
        find_sampler("eulr")
    with pytest.raises(ValueError, match="noise"):
        list(ddim(gaussian_denoiser(1), torch.zeros(1), schedule.levels(2), eta=0.5))
    assert find_sampler("DDIM").run is ddim
