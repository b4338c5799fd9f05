"""The whole of Stable Diffusion: text -> context -> noise -> latents -> images.

    sd = StableDiffusion.load("v1-5-pruned-emaonly.ckpt")
    sd.txt2img("a photograph of an astronaut riding a horse", seed=7)[0].save("astronaut.png")
    sd.img2img("an oil painting", photo, strength=0.6)
    sd.inpaint("a cat", photo, mask)

The short way above is a request made of keywords. The long way shows every step, and gives back what happened:

    run = sd.prepare(TextToImage("a horse", SamplingParams(steps=20, seed=7)))
    for step in run: ...                                                  preview, stop, interfere
    result = run.result()                                                 images, their seeds, notes

A run is a few lines on top of the other modules, meant to be read, and to be taken apart:

    context = sd.encode_prompt(["a horse"])                               models/text_encoder.py
    denoise = sd.denoiser(context, sd.encode_prompt([""]), guidance=7.5)  denoiser.py
    levels = sd.schedule.levels(20, "leading")                            schedule.py
    x = draw(generators(seed, 1), shape, sd.device)                       here
    for step in sd.sample(denoise, x, levels, "ddim"): ...                samplers.py
    images = sd.decode(step.x)                                            models/vae.py

Random numbers: image i of a request has its own CPU generator, seeded with seed + i, from which it draws, in float32,
tensors of the latents' shape (C, h, w), in this order: for the sample of the encoder's posterior of the given image,
if it is encoded; for that of the image with its hole hidden, if the model has 9 channels; its initial noise; then,
with a stochastic sampler, as its steps ask for them. So an image depends on neither its batch nor the device.

>>> StableDiffusion.load().txt2img("a red house on a meadow", steps=2, seed=7)[0].size
(128, 128)
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from .adapters.lora import Merged
from .adapters.lora_formats import read_lora
from .adapters.textual_inversion import Words, read_embedding
from .checkpoints.loading import LoadOptions, Source
from .conditioning import Conditioning
from .config import Config
from .denoiser import Denoiser, Network, keep_known
from .imaging.files import WHITE, flatten
from .imaging.masks import Canvas, conditioning, hide, latent_mask, prepare_mask, surroundings, widened
from .imaging.tensors import Box, fit, frame, to_pil, to_tensor
from .models.build import build
from .models.text_encoder import TextEncoder
from .models.unet import UNet
from .models.vae import VAE, Gaussian
from .params import MAX_SEED, ImageToImage, Inpaint, SamplingParams, TextToImage, find_sampler, number, whole
from .resources import resource
from .runtime.cuda_graphs import Compiled, Recorded
from .runtime.device import best_dtype, dtype_name, find_device, find_dtype
from .runtime.offload import Offload
from .runtime.vae_tiling import decode_in_strips, encode_in_strips
from .samplers import Denoise, Noise, Sampler, Step
from .schedule import Levels, Schedule
from .text.prompt_syntax import Chunk, chunks, emphasised
from .text.tokenizer import Note, Tokenizer, warn

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

EMBEDDED = "weights/pocket.safetensors"  # the model that comes with the project
MAX_SIDE = 16384  # pixels
LARGE = 1024 * 1024  # pixels from which the VAE is run in tiles
CROP_NOTE = 0.9  # a crop that keeps less of the image than this is noted
SHARED_MEMORY = ("cpu", "mps")  # devices without memory apart from the CPU's


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator an image, seeded with seed, seed + 1, ... (modulo 2^64)."""
    return [torch.Generator("cpu").manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(n)]


