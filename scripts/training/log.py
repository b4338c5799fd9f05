"""The log of a training run: one line of JSON every few steps, and the curve of the loss as an image.

OUT/log.jsonl    {"step": 100, "loss": 0.31, "lr": 0.0004, "norm": 0.8, "seconds": 12.5}
OUT/loss.png     needs matplotlib; without it the run says so once and goes on
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sd.files import replaced_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTH = 50  # points that the thick line averages over
NO_CURVE = 'no loss.png: it needs matplotlib, pip install "sd-from-scratch[study]" or pip install matplotlib'


class Log:
    """Appends to log.jsonl; when a run resumes at step `start`, later lines are dropped first."""

    def __init__(self, folder: Path, start: int) -> None:
        self.path, self.figure = folder / "log.jsonl", folder / "loss.png"
        self.plots = True  # until matplotlib turns out to be missing
        kept = [line for line in read_log(self.path) if line["step"] <= start] if start else []
        self.points: list[tuple[float, float]] = [(line["step"], line["loss"]) for line in kept]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        with replaced_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, loss: float, **values: float | list[float] | None) -> None:
        """Append a line with the loss of a step and other values."""
        self.points.append((step, loss))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss, **values}) + "\n")

    def plot(self) -> None:
        """Redraw the loss curve. Without matplotlib, print once how to install it."""
        if len(self.points) < 2 or not self.plots:
            return
        try:
            figure = curve(self.points)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "matplotlib":
                raise
            self.plots = False
            print(NO_CURVE, flush=True)
            return
        with replaced_file(self.figure) as partial:
            figure.savefig(partial, format="png")


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log up to the first damaged one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            _ = entry["step"], entry["loss"], entry["seconds"]
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        lines.append(entry)
    return lines


def curve(points: Sequence[tuple[float, float]]) -> Figure:
    """Loss over steps on a logarithmic scale: the values as a thin line, their moving average as a thick one.

    Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [step for step, _ in points]
    losses = np.maximum([loss for _, loss in points], 1e-12)
    window = max(1, min(SMOOTH, len(points) // 5))
    sums = np.concatenate([[0.0], np.cumsum(np.log(losses))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    average = np.exp((sums[ends] - sums[starts]) / (ends - starts))

    figure = Figure(figsize=(9.6, 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#a8c4e8", linewidth=1, label="loss")
    axes.plot(steps, average, color="#1f5fae", linewidth=2.5, label=f"average of {window}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(color="#dddddd", which="both")
    axes.legend()
    return figure
