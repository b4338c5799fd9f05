"""The benchmark on a small network: every row there, every figure a number that follows from the others."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_workers import Dying, Echo
from tqdm import tqdm

from scripts import bench
from scripts.benchmark import kernels, report, sides, start
from scripts.benchmark import references as peers
from scripts.benchmark.cases import (
    IMAGES,
    PARTS,
    Case,
    all_cases,
    arguments,
    config_of,
    flop,
    inner_cases,
    inputs,
    label,
    usual_case,
    weight_bytes,
)
from scripts.benchmark.interleave import Comparison, alternate, compared, measure
from scripts.benchmark.openvino_networks import model_file
from scripts.benchmark.peak import peak
from scripts.benchmark.runner import Run, settle
from scripts.benchmark.weights import WEIGHT_STD, RandomWeights, Setup, load_networks
from scripts.benchmark.workers import Failed, Worker
from sd.config import POCKET, SD1, SD1_INPAINT, SDXL, TinyVAEConfig, VAEConfig
from sd.models.build import build
from sd.models.taesd import TinyVAE
from sd.models.text_encoder import TextOutput
from sd.pipeline import StableDiffusion
from sd.runtime import kernel_choice, packing
from sd.runtime.cuda_graphs import Recorded

LABELS = {
    "unet": "U-Net step, 2 x 16x16",
    "control": "controlled step, 2 x 16x16",
    "vae": "VAE decode, 128x128",
    "taesd": "TAESD decode, 128x128",
    "text": "text encoder, 2 prompts",
    "picture": "picture, 2 steps, 128x128",
    "lcm": "LCM picture, 2 steps, 128x128",
    "lcm-taesd": "LCM with TAESD, 2 steps, 128x128",
    "start": "start to first step",
}
TINY = ["--tiny", "--device", "cpu", "--runs", "1", "--steps", "2", "--threads", "1"]
CPU = torch.device("cpu")
BAR = tqdm(disable=True)
SETUP = Setup(POCKET, None, CPU, "float32", 1, Path("."))
MEMORY_IS_COUNTED = Path("/proc/self/clear_refs").exists()  # on Linux


def needs(*packages: str) -> None:
    """Skip where the packages are not installed."""
    for name in packages:
        if find_spec(name) is None:
            pytest.skip(f"compares with {name}, which is not installed")


def measured(tmp_path: Path, *options: str) -> dict:
    """What a run that succeeds writes."""
    file, threads = tmp_path / "bench.json", torch.get_num_threads()
    assert bench.main([*TINY, "--json", str(file), *options]) == 0
    assert torch.get_num_threads() == threads
    record = json.loads(file.read_text())
    assert record["machine"]["threads"] == 1 and record["machine"]["versions"]["torch"] == torch.__version__
    return record


def check_figures(record: dict, parts: list[str], dtypes: list[str], names: list[str]) -> None:
    """The usual rows are those, and each figure follows from the others."""
    rows = [row for row in record["figures"] if row["usual"]]
    assert [(row["dtype"], row["part"]) for row in rows] == [(dtype, part) for dtype in dtypes for part in parts]
    assert record["notes"] == [] and [row["label"] for row in rows] == [LABELS[part] for _ in dtypes for part in parts]
    for row in record["figures"]:
        assert all(math.isfinite(value) and value > 0 for value in row.values() if isinstance(value, float))
        assert len(row["runs"]) == max(len(names), 1) and list(row["peers"]) == names
        for its in row["peers"].values():
            assert its["ratio"] == pytest.approx(its["ours"] / its["seconds"])
            assert its["difference"] is None or 0 <= its["difference"] < (0.1 if row["dtype"] == "bfloat16" else 1e-4)
            assert (its["difference"] is None) == (row["part"] in (*IMAGES, "start"))
        if row["part"] == "start":
            assert row["gflop"] is None and 1e8 < row["memory"] < 4e9 and row["ours"] > 0.2
        else:
            assert row["gflops"] == pytest.approx(row["gflop"] / row["ours"]) and 0 < row["of_peak"] < 1.5


def check_with(peer: str, record: dict, parts: list[str], dtypes: list[str]) -> None:
    """The same of a run with one peer; where the peer itself cannot run on this processor, the notes say so."""
    if record["notes"]:
        assert all(f": {peer} failed: " in note for note in record["notes"])
        assert [row["part"] for row in record["figures"] if row["usual"]] == [part for _ in dtypes for part in parts]
        pytest.skip("; ".join(record["notes"]))
    check_figures(record, parts, dtypes, [peer])


@pytest.mark.exhaustive
def test_alone(tmp_path, capsys):
    """Without peers."""
    options = ["--peers", "--parts", "vae", "unet", "--dtype", "float32", "--sizes", "64", "128", "--batches", "1", "2"]
    record = measured(tmp_path, *options)
    check_figures(record, ["unet", "vae"], ["float32"], [])
    assert Counter((row["part"], row["size"], row["batch"]) for row in record["figures"]) == Counter(
        [("unet", 64, 1), ("unet", 128, 1), ("unet", 128, 2), ("vae", 64, 1), ("vae", 128, 1)]
    )
    if MEMORY_IS_COUNTED:
        assert all(row["weights"] < row["memory"] < row["weights"] + 5e8 for row in record["figures"])
    lines = capsys.readouterr().out.splitlines()
    assert "cores, 1 threads" in lines[0] and lines[2] == "pocket, random weights, medians"
    assert sum(line.startswith(tuple(LABELS.values())) for line in lines) == 4  # time and memory
    growth = [["64x64", "1"], ["128x128", "1"], ["128x128", "1"], ["128x128", "2"]]
    tables = 2 if MEMORY_IS_COUNTED else 1  # of time, of memory
    assert [line.split()[3:5] for line in lines if line.startswith("U-Net step  ")] == growth * tables


@pytest.mark.exhaustive
def test_a_peer(tmp_path, capsys, monkeypatch):
    """With one peer, the smallest part, all in this process; `test_every_peer` runs each peer in its own process."""
    needs(*peers.REQUIRED)
    monkeypatch.setattr("scripts.benchmark.interleave.Worker", InThisProcess)
    monkeypatch.setattr("scripts.benchmark.runner.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    record = measured(tmp_path, "--peers", "diffusers", "--parts", "text", "--dtype", "float32", "--markdown")
    check_with("diffusers", record, ["text"], ["float32"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:3]] == [LABELS["text"]]


class InThisProcess:
    """Stands in for a worker, without the time that a process needs to import diffusers."""

    def __init__(self, name: str, log: Path, make: Callable[..., object], *arguments: object) -> None:
        self.name, self.made = name, make(*arguments)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, method: str, *arguments: object) -> object:
        return getattr(self.made, method)(*arguments)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("peer", "parts"),
    [
        ("diffusers", ["taesd", "text", "picture", "lcm", "lcm-taesd", "start"]),
        ("openvino", ["unet", "taesd", "picture", "lcm", "lcm-taesd", "start"]),
        ("compiled", ["text"]),
    ],
)
def test_every_peer(tmp_path, peer, parts):
    needs(*peers.REQUIRED, *(["openvino"] if peer == "openvino" else []))
    if peer == "compiled" and (lines := [line for line in sides.able_peers(None, CPU)[1] if "compiled" in line]):
        pytest.skip(lines[0])
    record = measured(tmp_path, "--peers", peer, "--parts", *parts, "--dtype", "float32", "--sizes", "64")
    check_with(peer, record, parts, ["float32"])
    assert len(record["figures"]) == len(parts) + ("unet" in parts)


@pytest.mark.exhaustive
def test_arithmetic_of_stable_diffusion():
    """Counted without memory; the U-Net's published 0.80 TFLOP a picture, twice for guidance."""
    unet, vae = (flop(usual_case(part, SD1), SD1) for part in ("unet", "vae"))
    assert unet == pytest.approx(1.607e12, rel=1e-2) and vae == pytest.approx(2.515e12, rel=1e-2)
    small, width, inner = flop(usual_case("text", POCKET), POCKET), POCKET.text[0].width, 4 * POCKET.text[0].width
    tokens = 2 * POCKET.text[0].length
    linear = 2 * tokens * POCKET.text[0].layers * (4 * width**2 + 2 * width * inner)
    scores = 2 * tokens * POCKET.text[0].layers * 2 * POCKET.text[0].length * width
    assert small == pytest.approx(linear + scores)
    assert flop(usual_case("picture", SD1, 4), SD1) == 4 * unet + vae + flop(usual_case("text", SD1), SD1)
    assert flop(Case("unet", 512, 8), SD1) == pytest.approx(8 * unet)
    assert 4 * unet < flop(Case("unet", 1024), SD1) < 16 * unet  # attention grows with the square of the tokens
    assert weight_bytes("unet", SD1, torch.bfloat16) == 2 * 859_520_964


