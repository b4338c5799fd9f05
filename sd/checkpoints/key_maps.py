"""Key maps: the name of each of our weights in other layouts.

The key map is data (block_names.py): pairs of corresponding blocks, and a few rules that name the layers inside a
block. Together they give one table {our key: source}, which is looked up in both directions: patterns are
never applied to unknown keys.

    ours                                 original (CompVis), after the prefix of the network
    unet.down.1.attn.0.blocks.0.attn2.q  input_blocks.4.1.transformer_blocks.0.attn2.to_q
    vae.encoder.mid.attn.attn.q          encoder.mid.attn_1.q, a 1x1 convolution
    text_encoder.blocks.3.attn.q         encoder.layers.3.self_attn.q_proj (CLIP)
                                         transformer.resblocks.3.attn.in_proj, the first third of it (OpenCLIP)

The same for diffusers and transformers.

    unet.down.1.attn.0.blocks.0.attn2.q  down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q
    unet.up.0.res.2.conv1                up_blocks.3.resnets.2.conv1: on the way up they count from the coarsest level
    vae.encoder.mid.attn.attn.q          encoder.mid_block.attentions.0.to_q

>>> from sd.config import SD1
>>> unet_sources("original", SD1, UNET)("down.1.attn.0.blocks.0.attn2.q.weight").key
'model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q.weight'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from ..config import Config, TextConfig, TinyVAEConfig
from . import tiny_vae
from .block_names import (
    PROJECTIONS,
    SAME_BLOCK,
    BlockPair,
    Rules,
    clip_blocks,
    diffusers_unet_blocks,
    diffusers_vae_blocks,
    openclip_blocks,
    spaced_unet_blocks,
    unet_blocks,
    vae_blocks,
)

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
CLIP_OLD = "cond_stage_model.transformer."  # some fine-tunes lack "text_model."
OPENCLIP = "cond_stage_model.model."
# The prefixes of text encoders in original files, by `TextConfig.names`; in those of SDXL, with the encoder's number
TEXT = {"clip": CLIP, "openclip": OPENCLIP}
TEXT_XL = {"clip": "conditioner.embedders.{}.transformer.text_model.", "openclip": "conditioner.embedders.{}.model."}
EMA = "model_ema."


class Source(NamedTuple):
    """Where to find one of our weights in another layout: a tensor, or one third of a fused q, k, v projection."""

    key: str
    third: int | None = None
    ones: int = 0  # dimensions of size 1 that it has in addition: 2 where our linear layer is a 1x1 convolution
    transposed: bool = False  # whether rows and columns are exchanged


# A transformer's only block was "block" in version 0.1; several are "blocks.0", "blocks.1", ...
OWN, OWN_0_1 = (re.compile(rf"(?<=attn)((?:\.\d+)?)\.{name}\.") for name in (r"blocks\.0", "block"))

# layers that are linear here and may be 1x1 convolutions elsewhere
UNET_POINTWISE = (".proj_in", ".proj_out")
VAE_POINTWISE = tuple(f".attn.attn.{n}" for n in PROJECTIONS)


def layer_table(blocks: Iterable[BlockPair], prefix: str = "") -> dict[str, str]:
    """Our layer -> their layer, for every layer that a block of these kinds may have."""
    return {
        f"{ours}.{a}".rstrip("."): f"{prefix}{theirs}.{b}".rstrip(".")
        for ours, theirs, rules in blocks
        for a, b in rules.items()
    }


def text_sources(layout: str, text: TextConfig, prefix: str) -> Callable[[str], Source]:
    """The sources of a text encoder's weights, by our key. `layout` "clip" (transformers' names) or "openclip"."""
    blocks = openclip_blocks if layout == "openclip" else clip_blocks
    layers = layer_table(blocks(text), prefix)
    if layout == "clip":  # transformers' CLIPTextModelWithProjection has this layer beside `text_model`
        return table_sources({"projection": prefix.removesuffix("text_model.") + "text_projection", **layers})
    plain = table_sources(layers)

    def source(key: str) -> Source:
        layer, _, leaf = key.rpartition(".")
        if layer == "projection":  # a bare matrix P, as in x @ P
            return Source(prefix + "text_projection", transposed=True)
        block, _, name = layer.rpartition(".attn.")
        if layer == "position":
            return Source(prefix + "positional_embedding")
        if name in ("q", "k", "v"):
            return Source(f"{prefix}transformer.res{block}.attn.in_proj_{leaf}", third="qkv".index(name))
        return plain(key)

    return source


def vae_sources(layout: str, config: Config, prefix: str) -> Callable[[str], Source]:
    """The same for the VAE. `layout` "original" or "diffusers"; of a tiny one, one of `tiny_vae.HALVES`."""
    if isinstance(config.vae, TinyVAEConfig):
        return table_sources(
            {ours: prefix + theirs for ours, theirs in tiny_vae.tiny_layers(layout, config.vae).items()}
        )
    if layout == "original":
        return table_sources(layer_table(vae_blocks(config), prefix), VAE_POINTWISE)
    return table_sources(layer_table(diffusers_vae_blocks(config), prefix))


def unet_sources(layout: str, config: Config, prefix: str) -> Callable[[str], Source]:
    """The same for the U-Net.

    layout   "original", "original-spaced" (see `spaced_unet_blocks`), "diffusers", or "ema", the moving average in an
             original file
    """
    pointwise = () if config.unet.linear_projections else UNET_POINTWISE
    if layout == "diffusers":
        return table_sources(layer_table(diffusers_unet_blocks(config), prefix), pointwise)
    if layout == "original":
        return table_sources(layer_table(unet_blocks(config), prefix), pointwise)
    if layout == "original-spaced":
        return table_sources(layer_table(spaced_unet_blocks(config), prefix), pointwise)
    raw = table_sources(layer_table(unet_blocks(config), UNET), pointwise)

    def source(key: str) -> Source:
        return raw(key)._replace(key=prefix + ema_key(raw(key).key).removeprefix(EMA))

    return source


def original_unet(config: Config) -> str:
    """The layout of a U-Net in an original checkpoint; one without a middle has the only numbers that exist for it."""
    return "original" if config.unet.middle_depth is not None else "original-spaced"


def sources(network: str, layout: str, config: Config, prefix: str, keys: Iterable[str]) -> dict[str, Source]:
    """The sources of a network's weights ("text_encoder", "text_encoder_2", "vae", "unet") in a layout, by our keys.

    layout   "own", "own-0.1" (as written by version 0.1), or one that the network's function above knows
    prefix   the prefix of every key in that layout
    """
    if layout in ("own", tiny_vae.OWN):
        return {key: Source(prefix + key) for key in keys}
    if layout == "own-0.1":
        return {key: Source(prefix + OWN.sub(r"\1.block.", key)) for key in keys}
    if network in config.text_names:
        source = text_sources(layout, text_of(config, network), prefix)
    else:
        source = {"vae": vae_sources, "unet": unet_sources}[network](layout, config, prefix)
    return {key: source(key) for key in keys}


def every_name(network: str, config: Config, prefix: str) -> Iterator[Callable[[str], Source | None]]:
    """All names that the weights of a network may have after a prefix, one layout after the other.

    That includes blocks whose layers are named as in another layout, such as `mid.attn_1.to_q`. The result of a
    callable is None for a weight that has no name of this kind.
    """
    walks: tuple[Iterable[BlockPair], ...]
    if network in config.text_names:
        text = text_of(config, network)
        walks = (clip_blocks(text), openclip_blocks(text))
        yield text_sources("openclip", text, prefix)  # has names that are not in a table
        # diffusers' converter to original SDXL files left it as it is in transformers: a linear layer
        yield lambda key: Source(prefix + "text_projection.weight") if key == "projection.weight" else None
    elif network == "vae":
        walks = (vae_blocks(config), diffusers_vae_blocks(config))
    else:
        walks = (unet_blocks(config), diffusers_unet_blocks(config))
    for pairs in map(list, walks):
        for number in range(max(map(len, SAME_BLOCK))):
            yield _known(layer_table([(ours, theirs, _rules(rules, number)) for ours, theirs, rules in pairs], prefix))


def _rules(rules: Rules, number: int) -> Rules:
    """The rules for the same block with this number, if there are several."""
    same = next((same for same in SAME_BLOCK if any(rules is other for other in same)), (rules,))
    return same[number % len(same)]


def _known(layers: Mapping[str, str]) -> Callable[[str], Source | None]:
    def source(key: str) -> Source | None:
        layer, _, leaf = key.rpartition(".")
        return Source(f"{layers[layer]}.{leaf}") if layer in layers else None

    return source


def from_own_0_1(key: str) -> str:
    """Our name of a weight, by its name in version 0.1."""
    return OWN_0_1.sub(r"\1.blocks.0.", key)


def text_of(config: Config, network: str) -> TextConfig:
    """The text encoder of this name ("text_encoder", "text_encoder_2")."""
    return config.text[config.text_names.index(network)]


def original_text(config: Config, network: str) -> tuple[str, str]:
    """The layout of a text encoder in an original checkpoint of this config, and its prefix."""
    number = config.text_names.index(network)
    names = config.text[number].names
    return names, (TEXT_XL if config.sizes else TEXT)[names].format(number)


def original_sources(config: Config, keys: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Source]]:
    """Per network, the sources of our weights in an original checkpoint of this config.

    keys   per network ("text_encoder", "vae", "unet", "unet_ema"), our names of its weights
    """
    unet = (original_unet(config), UNET)
    where = {"vae": ("original", VAE), "unet": unet, "unet_ema": ("ema", EMA)}
    where |= {network: original_text(config, network) for network in config.text_names}
    return {
        network: sources(network.removesuffix("_ema"), where[network][0], config, where[network][1], of_network)
        for network, of_network in keys.items()
    }


def diffusers_sources(config: Config, keys: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Source]]:
    """Per network, the sources of our weights in diffusers' and transformers' modules of this config.

    These are UNet2DConditionModel, AutoencoderKL and transformers 5's CLIPTextModel, also for OpenCLIP; earlier
    versions of transformers put "text_model." before every key. `keys` as for `original_sources`.
    """
    layout = dict.fromkeys(config.text_names, "clip") | (
        {"vae": "taesd-diffusers"} if isinstance(config.vae, TinyVAEConfig) else {}
    )
    return {
        network: sources(network, layout.get(network, "diffusers"), config, "", of_network)
        for network, of_network in keys.items()
    }


def table_sources(layers: Mapping[str, str], pointwise: tuple[str, ...] = ()) -> Callable[[str], Source]:
    """Our key -> its source, by a table of layers; those whose names end in `pointwise` are 1x1 convolutions there."""

    def source(key: str) -> Source:
        layer, _, leaf = key.rpartition(".")
        return Source(f"{layers[layer]}.{leaf}", ones=2 if leaf == "weight" and layer.endswith(pointwise) else 0)

    return source


def ema_key(key: str) -> str:
    """The key of a U-Net weight's moving average: without "model." and without dots (LitEma of the original)."""
    return EMA + key.removeprefix("model.").replace(".", "")
