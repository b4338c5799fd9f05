"""train.py --control: changes nothing at first, learns, stops and goes on; and data with hints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY, TINY_V2, TINY_XL
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from test_train_scripts import interrupt_at, same, start  # noqa: F401
from training_common import batch_of, random_data

from scripts import train
from scripts.training import control as training
from scripts.training import hints
from scripts.training.batches import Batches
from scripts.training.data import Example, World, fingerprint
from scripts.training.folders import DataOptions
from scripts.training.hints import HintedFolder, HintedWorld
from scripts.training.log import read_log
from scripts.training.loop import Recipe
from scripts.training.processes import Processes
from scripts.training.state import load_state
from sd import StableDiffusion
from sd.conditioning import Conditioning
from sd.config import POCKET, UNetConfig
from sd.control_config import ControlConfig, own_half
from sd.models.controlnet import ControlNet
from sd.models.unet import UNet
from sd.params import Control
from sd.training import erase_parts, initialise_control

CPU = torch.device("cpu")
QUICK = ("--batch", 2, "--warmup", 2, "--precision", "float32", "--device", "cpu", "--log-every", 2, "--samples", 0)
SMALL = ("--control", "--small", "--hint-widths", 8, 8, 8, 16, "--size", 32, *QUICK)
RESIDUALS = 5  # of the embedded model's U-Net: four skip connections and the middle

HOW = DataOptions(32)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """Four images with captions, and hints in each of the three ways: name.hint.png, hints/name.png, metadata."""
    folder = tmp_path_factory.mktemp("drawings")
    (folder / "hints").mkdir()
    (folder / "maps").mkdir()
    places = {"red": "red.hint.png", "green": "hints/green.png", "blue": "maps/b.jpg", "pink": "hints/pink.webp"}
    for i, (name, hint) in enumerate(places.items()):
        box = [20 + 8 * i, 10, 50 + 8 * i, 40]
        image, lines = Image.new("RGB", (96, 64), "white"), Image.new("L", (192, 128))
        ImageDraw.Draw(image).ellipse(box, name)
        ImageDraw.Draw(lines).ellipse([2 * side for side in box], outline=255, width=3)
        image.save(folder / f"{name}.png")
        lines.save(folder / hint)
    for name in ("red", "green", "pink"):
        (folder / f"{name}.txt").write_text(f"a {name} picture\n")
    line = {"file_name": "blue.png", "text": "a blue picture", "conditioning_image": "maps/b.jpg"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    return folder


def inputs(config: UNetConfig, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, 4, 8, 8, generator=rng), torch.full((batch,), 500.0)
    vector = None if config.vector is None else torch.randn(batch, config.vector, generator=rng)
    return x, t, Conditioning(torch.randn(batch, 7, config.context, generator=rng), vector)


# ------------------------------------------------------------------------------------------- the initial weights


@pytest.mark.parametrize("config", [TINY, TINY_V2, TINY_XL, POCKET], ids=lambda config: config.name)
def test_it_starts_as_the_first_half_and_changes_nothing(config):
    torch.manual_seed(0)
    unet = UNet(config.unet)
    control = ControlNet(ControlConfig.of(config.unet, hint=(4, 4, 4, 8)))
    initialise_control(control, unet)
    x, t, cond = inputs(config.unet)
    features = control.embed(torch.rand(2, 3, 64, 64))
    assert not features.any()
    first, time, context = unet.begin(x, t, cond)
    own, own_time, _ = control.begin(x, t, cond)
    for skip, copied in zip(unet.contract(first, time, context), control.contract(own, own_time, context), strict=True):
        assert torch.equal(skip, copied)
    down, middle = control(x, t, cond, features)
    assert not any(residual.any() for residual in (*down, middle))
    assert torch.equal(unet(x, t, cond, down, middle), unet(x, t, cond))
    assert all(layer.weight.any() for layer in control.hint.convs[:-1])


def test_a_small_one_copies_what_it_has():
    torch.manual_seed(0)
    unet = UNet(replace(TINY.unet, in_channels=9))  # of an inpainting model
    config = ControlConfig(replace(own_half(unet.config), depth=(0,) * len(TINY.unet.depth), middle_depth=0))
    control = ControlNet(config)
    initialise_control(control, unet)
    state, given = control.state_dict(), unet.state_dict()
    copied = [name for name in state if not name.startswith(("hint.", "zero"))]
    assert not any("attn" in name for name in copied)
    assert torch.equal(state.pop("conv_in.weight"), given["conv_in.weight"][:, :4])
    assert all(torch.equal(state[name], given[name]) for name in copied if name in state)


def test_one_for_another_u_net_is_refused():
    wider = replace(TINY.unet, channels=tuple(2 * width for width in TINY.unet.channels))
    with pytest.raises(ValueError, match="not a control network for this U-Net"):
        initialise_control(ControlNet(ControlConfig.of(wider)), UNet(TINY.unet))


# ------------------------------------------------------------------------------------------------- the program


def test_a_run_trains_the_control_network_alone_and_writes_it(start, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    status, said, _ = start(train, *SMALL, "--scenes", 6, "--steps", 4, "--ema", 0.5, "--out", out)
    assert status == 0
    assert said[-1].startswith(f"{out / 'control.safetensors'}: edges, a control network for pocket")
    state = load_state(out / "state.pt")
    assert state["networks"] and all(name.startswith("control.") for name in state["networks"])
    with safe_open(out / "control.safetensors", "pt") as file:
        config = ControlConfig.from_json(file.metadata()["sd.control"])
    assert config.hint == (8, 8, 8, 16) and config.name == "edges" and not config.attends and config.fits(POCKET.unet)
    tensors = load_file(out / "control.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    network = ControlNet(config)
    network.load_state_dict({name.removeprefix("control."): tensor for name, tensor in tensors.items()})
    average = state["ema"]["average"]
    assert all(torch.equal(tensors[name], average[name].half()) for name in tensors)
    assert network.zero_mid.weight.any() and network.hint.convs[-1].weight.any()
    lines = read_log(out / "train.jsonl")
    assert [len(line["zero"]) for line in lines] == [RESIDUALS, RESIDUALS]
    assert all(0 < before < after for before, after in zip(lines[0]["zero"], lines[1]["zero"], strict=True))


def test_the_model_that_is_controlled_stays_as_it_is(start, tmp_path, monkeypatch):  # noqa: F811
    models = []
    find_model = training.find_model
    monkeypatch.setattr(training, "find_model", lambda *args: models.append(find_model(*args)) or models[0])
    assert start(train, *SMALL, "--scenes", 4, "--steps", 2, "--out", tmp_path / "out")[0] == 0
    fresh = StableDiffusion.load(device="cpu", dtype="float32")
    for name in ("unet", "text_encoder", "vae"):
        assert same(dict(getattr(models[0], name).state_dict()), dict(getattr(fresh, name).state_dict())), name


@pytest.mark.exhaustive
def test_resumed_training_equals_uninterrupted_training(drawings, start, tmp_path, monkeypatch):  # noqa: F811
    options = (*SMALL, "--data", drawings, "--steps", 4, "--accumulate", 2, "--hint-erase", 0.5)
    assert start(train, *options, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        status, _, err = start(train, *options, "--out", tmp_path / "parts")
    assert status == 130 and err[-1] == "stopped"
    assert start(train, "--out", tmp_path / "parts", "--resume")[0] == 0
    whole, parts = (load_state(tmp_path / folder / "state.pt") for folder in ("whole", "parts"))
    assert whole["step"] == 4 and same(whole, parts)
    assert same(*(load_file(tmp_path / folder / "control.safetensors") for folder in ("whole", "parts")))


def test_two_processes_compute_with_the_hints_of_one_with_twice_the_batch():
    model = StableDiffusion.load(device="cpu", dtype="float32")
    data = random_data(model, {(4, 4): 8}, more={"hint": (1, 32, 32)})

    def parts(rank: int, count: int, batch: int) -> list[dict]:
        processes = Processes(CPU, rank, count)
        batches = Batches(data, model, Recipe(batch=batch, accumulate=2), processes)
        return list(training.HintBatches(batches, 0.5)(3))

    alone, first, second = parts(0, 1, 4), parts(0, 2, 2), parts(1, 2, 2)
    for k in range(2):
        assert torch.equal(alone[k]["hint"], torch.cat([first[k]["hint"], second[k]["hint"]]))
        assert alone[k]["hint"].shape == (4, 3, 32, 32)
    every = torch.cat([part["hint"] for part in alone])
    assert 0 < (every == 0).flatten(1).any(1).sum() < 8  # some lost a part, not all


@pytest.mark.exhaustive
def test_a_hint_is_learned():
    """On few drawings: with their hints the loss is smaller than with those of others, which at first are equal."""
    torch.manual_seed(0)
    model = StableDiffusion.load(device="cpu", dtype="float32")
    source = HintedWorld(World(8, 64), "edges")
    chosen = [source[i] for i in range(8)]
    pixels = torch.from_numpy(np.stack([example.pixels for example in chosen])).permute(0, 3, 1, 2) / 127.5 - 1
    lines = training.to_hints(torch.from_numpy(np.stack([example.hint for example in chosen]))[:, None])
    with torch.no_grad():
        x0, ids = model.encode(pixels).mode(), model.tokenizer([""] * 8).long()
    own = replace(own_half(model.config.unet), depth=(0, 0), middle_depth=0)
    network = training.initial_control(ControlConfig(own, (8, 8, 8, 16)), model.unet, 0)
    objective = training.Objective(network, model)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    t, noise = torch.full((8,), 999), torch.randn(x0.shape)  # the noisy latent shows nothing

    def losses() -> tuple[float, float]:
        with torch.no_grad():
            batch = batch_of(x0, ids, t, noise)
            return float(objective(batch, lines)), float(objective(batch, lines.roll(3, 0)))

    assert losses()[0] == losses()[1]
    for _ in range(50):
        optimizer.zero_grad()
        with torch.enable_grad():
            objective(batch_of(x0, ids, t, torch.randn(x0.shape)), lines).backward()
        optimizer.step()
    right, other = losses()
    assert right < 0.8 * other
    assert all(p.grad is None for p in (*model.unet.parameters(), *model.text_encoder.parameters()))


def test_samples_show_hints_beside_images(start, tmp_path):  # noqa: F811
    """Generated with the averaged control network, and the hint of the same scene as the caption."""
    out = tmp_path / "out"
    options = (*SMALL[:-2], "--samples", 3, "--sample-steps", 2, "--scenes", 6, "--steps", 2)
    assert start(train, *options, "--out", out)[0] == 0
    sheet = Image.open(out / "samples-000002.png")
    assert sheet.size == (6 * 32, 32)
    example = HintedWorld(World(6, 32, 8), "edges")[2]  # scenes 0, 2, 4
    assert np.array_equal(np.asarray(sheet.crop((64, 0, 96, 32)))[..., 0], example.hint)
    model = StableDiffusion.load(device="cpu", dtype="float32")
    with safe_open(out / "control.safetensors", "pt") as file:
        network = ControlNet(ControlConfig.from_json(file.metadata()["sd.control"]))
    state = load_state(out / "state.pt")["ema"]["average"]
    network.load_state_dict({name.removeprefix("control."): tensor for name, tensor in state.items()})
    name = model.add_control(network)
    hint = Control(name, Image.fromarray(example.hint))
    settings = {"steps": 2, "height": 32, "width": 32, "seed": 1}
    again = model.txt2img(example.captions[0], controls=hint, **settings)[0]
    assert np.abs(np.asarray(again, int) - np.asarray(sheet.crop((96, 0, 128, 32)), int)).max() <= 1


def test_wrong_options_are_one_line(drawings, start, tmp_path):  # noqa: F811
    def problem(*args: object) -> str:
        status, _, err = start(train, "--out", tmp_path / "out", *args)
        assert status == 1 and len(err) == 1, err
        return err[0].removeprefix("error: ")

    assert problem("--hint", "depth") == "--hint goes with --control"
    assert problem("--small") == "--small goes with --control"
    for option in (("--inpaint",), ("--train-text",), ("--weighting", "min-snr"), ("--vae", "x"), ("--text", "x")):
        assert problem(*SMALL, *option).startswith(f"{option[0]} does not go with --control")
    assert problem(*SMALL, "--drop", 1.5).startswith("--drop and --hint-erase must be from 0 to 1")
    assert problem(*SMALL, "--hint-widths", 8, 8).startswith("--hint-widths: this model needs 4 widths")
    assert problem(*SMALL, "--hint-widths", 0, 8, 8, 8).startswith("ControlConfig.hint: got (0, 8, 8, 8)")
    assert problem(*SMALL, "--data", drawings, "--hint", "edges").startswith("--hint is the kind of hints of drawn")
    assert problem(*SMALL, "--data", drawings / "none").endswith("no such folder")
    assert problem(*SMALL, "--ckpt", "x") == problem("--ckpt", "x")  # no such file, as without --control


def test_an_inpainting_model_is_refused(start, tmp_path, monkeypatch):  # noqa: F811
    from scripts.training.models import for_inpainting

    inpainting = for_inpainting(StableDiffusion.load(device="cpu", dtype="float32"))
    monkeypatch.setattr(training.StableDiffusion, "load", lambda *args, **options: inpainting)
    status, _, err = start(train, *SMALL, "--out", tmp_path)
    assert status == 1 and "is an inpainting model: train the control network on the ordinary model" in err[0]


# ----------------------------------------------------------------------------------------------------- the data


def test_hints_are_found_in_three_places_and_are_no_images(drawings):
    source = HintedFolder(drawings, HOW)
    assert [item.path.name for item in source.items] == ["blue.png", "green.png", "pink.png", "red.png"]
    assert [source.hints[item.path].name for item in source.items] == [
        "b.jpg",
        "green.png",
        "pink.webp",
        "red.hint.png",
    ]
    for i in range(4):
        example = source[i]
        assert example.hint.shape == (32, 32, 3) and example.hint.dtype == np.uint8
        dark = np.flatnonzero((example.pixels.min(2) < 225).any(0))  # columns of the disc
        bright = np.flatnonzero((example.hint.max(2) > 100).any(0))
        assert abs(dark.mean() - bright.mean()) < 1.5  # cropped and resized alike


def copied(drawings: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawings, tmp_path / "data"))


def test_an_image_without_a_hint_is_an_error(drawings, tmp_path):
    folder = copied(drawings, tmp_path)
    (folder / "hints" / "green.png").unlink()
    with pytest.raises(ValueError) as error:
        HintedFolder(folder, HOW)
    assert str(error.value) == (
        f"{folder / 'green.png'}: no hint (1 of 4 images have none): save it as green.hint.png in the same folder, as "
        "hints/green.png, or name it in metadata.jsonl"
    )
    (folder / "maps" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"metadata.jsonl: the hint of blue.png is missing: .*b.jpg"):
        HintedFolder(folder, HOW)
    (folder / "metadata.jsonl").write_text('{"file_name": "blue.png", "text": "blue", "hint": 7}')
    with pytest.raises(ValueError, match=r"the hint of blue.png must be the name of a file, got 7"):
        HintedFolder(folder, HOW)


def test_hints_of_another_shape_and_broken_ones_are_skipped(drawings, tmp_path):
    folder = copied(drawings, tmp_path)
    Image.new("L", (64, 64)).save(folder / "red.hint.png")
    (folder / "hints" / "green.png").write_bytes(b"not an image")
    source = HintedFolder(folder, HOW)
    found = [source[i] for i in range(4)]
    assert [example.pixels is None for example in found] == [False, True, False, True]
    assert str(folder / "hints" / "green.png") in found[1].problem
    assert found[3].problem.endswith("another aspect ratio than its image (64x64, and the image 96x64)")


def test_changed_hints_are_encoded_anew(drawings, tmp_path):
    folder = copied(drawings, tmp_path)
    before = fingerprint(HintedFolder(folder, HOW))
    assert before == fingerprint(HintedFolder(folder, HOW))
    Image.new("L", (97, 65)).save(folder / "red.hint.png")
    assert fingerprint(HintedFolder(folder, HOW)) != before
    world = World(4, 32)
    assert (
        len({fingerprint(source) for source in (world, HintedWorld(world, "edges"), HintedWorld(world, "depth"))}) == 3
    )


def test_the_cache_has_hints_as_bytes(drawings, start, tmp_path):  # noqa: F811
    """Three channels for images, one for drawn scenes."""
    for data, channels in ((drawings, 3), ("world", 1)):
        out = tmp_path / str(channels)
        assert start(train, *SMALL, "--data", data, "--scenes", 4, "--steps", 1, "--out", out)[0] == 0
        hint = load_file(out / "cache" / "latents.safetensors")["32x32.hint"]
        assert hint.dtype == torch.uint8 and hint.shape == (4, channels, 32, 32) and hint.max() > 150
    grey = training.to_hints(hint)
    assert grey.shape == (4, 3, 32, 32) and grey.max() == 1 and torch.equal(grey[:, 0], grey[:, 2])


def test_drawn_edges_are_of_three_kinds(monkeypatch):
    source = HintedWorld(World(60, 64), "edges")
    share = {}
    for kind in hints.KINDS:
        monkeypatch.setattr(hints, "KINDS", {kind: 1})
        drawn: list[Example] = [source[i] for i in range(60)]
        assert all(set(np.unique(example.hint)) <= {0, 255} for example in drawn)
        share[kind] = np.mean([example.hint.mean() for example in drawn]) / 255
    assert share["things"] < share["outlines"] and share["detected"] < share["outlines"]
    assert np.array_equal(source[3].hint, source[3].hint)
    with pytest.raises(ValueError, match="edges or depth"):
        HintedWorld(World(1, 64), "pose")


def test_erased_parts_are_rectangles_in_some_hints():
    hint = torch.rand(400, 3, 32, 32) * 0.5 + 0.5
    rng = torch.Generator().manual_seed(0)
    erased = erase_parts(hint, 0.25, rng)
    lost = (erased == 0).all(1)
    assert torch.equal((erased == 0).any(1), lost)  # of all channels
    assert torch.equal(erased[erased != 0], hint[erased != 0])
    touched = lost.flatten(1).any(1)
    assert 0.18 < touched.float().mean() < 0.32
    share = lost[touched].float().mean((1, 2))
    assert share.min() > 0.01 and share.max() < 0.75 and 0.1 < share.mean() < 0.4
    assert torch.equal(erase_parts(hint, 0.0, rng), hint)


def test_transparent_hints_are_read_as_they_are_used(tmp_path):
    """White lines on a transparent sheet: what is transparent is black."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.PNG")
    (tmp_path / "a.txt").write_text("a red square")
    sheet = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    sheet.paste((255, 255, 255, 255), (8, 8, 16, 16))
    sheet.save(tmp_path / "a.hint.PNG")
    (example,) = list(HintedFolder(tmp_path, HOW))
    assert example.hint[0, 0].max() == 0 and example.hint[12, 12].min() == 255


def test_images_in_a_folder_called_hints_are_images(tmp_path):
    folder = tmp_path / "hints"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    Image.new("RGB", (32, 32)).save(folder / "a.hint.png")
    (folder / "a.txt").write_text("a red square")
    assert len(HintedFolder(folder, HOW)) == 1
