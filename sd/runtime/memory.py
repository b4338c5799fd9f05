"""How much memory a run needs at least, known before anything is loaded, and how much is free.

Weights are counted. What a network needs beside them is estimated from its largest maps, those that are in memory at
the same time:

    a step      the skip connections not yet used, the map from the level below, and for one block either three times
                its input or, in the feed-forward layer of its transformer, sixteen maps of its width
    control     the residuals of control networks, as large as the skip connections, while the U-Net runs; what a
                control network itself needs is less than a step
    the VAE     at the finest level two and a half maps; in strips two, and a quarter of one from the level before

On a GPU this is within a tenth of what the sizes of live tensors add up to (tests/test_sdxl_memory.py). The memory of
the libraries and fragmentation come on top.

Sizes are in bytes. B batch, H x W pixels of the image, h x w of the latents.

>>> from sd.config import SD1
>>> job = Job(512, 512)
>>> [round(needed(SD1, torch.float16, job, kept) / 1e9, 1) for kept in (ALL, WITHOUT_TEXT, ONE)]
[2.5, 2.2, 1.8]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import Config, TinyVAEConfig, UNetConfig, VAEConfig
from ..models.build import weight_shapes

# Which networks of a model are on the device: all, all but the text encoders while they are not needed, or one
ALL, WITHOUT_TEXT, ONE = "all", "without text encoders", "one"
MEMINFO = Path("/proc/meminfo")
LIMITS = Path("/sys/fs/cgroup")  # of a container
OF_STRIPS = 2**27  # what the VAE's strips need: some are in memory at once
OF_RECORDING = 3  # times its residuals: what the recording of a control network keeps, its own skip connections first


class Job(NamedTuple):
    """What decides how much memory a run needs, beside the model and its precision."""

    height: int  # H
    width: int
    batch: int = 1  # images at once
    guided: bool = True  # each is two in the U-Net
    exact: bool = False  # the VAE overflows in float16 and is computed in float32
    whole: int = 1024 * 1024  # pixels up to which the VAE takes an image as a whole
    recorded: bool = False  # steps are recorded, which keeps their memory (cuda_graphs.py)
    controls: tuple[int, ...] = ()  # weights of each control network; those are always on the device


def weight_bytes(config: Config, dtype: torch.dtype) -> dict[str, int]:
    """The weights of each network."""
    return {
        name: sum(map(math.prod, shapes.values())) * dtype.itemsize for name, shapes in weight_shapes(config).items()
    }


def step_bytes(config: UNetConfig, dtype: torch.dtype, batch: int, height: int, width: int) -> int:
    """What the U-Net needs beside its weights, for a batch of latents of this size."""
    pixels = _pixels(config, height, width)
    kept = _skips(config, pixels)
    most, below = 0, config.channels[-1]  # channels that come from below
    for i, channels in reversed(list(enumerate(config.channels))):
        depths = config.depths_up(i)
        for depth in depths:
            joined = below * pixels[i] + kept.pop()
            needs = [3 * joined]  # the input of the residual block as it is, normalised, and a copy or the convolution
            if depth:  # four of the channels, the two halves of the projection, and the product
                needs.append((4 + 12) * channels * pixels[i])
            most = max(most, sum(kept) + below * pixels[i] + max(needs))
            below = channels
    return most * batch * dtype.itemsize


def _pixels(config: UNetConfig, height: int, width: int) -> list[int]:
    """The positions at each level of a U-Net, for latents of this size."""
    pixels = [height * width]
    for _ in config.channels[1:]:
        height, width = -(-height // 2), -(-width // 2)
        pixels.append(height * width)
    return pixels


def _skips(config: UNetConfig, pixels: Sequence[int]) -> list[int]:
    """The numbers in each skip connection of an image."""
    kept = [config.channels[0] * pixels[0]]
    for i, channels in enumerate(config.channels):
        kept += [channels * pixels[i]] * config.blocks
        kept += [channels * size for size in pixels[i + 1 : i + 2]]
    return kept


def residual_bytes(config: UNetConfig, dtype: torch.dtype, batch: int, height: int, width: int) -> int:
    """The residuals of a control network, for a batch of latents of this size: skip connections and middle."""
    pixels = _pixels(config, height, width)
    return (sum(_skips(config, pixels)) + config.channels[-1] * pixels[-1]) * batch * dtype.itemsize


def vae_bytes(config: VAEConfig | TinyVAEConfig, dtype: torch.dtype, job: Job) -> int:
    """What decoding an image needs beside the VAE's weights."""
    if isinstance(config, TinyVAEConfig):
        return 0  # less than a step
    pixels, size = job.height * job.width, 4 if job.exact else dtype.itemsize
    fine, coarse = config.channels[0], config.channels[:2][-1]
    if pixels <= job.whole // (2 if job.exact else 1):
        return 5 * coarse * pixels * size // 2
    return (8 * fine + coarse) * pixels * size // 4 + OF_STRIPS


