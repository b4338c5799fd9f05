"""Trainable LoRA: the network itself stays unchanged, and low-rank changes of some of its layers are learned.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models" (arXiv:2106.09685): a layer with the weight W
(out, in) computes

    W x + s B A x          s = alpha / r

and only A and B are trained. A (r, in) starts at random, B (out, r) at zero, so that nothing changes at first. r is the
rank; alpha is a constant, so that the learning rate need not change with the rank. For a convolution, A is one of the
same kernel size and stride with r output channels, and B a 1x1 convolution (LoCon, Yeh et al. 2023, arXiv:2309.14859);
3x3 convolutions may have a rank and an alpha of their own.

DoRA, Liu et al. 2024, "DoRA: weight-decomposed low-rank adaptation" (arXiv:2402.09353), also trains the length m (out)
of each row of the weight, and what A and B change is its direction:

    W' = m (W + s B A) / |W + s B A|          m starts at |W|; the norm is a constant for gradients (section 4.3)

The changes are added by hooks (`TrainableLora.attach`): the network keeps its class and its parameters, and with the
changes disabled it computes exactly what it did before. A, B and m are float32, whatever precision the network has;
they are used in the precision in which the layer computes. Files: lora_files.py; sd/adapters reads those of any tool.

>>> from sd.config import UNetConfig
>>> from sd.models.unet import UNet
>>> unet = UNet(UNetConfig(channels=(32, 64), heads=(2, 2), depth=(0, 1), blocks=1, context=16))
>>> lora = TrainableLora(unet, lora_layers(unet), LoraParams(rank=4))
>>> len(lora.names), sum(p.numel() for p in lora.parameters()) < sum(p.numel() for p in unet.parameters()) / 4
(79, True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.utils.hooks import RemovableHandle

from ..models.layers import module_list

# Layers that tools train: those of attention, all of transformers, and with convolutions those of residual blocks and
# between levels. The others (conv_in, conv_out, the embedding of the timestep) are small, and some programs do not look
# for them. ".attn.", ".fc1" and ".fc2" are of the text encoder.
ATTENTION = tuple(f".{attn}.{name}" for attn in ("attn", "attn1", "attn2") for name in ("q", "k", "v", "out"))
TRANSFORMER = (*ATTENTION, ".ff.proj", ".ff.out", ".proj_in", ".proj_out", ".fc1", ".fc2")
CONVOLUTIONS = (".conv1", ".conv2", ".skip", ".time", ".down", ".up.conv")
LAYERS = {"attention": ATTENTION, "transformer": TRANSFORMER, "all": TRANSFORMER + CONVOLUTIONS}
SMALLEST_NORM = torch.finfo(torch.float32).eps  # of a row: one of zeros stays so


@dataclass(frozen=True)
class LoraParams:
    """The settings of a LoRA. Raises ValueError for values out of range.

    rank         r, at least 1. A layer with fewer inputs or outputs than r gets the largest possible rank, and the same
                 scale
    alpha        above 0; by default the rank, so that the scale is 1
    conv_rank    rank of convolutions with kernels larger than 1x1; by default `rank`
    conv_alpha   alpha of these convolutions; by default such that their scale is that of the others
    dropout      share of a layer's inputs that is hidden from A in training, below 1
    dora         whether the lengths of the rows are trained, too
    """

    rank: int = 16
    alpha: float | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "conv_rank"):
            rank = getattr(self, name)
            if (rank is None and name == "rank") or (rank is not None and (not isinstance(rank, int) or rank < 1)):
                raise ValueError(f"the {name} of a LoRA must be a whole number from 1, got {rank}")
        for name in ("alpha", "conv_alpha"):
            alpha = getattr(self, name)
            if alpha is not None and not 0 < alpha < math.inf:
                raise ValueError(f"the {name} of a LoRA must be a number above 0, got {alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the dropout of a LoRA must be from 0 to below 1, got {self.dropout}")

    def of(self, layer: nn.Linear | nn.Conv2d) -> tuple[int, float]:
        """Rank and alpha of a layer, before the rank is limited by its size."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        if not isinstance(layer, nn.Conv2d) or math.prod(layer.kernel_size) == 1:
            return self.rank, alpha
        rank = self.rank if self.conv_rank is None else self.conv_rank
        return rank, float(rank * alpha / self.rank if self.conv_alpha is None else self.conv_alpha)


