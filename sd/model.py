"""The networks of one checkpoint, and each thing that is done with them: encoding, denoising, sampling, decoding.

The three tasks that are made of these parts are in pipeline.py.

>>> model = Model.load()  # the embedded one
>>> model.encode_prompt(["a red house"]).shape, model.latent_shape()
(torch.Size([1, 77, 64]), (4, 16, 16))
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from .adapters.lora import Merged
from .adapters.lora_formats import read_lora
from .adapters.textual_inversion import Words, read_embedding
from .checkpoints.checkpoint import Checkpoint, load_checkpoint, naming
from .checkpoints.convert import convert
from .checkpoints.detect import identify
from .checkpoints.layouts import NETWORKS
from .checkpoints.loading import build, describe, like, load_weights, probed, with_part
from .config import Config
from .denoiser import Denoiser, Network, with_channels
from .imaging.masks import conditioning
from .imaging.tensors import to_pil, to_tensor
from .models.text_encoder import TextEncoder
from .models.unet import UNet
from .models.vae import VAE, Gaussian
from .params import SAMPLER, find_sampler, number, whole
from .resources import resource
from .runtime.cuda_graphs import Compiled, Recorded
from .runtime.device import best_dtype, dtype_name, find_device, find_dtype
from .runtime.offload import Offload
from .runtime.optimize import optimize
from .runtime.vae_tiling import decode_in_strips, encode_in_strips
from .samplers import Denoise, Noise, Sampler, Step
from .schedule import Level, Schedule
from .text.prompt_syntax import Chunk, chunks, emphasised
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

EMBEDDED = "weights/pocket.safetensors"  # the model that comes with the project
MAX_SIDE = 16384  # pixels
ONE_MEMORY = ("cpu", "mps")  # devices without memory apart from the CPU's
LARGE = 1024 * 1024  # pixels from which the VAE goes over its maps in strips


def _those(names: Sequence[str], known: Mapping[str, object], what: str) -> list[str]:
    """The names, or all that are known if there are none; ValueError for one that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r} was added: {', '.join(known) or 'there is none'}")
    return list(names or known)


class Steps(Iterator[Step]):
    """A sampling run: iterate over its steps; `len` is their number, so that progress bars know the end."""

    def __init__(self, steps: Iterator[Step], n: int) -> None:
        self._steps, self._n = steps, n
        self.finish: Callable[[Image.Image], Image.Image] = lambda decoded: decoded  # what becomes of a decoded picture

    def __next__(self) -> Step:
        with torch.no_grad():
            return next(self._steps)

    def __len__(self) -> int:
        return self._n


