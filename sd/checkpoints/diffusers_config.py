"""The config that the JSON files of a diffusers folder describe. The reverse is in diffusers_export.py.

Some of their names mislead. `attention_head_dim` is the number of heads; `layers_per_block` counts the encoder's blocks
(the decoder has one more); `beta_schedule` "scaled_linear" is what the original calls "linear"; `num_hidden_layers` is
the number of layers that are run, 23 of 24 in SD 2. Unsupported settings are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from ..config import (
    BASE_SIZES,
    END,
    MODELS,
    REFINER_SIZES,
    SIZE_WIDTH,
    SMALL,
    Config,
    ScheduleConfig,
    TextConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    Word,
)
from ..schedule import to_zero_snr
from . import supported_settings as settings
from .checkpoint import CheckpointError
from .folders import SECOND
from .other_models import OTHER_INPUTS
from .supported_settings import Supported, check_kind, check_supported
from .tiny_files import CLASS, tiny_from_diffusers
from .tokenizer_files import pad_token

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}  # theirs -> ours
MAX_TIMESTEPS = 100_000
MIDDLE, PLAIN_MIDDLE = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"  # `mid_block_type`; null: no middle block

# unsupported pipelines, by a part of their class name
OTHER_PIPELINES = {
    "StableDiffusion3": "Stable Diffusion 3", "Flux": "Flux", "Depth2Img": "depth-to-image",
    "Upscale": "upscaling", "InstructPix2Pix": "instruct-pix2pix", "UnCLIP": "unCLIP",
    "ImageVariation": "image variation",
    "LDMTextToImage": "LDM text2img-large", "AltDiffusion": "AltDiffusion", "Kolors": "Kolors",
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


def supported_parts(
    configs: Mapping[str, Mapping[str, Any]], replaced: Collection[str] = ()
) -> dict[str, Mapping[str, Any]]:
    """A folder's JSON files, of which those of the networks are checked, each by itself.

    replaced   networks that are taken from other files: left out where they are not supported

    Raises CheckpointError for another network that is not supported.
    """
    kept = dict(configs)
    checks = {"unet": _unet, "vae": vae_from_diffusers, "text_encoder": _check_text, SECOND: _check_text}
    for name in configs.keys() & checks.keys():
        try:
            with _described():
                checks[name](configs[name])
        except CheckpointError:
            if name not in replaced:
                raise
            del kept[name]
    return kept


def from_diffusers(configs: Mapping[str, Mapping[str, Any]]) -> Config:
    """The config described by a folder's JSON files, of which there is at least "unet".

    Missing entries have diffusers' defaults. Raises CheckpointError for what is not supported.
    """
    with _described():
        unet = _unet(configs["unet"])
        vae = vae_from_diffusers(configs["vae"]) if "vae" in configs else _usual_vae(unet)
        texts = _texts(configs, unet)
        size = configs["unet"].get("sample_size") or 64
        size = (max(size) if isinstance(size, list) else int(size)) * vae.factor
        schedule = schedule_from_diffusers(configs.get("scheduler", {}))
        sizes, zero = _sizes(unet, texts), False
        if sizes:  # true is the default of the pipeline's class; the refiner's folder has false
            zero = bool(configs.get("index", {}).get(settings.FORCE_ZEROS, sizes == BASE_SIZES))
        config = Config(
            "diffusers model", size, text=texts, vae=vae, unet=unet, schedule=schedule, sizes=sizes, zero_empty=zero
        )
    plain_texts = tuple(_plain(text) for text in texts)
    plain = replace(unet, guidance=None)
    same = [known for known in MODELS.values() if known.text == plain_texts and _like_vae(known.vae, vae)]
    same = [known for known in same if plain.is_part_of(known.unet)]
    # a U-Net in full before one in part; and there are SD 1.x that predict v
    same.sort(key=lambda known: (known.unet != plain, known.schedule.prediction != schedule.prediction))
    if not same:
        return config
    name = same[0].name + (SMALL if same[0].unet != plain else "")
    return replace(config, name=name, guidance=same[0].guidance, sampler=same[0].sampler)


def _usual_vae(unet: UNetConfig) -> VAEConfig | TinyVAEConfig:
    """The VAE of the known models with such a U-Net, for a folder without one: SDXL's has a scale of its own."""
    kind = (unet.context, unet.vector)
    known = [model.vae for model in MODELS.values() if (model.unet.context, model.unet.vector) == kind]
    return known[0] if unet.vector is not None and known else VAEConfig()


def _plain(text: TextConfig) -> TextConfig:
    """A text encoder without the words that fine-tuning may have added."""
    return replace(text, vocab=TextConfig().vocab, words=(), pad=min(text.pad, END))


