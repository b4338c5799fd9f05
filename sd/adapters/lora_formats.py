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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint, naming, printable
from ..checkpoints.convert import listed
from ..checkpoints.folders import model_name
from ..config import Config
from .changes import Change, Shape
from .lora import Lora, Target
from .lora_names import NUMBERED, Layer, LayerNames, numbered_layers
from .lora_parts import LayerParts, Misfit, check_numbers, read_number, split_key
from .lora_settings import alpha_of, read_settings

LAYERS = 32  # of the largest text encoder (bigG): files may have layers after the last one that is run
# What tools call every file: it is named after its folder; and what people call the only file of a repository.
SAME_NAMES = frozenset({
    "pytorch_lora_weights", "adapter_model", "pytorch_custom_diffusion_weights", "diffusion_pytorch_model",
    "pytorch_model", "lora_weight",
})  # fmt: skip
ONLY_NAMES = frozenset({"lora", "lora_weights", "model", "adapter", "last"})
LISTED = 3  # names in a message at most: they are long
MAX_NOTE = 1000  # characters
NARROW = {("unet", "conv_in"): 4}  # input channels that a file may have where the model, for inpainting, has more

UNRUN = "of text encoder layers after the last one that is run"
NO_LAYER = "of layers that this model does not have"
NO_PART = "of no known kind of adapter"
OTHER_WORDS = "of words for another text encoder"

# The embeddings of a file: kohya's "bundle_emb.word.string_to_param.*", cloneofsimo's "<s1>".
BUNDLED, BUNDLED_ENDS = "bundle_emb.", (".string_to_param.*", ".emb_params", ".clip_l")
# Unsupported kinds of adapters, and unsupported models, by patterns of keys.
OTHER_KINDS = (
    (r"\.oft_diag", "an OFT in LyCORIS's first format"),
    (r"\.b?oft_[RS]", "an OFT of PEFT"),
    (r"\.ia3_l", "an (IA)3 of PEFT"),
    (r"\.lora_embedding_", "a LoRA of word tables"),
    (r"\.vera_lambda|\.hra_|\.lora_ga|\.dyn_(up|down)|\.fourierft", "an adapter of another kind"),
    (r"^bundle_emb\.|^<[^<>]+>$", "embeddings for another text encoder"),
)
OTHER_MODELS = (
    (r"lora_te3_|text_encoder_3\.|lora_transformer_|transformer\.|lora_unet_joint_blocks_|.*\bt5xxl\b",
     "SD 3 or Flux"),
    (r"(.*[._])?(double|single)_blocks[._]", "Flux"),
    (r"lora_prior_unet_|prior\.", "Stable Cascade"),
    (r"lora_te2_|te2[._]|text_encoder_2\.|(text_encoders\.)?clip_g\.|lora_te2\.|.*transformer_blocks[._]1[._]"
     r"|.*label_emb|.*add_embedding|conditioner\.embedders\.1\.", "SDXL"),
)  # fmt: skip
# by width of the text encoder
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 1280: "SDXL"}


def read_lora(path: str | os.PathLike[str], config: Config, networks: Mapping[str, nn.Module]) -> Lora:
    """Read a LoRA file for a model of this config, with these networks ("unet", "text_encoder").

    Raises CheckpointError for a file that is not a LoRA, is for another model, or is damaged.
    """
    path = Path(path)
    shapes = {
        (network, key): tuple(weight.shape)
        for network in ("unet", "text_encoder")
        for key, weight in networks[network].named_parameters()
    }
    with load_checkpoint(path) as file, naming(path):
        return _Contents(file, config, shapes).lora(path)


def lora_name(path: Path) -> str:
    """The name of a LoRA file: the file's, or its folder's if the tool gives every file the same name.

    In a cache of the Hugging Face hub, where files are links in folders named by hashes, it is the repository's name.

    >>> lora_name(Path("/hub/models--someone--pixel-art/snapshots/0123abcd/pytorch_lora_weights.safetensors"))
    'pixel-art'
    """
    path = Path(os.path.abspath(path))  # of the link, not of the file that it points to
    name, repository = model_name(path), _repository(path)
    if repository and (name in SAME_NAMES | ONLY_NAMES or path.parent.name == "blobs"):
        in_folder = path.parent.name != "blobs" and path.parent.parent.name != "snapshots"
        return path.parent.name if in_folder else repository
    return path.parent.name or name if name in SAME_NAMES else name


def _repository(path: Path) -> str | None:
    """The name of the repository, without its owner, of a file in a cache of the hub."""
    found = [part for part in path.parts if part.startswith("models--")]
    return found[-1].removeprefix("models--").rpartition("--")[2] or None if found else None


def layers_of(targets: Sequence[Target]) -> list[Layer]:
    """The layers of some weights."""
    return list(dict.fromkeys((network, key.rpartition(".")[0]) for network, key in targets))


