"""The safetensors format: names and places of tensors from its header.

    8 bytes: length N of the header; N bytes of JSON {key: {dtype, shape, data_offsets}}; the numbers

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from .dtypes import TYPES
from .pickles import RefusedFile
from .torch_files import MAX_DIMS, MAX_TENSORS, Contents, View

MAX_HEADER = 8 << 20  # bytes of a header; real ones have less than 1 MB, those of LoRAs with many tags a few MB
SMALL_HEADER = 1 << 20  # bytes of a header that Python may parse unchecked
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
AGAIN = "download it again"


def read_safetensors(stream: BinaryIO, path: Path) -> Contents:
    """Names and places from the header, which the format's own library has to accept, too. Raises RefusedFile."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    data = 8 + length
    if length > MAX_HEADER:
        raise RefusedFile(f"damaged: a safetensors header of {length} bytes, expected at most {MAX_HEADER}; {AGAIN}")
    if data > size:
        raise RefusedFile(f"truncated: its header says at least {data} bytes, the file has {size}; {AGAIN}")
    if length > SMALL_HEADER:
        _check_header(path)
    try:
        header = json.loads(stream.read(length).decode(), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {key: (info["dtype"], tuple(info["shape"]), *info["data_offsets"]) for key, info in header.items()}
        says = data + max((end for _dtype, _shape, _begin, end in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise RefusedFile(f"damaged: no valid JSON in its safetensors header ({error!s:.100}); {AGAIN}") from None
    if says != size:
        raise RefusedFile(f"truncated or damaged: its header says {says} bytes, the file has {size}; {AGAIN}")
    _check_header(path)

    views = {}
    for key, (kind, shape, begin, _end) in tensors.items():
        if kind not in SAFETENSORS_DTYPES:
            what = f"tensor {key[:100]!r} has type {kind}, expected one of {', '.join(SAFETENSORS_DTYPES)}"
            raise RefusedFile(f"{what}; convert it first")
        if len(shape) > MAX_DIMS:
            raise RefusedFile(f"damaged: tensor {key[:100]!r} has {len(shape)} dimensions; {AGAIN}")
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        views[key] = View(TYPES[SAFETENSORS_DTYPES[kind]], shape, stride, data + begin)
    return views, metadata


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
