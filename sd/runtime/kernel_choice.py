"""Which of several kernels is fastest: measured on the machine at hand, once for each kind of call, and remembered.

A kernel that is twice as fast on one processor can be five times slower on another, so nothing is assumed from the
processor's name. A kind is an operation with its precision and the sizes that its speed depends on, such as
`("attention", "bfloat16", 1, 1024, 4096, 40)`. For each kind, every kernel runs an example a few times. A kernel that
fails, or whose result differs from that of PyTorch's own operator ("plain") by more than rounding, is left out with a
warning; the fastest of the others is used from then on.

The choice depends on the kind and the number of threads, not on earlier calls: within a process, the same inputs always
go through the same kernels. Between processes, close times may lead to different choices, which round differently.
`save` and `load` fix the choices, so that a machine always generates the same image to the bit.

>>> with prefer("fast"):  # for tests: without measuring
...     fastest(("a kind", 8), ("plain", "another"), lambda: {}.get)
'another'
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from .. import __version__
from ..files import check_regular, replaced_file
from .device import processor

PLAIN = "plain"
Kind = tuple[str | int, ...]  # an operation, its precision and sizes
Example = Callable[[str], Tensor]  # runs the kernel of this name on inputs of the kind

# Calls of each kernel, alternating, until all together took this long; the fastest call of a kernel counts, as other
# processes can only make calls slower
LEAST_CALLS, MOST_CALLS = 3, 25
SECONDS = 0.02
QUEUED, PAUSE = 20, 10**7  # calls per measurement on CUDA; the pause before them in clock cycles, about 5 ms
TIE = 1.03  # times within this factor of the fastest count as equal; the first of these kernels is used
# Largest relative L2 difference from the plain result: it allows several roundings, but no wrong formula
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
FORMAT = 1  # of saved tables
MOST_TEXT = 2**20  # characters of a saved table that are read; it has about 150 per kind


class Measurement(NamedTuple):
    """The result for a kind: the kernel to use, the milliseconds of each, and the reasons why others were left out."""

    chosen: str
    milliseconds: Mapping[str, float]
    left_out: Mapping[str, str]


_preferred: str | None = None
_measured: dict[tuple[Kind, int], Measurement] = {}  # by kind and number of threads
_measuring = threading.RLock()


@contextmanager
def prefer(choice: str | None) -> Iterator[None]:
    """Within this context, use these kernels without measuring; with None, measure.

    choice   "plain", "fast" (the first that is not plain), or the name of one; kinds that lack it use the plain one

    For tests and comparisons. It applies to all threads of the process. Packed layers are chosen by `optimize`, which
    therefore has to run within the context; the other kernels are chosen at each call.
    """
    global _preferred
    before, _preferred = _preferred, choice
    try:
        yield
    finally:
        _preferred = before


def preferred() -> str | None:
    """The `choice` of the current `prefer` context; None if kernels are measured."""
    return _preferred


def fastest(kind: Kind, kernels: Sequence[str], example: Callable[[], Example]) -> str:
    """The name of the fastest of these kernels for a kind of call, which is measured the first time.

    kernels   their names: "plain" is PyTorch's own operator, and always one of them
    example   makes inputs of the kind; the function that it returns runs a kernel on them
    """
    if _preferred is not None:
        if _preferred == "fast":
            return next((name for name in kernels if name != PLAIN), PLAIN)
        return _preferred if _preferred in kernels else PLAIN
    if len(kernels) == 1:
        return PLAIN
    key = kind, torch.get_num_threads()
    found = _measured.get(key)
    if found is None or found.chosen not in kernels:
        with _measuring, torch.inference_mode(False), torch.no_grad():
            found = _measured.get(key)  # another thread may just have measured it
            if found is None or found.chosen not in kernels:
                found = _measure(kind, kernels, example())
                if found is None:
                    return PLAIN
                _measured[key] = found
    return found.chosen


def table() -> dict[str, Measurement]:
    """All measurements of this process. A key is the kind in words; the last word is the number of threads."""
    found = dict(_measured)
    return {" ".join(map(str, (*kind, f"threads={threads}"))): found[kind, threads] for kind, threads in found}


def save(path: str | os.PathLike[str]) -> None:
    """Write the measurements to a file, for `load`. Raises OSError if it cannot be written.

    Those in which a kernel was left out are not written: the reason may be gone next time.
    """
    found = {key: measurement for key, measurement in dict(_measured).items() if not measurement.left_out}
    rows = [[list(kind), threads, *measurement] for (kind, threads), measurement in found.items()]
    text = json.dumps({"format": FORMAT, "machine": machine(), "kernels": rows}, indent=1)
    with replaced_file(Path(path)) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def load(path: str | os.PathLike[str]) -> bool:
    """Use the measurements that `save` wrote instead of measuring; returns whether there were any.

    A file that is missing or damaged, or of another machine or version of torch or of this package, is not used.
    """
    try:
        check_regular(Path(path))
        with open(path, encoding="utf-8") as file:
            content = json.loads(file.read(MOST_TEXT))  # what is cut off is not valid
        if content["format"] != FORMAT or content["machine"] != machine():
            return False
        rows = {}
        for kind, threads, chosen, milliseconds, left_out in content["kernels"]:
            if not isinstance(chosen, str) or not isinstance(threads, int):
                return False
            rows[tuple(kind), threads] = Measurement(chosen, dict(milliseconds), dict(left_out))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
    _measured.update(rows)
    return bool(rows)


def machine() -> str:
    """What the choices depend on: the processor, and the versions of torch and of this package."""
    return f"{processor()}, torch {torch.__version__}, sd {__version__}"


def _measure(kind: Kind, kernels: Sequence[str], run: Example) -> Measurement | None:
    """Time the kernels of a kind, and compare their results with the plain one.

    None if that is not finite, as with an image that overflows in float16: then nothing can be compared.
    """
    expected = run(PLAIN)
    if not bool(expected.isfinite().all()):
        return None
    working, left_out = [PLAIN], {}
    for name in kernels:
        if name == PLAIN:
            continue
        try:
            wrong = _difference(run(name), expected)
        except Exception as error:  # whatever goes wrong, the plain kernel works
            wrong = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        if wrong is None:
            working.append(name)
        else:
            left_out[name] = wrong
            words = " ".join(map(str, kind))
            warnings.warn(f"the kernel {name!r} is not used for {words}: {wrong}", stacklevel=3)
    seconds, spent = dict.fromkeys(working, float("inf")), 0.0
    for call in range(MOST_CALLS if len(working) > 1 else 0):
        taken = [_seconds(run, name, expected.device) for name in working]
        seconds = {name: min(seconds[name], value) for name, value in zip(working, taken, strict=True)}
        spent += sum(taken)
        if call + 1 >= LEAST_CALLS and spent > SECONDS:
            break
    enough = TIE * min(seconds.values())
    chosen = next(name for name in working if seconds[name] <= enough)
    times = {name: round(1e3 * value, 4) for name, value in seconds.items() if len(working) > 1}
    return Measurement(chosen, times, left_out)


def _seconds(run: Example, name: str, device: torch.device) -> float:
    """The seconds that a call takes; on CUDA the time on the device, since launches cost nothing in a recorded step.

    On CUDA, `QUEUED` calls wait behind a pause, so that the device runs them without gaps between them.
    """
    if device.type != "cuda":
        start = perf_counter()
        run(name)
        return perf_counter() - start
    with torch.cuda.device(device):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE)
        start_event.record()
        for _ in range(QUEUED):
            run(name)
        end_event.record()
        end_event.synchronize()
    return 1e-3 * start_event.elapsed_time(end_event) / QUEUED


def _difference(result: Tensor, expected: Tensor) -> str | None:
    """What is wrong with the result of a kernel; None if it equals the plain result up to rounding."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"it returns {tuple(result.shape)} in {result.dtype}"
    size = expected.float().norm().clamp(min=torch.finfo(torch.float32).tiny)  # of zeros, 0 / 0 is not a number
    error = float((result.float() - expected.float()).norm() / size)
    if error <= TOLERANCE.get(expected.dtype, 0.0):
        return None
    return f"its result differs from PyTorch's by {error:.2g}"
