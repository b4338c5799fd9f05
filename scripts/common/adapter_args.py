"""Arguments for LoRA files, embeddings, and the prompt syntax of the web UI."""

from __future__ import annotations

import argparse
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import sd
from sd.adapters.adapter_files import EMBEDDING_FILES, LORA_FILES, adapter_file
from sd.adapters.added import LoraFile
from sd.adapters.textual_inversion import refuse_image
from sd.checkpoints.folders import model_name
from sd.checkpoints.hashes import ModelHash
from sd.params import TextToImage
from sd.recipes.fields import text_of
from sd.request_texts import all_texts
from sd.text.prompt_syntax import plain, texts_of
from sd.text.prompt_tags import tag_name

from .cli import Parser, file_path, home
from .prompt_loras import PromptLoras, check_folder, merge_loras

RENAMED = ("--weighted-prompts", "--long-prompts")  # of earlier versions, each a part of --web-ui-prompts


def add_addon_arguments(parser: Parser) -> None:
    """--lora, --no-lora, --lora-dir, --embedding, --web-ui-prompts, --clip-skip."""
    group = parser.add_argument_group("add-ons")
    group.add_argument(
        "--lora", type=home, action="append", default=[], metavar="[NAME=]FILE[:WEIGHT]",
        help="merge a LoRA or LyCORIS file, or a folder with one, into the model; can be given several times (default "
        "weight: 1)",
    )  # fmt: skip
    group.add_argument("--no-lora", action="store_true", help="use the embedded model without its LoRA for few steps")
    group.add_argument(
        "--lora-dir", type=file_path, metavar="DIR",
        help="folder of the LoRA files that prompts name (<lora:name:0.8>, with --web-ui-prompts) or --like needs",
    )  # fmt: skip
    group.add_argument(
        "--embedding", "--textual-inversion", type=home, action="append", default=[], metavar="FILE[:WORD]",
        help="a textual inversion file, and its word in prompts (default: the word in the file, or the file name)",
    )  # fmt: skip
    group.add_argument(
        "--web-ui-prompts", action="store_true",
        help="prompts have the syntax of AUTOMATIC1111's web UI: (word:1.2), [word], BREAK and any length, "
        "[a:b:0.4], [a|b], AND, <lora:name:0.8>; otherwise they are plain text, cut at 75 tokens",
    )  # fmt: skip
    group.add_argument(
        "--clip-skip", type=int, metavar="N",
        help="use layer N of the text encoder, counted from its end: 1 is the last (default: the model's own)",
    )  # fmt: skip
    for name in RENAMED:
        group.add_argument(name, action=Renamed, nargs=0, help=argparse.SUPPRESS)


class Renamed(argparse.Action):
    """An option that is now called otherwise: an error that says so."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(f"{self.option_strings[0]} is now --web-ui-prompts, one option for weights and long prompts")


def split_lora(text: str) -> tuple[Path, float]:
    """FILE[:WEIGHT] -> (path, weight). An existing file whose name contains a colon takes precedence."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    if not head:
        raise ValueError(f"--lora {text}: no file before the colon")
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) and Path(head).exists():
        raise ValueError(f"--lora {text}: the weight {tail!r} is not a number")
    return (Path(head), weight) if math.isfinite(weight) else (Path(text), 1.0)


def split_name(text: str) -> tuple[str | None, str]:
    """[NAME=]FILE[:WEIGHT] -> (name, FILE[:WEIGHT]). An existing file whose name contains "=" takes precedence."""
    name, equals, rest = text.partition("=")
    if not equals or split_lora(text)[0].exists() or set(name) & set("/\\"):
        return None, text
    if not name.strip() or not rest:
        raise ValueError(f"--lora {text}: expected NAME=FILE, or NAME=FILE:WEIGHT")
    return name.strip(), rest


def split_embedding(text: str) -> tuple[Path, str | None]:
    """FILE[:WORD] -> (path, word)."""
    head, colon, tail = text.rpartition(":")
    if colon and not head:
        raise ValueError(f"--embedding {text}: no file before the colon")
    if not colon or Path(text).exists() or not Path(head).exists():
        return Path(text), None
    if not tail.strip():
        raise ValueError(f"--embedding {text}: no word after the colon")
    return Path(head), tail


def lora_file(text: str) -> LoraFile:
    """The LoRA of one value of --lora, [NAME=]FILE[:WEIGHT].

    Raises ValueError for a wrong value, and CheckpointError for a file that is missing or not a weight file.
    """
    name, rest = split_name(text)
    path, weight = split_lora(rest)
    file = LoraFile(adapter_file(path, LORA_FILES), weight, name)
    sd.load_checkpoint(file.path).close()
    return file


def embedding_file(text: str) -> tuple[Path, str | None]:
    """The file and the word, if it is said, of one value of --embedding, FILE[:WORD].

    Raises ValueError for a wrong value, and CheckpointError for a file that is missing or not a weight file.
    """
    path, word = split_embedding(text)
    path = adapter_file(path, EMBEDDING_FILES)
    refuse_image(path)
    sd.load_checkpoint(path).close()
    return path, word


