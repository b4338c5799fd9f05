"""Training in several processes, and in one that is killed: everything is as if nothing had happened."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from random import Random

import pytest
import torch
from forked_runs import Child, forking, loads
from safetensors.torch import load_file
from test_sdxl_training import SMALL_XL, random_model
from test_train_scripts import ONE_THREAD, QUICK, ROOT, TORCHRUN, new, photos, same  # noqa: F401

from scripts.training.log import read_log
from scripts.training.models import write_model
from scripts.training.state import load_state

RUN = ("--samples", 0, "--log-every", 1, "--save-every", 2, "--steps", 4, "--batch", 2)
TWO = ("--samples", 0, "--log-every", 1, "--steps", 1)
# half of the runs end at a random time, the others where they write their files: 11 in a run, and 2 states
KILLS = [("time", i) for i in range(25)] + [(end, i) for i in range(11) for end in ("before", "after")]
KILLS += [("half", 0), ("half", 1), ("before", 3)]
KILLS = [KILLS[(i % 2) * 25 + i // 2] for i in range(50)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Programs that start at once."""
    with forking(tmp_path_factory.mktemp("runs")) as found:
        yield found


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(children: list[Child], status: int = 0) -> None:
    for child in children:
        assert child.wait() == status, child.printed()


def distance(a, b) -> float:
    """The relative distance of the tensors of two dictionaries."""
    assert a.keys() == b.keys() and len(a) > 20
    x, y = (torch.cat([value.flatten().float() for value in found.values()]) for found in (a, b))
    return ((x - y).norm() / x.norm()).item()


