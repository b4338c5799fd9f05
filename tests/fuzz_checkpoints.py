"""Read very many damaged files, each within limits, and say what happened.

    python tests/fuzz_checkpoints.py --count 200000         # ten minutes of one core; the tests read 700
    python tests/fuzz_checkpoints.py --only 1234 --keep .   # one input again, and its files

Files of every kind are made by fuzz_inputs.py and read as their owner would: opened, looked at (`convert.py --info`),
every tensor read, converted; LoRA and embedding files as add-ons of a small model. This happens in a process of its
own, which is watched. For each input one of two things may happen: a result, or an exception for the user, a
CheckpointError, ValueError or OSError of one printable line. Everything else is a failure:

    another exception, or a process that dies      also the MemoryError of a request for too much
    more than 10 seconds of the processor          a slow one takes 3 for the largest file
    more memory than 3 times the files and 128 MB  the constant is what the bounds on counts of things allow
    anything executed, imported or written         Python's audit events tell
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import fuzz_inputs
import torch
from fuzz_inputs import FOLDERS, MICRO, Input, make

from sd.adapters.lora_formats import read_lora
from sd.adapters.textual_inversion import read_embedding
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint, naming
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import identify
from sd.checkpoints.inspect import inspect
from sd.models.build import build
from sd.pipeline import StableDiffusion

SECONDS = 10.0  # of the processor, which may be slow
SILENCE = 300  # seconds by the clock, on a machine that may be busy
TIMES, CONSTANT = 3, 128 << 20  # memory: so many times the files, and so many bytes
FOR_USERS = (CheckpointError, ValueError, OSError)
LOADED = 20  # one sound checkpoint in so many is also made into networks, which takes longer than all the rest

# What reading may do, by the names of Python's audit events; opening files is looked at more closely.
HARMLESS = {
    "builtins.id", "os.listdir", "os.scandir", "object.__getattr__", "object.__setattr__", "sys._getframe",
    "mmap.__new__",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ one input


class Watch:
    """Takes note of what Python does while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on or event in HARMLESS:
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if len(self.seen) < 5:
            self.seen.append(f"{event} {arguments!r:.200}")


class Memory:
    """The memory that this process takes at most, where Linux says it."""

    def peak_from_now(self) -> int:
        """Forget the highest amount so far; returns the amount now."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return self._amount("VmRSS:")

    def peak(self) -> int:
        """The highest amount since then."""
        return self._amount("VmHWM:")

    def _amount(self, name: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    def limit(self, more: int) -> None:
        """Let requests fail that go beyond the memory asked for until now and so much more; lifts an earlier limit."""
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (self._amount("VmSize:") + more, hard))

    def no_limit(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def read(path: Path, what: str, networks: dict[str, torch.nn.Module], load: bool) -> str:
    """What a user does with a file; returns what it was."""
    if what == "lora":
        read_lora(path, MICRO, networks)
        return "lora"
    if what == "embedding":
        read_embedding(path, 2, 75)
        return "embedding"
    with load_checkpoint(path) as file, naming(path):
        assert all(line.isprintable() for line in inspect(file, sha256=False).lines())
        for key in file:
            tensor = file[key]
            assert tuple(tensor.shape) == file.shape(key) and tensor.dtype == file.dtype(key)
        found = None
        try:
            found = identify(file)
        except ValueError:
            found = identify(file, MICRO)  # its names are known, its sizes are not
        for state in convert(file, found.config).values():
            for key in state:
                state[key]
    if load:
        StableDiffusion.load(
            path, config=None if "sd.config" in file.metadata else MICRO, device="cpu", dtype="float32"
        )
    return "checkpoint"


@dataclass
class Outcome:
    """What came of one input; `fault` says what should not have happened."""

    number: int
    how: str
    result: str
    seconds: float
    memory: int
    fault: str = ""

    def line(self) -> str:
        """For the process that waits for it."""
        fault = self.fault.encode("unicode_escape").decode()[:3000]
        return f"{self.number}\t{self.how}\t{self.result}\t{self.seconds:.4f}\t{self.memory}\t{fault}\n"

    @classmethod
    def parse(cls, line: str) -> Outcome:
        """The reverse."""
        number, how, result, seconds, memory, fault = line.rstrip("\n").split("\t", 5)
        return cls(int(number), how, result, float(seconds), int(memory), fault)


class Reader:
    """Reads inputs in this process, in a folder of its own, and judges what happened."""

    def __init__(self, folder: Path) -> None:
        fuzz_inputs.prepare()
        for name in ("cp437", "raw_unicode_escape"):  # codecs are imported when they are first needed
            "".encode(name)
        self.folder, self.networks = folder, build(MICRO)
        for base, files in {"": {}, **FOLDERS}.items():
            (folder / f"x{base}").mkdir()
            for name, data in files.items():
                self._write(folder / f"x{base}" / name, data)
        self.watch, self.memory = Watch(), Memory()

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    def outcome(self, number: int, made: Input) -> Outcome:
        """Write the files, read them, put everything back."""
        base = self.folder / f"x{made.base}"
        before = {name: FOLDERS.get(made.base, {}).get(name) for name in made.files}
        for name, data in made.files.items():
            self._write(base / name, data)
        try:
            return self._judged(number, made, base / made.path)
        finally:
            for name, data in before.items():
                if data is None:
                    (base / name).unlink()
                else:
                    self._write(base / name, data)

    def _judged(self, number: int, made: Input, path: Path) -> Outcome:
        allowed = TIMES * made.size + CONSTANT
        fault = ""
        self.memory.limit(2 * allowed)  # what is asked for and never touched counts, too
        signal.setitimer(signal.ITIMER_PROF, 3 * SECONDS)  # then the process dies
        start, at_first = time.process_time(), self.memory.peak_from_now()
        self.watch.on = True
        try:
            result = read(path, made.what, self.networks, load=number % LOADED == 0)
        except FOR_USERS as error:
            result = type(error).__name__
            if not str(error).isprintable() or (
                isinstance(error, CheckpointError) and str(path.parent) not in str(error)
            ):
                fault = f"its message: {error!r}"
        except Exception:
            result, fault = "failure", traceback.format_exc()
        finally:
            self.watch.on = False
        seconds, memory = time.process_time() - start, self.memory.peak() - at_first
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.memory.no_limit()
        if seconds > SECONDS:
            fault += f" took {seconds:.1f} s"
        if memory > allowed:
            fault += f" took {memory >> 20} MB for {made.size >> 10} KB"
        if self.watch.seen:
            fault += f" did {self.watch.seen}"
            self.watch.seen.clear()
        return Outcome(number, made.how, result, seconds, memory, fault)


def work(seed: int, numbers: range, to: int) -> None:
    """Read inputs one after the other, and tell the waiting process about each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        reader = Reader(Path(folder))
        for name, (what, data) in fuzz_inputs.files().items():  # real files first: nothing is imported later
            if fault := reader.outcome(0, Input("real", {name: data}, name, what)).fault:
                reader.watch.seen.clear()
                if "did" not in fault:
                    raise SystemExit(f"{name}: {fault}")
        gc.collect()
        gc.freeze()  # what stays needs not be looked through again
        for number in numbers:
            os.write(to, reader.outcome(number, make(seed, number)).line().encode())
            if number % 500 == 0:
                gc.collect()


