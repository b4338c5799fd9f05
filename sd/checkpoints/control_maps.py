"""Control networks in files: the names of their weights, and which of these names a file has.

    layout      hint block                             zero convolutions                    half of the U-Net
    original    input_hint_block.0, .2, ..., .14       zero_convs.0.0, middle_block_out.0   input_blocks.1.0, ...
    diffusers   controlnet_cond_embedding.conv_in,     controlnet_down_blocks.0,            down_blocks.0.resnets.0,
                .blocks.0, ..., .conv_out              controlnet_mid_block                 ...
    own         hint.convs.0, .1, ..., .7              zero.0, zero_mid                     down.0.res.0, ...

The half of the U-Net has the names that it has in a U-Net (block_names.py). Before all of them stands "control_model."
in files of the original code, "controlnet." in some others, nothing in most; in files of ours, "control.".

>>> from sd.config import SD1
>>> config = ControlConfig.of(SD1.unet)
>>> layout = ControlLayout("original", "control_model.")
>>> [source.key for source in layout.sources(config, ["hint.convs.7.bias", "zero.11.weight"]).values()]
['control_model.input_hint_block.14.bias', 'control_model.zero_convs.11.0.weight']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from ..control_config import ControlConfig as ControlConfig
from .block_names import (
    DIFFUSERS_RESBLOCK,
    RESBLOCK,
    THIS,
    BlockPair,
    diffusers_encoder_blocks,
    encoder_blocks,
    transformer,
)
from .key_maps import UNET_POINTWISE, Source, layer_table, table_sources

OWN, ORIGINAL, DIFFUSERS = "own", "original", "diffusers"
OWN_PREFIX = "control."
# The prefixes that are known to be in use; a file with another one is read as well
PREFIXES = ("control_model.", "controlnet.", "")
# layout -> keys of which a U-Net has none: the hint block's first layer, the first and the last zero convolution
MARKS = {
    OWN: ("hint.convs.0.weight", "zero.0.weight", "zero_mid.weight"),
    ORIGINAL: ("input_hint_block.0.weight", "zero_convs.0.0.weight", "middle_block_out.0.weight"),
    DIFFUSERS: (
        "controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight", "controlnet_mid_block.weight",
    ),
}  # fmt: skip


class ControlLayout(NamedTuple):
    """The names that a file has for a control network: one of the three sets above, and a prefix."""

    name: str
    prefix: str

    def sources(self, config: ControlConfig, keys: Iterable[str]) -> dict[str, Source]:
        """Where each of our weights `keys` lies in the file."""
        if self.name == OWN:
            return {key: Source(self.prefix + key) for key in keys}
        pointwise = () if config.unet.linear_projections else UNET_POINTWISE
        source = table_sources(layer_table(control_blocks(self.name, config), self.prefix), pointwise)
        # zero convolutions are 1x1 convolutions here as well, so their shapes need no change
        return {key: source(key) for key in keys}


def control_blocks(layout: str, config: ControlConfig) -> Iterator[BlockPair]:
    """The blocks of a control network: ours, those of a layout ("original", "diffusers"), and the rules inside."""
    cfg, convs = config.unet, 2 * len(config.hint)
    count = len(cfg.channels) * (cfg.blocks + 1)  # skip connections: of conv_in, the blocks, the steps between levels
    if layout == ORIGINAL:
        yield from encoder_blocks(cfg)
        yield from _bare_blocks(config, "input_blocks.{}.1", "middle_block.1", ("middle_block.2", RESBLOCK))
        for i in range(convs):  # the original counts the activations between them
            yield f"hint.convs.{i}", f"input_hint_block.{2 * i}", THIS
        for i in range(count):
            yield f"zero.{i}", f"zero_convs.{i}.0", THIS
        yield "zero_mid", "middle_block_out.0", THIS
        return
    yield from diffusers_encoder_blocks(cfg)
    second = ("mid_block.resnets.1", DIFFUSERS_RESBLOCK)
    yield from _bare_blocks(config, "down_blocks.{}.attentions.{}", "mid_block.attentions.0", second)
    hint = "controlnet_cond_embedding"
    yield "hint.convs.0", f"{hint}.conv_in", THIS
    for i in range(1, convs - 1):
        yield f"hint.convs.{i}", f"{hint}.blocks.{i - 1}", THIS
    yield f"hint.convs.{convs - 1}", f"{hint}.conv_out", THIS
    for i in range(count):
        yield f"zero.{i}", f"controlnet_down_blocks.{i}", THIS
    yield "zero_mid", "controlnet_mid_block", THIS


def _bare_blocks(
    config: ControlConfig, place: str, middle: str, second: tuple[str, dict[str, str]]
) -> Iterator[BlockPair]:
    """The transformers without blocks. `place` has room for one number, or for the level and the block in it."""
    cfg = config.unet
    for level in config.bare:
        if level == len(cfg.channels):
            yield "mid.attn", middle, transformer(0)
            yield "mid.res.1", *second
            continue
        for i in range(cfg.blocks):
            numbers = (level, i) if place.count("{}") == 2 else (1 + level * (cfg.blocks + 1) + i,)
            yield f"down.{level}.attn.{i}", place.format(*numbers), transformer(0)


def control_layouts(found: Collection[str]) -> list[ControlLayout]:
    """The control networks in a file with these keys: the one with most of its marks first."""
    marks: Counter[ControlLayout] = Counter()
    for key in found:
        for name, ends in MARKS.items():
            for end in ends:
                if key == end or key.endswith(f".{end}"):
                    layout = ControlLayout(name, key.removesuffix(end))
                    marks[layout] += name != OWN or layout.prefix == OWN_PREFIX
    known = {prefix: number for number, prefix in enumerate((OWN_PREFIX, *PREFIXES))}
    layouts = [layout for layout, count in marks.items() if count]
    return sorted(layouts, key=lambda layout: (-marks[layout], known.get(layout.prefix, len(known))))
