"""Checkpoints that were distilled to few steps: what in a file or folder says so, and the defaults that follow.

In order of precedence:

    the U-Net            an embedding of the guidance scale, `cond_proj`: a latent consistency model
    the scheduler        of a folder: LCM's or TCD's, or one with trailing timesteps, as Turbo and Hyper-SD use. Not
                         LCM's, if the name is that of a one-step model with a timestep of its own
    what it is called    title in the metadata, name of the file, folder or repository: few_step.py has the words

SD-Turbo has the keys and shapes of Stable Diffusion 2.1, SDXL-Turbo and SDXL-Lightning those of SDXL, and merged LoRAs
leave no trace at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import BASE_SIZES, SD2, Config
from ..few_step import (
    LCM,
    LCM_GUIDED,
    LIGHTNING,
    SD,
    TCD,
    TITLES,
    TURBO,
    TURBO_XL,
    XL,
    FewStep,
    first_named,
    of_config,
)
from ..schedule import LCM_TIMESTEPS
from .checkpoint import CheckpointError
from .folders import model_name
from .hub_cache import repository
from .layouts import AVERAGE, Layout

if TYPE_CHECKING:
    from torch import Tensor

KEY = "guidance.weight"  # our name of the layer in the U-Net
LCM_WIDTH = 256  # of the embedding in published models
SCHEDULER = "scheduler/scheduler_config.json"
SIZES = {TURBO_XL.label: 512}  # native size in pixels, where it is not that of the model that was distilled
X0 = re.compile(r"(?<![a-z\d])x0(?![a-z\d])", re.IGNORECASE)

# diffusers' classes that say which sampler a model was distilled for, ...
FEW_STEP_SCHEDULERS = {"LCMScheduler": LCM, "TCDScheduler": TCD}
# ... those that say it with trailing timesteps, and the sampler that each is here, ...
TRAILING_SCHEDULERS = {
    "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_a", "DDIMScheduler": "ddim",
}  # fmt: skip
# ... and others, which choose a sampler for any model. That is the caller's choice here.
OTHER_SCHEDULERS = (
    "DDIMParallelScheduler", "DDIMInverseScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler", "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


def with_guidance(config: Config, found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> Config:
    """The config with the width of the guidance scale's embedding, if the U-Net in the file has one."""
    layout = layouts.get("unet") or layouts.get(AVERAGE)
    if layout is None or config.unet.guidance is not None:
        return config
    told = replace(config, unet=replace(config.unet, guidance=LCM_WIDTH))
    (source,) = layout.sources(told, [KEY], found).values()
    shape = found.get(source.key, ())
    return config if len(shape) != 2 else replace(config, unet=replace(config.unet, guidance=shape[1]))


def with_defaults(tensors: Mapping[str, Tensor], config: Config) -> tuple[Config, str]:
    """The config with the defaults of a few-step model, and a line that says them; the same and "" for another.

    Raises CheckpointError for the SDXL-Lightning model that predicts x0, by its name.
    """
    scheduler = getattr(tensors, "configs", {}).get("scheduler", {})
    if config.unet.guidance is not None:
        said = FEW_STEP_SCHEDULERS.get(str(scheduler.get("_class_name")), LCM)
        guided = replace(LCM_GUIDED, label=said.label, sampler=said.sampler)
        return _with(guided, config, "its U-Net takes the guidance scale as an input")
    kind = _by_scheduler(scheduler, config)
    names = [*_names(tensors)]
    named = first_named(names, XL if _is_xl_base(config) else SD)
    if kind == LCM and named is not None and named[0].one_step_at is not None:
        kind = None  # a scheduler of LCM has no place for that timestep
    if kind is not None:
        return _with(kind, config, "its scheduler_config.json says so")
    if named is not None and (named[0].label != TURBO.label or _is_sd2_base(config)):
        kind, place = named
        if kind.label == LIGHTNING.label and any(X0.search(name) for _, name in names):
            raise CheckpointError(
                "this is the SDXL-Lightning model that predicts x0 (its name says so): only eps and v are supported, "
                "so take the one for 2, 4 or 8 steps"
            )
        return _with(kind, replace(config, size=SIZES.get(kind.label, config.size)), f"{place} says so")
    if _is_trailing(scheduler, config):
        config = replace(config, sampler=TRAILING_SCHEDULERS[scheduler["_class_name"]], spacing="trailing")
        return config, f"its scheduler_config.json asks for the sampler {config.sampler} with trailing timesteps"
    return config, ""


