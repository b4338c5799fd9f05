"""The tiny autoencoder (TAESD) in place of the VAE: a thirtieth of the weights and a small part of the time.

Ollin Boer Bohan 2023, "Tiny AutoEncoder for Stable Diffusion" (github.com/madebyollin/taesd, taesd.py). It is distilled
from the VAE: the same latents, images with less detail. There is no normalisation, no attention and no Gaussian.

    block    x -> relu(x + conv(relu(conv(relu(conv(x))))))
    encode   image -> conv, blocks, halve, blocks, ..., conv -> z
    decode   z -> 3 tanh(z / 3) -> conv, relu, blocks, double, blocks, ..., conv -> image

The networks themselves have images in [0, 1], and latents as the U-Net has them, without a scale factor. `TinyVAE` has
the interface of `VAE`: images in [-1, 1]. B batch, C channels, H x W pixels, h x w = H/8 x W/8 latents.

>>> vae = TinyVAE(TinyVAEConfig())
>>> z = vae.encode(torch.zeros(1, 3, 64, 96)).mode()
>>> z.shape, vae.decode(z).shape
(torch.Size([1, 4, 8, 12]), torch.Size([1, 3, 64, 96]))
>>> from_bytes(to_bytes(torch.tensor([-3.0, 0.0, 9.0])))
tensor([-3.0000,  0.0118,  3.0000])
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TinyVAEConfig
from .layers import Upsample, module_list
from .vae import Gaussian

CLAMP = 3.0  # latents are bent into (-CLAMP, CLAMP) before they are decoded
NO_ENCODER = (
    "the tiny autoencoder has no encoder, which images to start from and inpainting need: give a folder with both of "
    "its files, taesd_encoder and taesd_decoder, or use the model's own VAE (without --vae)"
)


class Block(nn.Module):
    """Three 3x3 convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = F.relu(self.conv1(x), inplace=True)
        h = F.relu(self.conv2(h), inplace=True)
        return F.relu(self.conv3(h).add_(x), inplace=True)


class TinyStage(nn.Module):
    """The blocks at one resolution, and the step to the next one (`down` or `up`; None at the end).

    Encoder and decoder call its `layers` one by one, as those of vae.py do.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = module_list(Block(width) for _ in range(blocks))
        self.down: nn.Conv2d | None = None
        self.up: Upsample | None = None

    def layers(self) -> Iterator[nn.Module]:
        """In order: the blocks (B, C, H, W) -> (B, C, H, W), then the step to (B, C, H', W')."""
        yield from self.blocks
        yield from (step for step in (self.down, self.up) if step is not None)


class TinyEncoder(nn.Module):
    """Images -> latents."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.image_channels, config.width, 3, padding=1)
        self.down = module_list(TinyStage(config.width, blocks) for blocks in config.blocks)
        for stage in self.down[:-1]:
            stage.down = nn.Conv2d(config.width, config.width, 3, stride=2, padding=1, bias=False)
        self.conv_out = nn.Conv2d(config.width, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 4, h, w)."""
        x = self.conv_in(x)
        for stage in self.down:
            for layer in stage.layers():
                x = layer(x)
        return self.conv_out(x)


class TinyDecoder(nn.Module):
    """Latents -> images."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.latent_channels, config.width, 3, padding=1)
        self.up = module_list(TinyStage(config.width, blocks) for blocks in config.blocks)  # from the finest level
        for stage in self.up[1:]:
            stage.up = Upsample(config.width, bias=False)
        self.conv_out = nn.Conv2d(config.width, config.image_channels, 3, padding=1)

    def first(self, z: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> the coarsest map (B, C, h, w)."""
        return F.relu(self.conv_in(CLAMP * torch.tanh(z / CLAMP)), inplace=True)

    def forward(self, z: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, H, W), about [0, 1]."""
        x = self.first(z)
        for stage in reversed(self.up):
            for layer in stage.layers():
                x = layer(x)
        return self.conv_out(x)


class TinyVAE(nn.Module):
    """Encoder, if there is one, and decoder, with the interface of `VAE`."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.overflows: set[str] = set()  # what is not finite in half precision (latents.py): "image", "latent"
        self.encoder = TinyEncoder(config) if config.encoder else None
        self.decoder = TinyDecoder(config)

    def encode(self, image: Tensor) -> Gaussian:
        """image (B, 3, H, W) in [-1, 1], sides multiples of `config.factor` -> latents (B, 4, h, w) without spread.

        Raises ValueError for other sides, and without an encoder.
        """
        H, W = image.shape[-2:]
        if H % self.config.factor or W % self.config.factor:
            raise ValueError(f"image sides must be multiples of {self.config.factor}, got {H}x{W} (height x width)")
        if self.encoder is None:
            raise ValueError(NO_ENCODER)
        return self.gaussian(self.encoder((image + 1) / 2))

    def gaussian(self, encoded: Tensor) -> Gaussian:
        """The encoder's output (B, 4, h, w) -> the Gaussian around it that has no spread."""
        return Gaussian(encoded, torch.zeros_like(encoded))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 4, h, w) as the U-Net has them -> image (B, 3, H, W), about [-1, 1], not clamped."""
        return 2 * self.decoder(z) - 1


def to_bytes(z: Tensor) -> Tensor:
    """Latents as 8-bit numbers, as TAESD stores them in images: -3 to 3 in 255 steps; what is outside is cut off."""
    return (z.float() / (2 * CLAMP) + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def from_bytes(numbers: Tensor) -> Tensor:
    """The latents in float32 that `to_bytes` was given, to a half of 6/255."""
    return (numbers.float() / 255 - 0.5) * (2 * CLAMP)
