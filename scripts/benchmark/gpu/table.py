"""The times: 50 steps of DDIM with guidance, a whole image, the decoder, the text encoder; ours and diffusers.

Images by 4 steps of LCM without guidance, with the VAE and with a tiny autoencoder (TAESD), and the decoder of the
latter come with them. All programs use the same random weights, in float16 at the model's native size. Steps are
measured from the initial noise to the last latents, without text encoder and decoder; the device is synchronised before
and after. A row is the median of up to three runs after a warm-up, with the peak memory of warm-up and runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sd.config import POCKET, SD1, Config
from sd.noise import draw, generators
from sd.pipeline import StableDiffusion
from sd.runtime.cuda_graphs import Compiled, Recorded
from sd.runtime.device import dtype_name

from .. import references
from ..cases import GUIDANCE, PROMPTS
from ..cases import config_of as config_of_part
from ..peak import timed
from ..weights import Setup, load_networks
from .models import Place

RUNS, ENOUGH = 3, 12.0  # runs at most; seconds after which no further run starts
STEPS, TRIAL_STEPS, WARM_UP_STEPS = 50, 2, 2
LCM_STEPS = 4  # and no guidance
LCM = ("image, LCM", "image, LCM and TAESD")  # `LCM_STEPS` without guidance
IMAGES, DECODERS = ("image", *LCM), ("decoder", "TAESD decoder")
TINY = ("image, LCM and TAESD", "TAESD decoder")  # with the tiny autoencoder
EXTRA = ("image", "decoder", "text", *LCM, "TAESD decoder")
# "max-autotune" tries many kernels for each matrix product, which takes minutes
OVERHEAD, AUTOTUNE = "reduce-overhead", "max-autotune"


class Row(NamedTuple):
    """A measurement of `what` for `images` images: program "ours" or "diffusers"; way "eager", "recorded", ..."""

    what: str
    images: int
    program: str
    way: str

    @property
    def title(self) -> str:
        """The row in words."""
        return f"{self.what}, {self.images} image{'s' if self.images > 1 else ''}: {self.program}, {self.way}"


def config_of(place: Place) -> Config:
    """The model that is measured."""
    return POCKET if place.trial else SD1


def steps_of(place: Place) -> int:
    """The number of steps of a run."""
    return TRIAL_STEPS if place.trial else STEPS


class Timer:
    """Measures rows in its own process: networks on the device, and one `way` at a time."""

    def __init__(self, place: Place) -> None:
        self.place, self.device, self.config = place, torch.device(place.device), config_of(place)
        torch.set_num_threads(place.threads)
        torch.set_grad_enabled(False)
        dtype = dtype_name(place.dtype)
        setup = Setup(self.config, None, self.device, dtype, place.threads, place.folder)
        self.networks: dict[str, Any] = self.build(setup, self.config.networks)
        self.tiny: dict[str, Any] = self.build(setup.of_part("taesd"), ["vae"])  # the tiny autoencoder

    def build(self, setup: Setup, names: Sequence[str]) -> dict[str, Any]:
        """Networks on the device."""
        return dict(load_networks(setup, names))

    def do(self, row: Row) -> dict[str, Any]:
        """Seconds of each run, peak memory in bytes (None on CPUs), and the final latents of one image's steps."""
        self.free()
        start = perf_counter()
        call = self.call(row)
        out = call(True)  # the warm-up
        prepared = perf_counter() - start
        runs, result = list[float](), None
        start = perf_counter()
        while not runs or (len(runs) < (1 if self.place.trial else RUNS) and perf_counter() - start < ENOUGH):
            seconds, out = timed(partial(call, False), self.device)
            runs.append(seconds)
        if isinstance(out, Tensor) and row.what == "steps" and row.images == 1:
            result = out.float().cpu().numpy()
        return {
            "seconds": median(runs),
            "runs": runs,
            "warm_up": prepared,
            "tensors": torch.cuda.max_memory_allocated(self.device) if self.place.cuda else None,
            "reserved": torch.cuda.max_memory_reserved(self.device) if self.place.cuda else None,
            "result": result,
        }

    def free(self) -> None:
        """Return unused memory, that of the previous mode too, and reset the peak."""
        self.forget()
        gc.collect()
        if self.place.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def forget(self) -> None:
        """Drop what the previous way has recorded or compiled."""
        raise NotImplementedError

    def call(self, row: Row) -> Callable[[bool], Any]:
        """The function to measure. Its argument says whether it is the warm-up, which has fewer steps."""
        raise NotImplementedError

    def noise(self, images: int) -> Tensor:
        """The initial noise (B, C, h, w), the same for all programs."""
        side = self.config.size // self.config.vae.factor
        return draw(generators(0, images), (self.config.vae.latent_channels, side, side), self.device)

    def steps(self, warm_up: bool, what: str = "steps") -> int:
        """How many steps to take."""
        return WARM_UP_STEPS if warm_up else LCM_STEPS if what in LCM else steps_of(self.place)


