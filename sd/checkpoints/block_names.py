"""The names of corresponding blocks and layers in ours and in other layouts: the data of key_maps.py.

`*_blocks` walk a config and yield pairs of blocks, ours and theirs; a few rules name the layers inside a block.

>>> from sd.config import SD1
>>> next(pair[:2] for pair in unet_blocks(SD1) if pair[0] == "down.1.attn.0")
('down.1.attn.0', 'input_blocks.4.1')
"""

from __future__ import annotations

from collections.abc import Iterator

from ..config import Config, TextConfig, UNetConfig, VAEConfig

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
    yield from encoder_blocks(cfg, places)
    yield from (("norm_out", "out.0", THIS), ("conv_out", "out.2", THIS))
    for level in reversed(range(last + 1)):
        first, depths = (last - level) * places, cfg.depths_up(level)
        for i, depth in enumerate(depths):
            yield f"up.{level}.res.{i}", f"output_blocks.{first + i}.0", RESBLOCK
            if depth:
                yield f"up.{level}.attn.{i}", f"output_blocks.{first + i}.1", transformer(depth)
        if level > 0:  # the last layer of the level's last block
            index = 2 if depths[-1] else 1
            yield f"up.{level}.up.conv", f"output_blocks.{first + places - 1}.{index}.conv", THIS


def encoder_blocks(cfg: UNetConfig, places: int | None = None) -> Iterator[BlockPair]:
    """The same for the first half of the U-Net, which control networks have as well (control_maps.py)."""
    last = len(cfg.channels) - 1
    places = places or cfg.blocks + 1
    yield from (("time.0", "time_embed.0", THIS), ("time.2", "time_embed.2", THIS))
    if cfg.guidance is not None:  # the original has no such layer: this is the name in published single files
        yield "guidance", "time_embed.cond_proj", THIS
    if cfg.vector is not None:
        yield from (("vector.0", "label_emb.0.0", THIS), ("vector.2", "label_emb.0.2", THIS))
    yield "conv_in", "input_blocks.0.0", THIS
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
    yield from diffusers_encoder_blocks(cfg)
    yield from (("norm_out", "conv_norm_out", THIS), ("conv_out", "conv_out", THIS))
    for level in range(last + 1):
        up = f"up_blocks.{last - level}"
        for i, depth in enumerate(cfg.depths_up(level)):
            yield f"up.{level}.res.{i}", f"{up}.resnets.{i}", DIFFUSERS_RESBLOCK
            if depth:
                yield f"up.{level}.attn.{i}", f"{up}.attentions.{i}", transformer(depth)
        if level > 0:
            yield f"up.{level}.up.conv", f"{up}.upsamplers.0.conv", THIS


def diffusers_encoder_blocks(cfg: UNetConfig) -> Iterator[BlockPair]:
    """The same for the first half of the U-Net, which ControlNetModel has as well."""
    last = len(cfg.channels) - 1
    yield from (("time.0", "time_embedding.linear_1", THIS), ("time.2", "time_embedding.linear_2", THIS))
    if cfg.guidance is not None:
        yield "guidance", "time_embedding.cond_proj", THIS
    if cfg.vector is not None:
        yield from (("vector.0", "add_embedding.linear_1", THIS), ("vector.2", "add_embedding.linear_2", THIS))
    yield "conv_in", "conv_in", THIS
    if cfg.middle_depth is not None:
        yield "mid.res.0", "mid_block.resnets.0", DIFFUSERS_RESBLOCK
    if cfg.middle_depth:
        yield "mid.res.1", "mid_block.resnets.1", DIFFUSERS_RESBLOCK
        yield "mid.attn", "mid_block.attentions.0", transformer(cfg.middle_depth)
    for level, depth in enumerate(cfg.depth):
        for i in range(cfg.blocks):
            yield f"down.{level}.res.{i}", f"down_blocks.{level}.resnets.{i}", DIFFUSERS_RESBLOCK
            if depth:
                yield f"down.{level}.attn.{i}", f"down_blocks.{level}.attentions.{i}", transformer(depth)
        if level < last:
            yield f"down.{level}.down", f"down_blocks.{level}.downsamplers.0.conv", THIS


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
