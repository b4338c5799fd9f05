"""Models and LoRAs that were distilled to few steps: the settings they are made for, and how they are recognised.

Nothing in the weights of a distilled LoRA or model says that it is one, apart from an embedding of the guidance scale
in the U-Net. So what remains is what people and tools write about them: metadata, a folder's scheduler, file names.
scripts/distill.py writes the settings themselves into the metadata: `FewStep.to_json`, `from_json`.

    LCM        consistency distillation. Luo et al. 2023, "Latent consistency models" (arXiv:2310.04378: the guidance is
               an input of the network) and "LCM-LoRA" (arXiv:2311.05556: it is in the weights)
    TCD        Zheng et al. 2024, "Trajectory consistency distillation" (arXiv:2402.19159)
    Hyper-SD   Ren et al. 2024 (arXiv:2404.13686): one LoRA for each number of steps; "CFG" in the name keeps guidance
    SD-Turbo   Sauer et al. 2023, "Adversarial diffusion distillation" (arXiv:2311.17042): SD 2.1 for 1 to 4 steps;
               SDXL-Turbo is SDXL for as many
    Lightning  Lin et al. 2024, "SDXL-Lightning" (arXiv:2402.13929): one LoRA for each number of steps
    DMD2       Yin et al. 2024, "Improved distribution matching distillation" (arXiv:2405.14867)

Guidance is counted as everywhere here: 1 is none, which diffusers also writes as 0.

>>> kind = named("Hyper-SD15-8steps-CFG-lora")
>>> kind.described("LoRA"), kind.settings()
('a Hyper-SD LoRA', '8 steps, sampler ddim, guidance 5')
>>> named("pixel-art") is None
True
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .config import Config

DISTILLED = ("lcm", "tcd")  # samplers that suit only such models
MOST_STEPS = 12  # a model with more default steps than this is not a few-step model


@dataclass(frozen=True)
class FewStep:
    """The customary settings of one kind of few-step model."""

    label: str
    sampler: str  # a key of `samplers.SAMPLERS`
    spacing: str  # one of `schedule.SPACINGS`
    steps: int
    range: tuple[int, int]  # of the steps it is made for
    guidance: float
    guidances: tuple[float, float]  # the range of guidance it is made for

    def described(self, what: str) -> str:
        """The kind with an article: "an LCM LoRA"."""
        return f"{'an' if self.label[:2] in ('LC', 'SD') else 'a'} {self.label} {what}"

    def settings(self) -> str:
        """The settings as text."""
        return f"{_counted(self.steps)}, sampler {self.sampler}, guidance {self.guidance:g}"

    def introduced(self, name: str) -> str:
        """What is said of a LoRA of this name."""
        return f"{name} is {self.described('LoRA')}: {self.settings()}"

    def applied(self, config: Config) -> Config:
        """The config with these settings as its defaults."""
        return replace(
            config, sampler=self.sampler, spacing=self.spacing, steps=self.steps, guidance=float(self.guidance)
        )

    def to_json(self) -> str:
        """The settings for the metadata of a LoRA, under SETTINGS; `from_json` reads them."""
        return json.dumps({name: getattr(self, name) for name in WRITTEN})

    def far(self, steps: int, guidance: float) -> str | None:
        """What is customary, as text, if steps or guidance are outside of it."""
        (least, most), (low, high) = self.range, self.guidances
        if least <= steps <= most and low <= guidance <= high:
            return None
        count = _counted(most) if least == most else f"{least} to {_counted(most)}"
        more = " or more" if math.isinf(high) else f" to {high:g}" if high > low else ""
        return f"{count} and guidance {low:g}{more}"


def _counted(steps: int) -> str:
    return f"{steps} step{'s' if steps != 1 else ''}"


# The model cards of latent-consistency/lcm-lora-sdv1-5 (2 to 8 steps, guidance 1 to 2), SimianLuo/LCM_Dreamshaper_v7
# (1 to 8 steps, guidance 8; diffusers' guide: it was trained with 3 to 13), h1t/TCD-SD15-LoRA (4 steps, and more
# improve the image), ByteDance/Hyper-SD (guidance 5 to 8 with "CFG") and stabilityai/sd-turbo (1 to 4 steps). Those for
# SDXL are used in the same way: latent-consistency/lcm-lora-sdxl, h1t/TCD-SDXL-LoRA, Hyper-SDXL, sdxl-turbo.
# ByteDance's SDXL-Lightning has LoRAs for 2, 4 and 8 steps (Euler, trailing, no guidance), tianweiy/DMD2 one for 4 (LCM
# on the timesteps 999, 749, 499, 249, no guidance), with which up to 8 are customary.
LCM = FewStep("LCM", "lcm", "lcm", 4, (2, 8), 1.0, (1.0, 2.0))
LCM_GUIDED = FewStep("LCM", "lcm", "lcm", 4, (1, 8), 8.0, (3.0, 13.0))
TCD = FewStep("TCD", "tcd", "lcm", 4, (2, 20), 1.0, (1.0, 2.0))
HYPER = FewStep("Hyper-SD", "ddim", "trailing", 4, (2, 8), 1.0, (1.0, 1.0))
HYPER_ONE = replace(HYPER, sampler="tcd", spacing="lcm", steps=1, range=(1, 8))
HYPER_GUIDED = replace(HYPER, guidance=5.0, guidances=(5.0, 8.0))
TURBO = FewStep("SD-Turbo", "euler", "trailing", 1, (1, 4), 1.0, (1.0, 1.0))
TURBO_XL = replace(TURBO, label="SDXL-Turbo")
LIGHTNING = FewStep("SDXL-Lightning", "euler", "trailing", 4, (2, 8), 1.0, (1.0, 1.0))
DMD = FewStep("DMD2", "lcm", "trailing", 4, (4, 8), 1.0, (1.0, 1.0))

STEPS = re.compile(r"(?<!\d)(\d{1,2})[ _-]?steps?(?![a-z])")
# A name's words and the kind that they mean. Digits may stand beside a word: "dreamshaper_8LCM".
WORDS = (
    (re.compile(r"hyper[ _-]?sd"), HYPER),
    (re.compile(r"(?<![a-z])tcd(?![a-z])"), TCD),
    (re.compile(r"(?<![a-z])lcm(?![a-z])"), LCM),
    (re.compile(r"(?<![a-z])sd[ _-]?turbo(?![a-z])"), TURBO),
    (re.compile(r"(?<![a-z])sd[ _-]?xl[ _-]?turbo(?![a-z])"), TURBO_XL),
    # "lightning" alone is also a subject of ordinary LoRAs
    (
        re.compile(
            r"(?<![a-z])sd[ _-]?xl[ _-]?lightning(?![a-z])|(?<![a-z])lightning[ _-]?\d{1,2}[ _-]?steps?(?![a-z])"
        ),
        LIGHTNING,
    ),
    (re.compile(r"(?<![a-z])dmd2(?!\d)"), DMD),
)
TITLES = ("modelspec.title", "ss_output_name")  # entries of metadata that hold a model's name
SETTINGS = "sd.few_step"  # the entry of metadata that holds the settings of a LoRA
WRITTEN = ("sampler", "spacing", "steps", "guidance")  # those in it


def from_json(text: str, config: Config) -> FewStep:
    """The kind of a LoRA for a model by the settings that `FewStep.to_json` wrote.

    Raises ValueError for anything else. Names of samplers and spacings are checked when an image is generated.
    """
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or found.keys() != {*WRITTEN}:
            raise ValueError(f"expected {', '.join(WRITTEN)}")
        kind = of_config(replace(config, **found))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{SETTINGS} in its metadata cannot be read: {error!s:.200}") from None
    if kind is None:
        raise ValueError(f"{SETTINGS} in its metadata has {found['steps']!r:.50} steps, expected 1 to {MOST_STEPS}")
    return kind


def named(name: str) -> FewStep | None:
    """The kind of few-step model that a name means, with the number of steps in it; None for any other name."""
    name = name.lower()
    kind = next((kind for pattern, kind in WORDS if pattern.search(name)), None)
    found = STEPS.search(name)
    steps = int(found[1]) if found else 0
    if kind is HYPER:
        kind = HYPER_GUIDED if re.search(r"(?<![a-z])cfg(?![a-z])", name) else HYPER_ONE if steps == 1 else HYPER
    if kind is None or not 1 <= steps <= MOST_STEPS:
        return kind
    return replace(kind, steps=steps, range=(min(steps, kind.range[0]), max(steps, kind.range[1])))


def first_named(names: Iterable[tuple[str, str]]) -> tuple[FewStep, str] | None:
    """The kind that the first telling name means, and where that name was found; `names` are (place, name)."""
    for place, name in names:
        if (kind := named(name)) is not None:
            return kind, place
    return None


def of_config(config: Config) -> FewStep | None:
    """The kind of a model, by the defaults in its config; None for an ordinary model."""
    kind = LCM_GUIDED if config.unet.guidance is not None else None
    kind = kind or next((kind for kind in (LCM, TCD) if kind.sampler == config.sampler), None)
    if kind is None:
        if config.steps is None or config.steps > MOST_STEPS:
            return None
        scales = (1.0, 1.0) if config.guidance == 1 else (config.guidance, math.inf)  # how far up is not known
        kind = replace(TURBO, label="few-step", guidances=scales)
    elif kind is LCM_GUIDED and config.sampler == TCD.sampler:
        kind = replace(kind, label=TCD.label)
    steps, (least, most), (low, high) = config.steps or kind.steps, kind.range, kind.guidances
    return replace(
        kind,
        sampler=config.sampler,
        spacing=config.spacing or kind.spacing,
        steps=steps,
        range=(min(least, steps), max(most, steps)),
        guidance=config.guidance,
        guidances=(min(low, config.guidance), max(high, config.guidance)),
    )


def unsuited(found: tuple[str, FewStep] | None, sampler: str, steps: int, guidance: float) -> str | None:
    """What to say about settings that do not suit a model; None if they do.

    found   what makes it a model of few steps, and its kind; None for an ordinary model
    """
    if found is None:
        if sampler not in DISTILLED:
            return None
        return (
            f"the sampler {sampler} needs a few-step model, and this model is not recognised as one: images of an "
            "ordinary model are blurred. Add an LCM or TCD LoRA (if its file has another name: --lora lcm=FILE), or "
            "choose another sampler"
        )
    what, kind = found
    customary = kind.far(steps, guidance)
    given = f"{_counted(steps)} and guidance {guidance:g}"
    if customary is None:
        return None
    none = "; guidance 0 ignores the prompt, 1 is no guidance" if guidance == 0 else ""
    return f"{what} is made for {customary}, not for {given}: the image may be worse{none}"
