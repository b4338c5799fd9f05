"""The attention U-Net: a noisy latent, its timestep and the text's context -> prediction (eps or v, see schedule.py).

Ronneberger et al. 2015 (the U), Ho et al. 2020 (residual blocks and timestep), Rombach et al. 2022, "High-resolution
image synthesis with latent diffusion models", section 3.3 (cross-attention to the text). Level 0 is the finest. On the
way down, every output is kept; on the way up, each block takes the latest of them in addition to its input:

    x ── conv_in ─┬───────────────────────────────────────────────┬─ norm, silu, conv_out ── prediction
                down.0: (res, attn) x2, halve       up.0: (res, attn) x3
                  └ down.1: (res, attn) x2, halve   up.1: (res, attn) x3, double ┘
                      └ down.2: (res, attn) x2, halve   up.2: (res, attn) x3, double
                          └ down.3: res x2   ── mid ──   up.3: res x3, double

Distilled U-Nets leave some of it out: blocks of each level, the coarsest level, the middle (Kim et al. 2023, "BK-SDM: a
lightweight, fast, and cheap version of Stable Diffusion"). `UNetConfig` says which.

B batch, C channels, H x W latents (any size), N = H W tokens, M tokens of the context, D its width.

>>> unet = UNet(UNetConfig(channels=(32, 64), heads=(2, 2), depth=(0, 1), blocks=1, context=16))
>>> unet(torch.randn(1, 4, 16, 24), torch.tensor([999.0]), Conditioning(torch.randn(1, 77, 16))).shape
torch.Size([1, 4, 16, 24])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import GROUPS, UNetConfig
from .layers import Attention, FeedForward, ResBlock, Upsample, guidance_embedding, module_list, timestep_embedding

NORM_EPS = 1e-5  # residual blocks, norm_out and LayerNorms
TRANSFORMER_NORM_EPS = 1e-6  # of the GroupNorm before a transformer: the original makes it with another helper


class TransformerBlock(nn.Module):
    """Self-attention among positions, cross-attention to the text, feed-forward; each pre-normalised."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.attn1 = Attention(width, heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.attn2 = Attention(width, heads, context_width, qkv_bias=False)
        self.norm3 = nn.LayerNorm(width, NORM_EPS)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, M, D) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks, `depth` of them, over the positions of a feature map."""

    def __init__(self, channels: int, heads: int, context_width: int, depth: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = module_list(TransformerBlock(channels, heads, context_width) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (B, M, D) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # (B, N, C): a view where x is channels-last
        tokens = self.proj_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens)
        return x + tokens.reshape(B, H, W, C).permute(0, 3, 1, 2)


class Middle(nn.Module):
    """Residual block, transformer, residual block at the coarsest level; with depth 0, a single residual block."""

    def __init__(self, config: UNetConfig, depth: int, time_width: int) -> None:
        super().__init__()
        channels, heads = config.channels[-1], config.heads[-1]
        self.res = module_list(ResBlock(channels, channels, NORM_EPS, time_width) for _ in range(2 if depth else 1))
        self.attn = SpatialTransformer(channels, heads, config.context, depth) if depth else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), time (B, T), context (B, M, D) -> (B, C, H, W)."""
        x = self.res[0](x, time)
        return x if self.attn is None else self.res[1](self.attn(x, context), time)


