"""Training data as people have it: folders, captions, masks, sizes; what is computed once, and kept by contents."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY_XL, error, tiny_state
from conftest import loaded
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from scripts.training import latents as encoding
from scripts.training import texts
from scripts.training.batches import Batches, BatchOptions
from scripts.training.buckets import bucket_shapes, bucket_step, place
from scripts.training.caption_files import of_folder_name
from scripts.training.captions import Captions
from scripts.training.data import World
from scripts.training.dataset import split
from scripts.training.folders import DataOptions, Folder, Joined, captioned
from scripts.training.latents import latents
from scripts.training.loop import Recipe
from scripts.training.processes import Processes
from scripts.training.texts import with_encoded_text
from sd import StableDiffusion
from sd.config import POCKET, SD1, SD2, SDXL

ALONE = Processes(torch.device("cpu"))
HOW = DataOptions(128, 32, caption="a picture")


def disc(path: Path, size: tuple[int, int], colour: str = "red") -> None:
    """An image with a disc in its middle, on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "white")
    radius = min(size) // 4
    x, y = size[0] // 2, size[1] // 2
    ImageDraw.Draw(image).ellipse([x - radius, y - radius, x + radius, y + radius], colour)
    image.save(path)


@pytest.fixture
def encoded(monkeypatch, tiny_sd) -> list[int]:
    """The number of images in each call of the encoder."""
    found: list[int] = []
    encode = StableDiffusion.encode

    def counted(model, images):
        found.append(len(images))
        return encode(model, images)

    monkeypatch.setattr(StableDiffusion, "encode", counted)
    return found


# ------------------------------------------------------------------------------------------------------- the sizes


@pytest.mark.parametrize("config", [SD1, SD2, SDXL, POCKET], ids=lambda config: config.name)
def test_buckets_fit_the_model_and_have_about_one_area(config):
    step = bucket_step(config)
    shapes = bucket_shapes(config.size, step)
    assert step % config.vae.factor == 0 and step % (config.vae.factor * 2 ** (len(config.unet.channels) - 1)) == 0
    assert (step == 64) == (config.size >= 512)
    assert (config.size, config.size) in shapes
    assert all(h % step == w % step == 0 and h * w <= config.size**2 for h, w in shapes)
    assert all(h * w > 0.7 * config.size**2 for h, w in shapes)
    assert max(w / h for h, w in shapes) >= 2 and {(w, h) for h, w in shapes} == set(shapes)
    for aspect in np.linspace(0.5, 2, 61):  # what people photograph loses little
        kept = place((round(1000 * aspect), 1000), shapes).kept
        assert kept > (0.86 if config.size >= 512 else 0.77)


def test_a_size_below_one_step_is_refused():
    with pytest.raises(ValueError, match="--size must be at least 64 for this model, got 32"):
        bucket_shapes(32, 64)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 48), (1000, 200), (130, 131), (128, 128)])
