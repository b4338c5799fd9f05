"""LoRA to train: a network stays as it is, and low-rank changes of some of its layers are learned.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models" (arXiv:2106.09685): a layer with the weight W
(out, in) computes

    W x + (alpha / r) B A x          A (r, in) starts at random, B (out, r) at zero, so that nothing changes at first

and only A and B are trained. For a convolution, A is one of the same size and stride to r channels, and B a 1x1
convolution. r is the rank; alpha is fixed, so that other ranks need no other learning rate.

The changes are added by hooks (`TrainableLora.attach`): the network keeps its class and its parameters, and with the
changes disabled it computes what it did, to the bit. sd/adapters reads and merges LoRA files of any tool;
`lora_tensors` writes one that other tools read, too, in the form of kohya's scripts:

    lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight    A (r, in)
                                                                        .lora_up.weight      B (out, r)
                                                                        .alpha               a number

For SDXL, kohya's scripts name the U-Net's layers as the original does, lora_unet_input_blocks_4_1_..., and those of the
two text encoders lora_te1_... and lora_te2_....

>>> from sd.config import UNetConfig
>>> from sd.models.unet import UNet
>>> unet = UNet(UNetConfig(channels=(32, 64), heads=(2, 2), depth=(0, 1), blocks=1, context=16))
>>> lora = TrainableLora(unet, lora_layers(unet), rank=4)
>>> len(lora.names), sum(p.numel() for p in lora.parameters()) < sum(p.numel() for p in unet.parameters()) / 4
(79, True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checkpoints.key_maps import UNET, Source, diffusers_sources, original_sources
from ..config import Config
from ..models.layers import module_list

# Layers that tools train: those of transformers, and with convolutions those of residual blocks and between levels.
# The others (conv_in, conv_out, the embedding of the timestep) are small, and some programs do not look for them.
ATTENTION = (".attn.q", ".attn.k", ".attn.v", ".attn.out", ".fc1", ".fc2")  # of the text encoder
TRANSFORMER = tuple(f".{attn}.{name}" for attn in ("attn1", "attn2") for name in ("q", "k", "v", "out"))
TRANSFORMER += (".ff.proj", ".ff.out", ".proj_in", ".proj_out", *ATTENTION)
CONVOLUTIONS = (".conv1", ".conv2", ".skip", ".time", ".down", ".up.conv")


class LoraLayer(nn.Module):
    """A and B of one layer, a linear one or a convolution."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        into = layer.weight.shape[1:]  # (in,) or (in, height, width)
        ones = [1] * (len(into) - 1)
        self.scale = alpha / rank
        self.geometry: tuple[Any, Any] | None = None  # stride and padding of a convolution
        if isinstance(layer, nn.Conv2d):
            self.geometry = layer.stride, layer.padding
        self.down = nn.Parameter(layer.weight.new_empty(rank, *into, dtype=torch.float32))
        self.up = nn.Parameter(layer.weight.new_zeros(len(layer.weight), rank, *ones, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the output of the layer for an input x."""
        x = x.to(self.down.dtype)
        if self.geometry is None:
            return self.scale * F.linear(F.linear(x, self.down), self.up)
        stride, padding = self.geometry
        return self.scale * F.conv2d(F.conv2d(x, self.down, None, stride, padding), self.up)

    def delta(self) -> Tensor:
        """The change of the weight, (alpha / r) B A, in the shape of the weight."""
        change = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * change.unflatten(1, self.down.shape[1:])


class TrainableLora(nn.Module):
    """The changes of some layers of a network: its parameters are A and B of each.

    network   not changed, nor kept
    names     of linear layers and convolutions in it, such as `lora_layers` gives
    rank      r, from 1
    alpha     above 0; by default the rank, so that the scale is 1
    seed      of A's initial values, which are those of a linear layer (Kaiming-uniform), as in kohya's scripts

    Raises ValueError for a layer that is no linear layer or convolution, and for a rank or alpha out of range.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], rank: int, alpha: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        alpha = float(rank) if alpha is None else alpha
        if rank < 1 or not 0 < alpha < math.inf or not names:
            raise ValueError(f"a LoRA needs layers, a rank from 1 and alpha above 0: got {len(names)}, {rank}, {alpha}")
        self.names, self.rank, self.alpha, self.enabled = tuple(names), rank, alpha, True
        self._hooks: list[RemovableHandle] = []
        rng = torch.Generator().manual_seed(seed)
        made = []
        for name in names:
            layer = network.get_submodule(name)
            if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
                raise ValueError(f"{name} is a {type(layer).__name__}: a LoRA changes linear layers and convolutions")
            made.append(LoraLayer(layer, rank, alpha))
            down = made[-1].down
            bound = down[0].numel() ** -0.5  # of nn.Linear: kaiming_uniform_ with a = sqrt(5)
            with torch.no_grad():
                down.copy_((2 * torch.rand(down.shape, generator=rng) - 1) * bound)
        self.layers = module_list(made)

    def attach(self, network: nn.Module) -> None:
        """Let the network compute with the changes from now on. Its own parameters stay trainable if they are.

        Raises ValueError if it is attached already.
        """
        if self._hooks:
            raise ValueError("the LoRA is attached to a network already: detach it first")
        for name, layer in zip(self.names, self.layers, strict=True):
            self._hooks.append(network.get_submodule(name).register_forward_hook(self._adder(layer)))

    def detach(self) -> None:
        """Take the changes off the network again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _adder(self, layer: LoraLayer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + layer(inputs[0]).to(output.dtype) if self.enabled else output

        return add

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside a `with` block, the network computes without the changes."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @torch.no_grad()
    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the network with the changes added to its weights, which stay as they are."""
        changed = dict(state)
        for name, layer in zip(self.names, self.layers, strict=True):
            key = f"{name}.weight"
            changed[key] = (state[key].float() + layer.delta()).to(state[key].dtype)
        return changed


def lora_layers(network: nn.Module, convolutions: bool = True) -> list[str]:
    """The layers of a U-Net or text encoder that LoRAs usually change, in the order of the network.

    convolutions   also those of residual blocks and between levels, beside the transformers': a change of how the
                   network denoises, not only of what it paints, needs them
    """
    ends = TRANSFORMER + (CONVOLUTIONS if convolutions else ())
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [name for name in found if f".{name}".endswith(ends)]


def lora_tensors(
    loras: Mapping[str, TrainableLora], config: Config, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a LoRA file: kohya's names, for diffusers, ComfyUI, the web UI and this project.

    loras    by network: "unet", "text_encoder", "text_encoder_2"
    config   of the model: where its files have 1x1 convolutions for linear layers, so has the LoRA
    dtype    of A and B; alpha is float32
    """
    tensors: dict[str, Tensor] = {}
    for network, lora in loras.items():
        for source, layer in zip(_kohya(network, lora.names, config), lora.layers, strict=True):
            name = source.key.removesuffix(".weight").replace(".", "_")
            for part in ("down", "up"):
                tensor = getattr(layer, part).detach().to("cpu", dtype)
                tensors[f"{name}.lora_{part}.weight"] = tensor.reshape(tensor.shape + (1,) * source.ones)
            tensors[f"{name}.alpha"] = torch.tensor(lora.alpha)
    return tensors


def _kohya(network: str, names: Sequence[str], config: Config) -> list[Source]:
    """The sources of some layers of a network in kohya's LoRA files, with the prefixes that these have."""
    keys = {network: [f"{name}.weight" for name in names]}
    is_xl = bool(config.sizes)
    if network == "unet":
        found = original_sources(config, keys) if is_xl else diffusers_sources(config, keys)
        return [s._replace(key=f"lora_unet_{s.key.removeprefix(UNET)}") for s in found[network].values()]
    number = 2 - len(config.text) + config.text_names.index(network) + 1 if is_xl else ""  # the refiner has the second
    found = diffusers_sources(config, keys)
    return [s._replace(key=f"lora_te{number}_text_model_{s.key}") for s in found[network].values()]


def lora_metadata(lora: TrainableLora, title: str) -> dict[str, str]:
    """The metadata of a LoRA file, as kohya's scripts write it and other programs show it; `title` names the LoRA."""
    return {
        "format": "pt",
        "modelspec.title": title,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(lora.alpha),
    }
