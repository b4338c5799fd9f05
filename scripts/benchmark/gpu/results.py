"""The results of `bench.py --check`: the targets, and the tables as text or Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..report import gigabytes, grid, time

CHECK_FORMAT = "sd gpu check 1"  # of the file
MINUTES = 7.0  # default time limit
SECONDS, MEMORY = 0.45, 2.6e9  # targets: 50 steps on an H200; bytes for a 512x512 image in float16
Record = dict[str, Any]


def targets(record: Record) -> list[Record]:
    """Each target with its goal, the measured value, and whether it is reached; None where it was not measured.

    The values are those of the pipeline's default, recorded steps.
    """
    if record["settings"]["trial"] or not record["cuda"]:
        return []
    steps, image = (figure(record, what, "ours", "recorded") for what in ("steps", "image"))
    ours = steps["seconds"] if steps else None
    compiled = [
        row["seconds"]
        for row in record["rows"]
        if (row["what"], row["images"], row["program"]) == ("steps", 1, "diffusers")
        and row["way"] != "eager"
        and row["status"] == "measured"
    ]
    is_h200 = "H200" in record["machine"]["name"]
    goals: list[tuple[str, Any, Any, Callable[[Any], str]]] = [
        ("50 steps on an H200", ours if is_h200 else None, SECONDS, time),
        ("50 steps against the fastest compiled diffusers", ours, min(compiled, default=None), time),
        ("memory of the tensors of an image", image["tensors"] if image else None, MEMORY, gigabytes),
        ("memory reserved for an image, recording included", image["reserved"] if image else None, MEMORY, gigabytes),
    ]
    return [
        {
            "name": name,
            "goal": None if goal is None else f"at most {shown(goal)}",
            "value": None if value is None else shown(value),
            "reached": None if value is None or goal is None else value <= goal,
        }
        for name, value, goal, shown in goals
    ]


def figure(record: Record, what: str, program: str, way: str) -> Record | None:
    """The row of a measurement with one image; None if it was not measured."""
    return next(
        (
            row
            for row in record["rows"]
            if (row["what"], row["images"], row["program"], row["way"]) == (what, 1, program, way)
            and row["status"] == "measured"
        ),
        None,
    )


def count(record: Record, status: str) -> int:
    """How many checks and rows have a status."""
    return sum(entry["status"] == status for entry in (*record["checks"], *record["rows"]))


def text(record: Record, markdown: bool) -> str:
    """The tables with their captions."""
    about, settings = record["machine"], record["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    details = [f"{name} {about[key]}" for name, key in (("driver", "driver"), ("CUDA", "cuda"), ("cuDNN", "cudnn"))
               if about.get(key)]  # fmt: skip
    caption = [
        ", ".join([about["name"], *details, record["date"]]),
        versions,
        f"{settings['model']}, {settings['size']}x{settings['size']}, {settings['dtype']}, random weights, medians; "
        f"steps: {settings['steps']} of {settings['sampler'].upper()} with guidance",
    ]
    if settings["trial"]:
        caption.append("a trial of the program with small networks: its times are meaningless")
    blocks = [("; " if markdown else "\n").join(caption)]
    measured = [row for row in record["rows"] if row["status"] == "measured"]
    if measured:
        blocks.append(grid(measured, ROW_COLUMNS, markdown))
    if record["targets"]:
        blocks.append(grid(record["targets"], TARGET_COLUMNS, markdown))
    if record["checks"]:
        blocks.append(grid(record["checks"], CHECK_COLUMNS, markdown))
    left = [
        f"{row['status']}: {row['title']}: {row['message']}" for row in record["rows"] if row["status"] != "measured"
    ]
    if left:
        blocks.append("\n".join(f"* {line}" if markdown else line for line in left))
    numbers = [f"{count(record, status)} {status}" for status in ("passed", "measured", "failed", "not run")]
    blocks.append(", ".join(numbers) + (f"; {record['seconds']:.0f} s" if record["seconds"] else "; not complete"))
    return "\n\n".join(blocks)


Columns = dict[str, Callable[[Record], str]]

ROW_COLUMNS: Columns = {
    "what": lambda row: row["what"],
    "program": lambda row: f"{row['program']}, {row['way']}",
    "images": lambda row: str(row["images"]),
    "time": lambda row: time(row["seconds"]),
    "images/s": lambda row: f"{row['images'] / row['seconds']:.2f}",
    "tensors": lambda row: gigabytes(row["tensors"]),
    "reserved": lambda row: gigabytes(row["reserved"]),
    "difference": lambda row: f"{row['difference']:.1e}" if "difference" in row else "-",
}
TARGET_COLUMNS: Columns = {
    "target": lambda row: row["name"],
    "goal": lambda row: row["goal"] or "-",
    "found": lambda row: row["value"] or "-",
    "reached": lambda row: {True: "yes", False: "no", None: "not measured"}[row["reached"]],
}
CHECK_COLUMNS: Columns = {
    "check": lambda row: row["title"],
    "result": lambda row: f"{row['status']}: {row['message']}",
}