class Model:
    """The three networks of a checkpoint with their tokenizer and schedule, on one device in one precision."""

    def __init__(
        self, config: Config, text_encoder: TextEncoder, vae: VAE, unet: UNet, about: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.about = tuple(about)  # what was found out and chosen in loading, one line each
        self.tokenizer = Tokenizer(length=config.text.length, pad=config.text.pad)
        self.schedule = Schedule(config.schedule)
        self._networks: Mapping[str, nn.Module] = {"text_encoder": text_encoder, "vae": vae, "unet": unet}
        self._merged = Merged({"text_encoder": text_encoder, "unet": unet})
        self._words = Words(self.tokenizer, text_encoder)
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._steps: Network | None = Recorded(unet) if self.device.type == "cuda" else None  # in the U-Net's place

    @property
    def text_encoder(self) -> TextEncoder:
        """Token ids -> context. With `low_memory`, ask for it (and for the others) each time that you use it."""
        return self._networks["text_encoder"]

    @property
    def vae(self) -> VAE:
        """Pictures <-> latents."""
        return self._networks["vae"]

    @property
    def unet(self) -> UNet:
        """x_t, t, context -> prediction."""
        return self._networks["unet"]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        config: Config | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        weights: str = "auto",
        prediction: str | None = None,
        vae: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        variant: str | None = None,
        low_memory: bool = False,
        compile: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """Load a checkpoint: a file in the original layout or ours, a diffusers folder; the embedded model if none.

        config        which model it is; found out from the file if not given (`identify`)
        device        "cuda", "cpu", "mps", ...; the best there is if not given
        dtype         "float32", "float16", "bfloat16" or a torch dtype; the best for the device if not given
        weights       "auto", "raw" or "ema": which of a training checkpoint's two U-Nets (`convert`)
        prediction    "eps" or "v": what the U-Net predicts; found out if not given
        vae           another file or folder to take the VAE from: a VAE alone, or a whole checkpoint
        text_encoder  the same for the text encoder
        variant       of a diffusers folder: "fp16", ..., the files named so
        low_memory    the networks take turns in the device's memory (turns.py); on CPU and MPS they are read again at
                      each turn, from the files, which stay open: every picture takes seconds more
        compile       whether txt2img, img2img and inpaint compile the U-Net, which takes minutes at the first of each
                      size; for GPUs: on x86 CPUs it is slower than without, which a UserWarning says
        progress      is told (numbers in this weight, numbers in all) after each weight is read

        What was found out and chosen is in `about`. Raises CheckpointError, in one line, for files that are not a
        checkpoint, are damaged, dangerous, or hold something else; ValueError for a device or precision that is not
        there.
        """
        device = find_device(device)
        dtype = find_dtype(dtype) if dtype is not None else best_dtype(device)
        path = resource(EMBEDDED) if path is None else path
        if low_memory and compile:
            raise ValueError("low memory and compiling do not go together: compiled networks stay where they are")
        others = {name: other for name, other in (("vae", vae), ("text_encoder", text_encoder)) if other is not None}
        with ExitStack() as files:

            def opened(path: str | os.PathLike[str]) -> Checkpoint:
                return files.enter_context(load_checkpoint(path, variant, mapped=True))

            main = opened(path)
            parts = {name: opened(other) for name, other in others.items()}
            with naming(path):
                found = identify(main, config, prediction)
                states = convert(main, found.config, weights, [name for name in NETWORKS if name not in others])
            config = found.config
            for name, file in parts.items():
                with naming(others[name]):
                    config = with_part(config, name, file)
                    states |= convert(file, config, parts=[name])
            networks = build(config)
            for network in networks.values():
                optimize(network, device)
            total = sum(math.prod(w.shape) for net in networks.values() for w in net.state_dict().values())
            each_turn = low_memory and device.type in ONE_MEMORY  # are weights read, not only now
            place = torch.device("cpu") if low_memory and not each_turn else device
            report = None if each_turn else progress

            def read(name: str, network: nn.Module) -> None:
                for file in (main, *parts.values()):
                    file.check_unchanged()
                with naming(others.get(name, path)):
                    load_weights(network, states[name], place, dtype, lambda n: report(n, total) if report else None)

            for name, network in () if each_turn else networks.items():
                read(name, network)
            taken = Offload(networks, device, read if each_turn else None) if low_memory else networks
            if not found.decided:
                found = probed(found, taken["unet"])
                config = like(found.config, config)
            about = [*main.notes, *describe(main, found, weights, config)]
            if each_turn:
                files.pop_all()  # they stay open as long as the model is there
        model = cls(config, **networks, about=about)
        model._networks, model.device, model.dtype = taken, device, dtype
        if low_memory:  # recordings would hold the memory that is to be free for others
            model._steps = None
        elif compile:
            model._steps = Compiled(networks["unet"])
        return model

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
        text = self.config.text
        words = read_embedding(path, text.width, text.length - 2, word)
        self._keep("text_encoder")
        return self._words.add(words)

    def remove_embedding(self, *words: str) -> None:
        """Forget words that were added, all if none is named."""
        self._words.remove(*_those(words, self.words, "word"))

    def encode_prompt(
        self, prompts: str | Sequence[str], *, weighted_prompts: bool = False, long_prompts: bool = False
    ) -> Tensor:
        """Texts, or one -> context (B, M, D). What does not fit into M tokens is cut, with a warning that says what.

        weighted_prompts  `(word:1.2)`, `(word)` and `[word]` weigh words instead of being text (prompts.py)
        long_prompts      nothing is cut: contexts are (B, k M, D), k chunks, as many as the longest text needs; the
                          others are filled up with the empty text's
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not (weighted_prompts or long_prompts):
            ids = self.tokenizer(prompts).to(self.device)
            with torch.no_grad():
                return self.text_encoder(ids)
        texts = [chunks(self.tokenizer, text, weighted_prompts, long_prompts) for text in prompts]
        count = max(map(len, texts), default=1)
        rows = [chunk for text in texts for chunk in (*text, *[Chunk([], [])] * (count - len(text)))]
        weights = torch.ones(len(rows), self.tokenizer.length, device="cpu")
        for row, chunk in zip(weights, rows, strict=True):
            row[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights, device="cpu")
        with torch.no_grad():
            context = self.text_encoder(self.tokenizer.rows([chunk.ids for chunk in rows]).to(self.device))
            if (weights != 1).any():
                context = emphasised(context, weights.to(self.device))
        return context.reshape(len(texts), count * self.tokenizer.length, context.shape[-1])  # (B, k M, D)

    def same_length(self, *contexts: Tensor) -> list[Tensor]:
        """Contexts (B, k M, D) of different k, as long as the longest: filled up with that of the empty text."""
        M, length = self.config.text.length, max(context.shape[1] for context in contexts)
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

        `extra` (B, 5, h, w) is what a U-Net of 9 channels is given besides x: mask and masked latent, for example
        `all_hidden`. `network` is called in place of the U-Net.
        """
        if (extra is None) == self.sees_masks:
            need = "needs `extra`, mask and masked latent (all_hidden)" if extra is None else "takes no `extra`"
            raise ValueError(f"a U-Net of {self.config.unet.in_channels} input channels {need}")
        network = self._predict if network is None else network
        network = network if extra is None else with_channels(network, extra)
        guidance = self.config.guidance if guidance is None else guidance
        return Denoiser(network, self.schedule, context, uncond, guidance)

    def _predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The U-Net, asked for at each step: in between, a picture of the step may have been decoded."""
        return self.unet(x, t, context)

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        levels: Sequence[Level],
        sampler: str | Sampler = SAMPLER,
        *,
        eta: float | None = None,
        noise: Noise | None = None,
    ) -> Steps:
        """Walk x (B, C, h, w) down the levels: an iterator of steps with a length, which does the work as it is asked.

        `noise` gives stochastic samplers their random numbers, each draw independent of the others; `eta` is DDIM's, 0
        if not given.
        """
        chosen = find_sampler(sampler)
        options: dict[str, object] = {}
        if eta is not None:
            if chosen.stochastic != "eta":
                raise ValueError(f"eta is a setting of ddim, not of {chosen.label}")
            options["eta"] = eta
        if noise is None and chosen.stochastic == "always":
            raise ValueError(f"{chosen.label} draws noise in every step: give it `noise`")
        if noise is not None and chosen.stochastic != "never":
            options["noise"] = noise
        if chosen.paths:
            options["independent"] = True
        if chosen.midpoints:
            options["level_of_ratio"] = self.schedule.level_of_ratio
        return Steps(chosen.run(denoise, x, levels, **options), max(len(levels) - 1, 0))

    def encode(self, image: Image.Image | Tensor) -> Gaussian:
        """RGB picture, or (B, 3, H, W) in [-1, 1], sides multiples of 8 -> latents' Gaussian (B, C, h, w) in float32.

        Half precision can overflow in the VAE: see `decode`.
        """
        pixels = image if isinstance(image, Tensor) else to_tensor(image)
        if pixels.dim() != 4 or pixels.shape[1] != self.config.vae.image_channels:
            raise ValueError(f"expected an RGB picture or (B, 3, H, W), got {tuple(pixels.shape)}")
        large = pixels.shape[-2] * pixels.shape[-1] > LARGE
        encode = partial(encode_in_strips, self.vae) if large else self.vae.encode
        return Gaussian(*self._through_vae("latent", lambda x: torch.stack(encode(x)), pixels.to(self.device)))

    def decode(self, z: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) -> RGB pictures, one at a time, so that the memory needed is one picture's.

        Large ones are decoded in strips (strips.py), which saves memory and changes no more than rounding.

        Half precision can overflow in the VAE. What comes out with NaN or infinity is computed again in float32, with
        a warning; if it still does, that is an ArithmeticError: a black picture is never returned.
        """
        large = z.shape[-2] * z.shape[-1] * self.config.vae.factor**2 > LARGE
        decode = partial(decode_in_strips, self.vae) if large else self.vae.decode
        return [image for one in z.split(1) for image in to_pil(self._through_vae("picture", decode, one))]

    def _through_vae(self, what: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            out = run(x.to(self.dtype))
            if not out.isfinite().all() and self.dtype != torch.float32:
                warnings.warn(
                    f"a {what} is not finite in {dtype_name(self.dtype)}: computing it again in float32", stacklevel=3
                )
                self.vae.float()
                try:
                    out = run(x.float())
                finally:
                    self.vae.to(self.dtype)
        if not out.isfinite().all():
            raise ArithmeticError(
                f"the {what} is not finite (NaN) even in float32: the checkpoint may be damaged, or the U-Net "
                "overflows in half precision: try float32 (--dtype)"
            )
        return out.float()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; the model's native size where a side is not given."""
        factor = self.config.vae.factor
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = self.config.size if side is None else whole(name, side)
            if side > MAX_SIDE:
                raise ValueError(f"{name} must be at most {MAX_SIDE}, got {side}")
            if side % factor or side < factor:
                lower, upper = max(side // factor, 1) * factor, max(-(-side // factor), 1) * factor
                near = f"{lower} or {upper}" if lower != upper else f"{lower}"
                raise ValueError(f"{name} must be a multiple of {factor}, got {side}: try {near}")
            sides.append(side // factor)
        return self.config.vae.latent_channels, sides[0], sides[1]

    def picture_size(
        self, size: tuple[int, int], height: int | None = None, width: int | None = None, *, up: bool = False
    ) -> tuple[int, int]:
        """(height, width) to paint a picture of this (width, height) at: multiples of 8 in about its proportions.

        Its own size if that is from half to twice as many pixels as the model's native picture, which it paints best;
        else as many as that. A side that is given is used as it is. Rounded down, which cuts the picture; `up` is for
        framing it.
        """
        factor, native = self.config.vae.factor, self.config.size
        wide, high = size
        height = None if height is None else whole("height", height)
        width = None if width is None else whole("width", width)
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
            whole_factors = math.ceil(side / factor - 1e-6) if up else math.floor(side / factor + 1e-6)
            return min(max(whole_factors, 1), MAX_SIDE // factor) * factor

        height = rounded(high * scale) if height is None else height
        width = rounded(wide * scale) if width is None else width
        self.latent_shape(height, width)  # refuses what cannot be
        return height, width

    @property
    def sees_masks(self) -> bool:
        """Whether the U-Net is given a mask and a masked picture beside x, as inpainting models are."""
        return self.config.unet.in_channels != self.config.vae.latent_channels

    def all_hidden(self, shape: Sequence[int]) -> Tensor:
        """(1, 5, h, w) for latents of this shape: what a U-Net of 9 channels is given where all is to be painted.

        A mask of ones and the latent of a grey picture.
        """
        _, h, w = shape
        factor = self.config.vae.factor
        grey = torch.zeros(1, self.config.vae.image_channels, h * factor, w * factor, dtype=self.dtype, device="cpu")
        hidden = self.encode(grey).mode()
        return conditioning(torch.ones_like(hidden[:, :1]), hidden)
