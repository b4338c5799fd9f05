"""Control networks as a user of the programs meets them: images, files, metadata, and one line for what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY, TINY_V2, TINY_XL, tiny_state
from control_common import control_network, lines, silent
from PIL import Image
from safetensors.torch import save_file
from sdxl_common import model_files
from test_folders import write_folder

from scripts import img2img, inpaint, txt2img
from scripts.common import control_args, enough_memory
from scripts.common.control_args import Given, split_control, thresholds
from scripts.common.like_controls import is_network
from sd import Control, StableDiffusion, read_request
from sd.checkpoints.control_export import control_files, control_texts
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_own
from sd.checkpoints.hashes import file_hash
from sd.control_config import ControlConfig
from sd.imaging.annotate import canny
from sd.models.controlnet import ControlNet
from sd.params import TextToImage, from_dict
from sd.recipes import Addon, ControlUse
from sd.resources import EMBEDDED_CONTROLS
from sd.runtime import memory

needs_skimage = pytest.mark.skipif(
    not importlib.util.find_spec("skimage"), reason="needs scikit-image (tests/requirements.txt)"
)
SIZE = ("--height", "64", "--width", "64")
BASE = ("--steps", "4", "--seed", "3", "--dtype", "float32", "--device", "cpu")


def save_control(network, path: Path) -> None:
    tensors, metadata = control_files("sd", network.state_dict(), network.control_config)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory) -> Path:
    """A folder with the tiny model, control networks, hints and other images."""
    folder = tmp_path_factory.mktemp("files")
    own = to_own({name: network.state_dict() for name, network in tiny.items()})
    save_file({k: x.contiguous() for k, x in own.items()}, folder / "tiny.safetensors", {CONFIG_KEY: TINY.to_json()})
    save_control(control_network(), folder / "canny.safetensors")
    (folder / "other").mkdir()
    save_control(silent(control_network()), folder / "other" / "canny.safetensors")
    save_control(control_network("tiny-control-v2", TINY_V2), folder / "v2.safetensors")
    lines().save(folder / "hint.png")
    lines().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "mirror.png")
    lines(invert=True).save(folder / "inverted.png")
    lines(96, 40).convert("L").point(lambda value: value * 257, "I").convert("I;16").save(folder / "deep.png")
    clear = lines().convert("RGBA")
    clear.putalpha(lines().convert("L"))
    clear.save(folder / "clear.png")
    picture = np.full((64, 96, 3), 40, np.uint8)
    picture[16:48, 24:72] = (220, 180, 90)
    Image.fromarray(picture).save(folder / "picture.png")
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(folder / "init.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(folder / "mask.png")
    (folder / "text.png").write_text("no image")
    return folder


@pytest.fixture
def run(files, tmp_path, capsys, monkeypatch):
    """Runs a program beside those files; gives status, stdout, stderr, and the paths of the images made."""
    monkeypatch.chdir(files)

    def call(*args: object, program=txt2img, size=SIZE, model=("--ckpt", "tiny.safetensors")):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        status = program.main([*map(str, args), *size, *model, *BASE, "--out", str(out)])
        printed = capsys.readouterr()
        made = sorted(out.glob("*.png")) if out.is_dir() else []
        return status, printed.out, printed.err, [path for path in made if "-control" not in path.name]

    return call


def same(a: Path, b: Path) -> bool:
    return Image.open(a).tobytes() == Image.open(b).tobytes()


@pytest.fixture(scope="module")
def half_model(files, tiny) -> Path:
    """The tiny model as a diffusers folder with files of the variant fp16 alone."""
    folder = write_folder(files / "model", tiny_state(), TINY)
    for path in [*folder.rglob("*.safetensors")]:
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    return folder


# ------------------------------------------------------------------------------------------------- the value


def test_the_parts_of_a_value(files, monkeypatch):
    monkeypatch.chdir(files)

    def both(text: str) -> tuple[str, str, float | None, float | None, float | None]:
        given = split_control(text)
        return (str(given.file), str(given.image), *given[2:])

    assert both("canny.safetensors=hint.png") == ("canny.safetensors", "hint.png", None, None, None)
    assert both("canny.safetensors=hint.png:.5") == ("canny.safetensors", "hint.png", 0.5, None, None)
    assert both("canny.safetensors=hint.png:-1.5:0.1-0.75") == ("canny.safetensors", "hint.png", -1.5, 0.1, 0.75)
    assert both("canny.safetensors=hint.png::0-0.5") == ("canny.safetensors", "hint.png", None, 0.0, 0.5)
    # files that are not there are named whole, without what stands for a number
    assert both("a.pth=b.png:0.5:0-1")[:2] == ("a.pth", "b.png")
    assert both("a.pth=C:\\maps\\b.png")[1] == "C:\\maps\\b.png"
    assert both("C:\\nets\\a.pth=C:\\b.png:0.5")[:3] == ("C:\\nets\\a.pth", "C:\\b.png", 0.5)
    edges = split_control("edges=hint.png")
    assert edges.file.name == Path(EMBEDDED_CONTROLS["edges"]).name and edges.file.is_absolute()
    assert both("./edges=hint.png")[0] == "edges"  # a file of this name
    home = split_control("~/a=b.pth=~/c.png:1")
    assert home == Given(Path.home() / "a", Path("b.pth=~/c.png"), 1.0, None, None)


def test_names_that_exist_take_precedence(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.pth", "c=d.png", "e.png:0.5", "e.png", "f:g", "h.png"):
        Path(name).touch()
    given = split_control("a=b.pth=c=d.png:2")
    assert (str(given.file), str(given.image), given.scale) == ("a=b.pth", "c=d.png", 2.0)
    assert split_control("x.pth=c=d.png").image == Path("c=d.png")
    assert split_control("x.pth=e.png:0.5") == Given(Path("x.pth"), Path("e.png:0.5"))
    assert split_control("x.pth=e.png:0.5:2") == Given(Path("x.pth"), Path("e.png:0.5"), 2.0)
    assert split_control("f:g=h.png:0.5:0.2-1") == Given(Path("f:g"), Path("h.png"), 0.5, 0.2, 1.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert split_control("~/a=b.pth=~/h.png") == Given(tmp_path / "a=b.pth", tmp_path / "h.png")


def test_thresholds():
    assert thresholds("100-200") == (100, 200) and thresholds("0.5-255") == (0.5, 255)


# ------------------------------------------------------------------------------------------------- images


def test_a_hint_changes_the_image(run):
    status, out, err, (plain,) = run("a cat")
    assert (status, err) == (0, "") and "control" not in out
    status, out, err, (made,) = run("a cat", "--control", "canny.safetensors=hint.png")
    assert (status, err) == (0, "") and "control canny: 3.0 M weights" in out.splitlines()
    assert not same(plain, made)
    _, _, _, (zero,) = run("a cat", "--control", "canny.safetensors=hint.png:0")
    assert same(plain, zero)
    _, _, _, (half,) = run("a cat", "--control", "canny.safetensors=hint.png:0.5")
    _, _, _, (first,) = run("a cat", "--control", "canny.safetensors=hint.png:1:0-0.5")
    _, _, _, (prompt,) = run("a cat", "--control", "canny.safetensors=hint.png", "--control-mode", "prompt")
    images = [Image.open(path).tobytes() for path in (plain, made, half, first, prompt)]
    assert len(set(images)) == 5
    model = StableDiffusion.load("tiny.safetensors", device="cpu", dtype="float32")
    model.add_control("canny.safetensors", "x")
    control = Control("x", lines(), end=0.5)
    (wanted,) = model.txt2img("a cat", controls=[control], steps=4, seed=3, height=64, width=64)
    assert wanted.tobytes() == images[3]


@pytest.mark.exhaustive
def test_hints_of_any_kind(run):
    for hint in ("deep.png", "clear.png"):
        status, _, err, made = run("a cat", "--control", f"canny.safetensors={hint}")
        assert status == 0 and len(made) == 1
        assert ("58 % of the hint is cut off" in err) == (hint == "deep.png")
    status, _, err, _ = run("a cat", "--control", "canny.safetensors=deep.png", "--control-fit", "pad")
    assert (status, err) == (0, "")
    _, _, err, _ = run("a cat", "--control", "canny.safetensors=inverted.png")
    assert err.count("looks like black lines on white") == 1 and "invert it" in err


@pytest.mark.exhaustive
def test_two_uses_of_a_file_share_its_network(run, monkeypatch):
    added = []
    real = StableDiffusion.add_control
    monkeypatch.setattr(StableDiffusion, "add_control", lambda *args: added.append(args[2]) or real(*args))
    both = ("--control", "canny.safetensors=hint.png:0.6", "--control", "./canny.safetensors=mirror.png:0.6")
    status, _, err, (made,) = run("a cat", *both)
    assert (status, err, added) == (0, "", ["canny"])
    _, _, _, (one,) = run("a cat", *both[:2])
    assert not same(made, one)
    status, out, _, (other,) = run("a cat", *both[:2], "--control", "other/canny.safetensors=mirror.png")
    assert status == 0 and added[-2:] == ["canny", "canny-2"] and "control canny-2: " in out
    assert same(one, other)  # the second network changes nothing


@pytest.mark.exhaustive
def test_every_program_and_option(run, files):
    """Batches, prompts from a file, steps, high resolution, rounds, low memory: the hint has its effect in each."""
    control = ("--control", "canny.safetensors=hint.png:2")
    (files / "prompts.txt").write_text("a cat\na dog\n")
    cases = [
        (("--from-file", "prompts.txt"), txt2img, 2),
        (("a cat", "--n", "3", "--batch-size", "2", "--grid"), txt2img, 4),
        (("a cat", "--hires", "1.5", "--save-steps"), txt2img, 1),
        (("a cat", "--low-memory"), txt2img, 1),
        (("a cat", "init.png", "--loopback", "2"), img2img, 2),
        (("a cat", "init.png", "mask.png"), inpaint, 1),
        (("a cat", "init.png", "mask.png", "--only-masked", "--margin", "4"), inpaint, 1),
    ]
    for args, program, count in cases:
        status, _, err, made = run(*args, *control, program=program)
        assert status == 0 and err == "", (args, err)
        _, _, _, plain = run(*args, program=program)
        assert len(made) == len(plain) == count
        assert not any(map(same, made, plain)), args


@pytest.mark.exhaustive
def test_a_refiner_takes_its_steps_without_control(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    xl = model_files(folder)
    torch.manual_seed(0)
    network = ControlNet(ControlConfig.of(TINY_XL.unet))
    save_control(network, folder / "net.safetensors")
    control = ("--control", f"{folder / 'net.safetensors'}=hint.png")
    made = []
    for given in ((), control):
        for share in ("0", "0.5"):
            status, _, err, images = run(
                "a cat", "--refiner", xl["refiner"], "--refiner-from", share, *given, model=("--ckpt", str(xl["base"]))
            )
            assert status == 0 and "control" not in err
            made += images
    plain, _, _, controlled = made
    assert same(plain, made[2])  # all steps are the refiner's
    assert not same(made[1], controlled)


def test_the_images_of_a_folder(run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, width in (("a", 64), ("b", 96)):
        Image.radial_gradient("L").resize((width, 64)).convert("RGB").save(photos / f"{name}.png")
    control = ("--control", "canny.safetensors=hint.png")
    status, _, _, made = run("a cat", photos, *control, program=img2img, size=())
    assert status == 0 and [path.name for path in made] == ["a.png", "b.png"]
    assert [Image.open(path).size for path in made] == [(128, 128), (152, 104)]  # about the native size


# ------------------------------------------------------------------------------------------------- bad input

WRONG = [
    (["canny.safetensors"], "--control canny.safetensors: expected FILE=IMAGE, FILE=IMAGE:SCALE or"),
    (["=hint.png"], 'no control network before the "="'),
    (["canny.safetensors="], 'no image after the "="'),
    (["canny.safetensors=hint.png:strong"], "the scale 'strong' is not a number"),
    (["canny.safetensors=hint.png:nan"], "the scale must be a finite number, got nan"),
    (["canny.safetensors=none.png:inf"], "the scale must be a finite number, got inf"),
    (["canny.safetensors=hint.png:1:0.8-0.5"], "FROM must be smaller than TO, got 0.8-0.5"),
    (["canny.safetensors=hint.png:1:0-2"], "FROM and TO are fractions of the steps, from 0 to 1, got 0-2"),
    (["canny.safetensors=hint.png:1:half"], "'half' is not FROM-TO, fractions of the steps such as 0-0.5"),
    (["canny.safetensors=none.png"], "none.png: no such file; check the path"),
    (["canny.safetensors=text.png"], "text.png: a text, not an image"),
    (["canny.safetensors=other"], "other: a folder; give the image file inside it"),
    (["none.safetensors=hint.png"], "none.safetensors: "),
    (["tiny.safetensors=hint.png"], "tiny.safetensors: "),
    (["hint.png=hint.png"], "hint.png: "),
    (["v2.safetensors=hint.png"], "v2.safetensors: a control network for "),
    (["canny.safetensors=https://example.org/a.png"], "URLs are not fetched"),
    (["canny.safetensors=hint.png"] * 21, "--control: given 21 times, at most 20 are allowed"),
    (["edges=hint.png"], "--control edges is for the embedded model, not for tiny v1: give a control network"),
]


@pytest.mark.parametrize(("controls", "line"), WRONG, ids=lambda value: str(value)[:50])
def test_one_line_for_what_is_wrong(run, monkeypatch, controls, line):
    monkeypatch.setattr(StableDiffusion, "load", no_loading)
    status, _, err, made = run("a cat", *(word for value in controls for word in ("--control", value)))
    assert status == 1 and not made
    (only,) = err.splitlines()
    assert only.startswith("error: ") and line in only


def no_loading(*args: object, **options: object) -> None:
    raise AssertionError("a model is loaded")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--control-mode", "prompt"], "--control-mode has no effect without --control"),
        (["--control-fit", "pad"], "--control-fit has no effect without --control"),
        (["--annotate", "canny"], "--annotate has no effect without --control"),
        (["--canny", "1-2"], "--canny has no effect without --control"),
        (
            ["--control", "canny.safetensors=hint.png", "--canny", "1-2"],
            "--canny has no effect without --annotate canny",
        ),
    ],
)
def test_options_without_effect(run, monkeypatch, options, line):
    monkeypatch.setattr(StableDiffusion, "load", no_loading)
    status, _, err, _ = run("a cat", *options)
    assert (status, err) == (1, f"error: {line}\n")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("100", "'100' is not LOW-HIGH, such as 100-200"),
        ("200-100", "thresholds are from 0 to 255, the lower one first"),
        ("0-256", "thresholds are from 0 to 255"),
    ],
)
def test_wrong_thresholds(run, capsys, value, line):
    with pytest.raises(SystemExit) as stop:
        run("a cat", "--canny", value)
    assert stop.value.code == 2 and line in capsys.readouterr().err


def test_a_line_of_a_file_cannot_set_controls(run, files):
    (files / "lines.jsonl").write_text('{"prompt": "a cat", "controls": 1}\n')
    status, _, err, _ = run("--from-file", "lines.jsonl")
    assert status == 1 and err.endswith(
        "lines.jsonl:1: 'controls' cannot be set in a line: give --control, for all lines\n"
    )


def test_without_scikit_image_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "load", no_loading)
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    status, _, err, _ = run("a cat", "--control", "canny.safetensors=picture.png", "--annotate", "canny")
    assert (status, err) == (1, "error: finding edges needs scikit-image: pip install scikit-image\n")


def test_more_controls_than_memory(run, monkeypatch):
    monkeypatch.setattr(enough_memory, "onednn_dtypes", lambda: frozenset([torch.float32]))  # weights are packed
    free = int(1.02 * memory.needed(TINY, torch.float32, memory.Job(64, 64)))
    monkeypatch.setattr(enough_memory, "available", lambda device: free)
    status, _, err, _ = run("a cat")
    assert (status, err) == (0, "")
    monkeypatch.setattr(StableDiffusion, "load", no_loading)
    control = ("--control", "canny.safetensors=hint.png")
    status, _, err, _ = run("a cat", *control)
    assert status == 1 and err.startswith("error: tiny v1 needs about ") and ", fewer --control, " in err
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------- edges of pictures


@needs_skimage
def test_edges_of_a_picture():
    """A rectangle has four edges, whatever its colours; the thresholds are those of gradients from 0 to 255."""
    picture = Image.new("RGB", (64, 48), (40, 40, 40))
    picture.paste((40, 40, 90), (16, 12, 48, 36))  # the gradient is 4 x 50 along its sides
    at = 200 * 4 / np.pi  # the mean over all directions of |Gx| + |Gy| for a gradient of this length
    edges = np.asarray(canny(picture, 0.99 * at, 0.99 * at))
    assert edges.shape == (48, 64, 3) and set(np.unique(edges)) == {0, 255}
    ys, xs = np.nonzero(edges[..., 0])
    on_a_side = (abs(xs - 15.5) < 1) | (abs(xs - 47.5) < 1) | (abs(ys - 11.5) < 1) | (abs(ys - 35.5) < 1)
    assert on_a_side.all() and len(xs) > 90
    assert (
        np.asarray(canny(picture, 1.01 * at, 1.01 * at))[..., 0] > 0
    ).sum() <= 8  # at the corners, where it is longer


@pytest.mark.exhaustive
@needs_skimage
def test_a_picture_is_annotated_at_the_size_of_the_image(run, files):
    control = ("--control", "canny.safetensors=picture.png:2")
    status, out, err, (made,) = run("a cat", *control, "--annotate", "canny", size=("--height", "64", "--width", "80"))
    saved = made.with_name("00001-control.png")
    assert status == 0 and f"{saved}  canny of picture.png" in out.splitlines()
    found = Image.open(saved)
    cut = Image.open("picture.png").crop((8, 0, 88, 64))
    assert found.size == (80, 64) and found.tobytes() == canny(cut, 100, 200).tobytes()
    found.save(files / "map.png")
    _, _, err, (again,) = run(
        "a cat", "--control", "canny.safetensors=map.png:2", size=("--height", "64", "--width", "80")
    )
    assert err == "" and same(made, again)  # the finished map is the same hint
    lines_of = {}
    for given in ("50-100", "5-10"):
        soft = ("--control", "canny.safetensors=init.png", "--annotate", "canny", "--canny", given)
        _, out, _, made = run("a cat", *soft, "--n", "2")
        assert out.count("-control.png") == 1 and len(made) == 2  # the map of both is saved once
        lines_of[given] = np.asarray(Image.open(made[0].with_name("00001-control.png"))).sum()
    assert lines_of["50-100"] < lines_of["5-10"]


@needs_skimage
def test_maps_of_several_pictures_and_passes(run):
    two = ("--control", "canny.safetensors=picture.png", "--control", "canny.safetensors=init.png:0.5")
    _, out, _, (made,) = run("a cat", *two, "--annotate", "canny", "--hires", "1.5")
    names = [made.with_name(f"{made.stem}-control-{number}.png") for number in (1, 2)]
    assert all(str(name) in out for name in names)
    assert Image.open(names[0]).size == Image.open(made).size == (96, 96)
    options = ("--annotate", "canny", "--only-masked", "--margin", "4", "--canny", "10-20")
    _, _, _, (made,) = run("a cat", "init.png", "mask.png", *two[:2], *options, program=inpaint, size=())
    assert Image.open(made.with_name(f"{made.stem}-control.png")).size != Image.open(made).size  # of the region
    # what is padded has no edge at its border
    _, _, _, (made,) = run("a cat", *two[:2], "--annotate", "canny", "--control-fit", "pad")
    framed = np.asarray(Image.open(made.with_name(f"{made.stem}-control.png")))
    assert framed.any() and not framed[:14].any() and not framed[50:].any()


# ------------------------------------------------------------------------------------------------- metadata


def test_metadata_there_and_back(run, files):
    status, _, err, (made,) = run(
        "a cat", "--control", "canny.safetensors=hint.png:0.30000000000000004:0.1-0.9", "--control-mode", "prompt",
        "--control-fit", "pad", "--control", "other/canny.safetensors=mirror.png",
    )  # fmt: skip
    assert (status, err) == (0, "")
    text = Image.open(made).text["parameters"]
    digits = sha256((files / "canny.safetensors").read_bytes()[1 << 20 :][: 1 << 16]).hexdigest()[:8]
    assert (
        f', ControlNet 0: "Module: none, Model: canny [{digits}], Weight: 0.30000000000000004, Resize Mode: Resize and '
        "Fill, Low Vram: False, Guidance Start: 0.1, Guidance End: 0.9, Pixel Perfect: False, Control Mode: My prompt "
        'is more important, Hr Option: Both", ControlNet 1: "Module: none, Model: canny ['
    ) in text
    recipe = read_request(made)
    hints = [sha256((files / name).read_bytes()).hexdigest()[:10] for name in ("hint.png", "mirror.png")]
    first, second = recipe.controls
    assert first[:8] == ("canny", digits, 0.30000000000000004, 0.1, 0.9, "prompt", "pad", "none")
    assert first.hint == Addon("hint.png", digest=hints[0]) and second.hint == Addon("mirror.png", digest=hints[1])
    assert (second.scale, second.start, second.end) == (1.0, 0.0, 1.0) and recipe.notes == ()


@pytest.mark.exhaustive
def test_like_says_what_to_give_and_repeats_the_rest(run):
    _, _, _, (made,) = run("a cat", "--control", "canny.safetensors=hint.png:0.7:0-0.5", "--control-mode", "control")
    status, out, err, (without,) = run("--like", made, size=())
    digits = read_request(made).controls[0].digest
    (line,) = [line for line in err.splitlines() if "control" in line]
    assert line.startswith(f"warning: control network canny [{digits}] with the hint hint.png (")
    assert line.endswith("): give both with --control") and not same(made, without)
    status, out, err, (again,) = run("--like", made, "--control", "canny.safetensors=hint.png", size=())
    assert (status, err) == (0, "") and same(made, again)
    assert "control canny 0.7 steps 0-0.5 mode control" in out.splitlines()[0]
    assert Image.open(made).text == Image.open(again).text
    _, _, err, (other,) = run("--like", made, "--control", "canny.safetensors=mirror.png::0-1", size=())
    assert "the hint of control canny is not the same file as that of 00001.png" in err
    assert read_request(other).controls[0][2:6] == (0.7, 0.0, 1.0, "control")
    _, _, err, (other,) = run(
        "--like", made, "--control", "canny.safetensors=hint.png:1", "--control-mode", "balanced", size=()
    )
    assert err == "" and read_request(other).controls[0][2:6] == (1.0, 0.0, 0.5, "balanced")


@needs_skimage
def test_like_annotates_as_the_recipe_was(run):
    control = ("--control", "canny.safetensors=picture.png")
    _, _, _, (made,) = run("a cat", *control, "--annotate", "canny", "--canny", "20-30.5")
    assert ", Processor Res: 512, Threshold A: 20, Threshold B: 30.5, Guidance" in Image.open(made).text["parameters"]
    status, out, err, (again,) = run("--like", made, *control, size=())
    assert status == 0 and same(made, again) and "00001-control.png  canny of picture.png" in out
    assert err == "warning: control canny: 33 % of the hint is cut off\n"
    _, _, _, (other,) = run("--like", made, *control, "--annotate", "none", size=())
    assert not same(made, other) and read_request(other).controls[0].module == "none"


def test_the_settings_of_a_picture_in_a_request():
    control = Control("canny", lines(), annotate="canny", low=20, high=30)
    request = TextToImage("a cat", controls=control)
    (read,) = from_dict(request.to_dict()).controls
    assert (read.annotate, read.low, read.high) == ("canny", 20.0, 30.0)
    for wrong in ({"annotate": "depth"}, {"low": -1}, {"high": 256}, {"low": 150, "high": 100}):
        with pytest.raises(ValueError, match=r"^control canny: "):
            Control("canny", lines(), **wrong)


def test_a_network_is_found_by_name_or_hash(files, tmp_path):
    copy = tmp_path / "my (best) net, 2.pth"
    copy.write_bytes((files / "canny.safetensors").read_bytes())
    digits = file_hash(copy)
    assert is_network(copy, ControlUse("My best net 2")) and is_network(copy, ControlUse("canny", digits))
    assert not is_network(copy, ControlUse("canny")) and not is_network(copy, ControlUse("canny", "01234567"))


def test_names_of_networks():
    given = split_control("edges=a.png")
    assert control_args.network_name(given.file) == "edges"
    names = {
        "nets/control_v11p_sd15_canny.pth": "control_v11p_sd15_canny",
        "nets/depth/diffusion_pytorch_model.fp16.safetensors": "depth",
        "nets/v2.0": "v2.0",
        "hub/models--someone--control-canny/snapshots/0123abcd": "control-canny",
        "hub/models--someone--control-canny/snapshots/0123abcd/diffusion_pytorch_model.safetensors": "control-canny",
        "hub/models--someone--control/snapshots/0123abcd/canny.safetensors": "canny",
    }
    assert {path: control_args.network_name(Path(path)) for path in names} == names


@pytest.mark.parametrize("whole", [False, True])
def test_the_variant_of_the_model_need_not_be_that_of_a_control_folder(run, files, half_model, whole):
    """The files of the variant are read where there are any, else those without one; both in the folder of a model."""
    folders = []
    for name in ("plain", "both"):
        folders.append(files / f"{name} {whole}")
        place = folders[-1] / "controlnet" if whole else folders[-1]
        place.mkdir(parents=True)
        tensors, _ = control_files("diffusers", control_network().state_dict(), control_network().control_config)
        other, _ = control_files("diffusers", silent(control_network()).state_dict(), control_network().control_config)
        save_file({k: x.contiguous() for k, x in tensors.items()}, place / "diffusion_pytorch_model.safetensors")
        if name == "both":
            save_file({k: x.contiguous() for k, x in other.items()}, place / "diffusion_pytorch_model.fp16.safetensors")
        for file, text in control_texts(control_network().control_config).items():
            (place / file).write_text(text)
    made = {}
    for folder in (None, *folders):
        control = () if folder is None else ("--control", f"{folder}=hint.png")
        code, _, err, (made[folder],) = run("a", *control, "--variant", "fp16", model=("--ckpt", str(half_model)))
        assert code == 0, err
    plain, both = folders
    assert not same(made[None], made[plain]) and same(made[None], made[both])
    status, _, err, _ = run(
        "a", "--control", f"{plain}=hint.png", "--variant", "bf16", model=("--ckpt", str(half_model))
    )
    assert status == 1 and "no files of the variant 'bf16' in it; its variants: fp16" in err
