"""Memory for weights: separate memory pages, which return to the system as soon as a weight is freed.

Weights do not stay where they were loaded: on x86 CPUs they are packed when they are first used (cpu_kernels.py). The
holes that they leave in an allocator's memory are slightly too small for their successors: in the first step, a process
with Stable Diffusion 1.x in bfloat16 (2.1 GB) grew to 4.7 GB. With separate pages it stays at 2.4 GB.

Pages may belong to the file (`FilePages`): it is mapped, so that nothing is copied, and privately, so that writing to a
weight does not change the file. Loading that model from a file of the same precision then takes 0.4 s of one core
instead of 1.7 s, half of it to see that every number is finite.

The price: overwriting the file in place changes weights that have not been touched yet, and truncating it ends the
program. The same holds for everyone who loads safetensors through the format's own library, including diffusers and
transformers. Programs that download or save models replace the file, and then the old pages persist; the remaining risk
is `cp` or the like onto a model in use. So models are mapped, and files opened without a request (LoRAs, conversion)
are read. On Windows everything is read: a mapped file cannot be replaced there, not even by the program that continues
training it.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import torch

POSIX = os.name == "posix"
SMALL = 2**16  # bytes; smaller tensors are better placed in the allocator's memory


def fresh(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory for `count` numbers; separate pages if they are many."""
    import torch

    size = count * dtype.itemsize
    if size > SMALL and POSIX:
        with suppress(OSError):  # out of memory: the allocator has a better message
            return torch.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), dtype=dtype)
    return torch.empty(count, dtype=dtype, device="cpu")


class FilePages:
    """The memory-mapped pages of an open file, lent to tensors; what is written to them does not reach the file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._map: mmap.mmap | None = None
        self._lent: set[int] = set()  # places in this map
        self._lock = threading.Lock()  # several threads may read

    def lend(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """`count` numbers from byte `start` on; None if they have to be read.

        That is so for small tensors, unaligned ones, and files that cannot or must not be mapped.
        """
        import torch

        size = count * dtype.itemsize
        if size <= SMALL or start % dtype.itemsize or not POSIX:
            return None
        with self._lock:
            try:
                if os.fstat(self._stream.fileno()).st_size < start + size:
                    return None  # reading it says so
                if self._map is None or start in self._lent:  # somebody may have written to it
                    self._lent.clear()
                    self._map = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):  # some file systems cannot; ValueError: it has been closed
                return None
            self._lent.add(start)
            pages = self._map
        array = np.frombuffer(pages, np.uint8, size, start)
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(pages, "madvise") and first < last:
            _advise(pages, mmap.MADV_WILLNEED, first, last - first)
            weakref.finalize(array, _advise, pages, mmap.MADV_DONTNEED, first, last - first).atexit = False
        return torch.from_numpy(array).view(dtype)


def _advise(pages: mmap.mmap, advice: int, start: int, length: int) -> None:
    """Advise the system about the use of these pages; some file systems do not support it."""
    with suppress(OSError):
        pages.madvise(advice, start, length)
