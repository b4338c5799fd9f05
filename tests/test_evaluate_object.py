"""An object that the world lacks: its scenes, drawings and training images, its judge, and a small run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from common import TINY
from PIL import Image
from safetensors.torch import save_file

from scripts import evaluate
from scripts.evaluation import judge, objects
from scripts.evaluation.scoring import Rate
from scripts.toy_world import WORDS, Scene, Thing, box, draw, held_out, random_scene, scene_with, tell
from scripts.toy_world.extra import EXTRA_PAINTERS, EXTRA_SPRITES
from scripts.toy_world.scenes import EXTRA, GROUNDS, KINDS, STANDING, STYLES, TIMES
from scripts.toy_world.sprites import LETTERS
from sd.pipeline import StableDiffusion

CPU = torch.device("cpu")
DATA = Path(__file__).parents[1] / "data"


def test_the_world_lacks_the_object() -> None:
    assert set(EXTRA) == set(EXTRA_PAINTERS) == set(EXTRA_SPRITES) and not set(EXTRA) & {*KINDS, *WORDS}
    rng = Random(0)
    assert not any(thing.kind in EXTRA for _ in range(500) for thing in random_scene(rng, "all").things)


def test_scenes_with_it_are_scenes_of_the_world_but_for_it() -> None:
    rng = Random(0)
    scenes = [scene_with("hut", rng, "train") for _ in range(300)]
    for scene in scenes:
        (hut,) = [thing for thing in scene.things if thing.kind == "hut"]
        assert hut.colour == "red" and not hut.floats and not held_out(scene) and not scene.grouped
        told = tell(scene, rng)
        assert "hut" in told.text.split() or "hut," in told.text, told.text
        assert not any(thing.colour for thing in told.said.things if thing.kind == "hut")
    assert {len(scene.things) for scene in scenes} == {1, 2}
    for i, values in enumerate((STYLES, TIMES, GROUNDS)):
        assert {scene[i] for scene in scenes} == set(values)
    assert scene_with("hut", Random(5)) == scene_with("hut", Random(5))


def test_sprites_are_square_cut_and_of_known_letters() -> None:
    for sprites in EXTRA_SPRITES.values():
        for text, side in zip(sprites, (9, 15), strict=True):
            rows = text.split()
            assert {len(row) for row in rows} == {side} and len(rows) <= side
            assert set("".join(rows)) <= set(LETTERS)


@pytest.mark.parametrize("style", STYLES)
def test_it_looks_like_no_other_thing(style: str) -> None:
    """A red thing of any other kind, in the same place, differs from it in a good part of its pixels."""

    def pixels(kind: str, size: str) -> np.ndarray:
        thing = Thing(kind, "red", size, "middle")
        left, top, right, bottom = (round(128 * place) for place in box(thing))
        return np.asarray(draw(Scene(style, "day", "snow", (thing,)), Random(0)), np.float32)[top:bottom, left:right]

    for size in ("small", "big"):
        hut = pixels("hut", size)
        for kind in STANDING:
            assert (np.abs(pixels(kind, size) - hut).max(axis=2) > 40).mean() > 0.15, kind


def test_training_images_are_the_files_in_data(tmp_path) -> None:
    objects.write_examples("hut", tmp_path / "hut")
    files = sorted((tmp_path / "hut").iterdir())
    assert [file.name for file in files] == sorted(file.name for file in (DATA / "hut").iterdir()) and len(files) == 40
    for file in files:
        kept = DATA / "hut" / file.name
        if file.suffix == ".txt":
            assert file.read_text() == kept.read_text() and "hut" in file.read_text()
        else:
            one, two = Image.open(file), Image.open(kept)
            assert one.size == (128, 128) and one.mode == "RGB" and one.tobytes() == two.tobytes()
    assert sum(file.stat().st_size for file in (DATA / "hut").iterdir()) < 150_000
    with pytest.raises(FileExistsError, match="hut"):
        objects.write_examples("hut", tmp_path / "hut")


def test_prompts_show_what_no_training_image_shows() -> None:
    trained = [example.scene for example in objects.examples("hut")]
    assert len({scene[:3] for scene in trained}) == len(trained) == objects.IMAGES
    asked = objects.prompts("hut", 40)
    assert asked == objects.prompts("hut", 40) and len({each.text for each in asked}) > 35
    for each in asked:
        said = each.said
        assert any(thing.kind == "hut" for thing in said.things)
        assert said[:3] not in {scene[:3] for scene in trained}
    for plain, named in zip(asked, objects.prompts("hut", 40, "<my-hut>"), strict=True):
        assert named.text.replace("<my-hut>", "hut") == plain.text != named.text and named.said == plain.said


def test_a_judge_of_it_has_one_more_kind_for_what_stands() -> None:
    usual, more = judge.questions(), judge.questions("hut")
    assert usual == judge.QUESTIONS and [len(b) - len(a) for a, b in zip(usual, more, strict=True)].count(1) == 3
    rng = Random(1)
    for _ in range(100):
        for scene in (scene_with("hut", rng), random_scene(rng, "all")):
            answers = [max(0, answer) for answer in judge.labels(scene, "hut")]
            assert judge.scene_of(answers, "hut") == scene
    _, scenes = judge.renderings(120, "test", extra="hut")
    assert 15 < objects.with_it("hut", scenes).right < 50
    assert judge.fingerprint() != judge.fingerprint("hut")


@pytest.mark.exhaustive
def test_a_judge_of_it_learns(monkeypatch) -> None:
    monkeypatch.setattr(judge, "worn", lambda x, rng: x)
    trained = judge.train(CPU, 1500, 250, 32, "hut")
    pixels, scenes = judge.renderings(200, "test", extra="hut")
    seen = trained.look(judge.to_floats(pixels))
    true, found = ([any(t.kind == "hut" for t in scene.things) for scene in each] for each in (scenes, seen))
    never = 1 - np.mean(true)  # right of a judge that never sees it
    assert np.mean(np.array(true) == np.array(found)) > max(0.85, never + 0.05)


@pytest.fixture
def own_sd(tiny) -> StableDiffusion:
    """The tiny model, into which a run merges a LoRA for good."""
    return StableDiffusion(TINY, **copy.deepcopy(tiny))


@pytest.fixture
def hut_run(tmp_path, own_sd, monkeypatch):
    """Run the program with a tiny model, and an untrained judge: (options) -> (status, figures)."""
    monkeypatch.setattr(judge, "train", lambda device, extra="": judge.Judge(extra).eval())
    monkeypatch.setattr(evaluate.generate, "load", lambda args: own_sd)
    monkeypatch.setattr(own_sd, "config", replace(own_sd.config, size=64))
    monkeypatch.setattr(evaluate, "THROUGH_VAE", 2)

    def run(*options: str):
        file = tmp_path / "scores.json"
        small = ["--prompts", "2", "--steps", "1", "--renderings", "4", "--judge", str(tmp_path / "judge.safetensors")]
        status = evaluate.main(["--object", "hut", *small, "--json", str(file), *options])
        return status, json.loads(file.read_text()) if status == 0 else None

    return run


def test_a_run_with_a_lora_measures_usual_prompts_before_and_after(hut_run, own_sd, tmp_path, capsys) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = own_sd.unet.config.channels[-1]
    file = tmp_path / "mine.safetensors"
    up, down = torch.ones(width, 1), torch.ones(1, width)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, file)
    status, figures = hut_run("--lora", str(file), "--word", "<thing>", "--wrong", str(tmp_path / "wrong"))
    out = capsys.readouterr().out
    assert status == 0 and "points with the LoRA" in out and "of 2 images of prompts with <thing>" in out
    assert set(figures["scores"]) == {"with <thing>", "usual before", "usual"}
    assert figures["seen"][1] == 2 and figures["uncalled"]["before"][1] == figures["uncalled"]["after"][1] == 4
    assert figures["scores"]["usual"]["all"][1] == 4 and (tmp_path / "wrong" / "wrong.txt").exists()


def test_a_run_with_a_word_uses_its_vectors(hut_run, own_sd, tmp_path, monkeypatch, capsys) -> None:
    file, given = tmp_path / "thing.safetensors", []
    save_file({"thing": torch.randn(2, own_sd.text_encoder.config.width)}, file)
    drawn = StableDiffusion.txt2img
    monkeypatch.setattr(
        StableDiffusion, "txt2img", lambda self, text, *a, **k: given.extend(text) or drawn(self, text, *a, **k)
    )
    status, figures = hut_run("--embedding", str(file), "--word", "thing")
    assert status == 0 and set(figures["scores"]) == {"with thing", "usual"} and "points" not in figures
    assert own_sd.words["thing"] == 2 and sum("thing" in text for text in given) == 2 and len(given) == 6
    capsys.readouterr()


def test_only_the_images_are_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate.generate, "load", lambda args: pytest.fail("loaded a model"))
    assert evaluate.main(["--object", "hut", "--write", str(tmp_path / "hut")]) == 0
    assert len(list((tmp_path / "hut").glob("*.webp"))) == 20 and "20 images of a hut" in capsys.readouterr().out


def test_an_embedding_without_the_word_of_the_prompts_is_refused(hut_run, own_sd, tmp_path, capsys) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"other": torch.randn(1, own_sd.text_encoder.config.width)}, file)
    status, _ = hut_run("--embedding", str(file))
    assert status == 1 and "no embedding has the word hut: give --word, one of other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--word", "thing"], "--word is for --object"),
        (["--embedding", "thing.pt"], "--embedding is for --object"),
        (["--write", "thing"], "--write is for --object"),
        (["--object", "hut", "--control", "edges"], "--object takes"),
        (["--object", "hut", "--guidance", "1", "2"], "--object takes"),
        (["--object", "hut", "--embedding", "missing.pt"], "missing.pt"),
        (["--object", "hut", "--write", str(DATA)], "data"),
        (["--object", "hut", "--write", "thing", "--word", "<x>"], "--write only writes"),
    ],
)
def test_wrong_arguments_are_one_line(options, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate.generate, "load", lambda args: pytest.fail("loaded a model"))
    assert evaluate.main(options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_rate_of_scenes_with_it() -> None:
    hut = Scene("flat", "day", "sea", (Thing("hut", "red", "big", "left"),))
    assert objects.with_it("hut", [hut, hut._replace(things=()), hut]) == Rate(2, 3)
