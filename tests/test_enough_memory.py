"""Whether memory suffices: what is free, what a call needs, and the line that says so before a model is loaded."""

from __future__ import annotations

import argparse
import gc
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common import TINY_XL
from sdxl_common import TINY_REFINER, model_files, photo
from simulated_device import SimulatedGpu
from test_simulated_gpu import rounded_size

from scripts import img2img, txt2img
from scripts.common import enough_memory
from sd import StableDiffusion
from sd.checkpoints.placement import SAFE
from sd.config import SDXL
from sd.params import HighRes, SamplingParams, TextToImage
from sd.runtime import memory
from sd.runtime.memory import ALL, ONE, Job, available, needed, weight_bytes

SMALL = ("--steps", "5", "--height", "64", "--width", "64", "--seed", "3", "--dtype", "float32", "--device", "cpu")
HALF = torch.float16


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    gc.collect()  # what other tests have left: its end would be a warning here
    with SimulatedGpu() as device, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield device


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return model_files(tmp_path_factory.mktemp("models"))


def test_free_memory_of_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "MEMINFO")
    monkeypatch.setattr(memory, "LIMITS", tmp_path)
    cpu = torch.device("cpu")
    assert available(cpu) is None
    (tmp_path / "MEMINFO").write_text(
        "MemTotal:  9 kB\nMemAvailable:     3000 kB\nSwapFree:  1000 kB\nHugePages_Free: 0\n"
    )
    assert available(cpu) == 4000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
    assert available(cpu) == 4000 * 1024
    (tmp_path / "memory.max").write_text("50000\n")
    assert available(cpu) == 49000 + 1000 * 1024  # of a container, which may use the swap of the system
    (tmp_path / "memory.swap.max").write_text("max\n")
    (tmp_path / "memory.swap.current").write_text("100\n")
    assert available(cpu) == 49000 + 1000 * 1024
    (tmp_path / "memory.swap.max").write_text("600\n")
    assert available(cpu) == 49000 + 500
    assert available(torch.device("mps")) is None


def test_free_memory_of_a_gpu(gpu, monkeypatch, tmp_path):
    gpu.size = 10_000
    x = torch.empty(1000, device="cuda")
    assert available(torch.device("cuda", 0)) == 10_000 - rounded_size(x)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gpu.reserved - 300)  # PyTorch keeps the rest
    assert available(torch.device("cuda", 0)) == 10_000 - rounded_size(x) + 300
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: argparse.Namespace(is_integrated=1))
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "MEMINFO")  # of which such a GPU is a part
    (tmp_path / "MEMINFO").write_text("MemAvailable:     3000 kB\n")
    monkeypatch.setattr(memory, "LIMITS", tmp_path)
    assert available(torch.device("cuda", 0)) == 3000 * 1024


@pytest.fixture
def packing(monkeypatch) -> None:
    """Weights in float32 are packed, as on x86."""
    monkeypatch.setattr(enough_memory, "onednn_dtypes", lambda: frozenset([torch.float32]))


def no_loading(*args: object, **options: object) -> None:
    raise AssertionError("a model is loaded")


