"""The training programs as a user meets them: runs that stop and go on, many processes, full disks, broken data."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource as limits
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import TINY, manifest
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_scripts import ckpt  # noqa: F401

from scripts import convert, inpaint, train, train_text, train_vae, txt2img
from scripts.training import data as training_data
from scripts.training import loop, objective, recipe
from scripts.training.adapters import Adapters
from scripts.training.batches import Batch, Batches
from scripts.training.epochs import Order
from scripts.training.folders import DataOptions, Folder, captioned
from scripts.training.log import Log, read_log
from scripts.training.loop import Trainer
from scripts.training.processes import Processes
from scripts.training.state import load_state, save_state, save_tensors
from sd import StableDiffusion
from sd.checkpoints.detect import CONFIG_KEY
from sd.config import SD1, Config, TextConfig, UNetConfig, VAEConfig
from sd.models.vae import VAE
from sd.resources import resource
from sd.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SMALL = Config(
    name="small",
    size=64,
    text=(TextConfig(width=32, layers=1, heads=2),),
    vae=VAEConfig(channels=(32, 32, 32, 32), blocks=1, scale=1.0),
    unet=UNetConfig(channels=(32, 64), heads=(1, 2), depth=(0, 1), blocks=1, context=32),
)
PROGRAMS = [("train", "muon"), ("train_text", "adamw"), ("train_vae", "adamw")]
PROGRAMS += [
    pytest.param(*more, marks=pytest.mark.exhaustive)
    for more in (("train", "adamw"), ("train_text", "muon"), ("train_vae", "muon"))
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # for each: else two processes want twice the cores that there are
# Muon multiplies matrices in bfloat16, which takes long where the processor has none
QUICK = (
    "--optimizer",
    "adamw",
    "--batch",
    "2",
    "--warmup",
    "2",
    "--precision",
    "float32",
    "--device",
    "cpu",
    "--log-every",
    "2",
)


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> tuple[str, ...]:
    """The options of a small new model, with a VAE that knows nothing."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "small.json").write_text(SMALL.to_json())
    torch.manual_seed(0)
    state = {f"vae.{key}": value for key, value in VAE(SMALL.vae).state_dict().items()}
    save_tensors(state, folder / "vae.safetensors", {CONFIG_KEY: SMALL.to_json()})
    return ("--model", str(folder / "small.json"), "--vae", str(folder / "vae.safetensors"), *QUICK)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eight plain images with captions beside them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("red", "green", "blue", "yellow", "pink", "cyan", "white", "black")):
        image = Image.new("RGB", (96, 64), name)
        ImageDraw.Draw(image).ellipse([20 + 3 * i, 5 + 4 * i, 50 + 3 * i, 30 + 4 * i], tuple(rng.integers(0, 255, 3)))
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} picture\nsomething {name}\n")
    return folder


PLOT = Log.plot


@pytest.fixture
def start(capsys, monkeypatch):
    """Runs a training program; gives its status and the lines it printed to stdout and stderr.

    It draws no curve of the loss, which takes a sixth of a short run: a test that looks at the curve puts `PLOT` back.
    """
    monkeypatch.setattr(Log, "plot", lambda log: None)

    def run(program, *args: object) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        try:
            status = program.main([*map(str, args)])
        except SystemExit as stop:  # argparse
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def interrupt_at(monkeypatch, step: int) -> None:
    """Ctrl-C while this step is computed."""
    learning_rate = recipe.learning_rate

    def interrupted(now: int, *args):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(now, *args)

    monkeypatch.setattr(recipe, "learning_rate", interrupted)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(("name", "optimizer"), PROGRAMS)
@pytest.mark.sampled(4)
def test_resumed_training_equals_uninterrupted_training(name, optimizer, new, photos, start, tmp_path, monkeypatch):
    """Stopped by Ctrl-C between two lines of the log, resumed with no options but the folder: all is the same."""
    program = {"train": train, "train_text": train_text, "train_vae": train_vae}[name]
    options = ["--data", photos, "--steps", 4, *QUICK, "--accumulate", 2, "--save-every", 100]
    options += {"train": [*new, "--samples", 0], "train_text": new, "train_vae": [*new[:2], "--crop", 32]}[name]
    options += ["--optimizer", optimizer]
    assert start(program, *options, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        status, _, err = start(program, *options, "--out", tmp_path / "parts")
    assert status == 130 and err[-1] == "stopped"
    assert load_state(tmp_path / "parts" / "state.pt")["step"] == 2
    with open(tmp_path / "parts" / "train.jsonl", "a") as file:  # as if it had gone on a little and then been killed
        file.write('{"step": 3, "loss": 9.0, "lr": 0, "norm": 0, "seconds": 1.0}\n{"step": 4, "lo')
    monkeypatch.setattr(Log, "plot", PLOT)
    assert start(program, "--out", tmp_path / "parts", "--resume")[0] == 0

    whole, parts = (load_state(tmp_path / folder / "state.pt") for folder in ("whole", "parts"))
    assert same(whole, parts)
    assert whole["step"] == 4
    logs = [read_log(tmp_path / folder / "train.jsonl") for folder in ("whole", "parts")]
    assert [line["step"] for line in logs[0]] == [2, 4]
    for line, again in zip(*logs, strict=True):
        assert {**line, "seconds": 0} == {**again, "seconds": 0}
    written = {"train": "model", "train_text": "text_encoder", "train_vae": "vae"}[name] + ".safetensors"
    models = [load_file(tmp_path / folder / written) for folder in ("whole", "parts")]
    assert len(models[0]) > 15 and same(*models)
    with Image.open(tmp_path / "parts" / "loss.png") as image:
        assert image.size == (960, 540) and len(image.getcolors(1 << 20)) > 10


def test_log_without_matplotlib_skips_the_curve_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0, seconds=0.0)
        log.plot()
    assert capsys.readouterr().out == (
        'no loss.png: it needs matplotlib, pip install "sd-from-scratch[study]" or pip install matplotlib\n'
    )
    assert [line["step"] for line in read_log(tmp_path / "train.jsonl")] == [1, 2, 3]
    assert not (tmp_path / "loss.png").exists()


