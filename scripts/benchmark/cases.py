"""The cases: the parts of generating an image, their inputs and their number of operations.

    unet       one step: the network on two items per image, for guidance
    control    the same with a control network, whose hint is embedded beforehand as for an image; and without it
    vae        latents to pixels, one image at a time as in all programs, so only its size matters
    taesd      the same with a tiny autoencoder (TAESD)
    text       two prompts, encoded by all text encoders of the model
    picture    prompt to image, with some steps of DDIM and guidance
    lcm        prompt to image, with some steps of LCM: no guidance, so one prompt, and one item in a step
    lcm-taesd  the same with a tiny autoencoder
    start      a new interpreter, imports, weights from files, and the first step (start.py)

Growth of the cost is measured for the U-Net over image size and batch size, and for the VAE over image size.
Latent consistency models have the networks of the models that they are distilled from, or LoRAs that are merged into
these, so any weights show their speed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sd.conditioning import Conditioning
from sd.config import Config, TinyVAEConfig
from sd.control_config import ControlConfig
from sd.models.build import build
from sd.models.controlnet import HINT_CHANNELS, ControlNet
from sd.text.tokenizer import Tokenizer

PARTS = ("unet", "control", "vae", "taesd", "text", "picture", "lcm", "lcm-taesd", "start")
FEW_STEPS = ("lcm", "lcm-taesd")  # without guidance
IMAGES = ("picture", *FEW_STEPS)  # from prompt to image
TINY_VAE = ("taesd", "lcm-taesd")  # with a tiny autoencoder in place of the VAE
LARGE_PARTS = ("unet", "control", "vae", "taesd", "text", "picture", "start")  # the default for a model like SDXL
STEPS, LARGE_STEPS = 4, 2  # of an image, by default; the latter for a model like SDXL
TITLES = {
    "unet": "U-Net step", "control": "controlled step", "vae": "VAE decode", "taesd": "TAESD decode",
    "text": "text encoder", "picture": "picture",
    "lcm": "LCM picture", "lcm-taesd": "LCM with TAESD",
}  # fmt: skip

PROMPTS = ("a photograph of an astronaut riding a horse", "")  # prompt and negative prompt
GUIDANCE = 7.5
TIMESTEP = 500.0


class Case(NamedTuple):
    """A part with image size (size x size pixels), batch size, for images the number of steps; and whether guided.

    controlled is for the part `control`: False for the same networks without the control network, its cost being the
    difference.
    """

    part: str
    size: int
    batch: int = 1
    steps: int = 1
    guided: bool = True
    controlled: bool = True


def all_cases(part: str, config: Config, steps: int, sizes: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """The usual case of a part and those that show the growth of its cost, in order of work, a controlled one first."""
    usual = usual_case(part, config, steps)
    cases = {usual}
    if part in ("unet", "vae"):
        cases |= {usual._replace(size=size) for size in sizes}
    if part == "unet":
        cases |= {usual._replace(batch=batch) for batch in batches}
    if part == "control":
        cases |= {usual._replace(controlled=False)}
    return sorted(cases, key=lambda case: (case.size**2 * case.batch, not case.controlled, case))


def usual_case(part: str, config: Config, steps: int = 1) -> Case:
    """One image of the model's native size."""
    return Case(part, config.size, steps=steps if part in IMAGES else 1, guided=part not in FEW_STEPS)


def inner_cases(case: Case, config: Config) -> dict[str, Case]:
    """For a part of `IMAGES`: what each network does for one image, by "text", "unet" (one step) and "vae".

    An empty negative prompt is not encoded where it means zeros.
    """
    cases = {part: usual_case(part, config)._replace(guided=case.guided) for part in ("text", "unet", "vae")}
    if config.zero_empty:
        cases["text"] = cases["text"]._replace(guided=False)
    return cases


def needed(part: str, config: Config) -> tuple[str, ...]:
    """The names of the networks that a part needs."""
    names = {"unet": ("unet",), "control": ("unet", "control"), "vae": ("vae",), "taesd": ("vae",)}
    names |= {"text": config.text_names}
    return names.get(part, config.networks)


def networks_of(names: Collection[str], config: Config) -> dict[str, nn.Module]:
    """Networks of a model by name, on the meta device; "control" is one that has all of the U-Net's first half."""
    built = build(config)
    if "control" in names:
        with torch.device("meta"):
            built["control"] = ControlNet(ControlConfig.of(config.unet))
    return {name: built[name] for name in names}


def config_of(part: str, config: Config) -> Config:
    """The config of a part's networks: that of the model, for `TINY_VAE` with a tiny autoencoder."""
    if part not in TINY_VAE:
        return config
    return replace(config, vae=TinyVAEConfig(latent_channels=config.vae.latent_channels))


