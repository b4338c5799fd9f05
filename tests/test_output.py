"""Output files: each image is encoded once, gets a name of its own, and is not lost where that name cannot be."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from scripts.common import output
from scripts.common.output import Output
from sd.files import new_file, new_folder

IMAGE = Image.new("RGB", (8, 8), "red")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("out", ["cat.png", "cats"])
def test_each_image_is_encoded_and_written_once(tmp_path, monkeypatch, out):
    encoded, written = [], []
    monkeypatch.setattr(output, "png_bytes", lambda *args: encoded.append(1) or b"png")
    monkeypatch.setattr(output, "new_file", lambda path: written.append(path) or new_file(path))
    place = Output(tmp_path / out)
    made = [place.save(IMAGE).name for _ in range(60)]
    assert len(encoded) == len(written) == 60
    expected = ["cat.png", *(f"cat-{i}.png" for i in range(2, 61))] if out == "cat.png" else None
    assert made == (expected or [f"{i:05d}.png" for i in range(1, 61)])


def test_names_that_others_take_are_skipped(tmp_path):
    one, other = Output(tmp_path / "a.png"), Output(tmp_path / "a.png")
    made = [place.save(IMAGE).name for place in (one, other, one, other)]
    assert made == ["a.png", "a-2.png", "a-3.png", "a-4.png"]
    (tmp_path / "a-5.png").symlink_to("nowhere")  # a name is taken even where its file is gone
    assert one.save(IMAGE).name == "a-6.png" and one.save(IMAGE, kind="-grid").name == "a-grid.png"


def test_a_name_that_is_taken_in_between(tmp_path, monkeypatch):
    """After the look whether it is free."""

    @contextmanager
    def late(path: Path):
        with new_file(path) as partial:
            if path.name == "00001.png":
                path.write_bytes(b"theirs")
            yield partial

    monkeypatch.setattr(output, "new_file", late)
    assert Output(tmp_path).save(IMAGE).name == "00002.png"
    assert names(tmp_path) == ["00001.png", "00002.png"] and (tmp_path / "00001.png").read_bytes() == b"theirs"


@pytest.mark.parametrize("stem", ["a" * 251, "é" * 125, "a" * 240, "猫" * 83])
def test_long_names(tmp_path, stem):
    """The longest that the file system takes; what is appended shortens them."""
    place = Output(tmp_path / f"{stem}.png")
    first, second, third = (place.save(IMAGE) for _ in range(3))
    assert first.name == f"{stem}.png" and second != third
    assert second.name.endswith("-2.png") and third.name.endswith("-3.png") and second.name[:50] == stem[:50]
    grid = place.save(IMAGE, kind="-grid")
    assert grid.name.endswith("-grid.png") or grid.name.endswith("-grid-2.png")
    film = place.save_steps([IMAGE, IMAGE], first, "webp")
    assert film.exists() and film.with_suffix("").is_dir()


def test_names_that_are_too_long_are_refused_before_the_work(tmp_path):
    with pytest.raises(
        ValueError, match="the file name has 256 bytes, but this file system allows 255: choose a shorter"
    ):
        Output(tmp_path / f"{'a' * 252}.png")
    assert names(tmp_path) == []


def test_temporary_names_fit_wherever_the_name_fits(tmp_path):
    with new_file(tmp_path / ("é" * 127)) as partial:
        partial.write_bytes(b"a")
    with new_folder(tmp_path / ("b" * 255)) as folder:
        (folder / "c").touch()
    assert names(tmp_path) == ["b" * 255, "é" * 127]


@pytest.mark.parametrize(
    "highest, made",
    [
        ("999999999.png", ["00001.png", "00003.png", "00004.png"]),
        ("999999998-grid.png", ["999999999.png", "00001.png", "00003.png"]),
        ("1000000000.png", ["00003.png", "00004.png", "00005.png"]),  # no number of ours
    ],
)
def test_after_the_highest_number_come_free_ones(tmp_path, highest, made):
    (tmp_path / highest).touch()
    (tmp_path / "00002.png").touch()
    place = Output(tmp_path)
    assert [place.save(IMAGE).name for _ in made] == made


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    place = Output(tmp_path / "deep" / "out")
    shutil.rmtree(tmp_path / "deep")
    assert place.save(IMAGE) == tmp_path / "deep" / "out" / "00001.png"


@pytest.mark.parametrize("name", ["out", "cat.png"])
def test_images_that_cannot_be_saved_in_their_folder_go_to_another(tmp_path, monkeypatch, name):
    """A full disk, a folder that became a file."""
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    place = Output(tmp_path / "images" / name)
    first = place.save(IMAGE)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").touch()
    with pytest.warns(UserWarning, match=r"images.*: images are saved in .*sd-images-\w+ from now on") as told:
        second = place.save(IMAGE)
    third = place.save(IMAGE)
    assert len(told) == 1 and second.exists() and third.exists() and second.parent == third.parent != first.parent
    shutil.rmtree(spare)
    spare.touch()
    with pytest.raises(OSError, match=r"images|spare"):  # no place left
        place.save(IMAGE)


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        Output(tmp_path)
    assert names(tmp_path) == []


def test_a_full_disk_loses_no_image(tmp_path, monkeypatch):
    def full(path: Path):
        if "sd-images-" not in str(path):
            raise OSError(28, os.strerror(28))
        return new_file(path)

    place = Output(tmp_path / "out")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(output, "new_file", full)
    with pytest.warns(UserWarning, match="No space left on device: images are saved in"):
        assert place.save(IMAGE).name == "00001.png"


def test_an_image_beside_another_replaces_nothing(tmp_path):
    output = Output(tmp_path)
    image = Image.new("RGB", (8, 8))
    path = output.save(image)
    names = [output.save_beside(image, path, "-control").name for _ in range(3)]
    assert names == ["00001-control.png", "00001-control-2.png", "00001-control-3.png"]
    long = output.save_beside(image, tmp_path / f"{'é' * 120}.png", "-control")
    assert long.is_file() and long.name.endswith("-control.png")
    assert output.save(image).name == "00002.png"
