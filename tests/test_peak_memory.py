"""What --low-memory saves, measured through the program that people run: at full size, a small image, one step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import reference_weights as reference
import torch
from common import manifest

ROOT = Path(__file__).resolve().parents[1]
SAVED = 0.35e9  # bytes at least: in bfloat16, the text encoder and the VAE are 0.41 GB
OPTIONS = ("--steps", "1", "--height", "256", "--width", "256", "--guidance", "1", "--seed", "1")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory as Linux reports it"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Stable Diffusion 1.x in float16, as it is usually downloaded."""
    path = tmp_path_factory.mktemp("peak") / "sd-v1.safetensors"
    write(path)
    yield path
    path.unlink()


def write(path: Path) -> None:
    """In a function of its own, so that its tensors are gone when it returns."""
    state = reference.make_state_dict(manifest("sd-v1"))
    for key, tensor in state.items():
        state[key] = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
    reference.save(path, state)


# A program's peak begins with that of the process that starts it, so it is started by a small one.
START = """
import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run(checkpoint: Path, out: Path, *more: str) -> int:
    """Peak memory of txt2img.py in bytes."""
    command = [sys.executable, str(ROOT / "scripts" / "txt2img.py"), "a lighthouse", "--ckpt", str(checkpoint)]
    command += [*OPTIONS, "--device", "cpu", "--dtype", "bfloat16", "--out", str(out), *more]
    done = subprocess.run(
        [sys.executable, "-c", START, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.png"))) == 1
    return int(done.stdout)


def test_low_memory_lowers_the_peak(checkpoint, tmp_path, record_property):
    plain = run(checkpoint, tmp_path / "plain")
    low = run(checkpoint, tmp_path / "low", "--low-memory")
    record_property("peaks", (plain, low))
    assert plain - low >= SAVED, f"peak of {plain / 1e9:.2f} GB, and of {low / 1e9:.2f} GB with --low-memory"
