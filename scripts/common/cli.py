"""What all programs share: paths, errors in one line, exit statuses, and the memory allocator."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from sd.messages import is_out_of_memory

from .spellings import instead_of
from .streams import INTERRUPTED, interruptible, standard_streams

TEXT = "TEXT"  # metavar of options whose value is any text
PLAIN = "\0"  # before a word that is no option; no argument of a process can contain it


class PathError(argparse.ArgumentTypeError, ValueError):
    """A text that is not a path on this machine."""


def home(text: str) -> str:
    """A path, or FILE:WEIGHT or NAME=FILE, with a leading "~" expanded: not all shells do it, and none in --a=~/b.

    Raises PathError for an empty path (`--out "$FOLDER"` without a value), which would be the current folder; for URLs;
    and for the home folder of an unknown user, which would be a folder called "~name".
    """
    name, equals, file = text.partition("=")
    if equals and not re.search(r"[/\\]", name):
        return f"{name}={_expanded(file)}" if file.startswith("~") else text
    return _expanded(text)


def file_path(text: str) -> Path:
    """The type of every argument that is a path: see `home`."""
    return Path(_expanded(text))


def _expanded(text: str) -> str:
    if not text:
        raise PathError("the path is empty: give the name of a file or folder")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise PathError(f"{text}: URLs are not fetched; give a path on this machine")
    path = os.path.expanduser(text)
    first = (Path(path).parts or (path,))[0]
    if first.startswith("~") and not os.path.lexists(first):
        raise PathError(f"{text}: there is no home folder {first}: give the whole path")
    return path


def readable(text: str) -> str:
    """A text of the command line, read as UTF-8 where the encoding of the locale (LC_ALL=C) lacks its letters."""
    if not any("\udc80" <= letter <= "\udcff" for letter in text):  # bytes that could not be decoded
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line instead of with the whole usage.

    The value of an option for text (metavar TEXT) may begin with "-", as in --negative -blurry.
    """

    given: Sequence[str] = ()  # the arguments of the last call

    def __init__(self, **settings: Any) -> None:
        """Options are written in full: abbreviated, `--ti file.pt` would be --tileable and a prompt."""
        super().__init__(allow_abbrev=False, **settings)

    def parse_words(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse arguments; options may stand between positional ones, and none after "--"."""
        self.given = self._joined(list(sys.argv[1:] if argv is None else argv))
        args = self._parsed()
        for action in self._actions:
            if action.metavar == TEXT and isinstance(text := getattr(args, action.dest, None), str):
                setattr(args, action.dest, readable(text))
        return args

    def _parsed(self) -> argparse.Namespace:
        if "--" not in self.given:
            return self.parse_intermixed_args(self.given)
        at = list(self.given).index("--")  # argparse forgets it between its two passes: the words are marked instead
        args = self.parse_intermixed_args([*self.given[:at], *(PLAIN + word for word in self.given[at + 1 :])])
        for name, value in vars(args).items():
            if isinstance(value, list):
                setattr(args, name, [v.removeprefix(PLAIN) if isinstance(v, str) else v for v in value])
            elif isinstance(value, Path):
                setattr(args, name, Path(str(value).removeprefix(PLAIN)))
        return args

    def _joined(self, argv: list[str]) -> list[str]:
        """The arguments with `--negative -blurry` as `--negative=-blurry`: argparse would take the text for an option.

        A text with two dashes may be a misspelt option, so it is left. `--cfg_scale` is `--cfg-scale`, as in Python.
        """
        names = {name: action for action in self._actions for name in action.option_strings}
        out: list[str] = []
        for i, word in enumerate(argv):
            if word == "--":
                return out + argv[i:]
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in names and (dashed := name.replace("_", "-")) in names:
                word = dashed + equals + value
            before = names.get(out[-1]) if out else None
            is_text = before is not None and before.metavar == TEXT and before.nargs is None
            if is_text and re.match("-[^-]", word) and word.partition("=")[0] not in names:
                out[-1] += f"={word}"
            else:
                out.append(word)
        return out

    def named(self) -> set[str]:
        """The names of the options in the last call, with whatever value: also if it is the default."""
        words = list(self.given)
        words = words[: words.index("--")] if "--" in words else words
        absent = object()
        appended = {
            action.dest: None if isinstance(action, argparse._AppendAction) else absent for action in self._actions
        }
        found = self.parse_intermixed_args(words, argparse.Namespace(**appended))
        return {
            name for name, value in vars(found).items() if value is not absent and value is not None and value != []
        }

    def fits(self, name: str, value: object) -> bool:
        """Whether a value read from a file can be the default of an argument: a number, text or flag where it is one.

        True for a name that is no argument.
        """
        for action in self._actions:
            if action.dest == name and value is not None:
                values = value if isinstance(value, list) and action.nargs not in (None, 0) else [value]
                numbers = action.type in (int, float)
                kind = bool if action.nargs == 0 else (int, float) if numbers else str
                return all(isinstance(each, kind) and (kind is bool or not isinstance(each, bool)) for each in values)
        return True

    def error(self, message: str) -> NoReturn:
        """Exit with status 2. For a misspelt option, suggest the closest one."""
        known = [name for action in self._actions for name in action.option_strings]
        if message.startswith("unrecognized arguments: -"):
            word = message.split()[2]
            instead = instead_of(word, known)
            message += f": {instead}" if instead else self._for_text(word)
        elif "ignored explicit argument" in message:  # -hands: argparse reads -h and "ands"
            message += self._for_text(next((word for word in self.given if re.match("-h[^-=]", word)), "-text"))
        elif found := re.search(r"argument (\S+?)(?:/\S+)*: expected one argument", message):
            names = next((a.option_strings for a in self._actions if found[1] in a.option_strings), [found[1]])
            at = next((i for i, word in enumerate(self.given[:-1]) if word in names), None)
            if at is not None and (value := self.given[at + 1]).startswith("-") and value not in known:
                message += f'; for a value that begins with "-": {self.given[at]}="{value}"'
        self.exit(2, f"error: {message} (see --help)\n")

    def _for_text(self, word: str) -> str:
        """How to give a prompt that begins with "-", for programs with prompts."""
        if "--prompt" not in self._option_string_actions or word.startswith("--"):
            return ""
        return f'; for a prompt that begins with "-": --prompt="{word}"'


OUT_OF_MEMORY = (
    "out of memory: try --batch-size 1, a smaller --height and --width, --dtype float16 or bfloat16, or --device cpu"
)


def run(
    work: Callable[[argparse.Namespace], int | None],
    parser: Parser,
    argv: list[str] | None = None,
    out_of_memory: str = OUT_OF_MEMORY,
) -> int:
    """Parse, work, and report errors that are not the fault of the program in one line. Returns the exit status.

    `work` may return an exit status; None means 0.
    """
    with standard_streams():
        try:
            with interruptible():
                return _run(work, parser, argv, out_of_memory)
        except KeyboardInterrupt:
            tqdm.write("stopped", file=sys.stderr)
            return INTERRUPTED


def _run(
    work: Callable[[argparse.Namespace], int | None], parser: Parser, argv: list[str] | None, out_of_memory: str
) -> int:
    args = parser.parse_words(argv)
    if getattr(args, "like", None) is not None:
        args.named = parser.named()
    if not gc.get_freeze_count():  # a million objects of imports stay: not scanning them saves 0.3 s
        gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = say
        said.clear()
        try:
            return work(args) or 0
        except (ValueError, OSError, ArithmeticError) as error:
            return fail(describe(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            return fail(out_of_memory)


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
    if isinstance(error, FileExistsError) and error.strerror == os.strerror(errno.EEXIST):
        return f"{error.filename}: a file of this name exists where a folder is needed; choose another name"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


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
