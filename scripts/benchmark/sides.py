"""The implementations that are compared: how each builds a part and runs it. Each has its own process."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sd.conditioning import TextOutput
from sd.control import AppliedControl, controlled
from sd.denoiser import Denoiser
from sd.latents import DECODE_IN_STRIPS, most_at_once
from sd.models.controlnet import Residuals
from sd.pipeline import StableDiffusion
from sd.runtime.cuda_graphs import Recorded
from sd.samplers import ddim, lcm
from sd.schedule import Schedule

from . import references, texts
from .cases import (
    GUIDANCE,
    IMAGES,
    PROMPTS,
    Case,
    arguments,
    inner_cases,
    inputs,
    inputs_of,
    needed,
    usual_case,
)
from .openvino_networks import PRECISIONS, Network, openvino
from .weights import Setup, load_networks

PEERS = ("diffusers", "compiled", "openvino")


class Side:
    """Our implementation, with the networks of one part; the base class of the others."""

    keeps_freed_memory = True  # whether it gains from cli.keep_freed_memory

    def __init__(self, setup: Setup, part: str) -> None:
        self.setup = setup
        self.networks = self.build(part)

    @staticmethod
    def libraries() -> None:
        """Import the libraries, whose memory does not count."""

    def build(self, part: str) -> dict[str, nn.Module]:
        """The networks that a part needs, by name."""
        return load_networks(self.setup, needed(part, self.setup.config))

    def call(self, case: Case) -> Callable[[], Any]:
        """The function to measure; it returns a tensor or images."""
        if case.part in IMAGES:
            return self.generate(case)
        if case.part == "control":
            return self.step(case)
        return partial(self.function(case), *arguments(case, self.inputs(case)))

    def step(self, case: Case) -> Callable[[], Tensor]:
        """A step of the U-Net, with its control network if the case has one; the hint is embedded at the first call."""
        networks: dict[str, Any] = dict(self.networks)
        *given, hint = arguments(case, self.inputs(case))
        control = networks["control"]
        called = networks
        if self.setup.device.type == "cuda":  # as Model does it
            called = {name: Recorded(network) for name, network in networks.items()}

        def residuals(x: Tensor, *more: Any) -> Residuals:
            return called["control"](x[:, : control.config.in_channels], *more)  # without those of a mask

        applied = [AppliedControl(residuals, control.embed, hint)] if case.controlled else []
        return partial(controlled(called["unet"], applied), *given)

    def inputs(self, case: Case) -> list[Tensor]:
        """The inputs on the device, in the precision; timesteps stay float32, tokens int64."""
        given = [tensor.to(self.setup.device) for tensor in inputs(case, self.setup.config)]
        return [x.to(self.setup.torch_dtype) if x.is_floating_point() and x.dim() > 1 else x for x in given]

    def function(self, case: Case) -> Callable[..., Tensor]:
        """The network of a part, as a function of its inputs."""
        if case.part == "text":
            encode = self.encoder(case)
            return lambda *ids: texts.flat(encode(*ids))
        network: Any
        ((name, network),) = self.networks.items()
        if name == "vae":  # as Model.decode does it
            in_strips = DECODE_IN_STRIPS[type(network.config)]
            most = most_at_once(network.config, self.setup.device)
            return partial(in_strips, network) if case.size**2 > most else network.decode
        if case.part == "unet" and self.setup.device.type == "cuda":  # as Model does it
            return Recorded(network)
        return network

    def encoder(self, case: Case) -> Callable[..., TextOutput]:
        """The text encoders as one function of the ids for each of them."""
        encoders = list(self.networks.values())
        return lambda *given: joined([encode(ids) for encode, ids in zip(encoders, given, strict=True)])

    def generate(self, case: Case) -> Callable[[], Any]:
        """From prompts to an image."""
        networks: dict[str, Any] = dict(self.networks)
        model = StableDiffusion(self.setup.config, **networks)
        settings: dict[str, Any] = {"steps": case.steps, "guidance": GUIDANCE, "sampler": "ddim"}
        if not case.guided:
            settings |= {"guidance": 1.0, "sampler": "lcm"}
        return lambda: model.txt2img(*PROMPTS, **settings)


class Diffusers(Side):
    """diffusers, with convolutions in channels-last layout as its guides recommend for speed."""

    @staticmethod
    def libraries() -> None:
        """Import the libraries."""
        references.libraries()

    def build(self, part: str) -> dict[str, nn.Module]:
        """Reference networks with our weights."""
        return references.peers(super().build(part), self.setup.config, self.setup.torch_dtype)

    def function(self, case: Case) -> Callable[..., Tensor]:
        """The network of a part."""
        if case.part == "text":
            return super().function(case)
        network: Any
        ((name, network),) = self.networks.items()
        return network.decode if name == "vae" else network

    def step(self, case: Case) -> Callable[[], Tensor]:
        """As its pipelines do it, with the hint embedded in each step."""
        unet, control = (self.networks[name] for name in ("unet", "control"))
        *given, hint = arguments(case, self.inputs(case))
        if not case.controlled:
            return partial(unet, *given)
        hint = hint.expand(given[0].shape[0], -1, -1, -1)
        return lambda: unet(*given, *control(*given, hint))

    def encoder(self, case: Case) -> Callable[..., TextOutput]:
        """The text encoders as one function of the ids for each of them."""
        encoders: list[Any] = [self.networks[name] for name in self.setup.config.text_names]
        return lambda *given: joined([one.encode(ids) for one, ids in zip(encoders, given, strict=True)])

    def generate(self, case: Case) -> Callable[[], Any]:
        """With its pipeline."""
        config = self.setup.config
        pipe = references.pipeline(self.networks, config)
        if not case.guided:
            pipe.scheduler = references.scheduler(config, "LCMScheduler")
        inner = inner_cases(case, config)["text"]
        ids, encode = self.inputs(inner), self.encoder(inner)

        def run() -> Any:
            cond, uncond = texts.prompt_and_negative(encode(*ids), case, config)
            told = {"prompt_embeds": cond.hidden, "negative_prompt_embeds": uncond and uncond.hidden}
            if cond.pooled is not None:
                told |= {"pooled_prompt_embeds": cond.pooled, "negative_pooled_prompt_embeds": uncond and uncond.pooled}
            return pipe(
                **told, num_inference_steps=case.steps, guidance_scale=GUIDANCE if case.guided else 1.0,
                height=case.size, width=case.size, generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip

        return run


class Compiled(Diffusers):
    """The same through torch.compile, for one shape; compiling is not measured."""

    def build(self, part: str) -> dict[str, nn.Module]:
        """Networks that are compiled on their first call."""
        networks = super().build(part)
        network: Any
        mode = "max-autotune" if self.setup.device.type == "cuda" else "default"
        for name, network in networks.items():
            (network.model.decoder if name == "vae" else network.model).compile(dynamic=False, mode=mode)
        return networks


class OpenVINO(Side):
    """diffusers' networks in OpenVINO, compiled for the shapes of each case."""

    keeps_freed_memory = False  # it manages its memory itself

    @staticmethod
    def libraries() -> None:
        """Import the libraries, with the CPU plugin."""
        openvino().Core().get_property("CPU", "FULL_DEVICE_NAME")

    def build(self, part: str) -> dict[str, nn.Module]:
        """Nothing yet: the networks are compiled for the shapes of a case."""
        return {}

    def function(self, case: Case) -> Callable[..., Tensor]:
        """The network of a part."""
        if case.part == "text":
            return super().function(case)
        ((_, network),) = self.compiled(case)
        return network

    def encoder(self, case: Case) -> Callable[..., TextOutput]:
        """The text encoders as one function of the ids for each of them."""
        encoders = [network for _, network in self.compiled(case)]
        return lambda *given: joined(
            [TextOutput(*network.outputs(ids)) for network, ids in zip(encoders, given, strict=True)]
        )

    def compiled(self, case: Case) -> list[tuple[str, Network]]:
        """The networks of a part that is not an image, by name."""
        given = inputs_of(case, self.setup.config)
        return [(name, Network(self.setup, name, [x.shape for x in tensors])) for name, tensors in given.items()]

    def generate(self, case: Case) -> Callable[[], Any]:
        """With our sampling loop, as OpenVINO has none."""
        config = self.setup.config
        cases = inner_cases(case, config)
        encode, unet, decode = self.encoder(cases["text"]), self.function(cases["unet"]), self.function(cases["vae"])
        ids, (noise,) = self.inputs(cases["text"]), inputs(cases["vae"], config)
        schedule = Schedule(config.schedule)

        def run() -> Tensor:
            both = texts.prompt_and_negative(encode(*ids), case, config)
            cond, *uncond = [texts.conditioning(text, case, config) for text in both if text is not None]
            if uncond:
                denoise = Denoiser(unet, schedule, cond, uncond[0], GUIDANCE)
                *_, last = ddim(denoise, noise, schedule.levels(case.steps))
            else:
                denoise = Denoiser(unet, schedule, cond)
                *_, last = lcm(denoise, noise, schedule.levels(case.steps, "lcm"), noise=torch.randn_like)
            return decode(last.x)

        return run


