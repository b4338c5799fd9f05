"""Jobs: what a client asks for, and how far it is.

    work = Work(TextToImage("a house"), loras=(("style", 0.8),))
    (job,) = engine.submit([work], client="...")         # engine.py
    async for event in job.events(): ...                 # steps, with previews if wanted, until the end
    job.finished                                         # images, seeds, notes, and the text of each image

A job is changed by its worker alone, in its thread; others read it, ask it to stop, and are told by events.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from PIL import Image

from ..params import TextToImage

if TYPE_CHECKING:
    from ..pipeline import StableDiffusion
    from ..run import Run
    from ..samplers import Step
    from .loaded import Loaded

State = Literal["waiting", "running", "done", "failed", "cancelled"]
BACKLOG = 4  # events that a slow listener has still to be told, at most, besides the end
ENDS = ("done", "failed", "cancelled")
# of a job that failed: the client's mistake, too little memory, ours, or that the server stops
Fault = Literal["invalid", "memory", "internal", "stopping"]


class Watcher(Protocol):
    """Looks at the run of a job from inside (inside/). Called in the thread of its worker."""

    def watching(self, model: StableDiffusion) -> AbstractContextManager[StableDiffusion]:
        """Until the job has ended: the model to generate with. It may have hooks in its networks."""

    def begin(self, run: Run, loaded: Loaded) -> None:
        """Called before the first step."""

    def see(self, step: Step) -> None:
        """Called after each step, before the job reports it."""


@dataclass(frozen=True)
class Work:
    """What a client asks for: a request of the library, with one prompt, and what it is generated with.

    model      name, title or hash of a model in the catalogue; None is the current one
    loras      (name in the catalogue, weight) of each LoRA, besides those that the prompt names: with
               `request.web_ui_prompts`, tags such as <lora:style:0.8> are taken out of it
    vae        name of a VAE in the catalogue that replaces the model's; None: its own
    previews   make a preview at every k-th step; 0: none
    watcher    looks at the run; such a job is computed alone, as hooks would see the runs beside it
    """

    request: TextToImage
    model: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    vae: str | None = None
    previews: int = 0
    watcher: Watcher | None = None


class Finished(NamedTuple):
    """The result of a job."""

    images: list[Image.Image]
    seeds: list[int]
    variation_seeds: list[int]  # as many as images; empty without a variation
    texts: list[str]  # the "parameters" of each image
    notes: list[str]  # what was cut, chosen or retried, one line each
    model: str  # title of the model
    model_hash: str
    seconds: float
    interrupted: bool = False  # after fewer steps than asked for
    tokens: int = 0  # of the prompt
    factor: int = 8  # pixels for each position of the latents, in each direction


class Event(NamedTuple):
    """Something that happened to a job: its state, and the steps taken so far."""

    state: State
    step: int
    steps: int
    previews: Sequence[Image.Image] = ()  # of each image of the batch, as the model expects it after this step


class Listener:
    """The events that one listener has not read yet, in its event loop. A slow one misses steps, but not the end."""

    def __init__(self) -> None:
        self.loop, self.events = asyncio.get_running_loop(), deque[Event]()
        self.changed = asyncio.Event()

    def tell(self, event: Event) -> None:
        """Called in any thread."""
        with suppress(RuntimeError):  # the loop has been closed
            self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if len(self.events) >= BACKLOG and self.events[-1].state == "running":
            self.events.pop()
        self.events.append(event)
        self.changed.set()

    async def next(self) -> Event:
        """The next one, as soon as there is one."""
        while not self.events:
            self.changed.clear()
            await self.changed.wait()
        return self.events.popleft()


@dataclass(eq=False)
class Job:
    """A piece of work in the queue, at work, or done."""

    work: Work
    client: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = "waiting"
    step: int = 0
    steps: int = 0  # 0 before it starts
    previews: Sequence[Image.Image] = ()
    finished: Finished | None = None  # once it is done
    error: str = ""  # one line, once it has failed
    fault: Fault = "internal"
    created: float = field(default_factory=time.monotonic)
    started: float = 0.0
    ended: float = 0.0
    is_cancelled: bool = False  # asked for; see `cancel`
    is_interrupted: bool = False  # asked for; see `interrupt`
    is_preview_wanted: bool = False  # asked for; see `want_preview`
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listeners: list[Listener] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state in ENDS

    def cancel(self) -> None:
        """Drop it: at once if it waits, after the current step if it runs. It ends as "cancelled", without images."""
        self.is_cancelled = True

    def interrupt(self) -> None:
        """Finish it early: its images are what the model expects after the current step. A waiting job is dropped."""
        self.is_interrupted = True

    def want_preview(self) -> None:
        """Make `previews` once, after the current step, whatever `work.previews` says."""
        self.is_preview_wanted = True

    def report(self, state: State, step: int = 0, steps: int = 0, previews: Sequence[Image.Image] = ()) -> None:
        """Called by its worker: change state and steps, and tell those who listen."""
        with self._lock:
            self.state, self.step, self.steps = state, step, steps
            self.previews = previews or self.previews
            if state == "running" and not self.started:
                self.started = time.monotonic()
            if state in ENDS:
                self.ended = time.monotonic()
            for listener in self._listeners:
                listener.tell(Event(state, step, steps, previews))

    async def events(self) -> AsyncIterator[Event]:
        """Its present state, then whatever happens, until it has ended; some steps are left out if you are slow."""
        here = Listener()
        with self._lock:
            event = Event(self.state, self.step, self.steps, self.previews)
            self._listeners.append(here)
        try:
            while True:
                yield event
                if event.state in ENDS:
                    return
                event = await here.next()
        finally:
            with self._lock:
                self._listeners.remove(here)

    async def end(self) -> Job:
        """Wait until it has ended; returns the job itself."""
        async for _ in self.events():
            pass
        return self
