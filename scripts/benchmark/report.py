"""The results as rows of figures, as tables, and as a file for later comparison."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sd
from sd.files import replaced_file
from sd.runtime.device import processor_name

from .cases import TITLES, Case, flop, label, usual_case, weight_bytes
from .interleave import Comparison
from .runner import Run
from .start import LABEL
from .weights import Setup

FORMAT = "sd bench 2"  # of the file
PACKAGES = ("torch", "diffusers", "transformers", "openvino")
SAME_MACHINE = ("name", "device", "cores", "threads", "model")
Row = dict[str, Any]


def row(case: Case, setup: Setup, measured: Mapping[str, Comparison]) -> Row:
    """The figures of one case: seconds, bytes and plain numbers; None if unknown.

    `ours` is the median of all runs of ours; `peers[name]["ratio"]` uses only the runs that alternated with that peer.
    """
    start = case.part == "start"
    ours = [run for comparison in measured.values() for run in comparison.ours]
    seconds = median(run.seconds for run in ours)
    gflop = None if start else flop(case, setup.config) / 1e9
    return {
        "part": case.part,
        "label": LABEL if start else label(case, setup.config),
        "dtype": setup.dtype,
        "size": case.size,
        "batch": case.batch,
        "usual": start or case._replace(controlled=True) == usual_case(case.part, setup.config, case.steps),
        "controlled": case.part == "control" and case.controlled,
        "ours": seconds,
        "gflop": gflop,
        "gflops": gflop / seconds if gflop else None,
        "of_peak": None,
        "weights": weight_bytes(case.part, setup.config, setup.torch_dtype),
        "memory": highest(ours),
        "runs": [run.seconds for run in ours],
        "peers": {name: compared(comparison) for name, comparison in measured.items() if comparison.peer},
    }


def compared(comparison: Comparison) -> Row:
    """The figures of a peer."""
    ours, theirs = (median(run.seconds for run in runs) for runs in (comparison.ours, comparison.peer))
    return {
        "seconds": theirs,
        "ours": ours,
        "ratio": ours / theirs,
        "memory": highest(comparison.peer),
        "difference": comparison.difference,
        "runs": [run.seconds for run in comparison.peer],
        "ours_runs": [run.seconds for run in comparison.ours],
    }


def highest(runs: Sequence[Run]) -> int | None:
    """The highest memory of all runs; None if unknown."""
    return max((run.memory or 0 for run in runs), default=0) or None


def hold_against(rows: Sequence[Row], peak: float) -> None:
    """Set the share of the machine's peak (FLOP/s) that each row reaches."""
    for figures in rows:
        if figures["gflops"]:
            figures["of_peak"] = 1e9 * figures["gflops"] / peak


def machine(setup: Setup) -> Row:
    """Machine, versions, model and date."""
    cuda = setup.device.type == "cuda"
    versions = {"sd": sd.__version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "name": torch.cuda.get_device_name(setup.device) if cuda else cpu_name(),
        "device": str(setup.device),
        "cores": os.cpu_count(),
        "threads": setup.threads,
        "date": date.today().isoformat(),
        "versions": versions,
        "model": setup.config.name,
        "weights": setup.ckpt.name if setup.ckpt else "random",
    }


def cpu_name() -> str:
    """The name of the processor, and the best instruction set that torch uses on it."""
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"


