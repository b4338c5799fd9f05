"""A CLIP text encoder as a value.

>>> TextConfig().width, TextConfig(layers=11).published_layers
(768, 12)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .vae_config import check as _check
from .vae_config import check_sizes as _check_sizes

END = 49407  # id of CLIP's end token
PUBLISHED_LAYERS = {768: 12, 1024: 24, 1280: 32}  # of ViT-L/14, ViT-H/14 and ViT-bigG/14, by width
MAX_WORDS, MAX_WORD = 10_000, 200  # added to a tokenizer; letters of each


class Word(NamedTuple):
    """A word that a tokenizer knows besides CLIP's tokens, for one row of the token table."""

    text: str
    id: int
    exact: bool = False  # matches only as it is written; else in upper or lower case
    alone: bool = False  # matches only where no letter or digit is beside it


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text transformer; the defaults are those of ViT-L/14 in Stable Diffusion 1.x."""

    width: int = 768  # D
    layers: int = 12  # layers that are run; fewer than were trained is "clip skip"
    heads: int = 12
    activation: str = "quick_gelu"  # OpenAI's CLIP: x * sigmoid(1.702 x); OpenCLIP: "gelu", the exact one
    pad: int = END  # id after the end token: the end token again (OpenAI's CLIP at Hugging Face) or 0 (OpenCLIP)
    vocab: int = 49408
    length: int = 77  # M, tokens with start and end
    names: str = "clip"  # of its weights in original checkpoints: "clip" (transformers' names) or "openclip"
    hidden_layer: int = -1  # layer whose output is `hidden`, counted from the last one: -1, -2, ...
    hidden_norm: bool = True  # whether `hidden` passes through the final normalisation
    pooled: bool = False  # whether the normalised output at the end token is also returned
    projection: int | None = None  # width P of the linear layer that the pooled output passes through; None: no layer
    words: tuple[Word, ...] = ()  # besides CLIP's tokens; those whose id is below `vocab` can be used

    def __post_init__(self) -> None:
        _check_sizes(self, "width", "layers", "heads", "vocab", "length")
        _check(self.layers <= 256, f"TextConfig.layers: got {self.layers}, expected at most 256")
        _check(self.length >= 3, f"TextConfig.length: got {self.length}, expected room for start, a token and end")
        _check(self.vocab >= 49408, f"TextConfig.vocab: got {self.vocab}, CLIP has 49408 tokens")
        _check(self.width % self.heads == 0, f"TextConfig: {self.heads} heads do not divide width {self.width}")
        for name, known in (("activation", ("quick_gelu", "gelu")), ("names", ("clip", "openclip"))):
            value = getattr(self, name)
            _check(value in known, f"TextConfig.{name}: got {value!r:.100}, expected one of {known}")
        _check(type(self.pad) is int and 0 <= self.pad < self.vocab, f"TextConfig.pad: got {self.pad!r}, not an id")
        self._check_words()
        which = self.hidden_layer
        _check(
            type(which) is int and -self.layers <= which <= -1,
            f"TextConfig.hidden_layer: got {which!r:.100}, expected {-self.layers} to -1",
        )
        for name in ("hidden_norm", "pooled"):
            value = getattr(self, name)
            _check(type(value) is bool, f"TextConfig.{name}: got {value!r:.100}, expected true or false")
        if self.projection is not None:
            _check_sizes(self, "projection")
            _check(self.pooled, "TextConfig.projection: projects the pooled output, which is not asked for (pooled)")

    @property
    def pooled_width(self) -> int:
        """The width of the pooled output; 0 if there is none."""
        return (self.projection or self.width) if self.pooled else 0

    @property
    def published_layers(self) -> int:
        """The layers of the encoder as it was published: SD 2 leaves out the last of them, which it does not use."""
        return self.layers + (PUBLISHED_LAYERS.get(self.width) == self.layers + 1)

    def _check_words(self) -> None:
        _check(isinstance(self.words, tuple) and len(self.words) <= MAX_WORDS, "TextConfig.words: expected a list")
        words = []
        for entry in self.words:
            _check(isinstance(entry, list | tuple) and len(entry) == 4, f"TextConfig.words: got {entry!r:.100}")
            word = Word(*entry)  # JSON has lists
            text = isinstance(word.text, str) and word.text.isprintable() and 0 < len(word.text.strip()) <= MAX_WORD
            kinds = type(word.id) is int and type(word.exact) is bool and type(word.alone) is bool
            _check(text and kinds and word.id > END, f"TextConfig.words: got {entry!r:.100}")
            words.append(word)
        different = len({word.text for word in words}) == len({word.id for word in words}) == len(words)
        _check(different, "TextConfig.words: a word or an id occurs twice")
        object.__setattr__(self, "words", tuple(words))
