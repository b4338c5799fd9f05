"""--like FILE: what the file of an image says about how it was made is the default of every argument not given.

take(args, kind)      fills in the arguments; called before their values are checked
carried(args, ...)    the settings of the recipe that have no argument of their own
fitted(args, ...)     leaves out what the model, once it is loaded, has no use for
compare(args, ...)    says whether checkpoint, initial image and mask are those of the recipe
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sd.adapters.adapter_files import EMBEDDING_FILES, LORA_FILES, adapter_file, embedding_word, lora_name
from sd.checkpoints.convert import WEIGHTS
from sd.checkpoints.hashes import ModelHash, file_hash
from sd.config import PREDICTIONS, Config
from sd.imaging.files import SUFFIXES
from sd.messages import counted, one_line
from sd.params import MAX_SEED, SamplingParams, TextToImage
from sd.recipes import Addon, Recipe, read_request
from sd.recipes.comfyui_xl import EMPTY_NEGATIVE
from sd.recipes.fields import text_of
from sd.recipes.recipe import MAX_SHOWN, file_name
from sd.runtime.device import DTYPES
from sd.samplers import SAMPLERS
from sd.text.prompt_tags import tag_name

from .adapter_args import split_embedding, split_lora, split_name
from .arguments import colour
from .cli import Parser, file_path
from .default_lora import BROUGHT, decides_anew, embedded_lora
from .like_controls import compare_controls, settings_of, take_controls
from .prompt_loras import LoraFolder
from .xl_args import PAIRS

SECOND_PROMPTS = ("prompt_2", "negative_2")
OWN_VAE = ("", "none", "automatic", "default", "baked", "baked vae")  # values that name no file
ARGUMENTS = {"blur": "mask_blur"}  # setting -> the argument, where the names differ
# setting -> other arguments that say the same: if one of them is given, the recipe's value is not taken
RIVALS = {
    "spacing": ("sampler",),  # another sampler has its own grid
    "variation_seed": ("variation",),
    "variation_strength": ("variation",),
    **{setting: (argument,) for argument, settings in PAIRS.items() for setting in settings},
}
# our key -> the argument and how its value is read, for settings of the program and not of the request
PROGRAM = {
    "Weights": "weights", "Variant": "variant", "Prediction": "prediction", "Precision": "dtype",
    "Background": "background",
}  # fmt: skip
OLD_HASH = 8  # digits of the web UI's hash before 2023, which covers only a part of the file


def add_like_argument(parser: Parser) -> None:
    """--like."""
    parser.add_argument(
        "--like", type=file_path, metavar="FILE",
        help="take prompt and settings from this image, .txt or .json file (of this program, AUTOMATIC1111, Forge, "
        "SD.Next, ComfyUI, ...); other options override them",
    )  # fmt: skip


def take(args: argparse.Namespace, kind: type[TextToImage]) -> None:
    """Set the arguments that were not given to the values of the recipe; print what was taken, warn of the rest."""
    args.recipe = args.carried = args.control_uses = None
    args.anew = False
    if args.like is None:
        return
    recipe = read_request(args.like)
    if recipe.request.params.n > 1 and recipe.request.params.rng != "comfy":  # each image has its own random numbers
        recipe = recipe._replace(request=replace(recipe.request, params=_alone(recipe)))
    settings = _settings(args, recipe, kind)
    given = args.named
    args.anew = decides_anew(args, recipe)
    if args.anew:
        settings = {name: value for name, value in settings.items() if name not in BROUGHT}
    taken = {
        name: value for name, value in settings.items()
        if ARGUMENTS.get(name, name) not in given and not given.intersection(RIVALS.get(name, ()))
    }  # fmt: skip
    if "sampler" in given:  # its options are those of the recipe's sampler
        taken = {name: value for name, value in taken.items() if not _is_option(name)}
    args.recipe, args.carried = recipe, {}
    for name, value in taken.items():
        if hasattr(args, ARGUMENTS.get(name, name)):
            setattr(args, ARGUMENTS.get(name, name), value)
        else:
            args.carried[name] = value
    if hasattr(args, "variation") and args.carried.keys() >= {"variation_seed", "variation_strength"}:
        args.variation = args.carried.pop("variation_seed"), args.carried.pop("variation_strength")
    if "margin" in taken and "only_masked" not in given:
        args.only_masked = True
    if "n" in taken and "batch_size" not in given:
        args.batch_size = args.n
    _prompt(args, recipe)
    taken = {name: value for name, value in taken.items() if name not in SECOND_PROMPTS or _has(args, name)}
    _program(args, recipe)
    _loras(args, recipe)
    missing = take_controls(args, recipe)
    _print(args, recipe, taken)
    for note in (*_notes(args, recipe, kind), *missing):
        warnings.warn(note, stacklevel=1)


def _alone(recipe: Recipe) -> SamplingParams:
    """The settings of one image of a batch by itself."""
    params = recipe.request.params
    if params.variation_strength > 0:  # image k has variation_seed + k
        return replace(params, n=1, variation_seed=((params.variation_seed or 0) + recipe.position) % (MAX_SEED + 1))
    return replace(params, n=1, seed=(params.seed + recipe.position) % (MAX_SEED + 1))


def _is_option(name: str) -> bool:
    return any(name in sampler.options for sampler in SAMPLERS.values())


def _settings(args: argparse.Namespace, recipe: Recipe, kind: type[TextToImage]) -> dict[str, Any]:
    """The settings that the file has: those of the request, of its sampling, and of this kind of task."""
    request, params = recipe.request, recipe.request.params
    found: dict[str, Any] = {}
    for name in sorted(recipe.given):
        if name in params.options:
            found[name] = params.options[name]
        elif hasattr(params, name):
            found[name] = getattr(params, name)
        elif hasattr(request, name) and (name in kind.__dataclass_fields__ or hasattr(args, name)):
            found[name] = getattr(request, name)
        elif name in recipe.task and (name in kind.__dataclass_fields__ or hasattr(args, name)):
            found[name] = recipe.task[name]
    return found | {"negative": request.negative}


def _prompt(args: argparse.Namespace, recipe: Recipe) -> None:
    """The prompt, unless there is one: an option, a file of prompts, or a word that is not the name of an image."""
    folders = hasattr(args, "init_img")  # of images
    named = [
        # not `Path.is_file`, which raises for texts that are too long for a name
        (Path(word).suffix.lower() in SUFFIXES and os.path.isfile(word)) or (folders and os.path.isdir(word))
        for word in args.words
    ]
    if "prompt" not in args.named and args.from_file is None and all(named):
        (args.prompt,) = recipe.request.prompt
    elif "prompt_2" not in args.named:  # the recipe's goes with its prompt
        args.prompt_2 = None
    if "negative" in args.named and "negative_2" not in args.named:
        args.negative_2 = None


def _has(args: argparse.Namespace, name: str) -> bool:
    """Whether an argument has a value."""
    return getattr(args, name) is not None


def fitted(args: argparse.Namespace, requests: list[TextToImage], config: Config) -> list[TextToImage]:
    """The requests for a model: one with a single text encoder does not take the second prompts of a recipe.

    Sets their arguments to None, with a warning. Those that were given are left for the model to refuse.
    """
    if args.recipe is None or len(config.text) > 1:
        return requests
    second = [name for name in SECOND_PROMPTS if _has(args, name) and name not in args.named]
    if not second:
        return requests
    warnings.warn(
        f"{one_line(args.like.name)}: {' and '.join(second)} left out, as {config.name} has only one text encoder",
        stacklevel=1,
    )
    left_out = {name: getattr(args, name) for name in second}
    for name in second:
        setattr(args, name, None)
    fitting = []
    for request in requests:  # a line of --from-file may have a second prompt of its own
        changed: dict[str, Any] = {name: None for name, text in left_out.items() if getattr(request, name) == text}
        fitting.append(replace(request, **changed))
    return fitting


def _program(args: argparse.Namespace, recipe: Recipe) -> None:
    """Settings of our programs that are no part of a request: precision, weights, background."""
    if not recipe.program.startswith("sd "):
        return
    for key, name in PROGRAM.items():
        value = recipe.info.get(key)
        if value is None or name in args.named or not hasattr(args, name):
            continue
        allowed = {"weights": WEIGHTS, "prediction": PREDICTIONS, "dtype": tuple(DTYPES)}.get(name)
        if allowed is not None and value not in allowed:
            continue
        try:
            setattr(args, name, colour(value) if name == "background" else value)
        except argparse.ArgumentTypeError:
            warnings.warn(f"--like: {key} {one_line(value)} is left out", stacklevel=1)
    if hasattr(args, "invert_mask") and "invert_mask" not in args.named:
        args.invert_mask = recipe.info.get("Mask mode") == "Inpaint not masked"


def _given(text: str) -> tuple[str, Path, bool]:
    """The value of --lora: its name as it is written in metadata, its file, and whether it has a weight."""
    name, rest = split_name(text)
    path, _ = split_lora(rest)
    file = adapter_file(path, LORA_FILES)  # of a folder
    return tag_name(name or lora_name(file)), file, str(path) != rest


def _name(lora: Addon) -> str:
    """The name of a LoRA by which it is compared with files: without what a tag cannot have, in lower case."""
    return tag_name(lora.name).casefold()


def _loras(args: argparse.Namespace, recipe: Recipe) -> None:
    """Files for the LoRAs of the recipe: those given, with the weights of the recipe, or from the folder of LoRAs."""
    weights = {_name(lora): text_of(lora.weight) for lora in recipe.loras}
    if "lora" in args.named:
        for i, text in enumerate(args.lora):
            name, _, weighted = _given(text)
            if not weighted and name.casefold() in weights:
                args.lora[i] = f"{text}:{weights[name.casefold()]}"
        return
    folder = None if args.lora_dir is None else LoraFolder(args.lora_dir)
    for lora in recipe.loras:
        file = None if folder is None else find_lora(folder, lora)
        if file is None and args.ckpt is None and not args.anew:
            file = embedded_lora(recipe, lora)
        if file is not None:
            args.lora = [*args.lora, f"{file}:{weights[_name(lora)]}"]


def find_lora(folder: LoraFolder, lora: Addon) -> Path | None:
    """The file of a LoRA in a folder, or None: of several, that with the digest of the recipe, or the first."""
    found = sorted(folder.files(_name(lora)))
    if len(found) > 1 and lora.digest:
        found.sort(key=lambda path: not _same(lora_digest(path), lora.digest))
    return found[0] if found else None


def lora_digest(path: Path) -> str | None:
    """The digits by which metadata name a LoRA file."""
    return ModelHash(path, digits=64, tensors_only=path.suffix == ".safetensors").digits()


def _same(digest: str | None, other: str) -> bool:
    """Whether two hashes agree in the digits that both have."""
    return bool(digest) and bool(other) and str(digest)[: len(other)] == other[: len(str(digest))]


def _notes(args: argparse.Namespace, recipe: Recipe, kind: type[TextToImage]) -> list[str]:
    """What the recipe says that the arguments do not."""
    notes = [f"{one_line(args.like.name)}: {note}" for note in recipe.notes]
    if recipe.kind == "hires" and not hasattr(args, "hires"):
        notes.append(f"{one_line(args.like.name)}: made in two passes, of which only the first is repeated")
    if recipe.kind in ("img2img", "inpaint") and recipe.kind != kind.kind:
        notes.append(f"{one_line(args.like.name)}: made by {recipe.kind}, and {kind.kind} will give a different image")
    files = {name.casefold(): path for name, path, _ in map(_given, args.lora)}
    given = [lora for lora in recipe.loras if _name(lora) in files]
    if args.anew:
        given += [lora for lora in recipe.loras if embedded_lora(recipe, lora) is not None]
    missing = [lora for lora in recipe.loras if lora not in given]
    for lora in missing[:MAX_SHOWN]:
        notes.append(f"LoRA {lora.name}, weight {text_of(lora.weight)}: give its file with --lora")
    if len(missing) > MAX_SHOWN:
        notes.append(f"{counted(len(missing) - MAX_SHOWN, 'more LoRA')}: give the files with --lora")
    for lora in recipe.loras:
        path = files.get(_name(lora))
        if lora.digest and path is not None and path.is_file() and not _same(lora_digest(path), lora.digest):
            notes.append(f"LoRA {lora.name}: {path.name} is not the same file as the recipe's ({lora.digest})")
    words = {
        (word or embedding_word(adapter_file(path, EMBEDDING_FILES))).lower()
        for path, word in map(split_embedding, args.embedding)
    }
    for embedding in recipe.embeddings:
        if embedding.name.lower() not in words:
            notes.append(f"embedding {embedding.name}: give its file with --embedding")
    files_of = {"VAE": "vae", "Text encoder": "text_encoder", "Text encoder 2": "text_encoder_2", "Refiner": "refiner"}
    for key, name in files_of.items():
        if (
            (value := recipe.info.get(key))
            and getattr(args, name) is None
            and value.partition("(")[0].strip().lower() not in OWN_VAE
        ):
            value = re.sub(r" \[\w{1,64}\]\Z", "", value)  # the hash that the web UI writes after a refiner's name
            notes.append(f"{key} {file_name(value)}: give its file with --{name.replace('_', '-')}")
    return notes


def _print(args: argparse.Namespace, recipe: Recipe, taken: Mapping[str, Any]) -> None:
    """One line on what was taken."""
    prompt = [f'prompt "{one_line(args.prompt)}"'] if args.prompt == recipe.request.prompt[0] else []
    parts = [f"{name} {text_of(value)}" for name, value in taken.items() if value and value is not True]
    parts += [f"control {settings_of(use)}" for use in args.control_uses if use is not None]
    flags = [name for name, value in taken.items() if value is True]
    print(
        f"like {one_line(args.like.name)} by {recipe.program}: {one_line(', '.join([*prompt, *parts, *flags]), 400)}",
        flush=True,
    )


def carried(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The settings of the recipe that have no argument, and belong to this dataclass."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in (args.carried or {}).items() if name in names}


def compare(args: argparse.Namespace, more: Mapping[str, object]) -> None:
    """Warn if the initial image or the mask is another one than the recipe's; `more` has the hashes of those given."""
    if args.recipe is None or not args.recipe.program.startswith("sd "):
        return
    for key, what in (("Init image hash", "initial image"), ("Mask hash", "mask")):
        theirs = args.recipe.info.get(key)
        if theirs is not None and key in more and more[key] != theirs:
            warnings.warn(f"the {what} is not the same file as that of {one_line(args.like.name)}", stacklevel=1)


