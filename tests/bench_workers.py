"""Objects that test_bench.py and test_check.py put into processes: without torch, so that the processes start fast."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


class Echo:
    """A worker with methods that return, raise or end the process."""

    def __init__(self, word: str) -> None:
        if word == "refused":
            raise ValueError("this word is refused")
        print("printed by", word, flush=True)

    def process(self) -> int:
        return os.getpid()

    def divide(self, a: int, b: int) -> float:
        return a / b

    def complain(self) -> None:
        raise OSError("no such model\nSee our pages.")

    def lookup(self) -> None:
        raise KeyError("nothing\nof interest")

    def die(self, how: str) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        print("something", "last words", sep="\n", flush=True)
        os._exit(3)

    def take(self, size: int) -> tuple[int, ...]:
        """The peak before, while and after so many bytes are held."""
        import torch

        from scripts.benchmark.memory import Memory

        memory, peaks = Memory(torch.device("cpu")), []
        for amount in (1, size, 1):
            memory.release()
            memory.start()
            held = bytearray(os.urandom(1)) * amount
            peaks.append(memory.peak() or 0)
            del held
        return tuple(peaks)


class Dying:
    """A peer whose process dies, like a library that does not suit the processor."""

    def __init__(self, when: str) -> None:
        self.when = when
        self.die("built")

    def die(self, when: str) -> None:
        if self.when == when:
            print("a line that does not explain it", flush=True)
            os.kill(os.getpid(), signal.SIGFPE)

    def prepare(self, case: object) -> None:
        self.die("prepared")

    def run(self, keep: bool) -> None:
        self.die("run")
        raise AssertionError("the process should be dead")


class Doing:
    """Does items as the parts of `bench.py --check` do; what an item asks for is how it goes."""

    def __init__(self, start: str = "") -> None:
        if start == "refused":
            raise RuntimeError("no CUDA\nin this process")
        if start == "hangs":
            time.sleep(60)
        self.done = 0

    def do(self, how: object) -> object:
        self.done += 1
        if how == "raises":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "hangs":
            time.sleep(60)
        if how == "wrong":
            return "failed", "one and one are three"
        if isinstance(how, dict):
            return how
        return "passed", f"item {self.done} of its process"


class Starting(Doing):
    """A worker that has started a process."""

    def __init__(self) -> None:
        super().__init__()
        self.other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])

    def processes(self) -> tuple[int, int]:
        return os.getpid(), self.other.pid
