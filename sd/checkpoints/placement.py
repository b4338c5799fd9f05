"""The networks of a checkpoint on their device: read once, or again each time that they are needed (low memory)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from ..config import SDXL, Config
from ..models.build import build
from ..models.vae import VAE
from ..runtime.memory import ALL, Job, available, is_integrated, needed
from ..runtime.offload import Offload
from . import weights_cache
from .loading import ModelFiles
from .weights_cache import WeightsCache

SHARED_MEMORY = ("cpu", "mps")  # devices that share the memory of the CPU
SAFE = 1.1  # times the estimate, for what libraries need on a GPU


class Placed(NamedTuple):
    """The networks of a checkpoint, and what was detected."""

    config: Config
    networks: dict[str, nn.Module]
    used: Mapping[str, nn.Module]  # the networks, or an `Offload` through which they have to be used
    about: tuple[str, ...]  # what was detected and chosen, one line each
    cache: WeightsCache | None = None  # the file of these weights in the cache folder, if there is one


def place(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    low_memory: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Placed:
    """Build the networks of a model and read their weights.

    low_memory   only one network at a time is on the device. On CPU and MPS nothing is kept yet, and the files stay
                 open, since a network is read whenever it is needed; otherwise the files are closed here. The cache
                 folder of the files' options has no effect
    progress     called with (parameters in this weight, parameters in total) after each weight

    On a GPU that is too small for all networks and an image of the model's own size, the text encoders are there only
    while prompts are encoded, even without `low_memory` (`LoadOptions.offload_text_encoders`); `about` says so.

    If the files do not say what the U-Net predicts, it is run once to find out. If an error is raised, the files are
    closed.
    """
    reread = low_memory and device.type in SHARED_MEMORY
    cpu = torch.device("cpu")
    home = cpu if low_memory and not reread else device
    try:
        networks = build(files.config)
        offloaded = () if low_memory else _offloaded(files, device, dtype)
        total = sum(math.prod(w.shape) for net in networks.values() for w in net.state_dict().values())

        def report(count: int) -> None:
            if progress is not None and not reread:
                progress(count, total)

        def read(name: str, network: nn.Module) -> None:
            files.read(name, network, cpu if name in offloaded else home, dtype, report, own=reread)

        cache, reason = _cache(files, device, dtype, low_memory, total)
        if not reread:
            used_cache = cache is not None and cache.fill(networks, report)
            for name, network in () if used_cache else networks.items():
                read(name, network)
            cache = None if cache is None else cache.loaded(networks, used_cache)
        else:  # its weights would be looked at after the last step only, those of the others before the first one
            files.check_finite("vae", dtype)
        used: Mapping[str, nn.Module] = networks
        if low_memory or offloaded:
            resident = networks.keys() - set(offloaded) if offloaded else ()
            used = Offload(networks, device, read if reread else None, resident)
        if not files.decided:
            with used.use("unet") if isinstance(used, Offload) else nullcontext(used["unet"]) as unet:
                files.probe(unet)
        about = (*files.about(), *_overflowing(files, networks["vae"], dtype), *reason)
        if offloaded:
            about += (f"the text encoders are offloaded from {device} once prompts are encoded",)
    except BaseException:
        files.close()
        raise
    if not reread:
        files.close()
    return Placed(files.config, networks, used, about, cache)


def _offloaded(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The text encoders, if a GPU has no memory for all networks and an image, or if that is asked for."""
    config, asked = files.config, files.options.offload_text_encoders
    if asked is not None or device.type != "cuda" or is_integrated(device):
        return config.text_names if asked and device.type == "cuda" else ()
    if (free := available(device)) is None:
        return ()
    exact = dtype == torch.float16 and config.vae.scale == SDXL.vae.scale  # it may overflow
    job = Job(config.size, config.size, exact=exact, recorded=True)
    return () if SAFE * needed(config, dtype, job, ALL) <= free else config.text_names


def _overflowing(files: ModelFiles, vae: nn.Module, dtype: torch.dtype) -> list[str]:
    """Mark a VAE that is known to overflow in this precision, so that it is not tried; a line that says so."""
    if dtype != torch.float16 or not (why := files.overflows):
        return []
    if isinstance(vae, VAE):
        vae.overflows |= {"image", "latent"}
        vae.known_to_overflow = True
    return [f"VAE: computed in float32, because SDXL's original one overflows in float16 ({why})"]


def _cache(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, low_memory: bool, numbers: int
) -> tuple[WeightsCache | None, list[str]]:
    """The weights' file in the cache folder; or None, with a line that says why if the folder has no effect."""
    if files.options.cache is None or numbers * dtype.itemsize < weights_cache.SMALLEST:
        return None, []
    if reason := weights_cache.unusable(device, dtype, low_memory):
        return None, [f"the cache folder has no effect: {reason}"]
    return WeightsCache.of(files, dtype), []
