"""What all samplers share: their types, and the exact step between two noise levels for a constant x0.

A denoiser predicts the clean data x0 from x_t at a noise level. A sampler walks down a list of levels with it, and is a
generator of steps: the caller drives it, shows progress, looks at a step or stops early. The sampler continues from
`step.x`, which the caller may change in place. Samplers know nothing about networks and guidance.

All of them use x_t = alpha x0 + sigma eps with alpha² + sigma² = 1 (schedule.py). In the equations, a is the level at
the start of a step and b the next, less noisy one; eps = (x - alpha_a x0) / sigma_a.

DDIM (equation 13) and later papers also use y = x / alpha = x0 + r eps, with r = sigma / alpha (`Level.ratio`; it is
"sigma" in Karras et al. 2022 and in k-diffusion) and lambda = -ln r. Sampling is then the solution of dy/dr = eps, and
`move` is the exact solution for a constant x0. So most samplers differ only in the x0 that they move with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..schedule import Level

Denoise = Callable[[Tensor, Level], Tensor]  # (x_t, level) -> x0, of the same shape
Noise = Callable[[Tensor], Tensor]  # unit normal noise in the shape of its argument


class Step(NamedTuple):
    """The state x after step i (counted from 0), its `level`, and the x0 predicted in the step."""

    i: int
    level: Level
    x: Tensor
    x0: Tensor


def move(x: Tensor, x0: Tensor, a: Level, b: Level) -> Tensor:
    """x at level a -> alpha_b x0 + sigma_b eps at level b, with the eps that x and x0 imply.

    This is the deterministic DDIM step, Euler's method in y and r, and the first-order exponential integrator in lambda
    (DPM-Solver-1).
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
