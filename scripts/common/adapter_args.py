"""Arguments for LoRA files, embeddings, and weighted and long prompts."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import sd
from sd.recipes.fields import text_of

from .cli import Parser
from .output import ModelHash

LORA_TAG = re.compile(
    r"<lora:([^:>]{1,200})(?::([^>]{0,20}))?>"
)  # a LoRA file in a prompt, in the syntax of other tools


def add_addon_arguments(parser: Parser) -> None:
    """--lora, --embedding, --weighted-prompts, --long-prompts."""
    group = parser.add_argument_group("add-ons")
    group.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]",
        help="merge a LoRA file into the model; can be given several times (default weight: 1)",
    )  # fmt: skip
    group.add_argument(
        "--embedding", "--textual-inversion", action="append", default=[], metavar="FILE[:WORD]",
        help="a textual inversion file, and its word in prompts (default: the word in the file, or the file name)",
    )  # fmt: skip
    group.add_argument(
        "--weighted-prompts", action="store_true",
        help="(word:1.2), (word) and [word] in prompts change the weight of the word; otherwise brackets are text",
    )  # fmt: skip
    group.add_argument(
        "--long-prompts", action="store_true",
        help="split prompts of more than 75 tokens into chunks, also at BREAK; otherwise they are truncated",
    )  # fmt: skip


def split_lora(text: str) -> tuple[Path, float]:
    """FILE[:WEIGHT] -> (path, weight). An existing file whose name contains a colon takes precedence."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) and Path(head).exists():
        raise ValueError(f"--lora {text}: the weight {tail!r} is not a number")
    return (Path(head), weight) if math.isfinite(weight) else (Path(text), 1.0)


def split_embedding(text: str) -> tuple[Path, str | None]:
    """FILE[:WORD] -> (path, word)."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists() or not Path(head).exists():
        return Path(text), None
    if not tail.strip():
        raise ValueError(f"--embedding {text}: no word after the colon")
    return Path(head), tail


def tag_name(name: str) -> str:
    """The name of a LoRA as it is written in metadata, without the characters that end it there."""
    return re.sub("[:,<>]", "", name)


class AddOns:
    """The adapters given as arguments: checked before the model is loaded, then added to it."""

    def __init__(self, args: argparse.Namespace, prompts: list[str]) -> None:
        self._weighted, self._long = args.weighted_prompts, args.long_prompts
        self._loras = [split_lora(text) for text in args.lora]
        self._embeddings = [split_embedding(text) for text in args.embedding]
        for path, _ in (*self._loras, *self._embeddings):
            sd.load_checkpoint(path).close()  # raises for a wrong name before a large model is loaded
        for prompt in (*prompts, args.negative):
            if tag := LORA_TAG.search(prompt):
                file = f"{tag[1]}.safetensors" + (f":{tag[2]}" if tag[2] else "")
                raise ValueError(f"{tag[0]} in the prompt: give the file instead, for example --lora {file}")
        self._names: list[str] = []  # of the LoRAs
        self._words: dict[str, Path] = {}  # word in prompts -> file
        self._hashes: dict[Path, ModelHash] = {}

    def give(self, model: sd.StableDiffusion, hashes: bool) -> None:
        """Merge the LoRAs, add the words and print them. `hashes` computes the hashes for the metadata."""
        self._names = model.add_loras(self._loras, removable=False)
        for name, (_, weight) in zip(self._names, self._loras, strict=True):
            print(f"LoRA {name}, weight {weight:g}", flush=True)
        for file, word in self._embeddings:
            for added in model.add_embedding(file, word):
                self._words[added] = file
                print(f"embedding {added}, vectors: {model.words[added]}", flush=True)
        if hashes:
            files = [(file, file.suffix == ".safetensors") for file, _ in self._loras]
            files += [(file, False) for file, _ in self._embeddings]
            self._hashes = {file: ModelHash(file, digits=12, tensors_only=only) for file, only in files}

    def prompt(self, prompt: str) -> str:
        """The prompt for the metadata, with its LoRAs in the syntax of other tools."""
        loras = zip(self._names, self._loras, strict=True)
        return " ".join([prompt, *(f"<lora:{tag_name(name)}:{text_of(weight)}>" for name, (_, weight) in loras)])

    def about(self, model: sd.StableDiffusion, prompt: str, negative: str) -> dict[str, str]:
        """The entries about adapters in the metadata of an image, with the keys of other tools."""
        used = {i for text in (prompt, negative) for i in model.tokenizer.encode(text)} if self._words else set()
        words = [(word, file) for word, file in self._words.items() if used & set(model.tokenizer.added[word])]
        loras = [(tag_name(name), file) for name, (file, _) in zip(self._names, self._loras, strict=True)]
        values = {
            name: ", ".join(f"{re.sub('[:,]', '', word)}: {self._hashes[file].digits()}" for word, file in found)
            for name, found in (("Lora hashes", loras), ("TI hashes", words))
            if found and self._hashes
        }
        if self._weighted or re.search(r"[(\[]", prompt + negative):
            values["Emphasis"] = "Original" if self._weighted else "None"
        if self._long:
            values |= {"Long prompts": "on", "Pad conds": "True"}
        return values
