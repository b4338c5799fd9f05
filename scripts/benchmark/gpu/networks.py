"""Checks of each network against the recorded outputs of the original code, in every precision.

The tolerances for half precision are those of tests/test_full.py. float32 runs without TF32, with which cuDNN rounds
the inputs of convolutions to 10 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from sd.conditioning import Conditioning
from sd.models.vae import VAE
from sd.pipeline import StableDiffusion
from sd.runtime.device import dtype_name

from .items import check, require
from .models import Models, error, no_goldens, recorded, said

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
STEPS_TOLERANCE = 5e-2  # of whole runs in half precision: guidance amplifies rounding errors

Pair = tuple[str, Tensor, Tensor]  # name, output of the network, recorded output


@contextmanager
def exact() -> Iterator[None]:
    """A context without TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def compared(models: Models, pairs: Callable[[Models, StableDiffusion], Iterator[Pair]], dtype: torch.dtype) -> str:
    """Compare a network with recorded outputs in one precision; returns the largest error as text."""
    model, errors = models.reference(dtype), {}
    with exact():
        for what, out, expected in pairs(models, model):
            require(bool(out.isfinite().all()), f"{what}: not finite in {dtype_name(dtype)}")
            errors[what] = error(out, expected)
    worst = max(errors, key=lambda what: errors[what])
    require(
        errors[worst] < TOLERANCES[dtype],
        f"{worst}: error {errors[worst]:.1e} in {dtype_name(dtype)}, expected below {TOLERANCES[dtype]:.0e}",
    )
    return said(errors[worst], dtype)


def text_encoder(models: Models, model: StableDiffusion) -> Iterator[Pair]:
    """The context of some prompts."""
    name, key = ("tiny_v1_components", "context") if models.place.trial else ("clip_l", "last_hidden_state")
    golden = recorded().Golden(name)
    hidden = model.text_encoder(golden["ids"].long().to(models.device)).hidden
    yield name, recorded().kept(hidden, golden[key]), golden[key]


def vae(models: Models, model: StableDiffusion) -> Iterator[Pair]:
    """Encoder and decoder."""
    for name in ("tiny_v1_components",) if models.place.trial else ("vae_256x320", "vae_64x64_b2"):
        golden = recorded().Golden(name)
        image = recorded().images(golden["image_u8"]).to(models.device, model.dtype)
        network = cast(VAE, model.vae)
        yield f"{name}, encoder", torch.cat(network.moments(image), dim=1), golden["moments"]
        decoded = model.vae.decode(golden["latent"].to(models.device, model.dtype))
        yield f"{name}, decoder", recorded().kept(decoded, golden["decoded"]), golden["decoded"]


def unet(models: Models, model: StableDiffusion) -> Iterator[Pair]:
    """The prediction; at full size for two shapes."""
    before = "unet_" if models.place.trial else ""
    for name in ("tiny_v1_components",) if models.place.trial else ("unet_v1_64x64_b2", "unet_v1_48x80"):
        golden = recorded().Golden(name)
        x, t, out = golden[f"{before}x"], golden[f"{before}t"], golden[f"{before}out"]
        shape = (len(x), 77, models.config.unet.context)
        context = golden["context"] if models.place.trial else golden.normal("context", shape)
        given = Conditioning(context).to(models.device, model.dtype)
        yield name, model.unet(x.to(models.device, model.dtype), t.to(models.device), given), out


def steps(models: Models, model: StableDiffusion) -> Iterator[Pair]:
    """Some steps of DDIM, with prompts and guidance."""
    golden = recorded().Golden("tiny_v1_txt2img_ddim_s20" if models.place.trial else "full_v1_ddim_s4")
    x = golden["x_T"].to(models.device)
    context = model.encode_prompt(golden.case["prompts"][: len(x)])
    uncond = model.encode_prompt([golden.case["negative"]])
    levels = model.schedule.levels(golden.case["steps"], "leading")
    *_, last = model.sample(model.denoiser(context, uncond, golden.case["scale"]), x, levels, "ddim")
    yield golden.name, last.x, golden["out"]


def parity(models: Models, dtype: torch.dtype) -> str:
    """Compare all networks in one precision; returns their largest errors as text."""
    return "; ".join(f"{pairs.__name__} {compared(models, pairs, dtype)}" for pairs in (text_encoder, vae, unet))


@check("networks", "text encoder, VAE and U-Net in float16 against the original's outputs", needs=no_goldens)
def parity_float16(models: Models) -> str:
    """The usual precision on GPUs."""
    return parity(models, torch.float16)


@check("networks", "some steps with guidance against the original's, in the default precision", needs=no_goldens)
def default_steps(models: Models) -> str:
    """With the public API; steps are recorded where the pipeline records them."""
    model = models.reference(models.place.dtype)
    (found,) = [error(out, expected) for _, out, expected in steps(models, model)]
    require(found < STEPS_TOLERANCE, f"error {found:.1e}, expected below {STEPS_TOLERANCE:.0e}")
    return said(found, model.dtype)


@check("networks", "text encoder, VAE and U-Net in bfloat16 against the original's outputs", needs=no_goldens)
def parity_bfloat16(models: Models) -> str:
    """The other half precision."""
    return parity(models, torch.bfloat16)


@check("networks", "text encoder, VAE and U-Net in float32, without TF32, against the original's", needs=no_goldens)
def parity_float32(models: Models) -> str:
    """If only half precision fails, the kernels are right and the precision is not enough."""
    return parity(models, torch.float32)


@check("networks", "a tiny autoencoder (TAESD) in every precision against the original's outputs", needs=no_goldens)
def parity_taesd(models: Models) -> str:
    """Encoder and decoder. The latents are far enough from zero that their clamp shows."""
    golden, results = recorded().Golden("taesd_128x72"), []
    image, z = golden["image_u8"].float() / 127.5 - 1, 2 * golden.normal("latent", (1, 4, 16, 9))
    for dtype, limit in TOLERANCES.items():
        vae = models.tiny_vae(dtype)
        with exact():
            encoded = vae.encode(image.to(models.device, dtype)).mean
            decoded = (vae.decode(z.to(models.device, dtype)) + 1) / 2
        errors = {"encoder": error(encoded, golden["encoded"]), "decoder": error(decoded, golden["decoded"])}
        for half, found in errors.items():
            require(found < limit, f"{half}: error {found:.1e} in {dtype_name(dtype)}, expected below {limit:.0e}")
        results.append(said(max(errors.values()), dtype))
    return "; ".join(results)