def joined(outputs: Sequence[TextOutput]) -> TextOutput:
    """The outputs of the text encoders of a model as one."""
    return TextOutput.joined(outputs) if len(outputs) > 1 else outputs[0]


SIDES = {"ours": Side, "diffusers": Diffusers, "compiled": Compiled, "openvino": OpenVINO}


def takes_part(peer: str, case: Case, setup: Setup) -> bool:
    """Whether a peer is measured in a case."""
    if case.part == "control":
        return peer == "diffusers"
    if peer == "openvino":
        return setup.dtype in PRECISIONS
    if peer == "compiled":  # takes minutes for each shape
        return case == usual_case(case.part, setup.config, case.steps)
    return True


def able_peers(named: Sequence[str] | None, device: torch.device) -> tuple[list[str], list[str]]:
    """The peers to compare with (those named, by default all that can run), and one line for each that cannot run.

    Raises ValueError if a named peer cannot run.
    """
    reasons = {peer: _unable(peer, device) for peer in PEERS if named is None or peer in named}
    lines = [f"not compared with {peer}: {reason}" for peer, reason in reasons.items() if reason]
    if named and lines:
        raise ValueError(lines[0])
    return [peer for peer, reason in reasons.items() if not reason], lines


def _unable(peer: str, device: torch.device) -> str | None:
    """The reason why a peer cannot run; None if it can."""
    gone = [*references.missing(), *(["openvino"] if peer == "openvino" and find_spec("openvino") is None else [])]
    if gone:
        return f"{' and '.join(gone)} not installed (pip install {' '.join(gone)})"
    if peer == "openvino" and device.type != "cpu":
        return f"it runs on the CPU here, not on {device.type}"
    return no_compiler(device) if peer == "compiled" else None


def no_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks; None if nothing."""
    if device.type == "cuda":
        return None if find_spec("triton") else "triton not installed, with which torch compiles for CUDA"
    if device.type != "cpu":
        return f"torch does not compile for {device.type}"
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler}), with which torch compiles"
