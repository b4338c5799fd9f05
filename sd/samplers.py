"""Samplers: from noise to data, as generators over a denoiser.

A denoiser says for x_t at a level what the clean data x0 is; a sampler walks down a list of levels with it and yields
every step. A sampler knows no network and no guidance, and the caller drives: to show progress, to look at a step or
to stop early, iterate; to interfere, change `step.x` in place, and the sampler goes on from there.

    for step in ddim(denoise, x, levels):
        ...                                  step.x is the state, step.x0 the data predicted in this step

All of them use x_t = alpha x0 + sigma eps with alpha² + sigma² = 1 (schedule.py). In the equations a is the level
that a step starts from and b the next, less noisy one; eps = (x - alpha_a x0) / sigma_a.

Papers after DDIM use y = x / alpha = x0 + r eps instead, with r = sigma / alpha (`Level.ratio`; "sigma" in Karras et
al. 2022 and in k-diffusion) and lambda = -ln r. There the way down is a differential equation, dy/dr = eps, and `move`
is its exact solution for an x0 that stays the same. So most samplers come down to a choice of the x0 to move with.
The ancestral ones go further than b, to r_down, and come back up to b with fresh noise.

>>> import torch
>>> from sd.schedule import Schedule
>>> truth = torch.ones(1, 4, 8, 8)
>>> for step in ddim(lambda x, level: truth, torch.randn(1, 4, 8, 8), Schedule().levels(10, "trailing")):
...     pass
>>> torch.allclose(step.x, truth)  # a denoiser that knows the answer is led to it
True
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .schedule import SPACINGS, Level, Levels

Denoise = Callable[[Tensor, Level], Tensor]  # (x_t, level) -> x0, the same shape
Noise = Callable[[Tensor], Tensor]  # unit normal numbers in the shape of its argument

FEW_STEPS = 15  # below it DPM-Solver++ and UniPC end with a step of first order, which is more stable


class Step(NamedTuple):
    """The state after step i (from 0) and the x0 predicted in it; `level` is the one now reached."""

    i: int
    level: Level
    x: Tensor
    x0: Tensor


def move(x: Tensor, x0: Tensor, a: Level, b: Level) -> Tensor:
    """x at level a -> alpha_b x0 + sigma_b eps at level b, with the eps that x0 leaves in x.

    Euler's method in y and r, and the first-order exponential integrator in lambda (DPM-Solver-1), are this as well.
    """
    return of_x0(a, b) * x0 + (b.sigma / a.sigma) * x


def of_x0(a: Level, b: Level) -> float:
    """The coefficient of x0 in `move`."""
    return b.alpha - b.sigma * a.alpha / a.sigma


def eps_of(x: Tensor, x0: Tensor, a: Level) -> Tensor:
    """The noise in x at level a if the clean data is x0."""
    return (x - a.alpha * x0) / a.sigma


def log_steps(a: Level, b: Level) -> float:
    """lambda_b - lambda_a: the length of a step in ln(alpha / sigma)."""
    return math.log(a.ratio / b.ratio)


# ------------------------------------------------------------------------------------- diffusion's own samplers


def ddpm(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """Ancestral sampling from the posterior of Ho et al. 2020, eq. 6 and 7, on any subset of the timesteps.

        alpha = alpha_a / alpha_b,  beta = 1 - alpha²
        q(x_b | x_a, x0) = N(mean, std²)
        mean = (alpha_b beta / sigma_a²) x0 + (alpha sigma_b² / sigma_a²) x_a,   std² = beta sigma_b² / sigma_a²

    x (B, C, h, w) at levels[0]. One evaluation and one draw of noise a step; none where the next level is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        of_x0, of_x, std = posterior(a, b)
        x = of_x0 * x0 + of_x * x
        if std > 0:
            x = x + std * noise(x)
        yield Step(i, b, x, x0)


def posterior(a: Level, b: Level) -> tuple[float, float, float]:
    """The coefficients of x0 and x_a in the posterior's mean, and its standard deviation (Ho et al. 2020, eq. 7)."""
    alpha = a.alpha / b.alpha
    beta = 1.0 - alpha**2
    return b.alpha * beta / a.sigma**2, alpha * b.sigma**2 / a.sigma**2, math.sqrt(beta) * b.sigma / a.sigma


