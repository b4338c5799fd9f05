"""Conversion between a config and the JSON files of a diffusers folder.

Some of their names mislead. `attention_head_dim` is the number of heads; `layers_per_block` counts the encoder's blocks
(the decoder has one more); `beta_schedule` "scaled_linear" is what the original calls "linear"; `num_hidden_layers` is
the number of layers that are run, 23 of 24 in SD 2. Unsupported settings are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..config import END, GROUPS, MODELS, Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig, Word
from .checkpoint import CheckpointError
from .other_models import OTHER_INPUTS
from .tokenizer_files import pad_token, words_to_diffusers

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}  # theirs -> ours
MAX_TIMESTEPS = 100_000

# unsupported pipelines, by a part of their class name
OTHER_PIPELINES = {
    "XL": "SDXL", "StableDiffusion3": "Stable Diffusion 3", "Flux": "Flux", "Depth2Img": "depth-to-image",
    "Upscale": "upscaling", "InstructPix2Pix": "instruct-pix2pix", "UnCLIP": "unCLIP",
    "ImageVariation": "image variation",
    "LDMTextToImage": "LDM text2img-large", "AltDiffusion": "AltDiffusion", "ControlNet": "ControlNet",
}  # fmt: skip


def refuse_other_pipelines(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError, by name, for a folder whose model_index.json names another model.

    Many of them have no U-Net, but a VAE and a text encoder with the same names as Stable Diffusion's.
    """
    pipeline = str(configs.get("index", {}).get("_class_name") or "")
    for part, name in OTHER_PIPELINES.items():
        if part in pipeline:
            raise CheckpointError(f"this is {_an(name)} model ({pipeline:.100}), which is not supported")
    if pipeline and "StableDiffusion" not in pipeline and "unet" not in configs:
        raise CheckpointError(f"this is another model ({pipeline:.100}), which is not supported")


def from_diffusers(configs: Mapping[str, Mapping[str, Any]]) -> Config:
    """The config described by a folder's JSON files, of which there is at least "unet".

    Missing entries have diffusers' defaults. Raises CheckpointError for what is not supported.
    """
    with _described():
        unet = _unet(configs["unet"])
        vae = vae_from_diffusers(configs["vae"]) if "vae" in configs else VAEConfig()
        text = _text(configs, unet)
        size = configs["unet"].get("sample_size") or 64
        size = (max(size) if isinstance(size, list) else int(size)) * vae.factor
        schedule = schedule_from_diffusers(configs.get("scheduler", {}))
        config = Config("diffusers model", size, text=(text,), vae=vae, unet=unet, schedule=schedule)
    usual = replace(
        text, vocab=TextConfig().vocab, words=(), pad=min(text.pad, END)
    )  # fine-tuning may have added words
    sizes = ((usual,), vae, unet)
    same = [known for known in MODELS.values() if (known.text, known.vae, known.unet) == sizes]
    same.sort(key=lambda known: known.schedule.prediction != schedule.prediction)  # there are SD 1.x that predict v
    return replace(config, name=same[0].name, guidance=same[0].guidance, sampler=same[0].sampler) if same else config


