"""Control networks at work: wrappers of a network that add the residuals of a control network to it.

    controlled(x, t, c) = network(x, t, c, down = scale r_down(x, t, c, hint), middle = scale r_mid(x, t, c, hint))

Wrappers nest, and their residuals add up: `with_control(with_control(unet, edges, ...), depth, ...)`. A denoiser calls
the result like any network, so samplers and guidance need no change.

Guess mode (the ControlNet paper, section 4.3 and its code): the residuals of fine levels count less than those of
coarse ones, and only the prediction with the prompt is controlled, so guidance pushes the image towards the hint even
without a prompt. With n residuals,

    scale_i = scale 0.825^(n - 1 - i)        the middle, the last one, has the whole scale

>>> from sd.config import UNetConfig
>>> from sd.models.controlnet import ControlConfig
>>> from sd.models.unet import UNet
>>> config = UNetConfig(channels=(32, 64), heads=(2, 2), depth=(0, 1), blocks=1, context=16)
>>> unet, control = UNet(config), ControlNet(ControlConfig.of(config))
>>> x, t, conditioning = torch.randn(1, 4, 16, 24), torch.tensor([999.0]), Conditioning(torch.randn(1, 77, 16))
>>> network = with_control(unet, control, hint=torch.rand(1, 3, 128, 192), scale=0.0)
>>> torch.equal(network(x, t, conditioning), unet(x, t, conditioning))
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import Conditioning, Predict, Wrapper
from .denoiser import conditional
from .models.controlnet import ControlNet, Residuals

SOFT = 0.825  # the ratio of the scales of neighbouring residuals in guess mode


class ControllableNetwork(Protocol):
    """A network that takes residuals: a `UNet`, a wrapper of one, or what `with_control` returns."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        down: Sequence[Tensor] = (),
        middle: Tensor | None = None,
    ) -> Tensor: ...