def write(path: Path, record: Row) -> None:
    """Write all figures to a file for later comparison. Raises OSError with the file's name."""
    try:
        with replaced_file(path) as file:
            file.write_text(json.dumps({"format": FORMAT, **record}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:  # names the temporary file, or none
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def save(path: Path, record: Row, note: Callable[[str], object]) -> None:
    """`write` what is there so far; where that fails, `note` says so, and the measuring goes on."""
    try:
        write(path, record)
    except OSError as error:
        note(f"{path}: {error.strerror}; the tables will be printed at the end")


def read(path: Path, *others: str) -> Row:
    """Read a file of `write`, in this module's format or one of `others`. Raises ValueError for any other file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not JSON, not text
        record = None
    if not isinstance(record, dict) or record.get("format") not in (FORMAT, *others):
        raise ValueError(f"{path}: not a file that this program wrote with --json")
    return record


def text(record: Row, markdown: bool, earlier: Row | None = None) -> str:
    """The tables with their captions; with `earlier`, also the change of our times since then."""
    about, rows = record["machine"], record["figures"]
    peers = [name for name in ("diffusers", "compiled", "openvino") if any(name in row["peers"] for row in rows)]
    usual = [row for row in rows if row["usual"]]
    grown = growth_rows(rows)
    caption = [
        f"{about['name']}, {about['cores']} cores, {about['threads']} threads, {about['date']}",
        ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        f"{about['model']}, {about['weights']} weights, medians"
        + (", in brackets ours / theirs of alternating runs" if peers else ""),
    ]
    change = {}
    if earlier:
        caption += differences(about, earlier["machine"])
        change = {f"since {earlier['machine']['date']}": changes(earlier["figures"])}
    blocks = [("; " if markdown else "\n").join(caption)]
    if usual:
        blocks.append(grid(usual, time_columns(peers) | change, markdown))
        if shares := decoder_shares(usual):
            blocks.append(f"The tiny autoencoder decodes in {', '.join(shares)} of the VAE's time")
        if shares := control_shares(usual, peers):
            blocks.append(f"Control adds to a step, as a share of one without it, {'; '.join(shares)}")
        if any(row["memory"] for row in usual):
            blocks.append("Peak memory, beside one copy of the weights; for the start, of the whole process")
            blocks.append(grid(usual, memory_columns(peers), markdown))
    if grown:
        blocks.append("Growth of the cost with image size and batch size, relative to the first row of each series")
        blocks.append(grid(grown, growth_columns(peers) | change, markdown))
        if any(row["memory"] for row in grown):
            blocks.append("Growth of peak memory, beside one copy of the weights")
            blocks.append(grid(grown, series_columns() | without_names(memory_columns(peers)), markdown))
    if notes := record.get("notes"):  # peers that are not in the tables, and why
        blocks.append("\n".join(notes))
    return "\n\n".join(blocks)


Columns = dict[str, Callable[[Row], str]]  # title -> function from a row to its cell


def time_columns(peers: Sequence[str]) -> Columns:
    """Columns of the table of times."""
    return {
        "part": lambda row: row["label"],
        "precision": lambda row: row["dtype"],
        "ours": lambda row: time(row["ours"]),
        **{peer: partial(versus, peer=peer) for peer in peers},
        "GFLOP": lambda row: "-" if row["gflop"] is None else f"{row['gflop']:,.0f}",
        "GFLOP/s": lambda row: "-" if row["gflops"] is None else f"{row['gflops']:,.0f}",
        "of peak": lambda row: "-" if row["of_peak"] is None else f"{row['of_peak']:.0%}",
    }


def memory_columns(peers: Sequence[str]) -> Columns:
    """Columns of the table of memory."""
    return {
        "part": lambda row: row["label"],
        "precision": lambda row: row["dtype"],
        "weights": lambda row: gigabytes(row["weights"]),
        "ours": lambda row: gigabytes(row["memory"]),
        **{peer: partial(peer_memory, peer=peer) for peer in peers},
    }


def growth_columns(peers: Sequence[str]) -> Columns:
    """Columns of the table of growth."""
    columns = without_names(time_columns(peers))
    del columns["GFLOP"]
    ours = columns.pop("ours")
    return series_columns() | {"ours": ours, "growth": lambda row: f"{row['growth']:.2f}"} | columns


def series_columns() -> Columns:
    """Columns that say which row of `growth_rows` it is."""
    return {
        "part": lambda row: row["title"],
        "precision": lambda row: row["dtype"],
        "size": lambda row: f"{row['size']}x{row['size']}",
        "images": lambda row: str(row["batch"]),
    }


def without_names(columns: Columns) -> Columns:
    """The columns without those that say which row it is."""
    return {title: cell for title, cell in columns.items() if title not in ("part", "precision")}


def growth_rows(rows: Sequence[Row]) -> list[Row]:
    """For each part and precision, one image at increasing sizes, then increasing batches at the native size."""
    grown = []
    parts = TITLES.keys() - {"control"}  # whose rows differ in something else
    for part, dtype in dict.fromkeys((row["part"], row["dtype"]) for row in rows if row["part"] in parts):
        those = [row for row in rows if (row["part"], row["dtype"]) == (part, dtype)]
        native = next((row["size"] for row in those if row["usual"]), None)
        for series in ([row for row in those if row["batch"] == 1], [row for row in those if row["size"] == native]):
            ordered = sorted(series, key=lambda row: (row["size"], row["batch"]))
            if len(ordered) > 1:
                grown += [{**row, "title": TITLES[part], "growth": row["ours"] / ordered[0]["ours"]} for row in ordered]
    return grown


def decoder_shares(rows: Sequence[Row]) -> list[str]:
    """Our time of the tiny decoder as a share of the VAE's, for each precision in which both were measured."""
    seconds = {(row["part"], row["dtype"]): row["ours"] for row in rows}
    return [
        f"{took / seconds['vae', dtype]:.1%} ({dtype})"
        for (part, dtype), took in seconds.items()
        if part == "taesd" and ("vae", dtype) in seconds
    ]


def control_shares(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """What control adds to a step as a share of one without it, ours and of each peer, for each precision."""
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows if row["part"] == "control"):
        by_kind = {row["controlled"]: row for row in rows if (row["part"], row["dtype"]) == ("control", dtype)}
        if len(by_kind) < 2:  # it was stopped in between
            continue
        both = by_kind[True], by_kind[False]
        pairs = {"": [row["ours"] for row in both]}
        for peer in peers:
            if all(peer in row["peers"] for row in both):
                pairs[f" ({peer})"] = [row["peers"][peer]["seconds"] for row in both]
        shares = [f"{pair[0] / pair[1] - 1:.2f}{who}" for who, pair in pairs.items()]
        found.append(f"{' and '.join(shares)} in {dtype}")
    return found


def changes(earlier: Sequence[Row]) -> Callable[[Row], str]:
    """The column with the change of time since an earlier run."""
    then = {(row["label"], row["dtype"]): row["ours"] for row in earlier}

    def cell(row: Row) -> str:
        before = then.get((row["label"], row["dtype"]))
        return "-" if before is None else f"{row['ours'] / before - 1:+.0%}"

    return cell


def differences(now: Row, then: Row) -> list[str]:
    """Differences between two runs that make them hard to compare, one line each."""
    return [
        f"hard to compare with the earlier run: {what} was {then[what]} and is {now[what]}"
        for what in SAME_MACHINE
        if now[what] != then[what]
    ]


def grid(rows: Sequence[Row], columns: Columns, markdown: bool) -> str:
    """Rows as aligned text or Markdown; part and precision left-aligned, numbers right-aligned."""
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if markdown:
        cells.insert(1, ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip())
    return "\n".join(lines)


def versus(row: Row, peer: str) -> str:
    """The time of a peer, and the ratio ours / theirs."""
    its = row["peers"].get(peer)
    return f"{time(its['seconds'])} ({its['ratio']:.2f})" if its else "-"


def peer_memory(row: Row, peer: str) -> str:
    """Memory of a peer."""
    return gigabytes(row["peers"].get(peer, {}).get("memory"))


def time(seconds: float) -> str:
    """A time in seconds, or in milliseconds if it is short."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def gigabytes(size: int | None) -> str:
    """A size in GB."""
    return "-" if size is None else f"{size / 1e9:.2f} GB"
