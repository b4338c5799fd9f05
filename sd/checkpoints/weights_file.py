"""A file of weights in the form in which they are used: in their precision, packed for oneDNN where a layer packs them.

    8 bytes    MAGIC, with the version of this format
    8 bytes    where the header starts, little-endian
    32 bytes   SHA-256 of the header
    ...        the tensors, each at a multiple of 64 bytes, large ones at the start of a page
    to the end the header, JSON: {"facts", "classes", "tensors"}

Large tensors are not read but mapped into memory (formats/mmap.py), so opening takes no time, and the system reads what
is used. The mapping is private: no change of a weight reaches the file.

What is checked: the header by its checksum, and before any memory is used, that all tensors lie before the header
without overlapping. A truncated file has lost its header. The numbers have checksums too, which only `verify` looks
at: reading and adding up 2 GB would take longer than the whole start. That is enough, since the file gets its name
only when it is complete and on the disk, so what remains is a failing disk, from which no other weights file is
protected either. Nothing is ever written into a file that has its name.

A layout of oneDNN is trusted once the checksum fits, so such a file is as dangerous as a program: files that belong to
another user are not read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files import replaced_file
from ..runtime import packed_memory
from ..runtime.packing import PackedWeight
from .formats.mmap import SMALL, FilePages

MAGIC = b"sdlaid01"
MAX_HEADER = 2**26  # bytes; of Stable Diffusion 1.x it has 1 MB
HEAD = 48  # bytes before the first tensor
PAGE = 4096
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class BadFile(Exception):
    """A file that cannot be used as a cache; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie, and what they are.

    shape, stride   of the tensor; of a packed one, its own shape, and no stride
    layout          oneDNN's, of a packed one; else empty
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    layout: bytes
    start: int
    nbytes: int
    crc: int

    def to_json(self) -> dict[str, Any]:
        """As in the header."""
        layout = base64.b64encode(self.layout).decode()
        return {**vars(self), "dtype": NAMES[self.dtype], "layout": layout}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Place:
        """The same back. BadFile, or an error of Python's, for what cannot be right."""
        layout = base64.b64decode(entry["layout"], validate=True)
        shape, stride = tuple(entry["shape"]), tuple(entry["stride"])
        place = cls(TYPES[entry["dtype"]], shape, stride, layout, entry["start"], entry["nbytes"], entry["crc"])
        numbers = (*shape, *stride, place.start, place.nbytes, place.crc)
        if any(type(number) is not int or number < 0 for number in numbers) or place.nbytes == 0:
            raise BadFile("a number in its header is impossible")
        if not layout:
            extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            if min(shape, default=1) < 1 or extent * place.dtype.itemsize != place.nbytes:
                raise BadFile("a tensor in its header is impossible")
            if math.prod(shape) != extent:
                raise BadFile("a tensor in its header overlaps itself")
        return place


