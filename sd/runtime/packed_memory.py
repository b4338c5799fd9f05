"""The bytes of packed weights, and packed weights on given memory, without packing or copying.

oneDNN describes the layout of a packed weight in a few hundred bytes. From this description and the weight's own bytes,
torch can make the same tensor again on any memory, for example that of a mapped file (checkpoints/weights_cache.py).
The functions are those with which torch's ahead-of-time compiler (AOTInductor) loads its constants. They are internal
to torch, so `available` tries them once; where they are missing or have changed, weights are packed as usual.

>>> if available():
...     packed = packing.pack_linear(torch.eye(32))
...     data = numbers(packed).clone()
...     print(on_memory(data, layout(packed), (32, 32), torch.float32).to_dense().equal(torch.eye(32)))
... else:
...     print(True)
True
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import packing

ALIGNMENT = 64  # bytes: of a cache line, an AVX-512 register, and memory from torch's allocator
LIBRARY = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")


@cache
def available() -> bool:
    """Whether this version of torch supports all of this, tried on a small weight; False except on x86 CPUs."""
    if not packing.onednn_dtypes():
        return False
    try:
        with torch.inference_mode(False), torch.no_grad():
            weight = torch.arange(24.0 * 40, device="cpu").view(24, 40)
            packed = packing.pack_linear(weight)
            data = numbers(packed).clone()
            made = on_memory(data, layout(packed), weight.shape, torch.float32)
            x = torch.ones(2, 40, device="cpu")
            own = made.to_dense()
            return (
                own.equal(weight)
                and own.data_ptr() != data.data_ptr()
                and packing.linear(x, made, None).equal(packing.linear(x, packed, None))
            )
    except (AttributeError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError):
        return False


def numbers(packed: Tensor) -> Tensor:
    """The bytes of a packed weight: a uint8 view of its memory, valid for as long as the weight is."""
    size = torch.ops.mkldnn._nbytes(packed)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(torch.ops.mkldnn.data_ptr(packed)), dtype=torch.uint8)


def layout(packed: Tensor) -> bytes:
    """oneDNN's description of the layout of a packed weight."""
    return torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()


def on_memory(data: Tensor, layout: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A packed weight on the memory of `data` (uint8), which has to be kept for as long as the weight is used.

    layout   what `layout` returned for a weight of this shape and precision, with the same version of torch. It is not
             checked: oneDNN reads where it says, so wrong bytes can crash the program

    Raises ValueError for bytes that are not aligned, or too few or many for the layout; RuntimeError if torch refuses.
    """
    if data.data_ptr() % ALIGNMENT:
        raise ValueError(f"the memory of a packed weight must be aligned to {ALIGNMENT} bytes")
    create, wrap, codes = _functions()
    handle = ctypes.c_void_p()
    sizes, strides = (ctypes.c_int64 * len(shape))(*shape), (ctypes.c_int64 * len(shape))()
    failed = create(
        ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(len(shape)), sizes, strides, ctypes.c_int64(0),
        ctypes.c_int32(codes[dtype]), ctypes.c_int32(codes["cpu"]), ctypes.c_int32(0), ctypes.byref(handle),
        ctypes.c_int32(codes["packed"]), layout, ctypes.c_int64(len(layout)),
    )  # fmt: skip
    if failed or not handle.value:
        raise RuntimeError("torch refuses this layout of a packed weight")
    made: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(wrap(handle, None, None))
    if torch.ops.mkldnn._nbytes(made) != data.numel():
        raise ValueError("the layout of a packed weight does not fit its bytes")
    return made


@cache
def _functions() -> tuple[Any, Any, dict[Any, int]]:
    """torch's C function that makes a tensor, Python's function that wraps a pointer, and torch's codes of types."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / LIBRARY))
    # a function object of our own: `ctypes.pythonapi.PyCapsule_New` is shared with other packages
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    wrap = prototype(("PyCapsule_New", ctypes.pythonapi))
    codes: dict[Any, int] = {
        torch.float32: library.aoti_torch_dtype_float32(),
        torch.bfloat16: library.aoti_torch_dtype_bfloat16(),
        "cpu": library.aoti_torch_device_type_cpu(),
        "packed": library.aoti_torch_layout__mkldnn(),
    }
    return library.aoti_torch_create_tensor_from_blob_v2, wrap, codes
