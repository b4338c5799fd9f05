"""The forward process: how an image becomes noise.

Ho et al. 2020, "Denoising diffusion probabilistic models", eq. 2 and 4. Each step scales the image down a little and
adds a little noise. Many steps combine into one of the same form, so any level can be sampled directly:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)         one step
    q(x_t | x_0)     = N(alpha x_0, sigma²)                        t steps at once, `Schedule.add_noise`
    alpha-bar_t = alpha² = prod_{s <= t} (1 - beta_s),   sigma² = 1 - alpha-bar_t,   SNR = alpha² / sigma²

>>> of_t = curves(Schedule())
>>> [float(of_t.alpha_bar[t].round(3)) for t in (0, 500, 999)]
[0.999, 0.276, 0.005]
>>> int(np.argmax(of_t.snr < 1))  # the first timestep with more noise than image
354
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..noise import draw, generators
from ..pipeline import StableDiffusion
from ..schedule import Level, Schedule
from .drawing import Axes, Curve, beside, figure, plot, strip
from .latent import as_colours

TIMESTEPS = (-1, 50, 150, 300, 500, 750, 999)  # from clean to almost pure noise


class Noised(NamedTuple):
    """One image at increasing noise levels."""

    levels: list[Level]
    latents: Tensor  # (n, C, h, w)
    images: list[Image.Image]  # decoded


class Curves(NamedTuple):
    """The values of a schedule at every timestep, each (T,)."""

    t: np.ndarray
    alpha_bar: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    snr: np.ndarray


def forward_process(
    model: StableDiffusion, image: Image.Image, timesteps: Sequence[float] = TIMESTEPS, seed: int = 0
) -> Noised:
    """The latent of an image with the same noise added at each timestep (-1 is clean)."""
    z = model.encode(image).mode()
    noise = draw(generators(seed, 1), z.shape[1:], z.device)
    levels = [model.schedule.level(t) for t in timesteps]
    latents = [model.schedule.add_noise(z, noise, level) for level in levels]
    images = [image for x in latents for image in model.decode(x)]
    return Noised(levels, torch.cat(latents), images)


def curves(schedule: Schedule) -> Curves:
    """alpha-bar, alpha, sigma and the signal-to-noise ratio of every timestep."""
    alpha_bar = schedule.alpha_bar
    return Curves(
        np.arange(schedule.steps),
        alpha_bar,
        np.sqrt(alpha_bar),
        np.sqrt(1 - alpha_bar),
        alpha_bar / (1 - alpha_bar),
    )


def draw_forward(noised: Noised, width: int = 148) -> Image.Image:
    """Two rows, the latent and the decoded image; one column per level."""
    names = ["clean" if level.t < 0 else f"t = {level.t:g}" for level in noised.levels]
    columns = [
        f"{name}\nalpha {level.alpha:.2f}\nsigma {level.sigma:.2f}"
        for name, level in zip(names, noised.levels, strict=True)
    ]
    rows = [as_colours(noised.latents), [image.resize((width, width)) for image in noised.images]]
    body = strip(rows, columns, ("latent x_{t}", "decoded"), width, pixels=True)
    return figure(
        "The forward process: x_{t} = alpha x_{0} + sigma noise",
        body,
        "The same noise in increasing amounts. Diffusion adds it to the latent (top: three channels as red, green and "
        "blue); the bottom row shows the decoded latent.",
    )


def draw_curves(curves: Curves) -> Image.Image:
    """Amounts of image and noise over t, and their ratio on a logarithmic scale."""
    t = curves.t.tolist()
    parts = plot(
        [
            Curve("alpha: image", t, curves.alpha.tolist()),
            Curve("sigma: noise", t, curves.sigma.tolist()),
            Curve("alpha-bar", t, curves.alpha_bar.tolist()),
        ],
        (400, 300),
        Axes(x_label="timestep t", y_limits=(0, 1), title="image and noise in x_{t}"),
    )
    ratio = plot(
        [Curve("SNR", t, curves.snr.tolist())],
        (400, 300),
        Axes(x_label="timestep t", y_log=True, title="signal-to-noise ratio alpha^{2} / sigma^{2}"),
    )
    return figure(
        "The noise schedule",
        beside([parts, ratio], gap=40),
        f"From hardly any noise at t = 0 to almost pure noise at t = {t[-1]}. alpha^{{2}} + sigma^{{2}} = 1 for all t; "
        "alpha^{2} is called alpha-bar.",
    )
