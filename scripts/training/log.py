"""The log of a training run: one line of JSON every few steps, and the curve of the loss as a picture.

OUT/log.jsonl    {"step": 100, "loss": 0.31, "lr": 0.0004, "norm": 0.8, "seconds": 12.5}
OUT/loss.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from sd.files import replaced_file

WIDTH, HEIGHT = 960, 540
LEFT, TOP, RIGHT, BOTTOM = 80, 30, 20, 50  # pixels around the plot
SMOOTH = 50  # points that the thick line averages over


class Log:
    """Appends to log.jsonl; a run that goes on from step `start` first drops what was logged behind it."""

    def __init__(self, folder: Path, start: int) -> None:
        self.path, self.picture = folder / "log.jsonl", folder / "loss.png"
        kept = [line for line in read_log(self.path) if line["step"] <= start] if start else []
        self.points = [(line["step"], line["loss"]) for line in kept]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        with replaced_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, **values: float | None) -> None:
        """Add a line."""
        self.points.append((values["step"], values["loss"]))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def plot(self) -> None:
        """Draw the curve anew."""
        if len(self.points) > 1:
            with replaced_file(self.picture) as partial:
                curve(self.points).save(partial, "PNG")


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log; what follows one that was cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            _ = entry["step"], entry["loss"], entry["seconds"]
        except (ValueError, TypeError, KeyError):
            break
        lines.append(entry)
    return lines


def curve(points: Sequence[tuple[float, float]]) -> Image.Image:
    """Loss over steps, on a logarithmic scale: thin what was measured, thick its moving average."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    steps = [step for step, _ in points]
    logs = [math.log10(max(loss, 1e-12)) for _, loss in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(logs), max(logs)
    low, high = low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3

    def place(step: float, log: float) -> tuple[float, float]:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - log) / (high - low) * (HEIGHT - TOP - BOTTOM)

    for i in range(6):
        log = low + i / 5 * (high - low)
        _, y = place(first, log)
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], "#dddddd")
        pen.text((LEFT - 8, y), f"{10**log:.3g}", "#444444", anchor="rm")
        step = first + i / 5 * (last - first)
        x, _ = place(step, low)
        pen.text((x, HEIGHT - BOTTOM + 8), f"{step:.0f}", "#444444", anchor="ma")
    pen.text((LEFT, 8), "loss", "#444444")
    pen.text((WIDTH - RIGHT, HEIGHT - 18), "step", "#444444", anchor="ra")

    pen.line([place(step, log) for step, log in zip(steps, logs, strict=True)], "#a8c4e8", 1)
    window = max(1, min(SMOOTH, len(logs) // 5))
    sums = [0.0]
    for log in logs:
        sums.append(sums[-1] + log)
    smooth = [(sums[i] - sums[max(i - window, 0)]) / min(i, window) for i in range(1, len(sums))]
    pen.line([place(step, log) for step, log in zip(steps, smooth, strict=True)], "#1f5fae", 3, joint="curve")
    return image
