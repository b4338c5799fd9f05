"""Distillation: losses against scalar arithmetic, and on a Gaussian, whose consistency function is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sd.conditioning import Conditioning
from sd.config import ScheduleConfig
from sd.denoiser import Denoiser
from sd.samplers import ddim
from sd.schedule import Level, Levels, Schedule
from sd.training import (
    Points,
    consistency,
    consistency_loss,
    guided,
    level_batch,
    pseudo_huber,
    solver_step,
    solver_timesteps,
    trajectory,
    trajectory_loss,
)

DEVIATION = 0.7  # of the data; its mean is the context
COND, UNCOND, GUIDANCE = 1.0, -0.5, 3.0
MEAN = UNCOND + GUIDANCE * (COND - UNCOND)  # of the data that guidance leads to: x0 is linear in the mean


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean(value: float, n: int = 1) -> Conditioning:
    return Conditioning(torch.full((n, 1, 1), value))


def said(schedule: Schedule, x0: Tensor, x: Tensor, level: Level) -> Tensor:
    """The output of a network that says x0."""
    if schedule.config.prediction == "v":
        return (level.alpha * x - x0) / level.sigma
    return (x - level.alpha * x0) / level.sigma


def gaussian(schedule: Schedule):
    """The network that knows the data: E[x0 | x_t] of N(context, DEVIATION²)."""

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        level = level_batch(schedule, t.long())  # the sampler's are floats
        mu = cond.context[:, :, :, None]
        gain = DEVIATION**2 * level.alpha / (level.alpha**2 * DEVIATION**2 + level.sigma**2)
        return said(schedule, mu + gain * (x - level.alpha * mu), x, level)

    return network


def spread(level: Level) -> Tensor:
    """The standard deviation of x_t."""
    return (level.alpha**2 * DEVIATION**2 + level.sigma**2) ** 0.5


def exact(schedule: Schedule, mu: float = MEAN, s: Tensor | None = None, late: int = 0):
    """The network whose consistency function is the Gaussian's, to clean data or to the timesteps s.

    late   added to the timestep: a fault
    """

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        level, wrong = level_batch(schedule, t), level_batch(schedule, (t + late).clamp(0, 999))
        goal = level_batch(schedule, torch.full_like(t, -1) if s is None else s)
        point = goal.alpha * mu + spread(goal) / spread(wrong) * (x - wrong.alpha * mu)
        if s is None:  # f = c_skip x + c_out x0
            scaled = 10.0 * t[:, None, None, None]
            c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
            x0 = (point - c_skip * x) / c_out
        else:  # f = alpha_s x0 + sigma_s (x - alpha x0) / sigma
            share = goal.alpha - goal.sigma * level.alpha / level.sigma
            x0 = torch.where(share == 0, 0.0, (point - goal.sigma / level.sigma * x) / share)
        return said(schedule, x0, x, level)

    return network


def points_of(schedule: Schedule, steps: int, guidance: float = GUIDANCE, n: int = 4000) -> tuple[Points, Tensor]:
    """Pairs of points of the guided Gaussian's curves, and timesteps s at most u."""
    grid = torch.tensor(solver_timesteps(schedule, steps))
    index = torch.randint(0, steps, (n,), generator=rng(1))
    t, u = grid[index + 1], grid[index]
    s = grid[(torch.rand(n, generator=rng(2)) * (index + 1)).long()]
    x0 = MEAN + DEVIATION * torch.randn(n, 1, 1, 1, generator=rng(3))
    x_t = schedule.add_noise(x0, torch.randn(n, 1, 1, 1, generator=rng(4)), level_batch(schedule, t))
    teacher = guided(gaussian(schedule), mean(UNCOND), torch.full((n,), guidance))
    return solver_step(teacher, schedule, x_t, t, u, mean(COND, n)), s


@pytest.fixture(params=["eps", "v"])
def schedule(request) -> Schedule:
    return Schedule(ScheduleConfig(prediction=request.param))


def test_grid_of_the_solver():
    grid = solver_timesteps(Schedule(), 50)
    assert grid == (-1, *range(19, 1000, 20))
    assert solver_timesteps(Schedule(), 1000) == tuple(range(-1, 1000))
    for steps in (0, -50, 3, 1001):
        with pytest.raises(ValueError, match="must divide the 1000 timesteps of the model"):
            solver_timesteps(Schedule(), steps)


def test_a_batch_of_levels_has_clean_data():
    level = level_batch(Schedule(), torch.tensor([-1, 0, 999]))
    assert level.alpha[0].item() == 1 and level.sigma[0].item() == 0
    assert level.alpha[1].item() == pytest.approx(Schedule().level(0).alpha, rel=1e-6)
    with pytest.raises(IndexError):
        level_batch(Schedule(), torch.tensor([1000]))