def test_cases():
    """The usual one is always there; no case twice; the least work first."""
    assert all_cases("text", SD1, 4, [256], [8]) == [Case("text", 512)]
    assert all_cases("picture", SD1, 4, [256], [8]) == [Case("picture", 512, steps=4)]
    assert all_cases("vae", SD1, 4, [1024, 256, 512], [8]) == [Case("vae", 256), Case("vae", 512), Case("vae", 1024)]
    grown = all_cases("unet", SD1, 4, [768, 256], [4, 2])
    assert grown == [Case("unet", *more) for more in ((256,), (512,), (512, 2), (768,), (512, 4))]
    assert label(grown[2], SD1) == "U-Net step, 4 x 64x64" and label(grown[3], SD1) == "U-Net step, 2 x 96x96"


def test_cases_of_few_steps():
    """Without guidance: one prompt and one item a step, so half the arithmetic of the U-Net; the decoder is smaller."""
    config = config_of("lcm-taesd", POCKET)
    assert config == replace(POCKET, vae=TinyVAEConfig()) and config_of("lcm", POCKET) == POCKET
    case = usual_case("lcm-taesd", POCKET, 4)
    assert case == Case("lcm-taesd", 128, steps=4, guided=False)
    assert all_cases("lcm-taesd", POCKET, 4, [64], [2]) == [case]
    shapes = {part: inputs(inner, POCKET)[0].shape for part, inner in inner_cases(case, POCKET).items()}
    assert shapes == {"text": (1, 77), "unet": (1, 4, 16, 16), "vae": (1, 4, 16, 16)}
    x, t, context = inputs(inner_cases(case, POCKET)["unet"], POCKET)
    assert len(x) == len(t) == len(context) == 1 and len(inputs(usual_case("unet", POCKET), POCKET)[0]) == 2
    step, text = (flop(usual_case(part, POCKET), POCKET) / 2 for part in ("unet", "text"))
    decoders = flop(usual_case("vae", POCKET), POCKET), flop(usual_case("taesd", config), config)
    for part, its, decoder in zip(("lcm", "lcm-taesd"), (POCKET, config), decoders, strict=True):
        assert flop(usual_case(part, its, 4), its) == pytest.approx(4 * step + decoder + text)
    # every convolution of TAESD's decoder, the 3x3 kernels of 9 weights, counted by hand
    h = 16 * 16
    blocks = 2 * 9 * 64 * 64 * (9 * (1 + 4 + 16) + 3 * 64 + 4 + 16 + 64) * h
    assert decoders[1] == pytest.approx(blocks + 2 * 9 * 64 * (4 + 3 * 64) * h)


