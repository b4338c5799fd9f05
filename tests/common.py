"""What the tests share: recorded outputs of the original code ("goldens"), and the small models they are for.

The goldens were made with `reference_weights.py`: weights that are a function of their key and shape, loaded into the
original modules. `error` is the relative L2 distance that all tolerances speak of.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import reference_weights as reference
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sd.checkpoints.block_names import BlockPair, unet_blocks
from sd.config import SDXL, Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from sd.schedule import Level

HERE = Path(__file__).resolve().parent
# Float16 is emulated on most CPUs. On one where a convolution (in `skip_if_slow`) takes 0.27 s, a pass of SD 1's U-Net
# over 48x80 latents takes 27 s: this many times as long.
CONVOLUTIONS_IN_A_PASS = 100
PATIENCE = 300  # seconds that a full-size test in a half precision may take
GOLDENS, MANIFESTS = HERE / "goldens", HERE / "manifests"

# tiny-v1 of the reference configs: SD 1.x in small
TINY = Config(
    name="tiny v1",
    size=128,
    text=(TextConfig(width=64, layers=3, heads=4),),
    vae=VAEConfig(channels=(64, 64, 128, 128), blocks=1),
    unet=UNetConfig(channels=(64, 128, 128), heads=(4, 4, 4), depth=(1, 1, 0), blocks=1, context=64),
)

TINY_INPAINT = replace(TINY, name="tiny v1 inpainting", unet=replace(TINY.unet, in_channels=9))

# tiny-v2-v: SD 2 with v-prediction in small
TINY_V2 = Config(
    name="tiny v2",
    size=128,
    text=(TextConfig(width=96, layers=3, heads=3, activation="gelu", pad=0, names="openclip"),),
    vae=VAEConfig(channels=(64, 128, 128, 192), blocks=2),
    unet=UNetConfig(
        channels=(64, 128, 192), heads=(2, 4, 6), depth=(0, 1, 1), blocks=2, context=96, linear_projections=True
    ),
    schedule=ScheduleConfig(prediction="v"),
)

# tiny-sdxl: SDXL in small, whose second text encoder gives 96 pooled numbers
TINY_XL = replace(
    SDXL,
    name="tiny sdxl",
    size=128,
    text=(
        TextConfig(width=64, layers=2, heads=4, hidden_norm=False),
        TextConfig(
            96, 4, 3, "gelu", pad=0, names="openclip", hidden_layer=-2, hidden_norm=False, pooled=True, projection=96
        ),
    ),
    vae=VAEConfig(channels=(64, 64, 128, 128), blocks=1, scale=0.13025),
    unet=UNetConfig(
        channels=(64, 128, 192), heads=(2, 4, 6), depth=(0, 1, 2), middle_depth=2, context=160, vector=1632,
        linear_projections=True,
    ),
)  # fmt: skip


class Golden:
    """One recorded case: its tensors, and its description as a dict."""

    def __init__(self, name: str) -> None:
        self.name = name
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
            self.case: dict[str, Any] = json.loads(file.metadata()["case"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def normal(self, what: str, shape: tuple[int, ...]) -> Tensor:
        """An input or noise draw of the case that is stored as a recipe; checked where the case has its CRC-32."""
        tensor = reference.normal(f"{self.name}/{what}", shape)
        recipe = self.case.get(what)
        if isinstance(recipe, dict) and "crc32" in recipe:
            assert f"{zlib.crc32(tensor.numpy().data):08x}" == recipe["crc32"]
        return tensor

    def noise(self, kind: str = "step"):
        """The noise that the original drew in its i-th step, as samplers want it."""
        count = iter(range(10**6))
        return lambda x: self.normal(f"{kind}/{next(count)}", tuple(x.shape))


# A program's peak begins with that of the process that starts it, so a small process starts it.
START = """
import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_of(command: Sequence[object]) -> int:
    """Run a command to its end: the peak of its memory in bytes, as Linux reports it."""
    given = [sys.executable, "-c", START, *map(str, command)]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def share_kernels() -> None:
    """Write which kernels this process has chosen where programs find them, so that their images are the same ones."""
    from scripts.common.user_cache import keep_kernels

    keep_kernels(argparse.Namespace(no_cache=False))


