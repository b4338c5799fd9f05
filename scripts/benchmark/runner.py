"""One implementation in its own process: builds the networks of a part, runs them on request, returns the time."""

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

PAUSE = 0.01  # seconds; sleeping threads use less than a tenth of that time


class Run(NamedTuple):
    """One measurement: seconds, peak bytes if known, and the result if requested."""

    seconds: float
    memory: int | None
    result: np.ndarray | None = None


class Runner:
    """An implementation with the networks of one part, in the process that creates this object."""

    def __init__(self, side: str, setup: Setup, part: str) -> None:
        self.setup = setup
        torch.set_num_threads(setup.threads)
        torch.set_grad_enabled(False)
        SIDES[side].libraries()
        self.memory = Memory(setup.device)
        self.side = SIDES[side](setup, part)
        if setup.device.type == "cpu" and self.side.keeps_freed_memory:
            cli.keep_freed_memory()  # after loading the weights, like the scripts
        self.call: Callable[[], Any] | None = None

    def prepare(self, case: Case) -> None:
        """Prepare another case."""
        self.call = None
        self.rest()
        self.call = self.side.call(case)

    def rest(self) -> None:
        """Release cached memory."""
        self.memory.release()

    def run(self, keep: bool) -> Run:
        """Run once; returns the result if `keep` and it is a tensor."""
        if self.call is None:
            raise ValueError("nothing to run: call prepare first")
        self.memory.start()
        seconds, out = timed(self.call, self.setup.device)
        memory = self.memory.peak()
        result = out.float().cpu().numpy() if keep and isinstance(out, Tensor) else None
        settle()
        return Run(seconds, memory, result)

    def peak(self) -> float:
        """Peak FLOP/s of the machine in this precision."""
        return peak(self.setup.device, self.setup.torch_dtype, self.setup.trial)


def settle() -> None:
    """Wait until the threads of this process sleep: idle threads spin for a while, which would disturb the next one."""
    for _ in range(100):
        before = process_time()
        sleep(PAUSE)
        if process_time() - before < PAUSE / 10:
            return
