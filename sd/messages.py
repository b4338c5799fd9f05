r"""Texts from files and prompts as parts of messages: they may hold anything, of any length.

>>> printable("a\x1b[31m\nb"), one_line("a  long\nname", 10)
('a\\x1b[31m\\nb', 'a long ...')
>>> one_line("a" + " " * 400 + "b")
'a...'
>>> listed(["a", "b", "a", "c"], most=2), counted(1, "weight"), counted(0, "weight")
('a, b and 1 more', '1 weight', '0 weights')
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def printable(text: str) -> str:
    """A text with its line breaks, terminal control codes and halves of surrogate pairs escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def one_line(text: object, limit: int = 80) -> str:
    """A text as one line of at most `limit` printable characters; every run of white space is one blank."""
    text = str(text)
    line = printable(" ".join(text[: 4 * limit].split()))
    whole = len(line) <= limit and not text[4 * limit :].strip()
    return line if whole else line[: limit - 3] + "..."


def listed(items: Iterable[object], separator: str = ", ", most: int = 10) -> str:
    """The first few of some items, each once, and how many more there are."""
    found = list(dict.fromkeys(map(str, items)))
    return separator.join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def counted(count: int, noun: str) -> str:
    """A number and a noun that has a plural in -s."""
    return f"{count} {noun}{'s' * (count != 1)}"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a RuntimeError is the device's or the CPU allocator's "no memory"."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return True
    return bool(
        re.search("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", str(error), re.IGNORECASE)
    )
