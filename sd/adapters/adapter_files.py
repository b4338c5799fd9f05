"""Which file of a folder is an adapter, and the name that a file gives it.

Tools write folders as well as files: PEFT's adapter_model.safetensors with its settings beside it, diffusers'
pytorch_lora_weights.safetensors and learned_embeds.bin, a repository in the hub's cache.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..checkpoints.checkpoint import CheckpointError
from ..checkpoints.folders import ENDINGS, model_name
from ..checkpoints.formats.pickles import RefusedFile
from ..checkpoints.hub_cache import repository, snapshot
from ..messages import listed

# What tools call every file. Of several in a folder, the first is taken.
LORA_FILES = ("pytorch_lora_weights", "adapter_model")
EMBEDDING_FILES = ("learned_embeds",)
# LoRA files of these names are named after their folder, in the hub's cache after their repository; ...
SAME_NAMES = frozenset(
    {*LORA_FILES, "pytorch_custom_diffusion_weights", "diffusion_pytorch_model", "pytorch_model", "lora_weight"}
)
ONLY_NAMES = frozenset({"lora", "lora_weights", "model", "adapter", "last"})  # ... and of these, if it is in the cache
NO_WORDS = frozenset({"pytorch_model", "model", "embedding", "embeddings"})  # the same for embeddings
STEPS_SUFFIX = re.compile(r"-steps-\d+$")  # what diffusers appends to the name of an intermediate file


def adapter_file(path: Path, stems: tuple[str, ...]) -> Path:
    """The file to read for a path: the path itself, or of a folder the file that a tool wrote, or the only one.

    stems   names of files, without endings, that are looked for in a folder

    Raises CheckpointError for a folder in which it is not clear which file it is.
    """
    if not os.path.isdir(path):  # false, without an error, for what cannot be a path
        return path
    try:
        folder = snapshot(path) or path
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
    except RefusedFile as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; check its permissions") from None
    named = [file for stem in stems for file in files if model_name(file) == stem]
    named.sort(key=lambda file: (stems.index(model_name(file)), file.suffix.lower() != ".safetensors"))
    if named or len(files) == 1:
        return (named or files)[0]
    if not files:
        raise CheckpointError(f"{path}: no weight file in this folder ({', '.join(ENDINGS)}); give the adapter's file")
    some = listed((file.name for file in files), most=3)
    raise CheckpointError(f"{path}: a folder with {len(files)} weight files; give one of them ({some})")


def lora_name(path: Path) -> str:
    """The name of a LoRA file: the file's, or its folder's if the tool gives every file the same name.

    In a cache of the Hugging Face hub, where files are links in folders named by hashes, it is the repository's name.

    >>> lora_name(Path("/hub/models--someone--pixel-art/snapshots/0123abcd/pytorch_lora_weights.safetensors"))
    'pixel-art'
    """
    return _name(path, SAME_NAMES, ONLY_NAMES)


def embedding_word(path: Path) -> str:
    """The word of an embedding file that has none inside, by the same rules.

    >>> embedding_word(Path("/concepts/cat-toy/learned_embeds-steps-500.safetensors"))
    'cat-toy'
    """
    return _name(path, frozenset(EMBEDDING_FILES), NO_WORDS)


def is_no_word(path: Path) -> bool:
    """Whether an embedding file has one of the names that many share."""
    return STEPS_SUFFIX.sub("", model_name(path).lower()) in NO_WORDS.union(EMBEDDING_FILES)


def _name(path: Path, same: frozenset[str], only: frozenset[str]) -> str:
    path = Path(os.path.abspath(path))  # of the link, not of its target
    name, owner = model_name(path), repository(path)
    usual = STEPS_SUFFIX.sub("", name.lower())
    if owner and (usual in same | only or path.parent.name == "blobs"):
        in_folder = path.parent.name != "blobs" and path.parent.parent.name != "snapshots"
        return path.parent.name if in_folder else owner
    return path.parent.name or name if usual in same else name