def own_defaults(config: Config) -> str:
    """The line about a few-step model that carries its config."""
    kind = of_config(config)
    return "" if kind is None else f"{kind.described('model')}: {kind.settings()}"


def _with(kind: FewStep, config: Config, why: str) -> tuple[Config, str]:
    return kind.applied(config), f"{kind.described('model')} ({why}): {kind.settings()}"


def _by_scheduler(raw: Mapping[str, Any], config: Config) -> FewStep | None:
    """The kind that a folder's scheduler means. Trailing timesteps alone mean Turbo only for a network like Turbo's.

    The network of SDXL-Turbo has a native size of 512 pixels (`sample_size`), that of SDXL 1024.
    """
    if (kind := FEW_STEP_SCHEDULERS.get(str(raw.get("_class_name")))) is not None:
        return kind
    if _is_trailing(raw, config) and raw["_class_name"] != "DDIMScheduler":
        of_xl = _is_xl_base(config) and config.size == SIZES[TURBO_XL.label]
        turbo = TURBO if _is_sd2_base(config) else TURBO_XL if of_xl else None
        return turbo and replace(turbo, sampler=TRAILING_SCHEDULERS[raw["_class_name"]])
    return None


def _is_trailing(raw: Mapping[str, Any], config: Config) -> bool:
    """Whether timesteps are trailing, and not because the noise schedule ends in pure noise."""
    return (
        str(raw.get("_class_name")) in TRAILING_SCHEDULERS
        and raw.get("timestep_spacing") == "trailing"
        and not config.schedule.to_noise
    )


def _is_xl_base(config: Config) -> bool:
    """Whether a model has the parts of SDXL base, of which SDXL-Turbo, SDXL-Lightning and others were made."""
    return config.sizes == BASE_SIZES and config.schedule.prediction == "eps"


def _is_sd2_base(config: Config) -> bool:
    """Whether a model has the parts of SD 2.x base, of which SD-Turbo was made."""
    usual = (SD2.unet.context, SD2.unet.in_channels, SD2.schedule.prediction)
    return usual == (config.unet.context, config.unet.in_channels, config.schedule.prediction)


def _names(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """What a checkpoint is called, and where."""
    metadata, configs = getattr(tensors, "metadata", {}), getattr(tensors, "configs", {})
    for title in TITLES:
        yield f"its metadata ({title})", str(metadata.get(title, ""))
    for part in ("index", "unet"):
        yield f"the name in its {part} settings", str(configs.get(part, {}).get("_name_or_path", ""))
    if (path := getattr(tensors, "path", None)) is not None:
        yield "its name", model_name(path)
        yield "the name of its repository", repository(path) or ""


def notes_on_scheduler(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line for a scheduler that is unknown here, and for a training grid that another one is used for."""
    raw = configs.get("scheduler", {})
    name = raw.get("_class_name")
    if name is not None and name not in (*FEW_STEP_SCHEDULERS, *TRAILING_SCHEDULERS, *OTHER_SCHEDULERS):
        yield f"{SCHEDULER} names {str(name)!r:.100}, which is unknown: using the model's default sampler"
    grid = raw.get("original_inference_steps", LCM_TIMESTEPS)  # diffusers' name of the number of these
    if name in FEW_STEP_SCHEDULERS and grid != LCM_TIMESTEPS:
        yield f"{SCHEDULER} has original_inference_steps {grid!r:.50}, which is not supported: using {LCM_TIMESTEPS}"


def scheduler_to_diffusers(config: Config) -> dict[str, Any]:
    """The entries of a scheduler_config.json that `with_defaults` reads, for the default sampler of a config."""
    name = next((name for name, kind in FEW_STEP_SCHEDULERS.items() if kind.sampler == config.sampler), None)
    if name is not None:
        own = {
            "original_inference_steps": LCM_TIMESTEPS,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_scaling": 10.0,
        }
        return {"_class_name": name, **own}
    trailing = {sampler: name for name, sampler in TRAILING_SCHEDULERS.items()}
    if config.spacing == "trailing" and config.sampler in trailing:
        return {"_class_name": trailing[config.sampler], "timestep_spacing": "trailing"}
    return {}
