"""SDXL's own settings: sizes and refiner in requests, on the command line and in the files of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import error
from PIL import Image
from safetensors.torch import save_file
from sdxl_common import (
    SMALL_ARGS,
    finish,
    model_files,
    params,
    pixels,
    text_of,
    tiny_refiner,
    tiny_xl,
    two,
)

from scripts import img2img, txt2img
from scripts.common import xl_args
from sd import StableDiffusion, read_request
from sd.config import BASE_SIZES
from sd.params import TextToImage


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return tiny_xl()


@pytest.fixture(scope="module")
def refiner() -> StableDiffusion:
    return tiny_refiner()


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"original_width": 9, "crop_top": 3}, "original_width, crop_top have no effect: tiny v1 is not told them"),
        ({"negative_aesthetic_score": 3}, "negative_aesthetic_score has no effect: tiny v1 is not told it"),
        ({}, None),
    ],
)
def test_sizes_that_a_model_is_not_told(settings, note, tiny_sd, base):
    run = tiny_sd.prepare(TextToImage("a cat", params(**settings)))
    assert run.notes == ([] if note is None else [note])
    unheard = [name for name in settings if "score" in name]
    assert len(base.prepare(TextToImage("a cat", params(**settings))).notes) == len(unheard)


def test_sizes_change_the_image(base):
    plain = finish(base.prepare(TextToImage("a cat", params(steps=2))))
    for name in BASE_SIZES:
        assert error(finish(base.prepare(TextToImage("a cat", params(steps=2, **{name: 300})))), plain) > 1e-4
    own = params(steps=2, original_height=64, original_width=64, target_height=64, target_width=64)
    assert torch.equal(finish(base.prepare(TextToImage("a cat", own))), plain)


# ------------------------------------------------------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Base and refiner as files of our layout."""
    return model_files(tmp_path_factory.mktemp("models"))


ALL = (
    "--exact", "--refiner-from", "0.6", "--negative", "fog", "--prompt-2", "a watercolour, of a cat", "--negative-2",
    "red", "--original-size", "200x300", "--crop", "5x6", "--target-size", "70x80", "--aesthetic-score", "7.5",
    "--negative-aesthetic-score", "1.5",
)  # fmt: skip


@pytest.mark.exhaustive
def test_all_settings_and_their_metadata(files, base, refiner, tmp_path, capsys):
    """On the command line, in the file of the image, and read back: the same image each time."""
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    models = ("--ckpt", str(files["base"]), "--refiner", str(files["refiner"]))
    assert txt2img.main(["a cat", *models, *SMALL_ARGS, *ALL, "--out", str(first)]) == 0, capsys.readouterr().err
    settings = {
        "steps": 5, "seed": 3, "original_width": 200, "original_height": 300, "crop_left": 5, "crop_top": 6,
        "target_width": 70, "target_height": 80, "aesthetic_score": 7.5, "negative_aesthetic_score": 1.5,
        "refiner_from": 0.6,
    }  # fmt: skip
    request = TextToImage.of(
        "a cat", "fog", height=64, width=64, prompt_2="a watercolour, of a cat", negative_2="red", **settings
    )
    image = base.prepare(request, refiner).result().images[0]
    assert np.abs(pixels(first).astype(int) - np.asarray(image)).max() <= 1  # by other kernels

    recipe = read_request(first)
    found = {name: getattr(recipe.request.params, name) for name in settings}
    assert found == settings and recipe.notes == ()
    assert (recipe.request.prompt_2, recipe.request.negative_2) == ("a watercolour, of a cat", "red")
    assert recipe.info["Refiner"].startswith("refiner [") and recipe.info["Refiner switch at"] == "0.6"

    assert txt2img.main(["--like", str(first), *models, "--dtype", "float32", "--out", str(again)]) == 0
    assert np.array_equal(pixels(first), pixels(again))
    assert text_of(first) == text_of(again)
    capsys.readouterr()
    assert (
        txt2img.main(["--like", str(first), "--ckpt", models[1], "--crop", "0x0", "--out", str(tmp_path / "x.png")])
        == 0
    )
    assert "Refiner refiner: give its file with --refiner" in capsys.readouterr().err
    other = read_request(tmp_path / "x.png").request
    assert (other.params.crop_left, other.params.crop_top, other.params.original_width) == (0, 0, 200)


