"""The requests that are being generated: how far they are, and stopping them.

A client sees, interrupts and skips only what is its own: of its address. `progress` and `skip` are about its oldest
request, `interrupt` is about all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...imaging.tensors import grid
from ..engine import Engine
from ..jobs import Job

STAMP = "%Y%m%d%H%M%S"
PATIENCE = 0.5  # seconds that the answer about progress waits for an image
LOOK = 0.02  # seconds between looks


@dataclass(eq=False)
class Task:
    """A request and its jobs, one for each batch."""

    client: str
    name: str
    jobs: list[Job] = field(default_factory=list)  # empty before they are in the queue
    begun: float = field(default_factory=time.monotonic)
    stamp: str = field(default_factory=lambda: time.strftime(STAMP))
    skipped: bool = False
    interrupted: bool = False

    def begin(self, jobs: Sequence[Job]) -> None:
        """Its jobs are in the queue. It may have been interrupted before."""
        self.jobs.extend(jobs)
        if self.interrupted:
            for job in jobs:
                job.interrupt()

    @property
    def current(self) -> Job | None:
        """The first job that has not ended."""
        return next((job for job in self.jobs if not job.has_ended), None)

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        shares = [1.0 if job.has_ended else job.step / job.steps if job.steps else 0.0 for job in self.jobs]
        return min(0.01 + sum(shares) / max(len(shares), 1), 1.0)

    def state(self) -> dict[str, Any]:
        """The web UI's description of it."""
        current = self.current
        return {
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "stopping_generation": False,
            "job": self.name,
            "job_count": len(self.jobs),
            "job_timestamp": self.stamp,
            "job_no": sum(job.has_ended for job in self.jobs),
            "sampling_step": current.step if current else 0,
            "sampling_steps": current.steps if current else 0,
        }


IDLE: dict[str, Any] = {**Task("", "").state(), "job_timestamp": "0"}


class Tasks:
    """All of them, in the order in which they came."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks: list[Task] = []

    @contextmanager
    def added(self, client: str, name: str) -> Iterator[Task]:
        """A task that is there as long as the context."""
        task = Task(client, name)
        self._tasks.append(task)
        try:
            yield task
        finally:
            self._tasks.remove(task)

    def oldest(self, client: str) -> Task | None:
        """The one of a client that is worked on; None if it has none."""
        return next((task for task in self._tasks if task.client == client and task.current), None)

    def interrupt(self, client: str) -> None:
        """Finish all that a client has in work early, and drop what waits."""
        for task in self._tasks:
            if task.client == client:
                task.interrupted = True
                self._engine.interrupt(task.jobs)

    def skip(self, client: str) -> None:
        """Finish the batch that a client has in work early; the next ones go on."""
        task = self.oldest(client)
        if task is not None and (job := task.current) is not None and job.state == "running":
            task.skipped = True
            self._engine.interrupt([job])

    async def progress(self, client: str, with_image: bool) -> dict[str, Any]:
        """The web UI's answer about the progress of a client's request; its image is a PIL image."""
        task = self.oldest(client)
        if task is None:
            return {"progress": 0.0, "eta_relative": 0.0, "state": IDLE, "current_image": None, "textinfo": None}
        job, image = task.current, None
        if job is not None and with_image:
            image = await _preview(job)
        progress, passed = task.progress, time.monotonic() - task.begun
        waits = job is not None and job.state == "waiting"
        return {
            "progress": progress,
            "eta_relative": passed / progress - passed,
            "state": task.state(),
            "current_image": image,
            "textinfo": "In the queue" if waits else None,
        }


async def _preview(job: Job) -> Any:
    """What the model expects after the current step, if that comes soon, or else after an earlier one."""
    before, until = job.previews, time.monotonic() + PATIENCE
    job.want_preview()
    while job.previews is before and job.state == "running" and time.monotonic() < until:
        await asyncio.sleep(LOOK)
    images = job.previews
    return grid(images) if len(images) > 1 else images[0] if images else None