@contextmanager
def _described() -> Iterator[None]:
    """Turn errors caused by nonsensical entries of a JSON file into one clear CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"its JSON files describe no model that is known here: {error!s:.200}") from None


def _an(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOUaeiouL" or name.startswith("SD") else f"a {name}"


def _unet(raw: Mapping[str, Any]) -> UNetConfig:
    if raw.get("addition_embed_type") or raw.get("class_embed_type") or raw.get("num_class_embeds"):
        kind = (
            "an SDXL"
            if raw.get("addition_embed_type") == "text_time"
            else "an upscaling, unCLIP or other class-conditional"
        )
        raise CheckpointError(f"this is {kind} model, which is not supported")
    if raw.get("in_channels") in OTHER_INPUTS:
        what = OTHER_INPUTS[raw["in_channels"]]
        raise CheckpointError(f"this is {what} model ({raw['in_channels']} input channels), which is not supported")
    channels = tuple(raw.get("block_out_channels", (320, 640, 1280, 1280)))
    heads = raw.get("num_attention_heads") or raw.get("attention_head_dim", 8)
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    down = raw.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    expected = {
        "up_block_types": [f"{'CrossAttn' if kinds[name] else ''}UpBlock2D" for name in reversed(down)],
        "act_fn": "silu", "norm_num_groups": GROUPS, "transformer_layers_per_block": 1, "only_cross_attention": False,
        "dual_cross_attention": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional", "flip_sin_to_cos": True, "freq_shift": 0,
        "center_input_sample": False, "downsample_padding": 1, "encoder_hid_dim": None, "time_cond_proj_dim": None,
    }  # fmt: skip
    _check_supported("unet", raw, expected)
    return UNetConfig(
        in_channels=raw.get("in_channels", 4),
        out_channels=raw.get("out_channels", 4),
        channels=channels,
        heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(channels),
        depth=tuple(int(kinds[name]) for name in down),
        blocks=raw.get("layers_per_block", 2),
        context=raw.get("cross_attention_dim", 1280),
        linear_projections=raw.get("use_linear_projection") or False,
    )


@_described()
def vae_from_diffusers(raw: Mapping[str, Any]) -> VAEConfig:
    """The VAE described by a `vae/config.json`. Raises CheckpointError if it is not supported."""
    down, up = raw.get("down_block_types", ["DownEncoderBlock2D"]), raw.get("up_block_types", ["UpDecoderBlock2D"])
    expected = {
        "down_block_types": ["DownEncoderBlock2D"] * len(down), "up_block_types": ["UpDecoderBlock2D"] * len(up),
        "act_fn": "silu", "norm_num_groups": GROUPS, "shift_factor": None, "use_quant_conv": True,
        "use_post_quant_conv": True, "mid_block_add_attention": True, "latents_mean": None, "latents_std": None,
    }  # fmt: skip
    _check_supported("vae", raw, expected)
    return VAEConfig(
        channels=tuple(raw.get("block_out_channels", (64,))),
        blocks=raw.get("layers_per_block", 1),
        latent_channels=raw.get("latent_channels", 4),
        image_channels=raw.get("in_channels", 3),
        scale=float(raw.get("scaling_factor", 0.18215)),
    )


def _text(configs: Mapping[str, Mapping[str, Any]], unet: UNetConfig) -> TextConfig:
    """The text encoder described by a folder; without a text_encoder/config.json, the one that fits the U-Net.

    A folder does not tell how an original checkpoint names the weights: those with the exact GELU are OpenCLIP's.
    """
    if "text_encoder" not in configs:
        known = next((model.text[0] for model in MODELS.values() if model.unet.context == unet.context), None)
        if known is None:
            raise ValueError(f"no text_encoder/config.json beside a U-Net with context {unet.context}")
        return known
    raw = configs["text_encoder"]
    width = raw.get("hidden_size", 512)
    _check_supported("text_encoder", raw, {"intermediate_size": 4 * width, "layer_norm_eps": 1e-5})
    activation = raw.get("hidden_act", "quick_gelu")
    vocab = raw.get("vocab_size", 49408)
    words: tuple[Word, ...] = tuple(configs.get("words", {}).get("words", ()))
    ids = {"!": 0, "<|endoftext|>": 49407} | {word.text: word.id for word in words if word.id < vocab}
    # the token "!" has the id 0; OpenCLIP, which has the exact GELU, pads with it
    padding = ids.get(str(pad_token(configs.get("tokenizer", {}))), 0 if activation == "gelu" else 49407)
    return TextConfig(
        width=width,
        layers=raw.get("num_hidden_layers", 12),
        heads=raw.get("num_attention_heads", 8),
        activation=activation,
        pad=padding,
        vocab=vocab,
        words=words,
        length=raw.get("max_position_embeddings", 77),
        names="openclip" if activation == "gelu" else "clip",
    )


def check_text_encoder(raw: Mapping[str, Any], text: TextConfig) -> None:
    """Raise CheckpointError for a text encoder of the right shapes whose config.json describes another computation."""
    expected = {"hidden_act": text.activation, "num_attention_heads": text.heads, "layer_norm_eps": 1e-5}
    _check_supported("text_encoder", raw, expected)


def _check_supported(part: str, raw: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if key in raw and raw[key] is not None and raw[key] != value:
            raise CheckpointError(
                f"{part}/config.json has {key} {raw[key]!r:.100}, which is not supported: expected {value!r}"
            )


@_described()
def schedule_from_diffusers(raw: Mapping[str, Any]) -> ScheduleConfig:
    """The noise schedule described by a `scheduler_config.json`; by default Stable Diffusion's own."""
    prediction = raw.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise CheckpointError(
            f"predicts {prediction!r:.50} (scheduler_config.json), which is not supported: {known} are"
        )
    steps = raw.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {steps!r:.50}")
    own = ScheduleConfig(steps=steps, prediction=PREDICTIONS[prediction])
    start, end = float(raw.get("beta_start", own.beta_start)), float(raw.get("beta_end", own.beta_end))
    kind, betas = raw.get("beta_schedule", "scaled_linear"), raw.get("trained_betas")
    zero = bool(raw.get("rescale_betas_zero_snr"))
    if betas is None and kind == "scaled_linear":
        return replace(own, beta_start=start, beta_end=end, zero_snr=zero)
    if betas is None and kind == "linear":
        betas = [start + (end - start) * i / max(steps - 1, 1) for i in range(steps)]
    if not isinstance(betas, list) or zero:
        raise CheckpointError(f"its noise schedule (beta_schedule {kind!r:.50}) is not supported")
    products, left = [], 1.0
    for beta in betas:
        products.append(left := left * (1.0 - float(beta)))
    return replace(own, alpha_bar=tuple(products))


