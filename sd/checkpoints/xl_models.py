"""SDXL models by the shapes of their U-Net: base, refiner, inpainting, and smaller ones distilled from the base.

Smaller ones have fewer transformer blocks, which on the way up may differ from one residual block to the next (SSD-1B),
one residual block a level (KOALA), or a middle that is a single residual block. The blocks of a file are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..config import SDXL, SDXL_INPAINT, SDXL_REFINER, SMALL, Config, UNetConfig, VAEConfig
from .checkpoint import CheckpointError
from .layouts import Layout
from .supported_settings import FORCE_ZEROS

Shapes = Mapping[str, tuple[int, ...]]

VECTOR = "vector.0.weight"  # of the layer that only U-Nets with a vector have
MOST = 12  # transformer blocks after a residual block that are counted at most: SDXL has up to 10
KNOWN = {  # input channels, width of the context, width of the vector
    (4, 2048, 2816): SDXL, (9, 2048, 2816): SDXL_INPAINT, (4, 1280, 2560): SDXL_REFINER,
}  # fmt: skip
# Tensors beside the networks of models that have SDXL's networks but another noise schedule
OTHER_SCHEDULES = {"edm_mean": "Playground v2.5", "edm_std": "Playground v2.5", "edm_vpred.": "CosXL"}
OTHERS = {5632: "a Kolors"}  # models with SDXL's U-Net but another text encoder, by the width of the vector


def usual_vae(config: Config) -> VAEConfig:
    """The published VAE of the family of a model."""
    return SDXL.vae if config.sizes and isinstance(SDXL.vae, VAEConfig) else VAEConfig()


def refuse_other_schedules(found: Iterable[str]) -> None:
    """Raise CheckpointError, which names the model, for SDXL networks trained with EDM's continuous noise levels."""
    for key in found:
        if (
            name := next((OTHER_SCHEDULES[start] for start in OTHER_SCHEDULES if key.startswith(start)), None)
        ) is not None:
            raise CheckpointError(
                f"this is a {name} model (it has {key}), which is not supported: its noise levels are those of EDM, "
                "not Stable Diffusion's"
            )


def vector_width(found: Shapes, layout: Layout) -> int | None:
    """The width of the vector that the U-Net in a file takes; None if it takes none."""
    (source,) = layout.sources(SDXL, [VECTOR]).values()
    return found[source.key][-1] if source.key in found else None


def xl_config(found: Shapes, layout: Layout, channels: int, context: int) -> Config | None:
    """The config of an SDXL model, by its U-Net's input channels and context; None for another model with a vector.

    Raises CheckpointError for a known one that is not supported.
    """
    width = vector_width(found, layout)
    if width in OTHERS:
        raise CheckpointError(f"this is {OTHERS[width]} model (a vector of {width}), which is not supported")
    known = KNOWN.get((channels, context, width or 0))
    return known and with_depths(known, found, layout)


def with_depths(config: Config, found: Shapes, layout: Layout) -> Config:
    """The config with as many blocks and transformers as the U-Net in a file has.

    The config stays as it is if the numbers make no sense: loading then names what is missing.
    """
    full = config.unet
    blocks = full.blocks if _has(config, full, found, layout, f"down.0.res.{full.blocks - 1}.norm1.weight") else 1
    deep = replace(full, blocks=blocks, depth=(MOST,) * len(full.depth), middle_depth=MOST)

    def count(place: str) -> int:
        names = [f"{place}.blocks.{i}.norm1.weight" for i in range(MOST)]
        there = [_has(config, deep, found, layout, name) for name in names]
        return there.index(False) if False in there else MOST

    levels = range(len(full.channels))
    down = [[count(f"down.{level}.attn.{i}") for i in range(blocks)] for level in levels]
    up = tuple(tuple(count(f"up.{level}.attn.{i}") for i in range(blocks + 1)) for level in levels)
    middle: int | None = count("mid.attn")
    if not middle and not _has(config, deep, found, layout, "mid.res.0.norm1.weight"):
        middle = None
    if any(len(set(level)) > 1 for level in down):
        return config
    depth = tuple(level[0] for level in down)
    same = all(set(level) == {n} for level, n in zip(up, depth, strict=True))
    try:
        unet = replace(full, blocks=blocks, depth=depth, up_depth=None if same else up, middle_depth=middle)
    except ValueError:
        return config
    return config if unet == full else replace(config, name=config.name + SMALL, unet=unet)


def describe_empty(config: Config, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """A line on what an empty negative prompt is for an SDXL model, and why; `configs` are those of its folder."""
    what = "is zeros, not the encoded empty text" if config.zero_empty else "is encoded like any text, not zeros"
    if FORCE_ZEROS in configs.get("index", {}):
        why = f"as {FORCE_ZEROS} in its model_index.json says"
    else:
        why = "as in its training and in the web UI" if config.zero_empty else "as in its training"
    return f"an empty negative prompt {what}, {why}"


def _has(config: Config, unet: UNetConfig, found: Shapes, layout: Layout, name: str) -> bool:
    """Whether a file has a weight of a U-Net of this config, by our name."""
    (source,) = layout.sources(replace(config, unet=unet), [name]).values()
    return source.key in found