def test_networks_of_few_steps():
    """The tiny autoencoder takes the place of the VAE, in its files too; its weights are random beside a checkpoint."""
    for part in PARTS:
        tiny = part in ("taesd", "lcm-taesd")
        setup = SETUP.of_part(part)
        assert isinstance(setup.config.vae, TinyVAEConfig if tiny else VAEConfig) and setup.trial
        assert model_file(setup, "vae").name == ("taesd-float32.xml" if tiny else "vae-float32.xml")
        assert model_file(setup, "unet").name == "unet-float32.xml"
    drawn = load_networks(SETUP.of_part("taesd"), ["vae"])["vae"]
    beside = load_networks(replace(SETUP, ckpt=Path("nowhere.ckpt")).of_part("taesd"), ["vae"])["vae"]
    assert isinstance(drawn, TinyVAE) and isinstance(beside, TinyVAE)
    assert torch.equal(drawn.decoder.conv_in.weight, beside.decoder.conv_in.weight)


def test_settings_of_an_image(monkeypatch):
    """LCM without guidance, which needs one evaluation of the U-Net a step, or DDIM with guidance."""
    found = []
    monkeypatch.setattr(StableDiffusion, "txt2img", lambda model, *prompts, **settings: found.append(settings))
    for part in IMAGES:
        side = object.__new__(sides.Side)
        side.setup, side.networks = SETUP.of_part(part), build(SETUP.of_part(part).config)
        side.call(usual_case(part, POCKET, 4))()
    few = {"steps": 4, "guidance": 1, "sampler": "lcm"}
    assert found == [{"steps": 4, "guidance": 7.5, "sampler": "ddim"}, few, few]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [sides.Side, sides.Diffusers])
