"""The CLIP text encoder: token ids -> one vector per token, the context that the U-Net attends to.

Radford et al. 2021, "Learning transferable visual models from natural language supervision": a GPT-like causal
transformer with pre-normalisation. There is no padding mask: the models were trained with padding attended to, and
masking it changes the image.

    x      = token embedding + position embedding
    x      = x + attention(norm1(x))          causal: a token sees those before it
    x      = x + fc2(activation(fc1(norm2(x))))
    hidden = norm(x) or x, after the layer that the U-Net was trained with
    pooled = projection(norm(x at the end token)), after the last layer

What differs between models is in `TextConfig`. Stable Diffusion 1.x takes `hidden` from the last layer of OpenAI's
ViT-L/14, 2.x from the last but one of OpenCLIP's ViT-H/14, both normalised; neither uses `pooled`. SDXL has two
encoders, ViT-L/14 and OpenCLIP's ViT-bigG/14: it takes `hidden` of both from the last layer but one, not normalised,
and `pooled` of the second.

B batch, M tokens (77), D width, P width of the projection.

>>> encoder = TextEncoder(TextConfig(width=32, layers=2, heads=2, pooled=True, projection=16))
>>> hidden, pooled = encoder(torch.tensor([[49406, 320, 736, 1212, 49407]]))  # start, a, red, house, end
>>> hidden.shape, pooled.shape
(torch.Size([1, 5, 32]), torch.Size([1, 16]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import TextOutput as TextOutput
from ..config import END, TextConfig
from .layers import Attention, module_list

NORM_EPS = 1e-5  # every LayerNorm


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, x sigmoid(1.702 x), with which their CLIP was trained (CLIP model.py)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class TextBlock(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, NORM_EPS)
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, D)."""
        x = x + self.attn(self.norm1(x), causal=True)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


def layers_of_clip_skip(
    configs: Sequence[TextConfig], clip_skip: int, note: Callable[[str], object]
) -> tuple[int, ...]:
    """The `hidden_layer` of `TextEncoder.forward` for each text encoder that a "clip skip" of the web UIs means.

    It counts the layers of an encoder as it was published, from its end: 1 is the last. SD 2 and SDXL were trained with
    the last but one, number 2, and SD 2 and an encoder of SDXL lack the last one. There the web UI ignores the setting,
    whose default is 1; here, too, 1 means the model's own layers, and `note` says so. Raises ValueError for a number
    below 1 or above that of the layers.
    """
    most = min(config.published_layers for config in configs)
    if not 1 <= clip_skip <= most:
        raise ValueError(
            f"clip_skip must be from 1 (the last layer) to {most}, the number of layers of this model's text encoder"
            f"; got {clip_skip}"
        )
    layers = [config.published_layers - config.layers - clip_skip for config in configs]
    if max(layers) >= 0 or any(-layer > config.layers for layer, config in zip(layers, configs, strict=True)):
        own = configs[0].published_layers - configs[0].layers - configs[0].hidden_layer
        note(f"clip skip {clip_skip} has no effect: this model lacks that layer and uses clip skip {own}")
        return tuple(config.hidden_layer for config in configs)
    return tuple(layers)


class TextEncoder(nn.Module):
    """Token ids -> `TextOutput`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.length, config.width)
        self.blocks = module_list(TextBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, NORM_EPS)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None

    def forward(self, ids: Tensor, hidden_layer: int | None = None) -> TextOutput:
        """ids (B, M) below the vocabulary's size, M at most `config.length` -> hidden (B, M, D), pooled (B, P) or None.

        hidden_layer   in place of `config.hidden_layer`: -1 is the last layer, -2 the one before it, and so on

        The pooled vector is taken at a text's first end token, after the last layer: the tokens after it are padding.
        Layers whose output nothing needs are not run.
        """
        chosen = self.config.hidden_layer if hidden_layer is None else hidden_layer
        hidden = x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for layer, block in enumerate(self.blocks, -len(self.blocks)):
            x = block(x)
            if layer == chosen:
                hidden = x
                if not self.config.pooled:
                    break
        hidden = self.norm(hidden) if self.config.hidden_norm else hidden
        if not self.config.pooled:
            return TextOutput(hidden)
        end = (ids == END).int().argmax(dim=1)
        pooled = self.norm(x[torch.arange(len(x), device=x.device), end])  # (B, D)
        return TextOutput(hidden, pooled if self.projection is None else self.projection(pooled))
