"""Every setting is defined here once, with its default, range and meaning; and the requests made of them.

    SamplingParams                       how to sample, for all tasks; None means the model's or sampler's default
    ResolvedParams                       the same for one model, with these defaults filled in
    TextToImage, ImageToImage, Inpaint   a prompt, the settings of the task, and SamplingParams
    HighRes                              TextToImage in two passes, the second at a larger size

All of them are values: validated on construction, compared by content, and serialised as JSON (`to_dict`, `from_dict`).
The command line, the Python API and the metadata of images read names, defaults and help from here.

>>> request = TextToImage.of("a house", steps=20, sampler="DPM++ 2M Karras")
>>> request.params.sampler, request.params.spacing, request.params.steps
('dpmpp_2m', 'karras', 20)
>>> from_dict(request.to_dict()) == request
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from torch import Tensor

from . import prompt_checks
from .control_params import FITS as FITS
from .control_params import Control, controls
from .samplers import SAMPLERS, Sampler, find_sampler, sampler_key, spacing_in
from .schedule import SPACINGS
from .settings import OneOf, Range, check_settings, flag, number, setting, whole, with_default

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

    from .config import Config

MAX_SEED = 2**64 - 1
MAX_IMAGES = 10**6  # of a prompt in one request, which holds their seeds and latents
OF_MODEL = "this model's default, or its few-step LoRA's"  # what an error says of a setting that is not the caller's
RNGS = ("torch-cpu", "nv", "comfy")
SEED = Range(whole, 0, MAX_SEED, "from 0 to 2^64 - 1")
PIXELS = Range(whole, 0, 100_000)
SHARE = Range(number, 0, 1)
OWN = "in pixels; None: that of the generated image"
OPTIONS = {name: option for entry in SAMPLERS.values() for name, option in entry.options.items()}
POSTERIORS = ("sample", "mode")
CONTENTS = ("original", "fill", "noise")  # of the masked part, before noise is added
RENAMED = {"weighted_prompts": "web_ui_prompts", "long_prompts": "web_ui_prompts"}  # earlier names of settings
UPSCALERS = ("lanczos", "latent")
LARGEST_HIRES = 4.0
STRENGTH = "this share of the steps is taken (spacing lcm: all); 0 keeps the image, 1 starts from pure noise"


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. None means the default of the sampler (steps, spacing) or of the model (all others)."""

    sampler: str | None = setting(None, "a key of `samplers.SAMPLERS`, or the name of a sampler in another tool")
    steps: int | None = setting(
        None,
        "steps of the whole grid, 1 to 1000; strength below 1 takes only the last ones. With lcm 1 to 50, all taken",
        Range(whole, 1),
    )
    spacing: str | None = setting(None, f"grid of the noise levels: {', '.join(SPACINGS)}", OneOf(SPACINGS))
    guidance: float | None = setting(None, "how strongly to follow the prompt; 0 ignores it, 1 is no guidance", number)
    guidance_rescale: float = setting(
        0.0, "how far to rescale the guided prediction to its contrast without guidance, 0 to 1", Range(number, 0, 1)
    )
    guidance_until: float = setting(
        1.0,
        "fraction of the steps that use guidance, starting with the noisiest; the others take half the time",
        Range(number, 0, 1),
    )
    cache_interval: int = setting(
        1,
        "DeepCache: run the whole U-Net only in every k-th evaluation; faster, but the image changes; 1 caches nothing",
        Range(whole, 1),
    )
    seed: int = setting(0, "0 to 2^64 - 1; image k of a request has seed + k (exceptions: noise.py)", SEED)
    n: int = setting(1, "images per prompt", Range(whole, 1, MAX_IMAGES, f"from 1 to {MAX_IMAGES}"))
    exact: bool = setting(
        False,
        "each image is bit-identical to the same image generated alone; batches then save no time. Several prompts "
        "must have equally many chunks of tokens and parts joined by AND",
        flag,
    )
    height: int | None = setting(None, "in pixels, a multiple of 8", whole)
    width: int | None = setting(None, "in pixels, a multiple of 8", whole)
    rng: str = setting("torch-cpu", f"random number generator: {', '.join(RNGS)}", OneOf(RNGS))
    noise_seed_delta: int = setting(
        0, "added to the seed of the noise of stochastic samplers (the web UI's ENSD)", whole
    )
    variation_seed: int | None = setting(
        None, "seed of the noise to mix into the initial noise, see variation_strength", SEED
    )
    variation_strength: float = setting(
        0.0, "0 is the noise of the seed, 1 that of variation_seed; between, a mixture", Range(number, 0, 1)
    )
    tileable: bool = setting(False, "the image repeats without seams: convolutions wrap around its edges", flag)
    # what SDXL is told about an image (config.SIZES)
    original_height: int | None = setting(None, f"SDXL: height of the original image, {OWN}", PIXELS)
    original_width: int | None = setting(None, f"SDXL: width of the original image, {OWN}", PIXELS)
    crop_top: int = setting(0, "SDXL: pixels cropped off the top of the resized original", PIXELS)
    crop_left: int = setting(0, "SDXL: pixels cropped off the left of the resized original", PIXELS)
    target_height: int | None = setting(None, f"SDXL: height of the image after cropping, {OWN}", PIXELS)
    target_width: int | None = setting(None, f"SDXL: width of the image after cropping, {OWN}", PIXELS)
    aesthetic_score: float = setting(6.0, "SDXL's refiner: how beautiful the image is, about 2 to 7", number)
    negative_aesthetic_score: float = setting(2.5, "the same for the negative prompt", number)
    refiner_from: float | None = setting(
        None,
        "fraction of the steps of the whole grid after which the refiner continues, if one is given; None: SDXL's "
        "refiner at the first timestep below 200, on which it was trained, other models after 0.8",
        SHARE,
    )
    options: Mapping[str, float] = field(
        default_factory=dict, hash=False, metadata={"help": "of the sampler, such as eta or gamma"}
    )

    def __post_init__(self) -> None:
        check_settings(self)
        put = object.__setattr__
        if not isinstance(self.sampler, str | Sampler | None):
            raise ValueError(f"sampler must be a name, got {self.sampler!r:.100}")
        if self.sampler is not None and self.sampler not in tuple(SAMPLERS):
            put(self, "spacing", self.spacing or spacing_in(self.sampler))  # "DPM++ 2M Karras" names a spacing as well
            put(self, "sampler", sampler_key(find_sampler(self.sampler)))
        if self.variation_strength > 0 and self.variation_seed is None:
            raise ValueError("variation_strength needs variation_seed, the seed of the noise to mix in")
        if self.options:
            put(self, "options", {name: self._option(name, value) for name, value in self.options.items()})

    def _option(self, name: str, value: object) -> float:
        if name not in OPTIONS:
            raise ValueError(f"no sampler has the option {name!r}")
        if self.sampler is not None and name not in SAMPLERS[self.sampler].options:
            having = ", ".join(key for key, entry in SAMPLERS.items() if name in entry.options)
            raise ValueError(f"{name} is a setting of {having}, not of {SAMPLERS[self.sampler].label}")
        option = OPTIONS[name] if self.sampler is None else SAMPLERS[self.sampler].options[name]
        return Range(whole if isinstance(option.default, int) else number, option.low, option.high)(name, value)

    def resolved(self, config: Config) -> ResolvedParams:
        """The same for a model, with its defaults, and with its sampler's spacing and steps where it has none.

        Raises ValueError for a sampler or spacing of the model that is unknown, unless others are given.
        """
        name = self.sampler or config.sampler
        spacing = None
        if name not in SAMPLERS:  # the config of a file may have another tool's name
            try:
                name, spacing = sampler_key(find_sampler(name)), spacing_in(name)
            except ValueError as error:
                raise ValueError(f"{OF_MODEL}: {error}. Choose one yourself") from None
        if self.sampler is None and not self.options.keys() <= SAMPLERS[name].options.keys():
            # an option without a sampler selects one that has it: the original's --ddim_eta, for example
            having = [key for key, entry in SAMPLERS.items() if self.options.keys() <= entry.options.keys()]
            if not having:
                raise ValueError(f"no sampler has all of {', '.join(self.options)}")
            name, spacing = having[0], None
        # the model's grid is for its own sampler; a few-step model knows no other levels
        own_grid = config.spacing if config.steps is not None or name == config.sampler else None
        own = vars(self) | {
            "sampler": name,
            "steps": self.steps or config.steps or SAMPLERS[name].steps,
            "spacing": self.spacing or spacing or own_grid or SAMPLERS[name].spacing,
            "guidance": config.guidance if self.guidance is None else self.guidance,
            "one_step_at": config.one_step_at,
        }
        if own["spacing"] not in SPACINGS:
            raise ValueError(
                f"{OF_MODEL}: unknown spacing {own['spacing']!r:.50}, expected one of {', '.join(SPACINGS)}. "
                "Choose one yourself"
            )
        return ResolvedParams(**own)

    def batch(self, first: int, n: int) -> Self:
        """The parameters that generate n images of a request from number `first` on, whose seeds follow (noise.py)."""
        name = "variation_seed" if self.variation_strength > 0 else "seed"
        return replace(self, n=n, **{name: (getattr(self, name) + first) % (MAX_SEED + 1)})


