"""Words added to the vocabulary: ids beyond CLIP's tokens, and rows for them in the text encoders' token embeddings.

A word may have several vectors, each with an id of its own. A model with two text encoders (SDXL) has a tokenizer and a
table for each of them, and a word has equally many vectors in both: so both split a prompt into the same chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.text_encoder import TextEncoder
from ..text.tokenizer import Tokenizer


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
    """The words added to the tokenizers and text encoders of a model; without words, these are unchanged."""

    def __init__(self, tokenizers: Sequence[Tokenizer], text_encoders: Sequence[TextEncoder]) -> None:
        self._tokenizers, self._text_encoders = tuple(tokenizers), tuple(text_encoders)
        # word, as the tokenizers know it -> its vectors (n, D) in the table of each text encoder
        self._vectors: dict[str, tuple[Tensor, ...]] = {}
        self._aliases: dict[str, str] = {}  # a second word -> the one whose vectors it has

    @property
    def counts(self) -> dict[str, int]:
        """Word -> number of its vectors."""
        counts = {word: len(vectors[0]) for word, vectors in self._vectors.items()}
        return counts | {alias: counts[word] for alias, word in self._aliases.items()}

    def alias(self, word: str, name: str) -> str | None:
        """A second word for the vectors of one that was added; None if it is taken."""
        try:
            added = self._register(name, [tokenizer.added[word] for tokenizer in self._tokenizers])
        except ValueError:
            return None
        self._aliases[added] = word
        return added

    def add(self, words: Mapping[str, Tensor]) -> list[str]:
        """Add words; returns them as the tokenizers know them. ValueError if one is taken.

        words   word -> vectors (n, D); those for several text encoders are side by side, in their order
        """
        added = []
        self._look()
        try:
            for word, vectors in words.items():
                widths = [self._table(encoder).embedding_dim for encoder in self._text_encoders]
                added.append(self._register(word, self._next_ids(len(vectors))))
                self._vectors[added[-1]] = vectors.split(widths, dim=1)
        except ValueError:
            self.remove(*added)
            raise
        self._rebuild()
        return added

    def remove(self, *words: str) -> None:
        """Remove words that were added, and the second words for their vectors. Raises KeyError for others."""
        self._look()
        aliases, self._aliases = self._aliases, {}
        for alias in aliases:
            self._forget(alias)
        for word in {aliases.get(word, word) for word in words}:
            del self._vectors[word]
            self._forget(word)
        kept, self._vectors = self._vectors, {}
        for word, vectors in kept.items():  # close the gaps
            self._forget(word)
            self._register(word, self._next_ids(len(vectors[0])))
            self._vectors[word] = vectors
        for alias, word in aliases.items():
            if word in self._vectors:
                self.alias(word, alias)
        self._rebuild()

    def _register(self, word: str, ids: Sequence[Sequence[int]]) -> str:
        """Add a word to every tokenizer, or to none of them and raise ValueError; returns it as they know it."""
        done: list[Tokenizer] = []
        added = word
        try:
            for tokenizer, own in zip(self._tokenizers, ids, strict=True):
                added = tokenizer.add(word, own)
                done.append(tokenizer)
        except ValueError:
            for tokenizer in done:
                tokenizer.remove(added)
            raise
        return added

    def _forget(self, word: str) -> None:
        for tokenizer in self._tokenizers:
            tokenizer.remove(word)

    def _next_ids(self, count: int) -> list[range]:
        """The ids of a word with this number of vectors, for each text encoder."""
        used = sum(len(vectors[0]) for vectors in self._vectors.values())
        firsts = [self._table(encoder).num_embeddings + used for encoder in self._text_encoders]
        return [range(first, first + count) for first in firsts]

    @staticmethod
    def _table(text_encoder: TextEncoder) -> nn.Embedding:
        """An encoder's table without added words: looked up each time, because it may have been replaced."""
        token = getattr(text_encoder, "token", None)
        if not isinstance(token, nn.Embedding):
            raise ValueError("embeddings need a text encoder whose token table is an nn.Embedding named `token`")
        return token.without_words() if isinstance(token, WordTable) else token

    def keep(self) -> None:
        """Add the words again if a table was replaced. ValueError if it has another size."""
        tokens = [getattr(encoder, "token", None) for encoder in self._text_encoders]
        if not self._vectors or all(isinstance(token, WordTable) for token in tokens):
            return
        for tokenizer, encoder in zip(self._tokenizers, self._text_encoders, strict=True):
            first = min(min(tokenizer.added[word]) for word in self._vectors)
            if self._table(encoder).num_embeddings != first:
                raise ValueError(
                    f"the table of tokens has {self._table(encoder).num_embeddings} rows, and had {first} when words "
                    "were added: call remove_embedding() first"
                )
        self._rebuild()

    def _look(self) -> None:
        """Keep vectors of words that were changed in a table."""
        counts = [len(vectors[0]) for vectors in self._vectors.values()]
        for i, encoder in enumerate(self._text_encoders):
            token = getattr(encoder, "token", None)
            if not isinstance(token, WordTable) or len(token.more) != sum(counts):
                continue
            for word, now in zip(self._vectors, token.more.split(counts), strict=True):
                own = self._vectors[word]
                if not torch.equal(now, own[i].to(now)):
                    self._vectors[word] = (*own[:i], now.detach().clone(), *own[i + 1 :])

    def _rebuild(self) -> None:
        for i, encoder in enumerate(self._text_encoders):
            vectors = [own[i].to("cpu", torch.float32) for own in self._vectors.values()]
            table = self._table(encoder)
            encoder.token = WordTable(table, torch.cat(vectors)) if vectors else table
