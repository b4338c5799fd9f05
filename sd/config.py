"""Every supported model as a value.

A model is made of frozen dataclasses: its text encoders, a VAE, a U-Net and a noise schedule. The networks read nothing
else, so a new variant is a `replace(...)` of an existing one and never an `if` in a network. A checkpoint written by
this project carries its config as JSON (`Config.to_json`), so it loads without flags.

Sources: Stable Diffusion 1.x, `configs/stable-diffusion/v1-inference.yaml` of CompVis/stable-diffusion; 2.x,
`configs/stable-diffusion/v2-inference(-v).yaml` of Stability-AI/stablediffusion; CLIP ViT-L/14 and OpenCLIP ViT-H/14.

>>> SD1.vae.factor, SD1_INPAINT.unet.in_channels, POCKET.size
(8, 9, 128)
>>> Config.from_json(SD2_V.to_json()) == SD2_V
True
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

GROUPS = 32  # groups of every GroupNorm: every channel count is a multiple of it
END = 49407  # id of CLIP's end token
PUBLISHED_LAYERS = {768: 12, 1024: 24, 1280: 32}  # of ViT-L/14, ViT-H/14 and ViT-bigG/14, by width
MAX_WORDS, MAX_WORD = 10_000, 200  # added to a tokenizer; letters of each


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_sizes(owner: Any, *names: str, limit: int = 1 << 17) -> None:
    """Raise ValueError for a size that is not a sensible whole number: sizes may come from a file's metadata."""
    per_level = {f.name for f in fields(owner) if str(f.type).startswith("tuple")}
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) and name in per_level else (value,)
        good = bool(values) and all(type(size) is int and 0 < size <= limit for size in values)
        _check(good, f"{type(owner).__name__}.{name}: got {value!r:.100}, expected whole numbers from 1 to {limit}")


