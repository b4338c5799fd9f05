"""Samplers compared: how far each is from the exact solution after so many evaluations of the network.

All deterministic samplers solve one differential equation (Song et al. 2021, "Score-based generative modeling through
stochastic differential equations", eq. 13), so from the same noise they end at the same picture if their steps are
small enough. A method of order k makes an error of about C / n^k in n steps: a line of slope -k on logarithmic axes.

>>> settings = replace(PLAIN, seed=3)
>>> (ddim,) = convergence(
...     StableDiffusion.load(), "a red house", settings, samplers=["ddim"], steps=[2, 8], reference_steps=16, n=1
... )
>>> ddim.evaluations, ddim.errors[0] > ddim.errors[1]
([2, 8], True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..params import SamplingParams
from ..pipeline import StableDiffusion
from ..run import draw, generators
from ..samplers import SAMPLERS
from ..schedule import Level
from .drawing import Axes, Curve, figure, plot
from .runs import PLAIN, denoiser, last, walk

DETERMINISTIC = ("ddim", "heun", "dpm2", "lms", "dpmpp_2m", "unipc")
STEPS = (4, 8, 12, 16, 24, 32, 48)
SOLUTION_STEPS = 1000


class Convergence(NamedTuple):
    """One sampler's errors |x - x*| / |x*| by the number of evaluations of the denoiser."""

    sampler: str
    evaluations: list[int]
    errors: list[float]


def convergence(
    model: StableDiffusion,
    prompt: str,
    settings: SamplingParams = PLAIN,
    *,
    samplers: Sequence[str] = DETERMINISTIC,
    steps: Sequence[int] = STEPS,
    spacing: str = "karras",
    reference: str = "dpmpp_2m",
    reference_steps: int = SOLUTION_STEPS,
    n: int = 8,
) -> list[Convergence]:
    """The distance of every sampler's result from a long run of `reference`, all on one kind of grid.

    The median of `n` pictures, of the settings' seed and those behind it, is what counts: now and then one of them is
    about to be decided otherwise, and then small errors make a large difference. Guidance makes that worse.

    Grids that begin or end at other levels solve the equation between other ends: not "leading" beside "karras".
    """
    stochastic = [name for name in samplers if SAMPLERS[name].random]
    if stochastic:
        raise ValueError(f"{', '.join(stochastic)}: a sampler that draws noise has no one solution to approach")
    denoise = denoiser(model, model.encode_prompt([prompt]), settings)
    x = draw(generators(settings.seed, n), model.latent_shape(), model.device)
    calls = 0

    def counted(x: Tensor, level: Level) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise(x, level)

    def end(name: str, count: int) -> Tensor:
        return last(walk(model, counted, x, replace(settings, sampler=SAMPLERS[name], steps=count, spacing=spacing)))

    solution = end(reference, reference_steps)
    results = []
    for name in samplers:
        result = Convergence(SAMPLERS[name].label, [], [])
        for count in steps:
            calls = 0
            apart = (end(name, count) - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)
            result.evaluations.append(calls)
            result.errors.append(float(apart.median()))
        results.append(result)
    return results


def draw_convergence(results: Sequence[Convergence], reference_steps: int = SOLUTION_STEPS) -> Image.Image:
    """Error over evaluations, both logarithmic; `reference_steps` is of the solution that they were compared with."""
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
        "Samplers: how fast they converge",
        body,
        f"Each ends at the same picture if its steps are small enough: x* is a run of {reference_steps} steps. Lower "
        "is better; a method of higher order falls more steeply. Heun and DPM2 evaluate twice in a step.",
    )
