"""The embedded model's LoRA for few steps: which commands use it without being asked, and what --like repeats."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sd
from scripts import img2img, inpaint, txt2img
from scripts.common.default_lora import SPACING, suits
from sd.checkpoints.checkpoint import load_checkpoint
from sd.config import POCKET
from sd.few_step import LCM, SETTINGS, from_json
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource

LINES = ["LoRA pocket-lcm, weight 1", "pocket-lcm is an LCM LoRA: 4 steps, sampler lcm, guidance 1"]
SIZE = ["--height", "64", "--width", "64", "--seed", "7", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Start a program; returns its status, its lines and its images, the last ones first."""
    monkeypatch.chdir(tmp_path)

    def start(program, *args):
        status = program.main([*map(str, args), "--device", "cpu", "--dtype", "float32"])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out.splitlines(), sorted((tmp_path / "outputs").glob("*.png"), reverse=True)

    return start


def pixels(file) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def parameters(file) -> str:
    with Image.open(file) as image:
        return image.text["parameters"]


@pytest.mark.parametrize("settings", [
    {}, {"steps": 2}, {"steps": 8}, {"prompt": "a (cat:1.2), a house", "web_ui_prompts": True},
    {"guidance": 1}, {"sampler": "lcm"}, {"spacing": "trailing"}, {"negative": ""},
    {"n": 3, "height": 192, "width": 128, "seed": 3, "exact": True, "tileable": True, "rng": "nv"},
    {"variation_seed": 3, "variation_strength": 0.2},
])  # fmt: skip
def test_settings_of_few_steps(settings):
    assert suits(TextToImage.of(**{"prompt": "a cat", **settings}))


@pytest.mark.parametrize("settings", [
    {"steps": 1}, {"steps": 9}, {"steps": 50}, {"guidance": 4}, {"guidance": 0}, {"guidance": 1.5}, {"sampler": "ddim"},
    {"sampler": "tcd"}, {"spacing": "lcm"}, {"negative": "a dog"}, {"negative": ["", "a dog"]}, {"eta": 0.5},
    {"cache_interval": 3}, {"guidance_rescale": 0.5}, {"guidance_until": 0.5},
    *({"prompt": text, "web_ui_prompts": True} for text in ("[a cat:a duck:10]", "a [cat|duck]", "a cat AND a duck")),
])  # fmt: skip
def test_settings_of_the_model_by_itself(settings):
    assert not suits(TextToImage.of(**{"prompt": ["a cat", "a dog"], **settings}))


def test_what_takes_a_part_of_the_steps_does_not_suit():
    """Of 4 steps, a strength of 0.7 would take 2, and one of 0.2 none."""
    image = Image.new("RGB", (64, 64))
    assert not suits(HighRes.of("a cat", hires=2.0))
    assert not suits(ImageToImage.of("a cat", image=image)) and not suits(Inpaint.of("a cat", image=image, mask=image))


def test_the_lora_says_what_is_asked_for_here():
    with load_checkpoint(resource(EMBEDDED_LORA)) as file:
        assert from_json(file.metadata[SETTINGS], POCKET) == replace(LCM, spacing=SPACING)


def test_the_default_takes_four_steps(run):
    """Nothing is asked for but the prompt: the image of the model with its LoRA, which the file names."""
    lines, (image,) = run(txt2img, "a red house in the snow", "--seed", 7)
    assert lines[1:3] == LINES
    text = parameters(image)
    assert "<lora:pocket-lcm:1>" in text and "Steps: 4, Sampler: LCM" in text and "CFG scale: 1," in text
    model = sd.StableDiffusion.load(device="cpu", dtype="float32")
    assert model.few_step is None  # as imported, it is the model by itself
    model.add_lora(resource(EMBEDDED_LORA), note=lambda text: None)
    with torch.no_grad():
        (expected,) = model.txt2img("a red house in the snow", seed=7)
    assert expected.tobytes() == pixels(image)


def test_what_the_lora_is_not_made_for_uses_the_model_by_itself(run):
    lines, (image,) = run(txt2img, "a red house in the snow", "--guidance", 4, "--steps", 2, *SIZE)
    assert not any("LoRA" in line for line in lines)
    assert "lora" not in parameters(image).lower() and "CFG scale: 4," in parameters(image)


@pytest.mark.exhaustive
def test_other_models_and_loras_come_without_it(run, tmp_path):
    shutil.copy(resource(EMBEDDED), tmp_path / "mine.safetensors")
    lines, _ = run(txt2img, "a red house", "--ckpt", "mine.safetensors", "--steps", 2, *SIZE)
    assert not any("LoRA" in line for line in lines)
    shutil.copy(resource(EMBEDDED_LORA), tmp_path / "other.safetensors")
    lines, _ = run(txt2img, "a red house", "--lora", "other.safetensors", "--steps", 2, *SIZE)
    assert [line for line in lines if line.startswith("LoRA")] == ["LoRA other, weight 1"]
    folder = ["--lora-dir", ".", "--web-ui-prompts"]
    lines, _ = run(txt2img, "a red house <lora:other:0.5>", *folder, "--steps", 2, *SIZE)
    assert [line for line in lines if line.startswith("LoRA")] == ["LoRA other, weight 0.5"]