class Word(NamedTuple):
    """A word that a tokenizer knows besides CLIP's tokens, for one row of the token table."""

    text: str
    id: int
    exact: bool = False  # matches only as it is written; else in upper or lower case
    alone: bool = False  # matches only where no letter or digit is beside it


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text transformer; the defaults are those of ViT-L/14 in Stable Diffusion 1.x.

    SDXL's two encoders, of which only the second gives a pooled vector (no file of SDXL can be loaded yet):

        TextConfig(layers=11, hidden_norm=False)
        TextConfig(1280, 32, 20, "gelu", pad=0, names="openclip", hidden_layer=-2, hidden_norm=False, pooled=True,
                   projection=1280)
    """

    width: int = 768  # D
    layers: int = 12  # layers that are run; fewer than were trained is "clip skip"
    heads: int = 12
    activation: str = "quick_gelu"  # OpenAI's CLIP: x * sigmoid(1.702 x); OpenCLIP: "gelu", the exact one
    pad: int = END  # id after the end token: the end token again (OpenAI's CLIP at Hugging Face) or 0 (OpenCLIP)
    vocab: int = 49408
    length: int = 77  # M, tokens with start and end
    names: str = "clip"  # of its weights in original checkpoints: "clip" (transformers' names) or "openclip"
    hidden_layer: int = -1  # layer whose output is `hidden`, counted from the last one: -1, -2, ...
    hidden_norm: bool = True  # whether `hidden` passes through the final normalisation
    pooled: bool = False  # whether the normalised output at the end token is also returned
    projection: int | None = None  # width P of the linear layer that the pooled output passes through; None: no layer
    words: tuple[Word, ...] = ()  # besides CLIP's tokens; those whose id is below `vocab` can be used

    def __post_init__(self) -> None:
        _check_sizes(self, "width", "layers", "heads", "vocab", "length")
        _check(self.layers <= 256, f"TextConfig.layers: got {self.layers}, expected at most 256")
        _check(self.length >= 3, f"TextConfig.length: got {self.length}, expected room for start, a token and end")
        _check(self.vocab >= 49408, f"TextConfig.vocab: got {self.vocab}, CLIP has 49408 tokens")
        _check(self.width % self.heads == 0, f"TextConfig: {self.heads} heads do not divide width {self.width}")
        for name, known in (("activation", ("quick_gelu", "gelu")), ("names", ("clip", "openclip"))):
            value = getattr(self, name)
            _check(value in known, f"TextConfig.{name}: got {value!r:.100}, expected one of {known}")
        _check(type(self.pad) is int and 0 <= self.pad < self.vocab, f"TextConfig.pad: got {self.pad!r}, not an id")
        self._check_words()
        which = self.hidden_layer
        _check(
            type(which) is int and -self.layers <= which <= -1,
            f"TextConfig.hidden_layer: got {which!r:.100}, expected {-self.layers} to -1",
        )
        for name in ("hidden_norm", "pooled"):
            value = getattr(self, name)
            _check(type(value) is bool, f"TextConfig.{name}: got {value!r:.100}, expected true or false")
        if self.projection is not None:
            _check_sizes(self, "projection")
            _check(self.pooled, "TextConfig.projection: projects the pooled output, which is not asked for (pooled)")

    @property
    def published_layers(self) -> int:
        """The layers of the encoder as it was published: SD 2 leaves out the last of them, which it does not use."""
        return self.layers + (PUBLISHED_LAYERS.get(self.width) == self.layers + 1)

    def _check_words(self) -> None:
        _check(isinstance(self.words, tuple) and len(self.words) <= MAX_WORDS, "TextConfig.words: expected a list")
        words = []
        for entry in self.words:
            _check(isinstance(entry, list | tuple) and len(entry) == 4, f"TextConfig.words: got {entry!r:.100}")
            word = Word(*entry)  # JSON has lists
            text = isinstance(word.text, str) and word.text.isprintable() and 0 < len(word.text.strip()) <= MAX_WORD
            kinds = type(word.id) is int and type(word.exact) is bool and type(word.alone) is bool
            _check(text and kinds and word.id > END, f"TextConfig.words: got {entry!r:.100}")
            words.append(word)
        different = len({word.text for word in words}) == len({word.id for word in words}) == len(words)
        _check(different, "TextConfig.words: a word or an id occurs twice")
        object.__setattr__(self, "words", tuple(words))


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between images and latents (kl-f8 of the original code)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # one entry a level; each level but the last halves the size
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    latent_channels: int = 4
    image_channels: int = 3
    scale: float = 0.18215  # factor of the latents: it brings their standard deviation to about 1

    def __post_init__(self) -> None:
        _check_sizes(self, "channels", "blocks", "latent_channels", "image_channels")
        _check(self.image_channels == 3, f"VAEConfig.image_channels: got {self.image_channels}, images have 3")
        _check(len(self.channels) <= 8 and self.blocks <= 16, "VAEConfig: more than 8 levels or 16 blocks a level")
        _check(
            all(width % GROUPS == 0 for width in self.channels),
            f"VAEConfig.channels: got {self.channels}, expected multiples of {GROUPS}",
        )
        _check(type(self.scale) is float and 0 < self.scale < 1e4, f"VAEConfig.scale: got {self.scale!r}")

    @cached_property
    def factor(self) -> int:
        """Image pixels per latent pixel, in each direction: 8 for Stable Diffusion."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """The attention U-Net; per level (finest first): channels, heads, and depth."""

    in_channels: int = 4  # 9 for inpainting models: latent, mask, latent of the masked image
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (8, 8, 8, 8)  # the last entry is also the middle block's
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block; 0: no attention at this level
    middle_depth: int | None = 1  # the same for the middle block; None: no middle block (small distilled U-Nets)
    blocks: int = 2  # residual blocks per level on the way down; one more on the way up
    context: int = 768  # width D of the text context
    vector: int | None = None  # width V of a vector added to the timestep embedding; None: no such vector
    guidance: int | None = None  # width of the guidance scale's embedding, for networks that are told it; None: others
    linear_projections: bool = False  # whether files have linear layers around transformers, not 1x1 convolutions

    def __post_init__(self) -> None:
        _check_sizes(self, "in_channels", "out_channels", "channels", "heads", "blocks", "context")
        if self.middle_depth is not None:
            _check_sizes(self, "middle_depth", limit=32)
        _check_sizes(self, *(name for name in ("vector", "guidance") if getattr(self, name) is not None))
        odd = self.guidance is not None and (self.guidance < 4 or self.guidance % 2 > 0)
        _check(not odd, f"UNetConfig.guidance: got {self.guidance}, expected an even number from 4")
        flag = self.linear_projections
        _check(type(flag) is bool, f"UNetConfig.linear_projections: got {flag!r:.100}, expected true or false")
        whole = isinstance(self.depth, tuple) and all(type(n) is int and 0 <= n <= 32 for n in self.depth)
        _check(whole, f"UNetConfig.depth: got {self.depth!r:.100}, expected a whole number from 0 to 32 per level")
        _check(
            isinstance(self.channels, tuple) and isinstance(self.heads, tuple), "UNetConfig: expected lists per level"
        )
        levels = len(self.channels)
        _check(
            len(self.heads) == levels and len(self.depth) == levels and levels <= 8 and self.blocks <= 16,
            f"UNetConfig: {levels} channels, {len(self.heads)} heads and {len(self.depth)} depths: "
            "expected one of each per level, at most 8 levels and 16 blocks a level",
        )
        transformers = sum(self.depth) * (2 * self.blocks + 1) + (self.middle_depth or 0)  # SDXL has 70
        _check(transformers <= 500, f"UNetConfig: {transformers} transformer blocks, expected at most 500")
        _check(
            all(width % GROUPS == 0 for width in self.channels),
            f"UNetConfig.channels: got {self.channels}, expected multiples of {GROUPS}",
        )
        middle = (self.channels[-1], self.heads[-1], self.middle_depth)
        attending = [*zip(self.channels, self.heads, self.depth, strict=True), middle]
        _check(
            all(width % heads == 0 for width, heads, depth in attending if depth),
            f"UNetConfig.heads: {self.heads} do not divide the channels {self.channels}",
        )

    def is_part_of(self, full: UNetConfig) -> bool:
        """Whether this is `full` with fewer levels, blocks or transformers, or without its middle: a distilled one."""
        if len(self.channels) > len(full.channels):
            return False
        levels = slice(len(self.channels))
        same = self == replace(
            full,
            channels=full.channels[levels],
            heads=full.heads[levels],
            depth=self.depth,
            middle_depth=self.middle_depth,
            blocks=self.blocks,
        )
        fewer = self.blocks <= full.blocks and all(a <= b for a, b in zip(self.depth, full.depth, strict=False))
        return same and fewer and self.middle_depth in (None, full.middle_depth)


PRECISIONS = ("float32", "float16", "bfloat16")  # torch's names of the data types that networks may have
SHORT_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
PREDICTIONS = ("eps", "v")  # what a U-Net predicts: the noise (SD 1.x, SD 2 base), or the velocity (SD 2 768)


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule (betas with evenly spaced square roots) and what the network predicts."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    prediction: str = "eps"  # one of PREDICTIONS
    zero_snr: bool = False  # rescaled so that the last timestep is pure noise (Lin et al. 2024)
    alpha_bar: tuple[float, ...] | None = None  # the schedule as a table, one entry per timestep, in place of betas

    def __post_init__(self) -> None:
        _check_sizes(self, "steps", limit=100_000)
        numbers = all(type(beta) is float for beta in (self.beta_start, self.beta_end))
        ordered = numbers and 1e-6 <= self.beta_start <= self.beta_end <= 0.5
        _check(ordered, f"ScheduleConfig: got betas {self.beta_start!r} to {self.beta_end!r}, expected 1e-6 to 0.5")
        expected = f"got {self.prediction!r}, expected one of {PREDICTIONS}"
        _check(self.prediction in PREDICTIONS, f"ScheduleConfig.prediction: {expected}")
        _check(
            type(self.zero_snr) is bool, f"ScheduleConfig.zero_snr: got {self.zero_snr!r:.100}, expected true or false"
        )
        if self.alpha_bar is not None:
            table = self.alpha_bar
            _check(
                isinstance(table, tuple) and len(table) == self.steps and all(type(entry) is float for entry in table),
                f"ScheduleConfig.alpha_bar: expected {self.steps} numbers, one for each timestep",
            )
            falls = all(1 > a > b >= 0 for a, b in pairwise(table)) if len(table) > 1 else 0 < table[0] < 1
            _check(falls, "ScheduleConfig.alpha_bar: not a noise schedule, which decreases from below 1 towards 0")
            _check(not self.zero_snr, "ScheduleConfig: zero_snr rescales betas, alpha_bar is used as it is: give one")
        _check(
            not self.to_noise or self.prediction == "v",
            "ScheduleConfig: at zero terminal SNR nothing of the image is left, so eps says nothing about it: "
            "prediction must be v",
        )

    @property
    def to_noise(self) -> bool:
        """Whether the last timestep is pure noise (zero terminal SNR), by `zero_snr` or by the table."""
        return self.zero_snr or (self.alpha_bar is not None and self.alpha_bar[-1] < 1e-7)


@dataclass(frozen=True)
class Config:
    """A whole model: name, native image size in pixels, default settings, and its parts.

    steps, spacing   the default ones of a model that was distilled to few steps (few_step.py); None: its sampler's
    text   one text encoder, or several side by side, whose hidden states together are as wide as the U-Net's context
           (prepared for SDXL: the converter still refuses several)
    """

    name: str = "Stable Diffusion 1.x"
    size: int = 512
    guidance: float = 7.5
    sampler: str = "dpmpp_2m"  # the default one, a key of `samplers.SAMPLERS`
    steps: int | None = None
    spacing: str | None = None  # one of `schedule.SPACINGS`
    text: tuple[TextConfig, ...] = (TextConfig(),)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def text_names(self) -> tuple[str, ...]:
        """The names of the text encoders among the networks: "text_encoder", "text_encoder_2", and so on."""
        return ("text_encoder", *(f"text_encoder_{i}" for i in range(2, len(self.text) + 1)))

    @property
    def is_inpainting(self) -> bool:
        """Whether it is an inpainting model: its U-Net takes a mask and a masked image besides x."""
        return self.unet.in_channels != self.vae.latent_channels

    def __post_init__(self) -> None:
        _check_sizes(self, "size")
        number = type(self.guidance) in (int, float) and abs(self.guidance) <= 1000
        _check(number, f"Config.guidance: got {self.guidance!r:.100}, expected a number up to 1000")
        for name, value in (("sampler", self.sampler), ("spacing", "" if self.spacing is None else self.spacing)):
            _check(isinstance(value, str) and len(value) <= 100, f"Config.{name}: expected a name")
        if self.steps is not None:
            _check_sizes(self, "steps", limit=1000)
        named = isinstance(self.name, str) and len(self.name) <= 100 and self.name.isprintable()
        _check(named, "Config.name: expected at most 100 printable characters")
        _check(
            self.unet.out_channels == self.vae.latent_channels,
            f"Config: the U-Net predicts {self.unet.out_channels} channels of {self.vae.latent_channels}",
        )
        latent = self.vae.latent_channels
        _check(
            self.unet.in_channels in (latent, 2 * latent + 1),
            f"Config: a U-Net of {self.unet.in_channels} input channels, expected {latent} (x) or {2 * latent + 1} (x, "
            "mask and masked latent)",
        )
        encoders = isinstance(self.text, tuple) and all(isinstance(text, TextConfig) for text in self.text)
        _check(encoders and 1 <= len(self.text) <= 4, "Config.text: expected one to four text encoders")
        width = sum(text.width for text in self.text)
        _check(
            self.unet.context == width,
            f"Config: the U-Net expects a context {self.unet.context} wide, the text encoders' is {width}",
        )

    def to_json(self) -> str:
        """One line of JSON from which `from_json` makes an equal config."""
        values = asdict(self)
        parts = [(text, "words") for text in values["text"]]
        for part, name in (*parts, (values["unet"], "guidance"), (values, "steps"), (values, "spacing")):
            if not part[name]:  # versions that do not know this entry can read it
                del part[name]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The config written by `to_json` of this version or of 0.1; everything in it is checked.

        Raises ValueError for anything that is not a config, unknown entries included: they might change the model.
        """
        parts: dict[str, Any] = {"vae": VAEConfig, "unet": UNetConfig, "schedule": ScheduleConfig}
        try:
            raw = _upgraded(json.loads(text))
            values = {name: _part(parts[name], value) if name in parts else value for name, value in raw.items()}
            if "text" in raw:
                values["text"] = tuple(_part(TextConfig, value) for value in raw["text"])
            return cls(**values)
        except (TypeError, AttributeError, LookupError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"not a model config: {error!s:.200}") from None


