"""Where to compute and in which precision: names -> torch devices and dtypes, and the best there is; free memory.

>>> dtype_name(find_dtype("bfloat16")), find_device("cpu")
('bfloat16', device(type='cpu'))
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ..config import PRECISIONS, SHORT_PRECISIONS

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in PRECISIONS}
DEVICES = ("cuda", "cpu", "mps", "xpu")
# Entries of /proc/cpuinfo that tell processors apart: of x86, and of ARM, where it has no name
MODEL = "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision"


def best_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this name, with its number; the best available one if None. ValueError if it is unavailable."""
    if device is not None and str(device).partition(":")[0] not in DEVICES:
        raise ValueError(f"device {str(device)!r} is not available here: expected one of {', '.join(DEVICES)}")
    try:
        found = torch.device(device) if device is not None else best_device()
        # an empty tensor knows the number of the current device, which other threads would not
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} is not available here: {reason}") from None


def best_dtype(device: torch.device) -> torch.dtype:
    """The precision that is fastest without harm: float16 on CUDA, bfloat16 on CPUs that multiply it in hardware.

    Elsewhere bfloat16 would be emulated and slower than float32. MPS gets float32: half precision is not safe there.
    """
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu":
        if hasattr(torch.cpu, "get_capabilities"):
            able = torch.cpu.get_capabilities()
        else:  # before torch 2.10
            able = {"avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()}
        if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16")):
            return torch.bfloat16
    return torch.float32


def find_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The precision of this name; ValueError for one that is not supported."""
    found = DTYPES.get(SHORT_PRECISIONS.get(dtype, dtype)) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"unknown precision {dtype!r}, expected one of {', '.join(DTYPES)}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def unusable(network: nn.Module, device: torch.device) -> str | None:
    """Why a network cannot run on a device: its weights are elsewhere, or differ in precision. None if it can."""
    tensors = [*network.parameters(), *network.buffers()]
    if elsewhere := sorted({tensor.device.type for tensor in tensors} - {device.type}):
        remedy = "load the model again" if "meta" in elsewhere else f'move them with .to("{device.type}")'
        return f"some of its weights are on {' and '.join(elsewhere)}, the model is on {device.type}: {remedy}"
    dtypes = sorted({dtype_name(tensor.dtype) for tensor in tensors if tensor.is_floating_point()})
    if len(dtypes) > 1:
        return f"its weights are {' and '.join(dtypes)}: give all of them one precision, as .to(torch.{dtypes[-1]})"
    return None


@contextmanager
def explained(name: str, network: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a network within the block; if it fails as its weights were moved or cast in part, RuntimeError says so."""
    try:
        yield
    except RuntimeError as error:
        if why := unusable(network, device):
            raise RuntimeError(f"{name} cannot be used: {why}") from error
        raise


@cache
def processor_name() -> str:
    """The name of the processor, as the system reports it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@cache
def processor() -> str:
    """A description that identifies the type of processor: name, model, and the instruction sets that torch knows."""
    facts = [f"{key} {value}" for key, value in _cpuinfo().items() if key in MODEL]
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    sets = [torch.backends.cpu.get_cpu_capability(), *sorted(key for key, has in able.items() if has is True)]
    return ", ".join([processor_name(), *facts, " ".join(sets)])


def _cpuinfo() -> dict[str, str]:
    """The entries of /proc/cpuinfo for the first processor, where there is such a file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def give_back_memory() -> None:
    """Return free memory to the system: glibc keeps free blocks that lie below blocks in use, here 1.5 GB."""
    with suppress(OSError, AttributeError):  # another system
        ctypes.CDLL("libc.so.6").malloc_trim(0)