def test_a_state_between_two_lines_of_the_log_keeps_their_mean(new, photos, start, tmp_path, monkeypatch):
    options = ["--data", photos, *new, "--samples", 0, "--steps", 4, "--log-every", 4]
    assert start(train, *options, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert start(train, *options, "--out", tmp_path / "parts")[0] == 130
    assert start(train, "--out", tmp_path / "parts", "--resume")[0] == 0
    whole, parts = (read_log(tmp_path / folder / "train.jsonl") for folder in ("whole", "parts"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in parts]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["train", "train_vae"])
def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(name, new, photos, start, tmp_path):
    """After one step AdamW's first moment is (1 - beta1) times the gradient."""
    options = ["--data", photos, "--steps", 1, "--optimizer", "adamw"]
    options += ["--samples", 0, *new] if name == "train" else [*new[:2], *QUICK]
    program = {"train": train, "train_vae": train_vae}[name]
    assert start(program, *options, "--batch", 4, "--out", tmp_path / "one")[0] == 0
    command = [*TORCHRUN, ROOT / "scripts" / f"{name}.py", *options, "--batch", 2, "--out", tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_state(tmp_path / folder / "state.pt") for folder in ("one", "two"))
    moments = [state["optimizers"][0]["state"] for state in (one, two)]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) > 50
    a, b = (torch.cat([moment["exp_avg"].flatten() for moment in found.values()]) for found in moments)
    assert a.norm() > 1e-4
    assert (a - b).norm() / a.norm() < 1e-4
    logs = [read_log(tmp_path / folder / "train.jsonl") for folder in ("one", "two")]
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-5)
    # another batch has another gradient, so the comparison tells something
    assert start(program, *options, "--batch", 2, "--out", tmp_path / "half")[0] == 0
    half = load_state(tmp_path / "half" / "state.pt")["optimizers"][0]["state"]
    c = torch.cat([moment["exp_avg"].flatten() for moment in half.values()])
    assert (a - c).norm() / a.norm() > 0.05


