"""img2img.py and inpaint.py as a user meets them, and images of the steps."""

from __future__ import annotations

import os
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_scripts import ckpt, write  # noqa: F401

from scripts import img2img, inpaint
from sd import StableDiffusion
from sd.imaging.tensors import fit
from sd.resources import resource

SAMPLE, MASK = resource("data/sample.png"), resource("data/sample-mask.png")
SMALL = ("--height", "64", "--width", "64", "--steps", "2", "--device", "cpu", "--dtype", "float32", "--seed", "7")


@pytest.fixture
def edit(ckpt, tmp_path, capsys):  # noqa: F811
    """Runs a program on the tiny model; gives status, lines of stdout and stderr, and the files made."""

    def run(program, *args: object, small: tuple[str, ...] = SMALL):
        out = tmp_path / "out"
        try:
            status = program.main([*map(str, args), "--ckpt", str(ckpt), *small, "--out", str(out)])
        except SystemExit as stop:  # argparse
            status = stop.code
        printed = capsys.readouterr()
        files = sorted(str(p.relative_to(out)) for p in out.rglob("*")) if out.is_dir() else []
        return status, printed.out.splitlines(), printed.err.splitlines(), files

    return run


def made(tmp_path: Path, name: str = "00001.png") -> Image.Image:
    with Image.open(tmp_path / "out" / name) as image:
        image.load()
    return image


def test_a_changed_image(edit, tmp_path):
    status, out, err, files = edit(img2img, "a red cube", SAMPLE, "--strength", "0.5")
    assert (status, files, err) == (0, ["00001.png"], [])
    assert out[-1] == f"{tmp_path / 'out' / '00001.png'}  seed 7"
    image = made(tmp_path)
    assert image.size == (64, 64) and np.asarray(image).std() > 1
    assert re.fullmatch(
        r"a red cube\nSteps: 2, Sampler: DPM\+\+ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 64x64, "
        r"RNG: CPU, Denoising strength: 0.5, Generated size: 64x64, Init image hash: [0-9a-f]{10}, "
        r"Model hash: [0-9a-f]{10}, Model: tiny, "
        r"Precision: float32, Version: sd [\d.]+",
        image.text["parameters"],
    )


def test_names_of_the_original_script(edit):
    args = ("--prompt", "a", "--init-img", SAMPLE, "--ddim_steps", "4", "--n_samples", "2", "--scale", "5")
    assert edit(img2img, *args, "--strength", "0.8", small=SMALL[:4])[3] == ["00001.png", "00002.png"]


def test_the_size_is_the_image_s(edit, tmp_path):
    Image.open(SAMPLE).resize((131, 70)).save(tmp_path / "odd.png")
    edit(img2img, "a", tmp_path / "odd.png", "--steps", "2", small=("--seed", "1"))
    edit(img2img, "a", tmp_path / "odd.png", "--steps", "2", "--fit", "pad", small=("--seed", "1"))
    assert made(tmp_path).size == (128, 64) and made(tmp_path, "00002.png").size == (131, 70)


def test_prompts_from_a_file_leave_a_place_for_the_image(edit, tmp_path):
    prompts = write(tmp_path / "p.txt", b"a\nb\n")
    status, _, _, files = edit(img2img, SAMPLE, "--from-file", prompts, "--strength", "0.5")
    assert status == 0 and files == ["00001.png", "00002.png"]


@pytest.mark.parametrize("size", [(64, 64), (200, 136), (333, 222), (768, 512)], ids=str)
@pytest.mark.parametrize("options", [(), ("--only-masked",), ("--mask-blur", "4")], ids=str)
@pytest.mark.sampled(3)
def test_sample_image_and_mask(edit, tmp_path, size, options):
    picture = Image.open(SAMPLE).convert("RGB").resize(size)
    mask = Image.open(MASK).convert("L").resize(size, Image.Resampling.NEAREST)
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    status, _, err, files = edit(inpaint, "a cat", tmp_path / "picture.png", tmp_path / "mask.png", *options)
    assert (status, err, files) == (0, [], ["00001.png"])
    image = made(tmp_path)
    changed = (np.asarray(image) != np.asarray(picture)).any(axis=-1)
    hole = np.asarray(mask) > 0
    if "--mask-blur" in options:  # it reaches some pixels outwards
        hole = np.asarray(Image.fromarray(hole).filter(ImageFilter.MaxFilter(41)))
    assert image.size == size and not changed[~hole].any() and changed[hole].mean() > 0.5
    assert "RNG: CPU, Denoising strength: 1, " in image.text["parameters"]
    assert "Generated size: 64x64, Init image hash: " in image.text["parameters"]
    assert "Mask: mask.png" in image.text["parameters"]


