"""Textual inversion: files with vectors for new words of a text encoder.

Gal et al. 2022, "An image is worth one word: personalizing text-to-image generation using textual inversion"
(arXiv:2208.01618): the networks stay as they are; only the vectors of a new word are trained, from a few images. A word
may have several vectors, and takes as many of the 75 tokens of a prompt.

    file                        contents
    the paper's .pt             string_to_param: {"*": (n, D)}; the web UI's as well, with a name in addition
    diffusers' .bin             {"<the-word>": (D,) or (n, D)}; in .safetensors as well
    .safetensors of others      emb_params: (n, D); further names: `is_nameless`
    OneTrainer's                emp_params, and emp_params_out: output vectors, which are not used here

The file's name is always a word for its vectors, as in the web UIs; a word in the file is one, too. A file with a
tool's fixed name is named after its folder.

D is the width of the text encoder, so a file fits one family of models: 768 Stable Diffusion 1.x, 1024 2.x.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import CheckpointError, load_checkpoint, naming
from ..checkpoints.convert import shape_text
from ..checkpoints.finite import check_numbers
from ..checkpoints.folders import model_name
from ..checkpoints.tokenizer_files import usable_words
from ..config import TextConfig
from ..messages import listed
from ..models.text_encoder import TextEncoder
from ..text.tokenizer import Rule, Tokenizer, warn
from .adapter_files import EMBEDDING_FILES, adapter_file, embedding_word, is_no_word
from .lora_parts import ADAPTER_KEY

PARAMETERS = "string_to_param."  # prefix that the pickle reader gives to the names inside
# What keys consist of that are not words, such as "emb_params", "text_encoders_0", "<*>".
TECHNICAL = frozenset({
    "", "*", "<*>", "clip", "cond", "data", "emb", "embed", "embeds", "embedding", "embeddings", "embs", "emp",
    "encoder", "encoders", "h", "l", "learned", "model", "param", "params", "stage", "string", "tensor", "text", "to",
    "token", "transformer", "vector", "vectors", "weight", "weights",
})  # fmt: skip
OUTPUTS = ("_out", ".out")  # endings of keys of output vectors
SD3 = "Flux or Stable Diffusion 3"
OTHERS = {"clip_g": "SDXL", "text_encoders_1": "SDXL", "t5": SD3, "t5xxl": SD3, "text_encoders_2": SD3}
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL"}
MAX_WORDS = 100  # in one file
MAX_LETTERS = 200  # of a word


def read_embedding(path: str | os.PathLike[str], width: int, room: int, word: str | None = None) -> dict[str, Tensor]:
    """The words of an embedding file and their vectors, (n, width) each, in float32.

    width   of the text encoder's vectors
    room    number of tokens in a prompt, the maximum number of vectors of a word
    path    of the file, or of a folder as written by diffusers or the hub's cache
    word    name of the word; by default the one in the file, or the file's name without its ending

    Raises CheckpointError for a file that is not an embedding, or one for another model.
    """
    path = adapter_file(Path(path), EMBEDDING_FILES)
    refuse_image(path)
    with load_checkpoint(path) as file, naming(path):
        if other := next((model for key, model in OTHERS.items() if key in file), None):
            raise CheckpointError(
                f"an embedding for {other}, which is not supported (only Stable Diffusion 1.x and 2.x)"
            )
        shapes = {key: file.shape(key) for key in file if not is_output(key)}
        if len(shapes) < len(file):
            if not shapes:
                raise CheckpointError("holds output vectors only, which are not used here")
            warn(f"{path.name}: its output vectors are not used, only those of the word")
        single = [key for key, shape in shapes.items() if math.prod(shape) == 1]
        if single and len(single) < len(shapes):
            warn(f"{path.name}: tensors with a single number are not used: {listed(single)}")
            shapes = {key: shape for key, shape in shapes.items() if key not in single}
        lora = any(ADAPTER_KEY.search(key) for key in shapes)
        bad = [] if lora else [key for key, shape in shapes.items() if len(shape) not in (1, 2) or 0 in shape]
        if bad or lora or len(shapes) > MAX_WORDS:
            few = (
                f"{bad[0]} is {shape_text(shapes[bad[0]])}"
                if bad
                else f"{len(shapes)} tensors, {next(iter(shapes))}, ..."
            )
            raise CheckpointError(
                f"not an embedding ({few}): a checkpoint is given with --ckpt, a LoRA file with --lora"
            )
        if word is not None and len(shapes) > 1:
            raise CheckpointError(
                f"holds {len(shapes)} words ({listed(shapes, most=5)}): leave out the word (word=, FILE:WORD)"
            )
        nameless = [key for key in shapes if is_nameless(key.removeprefix(PARAMETERS))]
        if word is None and len(nameless) > 1:
            what = f"holds {len(nameless)} unnamed embeddings"
            raise CheckpointError(f"{what} ({listed(nameless, most=5)}): give a file with one")
        found = {}
        for key, shape in shapes.items():
            if shape[-1] != width:
                family = FAMILIES.get(shape[-1], "another model")
                raise CheckpointError(
                    f"an embedding for {family}: its vectors are {shape[-1]} wide, this model's {width}"
                )
            name = word or key.removeprefix(PARAMETERS)
            if word is None and (key in nameless or (len(shapes) == 1 and key.startswith(PARAMETERS))):
                name = embedding_word(path)
            if not name.isprintable() or len(name) > MAX_LETTERS:
                raise CheckpointError(f"{name[:50]!r} is not a word; give one (word=..., --embedding FILE:WORD)")
            if len(shape) == 2 and shape[0] > room:
                raise CheckpointError(f"{name!r} has {shape[0]} vectors, but a prompt has room for {room}")
            vectors = file[key]
            check_numbers(key, vectors)
            found[name] = vectors.reshape(-1, width).float()
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


def refuse_image(path: Path) -> None:
    """Raise CheckpointError for an image, in which the web UIs can hide an embedding."""
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(12)
        if head.startswith(b"\x89PNG") or (head[:4] == b"RIFF" and head[8:] == b"WEBP"):
            raise CheckpointError(
                f"{path}: an image; embeddings in images are not read: take the .pt or .safetensors file of the word"
            )


def is_nameless(key: str) -> bool:
    """Whether a key is no word, but says what a tensor is.

    >>> [is_nameless(key) for key in ("emp_params", "text_encoders_0", "*", "<model>", "cat")]
    [True, True, True, False, False]
    """
    return all(part in TECHNICAL or part.isdecimal() for part in re.split(r"[._-]", key.lower()))


def is_output(key: str) -> bool:
    """Whether a key is that of output vectors, which OneTrainer trains beside those of a nameless word."""
    return any(key.endswith(end) and is_nameless(key.removesuffix(end)) for end in OUTPUTS)


def other_word(path: Path, words: Mapping[str, Tensor]) -> str | None:
    """The file's name, if it can be a second word for the vectors of a file with one word of another name."""
    (word, *more), name = words, model_name(path)
    usable = name.isprintable() and 0 < len(name.strip()) <= MAX_LETTERS and not is_no_word(path)
    return name if not more and usable and name.lower() != word.lower() else None


