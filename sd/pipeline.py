"""The whole of Stable Diffusion: text -> context -> noise -> latents -> pictures.

    sd = StableDiffusion.load("v1-5-pruned-emaonly.ckpt")
    sd.txt2img("a photograph of an astronaut riding a horse", seed=7)[0].save("astronaut.png")

Each method is a few lines on top of the other modules, meant to be read, and to be taken apart:

    context = sd.encode_prompt(["a horse"])                               text_encoder.py
    denoise = sd.denoiser(context, sd.encode_prompt([""]), guidance=7.5)  denoiser.py
    levels = sd.schedule.levels(20, "leading")                            schedule.py
    x = initial_noise(generators, shape)                                  here
    for step in sd.sample(denoise, x, levels, "ddim"): ...                samplers.py
    pictures = sd.decode(step.x)                                          vae.py

Random numbers: picture i of a call has its own CPU generator, seeded with seed + i, from which it draws, in float32:
first its initial noise (C, h, w), then, with a stochastic sampler, tensors of that shape as its steps ask for them. So
a picture depends on neither the batch it is made in nor the device.
"""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoint import CheckpointError, load_checkpoint
from .config import Config
from .convert import build, convert, detect, load_weights
from .denoiser import Denoiser
from .image import to_pil
from .resources import resource
from .samplers import Denoise, Noise, Sampler, Step, sampler
from .schedule import Level, Schedule
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("cuda", "cpu", "mps", "xpu")
SAMPLER, GUIDANCE = "ddim", 7.5  # defaults
MAX_SEED = 2**64 - 1
MAX_SIDE = 16384  # pixels
EMBEDDED = "weights/pocket.safetensors"  # the model that comes with the project

Progress = Callable[["Steps"], Iterable[Step]]


def best_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this name, with its number; the best there is if None. ValueError for one that is not there."""
    try:
        found = torch.device(device) if device is not None else best_device()
        if found.type not in DEVICES:
            raise RuntimeError(f"expected one of {', '.join(DEVICES)}")
        # an empty tensor knows the number of the current device, which other threads would not
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} is not available here: {reason}") from None


def best_dtype(device: torch.device) -> torch.dtype:
    """The precision that is fastest without harm: float16 on CUDA, bfloat16 on CPUs that multiply it in hardware.

    Elsewhere bfloat16 would be emulated and slower than float32. MPS gets float32: half precision is not safe there.
    """
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu":
        if hasattr(torch.cpu, "get_capabilities"):
            able = torch.cpu.get_capabilities()
        else:  # before torch 2.10
            able = {"avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()}
        if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16")):
            return torch.bfloat16
    return torch.float32


def named(path: str | os.PathLike[str], error: ValueError) -> ValueError:
    """The error with the file's name in front, unless it is there already."""
    message = str(error)
    return error if message.startswith(str(path)) else CheckpointError(f"{path}: {message}")


def check_schedule(tensors: Mapping[str, Tensor], config: Config) -> None:
    """Warn if the file was trained with another noise schedule than the config's, as zero-terminal-SNR models are."""
    if "alphas_cumprod" not in tensors:
        return
    theirs, ours = tensors["alphas_cumprod"].double(), torch.from_numpy(Schedule(config.schedule).alpha_bar)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-3):  # as float16 rounds them
        warnings.warn(
            "this checkpoint was trained with another noise schedule (alphas_cumprod), which is not supported: its "
            "pictures will be off",
            stacklevel=3,
        )


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator a picture, seeded with seed, seed + 1, ... (modulo 2^64)."""
    return [torch.Generator("cpu").manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(n)]


def draw(rngs: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Unit normal noise (B, *shape) in float32, each picture's from its own generator: the only place that draws.

    Drawn one by one and on the CPU: a slice of a batch's draw is not the draw of that picture alone, and CUDA's
    generator gives other numbers.
    """
    each = [torch.randn(tuple(shape), generator=rng, device="cpu", dtype=torch.float32) for rng in rngs]
    return torch.stack(each).to(device)


class Steps(Iterator[Step]):
    """A sampling run: iterate over its steps; `len` is their number, so that progress bars know the end."""

    def __init__(self, steps: Iterator[Step], n: int) -> None:
        self._steps, self._n = steps, n

    def __next__(self) -> Step:
        with torch.no_grad():
            return next(self._steps)

    def __len__(self) -> int:
        return self._n


