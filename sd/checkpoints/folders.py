"""The files of a model that is a folder or split into several files. Only names and JSON files are looked at.

    model_index.json                    what the parts are
    unet/     config.json               sizes
              diffusion_pytorch_model.safetensors          or .bin; or .fp16.safetensors, .non_ema.safetensors: variants
    vae/      the same
    text_encoder/  config.json, model.safetensors or pytorch_model.bin
    text_encoder_2/  the same: SDXL's second one
    scheduler/scheduler_config.json     noise schedule, and what the U-Net predicts

This is how diffusers saves a pipeline. One of its parts may be given alone. A large file may be sharded: the
"weight_map" of an index, `*.safetensors.index.json`, then maps each weight to a file beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..messages import listed
from .formats.pickles import RefusedFile
from .hub_cache import cached_models, dangling, snapshot
from .layouts import SECOND
from .other_files import other_folder
from .tiny_vae import half_files
from .tokenizer_files import read_tokenizer

MAX_JSON = 1 << 20  # bytes; an index has less than 200 KB
STEMS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
    SECOND: ("model", "pytorch_model"),
}
ALL_STEMS = tuple(dict.fromkeys(stem for stems in STEMS.values() for stem in stems))
RAW_VARIANT = "non_ema"  # if present, the file without a variant is the moving average
EXTRA_FILE = "sd_extra.safetensors"  # ours: tensors that only an original file has
CONFIGS = {
    "index": "model_index.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    SECOND: f"{SECOND}/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "tokenizer_2": "tokenizer_2/tokenizer_config.json",
}
CLASSES = {
    "UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "AutoencoderTiny": "vae",
    **dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"), "text_encoder"),
    "ControlNetModel": "control",
}  # fmt: skip
ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of files of weights
NOT_NEEDED = ("safety_checker", "feature_extractor")  # parts of a pipeline without effect on images here
SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")


class Part(NamedTuple):
    """Files of weights, and the prefix that their names get."""

    prefix: str
    files: tuple[Path, ...]
    weight_map: Mapping[str, Set[str]] | None = None  # of an index: file name -> weights in the file


class Parts(NamedTuple):
    """A model in several files: its weights, its JSON files by topic, and what was chosen."""

    kind: str
    parts: tuple[Part, ...]
    configs: dict[str, dict[str, Any]]
    notes: tuple[str, ...]


def find_parts(folder: Path, variant: str | None = None) -> Parts:
    """The files of a diffusers folder, of one of its parts, or of a folder with an index. Raises RefusedFile.

    variant   "fp16", ...: files of this variant where there are any; else those without a variant, or the only variant
    """
    if (cached := snapshot(folder)) is not None:
        found = find_parts(cached, variant)
        return found._replace(notes=(f"the snapshot {cached.name} of the cache is read", *found.notes))
    inside = {name: folder / name for name in STEMS if (folder / name).is_dir()}
    if not inside and not (folder / CONFIGS["index"]).is_file():
        return _single_part(folder, variant)
    configs = {
        name: _text_part(_read_json(folder / file)) if name.startswith("text_encoder") else _read_json(folder / file)
        for name, file in CONFIGS.items()
        if (folder / file).is_file()
    }
    only_second = SECOND in inside and "text_encoder" not in inside
    if only_second:  # as in the refiner's folder: here it is the first one
        for first, second in (("text_encoder", SECOND), ("tokenizer", "tokenizer_2")):
            configs |= {first: configs.pop(second)} if second in configs else {}
    parts: list[Part] = []
    notes: list[str] = []
    available: set[str | None] = set()
    matched = variant is None
    for name, place in inside.items():
        variants = _variants(place, STEMS[name])
        if not variants and (other := _other_name(place)):
            variants = {None: other}
            notes.append(f"{name}/{other.name} is read, as there is no {STEMS[name][0]} beside it")
        available |= variants.keys()
        chosen = _choose(variants, variant)
        if not variants:
            what = _unreadable(place) or _cannot_choose(place)
            if what and name == "unet":
                raise RefusedFile(f"unet/: {what}")
            notes += [f"{name}/: {what}"] if what else []
            continue  # convert.py says what is missing, and which option gives it
        matched |= chosen == variant
        if variant is None and chosen is not None:
            notes.append(f"the {chosen} files are read, as there are no others")
        averaged = name == "unet" and chosen is None and RAW_VARIANT in variants
        named = "text_encoder" if name == SECOND and only_second else name
        parts.append(_part(f"{named}_ema." if averaged else f"{named}.", variants[chosen]))
        if averaged:
            parts.append(_part(f"{name}.", variants[RAW_VARIANT]))
    if not matched:
        known = ", ".join(sorted(filter(None, available))) or "none"
        raise RefusedFile(f"no files of the variant {variant!r} in it; its variants: {known}")
    if not parts and (what := _unreadable(folder, whole="index" in configs)):
        raise RefusedFile(what)
    if not parts and "index" not in configs:
        raise RefusedFile(_no_model(folder))
    for words, tokenizer in (("words", "tokenizer"), ("words_2", "tokenizer_2")):
        place = folder / ("tokenizer_2" if only_second else tokenizer)
        if place.is_dir() and not (only_second and words == "words_2"):
            configs[words], unused = read_tokenizer(place, configs.get(tokenizer, {}), _read_json)
            notes += unused
    notes += _unused(folder, inside)
    if (folder / EXTRA_FILE).is_file():
        parts.append(Part("", (folder / EXTRA_FILE,)))
    return Parts("diffusers folder", tuple(parts), configs, tuple(dict.fromkeys(notes)))


def model_name(path: Path) -> str:
    """The name of a file or folder of weights, without a file's ending.

    A folder keeps its whole name, as does a file without a known ending: the ".0" of "style-2.0" is part of a version.
    """
    path = path.resolve() if path.name in ("", ".", "..") else path
    known = path.suffix.lower() in ENDINGS and not path.is_dir()
    return path.stem if known else path.name


def is_index(path: Path) -> bool:
    """Whether a path is named like the index of a sharded file."""
    return re.search(r"\.index(\.[\w-]+)?\.json$", path.name) is not None


def parts_of_index(path: Path) -> Parts:
    """The files that an index names. Raises RefusedFile."""
    return Parts("index", (_part("", path),), {}, ())


def check_not_a_shard(path: Path) -> None:
    """Refuse a single shard of a model. Raises RefusedFile."""
    found = SHARD.search(path.name)
    if found and int(found[1]) > 1:
        raise RefusedFile(f"one of {int(found[1])} parts of a model; give the .index.json beside it, or the folder")


def _single_part(folder: Path, variant: str | None) -> Parts:
    variants = _variants(folder, ALL_STEMS)
    if not variants:
        if halves := half_files([file.name for file in _weights_in(folder)]):
            parts = tuple(_part(f"{half}.", folder / name) for half, name in halves.items())
            return Parts("folder of a tiny autoencoder", parts, {}, ())
        raise RefusedFile(_no_model(folder))
    chosen = _choose(variants, variant)
    if variant is not None and chosen != variant:
        known = ", ".join(sorted(filter(None, variants))) or "none"
        raise RefusedFile(f"no files of the variant {variant!r} in it; its variants: {known}")
    return Parts("diffusers folder", (_part("", variants[chosen]),), _config_of_part(folder), ())


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a part of a diffusers folder, such as a control network, has files of a variant: "fp16", ..."""
    with suppress(RefusedFile, OSError):  # what is wrong is said when it is read
        return variant in _variants(snapshot(folder) or folder, ALL_STEMS)
    return False


