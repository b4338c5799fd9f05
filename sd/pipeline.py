"""The whole of Stable Diffusion: text -> context -> noise -> latents -> images.

    model = StableDiffusion.load("v1-5-pruned-emaonly.ckpt")
    model.txt2img("a photograph of an astronaut riding a horse", seed=7)[0].save("astronaut.png")
    model.img2img("an oil painting", photo, strength=0.6)
    model.inpaint("a cat", photo, mask)

These methods build a request and return its images. `prepare` returns the run itself, whose steps are accessible:

    run = model.prepare(TextToImage("a horse", SamplingParams(steps=20, seed=7)))  run.py
    for step in run: ...                                                           preview, stop, change step.x
    images, seeds, notes = run.result()

A run only combines the other modules, which can also be used one by one:

    cond = model.conditioning(["a horse"])                                      prompts.py
    denoise = model.denoiser(cond, model.conditioning([""]), guidance=7.5)      denoiser.py
    levels = model.schedule.levels(20, "leading")                               schedule.py
    x = draw(generators(7, 1), model.latent_shape(), model.device)              noise.py
    for step in model.sample(denoise, x, levels, "ddim"): ...                   samplers/
    images = model.decode(step.x)                                               models/vae.py

>>> StableDiffusion.load().txt2img("a red house on a meadow", steps=2, seed=7)[0].size
(128, 128)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from . import latents
from .adapters.adaptable import Adaptable
from .adapters.added import Adapters
from .adapters.textual_inversion import tokenizer_for
from .checkpoints.loading import LoadOptions, ModelFiles
from .checkpoints.placement import place
from .checkpoints.weights_cache import Cached
from .conditioning import Composition, Conditioning, Network, Wrapper
from .config import Config
from .controls import Controllable
from .denoiser import Denoiser
from .files import user_path
from .hints import Hints
from .hires import high_res
from .image_starts import image_to_image, inpaint
from .imaging.masks import mask_channels
from .imaging.tensors import to_tensor
from .models.text_encoder import TextEncoder
from .models.unet import UNet
from .models.vae import Gaussian
from .params import HighRes, ImageToImage, Inpaint, SamplingParams, TextToImage
from .prompts import TextEncoding
from .refiner import check_models, notes_on, with_refiner
from .resources import EMBEDDED, resource
from .run import Run, Sampling, text_to_image
from .runtime.cuda_graphs import Compiled, Recorded
from .runtime.device import best_dtype, explained, find_device, find_dtype
from .runtime.offload import Offload, with_network, without_moving
from .runtime.optimize import unwrapped
from .samplers import Denoise, Noise, Sampler, Step, find_sampler
from .schedule import Levels, Schedule
from .size_conditioning import NUMBERS
from .text.tokenizer import Note, Tokenizer, warn

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

Prompt = str | Sequence[str] | Tensor
Progress = Callable[[Run], Iterable[Step]]


class StableDiffusion(Adaptable, Controllable, TextEncoding, Cached, Hints):
    """A checkpoint on one device in one precision: networks, tokenizer, schedule and adapters."""

    def __init__(
        self,
        config: Config,
        text_encoder: TextEncoder,
        vae: latents.Autoencoder,
        unet: UNet,
        about: Sequence[str] = (),
        text_encoder_2: TextEncoder | None = None,
    ) -> None:
        """The networks are those of the config; a second text encoder is there if it has one."""
        self.config = config
        self.about = tuple(about)  # what was detected and chosen in loading, one line each
        self._text_names = config.text_names
        self.tokenizers = tuple(map(tokenizer_for, config.text))
        self.schedule, self.is_inpainting = Schedule(config.schedule), config.is_inpainting
        self._controls = {}  # controls.py
        self._networks: Mapping[str, nn.Module] = {"text_encoder": text_encoder, "vae": vae, "unet": unet}
        if text_encoder_2 is not None:
            self._networks = {**self._networks, "text_encoder_2": text_encoder_2}
        if missing := [name for name in config.text_names if name not in self._networks]:
            raise ValueError(f"{config.name} has {len(config.text)} text encoders: give {', '.join(missing)} as well")
        self._adapters = Adapters(config, self.tokenizers, self._networks, self._keep)
        weight = next(getattr(unet, "norm_out", unet).parameters())  # a norm is never packed
        self.device, self.dtype = weight.device, weight.dtype
        # called in place of the U-Net: recorded or compiled
        self._fast_unet: Network | None = Recorded(unet) if self.device.type == "cuda" else None

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
        """Load a checkpoint: a file in the original or our layout, or a diffusers folder; None is the embedded model.

        path         "~" is the home folder, here and wherever the class takes a path
        device       "cuda", "cpu", "mps", ...; the best available if None
        dtype        "float32", "float16", "bfloat16" or a torch dtype; the best for the device if None
        low_memory   the networks take turns in the memory of the device (runtime/offload.py). On CPU and MPS they are
                     read again at each turn from the files, which stay open: each image takes seconds longer
        compile      compile the U-Net, which takes minutes at the first image of each size. For GPUs: on x86 CPUs it is
                     slower than without, and a UserWarning says so
        progress     called with (parameters in this weight, parameters in total) after each weight is read
        options      the fields of `LoadOptions`: config, weights, prediction, vae, text_encoder, ...
        `about` says what was detected and chosen. Raises CheckpointError for files that are not a checkpoint, damaged,
        dangerous, or of another model; ValueError for a device or precision that is not available.
        """
        device = find_device(device)
        dtype = find_dtype(dtype) if dtype is not None else best_dtype(device)
        if low_memory and compile:
            raise ValueError("low memory and compiling do not go together: compiled networks stay where they are")
        file = resource(EMBEDDED) if path is None else user_path(path)
        files = ModelFiles(file, LoadOptions.of(options, ("device", "dtype", "low_memory", "compile", "progress")))
        config, networks, used, about, cache = place(files, device, dtype, low_memory, progress)
        # adapters hold the plain networks; with low memory they are used through an `Offload` of the same ones
        model = cls(config, **cast(dict[str, Any], networks), about=about)
        model.__dict__.update(_networks=used, device=device, dtype=dtype, _cache=cache)
        if low_memory or compile:  # with low memory, a recording would hold memory that the other networks need
            model._fast_unet = Compiled(networks["unet"]) if compile else None
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the first text encoder."""
        return self.tokenizers[0]

    # ------------------------------------------------------------------------------------------------- networks

    @property
    def text_encoder(self) -> TextEncoder:
        """Token ids -> context. With `low_memory`, ask for the networks each time that you use them."""
        return cast(TextEncoder, self._networks["text_encoder"])

    @text_encoder.setter
    def text_encoder(self, network: nn.Module) -> None:
        self._replace("text_encoder", network)

    @property
    def text_encoder_2(self) -> TextEncoder:
        """SDXL's second text encoder. KeyError for a model of one."""
        return cast(TextEncoder, self._networks["text_encoder_2"])

    @text_encoder_2.setter
    def text_encoder_2(self, network: nn.Module) -> None:
        self._replace("text_encoder_2", network)

    @property
    def vae(self) -> latents.Autoencoder:
        """Images <-> latents."""
        return cast(latents.Autoencoder, self._networks["vae"])

    @vae.setter
    def vae(self, network: nn.Module) -> None:
        self._replace("vae", network)

    @property
    def unet(self) -> UNet:
        """x_t, t, conditioning -> prediction."""
        return cast(UNet, self._networks["unet"])

    @unet.setter
    def unet(self, network: nn.Module) -> None:
        self._replace("unet", network)
        # the previous one was recorded or compiled; a network in a wrapper is called as it is
        kind = Compiled if isinstance(self._fast_unet, Compiled) else Recorded if self.device.type == "cuda" else None
        self._fast_unet = kind(network) if kind is not None and isinstance(network, UNet) else None

    def _replace(self, name: str, network: nn.Module) -> None:
        """Use another network, or the same one in a wrapper: `model.unet = torch.compile(model.unet)`."""
        if isinstance(self._networks, Offload):
            self._networks.check_stays(name)
        if not callable(network):  # None, a path, a state dict
            raise TypeError(
                f"model.{name} must be a network (torch.nn.Module), got {type(network).__name__}: to load weights, "
                f"model.{name}.load_state_dict(...) or StableDiffusion.load; to save memory, load with low_memory=True"
            )
        plain = {key: unwrapped(net) for key, net in without_moving(self._networks).items()}
        wrapped = unwrapped(network)
        if wrapped is not plain[name] and name != "vae":  # adapters change the other two
            if self.loras or self.words:
                raise ValueError("remove LoRAs and embeddings before a network is replaced: it does not have them")
            self._adapters = Adapters(self.config, self.tokenizers, plain | {name: wrapped}, self._keep)
        self._networks = with_network(self._networks, name, network)

    def _keep(self, *names: str) -> None:
        """With `low_memory`, keep these networks in memory from now on: they are about to differ from their files."""
        if isinstance(self._networks, Offload):
            self._networks.keep(*names)

    @contextmanager
    def _use(self, name: str) -> Iterator[nn.Module]:
        """A network, which stays on the device within the block; see `explained` for its errors."""
        networks = self._networks
        turn = networks.use(name) if isinstance(networks, Offload) else nullcontext(networks[name])
        with turn as network, explained(f"model.{name}", network, self.device):
            yield network

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, wrap: Wrapper = lambda net: net) -> Tensor:
        """The output (B, C, h, w) of the U-Net, recorded or compiled if it is, for x (B, C, h, w) and t (B,).

        It runs in the precision of its weights, which may have been cast: `model.unet.half()`.
        `wrap` makes another network of the U-Net, whose output is returned instead: see `DeepCache`.
        """
        with self._use("unet") as unet:
            norm = getattr(unet, "norm_out", None)  # a layer whose weight is never packed
            dtype = norm.weight.dtype if isinstance(norm, nn.GroupNorm) else self.dtype
            if any(part is not None and part.dtype != dtype for part in conditioning):
                conditioning = conditioning.to(dtype=dtype)
            return wrap(self._fast_unet or unet)(x.to(dtype), t, conditioning)

    # ------------------------------------------------------------------------------------------- the three tasks

    def txt2img(
        self,
        prompt: Prompt,
        negative: Prompt | None = "",
        *,
        refiner: Self | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Generate images from text; settings are those of `TextToImage` and `SamplingParams`, and sampler options.

        One `negative` is for all prompts, several are one for each; contexts of `encode_prompt` are taken as well.
        With `hires`, for example 2, images are enlarged and refined; further settings are then those of `HighRes`.
        `refiner` is another model, for the last steps (refiner.py): `txt2img(..., refiner=other, refiner_from=0.8)`.
        `progress` wraps the iterator over the steps, for example `tqdm`. Notes are issued as warnings here; `prepare`
        returns them. Raises ValueError for values out of range, TypeError for unknown settings.
        """
        kind = TextToImage if settings.get("hires") is None else HighRes
        given = {name: value for name, value in settings.items() if value is not None or name != "hires"}
        return self._generate(kind.of(prompt, negative, **given), refiner, progress)

    def img2img(
        self,
        prompt: Prompt,
        image: Image.Image,
        negative: Prompt | None = "",
        *,
        refiner: Self | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Generate images from text and an initial image; settings as for `txt2img`, and those of `ImageToImage`."""
        return self._generate(ImageToImage.of(prompt, negative, image=image, **settings), refiner, progress)

    def inpaint(
        self,
        prompt: Prompt,
        image: Image.Image,
        mask: Image.Image | None = None,
        negative: Prompt | None = "",
        *,
        refiner: Self | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Generate the masked part of an image anew; settings as for `txt2img`, and those of `Inpaint`."""
        return self._generate(Inpaint.of(prompt, negative, image=image, mask=mask, **settings), refiner, progress)

    def _generate(self, request: TextToImage, refiner: Self | None, progress: Progress | None) -> list[Image.Image]:
        if not callable(progress) and progress is not None:
            raise TypeError(f"progress must wrap an iterator, as tqdm does, got {progress!r:.100}")
        run = self.prepare(request, refiner)
        for _ in (progress or iter)(run):
            pass
        result = run.result()
        for note in result.notes:
            warnings.warn(note, stacklevel=3)
        return result.images

    def prepare(self, request: TextToImage, refiner: Self | None = None) -> Run:
        """Encode, draw noise and plan a run that can be iterated; `refiner` is the model of its last steps."""
        if refiner is not None:
            check_models(self, refiner)
        if isinstance(request, HighRes):
            run: Run = high_res(self, request)
        elif isinstance(request, ImageToImage):
            run = image_to_image(self, request)
        elif isinstance(request, Inpaint):
            run = inpaint(self, request)
        else:
            run = text_to_image(self, request)
        numbers = any(getattr(request.params, name) != getattr(SamplingParams, name) for name in NUMBERS)
        if self.config.sizes or numbers:
            run.notes += notes_on(request, [model.config for model in (self, refiner) if model is not None])
        return run if refiner is None else with_refiner(run, refiner)

    # ------------------------------------------------------------------------------------------------- the parts

    def denoiser(
        self,
        context: Tensor | Conditioning | Composition,
        uncond: Tensor | Conditioning | None = None,
        guidance: float | None = None,
        concat: Tensor | None = None,
        network: Network | None = None,
        rescale: float = 0.0,
    ) -> Denoiser:
        """The U-Net with guidance, as samplers take it.

        context    encoded prompt (B, M, D), a `Conditioning`, or a `Composition`; `uncond` the empty or negative one
        guidance   the default of the model if None
        concat     (B, 5, h, w), further channels of an inpainting model (see `blank_concat`)
        network    called instead of the model's U-Net (in its recorded or compiled form, if it has one)
        rescale    how far to rescale the guided prediction to its contrast without guidance, 0 to 1 (denoiser.py)
        """
        guidance = self.defaults.guidance if guidance is None else guidance
        is_told = self.config.unet.guidance is not None  # the network itself, which then is called once
        cond = Conditioning(context) if isinstance(context, Tensor) else context
        other = Conditioning(uncond) if isinstance(uncond, Tensor) else uncond
        if concat is not None:
            cond, other = cond.with_concat(concat), None if other is None else other.with_concat(concat)
        if is_told:
            cond, other = cond.with_guidance(guidance), None if other is None else other.with_guidance(guidance)
        if (cond.concat is None) == self.is_inpainting:
            need = "needs `concat`, mask and masked image (blank_concat)" if self.is_inpainting else "takes no `concat`"
            raise ValueError(f"a U-Net of {self.config.unet.in_channels} input channels {need}")
        return Denoiser(network or self.predict, self.schedule, cond, other, 1.0 if is_told else guidance, rescale)

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
        """Sample from x (B, C, h, w) along the levels: a lazy iterator over the steps, which has a length.

        sampler   the default of the model if None
        noise     the random numbers of stochastic samplers: independent unit normal noise in each call
        options   of the sampler (`Sampler.options`), such as eta
        """
        return Sampling(denoise, x, levels, find_sampler(sampler or self.defaults.sampler), noise, options)

    def encode(self, image: Image.Image | Tensor, note: Note = warn) -> Gaussian:
        """Encode an RGB image, or (B, 3, H, W) in [-1, 1], with sides that are multiples of 8.

        Returns the distribution of the latents, a Gaussian over (B, C, h, w) in float32. See `latents.encode`.
        """
        pixels = image if isinstance(image, Tensor) else to_tensor(image)
        if pixels.dim() != 4 or pixels.shape[1] != self.config.vae.image_channels:
            raise ValueError(f"expected an RGB image or (B, 3, H, W), got {tuple(pixels.shape)}")
        with self._use("vae") as vae:
            return latents.encode(cast(latents.Autoencoder, vae), pixels.to(self.device), note)

    def decode(self, z: Tensor, note: Note = warn) -> list[Image.Image]:
        """Decode latents (B, C, h, w) to RGB images, one at a time. See `latents.decode`."""
        with self._use("vae") as vae:
            return latents.decode(cast(latents.Autoencoder, vae), z, note)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image, with the native size for a side that is None."""
        return latents.latent_shape(self.config, height, width)

    def image_size(
        self, size: tuple[int, int], height: int | None = None, width: int | None = None, *, up: bool = False
    ) -> tuple[int, int]:
        """The (height, width) at which to generate an image of this (width, height): see `latents.image_size`."""
        return latents.image_size(self.config, size, height, width, up=up)

    def blank_concat(self, shape: Sequence[int]) -> Tensor:
        """(1, 5, h, w), the `concat` of a whole image: a mask of ones, and grey; `shape` (C, h, w) of the latents."""
        _, h, w = shape
        factor = self.config.vae.factor
        grey = torch.zeros(1, self.config.vae.image_channels, h * factor, w * factor, dtype=self.dtype, device="cpu")
        masked = self.encode(grey).mode()
        return mask_channels(torch.ones_like(masked[:, :1]), masked)
