"""evaluate.py --control: edges of images against their hints, and captions with and without."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from scripts import evaluate
from scripts.evaluation import control, judge
from scripts.evaluation.judge import Judge
from scripts.toy_world import Scene
from sd import StableDiffusion
from sd.config import POCKET
from sd.control_config import ControlConfig
from sd.models.controlnet import ControlNet


class Draws:
    """In place of a model: it draws the scene whose edges it is given, and another one at scale 0."""

    def __init__(self, cases: list[control.Case]) -> None:
        self.cases, self.asked = cases, []

    def txt2img(self, text: str, *, seed: int, controls, **settings) -> list[Image.Image]:
        self.asked.append((text, seed, controls.name, controls.scale, settings))
        hint = np.asarray(controls.image.convert("L")) > 0
        mine = [
            i for i, case in enumerate(self.cases) if any(np.array_equal(hint, other) for other in case.hints.values())
        ]
        assert len(mine) == 1 and self.cases[mine[0]].told.text == text
        return [self.cases[(mine[0] + (0 if controls.scale else 3)) % len(self.cases)].picture]


class Sees:
    """In place of a judge: it knows the scenes of the pictures; of images of another number it sees nothing."""

    def look(self, images) -> list[Scene]:
        return [Scene("", "", "") for _ in images]


def test_a_model_that_obeys_is_told_from_one_that_does_not():
    cases = control.cases("unseen", 12)
    model = Draws(cases)
    scores, rates = control.measure(model, "lines", cases, Sees(), lambda _, x: x, steps=4, seed=30)
    detected, outlines = scores["detected"], scores["outlines"]
    assert detected["controlled"] == detected["drawn"] == 1.0
    assert 0.75 < outlines["controlled"] == outlines["drawn"] < 1.0
    for of in (detected, outlines):
        assert of["without"] < of["redrawn"] < of["controlled"]
        assert of["without"] < of["controlled"] - 0.2 and of["chance"] < of["controlled"] - 0.2
    assert list(rates) == ["without", "outlines", "detected"]
    assert rates["without"]["all"].of == 12
    asked = [(seed, name, scale, settings) for _, seed, name, scale, settings in model.asked]
    once = [(30 + i, "lines", {"steps": 4}) for i in range(12)]
    assert asked == [(s, n, scale, rest) for scale in (1.0, 1.0, 0.0) for s, n, rest in once]
    table = control.describe(scores)
    assert table.splitlines()[0] == "| F1 of edges | controlled | without | redrawn | chance | drawn |"
    assert re.search(r"\| detected \| 1\.000 \| 0\.\d{3} \| 0\.\d{3} \| 0\.\d{3} \| 1\.000 \|", table)


def test_cases_are_the_same_on_every_call_and_of_their_split():
    one, two = control.cases("train", 5), control.cases("train", 5)
    assert all(a.told == b.told and a.picture.tobytes() == b.picture.tobytes() for a, b in zip(one, two, strict=True))
    assert {kind for case in one for kind in case.hints} == set(control.KINDS)
    assert all(hint.dtype == bool and hint.shape == (128, 128) for case in one for hint in case.hints.values())
    assert one[0].told != control.cases("unseen", 1)[0].told
    assert not any(evaluate.says_unseen(case.told.said) for case in control.cases("train", 40))


@pytest.mark.exhaustive
def test_the_program_measures_a_control_network(tmp_path, monkeypatch, capsys):
    """With one that changes nothing, images are the same with and without."""
    network = ControlNet(ControlConfig.of(POCKET.unet, hint=(4, 4, 4, 4)))
    for layer in (*network.zero, network.zero_mid):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    add = StableDiffusion.add_control
    monkeypatch.setattr(StableDiffusion, "add_control", lambda model, file, note: add(model, network, file))
    monkeypatch.setattr(judge, "find", lambda *args: Judge())
    file = tmp_path / "figures.json"
    options = ["--control", "mine", "--prompts", "2", "--split", "unseen", "--steps", "2", "--renderings", "4"]
    assert evaluate.main([*options, "--dtype", "float32", "--device", "cpu", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "Edges of images against their hints, 2 unseen scenes:" in printed and "negative prompt" not in printed
    figures = json.loads(file.read_text())
    assert figures["control"] == "mine" and set(figures["edges"]) == {"unseen"}
    for of in figures["edges"]["unseen"].values():
        assert of["controlled"] == of["without"] and 0 < of["drawn"] <= 1
    scores = figures["scores"]["unseen"]
    assert scores["without"] == scores["outlines"] == scores["detected"]


@pytest.mark.parametrize(
    ("wrong", "said"), [(("--prompts", "0"), "at least two --prompts"), (("--wrong", "x"), "--wrong")]
)
def test_what_does_not_go_with_it(wrong, said, capsys):
    assert evaluate.main(["--control", "edges", *wrong]) == 1
    assert said in capsys.readouterr().err
