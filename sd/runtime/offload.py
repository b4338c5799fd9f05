"""Networks that take turns in memory, for machines that have no room for all of them at once.

A picture needs the text encoder, then (from a picture) the VAE, then the U-Net for all of its steps, then the VAE. Of
Stable Diffusion 1.x they are 12, 8 and 80 % of the weights. A GPU's networks lie in CPU memory and come over when it is
their turn. Where there is no second place to put them, as on a CPU, they are read from their file again, and dropped.

>>> with torch.device("meta"):  # without numbers
...     networks = {"unet": nn.Linear(4, 4), "vae": nn.Linear(4, 4)}
>>> turns = Turns(networks, torch.device("cpu"), lambda name, network: network.to_empty(device="cpu"))
>>> turns["unet"].weight.is_meta, turns["vae"].weight.is_meta, networks["unet"].weight.is_meta
(False, False, True)
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import nn


class Turns(Mapping[str, nn.Module]):
    """Networks by name. Whichever is asked for has its weights on the device; it has taken them from the one before.

    So a network is to be asked for whenever it is used, not kept: `turns["unet"](...)`.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        read: Callable[[str, nn.Module], object] | None = None,
    ) -> None:
        """The networks are in CPU memory, or on the meta device if `read` is given: it gives one its weights, there."""
        self._networks, self._device, self._read = networks, device, read
        self._here: str | None = None  # whose turn it is
        self._kept: set[str] = set()
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> nn.Module:
        network = self._networks[name]
        if name != self._here and name not in self._kept:
            if self._here is not None and self._here not in self._kept:
                self._put_away(self._here)
            self._here = None  # if it fails, it is nobody's turn
            self._bring(name)
            self._here = name
        return network

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        """A network whose turn it is as long as the block lasts, whatever other threads ask for."""
        with self._lock:
            yield self[name]

    def keep(self, *names: str) -> None:
        """Networks that are about to be changed, so that what the file holds will no longer do: they stay.

        Where weights are moved, not read again, changes move with them.
        """
        if self._read is not None:
            for name in set(names) - self._kept:
                if name != self._here:
                    self._bring(name)
                self._kept.add(name)

    def _bring(self, name: str) -> None:
        if self._read is not None:
            self._read(name, self._networks[name])
        else:
            self._networks[name].to(self._device, memory_format=torch.channels_last)

    def _put_away(self, name: str) -> None:
        if self._read is not None:
            self._networks[name].to("meta")
            give_back_memory()
        else:
            self._networks[name].to("cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)


def give_back_memory() -> None:
    """Have glibc give back what is free: by itself it keeps what has something in use behind it, here 1.5 GB."""
    with suppress(OSError, AttributeError):  # another system
        ctypes.CDLL("libc.so.6").malloc_trim(0)
