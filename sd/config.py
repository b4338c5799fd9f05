"""Every supported model as a value.

A model is made of frozen dataclasses: its text encoders, a VAE, a U-Net and a noise schedule. The networks read nothing
else, so a new variant is a `replace(...)` of an existing one and never an `if` in a network. A checkpoint written by
this project carries its config as JSON (`Config.to_json`), so it loads without flags.

Sources: Stable Diffusion 1.x, `configs/stable-diffusion/v1-inference.yaml` of CompVis/stable-diffusion; 2.x,
`configs/stable-diffusion/v2-inference(-v).yaml` of Stability-AI/stablediffusion; XL, `sd_xl_base.yaml` and
`sd_xl_refiner.yaml` of Stability-AI/generative-models; CLIP ViT-L/14, OpenCLIP ViT-H/14 and ViT-bigG/14.

>>> SD1.vae.factor, SD1_INPAINT.unet.in_channels, POCKET.size
(8, 9, 128)
>>> Config.from_json(SD2_V.to_json()) == SD2_V
True
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from .text_config import END as END
from .text_config import TextConfig
from .text_config import Word as Word
from .vae_config import GROUPS, TinyVAEConfig, VAEConfig
from .vae_config import check as _check
from .vae_config import check_sizes as _check_sizes


@dataclass(frozen=True)
class UNetConfig:
    """The attention U-Net; per level (finest first): channels, heads, and depth."""

    in_channels: int = 4  # 9 for inpainting models: latent, mask, latent of the masked image
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (8, 8, 8, 8)  # the last entry is also the middle block's
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block; 0: no attention at this level
    # on the way up, where it differs: for each level, finest first, one number for each block (SSD-1B)
    up_depth: tuple[tuple[int, ...], ...] | None = None
    # the same for the middle block. 0: one residual block alone; None: no middle block (small distilled U-Nets)
    middle_depth: int | None = 1
    blocks: int = 2  # residual blocks per level on the way down; one more on the way up
    context: int = 768  # width D of the text context
    vector: int | None = None  # width V of a vector added to the timestep embedding; None: no such vector
    guidance: int | None = None  # width of the guidance scale's embedding, for networks that are told it; None: others
    linear_projections: bool = False  # whether files have linear layers around transformers, not 1x1 convolutions

    def __post_init__(self) -> None:
        _check_sizes(self, "in_channels", "out_channels", "channels", "heads", "blocks", "context")
        if self.middle_depth != 0 and self.middle_depth is not None:
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
        if self.up_depth is not None:
            per_block = isinstance(self.up_depth, tuple) and len(self.up_depth) == levels
            good = per_block and all(
                isinstance(level, tuple) and len(level) == self.blocks + 1 and all(type(n) is int for n in level)
                for level in self.up_depth
            )
            _check(
                good and all(0 <= n <= 32 and (n > 0) == (level[0] > 0) for level in self.up_depth for n in level),
                f"UNetConfig.up_depth: got {self.up_depth!r:.100}, expected for each of {levels} levels "
                f"{self.blocks + 1} whole numbers, from 1 to 32 or all 0",
            )
        up = sum(sum(self.depths_up(level)) for level in range(levels))
        transformers = sum(self.depth) * self.blocks + up + (self.middle_depth or 0)  # SDXL has 70
        _check(transformers <= 500, f"UNetConfig: {transformers} transformer blocks, expected at most 500")
        _check(
            all(width % GROUPS == 0 for width in self.channels),
            f"UNetConfig.channels: got {self.channels}, expected multiples of {GROUPS}",
        )
        middle = (self.channels[-1], self.heads[-1], self.middle_depth)
        depths = [depth + sum(self.depths_up(level)) for level, depth in enumerate(self.depth)]
        attending = [*zip(self.channels, self.heads, depths, strict=True), middle]
        _check(
            all(width % heads == 0 for width, heads, depth in attending if depth),
            f"UNetConfig.heads: {self.heads} do not divide the channels {self.channels}",
        )

    def depths_up(self, level: int) -> tuple[int, ...]:
        """The number of transformer blocks after each residual block of a level on the way up."""
        return (self.depth[level],) * (self.blocks + 1) if self.up_depth is None else self.up_depth[level]

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
            up_depth=self.up_depth,
            middle_depth=self.middle_depth,
            blocks=self.blocks,
        )
        fewer = self.blocks <= full.blocks and all(a <= b for a, b in zip(self.depth, full.depth, strict=False))
        return same and fewer and (self.middle_depth or 0) <= (full.middle_depth or 0)


# What SDXL is told about the size of an image, in pixels: that of the original, where it was cropped, and its own
BASE_SIZES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
REFINER_SIZES = (*BASE_SIZES[:4], "aesthetic_score")
SIZES = (*BASE_SIZES, "aesthetic_score")
SIZE_WIDTH = 256  # of the embedding of each of these numbers

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
    one_step_at  the timestep at which such a model starts if only one step is taken; None: the first of the spacing
    text         one text encoder, or several side by side, whose hidden states together are as wide as the context of
                 the U-Net. The last one may have a pooled output, with which the U-Net's vector begins
    sizes        the numbers whose embeddings follow in the vector, out of SIZES: SDXL's size conditioning
    zero_empty   whether an empty negative prompt is a context and a pooled output of zeros, as in SDXL's training
    """

    name: str = "Stable Diffusion 1.x"
    size: int = 512
    guidance: float = 7.5
    sampler: str = "dpmpp_2m"  # the default one, a key of `samplers.SAMPLERS`
    steps: int | None = None
    spacing: str | None = None  # one of `schedule.SPACINGS`
    one_step_at: int | None = None
    text: tuple[TextConfig, ...] = (TextConfig(),)
    vae: VAEConfig | TinyVAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sizes: tuple[str, ...] = ()
    zero_empty: bool = False

    @property
    def text_names(self) -> tuple[str, ...]:
        """The names of the text encoders among the networks: "text_encoder", "text_encoder_2", and so on."""
        return ("text_encoder", *(f"text_encoder_{i}" for i in range(2, len(self.text) + 1)))

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of all networks: those of the text encoders, "vae" and "unet"."""
        return (*self.text_names, "vae", "unet")

    @property
    def is_refiner(self) -> bool:
        """Whether it is SDXL's refiner, which is told an aesthetic score."""
        return self.sizes == REFINER_SIZES

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
        if self.one_step_at is not None:
            _check_sizes(self, "one_step_at", limit=self.schedule.steps - 1)
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
        self._check_vector()

    def _check_vector(self) -> None:
        known = isinstance(self.sizes, tuple) and all(name in SIZES for name in self.sizes)
        _check(known and len(set(self.sizes)) == len(self.sizes), f"Config.sizes: got {self.sizes!r:.100}")
        _check(type(self.zero_empty) is bool, f"Config.zero_empty: got {self.zero_empty!r:.100}")
        pooled = [text.pooled_width for text in self.text]
        _check(not any(pooled[:-1]), "Config.text: only the last text encoder may have a pooled output")
        width = pooled[-1] + SIZE_WIDTH * len(self.sizes) or None
        _check(
            self.unet.vector == width,
            f"Config: the U-Net expects a vector {self.unet.vector} wide, that of the text and the sizes is {width}",
        )

    def to_json(self) -> str:
        """One line of JSON from which `from_json` makes an equal config."""
        values = asdict(self)
        parts = [(text, "words") for text in values["text"]]
        parts += [(values["unet"], name) for name in ("guidance", "up_depth")]
        parts += [(values, name) for name in ("steps", "spacing", "one_step_at", "sizes", "zero_empty")]
        for part, name in parts:
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
            if "width" in raw.get("vae", {}):
                parts["vae"] = TinyVAEConfig
            values = {
                name: _part(parts[name], value) if name in parts else tuples(value) for name, value in raw.items()
            }
            if "text" in raw:
                values["text"] = tuple(_part(TextConfig, value) for value in raw["text"])
            return cls(**values)
        except (TypeError, AttributeError, LookupError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"not a model config: {error!s:.200}") from None


