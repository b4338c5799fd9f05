"""The README and the reference pages: code runs, tables match their source, every option is listed, links are valid."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from scripts.benchmark import report
from scripts.benchmark.gpu import results
from sd.resources import EMBEDDED, resource
from sd.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PROGRAMS = (
    *("txt2img", "img2img", "inpaint", "convert", "train_vae", "train_text", "train", "distill"),
    *("evaluate", "study", "bench"),
)
CODE = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", DOCS / "python.md")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]


def sampler_table() -> str:
    """The table that docs/samplers.md must hold."""
    rows = [
        "| `--sampler` | name | paper | order | evaluations per step | random | spacing | default steps |",
        "| --- " * 8 + "|",
    ]
    for key, entry in SAMPLERS.items():
        random = "yes" if entry.stochastic else "with `--eta`" if "eta" in entry.options else "no"
        random = "unless `--gamma 0`" if "gamma" in entry.options else random
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
    page = (DOCS / "samplers.md").read_text(encoding="utf-8")
    assert sampler_table() in page, f"put this into docs/samplers.md:\n{sampler_table()}"


def option_strings(program: str) -> set[str]:
    """The options that the parser of a program accepts."""
    parser = importlib.import_module(f"scripts.{program}").parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_documented(program):
    documented = set(re.findall(r"`(--?[\w-]+)`", (DOCS / "cli.md").read_text(encoding="utf-8")))
    assert option_strings(program) - documented == set()


def test_every_documented_option_exists():
    rows = re.findall(r"^\| (`--.*?) \|", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {option for row in rows for option in re.findall(r"`(--[\w-]+)`", row)}
    assert documented - set().union(*map(option_strings, PROGRAMS)) == set()


def test_readme_is_short():
    assert len(TEXT.encode()) <= 12_000


def test_tables_of_the_benchmark():
    """What was measured last, as `bench.py --show FILE --markdown` prints it."""
    tables, few, growing = (
        report.text(report.read(ROOT / "docs" / file), markdown=True).split("\n\n")
        for file in ("bench.json", "bench-few-steps.json", "bench-growth.json")
    )
    benchmark, page = ((DOCS / name).read_text(encoding="utf-8") for name in ("benchmark.md", "performance.md"))
    assert all(table in benchmark for table in (*tables, *few))
    assert growing[0] in page and growing[-1] in page  # machine and date; how cost grows
    if (ROOT / "docs" / "gpu.json").exists():  # once `bench.py --check` has run on a GPU
        found = report.read(ROOT / "docs" / "gpu.json", results.CHECK_FORMAT)
        assert not found["settings"]["trial"] and results.text(found, markdown=True) in page


@pytest.mark.parametrize("block", CODE)
def test_code_runs(block, tmp_path, monkeypatch, capsys):
    assert resource(EMBEDDED).exists()
    (tmp_path / "weights").mkdir()
    (tmp_path / EMBEDDED).symlink_to(resource(EMBEDDED))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {})


def test_there_is_code():
    assert TEXT.count("```python") >= 3


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 15
    for link in links:
        assert "//" in link or (ROOT / link).exists(), link
