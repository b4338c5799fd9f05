"""What clients are told of an error of the library: without paths of this machine, and options of the command line."""

from __future__ import annotations

from collections.abc import Iterable

from ..messages import one_line
from .catalogue import Entry


def public_text(error: BaseException, entries: Iterable[Entry]) -> str:
    """The message of an error, in one line.

    entries   the files that it may be about: their names stand in place of their paths

    >>> public_text(ValueError("a.pt: this is a LoRA, not a model: give it with --lora a.pt"), [])
    'a.pt: this is a LoRA, not a model'
    """
    text = str(error)
    for entry in entries:
        text = text.replace(str(entry.path), entry.name)
    before, option, _ = text.partition(" --")
    if option and (end := max(before.rfind(sign) for sign in ":;(")) > 0:  # what to do about it in the programs
        text = before[:end].rstrip()
        if text.count("(") > text.count(")"):
            text = text[: text.rindex("(")].rstrip()
    return one_line(text, 500)
