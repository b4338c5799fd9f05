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

from .conditioning import Conditioning, Wrapper
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


class Predict(Protocol):
    """`StableDiffusion.predict`: the output of the network, or of what `wrap` makes of it."""

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, wrap: Wrapper = ...) -> Tensor: ...


class AppliedControl:
    """A control network with its hint and scale: (x, t, conditioning) -> the residuals to add, or None.

    network   a `ControlNet`, or a function like it
    embed     `ControlNet.embed`: it is called once, with the first x
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
    ) -> None:
        self._network, self._embed, self._hint = network, embed, hint
        self._scale, self._soft, self._guess, self._images = scale, soft, guess, images or hint.shape[0]
        self._features: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Residuals | None:
        """Scaled residuals for x (B, C, h, w): of B images, with guidance [uncond, cond] of each."""
        rows = conditional(x.shape[0], self._images) if self._guess else slice(None)
        if self._scale == 0:
            return None
        if self._features is None:
            self._features = self._embed(self._hint.to(x.device))
        features = self._features
        inputs, t, conditioning = x[rows], t[rows], conditioning.of_images(rows)
        if features.shape[0] > 1:
            features = torch.cat([features] * (inputs.shape[0] // features.shape[0]))  # `repeat` changes the layout
        down, middle = self._network(inputs, t, conditioning, features)
        n = len(down) + 1
        scales = [self._scale * (SOFT ** (n - 1 - i) if self._soft else 1.0) for i in range(n)]
        before = x.shape[0] - inputs.shape[0]  # images that are not controlled
        scaled = [_after(before, r if s == 1 else r * s) for r, s in zip((*down, middle), scales, strict=True)]
        return Residuals(tuple(scaled[:-1]), scaled[-1])


def _after(rows: int, residual: Tensor) -> Tensor:
    """(B, C, H, W) -> (rows + B, C, H, W), zero for the first ones, in the same memory layout."""
    return F.pad(residual, (0, 0, 0, 0, 0, 0, rows, 0)) if rows else residual


def controlled(network: ControllableNetwork, controls: Sequence[AppliedControl]) -> ControllableNetwork:
    """The network with the residuals of several control networks, which add up."""

    def run(
        x: Tensor, t: Tensor, conditioning: Conditioning, down: Sequence[Tensor] = (), middle: Tensor | None = None
    ) -> Tensor:
        for control in controls:
            residuals = control(x, t, conditioning)
            if residuals is not None:
                down, middle = _sum(down, residuals.down), _plus(middle, residuals.middle)
            del residuals  # their sum alone stays in memory while the network runs
        return network(x, t, conditioning, down, middle)

    return run


def controlled_predict(predict: Predict, controls: Sequence[AppliedControl]) -> Predict:
    """The method `predict` of a model, with the residuals of control networks."""

    def run(x: Tensor, t: Tensor, conditioning: Conditioning, wrap: Wrapper = lambda net: net) -> Tensor:
        return predict(
            x, t, conditioning, lambda network: controlled(cast(ControllableNetwork, wrap(network)), controls)
        )

    return run


def with_control(
    network: ControllableNetwork, control: ControlNet, hint: Tensor, scale: float = 1.0, *, guess: bool = False
) -> ControllableNetwork:
    """The network, controlled by a hint: the same function for study and for several in turn.

    control   a `ControlNet`
    hint      (B, 3, H, W), RGB in [0, 1], H and W those of the image, for B images, or one for all if not `guess`
    scale     of the residuals
    guess     guess mode: see above
    """
    return controlled(network, [AppliedControl(control, control.embed, hint, scale, soft=guess, guess=guess)])


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _sum(a: Sequence[Tensor], b: Sequence[Tensor]) -> Sequence[Tensor]:
    return b if not a else [x + y for x, y in zip(a, b, strict=True)]
