"""A trainable word (textual inversion): its vectors are learned, and everything else stays unchanged.

Gal et al. 2022, "An image is worth one word: personalizing text-to-image generation using textual inversion"
(arXiv:2208.01618). The word is added to the model (sd/adapters/words.py), and a hook of each text encoder's token table
gives the trained vectors for its ids, so that the table itself, and gradients for it, are not needed.

    file             contents
    .safetensors     {"<the-word>": (n, D)}; for SDXL {"clip_l": (n, 768), "clip_g": (n, 1280)}
    .pt              the web UI's string_to_param: {"*": (n, D)}, with a name and the step; for SDXL as above
    in a LoRA file   kohya's bundle_emb.WORD.string_to_param.*; for SDXL bundle_emb.WORD.clip_l and .clip_g

The web UI, ComfyUI, diffusers and sd/adapters/textual_inversion.py read both kinds of files. Bundled words are read by
the web UI and this project; diffusers refuses a LoRA file with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters.textual_inversion import encoder_names
from ..adapters.words import WordTable
from ..config import Config
from ..models.text_encoder import TextEncoder
from ..text.tokenizer import Tokenizer

ASTERISK = 265  # the id of "*", which stands for the word in the paper's files


class HasWords(Protocol):
    """What of `StableDiffusion` is needed here: "text_encoder", perhaps "text_encoder_2", and these."""

    config: Config
    tokenizers: tuple[Tokenizer, ...]

    def add_word(self, word: str, vectors: Tensor) -> str:
        """Add a word with its vectors (n, D); those for several text encoders are side by side."""


class TrainableWord(nn.Module):
    """The vectors of a word that is new to a model: its parameters, (n, D) for each text encoder, in float32.

    model    to which the word is added; it and its networks are not kept. Add other words before: a table that is
             replaced loses its hook
    word     as prompts will have it, such as "<cat-toy>"
    count    n, the number of vectors, each of which takes a token of a prompt
    init     a word or a few whose vectors are the first values. If it has fewer tokens than n they are repeated, and
             if it has more, neighbours are averaged

    The networks are to be frozen by the caller. Raises ValueError for a word that is taken, for more vectors than a
    prompt has room for, and for an `init` that has no tokens or that the model does not know.
    """

    def __init__(self, model: HasWords, word: str, count: int, init: str) -> None:
        super().__init__()
        self._encoders = tuple(_encoder(model, name) for name in model.config.text_names)  # a tuple is no submodule
        room = model.config.text[0].length - 2
        if not 1 <= count <= room:
            raise ValueError(f"a word has from 1 to {room} vectors, the tokens of a prompt; got {count}")
        first = [
            _initial(encoder, tokenizer, init, count)
            for encoder, tokenizer in zip(self._encoders, model.tokenizers, strict=True)
        ]
        self.word = model.add_word(word, torch.cat([vectors.cpu() for vectors in first], dim=1))
        self._ids = tuple(tokenizer.added[self.word][0] for tokenizer in model.tokenizers)
        self.vectors = nn.ParameterList(first)
        self._hooks: list[RemovableHandle] = []

    def attach(self) -> None:
        """Let the text encoders use these vectors from now on. Raises ValueError if they do already."""
        if self._hooks:
            raise ValueError(f"the word {self.word} is attached already: detach it first")
        for encoder, vectors, first in zip(self._encoders, self.vectors, self._ids, strict=True):
            self._hooks.append(encoder.token.register_forward_hook(self._giver(vectors, first)))

    def detach(self) -> None:
        """Let the text encoders use the vectors that the model has for the word: those of `store`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _giver(self, vectors: Tensor, first: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def give(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            place = inputs[0] - first
            own = F.embedding(place.clamp(0, len(vectors) - 1), vectors).to(output.dtype)
            return torch.where(((place >= 0) & (place < len(vectors)))[..., None], own, output)

        return give

    @torch.no_grad()
    def store(self, vectors: Sequence[Tensor] | None = None) -> None:
        """Make vectors those of the model's word, in the precision of its tables: these, or others such as averages."""
        for encoder, own, first in zip(self._encoders, vectors or self.vectors, self._ids, strict=True):
            table = encoder.token
            if not isinstance(table, WordTable):
                raise ValueError(f"the word {self.word} is not in the model any more")
            start = first - table.num_embeddings
            table.more[start : start + len(own)] = own.to(table.more)


def _encoder(model: HasWords, name: str) -> TextEncoder:
    return getattr(model, name)


@torch.no_grad()
def _initial(encoder: TextEncoder, tokenizer: Tokenizer, init: str, count: int) -> Tensor:
    """The first vectors (n, D) for one text encoder, on its device."""
    ids = tokenizer.encode(init)
    if not ids:
        raise ValueError(f"{init!r} has no tokens: give a word to start from, such as one for the kind of thing")
    known = encoder.token(torch.tensor(ids, device=encoder.position.weight.device)).float()
    if not known.any(dim=1).all():
        raise ValueError(
            f"the model does not know {init!r}, whose vectors are zero: start from a word that it knows (--init-word)"
        )
    if len(ids) > count:
        return torch.stack([part.mean(dim=0) for part in known.tensor_split(count)])
    return known[torch.arange(count, device=known.device) % len(ids)]


def embedding_tensors(word: str, vectors: Sequence[Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors of a .safetensors file of a word; `vectors` (n, D) for each text encoder, as of `TrainableWord`."""
    plain = [each.detach().to("cpu", torch.float32).contiguous() for each in vectors]
    return dict(zip(encoder_names(config) or (word,), plain, strict=True))


def embedding_pickle(word: str, vectors: Sequence[Tensor], config: Config, step: int) -> dict[str, Any]:
    """The contents of a .pt file of a word, for `torch.save`; `step` is that of the training."""
    tensors = embedding_tensors("*", vectors, config)
    if config.sizes:
        return tensors
    return {
        "string_to_token": {"*": ASTERISK},
        "string_to_param": tensors,
        "name": word,
        "step": step,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


def bundled_tensors(words: Mapping[str, Sequence[Tensor]], config: Config) -> dict[str, Tensor]:
    """The tensors of words that a LoRA file has beside its own; `words` as for `embedding_tensors`."""
    return {
        f"bundle_emb.{word}.{name}": tensor
        for word, vectors in words.items()
        for name, tensor in embedding_tensors("string_to_param.*", vectors, config).items()
    }
