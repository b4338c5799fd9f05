"""What a request may ask for, at most. The library itself has no such limits: there, the caller decides."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..params import HighRes, ImageToImage, Inpaint, TextToImage
from ..samplers import SAMPLERS
from .jobs import Work
from .settings import ServerSettings

MOST_TEXT = 20_000  # characters of a prompt
MOST_IMAGES = 4  # largest images that a request may have, by their pixels together
MOST_GUIDANCE = 1000.0
MOST_LORAS = 20
MOST_WEIGHT = 100.0  # of a LoRA
MOST_PARTS = 16  # of a prompt, joined by AND: each takes as long as a prompt alone


def check_work(work: Work, settings: ServerSettings) -> None:
    """Raise ValueError, one line, for work that exceeds a limit of the server."""
    request, params = work.request, work.request.params
    if isinstance(request.prompt, Tensor) or isinstance(request.negative, Tensor) or len(request.prompt) != 1:
        raise ValueError("a request has one prompt, as text")
    for text in (*request.prompt, request.negative, request.prompt_2, request.negative_2):
        if len(str(text or "")) > MOST_TEXT:
            raise ValueError(f"a prompt of {len(str(text)):,} characters is too long: at most {MOST_TEXT:,}")
        if not is_unicode(str(text or "")):
            raise ValueError("a prompt has half of a surrogate pair, which is no character: send it as UTF-8")
        if request.web_ui_prompts and len(parts := re.findall(r"\bAND\b", str(text or ""))) >= MOST_PARTS:
            raise ValueError(f"{len(parts) + 1} parts of a prompt joined by AND are too many: at most {MOST_PARTS}")
    if len(work.loras) > MOST_LORAS:
        raise ValueError(f"{len(work.loras)} LoRAs are too many: at most {MOST_LORAS}")
    if params.n > settings.max_batch:
        raise ValueError(f"{params.n} images at once are too many: this server generates at most {settings.max_batch}")
    usual = SAMPLERS[str(params.sampler)].steps if params.sampler in tuple(SAMPLERS) else 0  # DDPM has 1000
    for steps in (params.steps or usual, request.hires_steps if isinstance(request, HighRes) else None):
        if steps is not None and steps > settings.max_steps:
            raise ValueError(f"{steps} steps are too many: this server takes at most {settings.max_steps}, give fewer")
    if isinstance(request, ImageToImage | Inpaint):
        for name, image in (("image", request.image), ("mask", getattr(request, "mask", None))):
            if image is not None and image.width * image.height > settings.max_image_pixels:
                raise ValueError(
                    f"the {name} has {image.width}x{image.height} pixels: this server takes at most "
                    f"{settings.max_image_pixels:,}"
                )
    images = [request.image] if isinstance(request, ImageToImage | Inpaint) else []
    hints = {id(image): image for image in [*images, *(control.image for control in request.controls)]}
    if sum(image.width * image.height for image in hints.values()) > MOST_IMAGES * settings.max_image_pixels:
        raise ValueError(
            f"the images of the request have too many pixels together: this server takes at most "
            f"{MOST_IMAGES * settings.max_image_pixels:,}"
        )
    if params.guidance is not None and abs(params.guidance) > MOST_GUIDANCE:
        raise ValueError(f"guidance {params.guidance:g} is too large: at most {MOST_GUIDANCE:g}")
    check_size(request, 0, settings)


def check_size(request: TextToImage, native: int, settings: ServerSettings) -> None:
    """Raise ValueError for a request that generates too many pixels.

    native   the side at which the model works best, which it takes where the request has none; 0 if it is not known yet
    """
    height, width = request.params.height, request.params.width
    if isinstance(request, ImageToImage | Inpaint):  # a side that is not given follows from the proportions
        if height is None and width is not None:
            height = round(width * request.image.height / request.image.width)
        elif width is None and height is not None:
            width = round(height * request.image.width / request.image.height)
    height, width = native if height is None else height, native if width is None else width
    if isinstance(request, HighRes):
        height, width = int(height * request.hires), int(width * request.hires)
    if height * width > settings.max_pixels:
        raise ValueError(
            f"{width}x{height} pixels are too many: this server generates at most {settings.max_pixels:,}, for example "
            f"{int(settings.max_pixels**0.5)}x{int(settings.max_pixels**0.5)}"
        )


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError for too many LoRAs (name -> weight), or a weight that leaves no finite numbers."""
    if len(weights) > MOST_LORAS:
        raise ValueError(f"{len(weights)} LoRAs are too many: at most {MOST_LORAS}")
    for name, weight in weights.items():
        if not abs(weight) <= MOST_WEIGHT:
            raise ValueError(f"the weight {weight:g} of the LoRA {name} is too large: at most {MOST_WEIGHT:g}")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may have halves of surrogate pairs, such as "\\ud800"."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
