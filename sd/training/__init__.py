"""Training: losses, distillation, LoRA, new words, initial weights, augmentation, EMA, optimisers, noise and memory.

The pipeline never imports this package.
"""

from __future__ import annotations

from .augmentation import drop_prompts, erase_parts, random_masks
from .distillation import (
    Points,
    consistency,
    consistency_loss,
    guided,
    pseudo_huber,
    solver_step,
    solver_timesteps,
    trajectory,
    trajectory_loss,
)
from .ema import EMA
from .initialization import (
    add_guidance_input,
    initialise_control,
    initialise_text_encoder,
    initialise_unet,
    initialise_vae,
    widen_input,
)
from .lora import LoraParams, TrainableLora, lora_layers
from .lora_files import lora_hash, lora_metadata, lora_tensors
from .losses import (
    contrastive_loss,
    debiased_weight,
    diffusion_loss,
    huber,
    huber_scale,
    level_batch,
    masked,
    min_snr_weight,
    sample_losses,
    squared_error,
    vae_loss,
    velocity_weight,
)
from .memory import blocks, channels_last, checkpoint_activations
from .noise import offset_noise, pyramid_noise
from .optimizers import SCHEDULES, Muon, learning_rate, orthogonal
from .words import TrainableWord, bundled_tensors, embedding_pickle, embedding_tensors

__all__ = [
    "EMA",
    "SCHEDULES",
    "LoraParams",
    "Muon",
    "Points",
    "TrainableLora",
    "TrainableWord",
    "add_guidance_input",
    "blocks",
    "bundled_tensors",
    "channels_last",
    "checkpoint_activations",
    "consistency",
    "consistency_loss",
    "contrastive_loss",
    "debiased_weight",
    "diffusion_loss",
    "drop_prompts",
    "embedding_pickle",
    "embedding_tensors",
    "erase_parts",
    "guided",
    "huber",
    "huber_scale",
    "initialise_control",
    "initialise_text_encoder",
    "initialise_unet",
    "initialise_vae",
    "learning_rate",
    "level_batch",
    "lora_hash",
    "lora_layers",
    "lora_metadata",
    "lora_tensors",
    "masked",
    "min_snr_weight",
    "offset_noise",
    "orthogonal",
    "pseudo_huber",
    "pyramid_noise",
    "random_masks",
    "sample_losses",
    "solver_step",
    "solver_timesteps",
    "squared_error",
    "trajectory",
    "trajectory_loss",
    "vae_loss",
    "velocity_weight",
    "widen_input",
]
