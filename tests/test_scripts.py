"""The programs as a user meets them: images that are there, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import TINY, tiny_state
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts import convert, img2img, inpaint, txt2img
from sd.checkpoints import hashes
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_own
from sd.config import ScheduleConfig
from sd.runtime import kernel_choice
from sd.schedule import Schedule, to_zero_snr

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def ckpt(tiny, tmp_path_factory) -> Path:
    """The tiny model in our layout, which carries its config."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    own = to_own({name: network.state_dict() for name, network in tiny.items()})
    save_file({key: tensor.contiguous() for key, tensor in own.items()}, path, {CONFIG_KEY: TINY.to_json()})
    return path


@pytest.fixture
def generate(ckpt, tmp_path, capsys):
    """Runs txt2img on the tiny model; gives status, lines of stdout and stderr, and the files made."""

    def run(*args: str, model: Path | None = ckpt, out: Path | None = None):
        out = tmp_path / "out" if out is None else out
        given = ["--ckpt", str(model)] if model else []
        size = [] if "--height" in args or "--H" in args else ["--height", "64", "--width", "64"]
        steps = [] if {"--steps", "--ddim_steps"} & set(args) else ["--steps", "2"]
        try:
            status = txt2img.main([*args, *given, *size, *steps, "--device", "cpu", "--out", str(out)])
        except SystemExit as stop:  # argparse
            status = stop.code
        printed = capsys.readouterr()
        files = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
        return status, printed.out.splitlines(), printed.err.splitlines(), files

    return run


