"""The optimiser Muon (Jordan et al. 2024) and the learning rate over a run.

>>> [round(learning_rate(step, 100, 1.0, warmup=10), 2) for step in (0, 9, 55, 100)]
[0.1, 1.0, 0.5, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

# share of the peak learning rate, by the share of the steps after the warm-up that are done
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str = "cosine") -> float:
    """Linear warm-up to `peak`, then one of `SCHEDULES` until `steps`.

    cosine     half a cosine down to 0 (Loshchilov and Hutter 2016)
    linear     a straight line down to 0
    constant   the peak
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * SCHEDULES[schedule](done)


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose updates are orthogonalised matrices, so that rare directions are learned too.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Updates have about the size of Adam's
    (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so learning rates carry over. Use it for hidden
    weights of two or more dimensions; a kernel (out, in, 3, 3) is treated as a matrix (out, in · 9). Small networks
    need at most half as many steps as with AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the weights. Matrices of the same shape form one batch, which uses a GPU better."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append((p, p.grad))
            for shape, weights in by_shape.items():
                updates = []
                for p, grad in weights:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(grad, 1 - group["momentum"])
                    updates.append(grad.lerp(average, group["momentum"]).flatten(1))  # Nesterov momentum
                matrices = orthogonal(torch.stack(updates))
                size = 0.2 * max(matrices.shape[1:]) ** 0.5  # root mean square of an orthogonal matrix -> Adam's, 0.2
                for (p, _), matrix in zip(weights, matrices, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(matrix.view(shape), alpha=-group["lr"] * size)
        return loss


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (B, m, n) with singular values moved to 0.7 to 1.2; the dtype stays.

    Five Newton-Schulz iterations in bfloat16, which is precise enough, with the coefficients of Jordan et al.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