def test_inverted_mask_and_transparency(edit, tmp_path):
    picture, mask = Image.open(SAMPLE).convert("RGB"), Image.open(MASK).convert("L")
    kept = np.asarray(mask) == 0
    clear = picture.copy()
    clear.putalpha(mask)
    clear.save(tmp_path / "clear.png")  # transparent around the middle, so that is painted
    edit(inpaint, "a", SAMPLE, MASK, "--invert-mask")
    edit(inpaint, "a", tmp_path / "clear.png")
    for name in ("00001.png", "00002.png"):
        changed = (np.asarray(made(tmp_path, name)) != np.asarray(picture)).any(axis=-1)
        assert not changed[~kept].any() and changed[kept].mean() > 0.9
    assert "Mask mode: Inpaint not masked" in made(tmp_path).text["parameters"]
    assert "Mask: alpha" in made(tmp_path, "00002.png").text["parameters"]


def test_settings_of_the_mask_are_recorded(edit, tmp_path):
    args = (
        "--strength",
        "0.5",
        "--content",
        "fill",
        "--mask-blur",
        "2",
        "--only-masked",
        "--margin",
        "8",
        "--posterior",
        "mode",
    )
    assert edit(inpaint, "a", SAMPLE, MASK, *args)[0] == 0
    text = made(tmp_path).text["parameters"]
    for words in (
        "Denoising strength: 0.5, Posterior: mode, ",
        "Mask blur: 2, Masked content: fill, Inpaint area: Only masked, Masked area padding: 8",
        "Generated size: 64x64, ",
        f"Mask: sample-mask.png, Mask hash: {sha256(MASK.read_bytes()).hexdigest()[:10]}, ",
    ):
        assert words in text


def test_nothing_of_the_given_file_is_carried_along(edit, tmp_path):
    """Photos know where they were taken."""
    exif = Image.Exif()
    exif[0x010E] = "secret"
    Image.open(SAMPLE).convert("RGB").save(tmp_path / "a.jpg", exif=exif, comment=b"secret")
    edit(inpaint, "a", tmp_path / "a.jpg", MASK, "--no-metadata")
    assert b"secret" not in (tmp_path / "out" / "00001.png").read_bytes() and not made(tmp_path).info


@pytest.mark.parametrize("how, kind", [("decoded", "webp"), ("linear", "webp"), ("decoded", "gif")])
def test_steps_are_saved(edit, tmp_path, how, kind):
    args = ("--save-steps", "--preview", how, "--animation", kind, "--n", "2", "--batch-size", "2", "--strength", "1")
    status, out, err, files = edit(img2img, "a", SAMPLE, *args, small=(*SMALL[:4], "--steps", "3", "--seed", "7"))
    assert (status, err) == (0, [])
    folder = [f"-steps{os.sep}{i:03d}.png" for i in (1, 2, 3)]
    expected = [f"0000{n}{end}" for n in (1, 2) for end in (f"-steps.{kind}", "-steps", *folder, ".png")]
    assert files == sorted(expected)
    assert out[2] == str(tmp_path / "out" / f"00001-steps.{kind}")
    with Image.open(tmp_path / "out" / f"00002-steps.{kind}") as film:
        assert film.n_frames in (2, 3) and film.size == (64, 64)  # frames that are alike may be one
    last, picture = (
        np.asarray(made(tmp_path, f"00002{end}")).astype(int) for end in (f"-steps{os.sep}003.png", ".png")
    )
    assert np.abs(last - picture).mean() < (20 if how == "decoded" else 60)  # the last step ends a little above clean


def test_options_may_stand_between_the_words(edit, tmp_path):
    edit(inpaint, "a", "--mask-blur", "1", SAMPLE, "--strength", "0.9", MASK)
    edit(inpaint, "a", SAMPLE, MASK, "--mask-blur", "1", "--strength", "0.9")
    assert made(tmp_path).tobytes() == made(tmp_path, "00002.png").tobytes()


