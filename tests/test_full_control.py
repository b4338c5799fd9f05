"""Full size: ControlNets for SD 1.5 and 2.1 with the reference weights, against the original's recorded outputs.

As test_full.py for the models themselves; and one image through the program, from the kinds of files people have.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import Golden, error, manifest
from control_common import hint_of, lines
from PIL import Image
from torch import Tensor, nn

from sd.checkpoints.control_files import load_control
from sd.checkpoints.convert import convert
from sd.checkpoints.loading import load_weights
from sd.conditioning import Conditioning
from sd.config import SD1, SD2_V, Config
from sd.control import AppliedControl, controlled
from sd.models.build import build
from sd.models.controlnet import ControlNet

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# control network -> manifest of the model, its config, goldens, parameters
NETWORKS = {
    "controlnet-sd15": ("sd-v1", SD1, ("control_v15_24x40", "control_v15_32x32_b2"), 361_279_120),
    "controlnet-sd21": ("sd-v2-768-v", SD2_V, ("control_v21_32x24",), 364_228_240),
}


def unet_of(model: str, config: Config) -> nn.Module:
    """The U-Net of a manifest, in float32."""
    prefix = "model.diffusion_model."
    own = {key: entry for key, entry in manifest(model).items() if key.startswith(prefix)}
    state = convert(reference.make_state_dict(own), config, parts=["unet"])["unet"]
    return load_weights(build(config)["unet"], state, CPU, torch.float32)


@pytest.fixture(scope="module", params=NETWORKS)
def full(request, tmp_path_factory):
    """U-Net, control network from a file without a prefix, goldens, and the number of parameters."""
    model, config, goldens, count = NETWORKS[request.param]
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    reference.save(path, reference.make_state_dict(manifest(request.param), "control_model.", strip=True))
    control, _ = load_control(path, config, CPU, torch.float32)
    path.unlink()
    return unet_of(model, config), control, [Golden(name) for name in goldens], count


def test_parameters(full):
    _, control, _, count = full
    assert sum(p.numel() for p in control.parameters()) == count and len(control.state_dict()) == 340


def recorded_residuals(golden: Golden, down: tuple[Tensor, ...], middle: Tensor) -> dict[str, Tensor]:
    every_16th = {f"control_{i}_c16": down[i][:, ::16] for i in (0, 5)}
    return {**every_16th, "control_11": down[11], "control_12": middle}


def test_residuals_and_predictions(full):
    unet, control, goldens, _ = full
    for golden in goldens:
        batch, _, h, w = golden["eps"].shape
        x = golden.normal("x", (batch, 4, h, w))
        context = golden.normal("context", (batch, 77, unet.config.context))
        hint, t = hint_of(golden, (batch, 3, 8 * h, 8 * w)), torch.tensor(golden.case["t"], dtype=torch.float32)
        with torch.no_grad():
            features = control.embed(hint)
            assert error(features[:, ::16], golden["guided_hint_c16"]) < 1e-5
            residuals = control(x, t, Conditioning(context), features)
            for name, residual in recorded_residuals(golden, *residuals).items():
                assert error(residual, golden[name]) < 1e-5, name
            norms = [float(residual.double().norm()) for residual in (*residuals.down, residuals.middle)]
            assert norms == pytest.approx([norm for _, norm, _ in golden.case["norms_residuals"]], rel=1e-4)

            def prediction(control: ControlNet, scale=1.0, soft=False):
                applied = AppliedControl(control, control.embed, hint, scale, soft=soft)  # noqa: B023
                return controlled(unet, [applied])(x, t, Conditioning(context))  # noqa: B023

            assert error(prediction(control), golden["eps"]) < 2e-5
            assert error(prediction(control, 0.6), golden["eps_strength_06"]) < 2e-5
            assert error(prediction(control, soft=True), golden["eps_guess"]) < 2e-5
            assert error(prediction(control, 0.0), golden["eps_plain"]) < 2e-5


def test_an_image_from_a_whole_training_checkpoint(tmp_path):
    """`control_sd15_*.pth` holds a whole model beside the control network; and 768x512 pixels in bfloat16."""
    model = reference.make_state_dict(manifest("sd-v1"))
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in model.items()}
    reference.save(tmp_path / "v1-5.safetensors", half)
    own = reference.make_state_dict(manifest("controlnet-sd15"))
    whole = {**half, "logvar": torch.zeros(1000), **{key: tensor.half() for key, tensor in own.items()}}
    torch.save({"state_dict": whole}, tmp_path / "control_sd15_canny.pth")
    lines(384, 256).save(tmp_path / "hint.png")
    command = [sys.executable, ROOT / "scripts" / "txt2img.py", "a house", "--ckpt", tmp_path / "v1-5.safetensors"]
    command += ["--steps", "2", "--seed", "1", "--width", "768", "--height", "512"]
    command += ["--dtype", "bfloat16", "--no-cache"]
    images = {}
    for name, more in (
        ("plain", []),
        ("controlled", ["--control", f"{tmp_path / 'control_sd15_canny.pth'}={tmp_path / 'hint.png'}:0.8"]),
    ):
        done = subprocess.run(
            [*map(str, [*command, "--out", tmp_path / name]), *more], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / name / "00001.png") as image:
            images[name] = np.asarray(image.convert("RGB")).astype(int)
    assert images["plain"].shape == (512, 768, 3)
    assert np.abs(images["plain"] - images["controlled"]).mean() > 1
    for path in tmp_path.glob("*.*"):
        path.unlink()