def test_an_image_of_few_steps(kind):
    """One evaluation a step, of one item, at the timesteps of LCM; diffusers' image is of AutoencoderTiny as well."""
    needs(*peers.REQUIRED)
    side, found = kind(SETUP.of_part("lcm-taesd"), "lcm-taesd"), []
    unet = getattr(side.networks["unet"], "model", side.networks["unet"])
    unet.register_forward_pre_hook(lambda _, given: found.append((len(given[0]), float(given[1]))))
    (image,) = side.call(usual_case("lcm-taesd", POCKET, 4))()
    assert image.size == (128, 128) and found == [(1, 999.0), (1, 759.0), (1, 499.0), (1, 259.0)]
    if kind is sides.Diffusers:
        assert type(side.networks["vae"].model).__name__ == "AutoencoderTiny"


def test_inputs_are_the_same_every_time():
    x, t, context = inputs(Case("unet", 64, 3), replace(SD1_INPAINT, size=64))
    assert x.shape == (6, 9, 8, 8) and context.shape == (6, 77, 768) and t.tolist() == [500.0] * 6
    again = inputs(Case("unet", 64, 3), replace(SD1_INPAINT, size=64))
    assert all(torch.equal(a, b) for a, b in zip((x, t, context), again, strict=True))
    (ids,) = inputs(usual_case("text", SD1), SD1)
    assert ids.shape == (2, 77) and ids.dtype == torch.int64


def test_random_weights_are_the_same_every_time():
    meta = build(POCKET)["vae"].state_dict()
    first, second = RandomWeights(meta), RandomWeights(meta)
    assert list(first) == list(meta) and len(first) == len(meta)
    assert all(torch.equal(first[key], second[key]) and first[key].shape == meta[key].shape for key in meta)
    kernel = first["decoder.mid.res.0.conv1.weight"]
    assert float(kernel.std()) * kernel[0].numel() ** 0.5 == pytest.approx(WEIGHT_STD, rel=0.02)
    assert not torch.equal(kernel, first["decoder.mid.res.0.conv2.weight"])


def test_turns():
    """One run of each that does not count, then each in turn; only the first results are kept."""
    order = []

    def call(name: str, seconds: float):
        def run(keep: bool) -> Run:
            order.append(name)
            return Run(seconds, None, np.full(4, seconds, np.float32) if keep else None)

        return run

    comparison = alternate({"ours": call("a", 1.0), "other": call("b", 1.1)}, 2, "x", BAR)
    assert order == ["a", "b"] * 3
    assert [run.seconds for run in comparison.ours] == [1.0] * 2
    assert [run.seconds for run in comparison.peer] == [1.1] * 2
    assert comparison.difference == pytest.approx(0.1 / 1.1)
    assert alternate({"ours": call("a", 1.0)}, 1, "x", BAR) == Comparison([Run(1.0, None)], [], None)


def test_results_that_differ_are_not_compared():
    one = np.ones(4, np.float32)
    assert compared("x", {"ours": one, "peer": 1.01 * one}) == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert compared("x", {"ours": one, "peer": None}) is None
    with pytest.raises(Failed, match=r"other failed: x: its result differs from ours by 0\.5: not comparable"):
        compared("x", {"ours": one, "other": 2 * one})
    with pytest.raises(Failed, match="ours failed: x: not finite") as failed:
        compared("x", {"ours": one * np.inf, "other": one})
    assert failed.value.who == "ours"


