"""Stable Diffusion from scratch in PyTorch.

Reading order: see README.md.

Code that only inspects files works without torch, whose import takes longer than the inspection; everything else is
imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from .checkpoints.convert import convert
from .checkpoints.detect import detect, identify
from .config import MODELS, SD1, SD1_INPAINT, SD2, SD2_INPAINT, SD2_V, SDXL, SDXL_INPAINT, SDXL_REFINER, Config
from .schedule import Level, Schedule

if TYPE_CHECKING:
    from .conditioning import Conditioning
    from .control_params import Control
    from .denoiser import Denoiser
    from .models.text_encoder import TextEncoder
    from .models.unet import UNet
    from .models.vae import VAE
    from .params import HighRes, ImageToImage, Inpaint, SamplingParams, TextToImage
    from .pipeline import StableDiffusion
    from .recipes import Recipe, read_request
    from .run import Result, Run
    from .samplers import SAMPLERS, Step
    from .text.tokenizer import Tokenizer

__version__ = "0.2.0"

_LATER = {
    "Conditioning": "conditioning", "Control": "control_params", "Denoiser": "denoiser", "HighRes": "params",
    "ImageToImage": "params", "Inpaint": "params", "Recipe": "recipes", "Result": "run", "Run": "run",
    "SamplingParams": "params", "StableDiffusion": "pipeline", "TextToImage": "params",
    "SAMPLERS": "samplers", "Step": "samplers", "TextEncoder": "models.text_encoder", "Tokenizer": "text.tokenizer",
    "UNet": "models.unet", "VAE": "models.vae", "read_request": "recipes",
}  # fmt: skip

__all__ = [
    "MODELS",
    "SAMPLERS",
    "SD1",
    "SD1_INPAINT",
    "SD2",
    "SD2_INPAINT",
    "SD2_V",
    "SDXL",
    "SDXL_INPAINT",
    "SDXL_REFINER",
    "VAE",
    "Checkpoint",
    "CheckpointError",
    "Conditioning",
    "Config",
    "Control",
    "Denoiser",
    "HighRes",
    "ImageToImage",
    "Inpaint",
    "Level",
    "Recipe",
    "Result",
    "Run",
    "SamplingParams",
    "Schedule",
    "StableDiffusion",
    "Step",
    "TextEncoder",
    "TextToImage",
    "Tokenizer",
    "UNet",
    "convert",
    "detect",
    "identify",
    "load_checkpoint",
    "read_request",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
