"""Loading a tiny autoencoder (TAESD) alone, to preview the steps of a run whose images the model's own VAE decodes.

    tiny = load_tiny_vae("taesd_decoder.safetensors", model.config, model.device, model.dtype)
    for step in run:
        images = run.preview(step.x0, tiny)

To decode the images with it as well, load the model with it: `StableDiffusion.load(..., vae="taesd")`.
"""

from __future__ import annotations

import os
from typing import cast

import torch

from ..config import Config, TinyVAEConfig
from ..files import user_path
from ..messages import printable
from ..models.taesd import TinyVAE
from ..text.tokenizer import Note, warn
from .checkpoint import CheckpointError, load_checkpoint, naming
from .convert import convert
from .loading import load_weights, with_part
from .tiny_vae import notes_on_tiny


def load_tiny_vae(
    path: str | os.PathLike[str], config: Config, device: torch.device, dtype: torch.dtype, note: Note = warn
) -> TinyVAE:
    """The tiny autoencoder in a file or folder, for the latents of a model of this config.

    note   receives lines on what is doubtful; they are UserWarnings if it is not given

    Raises CheckpointError for a file of something else, damaged, or of a tiny autoencoder that does not fit the model.
    """
    path = user_path(path)
    with load_checkpoint(path, mapped=True) as file, naming(path):
        found = with_part(config, "vae", file)
        if not isinstance(found.vae, TinyVAEConfig):
            raise CheckpointError("this is a whole VAE, expected a tiny autoencoder (TAESD)")
        if found.vae.factor != config.vae.factor:
            raise CheckpointError(
                f"its latents stand for {found.vae.factor} x {found.vae.factor} pixels, those of {config.name} for "
                f"{config.vae.factor} x {config.vae.factor}: give another one"
            )
        state = convert(file, found, parts=["vae"])["vae"]
        paths = [part.path for part in file.files]
        for line in (*file.notes, *state.notes, *notes_on_tiny(config.vae, paths, bool(config.sizes))):
            note(printable(line))
        with torch.device("meta"):
            tiny = TinyVAE(found.vae)
        return cast(TinyVAE, load_weights(tiny, state, device, dtype))