def test_every_option_reaches_the_model(edit, ckpt, tmp_path):  # noqa: F811
    model = StableDiffusion.load(ckpt, device="cpu", dtype="float32")
    same = {"height": 64, "width": 64, "seed": 7, "guidance": 3.0, "sampler": "euler_a", "steps": 4}
    words = ("--guidance", "3", "--sampler", "euler_a", "--steps", "4", "--negative", "b")
    small = ("--height", "64", "--width", "64", "--device", "cpu", "--dtype", "float32", "--seed", "7", *words)
    with Image.open(SAMPLE) as sample, Image.open(MASK) as mask:
        edited = model.img2img("a", sample, "b", strength=0.6, posterior="mode", fit="pad", **same)
        repainted = model.inpaint(
            "a", sample, mask, "b", strength=0.6, content="noise", blur=2, margin=9, posterior="mode", **same
        )
    edit(img2img, "a", SAMPLE, "--strength", "0.6", "--posterior", "mode", "--fit", "pad", small=small)
    args = ("--content", "noise", "--mask-blur", "2", "--only-masked", "--margin", "9", "--posterior", "mode")
    edit(inpaint, "a", SAMPLE, MASK, "--strength", "0.6", *args, small=small)
    assert made(tmp_path).tobytes() == edited[0].tobytes()
    assert made(tmp_path, "00002.png").tobytes() == repainted[0].tobytes()


def test_empty_masks_are_refused_before_anything_is_loaded(edit, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "empty.png")
    status, out, err, files = edit(inpaint, "a", SAMPLE, tmp_path / "empty.png")
    assert status == 1 and out == [] and files == [] and "the mask is empty" in err[0]


def test_images_given_as_masks_are_noticed_once(edit):
    status, _, err, _ = edit(inpaint, "a", MASK, SAMPLE, "--n", "2")
    assert status == 0 and err == [
        "warning: the mask has colours, and only their brightness is used: is it the right file?"
    ]


def test_a_long_run_keeps_a_hundred_of_its_steps(edit):
    small = ("--height", "16", "--width", "16", "--device", "cpu", "--steps", "101", "--guidance", "1", "--seed", "1")
    _, _, _, files = edit(img2img, "a", SAMPLE, "--strength", "1", "--save-steps", "--preview", "linear", small=small)
    assert sum(name.startswith("00001-steps" + os.sep) for name in files) == 51  # every second, and the last


def test_no_steps_no_frames(edit):
    status, _, _, files = edit(img2img, "a", SAMPLE, "--strength", "0", "--save-steps")
    assert status == 0 and files == ["00001.png"]


@pytest.mark.parametrize(
    "program, args, words",
    [
        (img2img, ["a"], "give the image to start from"),
        (img2img, ["a", "missing.png"], "missing.png: no such file"),
        (img2img, ["a", SAMPLE, "b"], "'b' is one word too many"),
        (img2img, ["a", SAMPLE, "--init-img", SAMPLE], "one word too many beside --init-img"),
        (img2img, ["a", __file__], "a text, not an image"),
        (img2img, ["a", SAMPLE, "--strength", "1.5"], "strength must be in [0, 1], got 1.5"),
        (img2img, ["a", SAMPLE, "--strength", "nan"], "strength"),
        (img2img, ["a", SAMPLE, "--height", "65"], "height must be a multiple of 8, got 65"),
        (inpaint, ["a", SAMPLE], "no part of it is transparent: give a mask with --mask"),
        (inpaint, ["a", SAMPLE, "missing.png"], "missing.png: no such file"),
        (inpaint, ["a", SAMPLE, MASK, "--mask-blur", "-1"], "blur"),
        (inpaint, ["a", SAMPLE, MASK, "--only-masked", "--margin", "-1"], "at least 0"),
        (inpaint, [SAMPLE, MASK], "sample.png is an image: the prompt comes first"),
        (img2img, [SAMPLE, "a"], "sample.png is an image: the prompt comes first"),
        (img2img, [str(Path(SAMPLE).parent), "a cat"], "data is a folder: the prompt comes first"),
        (img2img, ["a", SAMPLE, SAMPLE], "one word too many: for several images, give their folder"),
        (img2img, ["a", "https://example.org/a.png"], "URLs are not fetched"),
    ],
    ids=str,
)
def test_refusals(edit, program, args, words):
    status, _, err, files = edit(program, *args, small=SMALL[4:])
    assert status == 1 and files == [] and len(err) == 1 and err[0].startswith("error: ") and words in err[0], err


