"""What a training run keeps on disk so that it can go on as if it had never stopped, and how it is asked to stop.

OUT/settings.json        the arguments that it was begun with; --resume takes them up again
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

SETTINGS, STATE = "settings.json", "state.pt"
NOT_KEPT = ("out", "resume", "threads", "workers", "device", "recipes")  # may be others from one start to the next


def save_state(state: Mapping[str, object], path: Path) -> None:
    """Write a training state whole or not at all: a run that ends while it saves keeps the state before.

    `state` holds tensors, numbers, texts, lists and dictionaries only, so `load_state` needs to trust nobody.
    """
    with replaced_file(path) as partial:
        try:
            with open(partial, "wb") as file:
                torch.save(dict(state), file)
        except RuntimeError as error:  # torch's writer reports what the system said as an error of its own
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path}: cannot be written: {getattr(reason, 'strerror', None) or reason}") from None
        except OSError as error:
            raise OSError(f"{path}: cannot be written: {error.strerror or error}") from None


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises OSError, or ValueError in one line for what is not a training state."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises several kinds, depending on where the file is wrong
        raise ValueError(f"{path}: not a training state: {str(error).partition(chr(10))[0][:200]}") from None


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A training state with this version's names of weights; it may be of version 0.1."""
    state["networks"] = {from_own_0_1(key): value for key, value in state["networks"].items()}
    if state["ema"] is not None:
        state["ema"]["average"] = {from_own_0_1(key): value for key, value in state["ema"]["average"].items()}
    return state


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file in the place of an older one, whole or not at all."""
    with replaced_file(path) as partial:
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from None


def continued(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a run that is taken up again (--resume): those it began with, and over them those given now."""
    if not args.resume:
        if (args.out / STATE).exists():
            raise ValueError(f"{args.out} holds a run already: go on with it (--resume) or choose another --out")
        return args
    path = args.out / SETTINGS
    if not (args.out / STATE).exists():
        raise ValueError(f"{args.out}: no run to go on with ({STATE}); begin one without --resume")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in kept.items() if name in vars(args)}
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: damaged; remove it and give all options again") from None
    except FileNotFoundError:
        return args
    # argparse converts defaults that are text as if they had been typed
    parser.set_defaults(**kept)
    return parser.parse_intermixed_args(argv)


def keep_settings(args: argparse.Namespace, recipe: Mapping[str, object]) -> None:
    """Write the arguments down for `continued`, and the recipe: defaults may be others in a later version."""
    values = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name not in NOT_KEPT}
    with replaced_file(args.out / SETTINGS) as partial:
        partial.write_text(json.dumps(values | dict(recipe), indent=1), encoding="utf-8")


class Stop:
    """While it is entered, Ctrl-C and the system's request to end (SIGTERM) set `asked`; a second one ends at once.

    So the step at hand is finished, and saved. With `patient`, further ones change nothing: torchrun hands on to its
    processes what the terminal has told them already, and itself ends those that take too long.
    """

    def __init__(self, patient: bool = False) -> None:
        self.asked, self.patient = False, patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # only there signals can be handled
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
            more = "" if self.patient else "; once more to stop at once"
            tqdm.write(f"stopping after this step, then saving{more}")


def finite(value: float, step: int, saved: int, what: str = "loss") -> float:
    """The loss, if it is a number; else ArithmeticError that says what to do. `saved` is the step of the last state."""
    if math.isfinite(value):
        return value
    kept = f"the state of step {saved} is kept" if saved else "nothing was saved yet"
    raise ArithmeticError(
        f"the {what} is not finite ({value}) by step {step}: try a lower --lr or --precision float32; {kept}"
    )
