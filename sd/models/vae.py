"""The variational autoencoder between images and latents: 512x512x3 <-> 64x64x4.

Kingma and Welling 2013, "Auto-encoding variational Bayes"; the networks are those of Esser et al. 2021, "Taming
transformers", in the kl-f8 form of Rombach et al. 2022, "High-resolution image synthesis with latent diffusion
models". The encoder outputs a Gaussian per latent pixel; diffusion runs on a sample of it times `scale`.

    encode:  image -> encoder -> quant -> mean, log variance;   z = scale * (mean + exp(logvar / 2) * noise)
    decode:  z / scale -> post_quant -> decoder -> image

Images are in [-1, 1]. B batch, C channels, H x W pixels, h x w = H/8 x W/8 latents. Level 0 is the finest,
in the encoder as in the decoder.

>>> vae = VAE(VAEConfig(channels=(32, 32, 32, 32), blocks=1))
>>> z = vae.encode(torch.zeros(1, 3, 64, 96)).mode()
>>> z.shape, vae.decode(z).shape
(torch.Size([1, 4, 8, 12]), torch.Size([1, 3, 64, 96]))
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GROUPS, VAEConfig
from .layers import Attention, ResBlock, Upsample, module_list

NORM_EPS = 1e-6  # every normalisation of the VAE; the U-Net's blocks have 1e-5
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # the clamp of the original code (distributions.py)


class Gaussian(NamedTuple):
    """The encoder's output, per latent: mean and standard deviation, both (B, C, h, w), scale included."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for unit normal noise of the same shape."""
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The most probable latent: the mean."""
        return self.mean


class Downsample(nn.Module):
    """3x3 convolution with stride 2, padded at the right and bottom only (model.py of the original)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class PixelAttention(nn.Module):
    """Single-head self-attention among all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, NORM_EPS)
        self.attn = Attention(channels, heads=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # (B, N, C)
        return x + self.attn(tokens).reshape(B, H, W, C).permute(0, 3, 1, 2)


class Middle(nn.Module):
    """The coarsest level's block, attention, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res = module_list(ResBlock(channels, channels, NORM_EPS) for _ in range(2))
        self.attn = PixelAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.res[1](self.attn(self.res[0](x)))


class Stage(nn.Module):
    """Residual blocks at one resolution, then the step to the next one (`down` or `up`; None at the end).

    Encoder and decoder call its `layers` one by one. A `forward` would keep its input in memory until the end: 134 MB
    when a 512x512 image is decoded in half precision.
    """

    def __init__(self, in_channels: int, channels: int, blocks: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * blocks
        self.res = module_list(ResBlock(a, b, NORM_EPS) for a, b in pairwise(widths))
        self.down: Downsample | None = None
        self.up: Upsample | None = None

    def layers(self) -> Iterator[nn.Module]:
        """In order: the blocks (B, C_in, H, W) -> (B, C, H, W), then the step to (B, C, H', W')."""
        yield from self.res
        yield from (step for step in (self.down, self.up) if step is not None)


class Encoder(nn.Module):
    """Images -> moments: mean and log variance, stacked as channels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.image_channels, config.channels[0], 3, padding=1)
        widths = (config.channels[0], *config.channels)
        self.down = module_list(Stage(a, b, config.blocks) for a, b in pairwise(widths))
        for stage, channels in zip(self.down[:-1], config.channels[:-1], strict=True):
            stage.down = Downsample(channels)
        self.mid = Middle(widths[-1])
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 8, h, w)."""
        x = self.conv_in(x)
        for stage in self.down:
            for layer in stage.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))


class Decoder(nn.Module):
    """Latents -> images."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.latent_channels, config.channels[-1], 3, padding=1)
        self.mid = Middle(config.channels[-1])
        widths = (*config.channels, config.channels[-1])  # each level takes those of the next coarser one
        self.up = module_list(Stage(b, a, config.blocks + 1) for a, b in pairwise(widths))
        for stage, channels in zip(self.up[1:], config.channels[1:], strict=True):
            stage.up = Upsample(channels)
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, H, W), about [-1, 1]."""
        x = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            for layer in stage.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class VAE(nn.Module):
    """Encoder and decoder. The scale factor is applied here and nowhere else."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.overflows: set[str] = set()  # what is not finite in half precision (latents.py): "image", "latent"
        self.known_to_overflow = False  # from its file, when the model was loaded
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> mean and log variance of the unscaled latent, each (B, 4, h, w)."""
        return self._split(self.encoder(image))

    def _split(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant(encoded).chunk(2, dim=1)
        return mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    def encode(self, image: Tensor) -> Gaussian:
        """image (B, 3, H, W) in [-1, 1], sides multiples of `config.factor` -> Gaussian over (B, 4, h, w)."""
        H, W = image.shape[-2:]
        if H % self.config.factor or W % self.config.factor:
            raise ValueError(f"image sides must be multiples of {self.config.factor}, got {H}x{W} (height x width)")
        return self.gaussian(self.encoder(image))

    def gaussian(self, encoded: Tensor) -> Gaussian:
        """The encoder's output (B, 8, h, w) -> Gaussian over (B, 4, h, w)."""
        mean, logvar = self._split(encoded)
        return Gaussian(self.config.scale * mean, self.config.scale * torch.exp(0.5 * logvar))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 4, h, w) as the U-Net has them -> image (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant(z / self.config.scale))
