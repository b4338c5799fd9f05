"""Files of prompts: where lines end, settings for each line, and what is said about the rest."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scripts import ckpt, generate  # noqa: F401

from scripts.common import prompts
from scripts.common.prompts import Line, read_prompts
from sd.params import ImageToImage, SamplingParams, TextToImage


def written(tmp_path: Path, text: str, name: str = "p.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def test_lines_end_at_line_feeds_only(tmp_path):
    """Other separators that Unicode knows stay in the prompt."""
    inside = "a\u2028b\x0bc\x0cd\x85e\u2029f"
    found = read_prompts(None, written(tmp_path, f"\ufeff{inside}\r\n\n  g \n", "p.txt"))
    assert [line.prompt for line in found] == [inside, "g"]
    assert [line.where for line in found] == [f"{tmp_path / 'p.txt'}:1", f"{tmp_path / 'p.txt'}:3"]
    text = json.dumps({"prompt": inside}, ensure_ascii=False).replace(r"\u000b", "").replace(r"\f", "")
    assert "\u2028b" in read_prompts(None, written(tmp_path, text))[0].prompt


@pytest.mark.parametrize(
    "text, words",
    [
        ("a cat\na dog --steps 20 --seed 3\n--n 2", "p.txt:2: --steps is read as a part of the prompt, and 1 more"),
        ("a cat -s 50 -n 3", "p.txt:1: -s is read as a part of the prompt; settings for each line need a file that"),
        ('{"prompt": "a"}', "p.txt:1: JSON is read as text, unless the name ends in .jsonl"),
        ("well-known, semi - detached -- and {old}, 3 -4", None),
    ],
)
def test_options_within_text_are_said(tmp_path, text, words):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_prompts(None, written(tmp_path, text, "p.txt"))
    assert len(told) == (words is not None) and (words is None or words in str(told[0].message))


def test_settings_of_a_line():
    params = SamplingParams(sampler="DPM++ 2M Karras", steps=9, seed=4, n=2)
    make = partial(partial(ImageToImage, image=Image.new("RGB", (8, 8)), strength=0.5), negative="x")
    plain = Line("a").request(make, params)
    assert plain == ImageToImage("a", params, "x", image=plain.image, strength=0.5)
    given = {"negative": "y", "strength": 0.9, "steps": 20, "sampler": "ddim", "eta": 0.5, "guidance": 3, "width": 64}
    changed = Line("b", given).request(make, params)
    expected = SamplingParams(
        sampler="ddim", steps=20, seed=4, n=2, guidance=3.0, width=64, options={"eta": 0.5}, spacing=None
    )  # the grid that belonged to the other sampler is gone
    assert changed == ImageToImage("b", expected, "y", image=plain.image, strength=0.9)
    assert Line("b", {"sampler": "ddim"}).request(make, params, "trailing").params.spacing == "trailing"


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "a", "step": 3}', "txt2img has no setting 'step': did you mean 'steps'?"),
        ('{"prompt": "a", "frobnicate": 3}', "txt2img has no setting 'frobnicate': it has aesthetic_score, "),
        ('{"prompt": "a", "strength": 0.5}', "txt2img has no setting 'strength'"),
        ('{"prompt": "a", "options": {"eta": 1}}', "no setting 'options'"),
        ('{"prompt": "a", "params": {}}', "no setting 'params'"),
        ('{"prompt": "a", "steps": "20"}', "steps must be a whole number, got '20'"),
        ('{"prompt": "a", "guidance": NaN}', "guidance must be a finite number"),
        ('{"prompt": "a", "seed": -1}', "seed must be from 0"),
        ('{"prompt": "a", "steps": 3, "steps": 4}', "the key 'steps' occurs twice"),
        ('{"negative": "a"}', "expected an object with a prompt"),
        ('{"prompt": ["a", "b"]}', "expected an object with a prompt"),
        ('["a"]', "expected an object with a prompt"),
        ("a red house", "not JSON (Expecting value at character 1): a red house"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_lines_that_are_refused_before_the_model_is_loaded(generate, tmp_path, line, words):  # noqa: F811
    path = written(tmp_path, '{"prompt": "fine"}\n\n' + line)
    status, out, err, files = generate("--from-file", str(path), model=tmp_path / "no such model")
    assert (status, out, files, len(err)) == (1, [], [], 1)
    assert err[0].startswith(f"error: {path}:3: ") and words in err[0], err


def test_images_have_the_settings_of_their_lines(generate, tmp_path):  # noqa: F811
    """Image k of the run has seed S + k, but for lines with a seed of their own."""
    rows = [
        {"prompt": "a", "n": 2},
        {"prompt": "b", "seed": 40, "n": 2, "negative": "c", "steps": 3, "height": 72},
        {"prompt": "d", "steps": None},
    ]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)))
    status, out, err, files = generate("--from-file", str(path), "--seed", "5", "--dtype", "float32")
    assert (status, err, len(files)) == (0, [], 5)
    assert [line.split()[-1] for line in out[1:]] == ["5", "6", "40", "41", "9"]
    with Image.open(tmp_path / "out" / "00004.png") as image:
        text = "b\nNegative prompt: c\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 41, "
        assert image.text["parameters"].startswith(f"{text}Size: 64x72, ") and image.size == (64, 72)
    generate(
        "b", "--negative", "c", "--steps", "3", "--height", "72", "--width", "64", "--seed", "41", "--dtype", "float32"
    )
    one, other = (np.asarray(Image.open(tmp_path / "out" / name)) for name in ("00004.png", "00006.png"))
    assert np.array_equal(one, other)


def test_requests_know_every_setting():
    """A field that is added to a request or to SamplingParams can be set in a line."""
    for name, value in (("guidance_rescale", 0.5), ("rng", "nv"), ("clip_skip", 2), ("tileable", True)):
        made = Line("a", {name: value}).request(TextToImage, SamplingParams())
        assert value in (getattr(made, name, None), getattr(made.params, name, None))
    assert prompts.JSON_LINES == (".jsonl", ".ndjson")
