"""Full size: Stable Diffusion 1.x with the reference weights, against the original's recorded outputs.

`pytest --full` runs these; they need 12 GB of memory, 20 GB of disk, and minutes. The files are made as a user has
them: original names, .ckpt and .safetensors, float32 and float16, with and without the moving average.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import MANIFESTS, Golden, check_norms, error, images, manifest, unet_norms
from PIL import Image

from sd import StableDiffusion
from sd.conditioning import Conditioning
from sd.config import SD1, SD1_INPAINT
from sd.models.build import build
from sd.resources import resource

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Four checkpoints of the same weights."""
    paths = write_files(tmp_path_factory.mktemp("full"))
    yield paths
    for path in paths.values():
        path.unlink()


def write_files(folder: Path) -> dict[str, Path]:
    """In a function of its own, so that its 8 GB of tensors are gone when it returns."""
    state = reference.make_state_dict(reference.with_ema(manifest("sd-v1")))
    plain = {key: tensor for key, tensor in state.items() if not key.startswith(reference.EMA_PREFIX)}
    fingerprints = json.loads((MANIFESTS / "fingerprints.json").read_text())
    assert reference.fingerprint(plain) == fingerprints["sd-v1"]
    reference.save(folder / "fp32-ema.ckpt", state)
    reference.save(folder / "fp32.safetensors", plain)
    for key, tensor in state.items():
        state[key] = tensor.half() if tensor.is_floating_point() else tensor
    reference.save(folder / "fp16-ema.ckpt", state)
    reference.save(folder / "fp16.safetensors", {key: state[key] for key in plain})
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def full(files) -> StableDiffusion:
    """The model from the file that holds most that is not needed: float32 with the moving average beside it."""
    return StableDiffusion.load(files["fp32-ema.ckpt"], device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def inpainting_file(tmp_path_factory) -> Path:
    """The inpainting model as it was published: one .ckpt, with the original's names."""
    path = tmp_path_factory.mktemp("inpainting") / "sd-v1-5-inpainting.ckpt"
    reference.save(path, reference.make_state_dict(manifest("sd-v1-inpainting")))
    yield path
    path.unlink()


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in build(SD1).items()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


@pytest.mark.parametrize("name", ["unet_v1_64x64_b2", "unet_v1_48x80"])
def test_unet(full, name, record_property):
    golden = Golden(name)
    norms = unet_norms(full.unet, SD1)
    out = full.unet(golden["x"], golden["t"], Conditioning(golden.normal("context", (golden["x"].shape[0], 77, 768))))
    check_norms(norms, golden.case["norms"], at_least=28)
    record_property("error", error(out, golden["out"]))
    assert error(out, golden["out"]) < 2e-5


def test_inpainting_model(inpainting_file):
    """Found out from the file alone."""
    sd = StableDiffusion.load(inpainting_file, device="cpu", dtype="float32")
    assert sd.config == SD1_INPAINT
    assert sum(p.numel() for p in sd.unet.parameters()) == 859_535_364
    golden = Golden("unet_v1_inpainting_64x64")
    norms = unet_norms(sd.unet, SD1_INPAINT)
    out = sd.unet(golden["x"], golden["t"], Conditioning(golden.normal("context", (1, 77, 768))))
    check_norms(norms, golden.case["norms"], at_least=28)
    assert error(out, golden["out"]) < 2e-5


@pytest.mark.parametrize("file", ["inpainting", "plain"])
def test_inpainting_script(request, file, tmp_path):
    """At full size, with an inpainting model and with any other: outside of the mask no pixel changes."""
    found = request.getfixturevalue("inpainting_file" if file == "inpainting" else "files")
    checkpoint = found if file == "inpainting" else found["fp16.safetensors"]
    sample, mask = resource("data/sample.png"), resource("data/sample-mask.png")
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "inpaint.py", "a purple tree", sample, mask),
            *("--ckpt", checkpoint, "--steps", "2", "--seed", "1", "--device", "cpu", "--out", tmp_path),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "00001.png") as image, Image.open(sample) as before, Image.open(mask) as hole:
        changed = (np.asarray(image) != np.asarray(before)).any(axis=-1)
        kept = np.asarray(hole.convert("L")) == 0
        assert image.size == before.size and not changed[kept].any() and changed[~kept].mean() > 0.5


@pytest.mark.parametrize("name", ["vae_256x320", "vae_64x64_b2"])
def test_vae(full, name):
    golden = Golden(name)
    picture = images(golden["image_u8"])
    moments = torch.cat(full.vae.moments(picture), dim=1)
    assert error(moments, golden["moments"]) < 2e-5
    noise = reference.normal(f"{name}/posterior", golden["z"].shape)
    assert error(full.vae.encode(picture).sample(noise), SD1.vae.scale * golden["z"]) < 2e-5
    assert error(full.vae.decode(golden["latent"]), golden["decoded"]) < 2e-5