def test_a_image(generate, tmp_path):
    status, out, err, files = generate("a red cube", "--seed", "7", "--dtype", "float32")
    assert (status, files, err) == (0, ["00001.png"], [])
    assert out == ["tiny v1 on cpu, float32, first seed 7", f"{tmp_path / 'out' / '00001.png'}  seed 7"]
    with Image.open(tmp_path / "out" / "00001.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB" and np.asarray(image).std() > 1
        assert re.fullmatch(
            r"a red cube\nSteps: 2, Sampler: DPM\+\+ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 64x64, "
            r"RNG: CPU, Model hash: [0-9a-f]{10}, Model: tiny, Precision: float32, Version: sd [\d.]+",
            image.text["parameters"],
        )


def test_low_memory_gives_the_same_image(generate, ckpt, tmp_path):
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(photo)
    Image.new("L", (64, 64), 255).save(mask)
    for run, files in ((txt2img, []), (img2img, [photo]), (inpaint, [photo, mask])):
        made = []
        for options in ([], ["--low-memory"]):
            out = tmp_path / f"{run.__name__}{len(options)}"
            given = ["a red cube", *map(str, files), *options, "--ckpt", str(ckpt), "--device", "cpu", "--steps", "2"]
            assert (
                run.main([*given, "--height", "64", "--width", "64", "--seed", "7", "--n", "2", "--out", str(out)]) == 0
            )
            made.append([file.read_bytes() for file in sorted(out.glob("*.png"))])
        assert made[0] == made[1] and len(made[0]) == 2


def test_compile_is_passed_on(generate, monkeypatch):
    made = []
    monkeypatch.setattr("sd.pipeline.Compiled", lambda unet: made.append(unet) or unet)
    assert generate("a", "--compile")[0] == 0 and len(made) == 1
    status, _, err, _ = generate("a", "--compile", "--low-memory")
    assert status == 1 and err == [
        "error: low memory and compiling do not go together: compiled networks stay where they are"
    ]


def test_option_names_of_the_original_scripts(generate, tmp_path):
    status, out, _, files = generate(
        *("--prompt", "a", "--ddim_steps", "3", "--scale", "4", "--H", "72", "--W", "64", "--ddim_eta", "0.5"),
        *("--n_samples", "2", "--n_iter", "2", "--seed", "5", "--precision", "full", "--negative", "b"),
    )
    assert status == 0 and len(files) == 4
    assert [line.split()[-1] for line in out[1:]] == ["5", "6", "7", "8"]
    with Image.open(tmp_path / "out" / "00004.png") as image:
        text = "Steps: 3, Sampler: DDIM, Schedule type: Leading, CFG scale: 4, Seed: 8, Size: 64x72, RNG: CPU, Eta: 0.5"
        assert f"Negative prompt: b\n{text}" in image.text["parameters"]


def test_batches_give_the_same_images_and_numbers_go_on(generate, tmp_path):
    generate("a", "--n", "3", "--seed", "1", "--dtype", "float32")
    (tmp_path / "out" / "00002.png").rename(tmp_path / "kept.png")
    generate("a", "--n", "3", "--seed", "1", "--dtype", "float32", "--batch-size", "3", "--grid")
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["00001.png", "00003.png", "00004.png", "00005.png", "00006.png", "00007-grid.png"]

    def pixels(name: str) -> np.ndarray:
        return np.asarray(Image.open(tmp_path / name)).astype(int)

    for single, batched in (("out/00001.png", 4), ("kept.png", 5), ("out/00003.png", 6)):
        assert np.abs(pixels(single) - pixels(f"out/0000{batched}.png")).max() <= 1
    assert pixels("out/00007-grid.png").shape == (128, 128, 3)


@pytest.mark.exhaustive
def test_settings_of_the_noise_reach_the_images(generate, tmp_path):
    """Each changes the image; in parts and in one batch, the seeds go on in the same way."""
    given = ("a", "--seed", "5", "--dtype", "float32", "--sampler", "euler_a")
    for settings in (
        [], ["--rng", "nv"], ["--rng", "comfy"], ["--ensd", "31337"], ["--variation", "9:0.3"], ["--tileable"],
        ["--guidance-rescale", "0.7"],
    ):  # fmt: skip
        assert generate(*given, *settings)[::2] == (0, [])
    images = [Image.open(tmp_path / "out" / f"0000{k}.png").tobytes() for k in range(1, 8)]
    assert len(set(images)) == 7
    _, out, _, _ = generate(*given, "--variation", "8:0.3", "--n", "2")
    assert [line.split("  ")[1] for line in out[1:]] == ["seed 5, variation seed 8", "seed 5, variation seed 9"]
    assert Image.open(tmp_path / "out" / "00009.png").tobytes() == images[4]
    _, out, _, _ = generate(*given, "--variation", ":0.3")
    assert re.search(r"seed 5, variation seed \d+$", out[1])
    status, out, err, _ = generate(*given, "--rng", "comfy", "--n", "2", "--batch-size", "2")
    assert status == 0 and [line.split("  ")[1] for line in out[1:]] == ["seed 5", "seed 5"]
    assert len(err) == 1 and "share the generator of seed 5" in err[0]


def test_high_resolution(generate, tmp_path):
    _, _, err, _ = generate("a", "--hires", "1.5", "--hires-steps", "1", "--save-steps", "--preview", "linear")
    assert err == []
    assert Image.open(tmp_path / "out" / "00001.png").size == (96, 96)
    frames = sorted((tmp_path / "out" / "00001-steps").glob("*.png"))
    assert [Image.open(frame).size for frame in frames] == [(96, 96)] * 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--variation", "7"), "'7' is not SEED:STRENGTH, such as 7:0.2"),
        (("--variation", "7:2"), "variation_strength must be in [0, 1], got 2"),
        (("--guidance-rescale", "1.5"), "guidance_rescale must be in [0, 1], got 1.5"),
        (("--hires", "1"), "hires must be above 1 and at most 4, got 1"),
        (("--hires-strength", "0.4"), "--hires-strength needs --hires, such as --hires 2"),
        (("--rng", "cuda"), "invalid choice: 'cuda'"),
    ],
)
def test_settings_that_cannot_be(generate, given, words):
    status, _, err, files = generate("a", *given)
    assert status != 0 and len(err) == 1 and words in err[0] and files == []