def _sizes(unet: UNetConfig, texts: Sequence[TextConfig]) -> tuple[str, ...]:
    """The numbers that follow the pooled text in the U-Net's vector. CheckpointError if they are not SDXL's."""
    if unet.vector is None:
        return ()
    left = unet.vector - texts[-1].pooled_width
    for sizes in (BASE_SIZES, REFINER_SIZES):
        if left == SIZE_WIDTH * len(sizes):
            return sizes
    raise CheckpointError(
        f"unet/config.json has projection_class_embeddings_input_dim {unet.vector}, which is not supported: expected "
        f"{texts[-1].pooled_width} for the text and {SIZE_WIDTH} for each of 5 or 6 numbers"
    )


def _like_vae(known: VAEConfig | TinyVAEConfig, vae: VAEConfig | TinyVAEConfig) -> bool:
    """Whether a model with the VAE `known` may be one with `vae`, whose scale was measured, or with a tiny one."""
    tiny = isinstance(vae, TinyVAEConfig)
    return tiny or (isinstance(known, VAEConfig) and replace(known, scale=vae.scale) == vae)


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
    if raw.get("in_channels") in OTHER_INPUTS:
        what = OTHER_INPUTS[raw["in_channels"]]
        raise CheckpointError(f"this is {what} model ({raw['in_channels']} input channels), which is not supported")
    check_kind("unet", raw)
    channels = tuple(raw.get("block_out_channels", (320, 640, 1280, 1280)))
    down = raw.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    _check_blocks(raw, down)
    check_supported("unet", raw, settings.UNET | {"time_embedding_dim": (4 * channels[0],)})
    depths, up_depth = _depths(raw, down)
    heads = _per_level(
        raw, "num_attention_heads" if raw.get("num_attention_heads") else "attention_head_dim", 8, len(down)
    )
    return UNetConfig(
        in_channels=raw.get("in_channels", 4),
        out_channels=raw.get("out_channels", 4),
        channels=channels,
        heads=heads,
        depth=tuple(depth if name.startswith("Cross") else 0 for depth, name in zip(depths, down, strict=True)),
        up_depth=up_depth,
        middle_depth={MIDDLE: depths[-1], PLAIN_MIDDLE: 0}.get(raw.get("mid_block_type", MIDDLE)),
        blocks=_uniform(raw, "layers_per_block", 2),
        context=_uniform(raw, "cross_attention_dim", 1280),
        vector=raw.get("projection_class_embeddings_input_dim") if raw.get("addition_embed_type") else None,
        guidance=raw.get("time_cond_proj_dim"),
        linear_projections=raw.get("use_linear_projection") or False,
    )


def _depths(raw: Mapping[str, Any], down: Sequence[str]) -> tuple[list[int], tuple[tuple[int, ...], ...] | None]:
    """The transformer blocks of each level, and those of each block on the way up if a file lists them separately."""
    key, levels, blocks = "transformer_layers_per_block", len(down), raw.get("layers_per_block", 2)
    value = raw.get(key, 1)
    depths = []
    for entry in value if isinstance(value, list) else [value] * levels:
        of_blocks = entry if isinstance(entry, list) else [entry]
        if not of_blocks or len(set(of_blocks)) > 1 or type(of_blocks[0]) is not int:
            raise ValueError(f"{key} is {value!r:.100}, expected whole numbers, the same for all blocks of a level")
        depths.append(of_blocks[0])
    if len(depths) != levels:
        raise ValueError(f"{key} is {value!r:.100}, expected one for each of {levels} levels")
    back = raw.get("reverse_transformer_layers_per_block")
    if back is None:
        return depths, None
    if not isinstance(back, list) or len(back) != levels or type(blocks) is not int:
        raise ValueError(f"reverse_{key} is {back!r:.100}, expected one entry for each of {levels} levels")
    up = [tuple(entry) if isinstance(entry, list) else (entry,) * (blocks + 1) for entry in reversed(back)]
    crossing = [name.startswith("Cross") for name in down]
    up_depth = tuple(of_level if cross else (0,) * (blocks + 1) for of_level, cross in zip(up, crossing, strict=True))
    plain = [(depth if cross else 0,) * (blocks + 1) for depth, cross in zip(depths, crossing, strict=True)]
    return depths, None if list(up_depth) == plain else up_depth


def _check_blocks(raw: Mapping[str, Any], down: Sequence[str]) -> None:
    """Raise CheckpointError unless the levels of a U-Net are of the two kinds known here, the same down and up."""
    up = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    if others := [name for name in down if name not in up]:
        raise CheckpointError(
            f"unet/config.json has {others[0]!r:.100} in down_block_types, which is not supported: "
            f"expected {' or '.join(up)}"
        )
    mirrored = [up[name] for name in reversed(down)]
    if raw.get("up_block_types", mirrored) != mirrored:
        raise CheckpointError(
            f"unet/config.json has up_block_types {raw['up_block_types']!r:.200}, which is not supported: "
            f"expected {mirrored!r}, as on the way down"
        )


def _per_level(raw: Mapping[str, Any], key: str, default: int, levels: int) -> tuple[Any, ...]:
    """A setting with one value, or with one for each level. ValueError for another number of them."""
    value = raw.get(key, default)
    values = tuple(value) if isinstance(value, list) else (value,) * levels
    if len(values) != levels or not all(type(item) is int for item in values):
        raise ValueError(f"{key} is {value!r:.100}, expected a whole number for each of {levels} levels")
    return values


