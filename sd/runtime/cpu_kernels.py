"""Faster layers for CPUs (packed weights: x86 only), with the interface of those they replace; see `optimize`.

On an x86 CPU, where a step of Stable Diffusion 1.x is 1,600 GFLOP, four choices of PyTorch cost up to half of it:

    convolutions   reorder their weights at every call     -> packed once, by oneDNN (`Conv2d`; 1x1 as linear layers)
    linear layers  the same; in float32 they go to MKL     -> packed once, and through oneDNN (`Linear`)
    attention      reaches a sixth of the processor's peak -> blocks of plain products (blockwise_attention.py)
    GEGLU          writes 42 MB and reads them again       -> rows in blocks that stay in the cache (`FeedForward`)

`Upsample` saves arithmetic; `GroupNorm` is more accurate and saves time.

Within `torch.compile` a packed layer breaks the graph and runs eagerly, because compilers cannot look into oneDNN's
tensors. For a graph without breaks, `optimize.restore` the network first.

>>> layer = nn.Linear(8, 4).requires_grad_(False)
>>> weight, x = layer.weight.clone(), torch.randn(2, 8)
>>> layer.__class__ = Linear  # as `optimize` does
>>> with torch.no_grad():
...     torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-5)
True
>>> layer.weight.equal(weight)
True
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import layers
from .blockwise_attention import attention
from .kernel_choice import PLAIN, Kind, fastest
from .packing import (
    InputSize,
    PackedLayer,
    PackedWeight,
    convolution,
    eagerly,
    for_inference,
    linear,
    pack_kernel,
    pack_linear,
    watched,
)

WIDE_FROM = 2**25  # bytes of the wide projection in `FeedForward` from which blocks are used: few caches hold it
WIDE_BLOCK = 2**22  # bytes of the projection in a block, which stay in the cache
LEAST_ROWS = 256  # at least, in a block: each block reads all weights
LARGE = 1024  # pixels from which PyTorch's GroupNorm takes another path, with sums that are too rough
AT_ONCE = 64  # output channels whose kernels are added up together in `UpsampleConv2d`
PART = 2**18  # how many numbers to add up at a time: 1 MB, which stays in the cache


class Linear(PackedLayer, nn.Linear):
    """nn.Linear with a packed weight; plain where gradients are wanted."""

    def pack(self, weight: Tensor, size: InputSize) -> PackedWeight:
        return PackedWeight(pack_linear(weight), size, weight.shape, weight.stride())

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        if torch.compiler.is_dynamo_compiling():
            return eagerly(self, x)
        # for inputs of a wrong shape, PyTorch's own operators have the best messages
        packed = self.packed_for(x) if x.dim() > 0 and x.shape[-1] == self.in_features else None
        if packed is None:
            return F.linear(x, self.weight, self.bias)
        return linear(x, packed.weight, self.__dict__["_parameters"]["bias"])


class Conv2d(PackedLayer, nn.Conv2d):
    """nn.Conv2d (padding of zeros, one group) with a packed kernel; plain where gradients are wanted."""

    for_maps = True

    def pack(self, weight: Tensor, size: InputSize) -> PackedWeight:
        kernel = pack_kernel(weight, self.padding, self.stride, self.dilation, self.groups, size)
        return PackedWeight(kernel, size, weight.shape, weight.stride())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        if torch.compiler.is_dynamo_compiling():
            return eagerly(self, x)
        packed = self.packed_for(x) if x.dim() == 4 and x.shape[1] == self.in_channels else None
        if packed is None:
            return self._conv_forward(x, self.weight, self.bias)
        bias = self.__dict__["_parameters"]["bias"]
        return convolution(x, packed.weight, bias, self.padding, self.stride, self.dilation, self.groups)


class PixelConv2d(PackedLayer, nn.Conv2d):
    """A 1x1 convolution as a linear layer over the pixels; plain where gradients are wanted.

    Packed as a linear layer, it is fast for images of any size; packed as a kernel, it is not. (At 256x256, a step
    took half as long again after one at 512x512.)
    """

    def pack(self, weight: Tensor, size: InputSize) -> PackedWeight:
        return PackedWeight(pack_linear(weight.flatten(1)), size, weight.shape, weight.stride())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        if torch.compiler.is_dynamo_compiling():
            return eagerly(self, x)
        packed = self.packed_for(x) if x.dim() == 4 and x.shape[1] == self.in_channels else None
        if packed is None:
            return self._conv_forward(x, self.weight, self.bias)
        bias = self.__dict__["_parameters"]["bias"]
        return linear(x.permute(0, 2, 3, 1).contiguous(), packed.weight, bias).permute(0, 3, 1, 2)


class UpsampleConv2d(PackedLayer, nn.Conv2d):
    """The 3x3 convolution in `Upsample`: packed as the four equivalent 2x2 kernels; plain when called directly.

    Of the nine pixels that a kernel sees in a doubled map only four differ. So each pixel of the result is a 2x2
    convolution of the small map by sums of the kernel's rows and columns. A doubled pixel has four places, hence four
    kernels, stored as one with four times the channels. By rows, for a kernel a, b, c:

        row 2i     sees rows i - 1, i, i of the small map: a, b + c
        row 2i + 1 sees rows i, i, i + 1:                  a + b, c
    """

    for_maps = True
    OPTIONS = (1, 1), (1, 1), (1, 1), 1  # padding, stride, dilation, groups

    def pack(self, weight: Tensor, size: InputSize) -> PackedWeight:
        C_out, C_in = weight.shape[:2]
        sums = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]).float()  # (place, of 2, of 3)
        kernels = weight.new_empty(2, 2, C_out, C_in, 2, 2)
        for start in range(0, C_out, AT_ONCE):  # all at once, the sums in float32 would take ten times the weight
            part = weight[start : start + AT_ONCE].float()
            kernels[:, :, start : start + AT_ONCE] = torch.einsum("ral,scm,oilm->rsoiac", sums, sums, part)
        # the plain weight cannot be computed from the sums, so it is kept
        kernels = kernels.view(4 * C_out, C_in, 2, 2).to_mkldnn()  # its own copy: from here on the first one is free
        kernels = pack_kernel(kernels, *self.OPTIONS, size)
        return PackedWeight(kernels, size, weight.shape, weight.stride(), weight)


class Upsample(layers.Upsample):
    """`layers.Upsample` with 4/9 of the arithmetic, where the map is doubled (`UpsampleConv2d`)."""

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size); twice the size where none is given."""
        if torch.compiler.is_dynamo_compiling():
            return eagerly(self, x, size)
        conv = self.conv
        if type(conv) is not UpsampleConv2d or x.dim() != 4 or x.shape[1] != conv.in_channels:
            return super().forward(x, size)
        B, C, H, W = x.shape
        packed = conv.packed_for(x) if not watched(conv) and tuple(size or ()) in ((), (2 * H, 2 * W)) else None
        if packed is None:
            return super().forward(x, size)
        bias = conv.__dict__["_parameters"]["bias"]
        x = convolution(x, packed.weight, None if bias is None else bias.repeat(4), *conv.OPTIONS)
        out = torch.empty((B, C, 2 * H, 2 * W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for place, part in enumerate(x.chunk(4, dim=1)):  # (B, C, H + 1, W + 1): a row and a column too many
            row, column = divmod(place, 2)
            out[:, :, row::2, column::2] = part[:, :, row : row + H, column : column + W]
        return out


class Attention(layers.Attention):
    """`layers.Attention`, by the fastest kernel for its inputs."""

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, N, D), context (B, M, context width) or None for x itself -> (B, N, D)."""
        if causal:
            return super().forward(x, context, causal)
        context = x if context is None else context
        return self.out(attention(self.q(x), self.k(context), self.v(context), self.heads))


class FeedForward(layers.FeedForward):
    """`layers.FeedForward`, in blocks of rows where the wide projection of all rows does not fit in the cache.

    At the finest level of Stable Diffusion 1.x the projection has 42 MB in bfloat16. Writing it to memory and reading
    it twice takes up to four times as long as the arithmetic.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        wide = self.proj.out_features * x.element_size()  # bytes of the projection of a row
        rows = max(WIDE_BLOCK // wide, LEAST_ROWS)
        if (
            x.device.type != "cpu"
            or x.dim() != 3
            or x[..., 0].numel() * wide < WIDE_FROM
            or not isinstance(self.proj, PackedLayer)  # else each block would pack the weight again
            or torch.is_grad_enabled()
            or not for_inference(x)
            or watched(self.proj, self.out)
        ):
            return super().forward(x)
        flat = x.flatten(0, 1)
        out = torch.empty_like(flat)
        for part, result in zip(flat.split(rows), out.split(rows), strict=True):
            result.copy_(super().forward(part))
        return out.view_as(x)


class GroupNorm(nn.GroupNorm):
    """Wu and He 2018, "Group normalization", on CPUs with exact sums in large float32 maps, faster in small bfloat16.

    For large channels-last maps, PyTorch's kernel adds up all pixels one after the other in float32. In an image of
    512x512 with a flat half, that is an error of 2e-3 in the output; sums of parts, added up in float64, leave 4e-7.
    (Far from zero, digits are still lost: 5e-3 where the mean is a thousand deviations, which no network has.)

    For maps of fewer than `LARGE` pixels, PyTorch's kernel can take four to six times as long in bfloat16 as in
    float32, so the two are compared.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if x.dim() != 4 or not self.affine:
            return super().forward(x)
        B, C, H, W = x.shape
        plain = torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != self.weight.dtype
        if plain or not for_inference(x) or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        if x.dtype == torch.bfloat16 and 0 < H * W < LARGE:
            if group_norm_kernel(C, H * W) == PLAIN:
                return super().forward(x)
            return _group_norm_in_float32(x, self.num_groups, self.weight, self.bias, self.eps)
        if x.dtype != torch.float32 or H * W < LARGE:
            return super().forward(x)
        sums, squares = _sums(x)
        n, G = H * W * C // self.num_groups, self.num_groups
        mean = sums.view(B, G, -1).sum(dim=-1, keepdim=True) / n
        var = squares.view(B, G, -1).sum(dim=-1, keepdim=True) / n - mean**2
        scale = (var.clamp(min=0) + self.eps).rsqrt() * self.weight.view(G, -1)
        shift = self.bias.view(G, -1) - mean * scale
        return torch.addcmul(shift.float().view(B, C, 1, 1), x, scale.float().view(B, C, 1, 1))


def group_norm_kernel(C: int, pixels: int) -> str:
    """The name of the faster kernel for group normalisation in bfloat16 of C channels with this many pixels each."""
    kind = ("group norm", "bfloat16", *(2 ** (size - 1).bit_length() for size in (C, pixels)))
    return fastest(kind, (PLAIN, "in float32"), partial(_group_norm_example, kind))


def _group_norm_in_float32(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm in bfloat16, computed in float32."""
    return F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)


def _group_norm_example(kind: Kind) -> Callable[[str], Tensor]:
    _, _, C, pixels = kind
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, int(pixels), 1, int(C), generator=rng, device="cpu").to(torch.bfloat16).permute(0, 3, 1, 2)
    weight, bias = torch.randn(2, int(C), generator=rng, device="cpu").to(torch.bfloat16)
    groups = min(layers.GROUPS, int(C))

    def run(name: str) -> Tensor:
        norm = F.group_norm if name == PLAIN else _group_norm_in_float32
        return norm(x, groups, weight, bias, 1e-5)

    return run


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of each channel of x (B, C, H, W): (B, C) in float64 on the CPU.

    On the CPU `var_mean` would take longer than the convolution that follows: 26 times as long as adding up by parts.
    """
    if x.device.type == "cpu":
        sums, squares = _sums(x)
        return sums / x[0, 0].numel(), squares / x[0, 0].numel()
    var, mean = (y.cpu().double() for y in torch.var_mean(x.float(), dim=(2, 3), correction=0))
    return mean, var + mean**2


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of x (B, C, H, W) and of its squares over all pixels, (B, C), added up in float64 by parts."""
    B, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view where x is channels-last
    sums, squares = pixels.new_zeros(2, B, C, dtype=torch.float64)
    for part in pixels.split(max(PART // (B * C), 1), dim=1):
        part = part.float()
        sums += part.sum(dim=1)
        squares += (part * part).sum(dim=1)
    return sums, squares
