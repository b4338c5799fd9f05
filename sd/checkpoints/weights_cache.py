"""A cache of converted and packed weights, so that a model starts faster.

On x86 CPUs most of a start is spent on converting the weights to the precision of the networks, on measuring which
kernels are faster, and on packing each weight for them at its first use (runtime/packing.py). The result depends on the
model's files, the options of `load`, the processor, the number of threads, and the versions of torch and of this
package. It is kept in a file of a cache folder (weights_file.py), and the next start maps this file into memory.

    model = StableDiffusion.load("v1-5.safetensors", cache="~/.cache/sd-from-scratch")
    model.txt2img("a horse")    # packs the weights
    model.save_cache()          # writes them, unless they come from there

The cache is optional: where a file is missing, damaged or made for something else, the model is loaded as usual, and
`save_cache` replaces the file. It fixes the choice of packed layers; with the same choice of kernels, images are
bit-identical with and without it. A file is never changed. It can be removed at any time, also while a model uses it
(except on Windows).

**The name of a model's file** contains a hash of everything that the weights depend on (`facts`). Hashing all numbers
of a model would take seconds. Instead, the hash covers the size of each of its files, the time of the last change and,
on POSIX systems, the time of the last change of the inode, which programs cannot set; and the name, type and position
of each tensor, and 64 bytes from its middle. No usual way of making another file keeps all of these.

**What is written** are the weights of the model's files, read once more, not those in memory: merged LoRAs and changed
weights are not in it. Only the layers' classes, and the sizes that they were packed for, are taken from the model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.build import weight_shapes
from ..runtime import kernel_choice, packed_memory
from ..runtime.device import dtype_name
from ..runtime.optimize import choose, chosen, class_name, restore, unwrapped
from ..runtime.packing import PackedLayer, PackedWeight, onednn_dtypes
from ..text.tokenizer import Note, warn
from .checkpoint import CheckpointError
from .loading import PATHS, LoadOptions, ModelFiles, Report, as_used
from .weights_file import BadFile, WeightsFile, write

SUFFIX = ".weights"
SMALLEST = 200_000_000  # bytes of weights: a smaller model, such as the embedded one, starts as fast without a cache
LIMIT = 20_000_000_000  # bytes of all files in the folder
FREE = 0.1  # share of the disk that has to stay free
INODE_TIMES = os.name == "posix"  # whether st_ctime is the time of the last change; elsewhere it is the creation time
SAMPLE = 64  # bytes of each tensor in the key
ABANDONED = 600  # seconds without a change after which an unfinished file belongs to a program that was killed


# ------------------------------------------------------------------------------------- the key


def machine() -> dict[str, Any]:
    """What the layout of weights and the choice of kernels depend on, besides the model."""
    return {
        "machine": kernel_choice.machine(),
        "threads": torch.get_num_threads(),
        "kernels": kernel_choice.preferred(),  # so that `prefer` has files of its own
    }


def fingerprint(files: ModelFiles) -> str:
    """The hash of the weights of these files: see the top of this file."""
    digest = hashlib.sha256(files.config.to_json().encode())
    for checkpoint in files.files:
        for opened in checkpoint.files:
            status = os.fstat(opened.stream.fileno())
            changed = status.st_ctime_ns if INODE_TIMES else 0
            digest.update(f"\n{opened.kind} {status.st_size} {status.st_mtime_ns} {changed}".encode())
        for key, (opened, view) in sorted(checkpoint.places.items(), key=lambda item: item[1][1].start):
            size = view.extent * view.dtype.itemsize
            opened.stream.seek(view.start + max(size - SAMPLE, 0) // 2)
            sample = opened.stream.read(min(size, SAMPLE))
            digest.update(f"\n{key} {view.dtype} {view.shape} {view.stride} {view.start} ".encode() + sample)
    for name, state in files.states.items():
        digest.update(json.dumps([name, [(key, state.origin(key)) for key in state]]).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- one model's file


def unusable(device: torch.device, dtype: torch.dtype, low_memory: bool) -> str:
    """Why a cache would have no effect, in a few words; empty if it has one."""
    if device.type != "cpu" or not packed_memory.available():
        return "it is for x86 CPUs"
    if low_memory:
        return "with low memory, networks are read from the model's own files"
    return "" if dtype in onednn_dtypes() else f"weights in {dtype_name(dtype)} are not packed"


@dataclass(frozen=True)
class WeightsCache:
    """The file of one model's weights in a cache folder.

    path     of the model, whose files are read again when the cache is written
    options  with which it was loaded
    dtype    the precision of the networks
    facts    everything that the weights depend on
    classes  network -> layer -> the class that `optimize` chose for it
    used     whether the model's weights were loaded from the cache, or have been written to it
    """

    path: Path
    options: LoadOptions
    dtype: torch.dtype
    facts: Mapping[str, Any]
    classes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    used: bool = False

    @classmethod
    def of(cls, files: ModelFiles, dtype: torch.dtype) -> WeightsCache:
        """The cache of an opened model in this precision."""
        facts = {**machine(), "dtype": dtype_name(dtype), "weights": fingerprint(files)}
        given = {name: getattr(files.options, name) for name in PATHS}
        absolute = {name: os.path.abspath(path) for name, path in given.items() if path is not None}
        return cls(Path(files.path).absolute(), replace(files.options, **absolute), dtype, facts)

    @property
    def folder(self) -> Path:
        """The cache folder."""
        assert self.options.cache is not None
        return Path(self.options.cache)

    @property
    def file(self) -> Path:
        """The path of the file. Its name begins with the model's, so that people can recognise it."""
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", self.path.stem)[:40]
        return self.folder / f"{name}-{self.facts['dtype']}-{key[:24]}{SUFFIX}"

    def fill(self, networks: Mapping[str, nn.Module], report: Report) -> bool:
        """Fill networks on the meta device with the weights in the cache.

        Returns False, and leaves the networks as they were, if it has none. `report` is called as in `load_weights`.
        """
        try:
            with WeightsFile(self.file) as found:
                if found.facts != self.facts or not _fits(found, networks, self.dtype):
                    return False
                taken = {name: found.tensor(name) for name in found.entries}
                if not all(choose(network, found.classes[name]) for name, network in networks.items()):
                    raise BadFile("it was made for other layers")
                _check_layers(taken, networks)
        except (OSError, BadFile, LookupError, TypeError, AttributeError):
            for network in networks.values():
                restore(network)
            return False
        for name, network in networks.items():
            _give(network.eval(), name, taken, report)
        with suppress(OSError):
            os.utime(self.file)  # the least recently used file is removed first
        return True

    def loaded(self, networks: Mapping[str, nn.Module], used: bool) -> WeightsCache:
        """A copy with the layers chosen for these networks; `used`: whether they were loaded from the cache."""
        return replace(self, classes={name: chosen(network) for name, network in networks.items()}, used=used)

    def write(self, networks: Mapping[str, nn.Module], limit: int) -> int:
        """Write the weights of the model's files, packed like those of the networks; returns the size in bytes.

        Raises CheckpointError if the model's files have changed; OSError for a folder that cannot be written to, or a
        disk that is too full.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ModelFiles(self.path, self.options) as files, torch.no_grad():
            if fingerprint(files) != self.facts["weights"]:
                raise CheckpointError(f"{self.path}: has changed since it was loaded; load it again")
            numbers = sum(
                math.prod(shape) for shapes in weight_shapes(files.config).values() for shape in shapes.values()
            )
            make_room(self.file, numbers * self.dtype.itemsize, limit)
            return write(self.file, self.facts, self.classes, self._weights(files, networks))

    def _weights(
        self, files: ModelFiles, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor | PackedWeight]]:
        """Name and weight, one by one: from the model's files, in the layout of the networks."""
        for name, state in files.states.items():
            modules = dict(networks[name].named_modules())
            for key in state:
                weight = as_used(state[key], self.dtype)
                path, _, leaf = key.rpartition(".")
                layer = modules.get(path)
                size = None
                if leaf == "weight" and isinstance(layer, PackedLayer):
                    as_chosen = class_name(type(layer)) == self.classes[name].get(path)
                    size = layer.size_to_pack_for() if as_chosen else None
                if size is None or not isinstance(layer, PackedLayer):
                    yield f"{name}.{key}", weight
                else:
                    yield f"{name}.{key}", layer.pack(weight, size)


