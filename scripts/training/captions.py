"""Encodes captions (token ids) with all text encoders of a model into the conditioning of the U-Net."""

from __future__ import annotations

import torch
from torch import Tensor

from sd.conditioning import Conditioning, TextOutput
from sd.models.text_encoder import TextEncoder
from sd.pipeline import StableDiffusion
from sd.size_conditioning import size_embedding
from sd.text_config import END

from .batches import Batch


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

    A dropped prompt is the empty one; for SDXL base, whose training had zeros in its place, it is zeros.
    """

    def __init__(self, model: StableDiffusion) -> None:
        self.config, self.encoders = model.config, text_encoders(model)
        self.empty = model.tokenizer([""]).to(model.device)  # ids (1, M)

    def encode(self, ids: Tensor) -> TextOutput:
        """ids (B, M) of the first tokenizer -> hidden (B, M, D) and pooled (B, P) or None."""
        text = TextOutput.joined([encoder(padded(ids, encoder.config.pad)) for encoder in self.encoders.values()])
        if not self.config.zero_empty:
            return text
        kept = ~(ids == self.empty).all(dim=1)
        pooled = None if text.pooled is None else text.pooled * kept[:, None]
        return TextOutput(text.hidden * kept[:, None, None], pooled)

    def __call__(self, batch: Batch) -> Conditioning:
        """What the U-Net is told of a batch: its captions, encoded now or before; for SDXL its sizes; mask channels."""
        text = self.encode(batch.ids) if batch.context is None else TextOutput(batch.context, batch.pooled)
        return told(text, batch)

    def without(self, batch: Batch) -> Conditioning:
        """What the U-Net is told of a batch in place of the captions: the empty prompt."""
        text = self.encode(self.empty)
        count = len(batch.ids)
        pooled = None if text.pooled is None else text.pooled.expand(count, -1)
        return told(TextOutput(text.hidden.expand(count, -1, -1), pooled), batch)


def told(text: TextOutput, batch: Batch) -> Conditioning:
    """The conditioning of encoded captions with the sizes and the mask channels of a batch."""
    vector = None
    if text.pooled is not None:
        vector = text.pooled
        if batch.sizes is not None:
            vector = torch.cat([vector, size_embedding(batch.sizes).to(vector)], dim=-1)
    return Conditioning(text.hidden, vector, batch.concat)
