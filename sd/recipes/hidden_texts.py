"""Texts in the lowest bits of a PNG file's alpha channel, which survive where text chunks are removed.

NovelAI and an extension of the web UI ("stealth pnginfo") write them. One bit of each pixel, column by column:

    stealth_pngcomp   15 bytes, or stealth_pnginfo
    length            4 bytes, big-endian: the number of bits that follow
    text              UTF-8, with stealth_pngcomp in gzip's format
"""

from __future__ import annotations

import io
import json
import zlib

import numpy as np
from PIL import Image

from ..imaging.files import MAX_PIXELS
from .containers import MAX_TEXT

COMPRESSED, PLAIN = b"stealth_pngcomp", b"stealth_pnginfo"
GZIP = 16 + zlib.MAX_WBITS


def hidden_texts(data: bytes) -> dict[str, str]:
    """The texts hidden in the pixels of a PNG file: keyword -> text; none if it has none, or is damaged."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode != "RGBA" or image.width * image.height > MAX_PIXELS:
                return {}
            alpha = np.asarray(image.getchannel("A"))
    except Exception:  # decoders may raise anything for damaged data
        return {}
    read = np.packbits(alpha.T.ravel()[: 8 * (len(PLAIN) + 4 + MAX_TEXT)] & 1).tobytes()
    start, at = read[: len(PLAIN)], len(PLAIN) + 4
    if start not in (COMPRESSED, PLAIN):
        return {}
    body = read[at : at + int.from_bytes(read[at - 4 : at], "big") // 8]
    if start == COMPRESSED:
        try:
            body = zlib.decompressobj(GZIP).decompress(body, MAX_TEXT)
        except zlib.error:
            return {}
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("Comment"), str):  # NovelAI's PNG texts
        return {name: value for name, value in found.items() if isinstance(value, str)}
    return {"parameters": text}
