"""Our samplers against the schedulers of diffusers that are of the same definition, after every step.

Both sides go down the same grid (theirs) from the same noise with the same network and, where they draw, the same
numbers. The network is a smooth function of x and t that bends enough for a wrong weight or order to show. Figures are
relative L2 distances, the largest after any step of any case here; where theirs keeps float32 inside, as in half of
them, 1e-7 is all there is.

    ddim          DDIM                          1e-15
    ddpm          DDPM                          4e-15   trailing 1e-10: theirs adds noise of 1e-10 at the end
    plms          PNDM, no Runge-Kutta steps    6e-15   v: theirs extrapolates velocities, ours the noise they mean
    lms           LMSDiscrete                   2e-14
    euler         EulerDiscrete                 2e-7
    euler_a       EulerAncestralDiscrete        3e-7
    heun          HeunDiscrete                  2e-15
    dpm2          KDPM2Discrete                 8e-7
    dpm2_a        KDPM2AncestralDiscrete        2e-5    sigma_down is a small difference in float32
    dpmpp_2s_a    DPMSolverSinglestep           4e-15   without noise, a grid of pairs: what `ancestral` leads to
    dpmpp_2m      DPMSolverMultistep, midpoint  3e-7
    dpmpp_2m_sde  the same, sde-dpmsolver++     3e-6    unless a run of fewer than 15 steps ends with noise, see below
    dpmpp_sde     DPMSolverSDE                  3e-7    theirs draws from a Brownian path: the noise of a step goes
                                                        on from that of its middle, ours is drawn anew
    unipc         UniPCMultistep, bh2           3e-15   unless a run of 15 steps or more ends with noise, see below
    lcm, tcd      LCM, TCD                      see test_few_step.py

What else differs:

    last step     Of first order where it ends at clean data, in both. Where some noise is left, dpmpp_2m is of first
                  order in runs of fewer than 15 steps, in both (theirs counts steps that image to image skips, too);
                  theirs treats the SDE variant likewise, ours does not; theirs takes it for UniPC at any length.
    karras        Even in ratio^(1/7) between the same ends, in both. KDPM2*, DPMSolverMultistep and UniPC round the
                  timestep that they tell the network.
    exponential   Likewise; the latter two cut the timestep off.
    linspace      The same timesteps in all that come from k-diffusion; between whole ones theirs interpolates the
                  ratio, ours its logarithm: 0.01 % apart at most up to 57 steps, 0.5 % at most. DPMSolverMultistep and
                  UniPC round those of n + 1 steps, without the last.
    trailing      The same for 889 of 1000 numbers of steps; theirs has one step more, at timestep -1, for 62 (61 is the
                  first), and rounds some timesteps the other way for the rest (48 is the first).
    leading       The same for all numbers of steps (below 1000) that divide 1000, given steps_offset 1. DDIM and PNDM
                  end at timestep 0 as ours does if set_alpha_to_one is off, the others go on to clean data;
                  DPMSolverMultistep and UniPC take the timesteps of n + 1 steps, without the last.
    one step      Ours starts at the noisiest level; linspace of theirs, and with it karras and exponential in all that
                  come from k-diffusion, at timestep 0.
    DDIM, PNDM    Each of their steps is 1000 // n timesteps long, whatever the grid: so linspace, and trailing where n
                  does not divide 1000, do not reach their own next timestep.
"""

from __future__ import annotations

import importlib
import math
import sys
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import error, increments

from sd.config import ScheduleConfig
from sd.samplers import SAMPLERS, ancestral, dpmpp_2s_a, eps_of
from sd.schedule import CLEAN, Levels, Schedule

pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # tensors to arrays in diffusers

schedule = Schedule()

