"""Noise with more of the lowest frequencies, for training on dark, bright and even images.

A model trained on white noise can hardly change the mean of an image: at the last timestep there is still a trace of
the image, whose lowest frequencies are the clearest, and the model learns to keep them. Either the schedule ends in
pure noise (`ScheduleConfig.zero_snr`, Lin et al. 2024), or the noise of training covers these frequencies, too:

    offset    eps + strength z, z one number per image and channel      Guttenberg 2023, "Diffusion with offset noise"
    pyramid   eps + discount z_1 + discount² z_2 + ..., z_i white noise of ever lower resolution, enlarged, and
              scaled to unit variance again                     Whitaker 2023, "Multi-resolution noise for diffusion
                                                                model training"

Both are for the prediction eps as well as v. The sampler goes on with white noise.

>>> rng = torch.Generator().manual_seed(0)
>>> noise = torch.randn(2, 4, 64, 64, generator=rng)
>>> offset_noise(noise, 0.1, rng).shape, round(pyramid_noise(noise, 0.6, rng)[0].std().item(), 3)
(torch.Size([2, 4, 64, 64]), 1.0)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 10  # of a pyramid at most


def offset_noise(noise: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Noise (B, C, h, w) with a random offset for each image and channel.

    strength   standard deviation of the offset; 0.05 to 0.1 are usual
    rng        on the device of the noise
    """
    return noise + strength * torch.randn(*noise.shape[:2], 1, 1, generator=rng, device=noise.device)


def pyramid_noise(noise: Tensor, discount: float, rng: torch.Generator) -> Tensor:
    """Noise (B, C, h, w) with noise of lower resolutions in addition; each image has unit variance.

    discount   weight of each resolution relative to the next higher one, from 0 to below 1; 0.3 to 0.8 are usual
    rng        on the device of the noise

    Each resolution is two to four times lower than the previous one, at random.
    """
    height, width = noise.shape[2:]
    out, scale = noise, 1.0
    factors = torch.rand(LEVELS, generator=rng, device=noise.device).tolist()  # at once: it waits for the device
    for i, factor in enumerate(factors, start=1):
        scale *= 2 + 2 * factor
        size = max(1, int(height / scale)), max(1, int(width / scale))
        coarse = torch.randn(*noise.shape[:2], *size, generator=rng, device=noise.device)
        out = out + discount**i * F.interpolate(coarse, (height, width), mode="bilinear")
        if size == (1, 1):
            break
    return out / out.std((1, 2, 3), keepdim=True)
