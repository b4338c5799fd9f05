"""The README's promises: its code runs, its table of samplers is the registry, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.benchmark import report
from sd.pipeline import EMBEDDED
from sd.resources import resource
from sd.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def sampler_table() -> str:
    """The table that the README must hold."""
    rows = ["| `--sampler` | name | paper | order | evaluations a step | random | grid | steps |", "| --- " * 8 + "|"]
    for key, entry in SAMPLERS.items():
        random = "yes" if entry.random else "with `--eta`" if "eta" in entry.options else "no"
        cells = [
            f"`{key}`",
            entry.label,
            entry.paper,
            entry.order,
            entry.evaluations,
            random,
            entry.spacing,
            entry.steps,
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def test_table_of_samplers():
    assert sampler_table() in TEXT, f"put this into README.md:\n{sampler_table()}"


def test_tables_of_the_benchmark():
    """What was measured last, as `bench.py --show FILE --markdown` prints it."""
    tables, growing = (
        report.text(report.read(ROOT / "docs" / file), markdown=True).split("\n\n")
        for file in ("bench.json", "bench-growth.json")
    )
    assert all(table in TEXT for table in tables)
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert growing[0] in page and growing[-1] in page  # machine and date; how cost grows


@pytest.mark.parametrize("number", range(len(CODE)))
def test_code_runs(number, tmp_path, monkeypatch, capsys):
    assert resource(EMBEDDED).exists()
    (tmp_path / "weights").mkdir()
    (tmp_path / EMBEDDED).symlink_to(resource(EMBEDDED))
    monkeypatch.chdir(tmp_path)
    exec(compile(CODE[number], f"README.md, block {number}", "exec"), {})


def test_there_is_code():
    assert len(CODE) >= 3


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 15
    for link in links:
        assert "//" in link or (ROOT / link).exists(), link
