"""Distillation of a diffusion model into one that needs a few steps: losses, pure functions of tensors.

A sampler of many steps follows a curve from noise to data, the solution of the probability flow ODE. A consistency
function returns the curve's end from any of its points, so that it needs one step. Two points of a curve have the same
end, and this is how a student learns it: one step of the teacher leads from x_t to a cleaner x_u, and what the student
says at x_t has to be what it says at x_u.

    t, u, s      timesteps of the solver's grid, t > u >= s: the two points, and the goal of TCD; -1 is clean data
    x_u          = alpha_u x0 + sigma_u eps, one DDIM step from x_t by the teacher's guided prediction
    f(x, t)      = c_skip(t) x + c_out(t) x0(x, t)                      Song et al. 2023, "Consistency models", eq. 5
                 c_skip = d² / ((c t)² + d²),  c_out = c t / sqrt((c t)² + d²),  d = 0.5, c = 10
                                                                        Luo et al. 2023, "Latent consistency models"
    f(x, t, s)   = alpha_s x0(x, t) + sigma_s eps(x, t)                 Zheng et al. 2024, "Trajectory consistency
                                                                        distillation" (TCD), section 4.1
    LCM          d(student's f(x_t, t), target's f(x_u, u))             Luo et al. 2023, eq. 10 and 14
    TCD          d(student's f(x_t, t, s), target's f(x_u, u, s))       s at random below u
    d(a, b)      = sqrt((a - b)² + h²) - h, pseudo-Huber                Song and Dhariwal 2023, section 3.3

x0(x, t) and eps(x, t) are what a network's prediction, eps or v, says of the clean data and the noise. The target is
the student itself, or the moving average of its weights, without gradient. Where u is clean data, it is x_u: the
boundary condition f(x, clean) = x, from which the student learns all else.

>>> schedule = Schedule()
>>> grid = solver_timesteps(schedule, 50)
>>> grid[:3], grid[-1]
((-1, 19, 39), 999)
>>> x0, noise, cond = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), Conditioning(torch.zeros(2, 77, 16))
>>> knows = lambda x, t, conditioning: noise  # a teacher for which all curves are straight lines
>>> t, u = torch.tensor([999, 19]), torch.tensor([979, -1])
>>> points = solver_step(knows, schedule, schedule.add_noise(x0, noise, level_batch(schedule, t)), t, u, cond)
>>> torch.allclose(points.x_u[1], x0[1], atol=1e-5)
True
>>> trajectory_loss(knows, knows, schedule, points, torch.tensor([19, -1]), cond).item() < 1e-6
True
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..conditioning import Conditioning, Network
from ..denoiser import concatenate
from ..samplers import move
from ..samplers.consistency import SIGMA_DATA, TIMESTEP_SCALING
from ..schedule import Schedule
from .losses import level_batch

HUBER = 1e-3  # h: of the code of Luo et al. 2023


class Points(NamedTuple):
    """Two points of one curve of the teacher: x_t and x_u (B, C, h, w), at the integer timesteps t and u (B,)."""

    x_t: Tensor
    t: Tensor
    x_u: Tensor
    u: Tensor


def solver_timesteps(schedule: Schedule, steps: int) -> tuple[int, ...]:
    """The grid of a solver with this number of steps, ascending: -1 for clean data, then `steps` timesteps.

    Raises ValueError if `steps` does not divide the number of timesteps.
    """
    if steps < 1 or schedule.steps % steps:
        raise ValueError(f"solver steps must divide the {schedule.steps} timesteps of the model, got {steps}")
    stride = schedule.steps // steps
    return tuple(range(-1, schedule.steps, stride))


def guided(network: Network, uncond: Conditioning, guidance: Tensor) -> Network:
    """A network that predicts with guidance, u + guidance (c - u), of a strength (B,) for each image.

    uncond   the empty prompt, for one image or B

    Both predictions are computed in one batch. See denoiser.py.
    """
    scale = guidance[:, None, None, None]

    def predict(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        without = uncond if cond.concat is None else uncond.with_concat(cond.concat)
        out = network(x.repeat(2, 1, 1, 1), t.repeat(2), concatenate([without, cond], len(x))).float()
        u, c = out.chunk(2)
        return u + scale * (c - u)

    return predict


@torch.no_grad()
def solver_step(
    teacher: Network, schedule: Schedule, x_t: Tensor, t: Tensor, u: Tensor, cond: Conditioning, substeps: int = 1
) -> Points:
    """Follow the teacher by DDIM from x_t (B, C, h, w) at t (B,) to u (B,), below t; -1 is clean data.

    substeps   steps on the way, evenly spaced in whole timesteps; more of them follow the curve more closely
    """
    x, now = x_t, t
    for i in range(1, substeps + 1):
        following = t - (t - u) * i // substeps
        a, b = level_batch(schedule, now), level_batch(schedule, following)
        there = now > following  # there may be fewer timesteps than substeps
        moved = move(x, schedule.to_x0(teacher(x, now.clamp(min=0), cond).float(), x, a), a, b)
        x, now = torch.where(there[:, None, None, None], moved, x), following
    return Points(x_t, t, x, u)


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B, 1, 1, 1) of timesteps t (B,), as in the sampler (samplers/consistency.py)."""
    scaled = TIMESTEP_SCALING * t.float()[:, None, None, None]
    squares = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / squares, scaled * squares.rsqrt()