def test_text_encoder(full):
    golden = Golden("clip_l")
    ids = full.tokenizer(golden.case["prompts"])
    assert torch.equal(ids, golden["ids"].long())
    layers = []
    for block in full.text_encoder.blocks:
        block.register_forward_hook(lambda module, args, out: layers.append(out))
    assert error(full.encode_prompt(golden.case["prompts"]), golden["last_hidden_state"]) < 1e-5
    rows = [1, 2]  # the case's own description says 1 and 3; its numbers are those of prompts 1 and 2
    assert error(layers[-2][rows], golden["penultimate"]) < 1e-5
    assert error(full.text_encoder.norm(layers[-2][rows]), golden["penultimate_ln"]) < 1e-5


@pytest.mark.parametrize("name", ["fp32-ema.ckpt", "fp32.safetensors"])
def test_four_steps_through_the_public_api(files, name):
    golden = Golden("full_v1_ddim_s4")
    sd = StableDiffusion.load(files[name], device="cpu", dtype="float32")
    context = sd.encode_prompt(golden.case["prompts"][:1])
    uncond = sd.encode_prompt([golden.case["negative"]])
    assert error(context, golden["cond"]) < 1e-5 and error(uncond, golden["uncond"]) < 1e-5
    levels = sd.schedule.levels(golden.case["steps"], "leading")
    assert [level.t for level in levels[:-1]] == golden.case["t_calls"]
    steps = list(sd.sample(sd.denoiser(context, uncond, golden.case["scale"]), golden["x_T"], levels, "ddim"))
    for i in range(3):
        assert error(steps[i].x, golden[f"mid.after_step_{i + 1}"]) < 1e-4
    assert error(steps[0].x0, golden["mid.pred_x0_step_1"]) < 1e-4
    assert error(steps[-1].x, golden["out"]) < 1e-4


@pytest.mark.parametrize("name", ["fp16-ema.ckpt", "fp16.safetensors"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-2), ("bfloat16", 5e-2)])
def test_half_precision_files(files, name, dtype, tolerance):
    golden = Golden("unet_v1_48x80")
    sd = StableDiffusion.load(files[name], device="cpu", dtype=dtype)
    context = golden.normal("context", (1, 77, 768)).to(sd.dtype)
    assert (
        error(sd.unet(golden["x"].to(sd.dtype), golden["t"], Conditioning(context)).float(), golden["out"]) < tolerance
    )


def test_float16_networks(files):
    """As they run on GPUs; the CPU can do it, slowly, so on small inputs."""
    sd = StableDiffusion.load(files["fp16.safetensors"], device="cpu", dtype="float16")
    golden = Golden("vae_64x64_b2")
    assert error(sd.vae.decode(golden["latent"].half()).float(), golden["decoded"]) < 1e-2
    golden = Golden("clip_l")
    assert error(sd.text_encoder(golden["ids"].long()).hidden.float(), golden["last_hidden_state"]) < 1e-2
    golden = Golden("unet_v1_48x80")
    out = sd.unet(golden["x"].half(), golden["t"], Conditioning(golden.normal("context", (1, 77, 768)).half()))
    assert error(out.float(), golden["out"]) < 1e-2


@pytest.mark.parametrize("name", ["fp32-ema.ckpt", "fp16-ema.ckpt", "fp32.safetensors", "fp16.safetensors"])
def test_script_on_a_real_prompt(files, name, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "txt2img.py", "a photograph of an astronaut riding a horse"),
            *("--ckpt", files[name], "--steps", "2", "--seed", "1", "--device", "cpu", "--out", tmp_path),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "00001.png") as image:
        assert image.size == (512, 512) and np.asarray(image).std() > 5
        assert "Seed: 1, Size: 512x512" in image.text["parameters"]


PAINT = """
import re
import sys

import sd

name, dtype, low = sys.argv[1:]
model = sd.StableDiffusion.load(name, device="cpu", dtype=dtype, low_memory=low == "low")
for seed in range(2):
    model.txt2img("a lighthouse", steps=1, height=256, width=256, seed=seed)
# not resource.getrusage: a child begins with its parent's peak
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory as Linux reports it")
@pytest.mark.parametrize("low", ["all at once", "low"])
@pytest.mark.parametrize("name, dtype", [("fp16.safetensors", "bfloat16"), ("fp32-ema.ckpt", "float32")])
def test_peak_memory_of_painting(files, name, dtype, low):
    """The weights once in the precision asked for, a tenth of them (kernels of enlargements, in two forms), and 1 GB.

    With low memory those of the U-Net. Nothing is held twice, no EMA half is read.
    """
    out = subprocess.run(
        [sys.executable, "-c", PAINT, files[name], dtype, low], cwd=ROOT, capture_output=True, text=True, check=True
    )
    networks = build(SD1)
    held = [networks["unet"]] if low == "low" else networks.values()
    weights = sum(p.numel() for network in held for p in network.parameters()) * (2 if dtype == "bfloat16" else 4)
    assert int(out.stdout) < 1.1 * weights + 2**30
