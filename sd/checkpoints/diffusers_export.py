"""The JSON files of a diffusers folder that describe a config. On misleading names in them: diffusers_config.py."""

from __future__ import annotations

import math
from typing import Any

from ..config import END, GROUPS, SIZE_WIDTH, Config, TextConfig, TinyVAEConfig, UNetConfig
from .diffusers_config import MIDDLE, PLAIN_MIDDLE, PREDICTIONS
from .few_step_files import scheduler_to_diffusers
from .folders import SECOND
from .supported_settings import FORCE_ZEROS
from .tiny_files import CLASS, tiny_to_diffusers
from .tokenizer_files import words_to_diffusers

# The class of the pipeline, by whether it is SDXL and whether it is an inpainting model
PIPELINES = {
    (False, False): "StableDiffusionPipeline", (False, True): "StableDiffusionInpaintPipeline",
    (True, False): "StableDiffusionXLPipeline", (True, True): "StableDiffusionXLInpaintPipeline",
}  # fmt: skip
NO_SAFETY_CHECKER = {"requires_safety_checker": False, "safety_checker": [None, None]}


def to_diffusers_configs(config: Config, version: str = "0.30.0") -> dict[str, dict[str, Any]]:
    """Path in the folder -> contents, for every JSON file except the tokenizer's vocabulary."""
    schedule = config.schedule
    tiny = isinstance(config.vae, TinyVAEConfig)
    vae = {"_class_name": CLASS if tiny else "AutoencoderKL", **vae_to_diffusers(config)}
    pipeline = PIPELINES[bool(config.sizes), config.is_inpainting]
    if config.is_refiner:
        pipeline = "StableDiffusionXLImg2ImgPipeline"
    sampling = {"_class_name": "DDIMScheduler", **scheduler_to_diffusers(config)}
    texts = dict(zip(text_folders(config), config.text, strict=True))
    xl: dict[str, Any] = {}
    if config.sizes:
        xl = {
            FORCE_ZEROS: config.zero_empty,
            "text_encoder": [None, None],  # the refiner has none
            "tokenizer": [None, None],
        }
        xl |= {"requires_aesthetics_score": True} if config.is_refiner else {}
    betas: dict[str, Any] = {"trained_betas": None}
    if schedule.alpha_bar is not None:
        before = (1.0, *schedule.alpha_bar[:-1])
        betas["trained_betas"] = [1.0 - a / b for a, b in zip(schedule.alpha_bar, before, strict=True)]
    return {
        "model_index.json": {
            "_class_name": pipeline, "_diffusers_version": version, **(xl or NO_SAFETY_CHECKER),
            "feature_extractor": [None, None], "image_encoder": [None, None],
            "scheduler": ["diffusers", sampling["_class_name"]],
            **{name: ["transformers", _text_class(text)] for name, text in texts.items()},
            **{_tokenizer(name): ["transformers", "CLIPTokenizer"] for name in texts},
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", vae["_class_name"]],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel", "_diffusers_version": version, **unet_to_diffusers(config),
        },
        "vae/config.json": {**vae, "_diffusers_version": version},
        "scheduler/scheduler_config.json": {
            "_diffusers_version": version, "num_train_timesteps": schedule.steps,
            "beta_start": schedule.beta_start, "beta_end": schedule.beta_end, "beta_schedule": "scaled_linear", **betas,
            "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[schedule.prediction],
            "rescale_betas_zero_snr": schedule.zero_snr, "clip_sample": False, "set_alpha_to_one": False,
            "steps_offset": 1, "timestep_spacing": "trailing" if schedule.zero_snr else "leading", **sampling,
        },
        **{path: content for name, text in texts.items() for path, content in _text_files(config, name, text).items()},
    }  # fmt: skip


def text_folders(config: Config) -> tuple[str, ...]:
    """The folder of each text encoder: the refiner's only one is in that of SDXL's second."""
    return (SECOND,) if config.is_refiner else config.text_names


