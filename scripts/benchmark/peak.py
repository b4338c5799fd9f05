"""The peak rate of the machine, for comparison: the fastest of some large matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from sd.runtime.optimize import optimize
from sd.training import channels_last

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
CONVOLUTIONS = ((512, 64), (1024, 32))  # channels and side, like those of the VAE and the U-Net
TRIAL_SIDE, TRIAL_CONVOLUTIONS = 1024, ((128, 64),)  # for a trial of the program: a twentieth of the work
SECONDS = 0.3  # for each


def peak(device: torch.device, dtype: torch.dtype, trial: bool = False) -> float:
    """FLOP/s of the fastest, with the fast layers of sd/runtime/optimize.py.

    trial   use small sizes, which give a lower peak
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
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
        fast = optimize(channels_last(layer.requires_grad_(False), device))
        calls.append((2 * side**2 * channels**2 * 9, partial(fast, x)))
    return max(flop / fastest(call, device) for flop, call in calls)


def fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several runs; the first is a warm-up."""
    took = [timed(call, device)[0]]
    while len(took) < 3 or sum(took) < SECONDS:
        took.append(timed(call, device)[0])
    return min(took)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Run a function to completion: seconds, and its result."""
    synchronize(device)
    start = perf_counter()
    out = call()
    synchronize(device)
    return perf_counter() - start, out


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
