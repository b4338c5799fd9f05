"""Samplers compared: distance to the exact solution over the number of network evaluations.

All deterministic samplers solve the same differential equation (Song et al. 2021, "Score-based generative modeling
through stochastic differential equations", eq. 13), so from the same noise they converge to the same image as the steps
get smaller. A method of order k has an error of about C / n^k after n steps: a line of slope -k on logarithmic axes.

>>> reference = replace(REFERENCE, steps=16, seed=3)
>>> (ddim,) = convergence(StableDiffusion.load(), "a red house", reference, samplers=["ddim"], steps=[2, 8], n=1)
>>> ddim.evaluations, ddim.errors[0] > ddim.errors[1]
([2, 8], True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..noise import draw, generators
from ..params import SamplingParams
from ..pipeline import StableDiffusion
from ..samplers import SAMPLERS
from ..schedule import Level
from .drawing import Axes, Curve, figure, plot
from .runs import PLAIN, denoiser, last, sample

DETERMINISTIC = ("ddim", "heun", "dpm2", "lms", "dpmpp_2m", "unipc")
STEPS = (4, 8, 12, 16, 24, 32, 48)
# near enough to the exact solution; without guidance
SOLUTION_STEPS = 1000
REFERENCE = replace(PLAIN, sampler="dpmpp_2m", steps=SOLUTION_STEPS, spacing="karras")


class Convergence(NamedTuple):
    """One sampler's errors |x - x*| / |x*| by the number of evaluations of the denoiser."""

    sampler: str
    evaluations: list[int]
    errors: list[float]


def convergence(
    model: StableDiffusion,
    prompt: str,
    reference: SamplingParams = REFERENCE,
    *,
    samplers: Sequence[str] = DETERMINISTIC,
    steps: Sequence[int] = STEPS,
    n: int = 8,
) -> list[Convergence]:
    """Distance of each sampler's result, after each number of steps, to the result of `reference`, a long run.

    All runs share the seed, guidance and step grid of the reference: grids of another spacing start and end at other
    noise levels, so they solve the equation over another interval. The error is the median over `n` images, seeds
    `reference.seed` and up, because for a few images a small error early on changes the content. Guidance makes that
    more frequent. Raises ValueError for a stochastic sampler.
    """
    stochastic = [name for name in samplers if SAMPLERS[name].stochastic]
    if stochastic:
        raise ValueError(f"{', '.join(stochastic)}: a stochastic sampler does not converge to one solution")
    denoise = denoiser(model, model.conditioning([prompt]), reference)
    x = draw(generators(reference.seed, n), model.latent_shape(), model.device)
    calls = 0

    def counted(x: Tensor, level: Level) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise(x, level)

    def end(settings: SamplingParams) -> Tensor:
        return last(sample(model, counted, x, settings))

    solution = end(reference)
    results = []
    for name in samplers:
        result = Convergence(SAMPLERS[name].label, [], [])
        for count in steps:
            calls = 0
            error = end(replace(reference, sampler=name, steps=count)) - solution
            result.evaluations.append(calls)
            result.errors.append(float((error.flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)).median()))
        results.append(result)
    return results


def draw_convergence(results: Sequence[Convergence], reference_steps: int = SOLUTION_STEPS) -> Image.Image:
    """Error over evaluations on logarithmic axes; `reference_steps` is the number of steps of the reference run."""
    curves = [Curve(result.sampler, result.evaluations, result.errors, dots=True) for result in results]
    body = plot(
        curves,
        (620, 400),
        Axes(
            x_label="evaluations of the network",
            y_label="distance to the solution, |x - x*| / |x*|",
            x_log=True,
            y_log=True,
        ),
    )
    return figure(
        "Samplers: rate of convergence",
        body,
        f"All converge to the same image; the solution x* is a run of {reference_steps} steps. Lower is better, and a "
        "method of higher order falls more steeply. Heun and DPM2 evaluate the network twice per step.",
    )
