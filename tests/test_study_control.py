"""The study of control networks: the log of a training, images by scale, steps and mode, norms of residuals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from common import TINY, TINY_INPAINT, TINY_XL, tiny_state
from conftest import loaded
from PIL import Image, ImageChops

from sd.config import POCKET, SD1, SDXL, Config
from sd.control_params import Control
from sd.models.controlnet import ControlConfig, ControlNet
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion
from sd.study import control

SETTINGS = SamplingParams(steps=4, sampler="ddim", spacing="trailing", seed=1)
HINT = Image.linear_gradient("L")


def model_of(name: str, config: Config, **values) -> StableDiffusion:
    """A small model with a control network of random weights, called "lines"."""
    model = StableDiffusion(config, **loaded(tiny_state(name), config))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_control(ControlNet(ControlConfig.of(config.unet, **values)), "lines")
    return model


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return model_of("tiny-v1", TINY)


# ------------------------------------------------------------------------------------------ the log


def test_forms_of_a_log(tmp_path):
    """Lines of a training, these as a list, or columns: the same."""
    rows = [{"step": 50 * i, "loss": 1 / i, "lr": 1e-3, "zero": [0.1 * i, 0.2]} for i in (1, 2, 3)]
    columns = {"steps": [50, 100, 150], "loss": [1, 1 / 2, 1 / 3], "zero": [row["zero"] for row in rows]}
    logs = []
    for text in ("\n".join(map(json.dumps, rows)) + "\n", json.dumps(rows, indent=1), json.dumps(columns)):
        (tmp_path / "log").write_text(text, encoding="utf-8")
        logs.append(control.read_log(tmp_path / "log"))
    assert logs[0] == logs[1] == logs[2] and logs[0].steps == [50, 100, 150] and logs[0].zero[2] == [0.1 * 3, 0.2]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "hello", "3", '{"step": 1, "loss": 2}', '[{"step": 1, "loss": 0.1, "zero": 3}]',
             '[{"step": 1, "loss": 0.1, "zero": [1]}, {"step": 2, "loss": 0.1, "zero": [1, 2]}]',
             '{"steps": [1, 2], "loss": [1], "zero": [[1]]}'],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"train.jsonl: not the log of the training of a control network") as refused:
        control.read_log(tmp_path / "train.jsonl")
    assert "\n" not in str(refused.value)


def test_the_curves_of_a_log():
    """One for each residual, in its colour; a wrong number of names is refused."""
    log = control.TrainingLog([100, 200], [0.3, 0.2], [[0.1, 0.0], [0.2, 0.1]])
    drawn = control.draw_zero_convolutions(log, ["fine", "coarse"])
    colours = {colour for _, colour in drawn.getcolors(1 << 18)}
    assert set(control_colours(2)) <= colours and control_colours(3)[2] not in colours
    assert control.draw_zero_convolutions(log).size != (0, 0)
    with pytest.raises(ValueError, match="a network with 2 zero convolutions, and this one has 3"):
        control.draw_zero_convolutions(log, ["a", "b", "c"])
    assert control.averaged([1.0, 3.0, 5.0], 2) == [1, 2, 4]


def control_colours(n: int) -> list[tuple[int, int, int]]:
    from sd.study.drawing import SERIES

    return list(SERIES[:n])


@pytest.mark.parametrize("config", [POCKET, TINY, SD1, SDXL], ids=["pocket", "tiny", "sd1", "sdxl"])
def test_each_residual_has_a_name(config):
    with torch.device("meta"):
        network = ControlNet(ControlConfig.of(config.unet))
    names = control.residual_names(config.unet)
    assert len(names) == len(set(names)) == len(network.zero) + 1 and names[-1] == "middle"
    if config == SD1:
        assert names[1:5] == ["level 0, block 1", "level 0, block 2", "level 0, halved", "level 1, block 1"]


# ------------------------------------------------------------------------------------------ images


@pytest.mark.exhaustive
def test_images_by_scale_steps_and_mode(tiny, monkeypatch):
    """Each of the requests once; the same setting in two rows is the same image."""
    asked, prepare = [], tiny.prepare
    monkeypatch.setattr(tiny, "prepare", lambda request, *more: asked.append(request) or prepare(request, *more))
    seen = control.controlled_images(tiny, "a house", Control("lines", HINT), SETTINGS, scales=(0.0, 1.0))
    assert list(seen.rows) == ["scale", "steps", "mode"] and list(seen.rows["mode"]) == list(control.MODES)
    controls = [request.controls for request in asked]
    assert sum(not each for each in controls) == 1 and len(asked) == 1 + 2 + 2 + 2
    assert {(c.scale, c.start, c.end, c.mode) for (c,) in filter(None, controls)} == {
        (0, 0, 1, "balanced"), (1, 0, 1, "balanced"), (1, 0, 0.3, "balanced"), (1, 0, 0.6, "balanced"),
        (1, 0, 1, "prompt"), (1, 0, 1, "control"),
    }  # fmt: skip
    plain = tiny.txt2img("a house", steps=4, sampler="ddim", spacing="trailing", seed=1)[0]
    assert seen.plain == plain == seen.rows["scale"]["0"]
    whole = seen.rows["scale"]["1"]
    assert whole is seen.rows["steps"]["0 to 1"] is seen.rows["mode"]["balanced"] and whole != plain
    others = [seen.rows["steps"]["0 to 0.6"], seen.rows["mode"]["prompt"], seen.rows["mode"]["control"]]
    assert all(ImageChops.difference(each, whole).getbbox() for each in others)
    assert seen.hint.size == (tiny.config.size,) * 2
    drawn = control.draw_controlled(seen, "a house")
    assert drawn.width > 4 * 128


# ------------------------------------------------------------------------------------------ residuals


def test_norms_of_known_residuals(tiny):
    """Zero convolutions that give a constant in every channel, whatever they see."""
    model = model_of("tiny-v1", TINY)
    network = model.control_network("lines").network
    layers = [*network.zero, network.zero_mid]
    for i, layer in enumerate(layers):
        layer.weight.zero_()
        layer.bias.fill_(i)
    seen = control.residual_norms(model, "a house", Control("lines", HINT), SETTINGS, points=2)
    assert len(seen.levels) == len(seen.x0) == 2 and seen.levels[0].t > seen.levels[1].t
    assert len(seen.names) == len(layers)
    skips = []
    with torch.no_grad():
        x = torch.zeros(1, *model.latent_shape())
        first, time, context = model.unet.begin(x, torch.tensor([1.0]), model.conditioning([""]))
        skips = model.unet.contract(first, time, context)
    for maps, shares in zip(seen.maps, seen.shares, strict=True):
        for i, (each, share) in enumerate(zip(maps, shares, strict=True)):
            assert torch.allclose(each, torch.full_like(each, i * math.sqrt(layers[i].out_channels)), atol=1e-4)
            assert (share == 0) == (i == 0)
        assert [each.shape for each in maps[:-1]] == [skip.shape[-2:] for skip in skips]
    assert control.draw_residuals(model, seen).width > 104 * (len(layers) + 1)


def test_shares_are_relative_to_what_is_added_to(tiny):
    """A control network that copies the U-Net, sees no hint and has identities as zero convolutions: exactly 1."""
    model = model_of("tiny-v1", TINY)
    network = model.control_network("lines").network
    network.load_state_dict(model.unet.state_dict(), strict=False)
    for layer in [*network.zero, network.zero_mid]:
        layer.weight.copy_(torch.eye(layer.out_channels)[:, :, None, None])
        layer.bias.zero_()
    network.hint.convs[-1].weight.zero_()
    network.hint.convs[-1].bias.zero_()
    seen = control.residual_norms(model, "a house", Control("lines", HINT), SETTINGS, points=1)
    assert seen.shares[0] == pytest.approx([1.0] * len(seen.names), rel=1e-4)


@pytest.mark.exhaustive
def test_networks_of_other_kinds():
    """Residuals that are averaged over all positions, and an inpainting model."""
    model = model_of("tiny-v1-inpainting", TINY_INPAINT, pooled=True)
    seen = control.residual_norms(model, "a house", Control("lines", HINT), SETTINGS, points=1)
    side = model.latent_shape()[-1]
    assert seen.maps[0][0].shape == (side, side) and float(seen.maps[0][0].std()) < 1e-5
    assert all(math.isfinite(share) and share > 0 for share in seen.shares[0])

    network = model.control_network("lines").network
    last = [*network.zero, network.zero_mid]
    for layer in last:
        layer.weight.zero_()
        layer.bias.fill_(2.0)
    constant = control.residual_norms(model, "a house", Control("lines", HINT), SETTINGS, points=1)
    for layer in last:  # the same added everywhere, but not averaged first
        layer.bias.fill_(4.0)
    network.control_config = replace(network.control_config, pooled=False)
    twice = control.residual_norms(model, "a house", Control("lines", HINT), SETTINGS, points=1)
    assert twice.shares[0] == pytest.approx([2 * share for share in constant.shares[0]], rel=1e-3)


@pytest.mark.exhaustive
def test_sdxl():
    """Which is told a vector: the U-Net and the control network see the same."""
    model = model_of("tiny-sdxl", replace(TINY_XL, size=64))
    seen = control.residual_norms(model, "a house", Control("lines", HINT), replace(SETTINGS, steps=2), points=2)
    assert len(seen.shares) == 2 and all(share > 0 for shares in seen.shares for share in shares)
    images = control.controlled_images(
        model, "a house", Control("lines", HINT), replace(SETTINGS, steps=2), scales=(1.0,), spans=((0.0, 0.5),)
    )
    assert images.rows["scale"]["1"] != images.plain != images.rows["steps"]["0 to 0.5"]