def _tokenizer(name: str) -> str:
    """The folder of the tokenizer that belongs to the text encoder in a folder."""
    return name.replace("text_encoder", "tokenizer")


def _text_class(text: TextConfig) -> str:
    return "CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"


def _text_files(config: Config, name: str, text: TextConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a text encoder and its tokenizer, by their paths."""
    end = "!" if text.pad == 0 else "<|endoftext|>"
    if text.pad > END:
        end = next((word.text for word in text.words if word.id == text.pad), end)
    added = words_to_diffusers(text.words)
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": end,
    }
    # for SDXL, diffusers takes the output of the last layer but one of an encoder that has its last layer as well
    layers = text.layers + (bool(config.sizes) and not text.pooled)
    tokenizer = _tokenizer(name)
    return {
        f"{name}/config.json": {
            "architectures": [_text_class(text)], "model_type": "clip_text_model", "vocab_size": text.vocab,
            "hidden_size": text.width, "intermediate_size": 4 * text.width, "num_hidden_layers": layers,
            "num_attention_heads": text.heads, "max_position_embeddings": text.length, "hidden_act": text.activation,
            "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "bos_token_id": 49406, "eos_token_id": 49407,
            "pad_token_id": text.pad, "projection_dim": text.projection or text.width,
        },
        f"{tokenizer}/tokenizer_config.json": {
            **special, "tokenizer_class": "CLIPTokenizer", "model_max_length": text.length, "do_lower_case": True,
            "add_prefix_space": False, "errors": "replace", **({"added_tokens_decoder": added} if added else {}),
        },
        **({f"{tokenizer}/added_tokens.json": {word.text: word.id for word in text.words}} if added else {}),
        f"{tokenizer}/special_tokens_map.json": special,
    }  # fmt: skip


def vector_to_diffusers(unet: UNetConfig) -> dict[str, Any]:
    """The arguments of diffusers' networks about a vector of pooled text and sizes (SDXL); none without one."""
    if unet.vector is None:
        return {}
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": unet.vector,
    }


def unet_to_diffusers(config: Config) -> dict[str, Any]:
    """The arguments of diffusers' UNet2DConditionModel."""
    cfg = config.unet
    middle = cfg.middle_depth or cfg.depth[-1]
    layers = [max(depth, 1) for depth in (*cfg.depth[:-1], middle)]  # the last entry is also the middle's
    back = None if cfg.up_depth is None else [[max(n, 1) for n in level] for level in reversed(cfg.up_depth)]
    return {
        "sample_size": math.ceil(config.size / config.vae.factor),
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.depth],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.depth)],
        "block_out_channels": list(cfg.channels),
        "layers_per_block": cfg.blocks,
        "transformer_layers_per_block": layers if max(layers) > 1 else 1,
        "reverse_transformer_layers_per_block": back,
        "mid_block_type": None if cfg.middle_depth is None else MIDDLE if cfg.middle_depth else PLAIN_MIDDLE,
        "cross_attention_dim": cfg.context,
        # the number of heads: an old misnomer of diffusers
        "attention_head_dim": cfg.heads[0] if len(set(cfg.heads)) == 1 else list(cfg.heads),
        "norm_num_groups": GROUPS,
        "use_linear_projection": cfg.linear_projections,
        "time_cond_proj_dim": cfg.guidance,
        **vector_to_diffusers(cfg),
    }


def vae_to_diffusers(config: Config) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL, or of its AutoencoderTiny."""
    cfg = config.vae
    if isinstance(cfg, TinyVAEConfig):
        return tiny_to_diffusers(cfg)
    return {
        "in_channels": cfg.image_channels,
        "out_channels": cfg.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(cfg.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(cfg.channels),
        "block_out_channels": list(cfg.channels),
        "layers_per_block": cfg.blocks,
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": GROUPS,
        "scaling_factor": cfg.scale,
        "sample_size": config.size,
    }
