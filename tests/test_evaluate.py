"""The evaluation: scoring by its rules, a judge that learns and is kept, and a whole run on a small scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import evaluate
from scripts.evaluation import judge, probes
from scripts.evaluation.scoring import ATTRIBUTES, Rate, tally, verdict, whole
from scripts.toy_world import Scene, Thing, Told, draw, held_out, random_scene, tell
from scripts.toy_world.scenes import COLOURS, COLUMNS, GROUNDS, KINDS, STYLES, TIMES
from scripts.toy_world.words import NOUNS

CPU = torch.device("cpu")
HOUSE, MOON = Thing("house", "red", "big", "left"), Thing("moon", "white", "small", "left")
SCENE = Scene("flat", "night", "snow", (HOUSE, MOON))


def told(*things: Thing, style: str = "", time: str = "", ground: str = "", relation: str = "") -> Told:
    return Told("", Scene(style, time, ground, things), relation)


def wrong(caption: Told, seen: Scene) -> set[str]:
    return {name for name, right in verdict(caption, seen).items() if not all(right)}


def test_what_is_as_said_is_right() -> None:
    rng = Random(0)
    for _ in range(500):
        scene = random_scene(rng, "all")
        assert wrong(tell(scene, rng), scene) == set() == wrong(whole(scene), scene)


@pytest.mark.parametrize(
    ("attribute", "changes"),
    [
        ("style", {"style": "pixel"}),
        ("time", {"time": "day"}),
        ("ground", {"ground": "sea"}),
        ("object", {"things": (HOUSE._replace(kind="castle"), MOON)}),
        ("colour", {"things": (HOUSE._replace(colour="blue"), MOON)}),
        ("size", {"things": (HOUSE, MOON._replace(size="big"))}),
        ("place", {"things": (HOUSE._replace(column="right"), MOON)}),
        ("no more", {"things": (HOUSE, MOON, Thing("tree", "green", "big", "right"))}),
    ],
)
def test_a_wrong_attribute_is_wrong_and_no_other(attribute: str, changes: dict) -> None:
    assert wrong(whole(SCENE), SCENE._replace(**changes)) - {"all"} == {attribute}
    assert ("all" in wrong(whole(SCENE), SCENE._replace(**changes))) == (attribute != "no more")


def test_what_is_unsaid_is_not_judged() -> None:
    caption = told(Thing("house", "", "", ""))
    for style, time, ground, colour in zip(STYLES, TIMES, GROUNDS, COLOURS, strict=False):
        seen = Scene(style, time, ground, (Thing("house", colour, "small", "middle"),))
        assert wrong(caption, seen) == set()
    assert {name for name, right in verdict(caption, SCENE).items() if right} == {"object", "all", "no more"}


def test_what_is_not_there_has_all_that_is_said_of_it_wrong() -> None:
    empty = SCENE._replace(things=())
    assert wrong(whole(SCENE), empty) == {"object", "colour", "size", "place", "all"}
    assert verdict(whole(SCENE), empty)["object"] == [False, False]


def test_things_are_paired_for_the_best() -> None:
    one, two = Thing("house", "red", "", ""), Thing("house", "blue", "", "")
    seen = SCENE._replace(things=(Thing("house", "blue", "big", "left"), Thing("house", "red", "big", "right")))
    assert wrong(told(one, two), seen) == set()
    assert wrong(told(one, two, relation="left"), seen) == {"relation", "all"}
    assert wrong(told(two, one, relation="left"), seen) == set()


@pytest.mark.parametrize(
    ("relation", "columns", "right"),
    [
        ("left", ("left", "right"), True),
        ("left", ("middle", "right"), True),
        ("left", ("right", "left"), False),
        ("left", ("left", "left"), False),
        ("below", ("middle", "middle"), True),
        ("below", ("left", "middle"), False),
        ("beside", ("right", "left"), True),
        ("beside", ("left", "left"), False),
    ],
)
def test_relations(relation: str, columns: tuple[str, str], right: bool) -> None:
    said = Thing("house", "", "", ""), Thing("moon", "", "", "")
    seen = tuple(thing._replace(column=column) for thing, column in zip((HOUSE, MOON), columns, strict=True))
    assert verdict(told(*said, relation=relation), SCENE._replace(things=seen))["relation"] == [right]


def test_the_number_of_equal_things_counts() -> None:
    """Exactly as many as said; without a number, two or three; neither fewer nor more."""
    tree = Thing("tree", "green", "small", "left")
    of = [SCENE._replace(things=tuple(tree._replace(column=c) for c in COLUMNS[:n])) for n in range(4)]
    two, three = (Told("", Scene("", "", "", (Thing("tree", "", "", ""),) * n), "", (n,)) for n in (2, 3))
    assert wrong(two, of[2]) == wrong(three, of[3]) == set()
    assert wrong(two, of[1]) == {"object", "number", "all"}
    assert wrong(two, of[3]) == {"number", "all", "no more"}
    assert wrong(three, of[2]) == {"object", "number", "all"}
    some = two._replace(numbers=(2, 3))
    assert wrong(some, of[2]) == wrong(some, of[3]) == set()
    assert wrong(some, of[1]) == {"object", "number", "all"}
    assert wrong(whole(of[2]), of[3]) == {"number", "all", "no more"}
    mixed = of[2]._replace(things=(*of[2].things, HOUSE._replace(column="right")))
    assert wrong(two, mixed) == {"no more"}


def test_tally_counts_mentions() -> None:
    rates = tally([whole(SCENE)] * 2, [SCENE, SCENE._replace(time="day", things=(HOUSE,))])
    assert set(rates) == set(ATTRIBUTES)
    assert rates["time"] == (1, 2) and rates["object"] == (3, 4) and rates["all"] == (1, 2)
    assert rates["relation"] == (0, 0) and [str(rates["time"]), str(rates["relation"])] == ["50.0 %", "-"]


def test_labels_are_scenes_in_other_words() -> None:
    rng = Random(1)
    for _ in range(300):
        scene = random_scene(rng, "all")
        answers = [max(0, answer) for answer in judge.labels(scene)]
        assert judge.scene_of(answers) == scene
        assert len(answers) == len(judge.QUESTIONS)


def test_blur_is_gaussian() -> None:
    """A point becomes a spot of the given variance and the same sum; standard deviation 0 changes nothing."""
    x = torch.zeros(2, 3, 31, 31)
    x[:, :, 15, 15] = 1
    out = judge.blurred(x, torch.tensor([0.0, 1.2]))
    torch.testing.assert_close(out[0], x[0], atol=1e-6, rtol=0)
    place = torch.arange(31) - 15.0
    for axis in (1, 2):
        profile = out[1].sum(axis)
        torch.testing.assert_close(profile @ torch.ones(31), torch.ones(3))
        torch.testing.assert_close(profile @ place**2, torch.full((3,), 1.44), atol=0.02, rtol=0)


def test_training_images_are_worn_but_mildly() -> None:
    x = judge.to_tensor([draw(SCENE, Random(0))] * 4)
    worn = judge.worn(x, torch.Generator().manual_seed(0))
    assert 0.01 < (worn - x).square().mean().sqrt() < 0.2
    assert all((worn[0] - other).abs().mean() > 0.01 for other in worn[1:])


@pytest.fixture
def new_judge(tmp_path, monkeypatch) -> tuple[judge.Judge, Path]:
    """A judge without training, and its file."""
    torch.manual_seed(0)
    file = tmp_path / "new" / "judge.safetensors"
    monkeypatch.setattr(judge, "train", lambda device, extra="": judge.Judge(extra).eval())
    return judge.find(file, CPU), file


@pytest.mark.exhaustive
def test_judge_learns(monkeypatch) -> None:
    """After few steps, without degradations, style, time and ground are well above chance; things take longer."""
    batches = []
    monkeypatch.setattr(judge, "worn", lambda x, rng: batches.append(x.shape) or x)
    trained = judge.train(CPU, 600, 100, 24)
    assert batches == [(24, 3, 128, 128)] * 100
    pixels, scenes = judge.renderings(100, "test")
    rates = tally([whole(scene) for scene in scenes], trained.look(judge.to_floats(pixels)))
    for name, chance in (("style", 1 / 3), ("time", 1 / 4), ("ground", 1 / 5)):
        assert rates[name].right / rates[name].of > 1.5 * chance, name


def test_judge_sees_images_of_every_size_alike(new_judge) -> None:
    image = draw(SCENE._replace(style="pixel"), Random(0))
    larger = image.resize((256, 256), Image.Resampling.NEAREST)
    one, two = new_judge[0].look([image, larger])
    assert one[:3] == two[:3]


def test_judge_is_kept_unless_the_world_changes(new_judge, monkeypatch, capsys) -> None:
    trained, file = new_judge
    calls = []
    monkeypatch.setattr(judge, "train", lambda device, extra="": calls.append(device) or trained)
    again = judge.find(file, CPU)
    assert not calls and not again.training
    for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    drawn = judge.draw
    monkeypatch.setattr(judge, "draw", lambda *args: drawn(*args).rotate(90))
    judge.find(file, CPU)
    assert len(calls) == 1 and "trained on another world" in capsys.readouterr().out
    judge.find(file, CPU)  # the new one is of the new world
    assert len(calls) == 1


def test_other_files_are_no_judges(tmp_path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a judge"):
        judge.find(file, CPU)
    assert file.read_bytes() == b"nothing"


def test_prompts_are_of_their_split() -> None:
    unseen = evaluate.prompts("unseen", 60)
    assert unseen == evaluate.prompts("unseen", 60) and len({each.text for each in unseen}) > 50
    assert all(evaluate.says_unseen(each.said) for each in unseen)
    assert not any(evaluate.says_unseen(each.said) for each in evaluate.prompts("seen", 200))
    assert evaluate.says_unseen(SCENE) == held_out(SCENE)


class Oracle:
    """A judge of scenes instead of images, for generators that hand them on."""

    def look(self, images: list[Scene]) -> list[Scene]:
        return images


def test_negative_prompts_are_counted() -> None:
    """A generator that obeys, one that ignores, and one that forgets everything."""

    def generator(obey: bool, forget: bool = False):
        def generate(texts, guidance, label, negatives=()):
            scenes = []
            for i, text in enumerate(texts):
                unwanted = negatives[i] if negatives else ""
                kinds = [k for k in KINDS if any(noun in text for noun in NOUNS[k])] if text else [KINDS[i % 5]]
                kinds = [] if unwanted and forget else [k for k in kinds if not (obey and f"a {k}" == unwanted)]
                style = "pixel" if obey and "flat" in unwanted else "flat"
                scenes.append(Scene(style, "day", "sea", tuple(Thing(k, "red", "big", "left") for k in kinds)))
            return scenes

        return generate

    some = [each for each in evaluate.prompts("seen", 60) if not each.numbers][:40]
    names = ("thing", "another thing", "style", "things stay")
    for generate, expected in (
        (generator(True), [1, 0, 1, 1]),
        (generator(False), [0, 0, 0, 1]),
        (generator(False, forget=True), [1, 1, 0, 0]),
    ):
        text, figures = probes.negative(generate, Oracle(), 7.5, some)
        assert [figures[name].right / figures[name].of for name in names] == expected
        assert figures["thing"].of == 40 and 5 < figures["style"].of < 40
        assert all(str(figures[name]) in text for name in names)


def test_distance_between_seeds() -> None:
    """Images of one prompt that differ by a tenth of the range, prompts by more; then images that do not differ."""

    def generate(texts, guidance, label, step=26):
        names = sorted(set(texts), key=texts.index)
        return [
            Image.new("RGB", (128, 128), (60 * (names.index(text) % 3) + step * (i % 2),) * 3)
            for i, text in enumerate(texts)
        ]

    some = evaluate.prompts("seen", 12)
    _, figures = probes.seeds(generate, Oracle(), 7.5, some)
    assert figures["mean"] == pytest.approx(4 / 6 * 26 / 255, abs=1e-4) and figures["least"] == 0
    assert figures["different prompts"] == pytest.approx(80 / 255, abs=1e-4)
    _, figures = probes.seeds(lambda *args: generate(*args, step=0), Oracle(), 7.5, some)
    assert figures["mean"] == 0


def test_nonsense_is_put_into_the_prompt() -> None:
    given = []

    def generate(texts, guidance, label, negatives=()):
        given.append(texts)
        return [SCENE for _ in texts]

    some = evaluate.prompts("seen", 30)
    _, figures = probes.nonsense(generate, Oracle(), 7.5, some)
    assert figures["with"] == figures["without"] == tally(some, [SCENE] * 30)["all"]
    plain, odd = given
    assert plain == [each.text for each in some]
    assert all(a in b and len(b) > len(a) for a, b in zip(plain, odd, strict=True))
    assert {b.startswith(a) for a, b in zip(plain, odd, strict=True)} == {True, False}


class Changer:
    """Stands for a generator: notes what it is to change, and gives the images back as they are or as `scenes`."""

    def __init__(self, scenes=None) -> None:
        self.scenes, self.given = scenes, None

    def each(self, label, guidance, texts, images, masks=()):
        self.given = texts, images, masks
        return self.scenes or images


@pytest.mark.parametrize("name", ["swap", "restyle"])
def test_changed_images_are_judged_by_the_new_caption(name, monkeypatch) -> None:
    """Whoever changes nothing is wrong in what was to be changed and right in the rest; whoever obeys is all right."""
    some, old, new = evaluate.prompts("seen", 24), [], {}

    def telling(scene: Scene, rng: Random) -> Told:
        told = tell(scene, rng)
        new[told.text] = scene
        return told

    monkeypatch.setattr(probes, "draw", lambda scene, rng: (old.append(scene), draw(scene, rng))[1])
    monkeypatch.setattr(probes, "tell", telling)
    probe, idle = probes.PROBES[name], Changer()
    monkeypatch.setattr(idle, "scenes", old)
    _, lazy = probe(idle, Oracle(), 7.5, some)
    texts, images, masks = idle.given
    assert len(texts) == len(images) == 24 and len(masks) == (24 if name == "swap" else 0)
    if name == "swap":
        assert lazy["object"] == (0, 24) and lazy["ground"].right == lazy["ground"].of > 0
        assert all(0.02 < np.asarray(mask).mean() / 255 < 0.5 for mask in masks)
    else:
        assert lazy["style"] == (0, 24) and lazy["object"].right == lazy["object"].of >= 24
    text, perfect = probe(Changer([new[text] for text in texts]), Oracle(), 7.5, some)
    assert perfect["all"] == (24, 24) and str(perfect["all"]) in text


def test_a_whole_run(new_judge, tmp_path, capsys, tiny_sd, monkeypatch) -> None:
    monkeypatch.setattr(evaluate.generate, "load", lambda args: tiny_sd)
    monkeypatch.setattr(tiny_sd, "config", replace(tiny_sd.config, size=64))
    monkeypatch.setattr(evaluate, "THROUGH_VAE", 2)
    files = [tmp_path / name for name in ("card/card.md", "scores.json", "wrong")]
    options = ["--prompts", "2", "--guidance", "1", "3", "--steps", "1", "--probes", "2", "--renderings", "6"]
    for name, file in zip(("--judge", "--markdown", "--json", "--wrong"), (new_judge[1], *files), strict=True):
        options += [name, str(file)]
    status = evaluate.main(options)
    out = capsys.readouterr().out
    assert status == 0 and out.strip() == files[0].read_text().strip()
    assert "This judge errs" in out and "PSNR" in out
    figures = json.loads(files[1].read_text())
    assert list(figures["scores"]) == ["seen, 1", "seen, 3", "unseen, 1", "unseen, 3"]
    assert set(figures["judge"]) == {*evaluate.WEAR, "through the VAE"} and figures["judge"]["JPEG"]["time"][1] == 6
    for rates in figures["scores"].values():
        assert set(rates) == set(ATTRIBUTES) and rates["all"][1] == 2
    row = next(line for line in out.splitlines() if line.startswith("| all") and "unseen" not in line)
    assert row.count("%") == 6
    wrong_lines = (files[2] / "wrong.txt").read_text().splitlines()
    assert {line.partition(":")[0] for line in wrong_lines} == {path.name for path in files[2].glob("*.png")} != set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "-1"], "--prompts must be at least 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--guidance", "nan"], "finite"),
        (["--sampler", "magic"], "magic"),
        (["--json", __file__], "such a file already"),
    ],
)
def test_wrong_arguments_are_one_line(options, message, capsys) -> None:
    assert evaluate.main(options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_wrong_lora_fails_before_the_model_is_loaded(monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate.generate, "load", lambda args: pytest.fail("loaded first"))
    for value, message in (("missing.safetensors:0.5", "missing.safetensors"), ("lcm=:1", "no file before the colon")):
        assert evaluate.main(["--lora", value]) == 1
        assert message in capsys.readouterr().err


def test_table_is_markdown() -> None:
    rates = {name: Rate(1, 3) for name in ATTRIBUTES}
    no_sizes = rates | {"size": Rate(0, 0)}
    assert "| size " not in evaluate.table({"a column": no_sizes}, "first")
    lines = evaluate.table({"a column": rates, "b": no_sizes}, "first").splitlines()
    assert (
        len({len(line) for line in lines}) == 1 and lines[0].startswith("| first") and len(lines) == len(ATTRIBUTES) + 3
    )
    assert lines[1].split("|")[2].strip() == "-------:" and lines[2].split("|")[2].strip() == "33.3 %"
    assert {line.count("|") for line in lines} == {4}
