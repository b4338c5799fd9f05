"""Whether the memory of the device suffices for a call, before its model is loaded: one line with what to change."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from sd.checkpoints.loading import LoadOptions, ModelFiles
from sd.checkpoints.placement import SAFE
from sd.checkpoints.weights_cache import WeightsCache
from sd.config import SDXL, Config
from sd.hires import enlarged_shape
from sd.latents import image_size, latent_shape, most_at_once
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage
from sd.resources import EMBEDDED, resource
from sd.runtime import kernel_choice
from sd.runtime.device import best_dtype, dtype_name, find_device, find_dtype
from sd.runtime.memory import ALL, ONE, WITHOUT_TEXT, Job, available, is_integrated, needed, weight_bytes
from sd.runtime.packing import onednn_dtypes

from .arguments import NICKNAMES
from .control_args import Controls
from .user_cache import cache_folder
from .xl_args import base_options, refiner_options

SURE = 0.95  # of the estimate, which is within a few percent: with less, a run cannot succeed
PER_PIXEL = 4096  # bytes; more than a network needs for a pixel of an image, beside its weights


def check_memory(
    args: argparse.Namespace, requests: Sequence[TextToImage], controls: Controls | None = None
) -> Literal[True] | None:
    """Raise ValueError if the device has less free memory than the call needs (sd/runtime/memory.py).

    Returns True if the text encoders should leave a GPU so that the call fits; None if loading may decide.

    The headers of the files are read only if, by the sizes of the files, memory could be short.
    """
    device = find_device(args.device)
    free = available(device)
    if free is None:
        return None
    given = NICKNAMES.get(args.dtype, args.dtype)
    dtype = best_dtype(device) if given is None else find_dtype(given)
    file = args.ckpt or resource(EMBEDDED)
    paths = [file, *([args.refiner] if args.refiner else [])]
    paths += controls.files.values() if controls else []
    networks = tuple(controls.weights.values()) if controls else ()
    if sum(map(size_of, paths)) * 2 + PER_PIXEL * most_pixels(args, requests) < free:
        return None
    with ModelFiles(file, LoadOptions(**base_options(args), cache=cache_folder(args))) as files:
        config, exact = files.config, dtype == torch.float16 and bool(files.overflows)
        mapped = mapped_bytes(files, args, device, dtype)
    refiner = None
    if args.refiner:
        with ModelFiles(args.refiner, LoadOptions(**refiner_options(args), cache=cache_folder(args))) as files:
            refiner = files.config
            mapped += mapped_bytes(files, args, device, dtype)
    leave, separate = False, device.type == "cuda" and not is_integrated(device)
    for request in requests:
        try:
            job = job_of(args, request, config, exact, device)._replace(controls=networks)
        except ValueError:  # invalid for this model: reported later, with the line of the request
            continue
        least = {kept: needed(config, dtype, job, kept, refiner) for kept in (ALL, WITHOUT_TEXT, ONE)}
        least[ALL] -= mapped
        leave |= SAFE * needed(config, dtype, at_most(job, request, config, dtype), ALL, refiner) > free
        kept = ONE if args.low_memory else WITHOUT_TEXT if separate else ALL
        if least[kept] * SURE > free and not args.no_memory_check and not extends_its_memory(device):
            raise ValueError(shortage(args, config, dtype, job, (least[kept], least[ONE], free), device))
    return True if leave and separate else None  # later sources may have larger images


def at_most(job: Job, request: TextToImage, config: Config, dtype: torch.dtype) -> Job:
    """What a request may turn out to need, where `job_of` has the least."""
    guided = job.guided or (request.params.guidance is None and config.unet.guidance is None)
    exact = job.exact or (dtype == torch.float16 and config.vae.scale == SDXL.vae.scale)
    height, width = (max(side, config.size) for side in (job.height, job.width))
    return job._replace(guided=guided, exact=exact, height=height, width=width)


def mapped_bytes(files: ModelFiles, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """Weights in memory-mapped files, at most: the system can drop these pages and read them again."""
    config, state = files.config, files.states["unet"]
    if device.type != "cpu" or args.low_memory:
        return 0
    cached = files.options.cache is not None and WeightsCache.of(files, dtype).file.exists()
    packed = dtype in onednn_dtypes() and kernel_choice.preferred() != "plain"
    as_they_are = not packed and state[next(iter(state))].dtype == dtype
    return sum(weight_bytes(config, dtype).values()) if cached or as_they_are else 0


def extends_its_memory(device: torch.device) -> bool:
    """Whether the driver of a GPU takes memory of the CPU when its own is full: on Windows, also below WSL."""
    return device.type == "cuda" and (sys.platform == "win32" or "microsoft" in platform.release().lower())


def shortage(
    args: argparse.Namespace,
    config: Config,
    dtype: torch.dtype,
    job: Job,
    sizes: tuple[int, int, int],
    device: torch.device,
) -> str:
    """What is missing, and the options that help. `sizes`: what is needed, what with low memory, and what is free."""
    now, low, free = sizes
    knobs = []
    if not args.low_memory and low <= free:
        knobs.append(f"--low-memory ({low / 1e9:.1f} GB)")
    if args.refiner:
        knobs.append("leaving out --refiner")
    if job.controls:
        knobs.append("fewer --control")
    if dtype == torch.float32:
        knobs.append("--dtype float16" if device.type == "cuda" else "--dtype bfloat16")
    if job.batch > 1:
        knobs.append("--batch-size 1")
    knobs.append("a smaller --height and --width")
    if device.type == "cuda":
        knobs.append("--device cpu")
    knobs.append("or --no-memory-check to try all the same")
    images = f"{job.batch} images" if job.batch > 1 else "an image"
    return (
        f"{config.name} needs about {now / 1e9:.1f} GB for {images} of {job.width}x{job.height} in "
        f"{dtype_name(dtype)}, and {device} has {free / 1e9:.1f} GB of free memory: try {', '.join(knobs)}"
    )


def job_of(args: argparse.Namespace, request: TextToImage, config: Config, exact: bool, device: torch.device) -> Job:
    """The largest batch of a request; ValueError for a size that this model cannot have."""
    params = request.params
    height, width = params.height or config.size, params.width or config.size
    if isinstance(request, Inpaint) and request.margin is not None:
        # a region of the image, at half of the native size or more
        height, width = params.height or config.size * 5 // 8, params.width or config.size * 5 // 8
    elif isinstance(request, ImageToImage | Inpaint):
        height, width = image_size(config, request.image.size, params.height, params.width)
    elif isinstance(request, HighRes):
        _, h, w = enlarged_shape(config, request)
        height, width = h * config.vae.factor, w * config.vae.factor
    latent_shape(config, height, width)  # raises for a size that cannot be
    # without a value, some models have guidance 1
    guided = params.guidance not in (None, 1) and params.guidance_until > 0 and config.unet.guidance is None
    recorded = device.type == "cuda" and not args.low_memory and not params.tileable
    return Job(height, width, batch_of(args, request), guided, exact, most_at_once(config.vae, device), recorded)


def batch_of(args: argparse.Namespace, request: TextToImage) -> int:
    """The most images that are generated at once."""
    one_by_one = request.params.exact or getattr(args, "loopback", 1) > 1
    return 1 if one_by_one else min(args.batch_size, request.params.n * args.n_iter)


def most_pixels(args: argparse.Namespace, requests: Sequence[TextToImage]) -> int:
    """An upper bound of the pixels of the largest batch; without a given size, an image counts as 2048x2048."""
    most = 0
    for request in requests:
        params = request.params
        scale = request.hires**2 if isinstance(request, HighRes) else 1
        pixels = (params.height or 2048) * (params.width or 2048) * scale
        most = max(most, int(pixels * (1 + batch_of(args, request))))
    return most


def size_of(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder; 0 for what cannot be read, which is said in loading."""
    try:
        files = path.rglob("*.*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0
