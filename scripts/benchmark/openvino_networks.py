"""diffusers' networks in OpenVINO, used as recommended: converted once to files, then compiled for fixed input shapes.

Fixed shapes make it faster (5 % of a U-Net step), and so does a float16 file if it computes in half precision. Weights
stay in the mapped file; compiling makes one copy in the layout that it computes with.

A float16 file is converted from float16 weights, as optimum-intel does it: linear layers are not computed while the
network is traced, and their weights become the constants of the file without a copy. So converting the U-Net of SDXL
takes 10 GB, as much as its weights in float32 alone. The file is the same as from float32 weights, rounded at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sd.conditioning import Conditioning
from sd.config import Config, TinyVAEConfig

from .cases import inputs_of, needed, usual_case
from .references import peers
from .weights import Setup, load_networks

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}  # its names of the precisions that every CPU supports
COARSEST = 4  # side of the U-Net's coarsest map for the inputs that a network is traced with
PATCHED = "_openvino_module_extension_patch_orig_forward"  # where OpenVINO keeps a method that it has replaced


def openvino() -> ModuleType:
    """The package, without its telemetry."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes its import fail
    import openvino

    return openvino


class Decoder(nn.Module):
    """A VAE as a module that converts latents to an image."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        return self.vae.decode(z)


class Encoder(nn.Module):
    """A text encoder as a module that returns only tensors."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """ids (B, M) -> hidden (B, M, D) and, if the model uses it, pooled (B, P)."""
        hidden, pooled = self.encoder.encode(ids)
        return hidden if pooled is None else (hidden, pooled)


class PlainUNet(nn.Module):
    """A U-Net as a module that takes only tensors."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,), context (B, M, D), for SDXL vector (B, V) -> (B, C_out, H, W)."""
        return self.unet(x, t, Conditioning(context, vector))


def model_file(setup: Setup, network: str) -> Path:
    """The path of the converted network, which `write_models` writes."""
    if network == "vae" and isinstance(setup.config.vae, TinyVAEConfig):
        network = "taesd"
    return setup.folder / f"{network}-{'float32' if setup.dtype == 'float32' else 'float16'}.xml"


class Conversion:
    """Converts networks; run in its own process, because it needs the memory of several copies of the weights."""

    def write_models(self, setup: Setup, part: str) -> None:
        """Write the networks that a part needs, unless their files exist."""
        files = {name: model_file(setup, name) for name in needed(part, setup.config)}
        for name in [name for name, file in files.items() if not file.exists()]:
            half = files[name].stem.endswith("float16")
            its = replace(setup, dtype="float16" if half else "float32", device=torch.device("cpu"))
            built = peers(load_networks(its, [name]), its.config, its.torch_dtype, "default")[name]
            network = {"vae": Decoder, "unet": PlainUNet}.get(name, Encoder)(built)
            openvino().save_model(
                converted(network, example(name, its.config), half), files[name], compress_to_fp16=half
            )


def example(name: str, config: Config) -> tuple[Tensor, ...]:
    """Small inputs to trace a network with: the converted one takes all shapes."""
    part = name if name in ("unet", "vae") else "text"
    size = COARSEST * config.vae.factor * 2 ** (len(config.unet.channels) - 1)
    return inputs_of(usual_case(part, config)._replace(size=size), config)[name]


def converted(network: nn.Module, given: tuple[Tensor, ...], half: bool) -> Any:
    """A network as OpenVINO's model; `given` is an example of its inputs, in float32.

    half    its weights are float16. It is changed and must not be used again
    """
    if half:
        for layer in network.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None and not layer.bias.any():
                layer.register_parameter("bias", None)  # as OpenVINO does it with float32 weights
    with torch.no_grad(), traceable(network) if half else nullcontext():
        return openvino().convert_model(network, example_input=given)


@contextmanager
def traceable(network: nn.Module) -> Iterator[None]:
    """Let a network with 16-bit weights be traced with float32 inputs."""
    openvino()
    from openvino.frontend.pytorch import patch_model

    getattr(patch_model, "__make_16bit_traceable")(network)
    try:
        yield
    finally:
        patch_model.unpatch_model(network, PATCHED)


def options(setup: Setup) -> dict[str, object]:
    """Compile options: lowest latency, this precision and number of threads."""
    return {
        "INFERENCE_NUM_THREADS": setup.threads,
        "INFERENCE_PRECISION_HINT": PRECISIONS[setup.dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }


class Network:
    """A converted network, compiled for inputs of these shapes; called with tensors like ours."""

    def __init__(self, setup: Setup, name: str, shapes: Sequence[Sequence[int]]) -> None:
        core = openvino().Core()
        model = core.read_model(model_file(setup, name))
        model.reshape(dict(zip(model.inputs, map(list, shapes), strict=True)))
        self._request = core.compile_model(model, "CPU", options(setup)).create_infer_request()

    def __call__(self, *inputs: Tensor | Conditioning) -> Tensor:
        """The first of `outputs`."""
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor | Conditioning) -> list[Tensor]:
        """Inputs in the order and shapes of the constructor, a Conditioning for its context and vector -> float32."""
        split = [x[:2] if isinstance(x, Conditioning) else (x,) for x in inputs]
        tensors = [x for several in split for x in several if x is not None]
        arrays = [(x.float() if x.is_floating_point() else x).numpy() for x in tensors]
        return [torch.from_numpy(array) for array in self._request.infer(arrays).values()]