def test_losses_are_their_closed_forms(schedule):
    """Image by image, with the scalar levels of the schedule; the last has the boundary condition."""
    t, u, s = torch.tensor([999, 519, 19]), torch.tensor([979, 499, -1]), torch.tensor([979, 19, -1])
    x0, noise = (torch.randn(3, 2, 3, 3, generator=rng(i)) for i in (5, 6))
    cond, uncond = (Conditioning(torch.randn(n, 1, 1, generator=rng(i))) for n, i in ((3, 7), (1, 8)))
    guidance = torch.tensor([1.0, 4.0, 7.5])

    def network(factor: float):
        return lambda x, t, c: factor * x + (t / 1000)[:, None, None, None] + c.context[:, :, :, None]

    x_t = schedule.add_noise(x0, noise, level_batch(schedule, t))
    points = solver_step(guided(network(0.5), uncond, guidance), schedule, x_t, t, u, cond)
    losses = [
        consistency_loss(network(0.4), network(0.3), schedule, points, cond, 0.1).item(),
        trajectory_loss(network(0.4), network(0.3), schedule, points, s, cond, 0.1).item(),
    ]

    def clean(out: Tensor, x: Tensor, at: Level) -> Tensor:
        return at.alpha * x - at.sigma * out if schedule.config.prediction == "v" else (x - at.sigma * out) / at.alpha

    def jump(x: Tensor, clean: Tensor, a: Level, b: Level) -> Tensor:
        return b.alpha * clean + b.sigma * (x - a.alpha * clean) / a.sigma

    expected = [0.0, 0.0]
    for i in range(3):
        a, b, goal = (schedule.level(float(times[i])) for times in (t, u, s))
        c, un = cond.context[i].item(), uncond.context.item()
        x = a.alpha * x0[i] + a.sigma * noise[i]
        g = guidance[i].item()
        out = 0.5 * x + a.t / 1000 + un + g * (c - un)
        x_u = jump(x, clean(out, x, a), a, b)
        torch.testing.assert_close(points.x_u[i], x_u, rtol=1e-4, atol=1e-4)
        ends = []
        for factor, point, at in ((0.4, x, a), (0.3, x_u, b)):
            if at.t < 0:
                ends.append((point, point))
                continue
            skip = 0.25 / ((10 * at.t) ** 2 + 0.25)
            x0_said = clean(factor * point + at.t / 1000 + c, point, at)
            to_s = jump(point, x0_said, at, goal)
            ends.append((skip * point + 10 * at.t / math.sqrt((10 * at.t) ** 2 + 0.25) * x0_said, to_s))
        for k in (0, 1):
            expected[k] += ((ends[0][k] - ends[1][k]) ** 2 + 0.01).sqrt().sub(0.1).mean().item() / 3
    assert losses == pytest.approx(expected, rel=1e-3)


def test_pseudo_huber_is_quadratic_below_h_and_linear_above():
    zero = torch.zeros(1)
    assert pseudo_huber(torch.tensor([1e-2]), zero, 1.0).item() == pytest.approx(0.5e-4, rel=1e-2)
    assert pseudo_huber(torch.tensor([-5.0]), zero, 1e-3).item() == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("method", ["lcm", "tcd"])
def test_the_exact_function_has_only_the_error_of_the_solver(schedule, method):
    """It falls with the square of the number of steps: DDIM is of first order, and the points are one step apart."""
    losses = []
    for steps in (10, 50, 200):
        points, s = points_of(schedule, steps)
        cond = mean(COND, len(s))
        if method == "lcm":
            network = exact(schedule)
            losses.append(consistency_loss(network, network, schedule, points, cond, 1e-6).item())
        else:
            network, at_u = exact(schedule, s=s), exact(schedule, s=s)
            losses.append(trajectory_loss(network, at_u, schedule, points, s, cond, 1e-6).item())
    assert 0.003 < losses[0] < 0.1
    assert losses[1] < losses[0] / 10 and losses[2] < losses[1] / 6


def test_faults_are_seen(schedule):
    """A timestep too late, guidance ignored, a step in the wrong direction: far above the error of the solver."""
    points, s = points_of(schedule, 50)
    cond = mean(COND, len(s))
    good = consistency_loss(exact(schedule), exact(schedule), schedule, points, cond).item()
    late = consistency_loss(exact(schedule, late=20), exact(schedule), schedule, points, cond).item()
    unguided = consistency_loss(exact(schedule, mu=COND), exact(schedule, mu=COND), schedule, points, cond).item()
    backwards = points._replace(x_u=2 * points.x_t - points.x_u)
    wrong = consistency_loss(exact(schedule), exact(schedule), schedule, backwards, cond).item()
    assert min(late, unguided, wrong) > 8 * good, (good, late, unguided, wrong)


