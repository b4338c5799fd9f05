"""Memory for weights: whole pages of their own, which go back to the system as soon as a weight goes.

A weight does not live long where it was loaded: an x86 CPU lays it out anew when it is first used (kernels.py). The
holes that it leaves in an allocator's memory are a little too small for what comes in its place: in the first step a
process with Stable Diffusion 1.x in bfloat16 (2.1 GB) grew to 4.7 GB. With pages it stays at 2.4.

Pages may be a file's own (`FilePages`): mapped, so that nothing is read before it is used, nor copied; and privately,
so that writing to a weight leaves the file as it is. To load that model from a file of its precision takes 0.2 s of
one core then, in place of 1.5.

The price: a file that is written over in place changes weights that have not been touched yet, and one that becomes
shorter ends the program. It is the same for all who load safetensors through the format's own library, diffusers and
transformers among them, and they live with it: what downloads or saves models puts a new file in the old one's place,
and then the old one's pages stay. What remains is `cp` and the like onto a model in use. On an x86 CPU that is the time
before its first picture, afterwards only the table of words still lies in the file. So models are mapped; whatever is
opened without the wish for it (LoRA files, conversion) is read. So is everything on Windows: there a file that is
mapped cannot be replaced, not even by the program that trains its model further.
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
SMALL = 2**16  # bytes up to which an allocator's memory is the better place


def fresh(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for so many numbers, whose values are not defined: pages of its own if they are many."""
    import torch

    size = count * dtype.itemsize
    if size > SMALL and POSIX:
        with suppress(OSError):  # no memory, which the allocator has the better words for
            return torch.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), dtype=dtype)
    return torch.empty(count, dtype=dtype, device="cpu")


class FilePages:
    """The pages of an open file, lent to tensors; what they write is theirs alone."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._map: mmap.mmap | None = None
        self._lent: set[int] = set()  # places in this map
        self._lock = threading.Lock()  # several threads may read

    def lend(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The numbers from byte `start` on; None where they have to be read.

        Small ones are, those that do not lie at a multiple of their size, and files that cannot or must not be mapped.
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
    """Tell the system what will become of these pages; not all file systems want to know."""
    with suppress(OSError):
        pages.madvise(advice, start, length)
