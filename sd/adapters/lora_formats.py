"""LoRA files: which of our weights each tensor changes, for the names of every tool; an unknown key is an error.

A weight has many names. As for checkpoints, the names are generated from ours and looked up; only the suffix of a key
is parsed. To add another tool's names, add its suffix to `PARTS` and `_pairs`, its names to `_unet_names` and
`_text_names`. To add another kind of adapter, such as DoRA, remove it from `OTHER_KINDS`, read its parts in `_pairs`,
and extend `Pair` (lora.py).

    kohya        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight, .lora_up, .alpha
                 lora_te_text_model_encoder_layers_0_mlp_fc1...; also lora_te1_, and the original's U-Net names
    diffusers    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight, .lora_B
                 unet....attn1.processor.to_q_lora.down.weight; text_encoder....q_proj.lora_linear_layer.down.weight
    PEFT         base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight

alpha is given for each pair, once for the whole file, or in PEFT's settings; by default it is the rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint, naming
from ..checkpoints.convert import listed, shape_text, squeezed
from ..checkpoints.folders import model_name
from ..checkpoints.key_maps import UNET, diffusers_sources, original_sources
from ..config import Config
from .lora import Lora, Pair, Target

LAYERS = 32  # of the largest text encoder (bigG): files may have layers after the last one that is run
SAME_NAMES = ("pytorch_lora_weights", "adapter_model")  # what diffusers and PEFT call every file
LISTED = 5  # names in an error message at most: they are long
MAX_SETTINGS = 1 << 20  # bytes of an adapter_config.json, or the same in metadata

# The suffix of a key tells the part. PEFT may put the adapter's name before ".weight".
PARTS = re.compile(
    r"(?P<name>.+?)\.(?:lora_(?P<kohya>down|up|mid)\.weight|lora_(?P<peft>[AB])(?:\.[^.]+)?\.weight"
    r"|(?:(?:lora|lora_linear_layer)\.)?(?P<diffusers>down|up)\.weight|(?P<alpha>alpha))"
)
PEFT = {"A": "down", "B": "up"}
# Attention processors of diffusers before PEFT: layer of an attention -> its name there.
PROCESSORS = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}
TEXT_PROCESSORS = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}

# Unsupported kinds of adapters, and unsupported models, by patterns of keys.
OTHER_KINDS = (
    (r"\.(dora_scale|lora_magnitude_vector)", "a DoRA"),
    (r"\.hada_", "a LoHa"),
    (r"\.lokr_", "a LoKr"),
    (r"\.b?oft_|\.oft_diag", "an OFT"),
    (r"\.on_input$", "an IA3"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.diff(_b)?$|\.[wb]_norm$", "a LyCORIS file of full weights, biases or norms"),
    (r"\.lora_embedding_", "a LoRA of word tables"),
    (r"^bundle_emb\.", "a LoRA with embeddings in it"),
)
OTHER_MODELS = (
    (r"lora_te3_|text_encoder_3\.|lora_transformer_|transformer\.|lora_unet_joint_blocks_", "SD 3 or Flux"),
    (r"(lora_unet_|diffusion_model\.|lycoris_)(double|single)_blocks", "Flux"),
    (r"lora_prior_unet_|prior\.", "Stable Cascade"),
    (r"lora_te2_|text_encoder_2\.|.*transformer_blocks[._]1[._]|.*label_emb|.*add_embedding", "SDXL"),
)
# by width of the text encoder
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 1280: "SDXL"}


def read_lora(path: str | os.PathLike[str], config: Config, networks: Mapping[str, nn.Module]) -> Lora:
    """Read a LoRA file for a model of this config, with these networks ("unet", "text_encoder").

    Raises CheckpointError for a file that is not a LoRA, is for another model, of another kind, or has keys
    that have no place in the model.
    """
    path = Path(path)
    shapes = {
        (network, key): tuple(weight.shape)
        for network in ("unet", "text_encoder")
        for key, weight in networks[network].named_parameters()
        if key.endswith(".weight") and weight.dim() > 1 and key not in ("token.weight", "position.weight")
    }
    with load_checkpoint(path) as file, naming(path):
        return Lora(lora_name(path), dict(_pairs(file, config, shapes)))


def lora_name(path: Path) -> str:
    """The file's name without its ending, or its folder's name if the tool gives every file the same name."""
    name = model_name(path)
    return path.resolve().parent.name if name in SAME_NAMES else name


def targets_by_name(config: Config, targets: Sequence[Target]) -> dict[str, Target]:
    """Every name that LoRA files may use for these weights -> the weight."""
    keys: dict[str, list[str]] = {"unet": [], "vae": [], "text_encoder": []}
    for network, key in targets:
        keys[network].append(key)
    theirs = diffusers_sources(config, keys)
    original = original_sources(config, {**keys, "text_encoder": []})
    found: dict[str, Target] = {}
    for key in keys["unet"]:
        for name in _unet_names(theirs["unet"][key].key, original["unet"][key].key):
            found[name] = "unet", key
    for key in keys["text_encoder"]:
        for name in _text_names(theirs["text_encoder"][key].key):
            found[name] = "text_encoder", key
    return found


def _unet_names(diffusers: str, original: str) -> Iterator[str]:
    path, old = diffusers.removesuffix(".weight"), original.removesuffix(".weight").removeprefix(UNET)
    for name in (path, old):
        yield "lora_unet_" + name.replace(".", "_")
    yield from (f"diffusion_model.{old}", f"{UNET}{old}")
    for prefix in ("", "unet.", "base_model.model.", "unet.base_model.model."):
        yield prefix + path
        for layer, processor in PROCESSORS.items():
            if path.endswith(f".{layer}"):
                attention = path.removesuffix(layer)
                yield from (f"{prefix}{attention}processor.{processor}", f"{prefix}{attention}{processor}")


def _text_names(diffusers: str) -> Iterator[str]:
    short = diffusers.removesuffix(".weight").removeprefix("text_model.")
    for path in (short, f"text_model.{short}"):  # transformers from version 5 on, and before
        for prefix in ("lora_te_", "lora_te1_"):
            yield prefix + path.replace(".", "_")
        for prefix in (
            "", "text_encoder.", "base_model.model.", "text_encoder.base_model.model.",
            "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer.",
        ):  # fmt: skip
            yield prefix + path
            for layer, processor in TEXT_PROCESSORS.items():
                if path.endswith(f".{layer}"):
                    yield prefix + path.removesuffix(layer) + processor


def _pairs(file: Checkpoint, config: Config, shapes: Mapping[Target, tuple[int, ...]]) -> Iterator[tuple[Target, Pair]]:
    """The changes in a file, after checking that all of its names and shapes fit."""
    known = targets_by_name(config, list(shapes))
    parts: dict[str, dict[str, str]] = {}  # name of a weight -> part of it -> key in the file
    unknown: list[str] = []
    beyond = _beyond(config, shapes)
    for key in file:
        match = PARTS.fullmatch(key)
        name = match["name"] if match else ""
        if match and name in known:
            part = match["kohya"] or match["diffusers"] or PEFT.get(match["peft"]) or "alpha"
            if part in parts.setdefault(name, {}):
                raise CheckpointError(f"two adapters in one file: {parts[name][part]} and {key}")
            parts[name][part] = key
        elif not (match and name in beyond) and key != "alpha":
            unknown.append(key)
    _check_family(file, parts, known, shapes)
    if unknown:
        _refuse(file, unknown, bool(parts))
    by_target: dict[Target, str] = {}
    for name in parts:
        if (other := by_target.setdefault(known[name], name)) != name:
            raise CheckpointError(f"two names for one weight: {other} and {name}")
    if not parts:
        raise CheckpointError("changes only layers of the text encoder that this model does not run")
    halves = [f"{name} without {part}" for name in parts for part in ("down", "up") if part not in parts[name]]
    if halves:
        raise CheckpointError(f"{len(halves)} halves of pairs missing: {listed(halves, most=LISTED)}")
    _check_shapes(file, parts, known, shapes)
    settings = _peft_config(file)
    for name, keys in parts.items():
        target = known[name]
        down, up, *mid = (file[keys[part]] for part in ("down", "up", "mid") if part in keys)
        if not all(map(_sound, (down, up, *mid))):
            raise CheckpointError(f"{name} holds numbers that are not finite, or whole numbers: a damaged file")
        yield target, Pair(down, up, mid[0] if mid else None, _scale(file, keys, name, target, down.shape[0], settings))


def _sound(numbers: Tensor) -> bool:
    """Whether all numbers are floats and finite. In pieces, because 8-bit floats have to be converted."""
    pieces = numbers.flatten().split(1 << 20)
    return numbers.is_floating_point() and all(bool(piece.float().isfinite().all()) for piece in pieces)


def _beyond(config: Config, shapes: Mapping[Target, tuple[int, ...]]) -> dict[str, Target]:
    """The names of weights in the text encoder's layers after the last one that is run."""
    text = config.text[0]
    first = [key for network, key in shapes if network == "text_encoder" and key.startswith("blocks.0.")]
    more = [
        ("text_encoder", key.replace("blocks.0.", f"blocks.{i}.", 1))
        for i in range(text.layers, LAYERS)
        for key in first
    ]
    deeper = replace(text, layers=max(LAYERS, text.layers))
    return targets_by_name(replace(config, text=(deeper, *config.text[1:])), more)


