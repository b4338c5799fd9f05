"""DPM-Solver++ and UniPC: x0 is extrapolated within a step, in lambda = ln(alpha / sigma).

Lu et al. 2022b, "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models"; Zhao et al. 2023,
"UniPC: a unified predictor-corrector framework for fast sampling of diffusion models".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..schedule import Level, Levels
from .karras import ancestral, back_up, below
from .step import Denoise, Noise, Step, log_steps, move, of_x0

FEW_STEPS = 15  # below it DPM-Solver++ and UniPC end with a step of first order, which is more stable


def dpmpp_2s_a(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2S), Lu et al. 2022b, algorithm 1, ancestral: `move` with x0 from the middle of the step.

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
    """`dpmpp_2s_a` for the stochastic equation: the step to the middle is ancestral, too (k-diffusion's dpmpp_sde).

    The noise added in the middle and at the end belongs to one Brownian path: the increment of the whole step contains
    that of its first part. With independent noise, contrast is lost: 12 % of it in 20 steps.

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


def extrapolated(x0: Tensor, a: Level, b: Level, before: tuple[Level, Tensor] | None) -> Tensor:
    """x0 in the middle of the step from a to b, on the line through this x0 and that of the previous step."""
    if before is None:
        return x0
    level, x0_before = before
    return x0 + (log_steps(a, b) / (2 * log_steps(level, a))) * (x0 - x0_before)


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2: `move` with x0 extrapolated to the middle of the step.

    First order in the first step, if the next level is clean, and in the last step of a short run.
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
    """SDE-DPM-Solver++(2M), Lu et al. 2022b, section 5: down to r_b² / r_a, twice as far in lambda, plus noise.

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
    """UniPC-2 for x0 with B(h) = e^h - 1, Zhao et al. 2023: `dpmpp_2m` as predictor, with a corrector.

    The evaluation at the start of a step is also used to correct the previous step: x is updated first.
    x (B, C, h, w) at levels[0]. One evaluation a step.
    """
    before: tuple[Level, Tensor] | None = None  # level and x0 of the previous step
    # of the previous step: level, x0, the x0 that it moved with, and its `before`
    start: tuple[Level, Tensor, Tensor, tuple[Level, Tensor] | None] | None = None
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
    """UniC (Zhao et al. 2023, eq. 9 and section 3.2): the x0 to move with from a to b, given x0 at b."""
    h = log_steps(a, b)
    growth = math.expm1(-h)  # B(-h), as lambda falls from b back to a
    phi2 = growth / -h - 1
    if before is None:
        return x0 + 0.5 * (x0_b - x0)
    level, x0_before = before
    r = -log_steps(level, a) / h  # start of the previous step in units of this one; negative
    phi3 = phi2 / -h - 0.5
    # weights of the two differences that are exact if x0 is quadratic in lambda
    back, ahead = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi2 / growth, 2 * phi3 / growth]).tolist()
    return x0 + (back / r) * (x0_before - x0) + ahead * (x0_b - x0)