def ddim(
    denoise: Denoise, x: Tensor, levels: Levels, *, eta: float = 0.0, noise: Noise | None = None
) -> Iterator[Step]:
    """Song et al. 2021, "Denoising diffusion implicit models", eq. 12 and 16.

        std = eta (sigma_b / sigma_a) sqrt(1 - alpha_a² / alpha_b²)      eta times the posterior's
        x_b = alpha_b x0 + sqrt(sigma_b² - std²) eps + std noise

    x (B, C, h, w) at levels[0]. eta 0 is deterministic and draws nothing; eta 1 is `ddpm`. One evaluation a step.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"ddim with eta {eta} draws noise in every step: give it `noise`")
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        std = eta * posterior(a, b)[2]
        x = move(x, x0, a, Level(b.t, b.alpha, math.sqrt(max(b.sigma**2 - std**2, 0.0))))
        if noise is not None and std > 0:
            x = x + std * noise(x)
        yield Step(i, b, x, x0)


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds", eq. 12: the multistep part.

    The noise of this step is extrapolated from those of up to three before (Adams-Bashforth), then moved with as in
    DDIM. The first step has none before it and averages with an evaluation at its end instead. Made for even grids.

    x (B, C, h, w) at levels[0]. One evaluation a step, two in the first.
    """
    past: deque[Tensor] = deque(maxlen=4)  # eps, the newest first
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        past.appendleft(eps_of(x, x0, a))
        if i == 0 and b.sigma > 0:
            ahead = move(x, x0, a, b)
            eps = (past[0] + eps_of(ahead, denoise(ahead, b), b)) / 2
        else:
            eps = sum(weight * e for weight, e in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True))
        x0 = (x - a.sigma * eps) / a.alpha
        x = b.alpha * x0 + b.sigma * eps
        yield Step(i, b, x, x0)


# ------------------------------------------------------------------------------------- solvers of dy/dr = eps


