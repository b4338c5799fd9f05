"""Files that are not Stable Diffusion 1.x, 2.x or XL, recognised by their keys so that they can be refused by name.

Two tables: what makes a file another model or an addition, whatever else is in it; and what a file without a known
network is. A row may also ask for the shape of the weight that its key matches.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from .checkpoint import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


class Other(NamedTuple):
    """Regular expressions that match a key, and the shape of that weight as text ("64x32x3x3"); what the file is."""

    key: str
    what: str
    shape: str = ""


NOT_SUPPORTED = "which is not supported (only Stable Diffusion 1.x, 2.x and XL)"
ADDITION = "an addition to a checkpoint, not a checkpoint"
UNSUPPORTED_ADDITION = f"{ADDITION}, and not supported"
EMBEDDING = f"this is a textual inversion embedding, {ADDITION}: give it with --embedding"
SDXL = r"^conditioner\.embedders\.1\.|add_embedding\.linear_1"
QUANTISED = "this file is quantised, which is not supported: give one with float16, bfloat16 or float32 weights"
LONG_CLIP = (
    "this has a text encoder with 248 positions (Long-CLIP), which is not supported: prompts have 77; give another one "
    "with --text-encoder"
)
DIFFUSION_TRANSFORMER = f"this is a diffusion transformer (PixArt, Sana, Lumina, Wan, LTX, ...), {NOT_SUPPORTED}"

# The first convolution of a tiny decoder (tiny_vae.py)
TINY_DECODER = r"^(first_stage_model\.|vae\.)?(((taesd_)?decoder\.)?1|decoder\.layers\.0)\.weight$"
TINY = "this is a tiny autoencoder (TAESD) of another family"
TINY_OF_SD = "not of Stable Diffusion: give taesd (1.x, 2.x) or taesdxl (XL)"

# Text encoders and autoencoders with the names of Stable Diffusion's, of which another file may be taken instead.
OTHER_TEXTS: tuple[Other, ...] = (
    Other(r"positional_embedding_res$|position_embedding_res\b", LONG_CLIP),
    Other(r"(position_embedding\.weight|positional_embedding)$", LONG_CLIP, "248x.*"),
)
OTHER_VAES: tuple[Other, ...] = (
    Other(r"\bdecoder\.conv_in\.weight$", "this is the VAE of another family (SD3, FLUX.1: 16 latent channels), not of "
          "Stable Diffusion 1.x, 2.x or XL", "512x16x3x3"),
    Other(r"\bdecoder\.conv_in\.weight$", "this is the VAE of another family (FLUX.2: 32 latent channels), not of "
          "Stable Diffusion 1.x, 2.x or XL", "512x32x3x3"),
    Other(r"\bquantize\.embedding\.", "this has a VQ autoencoder, not the VAE of Stable Diffusion"),
    Other(TINY_DECODER, f"{TINY} (SD3 or FLUX.1: 16 latent channels), {TINY_OF_SD}", "64x16x3x3"),
    Other(TINY_DECODER, f"{TINY} (FLUX.2: 32 latent channels), {TINY_OF_SD}", "64x32x3x3"),
    Other(TINY_DECODER, f"{TINY} (Sana: 32 latent channels, 32x32 pixels each), {TINY_OF_SD}", "256x32x3x3"),
    Other(TINY_DECODER, f"{TINY} (not 4 latent channels), {TINY_OF_SD}", r"64x(?!4x)\d+x3x3"),
)  # fmt: skip

CONTROL = Other(
    r"^(control_model|control\.hint)\.|controlnet_|^input_hint_block\.|^zero_convs\.",
    f"this is a ControlNet, {ADDITION}: give it with --control",
)
WHOLE_CONTROL = "give a ControlNet that is a network of its own"
# Files that add an image as a condition in another way, also if they have names of a ControlNet
OTHER_CONTROLS: tuple[Other, ...] = (
    Other(r"^lllite_", f"this is a ControlNet-LLLite, {UNSUPPORTED_ADDITION}: {WHOLE_CONTROL}"),
    Other(r"^lora_controlnet$", f"this is a Control-LoRA, {UNSUPPORTED_ADDITION}: {WHOLE_CONTROL}"),
    Other(r"\b(base_to_ctrl|ctrl_to_base|control_to_base_for_conv_in)\b|\b(enc|dec)_zero_convs_(in|out)\.",
          f"this is a ControlNet-XS, {UNSUPPORTED_ADDITION}: {WHOLE_CONTROL}"),
    Other(r"\btask_embedding$|\bcontrol_add_embedding\.", "this is a union ControlNet (one "
          "network for several kinds of hints, also called ProMax), "
          f"{UNSUPPORTED_ADDITION}: give one for a single kind"),
    Other(r"\bcontrolnet_(single_)?blocks\.|\bcontrolnet_(x|mode)_embedder\.", "this is a ControlNet for SD3, Flux or "
          f"another diffusion transformer, {NOT_SUPPORTED}"),
    Other(r"\bbrushnet_", f"this is a BrushNet, {UNSUPPORTED_ADDITION}"),
    Other(r"\bcontrolnet_cond_embedding\.\d|\bcontrolnet_cond_embedding\.conv_in\.conv\.", "this is a ControlNet for "
          f"videos (SparseCtrl), {UNSUPPORTED_ADDITION}"),
    Other(r"^(adapter\.)?body\.\d+\.(in_conv|block[12]|resnets)\b|^style_embedding$",
          f"this is a T2I-Adapter, {UNSUPPORTED_ADDITION}"),
)  # fmt: skip

# In whatever file; the first match counts.
OTHERS: tuple[Other, ...] = (
    # bitsandbytes (4 and 8 bits), GPTQ and AWQ, ComfyUI's scaled float8, Quanto, HQQ
    Other(r"bitsandbytes__|\.quant_state|\.absmax$|\.SCB$|\.weight_format$|\.qweight$|\.qzeros$|\.scales$", QUANTISED),
    Other(r"\.weight_scale(_2)?$|\.scale_weight$|^scaled_fp8$|\.comfy_quant$", QUANTISED),
    Other(r"\.weight\._(data|scale)$|\.W_q$", QUANTISED),
    *OTHER_CONTROLS,
    Other(r"^0$", f"this is a list of tensors without names, as LoRA files may be: {ADDITION}; give it with --lora"),
    Other(r"lora_|\.lora\.|_lora\.|\.hada_w|\.lokr_w|\.oft_", f"this is a LoRA, {ADDITION}: give it with --lora"),
    Other(r"^em[bp]_params(_out)?$|^string_to_param\.|^clip_[lg]$", EMBEDDING),
    CONTROL,
    Other(r"^image_proj\.|^ip_adapter\.|\bto_[kv]_ip\.", f"this is an IP-Adapter, {UNSUPPORTED_ADDITION}"),
    Other(r"motion_modules\.", f"this is a motion module (AnimateDiff), {UNSUPPORTED_ADDITION}"),
    Other(r"joint_blocks\.\d+\.|^transformer\.joint_", f"this is an SD3 model, {NOT_SUPPORTED}"),
    Other(r"double_blocks\.\d+\.|single_transformer_blocks\.\d+\.", f"this is a Flux model, {NOT_SUPPORTED}"),
    Other(r"time_stack\.|temporal_transformer_blocks", f"this is a video model, {NOT_SUPPORTED}"),
    Other(r"\btemp_(convs|attentions)\.", f"this is a video model, {NOT_SUPPORTED}"),
    Other(r"\bhead\.modulation$|\bpatchify_proj\.|\bcap_embedder\.", DIFFUSION_TRANSFORMER),
    Other(r"\bdouble_layers\.|\badaln_single\.|\bscale_shift_table$", DIFFUSION_TRANSFORMER),
    Other(r"^depth_model\.", f"this is a depth-to-image model, {NOT_SUPPORTED}"),
    Other(r"^embedder\.model\.|^noise_augmentor\.", f"this is an unCLIP model, {NOT_SUPPORTED}"),
    Other(r"^low_scale_model\.", f"this is an upscaling model, {NOT_SUPPORTED}"),
    Other(r"\bfuser\.(alpha_attn|linear)|\bposition_net\.", f"this is a GLIGEN model, {NOT_SUPPORTED}"),
    Other(r"^cond_stage_model\.transformer\.token_emb", f"this is LDM text2img-large, {NOT_SUPPORTED}"),
    Other(r"^cond_stage_model\.roberta\.|\.roberta\.encoder", f"this is AltDiffusion, {NOT_SUPPORTED}"),
    Other(r"^effnet\.|^prior\.|^generator\.down_blocks|\bclip_txt_mapper\.",
          f"this is Stable Cascade, {NOT_SUPPORTED}"),
    Other(r"\bstylegan_decoder\.|\bft_layers\.\d+\.",
          "this is a network that restores faces (GFPGAN, CodeFormer), not a checkpoint"),
    Other(r"^conv_first\.|^params_ema\.|^model\.0\.weight$", "this is an image upscaler (ESRGAN), not a checkpoint"),
)  # fmt: skip

UPSCALER = "this is an image upscaler (SwinIR, HAT, DAT, Real-ESRGAN), not a checkpoint"
ENCODER = "not a CLIP text encoder: give one with --text-encoder, beside a checkpoint (--ckpt)"
# In a file in which no network that is known here was found; the first match counts.
ALONE: tuple[Other, ...] = (
    Other(TINY_DECODER, "this is the decoder of a tiny autoencoder (TAESD) with most of its weights missing: download "
          "it again", "64x4x3x3"),
    Other(r"^(first_stage_model\.|vae\.)?((taesd_)?encoder\.(layers\.)?)?0\.weight$", "this is the encoder of a tiny "
          "autoencoder (TAESD), which cannot decode: give its decoder's file, or a folder with both, with --vae",
          "(64|32)x3x3x3"),
    Other(r"\b(concept_embeds|special_care_embeds)$", "this is a safety checker, not a checkpoint: none is used here"),
    Other(r"\bresidual_group\.blocks\.|^layers\.0\.blocks\.0\.attn", UPSCALER),
    Other(r"^(params\.)?body\.\d+\.(weight|rdb1\.)", UPSCALER),
    Other(r"\bencoder\.block\.0\.layer\.0\.SelfAttention\.", f"this is a T5 text encoder, {ENCODER}"),
    Other(r"\blayers\.0\.self_attn\.q_proj\.", f"this is a language model, {ENCODER}", r"(?!768x|1024x|1280x).*"),
    Other(r"^(roberta|bert|embeddings\.word_embeddings)\b", f"this is a BERT, {ENCODER}"),
    Other(r"^(image_encoder\.|mask_decoder\.|prompt_encoder\.)", "this is a network that segments images (SAM), not a "
          "checkpoint"),
    Other(r"^(vision_model|visual)\.", "this is an image encoder (CLIP vision), not a checkpoint"),
    Other(r"^(320|640|768|1024|1280)\.", f"this is a hypernetwork, {UNSUPPORTED_ADDITION}"),
)  # fmt: skip
OTHER_INPUTS = {5: "a depth-to-image", 7: "an upscaling", 8: "an instruct-pix2pix"}
OTHER_CONTEXTS = {1280: "LDM text2img-large or another SDXL refiner", 2048: "another SDXL"}


def is_sdxl(found: Shapes) -> bool:
    """Whether this is an SDXL model, whose VAE has the same names and shapes as Stable Diffusion's."""
    return any(re.search(SDXL, key) for key in found)


