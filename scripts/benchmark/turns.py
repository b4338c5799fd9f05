"""Measuring ours and one other in turns: one after the other, again and again, so that both meet the same machine.

Ours takes turns with one peer at a time, so that two models are in memory and not four. Every ratio is of such a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np

from .cases import Case, label
from .openvino_networks import Conversion
from .runner import Run, Runner
from .sides import takes_part
from .weights import Setup
from .workers import Failed, Worker

MAX_DIFFERENCE = 0.2  # relative, between two bfloat16 runs of a deep network; more is another network

Progress = Callable[[str], object]  # is told what runs now, once a run


class Turns(NamedTuple):
    """What was measured of ours and of a peer, in the order it was, and how far their results are apart.

    `peer` is empty where ours ran alone; `difference` is |ours - theirs| / |theirs|, where both gave numbers.
    """

    ours: list[Run]
    peer: list[Run]
    difference: float | None


def measure(
    setup: Setup,
    part: str,
    cases: Sequence[Case],
    peers: Sequence[str],
    runs: int,
    progress: Progress,
    note: Callable[[str], object],
) -> tuple[dict[Case, dict[str, Turns]], float]:
    """All cases of one part in one precision: by case and peer ("" alone), and what the machine reaches in FLOP/s.

    A peer that fails is left out, and `note` is told why. Raises Failed or ArithmeticError if ours does.
    """
    measured: dict[Case, dict[str, Turns]] = {case: {} for case in cases}
    with Worker("ours", setup.folder / "ours.log", Runner, "ours", setup, part) as ours:
        reached = ours.ask("peak")
        for peer in peers:
            its = [case for case in cases if takes_part(peer, case, setup)]
            try:
                with ExitStack() as stack:
                    theirs = start_peer(peer, setup, part, progress, stack) if its else None
                    for case in its:
                        measured[case][peer] = pair(ours, theirs, case, setup, runs, progress)
            except Failed as failure:
                if failure.who == "ours":
                    raise
                note(f"{part}, {setup.dtype}: {failure}")
        for case in cases:
            if not measured[case]:
                measured[case][""] = pair(ours, None, case, setup, runs, progress)
    return measured, reached


def start_peer(peer: str, setup: Setup, part: str, progress: Progress, stack: ExitStack) -> Worker:
    """A peer in its process, which ends with the stack."""
    progress(f"{peer}: building")
    log = setup.folder / f"{peer}.log"
    if peer == "openvino":
        with Worker(peer, log, Conversion) as conversion:
            conversion.ask("write_models", setup, part)
    return stack.enter_context(Worker(peer, log, Runner, peer, setup, part))


def pair(ours: Worker, theirs: Worker | None, case: Case, setup: Setup, runs: int, progress: Progress) -> Turns:
    """One case, by ours and by a peer or alone."""
    title = label(case, setup.config)
    workers = [ours, *([theirs] if theirs else [])]
    for worker in workers:
        worker.ask("prepare", case)
    calls = {worker.name: partial(worker.ask, "run") for worker in workers}
    return alternate(calls, runs, title, progress)


def alternate(calls: dict[str, Callable[[bool], Run]], runs: int, title: str, progress: Progress) -> Turns:
    """Ours and a peer's, or ours alone, in turns: one unmeasured run of each, whose results are compared, then `runs`.

    A call is told whether its result is wanted.
    """
    first, series = {}, {name: [] for name in calls}
    for name, call in calls.items():
        progress(f"{title}: {name}")
        first[name] = call(True).result
    difference = compared(title, first)
    for _ in range(runs):
        for name, call in calls.items():
            progress(f"{title}: {name}")
            series[name].append(call(False))
    ours, *peer = series.values()
    return Turns(ours, peer[0] if peer else [], difference)


def compared(title: str, results: dict[str, np.ndarray | None]) -> float | None:
    """How far ours and a peer's are apart. Times mean nothing unless both computed the same numbers."""
    arrays = {name: result for name, result in results.items() if result is not None}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise Failed(name, f"{title}: not finite in this precision: try --dtype bfloat16 or float32")
    if len(arrays) < 2:
        return None
    ours, (peer, theirs) = arrays["ours"], list(arrays.items())[1]
    difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if difference > MAX_DIFFERENCE:
        raise Failed(peer, f"{title}: its result differs from ours by {difference:.2g}: not comparable")
    return difference
