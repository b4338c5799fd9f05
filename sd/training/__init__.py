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
from .memory import channels_last, checkpoint_activations
from .noise import offset_noise, pyramid_noise
from .optimizers import Muon, learning_rate, orthogonal

__all__ = [
    "EMA",
    "Muon",
    "Points",
    "TrainableLora",
    "add_guidance_input",
    "channels_last",
    "checkpoint_activations",
    "consistency",
    "consistency_loss",
    "contrastive_loss",
    "debiased_weight",
    "diffusion_loss",
    "drop_prompts",
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
