"""The adapters of one model: LoRA files merged into its networks, and the words of textual inversion files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from torch import Tensor, nn

from ..config import Config
from ..few_step import FewStep, named
from ..models.text_encoder import TextEncoder
from ..text.tokenizer import Note, Tokenizer, warn
from .adapter_files import EMBEDDING_FILES, adapter_file
from .lora import Lora, Merged
from .lora_formats import read_lora
from .textual_inversion import other_word, read_embedding, widths_of
from .words import Words


class LoraFile(NamedTuple):
    """A LoRA file to merge, its weight, and its name in the model; by default that of the file."""

    path: str | os.PathLike[str]
    weight: float = 1.0
    name: str | None = None


class Adapters:
    """What was added to a model, and can be removed again.

    keep   called with the names of networks before they are changed: a network that is read from its file again would
           lose the change
    """

    def __init__(
        self,
        config: Config,
        tokenizers: Sequence[Tokenizer],
        networks: Mapping[str, nn.Module],
        keep: Callable[..., object],
    ) -> None:
        """`networks` has the text encoders, to each of which a tokenizer belongs, and the "unet"."""
        self._config, self._keep = config, keep
        self.merged = Merged(networks)
        self.words = Words(tokenizers, [cast(TextEncoder, networks[name]) for name in config.text_names])
        self._words_of: dict[str, list[str]] = {}  # name of a LoRA -> words that were in its file
        self.few_step: dict[str, FewStep] = {}  # the few-step LoRAs, in the order in which they were added
        self._permanent: set[str] = set()  # those of them that cannot be removed

    def add_loras(self, files: Sequence[LoraFile], removable: bool = True, note: Note = warn) -> list[str]:
        """See `StableDiffusion.add_loras`."""
        if not files:
            return []
        networks = self.merged.networks
        read = [read_lora(file.path, self._config, networks) for file in files]
        loras = self.merged.named(read, [file.name for file in files])
        self._keep(*networks)
        words: dict[str, list[str]] = {}
        notes = [text for lora in loras for text in lora.notes]
        try:
            for lora in loras:
                words[lora.name] = self._add_words(lora, notes)
            idle = self.merged.add(
                [(lora, file.weight) for lora, file in zip(loras, files, strict=True)], removable=removable
            )
        except BaseException:
            self._remove_words([word for added in words.values() for word in added])
            raise
        if removable:
            self._words_of |= words
        for lora, file in zip(loras, files, strict=True):
            kind = lora.few_step or named(lora.name)
            if kind is not None and file.weight > 0 and lora.name not in idle:
                self.few_step.pop(lora.name, None)  # it would keep its place
                self.few_step[lora.name] = kind
                self._permanent |= set() if removable else {lora.name}
                notes.append(kind.introduced(lora.name))
        notes += [f"the LoRA {name} changes nothing: its weight is 0, or all its values are 0" for name in idle]
        for text in notes:
            note(text)
        return [lora.name for lora in loras]

    def _add_words(self, lora: Lora, notes: list[str]) -> list[str]:
        """Add the words in a LoRA file, each unless it is taken; returns them."""
        added = []
        for word, vectors in lora.words.items():
            try:
                added += self.words.add({word: vectors})
            except ValueError as error:
                notes.append(f"the LoRA {lora.name} has an embedding that is not added: {error}")
        return added

    def remove_loras(self, names: Sequence[str]) -> None:
        """Remove these, or all if there are no names."""
        names = _known(names, self.merged.weights, "LoRA")
        self.merged.remove(*names)
        for name in {*names} - self._permanent:
            self.few_step.pop(name, None)
        self._remove_words([word for name in names for word in self._words_of.pop(name, [])])

    def _remove_words(self, words: Sequence[str]) -> None:
        there = [word for word in words if word in self.words.counts]
        if there:
            self.words.remove(*there)

    def forget_loras(self) -> None:
        """See `StableDiffusion.forget_loras`."""
        self.merged.forget()
        self._permanent |= {*self.few_step}
        self._words_of.clear()

    def add_embedding(self, path: str | os.PathLike[str], word: str | None = None) -> list[str]:
        """See `StableDiffusion.add_embedding`."""
        file = adapter_file(Path(path), EMBEDDING_FILES)
        words = read_embedding(file, widths_of(self._config), self._config.text[0].length - 2, word)
        self._keep(*self._config.text_names)
        added = self.words.add(words)
        name = other_word(file, words) if word is None else None
        second = None if name is None else self.words.alias(added[0], name)
        return added if second is None else [*added, second]

    def add_word(self, word: str, vectors: Tensor) -> str:
        """See `StableDiffusion.add_word`."""
        width, room = sum(text.width for text in self._config.text), self._config.text[0].length - 2
        if vectors.dim() != 2 or vectors.shape[1] != width or not 1 <= len(vectors) <= room:
            raise ValueError(
                f"the vectors of {word!r:.100} are {tuple(vectors.shape)}: expected 1 to {room}, {width} wide"
            )
        self._keep(*self._config.text_names)
        return self.words.add({word: vectors})[0]

    def remove_embeddings(self, words: Sequence[str]) -> None:
        """Remove these, or all if there are no words."""
        self.words.remove(*_known(words, self.words.counts, "word"))


def _known(names: Sequence[str], known: Mapping[str, object], what: str) -> list[str]:
    """The names, or all known names if there are none; raises ValueError for an unknown one."""
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r} was added: {', '.join(known) or 'there is none'}")
    return list(names or known)
