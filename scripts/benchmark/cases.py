"""What is measured: the parts of painting a picture, their inputs, and how much arithmetic each takes.

    unet     one step: the network on two items a picture, as guidance needs
    vae      latents to pixels, one picture at a time as all programs do it: so only its size matters
    text     two prompts
    picture  prompt to picture, with some steps of DDIM and guidance
    start    a new interpreter, imports, weights from files, and the first step (start.py)

How cost grows is seen on the U-Net in sizes and in pictures at a time, and on the VAE in sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sd.checkpoints.layouts import NETWORKS
from sd.checkpoints.loading import build
from sd.conditioning import Conditioning
from sd.config import Config
from sd.text.tokenizer import Tokenizer

PARTS = ("unet", "vae", "text", "picture", "start")
NEEDED = {"unet": ("unet",), "vae": ("vae",), "text": ("text_encoder",), "picture": NETWORKS, "start": NETWORKS}
TITLES = {"unet": "U-Net step", "vae": "VAE decode", "text": "text encoder", "picture": "picture"}

PROMPTS = ("a photograph of an astronaut riding a horse", "")  # what to paint, and what to steer away from
GUIDANCE = 7.5
TIMESTEP = 500.0


class Case(NamedTuple):
    """One thing to measure: a part, for so many pictures of size x size pixels; of a picture, in so many steps."""

    part: str
    size: int
    batch: int = 1
    steps: int = 1


def all_cases(part: str, config: Config, steps: int, sizes: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """The usual case of a part, and those that show how its cost grows; the least work first."""
    usual = usual_case(part, config, steps)
    cases = {usual}
    if part in ("unet", "vae"):
        cases |= {usual._replace(size=size) for size in sizes}
    if part == "unet":
        cases |= {usual._replace(batch=batch) for batch in batches}
    return sorted(cases, key=lambda case: (case.size**2 * case.batch, case))


def usual_case(part: str, config: Config, steps: int = 1) -> Case:
    """One picture of the model's native size."""
    return Case(part, config.size, steps=steps if part == "picture" else 1)


def label(case: Case, config: Config) -> str:
    """What a row of the table is called."""
    side, size = case.size // config.vae.factor, f"{case.size}x{case.size}"
    details = {
        "unet": f"{2 * case.batch} x {side}x{side}",
        "vae": size,
        "text": f"{len(PROMPTS)} prompts",
        "picture": f"{case.steps} step{'s' if case.steps > 1 else ''}, {size}",
    }
    return f"{TITLES[case.part]}, {details[case.part]}"


def inputs(case: Case, config: Config) -> tuple[Tensor, ...]:
    """The tensors that a part's network is given: the same numbers every time, on the CPU, in float32 (tokens: int64).

    unet (x (2B, C, h, w), t (2B,), context (2B, M, D)); vae (z (B, C, h, w),); text (ids (2, M),).
    """
    if case.part == "text":
        return (Tokenizer(length=config.text.length, pad=config.text.pad)(list(PROMPTS)),)
    rng = torch.Generator().manual_seed(0)
    side = case.size // config.vae.factor
    if case.part == "vae":
        return (torch.randn(case.batch, config.vae.latent_channels, side, side, generator=rng),)
    B = 2 * case.batch
    x = torch.randn(B, config.unet.in_channels, side, side, generator=rng)
    context = torch.randn(B, config.text.length, config.text.width, generator=rng)  # of unit size, as the encoder's
    return x, torch.full((B,), TIMESTEP), context


def arguments(case: Case, given: Sequence[Tensor]) -> tuple[Any, ...]:
    """What the part's network is called with, of the tensors of `inputs`: the U-Net's context is a Conditioning."""
    if case.part != "unet":
        return tuple(given)
    x, t, context = given
    return x, t, Conditioning(context)


@cache
def flop(case: Case, config: Config) -> float:
    """Floating-point operations of the plain formulas, counted without computing anything.

    What a kernel saves (cpu_kernels.UpsampleConv2d) still counts, for us as for the others.
    """
    if case.part == "picture":
        once = {part: flop(usual_case(part, config), config) for part in ("unet", "vae", "text")}
        return case.steps * once["unet"] + once["vae"] + once["text"]
    (name,) = NEEDED[case.part]
    network = build(config)[name]
    call = network.decode if case.part == "vae" else network
    given = [tensor.to("meta") for tensor in inputs(case, config)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*arguments(case, given))
    return float(counter.get_total_flops())


def weight_bytes(part: str, config: Config, dtype: torch.dtype) -> int:
    """One copy of the weights of all networks that a part needs."""
    built = build(config)
    numbers = sum(weight.numel() for name in NEEDED[part] for weight in built[name].state_dict().values())
    return numbers * dtype.itemsize
