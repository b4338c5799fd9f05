"""Files -> named tensors: the weight files people have, read as data. What a tensor is for is not asked here.

Three formats hold Stable Diffusion weights. They are told apart by their first bytes; a file's name says nothing.

    zip pickle, legacy pickle   .ckpt, .pt, .bin, written by `torch.save`; read by torch_files.py, without running them
    safetensors                 8 bytes: length N of the header; N bytes of JSON {key: {dtype, shape, data_offsets}};
                                the numbers. https://github.com/huggingface/safetensors#format

A model may also be several of these: a diffusers folder, or a file that was split (folders.py).

All come down to one table, `{key: View}`, with which `Checkpoint` reads any single tensor at its place in the file,
into memory of its own, when asked and not before. The file is not mapped into memory, but for weights that a model
keeps as they come, if its owner wishes so: pages.py has the reasons for both.

>>> from sd.resources import resource
>>> with load_checkpoint(resource("weights/pocket.safetensors")) as file:
...     print(file["unet.conv_in.weight"].shape)
torch.Size([96, 4, 3, 3])
"""

from __future__ import annotations

import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .folders import Part, Parts, check_not_a_shard, find_parts, is_index, parts_of_index
from .formats.dtypes import NumberType
from .formats.mmap import FilePages, fresh
from .formats.pickles import RefusedFile
from .formats.safetensors_files import AGAIN, read_safetensors
from .formats.torch_files import LEGACY_MAGIC, MAX_TENSORS, View, read_legacy, read_zip

if TYPE_CHECKING:
    import torch

MAX_NAME = 500  # characters
MAX_TABLE = 1_000_000  # numbers that a small tensor may be spread over

# The first bytes of files that are often given in place of a checkpoint -> what to tell their owner.
NOT_A_CHECKPOINT = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<", f"a web page (an error or login page saved in place of the file); {AGAIN}, logged in where needed"),
    (b"GGUF", "a GGUF file, quantised for other programs; give a .safetensors or .ckpt file"),
    (b"PK\x05\x06", "an empty zip archive; give the checkpoint itself"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"\x89PNG", "a PNG picture; give a .safetensors or .ckpt file"),
    (b"\xff\xd8\xff", "a JPEG picture; give a .safetensors or .ckpt file"),
    (b"GIF8", "a GIF picture; give a .safetensors or .ckpt file"),
    (b"RIFF", "a WebP picture or a sound; give a .safetensors or .ckpt file"),
    (b"%PDF", "a PDF document; give a .safetensors or .ckpt file"),
    (b"\x89HDF", "an HDF5 file (Keras); give a .safetensors or .ckpt file"),
    (b"\x93NUMPY", "a single numpy array; give a .safetensors or .ckpt file"),
    (b"\x00\x05\x16\x07", "the `._` companion that macOS writes beside a file; give the file without `._`"),
)


