"""Checks of the requests of a program, before a model is loaded and before the first image."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch

import sd
from sd.hires import enlarged_shape, second_pass
from sd.messages import one_line
from sd.models.text_encoder import layers_of_clip_skip
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage
from sd.request_texts import all_texts, prompt_texts
from sd.text.prompt_syntax import check_prompt, chunks, texts_of

from .prompts import Line

UNKNOWN = 200  # characters of unknown words that are shown


def check_prompts(request: TextToImage) -> None:
    """Raise the ValueError that the prompts of a request lead to, before a large model is loaded."""
    if request.web_ui_prompts:
        prompts, negatives = all_texts(request)
        for text in prompts:
            check_prompt(text)
        for text in negatives:
            check_prompt(text, negative=True)


def check_all(model: sd.StableDiffusion, lines: Sequence[Line], requests: Sequence[TextToImage]) -> None:
    """`check_for_model` for every prompt; errors name its line."""
    for line, request in zip(lines, requests, strict=True):
        try:
            check_for_model(model, request)
        except ValueError as error:
            raise line.at(error) from None


def check_for_model(model: sd.StableDiffusion, request: TextToImage) -> None:
    """Raise the ValueError that settings of a request lead to with this model, before the first image."""
    params = request.params.resolved(model.defaults)
    strength = request.strength if isinstance(request, ImageToImage | Inpaint) else 1.0
    model.schedule.levels(params.steps, params.spacing, strength)
    model.latent_shape(params.height, params.width)
    if isinstance(request, HighRes):
        enlarged_shape(model.config, request)
        second, strength = second_pass(request, params, model.schedule.steps)
        model.schedule.levels(second.steps, second.spacing, strength)
    if request.clip_skip is not None:
        layers_of_clip_skip(model.config.text, request.clip_skip, note=lambda text: None)


def warn_of_unknown_words(model: sd.StableDiffusion, args: argparse.Namespace, request: TextToImage) -> None:
    """Warn of words in the prompts without a vector: those of words that did not occur in training were set to 0."""
    who = "this model" if args.ckpt else "the embedded model"
    hint = "" if args.ckpt else " (its words: weights/README.md; another model: --ckpt)"
    for given, where in ((request.prompt, ""), (request.negative, " in the negative prompt")):
        read: list[int] = []
        for prompt in prompt_texts(given):
            if request.web_ui_prompts:
                read += [i for text in texts_of(prompt) for chunk in chunks(model.tokenizer, text) for i in chunk.ids]
            else:
                read += model.tokenizer.encode(prompt)[: model.tokenizer.length - 2]
        ids = torch.tensor(read, device=model.device, dtype=torch.long)
        missing = model.text_encoder.token(ids).abs().sum(dim=-1) == 0
        if words := dict.fromkeys(model.tokenizer.decode(ids[missing].tolist()).split()):
            warnings.warn(
                f"{who} does not know these words{where}: {one_line(' '.join(words), UNKNOWN)}{hint}", stacklevel=1
            )
