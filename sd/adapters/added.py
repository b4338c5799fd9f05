"""The adapters of one model: LoRA files merged into its networks, and the words of textual inversion files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import nn

from ..config import Config
from ..models.text_encoder import TextEncoder
from ..text.tokenizer import Tokenizer
from .lora import Merged
from .lora_formats import read_lora
from .textual_inversion import Words, other_word, read_embedding


class Adapters:
    """What was added to a model, and can be removed again.

    keep   called with the names of networks before they are changed: a network that is read from its file again would
           lose the change
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, networks: Mapping[str, nn.Module], keep: Callable[..., object]
    ) -> None:
        """`networks` has the "text_encoder" and the "unet"."""
        self._config, self._keep = config, keep
        self.merged = Merged(networks)
        self.words = Words(tokenizer, cast(TextEncoder, networks["text_encoder"]))

    def add_loras(self, files: Sequence[tuple[str | os.PathLike[str], float]], removable: bool = True) -> list[str]:
        """See `StableDiffusion.add_loras`."""
        if not files:
            return []
        networks = self.merged.networks
        loras = [(read_lora(path, self._config, networks), weight) for path, weight in files]
        self._keep(*networks)
        self.merged.add(loras, removable)
        return [lora.name for lora, _ in loras]

    def remove_loras(self, names: Sequence[str]) -> None:
        """Remove these, or all if there are no names."""
        self.merged.remove(*_known(names, self.merged.weights, "LoRA"))

    def add_embedding(self, path: str | os.PathLike[str], word: str | None = None) -> list[str]:
        """See `StableDiffusion.add_embedding`."""
        text = self._config.text[0]
        words = read_embedding(path, text.width, text.length - 2, word)
        self._keep("text_encoder")
        added = self.words.add(words)
        name = other_word(Path(path), words) if word is None else None
        second = None if name is None else self.words.alias(added[0], name)
        return added if second is None else [*added, second]

    def remove_embeddings(self, words: Sequence[str]) -> None:
        """Remove these, or all if there are no words."""
        self.words.remove(*_known(words, self.words.counts, "word"))


def _known(names: Sequence[str], known: Mapping[str, object], what: str) -> list[str]:
    """The names, or all known names if there are none; raises ValueError for an unknown one."""
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r} was added: {', '.join(known) or 'there is none'}")
    return list(names or known)
