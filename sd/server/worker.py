"""A worker: the thread of one device, with the models that it keeps in memory."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
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

if TYPE_CHECKING:
    from .engine import Engine, Setup

log = logging.getLogger("sd.server")


class Worker:
    """Takes jobs from the engine and computes them side by side, on one device.

    is_ready   whether its first model is loaded
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.engine, self.device, self.is_ready = engine, device, False
        self._models: OrderedDict[object, Loaded] = OrderedDict()  # the one used last is the last
        self._thread = threading.Thread(target=self._work, name=f"worker {device}", daemon=True)
        self._stopping = False
        self._turns: dict[Turn, tuple[Job, Setup]] = {}
        self.failure = ""  # why the first model could not be loaded
        self._wishes: list[str] = []  # "unload", "load": done while there are no jobs
        self.exclusive = threading.Lock()  # held while the device is used: what is not a job takes it (inside/)

    def start(self) -> None:
        """Load the current model, then work."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current step; its jobs end as failed. Waits for the thread."""
        self._stopping = True
        self.engine.wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def unload(self) -> None:
        """Give back the memory of all models, as soon as no job runs. The next job loads its model again."""
        self._wish("unload")

    def reload(self) -> None:
        """Load the current model, as soon as no job runs, if it is not in memory."""
        self._wish("load")

    def _wish(self, wish: str) -> None:
        self._wishes = [*(other for other in self._wishes if other != wish), wish]
        self.engine.wake()

    @property
    def models(self) -> list[Loaded]:
        """The models in memory, the one used last at the end."""
        return list(self._models.values())

    def _work(self) -> None:
        from .engine import Setup

        try:
            with self.exclusive:
                self._loaded(Setup(self.engine.current))
            self.is_ready = True
        except Exception as error:
            self.failure = one_line(str(error), 500)
            log.error("the model %s cannot be loaded: %s", self.engine.current.name, self.failure)
        self.engine.wake()
        lockstep: Lockstep | None = None
        setup: Setup | None = None
        while not self._stopping:
            jobs = self.engine.take(setup if self._turns else None, self._room(lockstep), wait=not self._turns)
            with self.exclusive:
                if self._wishes and not self._turns:
                    lockstep = None
                    self._grant()
                if jobs and not self._turns:
                    setup = jobs[0][1]
                    lockstep = self._prepared(setup, [job for job, _ in jobs])
                if lockstep is not None:
                    for job, own in jobs:
                        if not job.has_ended:
                            self._begin(lockstep, job, own)
                    if self._turns:
                        begun = time.perf_counter()
                        lockstep.advance()
                        self.engine.totals.seconds += time.perf_counter() - begun
                        self._collect()
        if lockstep is not None:
            lockstep.close()
            self._collect()

    def _room(self, lockstep: Lockstep | None) -> int:
        """How many jobs to add to those that run."""
        if not self._turns or lockstep is None:
            return 1  # whether others beside it are worth it is seen by what it evaluates
        settings = self.engine.settings
        most = settings.together if lockstep.pays() and not settings.low_memory else 1
        return max(most - len(self._turns), 0)

    def _grant(self) -> None:
        """Do what `unload` and `reload` asked for."""
        from .engine import Setup

        wishes, self._wishes = self._wishes, []
        for wish in wishes:
            if wish == "unload":
                self._models.clear()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            try:
                self._loaded(Setup(self.engine.current))
            except Exception as error:
                log.error("the model %s cannot be loaded: %s", self.engine.current.name, one_line(str(error), 500))

    def _prepared(self, setup: Setup, jobs: list[Job]) -> Lockstep | None:
        """The model of a setup with its LoRAs; None if that fails, and with it the jobs."""
        try:
            loaded = self._loaded(setup)
            loaded.merge(setup.loras)
            return loaded.lockstep
        except Exception as error:
            for job in jobs:
                self._failed(job, setup, error)
            return None

    def _loaded(self, setup: Setup) -> Loaded:
        """The model of a setup, loaded if it is not in memory; the one used least recently makes room."""
        key = setup.model, setup.vae
        if key not in self._models:
            while len(self._models) >= self.engine.settings.resident:
                self._models.popitem(last=False)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            self._models[key] = load(setup, self.engine.settings, self.device)
        self._models.move_to_end(key)
        self._models[key].add_embeddings(self.engine.catalogue.entries("embedding"))
        return self._models[key]

    def _begin(self, lockstep: Lockstep, job: Job, setup: Setup) -> None:
        loaded = self._models[setup.model, setup.vae]

        def steps(step: Step) -> None:
            self.engine.totals.steps += 1

        def task(model: StableDiffusion) -> None:
            check_size(job.work.request, loaded.model.config.size, self.engine.settings)
            loaded.add_controls(job.work.request.controls, self.engine.catalogue)
            generate(job, setup, model, loaded, steps)

        self._turns[lockstep.start(task)] = job, setup
        self._collect()

    def _collect(self) -> None:
        """Take out the jobs that have ended."""
        for turn in [turn for turn in self._turns if turn.ended]:
            job, setup = self._turns.pop(turn)
            if turn.failure is None:
                self.engine.ended(job, "done")
            else:
                self._failed(job, setup, turn.failure)

    def _failed(self, job: Job, setup: Setup, error: BaseException) -> None:
        """Tell the client of a job why it failed; paths of this machine are no business of his."""
        if isinstance(error, Cancelled):
            self.engine.ended(job, "cancelled")
        elif isinstance(error, Stopped):
            self.engine.failed(job, "the server stopped before this was generated: send it again", "stopping")
        elif isinstance(error, ValueError | TypeError):
            text = one_line(str(error), 500)
            for entry in (setup.model, setup.vae, *(entry for entry, _ in setup.loras)):
                if entry is not None:
                    text = text.replace(str(entry.path), entry.name)
            self.engine.failed(job, text, "invalid")
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
