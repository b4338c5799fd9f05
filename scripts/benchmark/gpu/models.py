"""The models that checks use: Stable Diffusion 1.x with the reference weights, and the embedded model.

The reference weights are computed from their names and shapes. The original code was run with them, and its outputs
are recorded in tests/goldens. So these checks need a checkout of the project. A trial uses the tiny model of the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

import sd
from sd.checkpoints.convert import convert
from sd.checkpoints.loading import load_weights
from sd.config import SD1, Config, TinyVAEConfig
from sd.models.build import build
from sd.models.taesd import TinyVAE
from sd.pipeline import StableDiffusion
from sd.runtime.device import dtype_name

from .items import Wrong

TESTS = Path(sd.__file__).resolve().parents[1] / "tests"


@dataclass(frozen=True)
class Place:
    """Where checks run: device ("cuda", "cuda:1", "cpu"), trial (tiny models), CPU threads, temporary folder."""

    device: str
    trial: bool
    threads: int
    folder: Path

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The precision of images and times: float16; float32 on a CPU, which may have to emulate float16."""
        return torch.float16 if self.cuda else torch.float32


def no_goldens() -> str | None:
    """A line that says what checks with recorded outputs need and is missing here; None if nothing is."""
    found = (TESTS / "goldens" / "unet_v1_64x64_b2.safetensors").is_file() and (TESTS / "common.py").is_file()
    return None if found else "needs the folder tests of a checkout of the project, with the recorded outputs"


def recorded() -> ModuleType:
    """The module tests/common.py, which reads the recorded outputs."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    import common

    return common


class Models:
    """Models on the device, each created at its first use."""

    def __init__(self, place: Place) -> None:
        self.place, self.device = place, torch.device(place.device)
        self._dtype: torch.dtype | None = None
        self._model: StableDiffusion | None = None

    @property
    def config(self) -> Config:
        """The config of the reference model."""
        return recorded().TINY if self.place.trial else SD1

    @cached_property
    def weights(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The reference weights by network, float32 in CPU memory (4.3 GB at full size)."""
        tests = recorded()
        shapes = tests.manifest("tiny-v1" if self.place.trial else "sd-v1")
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # 6 s on one core
            tensors = pool.map(lambda key: tests.reference.make_tensor(key, *shapes[key]), shapes)
            return convert(dict(zip(shapes, tensors, strict=True)), self.config)

    def reference(self, dtype: torch.dtype) -> StableDiffusion:
        """The model with the reference weights in a precision; only the last precision is kept."""
        if dtype != self._dtype or self._model is None:
            self._model = None
            networks: dict[str, Any] = {
                name: load_weights(network, self.weights[name], self.device, dtype)
                for name, network in build(self.config).items()
            }
            self._dtype, self._model = dtype, StableDiffusion(self.config, **networks)
        return self._model

    def tiny_vae(self, dtype: torch.dtype) -> TinyVAE:
        """The tiny autoencoder with the reference weights in a precision."""
        tests, config = recorded(), replace(self.config, vae=TinyVAEConfig())
        state = {
            f"{half}.{key}": tensor
            for half in ("encoder", "decoder")
            for key, tensor in tests.reference.make_state_dict(tests.manifest(f"taesd-{half}")).items()
        }
        weights = convert(state, config, parts=["vae"])["vae"]
        return cast(TinyVAE, load_weights(build(config)["vae"], weights, self.device, dtype))

    def embedded(
        self, device: str | None = None, dtype: torch.dtype = torch.float32, **options: Any
    ) -> StableDiffusion:
        """The embedded model, which is a trained one; by default on the device."""
        return StableDiffusion.load(device=device or self.place.device, dtype=dtype, **options)

    def free(self) -> None:
        """Return unused memory of the device, and reset the peak."""
        if self.place.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


class Checker:
    """Runs checks by name; created in the process of their part."""

    def __init__(self, place: Place, find: Callable[[str], Callable[[Models], str]]) -> None:
        self.models, self._find = Models(place), find
        torch.set_num_threads(place.threads)
        torch.set_grad_enabled(False)

    def do(self, name: str) -> tuple[str, str]:
        """Run one check; returns "passed" or "failed", and its message. Errors other than `Wrong` are raised."""
        try:
            return "passed", self._find(name)(self.models)
        except Wrong as wrong:
            return "failed", str(wrong)


def error(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance |a - b| / |b|, as in the tests; 0 if they are equal."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def said(value: float, dtype: torch.dtype) -> str:
    """The relative error as text."""
    return f"{dtype_name(dtype)}: error {value:.1e}" if value else f"{dtype_name(dtype)}: bit-identical"