class _Contents:
    """What the keys of a file are: parts of adapters of layers, words, and the rest."""

    def __init__(self, file: Checkpoint, config: Config, shapes: Mapping[Target, Shape]) -> None:
        self._file, self._config, self._shapes = file, config, shapes
        layers = layers_of(list(shapes))
        self._names, self._unrun = LayerNames(config, layers), _unrun_layers(config, layers)
        self.parts: dict[Layer, LayerParts] = {}
        self.words: dict[str, list[str]] = {}  # word -> its keys
        self.rest: dict[str, list[str]] = {}  # reason -> the keys that have no effect for it
        counted = self._counted(layers)
        for key in file:
            if key in counted:
                self._add_part(key, *counted[key])
            else:
                self._add(key)
        for parts in list(self.parts.values()):
            for key, reason in parts.left_over():
                self.rest.setdefault(reason, []).append(key)

    def _add(self, key: str) -> None:
        if word := _word(key):
            self.words.setdefault(word, []).append(key)
            return
        found = split_key(key)
        name, part = found or ("", "")
        layer = self._names.find(name)
        if layer is not None and (part != "weight" or f"{key.removesuffix('weight')}on_input" in self._file):
            self._add_part(key, layer, part)
        elif key != "alpha":
            reason = NO_PART if found is None else UNRUN if self._unrun.find(name) else NO_LAYER
            self.rest.setdefault(reason, []).append(key)

    def _add_part(self, key: str, layer: Layer, part: str) -> None:
        network, name = layer
        weight, bias = self._shapes.get((network, f"{name}.weight"), ()), self._shapes.get((network, f"{name}.bias"))
        keys = self.parts.setdefault(layer, LayerParts(self._file, {}, weight, bias)).keys
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
            if len(shape) < 2 or not (shape[0] == weight[0] if part == "up" else shape[1] == weight[1]):
                return False
        return True

    # --------------------------------------------------------------------------------------------------- the LoRA

    def lora(self, path: Path) -> Lora:
        """All of it, after checking that it fits the model."""
        used = {layer: parts for layer, parts in self.parts.items() if parts.used()}
        for layer, parts in used.items():
            _check_family(layer, parts)
        unknown = [key for reason in (NO_LAYER, NO_PART) for key in self.rest.get(reason, [])]
        for pattern, model in OTHER_MODELS:
            if any(re.match(pattern, key) for key in unknown):
                raise CheckpointError(f"a LoRA for {model}, which is not supported (only Stable Diffusion 1.x and 2.x)")
        words = dict(self._read_words())
        if not used and not words:
            self._refuse(unknown)
        changes = dict(self._changes(used))
        return Lora(lora_name(path), changes, words, self._notes(path), Path(os.path.realpath(path)))

    def _changes(self, used: Mapping[Layer, LayerParts]) -> Iterator[tuple[Target, Change]]:
        settings, wrong = read_settings(self._file), list[str]()
        whole = read_number(self._file, "alpha") if "alpha" in self._file else None
        for (network, name), parts in used.items():
            key = next(iter(parts.keys.values()))

            def alpha(rank: int, key: str = key, network: str = network) -> tuple[float | None, bool]:
                return (whole, False) if whole is not None else alpha_of(settings, key, network)

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
        """The words in the file that fit the text encoder, and their vectors (n, D) in float32."""
        text = self._config.text[0]
        for word, keys in self.words.items():
            shape = self._file.shape(keys[0])
            count = shape[0] if len(shape) == 2 else 1
            if len(keys) > 1 or len(shape) not in (1, 2) or shape[-1] != text.width or not 0 < count <= text.length - 2:
                self.rest.setdefault(OTHER_WORDS, []).extend(keys)
                continue
            vectors = self._file[keys[0]]
            check_numbers(keys[0], vectors)
            yield word, vectors.reshape(-1, text.width).float()

    def _notes(self, path: Path) -> tuple[str, ...]:
        """What of the file has no effect, in one line."""
        if not self.rest:
            return ()
        count = sum(map(len, self.rest.values()))
        reasons = "; ".join(f"{len(keys)} {why} ({listed(keys, most=LISTED)})" for why, keys in self.rest.items())
        note = printable(f"{path.name}: {count} of {len(self._file)} tensors have no effect: {reasons}")
        return (note if len(note) <= MAX_NOTE else note[: MAX_NOTE - 3] + "...",)

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
        if not any(re.search("lora|hada_|lokr_|oft_", key) for key in unknown):
            raise CheckpointError(
                f"not a LoRA ({some}): a checkpoint is given with --ckpt, an embedding with --embedding"
            )
        raise CheckpointError(f"{len(unknown)} of {len(self._file)} keys match no layer of this model: {some}")


def _unrun_layers(config: Config, layers: Sequence[Layer]) -> LayerNames:
    """The names of layers of the text encoder after the last one that is run."""
    text = config.text[0]
    first = [name for network, name in layers if network == "text_encoder" and name.startswith("blocks.0.")]
    more = [
        ("text_encoder", name.replace("blocks.0.", f"blocks.{i}.", 1))
        for i in range(text.layers, LAYERS)
        for name in first
    ]
    deeper = replace(text, layers=max(LAYERS, text.layers))
    return LayerNames(replace(config, text=(deeper, *config.text[1:])), more)


def _word(key: str) -> str | None:
    """The word whose vectors a tensor has."""
    if key.startswith(BUNDLED):
        end = next((end for end in BUNDLED_ENDS if key.endswith(end)), None)
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
        raise CheckpointError(
            f"made for {FAMILIES.get(made[1], 'another model')}, whose {what} {made[1]} wide, not {ours} as in "
            f"this model ({parts.keys[min(parts.keys)]})"
        )