def config_beside(path: Path) -> dict[str, dict[str, Any]]:
    """The config.json beside a file that is named like the weights of a part of a diffusers folder, by its topic.

    Empty if there is none, or if it is that of another part or program, which may be anything.
    """
    stem = path.name.partition(".")[0]
    if not any(stem in stems for stems in STEMS.values()):
        return {}
    with suppress(RefusedFile, OSError):
        found = _config_of_part(path.parent)
        return {topic: config for topic, config in found.items() if stem in STEMS.get(topic, STEMS["unet"])}
    return {}


def _config_of_part(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / "config.json").is_file():
        return {}
    config = _read_json(folder / "config.json")
    classes = config.get("architectures")
    names = [config.get("_class_name"), *(classes if isinstance(classes, list) else [])]
    topics = {CLASSES[name] for name in names if isinstance(name, str) and name in CLASSES}
    return {topic: _text_part(config) if topic == "text_encoder" else config for topic in topics}


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the text encoder in its config.json or in that of a whole CLIP, which has them as an entry."""
    inner = config.get("text_config") or config.get("text_config_dict")  # the latter in old files only
    return inner if isinstance(inner, dict) else config


def _unreadable(folder: Path, whole: bool = False) -> str | None:
    """What a folder has instead of weights that can be read, and what to do; None if unknown (see `other_folder`)."""
    if missing := dangling(folder):
        return f"links to files that are not there ({missing[0]}), as an unfinished download does; download it again"
    if models := cached_models(folder):
        return f"the cache of {len(models)} models; give one of the folders in it ({listed(models, most=3)})"
    return other_folder(folder, whole)


def _no_model(folder: Path) -> str:
    if what := _unreadable(folder):
        return what
    if models := sorted(place.name for place in folder.iterdir() if _is_model(place)):
        return f"a folder with a diffusers model in it; give the folder of the model ({listed(models, most=3)})"
    files = sorted(file.name for pattern in ("*.safetensors", "*.ckpt") for file in folder.glob(pattern))
    if files:
        some = listed(files, most=3)
        return f"a folder that is not a diffusers model; give the checkpoint file inside it ({some})"
    return "a folder that is not a diffusers model (no model_index.json, no unet/); give a checkpoint file"


def _is_model(folder: Path) -> bool:
    """Whether a folder looks like that of a diffusers model."""
    return (folder / CONFIGS["index"]).is_file() or all((folder / name).is_dir() for name in ("unet", "vae"))


def _weights_in(folder: Path) -> list[Path]:
    """The files of weights in a folder, by their names."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())


