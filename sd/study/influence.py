"""The influence of a word: the difference between the predictions with and without it.

An attention map shows where a word is attended to, not its effect: the causal text encoder may store the colour of
"a red house" in the vector of "house", and the network reads it there. The effect itself is a difference,

    influence(word) = |x0(x_t, prompt) - x0(x_t, prompt without the word)|         at each position of the latent

averaged over the states of one run with the whole prompt, without guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..params import SamplingParams
from ..pipeline import StableDiffusion
from .attention_figures import draw_words, noted
from .denoising import trajectory
from .runs import SETTINGS, denoiser
from .text import Word, words


class Influence(NamedTuple):
    """A generated image with a map for each word of its prompt."""

    image: Image.Image
    words: list[Word]
    maps: list[Tensor]  # (h, w) for each word


def without(found: list[Word], which: int) -> str:
    """The words as a prompt, without the one at index `which`.

    >>> without([Word("a", [1]), Word("red", [2]), Word("house", [3])], 1)
    'a house'
    """
    return " ".join(word.text for i, word in enumerate(found) if i != which)


def influence(model: StableDiffusion, prompt: str, settings: SamplingParams = SETTINGS) -> Influence:
    """Generate an image, and at each state of the run compare its prediction with those of the prompt minus a word."""
    found = words(model.tokenizer, prompt)
    if not found:
        raise ValueError("the prompt has no words to leave out")
    run = trajectory(model, prompt, settings)
    plain = replace(settings, guidance=1.0)
    prompts = [prompt, *(without(found, i) for i in range(len(found)))]
    denoise = denoiser(model, model.conditioning(prompts), plain)
    total = torch.zeros(len(found), *run.x.shape[-2:], device=run.x.device)
    with torch.no_grad():
        for x, level in zip(run.x[:-1], run.levels[:-1], strict=True):
            x0 = denoise(x.expand(len(prompts), -1, -1, -1), level)
            total += (x0[1:] - x0[:1]).norm(dim=1)
    return Influence(model.decode(run.x[-1:])[0], found, list(total / len(run.x0)))


def draw_influence(
    result: Influence,
    prompt: str,
    notes: Mapping[int, str] | None = None,
    boxes: Mapping[int, tuple[float, float, float, float]] | None = None,
) -> Image.Image:
    """The image and the map of each word; `notes` and `boxes` as in `attention_figures.draw_words`."""
    return draw_words(
        result.image,
        noted(result.words, notes),
        result.maps,
        "Influence: where the image changes without a word",
        f'"{prompt}": distance between the predicted x_{{0}} and the one for the prompt without the word, mean over '
        "all steps. Each map runs from zero (dark) to its maximum (light).",
        boxes,
    )
