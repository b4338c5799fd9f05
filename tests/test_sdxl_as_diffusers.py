"""Runs of SDXL in small are those of diffusers' pipelines: base and refiner, image to image, inpainting, prompts."""

from __future__ import annotations

import pytest
import torch
from common import TINY_XL, error, tiny_state
from sdxl_common import (
    PROMPT,
    TINY_REFINER,
    TINY_XL_INPAINT,
    as_ours,
    finish,
    guide_of,
    half_mask,
    model_of,
    params,
    photo,
    random_weights,
    tiny_refiner,
    tiny_xl,
)

from scripts import convert as convert_script
from sd import StableDiffusion
from sd.checkpoints.convert import convert
from sd.params import ImageToImage, Inpaint, TextToImage


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return tiny_xl()


@pytest.fixture(scope="module")
def refiner() -> StableDiffusion:
    return tiny_refiner()


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """diffusers' pipelines of the base and of the refiner, from folders written here."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("folders")
    base = convert(tiny_state("tiny-sdxl"), TINY_XL)
    for name, states, config in (("base", base, TINY_XL), ("refiner", random_weights(TINY_REFINER), TINY_REFINER)):
        (folder / name).mkdir()
        convert_script.save("diffusers", folder / name, states, config, {})
    made = (
        diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "base", add_watermarker=False),
        diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(folder / "refiner", add_watermarker=False),
    )
    return [as_ours(pipe) for pipe in made]


THEIRS = {"height": 64, "width": 64, "num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "latent"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fraction", [0.8, 0.5])
def test_base_and_refiner_as_diffusers(fraction, base, refiner, pipes):
    first, second = pipes
    request = TextToImage(PROMPT, params(refiner_from=fraction), negative="blurry")
    run = base.prepare(request, refiner)
    noise = run.start.x.clone()
    finish(run)
    more = THEIRS | {"prompt": PROMPT, "negative_prompt": "blurry"}
    latents = first(latents=noise, denoising_end=fraction, **more).images
    del more["height"], more["width"]
    latents = second(image=latents, denoising_start=fraction, **more).images
    assert error(run.x, latents) < 1e-4


@pytest.mark.exhaustive
def test_image_to_image_as_diffusers(base, refiner, pipes):
    """The last six of ten steps, from the same noised latents, by the base and by the refiner alone."""
    import diffusers

    first, second = pipes
    first = as_ours(diffusers.StableDiffusionXLImg2ImgPipeline(**first.components, add_watermarker=False))
    more = {name: value for name, value in THEIRS.items() if name not in ("height", "width")}
    for model, pipe in ((base, first), (refiner, second)):
        settings = params(aesthetic_score=7.0, negative_aesthetic_score=2.0)
        run = model.prepare(ImageToImage(PROMPT, settings, image=photo(), strength=0.6, negative="blurry"))
        noised = run.start.x.clone()
        finish(run)
        latents = pipe(
            PROMPT, negative_prompt="blurry", image=noised, denoising_start=0.4, aesthetic_score=7.0,
            negative_aesthetic_score=2.0, **more,
        ).images  # fmt: skip
        assert error(run.x, latents) < 1e-4


@pytest.mark.exhaustive
def test_inpainting_of_nine_channels_as_diffusers(pipes, refiner):
    import diffusers

    states = {name: dict(weights) for name, weights in convert(tiny_state("tiny-sdxl"), TINY_XL).items()}
    first = states["unet"]["conv_in.weight"]
    more = torch.randn(64, 5, 3, 3, generator=torch.Generator().manual_seed(8)) * 0.1
    states["unet"]["conv_in.weight"] = torch.cat([first, more], dim=1)
    model = model_of(states, TINY_XL_INPAINT)
    parts = dict(pipes[0].components)
    unet = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
    weights = parts["unet"].state_dict() | {"conv_in.weight": states["unet"]["conv_in.weight"]}
    unet.load_state_dict(weights)
    pipe = as_ours(diffusers.StableDiffusionXLInpaintPipeline(**(parts | {"unet": unet}), add_watermarker=False))
    scale = TINY_XL.vae.scale
    pipe._encode_vae_image = lambda image, generator: pipe.vae.encode(image).latent_dist.mode() * scale
    run = model.prepare(Inpaint(PROMPT, params(), image=photo(), mask=half_mask(), posterior="mode", negative="blurry"))
    noise = run.start.x.clone()
    finish(run)
    latents = pipe(
        PROMPT, negative_prompt="blurry", image=photo(), mask_image=half_mask(), strength=1.0, latents=noise, **THEIRS
    ).images
    assert error(run.x, latents) < 1e-4
    known = (32, 0, 64, 64)
    assert run.result().images[0].crop(known).tobytes() == photo().crop(known).tobytes()
    # a refiner of four channels continues it, and what is known is pasted
    refined = model.prepare(Inpaint(PROMPT, params(), image=photo(), mask=half_mask()), refiner)
    image = refined.result().images[0]
    assert refined.notes == [] and image.crop(known).tobytes() == photo().crop(known).tobytes()


def test_second_prompts_as_diffusers(base, pipes):
    texts = {"prompt_2": "a watercolour", "negative_prompt": "blurry", "negative_prompt_2": "red"}
    theirs = pipes[0].encode_prompt(PROMPT, device="cpu", **texts)
    guide = guide_of(base, TextToImage(PROMPT, params(), "blurry", prompt_2="a watercolour", negative_2="red"))
    for cond, context, pooled in zip((guide.cond, guide.uncond), theirs[:2], theirs[2:], strict=True):
        assert error(cond.context, context) < 1e-5
        assert error(cond.vector[:, :96], pooled) < 1e-5
