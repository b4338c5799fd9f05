"""Measure ours and one peer alternately, so that both see the same machine state.

Ours alternates with one peer at a time, so that only two models are in memory. Every ratio comes from such a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .cases import Case, label
from .openvino_networks import Conversion
from .runner import Run, Runner
from .sides import takes_part
from .weights import Setup
from .workers import Failed, Worker

MAX_DIFFERENCE = 0.2  # relative, between two bfloat16 runs of a deep network; more means another network


class Comparison(NamedTuple):
    """The alternating runs of ours and of a peer in their order, and the difference between their results.

    `peer` is empty if ours ran alone; `difference` is |ours - theirs| / |theirs| if both returned arrays.
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
    bar: tqdm,
    note: Callable[[str], object],
) -> tuple[dict[Case, dict[str, Comparison]], float]:
    """Measure all cases of one part in one precision: results by case and peer ("" for ours alone), and peak FLOP/s.

    `bar` advances by one per run. A peer that fails is left out, and `note` is called with the reason. Raises Failed
    if ours fails.
    """
    measured: dict[Case, dict[str, Comparison]] = {case: {} for case in cases}
    with Worker("ours", setup.folder / "ours.log", Runner, "ours", setup, part) as ours:
        reached = ours.ask("peak")
        for peer in peers:
            its = [case for case in cases if takes_part(peer, case, setup)]
            if not its:
                continue
            ours.ask("rest")  # building the peer takes most memory
            try:
                with start_peer(peer, setup, part, bar) as theirs:
                    for case in its:
                        measured[case][peer] = pair(ours, theirs, case, setup, runs, bar)
            except Failed as failure:
                if failure.who == "ours":
                    raise
                note(f"{part}, {setup.dtype}: {failure}")
        for case in cases:
            if not measured[case]:
                measured[case][""] = pair(ours, None, case, setup, runs, bar)
    return measured, reached


def start_peer(peer: str, setup: Setup, part: str, bar: tqdm) -> Worker:
    """Start a peer in its own process."""
    bar.set_postfix_str(f"{peer}: building")
    log = setup.folder / f"{peer}.log"
    if peer == "openvino":
        with Worker(peer, log, Conversion) as conversion:
            conversion.ask("write_models", setup, part)
    return Worker(peer, log, Runner, peer, setup, part)


def pair(ours: Worker, theirs: Worker | None, case: Case, setup: Setup, runs: int, bar: tqdm) -> Comparison:
    """Measure one case with ours and a peer, or with ours alone."""
    title = label(case, setup.config)
    workers = [ours, *([theirs] if theirs else [])]
    for worker in workers:
        worker.ask("prepare", case)
    calls = {worker.name: partial(worker.ask, "run") for worker in workers}
    return alternate(calls, runs, title, bar)


def alternate(calls: Mapping[str, Callable[[bool], Run]], runs: int, title: str, bar: tqdm) -> Comparison:
    """Alternate calls of ours and of a peer: a warm-up of each, whose results are compared, then `runs` measured runs.

    The argument of a call says whether to return the result.
    """
    first: dict[str, np.ndarray | None] = {}
    series: dict[str, list[Run]] = {name: [] for name in calls}
    for name, call in calls.items():
        bar.set_postfix_str(f"{title}: {name}")
        first[name] = call(True).result
        bar.update()
    difference = compared(title, first)
    for _ in range(runs):
        for name, call in calls.items():
            bar.set_postfix_str(f"{title}: {name}")
            series[name].append(call(False))
            bar.update()
    ours, *peer = series.values()
    return Comparison(ours, peer[0] if peer else [], difference)


def compared(title: str, results: dict[str, np.ndarray | None]) -> float | None:
    """Relative difference between the results of ours and of a peer: times are comparable only for equal results."""
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
