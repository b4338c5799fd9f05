"""The book in docs/: its code runs, commands create its figures, its links and names exist."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from toy_world_words import strange_words

from scripts.figures import commands
from sd.resources import EMBEDDED, resource

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CHAPTERS = sorted(DOCS.glob("[1-9]*-*.md"), key=lambda path: int(path.name.split("-")[0]))
REFERENCE = [
    "cli.md",
    "python.md",
    "samplers.md",
    "fine-tuning.md",
    "training.md",
    "server.md",
    "benchmark.md",
    "performance.md",
    "verification.md",
]
TEXTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in [DOCS / "README.md", *CHAPTERS, *(DOCS / name for name in REFERENCE)]
}


def code(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


LONG = ("4-unet", "5-samplers", "8-editing", "11-sdxl", "12-control")  # their code takes seconds


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=pytest.mark.exhaustive if path.stem in LONG else ()) for path in CHAPTERS],
)
def test_code_of_a_chapter_runs(path, tmp_path, monkeypatch, capsys):
    """From top to bottom, in one go, as a reader pastes it; the asserts in it hold, and the model knows its words."""
    (tmp_path / "weights").mkdir()
    (tmp_path / EMBEDDED).symlink_to(resource(EMBEDDED))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks, strange = code(TEXTS[path.name]), strange_words(monkeypatch)
    assert blocks
    for number, block in enumerate(blocks, start=1):
        with torch.enable_grad():  # as a reader has it
            exec(compile(block, f"{path.name}, block {number}", "exec"), names)
    assert strange == set()


def test_reading_order():
    """Twelve chapters; the contents list them in order, and each leads to the next."""
    names = [path.name for path in CHAPTERS]
    assert len(names) == 12
    assert re.findall(r"^\d+\. \[.*?\]\((.*?)\)", TEXTS["README.md"], re.MULTILINE) == names
    assert all(f"]({name})" in TEXTS["README.md"] for name in REFERENCE)
    for name, following in pairwise(names):
        assert "Next: [" in TEXTS[name].splitlines()[-1]
        assert TEXTS[name].rstrip().endswith(f"({following}).")


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]):
        assert "//" in link or (DOCS / link).exists(), link


@pytest.mark.parametrize("name", TEXTS)
def test_functions_that_are_named_exist(name):
    """[`Schedule.add_noise`](../sd/schedule.py) is there."""
    for function, module in re.findall(r"\[`([\w.]+)`\]\(\.\./(sd/[\w/]+)\.py\)", TEXTS[name]):
        reduce(getattr, function.split("."), importlib.import_module(module.replace("/", ".")))


def test_every_figure_is_made_by_a_command_and_shown():
    """The files in docs/figures are those of `study.py all`, and the book shows them; 2 MB at most."""
    made = {path.name for path in (DOCS / "figures").iterdir()}
    shown = {name for text in TEXTS.values() for name in re.findall(r"\]\(figures/(.*?)\)", text)}
    source = Path(commands.__file__).read_text(encoding="utf-8").replace("{job.args.film}", "webp")
    assert shown <= made
    assert all(f'"{name}"' in source for name in made)
    assert made - shown <= {"unet-parts.png"}
    assert sum(path.stat().st_size for path in (DOCS / "figures").iterdir()) < 2_000_000


def test_commands_are_those_that_exist():
    """Figures that the book's commands name."""
    for text in TEXTS.values():
        for figure in re.findall(r"scripts/study\.py (\w[\w-]*)", text):
            assert figure in {*commands.FIGURES, "all"}