def test_a_worker(tmp_path, capfd):
    """Lives in a process of its own, says nothing, survives its errors and not the `with` block."""
    with Worker("echo", tmp_path / "log", Echo, "one") as worker:
        process = worker.ask("process")
        assert process != os.getpid() and worker.ask("divide", 3, 2) == 1.5
        with pytest.raises(Failed, match=r"^echo failed: division by zero$"):
            worker.ask("divide", 1, 0)
        with pytest.raises(Failed, match=r"^echo failed: KeyError: 'nothing"):
            worker.ask("lookup")
        with pytest.raises(Failed, match=r"^echo failed: no such model$"):
            worker.ask("complain")
        assert worker.ask("process") == process
        if MEMORY_IS_COUNTED:
            before, held, after = worker.ask("take", 300_000_000)
            assert held - before == pytest.approx(3e8, rel=0.1) and after - before < 1e8
        with pytest.raises(Failed, match=r"^echo failed: last words$"):
            worker.ask("die", "exit")
    assert "printed by one" in (tmp_path / "log").read_text() and capfd.readouterr() == ("", "")
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
def test_a_worker_that_is_killed(tmp_path):
    with Worker("echo", tmp_path / "log", Echo, "two") as worker, pytest.raises(Failed, match="memory runs out"):
        worker.ask("die", "kill")


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
def test_a_worker_that_is_killed_while_another_works(tmp_path):
    """The system does that when the other takes all memory."""
    with Worker("echo", tmp_path / "log", Echo, "three") as worker:
        os.kill(worker.ask("process"), signal.SIGKILL)
        worker._process.join(60)
        for _ in range(2):
            with pytest.raises(Failed, match=r"^echo failed: .* memory runs out$"):
                worker.ask("process")


def test_on_a_gpu_steps_are_recorded_as_in_the_pipeline():
    side = object.__new__(sides.Side)
    side.setup, network = replace(SETUP, device=torch.device("cuda")), torch.nn.Identity()
    side.networks = {"unet": network}
    assert isinstance(side.function(usual_case("unet", POCKET)), Recorded)
    assert side.function(usual_case("text", POCKET))(TextOutput("hidden")) == "hidden"
    side.setup = SETUP
    assert side.function(usual_case("unet", POCKET)) is network


def test_a_worker_that_cannot_be_made(tmp_path):
    with pytest.raises(Failed, match=r"^echo failed: this word is refused$"):
        Worker("echo", tmp_path / "log", Echo, "refused")


def test_settling_ends_when_nothing_runs():
    begin = time.process_time()
    settle()
    assert time.process_time() - begin < 0.5


def test_the_peak_is_of_something(monkeypatch):
    monkeypatch.setattr("scripts.benchmark.peak.SIDE", {"cpu": 64})
    monkeypatch.setattr("scripts.benchmark.peak.CONVOLUTIONS", ((32, 8),))
    monkeypatch.setattr("scripts.benchmark.peak.SECONDS", 0.01)
    assert peak(CPU, torch.float32) > 1e6
    assert SETUP.trial and not replace(SETUP, config=SD1).trial and not replace(SETUP, ckpt=Path("x")).trial


def example(ours: float = 2.0, theirs: float = 4.0) -> dict:
    """The record of a run that was not made."""
    case = usual_case("unet", POCKET)
    comparison = {
        "openvino": Comparison([Run(ours, 10), Run(ours, 30)], [Run(theirs, 20)], 1e-3),
        "diffusers": Comparison([Run(2 * ours, None)], [Run(ours, None)], None),
    }
    grown = {"": Comparison([Run(3 * ours, 50)], [], None)}
    rows = [report.row(case, SETUP, comparison), report.row(case._replace(batch=2), SETUP, grown)]
    report.hold_against(rows, 2e9 * rows[0]["gflops"])
    return {"machine": report.machine(SETUP), "notes": [], "figures": rows}


