"""What `torch.save` writes, read without running it: two containers around a pickle, and the tensors named in it.

    zip pickle      since torch 1.6 (2020): a zip archive, nothing compressed, of `<name>/data.pkl`, a pickle of the
                    whole object, and `<name>/data/0`, `<name>/data/1`, ..., the raw numbers of one storage each
    legacy pickle   before that: five pickles (magic number, protocol, machine, object, keys of the storages), then for
                    each storage its length as int64 and its numbers, with nothing around them

Inside of the pickle a tensor is a call of `torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, ...)`, and
the storage a "persistent id": a key for numbers that lie outside of the pickle. A tensor is thus a window on a storage:

    element (i, j, ...)  =  number  offset + i stride[0] + j stride[1] + ...  of the storage

Here such a call becomes a `Tensor`, and with the place of its storage in the file a `View`. No number in a file is
trusted: the last element of a view has to lie inside its storage, and the storage inside the file, apart from all
others. A file is parsed only once, here, and not passed on to a reader that might see something else in it.

torch's side of this: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

from __future__ import annotations

import functools
import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, TypeGuard

from ..names import ignored, plain_name
from .dtypes import TYPES, NumberType
from .other_pickles import other_pickle
from .pickles import MAX_BYTES, Placeholder, RefusedFile, Stateful, Symbol, read_pickle
from .state_dicts import find_state_dict, inside_state_dict

MAX_TENSORS = 20_000  # in a file; a full Stable Diffusion 1 training checkpoint has 1,831
MAX_DIMS = 16  # of a tensor; convolutions have 4
MAX_DIRECTORY = 2 << 20  # bytes of a zip directory, at most 45,000 members; real ones have less than 500 KB
MAX_METADATA = 1000  # characters of a plain value
MAX_SHARING = 2  # average number of uses of the numbers in a file: tied weights, or an average equal to the weights

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
END_OF_ZIP, ZIP_END_SIZE = b"PK\5\6", 22  # the last record of a zip archive; a comment of at most 64 KB follows
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # header of a zip member, before name, extra field and data
ENCRYPTED = 0x2041  # three bits of a zip member's flags

STORAGE_DTYPES = {
    "DoubleStorage": TYPES["float64"], "FloatStorage": TYPES["float32"], "HalfStorage": TYPES["float16"],
    "BFloat16Storage": TYPES["bfloat16"], "LongStorage": TYPES["int64"], "IntStorage": TYPES["int32"],
    "ShortStorage": TYPES["int16"], "CharStorage": TYPES["int8"], "ByteStorage": TYPES["uint8"],
    "BoolStorage": TYPES["bool"],
    "UntypedStorage": TYPES["uint8"],  # counts bytes; the type is given with the tensor
}  # fmt: skip
AGAIN = "download it again"
DTYPES = {f"torch.{name}": kind for name, kind in TYPES.items()}


class View(NamedTuple):
    """Where a tensor lies in a file: element (0, 0, ...) is at byte `start`; strides count elements."""

    dtype: NumberType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def extent(self) -> int:
        """Number of elements of the storage from the first to the last one, both included."""
        steps = zip(self.shape, self.stride, strict=True)
        return 0 if 0 in self.shape else 1 + sum((size - 1) * stride for size, stride in steps)


class ByteRange(NamedTuple):
    """Where a storage lies in the file, in bytes."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Storage:
    """`numel` numbers, known as `key` outside the pickle; `dtype` is None for an unknown `kind`."""

    kind: Symbol
    key: str
    numel: int
    dtype: NumberType | None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A window on a storage, of integers from 0 to 2^63 - 1; not yet checked against the storage's size."""

    storage: Storage
    dtype: NumberType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A tensor of an unsupported kind (sparse, quantised, a subclass, ...); `how` completes "stored ..."."""

    how: str


class Contents(NamedTuple):
    """What is in a file: the tensors by name, the plain values beside them, and what was left out, one line each."""

    views: dict[str, View]
    plain: dict[str, str]
    notes: tuple[str, ...] = ()


def read_zip(stream: BinaryIO) -> Contents:
    """The contents of a zip archive that `torch.save` wrote. Raises RefusedFile."""
    members, prefix, trailing = _directory(stream)
    order = members.get(f"{prefix}byteorder")
    if order is not None and (order[0].file_size > 16 or _data(stream, *order) != b"little"):
        raise RefusedFile("holds numbers in big-endian order; save it again on a little-endian machine")
    pickled = io.BytesIO(_data(stream, *members[f"{prefix}data.pkl"]))
    content = read_pickle(pickled, _call, functools.partial(_stored, {}))

    @functools.cache  # tensors may share a storage
    def range_of(key: str) -> ByteRange:
        if f"{prefix}data/{key}" not in members:
            raise RefusedFile(f"damaged: the numbers of storage {key[:100]!r} are missing; download it again")
        return _range_of(stream, *members[f"{prefix}data/{key}"])

    return _contents(content, range_of, trailing)


def _directory(stream: BinaryIO) -> tuple[dict[str, tuple[zipfile.ZipInfo, int]], str, int]:
    """The members of the archive, the prefix of their names, and the number of bytes after the archive.

    A member is its directory entry and the byte of the file before which it must end. Whatever torch never writes is
    refused, because two zip readers might see different contents. torch, too, finds an archive with at most 64 KB
    after it.
    """
    size = stream.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(_Bounded(stream)) as archive:
            infos, end = sorted(archive.infolist(), key=lambda info: info.header_offset), archive.start_dir
            comment = len(archive.comment)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error) as error:
        what = f"no zip directory at the end of its {size} bytes ({error!s:.100})"
        if not any(_tail(stream, size)):
            raise RefusedFile(f"ends with nothing but zeros, as an unfinished download does; {AGAIN}") from None
        raise RefusedFile(f"truncated or damaged: {what}; download it again") from None
    if infos and infos[0].header_offset != 0:  # which some readers would take for the archive
        raise RefusedFile("tampered with: something lies in front of its zip archive; do not use this file")
    names = [info.orig_filename for info in infos]
    pickles = [name for name in names if name.casefold().rpartition("/")[2] == "data.pkl"]
    if not pickles:
        raise RefusedFile("a zip archive, not a checkpoint; unpack it and give the file inside of it")
    if len(pickles) > 1 or not pickles[0].endswith("data.pkl"):
        raise RefusedFile(f"tampered with: {len(pickles)} files that could be its data.pkl; do not use this file")
    prefix = pickles[0].removesuffix("data.pkl")
    if any(name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/") for name in names):
        raise RefusedFile("a TorchScript program, not a checkpoint; save the state_dict() of its model with torch.save")
    if len({name.casefold() for name in names}) < len(names):
        raise RefusedFile("tampered with: two members of one name in its zip directory; do not use this file")

    members = {}
    ends = [info.header_offset for info in infos[1:]] + [end]
    for info, name, before in zip(infos, names, ends, strict=True):
        if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":" or set(name) & set("\\\0"):
            what = "has a path that leads out of the archive"
        elif info.flag_bits & ENCRYPTED:
            what = "is encrypted"
        elif info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            what = "is compressed, which torch never does"
        elif info.header_offset < 0 or info.header_offset + LOCAL_HEADER.size + info.file_size > before:
            what = "overlaps another one or the end of the file"
        elif name == pickles[0] and info.file_size > MAX_BYTES:
            what = f"its data.pkl has {info.file_size} bytes, more than the limit of {MAX_BYTES >> 20} MB"
            raise RefusedFile(f"{what}; save only its weights with torch.save")
        else:
            members[name] = info, before
            continue
        raise RefusedFile(f"damaged or tampered with: member {name[:100]!r} {what}; do not use this file")
    tail = _tail(stream, size)
    return members, prefix, max(0, len(tail) - tail.rfind(END_OF_ZIP) - ZIP_END_SIZE - comment)


def _tail(stream: BinaryIO, size: int) -> bytes:
    """The end of a file, as far as the end of a zip archive may lie before it."""
    length = min(size, ZIP_END_SIZE + 0xFFFF)
    return _read(stream, size - length, length)


class _Bounded:
    """A file that is read in small pieces only: zipfile reads the whole directory at once, whatever its size."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, or all that is left. Raises RefusedFile if that is too much."""
        data = self._read(MAX_DIRECTORY + 1 if size is None or size < 0 else min(size, MAX_DIRECTORY + 1))
        if len(data) > MAX_DIRECTORY:
            limit = f"the limit of {MAX_DIRECTORY >> 20} MB, which is enough for 20,000 tensors"
            raise RefusedFile(f"its zip directory is larger than {limit}; save only its weights with torch.save")
        return data


