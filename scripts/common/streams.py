"""The standard streams and Ctrl-C of a program that runs in its own process.

A console is not always there. A program started by a service, by pythonw or with `2>&-` has streams that are None, and
the numbers of their closed files would go to the next files that it opens. A reader such as `head -1` closes its end
early. An encoding may lack most characters. None of these stops the work: what cannot be shown is dropped.

Imports only the standard library: a program calls `start` before it imports anything else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO, cast

INTERRUPTED = 130  # exit status, as shells report it: 128 + SIGINT


def start() -> None:
    """Prepare this process, before the slow imports: see `fill_closed_files` and `stop`.

    Ends it with a line if the current folder was removed: torch could not be imported.
    """
    fill_closed_files()
    try:
        os.getcwd()
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            os.write(2, b"error: the current folder does not exist any more: change to another one\n")
        raise SystemExit(1) from None
    with contextlib.suppress(ValueError):  # not the main thread: the signal is not ours
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # ignored signals (nohup) stay ignored
            signal.signal(signal.SIGINT, stop)


def fill_closed_files() -> None:
    """Open the null device under each of the numbers 0, 1 and 2 that is closed.

    Otherwise the next file that is opened gets the number, and what libraries print goes into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C while nothing needs to be cleaned up (imports, exit): one line, and the process ends at once."""
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this context Ctrl-C raises KeyboardInterrupt, also where `start` has replaced it by `stop`."""
    if signal.getsignal(signal.SIGINT) is not stop:  # called from Python: signals are the caller's
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, stop)


class SafeStream:
    """A text stream that never fails: characters that it lacks are escaped, and without a reader text is dropped."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._lost = stream, name, False
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it; returns its length."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try(self._stream.flush)

    def _try(self, action: Any) -> None:
        if self._lost:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: closed by another part of the program
            self._lost = True
            with contextlib.suppress(OSError, ValueError, AttributeError):
                # what is still in its buffer would fail again at exit
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            quiet = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EINVAL)  # EINVAL: on Windows
            if not quiet and self._name == "output" and sys.stderr is not None:
                reason = getattr(error, "strerror", None) or error
                sys.stderr.write(f"warning: the standard output cannot be written ({reason}): the work goes on\n")


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Within this context, sys.stdout and sys.stderr exist and never fail; afterwards they are what they were."""
    fill_closed_files()
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:

        def usable(stream: TextIO | None, name: str) -> TextIO:
            if stream is None:
                stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
            return stream if isinstance(stream, SafeStream) else cast(TextIO, SafeStream(stream, name))

        sys.stdout, sys.stderr = usable(sys.stdout, "output"), usable(sys.stderr, "errors")
        ours = sys.stdout, sys.stderr
        try:
            yield
        finally:
            for stream in ours:
                stream.flush()
            sys.stdout = before[0] if sys.stdout is ours[0] else sys.stdout
            sys.stderr = before[1] if sys.stderr is ours[1] else sys.stderr