@pytest.mark.exhaustive
@pytest.mark.parametrize("more", [("--shard",), ("--shard", "--checkpointing", "--accumulate", 2), ()])
def test_two_processes_compute_what_one_does(more, new, photos, server, port, tmp_path):  # noqa: F811
    """Weights, average and moments after a step; then each goes on where the other stopped."""
    common = ("--data", photos, *new, *TWO, "--validate", 0.25)
    parts = 2 if "--accumulate" in more else 1
    alone = ("--batch", 4 // parts, "--accumulate", parts, "--out", tmp_path / "one")
    one = server.start("train", *common, *alone)
    two = server.pair("train", *common, *more, "--batch", 2 // parts, "--out", tmp_path / "two", port=port)
    ended([one, *two])
    assert ("sharded over 2 processes" in two[0].printed()) == ("--shard" in more)
    compare(tmp_path)
    if "--accumulate" in more:
        return
    again = ("--resume", "--steps", 2)
    one = server.start("train", "--out", tmp_path / "two", *again, "--no-shard", "--batch", 4)
    two = server.pair("train", "--out", tmp_path / "one", *again, *more, "--batch", 2, port=port)
    ended([one, *two])
    compare(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("more", [(), ("--train-text", "--checkpointing")])
def test_sdxl_is_sharded(more, photos, server, port, tmp_path):  # noqa: F811
    """Its text encoders have weights of two widths, and blocks of several depths."""
    write_model(random_model(SMALL_XL), tmp_path / "xl.safetensors", torch.float32)
    common = ("--data", photos, "--ckpt", tmp_path / "xl.safetensors", *QUICK, *TWO, "--lr", 1e-4, *more)
    one = server.start("train", *common, "--batch", 4, "--out", tmp_path / "one")
    two = server.pair("train", *common, "--shard", "--batch", 2, "--out", tmp_path / "two", port=port)
    ended([one, *two])
    compare(tmp_path)
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert distance(*models) < 1e-3 and models[0]["unet.conv_in.weight"].dtype == torch.float16


def compare(folder) -> None:
    one, two = (load_state(folder / name / "state.pt") for name in ("one", "two"))
    assert one["step"] == two["step"]
    assert distance(one["networks"], two["networks"]) < 1e-5
    assert distance(one["ema"]["average"], two["ema"]["average"]) < 1e-5
    names = [name for group in one["optimizers"][0]["param_groups"] for name in group["names"]]
    for moment in ("exp_avg", "exp_avg_sq"):
        found = [
            {names[i]: kept[moment] for i, kept in state["optimizers"][0]["state"].items()} for state in (one, two)
        ]
        assert distance(*found) < 1e-5
    lines = [read_log(folder / name / "train.jsonl") for name in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4 if name == "norm" else 1e-5)
        if "validation" in a:
            assert a["validation"]["deciles"] == pytest.approx(b["validation"]["deciles"], rel=1e-4)


@pytest.mark.exhaustive
def test_a_killed_process_costs_no_more_than_the_last_interval(new, photos, server, port, tmp_path):  # noqa: F811
    """torchrun starts both again with the same words. Killed before anything is saved, they begin again."""
    options = ("--data", photos, *new, *RUN, "--ema", 0.5)
    whole = server.start("train", *options, "--batch", 4, "--out", tmp_path / "whole")
    words = ("train", *options, "--steps", 4, "--out", tmp_path / "out")
    for restart, saved in ((0, False), (1, True)):  # when it is killed: before and after something is saved
        pair = server.pair(*words, port=port, restart=restart)
        state = tmp_path / "out" / "state.pt"
        wait_until(lambda: (tmp_path / "out" / ".restarts").exists() and (not saved or state.exists()))  # noqa: B023
        pair[1].signal(signal.SIGKILL)
        assert pair[1].wait() == -signal.SIGKILL
        status = pair[0].wait()
        assert status == 1 and "error: process 0 lost the others: " in pair[0].printed()
        assert "Traceback" not in pair[0].printed()
        assert state.exists() == saved and (not saved or load_state(state)["step"] < 4)
    ended([*server.pair(*words, port=port, restart=2), whole])
    one, two = (load_state(tmp_path / name / "state.pt") for name in ("whole", "out"))
    assert two["step"] == 4 and distance(one["networks"], two["networks"]) < 1e-5
    assert [line["step"] for line in read_log(tmp_path / "out" / "train.jsonl")] == [1, 2, 3, 4]
    # a folder with a run is refused, and a restart does not change that
    for restart in (0, 1):
        pair = server.pair(*words, port=port, restart=restart)
        ended(pair, 1)
        assert pair[0].printed().splitlines()[-1] == (
            f"error: {tmp_path / 'out'} already has a run: continue it (--resume) or choose another --out"
        )


@pytest.mark.exhaustive
def test_torchrun_restarts_a_killed_process(new, photos, server, port, tmp_path):  # noqa: F811
    """The real one, with its own environment and signals. To the bit as two processes that nothing disturbs."""
    options = ("--data", photos, *new, *RUN, "--ema", 0.5, "--steps", 8)
    whole = server.pair("train", *options, "--out", tmp_path / "whole", port=port)
    command = [*TORCHRUN, "--max-restarts", "3", ROOT / "scripts" / "train.py", *options, "--out", tmp_path / "out"]
    with open(tmp_path / "printed.txt", "w") as printed:
        running = subprocess.Popen([*map(str, command)], stdout=printed, stderr=printed, env=ONE_THREAD)
    try:
        wait_until((tmp_path / "out" / "state.pt").exists, 120)
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert running.wait(timeout=120) == 0, (tmp_path / "printed.txt").read_text()
    finally:
        running.terminate()  # and its processes
        running.wait(timeout=60)
    ended(whole)
    assert same(*(load_state(tmp_path / name / "state.pt") for name in ("whole", "out")))
    assert not (tmp_path / "out" / ".restarts").exists()
    assert [line["step"] for line in read_log(tmp_path / "out" / "train.jsonl")] == [*range(1, 9)]


@pytest.fixture(scope="module")
def whole(new, photos, server, tmp_path_factory):  # noqa: F811
    """The words of a run that is not disturbed, where it is, and its seconds."""
    words = ("train", "--data", photos, *new, *RUN, "--samples", 1, "--sample-steps", 2, "--ema", 0.5)
    out, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    ended([server.start(*words, "--out", out)])
    return words, out, time.monotonic() - began


@pytest.mark.parametrize("moment", KILLS, ids=lambda moment: f"{moment[0]}-{moment[1]}")
@pytest.mark.sampled(65)
def test_a_run_killed_at_any_moment_goes_on(moment, whole, server, tmp_path):
    words, _, seconds = whole
    end, number = moment
    if end == "time":
        killed = server.start(*words, "--out", tmp_path)
        time.sleep((number + Random(number).random()) / 25 * seconds)
        killed.signal(signal.SIGKILL)
        assert killed.wait() in (-signal.SIGKILL, 0)
    else:
        assert server.start(*words, "--out", tmp_path, end=end, at=number).wait() == -signal.SIGKILL
    goes_on(whole, server, tmp_path)


@pytest.mark.parametrize("moment", [5, *range(5), *range(6, 12)])
@pytest.mark.sampled(12)
def test_ctrl_c_at_any_moment(moment, whole, server, tmp_path):
    """Also while the data is read: one line, and nothing half-written."""
    words, _, seconds = whole
    stopped = server.start(*words, "--out", tmp_path)
    time.sleep((moment + Random(moment).random()) / 12 * seconds)
    stopped.signal(signal.SIGINT)
    status = stopped.wait()
    printed = stopped.printed()
    assert status in (130, 0) and "Traceback" not in printed
    assert status == 0 or "stopped" in printed.splitlines(), printed
    goes_on(whole, server, tmp_path)


def goes_on(whole, server, out) -> None:
    """What is there can be read; the run goes on, or begins again, and ends as if nothing had happened."""
    words, undisturbed, _ = whole
    loads(out)
    resume = ("--resume",) if (out / "state.pt").exists() else ()
    ended([server.start(*(words[:1] if resume else words), "--out", out, *resume)])
    assert same(*(load_state(folder / "state.pt") for folder in (undisturbed, out)))
    assert same(*(load_file(folder / "model.safetensors") for folder in (undisturbed, out)))
    assert (out / "samples-000004.png").exists()  # its last bits depend on the kernels that the process found fastest
    assert [line["step"] for line in read_log(out / "train.jsonl")] == [1, 2, 3, 4]
    loads(out)


def wait_until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)
