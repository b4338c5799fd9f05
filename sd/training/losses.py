"""Losses of the three networks, pure functions of tensors.

    diffusion    L = E w_t || network(alpha_t x0 + sigma_t eps, t, c) - target ||²  Ho et al. 2020, eq. 14
                 target: eps, or the velocity v = alpha_t eps - sigma_t x0 (Salimans and Ho 2022, appendix D)
                 w_t: 1, or min-SNR's (Hang et al. 2023), the debiased one (Yu et al. 2023), or that of the velocity
                 In place of the square: pseudo-Huber, which outliers influence less (Khrapov et al. 2024). With a
                 mask, the mean is over the masked area
    VAE          (x - decoded)² + weight KL(N(mean, exp(logvar)) || N(0, 1)) + optional perceptual, adversarial terms
                                                         Kingma and Welling 2013; Rombach et al. 2022, appendix G
    CLIP         cross-entropy of the similarities of n images and n texts, along the rows and along the columns
                                                         (symmetric InfoNCE) Radford et al. 2021, figure 3

>>> schedule, noise = Schedule(), torch.randn(2, 4, 8, 8)
>>> t, context = torch.tensor([10, 900]), torch.zeros(2, 77, 16)
>>> cond = Conditioning(context)
>>> float(diffusion_loss(lambda x, t, cond: noise, schedule, torch.randn(2, 4, 8, 8), cond, t, noise))
0.0
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning import Conditioning
from ..denoiser import Network
from ..schedule import Level, Schedule


@lru_cache(maxsize=16)
def _level_table(schedule: Schedule, device: torch.device) -> Tensor:
    """alpha and sigma of clean data, then of all timesteps, (2, 1 + steps): cached, as a step shall not transfer it."""
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.from_numpy(schedule.alpha_bar)])
    return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()]).to(device, torch.float32)


def _alpha_sigma(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (B,) of integer timesteps t (B,), float32; t = -1 is clean data."""
    alpha, sigma = _level_table(schedule, t.device)[:, t + 1]
    return alpha, sigma


def level_batch(schedule: Schedule, t: Tensor) -> Level:
    """The levels of integer timesteps t (B,) as one level: alpha and sigma are (B, 1, 1, 1), float32, on t's device.

    t is in [-1, steps - 1]; -1 is clean data, as in `Schedule.level`.
    `Schedule.add_noise` and `Schedule.target` accept it like any other level, and broadcast.
    """
    values = (t, *(x[:, None, None, None] for x in _alpha_sigma(schedule, t)))
    return Level(*cast(Any, values))  # tensors in place of floats


Distance = Callable[[Tensor, Tensor], Tensor]  # prediction and target (B, C, h, w) -> the error of each element


def squared_error(out: Tensor, target: Tensor) -> Tensor:
    """(out - target)², for each element."""
    return (out - target).square()


def sample_losses(
    network: Network,
    schedule: Schedule,
    x0: Tensor,
    conditioning: Conditioning,
    t: Tensor,
    noise: Tensor,
    distance: Distance = squared_error,
) -> Tensor:
    """The mean error of the network's prediction, eps or v, for each sample: (B,), in float32.

    x0 (B, C, h, w) clean latents, t (B,) integer timesteps, noise like x0. `distance` is the squared error, or for
    example a `masked` one.
    """
    level = level_batch(schedule, t)
    out = network(schedule.add_noise(x0, noise, level), t, conditioning)
    return distance(out.float(), schedule.target(x0, noise, level)).mean((1, 2, 3))


def diffusion_loss(
    network: Network,
    schedule: Schedule,
    x0: Tensor,
    conditioning: Conditioning,
    t: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
    distance: Distance = squared_error,
) -> Tensor:
    """The weighted mean of `sample_losses`, a scalar: by default the squared error (Ho et al. 2020, eq. 14).

    weight   (B,), default 1
    """
    error = sample_losses(network, schedule, x0, conditioning, t, noise, distance)
    return error.mean() if weight is None else (weight * error).mean()


def masked(distance: Distance, mask: Tensor) -> Distance:
    """A distance whose mean over an image is that over the mask's area: the rest is not learned.

    mask   (B, 1, h, w) from 0 to 1, with a part above 0 in each image. Small areas count as much as large ones
    """
    share = mask / mask.mean((2, 3), keepdim=True).clamp(min=1e-6)
    return lambda out, target: distance(out, target) * share


