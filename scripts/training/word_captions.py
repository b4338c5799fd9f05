"""Captions for a new word: every caption of the images to learn contains it.

Images without captions get those of Gal et al. 2022 (appendix), "a photo of <cat-toy>" and the like, or for a style "a
painting in the style of <painter>". A caption that contains the word stays as it is; others get the word in front.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .data import Example, Record, Source, digest

OBJECT = (
    "{}", "a photo of {}", "a photo of one {}", "a picture of {}", "a close-up of {}", "a cropped photo of {}",
    "a bright photo of {}", "a dark photo of {}", "a good photo of {}", "a rendering of {}", "an illustration of {}",
)  # fmt: skip
STYLE = (
    "{}", "in the style of {}", "a painting in the style of {}", "a picture in the style of {}",
    "a drawing in the style of {}", "a close-up painting in the style of {}", "a rendering in the style of {}",
)  # fmt: skip


@dataclass(frozen=True)
class WithWord:
    """A source whose captions contain a word.

    templates   captions for images without one, with {} in place of the word
    """

    source: Source
    word: str
    templates: Sequence[str]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        example = self.source[i]
        return example._replace(captions=self.told(example.captions))

    def record(self, i: int) -> Record:
        """That of the source, with the word in the captions."""
        record = self.source.record(i)
        return record if record.captions is None else record._replace(captions=self.told(record.captions))

    def key(self, i: int) -> str:
        """That of the source; where captions come with the pixels, and are kept with them, also of the word."""
        key = self.source.key(i)
        return key if self.source.record(i).captions is not None else digest([key, self.word, *self.templates])

    def told(self, captions: Sequence[str]) -> list[str]:
        """The captions with the word; a part of another word, as "sks" in "asks", is not it."""
        whole = re.compile(rf"(?<!\w){re.escape(self.word)}(?!\w)", re.IGNORECASE)
        found: list[str] = []
        for caption in captions:
            if whole.search(caption):
                found.append(caption)
            elif caption:
                found.append(f"{self.word}, {caption}")
            else:
                found += [template.format(self.word) for template in self.templates]
        return found
