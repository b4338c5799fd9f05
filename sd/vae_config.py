"""The autoencoders between images and latents as values: Stable Diffusion's VAE, or a tiny one in its place.

Both have the same latents, so a model may have either (`Config.vae`).

>>> VAEConfig().factor, TinyVAEConfig().factor
(8, 8)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

GROUPS = 32  # groups of every GroupNorm: every channel count is a multiple of it


def check(ok: bool, message: str) -> None:
    """Raise ValueError with this message unless `ok`."""
    if not ok:
        raise ValueError(message)


def check_sizes(owner: Any, *names: str, limit: int = 1 << 17) -> None:
    """Raise ValueError for a size that is not a sensible whole number: sizes may come from a file's metadata."""
    per_level = {f.name for f in fields(owner) if str(f.type).startswith("tuple")}
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) and name in per_level else (value,)
        good = bool(values) and all(type(size) is int and 0 < size <= limit for size in values)
        check(good, f"{type(owner).__name__}.{name}: got {value!r:.100}, expected whole numbers from 1 to {limit}")


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between images and latents (kl-f8 of the original code)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # one entry a level; each level but the last halves the size
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    latent_channels: int = 4
    image_channels: int = 3
    scale: float = 0.18215  # factor of the latents: it brings their standard deviation to about 1

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "blocks", "latent_channels", "image_channels")
        check(self.image_channels == 3, f"VAEConfig.image_channels: got {self.image_channels}, images have 3")
        check(len(self.channels) <= 8 and self.blocks <= 16, "VAEConfig: more than 8 levels or 16 blocks a level")
        check(
            all(width % GROUPS == 0 for width in self.channels),
            f"VAEConfig.channels: got {self.channels}, expected multiples of {GROUPS}",
        )
        check(type(self.scale) is float and 0 < self.scale < 1e4, f"VAEConfig.scale: got {self.scale!r}")

    @cached_property
    def factor(self) -> int:
        """Image pixels per latent pixel, in each direction: 8 for Stable Diffusion."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TinyVAEConfig:
    """A tiny autoencoder (TAESD): `taesd.py` of madebyollin/taesd."""

    width: int = 64  # channels of every map
    blocks: tuple[int, ...] = (1, 3, 3, 3)  # residual blocks a level, finest first, in the encoder as in the decoder
    latent_channels: int = 4
    image_channels: int = 3
    encoder: bool = True  # whether it has an encoder, without which it can only decode

    def __post_init__(self) -> None:
        check_sizes(self, "width", "latent_channels", "image_channels", limit=4096)
        check_sizes(self, "blocks", limit=16)
        check(self.image_channels == 3, f"TinyVAEConfig.image_channels: got {self.image_channels}, images have 3")
        levels = isinstance(self.blocks, tuple) and len(self.blocks) <= 8
        check(levels, f"TinyVAEConfig.blocks: got {self.blocks!r:.100}, expected a list of at most 8 levels")
        check(type(self.encoder) is bool, f"TinyVAEConfig.encoder: got {self.encoder!r:.100}, expected true or false")

    @cached_property
    def factor(self) -> int:
        """Image pixels per latent pixel, in each direction."""
        return 2 ** (len(self.blocks) - 1)

    @property
    def scale(self) -> float:
        """Of its latents: they are those of the U-Net as they are."""
        return 1.0
