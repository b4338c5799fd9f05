"""The pass that makes networks fast on a device: layers are replaced by faster ones that do the same, and back.

A layer is replaced by changing its class to a subclass of its own: the network keeps its modules, their names, hooks
and parameters. Layers with packed weights (cpu_kernels.py) replace plain ones where they are faster, which is measured
for two sizes of each; where they are not, the plain layers stay.

>>> network = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
>>> with prefer("fast"):
...     type(optimize(network)[0]) is cpu_kernels.Linear, isinstance(network[0], nn.Linear)
(True, True)
>>> type(restore(network)[0]) is nn.Linear
True
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import layers
from . import cpu_kernels, packing
from .kernel_choice import faster, prefer

# The layers with which packed kernels are compared with plain ones: a few milliseconds each. Linear layers of at most
# the smaller width, in the geometric mean of in and out, are compared on their own: their overhead counts for more.
NARROW, WIDE, TOKENS = 128, 512, 128
CHANNELS, SIDE = 256, 8  # of a convolution and its map


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


RESTORED: dict[type[nn.Module], type[nn.Module]] = {  # fast class -> the one that it replaces
    cpu_kernels.Linear: nn.Linear,
    cpu_kernels.Conv2d: nn.Conv2d,
    cpu_kernels.PixelConv2d: nn.Conv2d,
    cpu_kernels.UpsampleConv2d: nn.Conv2d,
    cpu_kernels.Upsample: layers.Upsample,
    cpu_kernels.Attention: layers.Attention,
    cpu_kernels.GroupNorm: nn.GroupNorm,
    MPSAttention: layers.Attention,
}


def optimize(network: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Replace the layers of a network by the faster ones for a device, in place; returns the network.

    `device` is the one that it will run on, that of its first parameter if not given. Its weights have to be there, in
    the precision that it will run in. Layers of other classes, subclasses among them, stay as they are.
    """
    if device is None:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    replace = {"cpu": _on_cpu, "mps": _on_mps}.get(device.type)
    for module in network.modules() if replace is not None else ():
        replace(module)
    return network


def restore(network: nn.Module) -> nn.Module:
    """Undo `optimize`, in place; returns the network, its weights in their plain form, equal to the bit."""
    for module in network.modules():
        if type(module) in RESTORED:
            _ = module._parameters  # restores a packed weight
            module.__class__ = RESTORED[type(module)]
    return network


def _on_mps(module: nn.Module) -> None:
    if type(module) is layers.Attention:
        module.__class__ = MPSAttention


def _on_cpu(module: nn.Module) -> None:
    kind = type(module)
    if kind is nn.GroupNorm:
        module.__class__ = cpu_kernels.GroupNorm
    elif kind is layers.Attention:
        module.__class__ = cpu_kernels.Attention
    elif kind is layers.Upsample and type(module.conv) is nn.Conv2d and _packed_is_faster(kind, module.conv):
        module.__class__, module.conv.__class__ = cpu_kernels.Upsample, cpu_kernels.UpsampleConv2d
    elif kind is nn.Linear and _packed_is_faster(kind, module):
        module.__class__ = cpu_kernels.Linear
    elif kind is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros":
        if module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0):
            if _packed_is_faster(nn.Linear, module):
                module.__class__ = cpu_kernels.PixelConv2d
        elif not isinstance(module.padding, str) and _packed_is_faster(kind, module):
            module.__class__ = cpu_kernels.Conv2d


def _packed_is_faster(kind: type[nn.Module], layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a layer is to be packed, computed as one of this kind."""
    weight = layer.weight
    if weight.dtype not in packing.onednn_dtypes():
        return False
    width = CHANNELS
    if kind is nn.Linear:
        width = NARROW if weight.shape[0] * weight.shape[1] <= NARROW**2 else WIDE
    return faster((kind.__name__, weight.dtype, width), partial(_example, kind, width, weight.dtype))


def _example(
    kind: type[nn.Module], width: int, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Calls of two layers of this kind and width that do the same: (packed, plain)."""
    with torch.device("meta"):  # where initialisers draw no random numbers
        plain = {
            nn.Linear: partial(nn.Linear, width, width),
            nn.Conv2d: partial(nn.Conv2d, width, width, 3, padding=1),
            layers.Upsample: partial(layers.Upsample, width),
        }[kind]()
    plain = plain.to(dtype).to_empty(device="cpu").to(memory_format=torch.channels_last).requires_grad_(False)
    for parameter in plain.parameters():
        parameter.fill_(1)
    packed = copy.deepcopy(plain)
    if kind is layers.Upsample:
        packed.__class__, packed.conv.__class__ = cpu_kernels.Upsample, cpu_kernels.UpsampleConv2d
    else:
        packed.__class__ = cpu_kernels.Linear if kind is nn.Linear else cpu_kernels.Conv2d
    shape = (TOKENS, width) if kind is nn.Linear else (1, width, SIDE, SIDE)
    x = torch.ones(shape, dtype=dtype, device="cpu")
    x = x if kind is nn.Linear else x.to(memory_format=torch.channels_last)
    return lambda: packed(x), lambda: plain(x)
