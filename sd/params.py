"""Every setting of an image, once: its name, default, range and meaning; and the three requests made of them.

    SamplingParams   how to sample: what all tasks share
    TextToImage, ImageToImage, Inpaint   a prompt, its task's settings, and SamplingParams

They are values: checked when they are made, compared by content, and written as JSON (`to_dict`, `from_dict`). The
command line, the Python API and the metadata of images read names, defaults and help from here.

>>> request = TextToImage.of("a house", steps=20, sampler="DPM++ 2M Karras")
>>> request.params.sampler, request.params.spacing, request.params.steps
('dpmpp_2m', 'karras', 20)
>>> from_dict(request.to_dict()) == request
True
"""

from __future__ import annotations

import base64
import io
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from torch import Tensor

from .samplers import SAMPLERS, Sampler, grid_in, sampler, sampler_key
from .schedule import SPACINGS

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

    from .config import Config

MAX_SEED = 2**64 - 1
FITS = ("crop", "pad")
POSTERIORS = ("sample", "mode")
CONTENTS = ("original", "fill", "noise")  # what the hole holds at the start


def whole(name: str, value: object) -> int:
    """Whole numbers of any kind (numpy's too) as int; ValueError, with the name, for anything else."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r:.100}") from None


def number(name: str, value: object) -> float:
    """Real numbers of any kind as float; ValueError, with the name, for anything else."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r:.100}")
    return float(value)


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """ValueError that lists what is known, if `value` is something else."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")


def setting(default: Any, help: str) -> Any:
    """A field of a request: its default and what it means."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. None stands for what is customary: of the sampler (steps, spacing) or the model (the others)."""

    sampler: str | None = setting(None, "a name of `samplers.SAMPLERS`, or another tool's name for one")
    steps: int | None = setting(None, "steps of the whole grid, 1 to 1000; strength below 1 takes the last of them")
    spacing: str | None = setting(None, f"grid of the noise levels: {', '.join(SPACINGS)}")
    guidance: float | None = setting(None, "how strongly to follow the prompt; 0 ignores it, 1 is plain")
    seed: int = setting(0, "0 to 2^64 - 1; image k of a request has seed + k")
    n: int = setting(1, "images of each prompt")
    height: int | None = setting(None, "in pixels, a multiple of 8")
    width: int | None = setting(None, "in pixels, a multiple of 8")
    options: Mapping[str, float] = field(default_factory=dict, metadata={"help": "the sampler's own, such as eta"})

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.sampler is not None:
            put(self, "spacing", self.spacing or grid_in(self.sampler))  # a grid behind the name counts
            put(self, "sampler", sampler_key(find_sampler(self.sampler)))
        for name in ("steps", "height", "width"):
            if getattr(self, name) is not None:
                put(self, name, whole(name, getattr(self, name)))
        put(self, "seed", whole("seed", self.seed))
        put(self, "n", whole("n", self.n))
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.spacing is not None:
            one_of("spacing", self.spacing, SPACINGS)
        if self.guidance is not None:
            put(self, "guidance", number("guidance", self.guidance))
            if not math.isfinite(self.guidance):
                raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, got {self.seed}")
        if self.n < 1:
            raise ValueError(f"the number of images must be at least 1, got {self.n}")
        put(self, "options", {name: self._option(name, value) for name, value in self.options.items()})

    def _option(self, name: str, value: object) -> float:
        having = [key for key, entry in SAMPLERS.items() if name in entry.options]
        if not having:
            raise ValueError(f"no sampler has the option {name!r}")
        if self.sampler is not None and self.sampler not in having:
            raise ValueError(f"{name} is a setting of {', '.join(having)}, not of {SAMPLERS[self.sampler].label}")
        option = SAMPLERS[having[0]].options[name]
        found = whole(name, value) if isinstance(option.default, int) else number(name, value)
        if not option.low <= found <= option.high:
            raise ValueError(f"{name} must be in [{option.low:g}, {option.high:g}], got {value}")
        return found

    def resolved(self, config: Config) -> SamplingParams:
        """The same for a model, with what is customary filled in: its sampler, grid, steps and guidance."""
        name = sampler_key(find_sampler(self.sampler or config.sampler))
        if self.sampler is None and not self.options.keys() <= SAMPLERS[name].options.keys():
            # an option asks for its sampler: the original's --ddim_eta, for example
            having = [key for key, entry in SAMPLERS.items() if self.options.keys() <= entry.options.keys()]
            if not having:
                raise ValueError(f"no sampler has all of {', '.join(self.options)}")
            name = having[0]
        entry = SAMPLERS[name]
        return replace(
            self,
            sampler=name,
            steps=entry.steps if self.steps is None else self.steps,
            spacing=self.spacing or entry.spacing,
            guidance=config.guidance if self.guidance is None else self.guidance,
        )


def find_sampler(name: str | Sampler) -> Sampler:
    """A sampler itself, or the one of this name."""
    return name if isinstance(name, Sampler) else sampler(name)


