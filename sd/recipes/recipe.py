"""What was read from a file, as a value; and how the readers of all programs put it together.

A file is not to be trusted: every value is checked when it is put down, and one that is wrong becomes a note, as does
whatever has an effect on the image and cannot be reproduced here. Texts are free of control characters, and what is
shown to people is one line of printable ones.

>>> draft = Draft("some program")
>>> draft.put("steps", "20"), draft.put("guidance", "a lot"), draft.sampler("DPM++ 2M Karras")
(None, None, None)
>>> recipe = draft.recipe("a house")
>>> recipe.request.params.steps, recipe.request.params.sampler, recipe.notes
(20, 'dpmpp_2m', ("CFG scale is left out: 'a lot' is not a number",))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image

from ..messages import listed, one_line
from ..params import OPTIONS, REQUESTS, ImageToImage, Inpaint, SamplingParams, TextToImage
from ..samplers import BROWNIAN, SAMPLERS, find_sampler, sampler_key, spacing_in
from .fields import key, number, value_of

MAX_SIDE = 16384  # pixels
MAX_STEPS = 1000
MAX_BATCH = 100
MAX_SHOWN = 12  # names in one note
MAX_LORAS = 100  # entries of a list of LoRAs
NAME = 200  # characters of a name that are kept
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line breaks
# grids of the web UI and ComfyUI -> ours. "simple" has the same timesteps as ours where steps divide 1000.
GRIDS = {
    "uniform": "linspace", "normal": "linspace", "karras": "karras", "exponential": "exponential",
    "polyexponential": "exponential", "simple": "trailing", "ddim": "leading", "ddimuniform": "leading",
    "leading": "leading", "trailing": "trailing", "linspace": "linspace", "discrete": "linspace", "lcm": "lcm",
    "sgm": "sgm",
}  # fmt: skip
NEAR = {"sgmuniform": "sgm", "tcd": "lcm"}  # not the same, but close
OF_LCM = {"simple": "lcm", "sgmuniform": "lcm"}  # of the timesteps of LCMs: the first is exactly ours
MISSING = {"beta"}  # not available; it stands at the end of names of samplers, too


class Addon(NamedTuple):
    """A LoRA or an embedding: its name, its weight, and the first digits of its SHA-256, "" if unknown."""

    name: str
    weight: float = 1.0
    digest: str = ""


class ControlUse(NamedTuple):
    """A control network that was used: its name, digits of its hash; the settings of `Control`; and its hint.

    module   what made the hint of an image: "none" if it was ready, "canny", or what another program has
    hint     name and first digits of the SHA-256 of the image file, "" if unknown
    """

    name: str
    digest: str = ""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    fit: str = "crop"
    module: str = "none"
    low: float = 100.0
    high: float = 200.0
    hint: Addon = Addon("")


class Recipe(NamedTuple):
    """How an image was made, as far as its file says.

    request      prompt and settings; of an image that came from another one as `TextToImage`: see `with_image`
    kind         "txt2img", "img2img", "inpaint", or another key of `params.REQUESTS`
    task         the settings of that kind beyond those of TextToImage, such as strength
    given        the names of the settings that the file has; all others have their defaults
    loras        in the order in which they are merged
    embeddings   as far as the file names them
    model        the checkpoint; its name or digest may be ""
    program      the program that wrote the file
    info         everything else in the file: key -> text
    notes        what was left out, and what cannot be reproduced, one line each
    position     which of the images of the request it is: 0, or its place in a batch
    controls     the control networks; their hints are not in the file, so the request has none
    """

    request: TextToImage
    kind: str
    task: Mapping[str, Any]
    given: frozenset[str]
    loras: tuple[Addon, ...]
    embeddings: tuple[Addon, ...]
    model: Addon
    program: str
    info: Mapping[str, str]
    notes: tuple[str, ...]
    position: int = 0
    controls: tuple[ControlUse, ...] = ()

    def with_image(self, image: Image.Image, mask: Image.Image | None = None) -> TextToImage:
        """The request of image to image, or of inpainting if the recipe or a mask says so, on this image."""
        request = {f.name: getattr(self.request, f.name) for f in fields(TextToImage)}
        if self.kind == "inpaint" or mask is not None:
            return Inpaint(**request, image=image, mask=mask, **known(Inpaint, self.task))
        return ImageToImage(**request, image=image, **known(ImageToImage, self.task))


def known(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that a kind of request has."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in settings.items() if name in names}


def clean(text: str) -> str:
    r"""A text without control characters, except line breaks and tabs, and without halves of surrogate pairs.

    >>> clean("a\x1b[31m cat\r\nin a\thouse")
    'a[31m cat\nin a\thouse'
    """
    text = re.sub("\r\n?|\x85", "\n", text).replace("\f", " ").encode("utf-8", "replace").decode()
    return CONTROL.sub("", text)


def short_list(names: Iterable[object]) -> str:
    """Names for a message, each once."""
    return listed((one_line(name, 40) for name in names), most=MAX_SHOWN)


def file_name(text: object) -> str:
    """The name of a file without folders and without the ending of a file of weights."""
    name = one_line(re.split(r"[/\\]", str(text)[:2000])[-1], NAME)
    return re.sub(r"\.(safetensors|ckpt|pt|pth|bin|sft|gguf)$", "", name, flags=re.IGNORECASE)


@dataclass
class Draft:
    """A recipe in the making. Wrong values become notes."""

    program: str
    kind: str = "txt2img"
    settings: dict[str, Any] = field(default_factory=dict)
    loras: list[Addon] = field(default_factory=list)
    embeddings: list[Addon] = field(default_factory=list)
    controls: list[ControlUse] = field(default_factory=list)
    model: Addon = field(default_factory=lambda: Addon(""))
    position: int = 0
    info: dict[str, str] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)  # in their order, each once

    def note(self, text: str) -> None:
        """Add a note, once."""
        self.notes[text] = None

    def put(self, name: str, value: object, label: str = "") -> None:
        """Put down a setting, given as text or as a number; a wrong value becomes a note, which calls it `label`."""
        try:
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                cls = next((c for c in REQUESTS.values() if name in c.__dataclass_fields__), TextToImage)
                text = value.strip() if isinstance(value, str) else repr(value)
                value = value_of(SamplingParams if name in PARAMS else cls, name, text)
            made = _checked(self.settings | {name: value}, name)
        except ValueError as error:
            self.note(f"{label or key(name)} is left out: {one_line(error, 200)}")
        else:
            self.settings[name] = made

    def number(self, value: object, label: str, whole: bool = False) -> Any:
        """A number, or None with a note."""
        try:
            return number(value, whole)
        except ValueError as error:
            self.note(f"{label} is left out: {one_line(error, 200)}")
            return None

    def lora(self, name: object, weight: object, digest: str = "") -> None:
        """Add a LoRA by the name of its file; a weight that is wrong becomes a note."""
        name = file_name(name)
        number = self.number(weight, f"the weight of LoRA {name}") if name else None
        if number is not None:
            self.loras.append(Addon(name, number, digest))

    def limited(self, entries: object, what: str = "LoRAs") -> list[Any]:
        """The first `MAX_LORAS` entries of a list, with a note on those left out; none of anything but a list."""
        found = entries if isinstance(entries, list) else []
        if len(found) > MAX_LORAS:
            self.note(f"only the first {MAX_LORAS} of its {len(found)} {what} are read")
        return found[:MAX_LORAS]

    def size(self, width: object, height: object, factor: int = 8) -> None:
        """The size at which the image was generated; other programs round it down to a multiple of 8."""
        for name, value in (("width", width), ("height", height)):
            side = self.number(value, name, whole=True)
            if side is None:
                continue
            if not factor <= side <= MAX_SIDE:
                self.note(f"{name} is left out: {side} is not from {factor} to {MAX_SIDE}")
                continue
            if side % factor:
                self.note(f"{name} {side} is not a multiple of {factor}: {side - side % factor} is used")
            self.settings[name] = side - side % factor

    def sampler(self, name: object, automatic: Mapping[str, str] = MappingProxyType({})) -> None:
        """The sampler by its name in any program, with the grid that its name may end in.

        automatic   sampler -> the grid that the program uses if the name says nothing
        """
        text = re.sub(r"_gpu(?=_|$)", "", one_line(name, NAME))
        try:
            text, grid = _split_grid(text)
            found = sampler_key(find_sampler(text))
        except ValueError:
            self.note(f"sampler {one_line(name)} is not available: the default of the model is used")
            return
        self.settings["sampler"] = found
        if spacing := spacing_in(text) or automatic.get(found):
            self.settings["spacing"] = spacing
        if grid:
            self.grid(grid, self.settings.get("steps"))
        if found in BROWNIAN and not self.program.startswith("sd "):
            self.note(
                f"{SAMPLERS[found].label}: other programs draw its noise from a Brownian tree, so the image will differ"
            )

    def grid(self, name: object, steps: object = None, lcm: bool = False) -> None:
        """The grid of noise levels by its name in any program; `lcm` if it is made of the timesteps of LCMs."""
        plain = re.sub(r"[^a-z]", "", str(name)[:NAME].lower())
        if plain in GRIDS or plain in NEAR:
            self.settings["spacing"] = {**GRIDS, **NEAR, **(OF_LCM if lcm else {})}[plain]
        uneven = plain == "simple" and not lcm and isinstance(steps, int) and steps > 0 and 1000 % steps
        near = plain in NEAR or (plain == "lcm" and self.program.startswith("Fooocus"))  # it is "sgm_uniform" there
        if near or uneven:
            self.note(f"grid {one_line(name)}: {self.settings['spacing']} is close, but not the same")
        elif plain not in GRIDS:
            self.note(f"grid {one_line(name)} is not available: the default of the sampler is used")

    def recipe(self, prompt: str, negative: str = "") -> Recipe:
        """The whole."""
        if self.settings.get("variation_strength", 0.0) > 0 and "variation_seed" not in self.settings:
            del self.settings["variation_strength"]
            self.note("the strength of a variation is left out: its seed is missing")
        options = {name: value for name, value in self.settings.items() if name in OPTIONS}
        if (sampler := self.settings.get("sampler")) is not None:
            for name in options.keys() - SAMPLERS[sampler].options.keys():
                self.note(
                    f"{key(name)} {options.pop(name):g} is left out: {SAMPLERS[sampler].label} has no such setting"
                )
                del self.settings[name]
        if self.kind == "hires" and "hires" not in self.settings:
            self.kind = "txt2img"
            self.settings = {name: value for name, value in self.settings.items() if not name.startswith("hires_")}
            self.note("the second pass is left out: its scale factor is missing")
        cls = REQUESTS.get(self.kind, TextToImage)
        if any(f.metadata.get("image") for f in fields(cls)):  # what comes from an image needs it: see `with_image`
            cls = TextToImage
        names = {f.name for f in fields(cls)} | PARAMS | set(OPTIONS)
        main = {name: value for name, value in self.settings.items() if name in names}
        main |= {name: clean(main[name]) for name in ("prompt_2", "negative_2") if name in main}
        return Recipe(
            request=cls.of(clean(prompt), clean(negative), **main),
            kind=self.kind,
            task=MappingProxyType({name: value for name, value in self.settings.items() if name not in main}),
            given=frozenset(self.settings),
            loras=tuple(self.loras),
            embeddings=tuple(self.embeddings),
            model=self.model,
            program=one_line(self.program),
            info=MappingProxyType({one_line(name, NAME): clean(value) for name, value in self.info.items()}),
            notes=tuple(one_line(note, 500) for note in self.notes),
            position=self.position,
            controls=tuple(self.controls),
        )


def _split_grid(name: str) -> tuple[str, str]:
    """The name of a sampler, and the grid of ComfyUI or stable-diffusion.cpp after it: "euler_sgm_uniform".

    Raises ValueError if no sampler has the name, with or without its end.
    """
    try:
        find_sampler(name)  # also one with a grid of ours at its end
    except ValueError:
        for between in re.finditer("[_ ]", name):
            grid = re.sub("[_ ]", "", name[between.end() :]).lower()
            if grid in GRIDS or grid in NEAR or grid in MISSING:
                return name[: between.start()], name[between.end() :]
        raise
    return name, ""


PARAMS = frozenset(f.name for f in fields(SamplingParams)) - {"options"}
OWN = frozenset(f.name for f in fields(TextToImage)) - {"params", "prompt", "negative"}
WEIGHTED = {"web_ui_prompts": True}  # how the web UI and ComfyUI read prompts: brackets are weights


def _checked(settings: Mapping[str, Any], name: str) -> Any:
    """The value of a setting, as the request that it belongs to would have it. Raises ValueError."""
    value = settings[name]
    if name == "steps" and not 1 <= number(value, whole=True) <= MAX_STEPS:
        raise ValueError(f"{value} is not from 1 to {MAX_STEPS}")
    if name == "n" and not 1 <= number(value, whole=True) <= MAX_BATCH:
        raise ValueError(f"{value} is not from 1 to {MAX_BATCH}")
    if name in OPTIONS:
        return TextToImage.of("", **{name: value}).params.options[name]
    if name in PARAMS:
        extra = {"variation_seed": 0} if name == "variation_strength" else {}
        return getattr(TextToImage.of("", **{name: value, **extra}).params, name)
    if name in OWN:
        return getattr(TextToImage.of("", **{name: value}), name)
    for cls in REQUESTS.values():
        if name in cls.__dataclass_fields__:
            image = {"image": Image.new("L", (1, 1))} if "image" in cls.__dataclass_fields__ else {}
            return getattr(cls.of("", **{**image, name: value}), name)
    return value
