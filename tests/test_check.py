"""`bench.py --check` as a program: parts that fail, hang or die do not stop the others, and all of it is reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_workers import Doing, Echo, Starting

from scripts import bench
from scripts.benchmark.gpu import plan, results
from scripts.benchmark.gpu.plan import Item, Part, Running
from scripts.benchmark.gpu.table import Row
from scripts.benchmark.workers import TooSlow, Worker

ROW = Row("steps", 1, "ours", "recorded")


def figures(seconds: float, result: object = None) -> dict:
    """What the measurement of a row gives."""
    return {"seconds": seconds, "runs": [seconds], "warm_up": 1.0, "tensors": 1, "reserved": 2, "result": result}


def record(cuda: bool = True, name: str = "a card of the tests") -> dict:
    return {
        "format": results.CHECK_FORMAT,
        "machine": {"name": name, "versions": {"torch": "0"}, "driver": "1", "cuda": "2", "cudnn": 3},
        "settings": {"model": "m", "size": 512, "steps": 50, "sampler": "ddim", "dtype": "float16", "trial": False},
        "cuda": cuda, "date": "2000-01-01", "checks": [], "rows": [], "targets": [], "seconds": None,
    }  # fmt: skip


def ran(tmp_path, parts: list[Part], seconds: float = 60, cuda: bool = True) -> tuple[dict, list[str]]:
    """The record of a run of these parts, and the lines that were printed."""
    lines: list[str] = []
    running = Running(record(cuda), tmp_path, seconds, lines.append)
    running.all(parts)
    return running.record, lines


def doing(*asks: object, start: str = "", **options: object) -> Part:
    """A part whose items go as asked."""
    items = [Item(f"item {ask}", ask, limit=0.3 if ask == "hangs" else 10) for ask in asks]
    return Part("a part", Doing, (start,), items, **options)


def test_what_fails_hangs_or_dies_does_not_stop_the_rest(tmp_path):
    found, lines = ran(tmp_path, [doing("ok", "wrong", "ok", "raises", "ok", "dies", "ok", "hangs", "ok"), doing("ok")])
    assert [(entry["status"], entry["message"]) for entry in found["checks"]] == [
        ("passed", "item 1 of its process"),
        ("failed", "one and one are three"),
        ("passed", "item 3 of its process"),  # it goes on in the same process
        ("failed", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("passed", "item 1 of its process"),  # after any other error, in a new one
        ("failed", "its process died (signal 11)"),
        ("passed", "item 1 of its process"),
        ("failed", "stopped after 0.3 s, its time limit"),
        ("passed", "item 1 of its process"),
        ("passed", "item 1 of its process"),
    ]
    assert sum("a process starts" in line for line in lines) == 5
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in lines)
    assert results.count(found, "failed") == 4 and found["seconds"] > 0


@pytest.mark.parametrize("start", ["refused", "hangs"])
def test_a_part_whose_process_does_not_start(tmp_path, monkeypatch, start):
    if start == "hangs":
        monkeypatch.setattr(plan, "START", 0.3)
    found, _ = ran(tmp_path, [doing("ok", "ok", start=start)])
    first, second = found["checks"]
    reason = "RuntimeError: no CUDA" if start == "refused" else "stopped after 0.3 s, its time limit"
    assert (first["status"], first["message"]) == ("failed", reason)
    assert second["status"] == "not run" and "does not start" in second["message"]


def test_the_time_of_a_part_and_of_everything(tmp_path):
    found, lines = ran(tmp_path, [doing("hangs", "ok", limit=0.2), doing("ok")])
    assert sum("a process starts" in line for line in lines) == 2  # none for what the time is not enough for
    assert [entry["status"] for entry in found["checks"]] == ["not run", "not run", "passed"]
    assert re.fullmatch(
        r"stopped after \d+\.\d s: the time limit of its part was reached", found["checks"][0]["message"]
    )
    assert found["checks"][1]["message"] == "the time limit of its part was reached"
    hanging = Part("slow", Doing, (), [Item("long", "hangs", limit=60)])
    found, _ = ran(tmp_path, [hanging, doing("ok", "ok")], seconds=1)
    assert {entry["status"] for entry in found["checks"]} == {"not run"}
    assert all(entry["message"].endswith("the time limit was reached") for entry in found["checks"])


def test_what_cannot_run_here_is_said(tmp_path):
    items = [
        Item("a", "ok", cuda=True),
        Item("b", "ok", needs=lambda: "needs a parrot"),
        Item("c", ROW, cuda=True, row=ROW),
    ]
    found, lines = ran(tmp_path, [Part("a part", Doing, (), items)], cuda=False)
    assert [entry["message"] for entry in found["checks"]] == ["needs CUDA", "needs a parrot"]
    assert [row["message"] for row in found["rows"]] == ["needs CUDA"]
    assert not any("a process starts" in line for line in lines) and results.count(found, "failed") == 0


def test_rows_and_the_difference_of_their_results(tmp_path):
    ones = np.ones(4)
    measured = [figures(2.0, ones), figures(3.0, 1.01 * ones), figures(1.0, 2 * ones), figures(0.5)]
    measured.insert(0, figures(1.0, np.nan * ones))  # to which the others are not compared
    ways = ["not finite", "recorded", "eager", "wrong", "other"]
    items = [Item(way, one, row=ROW._replace(way=way), cuda=True) for way, one in zip(ways, measured, strict=True)]
    found, _ = ran(tmp_path, [Part("times", Doing, (), items)])
    first, *rows = found["rows"]
    assert (first["status"], first["message"]) == ("failed", "its latents are not finite")
    assert [row["status"] for row in rows] == ["measured", "measured", "failed", "measured"]
    assert [row.get("difference") for row in rows] == [None, pytest.approx(0.01), pytest.approx(1.0), None]
    assert rows[2]["message"] == "its latents differ from those of (recorded) by 1: not comparable"
    assert all("result" not in row for row in rows)
    json.dumps(found)


def test_a_worker_that_takes_too_long_is_killed(tmp_path):
    with Worker("x", tmp_path / "log", Echo, "x", limit=60) as worker:
        assert worker.ask("divide", 1, 2, limit=60) == 0.5
        process = worker._process
    with Worker("x", tmp_path / "log", Doing) as worker:
        process = worker._process
        with pytest.raises(TooSlow, match=r"x failed: stopped after 0\.2 s, its time limit"):
            worker.ask("do", "hangs", limit=0.2)
        assert process.exitcode == -9


def is_alive(pid: int) -> bool:
    """Whether there is such a process; one that has ended, but whose parent does not know it yet (Z), is none."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ends(pid: int) -> bool:
    """Whether a process ends in the next seconds."""
    until = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


