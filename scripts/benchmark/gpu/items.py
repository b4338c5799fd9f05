"""The registry of checks. A check is a function of the `Models` of its process that returns its result as a line.

    @check("images", "a batch gives the images of single runs")
    def batch_is_single(models: Models) -> str: ...

It raises `Wrong` with one line if the check fails. Any other exception counts as a failure, too; then a new process is
started, since an illegal memory access leaves CUDA unusable. tests/test_gpu.py runs the same checks.

>>> @check("doctest", "one and one are two")
... def sum_of_ones(models: object) -> str:
...     require(1 + 1 == 2, "not two")
...     return "two"
>>> CHECKS.pop("sum_of_ones").function(None)
'two'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

LIMIT = 40.0  # seconds that a check may take, including the generation of its weights


class Wrong(ValueError):
    """A check failed; the message says why."""


class Check(NamedTuple):
    """A registered check; `name` is that of its function.

    part   checks of a part share a process and its models
    cuda   whether it needs a GPU
    limit  the seconds that it may take
    needs  returns a line that says what it needs and is missing here; None if nothing is
    """

    name: str
    part: str
    title: str
    function: Callable[[Any], str]
    cuda: bool = False
    limit: float = LIMIT
    needs: Callable[[], str | None] = lambda: None


CHECKS: dict[str, Check] = {}  # in the order in which they run


def check(
    part: str, title: str, *, cuda: bool = False, limit: float = LIMIT, needs: Callable[[], str | None] = lambda: None
) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Register a function as a check: see `Check`."""

    def registered(function: Callable[[Any], str]) -> Callable[[Any], str]:
        name = function.__name__
        assert name not in CHECKS, name
        CHECKS[name] = Check(name, part, title, function, cuda, limit, needs)
        return function

    return registered


def require(condition: bool, otherwise: str) -> None:
    """Raise `Wrong` with the line `otherwise` unless the condition holds."""
    if not condition:
        raise Wrong(otherwise)
