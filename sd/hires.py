"""High resolution: an image is generated, enlarged, and refined at the larger size (the web UI's "hires. fix").

    first pass -> latents -> enlarged -> noise added -> the last steps of a second pass -> images

Models compose badly at sizes far above their native one: objects repeat. So the composition comes from a first pass at
the size of `params`, and the second, image to image on its result, adds detail. Both have the same prompt, sampler and
guidance. As in the web UI, the noise of the second pass comes from new generators with the seeds of the first, so it is
the noise of that seed at the larger size, and hires_steps are the steps that are taken, whatever the strength.

The image is enlarged by Lanczos resampling of its pixels, or by bilinear interpolation of its latents, which is faster
but blurs: it needs a strength of 0.5 or more. The latents of the enlarged image are the mean of the encoder's
distribution, so that the first random numbers of the second pass are its initial noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .config import Config
from .imaging.tensors import resize, to_tensor
from .latents import check_encoder, latent_shape
from .params import HighRes, ResolvedParams
from .run import Result, Run, Start, text_to_image
from .samplers import Step
from .schedule import ALL_STEPS, Levels

if TYPE_CHECKING:
    from .pipeline import StableDiffusion

REACH = 8  # pixels beyond an edge that are given to the Lanczos filter, which looks at 3 when it enlarges


class HighResRun(Run):
    """The run of a `HighRes` request: the steps of both passes. Previews have the size of the result."""

    def __init__(self, first: Run, second: Run, upscaler: str, shape: tuple[int, int, int]) -> None:
        """`second` has not begun; `shape` (C, h, w) is that of its latents."""
        self.model, self.request, self.params, self.notes = first.model, first.request, first.params, first.notes
        self.source, self.seeds, self.guides, self.edges = first.source, first.seeds, first.guides, first.edges
        second.notes = first.notes
        self.first, self.second, self.upscaler, self.shape = first, second, upscaler, shape
        self.refine: Callable[[Start], Start] = lambda start: start  # applied to the second pass (refiner.py)
        self.levels = Levels([*first.levels, *second.levels[1:]], first.levels.schedule)
        self.start, self.x, self._taken = first.start._replace(finish=self._to_size), first.x, 0
        self._steps, self._enlarged = self._both(), False  # `begin` is not called: the two passes have their own

    def _both(self) -> Iterator[Step]:
        """The steps of the first pass, then those of the second, which starts from the enlarged latents."""
        yield from self.first
        z = enlarged(self.first, self.second, self.upscaler, self.shape)
        noise = self.second.source.initial(self.shape)
        if len(self.second):
            z = self.model.schedule.add_noise(z, noise, self.second.levels[0])
        self.second.begin(self.refine(Start(z, self.second.denoiser(self.shape), finish=self._to_size)))
        self.start, self.x, self._enlarged = self.second.start, self.second.x, True
        for step in self.second:
            yield step._replace(i=len(self.first) + step.i)

    def _to_size(self, image: Image.Image) -> Image.Image:
        """An image of either pass at the size of the result."""
        factor = self.model.config.vae.factor
        return resize(image, self.shape[2] * factor, self.shape[1] * factor)

    def result(self) -> Result:
        """Take the remaining steps, decode and finish. Raises RuntimeError if a step failed or was interrupted."""
        for _ in self:
            pass
        if not self._enlarged and self._taken == len(self):  # a second pass without steps
            raise RuntimeError("enlarging the image failed: prepare the request again")
        return super().result()


def enlarged_shape(config: Config, request: HighRes) -> tuple[int, int, int]:
    """(C, h, w) of the enlarged latents; raises ValueError for an image that would be too large."""
    factor, (_, *sides) = config.vae.factor, latent_shape(config, request.params.height, request.params.width)
    height, width = (int(side * factor * request.hires + 1e-6) // factor * factor for side in sides)
    return latent_shape(config, height, width)


def high_res(model: StableDiffusion, request: HighRes) -> HighResRun:
    """Begin the first pass, and plan the second."""
    if request.hires_upscaler != "latent":
        check_encoder(model.config)
    first, factor = text_to_image(model, request), model.config.vae.factor
    shape = enlarged_shape(model.config, request)
    params, strength = second_pass(request, first.params, model.schedule.steps)
    params = replace(params, height=shape[1] * factor, width=shape[2] * factor)
    notes: list[str] = []
    second = Run(model, request, params, notes, shape, strength, first_pass=first.params.steps)
    if len(second):
        first.notes += notes
    else:
        first.notes.append(
            f"hires_strength {strength:g} of {params.steps} steps is less than one step: the image is only enlarged"
        )
    return HighResRun(first, second, request.hires_upscaler, shape)


def second_pass(request: HighRes, params: ResolvedParams, most: int) -> tuple[ResolvedParams, float]:
    """Parameters and strength of the second pass; its grid has at most so many steps, else ValueError."""
    strength = request.hires_strength
    if request.hires_steps is None or strength == 0:
        return params, strength
    if params.spacing in ALL_STEPS:
        return replace(params, steps=request.hires_steps), strength
    grid = int(request.hires_steps / strength)  # rounded down, as in the web UI
    if grid > most:
        raise ValueError(
            f"hires_steps {request.hires_steps} at hires_strength {strength:g} need a grid of {grid} steps, and there "
            f"are at most {most}: use fewer steps, or more strength"
        )
    return replace(params, steps=grid), request.hires_steps / grid


@torch.no_grad()
def enlarged(first: Run, second: Run, upscaler: str, shape: tuple[int, int, int]) -> Tensor:
    """The final latents of the first pass, enlarged to (B, C, h, w) for a shape (C, h, w)."""
    z, (_, h, w) = first.start.blend(first.x), shape
    wraps = first.params.tileable
    if upscaler == "latent":
        if not wraps:
            return F.interpolate(z, size=(h, w), mode="bilinear", align_corners=False)
        tiles = F.interpolate(z.repeat(1, 1, 3, 3), size=(3 * h, 3 * w), mode="bilinear", align_corners=False)
        return tiles[:, :, h : 2 * h, w : 2 * w].contiguous()
    factor = first.model.config.vae.factor
    latents = []
    for one in z.split(1):  # one at a time, as an encoder needs much memory
        (image,) = first.decode(one)
        larger = resize_periodic(image, w * factor, h * factor) if wraps else resize(image, w * factor, h * factor)
        latents.append(second.encode(to_tensor(larger)).mode())
    return torch.cat(latents)


def resize_periodic(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at this size, by Lanczos resampling, as a tile that repeats on all sides."""
    around = Image.fromarray(np.pad(np.asarray(image), ((REACH, REACH), (REACH, REACH), (0, 0)), mode="wrap"))
    box = (REACH, REACH, REACH + image.width, REACH + image.height)
    return around.resize((width, height), Image.Resampling.LANCZOS, box=box)
