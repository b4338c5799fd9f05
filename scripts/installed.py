"""Entry points of the installed commands: `sd-txt2img` calls `txt2img` here, and so on.

Each prepares the process (common/streams.py) before it imports the program, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .common import streams

PROGRAMS = (
    "txt2img",
    "img2img",
    "inpaint",
    "convert",
    "train",
    "train_text",
    "train_vae",
    "distill",
    "evaluate",
    "bench",
    "study",
    "serve",
)


def __getattr__(name: str) -> Callable[[], int]:
    """The entry point of a program."""
    if name not in PROGRAMS:
        raise AttributeError(name)

    def main() -> int:
        streams.start()
        status: int = import_module(f".{name}", __package__).main()
        return status

    return main
