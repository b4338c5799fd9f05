"""The benchmark on a small network: every row there, every figure a number that follows from the others."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from scripts import bench, peers
from sd.config import POCKET, SD1
from sd.loading import build

LABELS = {
    "unet": "U-Net step, 2 x 16x16",
    "vae": "VAE decode, 128x128",
    "text": "text encoder, 2 prompts",
    "picture": "picture, 2 steps, 128x128",
    "start": "start to first step",
}
TINY = ["--tiny", "--device", "cpu", "--runs", "1", "--steps", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """The machine's peak is measured with little work."""
    monkeypatch.setitem(bench.PEAK_SIZE, "cpu", 256)
    monkeypatch.setattr(bench, "PEAK_SIDE", 8)


def run(tmp_path, *options: str) -> list[dict]:
    """The figures of a run that succeeds."""
    file = tmp_path / "bench.json"
    threads = torch.get_num_threads()
    assert bench.main([*TINY, "--json", str(file), *options]) == 0
    assert torch.get_num_threads() == threads
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] == 1 and written["machine"]["versions"]["torch"] == torch.__version__
    return written["figures"]


def check_figures(figures: list[dict], parts: list[str], dtypes: list[str], peer: bool) -> None:
    assert [(row["dtype"], row["part"]) for row in figures] == [(d, part) for d in dtypes for part in parts]
    for row in figures:
        assert row["label"] == LABELS[row["part"]]
        assert all(math.isfinite(value) and value > 0 for value in row.values() if isinstance(value, float))
        assert row["runs"]["ours"] == [row["ours"]] and (row["peer"] is not None) == peer
        if peer:
            assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        if row["part"] == "start":
            assert row["gflop"] is None and 1e8 < row["memory_ours"] < 4e9 and row["ours"] > 0.2
        else:
            assert row["gflops"] == pytest.approx(row["gflop"] / row["ours"]) and row["memory_ours"] is None


def test_without_peer(tmp_path, capsys):
    parts = ["unet", "vae", "text", "picture"]
    figures = run(tmp_path, "--no-peer", "--parts", *reversed(parts), "--dtype", "float32", "bfloat16")
    check_figures(figures, parts, ["float32", "bfloat16"], peer=False)
    by_part = {row["part"]: row["gflop"] for row in figures}
    assert by_part["picture"] == pytest.approx(2 * by_part["unet"] + by_part["vae"] + by_part["text"])
    lines = capsys.readouterr().out.splitlines()
    assert "cores, 1 threads" in lines[0] and "diffusers" not in lines[1]
    assert sum(line.startswith(tuple(LABELS.values())) for line in lines) == 8


def test_with_peer(tmp_path, capsys):
    for name in peers.REQUIRED:
        pytest.importorskip(name, reason=f"compares with {name}, which is not installed")
    figures = run(tmp_path, "--dtype", "float32", "--markdown")
    check_figures(figures, list(LABELS), ["float32"], peer=True)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 7 and len({line.count("|") for line in table}) == 1
    assert [line.split("|")[1].strip() for line in table[2:]] == list(LABELS.values())


def test_start_without_peer(tmp_path):
    check_figures(run(tmp_path, "--no-peer", "--parts", "start", "--dtype", "float32"), ["start"], ["float32"], False)


def test_arithmetic_of_stable_diffusion():
    """Counted without memory; the U-Net's published 0.80 TFLOP a picture, twice for guidance."""
    counts = bench.flops(SD1)
    assert counts["unet"] == pytest.approx(1.607e12, rel=1e-2) and counts["vae"] == pytest.approx(2.515e12, rel=1e-2)
    small, width, inner = bench.flops(POCKET)["text"], POCKET.text.width, 4 * POCKET.text.width
    tokens = 2 * POCKET.text.length
    linear = 2 * tokens * POCKET.text.layers * (4 * width**2 + 2 * width * inner)
    scores = 2 * tokens * POCKET.text.layers * 2 * POCKET.text.length * width
    assert small == pytest.approx(linear + scores)


def test_random_weights_are_the_same_every_time():
    meta = build(POCKET)["vae"].state_dict()
    first, second = bench.RandomWeights(meta), bench.RandomWeights(meta)
    assert list(first) == list(meta) and len(first) == len(meta)
    assert all(torch.equal(first[key], second[key]) and first[key].shape == meta[key].shape for key in meta)
    kernel = first["decoder.mid.res.0.conv1.weight"]
    assert float(kernel.std()) * kernel[0].numel() ** 0.5 == pytest.approx(bench.WEIGHT_STD, rel=0.02)
    assert not torch.equal(kernel, first["decoder.mid.res.0.conv2.weight"])


def test_results_that_differ_are_not_compared():
    one = torch.ones(4)
    bench.check("x", {"ours": one, "peer": 1.01 * one})
    with pytest.raises(ArithmeticError, match=r"x: ours and diffusers' differ by 0\.5: not comparable"):
        bench.check("x", {"ours": one, "peer": 2 * one})
    with pytest.raises(ArithmeticError, match="not finite"):
        bench.check("x", {"ours": one / 0})


@pytest.mark.parametrize(
    "options, message",
    [
        (["--runs", "0"], "--runs must be at least 1, got 0"),
        (["--ckpt", "x.ckpt"], "give --ckpt or --tiny, not both"),
        (["--device", "abacus"], "device 'abacus' is not available here"),
        (["--json", __file__], "there is such a file already"),
    ],
)
def test_refusals(capsys, options, message):
    assert bench.main([*TINY, "--no-peer", "--parts", "text", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_missing_file(tmp_path, capsys):
    assert bench.main(["--no-peer", "--parts", "text", "--device", "cpu", "--ckpt", str(tmp_path / "no.ckpt")]) == 1
    error = capsys.readouterr().err
    assert "no.ckpt" in error and error.count("\n") == 1


def test_a_start_that_fails_says_why():
    with pytest.raises(OSError, match="the start of ours failed: ZeroDivisionError"):
        bench.child("ours", "1 / 0", {"threads": 1, "dtype": "float32", "device": "cpu"})


def test_without_diffusers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs diffusers and transformers: pip install diffusers transformers"):
        peers.peers(build(POCKET), POCKET, torch.float32)
    check_figures(run(tmp_path, "--parts", "text", "--dtype", "float32"), ["text"], ["float32"], peer=False)
    assert "not compared: diffusers and transformers not installed" in capsys.readouterr().out