def compare_model(args: argparse.Namespace, path: Path, digest: ModelHash | None, config: Config) -> None:
    """Warn if checkpoint, control networks or hints are others than the recipe's, or if that cannot be known."""
    if args.recipe is None:
        return
    compare_controls(args)
    model, name = args.recipe.model, one_line(args.like.name)
    if args.recipe.program.startswith("Fooocus") and not config.sizes:
        warnings.warn("Fooocus generates with SDXL models: the size and the settings are meant for one", stacklevel=1)
    if config.zero_empty and args.recipe.info.get(EMPTY_NEGATIVE) == "encoded" and not args.negative:
        warnings.warn(
            f"{name}: ComfyUI encodes the empty negative prompt, which is zeros here, as in the training of SDXL: the "
            "image will differ",
            stacklevel=1,
        )
    described = " ".join(filter(None, [model.name, model.digest and f"({model.digest})"]))
    if not model.digest:
        if model.name and (args.ckpt is None or file_name(path.name) != model.name):
            warnings.warn(f"{name} was made with the model {model.name}: give it with --ckpt", stacklevel=1)
        elif not model.name:
            warnings.warn(f"{name} does not say which model made it: the image may differ", stacklevel=1)
        return
    ours = file_hash(path) if len(model.digest) == OLD_HASH else (digest or ModelHash(path)).digits()
    if ours is None:
        warnings.warn(
            f"{name} was made with {described}: cannot tell whether {path.name} is the same model", stacklevel=1
        )
    elif not _same(ours, model.digest):
        which = "the embedded model" if args.ckpt is None else path.name
        warnings.warn(
            f"{name} was made with another model, {described}, than {which}: give it with --ckpt", stacklevel=1
        )
