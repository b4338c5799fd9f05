"""LoRA: changes to the weights of a model, merged into them and removable bit for bit.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models" (arXiv:2106.09685): fine-tuning changes a weight W
by a matrix of nearly low rank r, so only two thin matrices are trained and stored:

    W' = W + w (alpha / r) B A        alpha is chosen in training, w by the user

changes.py has the other kinds of changes, D(W) in place of (alpha / r) B A; each is computed from the original weight:

    W' = W + w1 D1(W) + w2 D2(W) + ...

The merged network is as fast as without LoRA. The sum is computed in float32 and rounded once, to the precision of the
weight. The previous weights are kept to restore them, with a fingerprint of the merged ones: weights that were changed
after merging, by loading others or in another precision, are not overwritten by the previous ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..few_step import FewStep
from ..runtime.offload import fingerprint
from .changes import Change

Target = tuple[str, str]  # network ("unet", "text_encoder", "text_encoder_2") and our name of a parameter in it


@dataclass(frozen=True)
class Lora:
    """The contents of a LoRA file that fits a model.

    words   embeddings in the file: word -> vectors (n, D), those of several text encoders side by side
    notes   what of the file has no effect
    file    the file itself, with all links resolved
    few_step   the kind of few-step LoRA that it is, by its name or metadata; None for an ordinary one
    """

    name: str
    changes: Mapping[Target, Change]
    words: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    file: Path | None = None
    few_step: FewStep | None = None


class Merged:
    """The LoRAs that are merged into some networks, and the previous weights."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.networks = networks
        self._loras: dict[str, tuple[Lora, float]] = {}  # by name, in order of addition
        self._before: dict[Target, Tensor] = {}  # changed weight -> the tensor before
        self._after: dict[Target, tuple[torch.dtype, Tensor]] = {}  # its precision and fingerprint when merged

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each removable LoRA, by name."""
        return {name: weight for name, (_, weight) in self._loras.items()}

    def named(self, loras: Sequence[Lora], names: Sequence[str | None]) -> list[Lora]:
        """The LoRAs under names of their own: those given, or the file's, with a number if another file has it.

        Raises ValueError if a given name is taken, or if a file is merged already and has no other name.
        """
        found: list[Lora] = []
        for lora, name in zip(loras, names, strict=True):
            others = {other.name: other for other, _ in self._loras.values()} | {other.name: other for other in found}
            if name is None:
                again = [other.name for other in others.values() if other.file is not None and other.file == lora.file]
                if again:
                    raise ValueError(
                        f"{lora.file}: {again[0]!r} is merged already: remove it, or give the file another name "
                        "(name=..., --lora NAME=FILE)"
                    )
                numbers = (f"{lora.name}-{i}" for i in range(2, len(others) + 3))
                name = lora.name if lora.name not in others else next(n for n in numbers if n not in others)
            elif not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise ValueError(f"{name!r:.100} is not a name for a LoRA: expected printable characters")
            elif name in others:
                raise ValueError(f"a LoRA named {name!r} is merged already: remove it, or give another name")
            found.append(replace(lora, name=name))
        return found

    def add(self, loras: Sequence[tuple[Lora, float]], removable: bool = True) -> list[str]:
        """Merge LoRAs, whose names are not taken, with their weights. Returns the names of those that change nothing.

        Raises ValueError if a weight or a sum is not finite, or if one of the model's weights was changed after LoRAs
        were merged into it. An error leaves everything unchanged, unless the LoRAs are not `removable`: the previous
        weights are then not kept, which takes less memory.
        """
        for lora, weight in loras:
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {lora.name} must be a finite number, got {weight}")
        targets = {target: None for lora, _ in loras for target in lora.changes}
        self._check_unchanged(targets)
        idle = [lora.name for lora, weight in loras if lora.changes and not (weight and self._changes_something(lora))]
        if removable:
            self._loras |= {lora.name: (lora, weight) for lora, weight in loras}
            try:
                self._refresh(targets)
            except BaseException:  # Ctrl-C as well
                for lora, _ in loras:
                    del self._loras[lora.name]
                self._refresh(targets)
                raise
            return idle
        for target in targets:
            if target in self._before:
                self._before[target] = merged_weight(self._before[target], loras, target)  # beneath the removable LoRAs
                self._refresh({target: None})
            else:
                parameter = self._weight(target)
                parameter.data = merged_weight(parameter.data, loras, target)
        return idle

    def remove(self, *names: str) -> None:
        """Remove LoRAs; without any, the weights are bit for bit the original ones. KeyError for unknown names.

        Raises ValueError, and changes nothing, if one of the model's weights was changed after they were merged.
        """
        targets = {target: None for name in names for target in self._loras[name][0].changes}
        self._check_unchanged(targets)
        before = dict(self._loras)
        for name in names:
            del self._loras[name]
        try:
            self._refresh(targets)
        except BaseException:  # some weights may still have them: removing can be repeated
            self._loras = before
            raise

    def forget(self) -> None:
        """Forget all LoRAs and the previous weights; the model's weights stay as they are now."""
        self._loras.clear()
        self._before.clear()
        self._after.clear()

    def _weight(self, target: Target) -> nn.Parameter:
        network, key = target
        layer, _, name = key.rpartition(".")
        return self.networks[network].get_submodule(layer).get_parameter(name)

    def _changes_something(self, lora: Lora) -> bool:
        return any(bool(change.delta_of(self._weight(at).data).any()) for at, change in lora.changes.items())

    def _check_unchanged(self, targets: Iterable[Target]) -> None:
        """Raise ValueError if one of these weights is not the one that LoRAs were merged into."""
        for target in targets:
            if target not in self._after:
                continue
            try:
                weight = self._weight(target).data
            except AttributeError:
                raise ValueError(_changed(target, "it is not there any more")) from None
            dtype, marks = self._after[target]
            if weight.dtype != dtype:
                raise ValueError(_changed(target, f"it is {weight.dtype}, it was {dtype}"))
            if weight.shape != self._before[target].shape or not torch.equal(fingerprint(weight).cpu(), marks):
                raise ValueError(_changed(target, "it has other numbers"))

    def _refresh(self, targets: Mapping[Target, None]) -> None:
        """Recompute these weights from the original ones and all LoRAs that change them."""
        loras = list(self._loras.values())
        for target in targets:
            if any(target in lora.changes for lora, _ in loras):
                parameter = self._weight(target)
                before = self._before.get(target, parameter.data)
                merged = merged_weight(before.to(parameter.device), loras, target)
                marks = merged.dtype, fingerprint(merged).cpu()
                self._before.setdefault(target, before.cpu())  # the device's memory is scarcer
                self._after.pop(target, None)  # an interrupt in between leaves a weight that is not checked
                parameter.data = merged
                self._after[target] = marks
            elif target in self._before:
                parameter = self._weight(target)
                self._after.pop(target, None)
                parameter.data = self._before[target].to(parameter.device)
                del self._before[target]


def _changed(target: Target, how: str) -> str:
    return (
        f"{'.'.join(target)} was changed after a LoRA was merged into it ({how}), so the previous weight no longer "
        "fits: load the model again, or keep the weights as they are with forget_loras(); remove LoRAs before such "
        "a change"
    )


def merged_weight(
    before: Tensor, loras: Sequence[tuple[Lora, float]], target: Target, dtype: torch.dtype | None = None
) -> Tensor:
    """W + the changes of all LoRAs, computed in float32 and rounded once, with the memory layout of W.

    dtype   of the result; by default that of W

    Raises ValueError if the result is not finite.
    """
    original = before.float()
    total = original.clone()
    for lora, weight in loras:
        if target in lora.changes:
            total.add_(lora.changes[target].delta_of(original), alpha=weight)
    merged = total.to(before.dtype if dtype is None else dtype)
    if not math.isfinite(merged.sum(dtype=torch.float32)):  # a single non-finite number makes the sum non-finite
        raise ValueError(
            f"merged, {'.'.join(target)} has numbers beyond {merged.dtype}: use a smaller weight or bfloat16"
        )
    return merged
