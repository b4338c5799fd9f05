"""scripts/study.py as a user meets it: every figure is there, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib import colormaps
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file, save_file
from toy_world_words import strange_words

from scripts import study
from scripts.common import generate
from scripts.figures import commands
from scripts.figures.student import load_student
from sd.config import POCKET
from sd.control_params import Control
from sd.few_step import LCM
from sd.models.controlnet import ControlConfig, ControlNet
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource
from sd.study import attention, attention_figures, consistency, convergence, drawing, editing, latent, noising, text

ROOT = Path(__file__).resolve().parents[1]
FILES = {  # what each subcommand makes
    "tokens": {"tokens.webp"},
    "embeddings": {"embeddings.webp"},
    "words": {"words.webp"},
    "latent": {"latent.webp"},
    "schedule": {"schedule.png"},
    "forward": {"forward.webp"},
    "unet": {"unet.png", "unet-parts.png"},
    "unets": {"unets.webp"},
    "attention": {"attention.webp", "attention-word.webp"},
    "influence": {"influence.webp"},
    "self-attention": {"self-attention.webp"},
    "reverse": {"reverse.webp", "reverse-film.webp"},
    "convergence": {"convergence.png"},
    "guidance": {"guidance.webp", "predictions.webp"},
    "grid": {"grid.webp"},
    "mixing": {"mixing.webp"},
    "editing": {"editing.webp"},
    "steering": {"steering.webp"},
    "consistency": {"consistency.webp", "consistency-distances.png"},
    "few-steps": {"few-steps.webp"},
    "control": {"control.webp", "residuals.webp"},
    "zero-convolutions": {"zero-convolutions.webp"},
}


EMBEDDED_FILE = str(resource(EMBEDDED))


def random_control(args, model) -> Control:
    """In place of a trained control network."""
    torch.manual_seed(1)
    name = model.add_control(ControlNet(ControlConfig.of(model.config.unet, name="edges")))
    return Control(name, Image.linear_gradient("L"))


@pytest.fixture
def run(tmp_path, capsys):
    """Runs study.py on small images with two steps; returns status, stderr and the names of the files."""

    def call(*args: str):
        try:
            status = study.main(
                ["--size", "64", *args, "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
            )
        except SystemExit as stop:  # argparse
            status = stop.code
        folder = tmp_path / "out"
        return status, capsys.readouterr().err, {p.name for p in folder.iterdir()} if folder.is_dir() else set()

    return call


def test_all_are_there():
    assert set(FILES) == set(study.FIGURES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.sampled(9)
def test_a_figure(name, run, tmp_path, monkeypatch):
    """Its files are images with content; a second run replaces them. The model knows all words of its prompts."""
    monkeypatch.setattr(convergence, "STEPS", (2, 3))
    monkeypatch.setattr(convergence, "REFERENCE", replace(convergence.REFERENCE, steps=6))
    monkeypatch.setattr(consistency, "CURVE", replace(consistency.CURVE, steps=3))
    monkeypatch.setattr(commands, "CURVES", 2)
    monkeypatch.setattr(consistency, "STEPS", (1, 2))
    monkeypatch.setattr(consistency, "MANY", 3)
    monkeypatch.setattr(commands, "load_control", random_control)
    strange = strange_words(monkeypatch)
    arguments = ["--x", "steps=1,2", "--y", "strength=0.5"] if name == "grid" else []
    if name == "zero-convolutions":
        arguments = ["--log", str(tmp_path / "train.jsonl")]
        line = {"loss": 0.3, "zero": [0.1, 0.2, 0.3, 0.2, 0.1]}
        text = "\n".join(json.dumps({"step": 50 * i, **line}) for i in range(1, 5))
        (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    for _ in range(2 if name in ("schedule", "reverse") else 1):
        status, errors, files = run(name, *arguments)
        assert (status, files) == (0, FILES[name]), errors
    assert strange == set()
    for file in files:
        with Image.open(tmp_path / "out" / file) as image:
            assert image.width > 300
            assert image.height > 150
            assert ImageStat.Stat(image.convert("L")).stddev[0] > 5
            assert getattr(image, "n_frames", 1) == (3 if "film" in file else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["atention"], "invalid choice: 'atention'"),
        (["attention", "--word", "dog"], "the prompt has no word 'dog': its words are watercolour, of, a"),
        (["grid", "--x", "size=3"], "unknown axis 'size'"),
        (["self-attention", "--point", "3"], "expected a point X,Y"),
        (["self-attention", "--point", "3,0"], "expected a point from 0,0 to 1,1"),
        (["schedule", "--ckpt", "missing.ckpt"], "missing.ckpt"),
        (["schedule", "--size", "100"], "must be a multiple of 8, got 100"),
        (["tokens", "--seed", "-5"], "seed must be from 0"),
        (["attention", "--prompt", " "], "--prompt has no words"),
        (["attention", "--word", ""], "the prompt has no word '': its words are"),
        (["editing", "--word", "dog"], "the prompt has no word 'dog': its words are a, pink, cat"),
        (["forward", "--t", "1000"], "timestep must be -1 (clean) or in [0, 999], got 1000"),
        (["forward", "--t", "nan"], "timestep must be"),
        (["forward", "--t", "half"], "argument --t: invalid float value: 'half'"),
        (["grid", "--x", "seed=1", "--y", "seed=2"], "a grid needs two different axes, got seed twice"),
        (["grid", "--x", "steps=1,0"], "steps must be at least 1, got 0"),
        (["consistency", "--ckpt", EMBEDDED_FILE], "consistency: give a few-step LoRA for this checkpoint, such as"),
        (["few-steps", "--lora", "missing.safetensors"], "missing.safetensors"),
        (["few-steps", "--lora", "lcm=:1"], "--lora :1: no file before the colon"),
        (["attention", "--lora", EMBEDDED_FILE], "--lora is for consistency, few-steps: attention shows the model"),
        (
            ["control", "--ckpt", EMBEDDED_FILE],
            "control: give a control network for this checkpoint with",
        ),
        (["control", "--control", EMBEDDED_FILE], "--control needs a hint of its kind: give one with --hint FILE"),
        (["control", "--control", "edges", "--hint", "missing.png"], "missing.png"),
        (["attention", "--hint", "edges.png"], "--hint is for control: attention shows the model without it"),
        (["attention", "--log", "train.jsonl"], "--log is for zero-convolutions: it has no effect on attention"),
        (["zero-convolutions", "--log", EMBEDDED_FILE], "pocket.safetensors: not the log of the training of a control"),
        (["attention", "--compile"], "--compile: a compiled U-Net skips the hooks of the studies; remove the option"),
    ],
)
def test_errors_are_one_line(arguments, message, run):
    status, errors, _ = run(*arguments)
    lines = [line for line in errors.splitlines() if not line.startswith("warning")]
    assert status in (1, 2)
    assert len(lines) == 1
    assert message in lines[0]


def test_a_missing_word_fails_before_generating(run, monkeypatch):
    monkeypatch.setattr(attention, "word_maps", lambda *_: pytest.fail("generated first"))
    assert run("attention", "--word", "dog")[0] == 1


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_out_is_a_folder(below, tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert study.main(["schedule", "--out", f"{tmp_path}/taken{below}"]) == 1
    assert "there is a file of this name" in capsys.readouterr().err


def test_all_makes_them_one_after_the_other(run, monkeypatch):
    monkeypatch.setattr(study, "FIGURES", {name: study.FIGURES[name] for name in ("tokens", "schedule")})
    assert run("all") == (0, "", {"tokens.webp", "schedule.png"})


def test_all_leaves_out_what_needs_a_lora_or_a_control_network():
    """Of another checkpoint, if none is given."""

    def chosen(*args: str) -> list[str]:
        return study.chosen_figures(study.parser().parse_args(["all", *args]))

    assert chosen() == list(study.FIGURES)
    lora = ["--lora", str(resource(EMBEDDED_LORA))]
    control = ["--control", "canny.safetensors", "--hint", "edges.png"]
    assert chosen("--ckpt", "v1-5.ckpt", *lora, *control) == list(study.FIGURES)
    with pytest.warns(UserWarning, match="left out: consistency, few-steps; for these, give a few-step LoRA for this"):
        left = set(study.FIGURES) - set(chosen("--ckpt", "v1-5.ckpt", *control))
    assert left == {"consistency", "few-steps"}
    with pytest.warns(UserWarning, match="left out: control; for these, give a control network for this checkpoint"):
        assert set(study.FIGURES) - set(chosen("--ckpt", "v1-5.ckpt", *lora)) == {"control"}


def test_a_lora_of_ones_own(run, tmp_path, monkeypatch):
    """It has to be one for few steps, by its name or metadata; then the model with it has the size of the ordinary."""
    file = tmp_path / "style.safetensors"
    save_file(load_file(resource(EMBEDDED_LORA)), file)  # without its metadata
    status, errors, files = run("few-steps", "--lora", str(file))
    assert (status, files) == (1, set())
    assert errors == f"error: {file} is not known as a few-step LoRA: if it is one, write --lora lcm={file}\n"

    seen = []
    monkeypatch.setattr(consistency, "few_steps", lambda *models, **_: seen.extend(models[:2]))
    monkeypatch.setattr(consistency, "draw_few_steps", lambda *_: Image.new("RGB", (8, 8)))
    assert run("few-steps", "--lora", f"lcm={file}:0.5")[0] == 0
    teacher, student = seen
    assert (teacher.few_step, teacher.defaults.sampler) == (None, teacher.config.sampler)
    assert (student.defaults.sampler, student.defaults.guidance, student.config.size) == ("lcm", 1.0, 64)
    assert list(student.few_step_loras) == ["lcm"] and student.unet is not teacher.unet


def test_an_unknown_lora_fails_before_all_figures(run, tmp_path):
    file = tmp_path / "style.safetensors"
    save_file(load_file(resource(EMBEDDED_LORA)), file)  # without its metadata
    status, errors, files = run("all", "--lora", str(file))
    assert (status, files) == (1, set()) and "is not known as a few-step LoRA" in errors


def test_the_ordinary_model_is_not_for_few_steps(monkeypatch):
    class Distilled:
        config = LCM.applied(POCKET)

    monkeypatch.setattr(generate, "load", lambda _: pytest.fail("loaded first"))
    with pytest.raises(ValueError, match="pocket is already a few-step model: give the ordinary model with --ckpt"):
        load_student(study.parser().parse_args(["few-steps"]), Distilled())


def test_default_axes():
    """The default of an axis, or that of the other axis where both would vary the same setting."""

    def names(*args: str) -> list[str]:
        return [axis.name for axis in commands.axes(study.parser().parse_args(["grid", *args]))]

    assert names() == ["steps", "sampler"]
    assert names("--x", "sampler=ddim") == ["sampler", "steps"]
    assert names("--y", "steps=2") == ["sampler", "steps"]
    assert names("--x", "seed=2") == ["seed", "sampler"]


@pytest.mark.exhaustive
def test_custom_timesteps_and_prompts(run, monkeypatch):
    seen = {}
    draw_forward, draw_order = noising.draw_forward, text.draw_word_order
    monkeypatch.setattr(noising, "draw_forward", lambda noised: seen.update(at=noised) or draw_forward(noised))
    monkeypatch.setattr(text, "draw_word_order", lambda order: seen.update(of=order) or draw_order(order))
    assert run("forward", "--t", "0", "--t", "500.5")[0] == 0
    assert [level.t for level in seen["at"].levels] == [0, 500.5]
    assert run("words", "--prompt", "a cat and a duck", "--other", "a duck and a cat")[0] == 0
    assert seen["of"].prompts == ("a cat and a duck", "a duck and a cat")
    assert run("mixing", "--seed", str(2**64 - 1))[0] == 0  # the next seed wraps around to 0


def test_out_of_memory(run, monkeypatch):
    """The message suggests options that exist."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(latent, "round_trip", fail)
    status, errors, _ = run("latent")
    assert status == 1
    assert errors == f"error: {study.OUT_OF_MEMORY}\n"
    known = {name for action in study.parser()._actions for name in action.option_strings}
    assert {word.strip(",") for word in study.OUT_OF_MEMORY.split() if word.startswith("--")} <= known