@pytest.mark.exhaustive
def test_a_refiner_is_loaded_as_the_model_is(files, tmp_path, capsys, monkeypatch):
    """With the same progress bar and copy in the cache folder; what was detected is said, and what it cannot read."""
    options, load = [], StableDiffusion.load

    def seen(path, **given):
        options.append(given)
        return load(path, **given)

    monkeypatch.setattr(StableDiffusion, "load", seen)
    save_file(two(2), tmp_path / "style.safetensors")
    models = ("--ckpt", str(files["base"]), "--refiner", str(files["refiner"]))
    words = ("--embedding", str(tmp_path / "style.safetensors"))
    assert txt2img.main(["a style cat", *models, *words, *SMALL_ARGS, "--out", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr()
    assert all(given.keys() >= {"progress", "cache", "low_memory", "compile"} for given in options)
    assert options[0]["cache"] == options[1]["cache"] and "variant" not in options[1]  # it is a file
    assert "refiner: an empty negative prompt is encoded like any text" in said.out
    assert "the refiner reads style as plain text: embeddings are added to the model alone" in said.err
    assert txt2img.main(["a cat", *models, *words, *SMALL_ARGS, "--out", str(tmp_path / "b.png")]) == 0
    assert "the refiner reads" not in capsys.readouterr().err


def test_lines_of_settings(files, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    line = {"prompt": "a cat", "prompt_2": "a dog", "crop_left": 9, "refiner_from": 0.5}
    lines.write_text(json.dumps(line) + "\n")
    arguments = ("--from-file", str(lines), "--ckpt", str(files["base"]), "--refiner", str(files["refiner"]))
    assert txt2img.main([*arguments, *SMALL_ARGS, "--out", str(tmp_path / "a.png")]) == 0
    request = read_request(tmp_path / "a.png").request
    assert (request.prompt_2, request.params.crop_left, request.params.refiner_from) == ("a dog", 9, 0.5)


def test_a_refiner_is_an_image_to_image_model(files, tmp_path):
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(photo)
    arguments = ("a cat", str(photo), "--ckpt", str(files["refiner"]), "--strength", "0.4")
    assert img2img.main([*arguments, *SMALL_ARGS, "--out", str(tmp_path / "a.png")]) == 0
    both = ("--ckpt", str(files["base"]), "--refiner", str(files["refiner"]), "--strength", "0.6")
    assert img2img.main(["a cat", str(photo), *both, *SMALL_ARGS, "--out", str(tmp_path / "b.png")]) == 0
    assert "Refiner switch at: 0.6" in text_of(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--refiner", "REFINER"), "a refiner continues a run of an SDXL model, but the model is pocket: leave it out"),
        (
            ("--ckpt", "BASE", "--refiner", "POCKET"),
            "a refiner continues a run of an SDXL model, but the refiner is pocket",
        ),
        (("--ckpt", "BASE", "--refiner", "nowhere.safetensors"), "nowhere.safetensors"),
        (
            ("--ckpt", "BASE", "--refiner", "REFINER", "--refiner-from", "1.5"),
            r"refiner_from must be in [0, 1], got 1.5",
        ),
        (("--ckpt", "REFINER", "--prompt-2", "x"), "prompt_2 is for a second text encoder"),
        (("--crop", "5"), "'5' is not two numbers of pixels, x before y, such as 1024x768"),
        (("--original-size", "1024x-3"), "is not two numbers"),
        (("--original-size", "999999x8"), "original_width must be in [0, 100000], got 999999"),
    ],
)
def test_wrong_arguments(arguments, message, files, tmp_path, capsys, monkeypatch):
    """One line, before a model is loaded where that can be known."""
    from sd.resources import resource

    monkeypatch.setattr(StableDiffusion, "load", no_loading if "--prompt-2" not in arguments else StableDiffusion.load)
    paths = {"BASE": files["base"], "REFINER": files["refiner"], "POCKET": resource("weights/pocket.safetensors")}
    try:
        status = txt2img.main(["a cat", *(str(paths.get(a, a)) for a in arguments), "--out", str(tmp_path / "a.png")])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert status != 0 and message in said and len(said.strip().split("\n")) == 1, said


def no_loading(*arguments, **options):
    raise AssertionError("a model is loaded")


def test_pairs():
    assert xl_args.pair("1024x768") == (1024, 768) and xl_args.pair(" 0X64") == (0, 64)


def test_what_an_empty_negative_prompt_is_is_said(files):
    lines = {name: StableDiffusion.load(path, device="cpu").about for name, path in files.items()}
    zeros = "an empty negative prompt is zeros, not the encoded empty text, as in its training and in the web UI"
    assert lines["base"].count(zeros) == 1
    assert (
        lines["refiner"].count("an empty negative prompt is encoded like any text, not zeros, as in its training") == 1
    )
