"""Size conditioning: what SDXL is told about the size of an image, and its refiner about how beautiful it is.

Podell et al. 2023, "SDXL: improving latent diffusion models for high-resolution image synthesis", sections 2.2 and 2.3.
In training, the numbers are the size of the original image, how much was cropped off the top and the left after
resizing, and the size that all images of the batch had, each as (height, width) or (top, left), in pixels. So a small
original size asks for the look of an enlarged photo, and a crop for a subject that is cut off. The refiner is told an
aesthetic score in place of the last size: one for the prompt, and a lower one for the negative prompt.

>>> import torch
>>> size_embedding(torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])).shape
torch.Size([1, 1536])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .conditioning import Conditioning, TextOutput
from .config import SIZE_WIDTH, SIZES, Config
from .messages import listed
from .models.layers import timestep_embedding
from .params import SamplingParams

NUMBERS = (*SIZES, "negative_aesthetic_score")  # the settings


def sizes_for(config: Config, params: SamplingParams, height: int, width: int, negative: bool = False) -> list[float]:
    """The numbers of `Config.sizes` for an image of this size in pixels."""
    own = {"original_height": height, "original_width": width, "target_height": height, "target_width": width}
    found = []
    for name in config.sizes:
        setting = f"negative_{name}" if negative and name == "aesthetic_score" else name
        value = getattr(params, setting)
        found.append(float(own[name] if value is None else value))
    return found


def size_embedding(sizes: Tensor) -> Tensor:
    """Each of n numbers embedded on its own: (B, n) -> (B, n * 256) in float32."""
    return timestep_embedding(sizes.flatten(), SIZE_WIDTH).reshape(len(sizes), -1)


def with_sizes(text: TextOutput, sizes: Sequence[float]) -> Conditioning:
    """The conditioning of encoded texts, all with the same sizes; without a pooled output, the context alone."""
    if text.pooled is None:
        return Conditioning(text.hidden)
    numbers = torch.tensor([sizes], dtype=torch.float32, device="cpu")
    embedded = size_embedding(numbers).to(text.pooled).expand(len(text.pooled), -1)
    return Conditioning(text.hidden, torch.cat([text.pooled, embedded], dim=-1))


def without_effect(params: SamplingParams, configs: Sequence[Config]) -> list[str]:
    """A note if numbers are given that no model of a run is told."""
    told = {name for config in configs for name in config.sizes}
    told |= {f"negative_{name}" for name in told if name == "aesthetic_score"}
    names = [name for name in NUMBERS if name not in told and getattr(params, name) != getattr(SamplingParams, name)]
    if not names:
        return []
    verb = "has" if len(names) == 1 else "have"
    return [f"{listed(names)} {verb} no effect: {configs[0].name} is not told {'it' if len(names) == 1 else 'them'}"]