def _fits(found: WeightsFile, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> bool:
    """Whether the file has exactly the weights of these networks, in this precision."""
    shapes = {
        f"{name}.{key}": tuple(weight.shape)
        for name, network in networks.items()
        for key, weight in network.state_dict().items()
    }
    return shapes == {key: entry.plain_shape for key, entry in found.entries.items()} and all(
        place.dtype == dtype for entry in found.entries.values() for place in entry.places
    )


def _check_layers(taken: Mapping[str, Tensor | PackedWeight], networks: Mapping[str, nn.Module]) -> None:
    """Raise BadFile if a weight is packed but its layer is not a `PackedLayer`."""
    layers = {f"{name}.{path}": layer for name, network in networks.items() for path, layer in network.named_modules()}
    for key, weight in taken.items():
        if isinstance(weight, PackedWeight) and not isinstance(layers[key.removesuffix(".weight")], PackedLayer):
            raise BadFile(f"{key} is packed")


def _give(network: nn.Module, name: str, taken: Mapping[str, Tensor | PackedWeight], report: Report) -> None:
    """Give a network on the meta device its weights."""
    for path, module in network.named_modules():
        parameters = module.__dict__["_parameters"]
        for leaf, meta in parameters.items():
            if meta is None:
                continue
            weight = taken[f"{name}.{path}.{leaf}" if path else f"{name}.{leaf}"]
            if not isinstance(weight, PackedWeight):
                parameters[leaf] = nn.Parameter(weight, requires_grad=False)
            elif isinstance(module, PackedLayer):
                module.adopt(weight)
            report(meta.numel())


# ------------------------------------------------------------------------------------- the folder


def make_room(file: Path, size: int, limit: int) -> None:
    """Remove the least recently used files until another one of `size` bytes fits into the folder's limit.

    Raises OSError, and removes nothing, if the file alone exceeds the limit, if the disk would become too full, or if
    there is a folder of its name.
    """
    if file.is_dir():
        raise OSError(errno.EISDIR, f"there is a folder of the name {file.name}: remove it")
    disk = shutil.disk_usage(file.parent)
    if disk.free - size < max(FREE * disk.total, 2 * size):
        raise OSError(errno.ENOSPC, f"the disk would be too full with another {size / 1e9:.1f} GB")
    if size > limit:
        raise OSError(errno.EFBIG, f"{size / 1e9:.1f} GB are more than the limit of {limit / 1e9:.1f} GB")
    others = []
    for path in file.parent.iterdir():
        with suppress(OSError):
            status = path.stat()
            if path.suffix == SUFFIX and path != file:
                others.append((status.st_mtime, status.st_size, path))
            elif path.suffix == ".part":
                if time.time() - status.st_mtime > ABANDONED:
                    path.unlink()
                else:
                    size += status.st_size
    total = size + sum(length for _, length, _ in others)
    for _, length, path in sorted(others):
        if total <= limit:
            break
        with suppress(OSError):  # on Windows, one that is in use
            path.unlink()
            total -= length


class Cached:
    """A model whose weights can be kept in a cache folder: `StableDiffusion.load(..., cache=folder)`."""

    _cache: WeightsCache | None = None  # None without a cache folder, or where it has no effect
    _networks: Mapping[str, nn.Module]

    @property
    def cache_file(self) -> Path | None:
        """The file in the cache folder that this model was loaded from, or that `save_cache` writes; or None."""
        return None if self._cache is None else self._cache.file

    def save_cache(self, *, limit: int = LIMIT, note: Note = warn) -> int:
        """Write the model's weights to its cache folder, unless they come from it; returns how many bytes were written.

        limit   bytes that all files in the folder may have together: the least recently used ones are removed

        Best called after the first image, when the sizes that the weights are packed for are known. It takes seconds,
        and reads the model's files once more, so merged LoRAs and changed weights are not written. If it fails, the
        model stays as it was, nothing is left in the folder, and a `note` says why. Returns 0 where there is nothing
        to do: without a cache folder, where the cache has no effect, and if the weights were loaded from it or
        have been written to it.
        """
        cache = self._cache
        if cache is None or cache.used:
            return 0
        try:
            size = cache.write({name: unwrapped(network) for name, network in self._networks.items()}, limit)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: torch is out of memory, for example
            strerror = error.strerror if isinstance(error, OSError) else None
            why = strerror or str(error).partition("\n")[0]
            note(f"the weights are not kept in the cache folder {cache.folder}: {why}")
            return 0
        self.__dict__["_cache"] = replace(cache, used=True)
        return size
