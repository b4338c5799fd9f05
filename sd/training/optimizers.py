"""The optimiser Muon (Jordan et al. 2024) and the learning rate over a run.

>>> [round(learning_rate(step, 100, 1.0, warmup=10), 2) for step in (0, 9, 55, 100)]
[0.1, 1.0, 0.5, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0 at `steps` (Loshchilov and Hutter 2016)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are replaced by orthogonal ones nearby, so that rare directions learn, too.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; steps have about the size of Adam's
    (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so learning rates carry over. It is for weights
    of two and more dimensions between a network's ends; a kernel (out, in, 3, 3) counts as a matrix (out, in · 9).
    Small networks learn in half the steps or fewer that AdamW needs.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change the weights by their gradients. Matrices of one shape go together, which a GPU needs to be busy."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, weights in by_shape.items():
                updates = []
                for p in weights:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]).flatten(1))  # Nesterov's look ahead
                matrices = orthogonal(torch.stack(updates))
                size = 0.2 * max(matrices.shape[1:]) ** 0.5  # an orthogonal matrix' root mean square -> Adam's, 0.2
                for p, matrix in zip(weights, matrices, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(matrix.view(shape), alpha=-group["lr"] * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (B, m, n) with their singular values brought to about 1, from 0.7 to 1.2; the same dtype.

    Five turns of a Newton-Schulz iteration, whose coefficients Jordan et al. chose for speed; bfloat16 does for it.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