@pytest.mark.parametrize(
    "args, words",
    [
        (["--background", "reddish"], "not a colour"),
        (["--content", "sky"], "invalid choice"),
        (["--mask_blurr", "4"], "did you mean --mask-blur?"),
    ],
)
def test_unknown_choices(edit, args, words):
    status, _, err, _ = edit(inpaint, "a", SAMPLE, MASK, *args)
    assert status == 2 and len(err) == 1 and words in err[0]


def test_background_of_transparent_images(edit, tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for name, colour in (("00001.png", "black"), ("00002.png", "#ffffff")):
        edit(img2img, "a", tmp_path / "clear.png", "--strength", "0", "--background", colour)
        assert made(tmp_path, name)
    black, white = (np.asarray(made(tmp_path, name)).astype(int) for name in ("00001.png", "00002.png"))
    assert np.abs(black - white).mean() > 5


# --- folders and loops ---


def test_a_folder_of_images(edit, tmp_path):
    """Sorted, each under its name, with seeds that go on; what cannot be read is named, and the rest is made."""
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "c.webp", "below/d.png"):
        Image.open(SAMPLE).convert("RGB").save(photos / name)
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "notes.txt").write_text("text")
    status, out, err, files = edit(img2img, "a", photos, "--strength", "0.5", "--n", "2", "--grid")
    assert status == 1 and files == ["00001-grid.png", "a-2.png", "a.png", "b-2.png", "b.png", "c-2.png", "c.png"]
    assert [line.split()[-1] for line in out[1:-1]] == ["7", "8", "9", "10", "11", "12"]
    assert [line.split(":")[0] for line in err] == ["warning", "error"] and "broken.png" in err[0]
    assert err[1].startswith("error: 1 of 4 images were skipped; the first: ") and "broken.png" in err[1]
    (photos / "broken.png").unlink()
    assert edit(img2img, "a", photos, "--strength", "0.5")[0] == 0
    assert made(tmp_path, "a-3.png").size == (64, 64)  # no file is replaced


@pytest.mark.parametrize("content, words", [(None, "no images in this folder"), (b"no image", "b.png: a text, not an")])
def test_folders_without_images(edit, tmp_path, content, words):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png") if content else ():
        (photos / name).write_bytes(content)
    status, out, err, files = edit(img2img, "a", photos)
    assert (status, out, files) == (1, [], []) and any(words in line for line in err)


def test_each_round_of_a_loop_starts_from_the_result_of_the_one_before(edit, ckpt, tmp_path):  # noqa: F811
    status, out, _, files = edit(img2img, "a", SAMPLE, "--strength", "0.5", "--loopback", "2", "--n", "2")
    assert status == 0 and files == [f"0000{i}.png" for i in (1, 2, 3, 4)]
    assert [line.split()[-1] for line in out[1:]] == ["7", "8", "9", "10"]
    model = StableDiffusion.load(ckpt, device="cpu", dtype="float32")
    first, third = made(tmp_path), made(tmp_path, "00003.png")
    for start, seed, name in ((first, 8, "00002.png"), (third, 10, "00004.png")):
        expected = model.img2img("a", start, strength=0.5, seed=seed, steps=2, height=64, width=64)[0]
        assert np.array_equal(np.asarray(expected), np.asarray(made(tmp_path, name)))
    assert "Loopback round: 2" in made(tmp_path, "00002.png").text["parameters"]
    assert edit(img2img, "a", SAMPLE, "--loopback", "0")[2] == ["error: --loopback must be at least 1, got 0"]


def test_matched_colours_do_not_drift(edit, tmp_path):
    args = ("--strength", "0.5", "--loopback", "4", "--match-colours")
    assert edit(img2img, "a", SAMPLE, *args, small=SMALL)[0] == 0
    sample = fit(Image.open(SAMPLE).convert("RGB"), 64, 64)
    drift = np.abs(np.asarray(made(tmp_path, "00004.png")).mean((0, 1)) - np.asarray(sample).mean((0, 1)))
    assert drift.max() < 1
