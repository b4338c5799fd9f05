"""Images that repeat without seams: convolutions whose maps wrap around at the edges, within a block and one thread.

A convolution pads its map with zeros. If it pads each edge with the opposite one instead, the network sees a torus: it
knows no edge, and moving its input around moves its output (up to the strides of its layers). Attention and
normalisation are that way already. So an image made by such a U-Net and VAE continues at its opposite edge.

`CircularPadding` replaces the convolutions of torch and of packing.py, and the padding before the VAE's downsampling,
while the block runs. The networks are not changed, and other threads do not notice.

>>> conv, x = torch.nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 8, 8)
>>> with CircularPadding(), torch.no_grad():
...     torch.allclose(conv(x.roll(3, dims=-1)), conv(x).roll(3, dims=-1), atol=1e-6)
True
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..conditioning import Conditioning, Network

Pair = int | tuple[int, ...]

_entered = threading.local()  # how many blocks this thread is in


def is_circular() -> bool:
    """Whether this thread is in a block of `CircularPadding`."""
    return getattr(_entered, "blocks", 0) > 0


def wrapped(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """x with so many of its last entries before it, and of its first ones after it, along a dimension.

    Raises ValueError if it has fewer.
    """
    size = x.shape[dim]
    if max(before, after) > size:
        raise ValueError(f"a map of {size} pixels cannot wrap around {max(before, after)} of them")
    ends = (x.narrow(dim, size - before, before), x, x.narrow(dim, 0, after))
    return torch.cat([part for part in ends if part.shape[dim]], dim=dim)  # keeps channels-last, unlike F.pad


def _both(x: Tensor, padding: Pair) -> Tensor:
    """x (B, C, H, W), wrapped on both sides of both dimensions."""
    high, wide = (padding, padding) if isinstance(padding, int) else padding
    return wrapped(wrapped(x, -2, high, high), -1, wide, wide)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv2d, circular."""
    return F.conv2d(_both(x, padding), weight, bias, stride, 0, dilation, groups)


def _pad(x: Tensor, pad: tuple[int, ...], mode: str = "constant", value: float | None = None) -> Tensor:
    """F.pad, circular where it adds zeros to the sides of a map."""
    if mode != "constant" or value or x.dim() != 4 or len(pad) != 4:
        return F.pad(x, pad, mode, value)
    left, right, top, bottom = pad
    return wrapped(wrapped(x, -2, top, bottom), -1, left, right)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], *args: Any) -> Tensor:
    """The convolution of packing.py, circular."""
    return torch.ops.mkldnn._convolution_pointwise(_both(x, padding), weight, bias, (0, 0), *args)


class CircularPadding(TorchFunctionMode):
    """Within the block, in this thread, convolutions wrap around."""

    def __init__(self) -> None:
        super().__init__()
        self._replaced: dict[Any, Callable[..., Tensor]] = {torch.conv2d: _conv2d, F.pad: _pad}
        packed = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # x86 only
        if packed is not None:
            self._replaced[packed] = _packed

    def __enter__(self) -> CircularPadding:
        super().__enter__()
        _entered.blocks = getattr(_entered, "blocks", 0) + 1
        return self

    def __exit__(self, *error: Any) -> None:
        _entered.blocks -= 1
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for each function of torch in the block, with this mode switched off."""
        return self._replaced.get(func, func)(*args, **(kwargs or {}))


def circular(network: Network) -> Network:
    """A network that sees its input as a torus."""

    def run(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with CircularPadding():
            return network(x, t, conditioning)

    return run
