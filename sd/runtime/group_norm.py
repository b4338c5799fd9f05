"""Group normalisation of large channels-last maps on a GPU, some groups at a time, which saves memory.

PyTorch's kernel for GPUs works on contiguous maps (B, C, H, W): it copies a channels-last map, and returns a contiguous
one, which the next convolution copies back. When a 512x512 image is decoded, these copies are the largest tensors, 134
MB each in half precision. Groups are normalised independently, so they can pass through the kernel in `PARTS` parts,
and the result is written channels-last. The result is the same, and as much is read and written.

>>> norm = nn.GroupNorm(8, 32)
>>> x = torch.randn(2, 32, 5, 7).contiguous(memory_format=torch.channels_last)
>>> torch.allclose(in_parts(norm, x), norm(x), atol=1e-6)
True
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 2**24  # numbers in a map; for smaller ones, the memory is not worth the additional kernels
PARTS = 4  # so the copies of a part are no larger than the output of the next convolution


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """x (B, C, ...), normalised; large channels-last maps in parts, and the result is channels-last, too."""
    if x.numel() >= LARGE and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return in_parts(norm, x)
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def in_parts(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """x (B, C, H, W), normalised, in the layout of x."""
    out = torch.empty_like(x)
    step = -(-norm.num_groups // PARTS)
    width = norm.num_channels // norm.num_groups
    for first in range(0, norm.num_groups, step):
        groups = min(step, norm.num_groups - first)
        part = slice(first * width, (first + groups) * width)
        out[:, part] = F.group_norm(x[:, part], groups, norm.weight[part], norm.bias[part], norm.eps)
    return out
