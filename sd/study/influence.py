"""What a word changes: the prediction with it and without it.

A map of attention says where a word is listened to, not what comes of it: the causal text encoder may have put the
colour of "a red house" into the vector of "house", where the picture finds it. The effect itself is a difference,

    influence(word) = |x0(x_t, prompt) - x0(x_t, prompt without the word)|         at each place of the latent

taken at the states of one run with the whole prompt, without guidance, and averaged over them.
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
from .attention import draw_words, noted
from .denoising import trajectory
from .runs import SETTINGS, denoiser
from .text import Word, words


class Influence(NamedTuple):
    """A picture of a prompt with what each of its words changed."""

    picture: Image.Image
    words: list[Word]
    maps: list[Tensor]  # (h, w) for each word


def without(found: list[Word], which: int) -> str:
    """The prompt of all words but one.

    >>> without([Word("a", [1]), Word("red", [2]), Word("house", [3])], 1)
    'a house'
    """
    return " ".join(word.text for i, word in enumerate(found) if i != which)


def influence(model: StableDiffusion, prompt: str, settings: SamplingParams = SETTINGS) -> Influence:
    """Paint a prompt, and at each state of the run compare its prediction with those of the prompt less a word."""
    found = words(model.tokenizer, prompt)
    if not found:
        raise ValueError("the prompt has no words to leave out")
    run = trajectory(model, prompt, settings)
    plain = replace(settings, guidance=1.0)
    prompts = [prompt, *(without(found, i) for i in range(len(found)))]
    denoise = denoiser(model, model.encode_prompt(prompts), plain)
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
    """The picture and a map for each word; `notes` are added to the names of the words they number."""
    return draw_words(
        result.picture,
        noted(result.words, notes),
        result.maps,
        "Influence: what changes where a word is left out",
        f'"{prompt}": how far the predicted x_{{0}} is from that of the prompt without the word, the mean over all '
        "steps; each map from nothing (dark) to its most (light).",
        boxes,
    )