MODULES = {
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "PNDM": "pndm",
    "LMSDiscrete": "lms_discrete",
    "EulerDiscrete": "euler_discrete",
    "EulerAncestralDiscrete": "euler_ancestral_discrete",
    "HeunDiscrete": "heun_discrete",
    "KDPM2Discrete": "k_dpm_2_discrete",
    "KDPM2AncestralDiscrete": "k_dpm_2_ancestral_discrete",
    "DPMSolverSinglestep": "dpmsolver_singlestep",
    "DPMSolverMultistep": "dpmsolver_multistep",
    "DPMSolverSDE": "dpmsolver_sde",
    "UniPCMultistep": "unipc_multistep",
}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TO_TIMESTEP_0 = {**LEADING, "set_alpha_to_one": False}  # as the original DDIM and PLMS end
LINSPACE, TRAILING = {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
PLMS = {**LEADING, "skip_prk_steps": True}


class Case(NamedTuple):
    sampler: str
    scheduler: str
    options: dict[str, Any]  # the scheduler's
    n: int
    tolerance: float = 0.0
    own: dict[str, Any] | None = None  # options of the sampler

    def __str__(self) -> str:
        options = {**self.options, **(self.own or {})}
        words = (key if value is True else str(value) for key, value in options.items())
        return "-".join((self.sampler, self.scheduler, *words, str(self.n)))


def network(x, t):
    """Of unit size, and depends on everything that a network may depend on."""
    return torch.sin(3 * x + t / 100) + 0.3 * torch.roll(x, 1, dims=-1)


def draws(seed=3):
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn((1, 4, 8, 8), generator=rng, dtype=torch.float64)


def quad(f, start, end, epsrel):
    """As scipy.integrate.quad, for polynomials up to degree 9."""
    points, weights = np.polynomial.legendre.leggauss(5)
    middle, half = float(start + end) / 2, float(end - start) / 2
    return half * sum(w * float(f(middle + half * p)) for p, w in zip(points, weights, strict=True)), 0.0


@lru_cache
def built(name: str, prediction: str, options: tuple[tuple[str, Any], ...]):
    """A scheduler of theirs as exact as it can be: with its table in float64. Some are slow to make."""
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    other = getattr(module, name + "Scheduler")(
        beta_start=schedule.config.beta_start, beta_end=schedule.config.beta_end, beta_schedule="scaled_linear",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction], **dict(options),
    )  # fmt: skip
    exact = torch.from_numpy(schedule.alpha_bar)
    assert error(other.alphas_cumprod, exact) < 1e-6
    other.alphas_cumprod = exact
    if getattr(other, "final_alpha_cumprod", 1) != 1:
        other.final_alpha_cumprod = exact[0]
    return other


@pytest.fixture
def scheduler(monkeypatch):
    """(name, prediction, number of steps, options) -> a scheduler of theirs at the start of a run.

    Two of them want packages that need not be here; what they want them for is stood in for: scipy integrates
    polynomials, and torchsde draws noise, which is replaced by ours anyway.
    """
    import diffusers.schedulers  # noqa: F401  # it looks for torchsde, and must not find the stand-in

    if find_spec("torchsde") is None:
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    if find_spec("scipy") is None:
        module = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")
        monkeypatch.setattr(module, "integrate", SimpleNamespace(quad=quad), raising=False)

    def start(name: str, prediction: str, n: int, **options: Any):
        if name in ("DDIM", "DDPM"):
            options["clip_sample"] = False
        other = built(name, prediction, tuple(options.items()))
        other.set_timesteps(n)
        if hasattr(other, "sigmas"):
            other.sigmas = other.sigmas.double()
        draw = draws()
        if name == "DPMSolverSDE":
            other.noise_sampler = lambda start, end: draw()
        monkeypatch.setattr(sys.modules[type(other).__module__], "randn_tensor", lambda *_, **__: draw(), raising=False)
        return other

    return start


def grid(other) -> Levels:
    """The levels of their whole steps, with the t at which they ask the network."""
    if not hasattr(other, "sigmas"):
        end = schedule.level(0) if getattr(other, "final_alpha_cumprod", 1) != 1 else CLEAN
        return Levels([*(schedule.level(t) for t in dict.fromkeys(other.timesteps.tolist())), end], schedule)
    ratios = dict.fromkeys(other.sigmas.tolist())  # in those with two evaluations a step each stands twice
    *levels, end = [schedule.level_of_ratio(ratio) for ratio in ratios]
    times = other.timesteps[:: other.order].tolist()
    return Levels([*(level._replace(t=t) for level, t in zip(levels, times, strict=True)), end], schedule)


def their_states(other, network, x, levels):
    """Their state after every step. Many of them keep y = x / alpha."""
    y_kept = other.init_noise_sigma != 1
    state = x / levels[0].alpha if y_kept else x
    states = []
    for i, t in enumerate(other.timesteps):
        out = network(other.scale_model_input(state, t), float(t))
        state = other.step(out, t, state).prev_sample
        if getattr(other, "state_in_first_order", True) or i == len(other.timesteps) - 1:
            states.append(state)
    states = states[1 - len(levels) :]  # PNDM's first step returns halfway, too
    return [state * level.alpha if y_kept else state for state, level in zip(states, levels[1:], strict=True)]


