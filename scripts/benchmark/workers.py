"""Objects in other processes, called over a pipe.

Each side has its own threads, allocator and peak memory: while one works, all others sleep. The output of a process
goes to a file; its last line is shown if the process dies. A process that is killed, or whose parent has ended, takes
the processes that it has started with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from ..common import cli

PATIENCE = 10.0  # seconds to wait for a process to exit


class Failed(OSError):
    """A side could not be built or run, or gave a different result; the message names it and the reason in one line."""

    def __init__(self, who: str, why: str) -> None:
        super().__init__(f"{who} failed: {why}")
        self.who, self.why = who, why


class TooSlow(Failed):
    """A call took longer than its limit; its process was killed."""


class Worker:
    """The object `make(*arguments)` in a new process until the `with` block ends; `ask` calls its methods.

    name    its name in messages
    log     file for its output
    limit   seconds that `make` may take; None for no limit
    Raises Failed if `make` or a method raises or takes too long, or the process dies.
    """

    def __init__(
        self, name: str, log: Path, make: Callable[..., Any], *arguments: Any, limit: float | None = None
    ) -> None:
        self.name, self.log = name, log
        log.write_bytes(b"")  # clear the output of an earlier process
        new = multiprocessing.get_context("spawn")  # thread pools do not survive a fork
        self._pipe, theirs = new.Pipe()
        self._process = new.Process(target=_serve, args=(theirs, log, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer(limit)
        except BaseException:
            self.close(patience=0)
            raise

    def ask(self, method: str, *arguments: Any, limit: float | None = None) -> Any:
        """Call a method and return its result; both arguments and result must be picklable.

        limit   seconds that the call may take, after which the process is killed; None for no limit
        """
        try:
            self._pipe.send((method, arguments))
        except OSError:  # it died since the last call, for example while another side was being built
            raise self._died() from None
        return self._answer(limit)

    def _answer(self, limit: float | None) -> Any:
        try:
            answered = self._pipe.poll(limit)  # None: no limit
            result, failure = self._pipe.recv() if answered else (None, None)
        except (EOFError, OSError):
            raise self._died() from None
        if not answered:
            self.close(patience=0)
            raise TooSlow(self.name, f"stopped after {limit:.3g} s, its time limit")
        if failure:
            raise Failed(self.name, failure)
        return result

    def _died(self) -> Failed:
        self._process.join(PATIENCE)
        return Failed(self.name, self._last_words())

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return last_words(self._process.exitcode, lines)

    def close(self, patience: float = PATIENCE) -> None:
        """End the process; after `patience` seconds by force, with the processes that it has started."""
        self._pipe.close()
        self._process.join(patience)
        if self._process.exitcode is None:
            if hasattr(os, "killpg") and self._process.pid:
                with suppress(OSError):  # it has not made its group yet
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join(PATIENCE)  # not for ever: in a driver that hangs, a process does not even die

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(patience=PATIENCE if kind is None else 0)


def last_words(code: int | None, lines: Sequence[str]) -> str:
    """Why a process ended, in one line: its signal, or else the last line that it printed.

    code   its exit code, negative for a signal, None if unknown
    """
    if code == -9:
        return "the system stopped it, as it does when memory runs out"
    if code is not None and code < 0:  # its output does not explain a signal
        return f"its process died (signal {-code})"
    return lines[-1] if lines else f"its process ended with status {code}"


def _serve(pipe: Connection, log: Path, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The main loop of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # `Worker.close` ends the whole group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    made, failure = _attempt(make, arguments)
    pipe.send((None, failure))
    while not failure:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_attempt(getattr(made, method), arguments))


def _end_with_parent() -> None:
    """Wait for the end of the parent process, however it ends, and end this process with those that it has started."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None]:
    """(result, None), or (None, error message)."""
    try:
        return function(*arguments), None
    except Exception as error:
        usual = isinstance(error, (ValueError, OSError, ArithmeticError))
        said = (cli.describe(error) if usual else str(error)).strip().partition("\n")[0]
        return None, said if usual and said else f"{type(error).__name__}: {said}"