def test_no_lora_is_the_model_by_itself(run):
    """With settings that the LoRA is made for, and beside a recipe that was made with it."""
    out, (first,) = run(txt2img, "a red house", "--no-lora", *SIZE, "--steps", 2)
    assert not any("LoRA" in line for line in out) and "CFG scale: 4," in parameters(first)
    out, (made, *_) = run(txt2img, "a red house", *SIZE)
    assert LINES[0] in out
    out, (image, *_) = run(txt2img, "--like", made, "--no-lora", "--steps", 2)
    assert not any("LoRA" in line for line in out) and pixels(image) == pixels(first)


def test_all_lines_of_a_file_have_the_same_model(run, tmp_path):
    """One line that asks for guidance is enough: all are made by the model by itself."""
    lines = [{"prompt": "a cat"}, {"prompt": "a duck", "guidance": 4}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out, images = run(txt2img, "--from-file", "prompts.jsonl", "--steps", 2, *SIZE)
    assert len(images) == 2 and not any("LoRA" in line for line in out)
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines[:1])), encoding="utf-8")
    out, _ = run(txt2img, "--from-file", "prompts.jsonl", "--steps", 2, *SIZE)
    assert LINES[0] in out


@pytest.mark.exhaustive
def test_image_to_image_and_inpainting_do_without_it(run, tmp_path):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "init.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    out, (image,) = run(img2img, "a red house", "init.png", "--strength", 0.3, "--steps", 8, "--seed", 7)
    assert not any("LoRA" in line for line in out) and "CFG scale: 4," in parameters(image)
    out, _ = run(inpaint, "a red house", "init.png", "mask.png", "--steps", 2, "--seed", 7)
    assert not any("LoRA" in line for line in out)
    _, (made, *_) = run(txt2img, "a red house", *SIZE)
    out, (image, *_) = run(img2img, "--like", made, "--init-img", "init.png", "--steps", 4)
    assert not any(line in out for line in LINES) and "CFG scale: 4," in parameters(image)


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", [["--steps", 2], ["--steps", 2, "--guidance", 4]], ids=["with", "without"])
def test_like_repeats_it_with_and_without(run, settings):
    """The recipe says whether the LoRA was merged: its settings alone do not decide it again."""
    _, (first,) = run(txt2img, "a red house", *settings, *SIZE)
    out, (again, _) = run(txt2img, "--like", first)
    assert pixels(first) == pixels(again) and (LINES[0] in out) == (len(settings) == 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("more, merged", [
    (["--seed", 9], True), (["--steps", 8], True), (["--negative", "a tree"], False), (["--guidance", 4], False),
    (["--sampler", "ddim"], False), (["--steps", 12], False),
], ids=str)  # fmt: skip
@pytest.mark.sampled(3)
def test_other_settings_beside_like_decide_anew(run, more, merged):
    """A negative prompt is not lost because the image was made without guidance."""
    _, (first,) = run(txt2img, "a red house", *SIZE)
    steps = [] if "--steps" in more or merged else ["--steps", 2]
    out, (again, _) = run(txt2img, "--like", first, *more, *steps)
    assert (LINES[0] in out) == merged
    assert f"CFG scale: {1 if merged else 4}," in parameters(again)
    assert ("Negative prompt: a tree" in parameters(again)) == ("a tree" in more)


def test_a_lora_beside_like_takes_its_place(run, tmp_path):
    _, (first,) = run(txt2img, "a red house", *SIZE)
    save_file(load_file(resource(EMBEDDED_LORA)), tmp_path / "style.safetensors")  # not known as one for few steps
    out, (again, _) = run(txt2img, "--like", first, "--lora", "style.safetensors", "--steps", 2)
    assert [line for line in out if line.startswith("LoRA")] == ["LoRA style, weight 1"]
    assert "CFG scale: 4," in parameters(again)


def test_a_recipe_without_it_stays_without_it(run, tmp_path):
    """Also where its settings are those of few steps."""
    text = "a red house\nSteps: 2, Sampler: LCM, Schedule type: Trailing, CFG scale: 1, Seed: 7, Version: sd 0.2"
    (tmp_path / "recipe.txt").write_text(text, encoding="utf-8")
    out, (image,) = run(txt2img, "--like", "recipe.txt")
    assert not any(line in out for line in LINES) and "Sampler: LCM" in parameters(image)