def errors(scheduler, case: Case, prediction: str, told: str | None = None) -> list[float]:
    """Relative L2 distances of our state from theirs, after every step; told "eps", theirs is given the noise."""
    own = Schedule(ScheduleConfig(prediction=prediction))
    other = scheduler(case.scheduler, told or prediction, case.n, **case.options)

    def denoise(x, level):
        return own.to_x0(network(x, level.t), x, level)

    def their_network(x, t):
        return eps_of(x, denoise(x, schedule.level(t)), schedule.level(t)) if told else network(x, t)

    levels = grid(other)
    x = reference.normal("x_T", (1, 4, 8, 8)).double()
    theirs = their_states(other, their_network, x, levels)

    entry, options, draw = SAMPLERS[case.sampler], dict(case.own or {}), draws()
    if entry.stochastic:
        drawn = lambda like: draw()  # noqa: E731
        options["noise"] = increments(drawn, levels) if case.sampler == "dpmpp_sde" else drawn
    steps = entry.run(denoise, x, levels, **options)
    return [error(step.x, state) for step, state in zip(steps, theirs, strict=True)]


def each(sampler: str, scheduler: str, tolerance: float, *options: dict[str, Any], steps=(8, 20)) -> list[Case]:
    return [Case(sampler, scheduler, option, n, tolerance) for option in options for n in steps]


AGREE = [
    *each("ddim", "DDIM", 1e-14, TO_TIMESTEP_0, TRAILING),
    *each("ddim", "DDIM", 1e-14, TRAILING, steps=(1, 2, 4)),  # Hyper-SD
    *each("ddpm", "DDPM", 3e-14, {}, LINSPACE),
    *each("ddpm", "DDPM", 1e-9, TRAILING),
    *each("lms", "LMSDiscrete", 1e-13, {}, KARRAS),
    *each("euler", "EulerDiscrete", 1e-6, {}, KARRAS, EXPONENTIAL, LEADING, TRAILING, {**TRAILING, **TO_SIGMA_MIN}),
    *each("euler_a", "EulerAncestralDiscrete", 2e-6, {}, TRAILING),
    *each("heun", "HeunDiscrete", 2e-14, {}, KARRAS, EXPONENTIAL),
    *each("dpm2", "KDPM2Discrete", 5e-6, {}, KARRAS, EXPONENTIAL),
    *each("dpm2_a", "KDPM2AncestralDiscrete", 1e-4, {}, KARRAS, EXPONENTIAL),
    *each("dpmpp_2m", "DPMSolverMultistep", 2e-6, {}, KARRAS, EXPONENTIAL),
    *each("dpmpp_2m", "DPMSolverMultistep", 2e-6, TO_SIGMA_MIN, steps=(8, 14, 15, 20)),
    *each("dpmpp_sde", "DPMSolverSDE", 2e-6, {}, KARRAS),
    *each("dpmpp_2m_sde", "DPMSolverMultistep", 2e-5, SDE, {**SDE, **KARRAS}, {**SDE, **EXPONENTIAL}),
    *each("dpmpp_2m_sde", "DPMSolverMultistep", 2e-5, {**SDE, **TO_SIGMA_MIN}, steps=(15, 20)),
    *each("unipc", "UniPCMultistep", 2e-14, {}, KARRAS, EXPONENTIAL),
    *each("unipc", "UniPCMultistep", 2e-14, TO_SIGMA_MIN, steps=(8, 14)),
]


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("case", AGREE, ids=str)
def test_every_step(scheduler, case, prediction):
    assert max(errors(scheduler, case, prediction)) < case.tolerance


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("n", [2, 10, 50])
def test_plms(scheduler, n, prediction):
    """Theirs extrapolates what the network gives, ours the noise that this means: with v theirs is told the noise."""
    case = Case("plms", "PNDM", PLMS, n)
    assert max(errors(scheduler, case, prediction, told="eps")) < 2e-14


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_dpmpp_2s_a_is_pairs_of_singlestep_steps(scheduler, prediction):
    """DPM-Solver++(2S) is theirs, on a grid in which the middles stand, too; how far down and back up, `ancestral`."""
    own = Schedule(ScheduleConfig(prediction=prediction))
    levels = schedule.levels(12, "karras")[:-1]
    x = reference.normal("x_T", (1, 4, 8, 8)).double()
    draw, draw_theirs = draws(), draws()
    steps = dpmpp_2s_a(
        lambda x, level: own.to_x0(network(x, level.t), x, level), x, levels,
        noise=lambda like: draw(),
    )  # fmt: skip
    for step, (a, b) in zip(steps, pairwise(levels), strict=True):
        down, up = ancestral(a, b)
        ends = schedule.level_of_ratio(down)
        pair = [a, schedule.level_of_ratio(math.sqrt(a.ratio * down))]
        other = scheduler("DPMSolverSinglestep", prediction, 2, lower_order_final=False, **TO_SIGMA_MIN)
        other.set_begin_index(0)
        other.sigmas = torch.tensor([level.ratio for level in (*pair, ends)], dtype=torch.float64)
        for level in pair:
            x = other.step(network(x, level.t), level.t, x).prev_sample
        x = b.alpha * (x / ends.alpha + up * draw_theirs())
        assert error(step.x, x) < 2e-14


