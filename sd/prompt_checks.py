"""Checks of the prompts of a request: texts, lists of texts, or encoded contexts, and how many of each.

>>> texts("prompt", ["a cat", "a dog"]), count(("a cat", "a dog"))
(('a cat', 'a dog'), 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .messages import counted


def texts(name: str, value: object) -> tuple[str, ...]:
    """A list of texts, which is not empty; raises ValueError, with the name, for anything else."""
    if isinstance(context := getattr(value, "context", None), Tensor):
        if getattr(value, "vector", None) is not None:  # a Conditioning, for which a request has no place
            raise ValueError(f"{name} must be a text or a list of texts, got a {type(value).__name__}: give the text")
        raise ValueError(
            f"{name} must be a text, a list of texts or a context, got a {type(value).__name__}: give its "
            f".context {tuple(context.shape)}"
        )
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name} must be a text, a list of texts or a context, got {value!r:.100}")
    for text in value:
        if not isinstance(text, str):
            is_context = isinstance(text, Tensor)
            found = f"a tensor {tuple(text.shape)}; join contexts with torch.cat" if is_context else f"{text!r:.100}"
            raise ValueError(f"{name} must be a text, a list of texts or a context, got a list with {found}")
    return tuple(value)


def is_empty(prompts: str | Sequence[str] | Tensor | None) -> bool:
    """Whether there is no prompt, or only empty texts."""
    return not isinstance(prompts, Tensor) and not any(prompts or ())


def count(prompts: Sequence[str] | Tensor) -> int:
    """The number of texts or contexts."""
    return len(prompts) if not isinstance(prompts, Tensor) or prompts.dim() else 0


def context(name: str, value: Tensor, length: int, width: int) -> None:
    """Raise ValueError, with the name, for a tensor that is not a context (B, k x length, width)."""
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if len(shape) != 3 or 0 in shape or shape[1] % length or shape[2] != width or not value.is_floating_point():
        raise ValueError(f"{name} must be a context (B, k x {length}, {width}) of this model, got {shape} in {dtype}")


def negatives(negative: object, prompt: Any) -> tuple[str, ...] | Tensor:
    """Several negatives: one text or context for each prompt, or one context for all. Raises ValueError."""
    prompts = count(prompt)
    found = negative if isinstance(negative, Tensor) else texts("negative", negative)
    if count(found) != prompts and not (isinstance(found, Tensor) and count(found) == 1):
        kind = "context" if isinstance(found, Tensor) else "text"
        raise ValueError(
            "negative must be one text for all prompts, or as many as there are prompts: "
            f"got {counted(count(found), kind)} for {counted(prompts, 'prompt')}"
        )
    return found


def second(name: str, value: object, prompt: Any) -> tuple[str, ...]:
    """The texts that a second text encoder reads, one for each prompt. Raises ValueError, with the name."""
    prompts = count(prompt)
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a text or a list of texts, got a tensor {tuple(value.shape)}")
    found = texts(name, value)
    if len(found) != prompts:
        raise ValueError(
            f"{name} must be one text for all prompts, or as many as there are prompts: "
            f"got {counted(len(found), 'text')} for {counted(prompts, 'prompt')}"
        )
    return found