def _part(kind: Callable[..., Any], raw: Mapping[str, Any]) -> Any:
    """One of the dataclasses above from its JSON object."""
    return kind(**{name: tuples(value) for name, value in raw.items()})


def tuples(value: Any) -> Any:
    """A value of JSON, which has lists for tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


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

SDXL = Config(
    name="SDXL base",
    size=1024,
    guidance=5.0,
    # the output of the last layer but one of OpenAI's ViT-L/14 and OpenCLIP's ViT-bigG/14, not normalised
    text=(
        TextConfig(layers=11, hidden_norm=False),
        TextConfig(
            1280, 32, 20, "gelu", pad=0, names="openclip", hidden_layer=-2, hidden_norm=False, pooled=True,
            projection=1280,
        ),
    ),
    vae=VAEConfig(scale=0.13025),
    unet=UNetConfig(
        channels=(320, 640, 1280), heads=(5, 10, 20), depth=(0, 2, 10), middle_depth=10, context=2048, vector=2816,
        linear_projections=True,
    ),
    sizes=BASE_SIZES,
    zero_empty=True,
)  # fmt: skip
SDXL_INPAINT = replace(SDXL, name="SDXL inpainting", unet=replace(SDXL.unet, in_channels=9))
SDXL_REFINER = replace(
    SDXL,
    name="SDXL refiner",
    text=SDXL.text[1:],
    unet=replace(
        SDXL.unet, channels=(384, 768, 1536, 1536), heads=(6, 12, 24, 24), depth=(0, 4, 4, 0), middle_depth=4,
        context=1280, vector=2560,
    ),
    sizes=REFINER_SIZES,
    zero_empty=False,
)  # fmt: skip

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
    "sd1": SD1, "sd1-inpaint": SD1_INPAINT, "sd2": SD2, "sd2-v": SD2_V, "sd2-inpaint": SD2_INPAINT,
    "sdxl": SDXL, "sdxl-inpaint": SDXL_INPAINT, "sdxl-refiner": SDXL_REFINER, "pocket": POCKET,
}  # fmt: skip
