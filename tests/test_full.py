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
from common import MANIFESTS, Golden, check_norms, error, images, kept, manifest, peak_of, skip_if_slow, unet_norms
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
    with unet_norms(full.unet, SD1) as norms:
        out = full.unet(
            golden["x"], golden["t"], Conditioning(golden.normal("context", (golden["x"].shape[0], 77, 768)))
        )
    check_norms(norms, golden.case["norms"], at_least=28)
    record_property("error", error(out, golden["out"]))
    assert error(out, golden["out"]) < 2e-5


def test_inpainting_model(inpainting_file):
    """Found out from the file alone."""
    sd = StableDiffusion.load(inpainting_file, device="cpu", dtype="float32")
    assert sd.config == SD1_INPAINT
    assert sum(p.numel() for p in sd.unet.parameters()) == 859_535_364
    golden = Golden("unet_v1_inpainting_64x64")
    with unet_norms(sd.unet, SD1_INPAINT) as norms:
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
            *("--ckpt", checkpoint, "--steps", "1", "--seed", "1", "--device", "cpu", "--out", tmp_path),
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
    assert error(kept(full.vae.decode(golden["latent"]), golden["decoded"]), golden["decoded"]) < 2e-5


def test_text_encoder(full):
    golden = Golden("clip_l")
    ids = full.tokenizer(golden.case["prompts"])
    assert torch.equal(ids, golden["ids"].long())
    layers = []
    for block in full.text_encoder.blocks:
        block.register_forward_hook(lambda module, args, out: layers.append(out))
    hidden = full.encode_prompt(golden.case["prompts"])
    assert error(kept(hidden, golden["last_hidden_state"]), golden["last_hidden_state"]) < 1e-5
    rows = [1, 2]  # the case's own description says 1 and 3; its numbers are those of prompts 1 and 2
    normed = full.text_encoder.norm(layers[-2][rows])
    assert error(kept(layers[-2][rows], golden["penultimate"]), golden["penultimate"]) < 1e-5
    assert error(kept(normed, golden["penultimate_ln"]), golden["penultimate_ln"]) < 1e-5


def test_four_steps_through_the_public_api(files):
    golden = Golden("full_v1_ddim_s4")
    sd = StableDiffusion.load(files["fp32.safetensors"], device="cpu", dtype="float32")
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


@pytest.mark.parametrize(
    "name, dtype, tolerance", [("fp16-ema.ckpt", "float32", 1e-2), ("fp16.safetensors", "bfloat16", 5e-2)]
)
def test_half_precision_files(files, name, dtype, tolerance):
    skip_if_slow(dtype)
    golden = Golden("unet_v1_48x80")
    sd = StableDiffusion.load(files[name], device="cpu", dtype=dtype)
    context = golden.normal("context", (1, 77, 768)).to(sd.dtype)
    assert (
        error(sd.unet(golden["x"].to(sd.dtype), golden["t"], Conditioning(context)).float(), golden["out"]) < tolerance
    )


def test_float16_networks(files):
    """As they run on GPUs; some CPUs can do it too, slowly, so on small inputs."""
    skip_if_slow("float16")
    sd = StableDiffusion.load(files["fp16.safetensors"], device="cpu", dtype="float16")
    golden = Golden("vae_64x64_b2")
    assert error(sd.vae.decode(golden["latent"].half()).float(), golden["decoded"]) < 1e-2
    golden = Golden("clip_l")
    hidden = sd.text_encoder(golden["ids"].long()).hidden.float()
    assert error(kept(hidden, golden["last_hidden_state"]), golden["last_hidden_state"]) < 1e-2
    golden = Golden("unet_v1_48x80")
    out = sd.unet(golden["x"].half(), golden["t"], Conditioning(golden.normal("context", (1, 77, 768)).half()))
    assert error(out.float(), golden["out"]) < 1e-2


@pytest.mark.parametrize(
    "name, side", [("fp32-ema.ckpt", 128), ("fp16-ema.ckpt", 512), ("fp32.safetensors", 128), ("fp16.safetensors", 128)]
)
def test_script_on_a_real_prompt(files, name, side, tmp_path):
    """512x512 is the default; the other files are told apart by a small image as well."""
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "txt2img.py", "a photograph of an astronaut riding a horse"),
            *("--ckpt", files[name], "--steps", "2", "--seed", "1", "--device", "cpu", "--out", tmp_path),
            *(() if side == 512 else ("--height", str(side), "--width", str(side))),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "00001.png") as image:
        assert image.size == (side, side) and np.asarray(image).std() > 5
        assert f"Seed: 1, Size: {side}x{side}" in image.text["parameters"]


SAVED = 0.35e9  # bytes at least: in bfloat16, the text encoder and the VAE are 0.41 GB


def peak_memory(checkpoint: Path, dtype: str, out: Path, *more: str) -> int:
    """The peak of txt2img.py in bytes, over two small images."""
    command = [
        sys.executable,
        ROOT / "scripts" / "txt2img.py",
        "a lighthouse",
        "--ckpt",
        checkpoint,
        "--dtype",
        dtype,
        "--no-cache",
    ]
    command += ["--n", "2", "--steps", "1", "--height", "256", "--width", "256", "--seed", "1", "--device", "cpu"]
    peak = peak_of([*command, "--out", out, *more])
    assert len(list(out.glob("*.png"))) == 2
    return peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory as Linux reports it")
@pytest.mark.parametrize("name, dtype", [("fp16.safetensors", "bfloat16"), ("fp32-ema.ckpt", "float32")])
def test_peak_memory(files, name, dtype, tmp_path, record_property):
    """The weights once in the requested precision, a tenth of them (upsampling kernels, in two forms), and 1 GB.

    With --low-memory those of the U-Net alone. Nothing is held twice, and the moving average is not read.
    """
    skip_if_slow(dtype, passes=6)  # of the program, twice
    networks = build(SD1)
    size = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    bytes_each = 2 if dtype == "bfloat16" else 4
    plain = peak_memory(files[name], dtype, tmp_path / "plain")
    low = peak_memory(files[name], dtype, tmp_path / "low", "--low-memory")
    record_property("peaks", (plain, low))
    assert plain < 1.1 * bytes_each * sum(size.values()) + 2**30
    assert low < 1.1 * bytes_each * size["unet"] + 2**30
    assert plain - low >= SAVED, f"peak of {plain / 1e9:.2f} GB, and of {low / 1e9:.2f} GB with --low-memory"
