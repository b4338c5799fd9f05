"""Second prompts: what SDXL's second text encoder reads in place of the prompt (`prompt_2`, `negative_2`).

>>> SecondTexts(("a red house",), None).beside(["a house", "a tower"], negative=False)
(['a house', 'a tower'], ['a red house', 'a red house'])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from .config import Config
from .params import TextToImage
from .text.prompt_editing import changes
from .text.prompt_syntax import read_negative, read_prompt

NAMES = ("prompt_2", "negative_2")


class SecondTexts(NamedTuple):
    """Texts for the second encoder, one for all or one for each; None where it reads the same as the first."""

    prompt: tuple[str, ...] | None
    negative: tuple[str, ...] | None

    @classmethod
    def of(cls, config: Config, request: TextToImage, note: Callable[[str], object]) -> SecondTexts:
        """Those of a request. Raises ValueError for a model with one text encoder, and for texts that change."""
        found: list[tuple[str, ...] | None] = []
        for name in NAMES:
            given = getattr(request, name)
            if given is not None and len(config.text) < 2:
                raise ValueError(f"{name} is for a second text encoder, but {config.name} has only one: leave it out")
            texts = (given,) if isinstance(given, str) else given
            if texts is not None and request.web_ui_prompts:
                texts = tuple(_single(name, text, note) for text in texts)
            found.append(texts)
        return cls(*found)

    def check_unused(self) -> None:
        """Raise ValueError if there are any: beside prompts that change, or that are several joined by AND."""
        for name, texts in zip(NAMES, self, strict=True):
            if texts is not None:
                raise ValueError(f"{name} cannot be combined with AND, [a:b:0.5], [a|b] or a weight at a prompt's end")

    def beside(self, texts: Sequence[str] | Tensor, negative: bool) -> tuple[Sequence[str] | Tensor, list[str] | None]:
        """The texts of the first encoder, and as many of the second, None where it reads the same."""
        second = self.negative if negative else self.prompt
        if second is None or isinstance(texts, Tensor):
            return texts, None
        count = max(len(texts), len(second))
        first = list(texts) if len(texts) == count else list(texts) * count
        return first, list(second) if len(second) == count else list(second) * count


def for_refiner(request: TextToImage, config: Config) -> TextToImage:
    """The request for a refiner, to which no control network fits.

    Its only text encoder is the second one of SDXL, and reads the same texts.
    """
    request = replace(request, controls=())
    if len(config.text) > 1:
        return request
    prompt = request.prompt if request.prompt_2 is None else request.prompt_2
    if isinstance(prompt, str) and not isinstance(request.prompt, str):  # one text for all prompts
        prompt = (prompt,) * len(request.prompt)
    negative = request.negative if request.negative_2 is None else request.negative_2
    return replace(request, prompt=prompt, negative=negative, prompt_2=None, negative_2=None)


def _single(name: str, text: str, note: Callable[[str], object]) -> str:
    """A text of the web UI's syntax that is the same in all steps, without comments. Raises ValueError for others."""
    if name == "negative_2":  # has other rules: AND is a word in it, and a number at its end is text
        stages = read_negative(text, 1, note=note)
        if changes(text):
            raise ValueError(f"{name} cannot have [a:b:0.5] or [a|b]: leave them out")
        return stages[0].text
    parts = read_prompt(text, 1, note=note)
    if len(parts) > 1 or parts[0].weight != 1 or changes(text):
        raise ValueError(f"{name} cannot have AND, [a:b:0.5], [a|b] or a weight at its end: leave them out")
    return parts[0].stages[0].text
