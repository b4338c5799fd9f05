"""The reverse process: how noise becomes an image, step by step.

At every step the denoiser predicts the clean data x0, and the sampler moves x a little towards it. So a run has two
sequences: x_t, which loses its noise, and x0, which begins as a blurred average of everything that the prompt allows
and becomes sharper (Ho et al. 2020, section 3.2; Song et al. 2021, eq. 12).

>>> steps = trajectory(StableDiffusion.load(), "a red house", SamplingParams(steps=3, spacing="trailing"))
>>> [round(level.sigma, 3) for level in steps.levels]
[0.998, 0.946, 0.681, 0.0]
>>> steps.x.shape, steps.x0.shape
(torch.Size([4, 4, 16, 16]), torch.Size([3, 4, 16, 16]))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..params import SamplingParams
from ..pipeline import StableDiffusion
from ..schedule import Level
from .drawing import MUTED, above, figure, framed, paragraph, strip
from .runs import SETTINGS, levels, noise, run


class Trajectory(NamedTuple):
    """A run of n steps: x[i] is the state at levels[i], x0[i] the prediction from it."""

    levels: list[Level]  # n + 1; the last is the clean end
    x: Tensor  # (n + 1, C, h, w)
    x0: Tensor  # (n, C, h, w)


def trajectory(
    model: StableDiffusion,
    prompt: str,
    settings: SamplingParams = SETTINGS,
    x: Tensor | None = None,
    negative: str = "",
) -> Trajectory:
    """All states and predictions of a run that starts from x (1, C, h, w), by default the noise of the seed."""
    x = noise(model, settings) if x is None else x
    states, predicted = [x], []
    for step in run(model, model.conditioning([prompt]), settings, x, negative):
        states.append(step.x.clone())
        predicted.append(step.x0.clone())
    return Trajectory(levels(model, settings), torch.cat(states), torch.cat(predicted))


def _name(level: Level) -> str:
    return "clean" if level.sigma == 0 else f"t = {level.t:.0f}"


def spread(n: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 .. n - 1, evenly spaced, including both ends."""
    if n <= most:
        return list(range(n))
    return [round(i * (n - 1) / max(most - 1, 1)) for i in range(most)]


def draw_trajectory(model: StableDiffusion, run: Trajectory, columns: int = 8, width: int = 132) -> Image.Image:
    """x_t above x0, both decoded, for at most `columns` of the steps."""
    shown = spread(len(run.x0), columns)
    rows = [model.decode(run.x[shown]), model.decode(run.x0[shown])]
    names = [_name(run.levels[i]) for i in shown]
    return figure(
        "The reverse process: from noise to an image",
        strip(rows, names, ("x_{t}", "x_{0} predicted"), width),
        "Top: the state of the sampler. Bottom: the clean image that the denoiser predicts from it, at first a blur of "
        "everything that the prompt allows, then the layout, then details. Both are decoded latents.",
    )


def frames(model: StableDiffusion, run: Trajectory, width: int = 192) -> list[Image.Image]:
    """The frames of an animation of the run: x_t beside x0, with the timestep and a bar for the remaining noise."""
    images = []
    states, predicted = model.decode(run.x), model.decode(run.x0)
    predicted.append(states[-1])
    for level, state, x0 in zip(run.levels, states, predicted, strict=True):
        pair = strip([[state, x0]], ("x_{t}", "x_{0} predicted"), width=width, gap=10)
        bar = Image.new("RGB", (pair.width, 6), (232, 235, 240))
        bar.paste((0, 114, 178), (0, 0, round(pair.width * level.sigma), 6))
        label = paragraph(f"{_name(level)}: sigma = {level.sigma:.3f}", pair.width, 14, MUTED, align="middle")
        images.append(framed(above([pair, bar, label], gap=6), 10))
    return images
