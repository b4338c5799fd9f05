"""The saved state of a training run, for exact resumption; and requests to stop.

OUT/state.pt      trained weights, optimizers, average, scaler and step; random numbers are a function of the step
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sd.checkpoints.key_maps import from_own_0_1
from sd.files import replaced_file

STATE = "state.pt"
KEPT = {"networks", "optimizer", "optimizers", "ema", "scaler", "step", "sum", "count"}


def save_pickle(values: Mapping[str, object], path: Path) -> None:
    """Write or replace a file of `torch.save` atomically. Raises OSError with its name, on a full disk for example."""
    with replaced_file(path) as partial:
        try:
            with open(partial, "wb") as file:
                torch.save(dict(values), file)
        except RuntimeError as error:  # torch's writer wraps the error of the system
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path}: cannot be written: {getattr(reason, 'strerror', None) or reason}") from None
        except OSError as error:
            raise OSError(f"{path}: cannot be written: {error.strerror or error}") from None


def save_state(state: Mapping[str, object], path: Path) -> None:
    """Write a training state atomically: a run that ends while saving keeps the previous state.

    `state` has only tensors, numbers, strings, lists and dictionaries, so that `load_state` is safe for any file.
    """
    save_pickle(state, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of `save_state`. Raises OSError, or ValueError in one line for anything but a training state.

    Tensors are read where they are used, so that several processes on a machine share the memory of a large file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # torch raises several kinds, depending on where the file is damaged
        raise ValueError(f"{path}: not a training state: {str(error).partition(chr(10))[0][:200]}") from None


def resumable(path: Path) -> dict[str, Any]:
    """The state of a run, with this version's names of weights; it may be of version 0.1.

    Raises OSError, or ValueError in one line for anything but the state of a run.
    """
    state = load_state(path)
    if not isinstance(state, dict) or KEPT - state.keys():
        raise ValueError(f"{path}: not the state of a training run; remove it to start again, or restore it")
    state["networks"] = {from_own_0_1(key): value for key, value in state["networks"].items()}
    if state["ema"] is not None:
        state["ema"]["average"] = {from_own_0_1(key): value for key, value in state["ema"]["average"].items()}
    return state


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write or replace a .safetensors file atomically."""
    with replaced_file(path) as partial:
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from None


class Stop:
    """Inside a `with` block, Ctrl-C and SIGTERM set `asked`, so that the current step is finished and saved.

    A second signal stops at once. With `patient`, further signals are ignored: torchrun forwards signals that its
    processes have already received from the terminal, and kills processes that take too long.
    """

    def __init__(self, patient: bool = False) -> None:
        self.asked, self.patient = False, patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # only the main thread can handle signals
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and not self.patient:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            more = "" if self.patient else "; press again to stop at once"
            tqdm.write(f"stopping after this step, then saving{more}")