def label(case: Case, config: Config) -> str:
    """The label of a row in the table."""
    side, size = case.size // config.vae.factor, f"{case.size}x{case.size}"
    step = f"{items(case)} x {side}x{side}"
    if not case.controlled:
        return f"the same without control, {step}"
    details = {"unet": step, "control": step, "text": f"{len(PROMPTS)} prompts"}
    details |= dict.fromkeys(IMAGES, f"{case.steps} step{'s' if case.steps > 1 else ''}, {size}")
    return f"{TITLES[case.part]}, {details.get(case.part, size)}"


def items(case: Case) -> int:
    """How many items a step of the U-Net computes: with guidance two for each image."""
    return (2 if case.guided else 1) * case.batch


def inputs(case: Case, config: Config) -> tuple[Tensor, ...]:
    """The input tensors of a part's network: the same values every time, on the CPU, in float32 (tokens: int64).

    unet (x (B, C, h, w), t (B,), context (B, M, D)) of B `items`, for SDXL with a vector (B, V) as well;
    control the same, and a hint (1, 3, H, W) as the last;
    vae, taesd (z (B, C, h, w),); text (ids (B, M), ...) for each text encoder.
    """
    if case.part == "text":
        prompts = PROMPTS if case.guided else PROMPTS[:1]
        return tuple(Tokenizer(length=text.length, pad=text.pad)(list(prompts)) for text in config.text)
    rng = torch.Generator().manual_seed(0)
    side = case.size // config.vae.factor
    if needed(case.part, config) == ("vae",):
        return (torch.randn(case.batch, config.vae.latent_channels, side, side, generator=rng),)
    B = items(case)
    x = torch.randn(B, config.unet.in_channels, side, side, generator=rng)
    shape = (B, config.text[0].length, config.unet.context)
    context = torch.randn(shape, generator=rng)  # of unit size, as the encoder's
    width = config.unet.vector
    vector = () if width is None else (torch.randn(B, width, generator=rng),)
    hint = (torch.rand(1, HINT_CHANNELS, case.size, case.size, generator=rng),) if case.part == "control" else ()
    return x, torch.full((B,), TIMESTEP), context, *vector, *hint


def inputs_of(case: Case, config: Config) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of `inputs` by the name of the network that they are for."""
    given, names = inputs(case, config), needed(case.part, config)
    return {name: (ids,) for name, ids in zip(names, given, strict=True)} if case.part == "text" else {names[0]: given}


def arguments(case: Case, given: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments of the part's network from the tensors of `inputs`: the U-Net takes a Conditioning.

    Those of the part `control` are the U-Net's, and the hint as the last.
    """
    if case.part not in ("unet", "control"):
        return tuple(given)
    x, t, *told = given
    hint = (told.pop(),) if case.part == "control" else ()
    return x, t, Conditioning(*told), *hint


@cache
def flop(case: Case, config: Config) -> float:
    """Floating-point operations of the plain formulas, counted on the meta device; `config` is that of `config_of`.

    Operations that a faster kernel saves still count, for all implementations.
    """
    if case.part in IMAGES:
        once = {part: flop(inner, config) for part, inner in inner_cases(case, config).items()}
        return case.steps * once["unet"] + once["vae"] + once["text"]
    networks: Any = networks_of(needed(case.part, config), config)
    if case.part == "control":
        step = flop(Case("unet", case.size, case.batch, guided=case.guided), config)
        return step + (control_flop(case, config, networks["control"]) if case.controlled else 0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for name, given in inputs_of(case, config).items():
            call = networks[name].decode if name == "vae" else networks[name]
            call(*arguments(case, [tensor.to("meta") for tensor in given]))
    return float(counter.get_total_flops())


def control_flop(case: Case, config: Config, network: ControlNet) -> float:
    """Those of a control network in a step. The hint does not count: it is embedded once per image."""
    x, t, conditioning, hint = arguments(case, [tensor.to("meta") for tensor in inputs(case, config)])
    with torch.no_grad():
        features = network.embed(hint)
        with FlopCounterMode(display=False) as counter:
            network(x[:, : network.config.in_channels], t, conditioning, features)
    return float(counter.get_total_flops())


def weight_bytes(part: str, config: Config, dtype: torch.dtype) -> int:
    """Bytes of one copy of the weights of all networks that a part needs."""
    networks = networks_of(needed(part, config), config).values()
    numbers = sum(weight.numel() for network in networks for weight in network.state_dict().values())
    return numbers * dtype.itemsize
