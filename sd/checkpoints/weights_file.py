"""A file of weights ready for use: in the precision of the networks, and packed for oneDNN where layers pack them.

    8 bytes    MAGIC, with the version of this format
    8 bytes    the position of the header, little-endian
    32 bytes   SHA-256 of the header
    ...        the tensors, each aligned to 64 bytes, large ones to a page
    to the end the header, JSON: {"facts", "classes", "tensors"}

Large tensors are not read but mapped into memory (formats/mmap.py), so opening takes no time, and the system reads only
what is used. The mapping is private: changes of a weight never reach the file.

When a file is opened, its header is verified by its checksum. All tensors must lie before the header, without
overlapping. A truncated file has lost its header. The tensors have checksums too, which only `verify` reads, since
checking 2 GB would take longer than the whole start. This is enough: a file gets its name only when it is complete and
on the disk, and is never written to after that. Only a failing disk remains, and other weights files have no protection
from that either.

oneDNN trusts the layouts in the file, so a forged file is as dangerous as a program: files that belong to another user
are not read.
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

from ..files import check_regular, replaced_file
from ..runtime import packed_memory
from ..runtime.packing import PackedWeight
from .formats.mmap import SMALL, FilePages

MAGIC = b"sdlaid01"
MAX_HEADER = 2**26  # bytes; that of Stable Diffusion 1.x has 1 MB
HEAD = 48  # bytes before the first tensor
PAGE = 4096
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class BadFile(Exception):
    """A file that cannot be used as a cache; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor are in the file, and how to interpret them.

    shape, stride   of the tensor; a packed one has no stride, and its shape is that of the packed tensor
    layout          oneDNN's description of a packed tensor; else empty
    start, nbytes   position and length in the file, in bytes
    crc             CRC-32 of these bytes
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
        """Parse `to_json`. Raises BadFile for impossible values; Python errors for wrong types or missing keys."""
        layout = base64.b64decode(entry["layout"], validate=True)
        shape, stride = tuple(entry["shape"]), tuple(entry["stride"])
        place = cls(TYPES[entry["dtype"]], shape, stride, layout, entry["start"], entry["nbytes"], entry["crc"])
        numbers = (*shape, *stride, place.start, place.nbytes, place.crc)
        if any(type(number) is not int or number < 0 for number in numbers) or place.nbytes == 0:
            raise BadFile("a number in its header is out of range")
        if not layout:
            extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            if min(shape, default=1) < 1 or extent * place.dtype.itemsize != place.nbytes:
                raise BadFile("the shape of a tensor in its header does not fit its size")
            if math.prod(shape) != extent:
                raise BadFile("a tensor in its header overlaps itself")
        return place


@dataclass(frozen=True)
class Entry:
    """One weight, plain or packed.

    packed_for      the size of the inputs that a packed weight is packed for (see `PackedWeight`); else None
    shape, stride   of the plain weight, if it is packed
    kept            the plain weight, where it cannot be computed from the packed one
    """

    place: Place
    packed_for: tuple[int, int, int] | None = None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    kept: Place | None = None

    def to_json(self) -> dict[str, Any]:
        """As in the header."""
        kept = None if self.kept is None else self.kept.to_json()
        return {**vars(self), "place": self.place.to_json(), "kept": kept}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Entry:
        """Parse `to_json`; errors as in `Place.from_json`."""
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
        """The shape of the weight in its plain form."""
        return self.place.shape if self.packed_for is None else self.shape

    @property
    def places(self) -> list[Place]:
        """The tensors of this weight in the file."""
        return [self.place] if self.kept is None else [self.place, self.kept]


# ------------------------------------------------------------------------------------- reading


