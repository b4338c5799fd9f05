"""Tiny autoencoders (TAESD) as diffusers describes them, and the files of one alone, for other programs.

>>> tiny_from_diffusers(tiny_to_diffusers(TinyVAEConfig())) == TinyVAEConfig()
True
>>> list(tiny_files("original", {}, TinyVAEConfig()))
['taesd_encoder.safetensors', 'taesd_decoder.safetensors']
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..vae_config import TinyVAEConfig, VAEConfig
from .supported_settings import TINY_VAE, Supported, check_supported
from .tiny_vae import PREFIX, tiny_layers

if TYPE_CHECKING:
    from torch import Tensor

CLASS = "AutoencoderTiny"  # of diffusers
WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")  # of AutoencoderTiny


def tiny_from_diffusers(raw: Mapping[str, Any]) -> TinyVAEConfig:
    """The tiny autoencoder described by a config.json. Raises CheckpointError, or ValueError for nonsense."""
    blocks = tuple(raw.get("num_encoder_blocks", (1, 3, 3, 3)))
    widths = raw.get("encoder_block_out_channels", [64] * len(blocks))
    like_encoder: Supported = {"num_decoder_blocks": blocks, **dict.fromkeys(WIDTHS, (widths[0],))}
    check_supported("vae", raw, TINY_VAE | like_encoder)
    if tuple(raw.get("num_decoder_blocks", reversed(blocks))) != blocks[::-1]:
        raise ValueError(f"num_decoder_blocks {raw['num_decoder_blocks']!r:.100} are not the encoder's in reverse")
    if {len(raw.get(name, blocks)) for name in WIDTHS} != {len(blocks)}:
        raise ValueError(f"not one entry of {WIDTHS[0]} and {WIDTHS[1]} for each of {len(blocks)} levels")
    return TinyVAEConfig(width=widths[0], blocks=blocks, latent_channels=raw.get("latent_channels", 4))


def tiny_to_diffusers(config: TinyVAEConfig) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderTiny."""
    widths = [config.width] * len(config.blocks)
    return {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "act_fn": "relu",
        "latent_channels": config.latent_channels,
        "upsampling_scaling_factor": 2,
        "num_encoder_blocks": list(config.blocks),
        "num_decoder_blocks": list(reversed(config.blocks)),
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "scaling_factor": config.scale,
        "force_upcast": False,
    }


def tiny_files(layout: str, state: Mapping[str, Tensor], config: TinyVAEConfig) -> dict[str, dict[str, Tensor]]:
    """A tiny autoencoder alone as files: name -> weights.

    layout   "sd", ours, one file; "original", one file for each half; "diffusers"
    """
    if layout == "sd":
        return {"": {f"vae.{key}": tensor for key, tensor in state.items()}}
    table = tiny_layers("taesd-diffusers" if layout == "diffusers" else "taesd", config)
    out = {f"{table[layer]}.{leaf}": state[f"{layer}.{leaf}"] for layer, _, leaf in (k.rpartition(".") for k in state)}
    if layout == "diffusers":
        return {"diffusion_pytorch_model.safetensors": out}
    halves = [half for half in ("encoder", "decoder") if half == "decoder" or config.encoder]
    return {
        f"{PREFIX}{half}.safetensors": {
            key.removeprefix(f"{half}."): tensor for key, tensor in out.items() if key.startswith(f"{half}.")
        }
        for half in halves
    }


def check_writable(config: VAEConfig | TinyVAEConfig, layout: str, alone: bool = False) -> None:
    """Raise ValueError for a tiny autoencoder that a layout ("sd", "original", "diffusers") has no place for.

    alone   whether it is written alone, not as the VAE of a model
    """
    if not isinstance(config, TinyVAEConfig):
        return
    if layout == "original" and not alone:
        raise ValueError(
            "an original checkpoint has no place for a tiny autoencoder (TAESD): take a whole VAE with --vae, or write "
            "another layout (--layout sd, diffusers)"
        )
    if layout == "diffusers" and not config.encoder:
        raise ValueError(
            "diffusers has no tiny autoencoder (TAESD) without an encoder: give a folder with both of its files, "
            "taesd_encoder and taesd_decoder, or write another layout (--layout sd)"
        )


def tiny_texts(config: TinyVAEConfig, version: str = "0.30.0") -> dict[str, str]:
    """The JSON files of a folder of AutoencoderTiny."""
    content = {"_class_name": CLASS, "_diffusers_version": version, **tiny_to_diffusers(config)}
    return {"config.json": json.dumps(content, indent=2) + "\n"}
