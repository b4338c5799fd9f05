"""The networks against the original's recorded outputs, in small; test_full.py has the full size."""

from __future__ import annotations

import pytest
import reference_weights as reference
import torch
from common import TINY, TINY_INPAINT, TINY_V2, Golden, check_norms, error, images, tiny_state, unet_norms
from conftest import loaded

from sd.checkpoints.convert import WEIGHTS, convert
from sd.checkpoints.loading import build, load_weights
from sd.checkpoints.weight_shapes import weight_shapes
from sd.config import MODELS
from sd.models.vae import VAE


@pytest.mark.parametrize("name", ["tiny_v1_components", "tiny_v1_inpainting_components"])
def test_tiny_components(request, name):
    golden = Golden(name)
    sd = request.getfixturevalue("tiny_sd" if name == "tiny_v1_components" else "tiny_inpaint")
    vae, unet = sd.vae, sd.unet
    assert error(sd.text_encoder(golden["ids"].long()), golden["context"]) < 1e-5
    norms = unet_norms(unet, sd.config)
    out = unet(golden["unet_x"], golden["unet_t"], golden["context"])
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
    assert error(networks["unet"](golden["x"], golden["t"], golden["context"]), golden["unet_out"]) < 2e-5
    moments = torch.cat(networks["vae"].moments(golden["image"]), dim=1)
    assert error(moments, golden["moments"]) < 2e-5
    # the case decodes without the scale factor
    assert error(networks["vae"].decode(golden["latent"] * TINY.vae.scale), golden["decoded"]) < 2e-5
    assert error(networks["text_encoder"](golden["ids"].long()), golden["context_out"]) < 1e-5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_ema_weights(weights):
    golden = Golden("tiny_v1_ema")
    state = convert(tiny_state("tiny-v1-full-ema"), TINY, weights)["unet"]
    unet = load_weights(build(TINY)["unet"], state, torch.device("cpu"), torch.float32)
    out = unet(golden["x"], golden["t"], golden.normal("context", (2, 77, 64)))
    assert error(out, golden["out_ema" if weights == "ema" else "out_plain"]) < 2e-5


@pytest.mark.parametrize("height, width", [(8, 8), (9, 13), (1, 1), (7, 24)])
def test_unet_takes_any_size(tiny, height, width):
    x = reference.normal("x", (2, 4, height, width))
    out = tiny["unet"](x, torch.tensor([981.0, 0.5]), reference.normal("c", (2, 77, 64)))
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 77, 154])
def test_unet_takes_any_context_length(tiny, tokens):
    x = reference.normal("x", (1, 4, 8, 8))
    assert tiny["unet"](x, torch.tensor([5.0]), reference.normal("c", (1, tokens, 64))).isfinite().all()


def test_fractional_timesteps_are_not_rounded(tiny):
    x, context = reference.normal("x", (1, 4, 8, 8)), reference.normal("c", (1, 77, 64))
    outs = [tiny["unet"](x, torch.tensor([t]), context) for t in (500.0, 500.5, 501.0)]
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
    out = networks["unet"](golden["unet_x"].to(dtype), golden["unet_t"], context)
    assert out.dtype == dtype and error(out.float(), golden["unet_out"]) < tolerance
    assert error(networks["vae"].decode(golden["latent"].to(dtype)).float(), golden["decoded"]) < tolerance
    assert error(networks["text_encoder"](golden["ids"].long()).float(), golden["context"]) < tolerance


def test_batch_equals_single_runs(tiny):
    x, context = reference.normal("x", (3, 4, 16, 16)), reference.normal("c", (3, 77, 64))
    t = torch.tensor([900.0, 400.0, 3.0])
    together = tiny["unet"](x, t, context)
    for i in range(3):
        assert error(together[i : i + 1], tiny["unet"](x[i : i + 1], t[i : i + 1], context[i : i + 1])) < 1e-5


def test_gradients_flow():
    """Steering by a loss differentiates through U-Net and VAE: nothing in them may forbid it."""
    networks = loaded(tiny_state(), TINY)
    with torch.enable_grad():
        x = reference.normal("x", (1, 4, 8, 8)).requires_grad_()
        out = networks["unet"](x, torch.tensor([10.0]), reference.normal("c", (1, 77, 64)))
        networks["vae"].decode(out).mean().backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0


@pytest.mark.parametrize("config", [*MODELS.values(), TINY, TINY_INPAINT, TINY_V2], ids=lambda config: config.name)
def test_the_list_of_weights_is_that_of_the_networks(config):
    """Names, shapes and order: files are checked against the list."""
    built = {name: {k: tuple(t.shape) for k, t in net.state_dict().items()} for name, net in build(config).items()}
    listed = weight_shapes(config)
    for name, shapes in built.items():
        assert listed[name] == shapes
