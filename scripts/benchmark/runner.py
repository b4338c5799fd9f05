"""One side in its process: builds what a part needs, runs it when told to, and says how long it took."""

from __future__ import annotations

from collections.abc import Callable
from time import process_time, sleep
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common import cli
from .cases import Case
from .memory import Memory
from .peak import peak, timed
from .sides import SIDES
from .weights import Setup

PAUSE = 0.01  # seconds in which threads that are asleep take less than a tenth of them


class Run(NamedTuple):
    """One measurement: seconds, bytes at the peak where they are known, and the numbers that came out if asked for."""

    seconds: float
    memory: int | None
    result: np.ndarray | None = None


class Runner:
    """A side with the networks of one part, in the process that this is made in."""

    def __init__(self, side: str, setup: Setup, part: str) -> None:
        self.setup = setup
        torch.set_num_threads(setup.threads)
        torch.set_grad_enabled(False)
        SIDES[side].libraries()
        self.memory = Memory(setup.device)
        self.side = SIDES[side](setup, part)
        if setup.device.type == "cpu" and self.side.keeps_freed_memory:
            cli.keep_freed_memory()  # after the weights were read, as the scripts do
        self.call: Callable[[], Any] | None = None

    def prepare(self, case: Case) -> None:
        """Get ready for another case."""
        self.call = None
        self.rest()
        self.call = self.side.call(case)

    def rest(self) -> None:
        """Give back what was kept for the next run."""
        self.memory.release()

    def run(self, keep: bool) -> Run:
        """Once; with the numbers that came out if `keep`, where they are a tensor."""
        if self.call is None:
            raise ValueError("nothing to run: call prepare first")
        self.memory.start()
        seconds, out = timed(self.call, self.setup.device)
        memory = self.memory.peak()
        result = out.float().cpu().numpy() if keep and isinstance(out, Tensor) else None
        settle()
        return Run(seconds, memory, result)

    def peak(self) -> float:
        """What the machine reaches in this precision, in FLOP/s."""
        return peak(self.setup.device, self.setup.torch_dtype, self.setup.trial)


def settle() -> None:
    """Wait until this process's threads, which look out for more work for a while, are asleep: another's turn comes."""
    for _ in range(100):
        before = process_time()
        sleep(PAUSE)
        if process_time() - before < PAUSE / 10:
            return
