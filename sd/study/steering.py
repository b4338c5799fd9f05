"""Guidance by a loss: any differentiable function of the image can guide its generation.

Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis", section 4.2, where the loss is a
classifier's; Bansal et al. 2023, "Universal guidance for diffusion models", use any loss. At each level the loss of the
predicted x0 is differentiated with respect to x_t, through the network, and its gradient corrects the predicted noise:

    eps <- eps + scale sigma grad_x loss(x0(x_t))     which for x0 = (x - sigma eps) / alpha means
    x0  <- x0 - scale (sigma² / alpha) grad_x loss

The result is a denoiser again, so every sampler can be steered.

>>> def likes_ones(x0: Tensor) -> Tensor:
...     return (x0 - 1).square().sum(dim=(1, 2, 3))
>>> denoise = steered(lambda x, level: x, likes_ones, scale=0.1)  # an identity denoiser
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
from .runs import SETTINGS, denoiser, last, noise, sample

Loss = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in about [-1, 1] -> (B,)


def steered(
    denoise: Denoise,
    loss: Loss,
    scale: float,
    decode: Callable[[Tensor], Tensor] | None = None,
    each: list[Tensor] | None = None,
) -> Denoise:
    """A denoiser whose prediction x0 is moved against the gradient of the loss.

    loss    function of `decode(x0)`, or of x0 (B, C, h, w) itself without `decode` -> (B,)
    scale   strength; 0 changes nothing
    each    if given, a list to which the losses (B,) of every evaluation are appended
    """

    def run(x: Tensor, level: Level) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x, level)
            losses = loss(x0 if decode is None else decode(x0))
            if losses.shape != x.shape[:1]:
                raise ValueError(f"expected one loss per image, ({x.shape[0]},), got {tuple(losses.shape)}")
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        if each is not None:
            each.append(losses.detach().cpu())
        return x0.detach() - scale * (level.sigma**2 / level.alpha) * gradient

    return run


def colour_loss(red: float, green: float, blue: float) -> Loss:
    """The mean squared distance of pixels to a colour, given in [-1, 1]: `colour_loss(-1, -1, 1)` makes images blue."""

    def loss(images: Tensor) -> Tensor:
        colour = images.new_tensor([red, green, blue]).view(1, 3, 1, 1)
        return (images - colour).square().mean(dim=(1, 2, 3))

    return loss


class Steered(NamedTuple):
    """One run per scale, all from the same noise."""

    scales: list[float]
    images: list[Image.Image]
    losses: list[list[float]]  # of the predicted x0, for each scale and evaluation


def steering(
    model: StableDiffusion, prompt: str, loss: Loss, scales: Sequence[float], settings: SamplingParams = SETTINGS
) -> Steered:
    """Generate a prompt with guidance by a loss on the decoded x0, once for each scale."""
    denoise = denoiser(model, model.conditioning([prompt]), settings)
    images, losses = [], []

    def load_unet(gradient: Tensor) -> None:
        _ = model.unet  # with offloading: the gradient has reached x0 and is about to pass through the U-Net

    def decode(x0: Tensor) -> Tensor:
        x0.register_hook(load_unet)
        return model.vae.decode(x0.to(model.dtype)).float()

    for scale in scales:
        each: list[Tensor] = []
        x = last(sample(model, steered(denoise, loss, scale, decode, each), noise(model, settings), settings))
        images += model.decode(x)
        losses.append([float(value) for value in each])
    return Steered(list(scales), images, losses)


def draw_steering(result: Steered, prompt: str, what: str, width: int = 150) -> Image.Image:
    """The images in a row, and the loss of the predicted x0 over the steps."""
    row = strip([result.images], [f"scale {scale:g}" for scale in result.scales], width=width)
    curves = [
        Curve(f"scale {scale:g}", list(range(1, len(values) + 1)), values)
        for scale, values in zip(result.scales, result.losses, strict=True)
    ]
    lines = plot(curves, (520, 260), Axes(x_label="step", y_label="loss of the predicted x_{0}"))
    return figure(
        f'Steering "{prompt}": {what}',
        above([row, lines], gap=24),
        "In every step the gradient of the loss, through decoder and U-Net, corrects the prediction. A larger scale "
        "lowers the loss more, at the cost of the prompt.",
    )
