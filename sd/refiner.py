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
So by default SDXL's refiner takes the steps from timesteps below 200, at least the last one: on even grids this is the
fraction 0.8, which is the default for other models.

With a second pass at high resolution (`HighRes`), the refiner takes its last steps, which is the web UI's default. In
inpainting it keeps the known part as the base does; after a base of 9 channels it is given no mask, and the known part
is pasted into the result.

With `low_memory`, the networks of both models take turns on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .config import Config, VAEConfig
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
    from .schedule import Levels

TRAINED = 200  # timesteps of the noise levels that SDXL's refiner was trained on
SWITCH = 0.8  # the default for other models
NOISES = ("steps", "beta_start", "beta_end", "zero_snr", "alpha_bar")  # what determines the noise level of a timestep


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
    names = ["latent_channels", "factor"]
    if isinstance(base.vae, VAEConfig) and isinstance(refiner.vae, VAEConfig):
        names.append("scale")  # a tiny autoencoder has the latents of the U-Net, and no scale of its own
    for name in names:
        ours, theirs = getattr(base.vae, name), getattr(refiner.vae, name)
        if ours != theirs:
            label = {"latent_channels": "number of channels", "factor": "reduction"}.get(name, name)
            raise ValueError(
                f"the refiner does not fit the model: the {label} of its latents is {theirs:g}, of the model's {ours:g}"
            )
    if any(getattr(base.schedule, name) != getattr(refiner.schedule, name) for name in NOISES):
        raise ValueError("the refiner does not fit the model: it was trained with another noise schedule")


def check_models(base: StableDiffusion, refiner: StableDiffusion) -> None:
    """Raise ValueError if a model cannot continue the run of another: `check_fit`, and one device for both."""
    if not isinstance(getattr(refiner, "config", None), Config):
        raise ValueError(f"refiner must be a model, such as StableDiffusion.load(FILE) gives, got {refiner!r:.100}")
    check_fit(base.config, refiner.config)
    if refiner.device != base.device:
        raise ValueError(f"the refiner is on {refiner.device}, the model on {base.device}: load both on one device")


def notes_on(request: TextToImage, configs: Sequence[Config]) -> list[str]:
    """Notes on what a request asks of SDXL models: of the model, and of its refiner if there is one."""
    notes = without_effect(request.params, configs)
    from_noise = not isinstance(request, ImageToImage | Inpaint) or request.strength == 1
    if from_noise and configs[0].is_refiner:
        notes.append(_from_noise(configs[0]))
    return notes


def _from_noise(config: Config) -> str:
    return (
        f"{config.name} was trained on low noise only: an image that it makes from pure noise does not look "
        "right. Use it for image to image at a low strength, or for the last steps of another model"
    )


def switch_after(levels: Levels, fraction: float | None, refiner: Config) -> int:
    """How many steps of a whole grid the base takes; `fraction` is `refiner_from`."""
    steps = len(levels) - 1
    if fraction is None and refiner.is_refiner:
        return min(_not_trained_on(levels), steps - 1)
    return int(steps * (SWITCH if fraction is None else fraction) + 1e-9)


def _not_trained_on(levels: Levels) -> int:
    """How many steps of a grid are above those that SDXL's refiner was trained on."""
    return sum(level.t >= TRAINED for level in levels[:-1])


def with_refiner(run: Run, refiner: StableDiffusion) -> Run:
    """A run that has not taken a step, with the refiner for its last steps; `check_models` has found that it fits."""
    model, request, params = run.model, run.request, run.params
    target, strength, first_pass = run, 1.0, 0
    if isinstance(run, HighResRun) and isinstance(request, HighRes):
        target, first_pass = run.second, params.steps
        _, strength = second_pass(request, params, model.schedule.steps)
    elif isinstance(request, ImageToImage | Inpaint):
        strength = request.strength
    if not len(target):
        return run
    whole = model.schedule.levels(target.params.steps, target.params.spacing)
    if len(target) == len(whole) - 1:  # another grid, with the spacing lcm
        whole = target.levels
    steps = len(whole) - 1
    switch = switch_after(whole, params.refiner_from, refiner.config)
    if not switch and strength == 1 and params.refiner_from != 0:
        switch = 1  # the base takes the first step, from pure noise
    share = switch / steps if params.refiner_from is None else params.refiner_from
    params = run.params = replace(params, refiner_from=share)  # for the metadata
    first = max(switch - (steps - len(target)), 0)  # of the steps that are taken
    if first >= len(target):
        run.notes.append(f"refiner_from {share:g} of {counted(steps, 'step')} leaves no steps to the refiner")
        return run
    t, trained = target.levels[first].t, _not_trained_on(whole)
    if refiner.config.is_refiner and t < TRAINED / 2 and switch > trained:
        run.notes.append(
            f"with spacing {target.params.spacing}, refiner_from {share:g} leaves the refiner only timesteps up to "
            f"{t:.0f}; it was trained on all below {TRAINED}, for which refiner_from is "
            f"{trained / steps:.2g}"
        )
    if not first and strength == 1 and refiner.config.is_refiner:
        run.notes.append(_from_noise(refiner.config))
    if not first:
        run.notes.append(f"the refiner takes all {counted(len(target), 'step')}")
    if isinstance(model._networks, Offload) and isinstance(refiner._networks, Offload):
        model._networks.take_turns_with(refiner._networks)  # before it encodes the prompts
    C, h, w = run.shape if isinstance(run, HighResRun) else run.start.x.shape[1:]
    notes: list[str] = []
    theirs = for_refiner(request, refiner.config)
    other = Run(refiner, theirs, target.params, notes, (C, h, w), strength, first_pass)
    own = other.denoiser((C, h, w))
    run.notes += [f"refiner: {note}" for note in notes if note not in run.notes]

    def refine(start: Start) -> Start:
        each = [start.denoise] * first + [start.hold(own)] * (len(target) - first)
        return start._replace(denoise=by_step(each, target.levels))

    if isinstance(run, HighResRun):
        run.refine = refine
        return run
    return run.begin(refine(run.start))
