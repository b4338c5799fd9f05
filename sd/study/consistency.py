"""Few-step models beside an ordinary one: what they predict along a curve from noise to data, and their images.

A sampler of many steps follows a curve from noise to data, the solution of the probability flow ODE (Song et al. 2021,
"Score-based generative modeling through stochastic differential equations", eq. 13). From a point x_t of the curve an
ordinary model predicts x0 = E[x0 | x_t], the mean of everything that may have led there, which is a blur while there is
much noise. A consistency model predicts the end of the curve, the same image from each of its points (Song et al. 2023,
"Consistency models", section 3), so that one step is enough in principle, and a few correct its errors.

    teacher    the ordinary model, whose curve it is
    student    the few-step model that was distilled from it

>>> model = StableDiffusion.load()
>>> seen = consistency(model, model, "a red house", replace(SETTINGS, steps=4), points=3)  # its own student
>>> [round(level.t) for level in seen.levels], seen.x.shape
([999, 749, 499], torch.Size([3, 4, 16, 16]))
>>> torch.equal(seen.teacher, seen.student)
True
>>> images = few_steps(model, model, "a red house", steps=(1, 2), many=3)
>>> len(images.teacher), len(images.student), images.many.size
(2, 2, (128, 128))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..params import SamplingParams
from ..pipeline import StableDiffusion
from ..samplers import find_sampler
from ..schedule import Level
from .denoising import trajectory
from .drawing import Axes, Curve, above, figure, plot, strip
from .runs import SETTINGS, denoiser, generate

STEPS, MANY = (1, 2, 4, 8), 50
# Close enough to the exact curve for the eye. Every fifth timestep is one of 8 trailing steps: a few-step model was
# trained there, or close to it.
CURVE = replace(SETTINGS, steps=40)


class Consistency(NamedTuple):
    """Points x[i] at levels[i] of a curve of the teacher, and the clean data predicted from each."""

    levels: list[Level]
    x: Tensor  # (n, C, h, w)
    end: Tensor  # (1, C, h, w), the clean end of the curve
    teacher: Tensor  # (n, C, h, w)
    student: Tensor  # (n, C, h, w)

    def distances(self, predicted: Tensor) -> list[float]:
        """|x0 - end| / |end| of each prediction (n, C, h, w)."""
        return ((predicted - self.end).flatten(1).norm(dim=1) / self.end.norm()).tolist()


def consistency(
    teacher: StableDiffusion,
    student: StableDiffusion,
    prompt: str,
    settings: SamplingParams = CURVE,
    *,
    points: int = 8,
) -> Consistency:
    """Follow the teacher from the noise of the seed, and ask both models at some points of its curve.

    The points are evenly spaced, from pure noise on. Guidance of the teacher is that of the settings or its own; the
    student has its own.
    """
    run = trajectory(teacher, prompt, settings)
    count = min(points, len(run.x0))
    chosen = [i * len(run.x0) // count for i in range(count)]
    ask = denoiser(student, student.conditioning([prompt]), replace(settings, guidance=None))
    with torch.no_grad():
        said = [ask(run.x[i : i + 1].to(student.device), run.levels[i]) for i in chosen]
    return Consistency(
        [run.levels[i] for i in chosen], run.x[chosen], run.x[-1:], run.x0[chosen], torch.cat(said).to(run.x.device)
    )


def draw_consistency(model: StableDiffusion, seen: Consistency, width: int = 132) -> Image.Image:
    """Three rows, decoded: the points of the curve, the predictions of the teacher, those of the student."""
    rows = [model.decode(x) for x in (seen.x, seen.teacher, seen.student)]
    names = [f"t = {level.t:.0f}" for level in seen.levels]
    return figure(
        "The consistency function: the same image from every point of a curve",
        strip(rows, names, ("x_{t}", "x_{0}: ordinary", "x_{0}: few steps"), width),
        "Top: the state of a run of the ordinary model. Middle: the clean image that it predicts from this state. "
        "Bottom: what the model distilled from it predicts from the same state.",
    )


def draw_distances(seen: Sequence[Consistency]) -> Image.Image:
    """Distance of both predictions to the end of the curve over t, the mean of several curves with the same levels."""
    t = [level.t for level in seen[0].levels]

    def mean(name: str) -> list[float]:
        rows = [each.distances(getattr(each, name)) for each in seen]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    curves = [Curve("ordinary", t, mean("teacher"), dots=True), Curve("few steps", t, mean("student"), dots=True)]
    axes = Axes(x_label="timestep t", y_label="|x_{0} - end| / |end|")
    body = plot(curves, (520, 300), axes)
    return figure("How far a prediction is from the end of the curve", above([body]), f"Mean of {len(seen)} runs.")


class FewSteps(NamedTuple):
    """Images of one prompt and one noise: of both models in each number of `steps`, of the teacher also in `many`."""

    steps: Sequence[int]
    teacher: list[Image.Image]
    student: list[Image.Image]
    most: int  # the steps of `many`
    many: Image.Image


def few_steps(
    teacher: StableDiffusion,
    student: StableDiffusion,
    prompt: str,
    settings: SamplingParams = SETTINGS,
    *,
    steps: Sequence[int] = STEPS,
    many: int = MANY,
) -> FewSteps:
    """Generate the images. The settings are the teacher's; the student has its own sampler, spacing and guidance."""
    usual = student.defaults
    spacing = usual.spacing or find_sampler(usual.sampler).spacing
    own = replace(settings, sampler=usual.sampler, spacing=spacing, guidance=None, options={})
    images = [generate(teacher, [prompt], replace(settings, steps=n))[0] for n in (*steps, many)]
    of_student = [generate(student, [prompt], replace(own, steps=n))[0] for n in steps]
    return FewSteps(steps, images[:-1], of_student, many, images[-1])


def draw_few_steps(seen: FewSteps, prompt: str, width: int = 128) -> Image.Image:
    """Two rows: the teacher in few steps and in many, the student in few."""
    columns = [f"{n} step{'s' if n > 1 else ''}" for n in (*seen.steps, seen.most)]
    rows = [[*seen.teacher, seen.many], seen.student]
    return figure(
        f'Few steps: "{prompt}"',
        strip(rows, columns, ("ordinary", "few steps"), width),
        "All images begin with the same noise. With guidance, a step of the ordinary model is two evaluations of the "
        "U-Net.",
    )