# ------------------------------------------------------------------------------------------------------ very many


@dataclass
class Report:
    """What came of all inputs."""

    count: int = 0
    results: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    slowest: Outcome | None = None
    largest: Outcome | None = None
    faults: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one."""
        self.count += 1
        self.results[outcome.result] += 1
        self.kinds[outcome.how] += 1
        if self.slowest is None or outcome.seconds > self.slowest.seconds:
            self.slowest = outcome
        if self.largest is None or outcome.memory > self.largest.memory:
            self.largest = outcome
        if outcome.fault:
            self.faults.append(outcome)


def outcomes(seed: int, numbers: range) -> Iterator[Outcome]:
    """Every input's outcome; a process that dies or says nothing for minutes costs one input and is replaced."""
    following = numbers.start
    while following < numbers.stop:
        ours, theirs = os.pipe()
        command = [sys.executable, __file__, "--worker", str(theirs), "--seed", str(seed), "--first", str(following)]
        child = subprocess.Popen([*command, "--count", str(numbers.stop - following)], pass_fds=[theirs])
        os.close(theirs)
        rest = b""
        try:
            while select.select([ours], [], [], SILENCE)[0] and (data := os.read(ours, 1 << 16)):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    yield (outcome := Outcome.parse(line.decode()))
                    following = outcome.number + 1
        finally:
            child.kill()
            status = child.wait()
            os.close(ours)
        if following < numbers.stop:
            if status > 0:
                raise RuntimeError(f"the reading process does not start: exit status {status}")
            how = f"said nothing for {SILENCE} s" if status == -signal.SIGKILL else f"died of signal {-status}"
            yield Outcome(following, make_kind(seed, following), "death", 0.0, 0, how)
            following += 1


def make_kind(seed: int, number: int) -> str:
    """What kind of input killed its reader."""
    fuzz_inputs.prepare()
    return make(seed, number).how


def fuzz(count: int, seed: int = 0, first: int = 0, tell: Callable[[Report], Any] = lambda report: None) -> Report:
    """Read `count` inputs."""
    report = Report()
    for outcome in outcomes(seed, range(first, first + count)):
        report.add(outcome)
        tell(report)
    return report


def main() -> int:
    """Entry point; the exit status is 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="another one makes other inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="read this one, and show what it does")
    parser.add_argument("--keep", type=Path, help="with --only: write its files here")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(args.seed, range(args.first, args.first + args.count), args.worker)
        return 0
    if args.only is not None:
        fuzz_inputs.prepare()
        made = make(args.seed, args.only)
        for name, data in made.files.items() if args.keep else ():
            (args.keep / name).parent.mkdir(parents=True, exist_ok=True)
            (args.keep / name).write_bytes(data)
        print(f"{made.how}: {made.path} as {made.what}, { ({name: len(data) for name, data in made.files.items()}) }")
        args.first, args.count = args.only, 1
    start = time.monotonic()

    def tell(report: Report) -> None:
        if report.faults and report.faults[-1].number == args.first + report.count - 1:
            outcome = report.faults[-1]
            print(
                f"input {outcome.number} ({outcome.how}): {outcome.fault.encode().decode('unicode_escape')}", flush=True
            )
        if report.count % 5000 == 0:
            print(f"{report.count} read, {len(report.faults)} failures, {time.monotonic() - start:.0f} s", flush=True)

    report = fuzz(args.count, args.seed, args.first, tell)
    print(f"{report.count} inputs in {time.monotonic() - start:.0f} s: {len(report.faults)} failures")
    print("kinds: " + ", ".join(f"{how} {count}" for how, count in sorted(report.kinds.items())))
    print("results: " + ", ".join(f"{result} {count}" for result, count in report.results.most_common()))
    for what, outcome in (("slowest", report.slowest), ("most memory", report.largest)):
        if outcome:
            about = f"{outcome.seconds:.2f} s, {outcome.memory / 1e6:.0f} MB, {outcome.result}"
            print(f"{what}: input {outcome.number} ({outcome.how}), {about}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
