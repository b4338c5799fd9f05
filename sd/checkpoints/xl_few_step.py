"""SDXL checkpoints that were distilled to few steps, by what they are called: their customary settings.

    SDXL-Turbo       Sauer et al. 2023 (arXiv:2311.17042): 1 to 4 steps without guidance at 512x512
    SDXL-Lightning   Lin et al. 2024 (arXiv:2402.13929): a U-Net or a whole checkpoint for 1 (x0), 2, 4 or 8 steps
    DMD2             Yin et al. 2024 (arXiv:2405.14867): a U-Net for 4 steps at the timesteps 999, 749, 499 and 249
    merges           fine-tunes of SDXL mixed with Turbo or Lightning, which people run with DPM++ SDE and weak guidance

Consistency models and Hyper-SD are called as those of Stable Diffusion 1.x are: few_step.py. The settings are those of
the model cards of stabilityai/sdxl-turbo, ByteDance/SDXL-Lightning, ByteDance/Hyper-SD and tianweiy/DMD2; of merges,
those that the cards of DreamShaper XL, TurboVision XL and Juggernaut XL have in common.

>>> xl_named("sdxl_lightning_4step_unet")[0].settings()
'4 steps, sampler euler, guidance 1'
>>> xl_named("sd_xl_base_1.0") is None
True
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from ..config import BASE_SIZES, Config
from ..few_step import DMD, LIGHTNING, MOST_STEPS, STEPS, TURBO_XL, FewStep, named
from .checkpoint import CheckpointError

TURBO_SIZE = 512  # pixels, the native size of SDXL-Turbo
XL_ONLY = (TURBO_XL.label, LIGHTNING.label, DMD.label)  # which no other family has
MERGED = FewStep("Turbo or Lightning", "dpmpp_sde", "karras", 8, (4, 8), 2.0, (1.0, 3.0))

MERGE = re.compile(r"((?<![A-Za-z])(?i:turbo|lightning)|(?<=[a-z])(Turbo|Lightning)|(?i:xl(turbo|lightning)))(?![a-z])")
NAME = r"(sd|stable[ _-]?diffusion)[ _-]?xl([ _-]v?\d[._]\d)?"
# A name's words and the kind that they mean; the first match counts. Merges have names such as "v9Rdphoto2Lightning".
XL_WORDS = (
    (re.compile(NAME + r"[ _-]?turbo(?![a-z])", re.IGNORECASE), TURBO_XL),
    (re.compile(NAME + r"[ _-]?lightning(?![a-z])", re.IGNORECASE), LIGHTNING),
    (re.compile(r"(?<![a-z])dmd2(?![a-z\d])", re.IGNORECASE), DMD),
    (MERGE, MERGED),
)
HYPER = re.compile(r"hyper[ _-]?sd", re.IGNORECASE)
X0 = re.compile(r"(?<![a-z\d])x0(?![a-z\d])", re.IGNORECASE)


class XLFewStep(NamedTuple):
    """The settings of a kind; its native size, if that is not SDXL's; and what else to say, after a semicolon."""

    kind: FewStep
    size: int | None = None
    remark: str = ""


def is_xl_base(config: Config) -> bool:
    """Whether a model has the parts of SDXL base, of which these are made."""
    return config.sizes == BASE_SIZES and config.schedule.prediction == "eps"


def xl_named(name: str) -> XLFewStep | None:
    """The kind of few-step SDXL model that a name means, with the number of steps in it; None for any other name.

    Raises CheckpointError for one that predicts x0.
    """
    kind = next((kind for pattern, kind in XL_WORDS if pattern.search(name)), None)
    found = STEPS.search(name.lower())
    steps = int(found[1]) if found else 0
    if kind is LIGHTNING and X0.search(name):
        raise CheckpointError(
            "this is the SDXL-Lightning model that predicts x0 (its name says so): only eps and v are supported, so "
            "take the one for 2, 4 or 8 steps"
        )
    if kind is None:
        other = named(name)
        if other is None or other.label == "SD-Turbo":
            return None
        return XLFewStep(other, remark=_one_step(800) if HYPER.search(name) and steps == 1 else "")
    if kind is DMD and steps == 1:
        return XLFewStep(replace(kind, steps=1, range=(1, 1)), remark=_one_step(399))
    if 1 <= steps <= MOST_STEPS:
        kind = replace(kind, steps=steps, range=(min(steps, kind.range[0]), max(steps, kind.range[1])))
    return XLFewStep(kind, TURBO_SIZE if kind.label == TURBO_XL.label else None)


def _one_step(timestep: int) -> str:
    """What is said of a model for one step that does not start from pure noise."""
    return f"; its only step was made for timestep {timestep}, and here it starts at 999: the image may be worse"


def first_xl_named(names: Iterable[tuple[str, str]]) -> tuple[XLFewStep, str] | None:
    """The kind that the first telling name means, and where that name was found; `names` are (place, name).

    A merge is what a name means that no other one is more exact about: "Turbo" in a title may be SDXL-Turbo itself.
    """
    found = [(kind, place) for place, name in names if (kind := xl_named(name)) is not None]
    found.sort(key=lambda entry: entry[0].kind.label == MERGED.label)
    return found[0] if found else None