PARENT = """
import sys
from pathlib import Path
from bench_workers import Starting
from scripts.benchmark.workers import Worker
if __name__ == "__main__":
    worker = Worker("x", Path(sys.argv[1]), Starting)
    print(*worker.ask("processes"), flush=True)
    worker.ask("do", "hangs")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at the processes of Linux")
def test_no_process_is_left(tmp_path):
    """Neither when a worker is killed, with what it has started, nor when the program is killed that started it."""
    with Worker("x", tmp_path / "log", Starting) as worker:
        started = worker.ask("processes")
        assert all(map(is_alive, started))
        with pytest.raises(TooSlow):
            worker.ask("do", "hangs", limit=0.1)
        assert all(map(ends, started))
    program = tmp_path / "program.py"
    program.write_text(PARENT)
    places = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent)))
    with subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "log")],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": places},
    ) as parent:  # fmt: skip
        started = list(map(int, parent.stdout.readline().split()))
        assert len(started) == 2 and all(map(is_alive, started))
        parent.kill()
    assert all(map(ends, started))


def row(way: str, seconds: float, what: str = "steps", program: str = "ours", **more: object) -> dict:
    given = {"images": 1, "status": "measured", "message": "", "title": way, "tensors": 1, "reserved": 2, **more}
    return {"what": what, "program": program, "way": way, "seconds": seconds, **given}


def test_targets():
    """(The figures are made up.)"""
    found = record(name="NVIDIA H200 of the tests")
    assert [target["reached"] for target in results.targets(found)] == [None] * 4
    found["rows"] = [
        row("recorded", 0.5),
        row("eager", 0.1),  # not the way that users get
        row("recorded", 0.1, images=4),
        row("recorded", 0.7, "image", tensors=2_500_000_000, reserved=2_700_000_000),
        row("eager", 0.1, program="diffusers"),
        row("max-autotune", 0.6, program="diffusers"),
        row("reduce-overhead", 0.2, program="diffusers", status="failed"),
    ]
    speed, peer, memory, reserved = results.targets(found)
    assert (speed["reached"], speed["value"], speed["goal"]) == (False, "500.0 ms", "at most 450.0 ms")
    assert (peer["reached"], peer["goal"]) == (True, "at most 600.0 ms")
    assert (memory["reached"], memory["value"]) == (True, "2.50 GB")
    assert (reserved["reached"], reserved["value"]) == (False, "2.70 GB")
    found["machine"]["name"] = "another card"
    assert results.targets(found)[0]["reached"] is None
    assert results.targets(found | {"cuda": False}) == []


@pytest.mark.parametrize("markdown", [False, True])
def test_the_file_is_shown(tmp_path, capsys, markdown):
    found = record()
    found["rows"] = [row("recorded", 2.0, difference=0.01), row("eager", 4.0, images=4), row("x", 0, status="not run")]
    found["checks"] = [{"title": "a check", "status": "failed", "message": "one is two"}]
    found["targets"] = results.targets(found)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(found))
    assert bench.main(["--show", str(file), *(["--markdown"] if markdown else [])]) == 0
    shown = capsys.readouterr().out
    for words in ("a card of the tests, driver 1, CUDA 2, cuDNN 3, 2000-01-01", "ours, recorded", "failed: one is two"):
        assert words in shown
    assert "0 passed, 2 measured, 1 failed, 1 not run; not complete" in shown
    assert ("| what " in shown) == markdown
    assert re.search(r"steps +(\| )?ours, recorded +(\| )? *1 +(\| +)?2\.00 s +(\| +)?0\.50", shown)
    assert bench.main(["--show", str(file), "--compare", str(file)]) == 1
    assert f"error: --compare {file}: a file of --check; give one" in capsys.readouterr().err
    earlier = Path(__file__).parents[1] / "docs" / "bench.json"
    assert bench.main(["--show", str(file), "--compare", str(earlier)]) == 1
    assert f"error: --compare cannot be used with {file}, a file of --check" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [0, 1])
def test_stopped_before_and_after_the_first_result(tmp_path, monkeypatch, capsys, saved):
    """There is a file if there are results, and it is named."""

    def stop(running, parts):
        for _ in range(saved):
            running.save()
        raise KeyboardInterrupt

    monkeypatch.setattr(Running, "all", stop)
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--check", "--tiny", "--device", "cpu"]) == 130
    assert len(list(tmp_path.iterdir())) == saved
    assert ("the results so far are in gpu.json" in capsys.readouterr().out) == bool(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--check", "--device", "cpu"], "--check needs a GPU, and the device is cpu: .* add --tiny"),
        (["--check", "--tiny", "--parts", "unet"], "--parts has no effect with --check"),
        (["--check", "--tiny", "--dtype", "float32"], "--dtype has no effect with --check"),
        (["--check", "--tiny", "--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--check", "--tiny", "--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--minutes", "3"], "--minutes is for --check only"),
        (["--check", "--tiny", "--device", "cpu", "--json", __file__], "there is such a file already"),
    ],
)
def test_wrong_arguments_are_said_in_a_line(capsys, options, message):
    assert bench.main(options) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert bench.main(["--check", "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert "device 'cuda' is not available here" in said and said.count("\n") == 1


def small(parts: list[Part]) -> list[Part]:
    """A few seconds of the real parts: one check and one row of ours."""
    checks = [item for item in parts[0].items if item.ask == "parity_float32"]
    rows = [item for item in parts[3].items if item.row == Row("steps", 1, "ours", "eager")]
    assert checks and rows
    return [
        Part(parts[0].name, parts[0].make, parts[0].arguments, checks),
        Part("x", parts[3].make, parts[3].arguments, rows),
    ]


@pytest.mark.parametrize("failing", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_a_trial_on_the_cpu(tmp_path, monkeypatch, capsys, failing):
    """The real processes once; with a part that fails, the exit status is 1 and the file has all."""
    all_parts = plan.all_parts
    parts = (lambda place: [doing("dies"), doing("ok")]) if failing else (lambda place: small(all_parts(place)))
    monkeypatch.setattr(plan, "all_parts", parts)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpu.json").touch()
    assert bench.main(["--check", "--tiny", "--device", "cpu", "--threads", "1"]) == int(failing)
    out = capsys.readouterr().out
    assert out.rstrip().endswith("written to gpu-2.json")
    found = json.loads((tmp_path / "gpu-2.json").read_text())
    statuses = [entry["status"] for entry in (*found["checks"], *found["rows"])]
    assert statuses == (["failed", "passed"] if failing else ["passed", "measured"])
    assert found["settings"]["trial"] and found["machine"]["versions"]["torch"] == torch.__version__
    assert bench.main(["--show", "gpu-2.json"]) == 0
    assert capsys.readouterr().out.strip() in out


@pytest.mark.exhaustive
def test_the_whole_trial(tmp_path):
    """Everything that a CPU can do passes, within a minute of a machine that is not busy."""
    file = tmp_path / "gpu.json"
    assert bench.main(["--check", "--tiny", "--device", "cpu", "--threads", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    reasons = {entry["message"] for entry in (*found["checks"], *found["rows"]) if entry["status"] == "not run"}
    assert all(reason == "needs CUDA" or "not installed" in reason for reason in reasons)
    assert results.count(found, "passed") >= 9
