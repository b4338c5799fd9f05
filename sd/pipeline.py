"""The whole of Stable Diffusion: text -> context -> noise -> latents -> pictures.

    sd = StableDiffusion.load("v1-5-pruned-emaonly.ckpt")
    sd.txt2img("a photograph of an astronaut riding a horse", seed=7)[0].save("astronaut.png")
    sd.img2img("an oil painting", photo, strength=0.6)
    sd.inpaint("a cat", photo, mask)

Each method is a few lines on top of the other modules, meant to be read, and to be taken apart:

    context = sd.encode_prompt(["a horse"])                               text_encoder.py
    denoise = sd.denoiser(context, sd.encode_prompt([""]), guidance=7.5)  denoiser.py
    levels = sd.schedule.levels(20, "leading")                            schedule.py
    x = initial_noise(generators, shape)                                  here
    for step in sd.sample(denoise, x, levels, "ddim"): ...                samplers.py
    pictures = sd.decode(step.x)                                          vae.py

Random numbers: picture i of a call has its own CPU generator, seeded with seed + i, from which it draws, in float32,
tensors of the latents' shape (C, h, w), in this order: for the sample of the encoder's posterior of the given picture,
if it is encoded; for that of the picture with its hole hidden, if the model has 9 channels; its initial noise; then,
with a stochastic sampler, as its steps ask for them. So a picture depends on neither the batch it is made in nor the
device.

>>> StableDiffusion.load().txt2img("a red house on a meadow", steps=2, seed=7)[0].size
(128, 128)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .denoiser import keep_known
from .imaging.files import WHITE, flatten
from .imaging.masks import CONTENTS, Canvas, conditioning, hide, latent_mask, prepare_mask, surroundings, widened
from .imaging.tensors import Box, fit, frame, to_tensor
from .model import Model, Steps
from .params import MAX_SEED, SAMPLER, Settings, number, one_of, whole
from .samplers import Denoise, Step
from .schedule import Level

STRENGTH = 0.75  # image to image's default
FITS = ("crop", "pad")
POSTERIORS = ("sample", "mode")
NEARLY_ALL = 0.9  # of a picture: cutting off more than the rest is said

Progress = Callable[[Steps], Iterable[Step]]


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator a picture, seeded with seed, seed + 1, ... (modulo 2^64)."""
    return [torch.Generator("cpu").manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(n)]