def _part(kind: Callable[..., Any], raw: Mapping[str, Any]) -> Any:
    """One of the dataclasses above from its JSON object, which has lists for tuples."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()})


def _upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """A config as JSON, in the entries of this version.

    Version 0.1 had one text encoder, no sampler, and a flag for each level that has attention. The encoder's
    activation determined how files name its weights and whether they have linear projections.
    """
    text, unet = raw.get("text"), raw.get("unet", {})
    if isinstance(text, dict):
        raw = raw | {"text": [{"names": "openclip" if text.get("activation") == "gelu" else "clip"} | text]}
    if "attention" in unet:
        attention = unet["attention"]
        flags = isinstance(attention, list) and all(type(flag) is bool for flag in attention)
        _check(flags, f"UNetConfig.attention: got {attention!r:.100}, expected true or false per level")
        rest = {name: value for name, value in unet.items() if name != "attention"}
        linear = isinstance(text, dict) and text.get("activation") == "gelu"
        raw = raw | {"unet": rest | {"depth": [int(flag) for flag in attention], "linear_projections": linear}}
    return {"sampler": LEGACY_SAMPLERS.get(raw.get("name", ""), SD1.sampler)} | raw


SD1 = Config()
SD1_INPAINT = replace(SD1, name="Stable Diffusion 1.x inpainting", unet=replace(SD1.unet, in_channels=9))
SD2 = Config(
    name="Stable Diffusion 2.x base",
    # 23 of OpenCLIP's 24 layers: Stable Diffusion 2 was trained with the output of the last but one
    text=(TextConfig(width=1024, layers=23, heads=16, activation="gelu", pad=0, names="openclip"),),
    unet=replace(SD1.unet, heads=(5, 10, 20, 20), context=1024, linear_projections=True),
)
SD2_V = replace(SD2, name="Stable Diffusion 2.x 768-v", size=768, schedule=replace(SD2.schedule, prediction="v"))
SD2_INPAINT = replace(SD2, name="Stable Diffusion 2.x inpainting", unet=replace(SD2.unet, in_channels=9))

# The embedded model: a small Stable Diffusion 1.x, trained from scratch on drawn scenes (weights/README.md)
POCKET = Config(
    name="pocket",
    size=128,
    guidance=4.0,
    sampler="ddim",
    text=(TextConfig(width=64, layers=3, heads=2),),
    vae=VAEConfig(channels=(64, 64, 96, 160), blocks=1),
    unet=UNetConfig(channels=(96, 160), heads=(3, 5), depth=(0, 1), blocks=1, context=64),
    schedule=ScheduleConfig(prediction="v"),
)

SMALL = ", small U-Net"  # after the name of a known model: its U-Net in part, distilled from it

LEGACY_SAMPLERS = {POCKET.name: POCKET.sampler}

MODELS = {
    "sd1": SD1, "sd1-inpaint": SD1_INPAINT, "sd2": SD2, "sd2-v": SD2_V, "sd2-inpaint": SD2_INPAINT, "pocket": POCKET,
}  # fmt: skip