def euler(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Euler's method (Karras et al. 2022, algorithm 1 without the correction); DDIM by another name.

    x (B, C, h, w) at levels[0]. One evaluation a step.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        x = move(x, x0, a, b)
        yield Step(i, b, x, x0)


def heun(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Karras et al. 2022, algorithm 1: Euler's step, then once more with the mean of the slopes at both its ends.

    x (B, C, h, w) at levels[0]. Two evaluations a step, one where the next level is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        end = move(x, x0, a, b)
        if b.sigma > 0:
            slope = (eps_of(x, x0, a) + eps_of(end, denoise(end, b), b)) / 2
            end = b.alpha * (x / a.alpha + (b.ratio - a.ratio) * slope)
        x = end
        yield Step(i, b, x, x0)


def lms(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None, order: int = 4) -> Iterator[Step]:
    """Linear multistep: the slope is a polynomial through the last `order` ones, integrated exactly (Adams-Bashforth).

        y_b = y_a + sum_j w_j eps_j,   w_j = integral from r_a to r_b of prod_{k != j} (r - r_k) / (r_j - r_k)

    On any grid, as in k-diffusion. x (B, C, h, w) at levels[0]. One evaluation a step.
    """
    past: deque[tuple[float, Tensor]] = deque(maxlen=order)  # (r, eps), the newest first
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        past.appendleft((a.ratio, eps_of(x, x0, a)))
        weights = multistep_weights([r for r, _ in past], a.ratio, b.ratio)
        y = x / a.alpha + sum(weight * eps for weight, (_, eps) in zip(weights, past, strict=True))
        x = b.alpha * y
        yield Step(i, b, x, x0)


def multistep_weights(points: Sequence[float], start: float, end: float) -> list[float]:
    """The integrals from start to end of the Lagrange polynomials of these points."""
    points, end, start = [point - start for point in points], end - start, 0.0  # fewer digits are lost near zero
    weights = []
    for j, point in enumerate(points):
        others = [*points[:j], *points[j + 1 :]]
        roots = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        integral = roots.integ()
        weights.append(float(integral(end) - integral(start)) / math.prod(point - other for other in others))
    return weights


def dpm2(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """The slope of a step is taken at its middle in lambda (DPM-Solver-2 of Lu et al. 2022a, as in k-diffusion).

    x (B, C, h, w) at levels[0]. Two evaluations a step, one where the next level is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        x = midpoint_step(denoise, x, x0, a, b, levels.between)
        yield Step(i, b, x, x0)


def midpoint_step(
    denoise: Denoise, x: Tensor, x0: Tensor, a: Level, b: Level, between: Callable[[float, float], Level]
) -> Tensor:
    """x at level a -> x at level b, along the slope in the middle of the step."""
    if b.sigma == 0:
        return move(x, x0, a, b)
    middle = between(a.ratio, b.ratio)
    halfway = move(x, x0, a, middle)
    slope = eps_of(halfway, denoise(halfway, middle), middle)
    return b.alpha * (x / a.alpha + (b.ratio - a.ratio) * slope)


# ------------------------------------------------------------------------------------- ancestral steps


def ancestral(a: Level, b: Level) -> tuple[float, float]:
    """(r_down, r_up) with r_down² + r_up² = r_b²: how far to go below b, and how much noise leads back up.

    As much noise as in the posterior of Ho et al. 2020 (k-diffusion's get_ancestral_step).
    """
    up = b.ratio * math.sqrt(max(1 - (b.ratio / a.ratio) ** 2, 0.0))
    return math.sqrt(max(b.ratio**2 - up**2, 0.0)), up


def below(b: Level, ratio: float) -> Level:
    """b with less noise, sigma = ratio alpha, and b's alpha: where an ancestral step is before its noise is added."""
    return Level(b.t, b.alpha, b.alpha * ratio)


def back_up(x: Tensor, b: Level, up: float, noise: Noise | None) -> Tensor:
    """x with noise of ratio `up` added, which brings it up to level b."""
    return x + b.alpha * up * noise(x) if up > 0 and noise is not None else x


def euler_a(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """Euler's step down, fresh noise back up: DDIM with eta 1.

    x (B, C, h, w) at levels[0]. One evaluation and one draw of noise a step; none where the next level is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        down, up = ancestral(a, b)
        x = back_up(move(x, x0, a, below(b, down)), b, up, noise)
        yield Step(i, b, x, x0)


def dpm2_a(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """`dpm2`, further down than b, and back up with fresh noise.

    x (B, C, h, w) at levels[0]. Two evaluations and one draw of noise a step; one and none where the next is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        down, up = ancestral(a, b)
        x = back_up(midpoint_step(denoise, x, x0, a, below(b, down), levels.between), b, up, noise)
        yield Step(i, b, x, x0)


def dpmpp_2s_a(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1), ancestral: the x0 of the step's middle serves for all of it.

    x (B, C, h, w) at levels[0]. Two evaluations and one draw of noise a step; one and none where the next is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        down, up = ancestral(a, b)
        if down == 0:
            x = move(x, x0, a, b)
        else:
            middle = levels.between(a.ratio, down)
            x0_middle = denoise(move(x, x0, a, middle), middle)
            x = back_up(move(x, x0_middle, a, below(b, down)), b, up, noise)
        yield Step(i, b, x, x0)


def dpmpp_sde(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """The same for the stochastic equation: also the way to the middle is ancestral (k-diffusion's sample_dpmpp_sde).

    Both increments of a step belong to one Brownian path, of which the middle has seen the first part: the whole step's
    is made of two independent draws. With unrelated ones contrast is lost: 12 % of it in 20 steps.

    x (B, C, h, w) at levels[0]. Two evaluations and two draws of noise a step; one and none where the next is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        if b.sigma == 0:
            x = move(x, x0, a, b)
        else:
            middle = levels.between(a.ratio, b.ratio)
            down, up = ancestral(a, middle)
            first = noise(x)
            halfway = move(x, x0, a, below(middle, down)) + middle.alpha * up * first
            down, up = ancestral(a, b)
            share = (a.ratio - middle.ratio) / (a.ratio - b.ratio)
            whole = math.sqrt(share) * first + math.sqrt(1 - share) * noise(x)
            x = move(x, denoise(halfway, middle), a, below(b, down)) + b.alpha * up * whole
        yield Step(i, b, x, x0)


# ------------------------------------------------------------------------------------- multistep in lambda


def extrapolated(x0: Tensor, a: Level, b: Level, before: tuple[Level, Tensor] | None) -> Tensor:
    """x0 in the middle of the step from a to b, along the line through this x0 and that of the step before."""
    if before is None:
        return x0
    level, x0_before = before
    return x0 + (log_steps(a, b) / (2 * log_steps(level, a))) * (x0 - x0_before)


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2: `move` with x0 extrapolated to the middle of the step.

    First order in the first step, where the next level is clean, and at the end of a run of few steps.
    x (B, C, h, w) at levels[0]. One evaluation a step.
    """
    before = None
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        plain = b.sigma == 0 or (len(levels) <= FEW_STEPS and i == len(levels) - 2)
        x = move(x, x0 if plain else extrapolated(x0, a, b, before), a, b)
        before = a, x0
        yield Step(i, b, x, x0)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), Lu et al. 2022b, section 5: down to r_b² / r_a, twice as far in lambda, and noise back up.

    x (B, C, h, w) at levels[0]. One evaluation and one draw of noise a step; none where the next level is clean.
    """
    before = None
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        if b.sigma == 0:
            x = move(x, x0, a, b)
        else:
            down = b.ratio**2 / a.ratio
            up = math.sqrt(b.ratio**2 - down**2)
            x = back_up(move(x, extrapolated(x0, a, b, before), a, below(b, down)), b, up, noise)
        before = a, x0
        yield Step(i, b, x, x0)


def unipc(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """UniPC-2 for x0 with B(h) = e^h - 1, Zhao et al. 2023: predicts as `dpmpp_2m`, then corrects where it came from.

    The evaluation at the start of a step also tells how the step before should have ended: x is first set right.
    x (B, C, h, w) at levels[0]. One evaluation a step.
    """
    before = None  # level and x0 of the step before
    start = None  # where the step before started: level, x0, the x0 that it moved with, and what was before that
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        if start is not None:
            level, x0_start, moved_with, earlier = start
            x = x + of_x0(level, a) * (corrected(level, x0_start, earlier, a, x0) - moved_with)
        plain = b.sigma == 0 or (len(levels) <= FEW_STEPS and i == len(levels) - 2)
        best = x0 if plain else extrapolated(x0, a, b, before)
        start = a, x0, best, before
        x = move(x, best, a, b)
        before = a, x0
        yield Step(i, b, x, x0)


def corrected(a: Level, x0: Tensor, before: tuple[Level, Tensor] | None, b: Level, x0_b: Tensor) -> Tensor:
    """UniC (Zhao et al. 2023, eq. 9 and section 3.2): the x0 to move from a to b with, now that x0 at b is known."""
    h = log_steps(a, b)
    growth = math.expm1(-h)  # B(-h), as lambda falls from b back to a
    phi2 = growth / -h - 1
    if before is None:
        return x0 + 0.5 * (x0_b - x0)
    level, x0_before = before
    r = -log_steps(level, a) / h  # where the step before began, in steps; negative
    phi3 = phi2 / -h - 0.5
    # weights of the two differences, so that the result is exact for an x0 that is a parabola in lambda
    back, ahead = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi2 / growth, 2 * phi3 / growth]).tolist()
    return x0 + (back / r) * (x0_before - x0) + ahead * (x0_b - x0)


# ------------------------------------------------------------------------------------- registry


class Option(NamedTuple):
    """A setting that one sampler has and others do not."""

    default: float
    low: float
    high: float
    help: str


class Sampler(NamedTuple):
    """What a caller needs to know to offer a sampler; --help and the table in docs are made from it."""

    label: str  # the name that people and image metadata use
    run: Callable[..., Iterator[Step]]  # (denoise, x, levels, *, noise, **options), in every one of them
    paper: str
    order: int
    evaluations: int  # of the network in a step
    random: bool  # whether it draws noise; one with the option eta does only where that is above 0
    spacing: str  # its customary grid, one of SPACINGS
    steps: int  # a customary number of steps
    options: Mapping[str, Option] = MappingProxyType({})  # keyword arguments of `run`

    def draws(self, options: Mapping[str, float] = MappingProxyType({})) -> bool:
        """Whether a run with these options draws noise."""
        return self.random or options.get("eta", 0.0) > 0


ETA = Option(0.0, 0.0, 1.0, "share of fresh noise in each step: 0 none, 1 as much as DDPM")
ORDER = Option(4, 1, 4, "how many of the last steps it extrapolates from")

HO, LIU, KARRAS = "Ho et al. 2020", "Liu et al. 2022", "Karras et al. 2022"
LU_A, LU_B, CROWSON = "Lu et al. 2022a", "Lu et al. 2022b", "k-diffusion"
SAMPLERS = {
    "ddim": Sampler("DDIM", ddim, "Song et al. 2021", 1, 1, False, "leading", 50, MappingProxyType({"eta": ETA})),
    "ddpm": Sampler("DDPM", ddpm, HO, 1, 1, True, "leading", 1000),
    "plms": Sampler("PLMS", plms, LIU, 4, 1, False, "leading", 50),
    "lms": Sampler("LMS", lms, CROWSON, 4, 1, False, "linspace", 50, MappingProxyType({"order": ORDER})),
    "euler": Sampler("Euler", euler, KARRAS, 1, 1, False, "linspace", 30),
    "euler_a": Sampler("Euler a", euler_a, CROWSON, 1, 1, True, "linspace", 30),
    "heun": Sampler("Heun", heun, KARRAS, 2, 2, False, "linspace", 20),
    "dpm2": Sampler("DPM2", dpm2, LU_A, 2, 2, False, "karras", 20),
    "dpm2_a": Sampler("DPM2 a", dpm2_a, LU_A, 1, 2, True, "karras", 20),
    "dpmpp_2s_a": Sampler("DPM++ 2S a", dpmpp_2s_a, LU_B, 1, 2, True, "karras", 20),
    "dpmpp_2m": Sampler("DPM++ 2M", dpmpp_2m, LU_B, 2, 1, False, "karras", 25),
    "dpmpp_sde": Sampler("DPM++ SDE", dpmpp_sde, LU_B, 1, 2, True, "karras", 20),
    "dpmpp_2m_sde": Sampler("DPM++ 2M SDE", dpmpp_2m_sde, LU_B, 1, 1, True, "karras", 25),
    "unipc": Sampler("UniPC", unipc, "Zhao et al. 2023", 3, 1, False, "karras", 30),
}

# other names of the original's scripts, k-diffusion, A1111, ComfyUI, and diffusers' classes without "Scheduler"
ALIASES = {
    "plms": ("pndm",),
    "lms": ("LMSDiscrete",),
    "euler": ("EulerDiscrete",),
    "euler_a": ("euler ancestral", "EulerAncestralDiscrete"),
    "heun": ("HeunDiscrete",),
    "dpm2": ("dpm_2", "KDPM2Discrete"),
    "dpm2_a": ("dpm_2_ancestral", "dpm2 ancestral", "KDPM2AncestralDiscrete"),
    "dpmpp_2s_a": ("dpmpp_2s_ancestral",),
    "dpmpp_2m": ("dpm_solver", "dpm_solver++", "DPMSolverMultistep"),
    "dpmpp_sde": ("DPMSolverSDE",),
    "unipc": ("uni_pc", "uni_pc_bh2", "UniPCMultistep"),
}


def _plain(name: str) -> str:
    """A name without case, spaces and signs; "++" and "pp" are the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


NAMES = {
    _plain(prefix + name): entry
    for key, entry in SAMPLERS.items()
    for name in (key, entry.label, *ALIASES.get(key, ()))
    for prefix in ("", "k_", "sample_")
}


def sampler(name: str) -> Sampler:
    """The sampler that goes by this name: ours, A1111's ("DPM++ 2M Karras"), the original scripts' ("k_lms") or
    diffusers' ("EulerDiscreteScheduler").

    A grid behind the name ("Karras", "exponential", ...) takes the place of its customary one. Raises ValueError that
    lists all names.
    """
    plain = _plain(name).removesuffix("scheduler")
    for spacing in SPACINGS:
        found = NAMES.get(plain.removesuffix(spacing))
        if found is not None and plain.endswith(spacing):
            return found._replace(spacing=spacing)
    if plain not in NAMES:
        grids = ", ".join(SPACINGS)
        raise ValueError(f"unknown sampler {name!r}, expected one of {', '.join(SAMPLERS)}; behind it, one of {grids}")
    return NAMES[plain]


def sampler_key(entry: Sampler) -> str:
    """The name of a sampler in `SAMPLERS`, whatever its grid."""
    return next(key for key, known in SAMPLERS.items() if known.label == entry.label)


def grid_in(name: str | Sampler) -> str | None:
    """The grid behind a sampler's name, if there is one: "karras" of "DPM++ 2M Karras"."""
    plain = _plain(name).removesuffix("scheduler") if isinstance(name, str) else ""
    return next((spacing for spacing in SPACINGS if plain.endswith(spacing)), None)
