"""LoRA: low-rank changes to the weights of a model, merged into them and removable bit for bit.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models" (arXiv:2106.09685): fine-tuning changes a weight
W (out x in) by a matrix of nearly low rank r, so only two thin matrices are trained and stored:

    W' = W + w (alpha / r) B A        A "down" (r x in), B "up" (out x r); alpha is chosen in training, w by the user

For a convolution (LoCon), A has the same kernel and r outputs, and B is 1x1; or both are 1x1 with a third, M, "mid",
between them: B M A. The merged network is as fast as without LoRA. B A is computed in float32, and the sum of all LoRAs
is rounded once, to the precision of the weight. The previous weights are kept to restore them.

>>> pair = Pair(down=torch.ones(1, 3), up=torch.tensor([[1.0], [2.0]]), mid=None, scale=0.5)
>>> pair.delta(torch.zeros(2, 3))
tensor([[0.5000, 0.5000, 0.5000],
        [1.0000, 1.0000, 1.0000]])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Target = tuple[str, str]  # network ("unet", "text_encoder") and our name of a weight in it


class Pair(NamedTuple):
    """The change of one weight: scale B A, or scale B M A."""

    down: Tensor  # (r, in) or (r, in, h, w)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    mid: Tensor | None  # (r, r, h, w)
    scale: float  # alpha / r

    def delta(self, weight: Tensor, factor: float = 1.0) -> Tensor:
        """The change times a factor, in float32, with the shape and on the device of the weight."""
        down, up = (x.to(weight.device, torch.float32).flatten(1) for x in (self.down, self.up))
        up = up * (self.scale * factor)  # the smallest of the tensors
        if self.mid is not None:
            mid = self.mid.to(weight.device, torch.float32)
            delta = torch.einsum("oa,abhw,bi->oihw", up, mid, down)
        else:
            delta = up @ down  # (out, in) or (out, in h w)
        out, width, *kernel = weight.shape
        if kernel and delta.numel() < weight.numel():  # made for a U-Net with 4 input channels; this one has 9
            delta = delta.view(out, -1, *kernel)
            delta = F.pad(delta, (0, 0) * len(kernel) + (0, width - delta.shape[1]))
        return delta.view(weight.shape)


@dataclass(frozen=True)
class Lora:
    """The contents of a LoRA file that fits a model."""

    name: str
    pairs: Mapping[Target, Pair]


class Merged:
    """The LoRAs that are merged into some networks, and the previous weights."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.networks = networks
        self._loras: dict[str, tuple[Lora, float]] = {}  # by name, in order of addition
        self._before: dict[Target, Tensor] = {}  # changed weight -> the tensor before

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each removable LoRA, by name."""
        return {name: weight for name, (_, weight) in self._loras.items()}

    def add(self, loras: Sequence[tuple[Lora, float]], removable: bool = True) -> None:
        """Merge LoRAs with their weights. Raises ValueError if a name is taken, or a weight or a sum is not finite.

        An error leaves everything unchanged, unless the LoRAs are not `removable`: the previous weights are then not
        kept, which takes less memory.
        """
        for i, (lora, weight) in enumerate(loras):
            if lora.name in self._loras or any(lora.name == other.name for other, _ in loras[:i]):
                raise ValueError(f"a LoRA named {lora.name!r} is merged already: remove it, or rename the file")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {lora.name} must be a finite number, got {weight}")
        targets = {target: None for lora, _ in loras for target in lora.pairs}
        if removable:
            self._loras |= {lora.name: (lora, weight) for lora, weight in loras}
            try:
                self._refresh(targets)
            except BaseException:  # Ctrl-C as well
                self.remove(*(lora.name for lora, _ in loras))
                raise
            return
        for target in targets:
            if target in self._before:
                self._before[target] = _sum(self._before[target], loras, target)  # beneath the removable LoRAs
                self._refresh({target: None})
            else:
                parameter = self._weight(target)
                parameter.data = _sum(parameter.data, loras, target)

    def remove(self, *names: str) -> None:
        """Remove LoRAs; without any, the weights are bit for bit the original ones. KeyError for unknown names."""
        targets = {target: None for name in names for target in self._loras[name][0].pairs}
        before = dict(self._loras)
        for name in names:
            del self._loras[name]
        try:
            self._refresh(targets)
        except BaseException:  # some weights may still have them: removing can be repeated
            self._loras = before
            raise

    def _weight(self, target: Target) -> nn.Parameter:
        network, key = target
        layer, _, name = key.rpartition(".")
        return self.networks[network].get_submodule(layer).get_parameter(name)

    def _refresh(self, targets: Mapping[Target, None]) -> None:
        """Recompute these weights from the original ones and all LoRAs that change them."""
        loras = list(self._loras.values())
        for target in targets:
            parameter = self._weight(target)
            if any(target in lora.pairs for lora, _ in loras):
                before = self._before.setdefault(target, parameter.data.cpu())  # the device's memory is scarcer
                parameter.data = _sum(before.to(parameter.device), loras, target)
            elif target in self._before:
                parameter.data = self._before.pop(target).to(parameter.device)


def _sum(before: Tensor, loras: Sequence[tuple[Lora, float]], target: Target) -> Tensor:
    """W + the changes of all LoRAs, computed in float32 and rounded once, with the memory layout of W."""
    total = before.to(torch.float32, copy=True)
    for lora, weight in loras:
        if target in lora.pairs:
            total += lora.pairs[target].delta(before, weight)
    merged = total.to(before.dtype)
    if not math.isfinite(merged.sum(dtype=torch.float32)):  # a single non-finite number makes the sum non-finite
        raise ValueError(
            f"merged, {'.'.join(target)} has numbers beyond {before.dtype}: use a smaller weight or bfloat16"
        )
    return merged
