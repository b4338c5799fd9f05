"""Runs that start from an image: image to image, and inpainting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .controls import like_image
from .denoiser import keep_known
from .imaging.colours import match_colours
from .imaging.files import WHITE, flatten
from .imaging.masks import Canvas, latent_mask, mask_channels, masked_image, prepare_mask, surroundings, widened
from .imaging.tensors import Box, fit, frame, to_tensor
from .latents import image_size, latent_shape
from .params import ImageToImage, Inpaint
from .run import Run, Start, Unchanged

if TYPE_CHECKING:
    from .pipeline import StableDiffusion

CROP_NOTE = 0.9  # cropping to less than this share of the image adds a note


def image_to_image(model: StableDiffusion, request: ImageToImage) -> Run:
    """Start from the latents of the image, with the noise of the first level added."""
    params = request.params.resolved(model.defaults)
    image, _ = _rgb_and_alpha(request.image)
    height, width = image_size(model.config, image.size, params.height, params.width, up=request.fit == "pad")
    shape = latent_shape(model.config, height, width)
    run = Run(model, request, params, [], shape, request.strength)
    run.place = like_image(image.size, width, height, request.fit)
    inside = Box(0, 0, width, height)
    if request.fit == "pad":
        image, inside = frame(image, width, height)
        check_tileable(run, inside, width, height)
    else:
        wider = (image.width / image.height) / (width / height)
        if (kept := min(wider, 1 / wider)) < CROP_NOTE:
            run.notes.append(f"{100 - 100 * kept:.0f} % of the image is cut off")
        image = fit(image, width, height)
    if request.strength == 1:  # nothing of the image is left
        x = run.source.initial(shape)
    else:
        z = _latents(run, to_tensor(image), request.posterior)
        noise = run.source.initial(shape)
        x = model.schedule.add_noise(z, noise, run.levels[0]) if len(run) else z
    original = image.crop(inside)

    def finish(generated: Image.Image) -> Image.Image:
        generated = generated.crop(inside)
        return match_colours(generated, original) if request.match_colours else generated

    return run.begin(Start(x, run.denoiser(shape), finish=finish))


def inpaint(model: StableDiffusion, request: Inpaint) -> Run:
    """Start from noise in the masked part.

    A model of 9 channels receives the mask and the masked image as input; for any other, x0 is held to the known part
    of the image (`keep_known`).
    """
    params, notes, factor = request.params.resolved(model.defaults), list[str](), model.config.vae.factor
    image, mask = _image_and_mask(request, notes.append)
    whole_image = region = Box(0, 0, *image.size)
    if request.margin is not None:
        region = surroundings(mask, request.margin) or whole_image
    height, width = image_size(model.config, region.size, params.height, params.width, up=True)
    if region != whole_image:
        region = widened(region, width / height, image.size)
    if mask.getbbox() is None:
        notes.append("the mask is empty (all black): nothing is generated")
        return Unchanged(model, request, params, notes, image)

    shape = latent_shape(model.config, height, width)
    run = Run(model, request, params, notes, shape, request.strength)
    run.place = like_image(image.size, width, height, "pad", region)
    canvas = Canvas.of(image, mask, region, width, height)
    check_tileable(run, canvas.inside if region == whole_image else None, width, height)
    known = concat = None
    if not model.is_inpainting or request.strength < 1:
        fill = request.content == "fill" and request.strength < 1
        known = _latents(run, canvas.filled() if fill else canvas.pixels, request.posterior)
    if model.is_inpainting:
        masked = _latents(run, masked_image(canvas.pixels, canvas.hole), request.posterior)
        concat = mask_channels(latent_mask(canvas.hole, factor), masked)
    x = run.source.initial(shape)
    # a latent is generated if any of its pixels is masked
    hole = F.max_pool2d(canvas.hole, factor).to(model.device)
    if known is not None:
        noised = model.schedule.add_noise(known, x, run.levels[0]) if len(run) else known
        from_noise = request.strength == 1 or (request.content == "noise" and len(run) > 0)
        x = torch.where(hole > 0, x, noised) if from_noise else noised
    denoise = run.denoiser(shape, concat)
    if model.is_inpainting or known is None:
        return run.begin(Start(x, denoise, finish=canvas.paste))
    z, hold = known, partial(keep_known, known=known, mask=hole)
    return run.begin(Start(x, hold(denoise), lambda last: torch.lerp(z, last, hole), canvas.paste, hold))


def _latents(run: Run, pixels: Tensor, posterior: str) -> Tensor:
    """(1, 3, H, W) -> the latents of each image (B, C, h, w): its own posterior sample, or the mean."""
    gaussian = run.encode(pixels)
    if posterior == "mode":
        return gaussian.mode().expand(len(run.seeds), -1, -1, -1)
    return gaussian.sample(run.source.posterior(gaussian.mean.shape[1:]))


def check_tileable(run: Run, inside: Box | None, width: int, height: int) -> None:
    """Raise ValueError if a tileable image is wanted, and only a part of the generated one is kept.

    inside   this part of the width x height generated; None for the region around a mask
    """
    if run.params.tileable and inside is None:
        raise ValueError("tileable cannot be combined with margin (--only-masked): leave the margin out")
    if run.params.tileable and inside != Box(0, 0, width, height):
        raise ValueError(
            f"tileable: the image would be padded to {width}x{height}, and its edges would not match: use "
            f"one whose sides are multiples of {run.model.config.vae.factor}"
        )


def _image_and_mask(request: Inpaint, note: Callable[[str], object]) -> tuple[Image.Image, Image.Image]:
    """RGB image and mask (mode L) of the same size; if no mask is given, the transparent part is the mask."""
    if request.mask is not None:
        image, mask = _rgb_and_alpha(request.image)[0], request.mask
    else:
        image, alpha = _rgb_and_alpha(request.image, None)  # keeps the colours of half-transparent pixels
        if alpha is None:
            raise ValueError("no part of the image is masked: give a mask, or an image with a transparent part")
        mask = ImageOps.invert(alpha)
    return image, prepare_mask(mask, image.size, request.blur, note)


def _rgb_and_alpha(
    image: Image.Image, background: tuple[int, int, int] | None = WHITE
) -> tuple[Image.Image, Image.Image | None]:
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # PIL opens files lazily
        raise ValueError(f"the image cannot be read: {error}") from None
    return flatten(image, background)
