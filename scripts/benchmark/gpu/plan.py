"""All parts of the check in order, each in its own process and with its own time limit.

A part that fails, hangs, or whose process dies does not stop the others. The most important comes first: whether
everything works, then times for one image, then larger batches, and last what torch.compile needs minutes for.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from .. import report
from ..interleave import MAX_DIFFERENCE
from ..sides import no_compiler
from ..weights import Setup
from ..workers import Failed, TooSlow, Worker
from . import controls, images, networks, others  # noqa: F401 (they register their checks)
from .items import CHECKS
from .models import Checker, Models, Place
from .results import CHECK_FORMAT, targets
from .table import AUTOTUNE, EXTRA, IMAGES, OVERHEAD, PROGRAMS, Row, config_of, difference, steps_of, without_peer

START = 60.0  # seconds that the start of a process may take: imports, the context of CUDA, weights
Record = dict[str, Any]
Say = Callable[[str], object]


@dataclass(frozen=True)
class Item:
    """A check or a measurement: `ask` is the argument of `do` in its process; `row` is set for a measurement."""

    title: str
    ask: Any
    cuda: bool = False
    limit: float = 30.0
    needs: Callable[[], str | None] = lambda: None
    row: Row | None = None


@dataclass(frozen=True)
class Part:
    """Items that share a process, in which `make(*arguments).do` runs each. `limit` is in seconds, for all items."""

    name: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...]
    items: Sequence[Item] = field(default_factory=tuple)
    limit: float = 120.0


def find(name: str) -> Callable[[Models], str]:
    """The function of a check; called in the process of its part."""
    return CHECKS[name].function


def checks_of(place: Place, part: str, limit: float) -> Part:
    """The registered checks of a part."""
    items = [Item(one.title, one.name, one.cuda, one.limit, one.needs) for one in CHECKS.values() if one.part == part]
    return Part(part, Checker, (place, find), items, limit)


def rows_of(place: Place, name: str, rows: Sequence[Row], limit: float, each: float = 40.0) -> Part:
    """The measurements of one program; `limit` seconds for all, `each` for one."""
    program = rows[0].program
    device = torch.device(place.device)

    def needs(way: str) -> str | None:
        lacking = without_peer() if program == "diffusers" else None
        return lacking or (no_compiler(device) if way in (OVERHEAD, AUTOTUNE) else None)

    items = [
        Item(row.title, row, row.way != "eager", each, lambda way=row.way: needs(way), row)  # type: ignore[misc]
        for row in rows
    ]
    return Part(name, PROGRAMS[program], (place,), items, limit)


def all_parts(place: Place) -> list[Part]:
    """All parts, in order."""
    batches = (4, 16)

    def steps(program: str, way: str, *numbers: int) -> list[Row]:
        return [Row("steps", n, program, way) for n in numbers]

    def extra(program: str, way: str) -> list[Row]:
        return [Row(what, 1, program, way if what in IMAGES else "eager") for what in EXTRA]

    ours = [*steps("ours", "recorded", 1), *steps("ours", "eager", 1), *steps("ours", "recorded, cudnn.benchmark", 1)]
    way = "recorded" if place.cuda else "eager"
    ours += [*extra("ours", way), *steps("ours", "recorded", *batches), *steps("ours", "eager", *batches)]
    theirs = [*steps("diffusers", "eager", 1), *extra("diffusers", "eager"), *steps("diffusers", "eager", *batches)]
    parts = [
        checks_of(place, "networks", 100),
        checks_of(place, "images", 140),
        checks_of(place, "others", 60 + others.START),
        rows_of(place, "times of ours", ours, 100),
        rows_of(place, "times of diffusers", theirs, 80),
    ]
    # one process each, since compiled code and its memory stay in a process
    for program, mode, number in (
        ("diffusers", OVERHEAD, 1), ("ours", OVERHEAD, 1), ("diffusers", AUTOTUNE, 1), ("ours", AUTOTUNE, 1),
        ("diffusers", OVERHEAD, 4), ("diffusers", OVERHEAD, 16),
    ):  # fmt: skip
        limit = 100.0 if mode == OVERHEAD else 240.0
        name = f"times of {program}, compiled, {mode}, {number} images"
        parts.append(rows_of(place, name, steps(program, mode, number), limit, limit))
    parts.insert(7, checks_of(place, "compiled", 120))
    return parts


class Running:
    """Runs the parts one after the other.

    record   receives the results
    folder   for the log files of the processes
    seconds  time limit for all parts
    say      called with a line for each result
    save     called after each result
    """

    def __init__(
        self, record: Record, folder: Path, seconds: float, say: Say, save: Callable[[], object] = lambda: None
    ) -> None:
        self.record, self.folder, self.say, self.save = record, folder, say, save
        self.began = perf_counter()
        self.deadline = self.began + seconds
        self.first: Any = None  # title and latents of the first row that has latents

    def all(self, parts: Sequence[Part]) -> None:
        """Run all parts."""
        for part in parts:
            self.part(part)
        self.record["targets"] = targets(self.record)
        self.record["seconds"] = perf_counter() - self.began
        self.save()

    def part(self, part: Part) -> None:
        """Run all items of a part. Its process starts at the first item that can run, and again after a failure."""
        worker: Worker | None = None
        refused: str | None = None  # why its process does not start
        ends = perf_counter() + part.limit
        gone = "the time limit was reached" if self.deadline <= ends else "the time limit of its part was reached"
        ends = min(ends, self.deadline)
        try:
            for item in part.items:
                reason = refused or self._not_run(item) or (gone if perf_counter() >= ends else None)
                if reason:
                    self.note(part, item, "not run", reason)
                    continue
                start = perf_counter()
                limit, left = START, ends - start
                try:
                    if worker is None:
                        worker = self._started(part, min(limit, left))
                    limit, left = item.limit, max(0.0, ends - perf_counter())
                    answer = worker.ask("do", item.ask, limit=min(limit, left))
                except Failed as failure:
                    took = perf_counter() - start
                    if isinstance(failure, TooSlow) and left < limit:
                        self.note(part, item, "not run", f"stopped after {took:.1f} s: {gone}", took)
                    else:
                        self.note(part, item, "failed", failure.why, took)
                        refused = "the process of its part does not start, see above" if worker is None else None
                    if worker is not None:  # an illegal memory access, for example, leaves CUDA unusable in its process
                        worker.close(patience=0)
                        worker = None
                else:
                    self.done(part, item, answer, perf_counter() - start)
        except BaseException:
            if worker is not None:
                worker.close(patience=0)
            raise
        if worker is not None:
            worker.close()

    def _started(self, part: Part, limit: float) -> Worker:
        """The process of a part."""
        self.say(f"{self.clock()} {part.name}: a process starts")
        log = self.folder / f"{part.name.replace(' ', '-')}.log"
        return Worker(part.name, log, part.make, *part.arguments, limit=limit)

    def _not_run(self, item: Item) -> str | None:
        """Why an item cannot run here; None if it can."""
        if item.cuda and not self.record["cuda"]:
            return "needs CUDA"
        return item.needs()

    def done(self, part: Part, item: Item, answer: Any, seconds: float) -> None:
        """Store the result of an item."""
        if item.row is None:
            status, message = answer
            self.note(part, item, status, message, seconds)
            return
        result = answer.pop("result", None)
        if result is not None and not np.isfinite(result).all():
            self.note(part, item, "failed", "its latents are not finite", seconds, answer)
            return
        if result is not None and self.first is None:
            self.first = item.title, result
        elif result is not None:
            title, first = self.first
            answer["difference"] = found = difference(result, first)
            if not found < MAX_DIFFERENCE:
                message = f"its latents differ from those of ({title}) by {found:.2g}: not comparable"
                self.note(part, item, "failed", message, seconds, answer)
                return
        self.note(part, item, "measured", report.time(answer["seconds"]), seconds, answer)

    def note(
        self, part: Part, item: Item, status: str, message: str, seconds: float = 0.0, figures: Record | None = None
    ) -> None:
        """Add the result of an item to the record, print and save it."""
        entry = {"part": part.name, "title": item.title, "status": status, "message": message, "took": seconds}
        if item.row is None:
            self.record["checks"].append({"name": str(item.ask), **entry})
        else:
            self.record["rows"].append({**item.row._asdict(), **entry, **(figures or {})})
        took = f" ({seconds:.1f} s)" if seconds else ""
        self.say(f"{self.clock()} {status:<8}  {item.title}: {message}{took}")
        self.save()

    def clock(self) -> str:
        """The seconds since the start."""
        return f"[{perf_counter() - self.began:5.1f} s]"


def new_record(place: Place, setup: Setup) -> Record:
    """The record before anything has run."""
    machine = {**report.machine(setup), **gpu(torch.device(place.device))}
    return {
        "format": CHECK_FORMAT,
        "machine": machine,
        "settings": {
            "model": config_of(place).name, "size": config_of(place).size, "steps": steps_of(place), "sampler": "ddim",
            "dtype": str(place.dtype).removeprefix("torch."), "trial": place.trial,
        },
        "cuda": place.cuda,
        "date": date.today().isoformat(),
        "checks": [],
        "rows": [],
        "targets": [],
        "seconds": None,
    }  # fmt: skip


def gpu(device: torch.device) -> Record:
    """Memory (bytes), compute capability, versions of driver, CUDA and cuDNN of a GPU; {} for other devices."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def driver() -> str | None:
    """The version of NVIDIA's driver, as nvidia-smi prints it; None without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None
