"""LoRA and LyCORIS files: which of our weights each tensor changes, whatever tool wrote it.

    lora_names.py     the layer that a key names
    lora_parts.py     the part of an adapter that a key is, and the change that the parts make together
    lora_settings.py  alpha in PEFT's settings
    changes.py        the formula of each kind of change

What is understood is applied. The rest is counted and named in the notes of the `Lora`: layers that the model does not
have, halves of pairs, rank 0, tensors of unknown kinds. Refused is a file of which nothing is understood, one for
another model, and one with two different adapters for a weight, or with numbers that are not finite.

alpha is given for each layer, once for the whole file, or in PEFT's settings; by default it is the rank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint, naming
from ..checkpoints.finite import check_numbers
from ..checkpoints.folders import model_name
from ..checkpoints.other_models import NOT_SUPPORTED, refuse_control
from ..config import Config
from ..few_step import SETTINGS, TITLES, FewStep, from_json, named
from ..messages import listed, one_line, printable
from .adapter_files import LORA_FILES, adapter_file, lora_name
from .changes import Change, Shape
from .lora import Lora, Target
from .lora_names import NUMBERED, Layer, LayerNames, flat, numbered_layers
from .lora_parts import ADAPTER_KEY, ONE_NUMBER, LayerParts, Misfit, plain_number, read_number, split_key
from .lora_settings import alpha_of, lokr_scale, read_settings
from .textual_inversion import encoder_names

LAYERS = 32  # of the largest text encoder (bigG): files may have layers after the last one that is run
LISTED = 3  # names in a message at most: they are long
MAX_NOTE = 1000  # characters
MAX_END = 4  # words after the name of a layer in an unknown key, such as "base_layer.weight"
NARROW = {("unet", "conv_in"): 4}  # input channels that a file may have where the model, for inpainting, has more

UNRUN = "of text encoder layers after the last one that is run"
NO_LAYER = "of layers that this model does not have"
NO_PART = "of no known kind of adapter"
OTHER_WORDS = "of words for another text encoder"

# Keys of the embeddings in a LoRA file: kohya's "bundle_emb.WORD.string_to_param.*", for SDXL "bundle_emb.WORD.clip_l"
# and "bundle_emb.WORD.clip_g"; cloneofsimo's "<s1>".
BUNDLED, BUNDLED_ENDS = "bundle_emb.", (".string_to_param.*", ".emb_params", ".clip_l")
# Unsupported kinds of adapters, and unsupported models, by patterns of keys.
OTHER_KINDS = (
    (r"\.oft_diag", "an OFT in LyCORIS's first format"),
    (r"\.b?oft_[RS]", "an OFT of PEFT"),
    (r"\.ia3_l", "an (IA)3 of PEFT"),
    (r"\.lora_embedding_", "a LoRA of word tables"),
    (r"\.vera_lambda|\.hra_|\.lora_ga|\.dyn_(up|down)|\.fourierft", "an adapter of another kind"),
    (r"_custom_diffusion\.", "a Custom Diffusion file"),
    (r"^image_proj\.|^ip_adapter\.|\.to_[kv]_ip\.", "an IP-Adapter"),
    (r"^bundle_emb\.|^<[^<>]+>$", "embeddings for another text encoder"),
)
ADALORA = re.compile(r"\.lora_E(\.|$)")  # factors between two matrices, which mean nothing without them
OTHER_MODELS = (
    (r"(.*[._])?joint_blocks[._]|lora_te3_|text_encoder_3\.|.*\bt5xxl\b", "SD 3 or Flux"),
    (r"(.*[._])?(double|single)(_transformer)?_blocks[._]", "Flux or HunyuanVideo"),
    (r"lora_transformer_|transformer\.", "SD 3 or Flux, or another diffusion transformer"),
    (r"lora_prior_unet_|prior\.", "Stable Cascade"),
)  # fmt: skip
# Layers that only one of the two families has, and its name: SDXL has a second text encoder and a vector; Stable
# Diffusion 1.x and 2.x have a fourth level, and attention in the first.
XL = (
    r"lora_te2_|te2[._]|text_encoder_2\.|(text_encoders\.)?clip_g\.|lora_te2\.|.*transformer_blocks[._]1[._]"
    r"|.*label_emb|.*add_embedding|conditioner\.embedders\.1\.",
    "SDXL",
)
NOT_XL = (
    r"(.*[._])?(down_blocks[._]0[._]attentions|up_blocks[._]3[._]attentions|input_blocks[._][12][._]1"
    r"|output_blocks[._](9|10|11)[._]1)[._]",
    "Stable Diffusion 1.x or 2.x",
)
# The same in a file of which nothing is understood. Beside layers of the model, such layers are left out.
OTHER_MODELS_ALONE = (
    (r"(.*[._])?motion_modules[._]", "the motion module of AnimateDiff"),
    (r"((lora_unet|diffusion_model|model\.diffusion_model|unet|base_model\.model)[._])?(transformer_)?blocks[._]\d",
     "a diffusion transformer (Wan, Qwen-Image, LTX, PixArt, ...)"),
    (r"((lora_unet|diffusion_model)[._])?layers[._]\d+[._](attention|feed_forward)[._]",
     "a diffusion transformer (Lumina, Z-Image)"),
    (r"(base_model\.model\.)?model\.layers\.\d+\.", "a language model"),
)  # fmt: skip
# by the width of the context or of the text encoder
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 1280: "SDXL"}
REFINER = "SDXL's refiner"  # its context has the width of SDXL's second text encoder


def read_lora(path: str | os.PathLike[str], config: Config, networks: Mapping[str, nn.Module]) -> Lora:
    """Read a LoRA file for a model of this config, with these networks ("unet" and the text encoders).

    path   of the file, or of a folder as written by diffusers, PEFT or the hub's cache

    Raises CheckpointError for a file that is not a LoRA, is for another model, or is damaged.
    """
    path = adapter_file(Path(path), LORA_FILES)
    shapes = {
        (network, key): tuple(weight.shape)
        for network in ("unet", *config.text_names)
        for key, weight in networks[network].named_parameters()
    }
    _check_plain(shapes)
    with load_checkpoint(path) as file, naming(path):
        return _Contents(file, config, shapes).lora(path)


def _check_plain(shapes: Iterable[Target]) -> None:
    """Raise ValueError if the weight of a layer is not its own parameter, as LoRAs are merged into parameters."""
    for network, key in shapes:
        layer, _, name = key.rpartition(".")
        if name not in ("weight", "bias"):
            raise ValueError(
                f"{network}.{layer.partition('.parametrizations')[0]} computes its weight (weight_norm, pruning, a "
                "parametrization), so no LoRA can be merged: make the weight plain first "
                "(parametrize.remove_parametrizations, prune.remove)"
            )


def layers_of(targets: Sequence[Target]) -> list[Layer]:
    """The layers of some weights."""
    return list(dict.fromkeys((network, key.rpartition(".")[0]) for network, key in targets))


class _Contents:
    """What the keys of a file are: parts of adapters of layers, words, and the rest."""

    def __init__(self, file: Checkpoint, config: Config, shapes: Mapping[Target, Shape]) -> None:
        self._file, self._config, self._shapes = file, config, shapes
        layers = layers_of(list(shapes))
        self._names, self._unrun = LayerNames(config, layers), _unrun_layers(config, layers)
        self._word_ends = (*BUNDLED_ENDS, *(f".{name}" for name in encoder_names(config)))
        self.parts: dict[Layer, LayerParts] = {}
        self.words: dict[str, list[str]] = {}  # word -> its keys
        self.rest: dict[str, list[str]] = {}  # reason -> the keys that have no effect for it
        counted = self._counted(layers)
        for key in file:
            if key in counted:
                self._add_part(key, *counted[key])
            else:
                self._add(key)
        for key, text in file.metadata.items():
            self._add_number(key, text)
        for parts in list(self.parts.values()):
            for key, reason in parts.left_over():
                self.rest.setdefault(reason, []).append(key)

    def _add(self, key: str) -> None:
        if word := _word(key, self._word_ends):
            self.words.setdefault(word, []).append(key)
            return
        found = split_key(key)
        name, part = found or ("", "")
        layer = self._names.find(name)
        if layer is not None and (part != "weight" or f"{key.removesuffix('weight')}on_input" in self._file):
            self._add_part(key, layer, part)
        elif key != "alpha":
            reason = UNRUN if name and self._unrun.find(name) else NO_PART if self._of_layer(key) else NO_LAYER
            self.rest.setdefault(NO_PART if found is None else reason, []).append(key)

    def _of_layer(self, key: str) -> bool:
        """Whether a key begins with the name of a layer that the model has."""
        name = flat(key)
        for _ in range(MAX_END):
            name = name.rpartition("_")[0]
            if name and self._names.find(name):
                return True
        return False

    def _add_number(self, key: str, text: str) -> None:
        """Add an alpha that is a plain number in place of a tensor."""
        name, part = split_key(key) or ("", "")
        layer = self._names.find(name) if part in ONE_NUMBER else None
        if layer in self.parts and key not in self._file:
            self.parts[layer].numbers[part] = plain_number(key, text)

    def _add_part(self, key: str, layer: Layer, part: str) -> None:
        network, name = layer
        weight, bias = self._shapes.get((network, f"{name}.weight"), ()), self._shapes.get((network, f"{name}.bias"))
        keys = self.parts.setdefault(layer, LayerParts(self._file, {}, weight, bias, {})).keys
        if (other := keys.setdefault(part, key)) == key:
            return
        if not _equal(self._file, key, other):
            raise CheckpointError(f"two adapters for one weight: {other} and {key} have different numbers")
        self.rest.setdefault("the same as others under another name", []).append(key)

    def _counted(self, layers: list[Layer]) -> dict[str, tuple[Layer, str]]:
        """The keys that count layers, "unet:0:up" -> layer and part, in the order of layers that the shapes show.

        A pickle may hold the matrices of one network as a list, up and down in turn.
        """
        keys = {key: match for key in self._file if (match := NUMBERED.fullmatch(key))}
        names = [{key: (f"{match[1]}:{int(match[2])}", match[3]) for key, match in keys.items()}]
        if all(key.isdigit() and len(key) < 6 for key in self._file):
            names = [
                {key: (f"{network}:{int(key) // 2}", ("up", "down")[int(key) % 2]) for key in self._file}
                for network in ("unet", "text_encoder")
            ]
        if not names[0]:
            return {}
        tables = numbered_layers(self._config, frozenset(layers), self._file.metadata)
        tries = [
            {key: (table[name], part) for key, (name, part) in named.items() if name in table}
            for named in names
            for table in tables
        ]
        return next((found for found in tries if found and self._all_fit(found)), tries[0])

    def _all_fit(self, found: Mapping[str, tuple[Layer, str]]) -> bool:
        for key, ((network, name), part) in found.items():
            shape, weight = self._file.shape(key), self._shapes[network, f"{name}.weight"]
            if part == "alpha":
                continue
            if len(shape) < 2 or not (shape[0] == weight[0] if part == "up" else shape[1] == weight[1]):
                return False
        return True

    # --------------------------------------------------------------------------------------------------- the LoRA

    def lora(self, path: Path) -> Lora:
        """All of it, after checking that it fits the model."""
        used = {layer: parts for layer, parts in self.parts.items() if parts.used()}
        if not used:
            refuse_control({key: self._file.shape(key) for key in self._file})
        for layer, parts in used.items():
            _check_family(layer, parts)
        unknown = [key for reason in (NO_LAYER, NO_PART) for key in self.rest.get(reason, [])]
        for pattern, model in OTHER_MODELS if used else OTHER_MODELS + OTHER_MODELS_ALONE:
            if any(re.match(pattern, key) for key in unknown):
                raise CheckpointError(f"a LoRA for {model}, {NOT_SUPPORTED}")
        pattern, model = NOT_XL if self._config.sizes else XL
        if (key := next((key for key in unknown if re.match(pattern, key)), None)) is not None:
            raise CheckpointError(
                f"a LoRA for {model} ({key}), not for this model ({self._config.name}): take one that was made for it"
            )
        if found := [key for key in self._file if ADALORA.search(key)]:
            raise CheckpointError(f"an AdaLoRA of PEFT ({found[0]}), which is not supported")
        words = dict(self._read_words())
        if not used and not words:
            self._refuse(unknown)
        changes = dict(self._changes(used))
        few_step, unread = self._few_step(path)
        notes = (*self._notes(path), *map(printable, unread))
        return Lora(lora_name(path), changes, words, notes, Path(os.path.realpath(path)), few_step)

    def _few_step(self, path: Path) -> tuple[FewStep | None, list[str]]:
        """The kind of few-step LoRA by its settings, else by what it is called, and a note on settings not read."""
        metadata, unread = self._file.metadata, list[str]()
        if SETTINGS in metadata:
            try:
                return from_json(metadata[SETTINGS], self._config), []
            except ValueError as error:
                unread = [f"the LoRA {lora_name(path)}: {error}"]
        names = (lora_name(path), model_name(path), *(metadata.get(title, "") for title in TITLES))
        return next(filter(None, map(named, names)), None), unread

    def _changes(self, used: Mapping[Layer, LayerParts]) -> Iterator[tuple[Target, Change]]:
        settings, wrong = read_settings(self._file), list[str]()
        whole = read_number(self._file, "alpha") if "alpha" in self._file else None
        if whole is None and self._file.kind != "safetensors" and "alpha" in self._file.metadata:
            whole = plain_number("alpha", self._file.metadata["alpha"])
        for (network, name), parts in used.items():
            key = next(iter(parts.keys.values()))

            def alpha(rank: int, key: str = key, network: str = network) -> tuple[float | None, bool]:
                return (whole, False) if whole is not None else alpha_of(settings, key, network)

            if (scale := lokr_scale(settings, key, network)) is not None and "alpha" not in parts.keys:
                parts.numbers.setdefault("scale", scale)
            inputs = NARROW.get((network, name))
            try:
                narrow = inputs if inputs is not None and parts.weight[1] > inputs else None
                for leaf, change in parts.changes(alpha, narrow):
                    yield (network, f"{name}.{leaf}"), change
            except Misfit as misfit:
                wrong.append(str(misfit))
        if wrong:
            what = f"{len(wrong)} of {len(used)} layers have the wrong shape"
            raise CheckpointError(f"made for another model: {what}: {listed(wrong, '; ', LISTED)}")

    def _read_words(self) -> Iterator[tuple[str, Tensor]]:
        """The words in the file that fit the text encoders, and their vectors (n, D) as `read_embedding` has them."""
        texts = self._config.text
        names = encoder_names(self._config) or ("",)
        for word, keys in self.words.items():
            if names != ("",):  # SDXL: one tensor for each text encoder
                by_end = {key.rpartition(".")[2]: key for key in keys}
                found = [by_end[name] for name in names if name in by_end]
            else:
                found = keys
            shapes = [self._file.shape(key) for key in found]
            counts = {shape[0] if len(shape) == 2 else 1 for shape in shapes}
            fits = len(found) == len(texts) and len(counts) == 1 and 0 < counts.pop() <= texts[0].length - 2
            fits = fits and all(len(shape) in (1, 2) for shape in shapes)
            if not fits or [shape[-1] for shape in shapes] != [text.width for text in texts]:
                self.rest.setdefault(OTHER_WORDS, []).extend(keys)
                continue
            vectors = []
            for key, text in zip(found, texts, strict=True):
                tensor = self._file[key]
                check_numbers(key, tensor)
                vectors.append(tensor.reshape(-1, text.width).float())
            yield word, torch.cat(vectors, dim=1)

    def _notes(self, path: Path) -> tuple[str, ...]:
        """What of the file has no effect, or another one than in some programs: a line for each."""
        zero = [parts.name() for parts in self.parts.values() if parts.alpha_is_zero()]
        what = f"{len(zero)} layer{'s have' if len(zero) > 1 else ' has'} alpha 0 ({listed(zero, most=1)})"
        notes = [f"{path.name}: {what}, read as the rank, as trainers do; other programs apply nothing"] if zero else []
        if not self.rest:
            return tuple(map(printable, notes))
        count = sum(map(len, self.rest.values()))
        reasons = "; ".join(f"{len(keys)} {why} ({listed(keys, most=LISTED)})" for why, keys in self.rest.items())
        note = f"{path.name}: {count} of {len(self._file)} tensors have no effect: {reasons}"
        return (*map(printable, notes), one_line(note, MAX_NOTE))

    def _refuse(self, unknown: list[str]) -> None:
        """Raise CheckpointError for a file of which nothing can be applied."""
        for pattern, kind in OTHER_KINDS:
            if found := [key for key in self._file if re.search(pattern, key)]:
                raise CheckpointError(f"{kind} ({found[0]}), which is not supported")
        others = {why: keys for why, keys in self.rest.items() if why not in (NO_LAYER, NO_PART)}
        if others:
            why, keys = max(others.items(), key=lambda item: len(item[1]))
            more = f", and {len(unknown)} {NO_LAYER}" if unknown else ""
            raise CheckpointError(f"nothing to apply: {len(keys)} tensors {why} ({listed(keys, most=LISTED)}){more}")
        some = listed(unknown or list(self._file), most=LISTED)
        if not any(ADAPTER_KEY.search(key) for key in unknown):
            raise CheckpointError(
                f"not a LoRA ({some}): a checkpoint is given with --ckpt, an embedding with --embedding"
            )
        what = "match no layer of this model" if self.rest.get(NO_LAYER) else f"are {NO_PART}"
        raise CheckpointError(f"{len(unknown)} of {len(self._file)} keys {what}: {some}")


def _unrun_layers(config: Config, layers: Sequence[Layer]) -> LayerNames:
    """The names of layers of the text encoders after the last one that is run."""
    deeper = tuple(replace(text, layers=max(LAYERS, text.layers)) for text in config.text)
    more = [
        (network, name.replace("blocks.0.", f"blocks.{i}.", 1))
        for network, text in zip(config.text_names, config.text, strict=True)
        for i in range(text.layers, LAYERS)
        for of, name in layers
        if of == network and name.startswith("blocks.0.")
    ]
    return LayerNames(replace(config, text=deeper), more)


def _word(key: str, ends: Sequence[str]) -> str | None:
    """The word whose vectors a tensor holds; `ends` are the endings of the keys of bundled embeddings."""
    if key.startswith(BUNDLED):
        end = next((end for end in ends if key.endswith(end)), None)
        return key.removeprefix(BUNDLED).removesuffix(end) if end else None
    return key if re.fullmatch("<[^<>]+>", key) else None


def _equal(file: Checkpoint, key: str, other: str) -> bool:
    """Whether two tensors of a file are the same, to the bit."""
    if file.shape(key) != file.shape(other) or file.dtype(key) != file.dtype(other):
        return False
    one, two = (file[name].flatten().view(torch.uint8) if file.shape(name) else file[name] for name in (key, other))
    return torch.equal(one, two)


def _check_family(layer: Layer, parts: LayerParts) -> None:
    """Raise CheckpointError for a LoRA for another model family, whose text encoder has another width."""
    network, name = layer
    if not (name.endswith(("attn2.k", "attn2.v")) if network == "unet" else name.endswith((".fc1", ".q", ".k", ".v"))):
        return
    made, ours = parts.shape_made(), parts.weight[1]
    if made is not None and len(made) > 1 and made[1] != ours:
        what = "U-Net expects texts" if network == "unet" else "text encoder is"
        family = FAMILIES.get(made[1], "another model")
        if network == "unet" and made[1] == 1280:
            family = REFINER
        raise CheckpointError(
            f"made for {family}, whose {what} {made[1]} wide, not {ours} as in "
            f"this model ({parts.keys[min(parts.keys)]})"
        )
