"""How much memory a network takes at its peak: weights and work, without the program and its libraries."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import torch

from sd.runtime.offload import give_back_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """The peak of this process, above what it had when this object was made; or of the GPU's memory.

    On the CPU pages of mapped files are not counted, as the system takes them back when it needs them. On CUDA all that
    the allocator has taken counts: what a recorded step works in is not allocated to anybody. Known on Linux and on
    CUDA; elsewhere None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = _own("VmRSS") or 0
        self._counting = False

    def start(self) -> None:
        """Look for the peak from now on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")  # proc(5): the peak is forgotten
            self._counting = True

    def peak(self) -> int | None:
        """Bytes at the peak since `start`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        highest = _own("VmHWM") if self._counting else None
        return None if highest is None else max(highest - self._before, 0)

    def release(self) -> None:
        """Give back what nothing refers to any more, which the allocators keep for later."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        give_back_memory()


def _own(entry: str) -> int | None:
    """Bytes by /proc/self/status, less those of mapped files."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return 1024 * (sizes[entry] - sizes.get("RssFile", 0)) if entry in sizes else None
