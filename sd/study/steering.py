"""Steering with a loss: any number that can be computed from the picture, and differentiated, can guide it.

Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis", section 4.2, where the loss is a
classifier's; Bansal et al. 2023, "Universal guidance for diffusion models", take any. At each level the loss of the
predicted x0 is differentiated with respect to x_t, through the network, and the predicted noise is corrected by it:

    eps <- eps + scale sigma grad_x loss(x0(x_t))     which for x0 = (x - sigma eps) / alpha means
    x0  <- x0 - scale (sigma² / alpha) grad_x loss

The result is a denoiser again, so every sampler can be steered.

>>> def likes_ones(x0: Tensor) -> Tensor:
...     return (x0 - 1).square().sum(dim=(1, 2, 3))
>>> denoise = steered(lambda x, level: x, likes_ones, scale=0.1)  # believes what it is given
>>> level = Level(t=500.0, alpha=0.6, sigma=0.8)
>>> float(denoise(torch.zeros(1, 4, 8, 8), level).mean()) > 0
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..params import SamplingParams
from ..pipeline import StableDiffusion
from ..samplers import Denoise
from ..schedule import Level
from .drawing import Axes, Curve, above, figure, plot, strip
from .runs import SETTINGS, denoiser, last, noise, walk

Loss = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in about [-1, 1] -> a number for each (B,)


def steered(
    denoise: Denoise,
    loss: Loss,
    scale: float,
    decode: Callable[[Tensor], Tensor] | None = None,
    each: list | None = None,
) -> Denoise:
    """The denoiser, drawn towards what the loss likes.

    loss    of what `decode` makes of x0 (B, C, h, w), of x0 itself if it is not given -> (B,)
    scale   how strongly; 0 changes nothing
    each    a list that is given the losses (B,) of every evaluation
    """

    def run(x: Tensor, level: Level) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x, level)
            losses = loss(x0 if decode is None else decode(x0))
            if losses.shape != x.shape[:1]:
                raise ValueError(f"a loss gives one number a picture, ({x.shape[0]},), got {tuple(losses.shape)}")
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        if each is not None:
            each.append(losses.detach().cpu())
        return x0.detach() - scale * (level.sigma**2 / level.alpha) * gradient

    return run


def colour_loss(red: float, green: float, blue: float) -> Loss:
    """How far pictures are from a colour on the average, in [-1, 1] each: the mean squared distance of their pixels.

    `colour_loss(-1, -1, 1)` makes it blue.
    """

    def loss(pictures: Tensor) -> Tensor:
        colour = pictures.new_tensor([red, green, blue]).view(1, 3, 1, 1)
        return (pictures - colour).square().mean(dim=(1, 2, 3))

    return loss


class Steered(NamedTuple):
    """One run for each scale, from the same noise."""

    scales: list[float]
    pictures: list[Image.Image]
    losses: list[list[float]]  # of x0, per evaluation


def steering(
    model: StableDiffusion, prompt: str, loss: Loss, scales: Sequence[float], settings: SamplingParams = SETTINGS
) -> Steered:
    """Pictures of a prompt steered by a loss on the decoded x0, for each scale."""
    denoise = denoiser(model, model.encode_prompt([prompt]), settings)
    pictures, losses = [], []

    def turn(_: Tensor) -> None:
        _ = model.unet  # networks that take turns (turns.py): the gradient has come back to x0, and goes on through it

    def decode(x0: Tensor) -> Tensor:
        x0.register_hook(turn)
        return model.vae.decode(x0.to(model.dtype)).float()

    for scale in scales:
        each: list[Tensor] = []
        x = last(walk(model, steered(denoise, loss, scale, decode, each), noise(model, settings), settings))
        pictures += model.decode(x)
        losses.append([float(value) for value in each])
    return Steered(list(scales), pictures, losses)


def draw_steering(result: Steered, prompt: str, what: str, width: int = 150) -> Image.Image:
    """The pictures in a row, and the losses of x0 over the steps."""
    row = strip([result.pictures], [f"scale {scale:g}" for scale in result.scales], width=width)
    curves = [
        Curve(f"scale {scale:g}", list(range(1, len(values) + 1)), values)
        for scale, values in zip(result.scales, result.losses, strict=True)
    ]
    lines = plot(curves, (520, 260), Axes(x_label="step", y_label="loss of the predicted x_{0}"))
    return figure(
        f'Steering "{prompt}": {what}',
        above([row, lines], gap=24),
        "In every step the gradient of the loss, through the decoder and the U-Net, moves the prediction a little. "
        "More of it obeys the loss more, at the cost of the prompt.",
    )