@pytest.mark.parametrize(
    "case, prediction",
    [
        (Case("ddim", "DDIM", LINSPACE, 20), "eps"),
        (Case("ddim", "DDIM", TRAILING, 7), "eps"),
        (Case("plms", "PNDM", PLMS, 20), "v"),
        (Case("lms", "LMSDiscrete", {}, 20, own={"order": 3}), "eps"),
        (Case("dpmpp_2m", "DPMSolverMultistep", {"solver_type": "heun"}, 20), "eps"),
        (Case("dpmpp_2m", "DPMSolverMultistep", {**TO_SIGMA_MIN, "lower_order_final": False}, 14), "eps"),
        (Case("dpmpp_2m_sde", "DPMSolverMultistep", {**SDE, **TO_SIGMA_MIN}, 14), "eps"),
        (Case("unipc", "UniPCMultistep", {**TO_SIGMA_MIN, "solver_type": "bh1"}, 14), "eps"),
        (Case("unipc", "UniPCMultistep", TO_SIGMA_MIN, 15), "eps"),
    ],
    ids=str,
)
def test_other_definitions_are_told_apart(scheduler, case, prediction):
    assert errors(scheduler, case, prediction)[-1] > 1e-3


K_LIKE = ("LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "DPMSolverSDE")
KDPM2 = ("KDPM2Discrete", "KDPM2AncestralDiscrete")
MULTISTEP = ("DPMSolverMultistep", "UniPCMultistep")
GRIDS = [
    # spacing, schedulers, options, how far apart t may be, how far apart ratios, for these numbers of steps
    ("karras", K_LIKE, KARRAS, 1e-4, 1e-6, (2, 8, 25)),
    ("karras", KDPM2 + MULTISTEP, KARRAS, 0.5, 1e-6, (2, 8, 25)),
    ("exponential", K_LIKE + KDPM2, EXPONENTIAL, 1e-4, 1e-6, (2, 8, 25)),
    ("exponential", MULTISTEP, EXPONENTIAL, 1.0, 1e-6, (2, 8, 25)),
    ("linspace", (*K_LIKE, *KDPM2, "EulerAncestralDiscrete"), LINSPACE, 1e-4, 1e-6, (2, 10, 28)),
    ("linspace", (*K_LIKE, *KDPM2, "EulerAncestralDiscrete"), LINSPACE, 1e-4, 1e-4, (8, 20, 50)),
    ("trailing", (*K_LIKE, *KDPM2, *MULTISTEP, "EulerAncestralDiscrete"), TRAILING, 0, 1e-6, (1, 7, 20, 50)),
    ("trailing", ("DDIM", "DDPM"), TRAILING, 0, 1e-12, (1, 8, 20, 50)),
    ("leading", (*K_LIKE, *KDPM2, "EulerAncestralDiscrete"), LEADING, 0, 1e-6, (1, 8, 20, 50)),
    ("leading", ("DDIM", "PNDM"), LEADING, 0, 1e-12, (2, 8, 20, 50)),
]


@pytest.mark.parametrize(
    "spacing, name, options, slack, tolerance, n",
    [
        (spacing, name, options, slack, tolerance, n)
        for spacing, names, options, slack, tolerance, counts in GRIDS
        for name in names
        for n in counts
    ],
)
def test_grids(scheduler, spacing, name, options, slack, tolerance, n):
    more = {"DDIM": {"set_alpha_to_one": spacing != "leading"}, "PNDM": {"skip_prk_steps": True}}.get(name, {})
    other = scheduler(name, "eps", n, **options, **more)
    ours, theirs = schedule.levels(n, spacing), grid(other)
    assert len(ours) == len(theirs)
    assert [level.t for level in ours[:-1]] == pytest.approx([level.t for level in theirs[:-1]], abs=slack + 1e-9)
    assert [level.ratio for level in ours[:-1]] == pytest.approx([level.ratio for level in theirs[:-1]], rel=tolerance)
    to_clean = spacing == "leading" and hasattr(other, "sigmas")  # where ours ends at timestep 0
    assert theirs[-1] == (CLEAN if to_clean else ours[-1])
