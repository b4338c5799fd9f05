"""What all programs share: errors in one line, exit statuses, and the memory allocator."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import gc
import re
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line instead of with the whole usage."""

    def named(self, argv: list[str] | None) -> set[str]:
        """The names of the arguments that are given, with whatever value: also if it is the default."""
        absent = object()
        appended = {
            action.dest: None if isinstance(action, argparse._AppendAction) else absent for action in self._actions
        }
        found = self.parse_intermixed_args(argv, argparse.Namespace(**appended))
        return {
            name for name, value in vars(found).items() if value is not absent and value is not None and value != []
        }

    def error(self, message: str) -> NoReturn:
        """Exit with status 2. For a misspelt option, suggest the closest one."""
        words = message.split()
        if message.startswith("unrecognized arguments: -"):
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(words[2].partition("=")[0].replace("_", "-"), known, n=1)
            message += f": did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message} (see --help)\n")


OUT_OF_MEMORY = (
    "out of memory: try --batch-size 1, a smaller --height and --width, --dtype float16 or bfloat16, or --device cpu"
)


def run(
    work: Callable[[argparse.Namespace], None],
    parser: Parser,
    argv: list[str] | None = None,
    out_of_memory: str = OUT_OF_MEMORY,
) -> int:
    """Parse, work, and report errors that are not the fault of the program in one line. Returns the exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # a file name that the terminal cannot show must not stop the program
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parser.parse_intermixed_args(argv)  # allows options between positional arguments
    args.named = parser.named(argv)
    if not gc.get_freeze_count():  # a million objects of imports stay: not scanning them saves 0.3 s
        gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = say
        said.clear()
        try:
            work(args)
        except KeyboardInterrupt:
            tqdm.write("stopped", file=sys.stderr)
            return 130
        except (ValueError, OSError, ArithmeticError) as error:
            return fail(describe(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            return fail(out_of_memory)
    return 0


said: set[str] = set()  # warnings already shown; cleared where they may be shown again


def say(message: Warning | str, *_: object, **__: object) -> None:
    """Show a warning in one line, once."""
    if str(message) not in said:
        said.add(str(message))
        tqdm.write(f"warning: {message}", file=sys.stderr)


def fail(message: str, status: int = 1) -> int:
    """Print an error in one line; returns the exit status."""
    tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def describe(error: Exception) -> str:
    """The message of an error; for one of the operating system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a RuntimeError is the device's or the CPU allocator's "no memory"."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return True
    return bool(
        re.search("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", str(error), re.IGNORECASE)
    )


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, because the next step allocates the same sizes again.

    By default it returns them to the system, which clears every page when they are allocated again. This saves 2 to
    11 % of a U-Net step on the CPU and 17 to 28 % of the VAE, at the cost of a few hundred MB. Does nothing on systems
    other than Linux with glibc.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)
