"""Group norm in parts: the same as in one, in the layout of its input."""

from __future__ import annotations

import pytest
import torch
from common import error
from torch import nn

from sd.runtime import cuda_kernels, group_norm
from sd.runtime.optimize import optimize, restore


@pytest.mark.parametrize("groups, channels", [(32, 64), (8, 24), (6, 12), (3, 3), (1, 5)])
def test_parts_are_the_whole(groups, channels):
    norm = nn.GroupNorm(groups, channels, 1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = 3 * torch.randn(2, channels, 7, 5) + 5
    last = x.contiguous(memory_format=torch.channels_last)
    out = group_norm.in_parts(norm, last)
    assert error(out, norm(x)) < 1e-6 and out.is_contiguous(memory_format=torch.channels_last)


def test_only_large_maps_are_taken_in_parts(monkeypatch):
    taken = []
    monkeypatch.setattr(group_norm, "in_parts", lambda norm, x: taken.append(x.shape) or x)
    norm = optimize(nn.GroupNorm(4, 8), torch.device("cuda"))
    assert type(norm) is cuda_kernels.GroupNorm
    for side, layout in ((8, torch.channels_last), (64, torch.contiguous_format), (64, torch.channels_last)):
        monkeypatch.setattr(group_norm, "LARGE", 8 * 64 * 64)
        norm(torch.ones(1, 8, side, side).contiguous(memory_format=layout))
    assert taken == [(1, 8, 64, 64)]
    norm(torch.ones(2, 8))  # not a map
    assert type(restore(norm)) is nn.GroupNorm
