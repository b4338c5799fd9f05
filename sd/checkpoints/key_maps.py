"""Key maps: the name of each of our weights in other layouts.

The key map is data. `*_blocks` walk the config and yield pairs of corresponding blocks; a few rules name the layers
inside a block. Together they give one table {our key: source}, which is looked up in both directions: patterns are
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

from ..config import Config, TextConfig, TinyVAEConfig, VAEConfig
from . import tiny_vae

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
CLIP_OLD = "cond_stage_model.transformer."  # some fine-tunes lack "text_model."
OPENCLIP = "cond_stage_model.model."
# The prefixes of original text encoders, by `TextConfig.names`; of SDXL and its refiner, with the number of the encoder
TEXT = {"clip": CLIP, "openclip": OPENCLIP}
TEXT_XL = {"clip": "conditioner.embedders.{}.transformer.text_model.", "openclip": "conditioner.embedders.{}.model."}
EMA = "model_ema."


class Source(NamedTuple):
    """Where to find one of our weights in another layout: a tensor, or one third of a fused q, k, v projection."""

    key: str
    third: int | None = None
    ones: int = 0  # dimensions of size 1 that it has in addition: 2 where our linear layer is a 1x1 convolution
    transposed: bool = False  # whether rows and columns are exchanged


Rules = dict[str, str]  # our layer within a block -> their layer within their block
BlockPair = tuple[str, str, Rules]  # our block, their block, and the rules inside

PROJECTIONS: Rules = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
RESBLOCK: Rules = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "skip": "skip_connection",
}  # fmt: skip
TRANSFORMER_BLOCK: Rules = {
    "norm1": "norm1", "norm2": "norm2", "norm3": "norm3", "ff.proj": "ff.net.0.proj", "ff.out": "ff.net.2",
    **{f"{attn}.{a}": f"{attn}.{b}" for attn in ("attn1", "attn2") for a, b in PROJECTIONS.items()},
}  # fmt: skip
SAME_NAMES: Rules = {n: n for n in ("norm1", "conv1", "norm2", "conv2")}
VAE_RESBLOCK: Rules = SAME_NAMES | {"skip": "nin_shortcut"}
VAE_ATTENTION: Rules = {"norm": "norm", "attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.out": "proj_out"}
CLIP_BLOCK: Rules = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
}  # fmt: skip
OPENCLIP_BLOCK: Rules = {
    "norm1": "ln_1", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj", "attn.out": "attn.out_proj",
}  # fmt: skip
DIFFUSERS_RESBLOCK: Rules = SAME_NAMES | {"skip": "conv_shortcut", "time": "time_emb_proj"}
DIFFUSERS_VAE_ATTENTION: Rules = {"norm": "group_norm"} | {f"attn.{a}": b for a, b in PROJECTIONS.items()}
OLD_VAE_ATTENTION: Rules = {  # diffusers before 0.18 (2023)
    "norm": "group_norm", "attn.q": "query", "attn.k": "key", "attn.v": "value", "attn.out": "proj_attn",
}  # fmt: skip
THIS: Rules = {"": ""}  # a block that is a single layer
FULL_BLOCKS = 2  # residual blocks a level of the full-size U-Net, by which some files of smaller ones are numbered

# Rules for the same block. Programs that rename only a part of a network mix them: see `every_name`.
SAME_BLOCK = (
    (RESBLOCK, VAE_RESBLOCK, DIFFUSERS_RESBLOCK),
    (VAE_ATTENTION, DIFFUSERS_VAE_ATTENTION, OLD_VAE_ATTENTION),
    (CLIP_BLOCK, OPENCLIP_BLOCK),
)

# A transformer's only block was "block" in version 0.1; several are "blocks.0", "blocks.1", ...
OWN, OWN_0_1 = (re.compile(rf"(?<=attn)((?:\.\d+)?)\.{name}\.") for name in (r"blocks\.0", "block"))

# layers that are linear here and may be 1x1 convolutions elsewhere
UNET_POINTWISE = (".proj_in", ".proj_out")
VAE_POINTWISE = tuple(f".attn.attn.{n}" for n in PROJECTIONS)


def transformer(depth: int) -> Rules:
    """The rules of a spatial transformer with this number of blocks."""
    return {name: name for name in ("norm", "proj_in", "proj_out")} | {
        f"blocks.{i}.{ours}": f"transformer_blocks.{i}.{theirs}"
        for i in range(depth)
        for ours, theirs in TRANSFORMER_BLOCK.items()
    }


def unet_blocks(config: Config, places: int | None = None) -> Iterator[BlockPair]:
    """The U-Net's blocks: ours, the original ones (without prefix), and the rules inside.

    places   numbers that each level takes, where it is more than the level has blocks (and a step): 3 in files made by
             diffusers' script for the full-size network, which leaves gaps. By default, numbers are consecutive
    """
    cfg = config.unet
    last = len(cfg.channels) - 1
    places = places or cfg.blocks + 1
    yield from (("time.0", "time_embed.0", THIS), ("time.2", "time_embed.2", THIS))
    if cfg.guidance is not None:  # the original has no such layer: this is the name in published single files
        yield "guidance", "time_embed.cond_proj", THIS
    if cfg.vector is not None:
        yield from (("vector.0", "label_emb.0.0", THIS), ("vector.2", "label_emb.0.2", THIS))
    yield from (("conv_in", "input_blocks.0.0", THIS), ("norm_out", "out.0", THIS), ("conv_out", "out.2", THIS))
    # the original numbers the blocks of a direction consecutively, on the way down with the steps between levels
    for level in range(last + 1):
        first = 1 + level * places
        for i in range(cfg.blocks):
            yield f"down.{level}.res.{i}", f"input_blocks.{first + i}.0", RESBLOCK
            if depth := cfg.depth[level]:
                yield f"down.{level}.attn.{i}", f"input_blocks.{first + i}.1", transformer(depth)
        if level < last:
            yield f"down.{level}.down", f"input_blocks.{first + places - 1}.0.op", THIS
    if cfg.middle_depth is not None:
        yield "mid.res.0", "middle_block.0", RESBLOCK
    if cfg.middle_depth:
        yield "mid.attn", "middle_block.1", transformer(cfg.middle_depth)
        yield "mid.res.1", "middle_block.2", RESBLOCK
    for level in reversed(range(last + 1)):
        first, depths = (last - level) * places, cfg.depths_up(level)
        for i, depth in enumerate(depths):
            yield f"up.{level}.res.{i}", f"output_blocks.{first + i}.0", RESBLOCK
            if depth:
                yield f"up.{level}.attn.{i}", f"output_blocks.{first + i}.1", transformer(depth)
        if level > 0:  # the last layer of the level's last block
            index = 2 if depths[-1] else 1
            yield f"up.{level}.up.conv", f"output_blocks.{first + places - 1}.{index}.conv", THIS


def spaced_unet_blocks(config: Config) -> Iterator[BlockPair]:
    """The same in a small U-Net's file, made of a diffusers folder by the script for the full-size network.

    The script knows no attention at the coarsest level of the way up: these transformers keep diffusers' names, and the
    step after them has the number that it has without them.
    """
    coarsest = f"up.{len(config.unet.channels) - 1}."
    for ours, theirs, rules in unet_blocks(config, places=FULL_BLOCKS + 1):
        if ours.startswith(f"{coarsest}attn."):
            theirs = f"up_blocks.0.attentions.{ours.rpartition('.')[2]}"
        elif ours == f"{coarsest}up.conv":
            theirs = f"output_blocks.{FULL_BLOCKS}.1.conv"
        yield ours, theirs, rules


def vae_blocks(config: Config) -> Iterator[BlockPair]:
    """The VAE's blocks. The original counts the decoder's levels from the finest, as here."""
    cfg = config.vae
    assert isinstance(cfg, VAEConfig)
    last = len(cfg.channels) - 1
    yield from (("quant", "quant_conv", THIS), ("post_quant", "post_quant_conv", THIS))
    for half, direction, blocks in (("encoder", "down", cfg.blocks), ("decoder", "up", cfg.blocks + 1)):
        for layer in ("conv_in", "norm_out", "conv_out"):
            yield f"{half}.{layer}", f"{half}.{layer}", THIS
        yield f"{half}.mid.res.0", f"{half}.mid.block_1", VAE_RESBLOCK
        yield f"{half}.mid.attn", f"{half}.mid.attn_1", VAE_ATTENTION
        yield f"{half}.mid.res.1", f"{half}.mid.block_2", VAE_RESBLOCK
        for level in range(last + 1):
            for i in range(blocks):
                yield f"{half}.{direction}.{level}.res.{i}", f"{half}.{direction}.{level}.block.{i}", VAE_RESBLOCK
            if level != (last if direction == "down" else 0):
                yield (
                    f"{half}.{direction}.{level}.{direction}.conv",
                    f"{half}.{direction}.{level}.{direction}sample.conv",
                    THIS,
                )


def clip_blocks(text: TextConfig) -> Iterator[BlockPair]:
    """The text encoder's blocks in transformers' CLIPTextModel."""
    yield "token", "embeddings.token_embedding", THIS
    yield "position", "embeddings.position_embedding", THIS
    yield "norm", "final_layer_norm", THIS
    for i in range(text.layers):
        yield f"blocks.{i}", f"encoder.layers.{i}", CLIP_BLOCK


def openclip_blocks(text: TextConfig) -> Iterator[BlockPair]:
    """The same in OpenCLIP. Its fused q, k, v and its bare position table are added in `text_sources`."""
    yield "token", "token_embedding", THIS
    yield "norm", "ln_final", THIS
    for i in range(text.layers):
        yield f"blocks.{i}", f"transformer.resblocks.{i}", OPENCLIP_BLOCK


def diffusers_unet_blocks(config: Config) -> Iterator[BlockPair]:
    """The U-Net's blocks in diffusers' UNet2DConditionModel."""
    cfg = config.unet
    last = len(cfg.channels) - 1
    yield from (("time.0", "time_embedding.linear_1", THIS), ("time.2", "time_embedding.linear_2", THIS))
    if cfg.guidance is not None:
        yield "guidance", "time_embedding.cond_proj", THIS
    if cfg.vector is not None:
        yield from (("vector.0", "add_embedding.linear_1", THIS), ("vector.2", "add_embedding.linear_2", THIS))
    yield from (("conv_in", "conv_in", THIS), ("norm_out", "conv_norm_out", THIS), ("conv_out", "conv_out", THIS))
    if cfg.middle_depth is not None:
        yield "mid.res.0", "mid_block.resnets.0", DIFFUSERS_RESBLOCK
    if cfg.middle_depth:
        yield "mid.res.1", "mid_block.resnets.1", DIFFUSERS_RESBLOCK
        yield "mid.attn", "mid_block.attentions.0", transformer(cfg.middle_depth)
    for level in range(last + 1):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        depths_down, depths_up = (cfg.depth[level],) * cfg.blocks, cfg.depths_up(level)
        for ours, theirs, depths in ((f"down.{level}", down, depths_down), (f"up.{level}", up, depths_up)):
            for i, depth in enumerate(depths):
                yield f"{ours}.res.{i}", f"{theirs}.resnets.{i}", DIFFUSERS_RESBLOCK
                if depth:
                    yield f"{ours}.attn.{i}", f"{theirs}.attentions.{i}", transformer(depth)
        if level < last:
            yield f"down.{level}.down", f"{down}.downsamplers.0.conv", THIS
        if level > 0:
            yield f"up.{level}.up.conv", f"{up}.upsamplers.0.conv", THIS


def diffusers_vae_blocks(config: Config) -> Iterator[BlockPair]:
    """The VAE's blocks in diffusers' AutoencoderKL. Its attention has had two sets of names (`SAME_BLOCK`)."""
    cfg = config.vae
    assert isinstance(cfg, VAEConfig)
    last = len(cfg.channels) - 1
    yield from (("quant", "quant_conv", THIS), ("post_quant", "post_quant_conv", THIS))
    for half, direction, blocks in (("encoder", "down", cfg.blocks), ("decoder", "up", cfg.blocks + 1)):
        for ours, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield f"{half}.{ours}", f"{half}.{theirs}", THIS
        for i in range(2):
            yield f"{half}.mid.res.{i}", f"{half}.mid_block.resnets.{i}", DIFFUSERS_RESBLOCK
        yield f"{half}.mid.attn", f"{half}.mid_block.attentions.0", DIFFUSERS_VAE_ATTENTION
        for level in range(last + 1):
            ours = f"{half}.{direction}.{level}"
            theirs = f"{half}.{direction}_blocks.{level if direction == 'down' else last - level}"
            for i in range(blocks):
                yield f"{ours}.res.{i}", f"{theirs}.resnets.{i}", DIFFUSERS_RESBLOCK
            if level != (last if direction == "down" else 0):
                yield f"{ours}.{direction}.conv", f"{theirs}.{direction}samplers.0.conv", THIS


def _layers(blocks: Iterable[BlockPair], prefix: str = "") -> dict[str, str]:
    """Our layer -> their layer, for every layer that a block of these kinds may have."""
    return {
        f"{ours}.{a}".rstrip("."): f"{prefix}{theirs}.{b}".rstrip(".")
        for ours, theirs, rules in blocks
        for a, b in rules.items()
    }


def text_sources(layout: str, text: TextConfig, prefix: str) -> Callable[[str], Source]:
    """The sources of a text encoder's weights, by our key. `layout` "clip" (transformers' names) or "openclip"."""
    blocks = openclip_blocks if layout == "openclip" else clip_blocks
    layers = _layers(blocks(text), prefix)
    if layout == "clip":  # transformers' CLIPTextModelWithProjection has the layer beside its `text_model`
        return _sources({"projection": prefix.removesuffix("text_model.") + "text_projection", **layers})
    plain = _sources(layers)

    def source(key: str) -> Source:
        layer, _, leaf = key.rpartition(".")
        if layer == "projection":  # a bare matrix, by which vectors are multiplied from the right
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
        return _sources({ours: prefix + theirs for ours, theirs in tiny_vae.tiny_layers(layout, config.vae).items()})
    if layout == "original":
        return _sources(_layers(vae_blocks(config), prefix), VAE_POINTWISE)
    return _sources(_layers(diffusers_vae_blocks(config), prefix))


def unet_sources(layout: str, config: Config, prefix: str) -> Callable[[str], Source]:
    """The same for the U-Net.

    layout   "original", "original-spaced" (see `spaced_unet_blocks`), "diffusers", or "ema", the moving average in an
             original file
    """
    pointwise = () if config.unet.linear_projections else UNET_POINTWISE
    if layout == "diffusers":
        return _sources(_layers(diffusers_unet_blocks(config), prefix), pointwise)
    if layout == "original":
        return _sources(_layers(unet_blocks(config), prefix), pointwise)
    if layout == "original-spaced":
        return _sources(_layers(spaced_unet_blocks(config), prefix), pointwise)
    raw = _sources(_layers(unet_blocks(config), UNET), pointwise)

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
    elif network == "vae":
        walks = (vae_blocks(config), diffusers_vae_blocks(config))
    else:
        walks = (unet_blocks(config), diffusers_unet_blocks(config))
    for pairs in map(list, walks):
        for number in range(max(map(len, SAME_BLOCK))):
            yield _known(_layers([(ours, theirs, _rules(rules, number)) for ours, theirs, rules in pairs], prefix))


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


def _sources(layers: Mapping[str, str], pointwise: tuple[str, ...] = ()) -> Callable[[str], Source]:
    """Our key -> its source, by a table of layers; those whose names end in `pointwise` are 1x1 convolutions there."""

    def source(key: str) -> Source:
        layer, _, leaf = key.rpartition(".")
        return Source(f"{layers[layer]}.{leaf}", ones=2 if leaf == "weight" and layer.endswith(pointwise) else 0)

    return source


def ema_key(key: str) -> str:
    """The key of a U-Net weight's moving average: without "model." and without dots (LitEma of the original)."""
    return EMA + key.removeprefix("model.").replace(".", "")
