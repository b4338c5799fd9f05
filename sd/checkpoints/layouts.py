"""The layout of each network in a file: a set of names, recognised by a key that only this set has.

The same weights go by many names. `key_maps.py` has a table for each set; a file may put a prefix of its own before
them. Networks are detected one by one, because a file may hold only one of them, or each in another layout: an original
checkpoint with diffusers' VAE, a folder whose parts were written by different versions of a library. Within a network,
single weights may have the names of another layout (`Layout.sources`), and a file may hold a network more than once:
`matching.py` chooses one.

    network        layout         characteristic key                            written by
    text_encoder   clip           embeddings.token_embedding.weight             transformers' CLIPTextModel; SD 1.x
                   openclip       positional_embedding, without ".weight"       OpenCLIP; SD 2.x
    text_encoder_2 clip, openclip the same, SDXL's second one                 transformers, OpenCLIP
    vae            original       decoder.mid.block_1.norm1.weight              CompVis
                   diffusers      decoder.mid_block.resnets.0.norm1.weight      diffusers
    vae            taesd...       decoder.3.conv.0.weight, ...: tiny_vae.py     tiny autoencoders (TAESD)
    unet           original       input_blocks.2.0...: a block or a step        CompVis
                   ema            input_blocks10in_layers0weight                its moving average: no dots
                   diffusers      down_blocks.0.resnets.0.norm1.weight          diffusers
                   original-      input_blocks.3.0.op.weight, but nothing       diffusers' script for the full-size
                   spaced         at input_blocks.2                             network, of a smaller one
    each           own            token.weight, down.0.res.0.norm1.weight, ...  this project
    unet           own-0.1        mid.attn.block.norm1.weight                   version 0.1 of this project
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import NamedTuple

from ..config import Config, TinyVAEConfig
from .key_maps import (
    CLIP,
    CLIP_OLD,
    EMA,
    OPENCLIP,
    UNET,
    VAE,
    Source,
    every_name,
    original_text,
    original_unet,
    sources,
)  # fmt: skip
from .tiny_vae import MARKS, is_tiny
from .tiny_vae import OWN as OWN_TINY

SECOND = "text_encoder_2"
AVERAGE = "unet_ema"  # moving average of the U-Net, which a training checkpoint has in addition
TOKENS = "token.weight"  # our name of the text encoder's table of tokens

# Possible prefixes. The first is that of the original files; then those of other programs: generative-models
# (conditioner.*), ComfyUI (text_encoders.*), stable-diffusion.cpp (te.*). A network alone has none.
TEXT_PREFIXES = (
    "text_encoder.", "", "conditioner.embedders.0.transformer.", "conditioner.embedders.0.model.",
    "conditioner.embedders.0.", "text_encoders.clip_l.transformer.", "text_encoders.clip_l.",
    "text_encoders.clip_h.transformer.", "text_encoders.clip_h.", "clip_l.transformer.", "clip_l.",
    "clip_h.transformer.", "clip_h.", "te.", "te1.", "transformer.", "model.", "clip.",
)  # fmt: skip
CLIP_PREFIXES = (
    CLIP, CLIP_OLD, f"{OPENCLIP}text_model.", OPENCLIP, "cond_stage_model.text_model.", "cond_stage_model.",
    *(prefix + inner for prefix in TEXT_PREFIXES for inner in ("text_model.", "")),
)  # fmt: skip
OPENCLIP_PREFIXES = (OPENCLIP, CLIP_OLD, "cond_stage_model.", *TEXT_PREFIXES, "text.", "model.text.")
# Of SDXL's second text encoder
SECOND_PREFIXES = (
    f"{SECOND}.", "conditioner.embedders.1.transformer.", "conditioner.embedders.1.",
    "text_encoders.clip_g.transformer.", "text_encoders.clip_g.", "clip_g.transformer.", "clip_g.", "te2.",
    "cond_stage_model.1.transformer.", "cond_stage_model.1.",
)  # fmt: skip
SECOND_CLIP_PREFIXES = tuple(prefix + inner for prefix in SECOND_PREFIXES for inner in ("text_model.", ""))
SECOND_OPENCLIP_PREFIXES = ("conditioner.embedders.1.model.", *SECOND_PREFIXES)
VAE_PREFIXES = (VAE, "vae.", "")
UNET_PREFIXES = (UNET, "unet.", "diffusion_model.", "model.", "")

MAX_OWN = 4  # words in a prefix that another program has added, at most
# Prefixes of other networks whose weights are named like Stable Diffusion's.
OTHER_PREFIX = re.compile(r"control|adapter|image|vision|visual|refiner|prior|lora|teacher|loss|clip_g|(_[23]|te2)\.$")

OWN_BLOCK, DIFFUSERS_BLOCK = "down.0.res.0.norm1.weight", "down_blocks.0.resnets.0.norm1.weight"
OLD_TRANSFORMER = "mid.attn.block.norm1.weight"

# network -> its layouts: name, characteristic key, prefixes
LAYOUTS: Mapping[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "text_encoder": (
        ("own", TOKENS, ("text_encoder.",)),
        ("clip", "embeddings.token_embedding.weight", CLIP_PREFIXES),
        ("openclip", "positional_embedding", OPENCLIP_PREFIXES),
    ),
    SECOND: (
        ("own", TOKENS, (f"{SECOND}.",)),
        ("clip", "embeddings.token_embedding.weight", SECOND_CLIP_PREFIXES),
        ("openclip", "positional_embedding", SECOND_OPENCLIP_PREFIXES),
    ),
    "vae": (
        ("own", "decoder.mid.res.0.norm1.weight", ("vae.",)),
        ("original", "decoder.mid.block_1.norm1.weight", VAE_PREFIXES),
        ("diffusers", "decoder.mid_block.resnets.0.norm1.weight", VAE_PREFIXES),
        *((name, mark, ("vae.",) if name == OWN_TINY else VAE_PREFIXES) for name, mark in MARKS.items()),
    ),
    "unet": (
        ("own-0.1", OLD_TRANSFORMER, ("unet.",)),
        ("own", OWN_BLOCK, ("unet.",)),
        ("original", "input_blocks.2.0.in_layers.0.weight", UNET_PREFIXES),  # two blocks a level
        ("original", "input_blocks.2.0.op.weight", UNET_PREFIXES),  # one
        ("original-spaced", "input_blocks.3.0.op.weight", UNET_PREFIXES),  # one, numbered as if there were two
        ("diffusers", DIFFUSERS_BLOCK, UNET_PREFIXES),
    ),
    AVERAGE: (
        ("own-0.1", OLD_TRANSFORMER, (f"{AVERAGE}.",)),
        ("own", OWN_BLOCK, (f"{AVERAGE}.",)),
        ("ema", "diffusion_modelinput_blocks10in_layers0weight", (EMA,)),
        ("diffusers", DIFFUSERS_BLOCK, (f"{AVERAGE}.",)),
    ),
}

# The first convolution, by layout: its shape tells the number of input channels.
FIRST = dict.fromkeys(("own", "own-0.1", "diffusers"), "conv_in.weight")
FIRST |= dict.fromkeys(("original", "original-spaced"), "input_blocks.0.0.weight")
FIRST_AVERAGED = "diffusion_modelinput_blocks00weight"


class Layout(NamedTuple):
    """The names that a file has for one network: a table of key_maps.py and a prefix."""

    network: str
    name: str
    prefix: str

    def sources(self, config: Config, keys: Iterable[str], found: Container[str] | None = None) -> dict[str, Source]:
        """Where each of our weights `keys` of the network lies in the file.

        found   the keys in the file: a weight that is not among them gets the name that it has in another layout, if
                that is there
        """
        table = sources(self.network.removesuffix("_ema"), self.name, config, self.prefix, keys)
        if found is None:
            return table
        missing = [key for key, source in table.items() if source.key not in found]
        if missing:
            for name in self.other_names(config):
                others = {key: other for key in missing if (other := name(key)) is not None and other.key in found}
                table |= others
                missing = [key for key in missing if key not in others]
        return table

    def fits(self, config: Config) -> bool:
        """Whether a model of this config has such a network: a second text encoder, a tiny VAE or another."""
        if self.network == "vae":
            return is_tiny(self.name) == isinstance(config.vae, TinyVAEConfig)
        return self.network in (*config.networks, AVERAGE)

    def other_names(self, config: Config) -> Iterator[Callable[[str], Source | None]]:
        """The names that weights may have instead, after the same prefix. Files of ours have none."""
        if self.name not in ("own", "own-0.1", "ema") and not is_tiny(self.name):
            yield from every_name(self.network.removesuffix("_ema"), config, self.prefix)

    def unrun_layer(self, key: str, layers: int) -> bool:
        """Whether a key belongs to a layer of the text encoder after the first `layers`, which are never run."""
        blocks = {"clip": "encoder.layers.", "openclip": "transformer.resblocks."}.get(self.name)
        if blocks is None or not key.startswith(self.prefix + blocks):
            return False
        number = key.removeprefix(self.prefix + blocks).partition(".")[0]
        return number.isdecimal() and int(number) >= layers


def all_layouts(found: Container[str]) -> dict[str, list[Layout]]:
    """The networks in a file with these keys, and their layouts: several if a network is there more than once.

    Those that the original code reads come first.
    """
    layouts = {
        network: [
            Layout(network, name, prefix)
            for name, mark, prefixes in candidates
            for prefix in prefixes
            if prefix + mark in found
        ]
        for network, candidates in LAYOUTS.items()
    }
    # the numbers of a full-size network, which has blocks where a smaller one has none
    plain = [layout._replace(name="original-spaced") for layout in layouts["unet"] if layout.name == "original"]
    layouts["unet"] = [layout for layout in layouts["unet"] if layout not in plain]
    return {network: several for network, several in layouts.items() if several}


def own_prefix(keys: Iterable[str], before: str = "") -> str:
    """The prefix that another program gave all names in a file, if networks are found only without it; else "".

    before   what this project puts before them: the name of a part of a folder

    >>> own_prefix(["autoencoder.decoder.mid.block_1.norm1.weight", "autoencoder.quant_conv.bias"])
    'autoencoder.'
    """
    names = [key for key in keys if "." in key]
    prefix = ""
    for _ in range(MAX_OWN):
        if not names or all_layouts({before + key.removeprefix(prefix) for key in names}):
            return prefix if names else ""
        prefix = prefix + names[0].removeprefix(prefix).partition(".")[0] + "."
        if OTHER_PREFIX.search(prefix) or not all(key.startswith(prefix) for key in names):
            return ""
    return ""


def find_layouts(found: Container[str]) -> dict[str, Layout]:
    """The networks in a file with these keys, and the first layout of each (see `matching.match_layouts`)."""
    return {network: several[0] for network, several in all_layouts(found).items()}


def alone_as(
    network: str, layouts: Mapping[str, Layout], found: Mapping[str, tuple[int, ...]], config: Config
) -> dict[str, Layout]:
    """The layouts of a file from which a network is taken; its text encoder may have another place there.

    A file's only text encoder may be the second one of a model, and the refiner's only one is the second one of SDXL:
    of several, the first that is as wide as the model's is taken.
    """
    if network not in config.text_names:
        return dict(layouts)
    names = [name for name in (network, "text_encoder", SECOND) if name in layouts]
    width = config.text[config.text_names.index(network)].width
    fits = [name for name in names if token_width(layouts[name], found, config) == width]
    if not names or (chosen := (fits or names)[0]) == network:
        return dict(layouts)
    swapped = {chosen: layouts[network]._replace(network=chosen)} if network in layouts else {}
    return {**layouts, **swapped, network: layouts[chosen]._replace(network=network)}


def token_width(layout: Layout, found: Mapping[str, tuple[int, ...]], config: Config) -> int:
    """The width of the text encoder in a file, by its table of tokens; 0 if it has none."""
    (source,) = layout._replace(network="text_encoder").sources(config, [TOKENS]).values()
    return found.get(source.key, (0,))[-1]


def usual_layout(network: str, config: Config) -> Layout:
    """The layout of a network of this config in an original checkpoint."""
    if network in config.text_names:
        return Layout(network, *original_text(config, network))
    return {
        "vae": Layout(network, "taesd" if isinstance(config.vae, TinyVAEConfig) else "original", VAE),
        "unet": Layout(network, original_unet(config), UNET),
        AVERAGE: Layout(network, "ema", EMA),
    }[network]


def first_convolution(layout: Layout) -> str:
    """The key of the U-Net's first convolution, whose shape tells the number of input channels."""
    return layout.prefix + (FIRST_AVERAGED if layout.name == "ema" else FIRST[layout.name])
