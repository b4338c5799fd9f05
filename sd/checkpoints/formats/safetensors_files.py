"""The safetensors format: names and places of tensors from its header.

    8 bytes: length N of the header; N bytes of JSON {key: {dtype, shape, data_offsets}}; the numbers

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import operator
import os
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from ..names import ignored, plain_name
from .dtypes import TYPES
from .pickles import RefusedFile
from .torch_files import AGAIN, MAX_DIMS, MAX_TENSORS, Contents, View

# bytes of a header: the limit of the format's own library; LoRAs may have many MB of tags in it
MAX_HEADER = 100_000_000
MAX_STRINGS = 400_000  # in a header; each takes some 100 bytes of memory, whatever its length
SMALL_HEADER = 1 << 20  # bytes of a header that Python may parse unchecked
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


def read_safetensors(stream: BinaryIO, path: Path) -> Contents:
    """Names and places from the header, which the format's own library has to accept, too. Raises RefusedFile."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    data = 8 + length
    if data > size:
        what = f"its first bytes announce a header of {length} bytes, the file has {size}"
        raise RefusedFile(f"truncated or damaged: {what}; {AGAIN}")
    if length > MAX_HEADER:
        raise RefusedFile(
            f"its safetensors header has {length} bytes, more than the limit of {MAX_HEADER} that the format's own "
            "library has, too; save it again with shorter metadata"
        )
    raw = stream.read(length)
    if length > SMALL_HEADER:
        _check_header(path)
        if (strings := (raw.count(b'"') - raw.count(b'\\"')) // 2) > MAX_STRINGS:
            what = f"its safetensors header has {strings} texts, more than the limit of {MAX_STRINGS}"
            raise RefusedFile(f"{what}; save it again with less metadata")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {key: (info["dtype"], tuple(info["shape"]), *info["data_offsets"]) for key, info in header.items()}
        # TypeError for an end that is not a whole number
        says = data + max((operator.index(end) for _dtype, _shape, _begin, end in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise RefusedFile(f"damaged: no valid JSON in its safetensors header ({error!s:.100}); {AGAIN}") from None
    if says > size:
        raise RefusedFile(f"truncated: its header says {says} bytes, the file has {size}; {AGAIN}")
    if says < size:
        stream.seek(says)
        padded = ", of zeros" if not any(stream.read(min(size - says, 1 << 16))) else ""
        what = f"longer than its header says: {size} bytes, not {says}{padded}"
        raise RefusedFile(f"{what}. The format allows nothing after the last tensor; {AGAIN}")
    _check_header(path)

    views, notes = {}, []
    for key, (kind, shape, begin, _end) in tensors.items():
        wrong = ""
        if kind not in SAFETENSORS_DTYPES:
            wrong = f"has type {kind}, expected one of {', '.join(SAFETENSORS_DTYPES)}; convert it first"
        elif len(shape) > MAX_DIMS:
            wrong = f"has {len(shape)} dimensions, expected at most {MAX_DIMS}; {AGAIN}"
        if wrong and ignored(plain_name(key)):
            notes.append(f"left out, as it is not needed: tensor {key[:100]!r} {wrong}")
        elif wrong:
            raise RefusedFile(f"tensor {key[:100]!r} {wrong}")
        else:
            stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            views[key] = View(TYPES[SAFETENSORS_DTYPES[kind]], shape, stride, data + begin)
    return Contents(views, metadata, tuple(notes))


def _check_header(path: Path) -> None:
    """Let the library check types, sizes, overlaps and gaps; no tensor is read.

    A large header is checked before Python parses it: the library needs less memory for nonsense, whereas Python
    needs 72 bytes for each `[],`.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            count = len(file.keys())
    except SafetensorError as error:
        raise RefusedFile(f"damaged: not valid as safetensors ({error!s:.200}); {AGAIN}") from None
    if count > MAX_TENSORS:
        raise RefusedFile(f"holds {count} tensors, expected at most {MAX_TENSORS}; give a file of model weights")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. ValueError for a duplicate name, which could be read either way."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs in it twice")
    return found
