"""Which model a file holds: told by the shapes of its weights, or by what is said about it.

The sizes of a model show in the shapes of its weights, and a file of ours or a folder carries its config. What the
U-Net predicts shows in neither: that is prediction.py. Other models are refused by name.

>>> from sd.checkpoints.checkpoint import load_checkpoint
>>> from sd.resources import resource
>>> with load_checkpoint(resource("weights/pocket.safetensors")) as file:
...     detect(file).name
'pocket'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..config import MODELS, SD1, SD1_INPAINT, SD2, SD2_INPAINT, Config, ScheduleConfig
from .checkpoint import CheckpointError, shapes
from .diffusers_config import from_diffusers, refuse_other_pipelines
from .layouts import AVERAGE, TOKENS, Layout, find_layouts, first_convolution
from .other_models import NOT_SUPPORTED, OTHER_CONTEXTS, OTHER_INPUTS, refuse_others
from .prediction import decide, predicting, read_beside, read_table, stored_schedule

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_KEY = "sd.config"  # where the metadata of a file of ours holds the config
FORMAT_KEY, FORMAT = "sd.format", "2"  # the layout of a file of ours; version 0.1 wrote no number
ORIGINAL_TEXT = ("cond_stage_model.", "conditioner.")  # before the names of an original checkpoint's text encoders
ALONE = {
    frozenset({"vae"}): "a VAE alone: give it with --vae, beside a checkpoint (--ckpt)",
    frozenset({"text_encoder"}): "a text encoder alone: give it with --text-encoder, beside a checkpoint (--ckpt)",
    frozenset({"vae", "text_encoder"}): "a text encoder and a VAE, but no U-Net: give the checkpoint",
}


@dataclass(frozen=True)
class Identity:
    """Which model a file holds.

    config    all about it; if not `decided`, its prediction is a guess that `probe` should check
    decided   whether something says what the U-Net predicts
    reason    what says so; empty for a file of ours, which carries its config
    """

    config: Config
    decided: bool = True
    reason: str = ""


def detect(tensors: Mapping[str, Tensor]) -> Config:
    """Which model a checkpoint holds, from what is said about it or the names and shapes of its weights.

    Raises CheckpointError for models that this project does not run, by name, and for SD 2.x U-Nets about which nothing
    says whether they predict eps (base) or v (768-v): `StableDiffusion.load` runs such a one to see.
    """
    found = identify(tensors)
    if not found.decided:
        raise CheckpointError(
            "an SD 2.x checkpoint: base and 768-v cannot be told apart by their keys, so say which it is "
            "(config=SD2 or SD2_V, --model sd2 or sd2-v)"
        )
    return found.config


def identify(tensors: Mapping[str, Tensor], config: Config | None = None, prediction: str | None = None) -> Identity:
    """Which model a checkpoint holds, and what its U-Net predicts, with the reason.

    tensors      a `Checkpoint`, of which only shapes and a small table are read, or any mapping
    config       which model it is, if that is known; what it says about the noise schedule is taken as it is
    prediction   "eps" or "v", if that is known

    Raises CheckpointError for models that this project does not run, by name.
    """
    if prediction not in (None, "eps", "v"):
        raise ValueError(f"unknown prediction {prediction!r}, expected eps or v")
    configs = getattr(tensors, "configs", {})
    refuse_other_pipelines(configs)
    if config is not None:
        return _as_given(tensors, predicting(config, prediction))
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
        return Identity(predicting(config, said), reason=why if said else "")
    found = shapes(tensors)
    refuse_others(found)
    layouts = find_layouts(found)
    if "unet" in configs:
        config = from_diffusers(configs)
    _check_unet(found, layouts)
    config = with_form(config or _by_shapes(found, layouts), found, layouts)
    return Identity(*decide(tensors, config, prediction, by_folder="unet" in configs))


def _as_given(tensors: Mapping[str, Tensor], config: Config) -> Identity:
    """The config that the caller gives; a noise schedule in the file takes the place of the usual one."""
    refuse_others(shapes(tensors))
    reason = "as given"
    usual = ScheduleConfig(steps=config.schedule.steps, prediction=config.schedule.prediction)
    if config.schedule == usual:
        try:
            table, why = stored_schedule(tensors, config.schedule)
            config = replace(config, schedule=replace(config.schedule, **table))
            reason += f"; {why}" if why else ""
        except CheckpointError:
            reason += "; the file's noise schedule is damaged and left out"
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    return Identity(config, reason=reason)


# ----------------------------------------------------------------------------------------------------- which model


def _check_unet(found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> None:
    if "unet" in layouts or AVERAGE in layouts:
        return
    if layouts:
        raise CheckpointError(no_unet(layouts))
    half = next(
        (half for half in ("decoder", "encoder") if any(key.startswith(f"{half}.conv_in.") for key in found)), None
    )
    if half:
        raise CheckpointError(f"this is half of a VAE ({half}), which is not supported: give a whole one")
    if not found:
        raise CheckpointError("no Stable Diffusion U-Net: no weights at all are in it; download it again")
    some = ", ".join(list(found)[:3])
    raise CheckpointError(f"no Stable Diffusion U-Net among its {len(found)} tensors ({some}, ...)")


def no_unet(layouts: Mapping[str, Layout]) -> str:
    """What a file is that holds these networks, of which none is a U-Net, and what to do with it."""
    return f"this is {ALONE.get(frozenset(layouts), 'no whole model: it has no U-Net')}"


def _by_shapes(found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> Config:
    """The config of a known model, by the shapes of its U-Net; of SD 2.x with 4 channels, base."""
    unet = layouts.get("unet") or layouts[AVERAGE]
    first = found.get(first_convolution(unet), ())
    keys = (".attn2.to_k.weight", ".attn2.k.weight", "attn2to_kweight")
    widths = {s[1] for k, s in found.items() if k.startswith(unet.prefix) and k.endswith(keys) and len(s) == 2}
    if len(first) != 4 or len(widths) != 1:
        raise CheckpointError(
            f"no Stable Diffusion U-Net: its first convolution is {first}, its context {sorted(widths)}"
        )
    channels, context = first[1], widths.pop()
    if any(key.startswith(f"{unet.prefix}label_emb.") for key in found):
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
    return known[channels, context]


def with_form(config: Config, found: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]) -> Config:
    """The config with what is not part of a model but of a file: its vocabulary, and the form of its weights.

    Fine-tuning adds words behind CLIP's own. The names of the text encoder, and whether projections are linear layers
    or 1x1 convolutions, are taken from original checkpoints alone: other layouts have one form for all models.
    """
    text, unet = config.text[0], config.unet
    if (layout := layouts.get("text_encoder")) is not None:
        (source,) = layout.sources(config, [TOKENS]).values()
        text = replace(text, vocab=max(text.vocab, found.get(source.key, (0,))[0]))
        if layout.prefix.startswith(ORIGINAL_TEXT):
            text = replace(text, names=layout.name)
    if (layout := layouts.get("unet")) is not None and layout.name == "original":
        (source,) = layout.sources(config, ["mid.attn.proj_in.weight"]).values()
        if source.key in found:
            unet = replace(unet, linear_projections=len(found[source.key]) == 2)
    return replace(config, text=(text, *config.text[1:]), unet=unet)


def damaged_position_ids(tensors: Mapping[str, Tensor]) -> str | None:
    """The key of position ids that merging has damaged, if there is one. They are never used here, but elsewhere."""
    for key in tensors:
        if key.endswith("position_ids"):
            found = read_table(tensors, key)
            if found is not None and not np.array_equal(found[0].ravel(), np.arange(max(found[0].size, 3))):
                return key
    return None
