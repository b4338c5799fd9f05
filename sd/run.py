"""Runs: the steps that a request takes, and its result. How requests with an image start is in image_starts.py.

    request -> contexts, noise levels, generators -> initial latents and denoiser (`Start`) -> steps -> images

All random numbers come from noise.py. The second pass of `HighRes` is in hires.py. The noise of an image depends
neither on its batch nor on the device; how its steps are rounded does, unless the request is `exact`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .changing_prompts import Pass
from .conditioning import Composition, Network
from .control import AppliedControl, controlled_predict
from .controls import Place, applied, at_size
from .denoiser import by_step, one_by_one
from .few_step import unsuited
from .latents import decode, latent_shape
from .messages import counted
from .models.build import Autoencoder
from .models.vae import Gaussian
from .noise import NoiseSource
from .params import ResolvedParams, TextToImage
from .prompt_checks import is_empty
from .prompts import guides
from .runtime.circular import CircularPadding, circular
from .runtime.deep_cache import DeepCache
from .samplers import BROWNIAN, SAMPLERS, Denoise, Noise, Sampler, Step
from .schedule import Levels

if TYPE_CHECKING:
    from .pipeline import StableDiffusion


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
    hold: Callable[[Denoise], Denoise] = lambda denoise: denoise  # wraps a denoiser as `denoise` wraps the model's own


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
        shape: tuple[int, int, int],
        strength: float = 1.0,
        first_pass: int = 0,
    ) -> None:
        """Encode the prompts and plan the steps. The run starts from what `begin` is given.

        shape        (C, h, w) of the latents
        first_pass   steps of the pass whose image this run refines, from which its prompts go on counting; 0: none
        """
        self.model, self.request, self.params, self.notes = model, request, params, notes
        self.levels = model.schedule.levels(params.steps, params.spacing, strength, params.one_step_at)
        if strength > 0 and len(self.levels) == 1:
            notes.append(f"strength {strength:g} of {params.steps} steps is less than one step: nothing is generated")
        size = (shape[1] * model.config.vae.factor, shape[2] * model.config.vae.factor)
        self.place: Place | None = None  # puts hints where the image is; None: at the size generated
        taken = Pass(params.steps, len(self), first_pass, size)
        self.guides = guides(model, request, params, taken, notes.append)
        self.source = NoiseSource(params, len(request.prompt) * params.n, model.device)
        self.edges: Callable[[], AbstractContextManager[object]] = CircularPadding if params.tileable else nullcontext
        self.seeds = self.source.seeds
        self._note_settings()

    def _note_settings(self) -> None:
        """Note settings that have no effect here, or not the expected one."""
        params, sampler, note = self.params, SAMPLERS[self.params.sampler], self.notes.append
        told = self.model.config.unet.guidance is not None
        where = "with this model, whose U-Net takes the guidance scale as an input" if told else "at guidance 1"
        if params.guidance_rescale > 0 and (told or params.guidance == 1):
            note(f"guidance_rescale has no effect {where}")
        if params.guidance_until < 1 and (told or params.guidance == 1):
            note(f"guidance_until has no effect {where}")
        elif params.guidance_until < 1 and isinstance(self.guides[0].cond, Composition):
            note("guidance_until saves no time with AND: steps without guidance need the negative prompt, too")
        if self.is_guided and len(self) and not self._guided():
            share = f"{params.guidance_until:g} of {counted(len(self), 'step')}"
            note(f"guidance_until {share} is less than one: none is guided")
        if params.noise_seed_delta and not sampler.draws(params.options):
            note(f"noise_seed_delta has no effect: {sampler.label} draws no noise in its steps")
        if params.rng == "comfy" and self.source.images > 1:
            note(
                f"with rng comfy, the {self.source.images} images of this batch share the generator of seed "
                f"{params.seed}: to reproduce one, generate the whole batch again"
            )
        text = unsuited(self.model.few_step, params.sampler, params.steps, params.guidance)
        if text is not None and len(self):
            note(text)
        by_default = told or (self.model.few_step is not None and self.request.params.guidance is None)
        if by_default and all(guide.uncond is None for guide in self.guides) and not is_empty(self.request.negative):
            note(f"the negative prompt has no effect {where}")
        if params.rng != "torch-cpu" and params.sampler in BROWNIAN:
            note(f"{sampler.label}: other programs draw its step noise differently, so only the initial noise matches")

    def begin(self, start: Start) -> Run:
        """Set the initial state; returns the run itself."""
        self.start, self.x, self._taken = start, start.x, 0
        sampler = SAMPLERS[self.params.sampler]
        self._steps = sampler.run(start.denoise, start.x, self.levels, noise=self.noise, **self.params.options)
        return self

    def noise(self, like: Tensor) -> Tensor:
        """Fresh unit normal noise in the shape of a tensor (B, ...) for the next step: see noise.py."""
        return self.source.step(like.shape[1:])

    def denoiser(self, shape: tuple[int, int, int], concat: Tensor | None = None) -> Denoise:
        """The model's denoiser, guided by the prompts of each step, for latents of shape (C, h, w).

        concat   mask and masked image for a model that takes them; if None, the whole image is generated
        """
        model, params = self.model, self.params
        if concat is None and model.is_inpainting:
            with self.edges():
                concat = model.blank_concat(shape)
        config = model.config
        even = config.vae.factor * 2 ** (len(config.unet.channels) - 1)
        if params.tileable and any(side * config.vae.factor % even for side in shape[1:]):
            self.notes.append(f"tileable: the image repeats most evenly if its sides are multiples of {even}")
        guided = self._guided()
        told = config.unet.guidance is not None
        hints = self._hints(shape) if self.request.controls else []
        # of each step: its guide, its guidance scale, and the hints that it follows
        steps = [
            (guide, params.guidance if told or i < guided else 1.0, self._followed(i, hints) if hints else [])
            for i, guide in enumerate(self.guides)
        ]
        keys = [(id(guide), scale, tuple(map(id, followed))) for guide, scale, followed in steps]
        made = {
            key: model.denoiser(
                guide.cond,
                guide.uncond,
                scale,
                concat,
                network=self._network(followed),
                rescale=params.guidance_rescale,
            )
            for key, (guide, scale, followed) in dict(zip(keys, steps, strict=True)).items()
        }
        first, *others = made.values()
        return by_step([made[key] for key in keys], self.levels) if others else first

    def _hints(self, shape: tuple[int, int, int]) -> list[AppliedControl]:
        """The hints of the request, placed on the image with latents of this shape."""
        images = 1 if self.params.exact else len(self.seeds)
        height, width = (side * self.model.config.vae.factor for side in shape[1:])
        place = self.place or at_size(width, height, self.notes.append)
        return applied(self.model, self.request.controls, place, images, self.notes.append)

    def _followed(self, step: int, hints: list[AppliedControl]) -> list[AppliedControl]:
        """Those of the hints of the request that a step follows."""
        both, steps = zip(hints, self.request.controls, strict=True), max(len(self), 1)
        return [hint for hint, control in both if control.is_active(step, steps)]

    @property
    def is_guided(self) -> bool:
        """Whether any step is evaluated without the prompt as well, apart from those of a `Composition`."""
        return self.params.is_guided and self.model.config.unet.guidance is None

    def _guided(self) -> int:
        """How many steps use guidance: a fraction of those that are taken, rounded down."""
        return int(len(self) * self.params.guidance_until + 1e-9) if self.is_guided else 0  # as in `levels`

    def _network(self, hints: Sequence[AppliedControl] = ()) -> Network:
        """The network of one denoiser, which follows these hints; with `exact`, one for each image."""
        params, images = self.params, len(self.seeds) if self.params.exact else 1
        predict = controlled_predict(self.model.predict, hints) if hints else self.model.predict
        networks: list[Network] = [predict] * images
        if params.cache_interval > 1:
            networks = [DeepCache(predict, params.cache_interval) for _ in networks]
        if params.tileable:
            networks = [circular(network) for network in networks]
        return one_by_one(networks) if params.exact else networks[0]

    def encode(self, pixels: Tensor) -> Gaussian:
        """`StableDiffusion.encode`, with the edges of this run."""
        with self.edges():
            return self.model.encode(pixels, self.notes.append)

    def decode(self, x0: Tensor, vae: Autoencoder | None = None) -> list[Image.Image]:
        """`StableDiffusion.decode`, with the edges of this run; by another VAE than the model's if one is given."""
        with self.edges():
            if vae is not None:
                return decode(vae, x0, self.notes.append)
            return self.model.decode(x0, self.notes.append)

    def __len__(self) -> int:
        return max(len(self.levels) - 1, 0)

    def __next__(self) -> Step:
        with torch.no_grad():
            step = next(self._steps)
        self.x, self._taken = step.x, self._taken + 1
        return step

    def preview(self, x0: Tensor, vae: Autoencoder | None = None) -> list[Image.Image]:
        """Decode latents of a step (B, C, h, w), for example `step.x0`, and finish them like the result.

        vae   decodes them in place of the model's own: a tiny one is many times as fast (`load_tiny_vae`)
        """
        return [self.start.finish(image) for image in self.decode(x0, vae)]

    def result(self) -> Result:
        """Take the remaining steps, decode and finish. Raises RuntimeError if a step failed or was interrupted."""
        for _ in self:
            pass
        if self._taken < len(self.levels) - 1:
            raise RuntimeError(f"step {self._taken + 1} of {len(self)} failed: prepare the request again")
        return Result(self.preview(self.start.blend(self.x)), self.seeds, list(dict.fromkeys(self.notes)))


class Unchanged(Run):
    """The run of a request that changes nothing, as its mask is empty: no steps, and copies of the image."""

    def __init__(
        self, model: StableDiffusion, request: TextToImage, params: ResolvedParams, notes: list[str], image: Image.Image
    ) -> None:
        self.model, self.request, self.params, self.notes, self.image = model, request, params, notes, image
        self.levels = Levels([], model.schedule)
        self.source, self.guides = NoiseSource(params, len(request.prompt) * params.n), []
        self.seeds = self.source.seeds
        self.begin(Start(torch.empty(0), lambda x, level: x))

    def preview(self, x0: Tensor, vae: Autoencoder | None = None) -> list[Image.Image]:
        """The image, once for each seed."""
        return [self.image.copy() for _ in self.seeds]


def text_to_image(model: StableDiffusion, request: TextToImage) -> Run:
    """Start from pure noise: unit noise, as in the original code, because sigma is close to 1 at the first level."""
    params = request.params.resolved(model.defaults)
    shape = latent_shape(model.config, params.height, params.width)
    run = Run(model, request, params, [], shape)
    return run.begin(Start(run.source.initial(shape), run.denoiser(shape)))
