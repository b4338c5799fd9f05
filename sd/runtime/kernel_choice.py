"""Which of two kernels is faster: measured on the machine at hand, once for each kind of call, and remembered.

What wins by a factor of two on one processor loses by five on another, so nothing is assumed from the processor's name.
The choice depends on the kind of call alone, not on what was called before: within a process, the same inputs always
go through the same kernels.

>>> with prefer("fast"):  # for tests
...     faster(("a kind",), lambda: (float, int))
True
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Literal

import torch

Choice = Literal["fast", "plain"]

CALLS = 3  # of each kernel, alternating; the fastest counts, as other processes only ever make calls slower
# Fast kernels may be this much slower and are still taken: the examples are small, and they gain more in large layers.
# A threshold that is far from usual results also keeps noise from deciding, and so how results are rounded.
MARGIN = 1.1

_forced: Choice | None = None
_measured: dict[Hashable, bool] = {}  # kind of call and number of threads -> whether the fast kernel is faster
_measuring = threading.Lock()


@contextmanager
def prefer(choice: Choice | None) -> Iterator[None]:
    """Use the fast or the plain kernels within this context, without measuring; None measures.

    For tests and comparisons. It holds for all threads of the process. Layers are chosen by `optimize`, so it has to
    be called in the context; attention is chosen at each call.
    """
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def faster(kind: Hashable, kernels: Callable[[], tuple[Callable[[], object], Callable[[], object]]]) -> bool:
    """Whether the fast kernel is faster than PyTorch's for this kind of call: measured the first time.

    `kernels` makes a typical call of the kind: (fast, plain).
    """
    if _forced is not None:
        return _forced == "fast"
    key = kind, torch.get_num_threads()
    if key not in _measured:
        with _measuring, torch.inference_mode(False), torch.no_grad():
            if key not in _measured:
                fast, plain = _seconds(*kernels())
                _measured[key] = fast < MARGIN * plain
    return _measured[key]


def _seconds(*runs: Callable[[], object]) -> list[float]:
    """The time of the fastest call of each, called alternately; the first call is a warm-up and does not count."""
    for run in runs:
        run()
    best = [float("inf")] * len(runs)
    for _ in range(CALLS):
        for i, run in enumerate(runs):
            start = perf_counter()
            run()
            best[i] = min(best[i], perf_counter() - start)
    return best
