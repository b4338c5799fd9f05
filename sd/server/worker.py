"""A worker: the thread of one device, with the models that it keeps in memory."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from ..lockstep import Lockstep, Stopped, Turn
from ..messages import is_out_of_memory, one_line
from ..pipeline import StableDiffusion
from ..samplers import Step
from .generation import Cancelled, generate
from .jobs import Job
from .limits import check_size
from .loaded import Loaded, load
from .public import public_text

if TYPE_CHECKING:
    from .engine import Engine, Setup

log = logging.getLogger("sd.server")


class Worker:
    """Takes jobs from the engine and computes them side by side, on one device.

    is_ready   whether its first model is loaded
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.engine, self.device, self.is_ready = engine, device, False
        self.failure = ""  # why the first model could not be loaded
        self.models: tuple[Loaded, ...] = ()  # those in memory, the one used last at the end
        self._models: OrderedDict[object, Loaded] = OrderedDict()  # the same by setup, for this thread alone
        self._thread = threading.Thread(target=self._work, name=f"worker {device}", daemon=True)
        self._stopping = False
        self._lockstep: Lockstep | None = None  # of the model whose jobs run
        self._turns: dict[Turn, tuple[Job, Setup]] = {}
        self._ordering = threading.Lock()
        self._orders: list[str] = []  # "unload", "load": done while there are no jobs

    def start(self) -> None:
        """Load the current model, then work."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    def stop(self, seconds: float) -> None:
        """End after the current step; its jobs end as failed. Waits for the thread, at most so long."""
        self._stopping = True
        self.engine.wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def unload(self) -> None:
        """Give back the memory of all models, as soon as no job runs. The next job loads its model again."""
        self._order("unload")

    def reload(self) -> None:
        """Load the current model, as soon as no job runs, if it is not in memory."""
        self._order("load")

    def _order(self, order: str) -> None:
        with self._ordering:
            self._orders = [*(other for other in self._orders if other != order), order]
        self.engine.wake()

    def _work(self) -> None:
        from .engine import Setup

        try:
            self._loaded(Setup(self.engine.current))
        except Exception as error:
            self.failure = one_line(str(error), 500)
            log.error("the model %s cannot be loaded: %s", self.engine.current.name, self.failure)
        self.engine.wake()
        setup: Setup | None = None
        while not self._stopping:
            others = any(worker.is_ready for worker in self.engine.workers if worker is not self)
            if self.failure and others:  # a device that does not work must not take the jobs of those that do
                time.sleep(1)
                continue
            jobs = self.engine.take(setup if self._turns else None, self._room(), wait=not self._turns)
            setup = jobs[0][1] if jobs else setup
            try:
                self._pass(jobs)
            except BaseException as error:  # whatever it is, others must get their answers
                log.error("the worker of %s starts again", self.device, exc_info=error)
                self._start_again(jobs, error)
        if self._lockstep is not None:
            self._lockstep.close()
            self._collect()

    def _pass(self, jobs: list[tuple[Job, Setup]]) -> None:
        """Begin these jobs, all of one setup, and take a step of all that run."""
        if not self._turns and (self._orders or jobs):
            self._lockstep = None  # else it would keep a model in memory that makes room
            self._carry_out_orders()
        if jobs and not self._turns:
            self._lockstep = self._prepared(jobs[0][1], [job for job, _ in jobs])
        for job, own in jobs:
            if self._lockstep is not None and not job.has_ended:
                self._begin(self._lockstep, job, own)
        if self._turns and self._lockstep is not None:
            begun = time.perf_counter()
            self._lockstep.advance()
            self.engine.worked(0, time.perf_counter() - begun)
            self._collect()

    def _start_again(self, jobs: list[tuple[Job, Setup]], error: BaseException) -> None:
        """After an error of our own: fail all jobs, and forget the models."""
        running = [*self._turns.values()]
        self._turns.clear()
        if self._lockstep is not None:
            with suppress(Exception):  # its tasks must not wait for ever
                self._lockstep.close()
        self._lockstep = None
        self._forget(*self._models)
        for job, setup in (*running, *jobs):
            self._failed(job, setup, RuntimeError(f"the worker failed: {error!r:.200}"))

    def _room(self) -> int:
        """How many jobs to add to those that run."""
        lockstep = self._lockstep
        if not self._turns or lockstep is None:
            return 1  # whether others beside it are worth it is seen by what it evaluates
        settings = self.engine.settings
        most = settings.together if lockstep.pays() and not settings.low_memory else 1
        return max(most - len(self._turns), 0)

    def _carry_out_orders(self) -> None:
        """Do what `unload` and `reload` asked for."""
        from .engine import Setup

        with self._ordering:
            orders, self._orders = self._orders, []
        for order in orders:
            if order == "unload":
                self._forget(*self._models)
                continue
            try:
                self._loaded(Setup(self.engine.current))
            except Exception as error:
                log.error("the model %s cannot be loaded: %s", self.engine.current.name, one_line(str(error), 500))

    def _prepared(self, setup: Setup, jobs: list[Job]) -> Lockstep | None:
        """The model of a setup with its LoRAs; None if that fails, and with it the jobs."""
        try:
            loaded = self._loaded(setup)
            loaded.drop_controls()
            loaded.merge(setup.loras)
            return loaded.lockstep
        except Exception as error:
            key = setup.model, setup.vae
            if key in self._models and self._models[key].loras is None:  # half merged: not to be used any more
                self._forget(key)
            for job in jobs:
                self._failed(job, setup, error)
            return None

    def _loaded(self, setup: Setup) -> Loaded:
        """The model of a setup, loaded if it is not in memory; the one used least recently makes room."""
        key = setup.model, setup.vae
        if key not in self._models:
            self._forget(*list(self._models)[: len(self._models) + 1 - self.engine.settings.resident])
            self._models[key] = load(setup, self.engine.settings, self.device)
            self.is_ready, self.failure = True, ""
        self._models.move_to_end(key)
        self._models[key].add_embeddings(self.engine.catalogue.entries("embedding"))
        self.models = tuple(self._models.values())  # from here on, others see it, with its words
        return self._models[key]

    def _forget(self, *keys: object) -> None:
        """Take models out of memory."""
        for key in keys:
            del self._models[key]
        self.models = tuple(self._models.values())
        if keys:
            gc.collect()  # tracebacks of failed jobs hold what they used, in circles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _begin(self, lockstep: Lockstep, job: Job, setup: Setup) -> None:
        loaded = self._models[setup.model, setup.vae]

        def steps(step: Step) -> None:
            self.engine.worked(1, 0.0)

        def task(model: StableDiffusion) -> None:
            check_size(job.work.request, loaded.model.config.size, self.engine.settings)
            loaded.add_controls(job.work.request.controls, self.engine.catalogue)
            generate(job, setup, model, loaded, steps)

        try:
            self._turns[lockstep.start(task)] = job, setup
        except Exception as error:  # no thread can be started
            self._failed(job, setup, error)
        self._collect()

    def _collect(self) -> None:
        """Take out the jobs that have ended."""
        for turn in [turn for turn in self._turns if turn.ended]:
            job, setup = self._turns.pop(turn)
            failure, turn.failure = turn.failure, None  # which holds all that the job used
            if failure is None:
                self.engine.ended(job, "done")
            else:
                self._failed(job, setup, failure)

    def _failed(self, job: Job, setup: Setup, error: BaseException) -> None:
        """Tell the client of a job why it failed."""
        if isinstance(error, Cancelled):
            self.engine.ended(job, "cancelled")
        elif isinstance(error, Stopped):
            self.engine.failed(job, "the server stopped before this was generated: send it again", "stopping")
        elif isinstance(error, ValueError | TypeError):
            hints = {control.name for control in job.work.request.controls}
            controls = [entry for entry in self.engine.catalogue.entries("control") if entry.name in hints]
            files = [setup.model, *([setup.vae] if setup.vae else []), *(entry for entry, _ in setup.loras), *controls]
            self.engine.failed(job, public_text(error, files), "invalid")
        elif isinstance(error, ArithmeticError):  # raised by the library for images that are not finite
            log.warning("job %s: %s", job.id, one_line(str(error), 300))
            self.engine.failed(
                job,
                "the image has numbers that are not finite: use less guidance, or smaller weights of LoRAs and words; "
                "if other settings fail as well, the model is damaged",
                "invalid",
            )
        elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            self.engine.failed(job, "out of memory: ask for a smaller image, or fewer at once", "memory")
        else:
            log.error("job %s failed", job.id, exc_info=error)
            self.engine.failed(job, "an internal error: see the log of the server", "internal")
