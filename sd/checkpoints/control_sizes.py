"""The sizes of a control network, by the names and shapes of its weights in a file.

Everything shows in them but the number of heads. It is that of the model which the network is for: 8 in Stable
Diffusion 1.x, one for 64 channels in 2.x and SDXL. The config.json of a diffusers folder has it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..config import MODELS, SD1, UNetConfig
from ..control_config import ControlConfig as ControlConfig
from ..messages import counted
from .checkpoint import CheckpointError
from .control_maps import DIFFUSERS, ORIGINAL, OWN, ControlLayout, control_blocks
from .key_maps import layer_table
from .xl_models import MOST

Shapes = Mapping[str, tuple[int, ...]]

MOST_BLOCKS, MOST_LEVELS, MOST_HINTS = 5, 8, 8  # blocks a level, levels, and widths of the hint block at most
MOST_NUMBERS = 100  # of the original's blocks that are looked for
HEAD = 64  # channels of a head in SD 2.x and SDXL
FAMILIES = {model.name.removesuffix(" base"): model.unet for model in MODELS.values()}
AGAIN = "download it again"
UNKNOWN = "no control network of a known kind"


def read_sizes(found: Shapes, layout: ControlLayout) -> tuple[UNetConfig, tuple[int, ...], tuple[int, ...]]:
    """The half of a U-Net, without its heads; the widths of the hint block; the levels of bare transformers.

    Raises CheckpointError for shapes that no control network has.
    """
    blocks, levels = _grid(found, layout)
    plain = UNetConfig(
        channels=(32,) * levels, heads=(1,) * levels, depth=(MOST,) * levels, middle_depth=MOST, blocks=blocks,
        up_depth=((0,) * (blocks + 1),) * levels, vector=1,
    )  # fmt: skip
    names = _names_of(layout, ControlConfig(plain, (1,) * MOST_HINTS))

    def shape(layer: str) -> tuple[int, ...]:
        return found.get(f"{names(layer)}.weight", ())

    def size(layer: str, axis: int = 0) -> int:
        there = shape(layer)
        if len(there) <= axis:
            raise CheckpointError(
                f"a control network without {names(layer)}.weight, or one in which it has another shape: {AGAIN}"
            )
        return there[axis]

    def depth(place: str) -> int:
        return max((i + 1 for i in range(MOST) if shape(f"{place}.blocks.{i}.norm1")), default=0)

    # of several blocks the deepest counts: what others lack of it is missing
    depths = [max(depth(f"down.{level}.attn.{i}") for i in range(blocks)) for level in range(levels)]
    middle = depth("mid.attn")
    places = [*(f"down.{level}.attn.0" for level in range(levels)), "mid.attn"]
    numbers = [*depths, middle]
    bare = tuple(i for i, place in enumerate(places) if not numbers[i] and shape(f"{place}.norm"))
    contexts = [shape(f"{place}.blocks.0.attn2.k") for place, number in zip(places, numbers, strict=True) if number]
    vector = size("vector.0", 1) if shape("vector.0") else None
    # the layers of the hint block that change its width are those with an even number
    hints = [shape(f"hint.convs.{i}") for i in range(0, 2 * MOST_HINTS, 2)]
    projections = [shape(f"{places[i]}.proj_in") for i, number in enumerate(numbers) if number or i in bare]
    width, channels = size("conv_in", 1), tuple(size(f"down.{level}.res.0.conv1") for level in range(levels))
    try:
        unet = UNetConfig(
            in_channels=width,
            out_channels=width,
            channels=channels,
            heads=(1,) * levels,
            depth=tuple(depths),
            middle_depth=middle or (0 if shape("mid.res.0.conv1") else None),
            blocks=blocks,
            context=contexts[0][1] if contexts and len(contexts[0]) == 2 else _usual_context(vector),
            vector=vector,
            linear_projections=any(len(projection) == 2 for projection in projections),
        )
    except ValueError as error:
        raise CheckpointError(f"{UNKNOWN}: {error}") from None
    if (kind := size("hint.convs.0", 1)) != 3:
        raise CheckpointError(f"its hints have {kind} channels, which is not supported: expected 3 (RGB)")
    return unet, tuple(there[0] for there in hints if there), bare


def _usual_context(vector: int | None) -> int:
    """The width of the context of models with such a vector, for a network that does not read it."""
    return next((unet.context for unet in FAMILIES.values() if unet.vector == vector), SD1.unet.context)


def _names_of(layout: ControlLayout, config: ControlConfig) -> Callable[[str], str]:
    """Our layer -> its name in the file."""
    if layout.name == OWN:
        return lambda layer: layout.prefix + layer
    return layer_table(control_blocks(layout.name, config), layout.prefix).__getitem__


def _grid(found: Shapes, layout: ControlLayout) -> tuple[int, int]:
    """The blocks a level and the levels of a control network. CheckpointError for a number that is not supported."""

    def count(name: str, first: int = 0) -> int:
        there = [f"{layout.prefix}{name.format(i)}.weight" in found for i in range(first, MOST_NUMBERS)]
        return there.index(False) if False in there else len(there)

    if layout.name == ORIGINAL:  # which numbers the steps between levels as well
        steps = [f"{layout.prefix}input_blocks.{i}.0.op.weight" in found for i in range(MOST_NUMBERS)]
        levels = 1 + sum(steps)
        blocks = steps.index(True) - 1 if True in steps else count("input_blocks.{}.0.in_layers.0", first=1)
    else:
        level, block = {
            OWN: ("down.{}.res.0.conv1", "down.0.res.{}.conv1"),
            DIFFUSERS: ("down_blocks.{}.resnets.0.conv1", "down_blocks.0.resnets.{}.conv1"),
        }[layout.name]
        levels, blocks = count(level), count(block)
    if not (1 <= blocks <= MOST_BLOCKS and 1 <= levels <= MOST_LEVELS):
        raise CheckpointError(f"{UNKNOWN}: {counted(levels, 'level')} of {counted(blocks, 'block')}")
    return blocks, levels


def with_model(unet: UNetConfig, folder: Mapping[str, Any], base: UNetConfig | None, notes: list[str]) -> UNetConfig:
    """The config with what its weights cannot show: its numbers of heads, and whether a middle is missing.

    folder  the config.json of a diffusers folder, which has the heads; else they are those of the model
    base    the U-Net that it is for, if known; otherwise it is taken to be for the family that has its sizes
    notes   receives a line if the heads are a guess
    """
    like = (unet.channels, unet.context, unet.vector)
    known = [model for model in FAMILIES.values() if (model.channels, model.context, model.vector) == like]
    model = base if base is not None and base.channels == unet.channels else next(iter(known), None)
    if unet.middle_depth is None and model is not None:
        unet = replace(unet, middle_depth=model.middle_depth)
    levels = len(unet.channels)
    said = folder.get("num_attention_heads") or folder.get("attention_head_dim")  # both are the number of heads
    if said is not None:
        return replace(unet, heads=tuple(said) if isinstance(said, list) else (said,) * levels)
    if model is not None:
        return replace(unet, heads=model.heads)
    heads = tuple(max(width // HEAD, 1) for width in unet.channels)
    notes.append(
        f"how many attention heads it has is not in the file: taken to be {', '.join(map(str, heads))} (one for {HEAD} "
        "channels)"
    )
    return replace(unet, heads=heads)
