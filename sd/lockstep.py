"""Several runs of one model side by side: their evaluations of the U-Net are made together, in one batch.

    lockstep = Lockstep(model)
    lockstep.start(lambda model: model.txt2img("a red house", seed=1))
    lockstep.start(lambda model: model.img2img("a boat", photo, steps=30))      # anything that uses the model
    while lockstep.advance():                                                  # one evaluation of each
        ...                                                                    # others may start in between

A task is an ordinary function that is given the model. It runs until the model's `predict` is called; when all tasks
wait for that, the calls of one shape are evaluated together (runtime/together.py), and each task goes on with its own
output. Tasks may differ in prompts, seeds, samplers, steps and images, and begin and end at different times. Each gets
the images that it would get alone, to the bit.

Tasks run in threads, but only one at a time: a thread is here what a coroutine is elsewhere, as samplers call the
network from the middle of their loops. All networks run in one thread, that of the lockstep: each thread that calls
them would bring its own pool of threads for their kernels, which wait for work by keeping processors busy.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conditioning import Conditioning, Wrapper
from .pipeline import StableDiffusion
from .runtime.circular import is_circular
from .runtime.together import Batch, Together

Task = Callable[[StableDiffusion], Any]
PAYS = 1.1  # the gain from which tasks are worth being computed side by side
ELSEWHERE = ("encode", "decode", "encode_batches")  # methods of the model that run networks


class Stopped(BaseException):
    """Raised in a task that waits for the network when the lockstep is closed. No `except Exception` catches it."""


class Alone(NamedTuple):
    """An evaluation that is not made together with others."""

    run: Callable[[], Any]


class Turn:
    """A task in its thread, which runs only while it has the turn."""

    def __init__(self, model: StableDiffusion, task: Task) -> None:
        self.call: Batch | Alone | Callable[[], Any] | None = None  # an evaluation, or another call, that it waits for
        self.output: Any = None
        self.error: BaseException | None = None  # to raise where the task waits
        self.ended, self.result = False, None
        self.failure: BaseException | None = None
        self._mine, self._back = threading.Lock(), threading.Lock()  # each is released by the other thread
        self._mine.acquire()
        self._back.acquire()
        self._model, self._task = model, task
        threading.Thread(target=self._run, name="lockstep", daemon=True).start()

    def go_on(self) -> None:
        """Let the task run until it waits for the network, or ends."""
        self._mine.release()
        self._back.acquire()

    def wait_for(self, call: Batch | Alone | Callable[[], Any]) -> Any:
        """Called in the task: let others run until there is the output of a call."""
        self.call = call
        self._back.release()
        self._mine.acquire()
        self.call, output, error = None, self.output, self.error
        self.output = self.error = None
        if error is not None:
            raise error
        return output

    def _run(self) -> None:
        self._mine.acquire()
        try:
            self.result = self._task(self._model)
        except BaseException as error:
            self.failure = error
        self.ended = True
        del self._model, self._task  # what they hold is free
        self._back.release()


class Lockstep:
    """Tasks of one model. Its methods are called from one thread, in which the network runs."""

    def __init__(self, model: StableDiffusion) -> None:
        self.model = model
        self.turns: list[Turn] = []
        self._together = Together(model.unet, self._evaluate)

    def __len__(self) -> int:
        return len(self.turns)

    def start(self, task: Task) -> Turn:
        """Begin a task, up to its first evaluation. Its `ended`, `result` and `failure` say how it went.

        The model that it is given is the same one, but for the methods that run networks.
        """
        shared = copy.copy(self.model)
        turn = Turn(shared, task)

        def predict(x: Tensor, t: Tensor, conditioning: Conditioning, wrap: Wrapper | None = None) -> Tensor:
            more = () if wrap is None else (wrap,)  # another network, such as one that follows hints
            evaluate = partial(self.model.predict, x, t, conditioning, *more)
            if is_circular():  # a mode of this thread, in which it is evaluated when it has its turn
                turn.wait_for(Alone(lambda: None))
                return evaluate()
            output: Tensor = turn.wait_for(Alone(evaluate) if more else Batch(x, t, conditioning))
            return output

        shared.predict = predict  # type: ignore[method-assign]
        for name in ELSEWHERE:
            setattr(shared, name, _elsewhere(getattr(self.model, name), turn))
        self.turns.append(turn)
        self._go_on(turn)
        return turn

    def advance(self) -> bool:
        """Evaluate what the tasks wait for, and let each go on; False if there are none."""
        shapes: dict[object, list[Turn]] = {}
        for turn in self.turns:
            if isinstance(turn.call, Batch):
                shapes.setdefault(turn.call.shape(), []).append(turn)
            elif isinstance(turn.call, Alone):
                self._run(turn, turn.call.run)
        for waiting in shapes.values():
            self._answer(waiting)
        for turn in [*self.turns]:
            self._go_on(turn)
        return bool(self.turns)

    def pays(self) -> bool:
        """Whether one more task is worth it: what the tasks evaluate now is faster together than one after another.

        True as long as that is not known. Large images on a CPU gain nothing, and all would end later.
        """
        shapes = [turn.call.shape() for turn in self.turns if isinstance(turn.call, Batch)]
        return all((self._together.gain(shape) or PAYS) >= PAYS for shape in shapes)

    def close(self) -> None:
        """End all tasks: `Stopped` is raised where they wait."""
        while self.turns:
            for turn in [*self.turns]:
                turn.error = Stopped()
                self._go_on(turn)

    def _go_on(self, turn: Turn) -> None:
        """Let a task run until it waits for an evaluation, or ends; what else it calls is answered at once."""
        turn.go_on()
        while not turn.ended and not isinstance(turn.call, Batch | Alone):
            assert turn.call is not None
            self._run(turn, turn.call)
            turn.go_on()
        if turn.ended:
            self.turns.remove(turn)

    def _run(self, turn: Turn, call: Callable[[], Any]) -> None:
        """Give a task the result of a call, or its error."""
        try:
            with torch.no_grad():
                turn.output = call()
        except Exception as error:
            turn.error = error

    def _answer(self, waiting: list[Turn]) -> None:
        """Give each of these tasks its output, or the error of its evaluation."""
        calls = [turn.call for turn in waiting if isinstance(turn.call, Batch)]
        try:
            with torch.no_grad():
                outputs = self._together(calls)
        except Exception as error:  # out of memory, for example
            outputs = []
            if len(waiting) == 1:
                waiting[0].error = error
                return
        if not outputs:  # each alone may do, now that what the error held is free
            for turn in waiting:
                self._answer([turn])
            return
        for turn, output in zip(waiting, outputs, strict=True):
            turn.output = output

    def _evaluate(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.model.predict(x, t, conditioning)


def _elsewhere(method: Callable[..., Any], turn: Turn) -> Callable[..., Any]:
    """A method of the model that runs in the thread of the lockstep, unless it is called in a mode of its own."""

    def call(*args: Any, **named: Any) -> Any:
        return method(*args, **named) if is_circular() else turn.wait_for(partial(method, *args, **named))

    return call