def distance(a, b):
    """The mean difference of two images, in grey levels."""
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 3


def test_custom_prompts(run, monkeypatch):
    """No boxes, because the positions of the things are unknown; edits that work for any prompt."""
    seen = {}
    draw_maps, draw_edits = attention_figures.draw_word_maps, editing.draw_edits
    monkeypatch.setattr(
        attention_figures, "draw_word_maps", lambda *args: seen.update(notes=args[2:]) or draw_maps(*args)
    )
    monkeypatch.setattr(editing, "draw_edits", lambda edits: seen.update(edits=edits) or draw_edits(edits))
    for name in ("attention", "editing"):
        assert run(name, "--prompt", "a cat in the snow", "--other", "a duck in the snow", "--word", "cat")[0] == 0
    assert seen["notes"] == ({}, {})
    assert list(seen["edits"]) == ["the other prompt", 'less of "cat"', 'more of "cat"']
    other, less, more = seen["edits"].values()
    assert distance(other.source, less.source) < 1 and distance(less.source, less.alone) < 1  # rounding: other batches
    assert distance(less.edited, less.source) > 1 < distance(more.edited, less.source)


@pytest.mark.exhaustive
def test_films(run, tmp_path, monkeypatch):
    """A GIF; an MP4, for which ffmpeg gets whole frames of even sides; one line if ffmpeg is missing."""
    assert run("reverse", "--film", "gif")[2] == {"reverse.webp", "reverse-film.gif"}
    monkeypatch.setattr(study.shutil, "which", lambda name: None)
    status, errors, _ = run("reverse", "--film", "mp4")
    assert status == 1
    assert errors == "error: --film mp4 needs ffmpeg, which is not installed: try webp or gif\n"
    monkeypatch.undo()
    tool = tmp_path / "bin" / "ffmpeg"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last.arguments"\ncat > "$last"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    assert run("reverse", "--film", "mp4")[0] == 0
    arguments = (tmp_path / "out" / "reverse-film.mp4.arguments").read_text().split()
    width, height = map(int, arguments[arguments.index("-s") + 1].split("x"))
    assert width % 2 == height % 2 == 0
    assert (tmp_path / "out" / "reverse-film.mp4").stat().st_size == width * height * 3 * (3 + study.LAST_FRAME_REPEATS)


