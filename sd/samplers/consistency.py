"""Samplers for models that are distilled to need few steps, 1 to 8: LCM and TCD.

The network of such a model is trained to be a consistency function: from any point x_t of a trajectory of the
probability flow it predicts the x0 where that trajectory ends, and not, as others do, the mean of all x0 that x_t may
come from. So one evaluation gives an image. Further steps add noise to it, less each time, and predict again.

    Luo et al. 2023, "Latent consistency models: synthesizing high-resolution images with few-step inference" (LCM)
    Zheng et al. 2024, "Trajectory consistency distillation: improved latent consistency distillation by semi-linear
    consistency function with trajectory mapping" (TCD)

Both are made for the spacing "lcm", the timesteps that these models are trained on, or "trailing". With an ordinary
model, their images are blurred: its prediction is a mean.

>>> import torch
>>> from sd.schedule import Schedule
>>> levels = Schedule().levels(4, "lcm")
>>> [level.t for level in levels]
[999.0, 759.0, 499.0, 259.0, -1.0]
>>> [step.level.t for step in tcd(lambda x, level: 0 * x, torch.randn(1, 4, 8, 8), levels, noise=torch.randn_like)]
[759.0, 499.0, 259.0, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ..schedule import Levels
from .step import Denoise, Noise, Step, move

SIGMA_DATA = 0.5  # standard deviation of the data in the boundary condition, as in the code of Luo et al.
TIMESTEP_SCALING = 10.0  # factor of t there


def lcm(denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """Multistep latent consistency sampling (Luo et al. 2023): predict x0, and add the noise of level b.

        x0  <- c_skip x + c_out x0                      see `boundary`
        x_b = alpha_b x0 + sigma_b noise

    x (B, C, h, w) at levels[0]. One evaluation and one draw of noise a step; none in the last step, which gives x0
    even if its level is not clean (the spacing leading). Grids that evaluate timestep 0 (linspace, karras, exponential)
    waste this evaluation: there the boundary condition makes x0 equal to x.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        c_skip, c_out = boundary(a.t)
        x0 = c_skip * x + c_out * denoise(x, a)
        x = x0 if i == len(levels) - 2 else b.alpha * x0 + b.sigma * noise(x)
        yield Step(i, b, x, x0)


def boundary(t: float) -> tuple[float, float]:
    """(c_skip, c_out) at timestep t, which make x0 equal to x at t = 0, as the consistency function is there.

    c_skip = s² / (T² + s²), c_out = T / sqrt(T² + s²) with T = 10 t and s = 0.5: next to 0 and 1 for all other t.
    """
    scaled = TIMESTEP_SCALING * t
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / math.hypot(scaled, SIGMA_DATA)


def tcd(
    denoise: Denoise, x: Tensor, levels: Levels, *, gamma: float = 0.3, noise: Noise | None = None
) -> Iterator[Step]:
    """Strategic stochastic sampling (Zheng et al. 2024): DDIM down to s, then noise up to b.

        s   = (1 - gamma) t_b, rounded down to a whole timestep
        x_s = alpha_s x0 + sigma_s eps
        x_b = (alpha_b / alpha_s) x_s + sqrt(1 - (alpha_b / alpha_s)²) noise

    gamma in [0, 1]: 0 draws nothing and is DDIM; with 1 all noise of x_b is fresh, but for that of timestep 0.
    x (B, C, h, w) at levels[0]. One evaluation and at most one draw a step. The last step ends at timestep 0, not at
    clean data, and draws nothing, as in the authors' code.
    """
    if gamma > 0 and noise is None:
        raise ValueError(f"tcd with gamma {gamma:g} draws noise in its steps: give it `noise`")
    for i, (a, b) in enumerate(pairwise(levels)):
        if b.sigma == 0 and a.t >= 1:
            b = levels.schedule.level(0)
        x0 = denoise(x, a)
        s = b
        if gamma > 0 and b.sigma > 0:
            s = levels.schedule.level(math.floor((1 - gamma) * b.t))
        x = move(x, x0, a, s)
        kept = b.alpha / s.alpha
        if noise is not None and kept < 1:
            x = kept * x + math.sqrt(1 - kept**2) * noise(x)
        yield Step(i, b, x, x0)
