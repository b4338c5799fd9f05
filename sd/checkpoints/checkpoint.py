"""Files -> named tensors: weight files in common formats, read as data. The purpose of a tensor is decided elsewhere.

Three formats hold Stable Diffusion weights. They are told apart by their first bytes, not by the file's name.

    zip pickle, legacy pickle   .ckpt, .pt, .bin, written by `torch.save`; read by torch_files.py, without running them
    safetensors                 8 bytes: length N of the header; N bytes of JSON {key: {dtype, shape, data_offsets}};
                                the numbers. https://github.com/huggingface/safetensors#format

A model may also consist of several such files: a diffusers folder, or a sharded file (folders.py).
Each format yields a table `{key: View}`, with which `Checkpoint` reads a single tensor from its place in the file, on
demand and into separate memory. A file is mapped into memory only on request (mmap.py has the reasons).

>>> from sd.resources import resource
>>> with load_checkpoint(resource("weights/pocket.safetensors")) as file:
...     print(file["unet.conv_in.weight"].shape)
torch.Size([96, 4, 3, 3])
"""

from __future__ import annotations

import math
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..messages import printable
from .folders import Part, Parts, check_not_a_shard, config_beside, find_parts, is_index, parts_of_index
from .formats.dtypes import NumberType
from .formats.mmap import FilePages, fresh
from .formats.pickles import RefusedFile
from .formats.safetensors_files import read_safetensors
from .formats.torch_files import AGAIN, LEGACY_MAGIC, MAX_TENSORS, View, read_legacy, read_zip
from .layouts import own_prefix
from .names import plain_names
from .other_files import other_file

if TYPE_CHECKING:
    import torch

MAX_NAME = 500  # characters
ADDRESS = re.compile(r"(https?|hf|s3|gs|urn|air):", re.IGNORECASE)
MAX_TABLE = 1_000_000  # elements from the first to the last of a small tensor

# First bytes of files that are often given in place of a checkpoint -> what to tell the user.
NOT_A_CHECKPOINT = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<", f"a web page (an error or login page saved in place of the file); {AGAIN}, logged in where needed"),
    (b"GGUF", "a GGUF file, quantised for other programs; give a .safetensors or .ckpt file"),
    (b"PK\x05\x06", "an empty zip archive; give the checkpoint itself"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"\x89PNG", "a PNG image; give a .safetensors or .ckpt file"),
    (b"\x89HDF", "a TensorFlow or Keras file; give a .safetensors or .ckpt file"),
    (b"\xff\xd8\xff", "a JPEG image; give a .safetensors or .ckpt file"),
)


class CheckpointError(ValueError):
    """A file that cannot be used. The message is one line: the path, what is wrong, what to do."""

    def __init__(self, message: str) -> None:
        if len(message) > 2000:  # names in a file may be of any length
            message = message[:1500] + " ... " + message[-400:]
        super().__init__(printable(message))


def named(path: str | os.PathLike[str], error: ValueError) -> ValueError:
    """The error, prefixed with the file's name unless it already is."""
    message = str(error)
    there = (f"{path}: ", f"{path}{os.sep}")  # or the name of a file in the folder
    return error if message.startswith(there) else CheckpointError(f"{path}: {message}")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Prefix every ValueError with the file's name."""
    try:
        yield
    except ValueError as error:
        raise named(path, error) from None