@pytest.mark.exhaustive
def test_ctrl_c_saves_where_many_processes_run(new, photos, start, tmp_path):
    """The terminal tells torchrun and its processes, and torchrun tells them again: they agree on a step and save."""
    command = [
        *TORCHRUN,
        ROOT / "scripts" / "train.py",
        "--data",
        photos,
        *new,
        "--steps",
        10**6,
        "--out",
        tmp_path / "out",
    ]
    running = subprocess.Popen(
        [*map(str, command), "--samples", "0"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ONE_THREAD,
    )
    try:
        deadline = time.monotonic() + 120
        while not read_log(tmp_path / "out" / "train.jsonl") and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    step = load_state(tmp_path / "out" / "state.pt")["step"]
    assert step >= read_log(tmp_path / "out" / "train.jsonl")[-1]["step"] > 0, err
    # one process goes on where two were
    again = ["--out", tmp_path / "out", "--resume", "--steps", step + 1, "--device", "cpu"]
    assert start(train, *again)[0] == 0


def test_accumulated_parts_give_the_gradients_of_one_batch(new, photos, start, tmp_path, monkeypatch):
    options = ["--data", photos, "--steps", 1, "--samples", 0, "--optimizer", "adamw", *new, "--batch", 2]
    found = []

    def joined(batches: Batches, step: int):
        parts = zip(*(batches.make(batches.epochs(number), number) for number in range(2)), strict=True)
        yield {"batch": Batch(*(None if a is None else torch.cat([a, b]) for a, b in parts))}

    for parts in (2, 1):
        out = tmp_path / str(parts)
        if parts == 1:
            monkeypatch.setattr(Batches, "__call__", joined)
        assert start(train, *options, "--accumulate", parts, "--out", out)[0] == 0
        state = load_state(out / "state.pt")["optimizers"][0]["state"]
        found.append(torch.cat([moment["exp_avg"].flatten() for moment in state.values()]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-4


def test_kill_9_while_saving_never_loses_the_state_before(tmp_path):
    """A program that does nothing but save is killed at different moments; a whole state is always there."""
    path = tmp_path / "state.pt"
    code = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom scripts.training.state import save_state\n"
        "def work():\n"
        "    step = 0\n"
        "    while True:\n"
        "        step += 1\n"
        f"        save_state({{'step': step, 'weights': torch.full((2_000_000,), float(step))}}, Path({str(path)!r}))\n"
        "        os.write(1, f'{step}\\n'.encode())\n"
        "for line in sys.stdin:\n"
        "    child = os.fork()\n"
        "    if child == 0: work()\n"
        "    os.write(1, f'child {child}\\n'.encode())\n"
        "    os.waitpid(child, 0)\n"
        "    os.write(1, b'gone\\n')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        half_written = 0
        for trial in range(12):
            parent.stdin.write("go\n")
            parent.stdin.flush()
            child, done = None, 0
            while child is None or done < 1:
                line = parent.stdout.readline()
                if line.startswith("child"):
                    child = int(line.split()[1])
                else:
                    done = int(line)
            time.sleep(0.004 * trial)
            os.kill(child, signal.SIGKILL)
            while (line := parent.stdout.readline()) != "gone\n":
                done = int(line)
            state = load_state(path)
            assert state["step"] in (done, done + 1)  # what was reported saved, or the one it was just about to report
            assert bool((state["weights"] == state["step"]).all())
            half_written = max(half_written, len(list(tmp_path.glob(".*.part"))))
    finally:
        parent.kill()
        parent.wait()
    assert half_written > 0  # at least once it was killed in the middle


def test_a_state_of_version_0_1_is_resumed(new, photos, start, tmp_path):
    """The names of a transformer's weights were others then, in networks and average."""
    assert start(train, "--data", photos, *new, "--samples", 0, "--steps", 1, "--out", tmp_path)[0] == 0
    model = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    state = load_state(tmp_path / "state.pt")
    for owner, name in ((state, "networks"), (state["ema"], "average")):
        old = {key.replace(".blocks.0.", ".block.") if "unet" in key else key: v for key, v in owner[name].items()}
        assert old.keys() != owner[name].keys()
        owner[name] = old
    save_state(state, tmp_path / "state.pt")
    assert start(train, "--out", tmp_path, "--resume")[0] == 0
    assert same(load_file(tmp_path / "model.safetensors"), model)


def test_what_killed_programs_left_is_removed_at_the_next_start(new, photos, start, tmp_path):
    assert start(train, "--data", photos, *new, "--samples", 0, "--steps", 1, "--out", tmp_path)[0] == 0
    (tmp_path / ".state.pt.0123abcd.part").write_bytes(b"half")
    (tmp_path / ".model.0123abcd.part" / "unet").mkdir(parents=True)  # of convert.py --layout diffusers
    assert start(train, "--out", tmp_path, "--resume", "--steps", 2)[0] == 0
    assert not list(tmp_path.glob(".*.part"))


@pytest.fixture
def full_disk():
    """No file may grow beyond 100 kB: the system's answer to writing is an error, as on a full disk."""
    before = limits.getrlimit(limits.RLIMIT_FSIZE)

    def fill() -> None:
        limits.setrlimit(limits.RLIMIT_FSIZE, (100_000, before[1]))

    yield fill
    limits.setrlimit(limits.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_state_before(full_disk, new, photos, start, tmp_path, monkeypatch):
    options = ["--data", photos, *new, "--samples", 0, "--steps", 2, "--out", tmp_path]
    assert start(train, *options)[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("state.pt", "model.safetensors")}
    full_disk()
    status, _, err = start(train, "--resume", "--steps", 4, "--out", tmp_path)
    assert status == 1 and len(err) == 1, err
    assert err[0].startswith(f"error: {tmp_path / 'state.pt'}: cannot be written: ")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob(".*.part"))
    with pytest.raises(OSError, match=r"x\.safetensors: cannot be written"):
        save_tensors({"a": torch.zeros(100_000)}, tmp_path / "x.safetensors", {})
    with pytest.raises(OSError, match=r"state\.pt: cannot be written"):
        save_state({"a": torch.zeros(100_000)}, tmp_path / "state.pt")
    assert load_state(tmp_path / "state.pt")["step"] == 2


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_word_on_a_full_disk(ending, full_disk, tmp_path):
    word = SimpleNamespace(word="<toy>", vectors=[torch.zeros(75, 1024)])
    full_disk()
    with pytest.raises(OSError, match=rf"word\.{ending}: cannot be written"):
        Adapters._write_word(SimpleNamespace(word=word, config=SMALL), tmp_path / f"word.{ending}", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("optimizer", "count", "steps", "seed"),
    [
        pytest.param("adamw", 3, 100, 1, marks=pytest.mark.exhaustive),
        pytest.param("muon", 8, 150, 0, marks=pytest.mark.exhaustive),
    ],
)
def test_images_are_memorised(optimizer, count, steps, seed, start, tmp_path):
    """The program alone: a few scenes through the embedded model's VAE; then each caption generates its own image."""
    config = replace(SMALL, unet=replace(SMALL.unet, channels=(64, 96), heads=(2, 3)))
    (tmp_path / "small.json").write_text(config.to_json())
    data = tmp_path / "data" / "8_scenes"  # 8 times per epoch, so that few images make whole batches
    data.mkdir(parents=True)
    examples = list(map(training_data.World(count, 64).__getitem__, range(count)))
    for i, example in enumerate(examples):
        Image.fromarray(example.pixels).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(example.captions[0])
    status, out, err = start(
        *(train, "--data", data.parent, "--model", tmp_path / "small.json"),
        *("--vae", resource("weights/pocket.safetensors")),
        *(
            "--steps",
            steps,
            "--seed",
            seed,
            "--batch",
            8,
            "--lr",
            2e-3,
            "--warmup",
            20,
            "--drop",
            0,
            "--prediction",
            "v",
        ),
        *("--optimizer", optimizer, "--ema", 0.95, "--samples", count, "--sample-steps", 2, "--log-every", 10),
        *("--precision", "float32", "--device", "cpu", "--out", tmp_path / "out"),
    )
    assert status == 0 and out[-1].startswith(f"{tmp_path / 'out' / 'model.safetensors'}: small"), err
    log = read_log(tmp_path / "out" / "train.jsonl")
    assert log[-1]["loss"] < 0.4 * log[0]["loss"]
    with Image.open(tmp_path / "out" / f"samples-{steps:06}.png") as sheet:
        assert sheet.width % 64 == sheet.height % 64 == 0 and sheet.width * sheet.height >= count * 64**2

    model = StableDiffusion.load(tmp_path / "out" / "model.safetensors", device="cpu", dtype="float32")
    wanted = [model.decode(model.encode(Image.fromarray(e.pixels)).mode())[0] for e in examples]
    generated = [model.txt2img(e.captions[0], steps=10, guidance=1.0, seed=i)[0] for i, e in enumerate(examples)]
    distance = np.array([[np.square(np.subtract(p, w, dtype=float)).mean() ** 0.5 for w in wanted] for p in generated])
    assert distance.argmin(axis=1).tolist() == list(range(count)), distance.round()
    others = distance[~np.eye(count, dtype=bool)]
    assert distance.diagonal().mean() < 0.65 * others.mean(), distance.round()


def test_what_was_trained_loads_everywhere(ckpt, photos, start, tmp_path, capsys):  # noqa: F811
    """Fine-tuned from a checkpoint: it loads without options and converts to the original layout with equal weights."""
    status, out, _ = start(
        *(train, "--ckpt", ckpt, "--data", photos, "--size", 64, *QUICK, "--steps", 2, "--out", tmp_path / "out"),
        *("--samples", 2, "--sample-steps", 2, "--export-dtype", "float32", "--checkpointing"),
    )
    model = tmp_path / "out" / "model.safetensors"
    assert status == 0 and out[-1] == f"{model}: tiny v1, for --ckpt of every program"
    kept, trained = (StableDiffusion.load(path, device="cpu", dtype="float32") for path in (ckpt, model))
    assert not same(kept.unet.state_dict(), trained.unet.state_dict())
    assert same(kept.text_encoder.state_dict(), trained.text_encoder.state_dict())  # without --train-text
    assert same(kept.vae.state_dict(), trained.vae.state_dict())

    arguments = ["a red image", "--steps", "2", "--height", "64", "--width", "64", "--device", "cpu", "--out"]
    assert txt2img.main([*arguments, str(tmp_path / "generated"), "--ckpt", str(model)]) == 0
    original = tmp_path / "original.safetensors"
    assert convert.main([str(model), str(original), "--layout", "original"]) == 0
    back = StableDiffusion.load(original, config=TINY, device="cpu", dtype="float32")
    assert same(back.unet.state_dict(), trained.unet.state_dict())


@pytest.mark.exhaustive
def test_an_inpainting_model_of_a_model_of_four_channels(ckpt, photos, start, tmp_path):  # noqa: F811
    common = (train, "--ckpt", ckpt, "--data", photos, "--size", 64, *QUICK, "--inpaint", "--train-text", "--ema", 0)
    status, _, err = start(
        *common, "--steps", 2, "--samples", 1, "--sample-steps", 2, "--export-dtype", "float32", "--out", tmp_path / "a"
    )
    assert (status, err) == (0, [])
    model = tmp_path / "a" / "model.safetensors"
    kept, trained = (StableDiffusion.load(path, device="cpu", dtype="float32") for path in (ckpt, model))
    assert trained.is_inpainting and trained.config.name == "tiny v1 inpainting"
    new = trained.unet.conv_in.weight[:, 4:]
    assert 0 < new.abs().max() < 1e-3  # began at zero, and learns
    assert not same(kept.text_encoder.state_dict(), trained.text_encoder.state_dict())
    mask = tmp_path / "mask.png"
    Image.new("L", (96, 64), 255).save(mask)
    image = photos / "red.png"
    small = ["--ckpt", str(model), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "generated")]
    assert inpaint.main(["a", str(image), str(mask), *small]) == 0
    # and going on with a model that has nine channels already
    assert start(*common[:2], model, *common[3:], "--steps", 1, "--samples", 0, "--out", tmp_path / "b")[0] == 0
    status, _, err = start(train, "--ckpt", model, "--data", photos, "--steps", 1, "--out", tmp_path / "c")
    assert status == 1 and err == ["error: tiny v1 inpainting has a U-Net of 9 channels: train it with --inpaint"]


@pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("bfloat16", "float16")]
)
def test_half_precision_learns_about_the_same(precision, new, photos, start, tmp_path):
    options = ["--data", photos, *new, "--samples", 0, "--steps", 4, "--weighting", "min-snr", "--prediction", "v"]
    assert start(train, *options, "--out", tmp_path / "float32")[0] == 0
    assert start(train, *options, "--precision", precision, "--out", tmp_path / precision)[0] == 0
    full, half = (read_log(tmp_path / name / "train.jsonl") for name in ("float32", precision))
    assert full[0]["loss"] == pytest.approx(half[0]["loss"], rel=0.02)
    assert full[0]["loss"] != half[0]["loss"]
    assert load_state(tmp_path / precision / "state.pt")["step"] == 4