def _refuse(file: Checkpoint, unknown: list[str], some_known: bool) -> None:
    """Raise CheckpointError that names the kind of file, if recognised, or its unknown keys."""
    for pattern, model in OTHER_MODELS:
        if any(re.match(pattern, key) for key in unknown):
            raise CheckpointError(f"a LoRA for {model}, which is not supported (only Stable Diffusion 1.x and 2.x)")
    for pattern, kind in OTHER_KINDS:
        found = [key for key in unknown if re.search(pattern, key)]
        if found:
            raise CheckpointError(f"{kind} ({found[0]}), which is not supported: LoRA and LoCon are")
    some = listed(unknown, most=LISTED)
    if not some_known and not any("lora" in key for key in unknown):
        raise CheckpointError(f"not a LoRA ({some}): a checkpoint is given with --ckpt, an embedding with --embedding")
    raise CheckpointError(f"{len(unknown)} of {len(file)} keys have no place in this model: {some}")


def _check_family(
    file: Checkpoint,
    parts: Mapping[str, Mapping[str, str]],
    known: Mapping[str, Target],
    shapes: Mapping[Target, tuple[int, ...]],
) -> None:
    """Raise CheckpointError for a LoRA for another model family, whose text encoder has another width."""
    for name, keys in parts.items():
        network, key = known[name]
        if network == "unet" and not key.endswith(("attn2.k.weight", "attn2.v.weight")):
            continue
        if network == "text_encoder" and key.endswith(".fc2.weight"):
            continue
        theirs, ours = file.shape(keys["down"])[1:2] if "down" in keys else (), shapes[network, key][1]
        if theirs and theirs != (ours,):
            what = "U-Net expects texts" if network == "unet" else "text encoder is"
            raise CheckpointError(
                f"made for {FAMILIES.get(theirs[0], 'another model')}, whose {what} {theirs[0]} wide, not {ours} as in "
                f"this model ({name})"
            )