def _range_of(stream: BinaryIO, info: zipfile.ZipInfo, before: int) -> ByteRange:
    """Where the data of a zip member are, by its local header, which must agree with the directory."""
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    local = _read(stream, info.header_offset, LOCAL_HEADER.size + len(name))
    signature, _, flags, method, *_, name_length, extra_length = LOCAL_HEADER.unpack_from(local)
    found = ByteRange(info.header_offset + LOCAL_HEADER.size + name_length + extra_length, info.file_size)
    if (
        (signature, method, flags & ENCRYPTED) != (b"PK\3\4", zipfile.ZIP_STORED, 0)
        or (name_length, local[LOCAL_HEADER.size :]) != (len(name), name)
        or sum(found) > before
    ):
        what = f"member {info.orig_filename[:100]!r} is not what the zip directory says"
        raise RefusedFile(f"damaged or tampered with: {what}; download it again")
    return found


def _data(stream: BinaryIO, info: zipfile.ZipInfo, before: int) -> bytes:
    return _read(stream, *_range_of(stream, info, before))


def read_legacy(stream: BinaryIO) -> Contents:
    """The contents of a file that `torch.save` wrote before the zip format. Raises RefusedFile."""
    storages: dict[str, Storage] = {}
    following = functools.partial(read_pickle, stream, _call, functools.partial(_stored, storages))
    stream.seek(0)
    if following() != LEGACY_MAGIC:
        raise RefusedFile("a Python pickle, but not one that torch.save wrote; give a .safetensors or .ckpt file")
    protocol, machine = following(), following()
    if protocol != LEGACY_PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise RefusedFile("a torch file of an unknown version or byte order; save it again with a newer torch")
    content, keys = following(), following()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
        raise RefusedFile("damaged: the storages at its end are not those of its tensors; download it again")

    ranges: dict[str, ByteRange] = {}
    position = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    for key in keys:
        if position > size:
            raise RefusedFile(f"truncated: it says that it has over {position} bytes, it has {size}; download it again")
        (numel,) = struct.unpack("<q", _read(stream, position, 8))
        storage = storages[key]
        if storage.dtype is None or numel != storage.numel or key in ranges:
            what = f"storage {key[:100]!r} of {numel} numbers, expected {storage.numel} in a {storage.kind}"
            raise RefusedFile(f"damaged: {what}; download it again")
        ranges[key] = ByteRange(position + 8, numel * storage.dtype.itemsize)
        position = sum(ranges[key])
    if position > size:
        raise RefusedFile(f"truncated: it says that it has {position} bytes, it has {size}; download it again")
    return _contents(content, ranges.__getitem__, size - position)