class AddOns:
    """The adapters given as arguments or named in prompts: checked before the model is loaded, then added to it."""

    def __init__(self, args: argparse.Namespace, requests: Sequence[TextToImage], of_prompts: PromptLoras) -> None:
        if args.lora_dir is not None:
            check_folder(args.lora_dir)  # even if no prompt names a file, so that a typo is reported
        if args.lora_dir is not None and args.like is None and not any(r.web_ui_prompts for r in requests):
            raise ValueError(
                "--lora-dir has no effect here: add --web-ui-prompts, with which prompts name LoRA files, or --like"
            )
        self._texts = [text for request in requests for text in _texts(request)]
        self._loras = [lora_file(text) for text in args.lora]
        self._embeddings = [embedding_file(text) for text in args.embedding]
        self.of_prompts = of_prompts
        named_in_prompts = {os.path.realpath(path) for path in of_prompts.paths}
        for lora in self._loras:
            if os.path.realpath(lora.path) in named_in_prompts:
                raise ValueError(f"{lora.path} is given with --lora and named in a prompt: take one of them out")
        for path in self.of_prompts.paths:
            sd.load_checkpoint(path).close()  # raises for a wrong name before a large model is loaded
        self._names: list[str] = []  # of the LoRAs
        self._words: dict[str, Path] = {}  # word in prompts -> file
        self._hashes: dict[Path, ModelHash] = {}

    def give(self, model: sd.StableDiffusion, hashes: bool) -> None:
        """Merge the LoRAs, add the words and print them. `hashes` computes the hashes for the metadata."""
        known = model.words
        self._names = merge_loras(model, self._loras, removable=False)
        for bundled in [word for word in model.words if word not in known]:  # in LoRA files
            print(f"embedding {bundled}, vectors: {model.words[bundled]}", flush=True)
        for file, word in self._embeddings:
            added = model.add_embedding(file, word)
            self._words |= dict.fromkeys(added, file)
            alike = len({model.tokenizer.added[name] for name in added}) == 1
            for names in [added] if alike else [[name] for name in added]:
                print(f"embedding {' or '.join(names)}, vectors: {model.words[names[0]]}", flush=True)
        self._warn_of_unused(model)
        if hashes:
            loras = [*self._files(), *self.of_prompts.paths]
            hashed = [(file, file.suffix == ".safetensors") for file in loras]
            hashed += [(file, False) for file, _ in self._embeddings]
            self._hashes = {file: ModelHash(file, digits=12, tensors_only=only) for file, only in hashed}

    def _files(self) -> list[Path]:
        """Those of --lora."""
        return [Path(lora.path) for lora in self._loras]

    def _warn_of_unused(self, model: sd.StableDiffusion) -> None:
        """Warn of embeddings that were added, but that no prompt uses."""
        used = {i for text in self._texts for i in model.tokenizer.encode(text)} if self._embeddings else set()
        for file, _ in self._embeddings:
            words = [word for word, own in self._words.items() if own == file]
            if not any(used & set(model.tokenizer.added[word]) for word in words):
                warnings.warn(
                    f"embedding {model_name(file)} added, but no prompt uses it: write {' or '.join(words)}",
                    stacklevel=1,
                )

    def warn_of_refiner(self, model: sd.StableDiffusion) -> None:
        """Warn of embeddings that prompts use: the refiner, whose text encoder is another one, reads their words."""
        ids = {i for text in self._texts for i in model.tokenizer.encode(text)} if self._words else set()
        if used := [word for word in self._words if ids & set(model.tokenizer.added[word])]:
            warnings.warn(
                f"the refiner reads {' or '.join(used)} as plain text: embeddings are added to the model alone",
                stacklevel=1,
            )

    def tags(self) -> list[str]:
        """The merged LoRAs for the metadata, in the syntax of other tools."""
        named = [(name, lora.weight) for name, lora in zip(self._names, self._loras, strict=True)]
        named += [(lora.name, lora.weight) for lora in self.of_prompts.current]
        return [f"<lora:{tag_name(name)}:{text_of(weight)}>" for name, weight in named]

    def about(self, model: sd.StableDiffusion, request: TextToImage) -> dict[str, str]:
        """The entries about adapters and prompts in the metadata of an image, with the keys of other tools."""
        texts = _texts(request)
        used = {i for text in texts for i in model.tokenizer.encode(text)} if self._words else set()
        words = [(word, file) for word, file in self._words.items() if used & set(model.tokenizer.added[word])]
        loras = [(tag_name(name), file) for name, file in zip(self._names, self._files(), strict=True)]
        loras += [(tag_name(lora.name), lora.path) for lora in self.of_prompts.current]
        values = {
            name: ", ".join(f"{re.sub('[:,]', '', word)}: {self._hashes[file].digits()}" for word, file in found)
            for name, found in (("Lora hashes", loras), ("TI hashes", words))
            if found and self._hashes
        }
        if request.web_ui_prompts:
            values |= {"Emphasis": "Original", "Pad conds": "True"}
        elif re.search(r"[(\[]", "".join(texts)):
            values["Emphasis"] = "None"
        return values


def _texts(request: TextToImage) -> list[str]:
    """What the prompts of a request say, the negative ones included, without the web UI's syntax."""
    prompts = [text for texts in all_texts(request) for text in texts]
    return [plain(text) for prompt in prompts for text in texts_of(prompt)] if request.web_ui_prompts else prompts