def _check_shapes(
    file: Checkpoint,
    parts: Mapping[str, Mapping[str, str]],
    known: Mapping[str, Target],
    shapes: Mapping[Target, tuple[int, ...]],
) -> None:
    wrong = []
    for name, keys in parts.items():
        network, key = known[name]
        shape = shapes[network, key]
        down, up = (squeezed(file.shape(keys[part]), 2) for part in ("down", "up"))
        mid = file.shape(keys["mid"]) if "mid" in keys else None
        if len(file.shape(keys["down"])) < 2 or len(file.shape(keys["up"])) < 2:
            wrong.append(f"{keys['down']} is {shape_text(down)}, {keys['up']} {shape_text(up)}")
            continue
        rank = file.shape(keys["down"])[0]
        out, width, *kernel = shape
        if mid is not None:
            made = (file.shape(keys["up"])[0], file.shape(keys["down"])[1], *mid[2:])
            fits = len(mid) == 4 and mid[:2] == (rank, rank) and len(down) <= 2 and len(up) <= 2
        else:
            made = (file.shape(keys["up"])[0], *file.shape(keys["down"])[1:])
            fits = len(up) <= 2
        fits = fits and file.shape(keys["up"])[1] == rank and rank > 0
        widened = (network, key) == ("unet", "conv_in.weight") and made == (out, 4, *kernel) and width == 9
        if not fits or not (squeezed(made, 2) == squeezed(shape, 2) or widened):
            wrong.append(f"{name} is for {shape_text(made)}, the model's is {shape_text(shape)}")
    if wrong:
        raise CheckpointError(
            f"made for another model: {len(wrong)} of {len(parts)} of the wrong shape: {listed(wrong, '; ', LISTED)}"
        )


