"""The peak memory of a network: weights and activations, without the program and its libraries."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import torch

from sd.runtime.device import give_back_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """Peak memory of this process beyond its memory when this object was created, or peak memory of the GPU.

    On the CPU, pages of mapped files do not count, because the system can reclaim them. On CUDA, all memory that the
    allocator reserved counts, because the buffers of a CUDA graph do not appear as allocated. Only on Linux and CUDA;
    elsewhere None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = _own("VmRSS") or 0
        self._counting = False

    def start(self) -> None:
        """Reset the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")  # proc(5): resets the peak
            self._counting = True

    def peak(self) -> int | None:
        """Peak in bytes since `start`; None if unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        highest = _own("VmHWM") if self._counting else None
        return None if highest is None else max(highest - self._before, 0)

    def release(self) -> None:
        """Return unused memory that the allocators cache to the system."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        give_back_memory()


def _own(entry: str) -> int | None:
    """An entry of /proc/self/status in bytes, minus mapped files."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return 1024 * (sizes[entry] - sizes.get("RssFile", 0)) if entry in sizes else None