def huber(c: Tensor) -> Distance:
    """The pseudo-Huber distance 2c (sqrt(d² + c²) - c): d² for differences d far below c, 2c |d| above it.

    c   (B,), above 0. Khrapov et al. 2024, "Improving diffusion models's data-corruption resistance using scheduled
        pseudo-Huber loss" (arXiv:2403.16728)
    """
    c = c[:, None, None, None]
    return lambda out, target: 2 * c * (((out - target).square() + c.square()).sqrt() - c)


def huber_scale(schedule: Schedule, t: Tensor, c: float = 0.1) -> Tensor:
    """The scale (B,) of `huber` at each timestep: 1 without noise, where details are decided, falling to c at the end.

    Khrapov et al. 2024, the "SNR" schedule: c + (1 - c) / (1 + sigma / alpha)².
    """
    alpha, sigma = _alpha_sigma(schedule, t)
    return c + (1 - c) / (1 + sigma / alpha).square()


def velocity_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """Weights (B,) that turn the error of eps into that of v: 1 / alpha² (Salimans and Ho 2022, table 1).

    At high noise x_t is almost equal to eps, so the plain error of eps is small there, although these levels determine
    the layout and depend most on the prompt. With this weight a short training learns to follow the prompt.
    """
    if schedule.config.prediction == "v":
        return torch.ones(t.shape, device=t.device)
    return _alpha_sigma(schedule, t)[0] ** -2


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights (B,) that weight the error of x0 by min(SNR, gamma), SNR = alpha² / sigma² (Hang et al. 2023, eq. 8).

    This limits the weight of low noise levels, so that all timesteps contribute alike. The error of eps is SNR times
    the error of x0, and that of v is SNR + 1 times.
    """
    alpha, sigma = _alpha_sigma(schedule, t)
    snr = (alpha / sigma).square()
    return snr.clamp(max=gamma) / (snr + 1 if schedule.config.prediction == "v" else snr)


def debiased_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """Weights (B,) 1 / sqrt(SNR) of the error of eps, SNR = alpha² / sigma² (Yu et al. 2023, "Debias the training of
    diffusion models", arXiv:2310.08442). The error of v is (SNR + 1) / SNR times that of eps.

    At high noise a small error of eps is a large one of x0, and the plain loss hardly sees it.
    """
    alpha, sigma = _alpha_sigma(schedule, t)
    snr = (alpha / sigma).square()
    return snr.rsqrt() * (snr / (snr + 1) if schedule.config.prediction == "v" else 1)


def vae_loss(
    image: Tensor,
    decoded: Tensor,
    mean: Tensor,
    logvar: Tensor,
    kl_weight: float,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    adversarial: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Squared error per pixel value plus weighted KL divergence per latent value from a standard normal distribution.

    image and decoded (B, 3, H, W), mean and logvar (B, C, h, w) -> a scalar, in float32. With a small weight the KL
    term does not make the latents normal, but it bounds their size and keeps the latent space smooth.

    perceptual   (image, decoded) -> a perceptual distance, for example LPIPS (Zhang et al. 2018)
    adversarial  decoded -> the generator loss of a discriminator (Esser et al. 2021)

    Both include their own weight; their mean is added.
    """
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    loss = F.mse_loss(decoded.float(), image) + kl_weight * kl.mean()
    if perceptual is not None:
        loss = loss + perceptual(image, decoded).mean()
    if adversarial is not None:
        loss = loss + adversarial(decoded).mean()
    return loss


def contrastive_loss(image_features: Tensor, text_features: Tensor, scale: Tensor | float) -> Tensor:
    """The loss of CLIP: match each image to its text, and each text to its image (Radford et al. 2021, figure 3).

    image_features and text_features (B, D), of which row i belongs to row i -> a scalar, in float32. `scale` is
    1 / temperature, in CLIP exp of a learned number that starts at ln(1 / 0.07) and is kept below ln(100).
    """
    if image_features.shape != text_features.shape or image_features.dim() != 2:
        raise ValueError(
            f"expected image and text features of the same shape (B, D), got {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}"
        )
    with torch.autocast(image_features.device.type, enabled=False):  # scaled by 100, half precision is too coarse
        image_features, text_features = (F.normalize(x.float(), dim=-1) for x in (image_features, text_features))
        similarity = scale * image_features @ text_features.T  # (B, B)
    own = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
