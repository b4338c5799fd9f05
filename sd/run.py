"""Runs: how each of the three requests starts, the steps it takes, and its result.

    request -> contexts, noise levels, generators -> initial latents and denoiser (`Start`) -> steps -> images

Random numbers: image i of a request has its own CPU generator, seeded with seed + i. It draws float32 tensors of the
shape of the latents (C, h, w), in this order: for the posterior sample of the encoded image, if there is one; for that
of the image with its masked part hidden, if the model has 9 channels; the initial noise; then, with a stochastic
sampler, the noise of each step. So an image depends neither on its batch nor on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .denoiser import keep_known
from .imaging.files import WHITE, flatten
from .imaging.masks import Canvas, latent_mask, mask_channels, masked_image, prepare_mask, surroundings, widened
from .imaging.tensors import Box, fit, frame, to_tensor
from .latents import image_size, latent_shape
from .params import MAX_SEED, ImageToImage, Inpaint, ResolvedParams, TextToImage
from .samplers import SAMPLERS, Denoise, Noise, Sampler, Step
from .schedule import Levels

if TYPE_CHECKING:
    from .pipeline import StableDiffusion

CROP_NOTE = 0.9  # cropping to less than this share of the image adds a note


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator per image, seeded with seed, seed + 1, ... (modulo 2^64)."""
    return [torch.Generator("cpu").manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(n)]


