"""The denoiser: a network, its prediction type and classifier-free guidance as one function (x_t, level) -> x0.

Ho and Salimans 2022, "Classifier-free diffusion guidance": with predictions c (with the prompt) and u (without, or
with the negative prompt)

    guided = u + guidance (c - u)

The batch order is [uncond, cond], here and nowhere else. As x0 is linear in the prediction, guiding the noise, the
velocity or x0 is the same. Anything with the U-Net's signature can stand in for the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
