"""The control network: a latent, its timestep, the context and a hint image -> residuals for the U-Net.

Zhang, Rao and Agrawala 2023, "Adding conditional control to text-to-image diffusion models" (ControlNet), section 3.
A copy of the first half of the U-Net sees the hint, such as an edge map, as well. Each skip connection of the U-Net
and its middle get what the copy has there, through a 1x1 convolution that is zero when training begins:

    hint ── hint block ──┐
    x ────── conv_in ────(+)──┬── down.0 ──┬── ... ── middle ──┐
                            zero.0       zero.1             zero_mid
                              │            │                   │
    U-Net's skips:           (+)          (+)     ...         (+)

So at first a control network changes nothing. The U-Net itself is never trained; it keeps what it knows.

>>> import torch
>>> config = ControlConfig(UNetConfig(channels=(32, 64), heads=(2, 2), depth=(0, 1), blocks=1, context=16))
>>> control = ControlNet(config)
>>> x, t, conditioning = torch.randn(1, 4, 16, 24), torch.tensor([999.0]), Conditioning(torch.randn(1, 77, 16))
>>> hint = control.embed(torch.rand(1, 3, 128, 192))
>>> [tuple(residual.shape) for residual in control(x, t, conditioning, hint).down]
[(1, 32, 16, 24), (1, 32, 16, 24), (1, 32, 8, 12), (1, 64, 8, 12)]
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import UNetConfig as UNetConfig
from ..control_config import ControlConfig as ControlConfig
from .layers import ResBlock, module_list
from .unet import NORM_EPS, SpatialTransformer, UNetEncoder

HINT_CHANNELS = 3  # a hint is an RGB image, also where it is grey


class Residuals(NamedTuple):
    """What a control network adds to a U-Net: to the skip connections, in the order of the way down; to the middle."""

    down: tuple[Tensor, ...]
    middle: Tensor


class HintBlock(nn.Module):
    """A hint image -> features at the resolution of the latents, by convolutions that halve it at each level."""

    def __init__(self, widths: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(HINT_CHANNELS, widths[0], 3, padding=1)]
        for width, following in pairwise(widths):
            convs.append(nn.Conv2d(width, width, 3, padding=1))
            convs.append(nn.Conv2d(width, following, 3, stride=2, padding=1))
        convs.append(nn.Conv2d(widths[-1], out_channels, 3, padding=1))
        self.convs = module_list(convs)

    def forward(self, hint: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 2^levels, W / 2^levels)."""
        *convs, last = self.convs
        for conv in convs:
            hint = F.silu(conv(hint))
        return last(hint)


class ControlNet(UNetEncoder):
    """x_t, t, conditioning and the features of a hint -> `Residuals` for a U-Net."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__(config.unet)
        self.control_config = config
        for level in config.bare:
            self._add_bare(level)
        self.hint = HintBlock(config.hint, config.unet.channels[0])
        self.zero = module_list(nn.Conv2d(channels, channels, 1) for channels in self.skip_channels)
        last = config.unet.channels[-1]
        self.zero_mid = nn.Conv2d(last, last, 1)

    def _add_bare(self, level: int) -> None:
        """Give a level, or the middle if it is the number of levels, transformers without blocks."""
        channels, heads, context = self.config.channels, self.config.heads, self.config.context
        if level < len(channels):
            count = range(self.config.blocks)
            self.down[level].attn = module_list(
                SpatialTransformer(channels[level], heads[level], context, depth=0) for _ in count
            )
        elif self.mid is not None:
            last = channels[-1]
            self.mid.attn = SpatialTransformer(last, heads[-1], context, depth=0)
            self.mid.res = module_list([self.mid.res[0], ResBlock(last, last, NORM_EPS, self.time_width)])

    def embed(self, hint: Tensor) -> Tensor:
        """The features (B, C_0, h, w) of a hint (B, 3, H, W), an RGB image in [0, 1]: the same at every step.

        Raises ValueError if its sides are not multiples of `ControlConfig.factor`.
        """
        factor = self.control_config.factor
        if hint.dim() != 4 or hint.shape[1] != HINT_CHANNELS or any(side % factor for side in hint.shape[-2:]):
            raise ValueError(
                f"a hint must be (B, {HINT_CHANNELS}, H, W) with sides that are multiples of {factor}, got "
                f"{tuple(hint.shape)}"
            )
        if self.control_config.bgr:
            hint = hint.flip(1)
        return self.hint(hint.to(self.conv_in.weight.dtype))

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | Tensor, features: Tensor) -> Residuals:
        """x (B, C, h, w), t (B,), the conditioning, and features (B or 1, C_0, h, w) of the hint -> residuals.

        Of the conditioning, mask and masked image (`concat`) and guidance scale are not used.
        """
        if isinstance(conditioning, Conditioning):
            conditioning = conditioning._replace(concat=None, guidance=None)
        x, time, context = self.begin(x, t, conditioning)
        skips = self.contract(x + features, time, context)
        middle = self.zero_mid(self.bottom(skips[-1], time, context))
        down = tuple(zero(skip) for zero, skip in zip(self.zero, skips, strict=True))
        if self.control_config.pooled:
            down, middle = tuple(map(_mean, down)), _mean(middle)
        return Residuals(down, middle)


def _mean(residual: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1)."""
    return residual.mean(dim=(2, 3), keepdim=True)
