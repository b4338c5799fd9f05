"""Which model a file holds, by its metadata or by the shapes of its weights.

Our own files and diffusers folders carry their config; other files are identified by the shapes of their weights, which
do not tell what the U-Net predicts: see prediction.py. Other models are refused by name.

>>> from sd.checkpoints.checkpoint import load_checkpoint
>>> from sd.resources import resource
>>> with load_checkpoint(resource("weights/pocket.safetensors")) as file:
...     detect(file).name
'pocket'
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..config import (
    MODELS,
    SD1,
    SD1_INPAINT,
    SD2,
    SD2_INPAINT,
    SDXL,
    SMALL,
    Config,
    ScheduleConfig,
    TinyVAEConfig,
    UNetConfig,
)
from ..few_step import TURBO
from .checkpoint import CheckpointError, shapes
from .diffusers_config import from_diffusers, refuse_other_pipelines, supported_parts
from .few_step_files import own_defaults, with_defaults, with_guidance
from .layouts import AVERAGE, SECOND, TOKENS, Layout, all_layouts, find_layouts, first_convolution, token_width
from .matching import TEXTS, match_layouts
from .names import plainly_named
from .other_models import NOT_SUPPORTED, OTHER_CONTEXTS, OTHER_INPUTS, refuse_alone, refuse_others
from .prediction import decide, predicting, read_beside, read_table, stored_schedule
from .tiny_vae import NAME as TINY
from .tiny_vae import is_tiny, tiny_config
from .xl_models import refuse_other_schedules, usual_vae, vector_width, with_depths, xl_config

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_KEY = "sd.config"  # metadata entry of a file of ours that holds the config
FORMAT_KEY, FORMAT = "sd.format", "2"  # format of a file of ours; version 0.1 wrote no number
ORIGINAL_TEXT = ("cond_stage_model.", "conditioner.")  # prefixes of text encoders in original checkpoints
ALONE = {
    frozenset({"vae"}): "a VAE alone: give it with --vae, beside a checkpoint (--ckpt)",
    frozenset({"text_encoder"}): "a text encoder alone: give it with --text-encoder, beside a checkpoint (--ckpt)",
    frozenset({"vae", "text_encoder"}): "a text encoder and a VAE, but no U-Net: give the checkpoint",
    frozenset({SECOND}): f"SDXL's second text encoder ({TEXTS[1280]}) alone: give it with --text-encoder-2, or for the "
    "refiner with --text-encoder, beside a checkpoint (--ckpt)",
    frozenset({"text_encoder", SECOND}): "SDXL's two text encoders without the rest: give the file with --text-encoder "
    "and with --text-encoder-2, beside a checkpoint (--ckpt)",
    frozenset({"vae", "text_encoder", SECOND}): "SDXL's text encoders and a VAE, but no U-Net: give the checkpoint",
}


@dataclass(frozen=True)
class Identity:
    """Which model a file holds.

    config    the model; if not `decided`, its prediction is a guess that `probe` should check
    decided   whether it is known what the U-Net predicts
    reason    how it is known; empty for a file of ours, which carries its config
    few_step  a line on the default settings of a model of few steps; empty for any other
    """

    config: Config
    decided: bool = True
    reason: str = ""
    few_step: str = ""


def detect(tensors: Mapping[str, Tensor]) -> Config:
    """Which model a checkpoint holds, from its metadata or the names and shapes of its weights.

    Raises CheckpointError for unsupported models, by name, and for SD 2.x U-Nets if nothing says whether they predict
    eps (base) or v (768-v): `StableDiffusion.load` runs these once to find out.
    """
    found = identify(tensors)
    if not found.decided:
        raise CheckpointError(
            "an SD 2.x checkpoint: base and 768-v cannot be told apart by their keys, so say which it is "
            "(config=SD2 or SD2_V, --model sd2 or sd2-v)"
        )
    return found.config


def identify(
    tensors: Mapping[str, Tensor],
    config: Config | None = None,
    prediction: str | None = None,
    replaced: Collection[str] = (),
) -> Identity:
    """Which model a checkpoint holds, what its U-Net predicts, and how that is known.

    tensors      a `Checkpoint`, of which only shapes and a small table are read, or any mapping
    config       the model, if known; an unusual noise schedule in it takes precedence over the file's
    prediction   "eps" or "v", if known
    replaced     networks that are taken from other files ("text_encoder", "vae"): this one's may be of any kind

    Raises CheckpointError for unsupported models, by name.
    """
    if prediction not in (None, "eps", "v"):
        raise ValueError(f"unknown prediction {prediction!r}, expected eps or v")
    tensors = plainly_named(tensors)
    configs = supported_parts(getattr(tensors, "configs", {}), replaced)
    refuse_other_pipelines(configs)
    if config is not None:
        return _as_given(tensors, predicting(config, prediction), replaced, said=prediction is not None)
    metadata = getattr(tensors, "metadata", {})
    written = metadata.get(CONFIG_KEY)
    if written is not None:
        number = metadata.get(FORMAT_KEY, FORMAT)
        if number != FORMAT:
            raise CheckpointError(f"the file has the format {number:.20}, this version reads {FORMAT} and those before")
        try:
            config = Config.from_json(written)
        except ValueError as error:
            raise CheckpointError(f"the file's own model config is damaged: {error}") from None
        said, why = (prediction, "as given") if prediction else read_beside(tensors)[:2]
        return Identity(predicting(config, said), reason=why if said else "", few_step=own_defaults(config))
    found = shapes(tensors)
    refuse_others(found, replaced)
    if "unet" in configs:
        config = from_diffusers(configs)
    _check_unet(found, find_layouts(found))
    config = with_guidance(config or _by_any_shapes(found), found, find_layouts(found))
    if config.sizes:
        refuse_other_schedules(found)
    layouts = match_layouts(found, config)
    config = with_form(with_vocabulary(config, found, layouts), found, layouts)
    config = with_autoencoder(config, found, layouts)
    config, decided, reason = decide(tensors, config, prediction, by_folder="unet" in configs)
    config, line = with_defaults(tensors, config)
    if not decided and config.steps == TURBO.steps and config.sampler == TURBO.sampler:
        decided, reason = True, "SD-Turbo does"
    return Identity(config, decided, reason, line)


def _as_given(tensors: Mapping[str, Tensor], config: Config, replaced: Collection[str], said: bool) -> Identity:
    """The config given by the caller; a noise schedule in the file replaces the usual one.

    said   whether the caller gave the prediction as well, which naming an SDXL model does not settle
    """
    found = shapes(tensors)
    refuse_others(found, replaced)
    if config.sizes:
        refuse_other_schedules(found)
    layouts = find_layouts(found)
    if "unet" in layouts:
        config = (with_depths if config.sizes else smaller)(config, found, layouts["unet"])
    layouts = match_layouts(found, config)
    config = with_form(with_guidance(config, found, layouts), found, layouts)
    config = with_autoencoder(config, found, layouts)
    reason, line = "as given", ""
    usual = ScheduleConfig(steps=config.schedule.steps, prediction=config.schedule.prediction)
    if config.sizes and not said and config.schedule == ScheduleConfig():
        config, _, reason = decide(tensors, config, None, by_folder=False)
    elif config.schedule == usual:
        table, why = stored_schedule(tensors, config.schedule)
        reason += f"; {why}" if why else ""
        try:
            config = replace(config, schedule=replace(config.schedule, **table))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    if config.steps is None and config.spacing is None:
        config, line = with_defaults(tensors, config)
    return Identity(config, reason=reason, few_step=line)


# ----------------------------------------------------------------------------------------------------- which model


def _check_unet(found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> None:
    if "unet" in layouts or AVERAGE in layouts:
        return
    if layouts:
        raise CheckpointError(no_unet(layouts, found))
    refuse_alone(found)
    half = next(
        (half for half in ("decoder", "encoder") if any(key.startswith(f"{half}.conv_in.") for key in found)), None
    )
    if half:
        raise CheckpointError(f"this is half of a VAE ({half}), which is not supported: give a whole one")
    if not found:
        raise CheckpointError("no Stable Diffusion U-Net: no weights at all are in it; download it again")
    some = ", ".join(list(found)[:3])
    raise CheckpointError(f"no Stable Diffusion U-Net among its {len(found)} tensors ({some}, ...)")


def no_unet(layouts: Mapping[str, Layout], found: Mapping[str, tuple[int, ...]]) -> str:
    """What a file without a U-Net is, by the networks that it does hold, and what to do with it."""
    if layouts.keys() == {"text_encoder"} and token_width(layouts["text_encoder"], found, SDXL) == SDXL.text[1].width:
        layouts = {SECOND: layouts["text_encoder"]}
    if layouts.keys() == {"vae"} and is_tiny(layouts["vae"].name):
        return f"this is {TINY}: give it with --vae, beside a checkpoint (--ckpt)"
    return f"this is {ALONE.get(frozenset(layouts), 'no whole model: it has no U-Net')}"


def _by_any_shapes(found: Mapping[str, tuple[int, ...]]) -> Config:
    """The same as `_by_shapes`, for a file that may have several U-Nets, some of them incomplete."""
    layouts = all_layouts(found)
    network = "unet" if "unet" in layouts else AVERAGE
    for unet in layouts[network][:-1]:
        try:
            return _by_shapes(found, {network: unet})
        except CheckpointError:
            continue
    return _by_shapes(found, {network: layouts[network][-1]})


def _by_shapes(found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> Config:
    """The config of a known model, by the shapes of its U-Net; SD 2 base for SD 2.x with 4 channels."""
    unet = layouts.get("unet") or layouts[AVERAGE]
    first = found.get(first_convolution(unet), ())
    keys = (".attn2.to_k.weight", ".attn2.k.weight", "attn2to_kweight")
    widths = {s[1] for k, s in found.items() if k.startswith(unet.prefix) and k.endswith(keys) and len(s) == 2}
    if len(first) != 4 or len(widths) != 1:
        raise CheckpointError(
            f"no Stable Diffusion U-Net: its first convolution is {first}, its context {sorted(widths)}"
        )
    channels, context = first[1], widths.pop()
    if vector_width(found, unet) is not None:
        config = None if channels in OTHER_INPUTS else xl_config(found, unet, channels, context)
        if config is not None:
            return config
        other = OTHER_INPUTS.get(channels) or OTHER_CONTEXTS.get(context) or "an unCLIP"
        raise CheckpointError(f"this is {other} model (it has label_emb), {NOT_SUPPORTED}")
    if channels in OTHER_INPUTS:
        raise CheckpointError(f"this is {OTHER_INPUTS[channels]} model ({channels} input channels), {NOT_SUPPORTED}")
    if context in OTHER_CONTEXTS:
        raise CheckpointError(f"this is {OTHER_CONTEXTS[context]} model (context {context}), {NOT_SUPPORTED}")
    known = {(4, 768): SD1, (9, 768): SD1_INPAINT, (4, 1024): SD2, (9, 1024): SD2_INPAINT}
    if (channels, context) not in known or first[0] != SD1.unet.channels[0]:
        raise CheckpointError(
            f"a U-Net of an unknown kind ({first[0]} wide, {channels} input channels, context {context}): "
            f"if it is one of {', '.join(MODELS)}, say so (--model)"
        )
    return smaller(known[channels, context], found, unet)


def smaller(config: Config, found: Mapping[str, tuple[int, ...]], layout: Layout) -> Config:
    """The config of a distilled U-Net, which has one block a level and lacks levels or the middle of that in `config`.

    The same config for a U-Net with as many blocks: what it lacks is missing.
    """

    def has(unet: UNetConfig, key: str) -> bool:
        (source,) = layout.sources(replace(config, unet=unet), [key]).values()
        return source.key in found

    if config.unet.blocks == 1 or has(config.unet, "down.0.res.1.norm1.weight"):
        return config
    unet = replace(config.unet, blocks=1)
    levels = [level for level in range(len(unet.channels)) if has(unet, f"down.{level}.res.0.norm1.weight")]
    count = max(levels, default=0) + 1
    depth = tuple(n if n and has(unet, f"down.{i}.attn.0.norm.weight") else 0 for i, n in enumerate(unet.depth))
    middle = unet.middle_depth if has(unet, "mid.res.0.norm1.weight") else None
    unet = replace(
        unet, channels=unet.channels[:count], heads=unet.heads[:count], depth=depth[:count], middle_depth=middle
    )
    return replace(config, name=config.name + SMALL, unet=unet)


def with_vocabulary(config: Config, found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> Config:
    """The config with the vocabulary size of the file: fine-tuning may add words after CLIP's own."""
    texts = []
    for network, text in zip(config.text_names, config.text, strict=True):
        if (layout := layouts.get(network)) is not None:
            (source,) = layout.sources(config, [TOKENS], found).values()
            text = replace(text, vocab=max(text.vocab, found.get(source.key, (0,))[0]))
        texts.append(text)
    return replace(config, text=tuple(texts))


