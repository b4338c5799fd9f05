"""Textual inversion: files with vectors for new words of a text encoder.

Gal et al. 2022, "An image is worth one word: personalizing text-to-image generation using textual inversion"
(arXiv:2208.01618): the networks stay as they are; only the vectors of a new word are trained, from a few images. A word
may have several vectors, and takes as many of the 75 tokens of a prompt.

    file                        contents
    the paper's .pt             string_to_param: {"*": (n, D)}; the web UI's as well, with a name in addition
    diffusers' .bin             {"<the-word>": (D,) or (n, D)}; in .safetensors as well
    .safetensors of others      emb_params: (n, D); further names: `is_nameless`
    OneTrainer's                emp_params, and emp_params_out: output vectors, which are not used here
    SDXL's                      clip_l: (n, 768) and clip_g: (n, 1280), one for each text encoder; also called
                                text_encoders_0 and text_encoders_1, or in two files, learned_embeds and
                                learned_embeds_2

The file's name is always a word for its vectors, as in the web UIs; a word in the file is one, too. A file with a
tool's fixed name is named after its folder.

D is the width of the text encoder, so a file fits one family of models: 768 for Stable Diffusion 1.x, 1024 for 2.x. A
file for 1.x has vectors for SDXL's first text encoder only, and was trained with another U-Net: SDXL models refuse it,
and the web UI skips it. SDXL's refiner has only the second encoder, and takes its vectors from a file for SDXL.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint, naming
from ..checkpoints.convert import shape_text
from ..checkpoints.finite import check_numbers
from ..checkpoints.folders import model_name
from ..checkpoints.other_models import NOT_SUPPORTED, refuse_control
from ..checkpoints.tokenizer_files import usable_words
from ..config import Config, TextConfig
from ..messages import listed
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
ENCODERS = ("clip_l", "clip_g")  # keys of the vectors for SDXL's text encoders, ...
OTHER_NAMES = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}  # ... and in diffusers' scripts
PAIR = ("learned_embeds", "learned_embeds_2")  # how the names of diffusers' files for the two begin
SD3 = "Flux or Stable Diffusion 3"
OTHERS = {"t5": SD3, "t5xxl": SD3, "text_encoders_2": SD3}
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL"}
MAX_WORDS = 100  # in one file
MAX_LETTERS = 200  # of a word


def encoder_names(config: Config) -> tuple[str, ...]:
    """The names of an SDXL model's text encoders in files, one for the refiner; none for other models."""
    return ENCODERS[-len(config.text) :] if config.sizes else ()


def widths_of(config: Config) -> int | dict[str, int]:
    """The width of a text encoder's vectors; for SDXL, those of its text encoders, by their names in files."""
    widths = [text.width for text in config.text]
    return dict(zip(encoder_names(config), widths, strict=True)) if config.sizes else widths[0]


def read_embedding(
    path: str | os.PathLike[str], width: int | Mapping[str, int], room: int, word: str | None = None
) -> dict[str, Tensor]:
    """The words of an embedding file and their vectors, (n, width) each, in float32.

    width   of the text encoder's vectors; for SDXL a `Mapping` from `widths_of`. Then the vectors of a word for the two
            text encoders are side by side: (n, 768 + 1280)
    room    number of tokens in a prompt, the maximum number of vectors of a word
    path    of the file, or of a folder as written by diffusers or the hub's cache
    word    name of the word; by default the one in the file, or the file's name without its ending

    Raises CheckpointError for a file that is not an embedding, or one for another model.
    """
    path = adapter_file(Path(path), EMBEDDING_FILES)
    refuse_image(path)
    if isinstance(width, Mapping) and len(width) > 1 and (second := _second_file(path)) is not None:
        return _joined(path, second, tuple(width.values()), room, word)
    with load_checkpoint(path) as file, naming(path):
        if other := next((model for key, model in OTHERS.items() if key in file), None):
            raise CheckpointError(f"an embedding for {other}, {NOT_SUPPORTED}")
        shapes = _vectors_in(file, path)
        parts = {_part(key): key for key in shapes if _part(key) is not None}
        if isinstance(width, int) or (not parts and len(width) == 1):
            (width,) = (width,) if isinstance(width, int) else width.values()
            if ENCODERS[1] in parts:
                raise CheckpointError("an embedding for SDXL, which has other text encoders: take one for this model")
            return _words(file, path, shapes, width, room, word)
        if not parts:
            _refuse_width(shapes, width)
        if isinstance(width, Mapping) and len(width) > 1 and (more := [key for key in shapes if _part(key) is None]):
            warn(f"{path.name}: tensors that belong to no text encoder are not used: {listed(more, most=5)}")
        name = _checked(word or embedding_word(path))
        return {name: _side_by_side(file, name, parts, width, room)}


