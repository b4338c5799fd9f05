"""Finds losses and gradients that are not finite, and names their step and images.

This is checked at each line of the log and before each saved state.

Losses and norms of gradients stay on the device in between, because looking at each would make the CPU wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .processes import Processes

NAMED = 8  # images that a message names


class Watch:
    """The losses of this process and the norms of the gradients, of the steps since the last look."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Keep the numbers of a step, two scalars."""
        self._losses.append(loss)
        self._norms.append(norm)

    def check(self, step: int, saved: int, processes: Processes, names: Callable[[int], Sequence[str]] | None) -> None:
        """Raise ArithmeticError, in all processes, for the first number that is not finite.

        step     steps that are done
        saved    the step of the last saved state
        names    step, from 0 -> the images of the step
        """
        if not self._losses:
            return
        losses, norms = processes.mean(torch.stack(self._losses)).tolist(), torch.stack(self._norms).tolist()
        self._losses, self._norms = [], []
        first = step - len(losses)
        for number, both in enumerate(zip(losses, norms, strict=True), start=first):
            for what, value in zip(("loss", "gradient"), both, strict=True):
                if not math.isfinite(value):
                    images = f" ({_listed(names(number))})" if names else ""
                    kept = f"the state of step {saved} is kept" if saved else "nothing has been saved yet"
                    raise ArithmeticError(
                        f"the {what} is not finite ({value}) at step {number + 1}{images}: try a lower --lr or "
                        f"--precision float32; {kept}"
                    )


def _listed(names: Sequence[str]) -> str:
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more
