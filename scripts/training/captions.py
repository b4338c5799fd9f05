"""Encodes captions (token ids) with all text encoders of a model into the conditioning of the U-Net."""

from __future__ import annotations

import torch
from torch import Tensor

from sd.conditioning import Conditioning, TextOutput
from sd.models.text_encoder import TextEncoder
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion
from sd.size_conditioning import sizes_for
from sd.text_config import END


def text_encoders(model: StableDiffusion) -> dict[str, TextEncoder]:
    """The text encoders of a model by their names: one, or SDXL's two."""
    return {name: getattr(model, name) for name in model.config.text_names}


def padded(ids: Tensor, pad: int) -> Tensor:
    """Token ids (B, M) with `pad` after the end token: the ids for two text encoders differ only there."""
    end = (ids == END).int().argmax(dim=1, keepdim=True)
    after = torch.arange(ids.shape[1], device=ids.device) > end
    return ids.masked_fill(after, pad)


class Captions:
    """Encodes captions as the pipeline encodes prompts, with gradients for text encoders that are trained.

    model   whose text encoders are used
    size    of the images in pixels, which SDXL is told as the original and as the target size, as in a run with
            default settings

    A dropped prompt is the empty one; for SDXL base, whose training had zeros in its place, it is zeros.
    """

    def __init__(self, model: StableDiffusion, size: int) -> None:
        self.model, self.empty = model, model.tokenizer([""]).to(model.device)
        self.sizes = sizes_for(model.config, SamplingParams(), size, size)

    def __call__(self, ids: Tensor, concat: Tensor | None = None) -> Conditioning:
        """ids (B, M) of the first tokenizer, concat (B, 5, h, w) or None -> what the U-Net is told."""
        model = self.model
        outputs = [encoder(padded(ids, encoder.config.pad)) for encoder in text_encoders(model).values()]
        text = TextOutput(torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled)
        cond = model.with_sizes(text, self.sizes)
        if model.config.zero_empty:
            cond = model.zeroed(cond, (ids == self.empty).all(dim=1))
        return cond if concat is None else cond.with_concat(concat)