def test_help_names_every_figure(capsys):
    with pytest.raises(SystemExit):
        study.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in [*study.FIGURES, "all"])


def test_code_that_generates_does_not_import_it():
    code = (
        "import sys, sd, sd.training, scripts.txt2img, scripts.inpaint, scripts.train; "
        "print([name for name in sys.modules if 'study' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------- drawing


def test_marks_are_not_drawn_as_letters():
    assert drawing.text_width("x_{t}") < drawing.text_width("x_t")
    assert drawing.text_width("10^{-3}") < drawing.text_width("10^-3")
    assert drawing.text_width("euler_a") > drawing.text_width("eulera")
    assert drawing.text_width("a $5 _{ $") > drawing.text_width("a $5")  # no markup: as it stands
    assert all(drawing.text_width(line) <= 120 for line in drawing.wrapped("one two three four five six", 120))


def test_colours_of_a_heat_map_are_in_order():
    image = drawing.heat(torch.tensor([[0.0, 0.5, 1.0]]), 30)
    light = [sum(image.getpixel((x, 2))) for x in (5, 15, 25)]
    assert light == sorted(light)
    inferno, around_zero = colormaps["inferno"], colormaps["RdBu_r"]
    assert image.getpixel((5, 2)) == inferno(0.0, bytes=True)[:3]
    assert image.getpixel((25, 2)) == inferno(1.0, bytes=True)[:3]
    around = drawing.heat(torch.tensor([[-2.0, 0.0, 1.0]]), 30, diverging=True)
    assert around.getpixel((5, 2)) == around_zero(0.0, bytes=True)[:3]
    assert around.getpixel((25, 2)) == around_zero(0.75, bytes=True)[:3]


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"figures need matplotlib: pip install \"sd-from-scratch\[study\]\" or"):
        drawing.plot([drawing.Curve("", [1, 2], [1, 2])])


def test_curves_go_where_their_numbers_are():
    """A rising line on a logarithmic axis: its colour is at the lower left and the upper right."""
    image = drawing.plot(
        [drawing.Curve("", [1, 10, 100], [1, 10, 100])], (200, 200), drawing.Axes(x_log=True, y_log=True)
    )
    found = [
        (x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == drawing.SERIES[0]
    ]
    assert found
    left, right = min(found), max(found)
    assert left[1] - right[1] > 150 < right[0] - left[0]
    middle = min(found, key=lambda at: abs(at[0] - (left[0] + right[0]) / 2))
    assert abs(middle[1] - (left[1] + right[1]) / 2) < 5
