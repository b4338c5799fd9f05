"""The cases: the parts of generating an image, their inputs and their number of operations.

    unet     one step: the network on two items per image, for guidance
    vae      latents to pixels, one image at a time as in all programs, so only its size matters
    text     two prompts
    picture  prompt to image, with some steps of DDIM and guidance
    start    a new interpreter, imports, weights from files, and the first step (start.py)

Growth of the cost is measured for the U-Net over image size and batch size, and for the VAE over image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sd.checkpoints.layouts import NETWORKS
from sd.conditioning import Conditioning
from sd.config import Config
from sd.models.build import build
from sd.text.tokenizer import Tokenizer

PARTS = ("unet", "vae", "text", "picture", "start")
NEEDED = {"unet": ("unet",), "vae": ("vae",), "text": ("text_encoder",), "picture": NETWORKS, "start": NETWORKS}
TITLES = {"unet": "U-Net step", "vae": "VAE decode", "text": "text encoder", "picture": "picture"}

PROMPTS = ("a photograph of an astronaut riding a horse", "")  # prompt and negative prompt
GUIDANCE = 7.5
TIMESTEP = 500.0


class Case(NamedTuple):
    """A part with image size (size x size pixels), batch size, and for "picture" the number of steps."""

    part: str
    size: int
    batch: int = 1
    steps: int = 1


def all_cases(part: str, config: Config, steps: int, sizes: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """The usual case of a part and those that show the growth of its cost, in order of work."""
    usual = usual_case(part, config, steps)
    cases = {usual}
    if part in ("unet", "vae"):
        cases |= {usual._replace(size=size) for size in sizes}
    if part == "unet":
        cases |= {usual._replace(batch=batch) for batch in batches}
    return sorted(cases, key=lambda case: (case.size**2 * case.batch, case))


def usual_case(part: str, config: Config, steps: int = 1) -> Case:
    """One image of the model's native size."""
    return Case(part, config.size, steps=steps if part == "picture" else 1)


def label(case: Case, config: Config) -> str:
    """The label of a row in the table."""
    side, size = case.size // config.vae.factor, f"{case.size}x{case.size}"
    details = {
        "unet": f"{2 * case.batch} x {side}x{side}",
        "vae": size,
        "text": f"{len(PROMPTS)} prompts",
        "picture": f"{case.steps} step{'s' if case.steps > 1 else ''}, {size}",
    }
    return f"{TITLES[case.part]}, {details[case.part]}"


def inputs(case: Case, config: Config) -> tuple[Tensor, ...]:
    """The input tensors of a part's network: the same values every time, on the CPU, in float32 (tokens: int64).

    unet (x (2B, C, h, w), t (2B,), context (2B, M, D)); vae (z (B, C, h, w),); text (ids (2, M),).
    """
    if case.part == "text":
        return (Tokenizer(length=config.text[0].length, pad=config.text[0].pad)(list(PROMPTS)),)
    rng = torch.Generator().manual_seed(0)
    side = case.size // config.vae.factor
    if case.part == "vae":
        return (torch.randn(case.batch, config.vae.latent_channels, side, side, generator=rng),)
    B = 2 * case.batch
    x = torch.randn(B, config.unet.in_channels, side, side, generator=rng)
    shape = (B, config.text[0].length, config.unet.context)
    context = torch.randn(shape, generator=rng)  # of unit size, as the encoder's
    return x, torch.full((B,), TIMESTEP), context


def arguments(case: Case, given: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments of the part's network from the tensors of `inputs`: the U-Net takes a Conditioning."""
    if case.part != "unet":
        return tuple(given)
    x, t, context = given
    return x, t, Conditioning(context)


@cache
def flop(case: Case, config: Config) -> float:
    """Floating-point operations of the plain formulas, counted on the meta device.

    Operations that a faster kernel saves still count, for all implementations.
    """
    if case.part == "picture":
        once = {part: flop(usual_case(part, config), config) for part in ("unet", "vae", "text")}
        return case.steps * once["unet"] + once["vae"] + once["text"]
    (name,) = NEEDED[case.part]
    network: Any = build(config)[name]
    call = network.decode if case.part == "vae" else network
    given = [tensor.to("meta") for tensor in inputs(case, config)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*arguments(case, given))
    return float(counter.get_total_flops())


def weight_bytes(part: str, config: Config, dtype: torch.dtype) -> int:
    """Bytes of one copy of the weights of all networks that a part needs."""
    built = build(config)
    numbers = sum(weight.numel() for name in NEEDED[part] for weight in built[name].state_dict().values())
    return numbers * dtype.itemsize
