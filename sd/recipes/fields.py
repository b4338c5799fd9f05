"""The settings of an image as "Key: value" pairs: one table, from which images are written and read.

Keys are those of AUTOMATIC1111's web UI where it has one. A setting without a line in `KEYS` is written under its own
name ("hires_steps" as "Hires steps"), so a new field of a request needs no line here. Numbers are written exactly: read
back, they are equal to the bit.

>>> from sd.params import ImageToImage, SamplingParams
>>> key("guidance"), key("hires_steps"), text_of(0.1 + 0.2), text_of(7.0), text_of(True)
('CFG scale', 'Hires steps', '0.30000000000000004', '7', 'True')
>>> value_of(SamplingParams, "guidance", "7.5"), value_of(SamplingParams, "seed", "12")
(7.5, 12)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..params import OPTIONS, SamplingParams, TextToImage
from ..samplers import SAMPLERS

# setting -> its key, then the keys of other programs and earlier versions (in lower case) that mean the same
KEYS = {
    "steps": ("Steps",),
    "sampler": ("Sampler",),
    "spacing": ("Schedule type", "schedule", "scheduler"),
    "guidance": ("CFG scale", "cfg", "guidance scale"),
    "guidance_rescale": ("CFG Rescale", "cfg rescale φ", "guidance rescale", "cfg rescale phi"),
    "seed": ("Seed",),
    "rng": ("RNG",),
    "noise_seed_delta": ("ENSD", "eta noise seed delta", "sampler eta delta"),
    "variation_seed": ("Variation seed",),
    "variation_strength": ("Variation seed strength", "variation strength"),
    "tileable": ("Tiling", "tileable"),
    "clip_skip": ("Clip skip", "clip_skip"),
    "eta": ("Eta", "eta ddim", "ddim eta"),
    "strength": ("Denoising strength",),
    "posterior": ("Posterior",),
    "fit": ("Fit",),
    "blur": ("Mask blur",),
    "content": ("Masked content",),
    "margin": ("Masked area padding",),
    "web_ui_prompts": ("Web UI prompts",),
    "refiner_from": ("Refiner switch at", "refiner start"),
    "hires": ("Hires upscale", "hires scale"),
    "hires_strength": ("Denoising strength", "hires strength"),
    "hires_steps": ("Hires steps",),
    "hires_upscaler": ("Hires upscaler",),
}
ALWAYS = (
    "strength",
    "hires",
    "hires_strength",
    "hires_upscaler",
)  # written even if they have their default, which tells the kind
RNGS = {"torch-cpu": "CPU", "nv": "NV", "comfy": "Comfy"}  # as the web UI writes them; it has no third
# written in a form of their own, or not settings of one image
APART = {"prompt", "negative", "params", "n", "height", "width", "options", "controls"}
NUMBER = re.compile(r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
DIGITS = 20  # of a whole number: 2^64 has 20


def key(setting: str) -> str:
    """The key of a setting."""
    return KEYS[setting][0] if setting in KEYS else setting.replace("_", " ").capitalize()


def keys_read(setting: str) -> tuple[str, ...]:
    """All keys of a setting, in lower case, the main one first."""
    return (key(setting).lower(), *KEYS.get(setting, ())[1:])


def text_of(value: object) -> str:
    """A value as text; a float has as many digits as it needs, and no more."""
    if isinstance(value, float):
        return short if math.isfinite(value) and float(short := f"{value:g}") == value else repr(value)
    return str(value)


def settings_of(kind: type) -> dict[str, str]:
    """The settings of a request or of SamplingParams that are pairs -> the type of their values: int, float, ..."""
    own = [f for f in fields(kind) if f.name not in APART and not f.metadata.get("image")]
    return {f.name: str(f.type).partition(" |")[0] for f in own}


def value_of(kind: type, setting: str, text: str) -> Any:
    """The value of a setting in a text. Raises ValueError, without the name of the setting, for one of another type."""
    types = {f.name: str(f.type).partition(" |")[0] for f in fields(kind)}
    wanted = types.get(setting) or type(OPTIONS[setting].default).__name__
    if wanted == "bool":
        if text.lower() not in ("true", "false", "on", "off"):
            raise ValueError(f"{text!r:.50} is neither True nor False")
        return text.lower() in ("true", "on")
    return number(text, wanted == "int") if wanted in ("int", "float") else text


def number(value: object, whole: bool = False) -> Any:
    """A number, or a text of one, as int or finite float. Raises ValueError for anything else."""
    text = value.strip() if isinstance(value, str) else repr(value) if type(value) in (int, float) else ""
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError(f"{value!r:.50} is not a number")
    if not whole:
        return float(text)
    digits = text.removesuffix(".0").lstrip("+")  # JSON of other programs has whole numbers as floats
    if not re.fullmatch(rf"-?\d{{1,{DIGITS}}}", digits, re.ASCII):
        raise ValueError(f"{value!r:.50} is not a whole number")
    return int(digits)


def describe(request: TextToImage, params: SamplingParams, size: tuple[int, int]) -> dict[str, str]:
    """The pairs of the settings that differ from their default, and of those that are always written.

    params   those of the run: with the defaults of the model filled in, and the seed of the image
    size     (width, height) of the image
    """
    pairs = {
        key("steps"): text_of(params.steps),
        key("sampler"): SAMPLERS[str(params.sampler)].label,
        key("spacing"): str(params.spacing).capitalize(),
        key("guidance"): text_of(params.guidance),
        key("seed"): text_of(params.seed),
        "Size": f"{size[0]}x{size[1]}",
        key("rng"): RNGS[params.rng],
    }
    found: dict[str, str] = {}
    for values in (params, request):
        default: Mapping[str, Any] = {f.name: f.default for f in fields(values)}
        for name in settings_of(type(values)):
            value = getattr(values, name)
            if key(name) not in pairs and (name in ALWAYS or value != default[name]):
                found[name] = str(value).capitalize() if name == "hires_upscaler" else text_of(value)
    for name in sorted(found, key=lambda name: [*KEYS, name].index(name)):
        if name == "margin":
            pairs["Inpaint area"] = "Only masked"
        pairs[key(name)] = found[name]
    return pairs | {key(name): text_of(value) for name, value in params.options.items()}
