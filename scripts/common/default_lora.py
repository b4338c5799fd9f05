"""The LoRA with which the embedded model needs few steps: merged by default, if the settings are those it is made for.

The embedded model without it takes 50 steps with guidance, with the LoRA 4 without. What it is not made for gets the
model without it: guidance, a negative prompt, more steps, another sampler, another LoRA; a part of the steps, of which
4 leave little choice (image to image, inpainting, high resolution); prompts that change in the course of the steps, or
that are joined by AND, which is guidance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sd.few_step import LCM
from sd.params import OPTIONS, SamplingParams, TextToImage
from sd.recipes import Recipe
from sd.recipes.recipe import Addon
from sd.request_texts import prompt_texts
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource

from .prompt_loras import PromptLoras

SPACING = "trailing"  # the timesteps it was trained on
# sampling settings that can be anything, or that `suits` looks at; all others must have their defaults
FREE = {
    "steps", "guidance", "sampler", "spacing", "seed", "n", "exact", "height", "width", "rng", "variation_seed",
    "variation_strength", "noise_seed_delta", "tileable",
}  # fmt: skip
# settings of a recipe that come from the LoRA, if its image was made with it, ...
BROUGHT = {"sampler", "spacing", "steps", "guidance"}
# ... and arguments that decide anew whether it is merged: then these settings are not repeated
DECIDING = BROUGHT | {
    "negative", "lora", "no_lora", "ckpt", "guidance_rescale", "guidance_until", "cache_interval", "hires",
    "web_ui_prompts", *OPTIONS,
}  # fmt: skip


def default_lora(args: argparse.Namespace, requests: Sequence[TextToImage], named: PromptLoras) -> list[str]:
    """The value of --lora that stands for the embedded LoRA, or none: for another model, other LoRAs, other settings.

    A recipe (--like) says itself which LoRAs its image was made with, unless other arguments decide it anew.
    """
    free = args.recipe is None or args.anew
    ours = free and args.ckpt is None and not (args.lora or args.no_lora or named.paths)
    return [str(resource(EMBEDDED_LORA))] if ours and all(map(suits, requests)) else []


def suits(request: TextToImage) -> bool:
    """Whether the LoRA is made for the settings of a request, as far as they are given."""
    params, usual = request.params, SamplingParams()
    own = {name for name, value in vars(params).items() if value != getattr(usual, name)}
    return (
        type(request) is TextToImage  # all others take a part of the steps
        and own <= FREE
        and not any(prompt_texts(request.negative))
        and not (request.web_ui_prompts and any("[" in text or "AND" in text for text in prompt_texts(request.prompt)))
        and params.sampler in (None, LCM.sampler)
        and params.spacing in (None, SPACING)
        and (params.steps is None or LCM.range[0] <= params.steps <= LCM.range[1])
        and params.guidance in (None, LCM.guidance)
    )


def embedded_lora(recipe: Recipe, lora: Addon) -> Path | None:
    """The file of a LoRA of a recipe, if it is the embedded one and the image was made with the embedded model."""
    ours = recipe.model.name == Path(EMBEDDED).stem and lora.name == Path(EMBEDDED_LORA).stem
    return resource(EMBEDDED_LORA) if ours and recipe.program.startswith("sd ") else None


def decides_anew(args: argparse.Namespace, recipe: Recipe) -> bool:
    """Whether the image of a recipe was made with the embedded LoRA, and what is wanted of it now may not suit it."""
    made = any(embedded_lora(recipe, lora) is not None for lora in recipe.loras)
    other_task = recipe.kind == TextToImage.kind and hasattr(args, "init_img")
    return made and (other_task or not DECIDING.isdisjoint(args.named))