def draw(rngs: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Unit normal noise (B, *shape) in float32, each picture's from its own generator: the only place that draws.

    Drawn one by one and on the CPU: a slice of a batch's draw is not the draw of that picture alone, and CUDA's
    generator gives other numbers.
    """
    each = [torch.randn(tuple(shape), generator=rng, device="cpu", dtype=torch.float32) for rng in rngs]
    noise = torch.stack(each)
    if device.type == "cuda":  # from pinned memory it goes over by itself; else all steps so far would be waited for
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


class Job(NamedTuple):
    """One call's pictures: their settings, contexts (B, M, D) and generators (B)."""

    settings: Settings
    context: Tensor
    uncond: Tensor | None
    rngs: list[torch.Generator]


class StableDiffusion(Model):
    """A checkpoint, and the three tasks it does: text to image, image to image, inpainting."""

    def txt2img(
        self,
        prompt: str | Sequence[str] | Tensor,
        negative: str = "",
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str = SAMPLER,
        spacing: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        n: int = 1,
        weighted_prompts: bool = False,
        long_prompts: bool = False,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Pictures of a text: n for each prompt, prompt by prompt; picture i of them all has the seed seed + i.

        prompt         a text, several, or contexts (B, M, D) from `encode_prompt`, which may be mixed
        negative       what to steer away from; without effect at guidance 1
        height, width  in pixels, multiples of the VAE's factor (8); the model's native size if not given
        steps          1 to 1000; the sampler's customary number if not given
        guidance       how strongly to follow the prompt: 0 not at all, 1 without exaggeration; the model's own if
                       not given: 7.5 for Stable Diffusion
        sampler        a name of `samplers.SAMPLERS` or an alias, "DPM++ 2M Karras" for example
        spacing        grid of the levels, one of `schedule.SPACINGS`; the sampler's own if not given
        eta            DDIM's share of fresh noise in each step: 0 none, 1 as much as DDPM
        seed           0 to 2^64 - 1
        weighted_prompts, long_prompts  `(word:1.2)` means weights, nothing is cut: see `encode_prompt`
        progress       wraps the iterator over steps, for example `tqdm`

        All pictures are made as one batch. Raises ValueError in one line for values that cannot be.
        """
        settings = Settings.of(
            steps=steps, guidance=self._guidance(guidance), sampler=sampler, spacing=spacing, eta=eta, seed=seed, n=n
        )
        shape = self.latent_shape(height, width)
        levels = self._levels(settings)
        job = self._job(prompt, negative, settings, weighted_prompts, long_prompts)
        # unit noise, as in the original: at the first level sigma is 0.997
        x = draw(job.rngs, shape, self.device)
        denoise = self._denoiser(job, self.all_hidden(shape) if self.sees_masks else None)
        return self.decode(self._walk(denoise, x, levels, job, progress))

    def img2img(
        self,
        prompt: str | Sequence[str] | Tensor,
        image: Image.Image,
        negative: str = "",
        *,
        strength: float = STRENGTH,
        fit_by: str = "crop",
        posterior: str = "sample",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str = SAMPLER,
        spacing: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        n: int = 1,
        weighted_prompts: bool = False,
        long_prompts: bool = False,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Pictures of a text that start from a picture (Meng et al. 2022, "SDEdit"): the rest is as in `txt2img`.

        image          of any size and mode; what is transparent becomes white
        strength       0 gives the picture back through the VAE, 1 is text to image; between them the last
                       int(strength * steps) steps are taken, from the picture with as much noise as they begin with
        fit_by         how the picture gets the result's proportions: "crop" cuts it, "pad" repeats its edges around it
                       and cuts them off again at the end
        posterior      "sample" or "mode" (the mean) of the encoder's Gaussian
        height, width  of what is painted; `picture_size` if not given
        """
        settings = Settings.of(
            steps=steps,
            guidance=self._guidance(guidance),
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            seed=seed,
            n=n,
            strength=strength,
        )
        one_of("way to fit", fit_by, FITS)
        one_of("posterior", posterior, POSTERIORS)
        rgb, _ = _flat(image)
        height, width = self.picture_size(rgb.size, height, width, up=fit_by == "pad")
        levels = self._levels(settings)
        job = self._job(prompt, negative, settings, weighted_prompts, long_prompts)
        inside = Box(0, 0, width, height)
        if fit_by == "pad":
            rgb, inside = frame(rgb, width, height)
        else:
            wider = (rgb.width / rgb.height) / (width / height)
            if min(wider, 1 / wider) < NEARLY_ALL:
                warnings.warn(f"{100 - 100 * min(wider, 1 / wider):.0f} % of the picture is cut off", stacklevel=2)
            rgb = fit(rgb, width, height)
        shape = self.latent_shape(height, width)
        if strength == 1:  # nothing of the picture is left
            x = draw(job.rngs, shape, self.device)
        else:
            z = self._latent(to_tensor(rgb), job, posterior)
            x = self.schedule.add_noise(z, draw(job.rngs, shape, self.device), levels[0]) if levels[1:] else z
        denoise = self._denoiser(job, self.all_hidden(shape) if self.sees_masks else None)

        def cut(painted: Image.Image) -> Image.Image:
            return painted.crop(inside)

        return [cut(painted) for painted in self.decode(self._walk(denoise, x, levels, job, progress, cut))]

    def inpaint(
        self,
        prompt: str | Sequence[str] | Tensor,
        image: Image.Image,
        mask: Image.Image | None = None,
        negative: str = "",
        *,
        strength: float = 1.0,
        content: str = "original",
        blur: float = 0.0,
        margin: int | None = None,
        posterior: str = "sample",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str = SAMPLER,
        spacing: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        n: int = 1,
        weighted_prompts: bool = False,
        long_prompts: bool = False,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """The picture with a part of it painted anew, at its own size; the rest is as in `txt2img`.

        image          of any size and mode; what is transparent becomes white, unless it is the mask
        mask           white is painted anew, black stays to the bit, grey is in between; brought to the picture's size;
                       the picture's transparent part if not given
        strength       as in `img2img`: below 1, something of what the hole held remains
        content        what the hole holds at the start, where strength is below 1: "original", "fill" (the colours
                       around it), or "noise"
        blur           softens the mask's edge, outwards, by so many pixels
        margin         if given, the model looks only at the part around the mask with so many pixels on each side of
                       it, brought to the size that it paints best; else at the whole picture
        posterior      "sample" or "mode" (the mean) of the encoder's Gaussian
        height, width  of what is painted; `picture_size` if not given

        Models of 9 channels are given mask and masked picture; others are held to what is known (`keep_known`).
        """
        settings = Settings.of(
            steps=steps,
            guidance=self._guidance(guidance),
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            seed=seed,
            n=n,
            strength=strength,
        )
        one_of("content", content, CONTENTS)
        one_of("posterior", posterior, POSTERIORS)
        if margin is not None and whole("margin", margin) < 0:
            raise ValueError(f"margin must be at least 0 pixels, got {margin}")
        if mask is None:
            picture, alpha = _flat(image, None)  # the colours under what is half transparent
            if alpha is None:
                raise ValueError("what is to be painted anew? Give a mask, or a picture with a transparent part")
            mask = ImageOps.invert(alpha)
        else:
            picture, _ = _flat(image)
        mask = prepare_mask(mask, picture.size, number("blur", blur))
        whole_picture = region = Box(0, 0, *picture.size)
        if margin is not None:
            region = surroundings(mask, margin) or whole_picture
        height, width = self.picture_size(region.size, height, width, up=True)
        if region != whole_picture:
            region = widened(region, width / height, picture.size)
        levels = self._levels(settings)
        job = self._job(prompt, negative, settings, weighted_prompts, long_prompts)
        if mask.getbbox() is None:
            warnings.warn("the mask is empty (all black): nothing is painted", stacklevel=2)
            return [picture.copy() for _ in job.rngs]

        canvas = Canvas.of(picture, mask, region, width, height)
        z = extra = None
        if not self.sees_masks or strength < 1:
            start = canvas.filled() if content == "fill" and strength < 1 else canvas.pixels
            z = self._latent(start, job, posterior)
        if self.sees_masks:
            hidden = self._latent(hide(canvas.pixels, canvas.hole), job, posterior)
            extra = conditioning(latent_mask(canvas.hole, self.config.vae.factor), hidden)
        x = draw(job.rngs, self.latent_shape(height, width), self.device)
        # all of a latent is painted anew if one of its pixels is
        hole = F.max_pool2d(canvas.hole, self.config.vae.factor).to(self.device)
        if z is not None:
            noised = self.schedule.add_noise(z, x, levels[0]) if levels[1:] else z
            from_noise = strength == 1 or (content == "noise" and len(levels) > 1)
            x = torch.where(hole > 0, x, noised) if from_noise else noised
        denoise = self._denoiser(job, extra)
        if self.sees_masks:
            x = self._walk(denoise, x, levels, job, progress, canvas.paste)
        else:
            x = torch.lerp(z, self._walk(keep_known(denoise, z, hole), x, levels, job, progress, canvas.paste), hole)
        return [canvas.paste(painted) for painted in self.decode(x)]

    def _guidance(self, given: float | None) -> float:
        return self.config.guidance if given is None else given

    def _levels(self, settings: Settings) -> list[Level]:
        levels = self.schedule.levels(settings.steps, settings.spacing, settings.strength)
        if settings.strength > 0 and len(levels) == 1:
            warnings.warn(
                f"strength {settings.strength:g} of {settings.steps} steps is less than one step: nothing is painted",
                stacklevel=3,
            )
        return levels

    def _job(
        self, prompt: str | Sequence[str] | Tensor, negative: str, settings: Settings, weighted: bool, long: bool
    ) -> Job:
        encode = partial(self.encode_prompt, weighted_prompts=weighted, long_prompts=long)
        context = self._context(prompt) if isinstance(prompt, Tensor) else encode(_texts(prompt))
        context = context.to(self.device, self.dtype).repeat_interleave(settings.n, dim=0)
        uncond = None
        if settings.guidance != 1.0:
            context, uncond = self.same_length(context, encode(_texts(negative)))
        return Job(settings, context, uncond, generators(settings.seed, context.shape[0]))

    def _latent(self, pixels: Tensor, job: Job, posterior: str) -> Tensor:
        """(1, 3, H, W) -> each picture's latent (B, C, h, w): a sample of its own, or the mean."""
        gaussian = self.encode(pixels)
        if posterior == "mode":
            return gaussian.mode().expand(len(job.rngs), -1, -1, -1)
        return gaussian.sample(draw(job.rngs, gaussian.mean.shape[1:], self.device))

    def _denoiser(self, job: Job, extra: Tensor | None) -> Denoise:
        return self.denoiser(job.context, job.uncond, job.settings.guidance, extra, self._steps)

    def _walk(
        self,
        denoise: Denoise,
        x: Tensor,
        levels: Sequence[Level],
        job: Job,
        progress: Progress | None,
        finish: Callable[[Image.Image], Image.Image] | None = None,
    ) -> Tensor:
        run = self.sample(
            denoise,
            x,
            levels,
            job.settings.sampler,
            eta=job.settings.eta,
            noise=lambda x: draw(job.rngs, x.shape[1:], x.device),
        )
        run.finish = finish or run.finish
        for step in progress(run) if progress is not None else run:
            x = step.x
        return x

    def _context(self, context: Tensor) -> Tensor:
        M, D = self.config.text.length, self.config.text.width
        if context.dim() != 3 or 0 in context.shape or context.shape[1] % M or context.shape[2] != D:
            raise ValueError(f"a context must be (B, {M}, {D}), got {tuple(context.shape)}")
        return context


def _texts(prompt: str | Sequence[str]) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r}")
    return list(texts)


def _flat(
    image: Image.Image, background: tuple[int, int, int] | None = WHITE
) -> tuple[Image.Image, Image.Image | None]:
    """RGB and alpha of a picture in memory."""
    if not isinstance(image, Image.Image):
        what = type(image).__name__
        raise ValueError(f"image must be a PIL picture (image_files.read_picture reads files), got {what}")
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # PIL opens files without reading them
        raise ValueError(f"the picture cannot be read: {error}") from None
    return flatten(image, background)