def _read(stream: BinaryIO, start: int, count: int) -> bytes:
    stream.seek(start)
    data = stream.read(count)
    if len(data) < count:
        raise RefusedFile(f"truncated: it ends at byte {start + len(data)}, before all of its data; download it again")
    return data


def _contents(content: object, range_of: Callable[[str], ByteRange], trailing: int) -> Contents:
    """The tensors and plain values in the pickled object; `range_of` finds a storage by its key.

    trailing   the number of bytes at the end of the file that belong to nothing
    """
    plain = {}
    if isinstance(content, dict):
        plain = {
            key[:MAX_METADATA]: str(value)[:MAX_METADATA]
            for key, value in content.items()
            if isinstance(key, str)
            and (isinstance(value, (str, float)) or (isinstance(value, int) and value.bit_length() <= 64))
        }
    content = inside_state_dict(content)
    if isinstance(content, Placeholder):
        raise RefusedFile(f"a whole {content.symbol} object, not its weights; save its state_dict() with torch.save")

    tensors: dict[str, Tensor | Unreadable] = find_state_dict(content, (Tensor, Unreadable))
    if isinstance(content, list) and len(content) % 2 == 0:  # pairs of matrices: the first LoRA files
        pairs = [tensor for tensor in content if isinstance(tensor, Tensor) and len(tensor.shape) > 1]
        tensors = {str(i): tensor for i, tensor in enumerate(pairs)} if len(pairs) == len(content) else {}
    if not tensors:
        names = [key[:30] for key in content if isinstance(key, str)] if isinstance(content, dict) else []
        what = f"holds no named tensors (but {', '.join(names[:5])})" if names else "holds no named tensors"
        if isinstance(content, Tensor):
            what += ", but a single one, as an aesthetic embedding of the web UI does"
        raise RefusedFile(other_pickle(content) or f"{what}; give a file of model weights")
    views, notes = {}, [f"the last {trailing} bytes of the file belong to nothing and are ignored"] if trailing else []
    for key, tensor in tensors.items():
        try:
            views[key] = _view(key, tensor, range_of)
        except RefusedFile as error:
            if not ignored(plain_name(key)):
                raise
            notes.append(f"left out, as it is not needed: {error}")
    tensors = {key: tensors[key] for key in views}
    storages = {tensor.storage.key for tensor in tensors.values() if isinstance(tensor, Tensor)}
    numbers = sum(range_of(key).size for key in storages)
    sizes = sum(math.prod(view.shape) * view.dtype.itemsize for view in views.values())
    if sizes > MAX_SHARING * numbers + (1 << 20):
        what = f"its tensors have {sizes} bytes, the numbers that they are views of only {numbers}"
        raise RefusedFile(f"damaged or tampered with: {what}; do not use this file")
    return Contents(views, plain, tuple(notes))


