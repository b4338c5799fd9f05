"""DeepCache: the deep features of the U-Net are computed in every k-th call only, and reused in between.

Ma, Fang and Wang 2024, "DeepCache: accelerating diffusion models for free". What the U-Net computes at its coarse
levels changes little from step to step. So the calls in between run only the first convolution and the last block on
the new x_t, with cached features F_s: the input of the last block when the whole network last ran, at noise level s.

    whole network     F_s = all blocks but the last,     out = end(last block(F_s, conv_in(x_s)))
    in between                                           out = end(last block(F_s, conv_in(x_t)))

This is the paper's uniform schedule with the outermost skip connection (cache_branch_id 0 of its code). It is an
approximation: docs/performance.md has its error and the time that it saves.

>>> from sd.config import UNetConfig
>>> unet = UNet(UNetConfig(channels=(32, 64), heads=(2, 2), depth=(0, 1), blocks=1, context=16))
>>> x, t, conditioning = torch.randn(1, 4, 16, 24), torch.tensor([999.0]), Conditioning(torch.randn(1, 77, 16))
>>> network = DeepCache(lambda *inputs, wrap: wrap(unet)(*inputs), interval=2)
>>> network(x, t, conditioning).equal(unet(x, t, conditioning))  # the whole network
True
>>> network(2 * x, t, conditioning).equal(unet(2 * x, t, conditioning))  # its last block
False
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..conditioning import Conditioning, Network, Predict
from ..models.unet import UNet, with_residuals
from .cuda_graphs import Compiled, Recorded
from .optimize import unwrapped


class Residuals(Protocol):
    """What control networks add to the U-Net (sd/control.py): (down, middle), or `first`, the first of `down` alone."""

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Sequence[Tensor], Tensor] | None: ...

    def first(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor | None: ...


class Deep(nn.Module):
    """A U-Net without its last block: its output is the input of that block."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        down: Sequence[Tensor] = (),
        middle: Tensor | None = None,
    ) -> Tensor:
        """The inputs of the U-Net -> features (B, C', H, W), the input of its last block."""
        x, time, context = self.unet.begin(x, t, conditioning)
        skips = self.unet.contract(x, time, context)
        x = self.unet.bottom(skips[-1], time, context)
        skips, x = with_residuals(skips, x, down, middle)
        return self.unet.expand(x, skips, time, context, left=1)


def shallow(
    unet: UNet, x: Tensor, t: Tensor, conditioning: Conditioning, features: Tensor, residual: Tensor | None = None
) -> Tensor:
    """The prediction (B, C, H, W) from the last block, with input `features`; exact if they are from the same x.

    residual   that of control networks for the first skip connection, the only one which this block has
    """
    x, time, context = unet.begin(x, t, conditioning)
    return unet.end(unet.expand(features, [x if residual is None else x + residual], time, context))


class DeepCache:
    """A network that runs as a whole in every `interval`-th call, and with cached features in between.

    Calls are counted, not steps: where a sampler evaluates the network twice in a step, the second evaluation may use
    the features of the first. The features belong to the images and prompts of these calls, so each denoiser of a run
    needs its own `DeepCache`. A call with an x of another shape runs the whole network.

    With recorded and compiled networks, the deep part is recorded or compiled, too. The last block always runs eagerly:
    it launches few kernels.
    """

    def __init__(self, predict: Predict, interval: int, residuals: Residuals | None = None) -> None:
        """`predict` is the method of a model, or a function like it; `residuals` those of control networks.

        Raises ValueError for an interval below 1.
        """
        if interval < 1:
            raise ValueError(f"cache_interval must be at least 1, got {interval}")
        self._predict, self._interval, self._residuals = predict, interval, residuals
        self._features: Tensor | None = None
        self._shape: torch.Size | None = None  # of the x of these features
        self._age = 0  # calls since they were computed

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The output of the network (B, C, H, W), exact or approximate.

        Raises ValueError if the network is not a `UNet`: others cannot be run in parts.
        """
        return self._predict(x, t, conditioning, wrap=self._around)

    def _around(self, network: Network) -> Network:
        fast = network if isinstance(network, Recorded | Compiled) else None
        plain = fast.plain if fast is not None else unwrapped(network) if isinstance(network, nn.Module) else network
        if not isinstance(plain, UNet):
            raise ValueError(
                f"cache_interval needs a UNet, whose parts it runs, and not a {type(plain).__name__}: leave it at 1"
            )
        unet: UNet = plain
        deep = Deep(unet) if fast is None else fast.part(Deep)

        def run(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            first: Tensor | None = None
            if self._features is None or self._age >= self._interval or x.shape != self._shape:
                residuals = None if self._residuals is None else self._residuals(x, t, conditioning)
                features = deep(x, t, conditioning, *(residuals or ()))
                first = None if residuals is None else residuals[0][0]
                self._features, self._shape, self._age = features.detach(), x.shape, 0
            else:
                features = self._features
                first = None if self._residuals is None else self._residuals.first(x, t, conditioning)
            self._age += 1
            return shallow(unet, x, t, conditioning, features, first)

        return run