def test_functions_of_the_gaussian(schedule):
    """`consistency` and `trajectory` of the exact network are the curve's end and its point at s."""
    t, s = torch.tensor([999, 499, 19]), torch.tensor([499, -1, 0])
    x = torch.randn(3, 1, 1, 1, generator=rng())
    level, goal = level_batch(schedule, t), level_batch(schedule, s)
    end = MEAN + DEVIATION * (x - level.alpha * MEAN) / spread(level)
    point = goal.alpha * MEAN + spread(goal) * (x - level.alpha * MEAN) / spread(level)
    torch.testing.assert_close(consistency(exact(schedule), schedule, x, t, mean(0, 3)), end, atol=1e-4, rtol=1e-4)
    found = trajectory(exact(schedule, s=s), schedule, x, t, s, mean(0, 3))
    torch.testing.assert_close(found, point, atol=1e-4, rtol=1e-4)


class Lines(nn.Module):
    """A student that says x0 = a x + b, with its own a and b at each timestep of a grid."""

    def __init__(self, schedule: Schedule, steps: int) -> None:
        super().__init__()
        self.schedule, self.stride = schedule, schedule.steps // steps
        self.a, self.b = (nn.Parameter(torch.zeros(steps)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        i = t // self.stride
        x0 = self.a[i][:, None, None, None] * x + self.b[i][:, None, None, None]
        return said(self.schedule, x0, x, level_batch(self.schedule, t))


def test_substeps_follow_the_curve(schedule):
    """From one grid point to the next in n steps: what the sampler does there; closer to the curve with more."""
    n, t, u = 8, 999, 749
    teacher = guided(gaussian(schedule), mean(UNCOND), torch.full((n,), GUIDANCE))
    denoise = Denoiser(gaussian(schedule), schedule, mean(COND), mean(UNCOND), GUIDANCE)
    x = torch.randn(n, 1, 1, 1, generator=rng(11))

    def end(substeps: int, u: int = u) -> torch.Tensor:
        times = torch.full((n,), t), torch.full((n,), u)
        return solver_step(teacher, schedule, x, *times, mean(COND, n), substeps).x_u

    levels = Levels([schedule.level(t) for t in (999, 916, 833, 749)], schedule)
    *_, last = ddim(denoise, x, levels)
    assert torch.allclose(end(3), last.x, atol=1e-5)
    errors = [(end(k) - end(250)).abs().max() for k in (1, 2, 4, 8)]
    assert all(a > 1.7 * b for a, b in pairwise(errors))
    assert torch.allclose(end(5, 998), end(1, 998))  # one timestep cannot be divided
    assert end(4, -1).isfinite().all()


@pytest.mark.exhaustive
@torch.enable_grad()
def test_a_student_learns_where_the_solver_ends(schedule):
    """Of 5 steps: from every timestep it returns what the DDIM sampler returns after its remaining steps."""
    steps, n = 5, 64
    student = Lines(schedule, steps)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    grid = torch.tensor(solver_timesteps(schedule, steps))
    teacher = guided(gaussian(schedule), mean(UNCOND), torch.full((n,), GUIDANCE))
    draw = rng(9)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 500)
        index = torch.randint(0, steps, (n,), generator=draw)
        level = level_batch(schedule, grid[index + 1])
        x0 = MEAN + DEVIATION * torch.randn(n, 1, 1, 1, generator=draw)
        x_t = schedule.add_noise(x0, torch.randn(n, 1, 1, 1, generator=draw), level)
        points = solver_step(teacher, schedule, x_t, grid[index + 1], grid[index], mean(COND, n))
        loss = consistency_loss(student, student, schedule, points, mean(COND, n))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    denoise = Denoiser(gaussian(schedule), schedule, mean(COND), mean(UNCOND), GUIDANCE)
    x = torch.randn(20, 1, 1, 1, generator=rng(10))
    for first in range(steps):
        levels = Levels([schedule.level(float(t)) for t in reversed(grid[: first + 2].tolist())], schedule)
        start = schedule.add_noise(torch.full_like(x, MEAN), x, levels[0])
        *_, last = ddim(denoise, start, levels)
        with torch.no_grad():
            found = consistency(student, schedule, start, torch.full((20,), int(levels[0].t)), mean(COND, 20))
        assert (found - last.x).abs().max() < 0.05, first


@torch.enable_grad()
def test_the_gradient_is_the_students_with_autocast():
    """The target runs without gradients after it, so that no rounded weight is kept without its graph."""
    schedule = Schedule()
    layer = nn.Conv2d(1, 1, 3, padding=1)
    points, s = points_of(schedule, 50, n=8)
    for loss in (
        lambda net: consistency_loss(net, net, schedule, points, mean(COND, 8)),
        lambda net: trajectory_loss(net, net, schedule, points, s, mean(COND, 8)),
    ):
        gradients = []
        for enabled in (False, True):
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss(lambda x, t, cond: layer(x)).backward()
            gradients.append(layer.weight.grad.clone())
        assert gradients[0].abs().sum() > 0
        torch.testing.assert_close(*gradients, rtol=0.05, atol=0.02)
