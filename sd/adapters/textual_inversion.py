"""Textual inversion: files with vectors for new words of a text encoder.

Gal et al. 2022, "An image is worth one word: personalizing text-to-image generation using textual inversion"
(arXiv:2208.01618): the networks stay as they are; only the vectors of a new word are trained, from a few images. A word
may have several vectors, and takes as many of the 75 tokens of a prompt.

    file                        contents
    the paper's .pt             string_to_param: {"*": (n, D)}; the web UI's as well, with a name in addition
    diffusers' .bin             {"<the-word>": (D,) or (n, D)}; in .safetensors as well
    .safetensors of others      emb_params: (n, D)

D is the width of the text encoder, so a file fits one family of models: 768 Stable Diffusion 1.x, 1024 2.x.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import CheckpointError, load_checkpoint, naming
from ..checkpoints.folders import model_name
from ..checkpoints.tokenizer_files import usable_words
from ..config import TextConfig
from ..models.text_encoder import TextEncoder
from ..text.tokenizer import Rule, Tokenizer

PARAMETERS = "string_to_param."  # prefix that the pickle reader gives to the names inside
NAMELESS = ("emb_params", "clip_l", "embedding", "weight", "*", "<*>")  # keys that are not words
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL"}
MAX_WORDS = 100  # in one file
MAX_LETTERS = 200  # of a word


def read_embedding(path: str | os.PathLike[str], width: int, room: int, word: str | None = None) -> dict[str, Tensor]:
    """The words of an embedding file and their vectors, (n, width) each, in float32.

    width   of the text encoder's vectors
    room    number of tokens in a prompt, the maximum number of vectors of a word
    word    name of the word; by default the one in the file, or the file's name without its ending

    Raises CheckpointError for a file that is not an embedding, or one for another model.
    """
    path = Path(path)
    with load_checkpoint(path) as file, naming(path):
        if {"clip_g", "clip_l"} <= set(file):
            raise CheckpointError("an embedding for SDXL, which is not supported (only Stable Diffusion 1.x and 2.x)")
        shapes = {key: file.shape(key) for key in file}
        bad = [key for key, shape in shapes.items() if len(shape) not in (1, 2) or 0 in shape]
        if bad or len(shapes) > MAX_WORDS or any("lora" in key for key in shapes):
            few = (
                f"{bad[0]} is {'x'.join(map(str, shapes[bad[0]]))}"
                if bad
                else f"{len(shapes)} tensors, {next(iter(shapes))}, ..."
            )
            raise CheckpointError(
                f"not an embedding ({few}): a checkpoint is given with --ckpt, a LoRA file with --lora"
            )
        if word is not None and len(shapes) > 1:
            raise CheckpointError(f"holds {len(shapes)} words ({', '.join(list(shapes)[:5])}): give none of your own")
        found = {}
        for key, shape in shapes.items():
            if shape[-1] != width:
                family = FAMILIES.get(shape[-1], "another model")
                raise CheckpointError(
                    f"an embedding for {family}: its vectors are {shape[-1]} wide, this model's {width}"
                )
            name = word or key.removeprefix(PARAMETERS)
            if word is None and len(shapes) == 1 and (name in NAMELESS or key.startswith(PARAMETERS)):
                name = model_name(path)
            if not name.isprintable() or len(name) > MAX_LETTERS:
                raise CheckpointError(f"{name[:50]!r} is not a word; give one (word=..., --embedding FILE:WORD)")
            if len(shape) == 2 and shape[0] > room:
                raise CheckpointError(f"{name!r} has {shape[0]} vectors, but a prompt has room for {room}")
            vectors = file[key].reshape(-1, width)
            whole = not vectors.is_floating_point()
            vectors = vectors.float()
            if whole or not vectors.isfinite().all():
                raise CheckpointError(f"{key} holds numbers that are not finite, or whole numbers: a damaged file")
            found[name] = vectors
        return found


def tokenizer_for(text: TextConfig) -> Tokenizer:
    """The tokenizer of a text encoder, with the words that the model's own has and its table of vectors has rows for.

    They are found as transformers finds them: within longer words, too.
    """
    tokenizer = Tokenizer(length=text.length, pad=min(text.pad, Tokenizer.end))
    for word in usable_words(text):
        rule = Rule.ALONE if word.alone else Rule.ANYWHERE
        with suppress(ValueError):  # nothing is left of it, or it differs from another one in case only
            tokenizer.add(word.text, [word.id], rule | Rule.EXACT if word.exact else rule)
    tokenizer.pad = text.pad
    return tokenizer


class WordTable(nn.Embedding):
    """The text encoder's token embedding with more rows at its end; the original table is shared, not copied."""

    def __init__(self, table: nn.Embedding, more: Tensor) -> None:
        """`more` (n, D): the vectors of the ids from `len(table)` on."""
        super().__init__(table.num_embeddings, table.embedding_dim, device="meta", dtype=table.weight.dtype)
        self.weight = table.weight
        self.more: Tensor
        self.register_buffer("more", more.to(table.weight), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> vectors (..., D)."""
        new = (ids - self.num_embeddings).clamp(min=0)
        known = super().forward(ids.clamp(max=self.num_embeddings - 1))
        return torch.where((ids >= self.num_embeddings)[..., None], nn.functional.embedding(new, self.more), known)


class Words:
    """The words added to a tokenizer and a text encoder; without words both are unchanged."""

    def __init__(self, tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self._table = text_encoder.token
        self._vectors: dict[str, Tensor] = {}  # by word, as the tokenizer knows it

    @property
    def counts(self) -> dict[str, int]:
        """Word -> number of its vectors."""
        return {word: len(vectors) for word, vectors in self._vectors.items()}

    def add(self, words: Mapping[str, Tensor]) -> list[str]:
        """Add words with their vectors (n, D); returns them as the tokenizer knows them. ValueError if one is taken."""
        added = []
        try:
            for word, vectors in words.items():
                added.append(self._tokenizer.add(word, range(self._next, self._next + len(vectors))))
                self._vectors[added[-1]] = vectors
        except ValueError:
            self.remove(*added)
            raise
        self._rebuild()
        return added

    def remove(self, *words: str) -> None:
        """Remove words that were added. KeyError for others."""
        for word in words:
            del self._vectors[word]
            self._tokenizer.remove(word)
        kept, self._vectors = self._vectors, {}
        for word, vectors in kept.items():  # close the gaps
            self._tokenizer.remove(word)
            self._tokenizer.add(word, range(self._next, self._next + len(vectors)))
            self._vectors[word] = vectors
        self._rebuild()

    @property
    def _next(self) -> int:
        return self._table.num_embeddings + sum(map(len, self._vectors.values()))

    def _rebuild(self) -> None:
        vectors = list(self._vectors.values())
        self._text_encoder.token = WordTable(self._table, torch.cat(vectors)) if vectors else self._table
