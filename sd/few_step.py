"""Models and LoRAs that were distilled to few steps: the settings they are made for, and how they are recognised.

Nothing in the weights of a distilled LoRA or model says that it is one, apart from an embedding of the guidance scale
in the U-Net. So what remains is what people and tools write about them: metadata, a folder's scheduler, file names.
scripts/distill.py writes the settings themselves into the metadata: `FewStep.to_json`, `from_json`.

    LCM        consistency distillation. Luo et al. 2023, "Latent consistency models" (arXiv:2310.04378: the guidance is
               an input of the network) and "LCM-LoRA" (arXiv:2311.05556: it is in the weights)
    TCD        Zheng et al. 2024, "Trajectory consistency distillation" (arXiv:2402.19159)
    Hyper-SD   Ren et al. 2024 (arXiv:2404.13686): one LoRA for each number of steps; "CFG" in the name keeps guidance
    SD-Turbo   Sauer et al. 2023, "Adversarial diffusion distillation" (arXiv:2311.17042): 1 to 4 steps, SD 2.1 at
               512x512; SDXL-Turbo is SDXL distilled in the same way, also at 512x512
    Lightning  Lin et al. 2024, "SDXL-Lightning" (arXiv:2402.13929): a U-Net and a LoRA for each number of steps
    DMD2       Yin et al. 2024, "Improved distribution matching distillation" (arXiv:2405.14867)
    merges     fine-tunes of SDXL merged with Turbo or Lightning, which people run with DPM++ SDE and weak guidance

Guidance is counted as everywhere here: 1 is none, which diffusers also writes as 0.

>>> kind = named("Hyper-SD15-8steps-CFG-lora")
>>> kind.described("LoRA"), kind.settings()
('a Hyper-SD LoRA', '8 steps, sampler ddim, guidance 5')
>>> named("dmd2_sdxl_1step_unet_fp16", XL).settings()
'1 step at timestep 399, sampler lcm, guidance 1'
>>> named("pixel-art") is None
True
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

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
    one_step_at: int | None = None  # timestep of the first level if only one step is taken; None: that of the spacing

    def described(self, what: str) -> str:
        """The kind with an article: "an LCM LoRA"."""
        return f"{'an' if self.label[:2] in ('LC', 'SD') else 'a'} {self.label} {what}"

    def settings(self) -> str:
        """The settings as text."""
        start = f" at timestep {self.one_step_at}" if self.one_step_at is not None and self.steps == 1 else ""
        return f"{_counted(self.steps)}{start}, sampler {self.sampler}, guidance {self.guidance:g}"

    def introduced(self, name: str) -> str:
        """What is said of a LoRA of this name."""
        return f"{name} is {self.described('LoRA')}: {self.settings()}"

    def applied(self, config: Config) -> Config:
        """The config with these settings as its defaults."""
        return replace(
            config,
            sampler=self.sampler,
            spacing=self.spacing,
            steps=self.steps,
            guidance=float(self.guidance),
            one_step_at=self.one_step_at,
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
# ByteDance/SDXL-Lightning is for 2, 4 and 8 steps (Euler, trailing, no guidance), tianweiy/DMD2 for 4 (LCM at the
# timesteps 999, 749, 499, 249, no guidance), and up to 8 are customary. For merges, what the cards of DreamShaper XL,
# TurboVision XL and Juggernaut XL have in common. Unlike LCM, two one-step models do not start at the last
# timestep: their cards give 399 for DMD2's U-Net, and 800 for Hyper-SD's U-Net for SDXL.
LCM = FewStep("LCM", "lcm", "lcm", 4, (2, 8), 1.0, (1.0, 2.0))
LCM_GUIDED = FewStep("LCM", "lcm", "lcm", 4, (1, 8), 8.0, (3.0, 13.0))
TCD = FewStep("TCD", "tcd", "lcm", 4, (2, 20), 1.0, (1.0, 2.0))
HYPER = FewStep("Hyper-SD", "ddim", "trailing", 4, (2, 8), 1.0, (1.0, 1.0))
HYPER_ONE = replace(HYPER, sampler="tcd", spacing="lcm", steps=1, range=(1, 8))
HYPER_ONE_XL = FewStep("Hyper-SD", "lcm", "lcm", 1, (1, 1), 1.0, (1.0, 1.0), one_step_at=800)
HYPER_GUIDED = replace(HYPER, guidance=5.0, guidances=(5.0, 8.0))
TURBO = FewStep("SD-Turbo", "euler", "trailing", 1, (1, 4), 1.0, (1.0, 1.0))
TURBO_XL = replace(TURBO, label="SDXL-Turbo")
LIGHTNING = FewStep("SDXL-Lightning", "euler", "trailing", 4, (2, 8), 1.0, (1.0, 1.0))
DMD = FewStep("DMD2", "lcm", "trailing", 4, (4, 8), 1.0, (1.0, 1.0))
DMD_ONE = replace(DMD, steps=1, range=(1, 1), one_step_at=399)
MERGED = FewStep("Turbo or Lightning", "dpmpp_sde", "karras", 8, (4, 8), 2.0, (1.0, 3.0))

LORA, SD, XL = "LoRA", "SD 1 or 2", "SDXL base"  # what a name belongs to: a LoRA, or a checkpoint of one of these


class Name(NamedTuple):
    """A pattern of names, the kind that it means, and for what: some of LORA, SD and XL."""

    pattern: re.Pattern[str]
    kind: FewStep
    of: tuple[str, ...] = (LORA, SD, XL)


def _any_case(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


IN_STEPS = r"[ _-]?\d{1,2}[ _-]?steps?(?![a-z])"
STEPS = _any_case(r"(?<!\d)(\d{1,2})[ _-]?steps?(?![a-z])")
CFG = _any_case(r"(?<![a-z])cfg(?![a-z])")
SDXL_NAME = r"(?<![a-z])(sd|stable[ _-]?diffusion)[ _-]?xl([ _-]v?\d[._]\d)?[ _-]?"
# a word of its own, or one that begins with a capital letter: "v9Rdphoto2Lightning"
MERGE = r"((?<![A-Za-z])(?i:turbo|lightning)|(?<=[a-z])(Turbo|Lightning)|(?i:xl(turbo|lightning)))(?![a-z])"
# The first match counts: "lcm" beside another name may be only the sampler. Digits may stand beside a word.
NAMES = (
    Name(_any_case(r"(?<![a-z])sd[ _-]?turbo(?![a-z])"), TURBO, (LORA, SD)),
    Name(_any_case(SDXL_NAME + r"turbo(?![a-z])"), TURBO_XL, (LORA, XL)),
    Name(_any_case(SDXL_NAME + r"lightning(?![a-z])"), LIGHTNING, (LORA, XL)),
    Name(_any_case(r"(?<![a-z])dmd2(?!\d)"), DMD, (LORA, XL)),
    Name(re.compile(MERGE), MERGED, (XL,)),
    Name(_any_case(r"hyper[ _-]?sd"), HYPER),
    Name(_any_case(r"(?<![a-z])tcd(?![a-z])"), TCD),
    Name(_any_case(r"(?<![a-z])lcm(?![a-z])"), LCM),
    # "lightning" alone is also a subject of ordinary LoRAs, and in the name of a checkpoint it means a merge
    Name(_any_case(r"(?<![a-z])lightning" + IN_STEPS), LIGHTNING, (LORA,)),
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
        kind = of_config(replace(config, **found, one_step_at=None))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{SETTINGS} in its metadata cannot be read: {error!s:.200}") from None
    if kind is None:
        raise ValueError(f"{SETTINGS} in its metadata has {found['steps']!r:.50} steps, expected 1 to {MOST_STEPS}")
    return kind


def named(name: str, of: str = LORA) -> FewStep | None:
    """The kind of few-step model that a name means, with the number of steps in it; None for any other name.

    of   what has the name: LORA, SD or XL
    """
    kind = next((entry.kind for entry in NAMES if of in entry.of and entry.pattern.search(name)), None)
    found = STEPS.search(name)
    steps = int(found[1]) if found else 0
    if kind is HYPER and CFG.search(name):
        kind = HYPER_GUIDED
    elif kind is HYPER and steps == 1:
        kind = HYPER_ONE_XL if of == XL else HYPER_ONE
    elif kind is DMD and steps == 1:
        kind = DMD_ONE
    if kind is None or not 1 <= steps <= MOST_STEPS:
        return kind
    return replace(kind, steps=steps, range=(min(steps, kind.range[0]), max(steps, kind.range[1])))


def first_named(names: Iterable[tuple[str, str]], of: str) -> tuple[FewStep, str] | None:
    """The kind that the first name with a known word means, and its place; `names` are (place, name).

    A merge counts only if no other name is more specific: "Turbo" in a title may be SDXL-Turbo itself.
    """
    found = [(kind, place) for place, name in names if (kind := named(name, of)) is not None]
    found.sort(key=lambda entry: entry[0].label == MERGED.label)
    return found[0] if found else None


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
    if config.one_step_at is not None and config.steps == 1:
        kind = replace(kind, range=(1, 1))
    steps, (least, most), (low, high) = config.steps or kind.steps, kind.range, kind.guidances
    return replace(
        kind,
        sampler=config.sampler,
        spacing=config.spacing or kind.spacing,
        steps=steps,
        range=(min(least, steps), max(most, steps)),
        guidance=config.guidance,
        guidances=(min(low, config.guidance), max(high, config.guidance)),
        one_step_at=config.one_step_at,
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