def test_rows_and_tables():
    record = example()
    first, second = record["figures"]
    assert first["ours"] == 2.0 and first["peers"]["openvino"]["ratio"] == 0.5 and first["of_peak"] == 0.5
    assert first["peers"]["diffusers"]["ratio"] == 2.0 and (first["memory"], second["memory"]) == (30, 50)
    assert second["peers"] == {} and second["usual"] is False
    text = report.text(record, markdown=False)
    rows = [line.split("  ") for line in text.splitlines() if line.startswith("U-Net")]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0][2:5] == ["2.00 s", "2.00 s (2.00)", "4.00 s (0.50)"] and cells[0][-1] == "50%"
    assert cells[1][2:] == ["0.03 GB", "0.00 GB", "-", "0.00 GB"]
    growth, memory = cells[2:4], cells[4:]
    assert [row[2:6] for row in growth] == [["128x128", "1", "2.00 s", "1.00"], ["128x128", "2", "6.00 s", "3.00"]]
    assert memory[0][2:] == ["128x128", "1", "0.03 GB", "0.00 GB", "-", "0.00 GB"]
    assert memory[1][2:] == ["128x128", "2", "0.03 GB", "0.00 GB", "-", "-"]
    assert "compiled" not in text and "since" not in text
    assert len({line.count("|") for line in report.text(record, markdown=True).splitlines() if "U-Net" in line}) == 3


def test_the_share_of_the_tiny_decoder():
    """Only where both decoders were measured in a precision."""
    record, times = example(), {("vae", "float32"): 4.0, ("taesd", "float32"): 0.3, ("taesd", "bfloat16"): 1.0}
    first = record["figures"][0]
    record["figures"] = [{**first, "part": part, "dtype": dtype, "ours": took} for (part, dtype), took in times.items()]
    line = "The tiny autoencoder decodes in 7.5% (float32) of the VAE's time"
    assert line in report.text(record, markdown=False).splitlines()
    assert "tiny autoencoder" not in report.text(example(), markdown=False)


def test_comparing_with_an_earlier_run(tmp_path, capsys):
    file, earlier = tmp_path / "now.json", tmp_path / "then.json"
    report.write(file, example())
    then = example(ours=1.6)
    then["machine"] |= {"threads": 64, "date": "2020-02-20"}
    del then["figures"][1]
    report.write(earlier, then)
    assert bench.main(["--show", str(file), "--compare", str(earlier)]) == 0
    out = capsys.readouterr().out
    assert "the earlier run: threads was 64 and is 1\n" in out and out.count("since 2020-02-20") == 2
    last = [line.split()[-1] for line in out.splitlines() if line.startswith("U-Net")]
    assert last == ["+25%", "GB", "+25%", "-", "GB", "-"]
    assert bench.main(["--show", str(file), "--compare", str(file)]) == 0
    out = capsys.readouterr().out
    assert "+0%" in out and "hard" not in out


def test_a_full_disk_does_not_stop_the_measuring(tmp_path, monkeypatch, capsys):
    """It is said with the name of the file, not of the temporary one; the tables come at the end."""

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    file, said = tmp_path / "now.json", []
    monkeypatch.setattr(Path, "write_text", full)
    report.save(file, example(), said.append)
    assert said == [f"{file}: No space left on device; the tables will be printed at the end"]
    with pytest.raises(OSError, match="No space left on device") as raised:
        report.write(file, example())
    assert raised.value.filename == str(file)
    monkeypatch.setattr(bench, "measured", lambda args: {"format": report.FORMAT, **example()})
    assert bench.main([*TINY, "--json", str(file)]) == 1
    out, err = capsys.readouterr()
    assert "U-Net" in out and err == f"error: {file}: No space left on device\n" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"\xff", b'{"machine": {}, "figures": []}', b"[" * 10**5])