def _vectors_in(file: Checkpoint, path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file that can be vectors of words, by key. Raises CheckpointError for others."""
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
        refuse_control(shapes)
        few = (
            f"{bad[0]} is {shape_text(shapes[bad[0]])}" if bad else f"{len(shapes)} tensors, {next(iter(shapes))}, ..."
        )
        raise CheckpointError(f"not an embedding ({few}): a checkpoint is given with --ckpt, a LoRA file with --lora")
    return shapes


def _words(
    file: Checkpoint, path: Path, shapes: Mapping[str, tuple[int, ...]], width: int, room: int, word: str | None
) -> dict[str, Tensor]:
    """The words of a file for one text encoder."""
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
        _check_width(shape, width)
        name = word or key.removeprefix(PARAMETERS)
        if word is None and (key in nameless or (len(shapes) == 1 and key.startswith(PARAMETERS))):
            name = embedding_word(path)
        found[_checked(name)] = _read(file, key, name, room)
    return found


def _side_by_side(
    file: Checkpoint, word: str, parts: Mapping[str | None, str], widths: Mapping[str, int], room: int
) -> Tensor:
    """The vectors (n, D) of a word, side by side; `parts` are their keys in the file, by text encoder of SDXL."""
    if missing := [name for name in widths if name not in parts]:
        raise CheckpointError(f"has no vectors for {missing[0]}: an embedding for this model has {_needed(widths)}")
    shapes = {name: file.shape(parts[name]) for name in widths}
    for name, width in widths.items():
        _check_width(shapes[name], width, f" of {name}")
    counts = {name: shape[0] if len(shape) == 2 else 1 for name, shape in shapes.items()}
    if len(set(counts.values())) > 1:
        each = " and ".join(f"{count} for {name}" for name, count in counts.items())
        raise CheckpointError(f"holds {each}: a word needs as many vectors for each text encoder")
    return torch.cat([_read(file, parts[name], word, room) for name in widths], dim=1)


def _refuse_width(shapes: Mapping[str, tuple[int, ...]], widths: Mapping[str, int]) -> None:
    """Raise CheckpointError for vectors for a single text encoder, given to a model with SDXL's."""
    found = next((shape[-1] for shape in shapes.values()), 0)
    family = FAMILIES.get(found, "another model")
    raise CheckpointError(
        f"an embedding for {family}: its vectors are {found} wide, and one for this model has {_needed(widths)}"
    )


def _needed(widths: Mapping[str, int]) -> str:
    return " and ".join(f"{name} ({width} wide)" for name, width in widths.items())


def _joined(one: Path, two: Path, widths: tuple[int, ...], room: int, word: str | None) -> dict[str, Tensor]:
    """The words of two files, one for each text encoder of SDXL."""
    first, second = (read_embedding(path, width, room) for path, width in zip((one, two), widths, strict=True))
    counts = [{name: len(vectors) for name, vectors in words.items()} for words in (first, second)]
    if counts[0] != counts[1]:
        raise CheckpointError(f"{two}: has other words, or another number of vectors, than {one.name} beside it")
    if word is not None and len(first) > 1:
        raise CheckpointError(f"{one}: holds {len(first)} words ({listed(first, most=5)}): leave out the word")
    return {_checked(word or name): torch.cat([vectors, second[name]], dim=1) for name, vectors in first.items()}


def _second_file(path: Path) -> Path | None:
    """The file for SDXL's second text encoder beside the one for the first, as diffusers' scripts write them."""
    first, second = PAIR
    if not path.name.startswith(first) or path.name.startswith(second):
        return None
    beside = path.with_name(second + path.name.removeprefix(first))
    return beside if beside.is_file() else None


def _part(key: str) -> str | None:
    """Which of `ENCODERS` the vectors under this key are for."""
    key = key.removeprefix(PARAMETERS)
    return OTHER_NAMES.get(key, key if key in ENCODERS else None)


def _check_width(shape: tuple[int, ...], width: int, of: str = "") -> None:
    if shape[-1] != width:
        family = FAMILIES.get(shape[-1], "another model")
        raise CheckpointError(f"an embedding for {family}: its vectors{of} are {shape[-1]} wide, this model's {width}")


def _checked(word: str) -> str:
    """The word. CheckpointError for what cannot be one."""
    if not word.isprintable() or len(word) > MAX_LETTERS:
        raise CheckpointError(f"{word[:50]!r} is not a word; give one (word=..., --embedding FILE:WORD)")
    return word


def _read(file: Checkpoint, key: str, name: str, room: int) -> Tensor:
    """The vectors (n, D) of a key, in float32."""
    shape = file.shape(key)
    if len(shape) == 2 and shape[0] > room:
        raise CheckpointError(f"{name!r} has {shape[0]} vectors, but a prompt has room for {room}")
    vectors = file[key]
    check_numbers(key, vectors)
    return vectors.reshape(-1, shape[-1]).float()


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
    names = [key.removesuffix(end) for end in OUTPUTS if key.endswith(end)]
    return any(name in ENCODERS or is_nameless(name) for name in names)


def other_word(path: Path, words: Mapping[str, Tensor]) -> str | None:
    """The file's name, if it can be a second word for the vectors of a file with one word of another name."""
    (word, *more), name = words, model_name(path)
    usable = name.isprintable() and 0 < len(name.strip()) <= MAX_LETTERS and not is_no_word(path)
    return name if not more and usable and name.lower() != word.lower() else None
