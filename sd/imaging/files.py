"""Image files: read any PNG, JPEG, WebP, GIF, BMP or TIFF as a plain RGB image; write PNG files and animations.

Reading takes these steps. Each may fail with a one-line error:

    bytes     a regular file of at most MAX_BYTES, read once; the SHA-256 digest identifies it
    header    at most MAX_PIXELS, checked before decoding; one of six formats, so that no rare decoder runs
    pixels    of the first frame or page; any bit depth and colour model
    alpha     separated from the colours: a channel, a palette with transparency, or one transparent colour
    colours   8-bit RGB, converted to sRGB if there is a colour profile
    upright   rotated according to the EXIF orientation (1 to 8); all other metadata is dropped

The "parameters" text chunk of a PNG file has the format of AUTOMATIC1111's web interface, which most tools can read:
the prompt, a line "Negative prompt: ...", then a line of "Name: value" pairs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError, features

from ..files import new_file
from ..messages import printable
from .mask_forms import grey_mask, palette_labels

MAX_BYTES = 256 << 20
MAX_PIXELS = 64 << 20  # 8192 x 8192
Colour = tuple[int, int, int]
WHITE = (255, 255, 255)

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of files in folders
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw")  # of photos, not read
# The first bytes of files (regular expressions), for error messages: these formats, other images, the rest.
OURS = {
    "PNG": rb"\x89PNG", "JPEG": rb"\xff\xd8\xff", "WebP": rb"RIFF....WEBP", "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\x00{4}", "TIFF": rb"II[*+]\x00|MM\x00[*+]",
}  # fmt: skip
OTHERS = {
    "an SVG drawing": rb"\s*(<\?xml.*|<!--.*|<!DOCTYPE svg.*)?<svg", "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(hei|hev|mif1|msf1)", "a camera's raw data": rb"....ftypcrx|FUJIFILM|IIRO|IIRS|IIU\x00",
    "a video": rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ", "JPEG XL": rb"\xff\x0a|\x00{3}\x0cJXL ",
    "JPEG 2000": rb"\xff\x4f\xff\x51|\x00{3}\x0cjP  ", "a Photoshop document": rb"8BPS",
    "a GIMP document": rb"gimp xcf", "PDF": rb"%PDF", "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "a high dynamic range image": rb"v/1\x01|#\?RADIANCE",
    "a kind of image": rb"\x00\x00[\x01\x02]\x00|qoif|DDS |P[1-7]\s",
}  # fmt: skip
SAVE_AS = "save it as PNG or JPEG"
NOT_AN_IMAGE = {
    "an empty file; download or save it again": rb"\Z",
    "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`": rb"version https://git-lfs",
    "a web page, saved instead of the image; save the image itself": rb"(\xef\xbb\xbf)?\s*<",
    "an archive; unpack it first": rb"PK\x03\x04|PK\x05\x06|\x1f\x8b|7z\xbc\xaf|Rar!",
    "the `._` companion that macOS writes beside a file; give the file without `._`": rb"\x00\x05\x16\x07",
    "a text, not an image; give a PNG or JPEG file": rb"\xff\xfe|\xfe\xff|[^\x00-\x08\x0e-\x1f\x7f]+\Z",
    f"an unknown image format; {SAVE_AS}": rb"",
}

# EXIF orientation -> what makes the image upright. https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf, 4.6.4 A
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
PAGE_KIND, BITS, PHOTOMETRIC, ORIENTATION, SUB_PAGES = 254, 258, 262, 274, 330  # numbers of TIFF and EXIF tags

SEVERAL = "{}: has several frames or pages; the first one is used"
# Pillow's warnings are silenced while it reads. Warning filters are global to the process: two threads that change them
# at the same time could leave them changed.
_quiet = threading.Lock()


class ImageFileError(ValueError):
    """A file that cannot be used as an image. The message is one line: the path, the problem, a remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # a file name may contain line breaks or terminal control codes


class ImageFile(NamedTuple):
    """The contents of a file: `image`, RGB, upright, without metadata; `alpha` of the same size in mode L, or None if
    all pixels are opaque; `digest`, the SHA-256 of the file in hexadecimal."""

    image: Image.Image
    alpha: Image.Image | None
    digest: str


def read_image(path: str | os.PathLike[str], background: Colour | None = WHITE, managed: bool = True) -> ImageFile:
    """Read an image file and `flatten` it. If there are several frames or pages, it is the first, with a UserWarning.

    Raises ImageFileError for any file that cannot be read: missing, no permission, too large, damaged, unknown format.
    """
    colours, alpha, several, digest = _read(path, managed)
    if several:
        warnings.warn(SEVERAL.format(path), stacklevel=2)
    return ImageFile(_over(colours, alpha, background), alpha, digest)


def read_mask(path: str | os.PathLike[str]) -> Image.Image:
    """Read a mask file and `flatten_mask` it; warnings and errors as in `read_image`."""
    colours, alpha, several, _ = _read(path, managed=False, labels=True)
    if several:
        warnings.warn(SEVERAL.format(path), stacklevel=2)
    try:
        mask, notes = grey_mask(colours, alpha)
    except ValueError as error:
        raise ImageFileError(f"{path}: {error}") from None
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return mask