@dataclass(frozen=True)
class ResolvedParams(SamplingParams):
    """SamplingParams for one model: height and width, which depend on the task, may be None. See `resolved`.

    one_step_at   not a setting, but a fact about the model: `Config.one_step_at`
    """

    sampler: str = with_default(SamplingParams, "sampler", "ddim")
    steps: int = with_default(SamplingParams, "steps", 50)
    spacing: str = with_default(SamplingParams, "spacing", "leading")
    guidance: float = with_default(SamplingParams, "guidance", 1.0)
    one_step_at: int | None = None

    @property
    def is_guided(self) -> bool:
        """Whether any step uses guidance, apart from that of a `Composition`."""
        return self.guidance != 1 and self.guidance_until > 0


def _with_pixels(name: str, image: Image.Image) -> None:
    """Raise ValueError, with the name, for an image of no width or height."""
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.width}x{image.height}")


@dataclass(frozen=True)
class TextToImage:
    """Generate images from text: `params.n` for each prompt, in the order of the prompts."""

    kind: ClassVar[str] = "txt2img"

    prompt: str | Sequence[str] | Tensor = setting("", "one text, several texts, or contexts (B, M, D)")
    params: SamplingParams = field(default_factory=SamplingParams)
    negative: str | Sequence[str] | Tensor | None = setting(
        "",
        "what to steer away from: one text for all prompts, one for each, or contexts (1 or B, M, D); None is the "
        "empty text. No effect at guidance 1, except with AND",
    )
    web_ui_prompts: bool = setting(
        False, "prompts have the web UI's syntax: weights (word:1.2), chunks of 75 tokens, [a:b:0.4], [a|b], AND", flag
    )
    clip_skip: int | None = setting(
        None,
        "layer of the text encoder to use, counted from its end: 1 is the last; None is the model's own",
        Range(whole, 1),
    )
    prompt_2: str | Sequence[str] | None = setting(
        None, "SDXL: what its second text encoder reads in place of the prompt, one text for all or one for each"
    )
    negative_2: str | Sequence[str] | None = setting(None, "the same for the negative prompt")
    controls: Sequence[Control] = setting((), "hints for control networks of the model (control_params.py)", controls)

    def __post_init__(self) -> None:
        check_settings(self)
        put = object.__setattr__
        if not isinstance(self.prompt, Tensor):
            texts = (self.prompt,) if isinstance(self.prompt, str) else prompt_checks.texts("prompt", self.prompt)
            put(self, "prompt", texts)
        if self.negative is None:
            put(self, "negative", "")
        elif not isinstance(self.negative, str):
            put(self, "negative", prompt_checks.negatives(self.negative, self.prompt))
        for name in ("prompt_2", "negative_2"):
            if (second := getattr(self, name)) is not None and not isinstance(second, str):
                put(self, name, prompt_checks.second(name, second, self.prompt))

    @classmethod
    def of(
        cls,
        prompt: str | Sequence[str] | Tensor,
        negative: str | Sequence[str] | Tensor | None = "",
        **settings: Any,
    ) -> Self:
        """The request with these settings: fields of the request, of SamplingParams, or options of the sampler.

        Raises TypeError for an unknown name, ValueError for a value out of range.
        """
        own: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        options: dict[str, float] = {}
        for name, value in settings.items():
            if name in OPTIONS:
                if value is not None:
                    options[name] = value
            elif name in SamplingParams.__dataclass_fields__ and name != "options":
                shared[name] = value
            elif name in cls.__dataclass_fields__ and name != "params":
                own[name] = value
            elif name in RENAMED:
                raise TypeError(f"{name} is now {RENAMED[name]}, one option for weights and long prompts")
            else:
                known = {f.name for f in (*fields(cls), *fields(SamplingParams))} - {"params", "options"}
                from .request_json import hint_for

                raise TypeError(f"{cls.kind} has no setting {name!r}: {hint_for(name, known)}")
        return cls(prompt=prompt, negative=negative, params=SamplingParams(**shared, options=options), **own)

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON values, images as PNG in base64. Raises ValueError if a prompt is not text."""
        from .request_json import to_dict

        return to_dict(self)


@dataclass(frozen=True)
class HighRes(TextToImage):
    """Generate images from text at the size of `params`, enlarge them, and refine them by image to image (hires.py)."""

    kind: ClassVar[str] = "hires"

    hires: float = setting(2.0, "enlarge by this factor, above 1, up to 4; sides become multiples of 8", number)
    hires_strength: float = setting(
        0.55, "of the second pass: 0 only enlarges, 1 keeps next to nothing of the first", Range(number, 0, 1)
    )
    hires_steps: int | None = setting(
        None,
        "steps that the second pass takes; None is hires_strength times steps, with the spacing lcm all",
        Range(whole, 1),
    )
    hires_upscaler: str = setting(
        "lanczos", f"{UPSCALERS[0]} enlarges the pixels, {UPSCALERS[1]} the latents", OneOf(UPSCALERS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.hires <= LARGEST_HIRES:
            raise ValueError(f"hires must be above 1 and at most {LARGEST_HIRES:g}, got {self.hires:g}")


@dataclass(frozen=True)
class _FromImage(TextToImage):
    """The settings that image to image and inpainting share."""

    # required; it has a default only because the fields before it have one
    image: Image.Image = setting(None, "of any size and mode; transparent pixels become white", image=True)
    posterior: str = setting(
        "sample", "latents of the image: a random sample, as in the original code, or the mean", OneOf(POSTERIORS)
    )
    strength: float = setting(1.0, STRENGTH, Range(number, 0, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.image, Image.Image):
            what = type(self.image).__name__
            raise ValueError(f"image must be a PIL image (imaging.files.read_image reads files), got {what}")
        _with_pixels("image", self.image)


@dataclass(frozen=True)
class ImageToImage(_FromImage):
    """Generate images from text and an initial image (Meng et al. 2022, "SDEdit")."""

    kind: ClassVar[str] = "img2img"

    strength: float = setting(0.75, STRENGTH, Range(number, 0, 1))
    fit: str = setting("crop", "how to reach the size generated at: crop, or pad with the pixels of edges", OneOf(FITS))
    match_colours: bool = setting(False, "give the result the mean and covariance of the colours of the image", flag)


@dataclass(frozen=True)
class Inpaint(_FromImage):
    """Generate the masked part of an image anew. The result has the size of the image."""

    kind: ClassVar[str] = "inpaint"

    mask: Image.Image | None = setting(
        None, "white is generated, black is kept; if None, the transparent part is the mask", image=True
    )
    content: str = setting("original", "initial content of the masked part, where strength is below 1", OneOf(CONTENTS))
    blur: float = setting(0.0, "radius in pixels by which the edge of the mask is softened, outwards", Range(number, 0))
    margin: int | None = setting(
        None, "generate only the region around the mask, with this many pixels on each side", Range(whole, 0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask is not None and not isinstance(self.mask, Image.Image):
            what = type(self.mask).__name__
            raise ValueError(f"mask must be a PIL image (imaging.files.read_mask reads files), got {what}")
        if self.mask is not None:
            _with_pixels("mask", self.mask)


Request = TextToImage | HighRes | ImageToImage | Inpaint
REQUESTS: dict[str, type[TextToImage]] = {cls.kind: cls for cls in (TextToImage, HighRes, ImageToImage, Inpaint)}


def from_dict(values: Mapping[str, Any]) -> TextToImage:
    """The request that `to_dict` serialised. Raises ValueError for anything else: it may come from a file."""
    from .request_json import from_dict

    return from_dict(values)
