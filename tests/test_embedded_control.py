"""The control network of the embedded model, as it comes with the project: what it is, and that images obey it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from scripts.common.edges import agreement
from scripts.evaluation.control import cases, edges_of
from sd import StableDiffusion
from sd.config import POCKET
from sd.control_config import ControlConfig
from sd.models.controlnet import ControlNet
from sd.params import Control
from sd.resources import EMBEDDED_CONTROLS, EMBEDDED_LORA, resource

FILE = resource(EMBEDDED_CONTROLS["edges"])
LIMIT = 6_000_000  # bytes


@pytest.fixture(scope="module")
def network() -> ControlNet:
    with safe_open(FILE, "pt") as file:
        control = ControlNet(ControlConfig.from_json(file.metadata()["sd.control"]))
    control.load_state_dict({name.removeprefix("control."): value.float() for name, value in load_file(FILE).items()})
    return control


def test_it_is_small_and_for_the_embedded_model(network):
    assert FILE.stat().st_size < LIMIT
    config = network.control_config
    assert config.name == "edges" and config.fits(POCKET.unet) and config.factor == POCKET.vae.factor
    assert not config.attends
    tensors = load_file(FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert all(name.startswith("control.") for name in tensors)
    assert all(layer.weight.any() for layer in (*network.zero, network.zero_mid, network.hint.convs[-1]))


@pytest.mark.parametrize(
    "steps",
    [pytest.param(4, id="LoRA, 4 steps"), pytest.param(12, id="12 steps", marks=pytest.mark.exhaustive)],
)
def test_images_obey_their_hints(steps):
    """On new scenes: with their hints, edges are where they should be; at scale 0 they are elsewhere."""
    model = StableDiffusion.load(device="cpu", dtype="float32")
    if steps == 4:
        model.add_loras([resource(EMBEDDED_LORA)], note=lambda text: None)
    name = model.add_control("edges")
    chosen = cases("unseen", 8 if steps == 4 else 3)
    obeyed, ignored = [], []
    for i, case in enumerate(chosen):
        hint = case.hints["detected"]
        image = Image.fromarray(hint)
        for scale, found in ((1.0, obeyed), (0.0, ignored)):
            controls = Control(name, image, scale)
            generated = model.txt2img(case.told.text, controls=controls, steps=steps, seed=i)[0]
            found.append(agreement(edges_of(generated), hint))
    assert np.mean(obeyed) > 0.8
    assert np.mean(ignored) < np.mean(obeyed) - 0.15


def test_the_sample_hint_is_white_lines_on_black():
    with Image.open(resource("data/sample-edges.png")) as image:
        pixels = np.asarray(image)
        assert image.size == (128, 128) and image.mode == "L"
    assert set(np.unique(pixels)) == {0, 255} and 0.03 < (pixels > 0).mean() < 0.2