def image_from_bytes(data: bytes, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in the contents of a file: upright, RGB, or RGBA if any pixel is transparent.

    Raises ImageFileError, as `read_image`, and for more than `most_pixels`, which is seen before decoding.
    """
    try:
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
            if width * height > most_pixels:
                raise ImageFileError(f"{width} x {height} are too many pixels, the limit is {most_pixels:,}")
            colours, alpha, _ = _decode(data, True, False)
    except Exception as error:  # decoders may raise anything for damaged data
        raise ImageFileError(_problem(error, data)) from None
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def flatten(
    image: Image.Image, background: Colour | None = WHITE, managed: bool = True
) -> tuple[Image.Image, Image.Image | None]:
    """An image of any mode -> RGB, upright; and its alpha in mode L, None if all pixels are opaque.

    Transparent pixels are composited onto `background`; None keeps the colours stored beneath the transparency.
    Embedded colour profiles are applied if `managed`, broken ones ignored. 16-bit values are scaled: 65535 -> 255. If
    the white value is unknown (32-bit integers and floats), it is the smallest of 1, 255, 65535 and 2**31 - 1 that no
    value exceeds; floats may exceed it by a factor of two, as sharpening causes. Values outside of 0 to white are
    clipped.
    Raises ImageFileError for values that are not finite.
    """
    colours, alpha = _layers(image, managed=managed)
    return _over(colours, alpha, background), alpha


def flatten_mask(image: Image.Image, note: Callable[[str], object] | None = None) -> Image.Image:
    """A mask of any mode -> L, upright: labels, two colours, strokes on a transparent layer, and grey (mask_forms.py).

    `note` receives lines on how the mask was read, for example that values are taken as labels; if None, they become
    UserWarnings. Raises ValueError for an ambiguous mask.
    """
    mask, notes = grey_mask(*_layers(image, managed=False, labels=True))
    for text in notes:
        if note is None:
            warnings.warn(text, stacklevel=2)
        else:
            note(text)
    return mask


def _over(colours: Image.Image, alpha: Image.Image | None, background: Colour | None) -> Image.Image:
    if alpha is None or background is None:
        return colours
    sheet = Image.new("RGB", colours.size, background)
    sheet.paste(colours, mask=alpha)
    return sheet


def _read(
    path: str | os.PathLike[str], managed: bool = True, labels: bool = False
) -> tuple[Image.Image, Image.Image | None, bool, str]:
    """Colours in RGB, alpha or None, whether there are several frames, the digest of the file."""
    data = None
    try:
        data = read_bytes(path)
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return *_decode(data, managed, labels), hashlib.sha256(data).hexdigest()
    except Exception as error:  # decoders may raise anything for damaged data
        raise ImageFileError(f"{path}: {_problem(error, data)}") from None


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a path with a zero byte
        raise ImageFileError("no such file; check the path") from None
    if stat.S_ISDIR(found.st_mode):
        raise ImageFileError("a folder; give the image file inside it")
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device may never end
        raise ImageFileError("not an ordinary file; give an image file")
    if found.st_size > MAX_BYTES:
        raise ImageFileError(f"larger than {MAX_BYTES >> 20} MB; reduce the image")
    with open(path, "rb") as file:
        return file.read(MAX_BYTES)


def _problem(error: Exception, data: bytes | None) -> str:
    """The error message for the user. `data`: the contents of the file, if they could be read."""
    if isinstance(error, ImageFileError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory to read it; reduce the image"
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit, which is checked first
        return _too_many_pixels()
    if data is None:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}; check the disk and its permissions"

    def begins(starts: dict[str, bytes]) -> str | None:
        return next((name for name, start in starts.items() if re.match(start, data[:500], re.DOTALL)), None)

    if ours := begins(OURS):
        if ours == "WebP" and not features.check("webp"):
            return f"this Pillow was built without WebP; {SAVE_AS}"
        if isinstance(error, UnidentifiedImageError):  # in its header
            return f"a {ours} file that is damaged, truncated or of a rare kind; download it again or {SAVE_AS}"
        return (
            f"a {ours} file that is damaged or truncated ({str(error)[:100] or type(error).__name__}); "
            "download it again"
        )
    if other := begins(OTHERS):
        return f"{other}, which is not supported; {SAVE_AS}"
    return begins(NOT_AN_IMAGE) or str(error)  # the last pattern matches everything


def _too_many_pixels(size: str = "") -> str:
    return f"{size}too many pixels, the limit is {MAX_PIXELS:,}; reduce the image"


def _decode(data: bytes, managed: bool, labels: bool) -> tuple[Image.Image, Image.Image | None, bool]:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageFileError(_too_many_pixels(f"{width} x {height}: "))
    tags = _tags(image)
    if tags.get(PAGE_KIND, 0) & 1 and (SUB_PAGES in tags or getattr(image, "is_animated", False)):
        raise ImageFileError(f"its first page is a small preview, as in camera raw files; open it and {SAVE_AS}")
    layers = _layers(image, data[24] if image.format == "PNG" else 8, managed, labels)
    try:
        several = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photo with its preview
    except Exception:  # the first frame is intact, the next one is not
        several = True
    return *layers, several


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF file; empty for other formats."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _layers(
    image: Image.Image, bits: int = 8, managed: bool = True, labels: bool = False
) -> tuple[Image.Image, Image.Image | None]:
    """Colours in RGB and alpha in L, None if opaque; both upright and without metadata.

    bits     bit depth of the PNG file, before Pillow converted it to 8 or 16
    managed  whether to apply colour profiles
    labels   whether small values are labels, as in masks
    """
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not affect the pixels
        turn = None
    colours, alpha = _split(image, bits, labels)
    colours = _srgb(colours, image.info.get("icc_profile") if managed else None)
    if turn is not None:
        colours, alpha = colours.transpose(turn), alpha and alpha.transpose(turn)
    for layer in (colours, alpha):
        if layer is not None:
            layer.info = {}
    return colours, alpha


def _split(image: Image.Image, bits: int, as_labels: bool) -> tuple[Image.Image, Image.Image | None]:
    """Colours in any 8-bit mode without alpha, and alpha."""
    key, alpha = image.info.get("transparency"), None
    if image.mode in ("La", "RGBa"):  # multiplied by alpha
        image = image.convert(image.mode.upper())
    elif image.mode == "P" and as_labels and (labels := palette_labels(image)) is not None:
        image = labels
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    elif key is not None:  # the transparent colour, in the bit depth of the file
        if image.mode == "L" and bits < 8 and key < 2**bits:
            key = key * 255 // (2**bits - 1)
        elif image.mode == "RGB" and bits == 16:
            key = [value >> 8 for value in key]
        same = np.asarray(image) == (bool(key) if image.mode == "1" else np.array(key))
        alpha = Image.fromarray(np.where(same.all(-1) if same.ndim == 3 else same, 0, 255).astype(np.uint8))
    if alpha is not None and alpha.getextrema()[0] == 255:
        alpha = None
    return (_eight_bits(image, as_labels) if image.mode[0] in "IF" else image), alpha


def _eight_bits(image: Image.Image, as_labels: bool) -> Image.Image:
    """Modes I;16, I and F -> L."""
    numbers = np.asarray(image)
    tags = _tags(image)
    if as_labels and image.mode[0] == "I" and numbers.max() <= 255:  # labels, or 8 bits in a larger type
        white = 255
    elif image.mode.startswith("I;16") or image.format == "PNG":  # older Pillow versions read a 16-bit PNG as mode I
        white = 4095 if tags.get(BITS) == (12,) else 65535
    else:
        top, beyond = numbers.max(), 2 if image.mode == "F" else 1
        if not np.isfinite(numbers).all():
            raise ImageFileError(f"it has values that are infinite or NaN; {SAVE_AS}")
        white = next((white for white in (1, 255, 65535) if top <= beyond * white), 2**31 - 1)
    grey = (numbers.clip(0, white) * np.float32(255 / white) + np.float32(0.5)).astype(np.uint8)
    # 0 may be white in a TIFF file, which Pillow handles in other modes only
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Mode RGB in sRGB. An ICC profile that is broken or of another colour model is ignored."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):  # otherwise the values stay the same to the bit
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                if converted is not None:  # None only for a conversion in place
                    return converted
        except Exception:
            pass
    return image.convert("RGB")


def parameters(prompt: str, negative: str, settings: Mapping[str, object]) -> str:
    """The text of the "parameters" chunk; values with a comma, colon or line break, and those that
    are empty, are quoted as JSON, as readers expect.

    >>> print(parameters("a red house", "clouds", {"Steps": 20, "Sampler": "DDIM"}))
    a red house
    Negative prompt: clouds
    Steps: 20, Sampler: DDIM
    """
    pairs = []
    for name, value in settings.items():
        text = str(value)
        if not text or text != text.strip() or not text.isprintable() or any(c in text for c in ',:"'):
            text = json.dumps(text, ensure_ascii=False)
        pairs.append(f"{name}: {text}")
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else []), ", ".join(pairs)]
    return "\n".join(lines)


def png_bytes(image: Image.Image, text: str | None = None) -> bytes:
    """The contents of a PNG file, with `text` in its "parameters" chunk."""
    info = PngImagePlugin.PngInfo()
    if text:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"
        # UTF-8 where Latin-1 would do as well: some programs write UTF-8 into tEXt, so readers have to guess there
        (info.add_text if text.isascii() else info.add_itxt)("parameters", text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, text: str | None = None) -> None:
    """Write a new PNG file atomically, with `text` in its "parameters" chunk.

    Raises FileExistsError if the file exists, OSError if it cannot be written.
    """
    with new_file(path) as partial:
        partial.write_bytes(png_bytes(image, text))
