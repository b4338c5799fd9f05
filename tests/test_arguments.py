"""Arguments that are paths, names of output files, and prompt files: one line for what cannot be, before any work."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_scripts import ROOT, ckpt, generate, write  # noqa: F401

from scripts import convert, img2img, inpaint, txt2img
from scripts.common import arguments, cli
from scripts.common.output import Output
from scripts.training.folders import DataOptions, Folder
from sd.files import user_path
from sd.imaging.tensors import grid
from sd.pipeline import StableDiffusion

PATHS = {
    txt2img: ["--ckpt", "--vae", "--text-encoder", "--out", "--from-file", "--like", "--lora", "--embedding"],
    img2img: ["--init-img", "--out"],
    inpaint: ["--init-img", "--mask"],
}  # fmt: skip


@pytest.mark.parametrize("program, option", [(program, name) for program, names in PATHS.items() for name in names])
@pytest.mark.parametrize(
    "text, words",
    [
        ("", "the path is empty"),
        ("https://example.org/a.png", "URLs are not fetched"),
        ("~nobody-x/a", "there is no home folder ~nobody-x"),
    ],
)
def test_paths_that_are_none(program, option, text, words, tmp_path, monkeypatch, capsys):
    """An empty path, of a variable without a value, would be the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        program.main(["a", f"{option}={text}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument {option}") and words in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, words", [("", "the path is empty"), ("s3://bucket/a.png", "URLs are not fetched")])
def test_words_that_are_no_paths(text, words, capsys):
    for program, given in ((img2img, ["a", text]), (inpaint, ["a", "a.png", text])):
        assert program.main(given) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main([text, "--info"])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option, words", [("--lora", "no file before the colon"), ("--embedding", "no file before")])
def test_no_file_before_a_weight_or_word(option, words, generate):  # noqa: F811
    status, _, err, files = generate("a", option, ":1")
    assert status == 1 and files == [] and len(err) == 1 and words in err[0]


def test_long_prompts_are_not_taken_for_names():
    """Names have at most 255 bytes: asking whether there is such a file is an error."""
    prompt = "a house " * 40 + ".png"
    sample = str(ROOT / "data" / "sample.png")
    args = arguments.place_words(img2img.parser().parse_words([prompt, sample]), "init_img")
    assert (args.prompt, args.init_img) == (prompt, sample)


def test_the_current_folder_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~a").mkdir()
    assert [str(cli.file_path(text)) for text in (".", "./", "..", "~a/b", "a=b")] == [".", ".", "..", "~a/b", "a=b"]


@pytest.mark.skipif(os.name != "posix", reason="other systems pass texts, not bytes")
def test_prompts_where_the_locale_has_only_ascii():
    code = (
        "import sys; from scripts.common.cli import readable; print(ascii([readable(word) for word in sys.argv[1:]]))"
    )
    given = [sys.executable, "-c", code, "a caf\u00e9", "\U0001f600", "a", b"\xff"]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run(given, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=True)
    assert found.stdout == ascii(["a caf\u00e9", "\U0001f600", "a", "\udcff"]) + "\n"


def test_empty_paths_in_python():
    for action in (lambda: user_path(""), lambda: StableDiffusion.load("")):
        with pytest.raises(ValueError, match="the path is empty"):
            action()
    assert user_path(b"a/b") == Path("a/b")


@pytest.mark.parametrize("name", ["cat.bmp", "cat.tiff", "cat.JFIF", "-", "a/.png"])
def test_names_of_output_files_that_cannot_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--out .*\.png"):
        Output(Path(name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cat.png", "cat.jpg"])
def test_a_folder_may_be_called_like_a_file(name, tmp_path):
    (tmp_path / name).mkdir()
    output = Output(tmp_path / name)
    assert output.save(Image.new("RGB", (8, 8))) == tmp_path / name / "00001.png"


@pytest.mark.parametrize("below", [".", "sub", "sub/cat.png"])
def test_a_file_in_the_place_of_the_output_folder_is_said(below, tmp_path):
    write(tmp_path / "file", b"mine")
    with pytest.raises(ValueError, match="cannot be created: part of its path is a file"):
        Output(tmp_path / "file" / below)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_full_disk_is_said_with_the_folder(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as raised:
        Output(tmp_path / "out")
    assert raised.value.filename == str(tmp_path / "out")


@pytest.mark.skipif(os.name != "posix", reason="other systems keep a folder that is in use")
def test_a_current_folder_that_was_removed_is_said(tmp_path):
    (tmp_path / "gone").mkdir()
    code = f"rmdir ../gone && exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/scripts/txt2img.py a"
    found = subprocess.run(["sh", "-c", code], cwd=tmp_path / "gone", capture_output=True, text=True, timeout=100)
    assert (found.returncode, found.stderr) == (
        1,
        "error: the current folder does not exist any more: change to another one\n",
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
def test_prompts_and_captions_in_other_encodings_are_refused(encoding, generate, tmp_path):  # noqa: F811
    """UTF-16 without a mark is valid UTF-8, with a zero byte behind each letter."""
    file = write(tmp_path / "a.txt", "a cat\n".encode(encoding))
    status, _, err, files = generate("--from-file", str(file))
    assert status == 1 and files == [] and len(err) == 1 and "save it as UTF-8" in err[0]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.txt: .*save it as UTF-8"):
        Folder(tmp_path, DataOptions(8))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"width": 513}, "width must be a multiple of 8"),
        ({"height": 32768}, "height must be at most"),
        ({"steps": 2000}, "from 1 to 1000"),
        ({"clip_skip": 99}, "clip_skip must be from 1"),
        ({"hires": 4, "width": 8192}, "width must be at most 16384, got 32768"),
    ],
)
def test_settings_of_all_lines_are_checked_before_the_first_image(settings, words, generate, tmp_path):  # noqa: F811
    lines = "\n".join(json.dumps({"prompt": "a"} | more) for more in ({}, settings))
    status, _, err, files = generate("--from-file", str(write(tmp_path / "p.jsonl", lines.encode())))
    assert status == 1 and files == [] and len(err) == 1 and "p.jsonl:2: " in err[0] and words in err[0]


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "a", "seed": 1, "seed": 2}', "the key 'seed' occurs twice"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "a number has too many digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "strength": 0.5}', "no setting 'strength': it is a setting of img2img and inpaint"),
        ('{"prompt": "a", "hires_strength": 0.5}', "'hires_strength': it goes with hires"),
        ('{"prompt": "a", "cfg_scale": 7}', "did you mean 'guidance'?"),
        ('{"prompt": "a", "numInferenceSteps": 7}', "did you mean 'steps'?"),
        ('{"prompt": "a", "image": "a.png"}', "'image' cannot be set in a line: give images as arguments of img2img"),
    ],
    ids=lambda text: text[:40],
)
def test_lines_with_settings_that_cannot_be(line, words, generate, tmp_path):  # noqa: F811
    status, _, err, files = generate("--from-file", str(write(tmp_path / "p.jsonl", line.encode())))
    assert status == 1 and files == [] and len(err) == 1 and words in err[0] and len(err[0]) < 600