def _view(key: str, tensor: Tensor | Unreadable, range_of: Callable[[str], ByteRange]) -> View:
    """A tensor's place in the file. Raises RefusedFile for an unsupported kind, or one that exceeds its storage."""
    if isinstance(tensor, Unreadable):
        what = f"tensor {key[:100]!r} is stored {tensor.how}, which is not supported"
        raise RefusedFile(f"{what}; save it as an ordinary dense tensor")
    start, size = range_of(tensor.storage.key)
    item = tensor.dtype.itemsize
    view = View(tensor.dtype, tensor.shape, tensor.stride, start + tensor.offset * item)
    # A view with overlaps (stride 0) may repeat numbers, but not have more elements than its storage.
    if view.extent and max(tensor.offset + view.extent, math.prod(view.shape)) * item > size:
        what = f"tensor {key[:100]!r} of shape {list(view.shape)} reaches beyond the {size} bytes of its storage"
        raise RefusedFile(f"damaged: {what}; download it again")
    return view


# ------------------------------------------------------------------------------------- what the pickle contains


def _call(function: Symbol, arguments: tuple) -> object:
    """The result of a call: a tensor or a dict if the function is known to make one, else a Placeholder."""
    if len(arguments) > 8:  # more than any function below takes
        return Placeholder(function)
    match (str(function), *arguments):
        case ("collections.OrderedDict",) | ("collections.defaultdict", *_):
            return {}
        case ("torch.nn.modules.container.ParameterDict", *_):
            return Stateful()
        case ("torch.Size", tuple(shape)):
            return shape
        case ("torch._utils._rebuild_tensor", Storage() as store, offset, tuple(shape), tuple(stride)):
            return _tensor(store, store.dtype, offset, shape, stride)
        case ("torch._utils._rebuild_tensor_v2", Storage() as store, offset, tuple(shape), tuple(stride), _, _, *flags):
            return _tensor(store, store.dtype, offset, shape, stride, *flags)
        case ("torch._utils._rebuild_tensor_v3", Storage() as store, offset, tuple(shape), tuple(stride), _, _, *rest):
            return _tensor(store, rest[0], offset, shape, stride, *rest[1:])
        case ("torch._utils._rebuild_parameter", Tensor() | Unreadable() as tensor, *_):
            return tensor
        case ("torch._utils._rebuild_parameter_with_state", Tensor() | Unreadable() as tensor, *_):
            return tensor
        case ("torch._tensor._rebuild_from_type_v2", Symbol() as rebuild, Symbol() as kind, tuple(inner), *_):
            if str(kind) not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
                return Unreadable(f"as the tensor class {kind}")
            if rebuild != function:  # not itself: that would recurse without end
                return _call(rebuild, inner)
    if function.name.startswith("_rebuild"):
        return Unreadable(f"by way of {function}")
    return Placeholder(function)


def _tensor(
    storage: Storage, dtype: object, offset: object, shape: tuple, stride: tuple, flags: object = None
) -> Tensor | Unreadable:
    """A tensor, after a check of all its numbers; `dtype` may still be a symbol."""
    if len(shape) != len(stride) or len(shape) > MAX_DIMS or not all(map(_is_size, (*shape, *stride))):
        raise ValueError("a tensor of impossible shape")
    if not _is_size(offset):
        raise ValueError("a tensor of impossible shape")
    if isinstance(dtype, Symbol):
        dtype = DTYPES.get(str(dtype))
    if not isinstance(dtype, NumberType):
        return Unreadable(f"with an unknown type of number in a {storage.kind}")
    if flags:
        return Unreadable("as a conjugate or negated view")
    return Tensor(storage, dtype, offset, shape, stride)


def _stored(storages: dict[str, Storage], saved: object) -> object:
    """The object of a persistent id; a storage is also added to `storages`."""
    if not isinstance(saved, tuple) or not 4 <= len(saved) <= 6:
        raise ValueError("a reference to unknown data outside of the pickle")
    match saved:
        case ("module", Symbol() as kind, *_):  # a class with its source text
            return kind
        case ("storage", Symbol() as kind, str(key), _, numel, *view) if _is_size(numel):
            if any(part is not None for part in view):
                raise ValueError("a view on another storage, as torch before 0.4 wrote it")
            dtype = STORAGE_DTYPES.get(kind.name) if kind.module.partition(".")[0] == "torch" else None
            storage = Storage(kind, key, numel, dtype)
            if storages.setdefault(key, storage) != storage and numel:
                raise ValueError(f"storage {key[:100]!r} is described in two ways")
            return storage
    raise ValueError("a reference to unknown data outside of the pickle")


def _is_size(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 63
