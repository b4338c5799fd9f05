"""Files that are not Stable Diffusion 1.x or 2.x, recognised by their keys so that they can be refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .checkpoint import CheckpointError

# Regular expressions that match a key -> what the file is; the first match counts.
NOT_SUPPORTED = "which is not supported (only Stable Diffusion 1.x and 2.x)"
ADDITION = "an addition to a checkpoint, not a checkpoint"
EMBEDDING = f"this is a textual inversion embedding, {ADDITION}: give it with --embedding"
SDXL = r"^conditioner\.embedders\.1\.|add_embedding\.linear_1"
OTHERS: tuple[tuple[str, str], ...] = (
    (r"bitsandbytes__|\.quant_state|\.absmax$|\.qweight$|\.scales$", "this file is quantised, which is not supported"),
    (r"^0$", f"this is a list of tensors without names, as LoRA files may be: {ADDITION}; give it with --lora"),
    (r"lora_|\.lora\.|_lora\.|\.hada_w|\.lokr_w|\.oft_", f"this is a LoRA, {ADDITION}: give it with --lora"),
    (r"^clip_g$", f"this is a textual inversion embedding for SDXL, {NOT_SUPPORTED}"),
    (r"^emb_params$|^string_to_param\.|^clip_l$", EMBEDDING),
    (r"^control_model\.|controlnet_|^adapter\.body|^input_hint_block", f"this is a ControlNet or adapter, {ADDITION}"),
    (r"^image_proj\.|^ip_adapter\.", f"this is an IP-Adapter, {ADDITION}"),
    (r"motion_modules\.", f"this is a motion module (AnimateDiff), {ADDITION}"),
    (SDXL, f"this is an SDXL model, {NOT_SUPPORTED}"),
    (r"joint_blocks\.\d+\.|^transformer\.joint_", f"this is an SD3 model, {NOT_SUPPORTED}"),
    (r"double_blocks\.\d+\.|single_transformer_blocks\.\d+\.", f"this is a Flux model, {NOT_SUPPORTED}"),
    (r"time_stack\.|temporal_transformer_blocks", f"this is a video model, {NOT_SUPPORTED}"),
    (r"^depth_model\.", f"this is a depth-to-image model, {NOT_SUPPORTED}"),
    (r"^embedder\.model\.|^noise_augmentor\.", f"this is an unCLIP model, {NOT_SUPPORTED}"),
    (r"^low_scale_model\.", f"this is an upscaling model, {NOT_SUPPORTED}"),
    (r"^cond_stage_model\.transformer\.token_emb", f"this is LDM text2img-large, {NOT_SUPPORTED}"),
    (r"^cond_stage_model\.roberta\.|\.roberta\.encoder", f"this is AltDiffusion, {NOT_SUPPORTED}"),
    (r"^effnet\.|^prior\.|^generator\.down_blocks", f"this is a cascade, {NOT_SUPPORTED}"),
    (r"^conv_first\.|^params_ema\.|^model\.0\.weight$", "this is an image upscaler (ESRGAN)"),
)  # fmt: skip
OTHER_INPUTS = {5: "a depth-to-image", 7: "an upscaling", 8: "an instruct-pix2pix"}
OTHER_CONTEXTS = {1280: "LDM text2img-large or an SDXL refiner", 2048: "an SDXL"}


def is_sdxl(found: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether this is an SDXL model, whose VAE has the same names and shapes as Stable Diffusion's."""
    return any(re.search(SDXL, key) for key in found)


def refuse_others(found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError, which names the kind of file, for what is not Stable Diffusion 1.x or 2.x."""
    for pattern, what in OTHERS:
        search = re.compile(pattern).search
        if any(search(key) for key in found):
            raise CheckpointError(what)
    if 1 <= len(found) <= 4 and all(shape[-1:] in ((768,), (1024,)) and len(shape) < 3 for shape in found.values()):
        raise CheckpointError(EMBEDDING)
