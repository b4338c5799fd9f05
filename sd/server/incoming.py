"""Images in requests: bounded before they are decoded, and never read from a path or an address.

>>> red = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
>>> image_of(red).size, image_of("data:image/png;base64," + red).mode
((1, 1), 'RGB')
>>> image_of("https://example.org/a.png")
Traceback (most recent call last):
ValueError: image: addresses are not fetched: send the image itself, as base64
"""

from __future__ import annotations

import base64
import binascii
import re

from PIL import Image

from ..imaging.files import ImageFileError, image_from_bytes

MOST_PIXELS = 4096 * 4096
DATA_URL = re.compile(r"data:[\w/+.-]*(?:;[\w=.-]+)*;base64,", re.ASCII)


def bytes_of(text: object, name: str = "image") -> bytes:
    """The bytes of a text in base64, or of a data URL. Raises ValueError, with the name, for anything else."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name}: expected an image as base64, got {type(text).__name__ if text else 'nothing'}")
    if re.match(r"\s*(https?|file|ftp)://", text[:40], re.IGNORECASE):
        raise ValueError(f"{name}: addresses are not fetched: send the image itself, as base64")
    if found := DATA_URL.match(text[:200]):
        text = text[found.end() :]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}: not valid base64") from None


def image_of(given: str | bytes, most_pixels: int = MOST_PIXELS, name: str = "image") -> Image.Image:
    """The image in a text in base64, or in the bytes of a file: upright, with its alpha channel if it has one.

    Raises ValueError, one line with the name, for what is no image, damaged, of an unusual format or too large.
    """
    data = given if isinstance(given, bytes) else bytes_of(given, name)
    try:
        return image_from_bytes(data, most_pixels)
    except ImageFileError as error:
        raise ValueError(f"{name}: {error}") from None
