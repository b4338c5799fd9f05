"""Runs the other tests marked gpu, such as those of training, with pytest where it is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from .items import check, require
from .models import TESTS, Models, no_goldens

LIMIT, START = 60.0, 20.0  # seconds for the tests, and before for the start of the process of their part


def no_pytest() -> str | None:
    """A line that says what is missing; None if nothing is."""
    return no_goldens() or (None if find_spec("pytest") else "needs pytest (pip install pytest)")


@check("others", "the other tests marked gpu, by pytest", cuda=True, limit=LIMIT, needs=no_pytest)
def marked_gpu(models: Models) -> str:
    """In its own process, which is stopped before the time limit."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--ignore=tests/test_gpu.py",
    ]
    try:
        done = subprocess.run(
            [*command, "tests"], cwd=TESTS.parent, capture_output=True, text=True, timeout=LIMIT - 5, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"stopped after {LIMIT - 5:.0f} s") from None
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing was printed"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    require(done.returncode == 0, (failed or lines)[-1 if not failed else 0])
    return lines[-1]