def test_images_are_never_stretched_and_crops_are_said(size, tmp_path):
    """A disc stays a disc, in the middle; what is cropped off is where the placement says."""
    disc(tmp_path / "a.png", size)
    example = Folder(tmp_path, HOW)[0]
    where = example.place
    assert example.pixels.shape == (where.height, where.width, 3)
    red = example.pixels[..., 1] < 128
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert abs(len(rows) - len(columns)) <= 1
    assert abs(rows.mean() - where.height / 2) <= 1.5 and abs(columns.mean() - where.width / 2) <= 1.5
    scale = len(rows) / (2 * (min(size) // 4) + 1)
    assert where.original == (size[1], size[0]) and (scale > 1.02) <= where.enlarged
    for side, wanted, crop in zip((size[1], size[0]), (where.height, where.width), where.crop, strict=True):
        assert abs((side * scale - wanted) / 2 - crop) <= 2
    assert where.kept == pytest.approx(min(1, where.height * where.width / (size[0] * size[1] * scale**2)), abs=0.06)


def test_one_line_says_what_becomes_of_the_images(tiny_sd, tmp_path, capsys):
    for name, size in (("wide", (330, 200)), ("long", (1000, 100)), ("small", (64, 64)), ("square", (300, 300))):
        disc(tmp_path / f"{name}.png", size)
    latents(tmp_path / "cache" / "a", Folder(tmp_path, HOW), tiny_sd, ALONE, 0)
    assert capsys.readouterr().out == (
        "4 images in 3 buckets, most often 128x128 pixels; largest crop 70 %; cropped by more than 10 %: "
        "long.png (70 %); 1 smaller than its bucket and enlarged\n"
    )
    latents(tmp_path / "cache" / "b", Folder(tmp_path, replace(HOW, step=None)), tiny_sd, ALONE, 0)
    assert "4 images in 1 bucket, of 128x128 pixels; largest crop 90 %" in capsys.readouterr().out
    latents(tmp_path / "cache" / "c", World(2, 32), tiny_sd, ALONE, 0)
    assert not capsys.readouterr().out


def test_an_upright_photo_counts_as_it_is_seen(tmp_path):
    image = Image.new("RGB", (300, 200), "red")
    exif = image.getexif()
    exif[274] = 6  # rotated by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    example = Folder(tmp_path, HOW)[0]
    assert example.pixels.shape == (160, 96, 3) and example.place.original == (300, 200)


# --------------------------------------------------------------------------------------------------- the folders


def test_folders_of_kohya(tmp_path):
    """10_name: repeats, and a caption for images without a file; deeper folders belong to the nearest one."""
    for name in ("10_red dog/a", "10_red dog/deep/b", "3_cat/c", "2024_summer/d", "e", "0_left out/f"):
        disc(tmp_path / f"{name}.png", (64, 64))
    (tmp_path / "3_cat" / "c.txt").write_text("my own words")
    with pytest.warns(UserWarning, match=r"skipped: .*0_left out: its name says 0 times per epoch"):
        items = captioned(tmp_path, "else")
    assert {item.path.stem: (item.captions, item.repeats) for item in items} == {
        "a": (["red dog"], 10), "b": (["red dog"], 10), "c": (["my own words"], 3), "d": (["else"], 1),
        "e": (["else"], 1),
    }  # fmt: skip
    assert of_folder_name(tmp_path / "e.png", tmp_path) is None
    with pytest.raises(ValueError, match=r"d\.png: no caption \(2 of 6 images have none\)"):
        captioned(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no image is to be shown"):
        captioned(tmp_path / "0_left out")


def test_metadata_of_kohya(tmp_path):
    for name in ("a", "sub/b", "sub/c", "d", "e"):
        disc(tmp_path / f"{name}.png", (64, 64))
    first = {"a": {"caption": "first words"}, "/elsewhere/on/disk/b.png": {"caption": "a b", "tags": "one, two"}}
    (tmp_path / "meta_cap.json").write_text(json.dumps(first))
    (tmp_path / "meta_clean.json").write_text(json.dumps({"a": {"caption": "a a", "train_resolution": [64, 64]}}))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "lines go first"}')
    (tmp_path / "sub" / "meta_lat.json").write_text(json.dumps({"c": {"tags": "only, tags"}, "gone": {"tags": "x"}}))
    (tmp_path / "sub" / "other.json").write_text("{}")  # none of kohya's
    (tmp_path / "e.txt").write_text("beside")
    with pytest.warns(UserWarning, match=r"meta_lat\.json: 1 of 2 images are missing, first gone"):
        items = captioned(tmp_path)
    assert {item.path.stem: item.captions[0] for item in items} == {
        "a": "a a", "b": "a b, one, two", "c": "only, tags", "d": "lines go first", "e": "beside",
    }  # fmt: skip
    (tmp_path / "sub" / "meta_lat.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta_lat\.json: not JSON: "):
        captioned(tmp_path)
    (tmp_path / "sub" / "meta_lat.json").write_text('{"info": 3}')
    with pytest.warns(UserWarning, match="not used: no captions in it"), pytest.raises(ValueError, match="no caption"):
        captioned(tmp_path)


def test_images_of_the_class_are_a_second_folder(tiny_sd, tmp_path, capsys):
    disc(tmp_path / "data" / "5_thing" / "a.png", (64, 64))
    disc(tmp_path / "data" / "class" / "b.png", (64, 64), "blue")  # inside: it is none to learn
    first = Folder(tmp_path / "data", replace(HOW, caption=None), (tmp_path / "data" / "class",))
    second = Folder(tmp_path / "data" / "class", replace(HOW, caption="a dog"), (tmp_path / "data",), regular=True)
    data = latents(tmp_path / "cache" / "latents", Joined(first, second), tiny_sd, ALONE, 0)
    assert [data.captions(i) for i in range(2)] == [["thing"], ["a dog"]]
    assert data.regular.tolist() == [False, True] and data.repeats.tolist() == [5, 1]
    assert "; 1 of them class images; 5 shown per epoch" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--reg .*none: no such folder"):
        Folder(tmp_path / "none", HOW, regular=True)


# ----------------------------------------------------------------------------------------------------- the masks


def test_masks_are_found_in_three_places(tiny_sd, tmp_path, capsys):
    """White is learned; the mask is cropped like its image and averaged; without one all is learned."""
    for name in ("beside", "below", "none"):
        disc(tmp_path / f"{name}.png", (300, 200))
    left = Image.new("L", (600, 400))
    left.paste(255, (0, 0, 300, 400))
    left.save(tmp_path / "beside.mask.png")
    (tmp_path / "masks").mkdir()
    left.resize((300, 200)).save(tmp_path / "masks" / "below.png")
    clear = Image.new("RGBA", (300, 200), (255, 0, 0, 255))
    clear.paste((0, 255, 0, 0), (150, 0, 300, 200))
    clear.save(tmp_path / "alpha.png")
    data = latents(tmp_path / "cache" / "a", Folder(tmp_path, replace(HOW, masked=True)), tiny_sd, ALONE, 0)
    assert data.names == ["alpha.png", "below.png", "beside.png", "none.png"]
    masks = data.take("mask", range(4))
    assert masks.shape == (4, 1, 12, 20)
    assert masks[:3, ..., :9].min() > 0.99 and masks[:3, ..., 11:].max() < 0.01 and (masks[3] == 1).all()
    assert "; 3 with a mask" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="2 masks not used: --masked uses them"):
        assert len(Folder(tmp_path, HOW)) == 4


def test_masks_that_cannot_be_are_problems(tmp_path):
    for name in ("shape", "black", "broken"):
        disc(tmp_path / f"{name}.png", (300, 200))
    Image.new("L", (64, 64), 255).save(tmp_path / "shape.mask.png")
    Image.new("L", (300, 200)).save(tmp_path / "black.mask.png")
    (tmp_path / "broken.mask.png").write_bytes(b"nothing")
    folder = Folder(tmp_path, replace(HOW, masked=True))
    problems = {item.path.stem: folder[i].problem for i, item in enumerate(folder.items)}
    assert all(folder[i].pixels is None for i in range(3))
    assert "another aspect ratio than its image (64x64, and the image 300x200)" in problems["shape"]
    assert "black everywhere" in problems["black"] and "broken.mask.png" in problems["broken"]


# ---------------------------------------------------------------------------------------------------- the caches


def test_latents_are_kept_by_contents(tiny_sd, tmp_path, encoded):
    """Of unchanged images none is encoded again, whatever their names and dates; changed contents are."""
    data, cache = tmp_path / "data", tmp_path / "cache" / "latents.safetensors"
    for i, size in enumerate(((64, 64), (96, 64), (64, 96))):
        disc(data / f"{i}.png", size)
    first = latents(cache, Folder(data, HOW), tiny_sd, ALONE, 0)
    assert sum(encoded) == 3 and not encoded.clear()
    before = cache.stat().st_ino
    (data / "0.png").touch()
    again = latents(cache, Folder(data, HOW), tiny_sd, ALONE, 0)
    assert not encoded and cache.stat().st_ino == before
    assert all(torch.equal(first.take("mean", [i]), again.take("mean", [i])) for i in range(3))

    (data / "1.png").rename(data / "5.png")  # renamed, one added twice, one removed
    (data / "0.png").unlink()
    for name in ("3.png", "4.png"):
        disc(data / name, (64, 64), "blue")
    mixed = latents(cache, Folder(data, HOW), tiny_sd, ALONE, 0)
    assert sum(encoded) == 1 and not encoded.clear()
    assert mixed.names == ["2.png", "3.png", "4.png", "5.png"] and mixed.images[1] == mixed.images[2]
    assert torch.equal(mixed.take("mean", [3]), first.take("mean", [1]))
    assert torch.equal(mixed.take("mean", [1]), mixed.take("mean", [2]))
    assert sum(len(value) for name, value in load_file(cache).items() if name.endswith(".key")) == 3

    stamp = (data / "2.png").stat()
    disc(data / "2.png", (64, 96), "green")  # other contents, same date
    os.utime(data / "2.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    latents(cache, Folder(data, HOW), tiny_sd, ALONE, 0)
    assert sum(encoded) == 1 and not encoded.clear()
    latents(cache, Folder(data, replace(HOW, size=96)), tiny_sd, ALONE, 0)
    assert sum(encoded) == 3 and not encoded.clear()
    cache.write_bytes(b"damaged")
    latents(cache, Folder(data, HOW), tiny_sd, ALONE, 0)
    assert sum(encoded) == 3


def test_what_was_encoded_before_a_stop_is_kept(tiny_sd, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(encoding, "SECONDS", -1)
    monkeypatch.setattr("scripts.training.data.CHUNK", 2)
    for i in range(5):
        disc(tmp_path / f"{i}.png", (64 + 32 * (i % 2), 64), ("red", "blue", "green", "pink", "black")[i])
    source, cache = Folder(tmp_path, HOW), tmp_path / "cache" / "latents.safetensors"
    read, seen = Folder.__getitem__, []

    def stopped(folder: Folder, i: int):
        if i == 4 and not seen:
            seen.append(i)
            raise KeyboardInterrupt
        return read(folder, i)

    monkeypatch.setattr(Folder, "__getitem__", stopped)
    with pytest.raises(KeyboardInterrupt):
        latents(cache, source, tiny_sd, ALONE, 0)
    assert sum(encoded) == 4 and not encoded.clear()
    data = latents(cache, source, tiny_sd, ALONE, 0)
    assert sum(encoded) == 1 and data.names == [f"{i}.png" for i in range(5)]


def test_latents_are_made_anew_for_another_vae(tiny_sd, tmp_path, encoded, monkeypatch):
    disc(tmp_path / "a.png", (64, 64))
    source, cache = Folder(tmp_path, HOW), tmp_path / "cache" / "latents.safetensors"
    latents(cache, source, tiny_sd, ALONE, 0)
    weight = tiny_sd.vae.quant.weight
    before = weight.clone()
    try:
        weight[0, 0] += 1e-3
        latents(cache, source, tiny_sd, ALONE, 0)
    finally:
        weight.copy_(before)
    latents(cache, source, tiny_sd, ALONE, 0, keep_pixels=True)
    assert encoded == [1, 1, 1]
    data = latents(cache, source, tiny_sd, ALONE, 0, keep_pixels=True, flip=True)
    assert encoded == [1] * 5
    pixels = data.take("pixels", [0])
    mirrored = tiny_sd.encode(pixels.flip(-1).float() / 127.5 - 1)
    assert error(data.take("flipped_mean", [0]).float(), mirrored.mean) < 1e-3


def test_drawn_scenes_are_kept_with_their_captions(tiny_sd, tmp_path, encoded):
    """The first scenes of a larger number are the same."""
    cache = tmp_path / "latents.safetensors"
    few = latents(cache, World(3, 32, 2), tiny_sd, ALONE, 0)
    more = latents(cache, World(5, 32, 2), tiny_sd, ALONE, 0)
    assert sum(encoded) == 5
    assert [more.captions(i) for i in range(3)] == [few.captions(i) for i in range(3)]
    assert [more.captions(i) for i in range(5)] == [list(World(5, 32, 2)[i].captions) for i in range(5)]


def test_a_broken_image_is_left_out_and_tried_again(tiny_sd, tmp_path, encoded):
    disc(tmp_path / "a.png", (64, 64))
    (tmp_path / "b.png").write_bytes(b"\x89PNG broken")
    cache = tmp_path / "cache" / "latents.safetensors"
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            data = latents(cache, Folder(tmp_path, HOW), tiny_sd, ALONE, 0)
        assert data.names == ["a.png"] and "b.png: a PNG file that is damaged" in str(said[0].message)
        assert str(said[1].message) == "1 of 2 images cannot be read and are skipped"
    assert sum(encoded) == 1


@pytest.mark.parametrize("name", ["tiny", "xl"])
def test_text_that_was_encoded_is_what_would_be_encoded(name, tiny_sd, tmp_path, monkeypatch):
    """Also for dropped prompts, and of those captions alone that are new."""
    model = tiny_sd if name == "tiny" else StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))
    for i, text in enumerate(("a red disc\nsomething red", "a boat", "")):
        disc(tmp_path / "data" / f"{i}.png", (64 + 32 * i, 64))
        (tmp_path / "data" / f"{i}.txt").write_text(text)
    cache, how = tmp_path / "text.safetensors", replace(HOW, caption="")
    data = latents(tmp_path / "latents", Folder(tmp_path / "data", how), model, ALONE, 0)
    calls: list[int] = []
    encode = Captions.encode
    monkeypatch.setattr(Captions, "encode", lambda self, ids: calls.append(len(ids)) or encode(self, ids))
    full = with_encoded_text(cache, data, model, ALONE, torch.float32)
    assert calls == [5]  # four captions and the empty one
    recipe, options = Recipe(batch=2, accumulate=3), BatchOptions(drop=0.4)
    plain, kept = (Batches(each, model, recipe, ALONE, options) for each in (data, full))
    told, empty = Captions(model), 0
    for step in range(4):
        for one, other in zip(plain(step), kept(step), strict=True):
            assert other["batch"].context is not None and torch.equal(one["batch"].ids, other["batch"].ids)
            expected, found = told(one["batch"]), told(other["batch"])
            torch.testing.assert_close(found.context, expected.context, rtol=1e-4, atol=1e-4)
            if expected.vector is not None:
                torch.testing.assert_close(found.vector, expected.vector, rtol=1e-4, atol=1e-4)
            empty += int((one["batch"].ids == told.empty).all(1).sum())
    assert empty > 2
    assert model.config.zero_empty == (not full.text.context[-1].any())
    calls.clear()
    half = with_encoded_text(cache, data, model, ALONE)
    assert calls == [5] and half.text.context.dtype == torch.float16
    assert error(half.text.context.float(), full.text.context) < 1e-3

    (tmp_path / "data" / "1.txt").write_text("a boat\na ship")
    data = latents(tmp_path / "latents", Folder(tmp_path / "data", how), model, ALONE, 0)
    calls.clear()
    again = with_encoded_text(cache, data, model, ALONE)
    assert calls == [1] and again.texts[2:4] == ["a boat", "a ship"]
    assert torch.equal(again.text.context[2], half.text.context[2]) and again.text.context[3].any()
    calls.clear()
    assert torch.equal(with_encoded_text(cache, data, model, ALONE).text.context, again.text.context) and not calls
    monkeypatch.setattr(texts, "MOST", 1000)
    assert with_encoded_text(cache, data, model, ALONE) is data


# ----------------------------------------------------------------------------------------------------- held out


def test_held_out_images_are_in_one_part_alone(tiny_sd, tmp_path):
    for i in range(9):
        disc(tmp_path / "data" / f"{i}.png", (64, 64), ("red", "blue", "green", "pink", "black", "grey")[i % 6])
    for i in range(3):
        disc(tmp_path / "class" / f"{i}.png", (96, 64), ("red", "blue", "green")[i])
    folders = Folder(tmp_path / "data", HOW), Folder(tmp_path / "class", HOW, regular=True)
    data = latents(tmp_path / "latents", Joined(*folders), tiny_sd, ALONE, 0)
    assert len(set(data.images)) == 9  # three are in the folder twice
    for share, count in ((0.01, 1), (0.5, 3), (0.99, 5)):
        kept, held = split(data, share, seed=3)
        assert len(set(held.images)) == count and not held.regular.any()
        assert not set(kept.images) & set(held.images)
        assert len(kept) + len(held) == 12 and int(kept.regular.sum()) == 3
        assert held.names == split(data, share, seed=3)[1].names
        i = held.names.index(held.names[0])
        assert torch.equal(held.take("mean", [i]), data.take("mean", [data.names.index(held.names[0])]))
    assert split(data, 0.5, seed=3)[1].names != split(data, 0.5, seed=5)[1].names
    with pytest.raises(ValueError, match="with one image none can be held out"):
        split(data.subset([0, 6, 9]), 0.5, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(data, 1, seed=0)