def _scale(
    file: Checkpoint, keys: Mapping[str, str], name: str, target: Target, rank: int, settings: Mapping[str, Any]
) -> float:
    """The factor of one pair: alpha / r, or alpha / sqrt(r) for rsLoRA.

    alpha is the pair's own, the file's, that in PEFT's settings, or r.
    """
    key = keys.get("alpha", "alpha")
    if key in file:
        if math.prod(file.shape(key)) != 1:
            raise CheckpointError(f"{key} is {shape_text(file.shape(key))}, expected one number")
        alpha, root = float(file[key].flatten()[0]), False
    else:
        alpha, root = _peft_alpha(settings, name, target, rank)
    scale = alpha / (math.sqrt(rank) if root else rank)
    if not math.isfinite(scale):
        raise CheckpointError(f"the alpha of {name} is not finite: a damaged file")
    return scale


def _peft_config(file: Checkpoint) -> dict[str, Any]:
    """PEFT's settings, from the file's metadata or an adapter_config.json beside it."""
    text = file.metadata.get("lora_adapter_metadata")
    beside = file.path.with_name("adapter_config.json")
    try:
        if text is None and model_name(file.path) == "adapter_model" and beside.is_file():
            with open(beside, "rb") as stream:
                text = stream.read(MAX_SETTINGS + 1).decode()
        if text is not None and len(text) > MAX_SETTINGS:
            raise ValueError(f"{len(text)} characters")
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"the settings of its adapter cannot be read: {error!s:.100}") from None
    return found if isinstance(found, dict) else {}


def _peft_alpha(settings: Mapping[str, Any], name: str, target: Target, rank: int) -> tuple[float, bool]:
    """alpha from PEFT's settings, and whether it is divided by the square root of the rank."""

    def get(what: str) -> Any:
        return settings.get(f"{target[0]}.{what}", settings.get(what))

    alpha = get("lora_alpha")
    patterns = get("alpha_pattern")
    for layer, own in patterns.items() if isinstance(patterns, dict) else ():
        if not re.fullmatch(r"[\w.-]+", layer):  # PEFT takes any regular expression
            what = f"the settings of its adapter have the pattern {layer!r:.50}"
            raise CheckpointError(f"{what}, which is not supported: expected the name of a layer")
        if name == layer or name.endswith(f".{layer}"):
            alpha = own
            break  # the first match counts, as in PEFT
    if alpha is None:
        return float(rank), False
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or abs(alpha) > 1e6:
        raise CheckpointError(f"the settings of its adapter say lora_alpha {alpha!r:.50}, expected a number")
    return float(alpha), get("use_rslora") is True
