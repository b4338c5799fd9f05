"""Samplers: from noise to data, as generators over a denoiser.

A denoiser says for x_t at a level what the clean data x0 is; a sampler walks down a list of levels with it and yields
every step. A sampler knows no network, no guidance and no schedule, and the caller drives: to show progress, to look
at a step or to stop early, iterate.

    for step in ddim(denoise, x, levels):
        ...                                  step.x is the state, step.x0 the data predicted in this step

All of them use x_t = alpha x0 + sigma eps with alpha² + sigma² = 1 (schedule.py). In the equations a is the level
that a step starts from and b the next, less noisy one; eps = (x - alpha_a x0) / sigma_a.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .schedule import Level

Denoise = Callable[[Tensor, Level], Tensor]  # (x_t, level) -> x0, the same shape
Noise = Callable[[Tensor], Tensor]  # unit normal numbers in the shape of its argument


class Step(NamedTuple):
    """The state after step i (from 0) and the x0 predicted in it; `level` is the one now reached."""

    i: int
    level: Level
    x: Tensor
    x0: Tensor


def ddpm(denoise: Denoise, x: Tensor, levels: Sequence[Level], *, noise: Noise) -> Iterator[Step]:
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
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, eta: float = 0.0, noise: Noise | None = None
) -> Iterator[Step]:
    """Song et al. 2021, "Denoising diffusion implicit models", eq. 12 and 16.

        std = eta (sigma_b / sigma_a) sqrt(1 - alpha_a² / alpha_b²)
        x_b = alpha_b x0 + sqrt(sigma_b² - std²) eps + std noise

    x (B, C, h, w) at levels[0]. eta 0 is deterministic and draws nothing; eta 1 is `ddpm`. One evaluation a step.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"ddim with eta {eta} draws noise in every step: give it `noise`")
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        std = eta * (b.sigma / a.sigma) * math.sqrt(1.0 - (a.alpha / b.alpha) ** 2)
        of_eps = math.sqrt(max(b.sigma**2 - std**2, 0.0))
        # eps written out, so that its two halves become two multiplications
        x = (b.alpha - of_eps * a.alpha / a.sigma) * x0 + (of_eps / a.sigma) * x
        if noise is not None and std > 0:
            x = x + std * noise(x)
        yield Step(i, b, x, x0)


class Sampler(NamedTuple):
    """What a caller needs to know to offer a sampler."""

    label: str  # the name that picture metadata carries
    run: Callable[..., Iterator[Step]]
    spacing: str  # its customary grid
    steps: int  # a customary number of steps
    stochastic: str  # "always", "eta" (only where eta > 0) or "never"


SAMPLERS = {
    "ddim": Sampler("DDIM", ddim, spacing="leading", steps=50, stochastic="eta"),
    "ddpm": Sampler("DDPM", ddpm, spacing="leading", steps=1000, stochastic="always"),
}


def sampler(name: str) -> Sampler:
    """The sampler of this name, upper or lower case. Raises ValueError that lists them all."""
    found = SAMPLERS.get(name.lower())
    if found is None:
        raise ValueError(f"unknown sampler {name!r}, expected one of {', '.join(SAMPLERS)}")
    return found