@pytest.fixture
def short(monkeypatch, capsys, files, tmp_path, packing):
    """Runs txt2img with so much free memory that a model of this config has too little; gives the line it ends with."""

    def run(*args: str, free: float, program=txt2img) -> str:
        monkeypatch.setattr(enough_memory, "available", lambda device: int(free))
        monkeypatch.setattr(StableDiffusion, "load", no_loading)
        assert program.main([*args, "--ckpt", str(files["base"]), *SMALL, "--out", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_too_little_memory_is_said_before_anything_is_loaded(short, files):
    weights = 0.9 * sum(weight_bytes(TINY_XL, torch.float32).values())
    line = short("a cat", free=weights)
    assert line.startswith("error: tiny sdxl needs about ")
    wanted = (
        r"GB for an image of 64x64 in float32, and cpu has [\d.]+ GB of free memory: try --low-memory \([\d.]+ GB\)"
    )
    wanted += ", --dtype bfloat16, a smaller --height and --width, or --no-memory-check to try all the same$"
    assert re.search(wanted, line)
    line = short("a cat", "--refiner", str(files["refiner"]), "--batch-size", "4", "--n", "3", free=1.5 * weights)
    assert "GB for 3 images of 64x64" in line
    assert "leaving out --refiner" in line and "--batch-size 1" in line
    assert "--low-memory (" not in short("a cat", "--low-memory", free=weights / 4)
    assert "--low-memory (" not in short("a cat", free=weights / 4)  # which would not do either
    photo(64).save(files["base"].parent / "photo.png")
    image = str(files["base"].parent / "photo.png")
    assert "64x64" in short("a cat", image, free=weights, program=img2img)
    assert "128x128" in short("a cat", "--hires", "2", free=weights)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("low", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("refined", [False, True])
def test_with_as_much_as_is_estimated_it_is_tried(low, refined, files, tmp_path, monkeypatch, packing):
    args = ["a cat", "--ckpt", str(files["base"]), *SMALL, "--out", str(tmp_path / "out")]
    args += ["--low-memory"] if low else []
    args += ["--refiner", str(files["refiner"])] if refined else []
    job = Job(64, 64, guided=False, whole=768 * 1024)
    kept, refiner = ONE if low else ALL, TINY_REFINER if refined else None
    enough = needed(TINY_XL, torch.float32, job, kept, refiner)
    assert enough < needed(TINY_XL, torch.float32, job, ALL, TINY_REFINER) or not low
    monkeypatch.setattr(enough_memory, "available", lambda device: enough)
    assert txt2img.main(args) == 0
    monkeypatch.setattr(enough_memory, "available", lambda device: int(0.94 * enough))
    assert txt2img.main(args) == 1
    assert txt2img.main([*args, "--no-memory-check"]) == 0


def test_a_plenty_of_memory_needs_no_look_at_the_files(files, monkeypatch):
    monkeypatch.setattr(enough_memory, "available", lambda device: 10**12)
    monkeypatch.setattr(enough_memory, "ModelFiles", no_loading)
    args = txt2img.parser().parse_args(["a", "--ckpt", str(files["base"]), *SMALL])
    requests = [TextToImage("a", SamplingParams()), HighRes("a", SamplingParams(), hires=2)]
    enough_memory.check_memory(args, requests)
    monkeypatch.setattr(enough_memory, "available", lambda device: 10**8)
    with pytest.raises(AssertionError, match="a model is loaded"):
        enough_memory.check_memory(args, requests)


def test_weights_in_the_cache_folder_need_not_be_free(files, monkeypatch, packing):
    """The system reads the pages of a mapped file again when it has taken them back."""
    args = txt2img.parser().parse_args(["a", "--ckpt", str(files["base"]), *SMALL])
    weights = sum(weight_bytes(TINY_XL, torch.float32).values())
    monkeypatch.setattr(enough_memory, "available", lambda device: int(0.9 * weights))
    kept = argparse.Namespace(file=files["base"].with_suffix(".none"))
    monkeypatch.setattr(enough_memory.WeightsCache, "of", lambda files, dtype: kept)
    requests = [TextToImage("a", SamplingParams(height=64, width=64))]
    with pytest.raises(ValueError, match="needs about"):
        enough_memory.check_memory(args, requests)
    kept.file = files["base"]
    enough_memory.check_memory(args, requests)


def test_weights_that_are_used_as_they_are_need_not_be_free(files, monkeypatch):
    """Where nothing is cast or packed, the checkpoint itself is mapped into memory."""
    weights = sum(weight_bytes(TINY_XL, torch.float32).values())
    monkeypatch.setattr(enough_memory, "available", lambda device: int(0.9 * weights))
    args = txt2img.parser().parse_args(["a", "--ckpt", str(files["base"]), "--no-cache", *SMALL])
    requests = [TextToImage("a", SamplingParams(height=64, width=64))]
    monkeypatch.setattr(enough_memory, "onednn_dtypes", frozenset)
    enough_memory.check_memory(args, requests)
    monkeypatch.setattr(enough_memory, "onednn_dtypes", lambda: frozenset([torch.float32]))
    with pytest.raises(ValueError, match="needs about"):
        enough_memory.check_memory(args, requests)


def test_a_batch_that_is_too_large_for_all_networks_offloads_the_text_encoders(gpu, files, monkeypatch):
    """Though an image of the native size would fit beside them."""
    args = txt2img.parser().parse_args(["a", "--ckpt", str(files["base"]), "--device", "cuda", "--batch-size", "8"])
    monkeypatch.setattr(enough_memory, "PER_PIXEL", 10**9)
    requests = [TextToImage("a", SamplingParams(n=count)) for count in (1, 8)]
    exact = TINY_XL.vae.scale == SDXL.vae.scale
    job = Job(TINY_XL.size, TINY_XL.size, exact=exact, recorded=True)
    one, all_of_them = (needed(TINY_XL, HALF, job._replace(batch=count)) for count in (1, 8))
    monkeypatch.setattr(enough_memory, "available", lambda device: int(SAFE * (one + all_of_them) / 2))
    assert [enough_memory.check_memory(args, [request]) for request in requests] == [None, True]