class WeightsFile:
    """An opened file. Close it once its weights have been read: they stay valid.

    facts    what it was made for: see weights_cache.py
    classes  network -> layer -> name of its class
    entries  name of a weight -> its entry in the header
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises BadFile, or OSError, for a file that cannot be used."""
        check_regular(path)
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
        """Raise BadFile unless all tensors lie before `limit`, aligned and without overlapping."""
        end = HEAD
        for place in sorted((p for entry in self.entries.values() for p in entry.places), key=lambda p: p.start):
            if place.start < end or place.start % packed_memory.ALIGNMENT:
                raise BadFile("its tensors overlap, or are not aligned")
            end = place.start + place.nbytes
        if end > limit:
            raise BadFile("one of its tensors overlaps its header")

    def _bytes(self, place: Place) -> Tensor:
        """The bytes of a tensor (uint8): mapped pages of the file if it is large, else a copy."""
        lent = self._pages.lend(place.start, place.nbytes, torch.uint8)
        if lent is not None:
            return lent
        own = torch.empty(place.nbytes, dtype=torch.uint8, device="cpu")
        self._stream.seek(place.start)
        if self._stream.readinto(own.numpy().data) != place.nbytes:  # type: ignore[attr-defined]
            raise BadFile("it has become shorter")
        return own

    def tensor(self, name: str) -> Tensor | PackedWeight:
        """A weight, plain or packed, as a copy or in private pages of the file. Raises BadFile if it cannot be used."""
        entry = self.entries[name]
        if entry.packed_for is None:
            return self._plain(entry.place)
        place, data = entry.place, self._bytes(entry.place)
        if data.data_ptr() % packed_memory.ALIGNMENT:
            raise BadFile("its memory is not aligned")
        try:
            packed = packed_memory.on_memory(data, place.layout, place.shape, place.dtype)
        except (RuntimeError, ValueError) as error:
            raise BadFile(f"one of its packed weights cannot be used: {error!s:.100}") from None
        kept = None if entry.kept is None else self._plain(entry.kept)
        return PackedWeight(packed, entry.packed_for, torch.Size(entry.shape), entry.stride, kept, data)

    def _plain(self, place: Place) -> Tensor:
        return self._bytes(place).view(place.dtype).as_strided(place.shape, place.stride)

    def damaged(self) -> list[str]:
        """The names of weights whose bytes do not match their checksum; reads the whole file."""
        return [
            name
            for name, entry in self.entries.items()
            if any(zlib.crc32(self._bytes(place).numpy().data) != place.crc for place in entry.places)
        ]

    def close(self) -> None:
        """Close the file; mapped weights stay valid."""
        self._stream.close()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header and its position. Raises BadFile unless it is what was written."""
    status = os.fstat(stream.fileno())
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise BadFile("it belongs to another user")
    head = stream.read(HEAD)
    start = int.from_bytes(head[8:16], "little")
    if len(head) < HEAD or head[:8] != MAGIC:
        raise BadFile("it is not a weights file of this version")
    if not HEAD <= start < status.st_size <= start + MAX_HEADER:
        raise BadFile("the position of its header is out of range")
    stream.seek(start)
    raw = stream.read()
    if hashlib.sha256(raw).digest() != head[16:]:
        raise BadFile("its header does not match its checksum")
    return json.loads(raw), start


def verify(path: Path) -> list[str]:
    """The names of damaged weights; reads the whole file. Raises BadFile if the header is damaged."""
    with WeightsFile(path) as file:
        return file.damaged()


# ------------------------------------------------------------------------------------- writing


def write(
    path: Path,
    facts: Mapping[str, Any],
    classes: Mapping[str, Mapping[str, str]],
    tensors: Iterable[tuple[str, Tensor | PackedWeight]],
) -> int:
    """Write a file, complete or not at all; returns its size in bytes. Raises OSError, for example if the disk is full.

    The tensors are consumed one by one, so only one of them needs to be in memory.
    """
    entries: dict[str, Entry] = {}
    with replaced_file(path, private=True) as partial, open(partial, "rb+") as stream:
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
    """Append a tensor to the file; returns its entry in the header."""
    if isinstance(tensor, PackedWeight):
        packed = tensor.weight
        place = _write_bytes(stream, packed_memory.numbers(packed), packed, packed_memory.layout(packed))
        kept = None if tensor.plain is None else _write_plain(stream, tensor.plain)
        return Entry(place, tensor.size, tuple(tensor.shape), tuple(tensor.stride), kept)
    return Entry(_write_plain(stream, tensor))


def _write_plain(stream: BinaryIO, tensor: Tensor) -> Place:
    """Write the numbers in the order of their memory, which must be dense."""
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