def test_the_drawn_world_is_the_default(new, start, tmp_path):
    options = ["--scenes", 12, "--phrasings", 2, *new, "--steps", 2, "--sample-steps", 1, "--samples", 2]
    assert start(train, *options, "--out", tmp_path / "u")[0] == 0
    assert (
        start(train_vae, "--scenes", 6, "--held-out", 3, *new[:2], *QUICK, "--steps", 2, "--out", tmp_path / "v")[0]
        == 0
    )
    assert (tmp_path / "v" / "vae.png").exists()
    # what that wrote is a VAE for train.py, with its own factor
    again = [*new[:2], "--vae", tmp_path / "v" / "vae.safetensors", *QUICK, "--scenes", 4, "--steps", 1, "--samples", 0]
    assert start(train, *again, "--out", tmp_path / "w")[0] == 0
    model = StableDiffusion.load(tmp_path / "w" / "model.safetensors", device="cpu")
    assert model.config.vae.scale != SMALL.vae.scale and model.config.name == "small"


def test_broken_images_are_skipped_and_counted(new, photos, start, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in photos.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    for name in ("red", "blue"):
        (data / f"{name}.png").write_bytes(b"\x89PNG broken")
    status, _, err = start(train, "--data", data, *new, "--samples", 0, "--steps", 1, "--out", tmp_path / "out")
    assert status == 0 and len(err) == 3
    assert err[0].startswith(f"warning: skipped: {data / 'blue.png'}: ")
    assert err[2] == "warning: 2 of 8 images cannot be read and are skipped"
    for path in data.glob("*.png"):
        path.write_bytes(b"")
    status, _, err = start(train, "--data", data, *new, "--steps", 1, "--out", tmp_path / "none")
    assert status == 1 and err[-1] == "error: none of the 8 images can be read"


def test_problems_with_the_data_are_one_line(new, photos, start, tmp_path):
    data = tmp_path / "data"

    def problem(*args: object) -> str:
        status, _, err = start(train, "--data", data, *new, "--steps", 1, "--out", tmp_path / "out", *args)
        assert status == 1 and len(err) == 1
        return err[0]

    assert problem() == f"error: --data {data}: no such folder"
    data.mkdir()
    assert problem().startswith(f"error: --data {data}: no images in it")
    (data / "a.png").write_bytes((photos / "red.png").read_bytes())
    (data / "b.png").write_bytes((photos / "red.png").read_bytes())
    (data / "b.txt").write_text("b")
    assert problem().startswith(f"error: {data / 'a.png'}: no caption (1 of 2 images have none): write it to a.txt")
    (data / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert problem() == f"error: {data / 'a.txt'}: not UTF-8 text; save it as UTF-8"
    (data / "a.txt").unlink()
    listed = data / "metadata.jsonl"
    listed.write_text('{"file_name": "a.png"}\n')
    assert problem().startswith(f"error: {listed}, line 1: expected")
    listed.write_text('{"file_name": "c.png", "text": "c"}\n')
    assert problem() == f"error: {data}: 1 images of metadata.jsonl are missing, first {data / 'c.png'}"
    listed.write_text('{"file_name": "a.png", "text": " "}\n')  # as good as none
    assert problem().startswith(f"error: {data / 'a.png'}: no caption (1 of 2")
    for text in ("not json\n", "[" * 100_000, '{"file_name": "a\\u0000.png", "text": "c"}'):
        listed.write_text(text)
        assert problem().startswith(f"error: {listed}, line 1: expected")
    assert problem("--data", listed) == f"error: --data {listed}: a file, not a folder"


def test_captions_of_both_kinds(photos, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".checkpoints").mkdir()
    for name in ("a.png", "sub/b.jpg", "._a.png", ".checkpoints/d.png", "c.png", "e.png"):
        (tmp_path / name).write_bytes((photos / "red.png").read_bytes())
    lines = [{"file_name": "b.jpg", "text": " one b "}, {"file_name": "b.jpg", "text": "another b", "extra": 1}]
    (tmp_path / "e.caption").write_text("an e")
    (tmp_path / "sub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "a.txt").write_text("\ufeffan a\n\n  the a \n", encoding="utf-8")
    folder = Folder(tmp_path, DataOptions(32, caption="else"))
    assert [(item.path.name, item.captions) for item in folder.items] == [
        ("a.png", ["an a", "the a"]), ("c.png", ["else"]), ("e.png", ["an e"]), ("b.jpg", ["one b", "another b"]),
    ]  # fmt: skip
    assert folder[0].pixels.shape == (32, 32, 3)
    with pytest.raises(ValueError, match=r"c\.png: no caption \(1 of 4"):
        captioned(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_linked_folders_are_followed(photos, tmp_path):
    """Each once, under its own name where it has one; circles end; links to nothing are named."""
    data, store = tmp_path / "data", tmp_path / "store"
    for place in ("data/a", "data/real/d", "store/b", "store/deep/c"):
        image = tmp_path / f"{place}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes((photos / "red.png").read_bytes())
        image.with_suffix(".txt").write_text(place)
    for link, target in (
        ("data/more", store), ("data/again", store), ("data/above_real", data / "real"), ("store/deep/circle", data),
        ("store/self", store), ("data/.hidden", photos),
    ):  # fmt: skip
        (tmp_path / link).symlink_to(target, target_is_directory=True)
    items = captioned(data)
    assert [(str(item.path.relative_to(data)), item.captions) for item in items] == [
        ("a.png", ["data/a"]), ("again/b.png", ["store/b"]), ("again/deep/c.png", ["store/deep/c"]),
        ("real/d.png", ["data/real/d"]),
    ]  # fmt: skip
    (data / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.warns(UserWarning, match=r"skipped: .*gone\.png: a link to nothing"):
        assert len(captioned(data)) == 4


def test_captions_keep_the_separators_of_unicode(photos, tmp_path):
    (tmp_path / "a.png").write_bytes((photos / "red.png").read_bytes())
    (tmp_path / "a.txt").write_text("one\u2028line\r\ntwo\x0b2", encoding="utf-8")
    assert captioned(tmp_path)[0].captions == ["one\u2028line", "two\x0b2"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a\u2028b"}', encoding="utf-8")
    assert captioned(tmp_path)[0].captions == ["a\u2028b"]


def test_workers_read_the_same(photos, monkeypatch):
    world = training_data.World(5, 64, phrasings=2)
    alone = [example for _, chunk in training_data.examples(world, 0, False) for example in chunk]
    monkeypatch.setattr(training_data, "FEW", 0)
    helped = [example for _, chunk in training_data.examples(world, 2, False) for example in chunk]
    assert len(alone) == len(helped) == 5
    for a, b in zip(alone, helped, strict=True):
        assert np.array_equal(a.pixels, b.pixels) and a.captions == b.captions and len(a.captions) == 2


def test_prepared_data_is_made_once_and_anew_when_it_changes(new, photos, start, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in photos.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    options = ["--data", data, *new, "--samples", 0, "--out", tmp_path / "out"]
    cache = tmp_path / "out" / "cache" / "latents.safetensors"
    assert start(train, *options, "--steps", 1)[0] == 0
    first = cache.stat().st_ino
    assert start(train, "--out", tmp_path / "out", "--resume", "--steps", 2)[0] == 0
    assert cache.stat().st_ino == first
    (data / "red.png").write_bytes((data / "blue.png").read_bytes())
    assert start(train, "--out", tmp_path / "out", "--resume", "--steps", 3)[0] == 0
    assert cache.stat().st_ino != first


def test_a_loss_of_nan_is_one_line_and_keeps_the_state(new, photos, start, tmp_path, monkeypatch):
    options = ["--data", photos, *new, "--samples", 0, "--log-every", 1, "--out", tmp_path]
    assert start(train, *options, "--steps", 2)[0] == 0
    before = (tmp_path / "state.pt").read_bytes()
    losses = objective.sample_losses
    monkeypatch.setattr(objective, "sample_losses", lambda *args: losses(*args) * float("nan"))
    status, _, err = start(train, "--out", tmp_path, "--resume", "--steps", 5)
    assert status == 1 and len(err) == 1
    assert re.fullmatch(
        r"error: the loss is not finite \(nan\) at step 3 \(\w+\.png, \w+\.png\): try a lower --lr or "
        r"--precision float32; the state of step 2 is kept",
        err[0],
    )
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.exhaustive
def test_a_text_encoder_learns_which_caption_belongs_to_which_image(new, photos, start, tmp_path):
    """Of 8 images, each with a word of its own. Then it is what a new model begins with."""
    options = ["--data", photos, *new, "--batch", 8, "--lr", 1e-3, "--ema", 0, "--optimizer", "adamw"]
    status, out, _ = start(train_text, *options, "--steps", 250, "--out", tmp_path / "text")
    assert status == 0 and out[-2].endswith(", 100.0 % of 8 captions find their image")
    written = tmp_path / "text" / "text_encoder.safetensors"
    learned = load_file(written)
    token = learned["text_encoder.token.weight"]
    known = Tokenizer()(["a red picture", "something blue"]).unique()
    assert (token[known] != 0).any(1).all()
    assert (token != 0).any(1).sum() < 20  # all other words mean nothing

    options = [
        "--data",
        photos,
        *new,
        "--samples",
        0,
        "--steps",
        1,
        "--lr",
        1e-9,
        "--ema",
        0,
        "--export-dtype",
        "float32",
    ]
    assert start(train, *options, "--text", written, "--out", tmp_path / "model")[0] == 0
    model = load_file(tmp_path / "model" / "model.safetensors")
    for key, value in learned.items():
        torch.testing.assert_close(model[key], value, atol=1e-6, rtol=0)
    status, _, err = start(train, *options, "--text", new[3], "--out", tmp_path / "vae")
    assert status == 1 and err == [f"error: {new[3]}: no text encoder in it: expected what train_text.py writes"]


def test_a_text_encoder_is_trained_by_one_process(new, photos, start, tmp_path, monkeypatch):
    two = Processes(torch.device("cpu"), rank=0, count=2)
    monkeypatch.setattr(loop, "processes", lambda device: contextlib.nullcontext(two))
    status, _, err = start(train_text, "--data", photos, *new, "--out", tmp_path / "out")
    assert status == 1 and err == [
        "error: the loss compares all images of a batch, so only one process can train: do not use torchrun"
    ]


def test_a_gradient_of_nan_is_never_saved(new, photos, start, tmp_path, monkeypatch):
    """The loss of the step is still a number: only the weights behind it are not."""
    options = ["--data", photos, *new, "--samples", 0, "--log-every", 10, "--save-every", 2, "--out", tmp_path]
    assert start(train, *options, "--steps", 2)[0] == 0
    kept = {name: (tmp_path / name).read_bytes() for name in ("state.pt", "model.safetensors")}
    clip = torch.nn.utils.clip_grad_norm_

    def poisoned(parameters, *args):
        parameters = list(parameters)
        parameters[-1].grad.fill_(float("nan"))
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    status, _, err = start(train, "--out", tmp_path, "--resume", "--steps", 3)
    assert status == 1 and err[-1].startswith("error: the gradient is not finite (nan) at step 3")
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}


@pytest.mark.exhaustive
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_leaves_out_a_step_that_overflows(optimizer, new, photos, start, tmp_path, monkeypatch):
    """Only the first layer's gradient overflows, which AdamW trains: Muon's weights must not move either."""
    options = ["--data", photos, *new, "--samples", 0, "--precision", "float16", "--optimizer", optimizer]
    options += ["--ema", 0, "--save-every", 1, "--log-every", 1]
    assert start(train, *options, "--steps", 1, "--out", tmp_path)[0] == 0
    before = load_state(tmp_path / "state.pt")
    step = loop.Trainer._optimise

    def overflowing(self, parts, lr):
        hook = self.trained["unet.conv_in.weight"].register_hook(lambda gradient: gradient * float("inf"))
        try:
            return step(self, parts, lr)
        finally:
            hook.remove()

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_optimise", overflowing)
        assert start(train, "--out", tmp_path, "--resume", "--steps", 2)[0] == 0
    after = load_state(tmp_path / "state.pt")
    assert same(before["networks"], after["networks"])
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2
    assert read_log(tmp_path / "train.jsonl")[-1]["norm"] is None
    assert start(train, "--out", tmp_path, "--resume", "--steps", 5)[0] == 0  # and it goes on
    assert not same(after["networks"], load_state(tmp_path / "state.pt")["networks"])


def test_a_model_that_was_not_written_is_written_on_resuming(new, photos, start, tmp_path):
    """A full disk or a kill may come between the last state and its model. A first Ctrl-C writes the model, too."""
    assert start(train, "--data", photos, *new, "--samples", 1, "--steps", 2, "--out", tmp_path)[0] == 0
    model = load_file(tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path / "samples-000002.png"):
        path.unlink()
    assert start(train, "--out", tmp_path, "--resume")[0] == 0
    assert same(load_file(tmp_path / "model.safetensors"), model)
    assert (tmp_path / "samples-000002.png").exists()


def test_ctrl_c_writes_the_model(new, photos, start, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 1)
    assert start(train, "--data", photos, *new, "--samples", 0, "--steps", 9, "--out", tmp_path)[0] == 130
    assert (tmp_path / "model.safetensors").exists()


def test_options_given_on_resuming_count(new, photos, start, tmp_path):
    options = ["--data", photos, *new, "--samples", 0, "--steps", 1, "--out", tmp_path, "--optimizer", "muon"]
    assert start(train, *options)[0] == 0
    changed = ["--steps", 2, "--weight-decay", 0.5, "--beta2", 0.9, "--precision", "float16"]
    assert start(train, "--out", tmp_path, "--resume", *changed)[0] == 0
    groups = load_state(tmp_path / "state.pt")["optimizers"][0]["param_groups"]
    assert groups[0]["weight_decay"] == 0.5 and groups[1]["weight_decay"] == 0
    assert all(group["betas"] == (0.9, 0.9) for group in groups)
    assert start(train, "--out", tmp_path, "--resume", "--steps", 3)[0] == 0  # remembered
    assert load_state(tmp_path / "state.pt")["optimizers"][0]["param_groups"][0]["weight_decay"] == 0.5


def test_a_run_inside_of_its_data_does_not_train_on_its_samples(new, photos, start, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in photos.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    options = ["--data", data, *new, "--samples", 1, "--caption", "any", "--steps", 1, "--out", data / "run"]
    assert start(train, *options)[0] == 0
    assert (data / "run" / "samples-000001.png").exists()
    _, out, _ = start(train, "--out", data / "run", "--resume", "--steps", 2)
    assert out[0] == "resumed with --steps 2 in place of 1" and out[1].startswith("8 images in 1 bucket")
    assert ", 8 images," in out[2]


@pytest.mark.exhaustive
def test_wrong_options_are_one_line(new, photos, start, tmp_path):
    def problem(*args: object) -> str:
        status, _, err = start(train, "--data", photos, "--out", tmp_path / "out", *args)
        assert status == 1 and len(err) == 1
        return err[0].removeprefix("error: ")

    assert problem("--steps", 0) == "--steps must be at least 1, got 0"
    assert problem("--ema", 1) == "--ema must be from 0 to below 1, got 1.0"
    assert problem() == "a new model needs a VAE (--vae): train one with train_vae.py, or use that of a checkpoint"
    assert problem("--vae", photos / "red.png").startswith(f"{photos / 'red.png'}: ")
    assert problem(*new, "--model", "sd9").startswith("--model sd9: expected one of sd1, ")
    assert problem(*new, "--size", 60).startswith("height must be a multiple of 8, got 60")
    assert problem(*new, "--size", 0) == "--size must be at least 1, got 0"  # not the model's own
    assert problem(*new, "--workers", -1) == "--workers must be at least 0, got -1"
    (tmp_path / "config.json").write_bytes("{}".encode("utf-16"))
    config = tmp_path / "config.json"
    assert problem(*new, "--model", config) == f"{config}: not UTF-8 text; save it as UTF-8"
    assert problem(*new, "--out", config).startswith(f"{config}: a file of this name exists where a folder")
    assert problem("--resume").endswith("no run to resume (state.pt); start one without --resume")
    out = tmp_path / "out"
    assert start(train, "--data", photos, *new, "--samples", 0, "--steps", 1, "--out", out)[0] == 0
    assert problem(*new) == f"{out} already has a run: continue it (--resume) or choose another --out"
    assert problem("--resume", "--steps", 2, "--ema", 0).endswith("--ema cannot change between 0 and another value")
    assert problem("--resume", "--steps", 2, "--optimizer", "muon").startswith(
        f"--optimizer muon: the run in {out} was started with --optimizer adamw, which cannot change: "
    )
    assert start(train, "--out", out, "--resume", "--steps", 2)[0] == 0  # what was refused is not remembered
    assert problem("--resume", "--steps", 1) == "the run is already at step 2: give more --steps"
    other = tmp_path / "other"
    for wrong, said in (
        (("--sample-steps", 0), "steps"), (("--sample-guidance", "nan"), "guidance"), (("--threads", -1), "--threads"),
        (("--lr", "inf"), "--lr"), (("--schedule", "cubic"), "--schedule must be cosine, linear or constant"),
        (("--text", photos / "red.png"), str(photos)), (("--sample-prompts", tmp_path / "none"), "--sample-prompts"),
    ):  # fmt: skip
        assert problem(*new, "--out", other, *wrong).startswith(said)
    assert not list(other.glob("*.*"))
    status, _, err = start(train, "--ckpt", resource("weights/pocket.safetensors"), "--out", other)
    assert status == 1 and err == ["error: --ckpt needs --data: a folder with images, or world for drawn scenes"]
    save_tensors({"text_encoder.norm.weight": torch.ones(8)}, tmp_path / "text.safetensors", {})
    said = problem("--vae", tmp_path / "text.safetensors", "--out", other)
    assert "no VAE in it: expected what train_vae.py writes" in said
    status, _, err = start(train_vae, "--data", photos, *new[:2], "--held-out", 0, "--out", other)
    assert status == 1 and err == ["error: --held-out must be at least 1, got 0"]


def test_words_that_will_not_be_learned_are_said(start, tmp_path):
    """The embedded model has no vectors for words that it was not taught, and without --train-text it gets none."""
    data = tmp_path / "data"
    data.mkdir()
    for name, text in (("a", "a red house"), ("b", "a red triceratops")):
        Image.new("RGB", (64, 64), "red").save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(text)
    common = ("--ckpt", resource("weights/pocket.safetensors"), "--data", data, "--size", 64, "--batch", 1)
    for more, said in (((), True), (("--train-text",), False)):
        out = tmp_path / f"out{len(more)}"
        status, _, err = start(train, *common, "--steps", 1, "--samples", 0, "--out", out, *more)
        assert status == 0, err
        assert any("does not know these words: triceratops (--train-text learns them)" in line for line in err) == said


def test_every_epoch_sees_every_image_once():
    order = Order(7, seed=3)
    stream = order(0, 21)
    for epoch in range(3):
        assert sorted(stream[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))
    assert stream[:7].tolist() != stream[7:14].tolist()
    assert torch.equal(Order(7, seed=3)(5, 9), stream[5:14])  # from anywhere
    assert not torch.equal(Order(7, seed=4)(0, 21), stream)


def test_a_log_goes_on_from_its_step(tmp_path):
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0 / step, lr=0.1, norm=1.0, seconds=float(step))
    again = Log(tmp_path, 2)
    assert again.seconds == 2.0 and [line["step"] for line in read_log(tmp_path / "train.jsonl")] == [1, 2]
    Log(tmp_path, 0)
    assert read_log(tmp_path / "train.jsonl") == []


def write_full_size(path: Path) -> None:
    """A v1 checkpoint in the original layout, in half precision, 2 GB; its tensors are gone when this returns."""
    state = reference.make_state_dict(manifest("sd-v1"))
    for key, tensor in state.items():
        state[key] = tensor.half() if tensor.is_floating_point() else tensor
    reference.save(path, state)


@pytest.mark.full
def test_fine_tuning_a_full_size_checkpoint_takes_a_step(photos, tmp_path):
    """In 16 GB: weights, gradients and AdamW's two moments of 860 M parameters in float32, and little else."""
    before, out = tmp_path / "v1.safetensors", tmp_path / "out"
    write_full_size(before)
    command = [sys.executable, ROOT / "scripts" / "train.py", "--ckpt", before, "--data", photos, "--out", out]
    command += ["--size", 64, "--batch", 1, "--steps", 1, "--warmup", 1, "--lr", 1e-3, "--ema", 0, "--samples", 0]
    done = subprocess.run(
        list(map(str, [*command, "--device", "cpu", "--checkpointing"])), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (out / "state.pt").unlink()  # 10 GB
    assert 0 < read_log(out / "train.jsonl")[0]["loss"] < 10
    a, b = (StableDiffusion.load(path, device="cpu", dtype="float16") for path in (before, out / "model.safetensors"))
    assert b.config == SD1
    kept, trained = a.unet.state_dict(), b.unet.state_dict()
    steps = torch.cat([(trained[key].float() - kept[key].float()).abs().flatten()[:1000] for key in kept])
    assert 0.5e-3 < steps.median() < 2e-3  # AdamW's first step is the learning rate, whatever the gradient
    assert same(a.text_encoder.state_dict(), b.text_encoder.state_dict())
    assert same(a.vae.state_dict(), b.vae.state_dict())
    for path in (before, out / "model.safetensors"):
        path.unlink()


@pytest.mark.gpu
def test_nothing_in_the_loop_waits_for_the_gpu(photos, start, new, tmp_path, monkeypatch):
    """Between two lines of the log no operation makes the CPU wait: the system would raise an error."""
    optimise = Trainer._optimise

    def watched(self, parts, lr):
        torch.cuda.set_sync_debug_mode("error" if self.step > 2 else "default")  # the first steps set things up
        try:
            return optimise(self, parts, lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_optimise", watched)
    options = ["--data", photos, *new, "--device", "cuda", "--precision", "bfloat16", "--steps", 6, "--samples", 0]
    for name, more in (("a", []), ("b", ["--weighting", "min-snr"]), ("c", ["--inpaint"])):
        assert start(train, *options, *more, "--out", tmp_path / name)[0] == 0
    options = ["--data", photos, *new[:2], *QUICK, "--device", "cuda", "--precision", "bfloat16", "--steps", 6]
    assert start(train_vae, *options, "--out", tmp_path / "d")[0] == 0
