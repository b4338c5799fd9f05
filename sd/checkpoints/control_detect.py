"""Which control network a file holds: its config, by the names and shapes of its weights; and its weights, strictly.

A file of ours carries its config. Others show its sizes (control_sizes.py), but not whether hints have blue first,
which only the config.json of a diffusers folder says, nor whether residuals are averaged over all positions: that is in
a config.json, or the file's name has "shuffle" in it, as that of the only published network of this kind.

A "difference" file holds the difference between a control network and the U-Net that it was trained from. Of the
weights that a U-Net has as well, those of the model's own are added to it when it is loaded (control_files.py). The
program that makes such files leaves out those that do not differ. Source of the form: Mikubill/sd-webui-controlnet
extract_controlnet_diff.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UNetConfig
from ..control_config import ControlConfig as ControlConfig
from ..control_config import own_half
from ..messages import counted, listed, one_line
from .checkpoint import Checkpoint, CheckpointError, shapes
from .control_maps import OWN, ControlLayout, control_layouts
from .control_sizes import AGAIN, FAMILIES, Shapes, read_sizes, with_model
from .convert import StateDict
from .detect import identify, no_unet
from .folders import model_name
from .hub_cache import repository
from .key_maps import Source
from .layouts import find_layouts
from .matching import table_faults
from .names import ignored
from .other_models import CONTROL as OTHER_CONTROL
from .other_models import refuse_alone, refuse_other_controls, refuse_others
from .supported_settings import CONTROL, check_supported, ignored_settings

CONTROL_KEY = "sd.control"  # metadata entry of a file of ours that holds the config of a control network
DIFFERENCE = "difference"  # a tensor, or a value, that only files of differences have
SHUFFLE = re.compile(r"shuffle", re.IGNORECASE)  # in the name of a file: its residuals are averaged
INPAINT = re.compile(r"inpaint(?![_-]depth)", re.IGNORECASE)  # hints of inpaint_depth are depth maps
NO_UNET = ("hint.", "zero")  # our names of what a U-Net does not have begin with these
# what tools call every file
SAME_NAMES = ("diffusion_pytorch_model", "controlnet", "control", "model", "pytorch_model")
# The parts of a whole checkpoint that may stand beside a control network with a prefix of its own
BESIDE = ("model.", "first_stage_model.", "cond_stage_model.", "conditioner.", "unet.", "vae.", "text_encoder")


@dataclass(frozen=True)
class FoundControl:
    """The control network in a file.

    config      of the network
    layout      the names of its weights
    difference  whether they are differences from those of a U-Net
    notes       what was found out and chosen, one line each
    """

    config: ControlConfig
    layout: ControlLayout
    difference: bool = False
    notes: tuple[str, ...] = ()


def has_control(tensors: Mapping[str, Any]) -> bool:
    """Whether a control network is in a file."""
    return bool(control_layouts(tensors))


def identify_control(tensors: Checkpoint, base: UNetConfig | None = None) -> FoundControl:
    """The control network in a file or folder. Only names and shapes are read.

    base   the U-Net that it is for, if known: see `check_fits`

    Raises CheckpointError, by name, for a file of something else, and for networks of a kind that is not supported.
    """
    found = shapes(tensors)
    refuse_other_controls(found)
    layouts = control_layouts(found)
    if not layouts:
        raise CheckpointError(_no_control(tensors, found))
    if len(layouts) > 1 and layouts[0].name == layouts[1].name:
        prefixes = listed(repr(layout.prefix) for layout in layouts)
        raise CheckpointError(f"several control networks in one file (with the prefixes {prefixes}): give one of them")
    layout = layouts[0]
    if (written := tensors.metadata.get(CONTROL_KEY)) is not None and layout.name == OWN:
        try:
            return FoundControl(ControlConfig.from_json(written), layout, notes=tensors.notes)
        except ValueError as error:
            raise CheckpointError(f"the file's own config is damaged: {error}") from None
    folder = tensors.configs.get("control", {})
    check_supported("control", folder, CONTROL)
    unet, widths, bare = read_sizes(found, layout)
    notes = [*tensors.notes, *ignored_settings(tensors.configs)]
    names = _names(tensors.path)
    pooled = next((name for name in names if SHUFFLE.search(name)), "") if not folder else ""
    if pooled:
        notes.append(f"its residuals are averaged over all positions: {pooled!r} is a network for colours (shuffle)")
    if inpaint := next((name for name in names if INPAINT.search(name)), ""):
        notes.append(
            f"the name {inpaint!r} suggests an inpainting control network: these expect -1 in the hint where the mask "
            "is, which an image cannot contain"
        )
    try:
        config = ControlConfig(
            with_model(unet, folder, base, notes),
            widths,
            bgr=folder.get("controlnet_conditioning_channel_order") == "bgr",
            pooled=bool(folder.get("global_pool_conditions")) or bool(pooled),
            bare=bare,
            name=control_name(tensors.path),
        )
    except ValueError as error:
        raise CheckpointError(f"no control network of a known kind: {error}") from None
    difference = any(key in tensors or key in tensors.metadata for key in (DIFFERENCE, layout.prefix + DIFFERENCE))
    if difference:
        notes.append("its weights are differences from those of a U-Net: they are added to the model's own")
        table = layout.sources(config, control_shapes(config))
        if same := len(table) - len(_different(found, table)):
            notes.append(f"without a difference, so the model's own: {counted(same, 'weight')} of {len(table)}")
    whole = [key for key in found if key.startswith(BESIDE) and not key.startswith(layout.prefix)]
    if layout.prefix and whole:
        notes.append(
            f"a whole checkpoint: only its control network is read, not the other {counted(len(whole), 'weight')}"
        )
    return FoundControl(config, layout, difference, tuple(notes))


def control_table(tensors: Checkpoint, found: FoundControl) -> dict[str, Source]:
    """Where each weight of the control network, under our names, lies in the file, or should.

    A file of differences may lack weights that are the same in the U-Net: they are not in the table then.
    """
    table = found.layout.sources(found.config, control_shapes(found.config))
    return _different(tensors, table) if found.difference else table


def _different(tensors: Collection[str], table: Mapping[str, Source]) -> dict[str, Source]:
    """The sources without those missing from a file of differences, of weights that a U-Net has as well."""
    return {key: source for key, source in table.items() if key.startswith(NO_UNET) or source.key in tensors}


def control_state(tensors: Checkpoint, found: FoundControl) -> StateDict:
    """The weights of the control network under our names, complete, of the right shapes, each read on demand.

    Of a file of differences those of `control_table`: the others are zero.

    Raises CheckpointError that counts and names what is missing, unknown or of the wrong shape.
    """
    expected = control_shapes(found.config)
    table = control_table(tensors, found)
    missing, misshapen = table_faults(shapes(tensors), table, expected)
    if missing:
        raise CheckpointError(
            f"{counted(len(missing), 'weight')} of {len(expected)} of the control network missing from the file: "
            f"{listed(missing)}; {AGAIN}"
        )
    if misshapen:
        raise CheckpointError(f"{counted(len(misshapen), 'weight')} of the wrong shape: {listed(misshapen, '; ')}")
    if unknown := unknown_keys(tensors, found):
        raise CheckpointError(
            f"{counted(len(unknown), 'weight')} in the file that a control network does not have: {listed(unknown)}"
        )
    return StateDict(tensors, table, expected, found.notes)


def unknown_keys(tensors: Mapping[str, Any], found: FoundControl) -> list[str]:
    """The keys of a file that belong neither to its control network nor to what may stand beside one."""
    used = {source.key for source in found.layout.sources(found.config, control_shapes(found.config)).values()}
    prefix = found.layout.prefix
    used |= {DIFFERENCE, prefix + DIFFERENCE}

    def beside(key: str) -> bool:
        return bool(prefix) and key.startswith(BESIDE) and not key.startswith(prefix)

    return [key for key in tensors if key not in used and not ignored(key) and not beside(key)]


def control_shapes(config: ControlConfig) -> Shapes:
    """The name and shape of every weight of a control network."""
    from ..models import build  # not at the top: torch is slow to import, and not everything needs it

    return build.control_shapes(config)


# ------------------------------------------------------------------------------------------- which model it is for


def check_fits(config: ControlConfig, unet: UNetConfig, name: str) -> None:
    """Raise CheckpointError, which names both families, unless a control network fits the U-Net of a model.

    name   what the model is called if it is of no known family
    """
    if config.fits(unet):
        return
    own, base = family(config.unet, config.attends), family(unet)
    if own == base or base is None:
        base = f"{name} ({_described(own_half(unet))})"
    raise CheckpointError(
        f"a control network for {own or f'another model ({_described(config.unet)})'}; the model is {base}: give one "
        "that was made for it"
    )


def family(unet: UNetConfig, attends: bool = True) -> str | None:
    """The family of a U-Net or of a control network, by its sizes; None for an unknown one.

    attends   whether it has transformers, whose context tells SD 1.x from 2.x
    """
    own = own_half(unet)
    for name, known in FAMILIES.items():
        same = (own.channels, own.vector, own.in_channels) == (known.channels, known.vector, known.out_channels)
        if same and (own.context == known.context or not attends):
            return name if own.blocks == known.blocks else f"{name}, small U-Net"
    return None


def _described(unet: UNetConfig) -> str:
    blocks = f"{unet.blocks} {'blocks' if unet.blocks > 1 else 'block'} a level"
    channels = f"{', '.join(map(str, unet.channels))} channels, {blocks}, {unet.in_channels} input channels"
    return f"{channels}, context {unet.context}, " + (f"vector {unet.vector}" if unet.vector else "no vector")


def _no_control(tensors: Checkpoint, found: Shapes) -> str:
    """What a file without a control network is, and what to do with it. Raises CheckpointError for a known kind."""
    try:
        refuse_others(found)
    except CheckpointError as error:
        if str(error) != OTHER_CONTROL.what:
            raise
        return f"a control network with most of its weights missing: {AGAIN}"
    layouts = find_layouts(found)
    if "unet" in layouts:
        what = "a checkpoint"
        with suppress(ValueError):
            what = f"a checkpoint ({identify(tensors).config.name})"
        return f"no control network in it: this is {what}; give it with --ckpt"
    if layouts:
        return f"no control network in it: {no_unet(layouts, found)}"
    refuse_alone(found)
    some = listed(found, most=3)
    return f"no control network among its {counted(len(found), 'tensor')} ({some}): give a ControlNet"


def control_name(path: str | os.PathLike[str]) -> str:
    """What the control network in a file or folder is called: see `_names`. The file need not be there."""
    return one_line(_names(path)[0], 100) or ControlConfig.name


def _names(path: str | os.PathLike[str]) -> list[str]:
    """The names of a control network, the best one first: of its file; of the folder, where tools call every file the
    same; or of its repository, in the cache, where the folder of a version has a hash for a name.
    """
    path = Path(os.path.abspath(path))  # of a link, not of its target
    if model_name(path).partition(".")[0] in SAME_NAMES:
        path = path.parent
    owner = repository(path)
    if owner and (path.parent.name == "snapshots" or path.name.startswith("models--")):
        return [owner]
    return [model_name(path), *([owner] if owner else [])]