def test_a_blur_is_checked_before_the_first_image(generate, tmp_path, capsys):  # noqa: F811
    lines = write(tmp_path / "p.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "blur": -4}')
    files = [str(ROOT / "data" / name) for name in ("sample.png", "sample-mask.png")]
    assert inpaint.main(["--from-file", str(lines), *files, "--out", str(tmp_path / "out")]) == 1
    assert "p.jsonl:2: blur must be at least 0, got -" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_grid_has_no_empty_columns():
    images = [Image.new("RGB", (8, 8))] * 3
    sizes = [grid(images, columns).size for columns in (None, 1, 2, 3, 10**6)]
    assert sizes == [(16, 16), (8, 24), (16, 16), (24, 8), (24, 8)]


@pytest.mark.parametrize("text", ['[{"prompt": "a"}]', '[\n{\n "prompt": "a"}]'])
def test_json_that_is_read_as_text_is_said(text, generate, tmp_path):  # noqa: F811
    status, _, err, _ = generate("--from-file", str(write(tmp_path / "p.json", text.encode())), "--steps", "1")
    assert status == 0 and "JSON is read as text" in err[0]


def test_unknown_words_are_not_shown_without_end(tmp_path, capsys):
    small = ["--steps", "1", "--height", "64", "--width", "64", "--device", "cpu", "--out", str(tmp_path)]
    assert txt2img.main([" ".join(f"zz{i}" for i in range(1000)), "--web-ui-prompts", *small]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any("does not know these words: z" in line for line in lines) and all(len(line) < 500 for line in lines)


def test_photos_in_other_formats_are_skipped_with_a_warning(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jfif", "JPEG")
    write(tmp_path / "b.heic", b"\0\0\0\x18ftypheic" + bytes(20))
    assert [path.name for path in img2img.images(tmp_path)] == ["a.jfif", "b.heic"]
    with pytest.warns(UserWarning, match=r"skipped: .*b\.heic: this format is not supported \(1 file\)"):
        assert len(Folder(tmp_path, DataOptions(8, caption="a"))) == 1