def skip_if_slow(dtype: str, passes: float = 1) -> None:
    """Skip a full-size test that would take minutes, as this processor emulates the precision.

    passes   the work of the test, in passes of SD 1's U-Net over 48x80 latents
    """
    import pytest  # here: `bench.py --check` reads the goldens, and may run where pytest is not installed

    x, kernel = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((1, 128, 32, 32), (128, 128, 3, 3)))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.nn.functional.conv2d(x, kernel, padding=1)
        times.append(time.perf_counter() - start)
    expected = min(times) * CONVOLUTIONS_IN_A_PASS * passes
    if expected > PATIENCE:
        pytest.skip(f"{dtype} is emulated on this processor: this test would take about {expected:.0f} s")


def error(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance |a - b| / |b|."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).norm() / b.double().norm())


def kept(full: Tensor, recorded: Tensor) -> Tensor:
    """The entries of a tensor that a golden has: of the largest ones, it has every k-th along some dimensions."""
    steps = [-(-a // b) for a, b in zip(full.shape, recorded.shape, strict=True)]
    return full[tuple(slice(None, None, step) for step in steps)]


@lru_cache
def manifest(name: str) -> reference.Manifest:
    """The names, shapes and types of a model's weights; the largest of the files are compressed."""
    file = MANIFESTS / f"{name}.json"
    if file.exists():
        return reference.load_manifest(file)
    raw = json.loads(gzip.decompress(file.with_suffix(".json.gz").read_bytes()))
    return {key: (tuple(shape), getattr(torch, dtype)) for key, (shape, dtype) in raw.items()}


@lru_cache
def tiny_state(name: str = "tiny-v1") -> dict[str, Tensor]:
    """An original-layout state dict with the reference weights."""
    return reference.make_state_dict(manifest(name))


def images(u8: Tensor) -> Tensor:
    """uint8 pictures -> [-1, 1]."""
    return u8.float() / 127.5 - 1


@contextmanager
def block_norms(network: nn.Module, places: Iterator[BlockPair]) -> Iterator[dict[str, float]]:
    """Hooks that fill a dict: L2 norm of each block's output, under the name of the original's block.

    The goldens carry the same, which shows where two implementations part. The network may be shared by many tests, so
    the hooks are removed at the end of the `with` block.
    """
    norms: dict[str, float] = {}
    handles = []
    for ours, theirs, _ in places:
        name = ".".join(theirs.split(".")[:2])

        def hook(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
            norms[name] = float(out.double().norm())

        handles.append(network.get_submodule(ours).register_forward_hook(hook))
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def check_norms(norms: dict[str, float], recorded: dict[str, list[Any]], at_least: int) -> None:
    """Compare what `block_norms` found with a case's norms; a difference names the first block where it shows."""
    for block, (_, norm, _) in recorded.items():
        if block in norms:  # time_embed's two layers are not two blocks
            assert abs(norms[block] / norm - 1) < 1e-4, f"the two part at {block}"
    assert len(norms) >= at_least


def unet_norms(unet: nn.Module, config: Config) -> AbstractContextManager[dict[str, float]]:
    return block_norms(unet, unet_blocks(config))


def gaussian_denoiser(std: float):
    """The exact denoiser of data that is N(0, std²): E[x0 | x_t] = alpha std² / (alpha² std² + sigma²) x_t."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        return level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2) * x

    return denoise


def assert_close(a: Any, b: Any, rtol: float) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol)


def increments(noise, levels):
    """Independent draws that make what `noise` drew for both increments of each of DPM++ SDE's steps.

    The original was given unrelated draws; ours makes the second increment of the first and a fresh one.
    """
    count, first = itertools.count(), None

    def draw(x):
        nonlocal first
        step, second = divmod(next(count), 2)
        drawn = noise(x)
        if not second:
            first = drawn
            return drawn
        high, low = levels[step].ratio, levels[step + 1].ratio
        share = (high - math.sqrt(high * low)) / (high - low)
        return (drawn - math.sqrt(share) * first) / math.sqrt(1 - share)

    return draw
