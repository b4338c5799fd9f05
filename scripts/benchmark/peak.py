"""What the machine reaches, which every part is held against: the best of some large products and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from sd.runtime.optimize import optimize

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
CONVOLUTIONS = ((512, 64), (1024, 32))  # channels and side of maps like the VAE's and the U-Net's
TRIAL_SIDE, TRIAL_CONVOLUTIONS = 1024, ((128, 64),)  # where the program is only tried: a twentieth of the work
SECONDS = 0.3  # for each of them


def peak(device: torch.device, dtype: torch.dtype, trial: bool = False) -> float:
    """FLOP/s of the fastest, with weights packed once where that is faster (sd/runtime/optimize.py).

    trial   take small ones, which tell less
    """
    size = TRIAL_SIDE if trial else SIDE.get(device.type, 4096)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    linear = optimize(nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False))
    calls: list[tuple[float, Callable[[], Tensor]]] = [
        (2 * size**3, lambda: matrix @ matrix),
        (2 * size**3, lambda: linear(matrix)),
    ]
    for channels, side in TRIAL_CONVOLUTIONS if trial else CONVOLUTIONS:
        x = torch.ones(1, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype).requires_grad_(
            False
        )
        layer = optimize(layer.to(memory_format=torch.channels_last))
        calls.append((2 * side**2 * channels**2 * 9, lambda layer=layer, x=x: layer(x)))
    return max(flop / fastest(call, device) for flop, call in calls)


def fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some runs, of which the first prepares the others."""
    took = [timed(call, device)[0]]
    while len(took) < 3 or sum(took) < SECONDS:
        took.append(timed(call, device)[0])
    return min(took)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Run something to its end: seconds, and what it gave."""
    synchronize(device)
    start = perf_counter()
    out = call()
    synchronize(device)
    return perf_counter() - start, out


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