class WordTable(nn.Embedding):
    """The text encoder's token embedding with more rows at its end; the original table is shared, not copied."""

    def __init__(self, table: nn.Embedding, more: Tensor) -> None:
        """`more` (n, D): the vectors of the ids from `len(table)` on."""
        super().__init__(table.num_embeddings, table.embedding_dim, device="meta", dtype=table.weight.dtype)
        self.weight = table.weight
        self._original = (table,)  # in a tuple, which is no submodule
        self.more: Tensor
        self.register_buffer("more", more.to(table.weight), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> vectors (..., D)."""
        new = (ids - self.num_embeddings).clamp(min=0)
        known = super().forward(ids.clamp(max=self.num_embeddings - 1))
        return torch.where((ids >= self.num_embeddings)[..., None], nn.functional.embedding(new, self.more), known)

    def without_words(self) -> nn.Embedding:
        """The original table, with the weight that this one has now: `load_state_dict` may have assigned another."""
        (table,) = self._original
        if table.weight is not self.weight:
            table.weight = self.weight
        return table


class Words:
    """The words added to a tokenizer and a text encoder; without words both are unchanged."""

    def __init__(self, tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self._vectors: dict[str, Tensor] = {}  # by word, as the tokenizer knows it
        self._aliases: dict[str, str] = {}  # a second word -> the one whose vectors it has

    @property
    def counts(self) -> dict[str, int]:
        """Word -> number of its vectors."""
        counts = {word: len(vectors) for word, vectors in self._vectors.items()}
        return counts | {alias: counts[word] for alias, word in self._aliases.items()}

    def alias(self, word: str, name: str) -> str | None:
        """A second word for the vectors of one that was added; None where it is taken."""
        try:
            added = self._tokenizer.add(name, self._tokenizer.added[word])
        except ValueError:
            return None
        self._aliases[added] = word
        return added

    def add(self, words: Mapping[str, Tensor]) -> list[str]:
        """Add words with their vectors (n, D); returns them as the tokenizer knows them. ValueError if one is taken."""
        added = []
        self._look()
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
        """Remove words that were added, each with the other word for its vectors. KeyError for others."""
        self._look()
        aliases, self._aliases = self._aliases, {}
        for alias in aliases:
            self._tokenizer.remove(alias)
        for word in {aliases.get(word, word) for word in words}:
            del self._vectors[word]
            self._tokenizer.remove(word)
        kept, self._vectors = self._vectors, {}
        for word, vectors in kept.items():  # close the gaps
            self._tokenizer.remove(word)
            self._tokenizer.add(word, range(self._next, self._next + len(vectors)))
            self._vectors[word] = vectors
        for alias, word in aliases.items():
            if word in self._vectors:
                self.alias(word, alias)
        self._rebuild()

    @property
    def _table(self) -> nn.Embedding:
        """The encoder's table without words: looked up each time, because it may have been replaced."""
        token = getattr(self._text_encoder, "token", None)
        if not isinstance(token, nn.Embedding):
            raise ValueError("embeddings need a text encoder whose token table is an nn.Embedding named `token`")
        return token.without_words() if isinstance(token, WordTable) else token

    @property
    def _next(self) -> int:
        return self._table.num_embeddings + sum(map(len, self._vectors.values()))

    def keep(self) -> None:
        """Add the words again if the table was replaced. ValueError if it has another size."""
        if not self._vectors or isinstance(getattr(self._text_encoder, "token", None), WordTable):
            return
        first = min(min(self._tokenizer.added[word]) for word in self._vectors)
        if self._table.num_embeddings != first:
            raise ValueError(
                f"the table of tokens has {self._table.num_embeddings} rows, and had {first} when words were added: "
                "call remove_embedding() first"
            )
        self._rebuild()

    def _look(self) -> None:
        """Keep vectors that were changed in the table."""
        token = getattr(self._text_encoder, "token", None)
        counts = [len(vectors) for vectors in self._vectors.values()]
        if isinstance(token, WordTable) and len(token.more) == sum(counts):
            for word, now in zip(self._vectors, token.more.split(counts), strict=True):
                if not torch.equal(now, self._vectors[word].to(now)):
                    self._vectors[word] = now.detach().clone()

    def _rebuild(self) -> None:
        vectors = [vector.to("cpu", torch.float32) for vector in self._vectors.values()]
        table = self._table
        self._text_encoder.token = WordTable(table, torch.cat(vectors)) if vectors else table
