"""Some of what `python tests/fuzz_checkpoints.py --count 200000` reads, and that it notices what it looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz_inputs
import pytest
from fuzz_checkpoints import fuzz

# A reader that does something else than to read, given one line of Python; prints what the fuzzer says of it.
MISBEHAVING = """
import os, subprocess, sys, tempfile, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import fuzz_checkpoints
from fuzz_inputs import Input

with tempfile.TemporaryDirectory() as folder:
    reader = fuzz_checkpoints.Reader(Path(folder))
    fuzz_checkpoints.SECONDS = 0.2
    for line in sys.argv[3:]:
        exec("def read(path, *args, **options):\\n " + line.replace("\\n", "\\n "), globals())
        fuzz_checkpoints.read = read
        print(repr(reader.outcome(1, Input("test", {"a": b"abc"}, "a")).fault))
"""
NOTICED = {
    "pass": "",
    "raise ValueError(f'{path}: one line')": "",
    "raise ValueError('two\\nlines')": "its message",
    "raise KeyError('a')": "KeyError",
    "assert False": "AssertionError",
    "os.system('true')": 'did ["os.system',
    "exec('1')": 'did ["compile',
    "subprocess.run(['true'])": "subprocess.Popen",
    "open(path, 'w').close()": 'did ["open',
    "import turtle": "import",
    "end = time.process_time() + 0.3\nwhile time.process_time() < end: pass": "took 0.3 s",
    "bytearray(b'x') * (180 << 20)": "MB for 0 KB",
    "bytearray(1 << 40)": "MemoryError",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is watched as Linux tells it")


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [350, pytest.param(4000, marks=pytest.mark.exhaustive)])
def test_damaged_files_do_no_harm(count):
    report = fuzz(count, first=1200)  # number 1405 is a bomb, which few are
    assert not report.faults, "\n".join(f"input {outcome.number}: {outcome.fault}" for outcome in report.faults[:5])
    assert report.count == count and len(report.kinds) == 9
    assert set(report.results) >= {"checkpoint", "lora", "embedding", "CheckpointError"}, "some are damaged harmlessly"


def test_a_number_is_an_input():
    fuzz_inputs.prepare()
    for number in range(30):
        assert fuzz_inputs.make(5, number) == fuzz_inputs.make(5, number)
    assert fuzz_inputs.make(5, 1) != fuzz_inputs.make(6, 1)


@pytest.mark.exhaustive
def test_harm_is_noticed():
    tests = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", MISBEHAVING, tests, tests.parent, *NOTICED], capture_output=True, text=True, check=True
    )
    for (line, word), fault in zip(NOTICED.items(), done.stdout.splitlines(), strict=True):
        assert word in fault if word else fault == "''", (line, fault)