def draw(rngs: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Unit normal noise (B, *shape) in float32, each image's from its own generator: the only place that draws.

    Drawn one by one and on the CPU: a slice of a batch's draw is not the draw of that image alone, and CUDA's
    generator gives other numbers.
    """
    each = [torch.randn(tuple(shape), generator=rng, device="cpu", dtype=torch.float32) for rng in rngs]
    noise = torch.stack(each)
    if device.type == "cuda":  # a copy from pinned memory does not wait for the steps that are still running
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


class Sampling(Iterator[Step]):
    """The steps of a sampler, without gradients; `len` is their number, so that progress bars know the end."""

    def __init__(self, steps: Iterator[Step], n: int) -> None:
        self._steps, self._n = steps, n

    def __next__(self) -> Step:
        with torch.no_grad():
            return next(self._steps)

    def __len__(self) -> int:
        return self._n


class Result(NamedTuple):
    """What a run gives: images, the seed of each, and notes on what was cut, chosen or retried, one line each."""

    images: list[Image.Image]
    seeds: list[int]
    notes: list[str]


class Start(NamedTuple):
    """Where a run starts: its first latents, what denoises them, and what becomes of the last ones."""

    x: Tensor  # (B, C, h, w) at the first level
    denoise: Denoise
    blend: Callable[[Tensor], Tensor] = lambda z: z  # of the last latents
    finish: Callable[[Image.Image], Image.Image] = lambda image: image  # of each decoded image


class Run(Sampling):
    """One request on its way: iterate over its steps, then ask for the `result`.

    It holds all its state, so that several can be under way on one model, in several threads. Between steps the caller
    may look (`preview`), change `step.x` in place, or leave.
    """

    def __init__(self, model: StableDiffusion, request: TextToImage, params: SamplingParams, notes: list[str]) -> None:
        self.model, self.request, self.params, self.notes = model, request, params, notes
        self.levels = model.schedule.levels(params.steps, params.spacing, request.strength)  # type: ignore[arg-type]
        if request.strength > 0 and len(self.levels) == 1:
            notes.append(
                f"strength {request.strength:g} of {params.steps} steps is less than one step: nothing is generated"
            )
        self.context, self.uncond = model.contexts(request, params, notes.append)
        count = self.context.shape[0]
        self.rngs = generators(params.seed, count)
        self.seeds = [(params.seed + i) % (MAX_SEED + 1) for i in range(count)]

    def begin(self, start: Start) -> Run:
        """Set out from here."""
        self.start, self.x = start, start.x
        steps = self.model.sample(
            start.denoise, start.x, self.levels, self.params.sampler, noise=self.noise, **self.params.options
        )
        super().__init__(steps, len(steps))
        return self

    def noise(self, like: Tensor) -> Tensor:
        """Fresh unit normal noise in the shape of a tensor (B, ...), each image's from its own generator."""
        return draw(self.rngs, like.shape[1:], self.model.device)

    def __next__(self) -> Step:
        step = super().__next__()
        self.x = step.x
        return step

    def preview(self, x0: Tensor) -> list[Image.Image]:
        """Latents of a step (B, C, h, w), `step.x0` for example, decoded and finished like the result."""
        return [self.start.finish(image) for image in self.model.decode(x0, self.notes.append)]

    def result(self) -> Result:
        """Take the steps that are left, decode, finish."""
        for _ in self:
            pass
        return Result(self.preview(self.start.blend(self.x)), self.seeds, self.notes)


class Unchanged(Run):
    """A request that leaves its image as it is: an empty mask."""

    def result(self) -> Result:
        """Copies of the image, one for each seed."""
        return Result([self.start.finish(Image.new("RGB", (1, 1))) for _ in self.seeds], self.seeds, self.notes)


Progress = Callable[[Run], Iterable[Step]]


def _those(names: Sequence[str], known: Mapping[str, object], what: str) -> list[str]:
    """The names, or all that are known if there are none; ValueError for one that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r} was added: {', '.join(known) or 'there is none'}")
    return list(names or known)


class StableDiffusion:
    """A checkpoint on one device in one precision: networks, tokenizer and schedule, and what is done with them."""

    def __init__(
        self, config: Config, text_encoder: TextEncoder, vae: VAE, unet: UNet, about: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.about = tuple(about)  # what was found out and chosen in loading, one line each
        self.tokenizer = Tokenizer(length=config.text[0].length, pad=config.text[0].pad)
        self.schedule = Schedule(config.schedule)
        self._networks: Mapping[str, nn.Module] = {"text_encoder": text_encoder, "vae": vae, "unet": unet}
        self._merged = Merged({"text_encoder": text_encoder, "unet": unet})
        self._words = Words(self.tokenizer, text_encoder)
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        # what is called in the U-Net's place
        self._steps: Network | None = Recorded(unet) if self.device.type == "cuda" else None

    @property
    def text_encoder(self) -> TextEncoder:
        """Token ids -> context. With `low_memory`, ask for it (and for the others) each time that you use it."""
        return self._networks["text_encoder"]  # type: ignore[return-value]

    @property
    def vae(self) -> VAE:
        """Images <-> latents."""
        return self._networks["vae"]  # type: ignore[return-value]

    @property
    def unet(self) -> UNet:
        """x_t, t, conditioning -> prediction."""
        return self._networks["unet"]  # type: ignore[return-value]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        low_memory: bool = False,
        compile: bool = False,
        progress: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint: a file in the original layout or ours, a diffusers folder; the embedded model if none.

        device      "cuda", "cpu", "mps", ...; the best there is if not given
        dtype       "float32", "float16", "bfloat16" or a torch dtype; the best for the device if not given
        low_memory  the networks take turns in the device's memory (runtime/offload.py); on CPU and MPS they are read
                    again at each turn, from the files, which stay open: every image takes seconds more
        compile     whether the U-Net is compiled, which takes minutes at the first image of each size; for GPUs: on
                    x86 CPUs it is slower than without, which a UserWarning says
        progress    is told (numbers in this weight, numbers in all) after each weight is read
        options     fields of `checkpoints.loading.LoadOptions`: config, weights, prediction, vae, text_encoder, variant

        What was found out and chosen is in `about`. Raises CheckpointError, in one line, for files that are not a
        checkpoint, are damaged, dangerous, or hold something else; ValueError for a device or precision that is not
        there.
        """
        device = find_device(device)
        dtype = find_dtype(dtype) if dtype is not None else best_dtype(device)
        if low_memory and compile:
            raise ValueError("low memory and compiling do not go together: compiled networks stay where they are")
        source = Source(resource(EMBEDDED) if path is None else path, LoadOptions(**options))
        reread = low_memory and device.type in SHARED_MEMORY  # are weights read at each turn, not only now
        try:
            networks = build(source.config)
            total = sum(math.prod(w.shape) for net in networks.values() for w in net.state_dict().values())
            place = torch.device("cpu") if low_memory and not reread else device

            def report(count: int) -> None:
                if progress is not None and not reread:
                    progress(count, total)

            def read(name: str, network: nn.Module) -> None:
                source.read(name, network, place, dtype, report, own=reread)

            for name, network in {} if reread else networks.items():
                read(name, network)
            taken = Offload(networks, device, read if reread else None) if low_memory else networks
            if not source.decided:
                source.probe(taken["unet"])
        except BaseException:
            source.close()
            raise
        model = cls(source.config, **networks, about=source.about())  # type: ignore[arg-type]
        if not reread:  # else they stay open as long as the model is there
            source.close()
        model._networks, model.device, model.dtype = taken, device, dtype
        if low_memory:  # recordings would hold the memory that is to be free for others
            model._steps = None
        elif compile:
            model._steps = Compiled(networks["unet"])
        return model

    # --------------------------------------------------------------------------------------------- the three tasks

    def txt2img(
        self,
        prompt: str | Sequence[str] | Tensor,
        negative: str = "",
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images of a text; the settings are those of `TextToImage` and `SamplingParams`, and a sampler's options.

        `progress` wraps the iterator over steps, for example `tqdm`. What was cut, chosen or retried is a warning here;
        `prepare` returns it. Raises ValueError in one line for values that cannot be.
        """
        return self._generate(TextToImage.of(prompt, negative, **settings), progress)

    def img2img(
        self,
        prompt: str | Sequence[str] | Tensor,
        image: Image.Image,
        negative: str = "",
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images of a text that start from an image; settings as for `txt2img`, and those of `ImageToImage`."""
        return self._generate(ImageToImage.of(prompt, negative, image=image, **settings), progress)

    def inpaint(
        self,
        prompt: str | Sequence[str] | Tensor,
        image: Image.Image,
        mask: Image.Image | None = None,
        negative: str = "",
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """The image with a part of it generated anew; settings as for `txt2img`, and those of `Inpaint`."""
        return self._generate(Inpaint.of(prompt, negative, image=image, mask=mask, **settings), progress)

    def _generate(self, request: TextToImage, progress: Progress | None) -> list[Image.Image]:
        run = self.prepare(request)
        for _ in progress(run) if progress is not None else run:
            pass
        result = run.result()
        for note in result.notes:
            warnings.warn(note, stacklevel=3)
        return result.images

    def prepare(self, request: TextToImage) -> Run:
        """Encode, draw and plan a request: a run that can be iterated. Nothing of the model is changed."""
        params = request.params.resolved(self.config)
        if isinstance(request, ImageToImage):
            return self._from_image(request, params)
        if isinstance(request, Inpaint):
            return self._from_hole(request, params)
        shape = self.latent_shape(params.height, params.width)
        run = Run(self, request, params, [])
        # unit noise, as in the original: at the first level sigma is 0.997
        x = draw(run.rngs, shape, self.device)
        return run.begin(Start(x, self._denoiser(run, self.all_hidden(shape) if self.sees_masks else None)))

    def _from_image(self, request: ImageToImage, params: SamplingParams) -> Run:
        rgb, _ = _flat(request.image)
        height, width = self.image_size(rgb.size, params.height, params.width, up=request.fit == "pad")
        notes: list[str] = []
        run = Run(self, request, params, notes)
        inside = Box(0, 0, width, height)
        if request.fit == "pad":
            rgb, inside = frame(rgb, width, height)
        else:
            wider = (rgb.width / rgb.height) / (width / height)
            if (kept := min(wider, 1 / wider)) < CROP_NOTE:
                notes.append(f"{100 - 100 * kept:.0f} % of the image is cut off")
            rgb = fit(rgb, width, height)
        shape = self.latent_shape(height, width)
        if request.strength == 1:  # nothing of the image is left
            x = draw(run.rngs, shape, self.device)
        else:
            z = self._latent(to_tensor(rgb), run, request.posterior)
            noise = draw(run.rngs, shape, self.device)
            x = self.schedule.add_noise(z, noise, run.levels[0]) if run.levels[1:] else z
        denoise = self._denoiser(run, self.all_hidden(shape) if self.sees_masks else None)
        return run.begin(Start(x, denoise, finish=lambda image: image.crop(inside)))

    def _from_hole(self, request: Inpaint, params: SamplingParams) -> Run:
        """Models of 9 channels are given mask and masked image; others are held to what is known (`keep_known`)."""
        notes: list[str] = []
        image, mask = _image_and_mask(request, notes.append)
        whole_image = region = Box(0, 0, *image.size)
        if request.margin is not None:
            region = surroundings(mask, request.margin) or whole_image
        height, width = self.image_size(region.size, params.height, params.width, up=True)
        if region != whole_image:
            region = widened(region, width / height, image.size)
        if mask.getbbox() is None:
            notes.append("the mask is empty (all black): nothing is generated")
            unchanged = Unchanged(self, request, params, notes)
            unchanged.levels = Levels([], self.schedule)
            nothing = torch.empty(0)
            return unchanged.begin(Start(nothing, lambda x, level: x, finish=lambda _: image.copy()))

        run = Run(self, request, params, notes)
        canvas = Canvas.of(image, mask, region, width, height)
        z = extra = None
        if not self.sees_masks or request.strength < 1:
            filled = request.content == "fill" and request.strength < 1
            z = self._latent(canvas.filled() if filled else canvas.pixels, run, request.posterior)
        if self.sees_masks:
            hidden = self._latent(hide(canvas.pixels, canvas.hole), run, request.posterior)
            extra = conditioning(latent_mask(canvas.hole, self.config.vae.factor), hidden)
        x = draw(run.rngs, self.latent_shape(height, width), self.device)
        # all of a latent is generated anew if one of its pixels is
        hole = F.max_pool2d(canvas.hole, self.config.vae.factor).to(self.device)
        if z is not None:
            noised = self.schedule.add_noise(z, x, run.levels[0]) if run.levels[1:] else z
            from_noise = request.strength == 1 or (request.content == "noise" and len(run.levels) > 1)
            x = torch.where(hole > 0, x, noised) if from_noise else noised
        denoise: Denoise = self._denoiser(run, extra)
        if self.sees_masks or z is None:
            return run.begin(Start(x, denoise, finish=canvas.paste))
        known = z
        return run.begin(
            Start(x, keep_known(denoise, known, hole), lambda last: torch.lerp(known, last, hole), canvas.paste)
        )

    def _latent(self, pixels: Tensor, run: Run, posterior: str) -> Tensor:
        """(1, 3, H, W) -> each image's latent (B, C, h, w): a sample of its own, or the mean."""
        gaussian = self.encode(pixels, run.notes.append)
        if posterior == "mode":
            return gaussian.mode().expand(len(run.rngs), -1, -1, -1)
        return gaussian.sample(draw(run.rngs, gaussian.mean.shape[1:], self.device))

    def _denoiser(self, run: Run, extra: Tensor | None) -> Denoiser:
        return self.denoiser(run.context, run.uncond, run.params.guidance, extra)

    # ------------------------------------------------------------------------------------------------- the parts

    def contexts(self, request: TextToImage, params: SamplingParams, note: Note) -> tuple[Tensor, Tensor | None]:
        """The contexts of a request's images: (B, M, D), and (1, M, D) of the negative prompt if guidance needs it."""
        how = {"weighted_prompts": request.weighted_prompts, "long_prompts": request.long_prompts}
        if isinstance(request.prompt, Tensor):
            context = self._checked_context(request.prompt)
        else:
            context = self.encode_prompt(request.prompt, note=note, **how)
        context = context.to(self.device, self.dtype).repeat_interleave(params.n, dim=0)
        if params.guidance == 1.0:
            return context, None
        context, uncond = self.same_length(context, self.encode_prompt([request.negative], note=note, **how))
        return context, uncond

    def _checked_context(self, context: Tensor) -> Tensor:
        M, D = self.config.text[0].length, self.config.unet.context
        if context.dim() != 3 or 0 in context.shape or context.shape[1] % M or context.shape[2] != D:
            raise ValueError(f"a context must be (B, {M}, {D}), got {tuple(context.shape)}")
        return context

    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        *,
        weighted_prompts: bool = False,
        long_prompts: bool = False,
        note: Note = warn,
    ) -> Tensor:
        """Texts, or one -> context (B, M, D). What does not fit into M tokens is cut, and `note` is told what.

        weighted_prompts  `(word:1.2)`, `(word)` and `[word]` weigh words instead of being text (text/prompt_syntax.py)
        long_prompts      nothing is cut: contexts are (B, k M, D), k chunks, as many as the longest text needs; the
                          others are filled up with the empty text's
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not (weighted_prompts or long_prompts):
            return self._encode_ids(self.tokenizer(prompts, note))
        texts = [chunks(self.tokenizer, text, weighted_prompts, long_prompts, note) for text in prompts]
        count = max(map(len, texts), default=1)
        rows = [chunk for text in texts for chunk in (*text, *[Chunk([], [])] * (count - len(text)))]
        weights = torch.ones(len(rows), self.tokenizer.length, device="cpu")
        for row, chunk in zip(weights, rows, strict=True):
            row[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights, device="cpu")
        context = self._encode_ids(self.tokenizer.rows([chunk.ids for chunk in rows]))
        if (weights != 1).any():
            context = emphasised(context, weights.to(self.device))
        return context.reshape(len(texts), count * self.tokenizer.length, context.shape[-1])  # (B, k M, D)

    def _encode_ids(self, ids: Tensor) -> Tensor:
        with torch.no_grad(), self._use("text_encoder") as encoder:
            return encoder(ids.to(self.device)).hidden

    def same_length(self, *contexts: Tensor) -> list[Tensor]:
        """Contexts (B, k M, D) of different k, as long as the longest: filled up with that of the empty text."""
        M, length = self.config.text[0].length, max(context.shape[1] for context in contexts)
        if all(context.shape[1] == length for context in contexts):
            return list(contexts)
        if any(context.shape[1] % M for context in contexts):
            raise ValueError(f"contexts must be multiples of {M} long, got {[c.shape[1] for c in contexts]}")
        empty = self.encode_prompt([""])

        def filled(context: Tensor) -> Tensor:
            more = empty.to(context).repeat(context.shape[0], (length - context.shape[1]) // M, 1)
            return torch.cat([context, more], dim=1)

        return [filled(context) for context in contexts]

    def denoiser(
        self,
        context: Tensor,
        uncond: Tensor | None = None,
        guidance: float | None = None,
        extra: Tensor | None = None,
        network: Network | None = None,
    ) -> Denoiser:
        """The U-Net with guidance (the model's own if not given), as samplers want it; context and uncond (B, M, D).

        The U-Net is called as fast as it can be: recorded or compiled where the model is. `extra` (B, 5, h, w) is what
        a U-Net of 9 channels is given besides x: mask and masked latent, for example `all_hidden`. `network` is called
        in place of the U-Net.
        """
        if (extra is None) == self.sees_masks:
            need = "needs `extra`, mask and masked latent (all_hidden)" if extra is None else "takes no `extra`"
            raise ValueError(f"a U-Net of {self.config.unet.in_channels} input channels {need}")
        network = self._predict if network is None else network
        guidance = self.config.guidance if guidance is None else guidance
        cond = Conditioning(context, concat=extra)
        away = None if uncond is None else Conditioning(uncond, concat=extra)
        return Denoiser(network, self.schedule, cond, away, guidance)

    def _predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net, taken at each step: in between, others may have used the device's memory."""
        with self._use("unet") as unet:
            return (self._steps or unet)(x, t, conditioning)

    def _use(self, name: str) -> AbstractContextManager[nn.Module]:
        """A network, which stays on the device within the block."""
        return self._networks.use(name) if isinstance(self._networks, Offload) else nullcontext(self._networks[name])

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        levels: Levels,
        sampler: str | Sampler | None = None,
        *,
        noise: Noise | None = None,
        **options: float,
    ) -> Sampling:
        """Walk x (B, C, h, w) down the levels: an iterator of steps with a length, which does the work as it is asked.

        sampler  the model's customary one if not given
        noise    gives stochastic samplers their random numbers, each draw independent of the others
        options  the sampler's own (`Sampler.options`), such as eta
        """
        chosen = find_sampler(sampler or self.config.sampler)
        for name in options:
            if name not in chosen.options:
                raise ValueError(f"{chosen.label} has no option {name}")
        if noise is None and chosen.draws(options):
            raise ValueError(f"{chosen.label} draws noise in every step: give it `noise`")
        return Sampling(chosen.run(denoise, x, levels, noise=noise, **options), max(len(levels) - 1, 0))

    def encode(self, image: Image.Image | Tensor, note: Note = warn) -> Gaussian:
        """RGB image, or (B, 3, H, W) in [-1, 1], sides multiples of 8 -> latents' Gaussian (B, C, h, w) in float32.

        Half precision can overflow in the VAE: see `decode`.
        """
        pixels = image if isinstance(image, Tensor) else to_tensor(image)
        if pixels.dim() != 4 or pixels.shape[1] != self.config.vae.image_channels:
            raise ValueError(f"expected an RGB image or (B, 3, H, W), got {tuple(pixels.shape)}")
        large = pixels.shape[-2] * pixels.shape[-1] > LARGE

        def encode(vae: VAE, x: Tensor) -> Tensor:
            return torch.stack(encode_in_strips(vae, x) if large else vae.encode(x))

        mean, std = self._through_vae("latent", encode, pixels.to(self.device), note)
        return Gaussian(mean, std)

    def decode(self, z: Tensor, note: Note = warn) -> list[Image.Image]:
        """Latents (B, C, h, w) -> RGB images, one at a time, so that the memory needed is one image's.

        Large ones are decoded in strips (runtime/vae_tiling.py), which saves memory and changes no more than rounding.

        Half precision can overflow in the VAE. What comes out with NaN or infinity is computed again in float32, and
        `note` is told; if it still does, that is an ArithmeticError: a black image is never returned.
        """
        large = z.shape[-2] * z.shape[-1] * self.config.vae.factor**2 > LARGE

        def decode(vae: VAE, x: Tensor) -> Tensor:
            return decode_in_strips(vae, x) if large else vae.decode(x)

        return [to_pil(self._through_vae("image", decode, one, note))[0] for one in z.split(1)]

    def _through_vae(self, what: str, run: Callable[[VAE, Tensor], Tensor], x: Tensor, note: Note) -> Tensor:
        with torch.no_grad(), self._use("vae") as vae:
            out = run(vae, x.to(self.dtype))  # type: ignore[arg-type]
            if not out.isfinite().all() and self.dtype != torch.float32:
                note(f"the {what} is not finite in {dtype_name(self.dtype)}: computing it again in float32")
                out = run(copy.deepcopy(vae).float(), x.float())  # a copy: others may be decoding
        if not out.isfinite().all():
            raise ArithmeticError(
                f"the {what} is not finite (NaN) even in float32: the checkpoint may be damaged, or the U-Net "
                "overflows in half precision: try float32 (--dtype)"
            )
        return out.float()

    # ------------------------------------------------------------------------------------------------- adapters

    def _keep(self, *names: str) -> None:
        """Networks that are about to be changed: their files will not have their weights."""
        if isinstance(self._networks, Offload):
            self._networks.keep(*names)

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs that are merged and can be removed: name -> weight."""
        return self._merged.weights

    def add_lora(self, path: str | os.PathLike[str], weight: float = 1.0) -> str:
        """Merge a LoRA file into U-Net and text encoder; returns its name: the file's, or the folder's (diffusers).

        Raises CheckpointError, in one line, for a file that is no LoRA, or one for another model.
        """
        return self.add_loras([(path, weight)])[0]

    def add_loras(self, files: Sequence[tuple[str | os.PathLike[str], float]], *, removable: bool = True) -> list[str]:
        """Merge several LoRA files, each with its weight; all are read before the first is merged.

        If not `removable`, the weights from before are not kept, which takes the less memory; they cannot be removed.
        """
        if not files:
            return []
        networks = self._merged.networks
        loras = [(read_lora(path, self.config, networks), number("weight", weight)) for path, weight in files]
        self._keep(*networks)
        self._merged.add(loras, removable)
        return [lora.name for lora, _ in loras]

    def remove_lora(self, *names: str) -> None:
        """Take LoRAs out again, all if none is named; then the weights are to the bit what they were before."""
        self._merged.remove(*_those(names, self.loras, "LoRA"))

    @property
    def words(self) -> dict[str, int]:
        """The words that were added by `add_embedding`: word -> number of its vectors."""
        return self._words.counts

    def add_embedding(self, path: str | os.PathLike[str], word: str | None = None) -> list[str]:
        """Add the words of a textual inversion file to prompts; returns them, in lower case, as prompts are read.

        `word` is what to call it; else what the file calls it, or the file's name without its ending. Raises
        CheckpointError, in one line, for a file that is no embedding, or one for another model; ValueError if the word
        is taken.
        """
        text = self.config.text[0]
        words = read_embedding(path, text.width, text.length - 2, word)
        self._keep("text_encoder")
        return self._words.add(words)

    def remove_embedding(self, *words: str) -> None:
        """Forget words that were added, all if none is named."""
        self._words.remove(*_those(words, self.words, "word"))

    # ------------------------------------------------------------------------------------------------- sizes

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image; the model's native size where a side is not given."""
        factor = self.config.vae.factor
        sides = []
        for name, given in (("height", height), ("width", width)):
            side = self.config.size if given is None else whole(name, given)
            if side > MAX_SIDE:
                raise ValueError(f"{name} must be at most {MAX_SIDE}, got {side}")
            if side % factor or side < factor:
                lower, upper = max(side // factor, 1) * factor, max(-(-side // factor), 1) * factor
                near = f"{lower} or {upper}" if lower != upper else f"{lower}"
                raise ValueError(f"{name} must be a multiple of {factor}, got {side}: try {near}")
            sides.append(side // factor)
        return self.config.vae.latent_channels, sides[0], sides[1]

    def image_size(
        self, size: tuple[int, int], height: int | None = None, width: int | None = None, *, up: bool = False
    ) -> tuple[int, int]:
        """(height, width) to generate an image of this (width, height) at: multiples of 8 in about its proportions.

        Its own size if that is from half to twice as many pixels as the model's native size, which it does best; else
        as many as that. A side that is given is used as it is. Rounded down, which crops the image; `up` is for
        padding it.
        """
        factor, native = self.config.vae.factor, self.config.size
        wide, high = size
        if height is not None and width is not None:
            scale = 1.0
        elif height is not None:
            scale = height / high
        elif width is not None:
            scale = width / wide
        else:
            share = wide * high / native**2
            scale = 1.0 if 0.5 <= share <= 2 else share**-0.5

        def rounded(side: float) -> int:
            multiples = math.ceil(side / factor - 1e-6) if up else math.floor(side / factor + 1e-6)
            return min(max(multiples, 1), MAX_SIDE // factor) * factor

        height = rounded(high * scale) if height is None else height
        width = rounded(wide * scale) if width is None else width
        self.latent_shape(height, width)  # refuses what cannot be
        return height, width

    @property
    def sees_masks(self) -> bool:
        """Whether the U-Net is given a mask and a masked image beside x, as inpainting models are."""
        return self.config.unet.in_channels != self.config.vae.latent_channels

    def all_hidden(self, shape: Sequence[int]) -> Tensor:
        """(1, 5, h, w) for latents of this shape: what a U-Net of 9 channels is given where all is generated.

        A mask of ones and the latent of a grey image.
        """
        _, h, w = shape
        factor = self.config.vae.factor
        grey = torch.zeros(1, self.config.vae.image_channels, h * factor, w * factor, dtype=self.dtype, device="cpu")
        hidden = self.encode(grey).mode()
        return conditioning(torch.ones_like(hidden[:, :1]), hidden)


def _image_and_mask(request: Inpaint, note: Note) -> tuple[Image.Image, Image.Image]:
    """RGB image and mask (mode L) of one size; what is transparent is the mask if none is given."""
    if request.mask is not None:
        image, mask = _flat(request.image)[0], request.mask
    else:
        image, alpha = _flat(request.image, None)  # the colours under what is half transparent
        if alpha is None:
            raise ValueError("what is to be generated anew? Give a mask, or an image with a transparent part")
        mask = ImageOps.invert(alpha)
    return image, prepare_mask(mask, image.size, request.blur, note)


def _flat(
    image: Image.Image | None, background: tuple[int, int, int] | None = WHITE
) -> tuple[Image.Image, Image.Image | None]:
    """RGB and alpha of an image in memory."""
    assert image is not None
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # PIL opens files without reading them
        raise ValueError(f"the image cannot be read: {error}") from None
    return flatten(image, background)