class OpenFile:
    """One opened file of weights: reads the numbers of a `View`, in fresh memory or in pages of the file.

    stream    the file; `tensor` moves its position
    kind      "zip pickle", "legacy pickle" or "safetensors"
    metadata  see `Checkpoint`
    mapped    see `load_checkpoint`
    """

    def __init__(self, path: Path, stream: BinaryIO, kind: str, metadata: dict[str, str], mapped: bool) -> None:
        self.path, self.kind, self.metadata = path, kind, metadata
        self._mapped = mapped
        self._pages = FilePages(stream)
        self.stream = stream
        self._opened = _state(stream)
        self._lock = threading.Lock()  # between seek and read

    def tensor(self, view: View) -> torch.Tensor:
        """The tensor, contiguous. CheckpointError if the file can no longer be read."""
        import torch

        dtype = view.dtype.torch
        numbers = None
        if self._mapped and self.kind == "safetensors":  # in the other formats, tensors may overlap
            numbers = self._pages.lend(view.start, view.extent, dtype)
        if numbers is None:
            empty = fresh if self._mapped else partial(torch.empty, device="cpu")
            numbers = empty(view.extent, dtype=dtype)
            self._read(view, numbers.view(torch.uint8).numpy().data)
        tensor = numbers.as_strided(view.shape, view.stride)
        return numbers.view(view.shape) if tensor.is_contiguous() else tensor.contiguous()

    def table(self, key: str, view: View) -> np.ndarray:
        """The same as float64, without torch. ValueError for 8-bit floats, and for a large tensor."""
        if view.extent > MAX_TABLE:
            what = f"damaged: the table {key[:100]!r} is scattered over {view.extent} numbers"
            raise CheckpointError(f"{self.path}: {what}; {AGAIN}")
        self._read(view, buffer := bytearray(view.extent * view.dtype.itemsize))
        numbers = view.dtype.decode(bytes(buffer))
        steps = tuple(step * numbers.itemsize for step in view.stride)
        return np.lib.stride_tricks.as_strided(numbers, view.shape, steps).copy()

    def _read(self, view: View, buffer: memoryview | bytearray) -> None:
        try:
            with self._lock:
                self.stream.seek(view.start)
                count = self.stream.readinto(buffer)  # type: ignore[attr-defined]  # of files opened in binary mode
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            raise CheckpointError(f"{self.path}: cannot be read any more: {error}; load it again") from None
        if count < len(buffer):
            raise CheckpointError(f"{self.path}: has become shorter since it was opened; load it again")

    def check_unchanged(self) -> None:
        """CheckpointError if the file was written to since it was opened."""
        if self.stream.closed or _state(self.stream) != self._opened:
            raise CheckpointError(f"{self.path}: has changed since it was opened; load it again")

    def close(self) -> None:
        """Close the file."""
        self.stream.close()

    __del__ = close


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of one file, or of the several files of a model, by name. Made by `load_checkpoint`.

    Opening reads names and shapes only. `checkpoint[key]` reads that tensor, each time anew, into contiguous CPU memory
    that belongs to the caller, or lends it the file's own pages (`mapped` of `load_checkpoint`); thread-safe. Close
    it when done, or use it in a `with` statement.

    Names are without what wrappers such as torch.compile put into them (names.py).

    path      the file or folder
    kind      "zip pickle", "legacy pickle" or "safetensors"; of several files "diffusers folder" or "index"
    places    where each tensor lies: file and `View`
    files     the opened files
    metadata  what the files say about themselves, untrusted text: `__metadata__` of safetensors; in pickles, the
              plain values besides the tensors ("epoch", "global_step", ...)
    configs   the JSON files of a folder, or beside a file of one, by topic ("unet", "scheduler", ...)
    notes     choices made while reading, one line each
    """

    def __init__(self, path: Path, kind: str, places: dict[str, tuple[OpenFile, View]], files: list[OpenFile]) -> None:
        self.path, self.kind, self.files = path, kind, files
        self.metadata = {key: value for file in reversed(files) for key, value in file.metadata.items()}
        self.configs: dict[str, dict[str, Any]] = {}
        self.notes: tuple[str, ...] = ()
        self.places = places

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it. KeyError for an unknown key."""
        return self.places[key][1].shape

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor's numbers, without reading it. KeyError for an unknown key."""
        return self.places[key][1].dtype.torch

    def number_type(self, key: str) -> NumberType:
        """The same, without torch."""
        return self.places[key][1].dtype

    def __getitem__(self, key: str) -> torch.Tensor:
        """Read one tensor. KeyError for an unknown key, CheckpointError if its file can no longer be read."""
        file, view = self.places[key]
        return file.tensor(view)

    def table(self, key: str) -> np.ndarray:
        """A small tensor as float64, read without torch. ValueError for 8-bit floats, and for a large tensor."""
        file, view = self.places[key]
        return file.table(key, view)

    def check_unchanged(self) -> None:
        """CheckpointError if one of the files was written to since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {self.kind}, {len(self)} tensors>"

    def close(self) -> None:
        """Close the files. Names and shapes stay; tensors can no longer be read."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _state(stream: BinaryIO) -> tuple[int, int]:
    """Size and time of the last change of an open file."""
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def load_checkpoint(path: str | os.PathLike, variant: str | None = None, *, mapped: bool = False) -> Checkpoint:
    """Open a .ckpt, .pt, .bin or .safetensors file, an index of several, or a diffusers folder; no tensor is read yet.

    variant   for a folder: "fp16", "bf16", ...: the files of this variant where there are any
    mapped    large tensors get separate memory pages; for safetensors, pages of the file, which must then not be
              overwritten in place while they are in use (see mmap.py)

    Raises CheckpointError, which names the file, for anything that is not a usable checkpoint: missing, broken,
    truncated, another kind of file, or an untrustworthy pickle.
    """
    path = Path(path)
    try:
        if "\0" not in str(path) and path.is_dir():
            return _plainly_named(_load_parts(path, find_parts(path, variant), mapped))
        if is_index(path):
            return _plainly_named(_load_parts(path, parts_of_index(path), mapped))
        check_not_a_shard(path)
        configs = {} if "\0" in str(path) else config_beside(path)
    except RefusedFile as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    checkpoint = _plainly_named(_load_file(path, mapped))
    checkpoint.configs = configs
    return checkpoint