def _uniform(raw: Mapping[str, Any], key: str, default: int) -> Any:
    """A setting with one value for all levels, as a number or as a list of equal ones."""
    value = raw.get(key, default)
    if not isinstance(value, list):
        return value
    if len({*map(str, value)}) != 1:
        raise CheckpointError(
            f"unet/config.json has {key} {value!r:.100}, which is not supported: expected one value for all levels"
        )
    return value[0]


@_described()
def vae_from_diffusers(raw: Mapping[str, Any]) -> VAEConfig | TinyVAEConfig:
    """The VAE described by a `vae/config.json`. Raises CheckpointError if it is not supported."""
    if raw.get("_class_name") == CLASS:
        return tiny_from_diffusers(raw)
    down, up = raw.get("down_block_types", ["DownEncoderBlock2D"]), raw.get("up_block_types", ["UpDecoderBlock2D"])
    check_kind("vae", raw)
    blocks: Supported = {
        "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
        "out_channels": (raw.get("in_channels", 3),),
    }  # fmt: skip
    check_supported("vae", raw, settings.VAE | blocks)
    if len(down) != len(up):
        raise ValueError(f"{len(down)} down_block_types and {len(up)} up_block_types")
    return VAEConfig(
        channels=tuple(raw.get("block_out_channels", (64,))),
        blocks=raw.get("layers_per_block", 1),
        latent_channels=raw.get("latent_channels", 4),
        image_channels=raw.get("in_channels", 3),
        scale=float(raw.get("scaling_factor", 0.18215)),
    )


def _texts(configs: Mapping[str, Mapping[str, Any]], unet: UNetConfig) -> tuple[TextConfig, ...]:
    """The text encoders described by a folder; without a text_encoder/config.json, those that fit the U-Net."""
    names = [name for name in ("text_encoder", SECOND) if name in configs]
    known = next((model.text for model in MODELS.values() if model.unet.context == unet.context), None)
    if not names or (known is not None and len(names) < len(known)):
        if known is None:
            raise ValueError(f"no text_encoder/config.json beside a U-Net with context {unet.context}")
        return known
    end = {"text_encoder": "", SECOND: "_2"}
    texts = [
        _text(configs[name], configs.get(f"tokenizer{end[name]}", {}), configs.get(f"words{end[name]}", {}))
        for name in names
    ]
    if unet.vector is None:
        return tuple(texts)
    # SDXL takes the output of the last layer but one of both, not normalised; the last layer is run for the pooled
    # output of the second alone
    first, last = texts[:-1], texts[-1]
    projection = configs[names[-1]].get("projection_dim", 512)
    last = replace(last, hidden_layer=-2, hidden_norm=False, pooled=True, projection=projection)
    return (*(replace(text, layers=text.layers - 1, hidden_norm=False) for text in first), last)


def _text(raw: Mapping[str, Any], tokenizer: Mapping[str, Any], added: Mapping[str, Any]) -> TextConfig:
    """The text encoder described by its config.json, the tokenizer's, and the words that the tokenizer knows.

    A folder does not tell how an original checkpoint names the weights: those with the exact GELU are OpenCLIP's.
    """
    width = raw.get("hidden_size", 512)
    _check_text(raw)
    check_supported("text_encoder", raw, {"intermediate_size": (4 * width,)})
    activation = raw.get("hidden_act", "quick_gelu")
    vocab = raw.get("vocab_size", 49408)
    words: tuple[Word, ...] = tuple(added.get("words", ()))
    ids = {"!": 0, "<|endoftext|>": 49407} | {word.text: word.id for word in words if word.id < vocab}
    # the token "!" has the id 0; OpenCLIP, which has the exact GELU, pads with it
    padding = ids.get(str(pad_token(tokenizer)), 0 if activation == "gelu" else 49407)
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
    _check_text(raw)
    check_supported("text_encoder", raw, {"hidden_act": (text.activation,), "num_attention_heads": (text.heads,)})


def _check_text(raw: Mapping[str, Any]) -> None:
    check_kind("text_encoder", raw)
    check_supported("text_encoder", raw, settings.TEXT)


@_described()
def schedule_from_diffusers(raw: Mapping[str, Any]) -> ScheduleConfig:
    """The noise schedule described by a `scheduler_config.json`; by default Stable Diffusion's own."""
    check_kind("scheduler", raw)
    check_supported("scheduler", raw, settings.SCHEDULER)
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
    if not isinstance(betas, list):
        raise CheckpointError(
            f"its noise schedule (scheduler_config.json has beta_schedule {kind!r:.50}) is not supported: "
            "scaled_linear, linear and trained_betas are"
        )
    alpha_bar = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))
    return replace(own, alpha_bar=tuple((to_zero_snr(alpha_bar) if zero else alpha_bar).tolist()))
