"""The texts of a request: its prompts and negative prompts, with or without the tags of LoRAs in them."""

from __future__ import annotations

from dataclasses import replace

from .params import TextToImage
from .text.prompt_tags import take_loras


def without_lora_tags(request: TextToImage) -> TextToImage:
    """The same request without the tags of LoRAs in its prompts, if it is one with `web_ui_prompts`."""
    if not request.web_ui_prompts:
        return request

    def without(given: object) -> tuple[str, ...]:
        return tuple(take_loras(text)[0] for text in prompt_texts(given))

    def second(given: object) -> str | tuple[str, ...] | None:
        return None if given is None else without(given)[0] if isinstance(given, str) else without(given)

    negative = without(request.negative)
    return replace(
        request,
        prompt=without(request.prompt),
        negative=negative[0] if len(negative) == 1 else negative,
        prompt_2=second(request.prompt_2),
        negative_2=second(request.negative_2),
    )


def all_texts(request: TextToImage) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts of the prompts and of the negative prompts of a request, those of the second encoder included."""
    prompts, negatives = (
        prompt_texts(first) + prompt_texts(() if second is None else second)
        for first, second in ((request.prompt, request.prompt_2), (request.negative, request.negative_2))
    )
    return prompts, negatives


def prompt_texts(prompts: object) -> tuple[str, ...]:
    """The texts of a prompt or a negative prompt."""
    assert isinstance(prompts, str | tuple)
    return (prompts,) if isinstance(prompts, str) else prompts
