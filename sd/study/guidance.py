"""Classifier-free guidance: the effect of the prompt, and of amplifying it.

Ho and Salimans 2022. Each step computes two predictions, with the prompt (c) and without it (u), and extrapolates from
u through c:

    guided = u + guidance (c - u)         0 gives u, 1 gives c, above 1 extrapolates (`Denoiser`)

>>> first, second = predictions(StableDiffusion.load(), "a red house", replace(SETTINGS, steps=2))
>>> bool((first.guided - first.uncond).norm() > (first.cond - first.uncond).norm())  # amplified
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
from .runs import SETTINGS, denoiser, guidance_of, last, noise, sample, unconditional

GUIDANCES = (0.0, 1.0, 2.0, 4.0, 7.5, 12.0, 20.0)


class Predictions(NamedTuple):
    """The predictions x0 (1, C, h, w) at one state of a guided run."""

    level: Level
    uncond: Tensor
    cond: Tensor
    guided: Tensor


def sweep(
    model: StableDiffusion, prompt: str, guidances: Sequence[float] = GUIDANCES, settings: SamplingParams = SETTINGS
) -> list[Image.Image]:
    """Generate the prompt at each guidance scale, from the same noise."""
    cond, x = model.conditioning([prompt]), noise(model, settings)
    images = []
    for guidance in guidances:
        each = replace(settings, guidance=guidance)
        images += model.decode(last(sample(model, denoiser(model, cond, each), x, each)))
    return images


def predictions(
    model: StableDiffusion, prompt: str, settings: SamplingParams = SETTINGS, negative: str = ""
) -> list[Predictions]:
    """The predictions without and with the prompt, and the guided one, at every state of a guided run."""
    plain = replace(settings, guidance=1.0)
    cond = denoiser(model, model.conditioning([prompt]), plain)
    uncond = denoiser(model, unconditional(model, negative), plain)
    scale = guidance_of(model, settings)
    seen: list[Predictions] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        u, c = uncond(x, level), cond(x, level)
        seen.append(Predictions(level, u, c, u + scale * (c - u)))
        return seen[-1].guided

    last(sample(model, denoise, noise(model, settings), settings))
    return seen


def draw_sweep(images: Sequence[Image.Image], guidances: Sequence[float], prompt: str, width: int = 132) -> Image.Image:
    """The images in a row."""
    return figure(
        f'Guidance: "{prompt}"',
        strip([images], [f"guidance {guidance:g}" for guidance in guidances], width=width),
        "The same noise and prompt with rising guidance. 0 ignores the prompt, and 1 is the prediction of the network. "
        "Higher values amplify the prompt: the image improves at first, then it is overdone.",
    )


def draw_predictions(
    model: StableDiffusion, seen: Sequence[Predictions], columns: int = 6, width: int = 140
) -> Image.Image:
    """x0 predicted without and with the prompt, their difference, and the guided x0, at `columns` of the steps."""
    some = [seen[i] for i in spread(len(seen), columns)]
    gaps = [(p.cond - p.uncond)[0].norm(dim=0) for p in some]
    top = max(float(gap.max()) for gap in gaps)
    rows = [
        model.decode(torch.cat([p.uncond for p in some])),
        model.decode(torch.cat([p.cond for p in some])),
        [heat(gap, width, 0.0, top) for gap in gaps],
        model.decode(torch.cat([p.guided for p in some])),
    ]
    names = ("without the prompt: u", "with the prompt: c", "difference: |c - u|", "guided: u + g (c - u)")
    return figure(
        "Guidance: two predictions and their combination",
        strip(rows, [f"t = {p.level.t:.0f}" for p in some], names, width),
        "The predicted clean image x_{0} at some steps of one guided run. The prompt has most effect while there is "
        "much noise; light areas of the difference are where it acts.",
    )
