"""A file's weights under our names: everything that a model needs, in the right shapes, or an error.

`layouts.py` finds out which names a file uses, `key_maps.py` has the key of each weight; here both are applied. Every
weight that a network needs must be present in the right shape, and every tensor of the file must be used or be on the
short list of known leftovers: anything else is an error that names it. A 1x1 convolution and a linear layer hold the
same numbers, so shapes are compared without trailing ones. The way back is in export.py.

>>> from sd.checkpoints.checkpoint import load_checkpoint
>>> from sd.resources import resource
>>> with load_checkpoint(resource("weights/pocket.safetensors")) as file:
...     states = convert(file, identify(file).config)
...     print(*states, states["unet"]["conv_in.weight"].shape)
text_encoder vae unet torch.Size([96, 4, 3, 3])
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..config import Config
from .checkpoint import CheckpointError, shapes
from .detect import identify, no_unet
from .key_maps import EMA, Source
from .layouts import AVERAGE, EXTRA, NETWORKS, TOKENS, find_layouts, usual_layout

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("auto", "raw", "ema")  # which of the two U-Nets of a training checkpoint to take
NAMES = {"text_encoder": "text encoder", "vae": "vae", "unet": "U-Net", AVERAGE: "moving average (EMA) of the U-Net"}
FLAGS = {"text_encoder": "--text-encoder", "vae": "--vae"}  # options that supply a network missing from a file

# What a checkpoint may hold besides the weights of its networks. Anything else is an error.
IGNORED_PREFIXES = (
    EMA, EXTRA, f"{AVERAGE}.", "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.", "vae.loss.",
    "embedding_manager.", "cond_stage_model.model.visual.", "visual.", "vision_model.", "safety_checker.", "edm_",
    "denoiser.", "optimizer_states", "lr_schedulers",
)  # fmt: skip
IGNORED_SUFFIXES = ("position_ids", "logit_scale", "text_projection", "text_projection.weight", "attn_mask")
IGNORED_KEYS = frozenset(
    {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("logvar", "lvlb_weights", "scale_factor", "v_pred", "ztsnr", "global_step", "epoch", "lr", "num_updates"),
        "visual_projection.weight",
    }
)


class StateDict(Mapping[str, "Tensor"]):
    """One network's weights under our names, read from `tensors` one at a time, on demand."""

    def __init__(
        self, tensors: Mapping[str, Tensor], sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._tensors, self._sources, self._shapes = tensors, sources, shapes

    def __getitem__(self, key: str) -> Tensor:
        source = self._sources[key]
        tensor = self._tensors[source.key]
        if source.third is not None:
            tensor = tensor.chunk(3)[source.third].clone()  # a view would keep all three in memory
        elif key == TOKENS:
            tensor = tensor[: self._shapes[key][0]]
        return tensor.reshape(self._shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def convert(
    tensors: Mapping[str, Tensor],
    config: Config | None = None,
    weights: str = "auto",
    parts: Collection[str] = NETWORKS,
) -> dict[str, StateDict]:
    """Checkpoint -> {"text_encoder", "vae", "unet"}: state dicts under our names, complete and of the right shapes.

    tensors   a `Checkpoint` (weights are read on demand) or any mapping of names to tensors, in one of the layouts of
              layouts.py
    config    the model in the file; by default `identify` finds out
    weights   a training checkpoint may hold the U-Net twice: as trained ("raw") and its moving average ("ema"). "auto"
              takes what other tools take: raw from a file, ema from a diffusers folder, or the only one there is
    parts     the networks to convert, of `NETWORKS` and "unet_ema", the moving average; the others are ignored

    Raises CheckpointError that counts and names what is missing, unknown or of the wrong shape.
    """
    from ..models.build import weight_shapes  # not at the top: torch is slow to import, and not everything needs it

    config = config or identify(tensors).config
    if len(config.text) > 1:
        raise CheckpointError(f"{config.name} has {len(config.text)} text encoders, which is not supported yet")
    found, layouts = shapes(tensors), find_layouts(tensors)
    of_unet = choose_weights(tensors, weights) if "unet" in parts else "unet"
    expected = dict(weight_shapes(config))
    expected[AVERAGE] = expected["unet"]
    tables = {name: layout.sources(config, expected[name]) for name, layout in layouts.items()}
    used = {source.key for table in tables.values() for source in table.values()}
    wanted = {part: of_unet if part == "unet" else part for part in parts}
    for name in wanted.values():
        if name not in tables:
            tables[name] = usual_layout(name, config).sources(config, expected[name])
    if of_unet in wanted.values() and not any(source.key in found for source in tables[of_unet].values()):
        raise CheckpointError(no_unet(layouts))
    _check_complete(found, {name: tables[name] for name in wanted.values()}, expected)
    others = [layout.prefix for name, layout in layouts.items() if name not in wanted.values() and layout.prefix]
    others += [usual_layout(name, config).prefix for name in NETWORKS if name not in parts]
    text = layouts.get("text_encoder")
    extra = [
        key
        for key in found
        if key not in used
        and not key.startswith(tuple(others))
        and not ignored(key)
        and not (text is not None and text.unrun_layer(key, config.text[0].layers))
    ]
    if extra:
        raise CheckpointError(f"{_count(extra)} in the file that {config.name} does not have: {listed(extra)}")
    return {part: StateDict(tensors, tables[name], expected[name]) for part, name in wanted.items()}


def choose_weights(tensors: Mapping[str, Tensor], weights: str = "auto") -> str:
    """Which U-Net of a file to take for `weights` ("auto", "raw", "ema"): "unet", as trained, or "unet_ema".

    Raises CheckpointError if the file does not have the one that is asked for.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}, expected one of {', '.join(WEIGHTS)}")
    layouts = find_layouts(tensors)
    if weights == "ema" and AVERAGE not in layouts:
        raise CheckpointError("no moving average (EMA) of the U-Net in this file: use weights auto or raw (--weights)")
    if weights == "raw" and "unet" not in layouts and AVERAGE in layouts:
        raise CheckpointError("only the moving average (EMA) of the U-Net is in this file: use weights auto or ema")
    if AVERAGE not in layouts or weights == "raw":
        return "unet"
    folder = getattr(tensors, "kind", None) == "diffusers folder"  # of which diffusers takes the average
    return AVERAGE if weights == "ema" or folder or "unet" not in layouts else "unet"


def describe_weights(tensors: Mapping[str, Tensor], weights: str = "auto") -> str:
    """Which of a file's two U-Nets is taken, in one line; empty if there is no choice."""
    layouts = find_layouts(tensors)
    if AVERAGE not in layouts:
        return ""
    taken = choose_weights(tensors, weights)
    if "unet" not in layouts:
        return "U-Net: its moving average (EMA), the only one in the file"
    if taken == AVERAGE:
        return "U-Net: its moving average (EMA); --weights raw takes it as trained"
    return "U-Net: as trained (raw); --weights ema takes its moving average"


def _check_complete(
    found: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Mapping[str, Source]],
    expected: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> None:
    missing, misshapen, absent = [], [], []
    for network, table in sources.items():
        gone = [source.key for source in table.values() if source.key not in found]
        if len(gone) == len(table):
            absent.append(network)
            continue
        missing += gone
        for key, source in table.items():
            want, have = expected[network][key], found.get(source.key)
            if source.third is not None:
                want = (3 * want[0], *want[1:])
            if key == TOKENS and have is not None and len(have) == 2 and have[0] > want[0]:
                have = (want[0], have[1])  # fine-tuning added words that no prompt can contain
            if have is not None and squeezed(have) != squeezed(want):
                misshapen.append(f"{source.key} is {shape_text(have)}, expected {shape_text(want)}")
    if absent:
        names = " and ".join(f"no {NAMES[network]}" for network in absent)
        flags = " and ".join(FLAGS[network] for network in absent if network in FLAGS)
        raise CheckpointError(f"the file has {names}" + (f": give it with {flags}" if flags else ""))
    if missing:
        total = sum(map(len, sources.values()))
        raise CheckpointError(f"{_count(missing)} of {total} missing from the file: {listed(missing)}")
    if misshapen:
        raise CheckpointError(f"{_count(misshapen)} of the wrong shape: {listed(misshapen, '; ')}")


def squeezed(shape: tuple[int, ...], least: int = 1) -> tuple[int, ...]:
    """A shape without its last dimensions of size 1, but at least this many dimensions."""
    while len(shape) > least and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def ignored(key: str) -> bool:
    """Whether a key is a known leftover: checkpoints may hold it, and no network needs it."""
    return key in IGNORED_KEYS or key.startswith(IGNORED_PREFIXES) or key.endswith(IGNORED_SUFFIXES)


def _count(keys: list[str]) -> str:
    return f"{len(keys)} weight{'s' if len(keys) > 1 else ''}"


def listed(keys: Sequence[str], separator: str = ", ", most: int = 10) -> str:
    """The first of some keys, and how many more there are."""
    return separator.join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text: "320x4x3x3"."""
    return "x".join(map(str, shape)) or "a scalar"
