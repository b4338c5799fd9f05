"""Sampling for the studies: all images start from the same noise, so that they differ only in what is studied.

>>> model = StableDiffusion.load()
>>> settings = replace(SETTINGS, steps=2, seed=3)  # guidance: the model's own
>>> for step in run(model, model.conditioning(["a red house", "a blue house"]), settings):
...     print(step.i, tuple(step.x.shape))
0 (2, 4, 16, 16)
1 (2, 4, 16, 16)
>>> generate(model, ["a red house"], settings)[0].size
(128, 128)

`StableDiffusion.txt2img` gives each image of a batch its own seed; here they share one.

SDXL is told more than a context (prompts.py), so the studies pass on what `StableDiffusion.conditioning` returns. The
contexts of `encode_prompt` do for other models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image
from torch import Tensor

from ..conditioning import Conditioning
from ..denoiser import Denoiser
from ..noise import draw, generators
from ..params import SamplingParams
from ..pipeline import StableDiffusion
from ..samplers import Denoise, Sampler, Step, spacing_in
from ..schedule import Levels
from ..size_conditioning import sizes_for

# fast, deterministic, and from pure noise to clean data
SETTINGS = SamplingParams(sampler="ddim", steps=20, spacing="trailing", seed=1)
PLAIN = replace(SETTINGS, guidance=1.0)  # the network's own prediction


def noise(model: StableDiffusion, settings: SamplingParams = SETTINGS, n: int = 1) -> Tensor:
    """The initial noise of the settings' seed, repeated n times: (n, C, h, w) at the model's native size."""
    return draw(generators(settings.seed, 1), model.latent_shape(), model.device).repeat(n, 1, 1, 1)


def levels(model: StableDiffusion, settings: SamplingParams = SETTINGS) -> Levels:
    """The step grid of the settings. Raises ValueError if they have no steps or no spacing."""
    if settings.steps is None or settings.spacing is None:
        raise ValueError("settings of a study need steps and spacing")
    return model.schedule.levels(settings.steps, settings.spacing, one_step_at=model.defaults.one_step_at)


def spacing_of(sampler: str | Sampler, usual: str | None) -> str | None:
    """The step grid in a sampler's name ("DPM++ 2M Karras"), or `usual` if it has none.

    >>> spacing_of("DPM++ 2M Karras", "trailing"), spacing_of("dpmpp_2m", "trailing")
    ('karras', 'trailing')
    """
    return spacing_in(sampler) or usual


def guidance_of(model: StableDiffusion, settings: SamplingParams = SETTINGS) -> float:
    """The guidance scale of the settings, or else the default of the model."""
    return model.defaults.guidance if settings.guidance is None else settings.guidance


def unconditional(model: StableDiffusion, negative: str = "") -> Conditioning:
    """The conditioning of the negative prompt for one image, from which guidance leads away.

    As in a run of the pipeline, an empty one is zeros for models that were trained so (`Config.zero_empty`).
    """
    size = model.config.size
    cond = model.conditioning([negative], sizes_for(model.config, SamplingParams(), size, size, negative=True))
    return model.zeroed(cond, [not negative.strip()]) if model.config.zero_empty else cond


def denoiser(
    model: StableDiffusion, cond: Tensor | Conditioning, settings: SamplingParams = SETTINGS, negative: str = ""
) -> Denoiser:
    """The guided denoiser for contexts (B, M, D), or for conditionings of B prompts."""
    scale = guidance_of(model, settings)
    uncond = unconditional(model, negative) if scale != 1.0 else None
    concat = model.blank_concat(model.latent_shape()) if model.is_inpainting else None
    cond = Conditioning(cond) if isinstance(cond, Tensor) else cond
    return model.denoiser(cond.to(model.device, model.dtype), uncond, scale, concat)


def sample(model: StableDiffusion, denoise: Denoise, x: Tensor, settings: SamplingParams = SETTINGS) -> Iterator[Step]:
    """The steps from x (B, C, h, w) at the first level to clean data; all B share the noise of stochastic samplers."""
    rngs = [generators(settings.seed, 1)[0] for _ in range(x.shape[0])]
    draw(rngs, x.shape[1:], x.device)  # skip the initial noise
    return model.sample(
        denoise,
        x,
        levels(model, settings),
        settings.sampler,
        **settings.options,
        noise=lambda x: draw(rngs, x.shape[1:], x.device),
    )


def run(
    model: StableDiffusion,
    cond: Tensor | Conditioning,
    settings: SamplingParams = SETTINGS,
    x: Tensor | None = None,
    negative: str = "",
) -> Iterator[Step]:
    """The sampling steps for the conditioning of B prompts, from the same noise or from x (B, C, h, w).

    cond   of `conditioning`; for models other than SDXL, the contexts (B, M, D) of `encode_prompt` are enough. Raises
           ValueError for anything else
    """
    context = cond.context if isinstance(cond, Conditioning) else cond
    if not isinstance(context, Tensor) or context.dim() != 3:
        got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"expected contexts (B, M, D) of encode_prompt, or a conditioning, got {got}")
    if isinstance(cond, Tensor) and model.config.unet.vector is not None:
        raise ValueError(
            f"{model.config.name} needs a vector in addition to the contexts: model.conditioning(prompts) has both"
        )
    x = noise(model, settings, context.shape[0]) if x is None else x
    return sample(model, denoiser(model, cond, settings, negative), x, settings)


def last(steps: Iterator[Step]) -> Tensor:
    """Run all steps and return the final x (B, C, h, w). Raises ValueError if there are no steps."""
    x = None
    for step in steps:
        x = step.x
    if x is None:
        raise ValueError("the run has no steps")
    return x


def generate(
    model: StableDiffusion,
    prompts: str | Sequence[str] | Tensor | Conditioning,
    settings: SamplingParams = SETTINGS,
    x: Tensor | None = None,
) -> list[Image.Image]:
    """Generate images of prompts, conditionings or contexts (B, M, D), from the same noise or from x (B, C, h, w)."""
    cond = prompts if isinstance(prompts, Tensor | Conditioning) else model.conditioning(prompts)
    return model.decode(last(run(model, cond, settings, x)))
