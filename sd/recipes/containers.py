"""The texts in an image file: PNG text chunks, the EXIF block, comments. Pixels are not decoded here.

    PNG          tEXt, zTXt and iTXt chunks, before or after the pixels; eXIf
    JPEG, WebP   EXIF: UserComment, ImageDescription, Make, Model, XPComment; the comment of a JPEG or GIF file
    .txt, .json  the whole file

A damaged file gives the texts that can still be read. Sizes are limited, so a small file never becomes a large text.

PNG: https://www.w3.org/TR/png-3/#11textinfo. EXIF: https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf, 4.6.5.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

from PIL import Image

from ..imaging.files import FORMATS, ImageFileError, read_bytes

MAX_TEXT = 1 << 20  # characters or bytes of one text
MAX_TEXTS = 64 << 10  # chunks of a PNG file that are looked at
PNG = b"\x89PNG\r\n\x1a\n"
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
DESCRIPTION, MAKE, MODEL, SOFTWARE, XP_COMMENT = 0x010E, 0x010F, 0x0110, 0x0131, 0x9C9C


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of a file: keyword -> text; "parameters" also for a comment in EXIF, and for a text file.

    Raises ImageFileError for a file that cannot be read, or is neither an image nor a text.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        raise ImageFileError(f"{path}: cannot be read: {error.strerror or error}; check its permissions") from None
    except ImageFileError as error:
        raise ImageFileError(f"{path}: {error}") from None
    suffix = Path(path).suffix.lower()
    if suffix in (".txt", ".json"):
        if len(data) > MAX_TEXT:
            raise ImageFileError(f"{path}: larger than {MAX_TEXT >> 20} MB, too large for the settings of an image")
        return {"prompt" if suffix == ".json" else "parameters": decoded(data)}
    return image_texts(data, str(path))


def image_texts(data: bytes, name: str = "image") -> dict[str, str]:
    """The same for the contents of an image file, called `name` in errors."""
    if data.startswith(PNG):
        return png_texts(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            exif = image.getexif()
            texts = exif_texts(exif)
            comment = image.info.get("comment")
    except Exception:  # decoders may raise anything for damaged data
        raise ImageFileError(f"{name}: not an image of a known format, or damaged; give the original file") from None
    if isinstance(comment, bytes | str) and "parameters" not in texts and len(comment) <= MAX_TEXT:
        texts["parameters"] = comment if isinstance(comment, str) else decoded(comment)
    return texts


def png_texts(data: bytes) -> dict[str, str]:
    """The texts of a PNG file; of two with one keyword, the last."""
    found: dict[str, str] = {}
    at = len(PNG)
    for _ in range(MAX_TEXTS):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length] if kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf") else b""
        at += 12 + length
        if kind == b"eXIf":
            found = _exif_block(body) | found
        elif body and len(body) <= MAX_TEXT + 200:
            keyword, _, rest = body.partition(b"\0")
            text = _chunk_text(kind, rest)
            if text is not None and len(keyword) < 80:
                found[keyword.decode("latin-1")] = text
        if kind == b"IEND":
            break
    return found


def _chunk_text(kind: bytes, rest: bytes) -> str | None:
    """The text of a chunk, after its keyword; None if it is damaged or too large."""
    if kind == b"tEXt":
        return decoded(rest)  # Latin-1 by the standard, but some programs write UTF-8
    if kind == b"zTXt":
        inflated = _inflated(rest[1:])
        return None if inflated is None else decoded(inflated)
    compressed, _, rest = rest[:1], rest[1:2], rest[2:]
    _language, _, rest = rest.partition(b"\0")
    _translated, _, text = rest.partition(b"\0")
    plain = _inflated(text) if compressed == b"\1" else text
    return None if plain is None else plain.decode("utf-8", "replace")


def _inflated(data: bytes) -> bytes | None:
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(data, MAX_TEXT)
    except zlib.error:
        return None
    return text if unpack.eof else None


def decoded(data: bytes) -> str:
    """A text of unknown encoding: UTF-16 with its mark, UTF-8, or Latin-1, which every byte is valid in."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _exif_block(block: bytes) -> dict[str, str]:
    exif = Image.Exif()
    try:
        exif.load(block)
        return exif_texts(exif)
    except Exception:  # whatever damaged data makes the parser raise
        return {}


def exif_texts(exif: Image.Exif) -> dict[str, str]:
    """The texts of an EXIF block; ComfyUI's begin with "prompt:" in any of several tags."""
    found: dict[str, str] = {}
    texts = {tag: exif.get(tag) for tag in (DESCRIPTION, MAKE, MODEL, SOFTWARE, XP_COMMENT)}
    texts[USER_COMMENT] = exif.get_ifd(EXIF_IFD).get(USER_COMMENT, exif.get(USER_COMMENT))
    big = exif.endian == ">"
    for tag, value in texts.items():
        if not isinstance(value, bytes | str) or not value or len(value) > 2 * MAX_TEXT:
            continue
        if isinstance(value, str):  # Pillow reads Latin-1, but most programs write UTF-8
            text = decoded(value.encode("latin-1")) if value.isascii() or max(value) < "\u0100" else value
        elif tag == XP_COMMENT:
            text = value.decode("utf-16-le", "replace")
        else:
            text = user_comment(value, big)
        text = text.strip("\0 \r\n")
        head, colon, rest = text.partition(":")
        if colon and head.strip().lower() in ("prompt", "workflow") and rest.lstrip().startswith("{"):
            found.setdefault(head.strip().lower(), rest.strip())
        elif tag == SOFTWARE:
            found["Software"] = text
        elif tag in (USER_COMMENT, XP_COMMENT) or (tag == DESCRIPTION and "Steps: " in text):
            found["parameters"] = text  # the last, UserComment, is the one that most programs write
    return found


def user_comment(value: bytes, big: bool = True) -> str:
    r"""The text of EXIF's UserComment: eight bytes name its encoding, but not the byte order of UTF-16.

    >>> user_comment(b"UNICODE\0" + "a cat".encode("utf-16-le")), user_comment(b"ASCII\0\0\0a cat")
    ('a cat', 'a cat')
    """
    prefix, body = value[:8], value[8:]
    if prefix.rstrip(b"\0").upper() in (b"ASCII", b"") and len(value) >= 8:
        return decoded(body)
    if prefix.upper().startswith(b"UNICODE"):
        return utf16(body, big)
    return utf16(value, big) if value[:200].count(0) > 50 else decoded(value)


def utf16(body: bytes, big: bool) -> str:
    """A text in UTF-16 of either byte order, or in UTF-8, which some programs write in its place."""
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        return body.decode("utf-16", "replace")
    # the settings are ASCII, whose high bytes are zero
    high, low = body[0::2].count(0), body[1::2].count(0)
    if high == low == 0:
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError:
            pass
    big = high > low if high != low else big
    return body.decode("utf-16-be" if big else "utf-16-le", "replace")
