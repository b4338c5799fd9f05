"""Full size: Stable Diffusion 2.x with the reference weights, against the original's recorded outputs.

As test_full.py for 1.x. The files are made as people have them: base and 768-v with the same weights and a .yaml
beside them or nothing, .ckpt and .safetensors, float32 and float16, with a moving average and without.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reference_weights as reference
import torch
from common import MANIFESTS, Golden, check_norms, error, kept, manifest, skip_if_slow, unet_norms

from sd import StableDiffusion
from sd.checkpoints.checkpoint import load_checkpoint
from sd.checkpoints.detect import identify
from sd.conditioning import Conditioning
from sd.config import SD2, SD2_INPAINT, SD2_V
from sd.models.build import build

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the same weights; of the 768-v model, float32 with the moving average and float16 without."""
    folder = tmp_path_factory.mktemp("full")
    write_files(folder)
    yield {path.name: path for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()


def write_files(folder: Path) -> None:
    """In a function of its own, so that its 9 GB of tensors are gone when it returns."""
    state = reference.make_state_dict(reference.with_ema(manifest("sd-v2-768-v")))
    plain = {key: tensor for key, tensor in state.items() if not key.startswith(reference.EMA_PREFIX)}
    fingerprints = json.loads((MANIFESTS / "fingerprints.json").read_text())
    assert reference.fingerprint(plain) == fingerprints["sd-v2-768-v"]
    reference.save(folder / "v2-1_768-ema-pruned.ckpt", state)
    for key, tensor in state.items():
        state[key] = tensor.half() if tensor.is_floating_point() else tensor
    reference.save(folder / "v2-fp16.safetensors", {key: state[key] for key in plain})
    yaml = 'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "v"\n'
    (folder / "v2-1_768-ema-pruned.yaml").write_text(yaml)


@pytest.fixture(scope="module")
def full(files) -> StableDiffusion:
    return StableDiffusion.load(files["v2-1_768-ema-pruned.ckpt"], device="cpu", dtype="float32")


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in build(SD2).items()}
    text = 354_032_641 - 12_596_224 - 1024 * 1024 - 1  # without the last layer, the projection, the scale
    assert counts == {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": text}
    assert sum(p.numel() for p in build(SD2_INPAINT)["unet"].parameters()) == 865_925_124


def test_the_yaml_beside_it_says_v(full):
    assert full.config == SD2_V
    assert full.about[0] == "predicts v: v2-1_768-ema-pruned.yaml beside it says so"
    assert full.about[1].startswith("U-Net: as trained (raw)")


def test_text_encoder(full):
    golden = Golden("openclip_h")
    assert torch.equal(full.tokenizer(golden.case["prompts"]), golden["ids"].long())
    for hidden in (full.text_encoder(golden["ids"].long()).hidden, full.encode_prompt(golden.case["prompts"])):
        assert error(kept(hidden, golden["penultimate_ln"]), golden["penultimate_ln"]) < 1e-5


@pytest.mark.parametrize("name", ["unet_v2_64x64", "unet_v2_32x48_b2", "unet_v2_96x96"])
def test_unet(full, name):
    golden = Golden(name)
    with unet_norms(full.unet, SD2) as norms:
        out = full.unet(
            golden["x"], golden["t"], Conditioning(golden.normal("context", (golden["x"].shape[0], 77, 1024)))
        )
    check_norms(norms, golden.case["norms"], at_least=28)
    assert error(out, golden["out"]) < 2e-5


def test_half_precision(files):
    """768-v in float16, in which q k of the original overflows on trained weights; and of a float16 file."""
    skip_if_slow("float16")
    sd = StableDiffusion.load(files["v2-fp16.safetensors"], device="cpu", dtype="float16", prediction="v")
    assert sd.config == SD2_V
    golden = Golden("unet_v2_32x48_b2")
    out = sd.unet(golden["x"].half(), golden["t"], Conditioning(golden.normal("context", (2, 77, 1024)).half()))
    assert error(out.float(), golden["out"]) < 1e-2
    golden = Golden("openclip_h")
    hidden = sd.text_encoder(golden["ids"].long()).hidden.float()
    assert error(kept(hidden, golden["penultimate_ln"]), golden["penultimate_ln"]) < 1e-2


def test_a_file_that_says_nothing_is_run_once(files):
    """What comes out for weights that were never trained means nothing; that it was asked for is said."""
    with load_checkpoint(files["v2-fp16.safetensors"]) as checkpoint:
        assert not identify(checkpoint).decided
    sd = StableDiffusion.load(files["v2-fp16.safetensors"], device="cpu")
    assert sd.config in (SD2, SD2_V) and "run once" in sd.about[0]


def test_inpainting(tmp_path):
    path = tmp_path / "512-inpainting-ema.ckpt"
    reference.save(path, reference.make_state_dict(manifest("sd-v2-inpainting")))
    sd = StableDiffusion.load(path, device="cpu", dtype="float32")
    path.unlink()
    assert sd.config == SD2_INPAINT and sd.about[0].startswith("predicts eps: as inpainting models do")
    golden = Golden("unet_v2_inpainting_48x64")
    with unet_norms(sd.unet, SD2_INPAINT) as norms:
        out = sd.unet(golden["x"], golden["t"], Conditioning(golden.normal("context", (1, 77, 1024))))
    check_norms(norms, golden.case["norms"], at_least=28)
    assert error(out, golden["out"]) < 2e-5


def test_info_does_not_read_the_weights(files):
    """Of 9 and 3 GB; test_inspect.py measures the whole program."""
    for name in ("v2-1_768-ema-pruned.ckpt", "v2-fp16.safetensors"):
        code = (
            "import sys, time, torch; from scripts import convert; start = time.process_time();"
            "assert convert.main([sys.argv[1], '--info']) == 0; print(time.process_time() - start)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, files[name]], cwd=ROOT, capture_output=True, text=True, check=True
        )
        *lines, seconds = done.stdout.splitlines()
        assert float(seconds) < 1
        assert any(line.startswith("model:") and "2.x" in line for line in lines)


def test_there_and_back(files, tmp_path):
    """Original, diffusers' folder, original: every bit of a float16 model, and diffusers' own networks load it."""
    source = files["v2-fp16.safetensors"]
    script = ROOT / "scripts" / "convert.py"
    start = time.perf_counter()
    for args in (
        (source, tmp_path / "folder", "--layout", "diffusers", "--model", "sd2-v"),
        (tmp_path / "folder", tmp_path / "back.safetensors", "--layout", "original"),
    ):
        done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    print(f"there and back in {time.perf_counter() - start:.0f} s")
    with load_checkpoint(source) as before, load_checkpoint(tmp_path / "back.safetensors") as after:
        assert set(before) - set(after) == set(reference.SCHEDULE) and set(after) <= set(before)
        assert all(torch.equal(before[key], after[key]) for key in after)
        assert identify(after).config == SD2_V
