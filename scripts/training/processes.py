"""One process, or those that torchrun started: rank, device and communication.

torchrun --nproc-per-node 2 scripts/train.py ...           two GPUs (NCCL), or two processes on the CPU (gloo)

Several machines must share the folder --out; the main process of the first one writes to it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sd.runtime.device import find_device

PATIENCE = timedelta(hours=12)  # while the main process prepares data or generates samples, the others wait


@dataclass(frozen=True)
class Processes:
    """This process, one of `count`; `local` is its rank on this machine, `messages` a process group on the CPU."""

    device: torch.device
    rank: int = 0
    count: int = 1
    local: int = 0
    messages: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any of the processes."""
        if self.count == 1:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.messages)
        return bool(said.item())

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.count > 1:
            dist.all_reduce(value)
            value = value / self.count
        return value

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier(group=self.messages)


def lost(error: RuntimeError, processes: Processes) -> bool:
    """Whether an error says that another process ended, or cannot be reached."""
    gone = r"closed by peer|reset by peer|broken pipe|gloo/transport|connection (was )?(lost|refused)|heartbeat"
    return processes.count > 1 and (
        isinstance(error, dist.DistNetworkError | dist.DistBackendError) or bool(re.search(gone, str(error), re.I))
    )


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun, only this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Processes(find_device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    cuda = device == "cuda" if device else torch.cuda.is_available()
    found = find_device(f"cuda:{local}" if cuda else device)
    if cuda:
        torch.cuda.set_device(found)
    _join("nccl" if found.type == "cuda" else "gloo")
    try:
        messages = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Processes(found, dist.get_rank(), dist.get_world_size(), local, messages)
    finally:
        dist.destroy_process_group()


def _join(backend: str) -> None:
    """Join the process group that the environment describes. Raises OSError if the others cannot be reached."""
    store, rank, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
        # torchrun keeps the store when it restarts processes: the addresses of those that are gone must not be read.
        # With several machines the numbers of restarts may differ
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    except RuntimeError as error:
        raise OSError(f"the other processes cannot be reached: {str(error).partition(chr(10))[0]}") from None
