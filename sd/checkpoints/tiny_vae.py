"""Tiny autoencoders (TAESD) in files: the names of their weights, and the files in a folder. See also tiny_files.py.

    layout            written by                                    encoder, its first block    decoder, its first block
    taesd             a folder with the original's two files        encoder.1.conv.0            decoder.3.conv.0
    taesd-decoder     the original's decoder alone                  -                           3.conv.0
    taesd-comfyui     ComfyUI, both in one file                     taesd_encoder.1.conv.0      taesd_decoder.3.conv.0
    taesd-diffusers   diffusers' AutoencoderTiny                    encoder.layers.1.conv.0     decoder.layers.2.conv.0
    taesd-own         this project                                  encoder.down.0.blocks.0     decoder.up.3.blocks.0

The original counts all layers of a half, also those without weights. Diffusers does not count the decoder's first one,
the clamp. The encoder's file is named as the decoder's is, so a file of one half is told by the number of its layers.

>>> tiny_layers("taesd-diffusers", TinyVAEConfig())["decoder.up.3.up.conv"]
'decoder.layers.6'
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..config import SD1, SDXL
from ..vae_config import TinyVAEConfig, VAEConfig
from .formats.pickles import RefusedFile
from .hub_cache import repository

# layout -> what its names begin with, in the encoder and in the decoder
HALVES: Mapping[str, tuple[str, str]] = {
    "taesd": ("encoder.", "decoder."),
    "taesd-decoder": ("encoder.", ""),  # without any encoder
    "taesd-comfyui": ("taesd_encoder.", "taesd_decoder."),
    "taesd-diffusers": ("encoder.layers.", "decoder.layers."),
    "taesd-own": ("encoder.", "decoder."),
}
OWN = "taesd-own"
MARKS = {  # layout -> a key that only this layout has
    "taesd": "decoder.3.conv.0.weight",
    "taesd-decoder": "18.conv.0.weight",  # the encoder has 15 layers
    "taesd-comfyui": "taesd_decoder.3.conv.0.weight",
    "taesd-diffusers": "decoder.layers.2.conv.0.weight",
    "taesd-own": "decoder.up.0.blocks.0.conv1.weight",
}
HALF_FILE = re.compile(r"(|\w*tae\w*[_-])(encoder|decoder)(\.[\w-]+)?")  # the stem of a half's file
PREFIX = "taesd_"  # the first part of such a name
XL = re.compile(r"tae\w*xl", re.IGNORECASE)  # in a file's name: for SDXL
TAESD = re.compile(r"(?<![a-z])taesd(?!xl)", re.IGNORECASE)  # for Stable Diffusion 1.x and 2.x
NAME = "a tiny autoencoder (TAESD)"


def tiny_layers(layout: str, config: TinyVAEConfig) -> dict[str, str]:
    """Our layer -> its name in a layout (not "taesd-own", whose names are ours)."""
    of_encoder, of_decoder = HALVES[layout]
    clamp = 0 if layout == "taesd-diffusers" else 1
    return dict([*_numbered(of_encoder, _encoder(config)), *_numbered(of_decoder, _decoder(config), clamp)])


def _encoder(config: TinyVAEConfig) -> Iterator[str | None]:
    """Our layers and blocks of the encoder, in order."""
    yield "encoder.conv_in"
    for level, blocks in enumerate(config.blocks):
        yield from (f"encoder.down.{level}.blocks.{i}" for i in range(blocks))
        yield f"encoder.down.{level}.down" if level < len(config.blocks) - 1 else "encoder.conv_out"


def _decoder(config: TinyVAEConfig) -> Iterator[str | None]:
    """The same of the decoder after its clamp; None stands for a layer without weights."""
    yield from ("decoder.conv_in", None)
    for level in reversed(range(len(config.blocks))):
        yield from (f"decoder.up.{level}.blocks.{i}" for i in range(config.blocks[level]))
        yield from (None, f"decoder.up.{level}.up.conv") if level else ("decoder.conv_out",)


def _numbered(prefix: str, layers: Iterator[str | None], first: int = 0) -> Iterator[tuple[str, str]]:
    for number, ours in enumerate(layers, start=first):
        if ours is not None and ".blocks." in ours:
            for i in range(3):  # convolutions, and ReLUs between them
                yield f"{ours}.conv{i + 1}", f"{prefix}{number}.conv.{2 * i}"
        elif ours is not None:
            yield ours, f"{prefix}{number}"


def is_tiny(layout: str) -> bool:
    """Whether a layout of a VAE is that of a tiny one."""
    return layout in HALVES


def tiny_config(
    known: VAEConfig | TinyVAEConfig, layout: str, prefix: str, found: Container[str]
) -> VAEConfig | TinyVAEConfig:
    """The config of the autoencoder in a file of these keys and this layout.

    known   what the model has, so far: a whole VAE in the file is taken to be this, or Stable Diffusion's
    """
    if not is_tiny(layout):
        return VAEConfig() if isinstance(known, TinyVAEConfig) else known
    tiny = known if isinstance(known, TinyVAEConfig) else TinyVAEConfig()
    first = prefix + HALVES[layout][0] + ("conv_in" if layout == OWN else "0")
    return replace(tiny, encoder=f"{first}.weight" in found)


def describe_tiny(config: TinyVAEConfig) -> str:
    """What it is, in a few words."""
    return NAME if config.encoder else f"{NAME}, only its decoder"


def notes_on_tiny(own: VAEConfig | TinyVAEConfig, paths: list[Path], for_xl: bool = False) -> list[str]:
    """What is doubtful about a tiny autoencoder, one line each.

    own      the autoencoder that the model itself has
    paths    the files of the tiny one
    for_xl   whether the model is SDXL
    """
    lines = []
    called = [name for path in paths for name in (path.name, path.parent.name, repository(path) or "")]
    names, others = ([name for name in called if pattern.search(name)] for pattern in (XL, TAESD))
    if for_xl and others and not names:
        lines.append(
            f"{others[0]}: its name says that it is for Stable Diffusion 1.x and 2.x, whose latents are different: "
            "expect wrong colours; SDXL's is called taesdxl (the weights themselves cannot show it)"
        )
    if names and not for_xl:
        lines.append(
            f"{names[0]}: its name says that it is for SDXL, whose latents are different: expect wrong colours; that "
            "of Stable Diffusion 1.x and 2.x is called taesd (the weights themselves cannot show it)"
        )
    usual = SDXL.vae if for_xl else SD1.vae
    if own not in (usual, TinyVAEConfig(), TinyVAEConfig(encoder=False)):
        family = "SDXL" if for_xl else "Stable Diffusion"
        lines.append(
            f"{NAME} is made for the latents of {family}'s VAE, and this model has another one: expect wrong images"
        )
    return lines


# ---------------------------------------------------------------------------------------------- folders


def half_files(names: list[str]) -> dict[str, str]:
    """The files of a folder that are the halves of a tiny autoencoder: "encoder" or "decoder" -> name. Empty if none.

    Of several, `taesd_encoder` and `taesd_decoder` are taken; RefusedFile if there are only others. A safetensors file
    comes before a pickle, and one of float32 before variants.
    """
    sets: dict[str, dict[str, str]] = {}
    for name in sorted(names, key=lambda name: (not name.endswith(".safetensors"), len(name))):
        match = HALF_FILE.fullmatch(Path(name).stem.lower())
        if match:
            sets.setdefault(match[1], {}).setdefault(match[2], name)
    if len(sets) > 1 and PREFIX not in sets:
        known = ", ".join(sorted(name.rstrip("_-") or "encoder and decoder" for name in sets))
        raise RefusedFile(f"a folder with several tiny autoencoders ({known}); give the decoder's file of one")
    return sets[PREFIX] if PREFIX in sets else next(iter(sets.values()), {})
