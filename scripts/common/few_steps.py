"""The LoRA with which the embedded model needs few steps: merged by default, if the settings are those it is made for.

The embedded model by itself takes 50 steps with guidance, with the LoRA 4 without. What it is not made for (guidance, a
negative prompt, more steps, another sampler) and another LoRA get the model by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sd.few_step import LCM
from sd.params import SamplingParams, TextToImage
from sd.recipes.recipe import Addon, Recipe
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource

from .prompt_loras import PromptLoras

# settings that the LoRA leaves free; all others have to be those of a request that does not mention them
FREE = {
    "steps", "guidance", "sampler", "spacing", "seed", "n", "exact", "height", "width", "rng", "variation_seed",
    "variation_strength", "noise_seed_delta", "tileable",
}  # fmt: skip
SPACING = "trailing"  # the timesteps it was trained on


def default_lora(args: argparse.Namespace, requests: Sequence[TextToImage], named: PromptLoras) -> list[str]:
    """The value of --lora that stands for the embedded LoRA, or none: for another model, other LoRAs, other settings.

    A recipe (--like) says itself which LoRAs its image was made with.
    """
    ours = args.ckpt is None and args.recipe is None and not args.lora and not named.paths
    return [str(resource(EMBEDDED_LORA))] if ours and all(map(suits, requests)) else []


def suits(request: TextToImage) -> bool:
    """Whether the LoRA is made for the settings of a request, as far as they are given."""
    params, usual = request.params, SamplingParams()
    own = {name for name, value in vars(params).items() if value != getattr(usual, name)}
    return (
        own <= FREE
        and not any(request.negative if isinstance(request.negative, tuple) else (request.negative,))
        and params.sampler in (None, LCM.sampler)
        and params.spacing in (None, SPACING)
        and (params.steps is None or params.steps <= LCM.range[1])
        and params.guidance in (None, LCM.guidance)
    )


def embedded_lora(recipe: Recipe, lora: Addon) -> Path | None:
    """The file of a LoRA of a recipe, if it is the embedded one and the image was made with the embedded model."""
    ours = recipe.model.name == Path(EMBEDDED).stem and lora.name == Path(EMBEDDED_LORA).stem
    return resource(EMBEDDED_LORA) if ours and recipe.program.startswith("sd ") else None
