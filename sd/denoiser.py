"""The denoiser: a network, its prediction type and classifier-free guidance as one function (x_t, level) -> x0.

Ho and Salimans 2022, "Classifier-free diffusion guidance": with predictions c (with the prompt) and u (without, or
with the negative prompt)

    guided = u + guidance (c - u)

The batch order [uncond, cond] is known only here. Since x0 is linear in the prediction, it makes no difference whether
guidance is applied to the noise, the velocity or x0. Any callable with the signature of the U-Net can replace the
network, and any callable with the signature of the denoiser can replace the denoiser: `keep_known` is such a wrapper.

>>> level = Schedule().level(500)
>>> x0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
>>> cond = Conditioning(torch.zeros(1, 77, 16))
>>> denoise = Denoiser(lambda x, t, conditioning: noise, Schedule(), cond)  # knows the noise
>>> torch.allclose(denoise(Schedule().add_noise(x0, noise, level), level), x0, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .conditioning import Conditioning, Network, concatenate
from .samplers import Denoise
from .schedule import Level, Schedule


class Denoiser:
    """Guided prediction of the clean data.

    network    predicts; called in the dtype of `cond.context`
    schedule   defines what the prediction means: the noise or the velocity
    cond       the prompts, for B images, or for one if all images share it
    uncond     the empty or negative prompt, likewise; its context has the same length. Not needed at guidance 1
    guidance   0 ignores the prompt, 1 is the plain prediction (at half the cost), above 1 exaggerates the prompt

    Raises ValueError for guidance without `uncond`, and if `cond` and `uncond` do not match.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        guidance: float = 1.0,
    ) -> None:
        self.network, self.schedule, self.guidance = network, schedule, guidance
        if guidance == 1.0:
            self.parts = [cond]
        elif uncond is not None:
            self.parts = [uncond, cond]
        else:
            raise ValueError(f"guidance {guidance} needs `uncond`, the conditioning to steer away from")
        # concatenated once, not in every step; again only for another batch size
        self._images = max(len(x) for part in self.parts for x in part if x is not None)
        self._conditioning = concatenate(self.parts, self._images)

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """x (B, C, h, w) at a level -> x0 (B, C, h, w) in the precision of x."""
        if x.shape[0] != self._images:
            self._conditioning = concatenate(self.parts, x.shape[0])
            self._images = x.shape[0]
        inputs = x.to(self._conditioning.context.dtype).repeat(len(self.parts), 1, 1, 1)
        t = torch.full((inputs.shape[0],), level.t, device=x.device, dtype=torch.float32)
        out = self.network(inputs, t, self._conditioning).to(x.dtype)
        if self.guidance != 1.0:
            uncond, cond = out.chunk(2)
            out = uncond + self.guidance * (cond - uncond)
        return self.schedule.to_x0(out, x, level)


def one_by_one(denoisers: Sequence[Denoise]) -> Denoise:
    """A denoiser for B images that calls the i-th of B denoisers for the i-th image alone.

    Kernels choose how they split their sums by the size of the batch, so in a batch an image is rounded otherwise than
    alone. With this it is the same to the bit, and batches are no faster.
    """
    return lambda x, level: torch.cat([one(part, level) for one, part in zip(denoisers, x.split(1), strict=True)])


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """A denoiser for data that is partly known: x0 is `known` (B, C, h, w) wherever mask (B, 1, h, w) is 0.

    With it, any sampler moves the known part from its noise straight to `known`, at the noise level of each step, while
    the network sees both parts and makes what it generates, where mask is 1, fit the rest.
    """
    return lambda x, level: torch.lerp(known, denoise(x, level), mask)
