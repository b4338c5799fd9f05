"""The log of a training run: one line of JSON every few steps, and the curve of the loss as an image.

OUT/train.jsonl    {"step": 100, "loss": 0.31, "lr": 0.0004, "norm": 0.8, "seconds": 12.5}
                   {"step": 100, "seconds": 14.0, "validation": {"loss": 0.33, "deciles": [0.9, ...]}}
OUT/loss.png       needs matplotlib; without it the run says so once and goes on
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd.files import replaced_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG, OLD_LOG = "train.jsonl", "log.jsonl"  # the second is the name that earlier versions gave it
SMOOTH = 50  # points that the thick line averages over
NO_CURVE = 'no loss.png: it needs matplotlib, pip install "sd-from-scratch[study]" or pip install matplotlib'
Values = Mapping[str, float | list[float]]


class Log:
    """Appends to train.jsonl; when a run resumes at step `start`, later lines are dropped first.

    points       step and loss of each line
    validation   step and values of each validation: "loss", and "deciles" of it by timestep, are drawn
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.path, self.figure = folder / LOG, folder / "loss.png"
        self.plots = True  # until matplotlib turns out to be missing
        if start and not self.path.exists() and (folder / OLD_LOG).exists():
            os.replace(folder / OLD_LOG, self.path)
        kept = [line for line in read_log(self.path) if line["step"] <= start] if start else []
        self.points: list[tuple[float, float]] = [(line["step"], line["loss"]) for line in kept if "loss" in line]
        self.validation = [(line["step"], line["validation"]) for line in kept if "validation" in line]
        self.seconds: float = kept[-1]["seconds"] if kept else 0.0
        with replaced_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, loss: float, **values: float | list[float] | Values | None) -> None:
        """Append a line with the loss of a step and other values."""
        self.points.append((step, loss))
        self._append({"step": step, "loss": loss, **values})

    def validate(self, step: int, seconds: float, values: Values) -> None:
        """Append a line with what a validation after a step found."""
        self.validation.append((step, dict(values)))
        self._append({"step": step, "seconds": seconds, "validation": dict(values)})

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")  # in one call: a killed program leaves no half of it

    def plot(self) -> None:
        """Redraw the loss curve. Without matplotlib, print once how to install it."""
        if len(self.points) < 2 or not self.plots:
            return
        try:
            figure = curve(self.points, self.validation)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "matplotlib":
                raise
            self.plots = False
            print(NO_CURVE, flush=True)
            return
        with replaced_file(self.figure) as partial:
            figure.savefig(partial, format="png")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log up to the first damaged one; each has "step", "seconds", and "loss" or "validation"."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            _ = 0.0 + entry["step"] + entry["seconds"] + (0 if "validation" in entry else entry["loss"])
            _ = dict(entry.get("validation", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            break
        lines.append(entry)
    return lines


def curve(points: Sequence[tuple[float, float]], validation: Sequence[tuple[float, Values]] = ()) -> Figure:
    """Loss over steps on a logarithmic scale: the values as a thin line, their moving average as a thick one.

    points       step and loss
    validation   step and values: "deciles", the losses of the timesteps from the least noisy tenth to the noisiest,
                 are drawn in a second panel, and their mean beside the training loss; without them "loss" is

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

    by_decile = [(step, values["deciles"]) for step, values in validation if "deciles" in values]
    figure = Figure(figsize=(9.6, 9.6 if by_decile else 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if by_decile else 1, sharex=True, squeeze=False)[:, 0]
    axes = panels[0]
    axes.plot(steps, losses, color="#a8c4e8", linewidth=1, label="loss")
    axes.plot(steps, average, color="#1f5fae", linewidth=2.5, label=f"average of {window}")
    if held_out := [(step, _mean(values)) for step, values in validation if "loss" in values]:
        axes.plot(*zip(*held_out, strict=True), color="#c8501e", linewidth=2.5, marker="o", label="validation")
    if by_decile:
        _plot_deciles(panels[1], by_decile)
    for panel in panels:
        panel.set_yscale("log")
        panel.set_ylabel("loss")
        panel.grid(color="#dddddd", which="both")
        panel.legend(ncols=2)
    panels[-1].set_xlabel("step")
    return figure


def _mean(values: Values) -> float:
    """The validation loss as the training loss is without weights: the mean of all timesteps."""
    return float(np.mean(values["deciles"] if "deciles" in values else values["loss"]))


def _plot_deciles(axes: Axes, found: Sequence[tuple[float, Any]]) -> None:
    """A line for each tenth of the timesteps, from the least noisy (dark) to the noisiest (light)."""
    from matplotlib import colormaps

    steps = [step for step, _ in found]
    count = max(len(deciles) for _, deciles in found)
    for i in range(count):
        values = [deciles[i] if i < len(deciles) and deciles[i] > 0 else float("nan") for _, deciles in found]
        color = colormaps["viridis"](i / max(count - 1, 1))
        label = f"timesteps {100 * i // count} to {100 * (i + 1) // count} %"
        axes.plot(steps, values, color=color, linewidth=1.5, marker=".", label=label)
