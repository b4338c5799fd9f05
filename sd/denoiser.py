"""The denoiser: a network, its prediction type and classifier-free guidance as one function (x_t, level) -> x0.

Ho and Salimans 2022, "Classifier-free diffusion guidance": with predictions c (with the prompt) and u (without, or
with the negative prompt)

    guided = u + guidance (c - u)

The batch order is [uncond, cond], here and nowhere else. As x0 is linear in the prediction, guiding the noise, the
velocity or x0 is the same. Anything with the U-Net's signature can stand in for the network, and anything with the
denoiser's for the denoiser: a known part of the picture (`keep_known`) is a wrapper.

>>> level = Schedule().level(500)
>>> x0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
>>> cond = Conditioning(torch.zeros(1, 77, 16))
>>> denoise = Denoiser(lambda x, t, conditioning: noise, Schedule(), cond)  # knows the noise
>>> torch.allclose(denoise(Schedule().add_noise(x0, noise, level), level), x0, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .conditioning import Conditioning, concatenate
from .samplers import Denoise
from .schedule import Level, Schedule

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x (B, C, h, w), t (B,), conditioning) -> (B, C, h, w)


class Denoiser:
    """Guided prediction of the clean data.

    network   what predicts, in the precision of the context
    schedule  says what the prediction means
    cond      the prompts, for B pictures, or for one where all pictures are alike
    uncond    what to steer away from, likewise, with a context of the same length; not needed at guidance 1
    guidance  0 ignores the prompt, 1 is the plain prediction (and half the work), above 1 exaggerates the prompt

    Raises ValueError, in one line, for a guidance without `uncond`, and where `cond` and `uncond` do not go together.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        guidance: float = 1.0,
    ) -> None:
        if guidance != 1.0 and uncond is None:
            raise ValueError(f"guidance {guidance} needs `uncond`, the conditioning to steer away from")
        self.network = network
        self.schedule = schedule
        self.guidance = guidance
        self.parts = [cond] if guidance == 1.0 else [uncond, cond]
        self._batch = 0  # pictures that `_conditioning` is for
        self._conditioning = self._for_batch(max(part.batch for part in self.parts))

    def _for_batch(self, batch: int) -> Conditioning:
        """The conditioning of a step of so many pictures, which is put together once."""
        if batch != self._batch:
            self._conditioning = concatenate([part.expand(batch) for part in self.parts])
            self._batch = batch
        return self._conditioning

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """x (B, C, h, w) at a level -> x0 (B, C, h, w) in x's precision."""
        conditioning = self._for_batch(x.shape[0])
        batch = x.to(conditioning.context.dtype).repeat(len(self.parts), 1, 1, 1)
        t = torch.full((batch.shape[0],), level.t, device=x.device, dtype=torch.float32)
        out = self.network(batch, t, conditioning).to(x.dtype)
        if self.guidance != 1.0:
            uncond, cond = out.chunk(2)
            out = uncond + self.guidance * (cond - uncond)
        return self.schedule.to_x0(out, x, level)


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """The denoiser where part of the clean data is known: x0 is `known` (B, C, h, w) wherever mask (B, 1, h, w) is 0.

    So every sampler leads that part from its noise straight to `known`, through just as much noise as each level has,
    while the network sees both parts and paints where mask is 1 what goes with the rest.
    """
    return lambda x, level: torch.lerp(known, denoise(x, level), mask)
