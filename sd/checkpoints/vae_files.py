"""Whose VAE a file holds, that of Stable Diffusion 1.x and 2.x or of SDXL, and whether it overflows in float16.

Both VAEs have the same names and shapes but different latents, so with the wrong one images have wrong colours or are
noise. What tells them apart, the most reliable first:

    the rest of the file         its text encoders or U-Net, its folder's pipeline, the config of a file of ours
    vae/config.json              scaling_factor 0.13025 or 0.18215
    metadata                     modelspec.architecture, ss_base_model_version
    names                        of the file, of its folder, and of its repository: sdxl_vae, vae-ft-mse-840000, ...

Otherwise it cannot be known. Both have been trained on the same kind of images with the same loss, and no property of
the weights or of an encoded image is known that only one of them has.

The activations of SDXL's original VAE exceed the range of float16; the "fp16-fix" is a fine-tune with smaller ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..config import SD1, SD2, SDXL, SDXL_REFINER, Config, VAEConfig
from .checkpoint import Checkpoint, CheckpointError, shapes
from .detect import CONFIG_KEY
from .hub_cache import repository
from .layouts import SECOND, find_layouts
from .other_models import is_sdxl

FAMILIES = {True: "an SDXL model", False: "a Stable Diffusion 1.x or 2.x model"}  # by whether it is SDXL's
UNKNOWN = (
    f"nothing shows whether this is the VAE of {FAMILIES[True]} or of {FAMILIES[False]}, which have the same names and "
    "shapes but different latents"
)
ARCHITECTURES = ("modelspec.architecture", "ss_base_model_version")  # entries of metadata
XL_ARCHITECTURE, SD_ARCHITECTURE = re.compile(r"xl"), re.compile(r"^(stable-diffusion-|sd_)v[12]")
XL_NAME = re.compile(r"(?i:sd[ _.-]?xl)|(?<![A-Za-z])(?i:xl)|(?<=[a-z])XL|(?i:xl)(?![a-z])")
SD_NAME = re.compile(
    r"ft[ _-](mse|ema)|kl-f8|(?<![a-z])sd[ _-]?v?(1|2)(?!\d\d)|stable[ _-]diffusion[ _-]v?[12](?!\d)"
    r"|(?<![a-z\d])v(1-[1-5]|2-[01])(?!\d)",
    re.IGNORECASE,
)
# Official files that contain the original VAE; a file sdxl_vae.safetensors may also be the fixed one
ORIGINAL = re.compile(r"sd_xl_(base|refiner|turbo)_", re.IGNORECASE)
FIXED = re.compile(r"fp16[ _.-]?(vae)?[ _.-]?fix|fix[ _.-]?fp16", re.IGNORECASE)
ATTENTION = re.compile(r"attn2\.(to_)?k\.weight$")


class Whose(NamedTuple):
    """Whose VAE it is, how that is known, and whether that is certain, as neither a name nor a scale is."""

    for_xl: bool
    why: str
    certain: bool = True


def whose_vae(tensors: Checkpoint) -> Whose | None:
    """Whose VAE a file holds; None if nothing tells."""
    found = shapes(tensors)
    if (written := tensors.metadata.get(CONFIG_KEY)) is not None:
        return Whose(bool(Config.from_json(written).sizes), "the file's own config")
    pipeline = str(tensors.configs.get("index", {}).get("_class_name") or "")
    if "StableDiffusion" in pipeline:
        return Whose("XL" in pipeline, f"its folder is a {pipeline:.60}")
    widths = {shape[1] for key, shape in found.items() if ATTENTION.search(key) and len(shape) == 2}
    if is_sdxl(found) or SECOND in find_layouts(found) or widths & {SDXL.unet.context, SDXL_REFINER.unet.context}:
        return Whose(True, "from the rest of the file")
    if widths & {SD1.unet.context, SD2.unet.context} or any(key.startswith("cond_stage_model.") for key in found):
        return Whose(False, "from the rest of the file")
    scale = tensors.configs.get("vae", {}).get("scaling_factor")
    for model in (SDXL, SD1):
        if isinstance(scale, float) and math.isclose(scale, model.vae.scale, rel_tol=1e-4):
            return Whose(model is SDXL, f"vae/config.json has scaling_factor {scale:g}", certain=False)
    for entry in ARCHITECTURES:
        said = str(tensors.metadata.get(entry, "")).lower()
        if XL_ARCHITECTURE.search(said) or SD_ARCHITECTURE.search(said):
            return Whose(bool(XL_ARCHITECTURE.search(said)), f"its metadata says so ({entry})")
    for name in _names(tensors):
        if XL_NAME.search(name) or SD_NAME.search(name):
            return Whose(bool(XL_NAME.search(name)), f"going by the name {name}", certain=False)
    return None


def refuse_other_vae(tensors: Checkpoint, config: Config) -> None:
    """Raise CheckpointError for a file that is to supply the VAE and is certainly of the other family."""
    whose = whose_vae(tensors)
    if whose is not None and whose.certain and whose.for_xl != bool(config.sizes):
        raise CheckpointError(
            f"the VAE of {FAMILIES[whose.for_xl]} ({whose.why}), whose latents differ from those of "
            f"{FAMILIES[bool(config.sizes)]}: give another one with --vae"
        )


def notes_on_vae(tensors: Checkpoint, config: Config) -> Iterator[str]:
    """A line if it is doubtful whether a VAE from another file fits; none for a VAE of unusual size."""
    if not isinstance(config.vae, VAEConfig) or config.vae.channels != VAEConfig().channels:
        return
    whose, own = whose_vae(tensors), FAMILIES[bool(config.sizes)]
    if whose is None:
        yield f"{tensors.path}: {UNKNOWN}: it is taken to be that of {own}"
    elif whose.for_xl != bool(config.sizes):
        yield (
            f"{tensors.path}: this is the VAE of {FAMILIES[whose.for_xl]} ({whose.why}), whose latents differ "
            f"from those of {own}: expect wrong colours (the weights themselves cannot show it)"
        )


def describe_whose(tensors: Checkpoint) -> str:
    """A line on whose VAE it is, for a file that holds only a VAE."""
    whose = whose_vae(tensors)
    if whose is None:
        return UNKNOWN
    return f"this is the VAE of {FAMILIES[whose.for_xl]} ({whose.why})"


def overflows(tensors: Checkpoint, config: Config) -> str:
    """How it is known that the VAE in a file overflows in float16; empty if it is not.

    config   of the model, with this VAE
    """
    if not config.sizes or not isinstance(config.vae, VAEConfig) or any(FIXED.search(name) for name in _names(tensors)):
        return ""
    asked = tensors.configs.get("vae", {}).get("force_upcast")  # diffusers then computes it in float32
    if asked is not None:
        return "force_upcast in its vae/config.json" if asked else ""
    name = next((name for name in _names(tensors) if ORIGINAL.search(name)), None)
    return f"going by the name {name}" if name else ""


def _names(tensors: Checkpoint) -> Iterator[str]:
    """What a file is called: by itself, by its folder, and by its repository."""
    for path in [Path(tensors.path), *(file.path for file in tensors.files)]:
        parent = path.parent.parent if path.parent.name == "vae" else path.parent
        yield from filter(None, (path.stem if path.suffix else path.name, parent.name, repository(path)))