class StableDiffusion:
    """The three networks of a checkpoint with their tokenizer and schedule, on one device in one precision."""

    def __init__(self, config: Config, text_encoder: TextEncoder, vae: VAE, unet: UNet) -> None:
        self.config = config
        self.tokenizer = Tokenizer(length=config.text.length, pad=config.text.pad)
        self.text_encoder, self.vae, self.unet = text_encoder, vae, unet
        self.schedule = Schedule(config.schedule)
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        config: Config | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        weights: str = "auto",
        progress: Callable[[int, int], object] | None = None,
    ) -> StableDiffusion:
        """Load a checkpoint: original layout or ours, .ckpt or .safetensors; the embedded model if none is given.

        config    which model it is; found out from the file if not given (`detect`)
        device    "cuda", "cpu", "mps", ...; the best there is if not given
        dtype     "float32", "float16", "bfloat16" or a torch dtype; the best for the device if not given
        weights   "auto", "raw" or "ema": which of a training checkpoint's two U-Nets (`convert`)
        progress  is told (numbers in this weight, numbers in all) after each weight is read

        Raises CheckpointError, in one line, for files that are not a checkpoint, are damaged, dangerous, or hold
        something else; ValueError for a device or precision that is not there.
        """
        device = find_device(device)
        dtype = _dtype(dtype) if dtype is not None else best_dtype(device)
        path = resource(EMBEDDED) if path is None else path
        with load_checkpoint(path) as checkpoint:
            try:
                config = config or detect(checkpoint)
                states = convert(checkpoint, config, weights)
                networks = build(config)
                total = sum(math.prod(w.shape) for net in networks.values() for w in net.state_dict().values())
                for name, network in networks.items():
                    load_weights(
                        network, states[name], device, dtype, lambda n: progress(n, total) if progress else None
                    )
                check_schedule(checkpoint, config)
            except ValueError as error:
                raise named(path, error) from None
        return cls(config, **networks)

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Texts -> context (B, M, D). What does not fit into M tokens is cut, with a warning that says what."""
        ids = self.tokenizer(list(prompts)).to(self.device)
        with torch.no_grad():
            return self.text_encoder(ids)

    def denoiser(self, context: Tensor, uncond: Tensor | None = None, guidance: float = GUIDANCE) -> Denoiser:
        """The U-Net with guidance, as samplers want it; context and uncond (B, M, D)."""
        return Denoiser(self.unet, self.schedule, context, uncond, guidance)

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

        `noise` gives stochastic samplers their random numbers; `eta` is DDIM's, 0 if not given.
        """
        chosen = _sampler(sampler)
        options: dict[str, object] = {}
        if eta is not None:
            if chosen.stochastic != "eta":
                raise ValueError(f"eta is a setting of ddim, not of {chosen.label}")
            options["eta"] = eta
        if noise is None and chosen.stochastic == "always":
            raise ValueError(f"{chosen.label} draws noise in every step: give it `noise`")
        if noise is not None and chosen.stochastic != "never":
            options["noise"] = noise
        if chosen.midpoints:
            options["level_of_ratio"] = self.schedule.level_of_ratio
        return Steps(chosen.run(denoise, x, levels, **options), max(len(levels) - 1, 0))

    def decode(self, z: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) -> RGB pictures, one at a time, so that the memory needed is one picture's.

        Half precision can overflow in the VAE. A picture that comes out with NaN or infinity is decoded again in
        float32, with a warning; if it still does, that is an ArithmeticError: a black picture is never returned.
        """
        pictures = []
        for i in range(z.shape[0]):
            with torch.no_grad():
                image = self.vae.decode(z[i : i + 1].to(self.dtype))
                if not image.isfinite().all() and self.dtype != torch.float32:
                    warnings.warn(
                        f"a picture is not finite when decoded in {_name(self.dtype)}: decoding it again in float32",
                        stacklevel=2,
                    )
                    image = _in_float32(self.vae, z[i : i + 1])
                if not image.isfinite().all():
                    raise ArithmeticError(
                        "the picture is not finite (NaN) even when decoded in float32: the checkpoint may be damaged, "
                        "or the U-Net overflows in half precision: try float32 (--dtype)"
                    )
            pictures += to_pil(image)
        return pictures

    def txt2img(
        self,
        prompt: str | Sequence[str] | Tensor,
        negative: str = "",
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float = GUIDANCE,
        sampler: str = SAMPLER,
        spacing: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        n: int = 1,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Pictures of a text: n for each prompt, prompt by prompt; picture i of them all has the seed seed + i.

        prompt         a text, several, or contexts (B, M, D) from `encode_prompt`, which may be mixed
        negative       what to steer away from; without effect at guidance 1
        height, width  in pixels, multiples of the VAE's factor (8); the model's native size if not given
        steps          1 to 1000; the sampler's customary number if not given
        guidance       how strongly to follow the prompt: 0 not at all, 1 without exaggeration, 7.5 is customary
        sampler        a name of `samplers.SAMPLERS` or an alias, "DPM++ 2M Karras" for example
        spacing        grid of the levels, one of `schedule.SPACINGS`; the sampler's own if not given
        eta            DDIM's share of fresh noise in each step: 0 none, 1 as much as DDPM
        seed           0 to 2^64 - 1
        progress       wraps the iterator over steps, for example `tqdm`

        All pictures are made as one batch. Raises ValueError in one line for values that cannot be.
        """
        chosen = _sampler(sampler)
        seed, n = _whole("seed", seed), _whole("n", n)
        steps = None if steps is None else _whole("steps", steps)
        check_settings(chosen, guidance=guidance, eta=eta, seed=seed, n=n, steps=steps)
        self._check_plain()
        shape = self.latent_shape(height, width)
        levels = self.schedule.levels(chosen.steps if steps is None else steps, spacing or chosen.spacing)
        context = self._context(prompt) if isinstance(prompt, Tensor) else self.encode_prompt(_texts(prompt))
        context = context.to(self.device, self.dtype).repeat_interleave(n, dim=0)
        uncond = self.encode_prompt(_texts(negative)) if guidance != 1.0 else None
        denoise = self.denoiser(context, uncond, guidance)

        rngs = generators(seed, context.shape[0])
        x = draw(rngs, shape, self.device)  # unit noise, as in the original: at the first level sigma is 0.997
        run = self.sample(denoise, x, levels, chosen, eta=eta, noise=lambda x: draw(rngs, x.shape[1:], x.device))
        for step in progress(run) if progress is not None else run:
            x = step.x
        return self.decode(x)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; the model's native size where a side is not given."""
        factor = self.config.vae.factor
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = self.config.size if side is None else _whole(name, side)
            if side > MAX_SIDE:
                raise ValueError(f"{name} must be at most {MAX_SIDE}, got {side}")
            if side % factor or side < factor:
                lower, upper = max(side // factor, 1) * factor, max(-(-side // factor), 1) * factor
                near = f"{lower} or {upper}" if lower != upper else f"{lower}"
                raise ValueError(f"{name} must be a multiple of {factor}, got {side}: try {near}")
            sides.append(side // factor)
        return self.config.vae.latent_channels, sides[0], sides[1]

    def _context(self, context: Tensor) -> Tensor:
        M, D = self.config.text.length, self.config.text.width
        if context.dim() != 3 or context.shape[0] < 1 or tuple(context.shape[1:]) != (M, D):
            raise ValueError(f"a context must be (B, {M}, {D}), got {tuple(context.shape)}")
        return context

    def _check_plain(self) -> None:
        if self.config.unet.in_channels != self.config.vae.latent_channels:
            raise ValueError(
                f"{self.config.name} has a U-Net for {self.config.unet.in_channels} channels, which paints into a "
                "given picture: it cannot paint from text alone"
            )


def check_settings(
    sampler: Sampler, *, guidance: float, eta: float | None, seed: int, n: int, steps: int | None
) -> None:
    """Refuse, with a ValueError of one line, settings that no model can run with."""
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance}")
    if eta is not None and sampler.stochastic != "eta":
        raise ValueError(f"eta is a setting of ddim, not of {sampler.label}")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be from 0 to 2^64 - 1, got {seed}")
    if n < 1:
        raise ValueError(f"the number of pictures must be at least 1, got {n}")


def _whole(name: str, value: int) -> int:
    """Whole numbers of any kind (numpy's too) as int."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def _texts(prompt: str | Sequence[str]) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r}")
    return list(texts)


def _sampler(name: str | Sampler) -> Sampler:
    return name if isinstance(name, Sampler) else sampler(name)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"unknown precision {dtype!r}, expected one of {', '.join(DTYPES)}")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_float32(vae: nn.Module, z: Tensor) -> Tensor:
    """Decode with the VAE in float32, and put it back into the precision it came in."""
    dtype = next(vae.parameters()).dtype
    try:
        return vae.float().decode(z.float())
    finally:
        vae.to(dtype)