def refuse_others(found: Shapes, replaced: Collection[str] = ()) -> None:
    """Raise CheckpointError, which names the kind of file, for what is not Stable Diffusion 1.x, 2.x or XL.

    replaced   networks that are taken from other files: "text_encoder", "vae"
    """
    _refuse(found, OTHERS)
    _refuse(found, () if "text_encoder" in replaced else OTHER_TEXTS)
    _refuse(found, () if "vae" in replaced else OTHER_VAES)
    if 1 <= len(found) <= 4 and all(shape[-1:] in ((768,), (1024,)) and len(shape) < 3 for shape in found.values()):
        raise CheckpointError(EMBEDDING)


def refuse_alone(found: Shapes) -> None:
    """The same for a file in which no network that is known here was found."""
    _refuse(found, ALONE)


def refuse_control(found: Shapes) -> None:
    """The same for a control network, of whatever kind, given as something else."""
    _refuse(found, (*OTHER_CONTROLS, CONTROL))


def refuse_other_controls(found: Shapes) -> None:
    """The same for a file that is to supply a control network."""
    _refuse(found, [other for other in OTHERS if other is not CONTROL])


def refuse_part(network: str, found: Shapes) -> None:
    """The same for a file that is to supply a text encoder or a VAE: with other positions, or of another family.

    vae_files.py tells Stable Diffusion's VAE from SDXL's.
    """
    _refuse(found, OTHER_VAES if network == "vae" else OTHER_TEXTS)


def _refuse(found: Shapes, table: Sequence[Other]) -> None:
    keys = "\n".join(found)
    for other in table:
        if not re.search(other.key, keys, re.MULTILINE):  # all at once, which is fast
            continue
        search, fits = re.compile(other.key).search, re.compile(other.shape or ".*").fullmatch
        if any(search(key) and fits("x".join(map(str, shape))) for key, shape in found.items()):
            raise CheckpointError(other.what)
