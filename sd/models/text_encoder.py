"""The CLIP text encoder: token ids -> one vector per token, the "context" that the U-Net attends to.

Radford et al. 2021, "Learning transferable visual models from natural language supervision": a GPT-like causal
transformer with pre-normalisation. Stable Diffusion 1.x uses OpenAI's ViT-L/14 at its last layer; 2.x OpenCLIP's
ViT-H/14 at its last but one. Both pass the result through the final normalisation. No padding mask: the model was
trained with the padding attended to, and masking it changes the picture.

    x   = token embedding + position embedding
    x   = x + attention(norm1(x))          causal: a token sees those before it
    x   = x + fc2(activation(fc1(norm2(x))))
    out = norm(x)

B batch, M tokens (77), D width.

>>> encoder = TextEncoder(TextConfig(width=32, layers=1, heads=2))
>>> encoder(torch.tensor([[49406, 320, 736, 1212, 49407]])).shape  # start, a, red, house, end
torch.Size([1, 5, 32])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TextConfig
from .layers import Attention

NORM_EPS = 1e-5  # every LayerNorm


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, x sigmoid(1.702 x); their weights were trained with it (CLIP model.py)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


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


class TextEncoder(nn.Module):
    """Token ids -> context."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, NORM_EPS)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, M), whole numbers below the vocabulary's size, M at most `config.length` -> (B, M, D)."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
