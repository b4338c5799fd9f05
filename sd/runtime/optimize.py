"""The pass that makes networks fast on a device: layers are replaced by faster ones that do the same, and back.

A layer is replaced by changing its class, to a subclass of its own: the network keeps its modules, their names, hooks
and parameters. What is faster is decided when a layer is called, by device, precision and shape, and measured where it
depends on the processor (cpu_kernels.py).

>>> network = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
>>> type(optimize(network)[0]) is cpu_kernels.Linear, isinstance(network[0], nn.Linear)
(True, True)
>>> type(restore(network)[0]) is nn.Linear
True
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import layers
from . import cpu_kernels


class MPSAttention(layers.Attention):
    """`layers.Attention` around two faults of PyTorch's kernels on Apple's GPUs.

    They have been wrong for transposed inputs (pytorch#163597) and for is_causal in half precision (pytorch#195910),
    without an error.
    """

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, N, D), context (B, M, context width) or None for x itself -> (B, N, D)."""
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()  # (B, heads, N, d)
            for y in (self.q(x), self.k(context), self.v(context))
        )
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if causal else None
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2))


REPLACEMENTS: dict[str, dict[type[nn.Module], type[nn.Module]]] = {  # device type -> class -> the faster one
    "cpu": {
        nn.Linear: cpu_kernels.Linear,
        nn.Conv2d: cpu_kernels.Conv2d,
        nn.GroupNorm: cpu_kernels.GroupNorm,
        layers.Attention: cpu_kernels.Attention,
        layers.Upsample: cpu_kernels.Upsample,
    },
    "mps": {layers.Attention: MPSAttention},
}


def optimize(network: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Replace the layers of a network by the faster ones for a device, in place; returns the network.

    `device` is the one that it will run on, that of its first parameter if not given. Layers of other classes,
    subclasses among them, stay as they are.
    """
    if device is None:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    replacements = REPLACEMENTS.get(device.type, {})
    for module in network.modules():
        if type(module) in replacements:
            module.__class__ = replacements[type(module)]
    return network


def restore(network: nn.Module) -> nn.Module:
    """Undo `optimize`, in place; returns the network, its weights in their plain form, equal to the bit."""
    plain = {fast: usual for table in REPLACEMENTS.values() for usual, fast in table.items()}
    for module in network.modules():
        if type(module) in plain:
            _ = module._parameters  # restores a packed weight
            module.__class__ = plain[type(module)]
    return network
