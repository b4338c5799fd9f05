"""The add-ons of txt2img, img2img and inpaint: LoRA files, embeddings, weighted and long prompts."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import sd

from .cli import Parser
from .output import ModelHash

LORA_TAG = re.compile(r"<lora:([^:>]{1,200})(?::([^>]{0,20}))?>")  # how other tools name a LoRA file in a prompt


def add_addon_arguments(parser: Parser) -> None:
    """--lora, --embedding, --weighted-prompts, --long-prompts."""
    group = parser.add_argument_group("add-ons")
    group.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]",
        help="merge a LoRA file into the model; may be given several times (default weight: 1)",
    )  # fmt: skip
    group.add_argument(
        "--embedding", "--textual-inversion", action="append", default=[], metavar="FILE[:WORD]",
        help="a textual inversion file, and the word for it in prompts (default: the file's own, or its name)",
    )  # fmt: skip
    group.add_argument(
        "--weighted-prompts", action="store_true",
        help="(word:1.2), (word) and [word] in prompts weigh the word; otherwise brackets are text",
    )  # fmt: skip
    group.add_argument(
        "--long-prompts", action="store_true",
        help="prompts of more than 75 tokens in chunks of 75, BREAK begins one; otherwise they are cut",
    )  # fmt: skip


def split_lora(text: str) -> tuple[Path, float]:
    """FILE[:WEIGHT]; names with a colon in them are files first."""
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
    """FILE[:WORD]."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists() or not Path(head).exists():
        return Path(text), None
    if not tail.strip():
        raise ValueError(f"--embedding {text}: no word behind the colon")
    return Path(head), tail


class AddOns:
    """The add-ons that the arguments name: checked before the model is loaded, then given to it."""

    def __init__(self, args: argparse.Namespace, prompts: list[str]) -> None:
        self._weighted, self._long = args.weighted_prompts, args.long_prompts
        self._loras = [split_lora(text) for text in args.lora]
        self._embeddings = [split_embedding(text) for text in args.embedding]
        for file in (file for file, _ in (*self._loras, *self._embeddings)):
            sd.load_checkpoint(file).close()  # a name that is wrong should say so before a large model is loaded
        for prompt in (*prompts, args.negative):
            if tag := LORA_TAG.search(prompt):
                file = f"{tag[1]}.safetensors" + (f":{tag[2]}" if tag[2] else "")
                raise ValueError(f"{tag[0]} in the prompt: give the file instead, for example --lora {file}")
        self._names: list[str] = []  # of the LoRAs
        self._words: dict[str, Path] = {}  # word in prompts -> file
        self._hashes: dict[Path, ModelHash] = {}

    def give(self, model: sd.StableDiffusion, hashes: bool) -> None:
        """Merge the LoRAs and add the words, and say so; `hashes` are for the metadata."""
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
        """The prompt as metadata have it: LoRAs stand in it, as other tools write and read them."""
        tags = [f"<lora:{name}:{weight:g}>" for name, (_, weight) in zip(self._names, self._loras, strict=True)]
        return " ".join([prompt, *tags])

    def about(self, model: sd.StableDiffusion, prompt: str, negative: str) -> dict[str, str]:
        """What a picture's metadata say about add-ons, under the names that other tools use."""
        used = {i for text in (prompt, negative) for i in model.tokenizer.encode(text)} if self._words else set()
        words = [(word, file) for word, file in self._words.items() if used & set(model.tokenizer.added[word])]
        loras = [(name, file) for name, (file, _) in zip(self._names, self._loras, strict=True)]
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