class AppliedControl:
    """A control network with its hint and scale: (x, t, conditioning) -> the residuals to add, or None.

    network   a `ControlNet`, or a function like it
    embed     `ControlNet.embed`: it is called once, with the first x
    first     `ControlNet.first`, for `first`
    hint      (B, 3, 8h, 8w) in [0, 1] for B images, or one for all
    scale     of the residuals; 1 is that of training
    soft      whether the fine levels count less (see above)
    guess     whether only the predictions with a prompt are controlled. Both together are guess mode
    images    the number of images in a batch; by default, that of the hints
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Conditioning, Tensor], Residuals],
        embed: Callable[[Tensor], Tensor],
        hint: Tensor,
        scale: float = 1.0,
        *,
        soft: bool = False,
        guess: bool = False,
        images: int | None = None,
        first: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self._network, self._embed, self._hint, self._first = network, embed, hint, first
        self._scale, self._soft, self._guess, self._images = scale, soft, guess, images or hint.shape[0]
        self._features: Tensor | None = None
        self._count: int | None = None  # of the residuals, once they are known

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Residuals | None:
        """Scaled residuals for x (B, C, h, w): of B images, with guidance [uncond, cond] of each."""
        if self._scale == 0:
            return None
        rows = self._rows(x)
        inputs = x[rows]
        down, middle = self._network(inputs, t[rows], conditioning.of_images(rows), self._features_for(inputs))
        n = self._count = len(down) + 1
        before = x.shape[0] - inputs.shape[0]  # images that are not controlled
        scaled = [_after(before, self._scaled(residual, i, n)) for i, residual in enumerate((*down, middle))]
        return Residuals(tuple(scaled[:-1]), scaled[-1])

    def first(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor | None:
        """The first of the residuals alone, which needs no more of the network than its first convolution."""
        if self._scale == 0:
            return None
        if self._first is None or self._count is None:  # how much the first one counts depends on how many there are
            residuals = self(x, t, conditioning)
            return None if residuals is None else residuals.down[0]
        inputs = x[self._rows(x)]
        residual = self._scaled(self._first(inputs, self._features_for(inputs)), 0, self._count)
        return _after(x.shape[0] - inputs.shape[0], residual)

    def _rows(self, x: Tensor) -> slice:
        """The entries of a batch that are controlled."""
        return conditional(x.shape[0], self._images) if self._guess else slice(None)

    def _features_for(self, inputs: Tensor) -> Tensor:
        """The hint's features, for a batch."""
        if self._features is None:
            self._features = self._embed(self._hint.to(inputs.device))
        if (count := self._features.shape[0]) == 1:
            return self._features
        return torch.cat([self._features] * (inputs.shape[0] // count))  # `repeat` changes the layout

    def _scaled(self, residual: Tensor, i: int, n: int) -> Tensor:
        """Residual i of n, with its scale."""
        scale = self._scale * (SOFT ** (n - 1 - i) if self._soft else 1.0)
        return residual if scale == 1 else residual * scale


def _after(rows: int, residual: Tensor) -> Tensor:
    """(B, C, H, W) -> (rows + B, C, H, W), zero for the first ones, in the same memory layout."""
    return F.pad(residual, (0, 0, 0, 0, 0, 0, rows, 0)) if rows else residual


class SummedControls:
    """Several control networks, whose residuals add up: (x, t, conditioning) -> their sum, None if there are none."""

    def __init__(self, controls: Sequence[AppliedControl]) -> None:
        self._controls = controls

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Residuals | None:
        """The sum of the residuals."""
        total: Residuals | None = None
        for control in self._controls:
            residuals = control(x, t, conditioning)
            if residuals is not None:
                total = residuals if total is None else _sum(total, residuals)
            del residuals  # their sum alone stays in memory while the next network runs
        return total

    def first(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor | None:
        """The sum of the first ones alone."""
        first, *others = [control.first(x, t, conditioning) for control in self._controls]
        for other in others:
            first = other if first is None else first if other is None else first + other
        return first


def controlled(network: ControllableNetwork, controls: Sequence[AppliedControl]) -> ControllableNetwork:
    """The network with the residuals of several control networks, which add up."""
    residuals = SummedControls(controls)

    def run(
        x: Tensor, t: Tensor, conditioning: Conditioning, down: Sequence[Tensor] = (), middle: Tensor | None = None
    ) -> Tensor:
        total = residuals(x, t, conditioning)
        if total is None:  # as without control, which may be recorded already
            return network(x, t, conditioning, *((down, middle) if down or middle is not None else ()))
        if down or middle is not None:
            total = _sum(total, Residuals(tuple(down), total.middle.new_zeros(()) if middle is None else middle))
        return network(x, t, conditioning, *total)

    return run


def controlled_predict(predict: Predict, controls: Sequence[AppliedControl]) -> Predict:
    """The method `predict` of a model, with the residuals of control networks."""

    def run(x: Tensor, t: Tensor, conditioning: Conditioning, wrap: Wrapper = lambda net: net) -> Tensor:
        return predict(
            x, t, conditioning, lambda network: controlled(cast(ControllableNetwork, wrap(network)), controls)
        )

    return run


def with_control(
    network: ControllableNetwork,
    control: ControlNet,
    hint: Tensor,
    scale: float = 1.0,
    *,
    guess: bool = False,
    images: int | None = None,
) -> ControllableNetwork:
    """The network, controlled by a hint; it can be controlled by another one in turn.

    control   a `ControlNet`
    hint      (B, 3, H, W), RGB in [0, 1], H and W those of the image, for B images or one for all
    scale     of the residuals
    guess     guess mode: see above
    images    the number of images, by default that of the hints: where only predictions with a prompt are controlled,
              in guess mode and by networks for colours (`ControlConfig.pooled`), it says which ones these are
    """
    only_cond = guess or control.control_config.pooled  # as in the original code
    applied = AppliedControl(control, control.embed, hint, scale, soft=guess, guess=only_cond, images=images)
    return controlled(network, [applied])


def _sum(a: Residuals, b: Residuals) -> Residuals:
    return Residuals(tuple(x + y for x, y in zip(a.down, b.down, strict=True)), a.middle + b.middle)
