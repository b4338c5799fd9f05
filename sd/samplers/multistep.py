"""Linear multistep methods: the noise eps of a step is extrapolated from those of previous steps (Adams-Bashforth).

PLMS: Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds". LMS: k-diffusion, after Karras et
al. 2022.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..schedule import Levels
from .step import Denoise, Noise, Step, eps_of, move

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds", eq. 12: the multistep part.

    eps is extrapolated from this and up to three previous steps, then used in a DDIM step. The first step has no
    previous one and takes the mean with an evaluation at its end instead. Made for evenly spaced grids.

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
            eps = weighted_sum(ADAMS_BASHFORTH[len(past) - 1], past)
        x0 = (x - a.sigma * eps) / a.alpha
        x = b.alpha * x0 + b.sigma * eps
        yield Step(i, b, x, x0)


def lms(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None, order: int = 4) -> Iterator[Step]:
    """Linear multistep: the exact integral of the polynomial through the last `order` slopes.

        y_b = y_a + sum_j w_j eps_j,   w_j = integral from r_a to r_b of prod_{k != j} (r - r_k) / (r_j - r_k)

    For any grid, as in k-diffusion. x (B, C, h, w) at levels[0]. One evaluation a step.
    """
    past: deque[tuple[float, Tensor]] = deque(maxlen=order)  # (r, eps), the newest first
    for i, (a, b) in enumerate(pairwise(levels)):
        x0 = denoise(x, a)
        past.appendleft((a.ratio, eps_of(x, x0, a)))
        weights = multistep_weights([r for r, _ in past], a.ratio, b.ratio)
        y = x / a.alpha + weighted_sum(weights, [eps for _, eps in past])
        x = b.alpha * y
        yield Step(i, b, x, x0)


def weighted_sum(weights: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    """The sum of weight * tensor."""
    return reduce(operator.add, (weight * tensor for weight, tensor in zip(weights, tensors, strict=True)))


def multistep_weights(points: Sequence[float], start: float, end: float) -> list[float]:
    """The integrals from start to end of the Lagrange polynomials of these points."""
    points, end, start = [point - start for point in points], end - start, 0.0  # loses fewer digits
    weights = []
    for j, point in enumerate(points):
        others = [*points[:j], *points[j + 1 :]]
        roots = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        integral = roots.integ()
        weights.append(float(integral(end) - integral(start)) / math.prod(point - other for other in others))
    return weights
