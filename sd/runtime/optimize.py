"""The pass that makes networks fast on a device: it replaces layers with faster equivalents, and restores them.

A layer is replaced by changing its class to a subclass of it: the network keeps its modules, their names, hooks
and parameters. Layers with packed weights (cpu_kernels.py) replace plain ones where they are faster, which is measured
by an example of each kind; where they are not, the plain layers stay. `GroupNorm` and `Attention` are always replaced
on CPUs: they choose at each call.

>>> network = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
>>> with kernel_choice.prefer("fast"):
...     type(optimize(network)[0]) is cpu_kernels.Linear, isinstance(network[0], nn.Linear)
(True, True)
>>> type(restore(network)[0]) is nn.Linear
True
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import layers
from . import cpu_kernels, group_norm, kernel_choice, packing

# Packed layers are compared with plain ones by these examples, which take a few milliseconds each. Small linear layers
# are compared on their own: there, the overhead of a call counts as much as the kernel.
EXAMPLES: dict[type[nn.Module], Callable[[int], nn.Module]] = {
    nn.Linear: lambda width: nn.Linear(width, width),
    nn.Conv2d: lambda width: nn.Conv2d(width, width, 3, padding=1),
    layers.Upsample: layers.Upsample,
}
NARROW, WIDE = 128, 512  # widths of two linear examples: for up to NARROW x NARROW weights, and for more
TOKENS = 128  # rows of their input
CHANNELS, SIDE = 256, 8  # of a convolution and its map


class MPSAttention(layers.Attention):
    """`layers.Attention` that avoids two bugs in PyTorch's kernels on Apple's GPUs.

    They gave wrong results for transposed inputs (pytorch#163597) and for is_causal in half precision (pytorch#195910),
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


PLAIN_CLASS: dict[type[nn.Module], type[nn.Module]] = {  # fast class -> the one that it replaces
    cpu_kernels.Linear: nn.Linear,
    cpu_kernels.Conv2d: nn.Conv2d,
    cpu_kernels.PixelConv2d: nn.Conv2d,
    cpu_kernels.UpsampleConv2d: nn.Conv2d,
    cpu_kernels.Upsample: layers.Upsample,
    cpu_kernels.Attention: layers.Attention,
    cpu_kernels.GroupNorm: nn.GroupNorm,
    MPSAttention: layers.Attention,
    group_norm.GroupNorm: nn.GroupNorm,
}


def optimize(network: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Replace the layers of a network with the faster ones for a device, in place; returns the network.

    `device` is the one that it will run on; by default, that of its first parameter. Its weights must already be there
    in the precision that it will run in. Layers of other classes, including subclasses, are left unchanged.
    """
    if device is None:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    for module in network.modules():
        if device.type == "cpu":
            _optimize_for_cpu(module)
        elif device.type == "mps" and type(module) is layers.Attention:
            module.__class__ = MPSAttention
        elif device.type == "cuda" and type(module) is nn.GroupNorm:
            module.__class__ = group_norm.GroupNorm
    return network


def restore(network: nn.Module) -> nn.Module:
    """Undo `optimize`, in place; returns the network, with its weights in plain form, bit-identical."""
    for module in network.modules():
        if type(module) in PLAIN_CLASS:
            if isinstance(module, packing.PackedLayer):
                module.unpack()
            module.__class__ = PLAIN_CLASS[type(module)]
    return network


def unwrapped(network: nn.Module) -> nn.Module:
    """The network within the wrappers of torch: of `torch.compile`, DataParallel, AveragedModel."""
    for name in ("_orig_mod", "module"):
        if isinstance(inner := getattr(network, name, None), nn.Module):
            return unwrapped(inner)
    return network


def _optimize_for_cpu(module: nn.Module) -> None:
    """Replace one layer, where its fast version pays."""
    if type(module) is nn.GroupNorm:
        module.__class__ = cpu_kernels.GroupNorm
    elif type(module) is layers.Attention:
        module.__class__ = cpu_kernels.Attention
    elif type(module) is layers.Upsample:  # comes before its convolution, which is then no longer a plain one
        if _is_upsampling(module.conv) and _pays(layers.Upsample, CHANNELS, module.conv.weight.dtype):
            _pack(module)
    elif type(module) is nn.Linear or _is_pointwise(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        if _pays(nn.Linear, NARROW if weight.numel() <= NARROW**2 else WIDE, weight.dtype):
            _pack(module)
    elif type(module) is nn.Conv2d and _can_be_packed(module) and _pays(nn.Conv2d, CHANNELS, module.weight.dtype):
        _pack(module)


def _can_be_packed(module: nn.Conv2d) -> bool:
    """Whether oneDNN's operator for packed kernels can do what a convolution does."""
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _is_upsampling(conv: nn.Module) -> bool:
    """Whether a convolution is the usual one in `Upsample`: 3x3, with as many output as input channels."""
    return (
        type(conv) is nn.Conv2d
        and _can_be_packed(conv)
        and (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.in_channels == conv.out_channels
    )


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution that sees one pixel at a time."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


def _pack(module: nn.Module) -> None:
    """Replace a layer with the one that packs its weight."""
    if type(module) is layers.Upsample:
        module.__class__, module.conv.__class__ = cpu_kernels.Upsample, cpu_kernels.UpsampleConv2d
    elif type(module) is nn.Linear:
        module.__class__ = cpu_kernels.Linear
    else:
        module.__class__ = cpu_kernels.PixelConv2d if _is_pointwise(module) else cpu_kernels.Conv2d


def _pays(kind: type[nn.Module], width: int, dtype: torch.dtype) -> bool:
    """Whether packed layers of this kind are the faster ones."""

    def kernels() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        with torch.device("meta"):  # where initialisers draw no random numbers
            plain = EXAMPLES[kind](width)
        for layer in plain.modules():  # not `to_empty`, whose imports take half a second
            for name, parameter in layer.named_parameters(recurse=False):
                layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
                ones = torch.ones(parameter.shape, dtype=dtype, device="cpu").contiguous(memory_format=layout)
                setattr(layer, name, nn.Parameter(ones, requires_grad=False))
        packed = copy.deepcopy(plain)
        _pack(packed)
        if kind is nn.Linear:
            x = torch.ones(TOKENS, width, dtype=dtype, device="cpu")
        else:
            x = torch.ones(1, SIDE, SIDE, width, dtype=dtype, device="cpu").permute(0, 3, 1, 2)
        return lambda: packed(x), lambda: plain(x)

    return dtype in packing.onednn_dtypes() and kernel_choice.faster((kind.__name__, width, dtype), kernels)
