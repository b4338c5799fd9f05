"""The two original samplers: DDPM and DDIM.

Ho et al. 2020, "Denoising diffusion probabilistic models"; Song et al. 2021, "Denoising diffusion implicit models".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ..schedule import Level, Levels
from .step import Denoise, Noise, Step, move


def ddpm(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """Ancestral sampling from the posterior, Ho et al. 2020, eq. 6 and 7, on any subset of the timesteps.

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
        std = eta * posterior(a, b)[2] if eta > 0 else 0.0
        x = move(x, x0, a, Level(b.t, b.alpha, math.sqrt(max(b.sigma**2 - std**2, 0.0))))
        if noise is not None and std > 0:
            x = x + std * noise(x)
        yield Step(i, b, x, x0)
