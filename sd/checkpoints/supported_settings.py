"""The settings in a diffusers folder's JSON files that change what a network computes, and the values it has here.

Every argument of diffusers' UNet2DConditionModel and AutoencoderKL and of transformers' CLIPTextConfig is in one of
three places: it is a size that `diffusers_config.py` reads; it is in a table below; or it is `FREE`, as it changes no
result. A value that no network here has is refused by its name. An entry that is in none of the three is ignored, and a
note names it: it may belong to a later version of these libraries.

>>> check_supported("unet", {"norm_eps": 1e-5, "act_fn": "swish"}, UNET)
>>> check_supported("unet", {"norm_eps": 1e-6}, UNET)
Traceback (most recent call last):
    ...
sd.checkpoints.checkpoint.CheckpointError: unet/config.json has norm_eps 1e-06, which is not supported: expected 1e-05
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..config import GROUPS, SIZE_WIDTH
from .checkpoint import CheckpointError

Supported = dict[str, tuple[Any, ...]]  # setting -> the values that this project's network has

UNET: Supported = {
    "act_fn": ("silu", "swish"),  # two names of one function
    "norm_num_groups": (GROUPS,), "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,), "freq_shift": (0,), "center_input_sample": (False,),
    "time_embedding_type": ("positional",), "time_embedding_act_fn": (), "timestep_post_act": (),
    "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "downsample_padding": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "mid_block_scale_factor": (1,),
    "only_cross_attention": (False,), "mid_block_only_cross_attention": (False,), "dual_cross_attention": (False,),
    "cross_attention_norm": (), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "encoder_hid_dim_type": (),
    "addition_embed_type": ("text_time",), "addition_time_embed_dim": (SIZE_WIDTH,),
}  # fmt: skip
VAE: Supported = {
    "act_fn": ("silu", "swish"), "norm_num_groups": (GROUPS,), "mid_block_add_attention": (True,),
    "use_quant_conv": (True,), "use_post_quant_conv": (True,),
    "shift_factor": (0,), "latents_mean": (0,), "latents_std": (1,),
}  # fmt: skip
TINY_VAE: Supported = {  # of AutoencoderTiny
    "act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,),
    "in_channels": (3,), "out_channels": (3,), "latent_magnitude": (3,), "latent_shift": (0.5,),
    "scaling_factor": (1,), "shift_factor": (0,),
}  # fmt: skip
TEXT: Supported = {
    "hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,), "model_type": ("clip_text_model", "clip"),
    "max_position_embeddings": (77,),
}  # fmt: skip
CONTROL: Supported = {  # of ControlNetModel, besides the sizes, which its weights show
    "conditioning_channels": (3,), "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    "global_pool_conditions": (True, False),
    "act_fn": ("silu", "swish"), "norm_num_groups": (GROUPS,), "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,), "freq_shift": (0,), "downsample_padding": (1,), "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "resnet_time_scale_shift": ("default",),
    "only_cross_attention": (False,), "class_embed_type": (), "num_class_embeds": (), "encoder_hid_dim_type": (),
    "addition_embed_type": ("text_time",), "addition_time_embed_dim": (SIZE_WIDTH,),
}  # fmt: skip
SCHEDULER: Supported = {"snr_shift_scale": (1,), "use_flow_sigmas": (False,)}

# What a null means where it is not "as by default": these settings switch something off.
NOT_NULL = ("norm_num_groups",)

# Read as sizes, or without an effect on a result. The last lines are written by trainers, of a moving average.
FREE = {
    "unet": """sample_size in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block
        cross_attention_dim transformer_layers_per_block attention_head_dim num_attention_heads use_linear_projection
        dropout upcast_attention reverse_transformer_layers_per_block addition_embed_type_num_heads time_embedding_dim
        projection_class_embeddings_input_dim class_embed_type num_class_embeds encoder_hid_dim time_cond_proj_dim
        dtype from_pt use_memory_efficient_attention split_head_dim
        decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup""",
    "vae": """sample_size in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block
        latent_channels scaling_factor force_upcast dtype from_pt
        encoder_block_out_channels decoder_block_out_channels num_encoder_blocks num_decoder_blocks
        upsample_fn upsampling_scaling_factor latent_magnitude latent_shift""",
    "control": """in_channels down_block_types block_out_channels layers_per_block cross_attention_dim
        transformer_layers_per_block attention_head_dim num_attention_heads use_linear_projection upcast_attention
        encoder_hid_dim projection_class_embeddings_input_dim addition_embed_type_num_heads
        conditioning_embedding_out_channels sample_size""",
}


class Kind(NamedTuple):
    """Another kind of network: a setting that it has (any value, or those that match), and what it is."""

    part: str
    setting: str
    values: str  # regular expression that matches the value as text
    what: str


FORCE_ZEROS = "force_zeros_for_empty_prompt"  # in model_index.json: `Config.zero_empty`
ANY = "."
KINDS = (
    Kind("unet", "quantization_config", ANY, "a quantised model, which is not supported: give its float weights"),
    Kind("vae", "quantization_config", ANY, "a quantised VAE, which is not supported: give its float weights"),
    Kind("text_encoder", "quantization_config", ANY, "a quantised text encoder, which is not supported: give its float "
         "weights"),
    Kind("unet", "_class_name", "UNet3D|Motion|SpatioTemporal|I2VGen", "a video model, which is not supported"),
    Kind("unet", "_class_name", "^(?!(Flax)?UNet2DConditionModel$)", "another network than Stable Diffusion's U-Net, "
         "which is not supported"),
    *(
        Kind("unet", name, ANY, "an upscaling, unCLIP or other class-conditional model, which is not supported")
        for name in ("class_embed_type", "num_class_embeds")
    ),
    Kind("unet", "addition_embed_type", "^(?!text_time$)", "a model conditioned on images or a second text "
         "(Kandinsky, DeepFloyd), which is not supported"),
    Kind("unet", "encoder_hid_dim", ANY, "a model whose text encoder is another one (DeepFloyd, Kolors), which is not "
         "supported"),
    Kind("unet", "attention_type", "^gated", "a GLIGEN model, which is not supported"),
    Kind("vae", "_class_name", "^(?!(Flax)?AutoencoderKL$|AutoencoderTiny$)", "another autoencoder than Stable "
         "Diffusion's VAE, which is not supported: give one with --vae"),
    Kind("vae", "latents_mean", r"^\[(-?[\d.]+), (?!\1[,\]])", "the VAE of Playground v2.5 or another one that shifts "
         "each channel, which is not supported"),
    Kind("text_encoder", "max_position_embeddings", "^248$", "a text encoder with 248 positions (Long-CLIP), which is "
         "not supported: prompts have 77; give another one with --text-encoder"),
    Kind("text_encoder", "architectures", r"^(?!\['(Flax|TF)?CLIP(TextModel|TextModelWithProjection|Model)'\]$)",
         "another text encoder than CLIP's, which is not supported: give one with --text-encoder"),
    Kind("scheduler", "_class_name", "FlowMatch", "a flow model, which is not supported: the models here are trained "
         "with a noise schedule"),
    Kind("scheduler", "_class_name", "^EDM", "a model of the EDM noise schedule, which is not supported"),
    Kind("scheduler", "_class_name", "UnCLIP|VQDiffusion|CMStochastic|Cogvideo|CogVideo|Wuerstchen", "another kind of "
         "diffusion model, which is not supported"),
)  # fmt: skip

FILES = {"scheduler": "scheduler/scheduler_config.json", "control": "config.json"}
# Settings of a scheduler that change each step. Others choose a sampler or a step grid, which is the caller's choice
# here, or `clip_sample`, which diffusers does not follow for Stable Diffusion either.
SAMPLING = ("thresholding",)


def file_of(part: str) -> str:
    """The JSON file of a part of a folder."""
    return FILES.get(part, f"{part}/config.json")


def check_kind(part: str, raw: Mapping[str, Any]) -> None:
    """Raise CheckpointError, by name, for a part whose JSON file describes another kind of network."""
    for kind in KINDS:
        value = raw.get(kind.setting)
        if kind.part == part and value and re.search(kind.values, str(value)):
            found = f"{file_of(part)} has {kind.setting} {value!r:.100}"
            raise CheckpointError(f"this is {kind.what} ({found})")


def check_supported(part: str, raw: Mapping[str, Any], supported: Supported) -> None:
    """Raise CheckpointError for a setting with a value that is not supported, with the file and what is expected.

    A null is a setting that is not used, and a list has one entry for each level or channel.
    """
    for key, values in supported.items():
        value = raw.get(key)
        given = value if isinstance(value, list) else [value]
        if key in raw and not all(item in values or (item is None and key not in NOT_NULL) for item in given):
            expected = " or ".join(map(repr, values)) or "no value"
            raise CheckpointError(
                f"{file_of(part)} has {key} {value!r:.100}, which is not supported: expected {expected}"
            )


def ignored_settings(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line for each setting in a folder's JSON files that is not looked at and might have an effect."""
    for part, known in (("unet", UNET), ("vae", VAE), ("control", CONTROL)):
        raw, free = configs.get(part, {}), FREE[part].split()
        for key, value in raw.items():
            if value and key not in known and key not in free and not key.startswith("_"):
                yield f"{file_of(part)} has {key} {value!r:.100}, which is unknown and ignored"
    for key in SAMPLING:
        if configs.get("scheduler", {}).get(key):
            yield f"{FILES['scheduler']} asks for {key}, which no sampler here has: ignored"