def _plainly_named(checkpoint: Checkpoint) -> Checkpoint:
    names = plain_names(checkpoint.places)
    if prefix := own_prefix(names.values()):
        checkpoint.notes += (printable(f"all names in the file begin with {prefix!r}: this prefix is ignored"),)
    checkpoint.places = {names[key].removeprefix(prefix): place for key, place in checkpoint.places.items()}
    return checkpoint


def _load_file(path: Path, mapped: bool) -> Checkpoint:
    try:
        stream = _open(path)
        try:
            kind = _kind(stream)
            views, metadata, notes = {
                "safetensors": lambda: read_safetensors(stream, path),
                "zip pickle": lambda: read_zip(stream),
                "legacy pickle": lambda: read_legacy(stream),
            }[kind]()
            _check(views)
        except BaseException:
            stream.close()
            raise
    except RefusedFile as error:
        known = other_file(path) if path.is_file() else None
        raise CheckpointError(f"{path}: {known or error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    file = OpenFile(path, stream, kind, metadata, mapped)
    in_order = sorted(views.items(), key=lambda item: item[1].start)
    checkpoint = Checkpoint(path, kind, {key: (file, view) for key, view in in_order}, [file])
    checkpoint.notes = tuple(map(printable, notes))
    return checkpoint


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}; check the disk and its permissions")


def _load_parts(path: Path, found: Parts, mapped: bool) -> Checkpoint:
    """All files of a model. Raises RefusedFile, or CheckpointError that names one of them."""
    files: list[OpenFile] = []
    places: dict[str, tuple[OpenFile, View]] = {}
    notes = [*found.notes]
    try:
        for part in found.parts:
            inside: dict[str, tuple[OpenFile, View]] = {}
            for name in part.files:
                opened = _load_file(name, mapped)
                files += opened.files
                notes += [f"{name.name}: {note}" for note in opened.notes]
                _check_index(part, opened)
                inside |= opened.places
            prefix = own_prefix(inside, part.prefix) if part.prefix else ""
            places |= {part.prefix + key.removeprefix(prefix): place for key, place in inside.items()}
        if len(places) > MAX_TENSORS:
            raise RefusedFile(f"holds {len(places)} tensors, expected at most {MAX_TENSORS}")
    except BaseException:
        for file in files:
            file.close()
        raise
    checkpoint = Checkpoint(path, found.kind, places, files)
    checkpoint.configs, checkpoint.notes = found.configs, tuple(map(printable, notes))
    return checkpoint


