"""Base and refiner as one run: the last steps of a run are taken by another model, SDXL's refiner.

Podell et al. 2023, "SDXL", section 2.5: a second model, trained on the low noise levels only, improves the images of
the first. There it adds noise to finished latents and removes it; here it can also take over the last steps. Both have
the same latent space and noise schedule, so they are one denoiser that is another network in the last steps
(`by_step`): the sampler keeps its history, and the noise of stochastic samplers goes on. Each model encodes the prompts
with its own text encoders, and is told its own sizes.

    levels     0 ... int(refiner_from * steps)           base
               int(refiner_from * steps) ... steps       refiner

The fraction is one of the whole grid, whatever the strength: then each network sees the noise levels that it was
trained for, also in image to image, where it may take all of the steps. On a grid that is even in timesteps this is
diffusers' `denoising_end` and the web UI's "Refiner switch at", which both cut at a timestep. On that of Karras the
last fifth of the steps are at timesteps below 20; the 200 lowest, on which the refiner was trained, are two fifths.

In high resolution the refiner takes the last steps of the second pass, which is the web UI's default. In inpainting it
keeps what is known as the base does; after a base of 9 channels it is given no mask, and what is kept of the image is
pasted into the result.

With `low_memory`, the networks of both models take turns on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .config import REFINER_SIZES, Config
from .denoiser import by_step
from .hires import HighResRun, second_pass
from .messages import counted
from .params import HighRes, ImageToImage, Inpaint, TextToImage
from .run import Run, Start
from .runtime.offload import Offload
from .second_prompts import for_refiner
from .size_conditioning import without_effect

if TYPE_CHECKING:
    from .pipeline import StableDiffusion

TRAINED = 200  # timesteps of the noise levels that SDXL's refiner was trained on
NOISES = ("steps", "beta_start", "beta_end", "zero_snr", "alpha_bar")  # what makes a noise level of a timestep


def check_fit(base: Config, refiner: Config) -> None:
    """Raise ValueError if a model of one config cannot continue the run of another."""
    for config, what in ((base, "the model"), (refiner, "the refiner")):
        if not config.sizes:
            raise ValueError(f"a refiner continues a run of an SDXL model, but {what} is {config.name}: leave it out")
    if refiner.is_inpainting:
        raise ValueError(
            f"the refiner is {refiner.name}, whose U-Net needs a mask in every step: use one with "
            f"{refiner.vae.latent_channels} input channels"
        )
    for name in ("latent_channels", "factor", "scale"):
        ours, theirs = getattr(base.vae, name), getattr(refiner.vae, name)
        if ours != theirs:
            label = {"latent_channels": "number of channels", "factor": "reduction"}.get(name, name)
            raise ValueError(
                f"the refiner does not fit the model: the {label} of its latents is {theirs:g}, of the model's {ours:g}"
            )
    if any(getattr(base.schedule, name) != getattr(refiner.schedule, name) for name in NOISES):
        raise ValueError("the refiner does not fit the model: it was trained with another noise schedule")


def notes_on(request: TextToImage, configs: Sequence[Config]) -> list[str]:
    """Notes on what a request asks of SDXL models: of the model, and of its refiner if there is one."""
    notes = without_effect(request.params, configs)
    from_noise = not isinstance(request, ImageToImage | Inpaint) or request.strength == 1
    if from_noise and configs[0].sizes == REFINER_SIZES:
        notes.append(
            f"{configs[0].name} was trained on low noise only: an image that it makes from pure noise does not look "
            "right. Use it for image to image at a low strength, or for the last steps of another model"
        )
    return notes


def with_refiner(run: Run, refiner: StableDiffusion) -> Run:
    """A run that has not taken a step, with the refiner for its last steps. Raises ValueError if it does not fit."""
    model, request, params = run.model, run.request, run.params
    check_fit(model.config, refiner.config)
    if refiner.device != model.device:
        raise ValueError(f"the refiner is on {refiner.device}, the model on {model.device}: load both on one device")
    target, strength, first_pass = run, 1.0, 0
    if isinstance(run, HighResRun) and isinstance(request, HighRes):
        target, first_pass = run.second, params.steps
        _, strength = second_pass(request, params, model.schedule.steps)
    elif isinstance(request, ImageToImage | Inpaint):
        strength = request.strength
    if not len(target):
        return run
    whole = model.schedule.levels(target.params.steps, target.params.spacing)
    steps = len(whole) - 1
    first = max(int(steps * params.refiner_from + 1e-9) - (steps - len(target)), 0)  # of the steps that are taken
    if first >= len(target):
        run.notes.append(
            f"refiner_from {params.refiner_from:g} of {counted(steps, 'step')} leaves no steps to the refiner"
        )
        return run
    t = target.levels[first].t
    if refiner.config.sizes == REFINER_SIZES and t < TRAINED / 2:
        share = sum(level.t >= TRAINED for level in whole[:-1]) / steps
        run.notes.append(
            f"with spacing {target.params.spacing}, refiner_from {params.refiner_from:g} leaves the refiner only "
            f"timesteps up to {t:.0f}; it was trained on all below {TRAINED}, for which refiner_from is {share:.2g}"
        )
    if not first:
        run.notes.append(f"the refiner takes all {counted(len(target), 'step')}")
    C, h, w = run.shape if isinstance(run, HighResRun) else run.start.x.shape[1:]
    notes: list[str] = []
    theirs = for_refiner(request, refiner.config)
    other = Run(refiner, theirs, target.params, notes, (C, h, w), strength, first_pass)
    own = other.denoiser((C, h, w))
    run.notes += [f"refiner: {note}" for note in notes if note not in run.notes]
    if isinstance(model._networks, Offload) and isinstance(refiner._networks, Offload):
        model._networks.take_turns_with(refiner._networks)

    def refine(start: Start) -> Start:
        each = [start.denoise] * first + [start.hold(own)] * (len(target) - first)
        return start._replace(denoise=by_step(each, target.levels))

    if isinstance(run, HighResRun):
        run.refine = refine
        return run
    return run.begin(refine(run.start))
