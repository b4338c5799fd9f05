"""The methods of `StableDiffusion` that add LoRA files and textual inversions to a model, and remove them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from ..config import Config
from ..few_step import FewStep, of_config
from ..files import user_path
from ..settings import number
from ..text.tokenizer import Note, warn
from .added import Adapters, LoraFile


class Adaptable:
    """A model with `Adapters`."""

    _adapters: Adapters
    config: Config

    @property
    def few_step_loras(self) -> dict[str, FewStep]:
        """The few-step LoRAs that are merged with a weight above 0, and their kinds; the last one sets the defaults."""
        return self._adapters.few_step

    @property
    def few_step(self) -> tuple[str, FewStep] | None:
        """What makes this a model of few steps, as text, and its kind; None for an ordinary model."""
        loras = [*self._adapters.few_step.items()]  # a copy: another thread may remove one
        if loras and self.config.unet.guidance is None:
            name, kind = loras[-1]
            return f"{name} ({kind.described('LoRA')})", kind
        own = of_config(self.config)
        return None if own is None else (f"this model ({own.described('model')})", own)

    @property
    def defaults(self) -> Config:
        """The config, whose default settings are those of a few-step LoRA while one is merged (few_step.py).

        A network that is told its guidance keeps its own: it is one for few steps already.
        """
        kinds = [] if self.config.unet.guidance is not None else [*self._adapters.few_step.values()]
        return kinds[-1].applied(self.config) if kinds else self.config

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs that are merged and can be removed: name -> weight."""
        return self._adapters.merged.weights

    def add_lora(
        self, path: str | os.PathLike[str], weight: float = 1.0, name: str | None = None, *, note: Note = warn
    ) -> str:
        """Merge a LoRA or LyCORIS file into U-Net and text encoders, and add the embeddings in it; returns its name.

        path   a file, or a folder with one, as written by diffusers, PEFT or the hub's cache
        name   that of the LoRA from then on. By default the file's; its folder's or repository's, if tools call every
               file so; with a number if another file has that name
        note   receives lines on the parts of the file that have no effect, and on the settings that a few-step LoRA
               makes the defaults while it has a weight above 0; they are UserWarnings if it is not given

        Raises CheckpointError for a file that is not a LoRA, or one for another model; ValueError if the name is
        taken, if the file is merged already, or if weights were changed after others were merged into them.
        """
        return self._adapters.add_loras([LoraFile(user_path(path), number("weight", weight), name)], note=note)[0]

    def add_loras(
        self,
        files: Sequence[str | os.PathLike[str] | LoraFile | tuple[str | os.PathLike[str], float]],
        *,
        removable: bool = True,
        note: Note = warn,
    ) -> list[str]:
        """Merge several LoRA files, each as a path, or as one with its weight, and a name; see `add_lora`.

        All are read before the first is merged. Each change is computed from the original weights: their order does not
        matter. If not `removable`, the previous weights are not kept, which needs less memory. Raises TypeError for one
        path in place of a list.
        """
        if isinstance(files, str | os.PathLike):
            raise TypeError(f"add_loras takes a list of files, got {files!r:.100}: add_lora takes one")
        loras = [LoraFile(file) if isinstance(file, str | os.PathLike) else LoraFile(*file) for file in files]
        loras = [lora._replace(path=user_path(lora.path), weight=number("weight", lora.weight)) for lora in loras]
        return self._adapters.add_loras(loras, removable, note)

    def remove_lora(self, *names: str) -> None:
        """Remove LoRAs, all if no name is given. The weights are then bit for bit what they were before.

        Raises ValueError, and changes nothing, if weights were changed after LoRAs were merged into them: by loading
        others, in place, or in another precision.
        """
        self._adapters.remove_loras(names)

    def forget_loras(self) -> None:
        """Keep the weights as they are now: LoRAs that are merged stay for good, and can no longer be removed."""
        self._adapters.forget_loras()

    @property
    def words(self) -> dict[str, int]:
        """The words added by `add_embedding`: word -> number of its vectors."""
        return self._adapters.words.counts

    def add_embedding(self, path: str | os.PathLike[str], word: str | None = None) -> list[str]:
        """Add the words of a textual inversion file to prompts; returns them in lower case, as prompts are read.

        For SDXL, a word has vectors for both text encoders.

        path   a file, or a folder with one, as written by diffusers or the hub's cache
        word   the name of the word; if None, the word in the file, and the file's name without its suffix

        Raises CheckpointError for a file that is not an embedding, or one for another model; ValueError if the word is
        taken.
        """
        return self._adapters.add_embedding(user_path(path), word)

    def add_word(self, word: str, vectors: Tensor) -> str:
        """Add a word with these vectors (n, D) to prompts; returns it in lower case, as prompts are read.

        vectors   for SDXL those for its two text encoders, side by side

        Raises ValueError if the word is taken, or if the vectors do not fit.
        """
        return self._adapters.add_word(word, vectors)

    def remove_embedding(self, *words: str) -> None:
        """Remove words that were added, all if none is given."""
        self._adapters.remove_embeddings(words)
