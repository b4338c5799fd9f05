"""The networks against the original's recorded outputs, in small; test_full.py has the full size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference_weights as reference
import torch
from common import TINY, Golden, check_norms, error, images, tiny_state, unet_norms
from conftest import loaded

from sd.checkpoints.convert import WEIGHTS, convert
from sd.checkpoints.loading import load_weights
from sd.conditioning import Conditioning
from sd.config import UNetConfig
from sd.models.build import build
from sd.models.unet import UNet
from sd.models.vae import VAE


@pytest.mark.parametrize("name", ["tiny_v1_components", "tiny_v1_inpainting_components"])
def test_tiny_components(request, name):
    golden = Golden(name)
    sd = request.getfixturevalue("tiny_sd" if name == "tiny_v1_components" else "tiny_inpaint")
    vae, unet = sd.vae, sd.unet
    assert error(sd.text_encoder(golden["ids"].long()).hidden, golden["context"]) < 1e-5
    with unet_norms(unet, sd.config) as norms:
        out = unet(golden["unet_x"], golden["unet_t"], Conditioning(golden["context"]))
    check_norms(norms, golden.case["norms_unet"], at_least=14)
    assert error(out, golden["unet_out"]) < 2e-5

    picture = images(golden["image_u8"])
    assert error(torch.cat(vae.moments(picture), dim=1), golden["moments"]) < 2e-5
    gaussian = vae.encode(picture)
    z = gaussian.sample(reference.normal(f"{name}/posterior", golden["z"].shape))
    assert error(z, golden["z"]) < 2e-5
    assert error(gaussian.mode(), 0.18215 * golden["moments"][:, :4]) < 2e-5
    assert error(vae.decode(golden["latent"]), golden["decoded"]) < 2e-5


def test_every_normalisation_eps():
    """Weights so small that a wrong eps in any one layer costs 1e-3 or more."""
    golden = Golden("eps_tiny_v1")
    networks = loaded(reference.shrink(tiny_state(), 0.02), TINY)
    assert error(networks["unet"](golden["x"], golden["t"], Conditioning(golden["context"])), golden["unet_out"]) < 2e-5
    moments = torch.cat(networks["vae"].moments(golden["image"]), dim=1)
    assert error(moments, golden["moments"]) < 2e-5
    # the case decodes without the scale factor
    assert error(networks["vae"].decode(golden["latent"] * TINY.vae.scale), golden["decoded"]) < 2e-5
    assert error(networks["text_encoder"](golden["ids"].long()).hidden, golden["context_out"]) < 1e-5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_ema_weights(weights):
    golden = Golden("tiny_v1_ema")
    state = convert(tiny_state("tiny-v1-full-ema"), TINY, weights)["unet"]
    unet = load_weights(build(TINY)["unet"], state, torch.device("cpu"), torch.float32)
    out = unet(golden["x"], golden["t"], Conditioning(golden.normal("context", (2, 77, 64))))
    assert error(out, golden["out_ema" if weights == "ema" else "out_plain"]) < 2e-5


@pytest.mark.parametrize("height, width", [(8, 8), (9, 13), (1, 1), (7, 24)])
def test_unet_takes_any_size(tiny, height, width):
    x = reference.normal("x", (2, 4, height, width))
    out = tiny["unet"](x, torch.tensor([981.0, 0.5]), Conditioning(reference.normal("c", (2, 77, 64))))
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 77, 154])
def test_unet_takes_any_context_length(tiny, tokens):
    x = reference.normal("x", (1, 4, 8, 8))
    assert tiny["unet"](x, torch.tensor([5.0]), Conditioning(reference.normal("c", (1, tokens, 64)))).isfinite().all()


def test_fractional_timesteps_are_not_rounded(tiny):
    x, context = reference.normal("x", (1, 4, 8, 8)), reference.normal("c", (1, 77, 64))
    outs = [tiny["unet"](x, torch.tensor([t]), Conditioning(context)) for t in (500.0, 500.5, 501.0)]
    assert error(outs[1], outs[0]) > 1e-3 and error(outs[1], outs[2]) > 1e-3


def test_vae_sides(tiny):
    latent = reference.normal("z", (1, 4, 3, 5))
    assert tiny["vae"].decode(latent).shape == (1, 3, 24, 40)
    assert tiny["vae"].encode(torch.zeros(1, 3, 24, 40)).mean.shape == (1, 4, 3, 5)
    with pytest.raises(ValueError, match="multiples of 8, got 20x40"):
        tiny["vae"].encode(torch.zeros(1, 3, 20, 40))


def test_logvar_is_clamped(tiny):
    vae: VAE = tiny["vae"]
    _, logvar = vae.moments(torch.full((1, 3, 16, 16), 1e6))
    assert logvar.max() <= 20 and logvar.min() >= -30


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_half_precision(dtype, tolerance):
    golden = Golden("tiny_v1_components")
    networks = loaded(tiny_state(), TINY, dtype)
    context = golden["context"].to(dtype)
    out = networks["unet"](golden["unet_x"].to(dtype), golden["unet_t"], Conditioning(context))
    assert out.dtype == dtype and error(out.float(), golden["unet_out"]) < tolerance
    assert error(networks["vae"].decode(golden["latent"].to(dtype)).float(), golden["decoded"]) < tolerance
    assert error(networks["text_encoder"](golden["ids"].long()).hidden.float(), golden["context"]) < tolerance


def test_batch_equals_single_runs(tiny):
    x, context = reference.normal("x", (3, 4, 16, 16)), reference.normal("c", (3, 77, 64))
    t = torch.tensor([900.0, 400.0, 3.0])
    together = tiny["unet"](x, t, Conditioning(context))
    for i in range(3):
        assert (
            error(together[i : i + 1], tiny["unet"](x[i : i + 1], t[i : i + 1], Conditioning(context[i : i + 1])))
            < 1e-5
        )


def test_gradients_flow():
    """Steering by a loss differentiates through U-Net and VAE: nothing in them may forbid it."""
    networks = loaded(tiny_state(), TINY)
    with torch.enable_grad():
        x = reference.normal("x", (1, 4, 8, 8)).requires_grad_()
        out = networks["unet"](x, torch.tensor([10.0]), Conditioning(reference.normal("c", (1, 77, 64))))
        networks["vae"].decode(out).mean().backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0


def test_residuals_of_a_control_network(tiny):
    """They are added to what is kept on the way down, and to the middle: where these are not used, nothing changes."""
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([10.0]), Conditioning(torch.randn(1, 5, 64))
    unet, kept = tiny["unet"], []
    plain = unet(x, t, cond)
    handles = [
        layer.register_forward_hook(lambda *args: kept.append(args[-1].shape))
        for layer in (unet.conv_in, *(level.down for level in unet.down if level.down is not None))
    ]
    unet(x, t, cond)
    for handle in handles:
        handle.remove()
    shapes = [(1, 64, 8, 8), (1, 64, 8, 8), (1, 64, 4, 4), (1, 128, 4, 4), (1, 128, 2, 2), (1, 128, 2, 2)]
    assert [shape for shape in shapes if shape in kept] and len(kept) == 3
    zeros = [torch.zeros(shape) for shape in shapes]
    middle = torch.zeros(1, 128, 2, 2)
    assert torch.equal(unet(x, t, cond, zeros, middle), plain)
    for i in range(len(shapes)):
        changed = [residual + (i == j) for j, residual in enumerate(zeros)]
        assert error(unet(x, t, cond, changed, middle), plain) > 1e-4
    assert error(unet(x, t, cond, middle=middle + 1), plain) > 1e-4
    with pytest.raises(ValueError, match="2 residuals of a control network, but the U-Net keeps 6"):
        unet(x, t, cond, zeros[:2])


def test_depth_and_vector():
    """Several transformer blocks a level, and a vector beside the timestep, as SDXL has them."""
    torch.manual_seed(0)
    config = UNetConfig(channels=(32, 64), heads=(1, 2), depth=(0, 2), middle_depth=3, blocks=1, context=8, vector=12)
    unet = UNet(config)
    assert [len(attn.blocks) for attn in (*unet.down[1].attn, unet.mid.attn, *unet.up[1].attn)] == [2, 3, 2, 2]
    assert len(unet.down[0].attn) == len(unet.up[0].attn) == 0
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([10.0]), torch.randn(1, 5, 8)
    outs = [unet(x, t, Conditioning(context, vector)) for vector in (torch.zeros(1, 12), torch.ones(1, 12))]
    assert error(*outs) > 1e-4
    with pytest.raises(ValueError, match="needs a vector"):
        unet(x, t, Conditioning(context))
    with pytest.raises(ValueError, match="takes no vector"):
        UNet(replace(config, vector=None))(x, t, Conditioning(context, torch.ones(1, 12)))


def test_channels_behind_those_of_x(tiny_inpaint):
    """Mask and masked latent are given as a conditioning, or by the caller in x."""
    x, more = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8)
    t, context = torch.tensor([10.0, 20.0]), torch.randn(2, 5, 64)
    out = tiny_inpaint.unet(x, t, Conditioning(context, concat=more))
    assert torch.equal(out, tiny_inpaint.unet(torch.cat([x, more], 1), t, Conditioning(context)))
