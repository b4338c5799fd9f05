"""Solvers of dy/dr = eps by slopes, and their ancestral variants, as in k-diffusion.

Karras et al. 2022, "Elucidating the design space of diffusion-based generative models"; Lu et al. 2022a, "DPM-Solver".
An ancestral step goes further than b, down to the ratio r_down, and returns to b with fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import Tensor

from ..schedule import Level, Levels
from .step import Denoise, Noise, Step, eps_of, move


def euler(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Euler's method (Karras et al. 2022, algorithm 1 without the correction); DDIM by another name.

    x (B, C, h, w) at levels[0]. One evaluation a step.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        x = move(x, x0, a, b)
        yield Step(i, b, x, x0)


def heun(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Karras et al. 2022, algorithm 1: an Euler step, repeated with the mean of the slopes at its two ends.

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


def dpm2(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Midpoint method: the slope in the middle of the step, in lambda (DPM-Solver-2, Lu et al. 2022a).

    x (B, C, h, w) at levels[0]. Two evaluations a step, one where the next level is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        x = midpoint_step(denoise, x, x0, a, b, levels.between)
        yield Step(i, b, x, x0)


def midpoint_step(
    denoise: Denoise, x: Tensor, x0: Tensor, a: Level, b: Level, between: Callable[[float, float], Level]
) -> Tensor:
    """x at level a -> x at level b, with the slope in the middle of the step."""
    if b.sigma == 0:
        return move(x, x0, a, b)
    middle = between(a.ratio, b.ratio)
    halfway = move(x, x0, a, middle)
    slope = eps_of(halfway, denoise(halfway, middle), middle)
    return b.alpha * (x / a.alpha + (b.ratio - a.ratio) * slope)


def ancestral(a: Level, b: Level) -> tuple[float, float]:
    """(r_down, r_up) with r_down² + r_up² = r_b²: the ratio to step down to, and that of the noise to add.

    The same amount of noise as in the posterior of Ho et al. 2020 (k-diffusion's get_ancestral_step).
    """
    up = b.ratio * math.sqrt(max(1 - (b.ratio / a.ratio) ** 2, 0.0))
    return math.sqrt(max(b.ratio**2 - up**2, 0.0)), up


def below(b: Level, ratio: float) -> Level:
    """The level of an ancestral step before its noise is added: alpha of b, and sigma = ratio alpha."""
    return Level(b.t, b.alpha, b.alpha * ratio)


def back_up(x: Tensor, b: Level, up: float, noise: Noise | None) -> Tensor:
    """Add noise of the ratio `up` to x, which returns it to level b."""
    return x + b.alpha * up * noise(x) if up > 0 and noise is not None else x


def euler_a(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """Euler's method, ancestral: the same as DDIM with eta 1.

    x (B, C, h, w) at levels[0]. One evaluation and one draw of noise a step; none where the next level is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        down, up = ancestral(a, b)
        x = back_up(move(x, x0, a, below(b, down)), b, up, noise)
        yield Step(i, b, x, x0)


def dpm2_a(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """`dpm2`, ancestral.

    x (B, C, h, w) at levels[0]. Two evaluations and one draw of noise a step; one and none where the next is clean.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        down, up = ancestral(a, b)
        x = back_up(midpoint_step(denoise, x, x0, a, below(b, down), levels.between), b, up, noise)
        yield Step(i, b, x, x0)