def consistency(network: Network, schedule: Schedule, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """f(x, t): the end of the curve through x (B, C, h, w) at t (B,), in float32. Song et al. 2023, eq. 5."""
    x0 = schedule.to_x0(network(x, t, cond).float(), x, level_batch(schedule, t))
    c_skip, c_out = boundary_scalings(t)
    return c_skip * x + c_out * x0


def trajectory(network: Network, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
    """f(x, t, s): the point at s (B,) of the curve through x (B, C, h, w) at t (B,), in float32. Zheng et al. 2024."""
    level = level_batch(schedule, t)
    x0 = schedule.to_x0(network(x, t, cond).float(), x, level)
    return move(x, x0, level, level_batch(schedule, s))


def pseudo_huber(a: Tensor, b: Tensor, h: float = HUBER, weight: Tensor | None = None) -> Tensor:
    """Mean of sqrt((a - b)² + h²) - h: quadratic for differences below h, their absolute value above.

    weight   (B,) of each item of a and b (B, ...), default 1
    """
    error = ((a - b).square() + h**2).sqrt()
    return error.mean() - h if weight is None else (weight * (error.flatten(1).mean(1) - h)).mean()


def consistency_loss(
    student: Network,
    target: Network,
    schedule: Schedule,
    points: Points,
    cond: Conditioning,
    h: float = HUBER,
    weight: Tensor | None = None,
) -> Tensor:
    """LCM's loss: f of the student at x_t and of the target at x_u shall be equal -> a scalar (Luo et al. 2023).

    `weight` (B,) is that of each item, by default 1.

    With autocast the student has to be called first, which it is: a weight that is first rounded without gradients is
    kept that way for the whole step.
    """
    said = consistency(student, schedule, points.x_t, points.t, cond)
    with torch.no_grad():
        end = consistency(target, schedule, points.x_u, points.u.clamp(min=0), cond)
        end = torch.where(_is_clean(points.u), points.x_u, end)
    return pseudo_huber(said, end, h, weight)


def trajectory_loss(
    student: Network,
    target: Network,
    schedule: Schedule,
    points: Points,
    s: Tensor,
    cond: Conditioning,
    h: float = HUBER,
    weight: Tensor | None = None,
) -> Tensor:
    """TCD's loss: f to s (B,), at most u, of the student at x_t and of the target at x_u shall be equal -> a scalar.

    Zheng et al. 2024, section 4.2. `weight` (B,) is that of each item, by default 1. The student is called first, for
    the reason given in `consistency_loss`.
    """
    said = trajectory(student, schedule, points.x_t, points.t, s, cond)
    with torch.no_grad():
        point = trajectory(target, schedule, points.x_u, points.u.clamp(min=0), s, cond)
        point = torch.where(_is_clean(points.u), points.x_u, point)
    return pseudo_huber(said, point, h, weight)


def _is_clean(t: Tensor) -> Tensor:
    return (t < 0)[:, None, None, None]