def draw(rngs: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Unit normal noise (B, *shape) in float32, with one generator per image. All random numbers come from here.

    Drawn one by one and on the CPU: a slice of a batch's noise is not the noise of that image alone, and CUDA's
    generator gives other numbers.
    """
    each = [torch.randn(tuple(shape), generator=rng, device="cpu", dtype=torch.float32) for rng in rngs]
    noise = torch.stack(each)
    if device.type == "cuda":  # a copy from pinned memory does not wait for the steps that are still running
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


class Sampling(Iterator[Step]):
    """The steps of a sampler, without gradients. `len` is the total number of steps, for progress bars."""

    def __init__(
        self,
        denoise: Denoise,
        x: Tensor,
        levels: Levels,
        sampler: Sampler,
        noise: Noise | None,
        options: Mapping[str, float],
    ) -> None:
        """Raises ValueError for options that the sampler does not have, and if it needs noise and is given none."""
        for name in options:
            if name not in sampler.options:
                raise ValueError(f"{sampler.label} has no option {name}")
        if noise is None and sampler.draws(options):
            raise ValueError(f"{sampler.label} draws noise in every step: give it `noise`")
        self._steps, self._n = sampler.run(denoise, x, levels, noise=noise, **options), max(len(levels) - 1, 0)

    def __next__(self) -> Step:
        with torch.no_grad():
            return next(self._steps)

    def __len__(self) -> int:
        return self._n


class Result(NamedTuple):
    """Images, the seed of each, and notes on what was cut, chosen or retried, one line each."""

    images: list[Image.Image]
    seeds: list[int]
    notes: list[str]


class Start(NamedTuple):
    """The initial state of a run, and what is done with the final one."""

    x: Tensor  # (B, C, h, w) at the first level
    denoise: Denoise
    blend: Callable[[Tensor], Tensor] = lambda z: z  # applied to the final latents
    finish: Callable[[Image.Image], Image.Image] = lambda image: image  # applied to each decoded image


class Run(Iterator[Step]):
    """A request in progress: iterate over its steps, then ask for its `result`.

    A run holds all of its state, so several runs can use one model, in several threads. Between steps the caller may
    look (`preview`), change `step.x` in place, or stop. `len` is the total number of steps, for progress bars.
    """

    start: Start
    x: Tensor  # (B, C, h, w), the state after the last step

    def __init__(
        self,
        model: StableDiffusion,
        request: TextToImage,
        params: ResolvedParams,
        notes: list[str],
        strength: float = 1.0,
    ) -> None:
        """Encode the prompts and plan the steps. The run starts from what `begin` is given."""
        self.model, self.request, self.params, self.notes = model, request, params, notes
        self.levels = model.schedule.levels(params.steps, params.spacing, strength)
        if strength > 0 and len(self.levels) == 1:
            notes.append(f"strength {strength:g} of {params.steps} steps is less than one step: nothing is generated")
        encode = partial(
            model.encode_prompt,
            weighted_prompts=request.weighted_prompts,
            long_prompts=request.long_prompts,
            note=notes.append,
        )
        negative = [request.negative] if isinstance(request.negative, str) else request.negative
        assert negative is not None  # a request makes "" of None
        for name, given in (("prompt", request.prompt), ("negative", negative)):
            if isinstance(given, Tensor):
                _check_context(name, given, model)
        context = request.prompt if isinstance(request.prompt, Tensor) else encode(request.prompt)
        self.context = context.to(model.device, model.dtype).repeat_interleave(params.n, dim=0)
        self.uncond: Tensor | None = None
        if params.guidance != 1.0:
            uncond = (negative if isinstance(negative, Tensor) else encode(negative)).to(model.device, model.dtype)
            self.uncond = uncond if len(uncond) == 1 else uncond.repeat_interleave(params.n, dim=0)
            if self.uncond.shape[1] != self.context.shape[1]:
                self.context, self.uncond = model.same_length(self.context, self.uncond)
        self.rngs = generators(params.seed, len(self.context))
        self.seeds = [rng.initial_seed() for rng in self.rngs]

    def begin(self, start: Start) -> Run:
        """Set the initial state; returns the run itself."""
        self.start, self.x, self._taken = start, start.x, 0
        sampler = SAMPLERS[self.params.sampler]
        self._steps = sampler.run(start.denoise, start.x, self.levels, noise=self.noise, **self.params.options)
        return self

    def noise(self, like: Tensor) -> Tensor:
        """Fresh unit normal noise in the shape of a tensor (B, ...), each image's from its own generator."""
        return draw(self.rngs, like.shape[1:], self.model.device)

    def __len__(self) -> int:
        return max(len(self.levels) - 1, 0)

    def __next__(self) -> Step:
        with torch.no_grad():
            step = next(self._steps)
        self.x, self._taken = step.x, self._taken + 1
        return step

    def preview(self, x0: Tensor) -> list[Image.Image]:
        """Decode latents of a step (B, C, h, w), for example `step.x0`, and finish them like the result."""
        return [self.start.finish(image) for image in self.model.decode(x0, self.notes.append)]

    def result(self) -> Result:
        """Take the remaining steps, decode and finish. Raises RuntimeError if a step failed or was interrupted."""
        for _ in self:
            pass
        if self._taken < len(self.levels) - 1:
            raise RuntimeError(f"step {self._taken + 1} of {len(self)} failed: prepare the request again")
        return Result(self.preview(self.start.blend(self.x)), self.seeds, list(dict.fromkeys(self.notes)))


def _check_context(name: str, context: Tensor, model: StableDiffusion) -> None:
    """Raise ValueError if a tensor that was given as a prompt is not a context of this model."""
    M, D = model.config.text[0].length, model.config.unet.context
    shape, dtype = tuple(context.shape), str(context.dtype).removeprefix("torch.")
    if len(shape) != 3 or 0 in shape or shape[1] % M or shape[2] != D or not context.is_floating_point():
        raise ValueError(f"{name} must be a context (B, k x {M}, {D}) of this model, got {shape} in {dtype}")


class Unchanged(Run):
    """The run of a request that changes nothing, as its mask is empty: no steps, and copies of the image."""

    def __init__(
        self,
        model: StableDiffusion,
        request: TextToImage,
        params: ResolvedParams,
        notes: list[str],
        image: Image.Image,
    ) -> None:
        self.model, self.request, self.params, self.notes, self.image = model, request, params, notes, image
        self.levels = Levels([], model.schedule)
        self.rngs = generators(params.seed, len(request.prompt) * params.n)
        self.seeds = [rng.initial_seed() for rng in self.rngs]
        self.begin(Start(torch.empty(0), lambda x, level: x))

    def preview(self, x0: Tensor) -> list[Image.Image]:
        """The image, once for each seed."""
        return [self.image.copy() for _ in self.seeds]


# --------------------------------------------------------------------------------------------- the three starts


def text_to_image(model: StableDiffusion, request: TextToImage) -> Run:
    """Start from pure noise: unit noise, as in the original code, because sigma is close to 1 at the first level."""
    params = request.params.resolved(model.config)
    shape = latent_shape(model.config, params.height, params.width)
    run = Run(model, request, params, [])
    x = draw(run.rngs, shape, model.device)
    concat = model.blank_concat(shape) if model.is_inpainting else None
    return run.begin(Start(x, model.denoiser(run.context, run.uncond, params.guidance, concat)))


def image_to_image(model: StableDiffusion, request: ImageToImage) -> Run:
    """Start from the latents of the image, with the noise of the first level added."""
    params = request.params.resolved(model.config)
    image, _ = _rgb_and_alpha(request.image)
    height, width = image_size(model.config, image.size, params.height, params.width, up=request.fit == "pad")
    shape = latent_shape(model.config, height, width)
    run = Run(model, request, params, [], request.strength)
    inside = Box(0, 0, width, height)
    if request.fit == "pad":
        image, inside = frame(image, width, height)
    else:
        wider = (image.width / image.height) / (width / height)
        if (kept := min(wider, 1 / wider)) < CROP_NOTE:
            run.notes.append(f"{100 - 100 * kept:.0f} % of the image is cut off")
        image = fit(image, width, height)
    if request.strength == 1:  # nothing of the image is left
        x = draw(run.rngs, shape, model.device)
    else:
        z = _latents(run, to_tensor(image), request.posterior)
        noise = draw(run.rngs, shape, model.device)
        x = model.schedule.add_noise(z, noise, run.levels[0]) if len(run) else z
    concat = model.blank_concat(shape) if model.is_inpainting else None
    denoise = model.denoiser(run.context, run.uncond, params.guidance, concat)
    return run.begin(Start(x, denoise, finish=lambda generated: generated.crop(inside)))


def inpaint(model: StableDiffusion, request: Inpaint) -> Run:
    """Start from noise in the masked part.

    A model of 9 channels receives the mask and the masked image as input; for any other, x0 is held to the known part
    of the image (`keep_known`).
    """
    params, notes, factor = request.params.resolved(model.config), list[str](), model.config.vae.factor
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

    run = Run(model, request, params, notes, request.strength)
    canvas = Canvas.of(image, mask, region, width, height)
    known = concat = None
    if not model.is_inpainting or request.strength < 1:
        fill = request.content == "fill" and request.strength < 1
        known = _latents(run, canvas.filled() if fill else canvas.pixels, request.posterior)
    if model.is_inpainting:
        masked = _latents(run, masked_image(canvas.pixels, canvas.hole), request.posterior)
        concat = mask_channels(latent_mask(canvas.hole, factor), masked)
    x = draw(run.rngs, latent_shape(model.config, height, width), model.device)
    # a latent is generated if any of its pixels is masked
    hole = F.max_pool2d(canvas.hole, factor).to(model.device)
    if known is not None:
        noised = model.schedule.add_noise(known, x, run.levels[0]) if len(run) else known
        from_noise = request.strength == 1 or (request.content == "noise" and len(run) > 0)
        x = torch.where(hole > 0, x, noised) if from_noise else noised
    denoise: Denoise = model.denoiser(run.context, run.uncond, params.guidance, concat)
    if model.is_inpainting or known is None:
        return run.begin(Start(x, denoise, finish=canvas.paste))
    z = known
    return run.begin(Start(x, keep_known(denoise, z, hole), lambda last: torch.lerp(z, last, hole), canvas.paste))


def _latents(run: Run, pixels: Tensor, posterior: str) -> Tensor:
    """(1, 3, H, W) -> the latents of each image (B, C, h, w): its own posterior sample, or the mean."""
    gaussian = run.model.encode(pixels, run.notes.append)
    if posterior == "mode":
        return gaussian.mode().expand(len(run.rngs), -1, -1, -1)
    return gaussian.sample(draw(run.rngs, gaussian.mean.shape[1:], run.model.device))


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