class LoraLayer(nn.Module):
    """A, B and, for DoRA, m of one layer: a linear layer or a convolution.

    Its rank is at most the smaller side of the weight as a matrix: a larger one would have no effect. alpha is then
    reduced in proportion, so that the scale stays the same.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, params: LoraParams) -> None:
        super().__init__()
        asked, alpha = params.of(layer)
        into = layer.weight.shape[1:]  # (in,) or (in, height, width)
        ones = [1] * (len(into) - 1)
        self.rank = min(asked, len(layer.weight), math.prod(into))
        self.usual_alpha = alpha  # without the limit
        self.scale, self.alpha = alpha / asked, alpha * self.rank / asked
        self.is_limited, self.dropout = self.rank < asked, params.dropout
        self.geometry: tuple[Any, Any] | None = None  # stride and padding of a convolution
        if isinstance(layer, nn.Conv2d):
            self.geometry = layer.stride, layer.padding
        self.down = nn.Parameter(layer.weight.new_empty(self.rank, *into, dtype=torch.float32))
        self.up = nn.Parameter(layer.weight.new_zeros(len(layer.weight), self.rank, *ones, dtype=torch.float32))
        self.magnitude: nn.Parameter | None = None
        if params.dora:  # by the function that training uses, so that the first factors are exactly 1
            self.magnitude = nn.Parameter(_norms(layer.weight.detach(), torch.zeros_like(self.down), self.up, 1.0))

    def forward(self, x: Tensor, output: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
        """The output of the layer with the change, given its input x and its own output."""
        is_dropping = self.dropout > 0 and self.training
        seen = F.dropout(x, self.dropout) if is_dropping else x
        change = self._change(seen).to(output.dtype)
        changed = output + change
        if self.magnitude is None:
            return changed
        # m W x / |W'| + bias, as the output and what it lacks: only one more tensor is kept for the backward pass
        if is_dropping:  # the paper's code: A and the part of m - 1 see the same input
            whole = self._layer(seen, layer.weight.to(seen.dtype)).to(output.dtype) + change
        else:
            whole = changed if layer.bias is None else changed - self._per_row(layer.bias.to(output.dtype))
        factor = self.magnitude / _norms(layer.weight.detach(), self.down, self.up, self.scale) - 1
        return changed + self._per_row(factor.to(output.dtype)) * whole

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        """A layer of the same kind, with this weight and without bias."""
        return F.linear(x, weight) if self.geometry is None else F.conv2d(x, weight, None, *self.geometry)

    def _change(self, x: Tensor) -> Tensor:
        """s B A x, in the precision of x, or in that of autocast."""
        inner = self.scale * self._layer(x, self.down.to(x.dtype))  # scaled where it is smallest
        up = self.up.to(inner.dtype)
        return F.linear(inner, up) if self.geometry is None else F.conv2d(inner, up)

    def _per_row(self, values: Tensor) -> Tensor:
        """(out,) in the shape of the output's channels."""
        return values if self.geometry is None else values[:, None, None]

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the change, in at least float32 and in the shape of the weight."""
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        whole = w + self.delta().to(w).view(w.shape)
        if self.magnitude is None:
            return whole
        rows = whole.flatten(1)
        factors = self.magnitude.to(w) / rows.norm(dim=1).clamp(min=SMALLEST_NORM)
        return (rows * factors[:, None]).view(w.shape)

    def delta(self) -> Tensor:
        """The low-rank change of the weight, s B A, in the shape of the weight."""
        change = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * change.unflatten(1, self.down.shape[1:])


@torch.no_grad()
def _norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """|W + s B A| of each row (out,), without a matrix of the size of B A: |w|² + 2 b A w + b A A^T b^T for a row w."""
    device = weight.device.type  # "meta", of which shapes are counted, has no autocast
    with torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext():
        w, a, b = weight.flatten(1).to(down.dtype), down.flatten(1), scale * up.flatten(1)
        squares = torch.linalg.vector_norm(w, dim=1).square()
        squares = squares + ((2 * (w @ a.T) + b @ (a @ a.T)) * b).sum(dim=1)
        return squares.clamp(min=SMALLEST_NORM**2).sqrt()


class TrainableLora(nn.Module):
    """The changes of some layers of a network. Its parameters are A and B of each layer, and m for DoRA.

    network   is neither changed nor kept
    names     of linear layers and convolutions in it, for example those of `lora_layers`
    params    rank, alpha and so on
    seed      of A's initial values, which are those of a linear layer (Kaiming-uniform), as in kohya's scripts

    In eval mode there is no dropout. Dropout draws from torch's global random numbers: activations that are recomputed
    need the same ones (`preserve_rng_state` of torch's `checkpoint`).

    Raises ValueError for a layer that is no linear layer or convolution, and for a rank above that of every layer.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], params: LoraParams, seed: int = 0) -> None:
        super().__init__()
        if not names:
            raise ValueError("a LoRA needs layers: none of this network is among those chosen")
        self.names, self.params, self.enabled = tuple(names), params, True
        self._hooks: list[RemovableHandle] = []
        rng = torch.Generator().manual_seed(seed)
        made = []
        for name in names:
            layer = network.get_submodule(name)
            if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
                raise ValueError(f"{name} is a {type(layer).__name__}: a LoRA changes linear layers and convolutions")
            made.append(LoraLayer(layer, params))
            down = made[-1].down
            bound = down[0].numel() ** -0.5  # of nn.Linear: kaiming_uniform_ with a = sqrt(5)
            with torch.no_grad():
                down.copy_((2 * torch.rand(down.shape, generator=rng) - 1) * bound)
        if all(layer.is_limited for layer in made):
            most = max(range(len(made)), key=lambda i: made[i].rank)
            raise ValueError(
                f"the rank is above that of every layer: the largest that has an effect is {made[most].rank} "
                f"({names[most]})"
            )
        self.layers = module_list(made)

    @property
    def limited(self) -> int:
        """The number of layers that are too small for the rank, and have the largest that they can have."""
        return sum(layer.is_limited for layer in self.layers)

    def attach(self, network: nn.Module) -> None:
        """Let the network compute with the changes from now on. Its own parameters stay trainable if they are.

        Raises ValueError if it is attached already.
        """
        if self._hooks:
            raise ValueError("the LoRA is attached to a network already: detach it first")
        for name, layer in zip(self.names, self.layers, strict=True):
            self._hooks.append(network.get_submodule(name).register_forward_hook(self._changer(layer)))

    def detach(self) -> None:
        """Remove the changes from the network again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _changer(self, layer: LoraLayer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def change(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return layer(inputs[0], output, module) if self.enabled else output

        return change

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
        """A state dict of the network with the changes in its weights, in their precision; `state` stays as it is."""
        changed = dict(state)
        for name, layer in zip(self.names, self.layers, strict=True):
            key = f"{name}.weight"
            changed[key] = layer.merged(state[key]).to(state[key].dtype)
        return changed


def lora_layers(network: nn.Module, which: str = "all") -> list[str]:
    """The layers of a U-Net or text encoder that LoRAs usually change, in the order of the network.

    which   "attention"; "transformer", feed-forward layers and the projections around them as well; or "all", with the
            layers of residual blocks and between levels, which are needed to change how the network denoises, not only
            what it paints

    Raises ValueError for another choice.
    """
    if which not in LAYERS:
        raise ValueError(f"{which!r} are no layers of a LoRA: choose {', '.join(LAYERS)}")
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [name for name in found if f".{name}".endswith(LAYERS[which])]
