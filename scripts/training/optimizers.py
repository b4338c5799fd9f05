"""Which optimizer trains which parameters and how fast; and saved states of optimizers.

Each group of parameters has their names and a factor of the learning rate, so that a state can be resumed where the
groups are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sd.training import Muon

from .recipe import Recipe

# layers that AdamW optimises even with Muon: first and last layers, whose rows are colours, latents or words
ENDS = ("conv_in", "conv_out", "quant", "token.", "position.")
# parts of names of parameters without weight decay, beside those of one dimension (biases, norms): vectors of words,
# and the lengths of DoRA
NOT_DECAYED = {"token", "word", "words", "vectors", "magnitude"}
NO_BITSANDBYTES = (
    '--optimizer adamw8bit needs bitsandbytes: pip install "sd-from-scratch[low-memory]" or pip install bitsandbytes'
)


def make_optimizers(
    trained: Mapping[str, Tensor], recipe: Recipe, device: torch.device, rates: Mapping[str, float]
) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the hidden matrices and AdamW for the rest.

    rates   factors of the learning rate, by what names begin with; the first that fits counts, and others have 1

    Raises ValueError for a factor below 0, and where bitsandbytes is missing.
    """
    if wrong := [f"{name} {rate}" for name, rate in rates.items() if not 0 <= rate < float("inf")]:
        raise ValueError(f"the learning rate of a part must be at least 0: {wrong[0]}")
    found: dict[str, dict[tuple[float, bool], dict[str, Any]]] = {"adamw": {}, "muon": {}}
    factors = dict.fromkeys([1.0, *rates.values()])
    for kind in found:
        found[kind] = {(factor, decayed): _group(factor, decayed) for factor in factors for decayed in (True, False)}
    for name, p in trained.items():
        decayed = p.dim() > 1 and not NOT_DECAYED & set(name.split("."))
        inner = decayed and recipe.optimizer == "muon" and not any(end in name for end in ENDS)
        factor = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), 1.0)
        group = found["muon" if inner else "adamw"][factor, decayed]
        group["params"].append(p)
        group["names"].append(name)
    groups = {kind: [group for group in by_rate.values() if group["params"]] for kind, by_rate in found.items()}
    made: list[torch.optim.Optimizer] = []
    if groups["adamw"]:
        made.append(_adamw(groups["adamw"], recipe, device))
    if groups["muon"]:
        made.append(Muon(groups["muon"], recipe.lr, weight_decay=recipe.weight_decay))
    return made


def _group(factor: float, decayed: bool) -> dict[str, Any]:
    return {"params": [], "names": [], "factor": factor} | ({} if decayed else {"weight_decay": 0.0})


def _adamw(groups: list[dict[str, Any]], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    betas = (0.9, recipe.beta2)
    if recipe.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "bitsandbytes":
                raise
            raise ValueError(NO_BITSANDBYTES) from None
        return bitsandbytes.optim.AdamW8bit(groups, recipe.lr, betas=betas, weight_decay=recipe.weight_decay)
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, recipe.lr, betas=betas, weight_decay=recipe.weight_decay, fused=fused)


def set_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of the next step; each group keeps its factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    place: Callable[[Any, Tensor], Any] = lambda value, like: value,
) -> None:
    """Restore the state of an optimizer's parameters, by their names; settings such as betas stay as they are.

    saved   a `state_dict` of whole tensors; without names in its groups (of an earlier version) in the same order
    place   how a value of the state is kept for a parameter: see sharding.py
    """
    current = optimizer.state_dict()
    own = {name: p for group in optimizer.param_groups for name, p in zip(group["names"], group["params"], strict=True)}
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    names = [name for group in saved["param_groups"] for name in group.get("names", ())] or list(own)
    by_name = {name: saved["state"].get(number, {}) for number, name in zip(numbers, names, strict=True)}
    current["state"] = {
        i: {key: place(_laid_out(value, p), p) for key, value in by_name[name].items()}
        for i, (name, p) in enumerate(own.items())
        if by_name[name]
    }
    optimizer.load_state_dict(current)


def _laid_out(value: Any, like: Tensor) -> Any:
    """A copy of a tensor, in the order of the parameter in memory if it has its shape.

    Fused optimizers do not look at strides, and a state that was saved by a sharded run, for example, has no
    channels-last kernels.
    """
    if not isinstance(value, Tensor):
        return value
    if value.shape != like.shape:
        return value.clone()
    return torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device).copy_(value)
