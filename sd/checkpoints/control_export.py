"""Control networks as files, for this project and for other programs, bit for bit.

    own         one file, control.*, with the config in its metadata
    original    one file, control_model.*, as the original code writes it and most programs read it
    diffusers   a folder of ControlNetModel

>>> from sd.config import SD1
>>> control_to_diffusers(ControlConfig.of(SD1.unet))["conditioning_embedding_out_channels"]
[16, 32, 96, 256]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import GROUPS
from ..control_config import ControlConfig as ControlConfig
from .control_detect import CONTROL_KEY, SHUFFLE, FoundControl
from .control_maps import DIFFUSERS, ORIGINAL, OWN_PREFIX, PREFIXES, ControlLayout
from .diffusers_config import MIDDLE, PLAIN_MIDDLE
from .diffusers_export import vector_to_diffusers

if TYPE_CHECKING:
    from torch import Tensor

CLASS = "ControlNetModel"  # of diffusers
WEIGHTS = "diffusion_pytorch_model.safetensors"


def check_control_writable(found: FoundControl, layout: str, name: str) -> None:
    """Raise ValueError for a control network that a layout ("sd", "original", "diffusers") has no place for.

    name   of the file that is to be written
    """
    if found.difference:
        raise ValueError(
            "its weights are only differences from those of a U-Net: give the control network that they were made "
            "from, or use this one as it is (--control)"
        )
    config = found.config
    if layout == "diffusers":
        _layers(config)
    if layout == "original" and config.bgr:
        raise ValueError(
            "an original file cannot say that hints have blue first: write another layout (--layout sd, diffusers)"
        )
    if layout == "original" and config.pooled and not SHUFFLE.search(name):
        raise ValueError(
            "an original file says by its name alone that residuals are averaged: put 'shuffle' in its name"
        )


def control_files(
    layout: str, state: Mapping[str, Tensor], config: ControlConfig
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a control network in a layout ("sd", "original", "diffusers"), and the file's metadata.

    state   by our names
    """
    if layout == "sd":
        return {OWN_PREFIX + key: tensor for key, tensor in state.items()}, {
            "format": "pt", CONTROL_KEY: config.to_json(),
        }  # fmt: skip
    names = ControlLayout(ORIGINAL, PREFIXES[0]) if layout == "original" else ControlLayout(DIFFUSERS, "")
    table = names.sources(config, state)
    out = {source.key: state[key].reshape(state[key].shape + (1,) * source.ones) for key, source in table.items()}
    return out, {"format": "pt"}


def control_texts(config: ControlConfig, version: str = "0.30.0") -> dict[str, str]:
    """The JSON files of a folder of ControlNetModel."""
    content = {"_class_name": CLASS, "_diffusers_version": version, **control_to_diffusers(config)}
    return {"config.json": json.dumps(content, indent=2) + "\n"}


def control_to_diffusers(config: ControlConfig) -> dict[str, Any]:
    """The arguments of diffusers' ControlNetModel. Raises ValueError for a network that it cannot have."""
    cfg, layers = config.unet, _layers(config)
    crossing = [bool(depth) or level in config.bare for level, depth in enumerate(cfg.depth)]
    return {
        "in_channels": cfg.in_channels,
        "conditioning_channels": 3,
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossing],
        "mid_block_type": MIDDLE if cfg.middle_depth or len(cfg.channels) in config.bare else PLAIN_MIDDLE,
        "block_out_channels": list(cfg.channels),
        "layers_per_block": cfg.blocks,
        "transformer_layers_per_block": 1 if set(layers) == {1} else layers,
        "cross_attention_dim": cfg.context,
        # the number of heads: an old misnomer of diffusers
        "attention_head_dim": cfg.heads[0] if len(set(cfg.heads)) == 1 else list(cfg.heads),
        "norm_num_groups": GROUPS,
        "use_linear_projection": cfg.linear_projections,
        "conditioning_embedding_out_channels": list(config.hint),
        "controlnet_conditioning_channel_order": "bgr" if config.bgr else "rgb",
        "global_pool_conditions": config.pooled,
        **vector_to_diffusers(cfg),
    }


def _layers(config: ControlConfig) -> list[int]:
    """The transformer blocks of each level in diffusers' config, whose last number is also the middle's."""
    cfg, levels = config.unet, len(config.unet.channels)
    last = cfg.depth[-1] or (0 if levels - 1 in config.bare else None)
    middle = cfg.middle_depth or (0 if levels in config.bare else None)
    if cfg.middle_depth is None or (last is not None and middle is not None and last != middle):
        raise ValueError(
            f"diffusers has no control network whose {'middle is missing' if middle is None else 'middle is deeper'}: "
            "write another layout (--layout sd, original)"
        )
    ends = [value for value in (last, middle) if value is not None]
    before = [1 if not depth and level not in config.bare else depth for level, depth in enumerate(cfg.depth[:-1])]
    return [*before, ends[0] if ends else 1]
