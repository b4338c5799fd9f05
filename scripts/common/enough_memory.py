"""Whether the memory of the device suffices for a call, before its model is loaded: one line with what to change."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from sd.checkpoints.loading import LoadOptions, ModelFiles
from sd.checkpoints.weights_cache import WeightsCache
from sd.config import Config
from sd.hires import enlarged_shape
from sd.latents import image_size, latent_shape, most_at_once
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage
from sd.resources import EMBEDDED, resource
from sd.runtime.device import best_dtype, dtype_name, find_device, find_dtype
from sd.runtime.memory import ALL, ONE, WITHOUT_TEXT, Job, available, needed, weight_bytes

from .arguments import NICKNAMES
from .user_cache import cache_folder
from .xl_args import base_options, refiner_options

PER_PIXEL = 4096  # bytes; more than a network needs for a pixel of an image, beside its weights


def check_memory(args: argparse.Namespace, requests: Sequence[TextToImage]) -> None:
    """Raise ValueError if the device has less free memory than the call needs at least (sd/runtime/memory.py).

    The headers of the files are read only where memory could be short by their size.
    """
    device = find_device(args.device)
    free = available(device)
    if free is None:
        return
    given = NICKNAMES.get(args.dtype, args.dtype)
    dtype = best_dtype(device) if given is None else find_dtype(given)
    file = args.ckpt or resource(EMBEDDED)
    paths = [file, *([args.refiner] if args.refiner else [])]
    if sum(map(size_of, paths)) * 2 + PER_PIXEL * most_pixels(args, requests) < free:
        return
    with ModelFiles(file, LoadOptions(**base_options(args), cache=cache_folder(args))) as files:
        config, exact = files.config, dtype == torch.float16 and bool(files.overflows)
        mapped = files.options.cache is not None and WeightsCache.of(files, dtype).file.exists()
    refiner = None
    if args.refiner:
        with ModelFiles(args.refiner, LoadOptions(**refiner_options(args))) as files:
            refiner = files.config
    cuda = device.type == "cuda"
    kinds = [ONE] if args.low_memory else [WITHOUT_TEXT] if cuda else [ALL]
    for request in requests:
        try:
            job = job_of(args, request, config, exact, device)
        except ValueError:  # a size that this model cannot have, which is said with its line
            continue
        least = {kept: needed(config, dtype, job, kept, refiner) for kept in (*kinds, ONE)}
        if mapped:  # the system reads these pages of the cache's file again
            least[kinds[0]] -= sum(weight_bytes(config, dtype).values())
        if least[kinds[0]] > free:
            raise ValueError(shortage(args, config, dtype, job, least, free, device))


def shortage(
    args: argparse.Namespace,
    config: Config,
    dtype: torch.dtype,
    job: Job,
    least: dict[str, int],
    free: int,
    device: torch.device,
) -> str:
    """What is missing, and the options that help."""
    now, *_ = least.values()
    knobs = []
    if not args.low_memory:
        knobs.append(f"--low-memory ({least[ONE] / 1e9:.1f} GB)")
    if args.refiner:
        knobs.append("no --refiner")
    if dtype == torch.float32:
        knobs.append("--dtype float16" if device.type == "cuda" else "--dtype bfloat16")
    if job.batch > 1:
        knobs.append("--batch-size 1")
    knobs.append("a smaller --height and --width")
    if device.type == "cuda":
        knobs.append("--device cpu")
    images = f"{job.batch} images" if job.batch > 1 else "an image"
    return (
        f"{config.name} needs at least {now / 1e9:.1f} GB for {images} of {job.width}x{job.height} in "
        f"{dtype_name(dtype)}, and {device} has {free / 1e9:.1f} GB of free memory: try {', '.join(knobs)}"
    )


def job_of(args: argparse.Namespace, request: TextToImage, config: Config, exact: bool, device: torch.device) -> Job:
    """The largest batch of a request; ValueError for a size that this model cannot have."""
    params = request.params
    height, width = params.height or config.size, params.width or config.size
    if isinstance(request, ImageToImage | Inpaint):
        height, width = image_size(config, request.image.size, params.height, params.width)
    elif isinstance(request, HighRes):
        _, h, w = enlarged_shape(config, request)
        height, width = h * config.vae.factor, w * config.vae.factor
    latent_shape(config, height, width)  # raises for a size that cannot be
    guided = params.guidance not in (None, 1)  # None: some models have guidance 1 by default
    recorded = device.type == "cuda" and not args.low_memory
    return Job(height, width, batch_of(args, request), guided, exact, most_at_once(config.vae, device), recorded)


def batch_of(args: argparse.Namespace, request: TextToImage) -> int:
    """The most images that are generated at once."""
    return 1 if request.params.exact else min(args.batch_size, request.params.n * args.n_iter)


def most_pixels(args: argparse.Namespace, requests: Sequence[TextToImage]) -> int:
    """At least the pixels of the largest batch; an image without a size has no more than 2048x2048."""
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
