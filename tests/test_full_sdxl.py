"""Full size: SDXL with the reference weights, against the original's recorded outputs.

As test_full.py for 1.x. In float32 the networks are tested one by one, as the U-Net alone has 10 GB; the whole model is
loaded from a float16 file, as it was published, in bfloat16.
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
from common import Golden, check_norms, error, manifest, peak_of, unet_norms
from PIL import Image
from torch import nn

from sd import StableDiffusion
from sd.checkpoints.convert import convert
from sd.checkpoints.loading import load_weights
from sd.conditioning import Conditioning
from sd.config import SDXL, SDXL_REFINER, Config
from sd.models.build import build
from sd.runtime.device import best_dtype

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PREFIXES = {
    "unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}  # fmt: skip


def network(name: str, config: Config, file: str = "sdxl-base") -> nn.Module:
    """One network of a file, in float32."""
    own = {key: entry for key, entry in manifest(file).items() if key.startswith(PREFIXES[name])}
    state = convert(reference.make_state_dict(own), config, parts=[name])[name]
    return load_weights(build(config)[name], state, CPU, torch.float32)


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in build(SDXL).items()}
    last = 7_087_872  # the last layer of CLIP-L, which is never run; and bigG has a scale, which no network needs
    assert counts == {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480 - last, "text_encoder_2": 694_659_841 - 1,
    }  # fmt: skip
    assert sum(p.numel() for p in build(SDXL_REFINER)["unet"].parameters()) == 2_259_526_660


def test_text_encoders():
    golden = Golden("sdxl_clip_l")
    assert error(network("text_encoder", SDXL)(golden["ids"].long()).hidden, golden["hidden_11"]) < 1e-5
    golden = Golden("sdxl_bigg")
    hidden, pooled = network("text_encoder_2", SDXL)(golden["ids"].long())
    assert error(hidden, golden["penultimate"]) < 1e-5 and error(pooled, golden["pooled"]) < 1e-5


@pytest.mark.parametrize(
    ("config", "file", "names"),
    [
        pytest.param(SDXL, "sdxl-base", ["unet_sdxl_24x40", "unet_sdxl_32x32_b2"], id="base"),
        pytest.param(SDXL_REFINER, "sdxl-refiner", ["unet_sdxl_refiner_24x32"], id="refiner"),
    ],
)
def test_unet(config, file, names):
    unet = network("unet", config, file)
    for name in names:
        golden = Golden(name)
        context = golden.normal("context", (len(golden["x"]), 77, config.unet.context))
        t = torch.tensor(golden.case["t"])
        with unet_norms(unet, config) as norms:
            out = unet(golden["x"], t, Conditioning(context, golden["y"]))
        check_norms(norms, golden.case["norms"], at_least=20)
        assert error(out, golden["out"]) < 2e-5


# ----------------------------------------------------------------------------------------------------- the whole model


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The base model as it was published: one file of float16 under the original's names."""
    path = tmp_path_factory.mktemp("sdxl") / "sd_xl_base_1.0.safetensors"
    write_file(path, "sdxl-base")
    yield path
    path.unlink()


def write_file(path: Path, name: str) -> None:
    """In a function of its own, so that its 7 GB of tensors are gone when it returns."""
    state = {}
    for key, entry in manifest(name).items():
        (tensor,) = reference.make_state_dict({key: entry}).values()
        state[key] = tensor.half() if tensor.is_floating_point() else tensor
    reference.save(path, state)


def test_a_published_file_makes_images(file, tmp_path):
    """Through the program: 512x512, two steps with guidance, in the best precision of the processor."""
    command = [sys.executable, "scripts/txt2img.py", "a red cube", "--ckpt", file, "--steps", "2", "--seed", "1"]
    command += ["--height", "512", "--width", "512", "--out", tmp_path, "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (image,) = map(Image.open, tmp_path.glob("*.png"))
    pixels = np.asarray(image).astype(float)
    assert image.size == (512, 512) and pixels.std() > 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory as Linux reports it")
@pytest.mark.skipif(best_dtype(CPU) != torch.bfloat16, reason="this processor does not compute in bfloat16")
def test_peak_memory(file, tmp_path, record_property):
    """At 1024x1024 in bfloat16: the weights once, and 2.5 GB; with --low-memory, those of the U-Net alone."""
    command = [sys.executable, ROOT / "scripts" / "txt2img.py", "a red cube", "--negative", "blue", "--ckpt", file]
    command += ["--no-cache", "--steps", "1"]
    command += ["--seed", "1", "--device", "cpu", "--dtype", "bfloat16"]
    plain, low = (peak_of([*command, "--out", tmp_path, *more]) for more in ((), ("--low-memory",)))
    record_property("peaks", (plain, low))
    size = {name: 2 * sum(p.numel() for p in network.parameters()) for name, network in build(SDXL).items()}
    assert plain < sum(size.values()) + 2.5e9, f"peak of {plain / 1e9:.2f} GB"
    assert low < size["unet"] + 2.5e9, f"peak of {low / 1e9:.2f} GB"


def test_half_precision_of_the_whole_model(file):
    """The same contexts and prediction as in float32, up to the precision of the processor's fastest type."""
    dtype = best_dtype(CPU)
    model = StableDiffusion.load(file, device="cpu", dtype=dtype)
    assert model.config == SDXL
    limit = 5e-2 if dtype == torch.bfloat16 else 1e-2  # the weights are float16's
    golden = Golden("sdxl_bigg")
    text = model.encode_texts(golden.case["prompts"])
    assert error(text.hidden[..., 768:].float(), golden["penultimate"]) < limit
    assert error(text.hidden[..., :768].float(), Golden("sdxl_clip_l")["hidden_11"]) < limit
    golden = Golden("unet_sdxl_32x32_b2")
    context = golden.normal("context", (2, 77, 2048))
    out = model.predict(golden["x"], torch.tensor(golden.case["t"]), Conditioning(context, golden["y"]))
    assert error(out.float(), golden["out"]) < limit


def test_info_names_it(file):
    done = subprocess.run(
        [sys.executable, "scripts/convert.py", file, "--info"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = json.dumps(done.stdout.splitlines())
    assert "SDXL base, 1024x1024" in lines and "second text encoder" in lines and "2567.5 M" in lines
