"""Stable Diffusion from scratch in PyTorch.

Reading order: config, schedule, samplers, layers, unet, denoiser, model, pipeline, inpainting; then text_encoder, vae,
tokenizer, and checkpoint and convert for what is in the files.
"""

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint
from .config import MODELS, SD1, SD1_INPAINT, SD2, SD2_INPAINT, SD2_V, Config
from .convert import convert
from .denoiser import Denoiser
from .identity import detect
from .pipeline import StableDiffusion
from .samplers import SAMPLERS, Step
from .schedule import Level, Schedule
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "SAMPLERS",
    "SD1",
    "SD1_INPAINT",
    "SD2",
    "SD2_INPAINT",
    "SD2_V",
    "VAE",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "Denoiser",
    "Level",
    "Schedule",
    "StableDiffusion",
    "Step",
    "TextEncoder",
    "Tokenizer",
    "UNet",
    "convert",
    "detect",
    "load_checkpoint",
]