class Stage(nn.Module):
    """One resolution: residual blocks, each followed by a transformer unless the depths are 0.

    `widths` are the input channels of each block, and `depths` the transformer blocks after each. `down` or `up` is the
    step to the next level, None at the end.
    """

    def __init__(
        self, config: UNetConfig, level: int, widths: Sequence[int], depths: Sequence[int], time_width: int
    ) -> None:
        super().__init__()
        channels, heads, context = config.channels[level], config.heads[level], config.context
        self.res = module_list(ResBlock(width, channels, NORM_EPS, time_width) for width in widths)
        self.attn = module_list(SpatialTransformer(channels, heads, context, depth) for depth in depths if depth)
        self.down: nn.Conv2d | None = None
        self.up: Upsample | None = None

    def block(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Block i: x (B, C_in, H, W), time (B, T), context (B, M, D) -> (B, C, H, W)."""
        x = self.res[i](x, time)
        return self.attn[i](x, context) if self.attn else x


class UNetEncoder(nn.Module):
    """The first half of the U-Net: the way down and the middle. Control networks have one as well (controlnet.py)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first = config.channels[0]
        self.time_width = 4 * first
        self.time = nn.Sequential(
            nn.Linear(first, self.time_width), nn.SiLU(), nn.Linear(self.time_width, self.time_width)
        )
        self.guidance: nn.Linear | None = None
        if config.guidance is not None:
            self.guidance = nn.Linear(config.guidance, first, bias=False)
        self.vector: nn.Sequential | None = None
        if config.vector is not None:
            self.vector = nn.Sequential(
                nn.Linear(config.vector, self.time_width), nn.SiLU(), nn.Linear(self.time_width, self.time_width)
            )
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)

        down = []
        self.skip_channels = [first]  # of what is kept on the way down
        for i, channels in enumerate(config.channels):
            widths = [self.skip_channels[-1]] + [channels] * (config.blocks - 1)
            stage = Stage(config, i, widths, [config.depth[i]] * config.blocks, self.time_width)
            self.skip_channels += [channels] * config.blocks
            if i < len(config.channels) - 1:
                stage.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
                self.skip_channels.append(channels)
            down.append(stage)
        self.down = module_list(down)

        self.mid = None if config.middle_depth is None else Middle(config, config.middle_depth, self.time_width)

    def begin(self, x: Tensor, t: Tensor, conditioning: Conditioning | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first features (B, C_0, H, W), the embedded time (B, T) and the context (B, M, D)."""
        if isinstance(conditioning, Tensor):
            conditioning = Conditioning(conditioning)
        context, vector, concat, guidance = conditioning
        for name, given, layer in (("vector", vector, self.vector), ("guidance", guidance, self.guidance)):
            if (given is None) != (layer is None):
                raise ValueError(f"this U-Net {'takes no' if layer is None else 'needs a'} {name} as conditioning")
        embedded = timestep_embedding(t, self.config.channels[0]).to(x.dtype)
        if self.guidance is not None and guidance is not None:
            embedded = embedded + self.guidance(guidance_embedding(guidance, self.guidance.in_features).to(x.dtype))
        time = self.time(embedded)
        if self.vector is not None and vector is not None:
            time = time + self.vector(vector.to(x.dtype))
        x = self.conv_in(x if concat is None else torch.cat([x, concat.to(x.dtype)], dim=1))
        return x, F.silu(time), context  # every block would begin with this silu

    def contract(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """The way down: the skip connections, from the first features to the input of the middle."""
        skips = [x]
        for stage in self.down:
            for i in range(len(stage.res)):
                x = stage.block(i, x, time, context)
                skips.append(x)
            if stage.down is not None:
                x = stage.down(x)
                skips.append(x)
        return skips

    def bottom(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """The middle, if the U-Net has one: (B, C, H, W) -> (B, C, H, W)."""
        return x if self.mid is None else self.mid(x, time, context)


class UNet(UNetEncoder):
    """x_t, t, conditioning -> prediction, with the shape of x_t (but `out_channels` channels)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        skips = list(self.skip_channels)
        first, last = config.channels[0], config.channels[-1]
        up = []
        width = last  # channels of the output of the coarser level
        for i, channels in reversed(list(enumerate(config.channels))):
            widths = [before + skips.pop() for before in [width] + [channels] * config.blocks]
            stage = Stage(config, i, widths, config.depths_up(i), self.time_width)
            if i > 0:
                stage.up = Upsample(channels)
            up.append(stage)
            width = channels
        self.up = module_list(reversed(up))

        self.norm_out = nn.GroupNorm(GROUPS, first, NORM_EPS)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning | Tensor,
        down: Sequence[Tensor] = (),
        middle: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W), t (B,) in [0, steps), whole or fractional, and the conditioning -> (B, C_out, H, W).

        conditioning   context (B, M, D); vector (B, V) and guidance (B,) if the config has one; concat (B, E, H, W),
                       which is appended to the channels of x: C + E is the config's `in_channels`. A bare tensor is
                       the context
        down, middle   residuals of control networks: added to the skip connections, in the order of the way down, and
                       to the output of the middle block, or where it would be (sd/control.py)

        Raises ValueError if a vector or guidance is missing or unexpected, and for a wrong number of `down` residuals.
        """
        x, time, context = self.begin(x, t, conditioning)
        skips = self.contract(x, time, context)
        x = self.bottom(skips[-1], time, context)
        if down or middle is not None:
            skips, x = with_residuals(skips, x, down, middle)
        return self.end(self.expand(x, skips, time, context))

    # Parts of `forward`, like those of the encoder, for networks that run some of them: see runtime/deep_cache.py

    def expand(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor, left: int = 0) -> Tensor:
        """The way up: each block removes the last of `skips` and uses it, until `left` of them remain.

        The number of skips decides which block comes first. So a second call can continue with those that remain.
        """
        blocks = [(stage, i) for stage in reversed(self.up) for i in range(len(stage.res))]  # one for each skip
        for stage, i in blocks[len(blocks) - len(skips) : len(blocks) - left]:
            x = stage.block(i, torch.cat([x, skips.pop()], dim=1), time, context)
            if i == len(stage.res) - 1 and stage.up is not None:
                x = stage.up(x, skips[-1].shape[-2:])
        return x

    def end(self, x: Tensor) -> Tensor:
        """The last features (B, C_0, H, W) -> the prediction (B, C, H, W)."""
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


def with_residuals(
    skips: list[Tensor], x: Tensor, down: Sequence[Tensor], middle: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The skip connections, and the output x of the middle, with the residuals of control networks added."""
    if down:
        if len(down) != len(skips):
            raise ValueError(f"{len(down)} residuals of a control network, but the U-Net keeps {len(skips)}")
        skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
    return skips, x if middle is None else x + middle