def test_exact_images_do_not_depend_on_measured_kernels(generate, tmp_path, monkeypatch):
    """Whichever kernels would be the faster ones in this run."""
    made, timed = [], []
    for fast in (False, True):
        taken = 1.0 if fast else -1.0
        monkeypatch.setattr(
            kernel_choice,
            "_seconds",
            lambda run, name, device, taken=taken: timed.append(name) or (taken if name == "plain" else 0.0),
        )
        monkeypatch.setattr(kernel_choice, "_measured", {})
        size = ("--batch-size", "2") if fast else ()
        assert generate("a", "--n", "2", "--seed", "1", "--dtype", "bfloat16", "--exact", *size)[0] == 0
        assert timed == []
    for name in range(1, 5):
        made.append(np.asarray(Image.open(tmp_path / "out" / f"0000{name}.png")))
    assert np.array_equal(made[0], made[2]) and np.array_equal(made[1], made[3])


def test_prompt_files(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa naïve cat\r\n\r\n  東京  \n".encode())
    status, _, _, files = generate("--from-file", str(file), "--seed", "0")
    assert status == 0 and files == ["00001.png", "00002.png"]
    texts = [Image.open(tmp_path / "out" / name).text["parameters"].splitlines()[0] for name in files]
    assert texts == ["a naïve cat", "東京"]


def test_a_name_for_the_image_and_no_metadata(generate, tmp_path):
    status, _, _, _ = generate("a", "--n", "2", "--no-metadata", out=tmp_path / "new" / "cat.png")
    assert status == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["cat-2.png", "cat.png"]
    assert "parameters" not in Image.open(tmp_path / "new" / "cat.png").text


def test_random_seeds_are_reported_and_differ(generate):
    seeds = {generate("a")[1][-1].split()[-1] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    "args, label",
    [
        (["--plms"], "PLMS, Schedule type: Leading"),
        (["--sampler", "DPM++ 2M Karras"], "DPM++ 2M, Schedule type: Karras"),
        (["--sampler", "k_euler_a", "--spacing", "exponential"], "Euler a, Schedule type: Exponential"),
    ],
)
def test_samplers_by_the_names_people_type(generate, tmp_path, args, label):
    status, _, err, _ = generate("a", *args, "--skip_grid")
    assert status == 0 and err == []
    assert f"Sampler: {label}, " in Image.open(tmp_path / "out" / "00001.png").text["parameters"]


def test_the_embedded_model_says_which_words_it_does_not_know(tmp_path, capsys):
    args = ["--steps", "1", "--device", "cpu", "--out", str(tmp_path), "--seed", "0"]
    assert txt2img.main(["a dog in the snow", *args]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the embedded model does not know these words: dog (")
    assert txt2img.main(["a house", "--negative", "dog, bad hands, bad dog", *args]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: the embedded model does not know these words in the negative prompt: dog bad hands ("
    )
    assert txt2img.main(["a red house in the snow", *args]) == 0
    assert capsys.readouterr().err == ""


def test_a_negative_without_effect_is_not_recorded(generate, tmp_path):
    generate("a", "--negative", "b", "--guidance", "1")
    assert "Negative" not in Image.open(tmp_path / "out" / "00001.png").text["parameters"]


def test_seeds_wrap_around(generate):
    status, out, err, _ = generate("a", "--n", "2", "--seed", str(2**64 - 1))
    assert status == 0 and err == []
    assert [line.split()[-1] for line in out[1:]] == [str(2**64 - 1), "0"]


def test_every_warning_is_printed(generate, tmp_path):
    """Also the second of two that are equal."""
    file = write(tmp_path / "p.txt", (b"word " * 100 + b"\n") * 2)
    status, _, err, files = generate("--from-file", str(file))
    assert status == 0 and len(files) == 2 and len([line for line in err if "25" in line]) == 2


def test_a_warning_says_that_a_long_prompt_is_truncated(generate):
    status, _, err, files = generate("word " * 500)
    assert status == 0 and files and len(err) == 1
    assert err[0].startswith("warning: ") and "425" in err[0]


def test_empty_prompts_are_allowed(generate):
    assert generate("")[0] == 0


HTML = b"<!DOCTYPE html><html><head><title>Log in</title>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 4265380512\n"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def evil(path: Path) -> Path:
    """A checkpoint that runs a command when other programs open it."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {path.parent / 'executed'}",)

    torch.save({"state_dict": {"a": torch.zeros(1)}, "hook": Evil()}, path)
    return path


def original(path: Path, **changes: torch.Tensor | None) -> Path:
    state = {**tiny_state(), **{key.replace("__", "."): tensor for key, tensor in changes.items()}}
    torch.save({"state_dict": {key: tensor for key, tensor in state.items() if tensor is not None}}, path)
    return path


def sdxl(path: Path) -> Path:
    save_file({"conditioner.embedders.1.model.ln_final.weight": torch.zeros(4)}, path)
    return path


def cut(path: Path) -> Path:
    original(path)
    return write(path, path.read_bytes()[:200_000])


FILES = {
    "missing": (lambda path: path, "no such file"),
    "folder": (lambda path: path.mkdir() or path, "folder"),
    "empty": (lambda path: write(path, b""), "empty"),
    "web page": (lambda path: write(path, HTML), "web page"),
    "git-lfs": (lambda path: write(path, LFS), "git-lfs"),
    "truncated": (cut, "truncated|cut off|incomplete|damaged"),
    "runs code": (evil, "system"),
    "sdxl": (sdxl, "SDXL"),
    "unknown model": (original, "unknown kind"),
    "plain zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "b") or path, "zip"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_checkpoints(generate, tmp_path, name):
    make, words = FILES[name]
    status, out, err, files = generate("a", model=make(tmp_path / "bad.ckpt"))
    assert status == 1 and out == [] and files == []
    assert len(err) == 1 and err[0].startswith("error: ") and "bad.ckpt" in err[0]
    assert re.search(words, err[0], re.IGNORECASE), err[0]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (["a", "--height", "500", "--width", "64"], "multiple of 8, got 500: try 496 or 504"),
        (["a", "--steps", "0"], "steps must be at least 1"),
        (["a", "--steps", "5000"], "1000"),
        (["a", "--steps", "many"], "--steps"),
        (["a", "--guidance", "nan"], "guidance must be a finite number"),
        (["a", "--sampler", "eulr"], "unknown sampler 'eulr', expected one of ddim"),
        (["a", "--eta", "7"], "eta"),
        (["a", "--gamma", "1.5"], "gamma must be in [0, 1], got 1.5"),
        (["a", "--gamma", "0.5", "--sampler", "lcm"], "gamma is a setting of tcd, not of LCM"),
        (["a", "--sampler", "lcm", "--steps", "60"], "the spacing lcm has 50 timesteps, too few for 60 steps"),
        (["a", "--seed", "-5"], "seed"),
        (["a", "--n", "0"], "--n must be at least 1"),
        (["a", "--batch-size", "0"], "--batch-size"),
        (["a", "--columns", "0"], "--columns"),
        (["a", "--dtype", "int8"], "--dtype"),
        (["a", "--model", "sd3"], "--model"),
        (["a", "--height", "80000000000", "--width", "64"], "at most 16384"),
        (["a", "--frobnicate"], "--frobnicate"),
        ([], "prompt"),
        (["a", "--prompt", "b"], "'a' is one word too many beside --prompt"),
        (["a", "--from-file", "b.txt"], "'a' is one word too many beside --from-file"),
        (["a", "red", "house"], "'red' is one word too many: a prompt of several words needs quotes"),
        (["--from-file", "no/such/prompts.txt"], "no/such/prompts.txt: No such file"),
    ],
    ids=" ".join,
)
def test_bad_arguments(generate, args, words):
    status, _, err, files = generate(*args)
    assert status in (1, 2) and files == []
    assert len(err) == 1 and err[0].startswith("error: ") and words in err[0], err


@pytest.mark.parametrize(
    "data, words", [(b"\xff\xfe\x00", "UTF-8"), (b"\n \n", "no prompts"), (b"a" * (17 << 20), "16 MB")]
)
def test_bad_prompt_files(generate, tmp_path, data, words):
    status, _, err, files = generate("--from-file", str(write(tmp_path / "p.txt", data)))
    assert status == 1 and files == [] and len(err) == 1 and words in err[0]


def test_output_that_cannot_be_written(generate, tmp_path):
    status, _, err, _ = generate("a", out=write(tmp_path / "file", b"mine"))
    assert status == 1 and len(err) == 1 and "file" in err[0]
    status, _, err, _ = generate("a", out=write(tmp_path / "mine.png", b"mine"))
    assert status == 1 and "already" in err[0] and (tmp_path / "mine.png").read_bytes() == b"mine"
    status, _, err, _ = generate("a", out=tmp_path / "a.jpg")
    assert status == 1 and ".png" in err[0]
    if Path("/proc").is_dir():  # where not even root may write
        status, _, err, _ = generate("a", out=Path("/proc/pictures"))
        assert status == 1 and len(err) == 1 and "/proc/pictures" in err[0]


def test_a_full_disk_leaves_nothing_behind(generate, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    status, _, err, files = generate("a")
    assert status == 1 and files == [] and err == ["error: No space left on device"]


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("not enough memory: 1 GB")],
)
def test_out_of_memory_suggests_settings(generate, monkeypatch, error):
    def exhausted(*args, **kwargs):
        raise error

    monkeypatch.setattr("sd.pipeline.StableDiffusion.prepare", exhausted)
    status, _, err, files = generate("a")
    assert status == 1 and files == [] and len(err) == 1
    assert "out of memory" in err[0] and "--batch-size 1" in err[0] and "--height" in err[0]


def test_control_c(generate, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sd.pipeline.StableDiffusion.prepare", interrupted)
    status, _, err, files = generate("a")
    assert (status, err, files) == (130, ["stopped"], [])


def test_a_bug_is_not_reported_as_an_error_of_the_user(generate, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("sd.pipeline.StableDiffusion.prepare", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        generate("a")


def test_runs_from_any_folder_without_installation(ckpt, tmp_path):
    args = ["a", "--ckpt", ckpt, "--steps", "1", "--height", "64", "--width", "64", "--device", "cpu", "--seed", "0"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "txt2img.py", *map(str, args)],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "00001.png").exists()
    assert done.stderr == ""


@pytest.mark.parametrize("module", [txt2img, img2img, inpaint, convert])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


def test_what_was_detected_is_printed(generate, ckpt, tmp_path, capsys):
    """A diffusers folder, another VAE, and the prediction with its reason; --prediction overrules it."""
    folder, vae = tmp_path / "folder", tmp_path / "vae.safetensors"
    assert convert.main([str(ckpt), str(folder), "--layout", "diffusers"]) == 0
    save_file({k: t for k, t in tiny_state().items() if k.startswith("first_stage_model.")}, vae)
    capsys.readouterr()
    status, out, err, _ = generate("a", "--seed", "1", "--dtype", "float32", "--vae", str(vae), model=folder)
    assert (status, err) == (0, [])
    assert out[:2] == ["diffusers model on cpu, float32, first seed 1", "predicts eps: scheduler_config.json says so"]
    with Image.open(tmp_path / "out" / "00001.png") as image:
        assert "Model: folder, VAE: vae, Precision: float32" in image.text["parameters"]
    generate("a", "--seed", "1", "--dtype", "float32")
    one, other = (np.asarray(Image.open(tmp_path / "out" / f"0000{i}.png")) for i in (1, 2))
    assert np.array_equal(one, other)
    _, out, _, _ = generate("a", "--seed", "1", "--dtype", "float32", "--prediction", "v", model=folder)
    assert out[1] == "predicts v: as given"
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "out" / "00003.png")), one)


@pytest.mark.parametrize(
    "given, words",
    [
        (("--vae", "gone.safetensors"), "gone.safetensors: no such file"),
        (("--text-encoder", "{vae}"), "vae.safetensors: the file has no text encoder"),
        (("--ckpt", "{vae}"), "vae.safetensors: this is a VAE alone: give it with --vae, beside a checkpoint (--ckpt)"),
        (
            ("--variant", "fp16", "--ckpt", "{folder}"),
            "folder: no files of the variant 'fp16' in it; its variants: none",
        ),
    ],
)
def test_parts_that_cannot_be(generate, ckpt, tmp_path, capsys, given, words):
    save_file(
        {k: t for k, t in tiny_state().items() if k.startswith("first_stage_model.")}, tmp_path / "vae.safetensors"
    )
    assert convert.main([str(ckpt), str(tmp_path / "folder"), "--layout", "diffusers"]) == 0
    capsys.readouterr()
    given = [word.format(vae=tmp_path / "vae.safetensors", folder=tmp_path / "folder") for word in given]
    status, _, err, files = generate("a", *given, model=None if "--ckpt" in given else ckpt)
    assert status == 1 and len(err) == 1 and words in err[0], err
    assert files == []


@pytest.mark.parametrize("table", [False, True])
def test_a_model_trained_from_pure_noise(generate, ckpt, tmp_path, table):
    """Zero terminal SNR: the usual grid does not begin where the model does, and that is said."""
    alpha_bar = tuple(to_zero_snr(Schedule(ScheduleConfig(beta_end=0.02)).alpha_bar).tolist())
    given = {"alpha_bar": alpha_bar} if table else {"zero_snr": True}
    config = replace(TINY, schedule=replace(TINY.schedule, prediction="v", **given))
    path = tmp_path / "zero.safetensors"
    save_file(load_file(ckpt), path, {CONFIG_KEY: config.to_json()})
    _, _, err, _ = generate("a", model=path)
    assert len(err) == 1 and "--spacing trailing" in err[0]
    _, _, err, _ = generate("a", "--spacing", "trailing", model=path)
    assert err == []


# --- convert.py ---


def run_convert(*args: object, capsys) -> tuple[int, list[str]]:
    status = convert.main([str(arg) for arg in args])
    return status, capsys.readouterr().err.splitlines()


def test_conversion_there_and_back(ckpt, tmp_path, capsys):
    there = tmp_path / "original.safetensors"
    assert run_convert(ckpt, there, "--layout", "original", capsys=capsys) == (0, [])
    written = load_file(there)
    assert set(tiny_state()) - set(written) == set(reference.SCHEDULE)
    for key, tensor in written.items():
        assert torch.equal(tensor, tiny_state()[key])
    half = tmp_path / "half.safetensors"
    assert run_convert(ckpt, half, "--dtype", "float16", capsys=capsys) == (0, [])
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.float16}
    assert half.stat().st_size < 0.51 * ckpt.stat().st_size


def test_conversion_refuses(ckpt, tmp_path, capsys):
    mine = write(tmp_path / "mine.safetensors", b"mine")
    for args, words in (
        ((ckpt, mine), "already"),
        ((ckpt, tmp_path / "out.ckpt"), "only .safetensors"),
        ((original(tmp_path / "o.ckpt"), tmp_path / "new.safetensors"), "unknown kind"),
        ((ckpt, tmp_path / "no" / "folder.safetensors"), "folder"),
    ):
        status, err = run_convert(*args, capsys=capsys)
        assert status == 1 and len(err) == 1 and words in err[0], err
    assert mine.read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.safetensors", "o.ckpt"]


def test_metadata_of_a_conversion_is_the_config(ckpt, tmp_path, capsys):
    out = tmp_path / "copy.safetensors"
    run_convert(ckpt, out, capsys=capsys)
    header = json.loads(out.read_bytes()[8 : 8 + int.from_bytes(out.read_bytes()[:8], "little")])
    assert json.loads(header["__metadata__"][CONFIG_KEY])["name"] == "tiny v1"


def test_model_hash_is_the_sha256(tmp_path):
    file = write(tmp_path / "a", b"abc")
    assert hashes.ModelHash(file).digits() == "ba7816bf8f"
    assert hashes.ModelHash(tmp_path / "gone").digits() is None
