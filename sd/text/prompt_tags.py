"""Tags in prompts, `<lora:name:0.8>`: AUTOMATIC1111's web UI removes them from the text and loads what they name.

    <lora:name>  <lora:name:0.8>    a LoRA file by its name without the ending; `lyco` is the same as `lora`
    <lora:name:0.8:0.6>             with a weight for the text encoder and one for the U-Net; also te=0.8, unet=0.6
    <hypernet:name:1>               a hypernetwork, which is another kind of file
    <word:anything>                 tags of extensions

What a tag does is not decided here. A word of a textual inversion such as `<cat-toy>` has no colon and is not a tag.

>>> text, (tag,) = take_tags("a house <lora:style:0.5>")
>>> text, tag.kind, lora_weight(tag)
('a house ', 'lora', 0.5)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from ..messages import one_line
from .tokenizer import Note

TAG = re.compile(r"#[^\n]*|<(\w+):([^>]+)>")  # or a comment
LORA = ("lora", "lyco")


class Tag(NamedTuple):
    """A tag: what it is written as, its kind, and the values after the kind."""

    written: str
    kind: str
    values: tuple[str, ...]

    @property
    def is_lora(self) -> bool:
        """Whether it names a LoRA file."""
        return self.kind in LORA

    @property
    def name(self) -> str:
        """The name of the file, without its ending."""
        return self.values[0].strip()

    @property
    def short(self) -> str:
        """The tag as it can be shown in a message."""
        return one_line(self.written, 100)


def take_tags(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags, and the tags in their order. Tags in comments are part of those."""
    return _take(prompt, lambda tag: True)


def take_loras(prompt: str) -> tuple[str, list[Tag]]:
    """The same for the tags of LoRAs only."""
    return _take(prompt, lambda tag: tag.is_lora)


def _take(prompt: str, wanted: Callable[[Tag], bool]) -> tuple[str, list[Tag]]:
    tags: list[Tag] = []

    def taken(match: re.Match[str]) -> str:
        if match[1] is None or not wanted(tag := Tag(match[0], match[1], tuple(match[2].split(":")))):
            return match[0]
        tags.append(tag)
        return ""

    return TAG.sub(taken, prompt), tags


def tag_name(name: str) -> str:
    """The name of a LoRA as a tag has it, without the characters that end it there."""
    return re.sub("[:,<>]", "", name)


def lora_weight(tag: Tag) -> float:
    """The weight of a LoRA's tag, 1 if there is none.

    Raises ValueError for what is not a number, for different weights of the text encoder and the U-Net, and for other
    values, such as the rank `dyn`.
    """
    positional = [value.strip() for value in tag.values[1:] if "=" not in value]
    named = {name.strip(): value.strip() for name, _, value in (v.partition("=") for v in tag.values[1:] if "=" in v)}
    if len(positional) > 2 or named.keys() - {"te", "unet"}:
        other = next((name for name in named if name not in ("te", "unet")), "a rank")
        raise ValueError(f"{tag.short}: only weights are supported in a LoRA's tag, not {other!s:.40}: remove it")
    te = named.get("te", positional[0] if positional else "1")
    unet = named.get("unet", positional[1] if len(positional) == 2 else te)
    weights = []
    for text in (te, unet):
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"{tag.short}: the weight {text!r:.40} is not a number")
        weights.append(weight)
    if weights[0] != weights[1]:
        raise ValueError(
            f"{tag.short}: different weights for the text encoder and the U-Net are not supported: give one weight"
        )
    return weights[0]


def without_tags(prompt: str, note: Note) -> str:
    """A prompt without the tags that have no effect here; `note` receives each of them.

    Raises ValueError for a LoRA's tag, which a text alone cannot load.
    """
    text, tags = take_tags(prompt)
    for tag in tags:
        if tag.is_lora:
            raise ValueError(
                f"{tag.short} in the prompt: take it out, and merge the file with model.add_lora(path, weight) "
                "(the programs do both: --lora-dir)"
            )
        note_unused(tag, note)
    return text


def note_unused(tag: Tag, note: Note) -> None:
    """Say that a tag which is not a LoRA's has no effect."""
    if tag.kind == "hypernet":
        note(f"{tag.short} is left out: hypernetworks are not supported")
    else:
        note(f"{tag.short} is left out: tags of the kind {tag.kind!r:.40} are not known")