def needed(config: Config, dtype: torch.dtype, job: Job, kept: str = ALL, refiner: Config | None = None) -> int:
    """About the least memory in which a run succeeds.

    kept      `ALL`, `WITHOUT_TEXT` or `ONE`
    refiner   the config of a second model for the last steps, of which the same networks are kept
    """
    factor = config.vae.factor
    h, w, batch = job.height // factor, job.width // factor, job.batch * (2 if job.guided else 1)
    models = [config] if refiner is None else [config, refiner]
    weights = [weight_bytes(each, dtype) for each in models]
    steps = [step_bytes(each.unet, dtype, batch, h, w) for each in models]
    image = vae_bytes(config.vae, dtype, job)
    controls = sum(job.controls) * dtype.itemsize
    if job.controls:
        residuals = residual_bytes(config.unet, dtype, batch, h, w)
        steps[0] += residuals
        image += OF_RECORDING * len(job.controls) * residuals if job.recorded else 0
    if job.exact:
        image += weights[0]["vae"] // dtype.itemsize * 4  # a copy of it
    text = max(size for own in weights for name, size in own.items() if name not in ("unet", "vae"))
    if kept == ONE:
        unet = max(own["unet"] + step for own, step in zip(weights, steps, strict=True))
        return max(unet, weights[0]["vae"] + image, text) + controls
    if job.recorded:
        image += sum(steps)
    always = sum(size for own in weights for name, size in own.items() if kept == ALL or name in ("unet", "vae"))
    return controls + always + max(*steps, image, 0 if kept == ALL else text)


def available(device: torch.device) -> int | None:
    """Free memory of a device; None if that is not known. Of the CPU, on Linux: what programs can have, with swap."""
    if device.type == "cuda":
        with suppress(RuntimeError, AssertionError):  # without a driver
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + unused
            if is_integrated(device):  # what it calls free is without the pages of files, which the system can drop
                free = max(free, _of_the_system() or 0)
            return free
        return None
    return _of_the_system() if device.type == "cpu" else None


def is_integrated(device: torch.device) -> bool:
    """Whether a device is a GPU whose memory is that of the CPU."""
    return device.type == "cuda" and bool(torch.cuda.get_device_properties(device).is_integrated)


def _of_the_system() -> int | None:
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        sizes = {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
        free, swap = sizes["MemAvailable"], sizes.get("SwapFree", 0)
    except (OSError, ValueError, LookupError):  # another system
        return None
    with suppress(OSError, ValueError, LookupError):  # no limit, or none that is known
        used = dict(line.split() for line in _limit("memory.stat").splitlines())
        free = min(free, int(_limit("memory.max")) - int(used["anon"]))
    with suppress(OSError, ValueError):
        swap = min(swap, int(_limit("memory.swap.max")) - int(_limit("memory.swap.current")))
    return free + swap


def _limit(name: str) -> str:
    """A file of the control group (version 2) in which a container runs."""
    return (LIMITS / name).read_text(encoding="ascii")