class Ours(Timer):
    """This project. Ways: eager, recorded (the default on CUDA), recorded with cudnn.benchmark, compiled."""

    @cached_property
    def model(self) -> StableDiffusion:
        """The pipeline."""
        return StableDiffusion(self.config, **self.networks)

    @cached_property
    def with_tiny_vae(self) -> StableDiffusion:
        """The same with the tiny autoencoder."""
        return StableDiffusion(config_of_part("taesd", self.config), **self.networks | self.tiny)

    def forget(self) -> None:
        """See `Timer.forget`."""
        self.model._fast_unet = self.with_tiny_vae._fast_unet = None

    def call(self, row: Row) -> Callable[[bool], Any]:
        """See `Timer.call`."""
        model, way = self.with_tiny_vae if row.what in TINY else self.model, row.way
        torch.backends.cudnn.benchmark = way == "recorded, cudnn.benchmark"
        if way in (OVERHEAD, AUTOTUNE):
            model._fast_unet = Compiled(model.unet, mode=way)
        elif way.startswith("recorded"):
            model._fast_unet = Recorded(model.unet)
        x = self.noise(row.images)
        if row.what in DECODERS:
            return lambda warm_up: model.decode(x)
        if row.what == "text":
            return lambda warm_up: model.encode_prompt(PROMPTS)
        if row.what in IMAGES:
            settings: dict[str, Any] = {"n": row.images, "guidance": GUIDANCE, "sampler": "ddim", "seed": 0}
            settings |= {"guidance": 1.0, "sampler": "lcm"} if row.what in LCM else {}
            return lambda warm_up: model.txt2img(*PROMPTS, steps=self.steps(warm_up, row.what), **settings)
        cond, uncond = model.encode_prompt(PROMPTS).chunk(2)
        denoise = model.denoiser(cond, uncond, GUIDANCE)

        def run(warm_up: bool) -> Tensor:
            *_, last = model.sample(denoise, x, model.schedule.levels(self.steps(warm_up), "leading"), "ddim")
            return last.x

        return run


class Diffusers(Timer):
    """The pipeline of diffusers, with channels-last convolutions. Ways: eager, compiled (its U-Net)."""

    def build(self, setup: Setup, names: Sequence[str]) -> dict[str, Any]:
        """The networks of diffusers with our weights."""
        references.libraries()
        return references.peers(super().build(setup, names), setup.config, setup.torch_dtype)

    def forget(self) -> None:
        """See `Timer.forget`."""
        self.networks["unet"].model._compiled_call_impl = None

    def call(self, row: Row) -> Callable[[bool], Any]:
        """See `Timer.call`."""
        networks, few = self.networks | (self.tiny if row.what in TINY else {}), row.what in LCM
        text, vae, unet = (networks[name] for name in ("text_encoder", "vae", "unet"))
        if row.way in (OVERHEAD, AUTOTUNE):
            unet.model.compile(dynamic=False, mode=row.way)
        x, pipe = self.noise(row.images).to(self.place.dtype), references.pipeline(networks, self.config)
        if few:
            pipe.scheduler = references.scheduler(self.config, "LCMScheduler")
        from sd.text.tokenizer import Tokenizer

        tokenizer = Tokenizer(length=self.config.text[0].length, pad=self.config.text[0].pad)
        if row.what in DECODERS:
            return lambda warm_up: pipe.image_processor.postprocess(vae.decode(x), output_type="pil")
        if row.what == "text":
            return lambda warm_up: text(tokenizer(list(PROMPTS)).to(self.device))

        prompts = list(PROMPTS[:1] if few else PROMPTS)

        def run(warm_up: bool, encoded: Tensor | None = None, kind: str = "pil") -> Any:
            encoded = text(tokenizer(prompts).to(self.device)) if encoded is None else encoded
            cond, *uncond = (part.expand(row.images, -1, -1) for part in encoded.split(1))
            return pipe(
                prompt_embeds=cond, negative_prompt_embeds=None if few else uncond[0],
                num_inference_steps=self.steps(warm_up, row.what), guidance_scale=1.0 if few else GUIDANCE,
                height=self.config.size, width=self.config.size, latents=x, output_type=kind,
            ).images  # fmt: skip

        if row.what in IMAGES:
            return run
        return partial(run, encoded=text(tokenizer(list(PROMPTS)).to(self.device)), kind="latent")


PROGRAMS: dict[str, type[Timer]] = {"ours": Ours, "diffusers": Diffusers}


def without_peer() -> str | None:
    """Why diffusers cannot run here; None if it can."""
    gone = references.missing()
    return f"{' and '.join(gone)} not installed (pip install {' '.join(gone)})" if gone else None


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b| of final latents: rounding, amplified by guidance and steps."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