@dataclass(frozen=True)
class TextToImage:
    """Images of a text: `params.n` for each prompt, prompt by prompt."""

    kind: ClassVar[str] = "txt2img"

    prompt: str | Sequence[str] | Tensor = setting("", "a text, several, or contexts (B, M, D)")
    params: SamplingParams = field(default_factory=SamplingParams)
    negative: str = setting("", "what to steer away from; without effect at guidance 1")
    weighted_prompts: bool = setting(False, "(word:1.2), (word) and [word] in prompts weigh the word")
    long_prompts: bool = setting(False, "prompts of more than 75 tokens in chunks, instead of cutting them")

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, Tensor):
            object.__setattr__(self, "prompt", texts(self.prompt))
        if not isinstance(self.negative, str):
            raise ValueError(f"the negative prompt must be a text, got {self.negative!r:.100}")

    @property
    def strength(self) -> float:
        """The share of the grid's steps that are taken."""
        return 1.0

    @classmethod
    def of(cls, prompt: str | Sequence[str] | Tensor, negative: str = "", **settings: Any) -> Self:
        """The request of these settings: fields of the request, of SamplingParams, or options of the sampler.

        Raises TypeError for a name that is none of them, ValueError for a value that cannot be.
        """
        own = {f.name for f in fields(cls)} - {"params"}
        shared = {f.name for f in fields(SamplingParams)} - {"options"}
        options = {name for entry in SAMPLERS.values() for name in entry.options}
        if unknown := settings.keys() - own - shared - options:
            known = ", ".join(sorted({*own, *shared, *options}))
            raise TypeError(f"{cls.kind} has no setting {', '.join(map(repr, sorted(unknown)))}; it has {known}")
        params = SamplingParams(
            **{name: value for name, value in settings.items() if name in shared},
            options={name: value for name, value in settings.items() if name in options and value is not None},
        )
        return cls(prompt=prompt, negative=negative, params=params, **{k: v for k, v in settings.items() if k in own})

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON values; images as PNG in base64. ValueError if the prompt is not text."""
        if isinstance(self.prompt, Tensor):
            raise ValueError("a request with contexts in place of a prompt cannot be written")
        found: dict[str, Any] = {"kind": self.kind}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, SamplingParams):
                value = {g.name: getattr(value, g.name) for g in fields(value)}
            elif isinstance(value, Image.Image):
                buffer = io.BytesIO()
                value.save(buffer, "PNG")
                value = base64.b64encode(buffer.getvalue()).decode("ascii")
            elif isinstance(value, tuple):
                value = list(value)
            found[f.name] = value
        return found


def texts(prompt: object) -> tuple[str, ...]:
    """A prompt or several, as a tuple; ValueError for anything else."""
    found = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(found, Sequence) or not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r:.100}")
    return tuple(found)


@dataclass(frozen=True)
class _FromImage(TextToImage):
    """What image to image and inpainting share."""

    image: Image.Image | None = setting(None, "of any size and mode; what is transparent becomes white")
    posterior: str = setting("sample", "the encoder's answer: a random sample, as the original takes, or its mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.image, Image.Image):
            what = type(self.image).__name__
            raise ValueError(f"image must be a PIL image (imaging.files.read_image reads files), got {what}")
        one_of("posterior", self.posterior, POSTERIORS)
        if not 0 <= number("strength", self.strength) <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength}")


@dataclass(frozen=True)
class ImageToImage(_FromImage):
    """Images of a text that start from an image (Meng et al. 2022, "SDEdit")."""

    kind: ClassVar[str] = "img2img"

    strength: float = setting(0.75, "0 keeps the image, 1 starts from noise alone; this share of the steps is taken")
    fit: str = setting("crop", "to the size generated at: crop the image, or pad it by repeating its edges")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("way to fit", self.fit, FITS)


@dataclass(frozen=True)
class Inpaint(_FromImage):
    """An image with a part of it generated anew, at its own size."""

    kind: ClassVar[str] = "inpaint"

    strength: float = setting(1.0, "below 1, something of what the hole held remains")
    mask: Image.Image | None = setting(None, "white is generated anew, black stays to the bit; the transparent part")
    content: str = setting("original", "what the hole holds at the start, where strength is below 1")
    blur: float = setting(0.0, "softens the mask's edge, outwards, by so many pixels")
    margin: int | None = setting(None, "look only at the part around the mask, with so many pixels on each side")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("content", self.content, CONTENTS)
        number("blur", self.blur)
        if self.margin is not None and whole("margin", self.margin) < 0:
            raise ValueError(f"margin must be at least 0 pixels, got {self.margin}")
        if self.mask is not None and not isinstance(self.mask, Image.Image):
            what = type(self.mask).__name__
            raise ValueError(f"mask must be a PIL image (imaging.files.read_mask reads files), got {what}")


Request = TextToImage | ImageToImage | Inpaint
REQUESTS: dict[str, type[TextToImage]] = {cls.kind: cls for cls in (TextToImage, ImageToImage, Inpaint)}


def from_dict(values: Mapping[str, Any]) -> TextToImage:
    """The request that `to_dict` wrote. It may come from a file, so ValueError for anything else."""
    try:
        kind = REQUESTS[values["kind"]]
        given = {name: value for name, value in values.items() if name != "kind"}
        given["params"] = SamplingParams(**given.get("params", {}))
        for name in ("image", "mask"):
            if given.get(name) is not None:
                png = io.BytesIO(base64.b64decode(given[name], validate=True))
                given[name] = Image.open(png, formats=["PNG"]).copy()
        return kind(**given)
    except (TypeError, KeyError, AttributeError, OSError, SyntaxError) as error:
        raise ValueError(f"not a request: {error!s:.200}") from None
