"""The pass that makes networks fast on a device: it replaces layers with faster equivalents, and restores them.

A layer is replaced by changing its class to a subclass: the network keeps its modules, their names, hooks and
parameters. Layers with packed weights (cpu_kernels.py) replace plain ones where they are faster in a measurement on
examples. `GroupNorm`, `Attention` and `FeedForward` are always replaced on CPUs, and those of cuda_kernels.py on CUDA:
they choose a kernel at each call.

>>> network = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
>>> with kernel_choice.prefer("fast"):
...     type(optimize(network)[0]) is cpu_kernels.Linear, isinstance(network[0], nn.Linear)
(True, True)
>>> type(restore(network)[0]) is nn.Linear
True
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import layers
from . import cpu_kernels, cuda_kernels, kernel_choice, packing
from .device import DTYPES, dtype_name

# Packed layers are compared with plain ones on examples of a few widths, which take about a millisecond each. A layer
# gets the smallest example with at least as many weights, else the largest.
EXAMPLES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda width: nn.Linear(width, width), (128, 512, 1280)),
    "convolution": (lambda channels: nn.Conv2d(channels, channels, 3, padding=1), (128, 512)),
    "upsampling": (layers.Upsample, (256,)),
}
TOKENS = 128  # rows of the input of linear layers
SIDE = 8  # height and width of the maps


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
    cpu_kernels.FeedForward: layers.FeedForward,
    cpu_kernels.GroupNorm: nn.GroupNorm,
    MPSAttention: layers.Attention,
    **{fast: plain for plain, fast in cuda_kernels.CLASSES.items()},
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
        elif device.type == "cuda" and type(module) in cuda_kernels.CLASSES:
            module.__class__ = cuda_kernels.CLASSES[type(module)]
            if isinstance(module, layers.Attention):
                cuda_kernels.join(module)
        elif device.type == "mps" and type(module) is layers.Attention:
            module.__class__ = MPSAttention
    return network


def restore(network: nn.Module) -> nn.Module:
    """Undo `optimize`, in place; returns the network, with its weights in plain form, bit-identical."""
    for module in network.modules():
        if type(module) in PLAIN_CLASS:
            if isinstance(module, packing.PackedLayer):
                module.unpack()
            module.__class__ = PLAIN_CLASS[type(module)]
    return network


def chosen(network: nn.Module) -> dict[str, str]:
    """What `optimize` chose: the name of each layer that was replaced -> the name of its class."""
    return {name: class_name(type(module)) for name, module in network.named_modules() if type(module) in PLAIN_CLASS}


def class_name(kind: type[nn.Module]) -> str:
    """The name of a layer's class after that of its module: "cpu_kernels.Linear"."""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def choose(network: nn.Module, choices: Mapping[str, str]) -> bool:
    """Replace the layers as in a network of which `chosen` is given, without measuring; False if they do not fit."""
    classes = {class_name(fast): fast for fast in PLAIN_CLASS}
    modules = dict(network.named_modules())
    for name, choice in choices.items():
        plain = PLAIN_CLASS.get(classes.get(choice, nn.Module))
        if plain is None or type(modules.get(name)) is not plain:
            return False
    for name, choice in choices.items():
        modules[name].__class__ = classes[choice]
    return True


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
    elif type(module) is layers.FeedForward:
        module.__class__ = cpu_kernels.FeedForward
    elif (operation := packable(module)) is not None:
        weight = (module.conv if type(module) is layers.Upsample else module).weight
        assert isinstance(weight, Tensor)
        able = weight.dtype in packing.onednn_dtypes()
        if able and layer_kernel(operation, weight.shape, weight.dtype) != kernel_choice.PLAIN:
            _pack(module)


def packable(module: nn.Module) -> str | None:
    """The operation (a key of `EXAMPLES`) of a layer whose weight can be packed; None for other layers.

    An `Upsample` comes before its convolution in `Module.modules`, which is no longer a plain one when it is packed.
    """
    if type(module) is layers.Upsample:
        return "upsampling" if _is_upsampling(module.conv) else None
    if type(module) is nn.Linear or _is_pointwise(module):
        return "linear"
    return "convolution" if type(module) is nn.Conv2d and _can_be_packed(module) else None


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


def layer_kernel(operation: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """The name of the faster kernel, "plain" or "packed", for an operation of `EXAMPLES` and a weight of this shape."""
    _, widths = EXAMPLES[operation]
    width = next((width for width in widths if shape[0] * shape[1] <= width**2), widths[-1])
    kind = (operation, dtype_name(dtype), width)
    return kernel_choice.fastest(kind, (kernel_choice.PLAIN, "packed"), partial(_example, kind))


def _example(kind: kernel_choice.Kind) -> Callable[[str], Tensor]:
    """Two layers, a plain and a packed one, with the same weights, and an input."""
    operation, name, width = str(kind[0]), str(kind[1]), int(kind[2])
    make, _ = EXAMPLES[operation]
    dtype, rng = DTYPES[name], torch.Generator().manual_seed(0)
    with torch.device("meta"):  # where initialisers draw no random numbers
        plain = make(width)
    for layer in plain.modules():  # not `to_empty`, whose imports take half a second
        for key, parameter in layer.named_parameters(recurse=False):
            layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
            values = torch.randn(parameter.shape, generator=rng, device="cpu").to(dtype)
            values = values.contiguous(memory_format=layout)
            setattr(layer, key, nn.Parameter(values, requires_grad=False))
    packed = copy.deepcopy(plain)
    _pack(packed)
    if operation == "linear":
        x = torch.randn(TOKENS, width, generator=rng, device="cpu").to(dtype)
    else:
        x = torch.randn(1, SIDE, SIDE, width, generator=rng, device="cpu").to(dtype).permute(0, 3, 1, 2)
    return lambda name: plain(x) if name == kernel_choice.PLAIN else packed(x)
