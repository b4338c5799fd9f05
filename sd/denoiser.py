"""The denoiser: a network, its prediction type and classifier-free guidance as one function (x_t, level) -> x0.

Ho and Salimans 2022, "Classifier-free diffusion guidance": with predictions c (with the prompt) and u (without, or
with the negative prompt)

    guided = u + guidance (c - u)

The batch order is [uncond, cond], here and nowhere else. As x0 is linear in the prediction, guiding the noise, the
velocity or x0 is the same. Anything with the U-Net's signature can stand in for the network, and anything with the
denoiser's for the denoiser: more inputs (`with_channels`) and a known part of the picture (`keep_known`) are wrappers.

>>> level = Schedule().level(500)
>>> x0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
>>> denoise = Denoiser(lambda x, t, context: noise, Schedule(), torch.zeros(1, 77, 16))  # knows the noise
>>> torch.allclose(denoise(Schedule().add_noise(x0, noise, level), level), x0, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .samplers import Denoise
from .schedule import Level, Schedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (B, C, h, w), t (B,), context (B, M, D)) -> (B, C, h, w)


class Denoiser:
    """Guided prediction of the clean data.

    network   what predicts, in the precision of `context`
    schedule  says what the prediction means
    context   (B, M, D), the prompts, or (1, M, D) for all pictures alike; `uncond` likewise what to steer away from,
              not needed at guidance 1
    guidance  0 ignores the prompt, 1 is the plain prediction (and half the work), above 1 exaggerates the prompt
    """

    def __init__(
        self, network: Network, schedule: Schedule, context: Tensor, uncond: Tensor | None = None, guidance: float = 1.0
    ) -> None:
        if guidance != 1.0 and uncond is None:
            raise ValueError(f"guidance {guidance} needs `uncond`, the context to steer away from")
        self.network = network
        self.schedule = schedule
        self.guidance = guidance
        self.contexts = [context] if guidance == 1.0 else [uncond, context]

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """x (B, C, h, w) at a level -> x0 (B, C, h, w) in x's precision."""
        B = x.shape[0]
        for context in self.contexts:
            if context.shape[0] not in (1, B):
                raise ValueError(f"a context for {context.shape[0]} pictures, but there are {B}")
        contexts = torch.cat([context.expand(B, -1, -1) for context in self.contexts])
        batch = x.to(contexts.dtype).repeat(len(self.contexts), 1, 1, 1)
        t = torch.full((batch.shape[0],), level.t, device=x.device, dtype=torch.float32)
        out = self.network(batch, t, contexts).to(x.dtype)
        if self.guidance != 1.0:
            uncond, cond = out.chunk(2)
            out = uncond + self.guidance * (cond - uncond)
        return self.schedule.to_x0(out, x, level)


def with_channels(network: Network, extra: Tensor) -> Network:
    """The network with `extra` (B, E, h, w) behind the channels of x; for the batch of guidance, repeated."""

    def run(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        more = extra.to(x.dtype).repeat(x.shape[0] // extra.shape[0], 1, 1, 1)
        return network(torch.cat([x, more], dim=1), t, context)

    return run


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """The denoiser where part of the clean data is known: x0 is `known` (B, C, h, w) wherever mask (B, 1, h, w) is 0.

    So every sampler leads that part from its noise straight to `known`, through just as much noise as each level has,
    while the network sees both parts and paints where mask is 1 what goes with the rest.
    """
    return lambda x, level: torch.lerp(known, denoise(x, level), mask)
