"""The queue of jobs, and the workers that take from it: one for each device.

    client -> `submit` -> queue (bounded, the clients in turn) -> worker (worker.py) -> events of the job

A worker computes jobs side by side if they use the same model and LoRAs (`lockstep`): the first in the queue, and those
behind it that fit. A job that does not fit is not overtaken for long: once it is first, no others are added.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..params import TextToImage
from ..request_texts import all_texts, without_lora_tags
from ..runtime.device import find_device
from ..text.prompt_tags import lora_weight, take_loras
from .catalogue import Catalogue, Entry
from .jobs import ENDS, Job, Work
from .limits import check_weights, check_work
from .settings import ServerSettings
from .worker import Worker

STOPPING = 30.0  # seconds in which a worker must stop: a step, or the loading of a model
INTAKE = 4  # requests whose images are decoded at once
RECENT = 50  # jobs whose duration the next ones are estimated by


class Busy(Exception):
    """The queue is full, or the server stops. `retry_after` in seconds; None if it makes no sense to try again."""

    def __init__(self, message: str, retry_after: int | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Setup(NamedTuple):
    """What jobs that are computed side by side have in common."""

    model: Entry
    loras: tuple[tuple[Entry, float], ...] = ()
    vae: Entry | None = None
    alone: object = None  # of a job that is computed alone: equal to no other


@dataclass
class Totals:
    """What happened since the start."""

    accepted: int = 0
    refused: int = 0
    ended: Counter[str] = field(default_factory=Counter)  # by state
    images: int = 0
    steps: int = 0
    seconds: float = 0.0  # that workers were busy


class Engine:
    """Accepts jobs, and has them done.

    current   the model of requests that name none
    totals    counts, for metrics
    seen      called in the worker's thread with each job when it ends
    """

    def __init__(self, settings: ServerSettings, seen: Callable[[Job], object] = lambda job: None) -> None:
        self.settings, self.seen = settings, seen
        self.catalogue = Catalogue(settings)
        self.current = self.catalogue.default
        self.totals = Totals()
        self.intake = asyncio.Semaphore(INTAKE)  # held by those who decode the images of a request
        self._waiting: deque[tuple[Job, Setup]] = deque()
        self._running: list[Job] = []
        self._over: weakref.WeakSet[Job] = weakref.WeakSet()  # that have ended, as far as somebody still has them
        self._changed = threading.Condition()
        self._accepts = True
        self._durations: deque[float] = deque(maxlen=RECENT)
        devices = settings.device or ("",)
        self.workers = [Worker(self, find_device(name or None)) for name in devices]

    # ------------------------------------------------------------------------------------------- for the routes

    def start(self) -> None:
        """Start the workers, each of which loads the current model. Returns at once."""
        for worker in self.workers:
            worker.start()

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded, and jobs are accepted."""
        return self._accepts and any(worker.is_ready and worker.is_alive for worker in self.workers)

    @property
    def is_stopping(self) -> bool:
        """Whether it accepts no more jobs."""
        return not self._accepts

    async def submit(self, works: Sequence[Work], client: str) -> list[Job]:
        """Put work into the queue, all or nothing; returns its jobs.

        client   whose work it is: so that one cannot fill the queue

        Raises Busy if there is no room, and ValueError for work that names what is not there, or exceeds the limits.
        """
        setups = await asyncio.to_thread(lambda: [self._checked(work) for work in works])
        jobs = [Job(work, client) for work, _ in setups]
        with self._changed:
            if not self._accepts:
                self.totals.refused += len(jobs)
                raise Busy("the server is stopping", None)
            self._check_room(jobs)
            self.totals.accepted += len(jobs)
            self._waiting += zip(jobs, (setup for _, setup in setups), strict=True)
            self._changed.notify_all()
        return jobs

    def _check_room(self, jobs: Sequence[Job]) -> None:
        """Raise Busy if these jobs of one client would be too many, or their images too large, for the queue."""
        settings, waiting = self.settings, [job for job, _ in self._waiting]
        own = [job for job in waiting if job.client == jobs[0].client] if jobs else []
        most = settings.max_waiting_pixels
        message = ""
        if len(waiting) + len(jobs) > settings.queue or len(own) + len(jobs) > settings.queue_per_client:
            whose = "the queue is full" if len(waiting) + len(jobs) > settings.queue else "too many of your jobs wait"
            message = f"{whose}: {len(own)} of yours, {len(waiting)} in all; try again later"
        elif pixels([*waiting, *jobs]) > most or pixels([*own, *jobs]) > max(most // 2, pixels(jobs)):
            message = "the images of the jobs that wait are too large together: try again later"
        if message:
            self.totals.refused += len(jobs)
            raise Busy(message, self.retry_after())

    def retry_after(self) -> int:
        """Seconds after which some of the jobs that wait now will have ended, by the durations of recent ones."""
        mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
        ahead = len(self._waiting) / 2 / max(len(self.workers) * self.settings.together, 1)
        return max(1, min(round(mean * ahead), 600))

    def jobs(self) -> list[Job]:
        """Those that run, then those that wait, in the order in which they will be taken."""
        with self._changed:
            return [*self._running, *(job for job, _ in self._in_turn(self._waiting))]

    def interrupt(self, jobs: Sequence[Job]) -> None:
        """Finish jobs early; see `Job.interrupt`."""
        for job in jobs:
            job.interrupt()
        self.wake()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs whose client went away, or does not want them any more."""
        for job in jobs:
            job.cancel()
        self.wake()

    def drain(self) -> None:
        """Accept no more jobs. Those in the queue are still done. Safe in a signal handler's thread."""
        self._accepts = False
        self.wake()

    def close(self, grace: float | None = None) -> None:
        """Accept no more, wait for accepted jobs at most `grace` seconds, fail the others, stop the workers."""
        self.drain()
        until = time.monotonic() + (self.settings.grace if grace is None else grace)
        with self._changed:
            while (self._waiting or self._running) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            unfinished = [job for job, _ in self._waiting]
            self._waiting.clear()
        for worker in self.workers:
            worker.stop(STOPPING)
        for job in [*unfinished, *self._running]:  # the latter if a worker takes too long to stop
            self.failed(job, "the server stopped before this was generated: send it again", "stopping")

    # ------------------------------------------------------------------------------------------- for workers

    def wake(self) -> None:
        """Let those who wait for a change look again."""
        with self._changed:
            self._changed.notify_all()

    def take(self, setup: Setup | None, room: int, wait: bool) -> list[tuple[Job, Setup]]:
        """The next jobs for a worker, at most `room`: all of one setup.

        setup   of the jobs that it computes already; None if there are none
        wait    until there is one, `wake` is called, or a second is over
        """
        dropped: list[Job] = []
        with self._changed:
            if wait and not self._waiting:
                self._changed.wait(1)  # not for ever: it may have been woken just before
            waiting = [*self._waiting]
            dropped = [job for job, _ in waiting if job.is_cancelled or job.is_interrupted]
            waiting = [pair for pair in waiting if pair[0] not in dropped]
            taken, order = [], self._in_turn(waiting)
            if order and setup in (None, order[0][1]):
                taken = [pair for pair in order if pair[1] == order[0][1]][:room]
            self._waiting = deque(pair for pair in waiting if pair not in taken)
            self._running += [job for job, _ in taken]
        for job in dropped:
            self.ended(job, "cancelled")
        return taken

    def _in_turn(self, waiting: Iterable[tuple[Job, Setup]]) -> list[tuple[Job, Setup]]:
        """Jobs in the order in which they are taken: the first of each client, then the second of each, ...

        Those of a client that run already count as well: who asks for much does not keep others waiting.
        """
        ahead = Counter(job.client for job in self._running)
        ranked = []
        for pair in waiting:
            ranked.append((ahead[pair[0].client], pair))
            ahead[pair[0].client] += 1
        return [pair for _, pair in sorted(ranked, key=lambda ranked: ranked[0])]

    def worked(self, steps: int, seconds: float) -> None:
        """Count what a worker did."""
        with self._changed:
            self.totals.steps += steps
            self.totals.seconds += seconds

    def ended(self, job: Job, state: str) -> None:
        """A job has ended: count it, and tell its client. Nothing happens if it had ended before."""
        assert state in ENDS
        with self._changed:
            if job in self._over:
                return
            self._over.add(job)
            if job in self._running:
                self._running.remove(job)
            self.totals.ended[state] += 1
            if state == "done" and job.finished is not None:
                self.totals.images += len(job.finished.images)
                self._durations.append(time.monotonic() - job.started)
            self._changed.notify_all()
        job.report(state, job.step, job.steps)  # type: ignore[arg-type]
        self.seen(job)

    def failed(self, job: Job, error: str, fault: str) -> None:
        """A job has failed: say why."""
        if not job.has_ended:
            job.error, job.fault = error, fault  # type: ignore[assignment]
        self.ended(job, "failed")

    # ------------------------------------------------------------------------------------------- checks

    def _checked(self, work: Work) -> tuple[Work, Setup]:
        """The work without tags in its prompt, and the files that it names. Raises ValueError."""
        check_work(work, self.settings)
        find = self.catalogue.find
        weights: dict[Entry, float] = {}
        for name, weight in (*work.loras, *tags_of(work.request)):
            entry = find("lora", name)
            weights[entry] = weights.get(entry, 0.0) + weight  # named twice
        check_weights({entry.name: weight for entry, weight in weights.items()})
        setup = Setup(
            self.current if work.model is None else find("model", work.model),
            tuple(weights.items()),
            None if work.vae is None else find("vae", work.vae),
            None if work.watcher is None else object(),
        )
        for control in work.request.controls:
            find("control", control.name)
        return replace(work, request=without_lora_tags(work.request)), setup


def pixels(jobs: Iterable[Job]) -> int:
    """The pixels of all images in the requests of jobs; one that several have counts once."""
    found: dict[int, int] = {}
    for job in jobs:
        request = job.work.request
        images = [getattr(request, name, None) for name in ("image", "mask")]
        for image in [*images, *(control.image for control in request.controls)]:
            if image is not None:
                found[id(image)] = image.width * image.height
    return sum(found.values())


def tags_of(request: TextToImage) -> list[tuple[str, float]]:
    """The LoRAs that the prompts of a request name, and their weights. Raises ValueError for a wrong weight."""
    if not request.web_ui_prompts:
        return []
    tags = [tag for text in all_texts(request)[0] for tag in take_loras(text)[1]]
    return [(tag.name, lora_weight(tag)) for tag in tags]