@dataclass(frozen=True)
class Entry:
    """One weight: plain, or packed with the size of the inputs; `kept` is the plain one of some that are packed."""

    place: Place
    packed_for: tuple[int, int, int] | None = None
    shape: tuple[int, ...] = ()  # of the plain weight of a packed one
    stride: tuple[int, ...] = ()
    kept: Place | None = None

    def to_json(self) -> dict[str, Any]:
        """As in the header."""
        kept = None if self.kept is None else self.kept.to_json()
        return {**vars(self), "place": self.place.to_json(), "kept": kept}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Entry:
        """The same back."""
        size, kept = entry["packed_for"], entry["kept"]
        place = Place.from_json(entry["place"])
        if (size is None) == bool(place.layout):
            raise BadFile("a packed weight in its header has no layout, or a plain one has")
        if size is not None and kept is None and math.prod(place.shape) != math.prod(entry["shape"]):
            raise BadFile("a packed weight in its header has another shape than the plain one")
        return cls(
            place,
            None if size is None else (int(size[0]), int(size[1]), int(size[2])),
            tuple(map(int, entry["shape"])),
            tuple(map(int, entry["stride"])),
            None if kept is None else Place.from_json(kept),
        )

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape of the weight, which may be packed."""
        return self.place.shape if self.packed_for is None else self.shape

    @property
    def places(self) -> list[Place]:
        """All that it has in the file."""
        return [self.place] if self.kept is None else [self.place, self.kept]


# ------------------------------------------------------------------------------------- reading


class WeightsFile:
    """An opened file. Close it when its weights have been taken: they stay valid.

    facts    what it was made for
    classes  network -> module -> name of the class that the layer had
    entries  name of a weight -> what there is in the file
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises BadFile, or OSError, for a file that cannot be used."""
        self._stream: BinaryIO = open(path, "rb")  # noqa: SIM115
        try:
            header, end = _read_header(self._stream)
            self.facts, self.classes = header["facts"], header["classes"]
            self.entries = {name: Entry.from_json(entry) for name, entry in header["tensors"].items()}
            self._check_places(end)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            self._stream.close()
            raise BadFile(f"its header is damaged ({error!s:.80})") from None
        except BaseException:
            self._stream.close()
            raise
        self._pages = FilePages(self._stream)

    def _check_places(self, limit: int) -> None:
        """Every tensor between the first bytes and the header, at its alignment, none over another."""
        end = HEAD
        for place in sorted((p for entry in self.entries.values() for p in entry.places), key=lambda p: p.start):
            if place.start < end or place.start % packed_memory.ALIGNMENT:
                raise BadFile("tensors in it overlap, or are not aligned")
            end = place.start + place.nbytes
        if end > limit:
            raise BadFile("a tensor in it reaches into its header")

    def _bytes(self, place: Place) -> Tensor:
        """The bytes of a tensor (uint8): pages of the file if they are many, else memory of their own."""
        lent = self._pages.lend(place.start, place.nbytes, torch.uint8)
        if lent is not None:
            return lent
        own = torch.empty(place.nbytes, dtype=torch.uint8, device="cpu")
        self._stream.seek(place.start)
        if self._stream.readinto(own.numpy().data) != place.nbytes:  # type: ignore[attr-defined]
            raise BadFile("it has become shorter")
        return own

    def tensor(self, name: str) -> Tensor | PackedWeight:
        """A weight, plain or packed, in memory of its own or in private pages of the file."""
        entry = self.entries[name]
        if entry.packed_for is None:
            return self._plain(entry.place)
        place, data = entry.place, self._bytes(entry.place)
        if data.data_ptr() % packed_memory.ALIGNMENT:
            raise BadFile("its memory is not aligned")
        try:
            packed = packed_memory.on_memory(data, place.layout, place.shape, place.dtype)
        except (RuntimeError, ValueError) as error:
            raise BadFile(f"a packed weight in it cannot be used: {error!s:.100}") from None
        kept = None if entry.kept is None else self._plain(entry.kept)
        return PackedWeight(packed, entry.packed_for, torch.Size(entry.shape), entry.stride, kept, data)

    def _plain(self, place: Place) -> Tensor:
        return self._bytes(place).view(place.dtype).as_strided(place.shape, place.stride)

    def damaged(self) -> list[str]:
        """The names of weights whose numbers do not have the checksum that they were written with; reads all."""
        return [
            name
            for name, entry in self.entries.items()
            if any(zlib.crc32(self._bytes(place).numpy().data) != place.crc for place in entry.places)
        ]

    def close(self) -> None:
        """Close the file; pages that were lent stay."""
        self._stream.close()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, and where it starts; raises BadFile unless it is what was written."""
    status = os.fstat(stream.fileno())
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise BadFile("it belongs to another user")
    head = stream.read(HEAD)
    start = int.from_bytes(head[8:16], "little")
    if len(head) < HEAD or head[:8] != MAGIC:
        raise BadFile("it is not a weights file of this version")
    if not HEAD <= start < status.st_size <= start + MAX_HEADER:
        raise BadFile("its header has an impossible place")
    stream.seek(start)
    raw = stream.read()
    if hashlib.sha256(raw).digest() != head[16:]:
        raise BadFile("its header does not have its checksum")
    return json.loads(raw), start


def verify(path: Path) -> list[str]:
    """The names of damaged weights in a file, which is read as a whole; BadFile if its header is damaged already."""
    with WeightsFile(path) as file:
        return file.damaged()


# ------------------------------------------------------------------------------------- writing


def write(
    path: Path,
    facts: Mapping[str, Any],
    classes: Mapping[str, Mapping[str, str]],
    tensors: Iterable[tuple[str, Tensor | PackedWeight]],
) -> int:
    """Write a file, whole or not at all; returns its size in bytes. OSError if the disk is full, for example.

    The tensors are consumed one by one: no more than one needs to be in memory.
    """
    entries: dict[str, Entry] = {}
    with replaced_file(path) as partial, open(partial, "rb+") as stream:
        stream.seek(HEAD)
        for name, tensor in tensors:
            entries[name] = _write_tensor(stream, tensor)
        start = stream.tell()
        listed = {name: entry.to_json() for name, entry in entries.items()}
        raw = json.dumps({"facts": facts, "classes": classes, "tensors": listed}).encode()
        stream.write(raw)
        size = stream.tell()
        stream.seek(0)
        stream.write(MAGIC + start.to_bytes(8, "little") + hashlib.sha256(raw).digest())
    return size


def _write_tensor(stream: BinaryIO, tensor: Tensor | PackedWeight) -> Entry:
    """Write the bytes of a tensor to where the file ends; returns its entry in the header."""
    if isinstance(tensor, PackedWeight):
        packed = tensor.weight
        place = _write_bytes(stream, packed_memory.numbers(packed), packed, packed_memory.layout(packed))
        kept = None if tensor.plain is None else _write_plain(stream, tensor.plain)
        return Entry(place, tensor.size, tuple(tensor.shape), tuple(tensor.stride), kept)
    return Entry(_write_plain(stream, tensor))


def _write_plain(stream: BinaryIO, tensor: Tensor) -> Place:
    """The numbers in the order of the memory, which has no holes."""
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return _write_bytes(stream, flat, tensor, b"")


def _write_bytes(stream: BinaryIO, data: Tensor, tensor: Tensor, layout: bytes) -> Place:
    nbytes = data.numel()
    step = PAGE if nbytes > SMALL else packed_memory.ALIGNMENT
    stream.seek(-stream.tell() % step, os.SEEK_CUR)
    start, raw = stream.tell(), data.numpy().data
    stream.write(raw)
    stride = () if layout else tuple(tensor.stride())
    return Place(tensor.dtype, tuple(tensor.shape), stride, layout, start, nbytes, zlib.crc32(raw))