def with_form(config: Config, found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> Config:
    """The config with the form of an original checkpoint, which an export keeps.

    Such a file names its text encoder as transformers or as OpenCLIP does, and has linear layers or 1x1 convolutions as
    projections. Other layouts have the same form for all models.
    """
    unet, texts = layouts.get("unet"), []
    for network, text in zip(config.text_names, config.text, strict=True):
        layout = layouts.get(network)
        original = layout is not None and layout.prefix.startswith(ORIGINAL_TEXT)
        texts.append(replace(text, names=layout.name) if layout is not None and original else text)
    config = replace(config, text=tuple(texts))
    if unet is not None and unet.name.startswith("original"):
        keys = [f"down.{level}.attn.0.proj_in.weight" for level, depth in enumerate(config.unet.depth) if depth]
        projections = unet.sources(config, keys or ["mid.attn.proj_in.weight"], found).values()
        linear = any(len(found.get(source.key, ())) == 2 for source in projections)
        config = replace(config, unet=replace(config.unet, linear_projections=linear))
    return config


def with_autoencoder(config: Config, found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> Config:
    """The config with a tiny autoencoder, if that is the VAE in the file."""
    layout = layouts.get("vae")
    if layout is None:
        return config
    vae = tiny_config(config.vae, layout.name, layout.prefix, found)
    if config.sizes and isinstance(config.vae, TinyVAEConfig) and not isinstance(vae, TinyVAEConfig):
        vae = usual_vae(config)
    return replace(config, vae=vae)


def damaged_position_ids(tensors: Mapping[str, Tensor]) -> str | None:
    """The key of position ids that merging has damaged, if any. They are not used here, but other programs use them."""
    for key in tensors:
        if key.endswith("position_ids"):
            found = read_table(tensors, key)
            if found is not None and not np.array_equal(found[0].ravel(), np.arange(max(found[0].size, 3))):
                return key
    return None
