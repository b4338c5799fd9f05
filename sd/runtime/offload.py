"""Keeps networks out of memory while they are not needed, for machines whose memory cannot hold all of them at once.

An image needs the text encoder, then (if it starts from an image) the VAE, then the U-Net for all steps, then the VAE.
In Stable Diffusion 1.x they hold 12, 8 and 80 % of the weights. With a GPU, the networks stay in CPU memory and are
copied to the device when they are needed; only changed weights are copied back. A device without separate memory,
such as the CPU, reads them from their file each time, and drops them afterwards. A network that was handed out
(`offload["unet"]`) is looked at first: if it has changed since, it stays in memory.

Networks that are `resident` stay on the device, and only the others leave it. So the text encoders of SDXL, a quarter
of its weights, are on a small GPU only while prompts are encoded.

>>> with torch.device("meta"):  # shapes without values
...     networks = {"unet": nn.Linear(4, 4), "vae": nn.Linear(4, 4)}
>>> offload = Offload(networks, torch.device("cpu"), lambda name, network: network.to_empty(device="cpu"))
>>> offload["unet"].weight.is_meta, offload["vae"].weight.is_meta, networks["unet"].weight.is_meta
(False, False, True)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .device import give_back_memory
from .packing import drop_weights


class Offload(Mapping[str, nn.Module]):
    """Networks by name. Only the one that was requested last, and those that are resident, are on the device.

    So request a network each time that you use it: `offload["unet"](...)`. With several threads, use
    `with offload.use("unet") as network:`, which keeps it on the device until the end of the block.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        read: Callable[[str, nn.Module], object] | None = None,
        resident: Collection[str] = (),
    ) -> None:
        """The networks are in CPU memory, or on the meta device if `read` is given, which loads the weights of one.

        resident   networks that are on the device, and stay there
        """
        self._networks, self._device, self._read = networks, device, read
        self.resident = frozenset(resident)
        self._here: str | None = None  # the network on the device
        self._complete = True  # whether all of it is there: an error or an interrupt may have stopped the move
        self._kept: set[str] = set()  # networks that stay, as their file no longer has their weights
        # what the network in memory was when it was handed out; None if it was not
        self._handed_out: dict[str, Any] | None = None
        # of the network on the device, by id: each tensor, its fingerprint on arrival, and the copy in CPU memory
        self._copies: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._lock = threading.RLock()
        self._others: list[weakref.ref[Offload]] = []  # with which it shares the device

    def take_turns_with(self, other: Offload) -> None:
        """Share the device with another model: from now on only one network of the two is on it."""
        while True:
            locks = self._lock, other._lock
            first, second = sorted(locks, key=id)  # the same order in every thread
            with first, second:
                if locks == (self._lock, other._lock):  # else another thread has just joined one of them
                    self._share_with(other)
                    return

    def _share_with(self, other: Offload) -> None:
        """One lock for both and all that share the device with them. Needs the locks of both."""
        if other is self or other in self._partners():
            return
        both = [offload for each in (self, other) for offload in (each, *each._partners())]
        lock = self._lock
        for offload in both:
            offload._lock = lock
            offload._others = [weakref.ref(partner) for partner in both if partner is not offload]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock: that which it has when it is free, not the one it had when the waiting began."""
        while True:
            lock = self._lock
            with lock:
                if lock is self._lock:
                    yield
                    return

    def _partners(self) -> list[Offload]:
        return [partner for known in self._others if (partner := known()) is not None]

    def _leave(self) -> None:
        """Free the memory of the network on the device, which another model needs."""
        if self._here is not None and self._here not in self._kept:
            self._complete = False
            self._put_away(self._here)
            if self._here not in self._kept:
                self._here = None
            self._complete = True

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        """The network, which no other thread can move within the block."""
        with self._locked():
            yield self._get(name)

    def __getstate__(self) -> dict[str, Any]:  # for copying: a copy has its own lock
        return self.__dict__ | {"_lock": None, "_others": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __getitem__(self, name: str) -> nn.Module:
        with self._locked():
            network = self._get(name)
            if self._read is not None and name not in self._kept and self._handed_out is None:
                self._handed_out = fingerprints(network)  # whoever asked for it may change it
            return network

    def check_stays(self, name: str) -> None:
        """Raise ValueError for a network that is not resident, and so cannot be replaced."""
        if name not in self.resident:
            if self.resident:
                raise ValueError(
                    f"the {name} cannot be replaced: it is offloaded from {self._device} once prompts are encoded"
                )
            raise ValueError("with low memory the networks take turns, and cannot be replaced: load without it")

    def _get(self, name: str) -> nn.Module:
        if name in self.resident:
            for offload in (self, *self._partners()):
                offload._leave()
        elif name not in self._kept and (name != self._here or not self._complete):
            self._complete = False
            if self._here is not None and self._here not in self._kept:
                self._put_away(self._here)
            for partner in self._partners():
                partner._leave()
            if name not in self._kept:  # else it has just turned out to be changed
                self._here = name  # set before the move: if it fails, the next move undoes it
                self._bring(name)
            self._complete = True
        return self._networks[name]

    def keep(self, *names: str) -> None:
        """Keep networks in memory from now on, because their weights are about to differ from the file.

        Does nothing if weights are moved rather than read again: changes move with them.
        """
        if self._read is None:
            return
        with self._locked():
            for name in set(names) - self._kept:
                if name != self._here or not self._complete:
                    self._bring(name)
                self._kept.add(name)

    def _bring(self, name: str) -> None:
        network = self._networks[name]
        if self._read is not None:
            self._read(name, network)
            return
        for tensor in _tensors(network):
            copy = tensor.data
            if self._device.type == "cuda" and not copy.is_pinned():  # once: later copies then run at full speed
                copy = copy.pin_memory()
            tensor.data = self._to_device(copy)
            self._copies[id(tensor)] = tensor, fingerprint(tensor.data), copy

    def _put_away(self, name: str) -> None:
        """Free the device's memory of a network. Can be repeated if it was interrupted."""
        network = self._networks[name]
        if self._read is not None:
            if self._handed_out is not None and self._handed_out != fingerprints(network):
                self._kept.add(name)
            self._handed_out = None
            if name in self._kept:
                return
            drop_weights(network)
            give_back_memory()
            return
        for tensor in _tensors(network):
            _, before, copy = self._copies.pop(id(tensor), (None, None, None))
            if (
                before is not None
                and copy is not None
                and (tensor.dtype, tensor.shape) == (copy.dtype, copy.shape)
                and torch.equal(fingerprint(tensor.data), before)
            ):
                tensor.data = copy
            else:
                tensor.data = self._from_device(tensor.data)
        self._copies.clear()

    def _to_device(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, convolution kernels in channels-last."""
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(self._device, memory_format=layout)

    def _from_device(self, tensor: Tensor) -> Tensor:
        """The tensor in CPU memory."""
        return tensor.cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)


def without_moving(networks: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """The networks where they are: items of an `Offload` come to the device when they are looked at."""
    return networks._networks if isinstance(networks, Offload) else networks


def with_network(networks: Mapping[str, nn.Module], name: str, network: nn.Module) -> Mapping[str, nn.Module]:
    """The networks with another one of this name; of an `Offload`, one that is resident (`check_stays`)."""
    if isinstance(networks, Offload):
        with networks._locked():
            networks._networks = {**networks._networks, name: network}
        return networks
    return {**networks, name: network}


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


def fingerprints(network: nn.Module) -> dict[str, Any]:
    """What tells whether a network has changed: precision, shape and fingerprint of its parameters and buffers."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.device, None if tensor.is_meta else fingerprint(tensor.data).tolist())
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }


def fingerprint(tensor: Tensor) -> Tensor:
    """(3,) integers on the tensor's device that change with its bits: their sum, and sums weighted by row and column.

    The version counter of a tensor is not enough: changes through `.data`, as when a LoRA is merged, do not count.

    >>> fingerprint(torch.tensor([[1.0, 2.0]])).equal(fingerprint(torch.tensor([[2.0, 1.0]])))
    False
    """
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().reshape(len(tensor) if tensor.dim() else 1, -1).view(kind)
    rows, columns = (bits.sum(dim=dim, dtype=torch.int64) for dim in (1, 0))
    weighted = [(sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum() for sums in (rows, columns)]
    return torch.stack([rows.sum(), *weighted])
