"""The saved state of a training run, for exact resumption; and requests to stop.

OUT/settings.json        the arguments of the run, which --resume restores
OUT/state.pt             networks, optimizer, average, scaler and step; random numbers are a function of the step
"""

from __future__ import annotations

import argparse
import json
import math
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

from ..common.cli import Parser

SETTINGS, STATE = "settings.json", "state.pt"
NOT_KEPT = ("out", "resume", "threads", "workers", "device", "recipes")  # may differ between starts


def save_state(state: Mapping[str, object], path: Path) -> None:
    """Write a training state atomically: a run that ends while saving keeps the previous state.

    `state` has only tensors, numbers, strings, lists and dictionaries, so that `load_state` is safe for any file.
    """
    with replaced_file(path) as partial:
        try:
            with open(partial, "wb") as file:
                torch.save(dict(state), file)
        except RuntimeError as error:  # torch's writer wraps the error of the system
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path}: cannot be written: {getattr(reason, 'strerror', None) or reason}") from None
        except OSError as error:
            raise OSError(f"{path}: cannot be written: {error.strerror or error}") from None


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of `save_state`. Raises OSError, or ValueError in one line for anything but a training state."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises several kinds, depending on where the file is damaged
        raise ValueError(f"{path}: not a training state: {str(error).partition(chr(10))[0][:200]}") from None


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A training state with this version's names of weights; it may be of version 0.1."""
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


def continued(parser: Parser, args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a resumed run (--resume): those of its start, overridden by those given now."""
    if not args.resume:
        if (args.out / STATE).exists():
            raise ValueError(f"{args.out} already has a run: continue it (--resume) or choose another --out")
        return args
    path = args.out / SETTINGS
    if not (args.out / STATE).exists():
        raise ValueError(f"{args.out}: no run to resume ({STATE}); start one without --resume")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in kept.items() if name in vars(args)}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}: damaged; remove it and give all options again") from None
    except FileNotFoundError:
        return args
    # argparse parses string defaults like arguments
    parser.set_defaults(**kept)
    return parser.parse_words(argv)


def keep_settings(args: argparse.Namespace, recipe: Mapping[str, object]) -> None:
    """Save the arguments for `continued`, and the recipe, because a later version may have other defaults."""
    values = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name not in NOT_KEPT}
    with replaced_file(args.out / SETTINGS) as partial:
        partial.write_text(json.dumps(values | dict(recipe), indent=1), encoding="utf-8")


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


def finite(value: float, step: int, saved: int, what: str = "loss") -> float:
    """The value if it is finite; otherwise ArithmeticError with advice. `saved` is the step of the last saved state."""
    if math.isfinite(value):
        return value
    kept = f"the state of step {saved} is kept" if saved else "nothing has been saved yet"
    raise ArithmeticError(
        f"the {what} is not finite ({value}) at step {step}: try a lower --lr or --precision float32; {kept}"
    )
