"""Answers in OpenAI's form: images as base64 or data: URLs, or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from PIL import Image

from ...imaging.files import png_bytes
from .. import http
from ..events import ServerEvent, follow
from ..http import ApiError
from ..jobs import Finished, Job
from .errors import as_json
from .parameters import Asked

log = logging.getLogger("sd.server")
MOST_EXIF = 30_000  # characters, two bytes each: a block of EXIF in a JPEG has less than 64 KiB
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769  # EXIF 2.32, 4.6.5 B: where other programs look for "parameters"


def encoded(image: Image.Image, asked: Asked, text: str | None = None) -> str:
    """An image in the format asked for, as base64; `text` is its "parameters"."""
    if asked.output_format == "png":
        return base64.b64encode(png_bytes(image, text)).decode("ascii")
    buffer, exif = io.BytesIO(), Image.Exif()
    if text and len(text) <= MOST_EXIF:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    image.convert("RGB").save(buffer, asked.output_format.upper(), quality=asked.quality, exif=exif)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def answer(jobs: Sequence[Job], asked: Asked) -> dict[str, Any]:
    """The answer of all jobs of a request. It encodes images: not to be called in the event loop."""
    finished = http.results(jobs)
    data = []
    for each in finished:
        for image, seed, text in zip(each.images, each.seeds, each.texts, strict=True):
            found = encoded(image, asked, text)
            url = f"data:image/{asked.output_format};base64,{found}"
            data.append({**({"url": url} if asked.as_url else {"b64_json": found}), "seed": seed})
    images = [image for each in finished for image in each.images]
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": asked.output_format,
        "size": size_of(images[0]) if images else None,
        "data": data,
        "usage": usage(asked, finished, images),
        "model": finished[0].model if finished else None,
        "notes": list(dict.fromkeys(note for each in finished for note in each.notes)),
    }


def size_of(image: Image.Image) -> str:
    """The size of an image as this interface writes it."""
    return f"{image.width}x{image.height}"


def usage(asked: Asked, finished: Sequence[Finished], images: Sequence[Image.Image]) -> dict[str, Any]:
    """What stands for tokens: those of the prompt, and the positions of the latents of images."""
    text = finished[0].tokens if finished else 0
    factor = finished[0].factor if finished else 8

    def latents(size: tuple[int, int]) -> int:
        return -(-size[0] // factor) * -(-size[1] // factor)

    sent = latents(asked.size_in) if asked.size_in else 0
    made = sum(latents(image.size) for image in images)
    return {
        "input_tokens": text + sent,
        "input_tokens_details": {"text_tokens": text, "image_tokens": sent},
        "output_tokens": made,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        "total_tokens": text + sent + made,
    }


async def events(jobs: list[Job], asked: Asked, task: str) -> AsyncIterator[ServerEvent | None]:
    """The images of a request as events: partial ones, then each that is complete.

    task   "image_generation" or "image_edit", with which the names of the events begin
    """
    first = 0  # number of the first image of a job
    try:
        for job in jobs:
            sent = 0
            async for event in follow(job):
                if event is None:
                    yield None
                elif event.previews and sent < asked.partials:
                    for i, preview in enumerate(event.previews):
                        shown = {"partial_image_index": sent, "image_index": first + i}
                        yield await _event(f"{task}.partial_image", preview, asked, shown)
                    sent += 1
            http.check_done([job])
            finished = job.finished
            assert isinstance(finished, Finished)
            for i, image in enumerate(finished.images):
                values: dict[str, Any] = {
                    "usage": usage(asked, [finished], [image]),
                    "image_index": first + i,
                    "seed": finished.seeds[i],
                    "model": finished.model,
                    "notes": finished.notes,
                }
                yield await _event(f"{task}.completed", image, asked, values, finished.texts[i])
            first += len(finished.images)
    except ApiError as error:
        yield ServerEvent("error", {"type": "error", **as_json(error)})
    except Exception as error:
        log.error("a stream of images failed", exc_info=error)
        yield ServerEvent("error", {"type": "error", **as_json(http.as_api_error(error))})


async def _event(
    name: str, image: Image.Image, asked: Asked, values: dict[str, Any], text: str | None = None
) -> ServerEvent:
    """An event with an image."""
    data = {
        "type": name,
        "b64_json": await asyncio.to_thread(encoded, image, asked, text),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": asked.output_format,
        "quality": "auto",
        "size": size_of(image),
    }
    return ServerEvent(name, {**data, **values})
