"""The layers that the networks share: attention, feed-forward, residual block, timestep embedding.

    attention            softmax(q kᵀ / sqrt(d)) v          Vaswani et al. 2017, "Attention is all you need", eq. 1
    feed-forward         out(value * gelu(gate))            Shazeer 2020, "GLU variants improve transformer" (GEGLU)
    residual block       x + conv(silu(norm(conv(silu(norm(x))) + time)))       Ho et al. 2020, appendix B
    timestep embedding   cos(t w_i), sin(t w_i)             Ho et al. 2020; w_i = 10000^(-i / half)
    guidance embedding   sin(g w_i), cos(g w_i)             g = 1000 (guidance - 1); w_i = 10000^(-i / (half - 1))

B batch, C channels, H height, W width, N tokens, M tokens of the context, D width of a token, d width of a head.

>>> timestep_embedding(torch.tensor([0.0, 999.0]), 320).shape
torch.Size([2, 320])
>>> tokens = torch.randn(1, 5, 64)
>>> Attention(64, heads=4)(tokens).shape  # self-attention
torch.Size([1, 5, 64])
>>> Attention(64, heads=4, context_width=32)(tokens, torch.randn(1, 77, 32)).shape  # cross-attention
torch.Size([1, 5, 64])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GROUPS

Part = TypeVar("Part", bound=nn.Module)


def module_list(modules: Iterable[Part]) -> Sequence[Part]:
    """An `nn.ModuleList` whose contents type checkers know."""
    return cast("Sequence[Part]", nn.ModuleList(modules))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention: q (B, N, D), k and v (B, M, D) -> (B, N, D).

    PyTorch's fused kernel never builds the N x M matrix; it scales before the softmax and accumulates in float32, which
    makes half precision safe. `causal` lets token n see tokens 0..n only (M = N).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2)  # (B, N, D)


class Attention(nn.Module):
    """Attention with its four projections: self-attention, or cross-attention if a context is given.

    One class serves the text encoder (`qkv_bias`, causal), the VAE (one head) and the U-Net (no bias on q, k, v).
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, qkv_bias: bool = True) -> None:
        super().__init__()
        context_width = width if context_width is None else context_width
        self.heads = heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(context_width, width, bias=qkv_bias)
        self.v = nn.Linear(context_width, width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, N, D), context (B, M, context width) or None for x itself -> (B, N, D)."""
        context = x if context is None else context
        return self.out(attention(self.q(x), self.k(context), self.v(context), self.heads, causal))


class FeedForward(nn.Module):
    """GEGLU: one half of a wide projection, gated by the exact (erf) GELU of the other half."""

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * factor * width)
        self.out = nn.Linear(factor * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(F.gelu(gate).mul_(value))  # in place: the largest tensors of a transformer


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut; in the U-Net the timestep is added between them.

    `eps` of the normalisations is 1e-5 in the U-Net and 1e-6 in the VAE (GroupNorm32 in openaimodel.py and Normalize in
    model.py of the original), so it has no default.
    """

    def __init__(self, in_channels: int, out_channels: int, eps: float, time_width: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels) if time_width else None
        self.norm2 = nn.GroupNorm(GROUPS, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, C_in, H, W), time (B, time width) or None -> (B, C_out, H, W)."""
        # SiLU in place: the normalised copy, at full resolution the largest tensor, is not needed again
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time is not None:
            h += self.time(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.skip(x) + h


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size); by default twice the size.

        Halving an odd size rounds up, so the original size has to be given on the way back.
        """
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the timestep, cosines first: t (B,), whole or fractional -> (B, width) in float32.

    The frequencies decrease from 1 to nearly 1/10000 in width / 2 steps. Always in float32: in half precision t = 999
    and 998.5 would be equal.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(index * (-math.log(10000) / half))  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Sinusoids of the guidance scale, sines first: guidance (B,) -> (B, width) in float32; width is even.

    As in latent consistency models (Luo et al. 2023; the function is that of Kingma et al. 2021, "Variational diffusion
    models"). Their w is guidance - 1, which is 0 without guidance, and is multiplied by 1000. Unlike those of the
    timestep, the frequencies decrease to 1/10000 itself.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=guidance.device)
    angles = 1000 * (guidance.float()[:, None] - 1) * torch.exp(index * (-math.log(10000) / (half - 1)))  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
