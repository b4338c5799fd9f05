"""The kernel that this machine uses for each kind of call in a model, with the times of all (`--kernels`).

The networks run on the meta device, where only shapes are computed, to find the kinds that occur when an image is
generated. Each is then measured as it would be at its first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sd.config import Config
from sd.models import layers
from sd.models.build import build
from sd.runtime import blockwise_attention, cpu_kernels, kernel_choice, packing
from sd.runtime.optimize import layer_kernel, packable

from .cases import arguments, inputs, needed, usual_case

PARTS = ("unet", "vae", "text")


def measure_kernels(config: Config, dtype: torch.dtype) -> dict[str, kernel_choice.Measurement]:
    """Measure the kinds of calls that occur for an image of the native size; returns `kernel_choice.table`.

    It is empty where there are only PyTorch's kernels.
    """
    if dtype not in packing.onednn_dtypes():
        return {}
    for layer, x, context in calls(config):
        if isinstance(layer, layers.Attention):
            d = layer.q.out_features // layer.heads
            M = (x if context is None else context).shape[1]
            blockwise_attention.kernel_for(len(x) * layer.heads, x.shape[1], M, d, dtype)
        elif isinstance(layer, nn.GroupNorm):
            if dtype == torch.bfloat16 and x[0, 0].numel() < cpu_kernels.LARGE:
                cpu_kernels.group_norm_kernel(x.shape[1], x[0, 0].numel())
        elif operation := packable(layer):
            weight = layer.conv.weight if isinstance(layer, layers.Upsample) else layer.weight
            layer_kernel(operation, weight.shape, dtype)
    return kernel_choice.table()


def calls(config: Config) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
    """The layers of the networks in the order of their calls, each with its inputs x and context (on meta)."""
    found: list[tuple[Any, Tensor, Tensor | None]] = []

    def see(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        context = next((tensor for tensor in given[1:2] if isinstance(tensor, Tensor)), None)
        if not named.get("causal"):  # causal attention is PyTorch's own
            found.append((layer, given[0], context))

    networks = build(config)
    for part in PARTS:
        (name,) = needed(part, config)
        network: Any = networks[name]
        for layer in network.modules():
            if isinstance(layer, layers.Attention | layers.Upsample | nn.GroupNorm) or packable(layer):
                layer.register_forward_pre_hook(see, with_kwargs=True)
        call = network.decode if part == "vae" else network
        with torch.no_grad():
            given = [tensor.to("meta") for tensor in inputs(usual_case(part, config), config)]
            call(*arguments(usual_case(part, config), given))
    yield from found


def text(table: dict[str, kernel_choice.Measurement]) -> str:
    """The table as text: a line for each kind, with the milliseconds of each kernel; * marks the one in use."""
    lines = [kernel_choice.machine(), ""]
    width = max((len(kind) for kind in table), default=0)
    for kind, (chosen, milliseconds, left_out) in sorted(table.items()):
        times = [f"{'*' if name == chosen else ' '}{name} {ms:.3f}" for name, ms in milliseconds.items()]
        wrong = [f" {name}: {why}" for name, why in left_out.items()]
        lines.append(f"{kind:<{width}}  {'  '.join([*times, *wrong])}")
    return "\n".join(lines if table else [*lines, "there are only PyTorch's kernels here"])