def _check_index(part: Part, file: Checkpoint) -> None:
    """Raise RefusedFile unless a file holds the weights that its index lists for it, and no others."""
    if part.weight_map is None:
        return
    listed = part.weight_map.get(file.path.name, frozenset())
    if wrong := sorted(listed ^ set(file)):
        what = "not in it" if wrong[0] in listed else "in it, but not in the index"
        raise RefusedFile(
            f"the index does not fit {file.path.name}: {wrong[0][:100]!r} is {what} ({len(wrong)} such); {AGAIN}"
        )


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor; a Checkpoint does not read them for it."""
    if isinstance(tensors, Checkpoint):
        return {key: tensors.shape(key) for key in tensors}
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _check(views: dict[str, View]) -> None:
    if not 1 <= len(views) <= MAX_TENSORS:
        raise RefusedFile(f"holds {len(views)} tensors, expected 1 to {MAX_TENSORS}; give a file of model weights")
    for key, (_, shape, _, _) in views.items():
        if len(key) > MAX_NAME:
            what = f"a tensor's name of {len(key)} characters, {key[:100]!r}..., longer than the limit of {MAX_NAME}"
            raise RefusedFile(f"{what}; give a file of model weights")
        if math.prod(size or 1 for size in shape) >> 63:  # torch rejects these sizes even for an empty tensor
            raise RefusedFile(f"damaged: tensor {key[:100]!r} has an impossible shape; {AGAIN}")


def _open(path: Path) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, ValueError):  # ValueError: a path with a zero byte
        address = "an address, not a file; nothing is downloaded here: download it first"
        raise RefusedFile(address if ADDRESS.match(str(path)) else "no such file; check the path") from None
    if stat.S_ISDIR(mode):
        raise RefusedFile("a folder where a file is expected")
    if not stat.S_ISREG(mode):
        raise RefusedFile("not an ordinary file; give a .safetensors or .ckpt file")
    return open(path, "rb")


def _kind(stream: BinaryIO) -> str:
    """The format, by the first bytes. Raises RefusedFile, which names other kinds of files."""
    head = stream.read(512)
    if not head:
        raise RefusedFile(f"an empty file; {AGAIN}")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().decode("utf-8", "ignore")
    is_text = len(text) > 3 and all(c.isprintable() or c in "\r\n\t" for c in text)
    if head.startswith(b"PK\x03\x04"):
        return "zip pickle"
    # A header length below 4 GB has four zero bytes, which neither text nor a pickle has here.
    if head[8:9] == b"{" and (head[4:8] == bytes(4) or (not is_text and head[:1] != b"\x80")):
        return "safetensors"
    if head[:1] == b"\x80" or head.startswith(b"L%dL\n" % LEGACY_MAGIC):
        return "legacy pickle"
    for magic, what in NOT_A_CHECKPOINT:
        if head.startswith(magic) or (magic == b"<" and text.startswith("<")):
            raise RefusedFile(what)
    if head[257:262] == b"ustar":
        raise RefusedFile("a tar archive; unpack it first")
    if not head.strip(b"\0"):
        raise RefusedFile(f"starts with nothing but zeros, as an unfinished download does; {AGAIN}")
    if is_text:
        raise RefusedFile(f"a text file, starting {text[:30]!r}; give a .safetensors or .ckpt file")
    raise RefusedFile(f"not a checkpoint, starting {head[:8].hex(' ')}; give a .safetensors or .ckpt file")
