"""Classifier-free guidance: what the prompt adds, and what exaggerating it does.

Ho and Salimans 2022. Two predictions are made in every step, with the prompt (c) and without (u), and the sampler is
given a point beyond the first on the line from the second through it:

    guided = u + guidance (c - u)         0 is u, 1 is c, above 1 goes on in the same direction (`Denoiser`)

>>> first, last_one = predictions(StableDiffusion.load(), "a red house", replace(SETTINGS, steps=2))
>>> bool((first.guided - first.uncond).norm() > (first.cond - first.uncond).norm())  # exaggerated
True
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
from ..schedule import Level
from .denoising import spread
from .drawing import figure, heat, strip
from .runs import SETTINGS, denoiser, guidance_of, last, noise, walk

GUIDANCES = (0.0, 1.0, 2.0, 4.0, 7.5, 12.0, 20.0)


class Predictions(NamedTuple):
    """What was predicted at one state of a guided run, all x0 (1, C, h, w)."""

    level: Level
    uncond: Tensor
    cond: Tensor
    guided: Tensor


def sweep(
    model: StableDiffusion, prompt: str, guidances: Sequence[float] = GUIDANCES, settings: SamplingParams = SETTINGS
) -> list[Image.Image]:
    """The prompt's picture at each guidance, from the same noise."""
    context, x = model.encode_prompt([prompt]), noise(model, settings)
    pictures = []
    for guidance in guidances:
        each = replace(settings, guidance=guidance)
        pictures += model.decode(last(walk(model, denoiser(model, context, each), x, each)))
    return pictures


def predictions(
    model: StableDiffusion, prompt: str, settings: SamplingParams = SETTINGS, negative: str = ""
) -> list[Predictions]:
    """Both predictions and the guided one at every state of a guided run."""
    plain = replace(settings, guidance=1.0)
    cond = denoiser(model, model.encode_prompt([prompt]), plain)
    uncond = denoiser(model, model.encode_prompt([negative]), plain)
    scale = guidance_of(model, settings)
    seen: list[Predictions] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        u, c = uncond(x, level), cond(x, level)
        seen.append(Predictions(level, u, c, u + scale * (c - u)))
        return seen[-1].guided

    last(walk(model, denoise, noise(model, settings), settings))
    return seen


def draw_sweep(
    pictures: Sequence[Image.Image], guidances: Sequence[float], prompt: str, width: int = 132
) -> Image.Image:
    """The pictures in a row."""
    return figure(
        f'Guidance: "{prompt}"',
        strip([pictures], [f"guidance {guidance:g}" for guidance in guidances], width=width),
        "One noise, one prompt, guidance from left to right. At 0 the prompt is ignored, 1 is what the network "
        "predicts. Beyond it the prompt is exaggerated, first to the better, then too much.",
    )


def draw_predictions(
    model: StableDiffusion, seen: Sequence[Predictions], columns: int = 6, width: int = 140
) -> Image.Image:
    """The predictions x0 without and with the prompt, where they differ, and the guided one, at some of the steps."""
    some = [seen[i] for i in spread(len(seen), columns)]
    gaps = [(p.cond - p.uncond)[0].norm(dim=0) for p in some]
    top = max(float(gap.max()) for gap in gaps)
    rows = [
        model.decode(torch.cat([p.uncond for p in some])),
        model.decode(torch.cat([p.cond for p in some])),
        [heat(gap, width, 0.0, top) for gap in gaps],
        model.decode(torch.cat([p.guided for p in some])),
    ]
    names = ("without the prompt: u", "with the prompt: c", "where they differ: |c - u|", "guided: u + g (c - u)")
    return figure(
        "Guidance: two predictions and what is made of them",
        strip(rows, [f"t = {p.level.t:.0f}" for p in some], names, width),
        "The predicted clean picture x_{0} at some of the steps of one guided run. The prompt decides most while there "
        "is much noise; light is where its word counts.",
    )