def printable(text: str) -> str:
    """One line of a text out of a foreign file, in which names may hold line ends, or codes that a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(ValueError):
    """A file that cannot be used. The text is one line: the path, what is wrong, what to do."""

    def __init__(self, message: str) -> None:
        if len(message) > 2000:  # names in a foreign file may be endless
            message = message[:1500] + " ... " + message[-400:]
        super().__init__(printable(message))


def named(path: str | os.PathLike[str], error: ValueError) -> ValueError:
    """The error with the file's name in front, unless it is there already."""
    message = str(error)
    there = (f"{path}: ", f"{path}{os.sep}")  # or that of a file in the folder
    return error if message.startswith(there) else CheckpointError(f"{path}: {message}")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name in front of whatever is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise named(path, error) from None


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a file by name, in the order of their places in the file. Made by `load_checkpoint`.

    Opening reads names and shapes only. `checkpoint[key]` reads that tensor, each time anew, into fresh contiguous CPU
    memory that belongs to the caller, or gives it the file's own (`mapped` of load_checkpoint); any thread may. Close
    it when done, or use it in a `with` statement.

    `path`; `kind`: "zip pickle", "legacy pickle" or "safetensors"; `metadata`: what the file says about itself, text
    from a stranger: the `__metadata__` of safetensors, of pickles the plain values beside the tensors ("epoch",
    "global_step", ...). `configs`: of a folder, its JSON files by what they are about ("unet", "scheduler", ...);
    `notes`: what was chosen in reading it.
    """

    def __init__(
        self,
        path: Path,
        stream: BinaryIO,
        kind: str,
        views: dict[str, View],
        metadata: dict[str, str],
        mapped: bool = False,
    ):
        self.path = path
        self.kind = kind
        self.metadata = metadata
        self.configs: dict[str, dict[str, Any]] = {}
        self.notes: tuple[str, ...] = ()
        self._mapped = mapped
        self._pages = FilePages(stream)
        self._stream = stream
        self._opened = _state(stream)
        self._lock = threading.Lock()  # between seek and read
        self._views = views

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it. KeyError for an unknown key."""
        return self._views[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor's numbers, without reading it. KeyError for an unknown key."""
        return self._views[key].dtype.torch

    def number_type(self, key: str) -> NumberType:
        """The same, without torch."""
        return self._views[key].dtype

    def __getitem__(self, key: str) -> torch.Tensor:
        """Read one tensor. KeyError for an unknown key, CheckpointError if the file cannot be read any more."""
        import torch

        view = self._views[key]
        dtype = view.dtype.torch
        numbers = None
        if self._mapped and self.kind == "safetensors":  # of the other formats, tensors may overlap
            numbers = self._pages.lend(view.start, view.extent, dtype)
        if numbers is None:
            empty = fresh if self._mapped else partial(torch.empty, device="cpu")
            numbers = empty(view.extent, dtype=dtype)
            self._read(view, memoryview(numbers.view(torch.uint8).numpy()))
        tensor = numbers.as_strided(view.shape, view.stride)
        return numbers.view(view.shape) if tensor.is_contiguous() else tensor.contiguous()

    def table(self, key: str) -> np.ndarray:
        """A small tensor as float64, read without torch. ValueError for floats of 8 bits, and for one that is large."""
        view = self._views[key]
        if view.extent > MAX_TABLE:
            what = f"damaged: the table {key[:100]!r} lies scattered over {view.extent} numbers"
            raise CheckpointError(f"{self.path}: {what}; {AGAIN}")
        self._read(view, buffer := bytearray(view.extent * view.dtype.itemsize))
        numbers = view.dtype.decode(bytes(buffer))
        steps = tuple(step * numbers.itemsize for step in view.stride)
        return np.lib.stride_tricks.as_strided(numbers, view.shape, steps).copy()

    def _read(self, view: View, buffer: memoryview | bytearray) -> None:
        try:
            with self._lock:
                self._stream.seek(view.start)
                count = self._stream.readinto(buffer)
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            raise CheckpointError(f"{self.path}: cannot be read any more: {error}; load it again") from None
        if count < len(buffer):
            raise CheckpointError(f"{self.path}: has become shorter since it was opened; load it again")

    def check_unchanged(self) -> None:
        """CheckpointError if something was written to the file since it was opened."""
        if self._stream.closed or _state(self._stream) != self._opened:
            raise CheckpointError(f"{self.path}: has changed since it was opened; load it again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __contains__(self, key: object) -> bool:
        return key in self._views

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {self.kind}, {len(self)} tensors>"

    def close(self) -> None:
        """Close the file. Names and shapes stay; tensors can no longer be read."""
        self._stream.close()

    __del__ = close

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Bundle(Checkpoint):
    """Several files read as one `Checkpoint`. `kind` is "diffusers folder" or "index"; `files` are theirs."""

    def __init__(self, path: Path, kind: str, places: dict[str, tuple[Checkpoint, str]], files: list[Checkpoint]):
        self.path, self.kind, self.files = path, kind, files
        self.metadata = {key: value for file in reversed(files) for key, value in file.metadata.items()}
        self.configs, self.notes = {}, ()
        self._places = places

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it. KeyError for an unknown key."""
        file, name = self._places[key]
        return file.shape(name)

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor's numbers, without reading it. KeyError for an unknown key."""
        file, name = self._places[key]
        return file.dtype(name)

    def number_type(self, key: str) -> NumberType:
        """The same, without torch."""
        file, name = self._places[key]
        return file.number_type(name)

    def table(self, key: str) -> np.ndarray:
        """A small tensor as float64, read without torch."""
        file, name = self._places[key]
        return file.table(name)

    def __getitem__(self, key: str) -> torch.Tensor:
        """Read one tensor. KeyError for an unknown key, CheckpointError if its file cannot be read any more."""
        file, name = self._places[key]
        return file[name]

    def check_unchanged(self) -> None:
        """CheckpointError if something was written to one of the files since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def close(self) -> None:
        """Close the files. Names and shapes stay; tensors can no longer be read."""
        for file in self.files:
            file.close()

    __del__ = close


def _state(stream: BinaryIO) -> tuple[int, int]:
    """Size and time of the last change of an open file."""
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def load_checkpoint(path: str | os.PathLike, variant: str | None = None, *, mapped: bool = False) -> Checkpoint:
    """Open a .ckpt, .pt, .bin or .safetensors file, an index of several, or a diffusers folder; no tensor is read yet.

    variant   of a folder: "fp16", "bf16", ..., the files named so where there are any
    mapped    large tensors get pages of their own: of safetensors the file's, which must not be written over as long as
              they are used (pages.py has the reasons)

    Raises CheckpointError, one line that names the file, for whatever is no usable checkpoint: missing, broken,
    truncated, another kind of file, or a pickle that is not to be trusted.
    """
    path = Path(path)
    try:
        if "\0" not in str(path) and path.is_dir():
            return _load_parts(path, find_parts(path, variant), mapped)
        if is_index(path):
            return _load_parts(path, parts_of_index(path), mapped)
        check_not_a_shard(path)
    except RefusedFile as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    return _load_file(path, mapped)


def _load_file(path: Path, mapped: bool) -> Checkpoint:
    try:
        stream = _open(path)
        try:
            kind = _kind(stream)
            views, metadata = {
                "safetensors": lambda: read_safetensors(stream, path),
                "zip pickle": lambda: read_zip(stream),
                "legacy pickle": lambda: read_legacy(stream),
            }[kind]()
            _check(views)
        except BaseException:
            stream.close()
            raise
    except RefusedFile as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    views = dict(sorted(views.items(), key=lambda item: item[1].start))
    return Checkpoint(path, stream, kind, views, metadata, mapped)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}; check the disk and its permissions")


def _load_parts(path: Path, found: Parts, mapped: bool) -> Bundle:
    """All files of a model; the path of the folder or index stands in front of what is wrong with it."""
    files: list[Checkpoint] = []
    places: dict[str, tuple[Checkpoint, str]] = {}
    try:
        for part in found.parts:
            for name in part.files:
                files.append(file := _load_file(name, mapped))
                _check_index(part, file)
                places |= {part.prefix + key: (file, key) for key in file}
        if len(places) > MAX_TENSORS:
            raise RefusedFile(f"holds {len(places)} tensors, expected at most {MAX_TENSORS}")
    except BaseException:
        for file in files:
            file.close()
        raise
    bundle = Bundle(path, found.kind, places, files)
    bundle.configs, bundle.notes = found.configs, found.notes
    return bundle


def _check_index(part: Part, file: Checkpoint) -> None:
    """Every weight of an index lies in the file that it names, and no other weight does."""
    if part.weight_map is None:
        return
    listed = part.weight_map.get(file.path.name, frozenset())
    if wrong := sorted(listed ^ set(file)):
        what = "not in it" if wrong[0] in listed else "in it, but not in the index"
        raise RefusedFile(
            f"the index does not fit {file.path.name}: {wrong[0][:100]!r} is {what} ({len(wrong)} such); {AGAIN}"
        )


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor; of a Checkpoint without reading any."""
    if isinstance(tensors, Checkpoint):
        return {key: tensors.shape(key) for key in tensors}
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _check(views: dict[str, View]) -> None:
    if not 1 <= len(views) <= MAX_TENSORS:
        raise RefusedFile(f"holds {len(views)} tensors, expected 1 to {MAX_TENSORS}; give a file of model weights")
    for key, (_, shape, _, _) in views.items():
        if len(key) > MAX_NAME:
            raise RefusedFile(f"damaged: a tensor's name of {len(key)} characters, {key[:100]!r}...; {AGAIN}")
        if math.prod(size or 1 for size in shape) >> 63:  # torch minds these sizes of an empty tensor, too
            raise RefusedFile(f"damaged: tensor {key[:100]!r} has an impossible shape; {AGAIN}")


def _open(path: Path) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, ValueError):  # ValueError: a path with a zero byte
        raise RefusedFile("no such file; check the path") from None
    if stat.S_ISDIR(mode):
        raise RefusedFile("a folder where a file is expected")
    if not stat.S_ISREG(mode):
        raise RefusedFile("not an ordinary file; give a .safetensors or .ckpt file")
    return open(path, "rb")


def _kind(stream: BinaryIO) -> str:
    """The format, by the first bytes; RefusedFile says what else it is."""
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
        if head.split(b"\0")[0] in (b"storages", b"tensors", b"pickle", b"sys_info"):
            raise RefusedFile("a torch file from before 2017 (tar); load and save it with a newer torch first")
        raise RefusedFile("a tar archive; unpack it first")
    if not head.strip(b"\0"):
        raise RefusedFile(f"starts with nothing but zeros, as a download that did not finish does; {AGAIN}")
    if is_text:
        raise RefusedFile(f"a text file, starting {text[:30]!r}; give a .safetensors or .ckpt file")
    raise RefusedFile(f"not a checkpoint, starting {head[:8].hex(' ')}; give a .safetensors or .ckpt file")