def to_diffusers_configs(config: Config, version: str = "0.30.0") -> dict[str, dict[str, Any]]:
    """Path in the folder -> contents, for every JSON file except the tokenizer's vocabulary."""
    text, schedule = config.text[0], config.schedule
    pipeline = "StableDiffusionInpaintPipeline" if config.is_inpainting else "StableDiffusionPipeline"
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
    betas: dict[str, Any] = {"trained_betas": None}
    if schedule.alpha_bar is not None:
        before = (1.0, *schedule.alpha_bar[:-1])
        betas["trained_betas"] = [1.0 - a / b for a, b in zip(schedule.alpha_bar, before, strict=True)]
    return {
        "model_index.json": {
            "_class_name": pipeline, "_diffusers_version": version, "requires_safety_checker": False,
            "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel", "_diffusers_version": version, **unet_to_diffusers(config),
        },
        "vae/config.json": {"_class_name": "AutoencoderKL", "_diffusers_version": version, **vae_to_diffusers(config)},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": text.vocab,
            "hidden_size": text.width, "intermediate_size": 4 * text.width, "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads, "max_position_embeddings": text.length, "hidden_act": text.activation,
            "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "bos_token_id": 49406, "eos_token_id": 49407,
            "pad_token_id": text.pad, "projection_dim": text.width,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler", "_diffusers_version": version, "num_train_timesteps": schedule.steps,
            "beta_start": schedule.beta_start, "beta_end": schedule.beta_end, "beta_schedule": "scaled_linear", **betas,
            "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[schedule.prediction],
            "rescale_betas_zero_snr": schedule.zero_snr, "clip_sample": False, "set_alpha_to_one": False,
            "steps_offset": 1, "timestep_spacing": "trailing" if schedule.zero_snr else "leading",
        },
        "tokenizer/tokenizer_config.json": {
            **special, "tokenizer_class": "CLIPTokenizer", "model_max_length": text.length, "do_lower_case": True,
            "add_prefix_space": False, "errors": "replace", **({"added_tokens_decoder": added} if added else {}),
        },
        **({"tokenizer/added_tokens.json": {word.text: word.id for word in text.words}} if added else {}),
        "tokenizer/special_tokens_map.json": special,
    }  # fmt: skip


def unet_to_diffusers(config: Config) -> dict[str, Any]:
    """The arguments of diffusers' UNet2DConditionModel."""
    cfg = config.unet
    return {
        "sample_size": math.ceil(config.size / config.vae.factor),
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.depth],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.depth)],
        "block_out_channels": list(cfg.channels),
        "layers_per_block": cfg.blocks,
        "cross_attention_dim": cfg.context,
        # the number of heads: an old misnomer of diffusers
        "attention_head_dim": cfg.heads[0] if len(set(cfg.heads)) == 1 else list(cfg.heads),
        "norm_num_groups": GROUPS,
        "use_linear_projection": cfg.linear_projections,
    }


def vae_to_diffusers(config: Config) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL."""
    cfg = config.vae
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