def _other_name(folder: Path) -> Path | None:
    """The only file of weights in a part of a model, whatever its name is, unless it is one of several parts."""
    files = _weights_in(folder)
    return files[0] if len(files) == 1 and not SHARD.search(files[0].name) and not other_folder(folder) else None


def _cannot_choose(folder: Path) -> str | None:
    """The message for a part whose weight files cannot be told apart by name; None if it has no weight files."""
    files = [file.name for file in _weights_in(folder)]
    if not files:
        return None
    some = listed(files, most=3)
    if any(SHARD.search(name) for name in files):
        return f"parts of a split file without their index ({some}); download its .index.json as well"
    return f"{len(files)} files of weights with unusual names ({some}); give the right one its usual name"


def _unused(folder: Path, used: Collection[str]) -> list[str]:
    """A note on the weights in a model's folder that are not read."""
    places = [place for place in sorted(folder.iterdir()) if place.is_dir() and place.name not in used]
    names = []
    for place in places:
        with suppress(OSError):  # one that may not be looked into, such as lost+found
            names += [f"{place.name}/"] if place.name not in NOT_NEEDED and _weights_in(place) else []
    names += [file.name for file in _weights_in(folder) if file.name.startswith("pytorch_lora_weights")]
    return [f"in the folder, but not used: {', '.join(names)}"] if names else []


def _variants(folder: Path, stems: Sequence[str]) -> dict[str | None, Path]:
    """Variant -> the file or index to read, safetensors before pickles; None for files without a variant."""
    found: dict[str | None, Path] = {}
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for ending in ("safetensors", "bin"):
        for stem in stems:
            whole = re.compile(rf"{stem}(?:\.([\w-]+))?\.{ending}")
            index = re.compile(rf"{stem}(?:\.([\w-]+))?\.{ending}\.index(?:\.([\w-]+))?\.json")
            for pattern in (whole, index):
                for name in names:
                    if (match := pattern.fullmatch(name)) and not SHARD.search(name):
                        found.setdefault(next(filter(None, match.groups()), None), folder / name)
    return found


def _choose(variants: Mapping[str | None, Path], wanted: str | None) -> str | None:
    """The variant to read: the one wanted, else none, else the only one there is."""
    if wanted in variants or None in variants or not variants:
        return wanted if wanted in variants else None
    names = sorted(name for name in variants if name)
    if len(names) > 1 and "fp16" not in names:
        raise RefusedFile(f"has the variants {', '.join(names)}; say which (variant=..., --variant)")
    return "fp16" if "fp16" in names else names[0]


def _part(prefix: str, path: Path) -> Part:
    if path.suffix != ".json":
        return Part(prefix, (path,))
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RefusedFile(f"{path.name} has no weight_map: not an index of a model's files")
    weights: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        # beside the index and nowhere else
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or set(name) & set("\\:\0"):
            raise RefusedFile(
                f"{path.name} names {str(name)[:100]!r}, which is no file beside it; do not use this file"
            )
        weights.setdefault(name, set()).add(key)
    return Part(prefix, tuple(path.parent / name for name in weights), weights)


def _read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    with open(path, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise RefusedFile(f"{path.name} in it has more than {limit >> 20} MB, the limit for such a file")
    try:
        content = json.loads(raw.removeprefix(b"\xef\xbb\xbf").decode())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise RefusedFile(f"{path.name} in it is not valid JSON ({error!s:.100}); download it again") from None
    return content
