"""Training: losses, distillation, LoRA, initial weights, augmentation, EMA, optimisers and memory.

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
from .lora import TrainableLora, lora_layers, lora_metadata, lora_tensors
from .losses import contrastive_loss, diffusion_loss, level_batch, min_snr_weight, vae_loss, velocity_weight
from .memory import blocks, channels_last, checkpoint_activations
from .optimizers import SCHEDULES, Muon, learning_rate, orthogonal

__all__ = [
    "EMA",
    "SCHEDULES",
    "Muon",
    "Points",
    "TrainableLora",
    "add_guidance_input",
    "blocks",
    "channels_last",
    "checkpoint_activations",
    "consistency",
    "consistency_loss",
    "contrastive_loss",
    "diffusion_loss",
    "drop_prompts",
    "erase_parts",
    "guided",
    "initialise_control",
    "initialise_text_encoder",
    "initialise_unet",
    "initialise_vae",
    "learning_rate",
    "level_batch",
    "lora_layers",
    "lora_metadata",
    "lora_tensors",
    "min_snr_weight",
    "orthogonal",
    "pseudo_huber",
    "random_masks",
    "solver_step",
    "solver_timesteps",
    "trajectory",
    "trajectory_loss",
    "vae_loss",
    "velocity_weight",
    "widen_input",
]