def test_a_file_that_is_no_earlier_run(tmp_path, capsys, content):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    assert bench.main(["--show", str(file)]) == 1
    assert capsys.readouterr().err == f"error: {file}: not a file that this program wrote with --json\n"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--runs", "0"], "--runs must be at least 1, got 0"),
        (["--batches", "2", "0"], "--batches must be at least 1, got 0"),
        (["--sizes", "100"], "--sizes must be multiples of 16, got 100"),
        (
            ["--parts", "lcm", "lcm-taesd", "--steps", "51"],
            "LCM takes at most 50 steps, and --steps is 51: leave lcm, lcm-taesd out of --parts",
        ),
        (["--ckpt", "x.ckpt"], "give only one of --ckpt, --model and --tiny"),
        (["--device", "abacus"], "device 'abacus' is not available here"),
        (["--json", __file__], "there is such a file already"),
        (["--json", "no/such/folder/new.json"], f"{Path('no/such/folder')}: No such file"),
        (["--json", "."], "--json .: a folder; give the name of a new file"),
        (["--json", "new.json", "--show", "old.json"], "--json has no effect with --show: leave it out"),
        (["--compare", "nowhere.json"], "nowhere.json: No such file"),
    ],
)
def test_refusals(capsys, options, message):
    assert bench.main([*TINY, "--peers", "--parts", "text", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_missing_file(tmp_path, capsys):
    assert bench.main(["--peers", "--parts", "text", "--device", "cpu", "--ckpt", str(tmp_path / "no.ckpt")]) == 1
    error = capsys.readouterr().err
    assert "no.ckpt" in error and error.count("\n") == 1


def test_a_start_that_fails_says_why():
    with pytest.raises(Failed, match="ours failed: ZeroDivisionError"):
        start.child("ours", "1 / 0", {}, False)


def test_peers_that_are_not_there(monkeypatch):
    """Each is said in a line; one that was asked for is an error."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs diffusers and transformers: pip install diffusers transformers"):
        peers.peers(build(POCKET), POCKET, torch.float32)
    able, lines = sides.able_peers(None, CPU)
    assert able == [] and len(lines) == 3
    assert lines[0] == (
        "not compared with diffusers: diffusers and transformers not installed (pip install diffusers transformers)"
    )
    with pytest.raises(ValueError, match="not compared with diffusers: diffusers and transformers not installed"):
        sides.able_peers(["diffusers"], CPU)


def test_peers_that_cannot_run(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setattr(sides, "find_spec", lambda name: None if name in ("openvino", "triton") else name)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert sides.able_peers(None, CPU) == (
        ["diffusers"],
        [
            "not compared with compiled: no C++ compiler (no-such-compiler), with which torch compiles",
            "not compared with openvino: openvino not installed (pip install openvino)",
        ],
    )
    assert "triton not installed" in sides.able_peers(None, torch.device("cuda"))[1][0]
    monkeypatch.setattr(sides, "find_spec", lambda name: name)
    assert sides.able_peers(None, torch.device("cuda")) == (
        ["diffusers", "compiled"],
        ["not compared with openvino: it runs on the CPU here, not on cuda"],
    )
    assert sides.able_peers([], CPU) == ([], [])


def test_who_takes_part_in_what():
    usual, grown = usual_case("unet", POCKET), Case("unet", 64)
    assert sides.takes_part("diffusers", grown, SETUP) and sides.takes_part("openvino", grown, SETUP)
    assert sides.takes_part("compiled", usual, SETUP) and not sides.takes_part("compiled", grown, SETUP)
    assert sides.takes_part("compiled", usual_case("picture", POCKET, 7), SETUP)
    assert not sides.takes_part("openvino", usual, replace(SETUP, dtype="float16"))


def test_a_peer_that_fails_is_left_out(tmp_path, capsys, monkeypatch):
    """And said; ours is measured all the same."""
    monkeypatch.setattr(bench, "able_peers", lambda named, device: (["openvino"], []))
    monkeypatch.setattr("scripts.benchmark.interleave.start_peer", failing)
    monkeypatch.setattr("scripts.benchmark.interleave.Worker", OursAtOnce)
    record = measured(tmp_path, "--parts", "text", "--dtype", "float32")
    assert record["notes"] == ["text, float32: openvino failed: no such luck"]
    assert record["notes"][0] in capsys.readouterr().out and record["figures"][0]["peers"] == {}


def failing(peer: str, *_: object) -> None:
    raise Failed(peer, "no such luck")


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
@pytest.mark.parametrize("when", ["built", "run"])
def test_a_peer_that_dies_is_left_out(tmp_path, monkeypatch, when):
    """Its signal is said; ours is measured all the same, and its own columns are left out."""
    monkeypatch.setattr(
        "scripts.benchmark.interleave.start_peer",
        lambda peer, setup, part, bar: Worker(peer, tmp_path / f"{peer}.log", Dying, when),
    )
    monkeypatch.setattr("scripts.benchmark.interleave.Worker", OursAtOnce)
    case, notes = usual_case("text", POCKET), []
    comparison, _ = measure(SETUP, "text", [case], ["openvino"], 1, BAR, notes.append)
    assert notes == ["text, float32: openvino failed: its process died (signal 8)"]
    assert list(comparison[case]) == [""] and comparison[case][""].peer == []
    record = {"machine": report.machine(SETUP), "notes": notes, "figures": [report.row(case, SETUP, comparison[case])]}
    text = report.text(record, markdown=False)
    assert text.endswith(f"\n\n{notes[0]}")
    (titles,) = [line for line in text.splitlines() if "precision" in line]
    assert "ours" in titles and "openvino" not in titles


class OursAtOnce:
    """Stands in for our worker: every run takes a second."""

    name = "ours"

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> OursAtOnce:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, method: str, *_: object) -> object:
        return {"peak": 1e9, "run": Run(1.0, None, None)}.get(method)


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
def test_a_start_that_dies_says_by_which_signal():
    with pytest.raises(Failed, match=r"^openvino failed: its process died \(signal 8\)$"):
        start.child("openvino", "import os\nos.kill(os.getpid(), 8)", {}, False)


def test_kernels_of_a_model(capsys):
    """One line for each kind of call, with the kernel that is used marked."""
    assert bench.main(["--kernels", "--tiny", "--dtype", "float32", "bfloat16"]) == 0
    _, *lines = capsys.readouterr().out.strip().splitlines()
    if not packing.onednn_dtypes():
        assert lines == ["", "there are only PyTorch's kernels here"]
        return
    kinds = {line.split()[0] for line in lines if line}
    assert {"attention", "convolution", "linear", "upsampling"} <= kinds
    assert all("*" in line for line in lines if line)


def test_two_rows_of_the_start_are_no_growth():
    row = {"part": "start", "dtype": "float32", "size": 512, "batch": 1, "usual": True, "ours": 1.0}
    assert report.growth_rows([row, {**row, "usual": False}]) == []


@pytest.mark.skipif(not packing.onednn_dtypes(), reason="PyTorch's kernels are the only ones here")
def test_kernels_are_those_of_an_image():
    """The kinds of calls that are found by shapes alone are those that are measured while an image is generated."""
    with kernel_choice.prefer(None):
        kernel_choice._measured.clear()
        found = set(kernels.measure_kernels(POCKET, torch.float32))
        kernel_choice._measured.clear()
        StableDiffusion.load(device="cpu", dtype="float32").txt2img("a house", "grey", steps=1, guidance=4)
        assert set(kernel_choice.table()) == found and len(found) > 3


def test_a_table_of_some_precisions(capsys, monkeypatch):
    """Also if the last has no other kernels."""
    measured = {"a kind": kernel_choice.Measurement("plain", {"plain": 1.0}, {})}
    monkeypatch.setattr(kernels, "measure_kernels", lambda config, dtype: measured if dtype == torch.float32 else {})
    assert bench.main(["--kernels", "--tiny", "--dtype", "float32", "float16"]) == 0
    assert "a kind  *plain 1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "meta"], "device"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--sizes", "64"], "--sizes has no effect with --kernels"),
        (["--json", "new.json"], "--json has no effect with --kernels"),
    ],
)
def test_what_the_table_of_kernels_does_not_take(capsys, options, message):
    assert bench.main(["--kernels", "--tiny", *options]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_sdxl_is_told_a_vector():
    """Its U-Net takes one; test_bench_sdxl.py has the other parts."""
    case = Case("unet", 64)
    given = inputs(case, SDXL)
    assert [tuple(x.shape) for x in given] == [(2, 4, 8, 8), (2,), (2, 77, 2048), (2, 2816)]
    conditioning = arguments(case, given)[2]
    assert conditioning.vector is given[3] and flop(case, SDXL) > 2 * flop(case, SD1)
