"""Training: losses, initial weights, augmentation, EMA, optimisers and memory.

The pipeline never imports this package.
"""

from __future__ import annotations

from .augmentation import drop_prompts, random_masks
from .ema import EMA
from .initialization import initialise_text_encoder, initialise_unet, initialise_vae, widen_input
from .losses import contrastive_loss, diffusion_loss, level_batch, min_snr_weight, vae_loss, velocity_weight
from .memory import channels_last, checkpoint_activations
from .optimizers import Muon, learning_rate, orthogonal

__all__ = [
    "EMA",
    "Muon",
    "channels_last",
    "checkpoint_activations",
    "contrastive_loss",
    "diffusion_loss",
    "drop_prompts",
    "initialise_text_encoder",
    "initialise_unet",
    "initialise_vae",
    "learning_rate",
    "level_batch",
    "min_snr_weight",
    "orthogonal",
    "random_masks",
    "vae_loss",
    "velocity_weight",
    "widen_input",
]
