"""Some of what `python tests/fuzz_recipes.py --count 200000` reads."""

from __future__ import annotations

import fuzz_recipes
import pytest
from fuzz_recipes import fuzz, make


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.exhaustive)])
def test_damaged_recipes_do_no_harm(count):
    report = fuzz(count, first=100)
    assert not report.faults, "\n".join(f"input {number}, {fault}" for number, fault in report.faults[:5])
    assert report.count == count and len(report.kinds) == 7
    assert min(report.results["recipe"], report.results["refused"]) > count / 4


def test_a_number_is_an_input():
    assert all(make(5, number) == make(5, number) for number in range(40))
    assert make(5, 1) != make(6, 1)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("raise KeyError('a')", "KeyError"),
        ("raise fuzz_recipes.ImageFileError('elsewhere')", "its message"),
        ("open(str(path) + '2', 'w').close()", "open ("),
        ("exec('1')", "compile ("),
    ],
)
def test_harm_is_noticed(monkeypatch, harm, words):
    names = {"fuzz_recipes": fuzz_recipes}
    exec(f"def read(path):\n {harm}\n raise fuzz_recipes.ImageFileError(str(path))", names)
    monkeypatch.setattr(fuzz_recipes, "read_request", names["read"])
    assert words in fuzz(1).faults[0][1]
