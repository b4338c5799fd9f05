"""The shared layers against their formulas."""

from __future__ import annotations

import math

import pytest
import reference_weights as reference
import torch
from common import error
from torch import nn

from sd.models import layers
from sd.models.layers import Attention, FeedForward, ResBlock, Upsample, timestep_embedding
from sd.models.text_encoder import quick_gelu
from sd.runtime.blockwise_attention import attention
from sd.runtime.cpu_kernels import GroupNorm


def textbook_attention(q, k, v, heads, causal=False):
    """softmax(q kᵀ / sqrt(d)) v, head by head, in float64."""
    out = []
    for qh, kh, vh in zip(*(x.double().chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = qh @ kh.transpose(-1, -2) / math.sqrt(qh.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ vh)
    return torch.cat(out, dim=-1)


@pytest.mark.parametrize("heads, width", [(1, 64), (8, 320), (4, 64)])
@pytest.mark.parametrize("N, M, causal", [(77, 77, True), (64, 77, False), (1024, 1024, False), (5, 1, False)])
def test_attention_is_the_textbook_formula(heads, width, N, M, causal):
    q = reference.normal("q", (2, N, width))
    k, v = reference.normal("k", (2, M, width)), reference.normal("v", (2, M, width))
    expected = textbook_attention(q, k, v, heads, causal)
    low = [x.bfloat16() for x in (q, k, v)]
    assert error(layers.attention(q, k, v, heads, causal), expected) < 1e-6
    assert error(layers.attention(*low, heads, causal), textbook_attention(*low, heads, causal)) < 1e-2
    if not causal:
        assert error(attention(q, k, v, heads), expected) < 1e-6
        assert error(attention(*low, heads), textbook_attention(*low, heads)) < 1e-2


@pytest.mark.parametrize("spread, tolerance", [(1.0, 0.01), (4.0, 0.03), (8.0, 0.05)])
def test_attention_in_bfloat16_with_large_scores(spread, tolerance):
    """Where it is blockwise on the CPU, scores are rounded before the softmax; the error grows with them."""
    q, k, v = (reference.normal(name, (1, 1024, 64)) for name in "qkv")
    low = [(spread * q).bfloat16(), k.bfloat16(), v.bfloat16()]
    assert error(attention(*low, heads=1), textbook_attention(*low, heads=1)) < tolerance


def test_blockwise_attention_has_no_gradient_to_lose():
    x = reference.normal("x", (1, 600, 32)).bfloat16()
    with torch.enable_grad():
        tracked = x.clone().requires_grad_()
        attention(tracked, tracked, tracked, heads=1).float().sum().backward()
    assert tracked.grad.isfinite().all() and tracked.grad.norm() > 0


def test_attention_does_not_overflow_in_half_precision():
    """Scores beyond float16's 65504, as SD 2.1 makes them: the softmax must still be exact about the largest."""
    q = torch.full((1, 4, 64), 200.0, dtype=torch.float16)
    k = torch.full((1, 4, 64), 200.0, dtype=torch.float16)
    k[:, 1:] = -200.0
    v = reference.normal("v", (1, 4, 64)).half()
    out = attention(q, k, v, heads=1)
    assert out.isfinite().all() and error(out, v[:, :1].expand_as(out)) < 1e-3


def test_cross_attention_reads_the_context():
    layer = Attention(64, 4, context_width=48, qkv_bias=False)
    x, context = reference.normal("x", (2, 9, 64)), reference.normal("c", (2, 7, 48))
    heads = textbook_attention(layer.q(x), layer.k(context), layer.v(context), 4)
    assert error(layer(x, context), heads @ layer.out.weight.double().T + layer.out.bias.double()) < 1e-6
    assert layer.q.bias is None and layer.out.bias is not None


def test_geglu():
    layer = FeedForward(32)
    x = reference.normal("x", (2, 5, 32))
    value, gate = layer.proj(x).double().chunk(2, dim=-1)
    exact = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    expected = (value * exact) @ layer.out.weight.double().T + layer.out.bias.double()
    assert error(layer(x), expected) < 1e-6  # the tanh approximation is 8e-5 off


def test_quick_gelu():
    x = torch.linspace(-4, 4, 33)
    assert error(quick_gelu(x), x.double() / (1 + torch.exp(-1.702 * x.double()))) < 1e-6


def test_timestep_embedding():
    t = torch.tensor([0.0, 1.0, 17.25, 999.0])
    out = timestep_embedding(t, 320)
    for i in (0, 1, 80, 159):
        angle = t.double() * math.exp(-math.log(10000) * i / 160)
        assert torch.allclose(out[:, i].double(), angle.cos(), atol=1e-4)  # cosines first
        assert torch.allclose(out[:, 160 + i].double(), angle.sin(), atol=1e-4)
    assert out.dtype == torch.float32 and timestep_embedding(torch.tensor([3]), 320).dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalisation_statistics_are_float32(dtype, layout):
    """Activations far from zero: mean and variance summed in half precision would be off by tens of percent."""
    # mean / std of 120, as no network has it; the CPU's channels-last kernel subtracts squares: 10 is what it can do
    mean = 60 if layout == torch.contiguous_format else 5
    x = (reference.normal("x", (2, 64, 33, 31)) * 0.5 + mean).to(dtype).contiguous(memory_format=layout)
    norm = GroupNorm(32, 64, 1e-5).to(dtype)
    expected = nn.functional.group_norm(x.double(), 32, eps=1e-5)
    assert error(norm(x), expected) < (1e-3 if dtype == torch.float16 else 5e-3)


@pytest.mark.parametrize("height, width", [(512, 256), (64, 64), (32, 32), (1, 5000)])
def test_normalisation_of_large_flat_pictures(height, width):
    """A flat half, as a sky or a greyed hole: sums of many equal numbers are where float32 loses most."""
    x = reference.normal("x", (1, 64, height, width)) * 0.5 + 0.5
    x[..., width // 2 :] = 0.9
    norm = GroupNorm(32, 64, 1e-5)
    norm.weight.copy_(reference.normal("w", (64,)))
    norm.bias.copy_(reference.normal("b", (64,)))
    expected = nn.functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-5)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = norm(x.contiguous(memory_format=layout))
        assert out.is_contiguous(memory_format=layout)
        assert error(out, expected) < 1e-6
    with torch.enable_grad():  # the plain kernel, for training
        assert error(norm(x).detach(), expected) < 1e-5


@pytest.mark.parametrize("height, width", [(4, 4), (31, 33), (32, 32)])
def test_normalisation_of_small_maps_in_bfloat16(height, width):
    """Computed in float32 where that is faster: only what comes out is rounded."""
    x = reference.normal("x", (2, 64, height, width)).bfloat16().to(memory_format=torch.channels_last)
    norm = GroupNorm(32, 64, 1e-5)
    norm.weight.copy_(reference.normal("w", (64,)))
    norm.bias.copy_(reference.normal("b", (64,)))
    norm = norm.bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    weight, bias = norm.weight.double(), norm.bias.double()
    assert error(out, nn.functional.group_norm(x.double(), 32, weight, bias, 1e-5)) < 3e-3


def test_res_block_adds_time_between_its_halves():
    block = ResBlock(32, 64, 1e-5, time_width=16)
    x, time = reference.normal("x", (2, 32, 5, 7)), reference.normal("t", (2, 16))
    silu = nn.functional.silu
    h = block.conv1(silu(block.norm1(x))) + block.time(time)[:, :, None, None]
    assert error(block(x, time), block.skip(x) + block.conv2(silu(block.norm2(h)))) < 1e-6
    kept = x.clone()
    block(x, time)
    assert torch.equal(x, kept), "the input must stay as it was"


def test_upsample_to_an_odd_size():
    layer = Upsample(32)
    x = reference.normal("x", (1, 32, 3, 4))
    assert layer(x).shape == (1, 32, 6, 8) and layer(x, (5, 7)).shape == (1, 32, 5, 7)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert error(layer(x), nn.functional.conv2d(doubled, layer.conv.weight, layer.conv.bias, padding=1)) < 1e-6
