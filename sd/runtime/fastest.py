"""The fastest of several kernels for a kind of call, by comparisons of two (kernel_choice.py).

>>> from .kernel_choice import prefer
>>> with prefer("plain"):
...     fastest("a kind", {"plain": lambda: torch.ones(1), "other": lambda: torch.ones(1)})
'plain'
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor

from .kernel_choice import faster


def fastest(kind: Hashable, candidates: Mapping[str, Callable[[], Tensor]]) -> str:
    """The name of the fastest; "plain" is always among them, and taken in place of one that raises."""
    best = "plain"
    for name in candidates:
        if name == "plain":
            continue
        pair = partial(_both, candidates[name], candidates[best])
        try:
            best = name if faster((kind, name, best), pair) else best
        except Exception:  # whatever a compiler of kernels raises
            continue
    return best


def _both(fast: Callable[[], Tensor], other: Callable[[], Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    return _to_the_end(fast), _to_the_end(other)


def _to_the_end(run: Callable[[], Tensor]) -> Callable[[], object]:
    """Run, and wait until the device has finished."""

    def timed() -> None:
        if run().is_cuda:
            torch.cuda.synchronize()

    return timed
