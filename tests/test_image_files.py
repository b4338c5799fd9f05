"""Every kind of image file is read right, or refused with one line that says what it is; and what is written."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import random
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from sd.imaging import files as image_files
from sd.imaging.animation import save_animation
from sd.imaging.files import (
    MAX_BYTES,
    MAX_PIXELS,
    ImageFileError,
    flatten,
    flatten_mask,
    parameters,
    read_image,
    read_mask,
    save_png,
)

pytestmark = [  # unless a test expects it, nothing warns; colours are what most of these masks are told apart by
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:the mask has colours"),
]

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
DAMAGED = "a {} file that is damaged, truncated or of a rare kind; download it again or save it as PNG or JPEG"
TOO_MANY = "too many pixels, the limit is 67,108,864; reduce the image"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def written(folder: Path, data: bytes, name: str = "image") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def pixels(image: Image.Image) -> list:
    return np.asarray(image).tolist()


def row(*colours) -> Image.Image:
    """One row of pixels; RGBA if the colours have four numbers."""
    return Image.fromarray(np.array([colours], dtype=np.uint8))


def refusal(path: Path | str, read=read_image) -> str:
    """The message behind the file's name; one line."""
    with pytest.raises(ImageFileError) as error:
        read(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and text.isprintable()
    assert error.value.__cause__ is None and error.value.__suppress_context__
    return text.removeprefix(f"{path}: ")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, kind: int, rows: list[bytes], *more: bytes) -> bytes:
    """kind: 0 grey, 2 colours, 3 palette, 4 grey and alpha, 6 colours and alpha."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in rows))
    parts = chunk(b"IHDR", header), *more, chunk(b"IDAT", body), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(numbers: np.ndarray, order: str = "<", white_is_zero: bool = False, **tags: int) -> bytes:
    """Uncompressed, of one page; `tags`: t254=1, ... replace what is derived from the numbers (H, W) or (H, W, C)."""
    numbers = numbers.astype(numbers.dtype.newbyteorder(order))
    height, width, channels = (*numbers.shape, 1)[:3]
    bits, form = numbers.itemsize * 8, {"u": 1, "i": 2, "f": 3}[numbers.dtype.kind]
    entries = {
        256: [width], 257: [height], 258: [bits] * channels, 259: [1],
        262: [2 if channels > 2 else int(not white_is_zero)],
        273: [8], 277: [channels], 278: [height], 279: [numbers.nbytes], 339: [form] * channels,
    }  # fmt: skip
    entries |= {int(name[1:]): [value] for name, value in tags.items()}
    start = 8 + numbers.nbytes + numbers.nbytes % 2
    end, table, behind = start + 6 + 12 * len(entries), b"", b""
    for tag, values in sorted(entries.items()):
        kind, code = (4, "I") if max(values) > 65535 else (3, "H")
        value = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(value) > 4:
            value, behind = struct.pack(f"{order}I", end + len(behind)), behind + value
        table += struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", start)
    body = numbers.tobytes().ljust(start - 8, b"\0")
    return head + body + struct.pack(f"{order}H", len(entries)) + table + b"\0\0\0\0" + behind


def bmp_with_alpha(image: Image.Image) -> bytes:
    """Version 4: says which bits are alpha."""
    body = image.tobytes("raw", "BGRA")
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, *image.size, 1, 32, 3, len(body), 2835, 2835, 0, 0) + masks
    head = head.ljust(108, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body


def icc(space: bytes, gamma: float = 1.0, name: str = "linear") -> bytes:
    """A colour profile with the primaries of sRGB. https://www.color.org/specification/ICC.1-2022-05.pdf"""

    def numbers(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"
    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78 + (-len(text) - 78) % 4),
        b"wtpt": numbers(0.9642, 1.0, 0.8249),
    }
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"rXYZ": numbers(0.4361, 0.2225, 0.0139)}
        tags |= {b"gXYZ": numbers(0.3851, 0.7169, 0.0971), b"bXYZ": numbers(0.1431, 0.0606, 0.7141)}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4xI4s4s4s", start + len(body), 0x02100000, b"mntr", space, b"XYZ ").ljust(36, b"\0") + b"acsp"
    return head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061).ljust(60, b"\0") + table + body


RAMP = Image.fromarray(np.arange(0, 256, 5, dtype=np.uint8)[None])  # 52 greys, 0 to 255
STRIPES = row(RED, GREEN, BLUE, WHITE, BLACK, GREY)


# ------------------------------------------------------------------------------------------------- what is in a file


def opaque() -> dict[str, tuple[bytes, list]]:
    """Files without transparency, and the one row of pixels they show."""
    rgb, grey = pixels(STRIPES), pixels(RAMP.convert("RGB"))
    steps16 = np.array([[0, 128, 129, 256, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    grey16 = pixels(Image.fromarray((np.int64(steps16) * 255 / 65535).round().astype(np.uint8)).convert("RGB"))
    big16 = steps16.astype(">u2").tobytes()
    pair = [[BLACK, WHITE]]

    def shades(*values: int) -> list:
        return [[[value] * 3 for value in values]]

    def table(dtype: str, *values: float) -> np.ndarray:
        return np.array([values], dtype=dtype)

    sixteen = np.array([[[0, 32768, 65535], [65535, 256, 255]]], dtype=np.uint16)
    inked = Image.fromarray(np.array([[[0, 255, 255, 0], [0, 0, 0, 128], [0, 0, 0, 0]]], dtype=np.uint8), "CMYK")
    return {
        "RGB PNG": (encoded(STRIPES, "PNG"), rgb),
        "RGB BMP": (encoded(STRIPES, "BMP"), rgb),
        "RGBA BMP, whose fourth byte means nothing": (encoded(STRIPES.convert("RGBA"), "BMP"), rgb),
        "RGB WebP": (encoded(STRIPES, "WEBP", lossless=True), rgb),
        "RGB TIFF": (encoded(STRIPES, "TIFF"), rgb),
        "RGB LZW TIFF": (encoded(STRIPES, "TIFF", compression="tiff_lzw"), rgb),
        "RGBA, all opaque": (encoded(STRIPES.convert("RGBA"), "PNG"), rgb),
        "RGBX TIFF": (encoded(STRIPES.convert("RGBX"), "TIFF"), rgb),
        "palette PNG": (encoded(STRIPES.quantize(6), "PNG"), rgb),
        "palette GIF": (encoded(STRIPES.quantize(6), "GIF"), rgb),
        "palette BMP": (encoded(STRIPES.quantize(6), "BMP"), rgb),
        "palette TIFF": (encoded(STRIPES.quantize(6), "TIFF"), rgb),
        "palette, 2 bits": (png(3, 1, 2, 3, [b"\x18"], chunk(b"PLTE", bytes([*RED, *GREEN, *BLUE]))), [rgb[0][:3]]),
        "grey PNG": (encoded(RAMP, "PNG"), grey),
        "grey JPEG": (encoded(Image.new("L", (8, 8), 77), "JPEG"), [[[77] * 3] * 8] * 8),
        "grey GIF": (encoded(RAMP, "GIF"), grey),
        "grey TIFF": (encoded(RAMP, "TIFF"), grey),
        "grey, 4 bits": (png(4, 1, 4, 0, [b"\x01\xef"]), shades(0, 17, 238, 255)),
        "1 bit PNG": (encoded(Image.fromarray(np.array([[False, True]])), "PNG"), pair),
        "1 bit TIFF": (encoded(Image.fromarray(np.array([[False, True]])), "TIFF", compression="group4"), pair),
        "1 bit BMP": (encoded(Image.fromarray(np.array([[False, True]])), "BMP"), pair),
        "LA, all opaque": (encoded(RAMP.convert("LA"), "PNG"), grey),
        "16 bits PNG": (png(9, 1, 16, 0, [big16]), grey16),
        "16 bits PNG, dark": (png(2, 1, 16, 0, [b"\0\0\0\xff"]), shades(0, 1)),
        "16 bits TIFF": (tiff(steps16), grey16),
        "16 bits TIFF, big-endian": (tiff(steps16, ">"), grey16),
        "16 bits TIFF, big-endian, dark": (tiff(steps16[:, :3], ">"), shades(0, 0, 1)),
        "16 bits TIFF, white is 0": (tiff(65535 - steps16, white_is_zero=True), grey16),
        "16 bits colour PNG": (png(2, 1, 16, 2, [sixteen.astype(">u2").tobytes()]), [[[0, 128, 255], [255, 1, 0]]]),
        "16 bits colour TIFF": (tiff(sixteen), [[[0, 128, 255], [255, 1, 0]]]),
        "16 bits colour TIFF, big-endian": (tiff(sixteen, ">"), [[[0, 128, 255], [255, 1, 0]]]),
        "16 bits TIFF, signed": (tiff(table("i2", -5, 0, 257, 32767)), shades(0, 0, 1, 127)),
        "12 bits TIFF": (tiff(table("u1", 0x00, 0x08, 0x00), t256=2, t258=12), shades(0, 128)),
        "32 bits TIFF, 0 to 1": (tiff(table("i4", 0, 1)), shades(0, 255)),
        "32 bits TIFF, 0 to 255": (tiff(table("i4", -1000, 0, 1, 2, 255)), shades(0, 0, 1, 2, 255)),
        "32 bits TIFF, 0 to 65535": (tiff(table("i4", 0, 256, 257, 65535)), shades(0, 1, 1, 255)),
        "32 bits TIFF, beyond": (tiff(table("i4", 65536, 2**30, 2**31 - 1)), shades(0, 128, 255)),
        "float TIFF, 0 to 1": (tiff(table("f4", -0.5, 0, 0.5, 0.75, 1)), shades(0, 0, 128, 191, 255)),
        "float TIFF, a little above 1": (tiff(table("f4", 0, 0.5, 1, 1.25)), shades(0, 128, 255, 255)),
        "float TIFF, 0 to 255": (tiff(table("f4", 0, 1.4, 200, 255)), shades(0, 1, 200, 255)),
        "float TIFF, big-endian": (tiff(table("f4", 0, 1.4, 200, 300), ">"), shades(0, 1, 200, 255)),
        "float TIFF, all 0": (tiff(table("f4", 0, 0)), shades(0, 0)),
        "CMYK TIFF": (encoded(inked, "TIFF"), [[RED, [127] * 3, WHITE]]),
        "LAB TIFF": (tiff(np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8), t262=8), [[[1, 0, 1], [254, 255, 254]]]),
        "YCbCr TIFF": (tiff(np.array([[[0, 128, 128], [200, 128, 128]]], np.uint8), t262=6), shades(0, 200)),
        "1 x 1": (encoded(Image.new("RGB", (1, 1), GREEN), "PNG"), [[GREEN]]),
        "8000 x 20": (encoded(Image.new("RGB", (8000, 20), BLUE), "PNG"), [[BLUE] * 8000] * 20),
    }  # fmt: skip


OPAQUE = opaque()


# what Pillows before 12 read wrongly themselves
NEWER = ("YCbCr TIFF", "LA TIFF, multiplied", "palette and alpha TIFF")


def skip_if_newer(name: str) -> None:
    if name in NEWER and int(PIL.__version__.partition(".")[0]) < 12:
        pytest.skip("this Pillow cannot read it")


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_files(tmp_path, name):
    skip_if_newer(name)
    data, expected = OPAQUE[name]
    image = read_image(written(tmp_path, data), background=(1, 2, 3))
    assert np.array_equal(np.asarray(image.image), np.array(expected)), pixels(image.image)
    assert image.image.mode == "RGB" and type(image.image) is Image.Image
    assert image.alpha is None
    assert image.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "CMYK", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_jpeg_colours(tmp_path, mode, options):
    """CMYK too, whose numbers Adobe's programs write upside down."""
    image = Image.new("RGB", (64, 64), (200, 60, 30)).convert(mode)
    data = encoded(image, "JPEG", quality=95, **options)
    assert (b"Adobe" in data) == (mode == "CMYK")
    expected = [98] * 3 if mode == "L" else [200, 60, 30]
    assert np.abs(np.asarray(read_image(written(tmp_path, data)).image).astype(int) - expected).max() <= 3


def see_through() -> dict[str, tuple[bytes, list]]:
    """Files with transparency, and the one row of pixels with alpha that they show."""
    four = [(*RED, 255), (*GREEN, 128), (*BLUE, 1), (10, 20, 30, 0)]
    rgba, la = row(*four), Image.merge("LA", [row(*four).convert("L"), row(*four).getchannel("A")])
    greys = [[(76, 76, 76, 255), (150, 150, 150, 128), (29, 29, 29, 1), (18, 18, 18, 0)]]
    colours = bytes([*RED, *GREEN, *BLUE])
    first = [[(*RED, 0), (*GREEN, 255), (*BLUE, 255)]]
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    palette.putpalette(colours)
    palette_and_alpha = Image.merge("PA", [palette, Image.fromarray(np.array([[255, 128, 0]], dtype=np.uint8))])
    plte, key = chunk(b"PLTE", colours), struct.pack(">3H", *RED)
    ramp = [[(0, 0, 0, 255), (85, 85, 85, 0), (170, 170, 170, 255), (255, 255, 255, 255)]]
    deep = np.array([[0, 257, 258]], dtype=">u2").tobytes()
    deep_rgb = np.array([[[0x0910] * 3, [0x0710] * 3]], dtype=">u2").tobytes()
    return {
        "RGBA PNG": (encoded(rgba, "PNG"), [four]),
        "RGBA WebP": (encoded(rgba, "WEBP", lossless=True, exact=True), [four]),
        "RGBA TIFF": (encoded(rgba, "TIFF"), [four]),
        "RGBA BMP": (bmp_with_alpha(rgba), [four]),
        "RGBA TIFF, multiplied": (
            tiff(np.array([[[100, 50, 0, 128], [255, 0, 0, 255]]], np.uint8), t338=1),
            [[(199, 99, 0, 128), (*RED, 255)]],
        ),
        "LA PNG": (encoded(la, "PNG"), greys),
        "LA TIFF": (encoded(la, "TIFF"), greys),
        "LA TIFF, multiplied": (
            tiff(np.array([[[100, 128], [255, 255]]], np.uint8), t338=1), [[(199, 199, 199, 128), (*WHITE, 255)]],
        ),
        "LA PNG, 16 bits": (png(2, 1, 16, 4, [bytes([7, 0, 9, 0, 7, 0, 255, 255])]), [[(7, 7, 7, 9), (7, 7, 7, 255)]]),
        "RGBA PNG, 16 bits": (png(1, 1, 16, 6, [bytes([1, 0, 2, 0, 3, 0, 4, 0])]), [[(1, 2, 3, 4)]]),
        "palette, one transparent": (png(3, 1, 8, 3, [b"\0\1\2"], plte, chunk(b"tRNS", b"\0")), first),
        "palette, many transparent": (
            png(3, 1, 8, 3, [b"\0\1\2"], plte, chunk(b"tRNS", bytes([9, 200]))),
            [[(*RED, 9), (*GREEN, 200), (*BLUE, 255)]],
        ),
        "palette and alpha TIFF": (encoded(palette_and_alpha, "TIFF"), [[(*RED, 255), (*GREEN, 128), (*BLUE, 0)]]),
        "GIF": (encoded(palette, "GIF", transparency=0), first),
        "one colour": (png(3, 1, 8, 2, [colours], chunk(b"tRNS", key)), first),
        "one grey": (
            png(3, 1, 8, 0, [b"\5\6\7"], chunk(b"tRNS", b"\0\6")), [[(5, 5, 5, 255), (6, 6, 6, 0), (7, 7, 7, 255)]],
        ),
        "one grey of 2 bits": (png(4, 1, 2, 0, [b"\x1b"], chunk(b"tRNS", b"\0\1")), ramp),
        "one grey of 4 bits": (png(2, 1, 4, 0, [b"\x5f"], chunk(b"tRNS", b"\0\x05")), [ramp[0][1::2]]),
        "one grey of 1 bit": (png(2, 1, 1, 0, [b"\x40"], chunk(b"tRNS", b"\0\1")), [[(*BLACK, 255), (*WHITE, 0)]]),
        "one grey of 16 bits": (
            png(3, 1, 16, 0, [deep], chunk(b"tRNS", struct.pack(">H", 257))),
            [[(*BLACK, 255), (1, 1, 1, 0), (1, 1, 1, 255)]],
        ),
        "one colour of 16 bits": (
            png(2, 1, 16, 2, [deep_rgb], chunk(b"tRNS", struct.pack(">3H", *[0x0910] * 3))),
            [[(9, 9, 9, 0), (7, 7, 7, 255)]],
        ),
    }  # fmt: skip


SEE_THROUGH = see_through()


@pytest.mark.parametrize("background", [WHITE, (30, 200, 99)])
@pytest.mark.parametrize("name", SEE_THROUGH)
def test_transparent_files(tmp_path, name, background):
    skip_if_newer(name)
    data, expected = SEE_THROUGH[name]
    image = read_image(written(tmp_path, data), background)
    expected = np.array(expected)
    colours, alpha = expected[..., :3], expected[..., 3:]
    composite = np.rint((colours * alpha + np.array(background) * (255 - alpha)) / 255)
    assert np.array_equal(np.asarray(image.image), composite), pixels(image.image)
    assert image.image.mode == "RGB"
    if alpha.min() == 255:
        assert image.alpha is None
    else:
        assert image.alpha.mode == "L" and np.array_equal(np.asarray(image.alpha), alpha[..., 0])


def test_opaque_pixels_stay_to_the_bit_beside_transparent_ones(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    colours[::2, :, 3], colours[1::2, :, 3] = 255, 0
    image = read_image(written(tmp_path, encoded(Image.fromarray(colours), "PNG")), background=(3, 2, 1))
    assert np.array_equal(np.asarray(image.image)[::2], colours[::2, :, :3])
    assert (np.asarray(image.image)[1::2] == (3, 2, 1)).all()


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "I",
        "I;16",
        "I;16L",
        "I;16B",
        "I;16N",
        "F",
    ],
)
def test_flatten_takes_every_mode(mode):  # fmt: skip
    """Also those that no file has: white stays white, and the image that was given is not changed."""
    if mode == "LAB":
        image = Image.merge("LAB", [Image.new("L", (3, 2), v) for v in (255, 128, 128)])
    elif mode in ("La", "RGBa"):
        image = Image.new("RGBA", (3, 2), WHITE).convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode.startswith("I;16"):
        image = Image.new(mode, (3, 2), 65535)
    elif mode in ("I", "F"):
        image = Image.new(mode, (3, 2), 255)
    elif mode == "PA":
        image = Image.new("P", (3, 2), 0)
        image.putpalette(WHITE)
        image = image.convert("PA")
    else:
        image = Image.new("RGB", (3, 2), WHITE).convert(mode)
    assert image.mode == mode
    image.info["comment"] = "kept"
    before = image.tobytes()
    rgb, alpha = flatten(image)
    white = [254, 255, 254] if mode == "LAB" else list(WHITE)  # so says Little CMS
    assert rgb.mode == "RGB" and pixels(rgb) == [[white] * 3] * 2 and alpha is None
    assert rgb is not image and rgb.info == {} and image.info == {"comment": "kept"} and image.tobytes() == before
    assert pixels(flatten_mask(image)) == [[255] * 3] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(tmp_path, value):
    path = written(tmp_path, tiff(np.array([[0.5, value]], dtype="f4")))
    text = "it has values that are infinite or NaN; save it as PNG or JPEG"
    assert refusal(path) == refusal(path, read_mask) == text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_nothing_is_carried_along(tmp_path, kind):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    data = encoded(RAMP.convert("RGB"), kind, exif=exif, icc_profile=icc(b"RGB ", name="sRGB"), dpi=(72, 72))
    assert b"a camera" in data
    image = read_image(written(tmp_path, data)).image
    assert image.info == {} and not image.getexif() and image.format is None
    assert b"a camera" not in encoded(image, "PNG")


# --------------------------------------------------------------------------------------------------- held otherwise


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera that is held so stores what it sees."""
    return {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


CORNERS = np.full((32, 64, 3), 255, dtype=np.uint8)  # red is above left, blue above right
CORNERS[:16, :16], CORNERS[:16, 48:] = RED, BLUE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "TIFF, LZW", "TIFF, two pages"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, kind, orientation):
    stored = Image.fromarray(np.ascontiguousarray(turned(CORNERS, orientation)))
    options = {
        "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "TIFF, LZW": {"compression": "tiff_lzw"},
        "TIFF, two pages": {"save_all": True, "append_images": [stored]},
    }.get(kind, {})  # fmt: skip
    path = written(tmp_path, encoded(stored, kind.partition(",")[0], exif=oriented(orientation), **options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if "two" in kind else "error", message=".*the first one is used")
        image = read_image(path).image
        stored = stored.convert("L")
        options |= {"append_images": [stored]} if "two" in kind else {}
        mask = read_mask(
            written(tmp_path, encoded(stored, kind.partition(",")[0], exif=oriented(orientation), **options))
        )
    assert image.size == mask.size == (64, 32)
    assert np.abs(np.asarray(image).astype(int) - CORNERS).max() <= (8 if kind == "JPEG" else 0)
    assert abs(mask.getpixel((2, 2)) - 76) <= 2 and abs(mask.getpixel((61, 2)) - 29) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_alpha(tmp_path, orientation):
    upright = np.dstack([CORNERS, np.where(np.arange(64) < 20, 0, 255).repeat(32).reshape(64, 32).T.astype(np.uint8)])
    stored = Image.fromarray(np.ascontiguousarray(turned(upright, orientation)))
    image = read_image(written(tmp_path, encoded(stored, "PNG", exif=oriented(orientation))))
    assert np.array_equal(np.asarray(image.alpha), upright[..., 3])
    assert np.array_equal(np.asarray(image.image)[:, 20:], CORNERS[:, 20:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_flatten_turns_opened_files_once(tmp_path, kind):
    stored = Image.fromarray(np.ascontiguousarray(turned(CORNERS, 6)))
    with Image.open(written(tmp_path, encoded(stored, kind, exif=oriented(6)))) as image:
        assert flatten(image)[0].size == (64, 32)
        assert flatten(ImageOps.exif_transpose(image))[0].size == (64, 32)
        assert flatten(flatten(image)[0])[0].size == (64, 32)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist(tmp_path, orientation):
    path = written(tmp_path, encoded(Image.fromarray(CORNERS), "PNG", exif=oriented(orientation)))
    assert np.array_equal(np.asarray(read_image(path).image), CORNERS)


JPEG_OR_WEBP = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"", b"\0", b"garbage", b"II*\0\xff\xff\xff\x7f", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3",
        b"II*\0\x08\0\0\0\1\0\x12\1\5\0\1\0\0\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0a\0\0\0\0\0\0\0",
        bytes(range(256)) * 4,
    ],
    ids=range(9),
)  # fmt: skip
def test_broken_exif_does_not_stop_the_reading(tmp_path, kind, exif):
    image = Image.fromarray(CORNERS)
    if kind == "PNG":
        data = encoded(image, kind)
        data = data[:33] + chunk(b"eXIf", exif) + data[33:]
    else:
        data = encoded(image, kind, exif=b"Exif\0\0" + exif, **JPEG_OR_WEBP[kind])
    shown = np.asarray(read_image(written(tmp_path, data)).image).astype(int)
    assert np.abs(shown - CORNERS).max() <= (8 if kind == "JPEG" else 0)


# ---------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize(
    "mode, space", [("RGB", b"RGB "), ("RGBA", b"RGB "), ("P", b"RGB "), ("L", b"GRAY"), ("LA", b"GRAY")]
)
def test_colour_profiles_are_obeyed(tmp_path, mode, space):
    """A linear 128 is 188 in sRGB. A mask's numbers are no colours."""
    fill = {"L": 128, "LA": (128, 90), "RGBA": (*GREY, 90)}.get(mode, GREY)
    image = Image.new(mode.replace("P", "RGB"), (4, 4), fill)
    image = image.quantize(2) if mode == "P" else image
    path = written(tmp_path, encoded(image, "PNG", icc_profile=icc(space)))
    image = read_image(path, background=BLACK)
    share = 90 / 255 if "A" in mode else 1
    assert np.abs(np.asarray(image.image) - 188 * share).max() <= 1
    assert (image.alpha is not None) == ("A" in mode)
    assert set(np.asarray(read_mask(path)).flat) == {90 if "A" in mode else 128}


def test_inks_are_converted_by_their_profile(tmp_path):
    """A profile of CMYK needs tables; here it is enough that one of the wrong kind is not applied."""
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    path = written(tmp_path, encoded(image, "TIFF", icc_profile=icc(b"RGB ")))
    assert read_image(path).image.getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    "profile",
    [
        b"", b"garbage", icc(b"RGB ")[:200], icc(b"GRAY"), bytes(128),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        icc(b"RGB ", 2.2, "sRGB IEC61966-2.1"),
    ],
    ids=["empty", "garbage", "cut off", "of grey", "zeros", "Pillow's sRGB", "sRGB"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_these_profiles_change_nothing(tmp_path, profile, kind):
    colours = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    path = written(tmp_path, encoded(Image.fromarray(colours), kind, icc_profile=profile, **options))
    assert np.array_equal(np.asarray(read_image(path).image), colours)


def test_without_lcms(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("The _imagingcms C module is not installed")

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    path = written(tmp_path, encoded(Image.new("RGB", (2, 2), GREY), "PNG", icc_profile=icc(b"RGB ")))
    assert read_image(path).image.getpixel((0, 0)) == GREY


# ------------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("colour", [BLACK, WHITE, RED, (37, 99, 235)])
@pytest.mark.parametrize("nothing", [BLACK, WHITE])
def test_strokes_of_one_colour_on_nothing_are_the_mask(tmp_path, colour, nothing):
    """The faint edges as a browser's canvas makes them: the colour multiplied by alpha, rounded, and divided again."""
    alpha = np.arange(256)[None]
    shaded = np.rint(np.rint(np.array(colour) * alpha[..., None] / 255) / np.maximum(alpha, 1)[..., None] * 255)
    shaded = np.where(alpha[..., None] == 0, nothing, shaded)
    image = Image.fromarray(np.dstack([shaded, alpha]).astype(np.uint8))
    assert np.array_equal(np.asarray(read_mask(written(tmp_path, encoded(image, "PNG")))), alpha)


def test_other_masks(tmp_path):
    def mask(image: Image.Image, kind: str = "PNG", **options) -> list:
        found = read_mask(written(tmp_path, encoded(image, kind, **options)))
        assert found.mode == "L" and type(found) is Image.Image
        return pixels(found)[0]

    assert mask(row((*WHITE, 255), (*BLACK, 255), (*WHITE, 0), (*WHITE, 51))) == [255, 0, 0, 51]  # lies on black
    assert mask(row((*WHITE, 255), (*RED, 255), (9, 9, 9, 0))) == [255, 76, 0]
    assert mask(row((*BLACK, 0), (*RED, 0))) == [0, 0]  # nothing was painted
    assert mask(row((*BLACK, 9), (*RED, 100))) == [9, 100]  # faint strokes only
    assert mask(row((*BLACK, 255), (*BLACK, 255))) == [0, 0]  # opaque: its colours count
    assert mask(STRIPES) == [76, 150, 29, 255, 0, 128]
    assert mask(RAMP) == mask(RAMP, "GIF") == mask(RAMP, "TIFF") == pixels(RAMP)[0]
    assert mask(STRIPES.quantize(6)) == [76, 150, 29, 255, 0, 128]
    assert mask(Image.fromarray(np.array([[True, False]]))) == [255, 0]
    assert mask(Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))) == [0, 128, 255]
    assert mask(row(BLACK, WHITE).quantize(2), "GIF", transparency=0)[0] in (0, 255)


def test_a_stroke_in_a_gif_is_its_alpha(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 1, 0]], dtype=np.uint8), "P")
    image.putpalette([*WHITE, *BLACK])
    path = written(tmp_path, encoded(image, "GIF", transparency=0))
    assert pixels(read_mask(path)) == [[0, 255, 255, 0]]


# ---------------------------------------------------------------------------------------------------- several frames


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_of_several_frames_the_first_is_used(tmp_path, kind, read):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = written(tmp_path, encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    with pytest.warns(UserWarning) as told:
        found = read(path)
    about_frames = [w for w in told if "colours" not in str(w.message)]
    assert [str(w.message) for w in about_frames] == [f"{path}: has several frames or pages; the first one is used"]
    assert about_frames[0].filename == __file__
    image = found if read is read_mask else found.image
    assert image.getpixel((9, 9)) == (76 if read is read_mask else RED)


def test_a_damaged_second_frame_does_no_harm(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    path = written(tmp_path, data[: data.rindex(b"\x2c") + 5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(path).image.getpixel((3, 3)) == RED


def test_photos_with_a_preview_behind_them_are_one_image(tmp_path):
    """MPO: what many phones write under the name .jpg."""
    photo = Image.new("RGB", (32, 32), (200, 60, 30))
    data = encoded(photo, "MPO", save_all=True, append_images=[photo.resize((8, 8))])
    assert read_image(written(tmp_path, data)).image.size == (32, 32)


def test_camera_raw_files_are_not_their_previews(tmp_path):
    preview = np.full((4, 4, 3), 9, dtype=np.uint8)
    text = "its first page is a small preview, as in camera raw files; open it and save it as PNG or JPEG"
    assert refusal(written(tmp_path, tiff(preview, t254=1, t330=8))) == text
    assert read_image(written(tmp_path, tiff(preview, t254=1))).image.size == (4, 4)  # there is nothing else in it


# ---------------------------------------------------------------------------------------------------------- refusals

KINDS = {
    "PNG": {"kind": "PNG"}, "JPEG": {"kind": "JPEG"}, "progressive JPEG": {"kind": "JPEG", "progressive": True},
    "GIF": {"kind": "GIF"}, "WebP": {"kind": "WEBP"}, "lossless WebP": {"kind": "WEBP", "lossless": True},
    "BMP": {"kind": "BMP"}, "TIFF": {"kind": "TIFF"}, "LZW TIFF": {"kind": "TIFF", "compression": "tiff_lzw"},
}  # fmt: skip
NOISE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_files_that_are_cut_off(tmp_path, name, share):
    data = encoded(NOISE, **KINDS[name])
    path = written(tmp_path, data[: max(int(share * len(data)), 16)])
    kind = name.split()[-1]
    for read in (read_image, read_mask):
        text = refusal(path, read)
        if text != DAMAGED.format(kind):
            assert text.startswith(f"a {kind} file that is damaged or truncated (") and text.endswith(
                "); download it again"
            )


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "an empty file; download or save it again"),
        (b"an image of a cat\n", "a text, not an image; give a PNG or JPEG file"),
        ("ein Bild \u4e2d\u6587".encode() * 999, "a text, not an image; give a PNG or JPEG file"),
        ("a text".encode("utf-16"), "a text, not an image; give a PNG or JPEG file"),
        (b"BMW and other cars", "a text, not an image; give a PNG or JPEG file"),
        (
            b"<!DOCTYPE html><html><body>404</body>",
            "a web page, saved instead of the image; save the image itself",
        ),
        (b"\xef\xbb\xbf\n <html>", "a web page, saved instead of the image; save the image itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`",
        ),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF, which is not supported; save it as PNG or JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC, which is not supported; save it as PNG or JPEG"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "a camera's raw data, which is not supported; save it as PNG or JPEG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a video, which is not supported; save it as PNG or JPEG"),
        (b"\xff\x0a\xfa\x7f\1", "JPEG XL, which is not supported; save it as PNG or JPEG"),
        (b"8BPS\0\1", "a Photoshop document, which is not supported; save it as PNG or JPEG"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF, which is not supported; save it as PNG or JPEG"),
        (b"<svg xmlns='x'/>", "an SVG drawing, which is not supported; save it as PNG or JPEG"),
        (b"<?xml version='1.0'?>\n<svg/>", "an SVG drawing, which is not supported; save it as PNG or JPEG"),
        (b"gimp xcf v011\0", "a GIMP document, which is not supported; save it as PNG or JPEG"),
        (b"v/1\x01\2\0\0\0", "a high dynamic range image, which is not supported; save it as PNG or JPEG"),
        (b"P6 1 1 255 abc", "a kind of image, which is not supported; save it as PNG or JPEG"),
        (b"PK\x03\x04\x14\0", "an archive; unpack it first"),
        (b"\x1f\x8b\x08\0", "an archive; unpack it first"),
        (
            b"\x00\x05\x16\x07\0\2\0\0Mac OS X",
            "the `._` companion that macOS writes beside a file; give the file without `._`",
        ),
        (b"\x7fELF\2\1\1\0\0", "an unknown image format; save it as PNG or JPEG"),
        (bytes(1000), "an unknown image format; save it as PNG or JPEG"),
        (b"\x89PNG\r\n\x1a\n", DAMAGED.format("PNG")),
        (b"\xff\xd8\xff", DAMAGED.format("JPEG")),
        (b"GIF89a", DAMAGED.format("GIF")),
        (b"II*\0\x08\0\0\0", DAMAGED.format("TIFF")),
    ],
)
def test_what_is_not_a_image_is_named(tmp_path, data, text):
    path = written(tmp_path, data, "image.png")
    assert refusal(path) == refusal(path, read_mask) == text


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_what_is_not_a_file(tmp_path, read):
    missing = "no such file; check the path"
    file = written(tmp_path, b"x")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert refusal(tmp_path, read) == "a folder; give the image file inside it"
    assert refusal(tmp_path / "missing.png", read) == missing
    assert refusal(file / "below.png", read) == missing
    assert refusal(tmp_path / "dangling", read) == missing
    assert refusal("", read) == missing
    with pytest.raises(ImageFileError, match=r"a\\x00b: no such file"):
        read("a\0b")
    assert refusal(tmp_path / ("x" * 5000), read).startswith("cannot be read: ")
    with pytest.raises(ImageFileError) as error:
        read(tmp_path / "two\nlines \x1b[31m.png")
    assert str(error.value) == f"{tmp_path}/two\\nlines \\x1b[31m.png: {missing}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_pipes_and_devices_are_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    assert refusal(tmp_path / "pipe.png", read) == "not an ordinary file; give an image file"
    if os.path.exists("/dev/zero"):
        assert refusal("/dev/zero", read) == "not an ordinary file; give an image file"


@pytest.mark.parametrize(
    "error, text",
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("odd"), "odd"),
    ],
)
def test_files_that_the_system_does_not_give(tmp_path, monkeypatch, error, text):
    def refuse(*_):
        raise error

    monkeypatch.setattr(image_files, "open", refuse, raising=False)
    assert refusal(written(tmp_path, b"x")) == f"cannot be read: {text}; check the disk and its permissions"


def test_symbolic_links_and_odd_names_are_fine(tmp_path, monkeypatch):
    written(tmp_path, encoded(STRIPES, "PNG"), "日本 {0} %s.jpeg")
    (tmp_path / "link").symlink_to("日本 {0} %s.jpeg")
    monkeypatch.chdir(tmp_path)
    for path in ("link", Path("link"), "日本 {0} %s.jpeg"):
        assert pixels(read_image(path).image) == pixels(STRIPES)


def test_too_many_bytes(tmp_path):
    path = written(tmp_path, encoded(STRIPES, "PNG"))
    os.truncate(path, MAX_BYTES + 1)  # takes no room on the disk
    start = time.process_time()
    assert refusal(path) == refusal(path, read_mask) == "larger than 256 MB; reduce the image"
    assert time.process_time() - start < 0.1


def bombs() -> dict[str, bytes]:
    jpeg = encoded(Image.new("RGB", (8, 8)), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    bmp = encoded(Image.new("RGB", (8, 8)), "BMP")
    gif = encoded(Image.new("L", (8, 8)), "GIF")
    webp = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16382 | 16382 << 14)
    return {
        "PNG": png(60000, 60000, 8, 2, [b""]),
        "PNG, below Pillow's limit": png(9000, 9000, 8, 2, [b""]),
        "PNG, where Pillow would warn": png(10000, 10000, 8, 2, [b""]),
        "JPEG": jpeg[:at] + struct.pack(">HH", 60000, 60000) + jpeg[at + 4 :],
        "BMP": bmp[:18] + struct.pack("<ii", 60000, 60000) + bmp[26:],
        "GIF": gif[:6] + struct.pack("<HH", 60000, 60000) + gif[10:],
        "WebP": bytes(webp),
        "TIFF": tiff(np.zeros((1, 1, 3), np.uint8), t256=60000, t257=60000, t278=60000),
        "LZW TIFF": tiff(np.zeros((1, 1, 3), np.uint8), t256=60000, t257=60000, t278=60000, t259=5),
    }


@pytest.mark.parametrize("name", bombs())
@pytest.mark.parametrize("limit", ["Pillow's limit", "no limit of Pillow's"])
def test_too_many_pixels(tmp_path, monkeypatch, name, limit):
    if limit != "Pillow's limit":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = written(tmp_path, bombs()[name])
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # no pixel is decoded
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    gc.collect()  # what other tests left is not for this one to clean up
    start = time.process_time()
    text = refusal(path)
    assert time.process_time() - start < 1
    side = "9000" if "below" in name else "10000" if "warn" in name else "16383" if name == "WebP" else "60000"
    assert text in (TOO_MANY, f"{side} x {side}: {TOO_MANY}")
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_where_the_limit_of_pixels_is(tmp_path, monkeypatch):
    assert MAX_PIXELS == 8192 * 8192
    monkeypatch.setattr(image_files, "MAX_PIXELS", 100)
    for size in ((10, 10), (100, 1), (1, 100)):
        assert read_image(written(tmp_path, encoded(Image.new("L", size), "PNG"))).image.size == size
    text = "101 x 1: too many pixels, the limit is 100; reduce the image"
    assert refusal(written(tmp_path, encoded(Image.new("L", (101, 1)), "PNG"))) == text


def test_bombs_of_other_kinds(tmp_path):
    """A little file that unpacks to much: a text (zTXt), a profile (iCCP), or more pixels than the header says."""
    zeros = zlib.compress(bytes(100 << 20), 9)
    line = bytes([*RED, *GREEN])
    for name in (b"zTXt", b"iCCP"):
        text = refusal(written(tmp_path, png(2, 1, 8, 2, [line], chunk(name, b"name\0\0" + zeros))))
        assert text.lower().startswith("a png file that is damaged or truncated (decompressed data too large")
    for data in (
        png(2, 1, 8, 2, [line], chunk(b"tEXt", b"Comment\0" + b"x" * (3 << 20))),  # large, but it does not grow
        png(2, 1, 8, 2, [line] + [bytes(1 << 20)] * 100),
    ):
        assert pixels(read_image(written(tmp_path, data)).image) == [[list(RED), list(GREEN)]]


ERRORS = [
    OSError("x"), OSError(22, "Invalid"), SyntaxError("x"), ValueError("x"), struct.error("x"), EOFError(),
    IndexError("x"), TypeError("x"), KeyError("x"), OverflowError("x"), zlib.error("x"), AttributeError("x"),
    RecursionError("x"), AssertionError(), ZeroDivisionError("x"), RuntimeError("x"), NotImplementedError("x"),
    UnicodeDecodeError("a", b"", 0, 1, "x"), UserWarning("x"), Image.DecompressionBombWarning("x"),
    Exception("two\nlines", 3),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("place", ["open", "load"])
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, error, place):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(*((Image, "open") if place == "open" else (ImageFile.ImageFile, "load")), fail)
    text = refusal(written(tmp_path, encoded(STRIPES, "PNG")))
    assert text.startswith("a PNG file that is damaged or truncated (")


def test_what_is_no_fault_of_the_file(tmp_path, monkeypatch):
    path = written(tmp_path, encoded(STRIPES, "PNG"))
    for error, text in (
        (MemoryError(), "not enough memory to read it; reduce the image"),
        (Image.DecompressionBombError("x"), TOO_MANY),
    ):
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert refusal(path) == text
    for error in (KeyboardInterrupt, SystemExit):
        monkeypatch.setattr(Image, "open", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            read_image(path)


def test_a_pillow_without_webp(tmp_path, monkeypatch):
    path = written(tmp_path, encoded(STRIPES, "WEBP"))
    monkeypatch.setattr(image_files.features, "check", lambda name: False)
    monkeypatch.setattr(image_files, "FORMATS", ("PNG",))
    assert refusal(path) == "this Pillow was built without WebP; save it as PNG or JPEG"
    with pytest.raises(ValueError, match=r"a\.webp: this Pillow was built without WebP; use \.gif$"):
        save_animation([STRIPES], tmp_path / "a.webp")


def test_threads_do_not_silence_each_other(tmp_path):
    path = written(tmp_path, encoded(NOISE.resize((300, 300)), "PNG"))
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [read_image(path) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# ------------------------------------------------------------------------------------------------------ broken files


def samples() -> list[bytes]:
    """Small files of every format, with what they may have in them."""
    image, exif, profile = NOISE.resize((12, 9)), oriented(6), icc(b"RGB ")
    shades, pair = image.quantize(16), {"save_all": True, "append_images": [Image.new("RGB", (12, 9), RED)]}
    clear = image.convert("RGBA")
    clear.putalpha(image.convert("L"))
    return [
        encoded(image, "PNG", exif=exif, icc_profile=profile), encoded(clear, "PNG"), encoded(image, "PNG", **pair),
        encoded(shades, "PNG", transparency=3), encoded(image.convert("I;16"), "PNG"),
        png(4, 1, 2, 0, [b"\x1b"], chunk(b"tRNS", b"\0\1")),
        encoded(image, "JPEG", exif=exif, icc_profile=profile), encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "MPO", save_all=True, append_images=[clear.convert("RGB")]),
        encoded(image, "GIF", **pair), encoded(shades, "GIF", transparency=2),
        encoded(image, "WEBP", exif=exif, icc_profile=profile), encoded(clear, "WEBP", lossless=True),
        encoded(image, "WEBP", **pair),
        encoded(image, "BMP"), encoded(shades, "BMP"), bmp_with_alpha(clear),
        encoded(image, "TIFF", exif=exif, icc_profile=profile), encoded(clear, "TIFF", compression="tiff_lzw"),
        encoded(image, "TIFF", compression="tiff_deflate", **pair), encoded(image.convert("F"), "TIFF"),
        encoded(image.convert("CMYK"), "TIFF", compression="packbits"),
        encoded(image.convert("1"), "TIFF", compression="group4"), encoded(image.convert("LAB"), "TIFF"),
        tiff(np.asarray(image.convert("I;16")), ">", white_is_zero=True),
    ]  # fmt: skip


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A few bytes changed, put in, taken out, or taken from another file; checksums of PNG chunks put right again."""
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        # headers are what decoders trust, so they are hit more often
        at = rng.randrange(min(len(broken), rng.choice((64, 256, 1 << 20)))) if broken else 0
        what = rng.randrange(8)
        if what < 3:
            broken[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])
        elif what == 3:
            broken[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\1\0"))
        elif what == 4:
            del broken[at : at + rng.randrange(1, 20)]
        elif what == 5:
            broken[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif what == 6:
            del broken[at + rng.randrange(1 + len(broken)) :]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            broken[at : at + 20] = other[start : start + 20]
    if broken[:4] == b"\x89PNG" and rng.random() < 0.8:
        at = 8
        while at + 12 <= len(broken):
            end = at + 8 + int.from_bytes(broken[at : at + 4], "big")
            if end + 4 > len(broken):
                break
            broken[end : end + 4] = zlib.crc32(broken[at + 4 : end]).to_bytes(4, "big")
            at = end + 4
    return bytes(broken)


def fuzz(folder: Path, seed: int, rounds: int) -> dict[str, int]:
    """Read broken files; how many were read, and refused."""
    rng, files, counts = random.Random(seed), samples(), {"read": 0, "refused": 0}
    path = folder / f"broken{seed}"
    for number in range(rounds):
        path.write_bytes(mutated(files[number % len(files)], rng, files))
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                if number // len(files) % 4:
                    image = read_image(path)
                    images = [image for image in (image.image, image.alpha) if image is not None]
                    assert [image.mode for image in images] == ["RGB", "L"][: len(images)]
                    assert (
                        len({image.size for image in images}) == 1
                        and 0 < images[0].width * images[0].height <= MAX_PIXELS
                    )
                else:
                    assert read_mask(path).mode == "L"
            counts["read"] += 1
        except ImageFileError as error:
            assert (
                str(error).startswith(f"{path}: ")
                and str(error).isprintable()
                and len(str(error)) < 400 + len(str(path))
            )
            counts["refused"] += 1
        for warning in told:
            text = str(warning.message)
            assert text == f"{path}: has several frames or pages; the first one is used" or "has colours" in text
    return counts


def test_broken_files_are_read_or_refused(tmp_path):
    start = time.process_time()
    counts = fuzz(tmp_path, seed=7, rounds=600)
    assert min(counts.values()) > 100, counts
    assert time.process_time() - start < 10


# ------------------------------------------------------------------------------------------------------ what is written


def test_parameters_have_the_form_that_tools_read():
    text = parameters("a cat", "blurry", {"Steps": 20, "Sampler": "DDIM", "Seed": 7, "Model": 'a,"b'})
    assert text == 'a cat\nNegative prompt: blurry\nSteps: 20, Sampler: DDIM, Seed: 7, Model: "a,\\"b"'
    assert parameters("a", "", {"Steps": 1}) == "a\nSteps: 1"


@pytest.mark.parametrize("text", ["a cat", "naïve", "東京 🎨\nline", "\ud800 half a surrogate", None])
def test_png_carries_its_parameters(tmp_path, text):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (3, 3)), path, text)
    with Image.open(path) as image:
        image.load()
        assert image.text.get("parameters") == (text.replace("\ud800", "?") if text else None)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "save", [lambda image, path: save_png(image, path), lambda image, path: save_animation([image], path)]
)
def test_no_file_is_replaced_and_none_is_left_half_written(tmp_path, monkeypatch, save):
    path = tmp_path / "a.png"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        save(Image.new("RGB", (3, 3)), path)
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        save(Image.new("RGB", (3, 3)), tmp_path / "b.png")
    assert len(list(tmp_path.iterdir())) == 1


def played(path: Path) -> tuple[list[Image.Image], list[int]]:
    """The frames, and for how many milliseconds each is shown."""
    frames, times = [], []
    with Image.open(path) as film:
        for number in range(getattr(film, "n_frames", 1)):
            film.seek(number)
            film.load()
            frames.append(film.convert("RGB"))
            times.append(film.info.get("duration"))
        if len(frames) > 1:
            assert film.info["loop"] == 0  # for ever
    return frames, times


def steps(count: int, size: tuple[int, int] = (48, 40)) -> list[Image.Image]:
    """A smooth image that comes out of noise."""
    y, x = np.mgrid[: size[1], : size[0]]
    smooth = np.dstack([x * 255 / size[0], y * 255 / size[1], 255 - x * 255 / size[0]])
    noise = np.random.default_rng(3).uniform(0, 255, (size[1] // 8, size[0] // 8, 3)).repeat(8, 0).repeat(8, 1)
    shares = np.linspace(1, 0, count) if count > 1 else [0]
    return [Image.fromarray((share * noise + (1 - share) * smooth).astype(np.uint8)) for share in shares]


@pytest.mark.parametrize("suffix, error", [(".webp", 3), (".gif", 6), (".png", 0), (".WEBP", 3)])
@pytest.mark.parametrize("count", [2, 7])
def test_animations(tmp_path, suffix, error, count):
    frames, path = steps(count), tmp_path / f"film{suffix}"
    save_animation(frames, path)
    shown, times = played(path)
    assert len(shown) == count and times == [200] * (count - 1) + [1500]
    assert np.abs(np.asarray(frames[-1]).astype(int) - np.asarray(shown[-1])).mean() <= error
    for frame, image in zip(frames, shown, strict=True):  # at each place the right one
        distances = [np.abs(np.asarray(other).astype(int) - np.asarray(image)).mean() for other in frames]
        assert distances.index(min(distances)) == frames.index(frame)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_an_animation_of_one_frame(tmp_path, suffix):
    path = tmp_path / f"film{suffix}"
    save_animation(steps(1), path, last=2)
    shown, _ = played(path)
    assert len(shown) == 1 and shown[0].size == (48, 40)


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_frames_may_be_alike_and_of_any_mode(tmp_path, suffix):
    """Equal frames that follow each other may be written as one, which is shown as long as both."""
    path = tmp_path / f"film{suffix}"
    red, grey = Image.new("RGB", (8, 8), RED), Image.new("L", (8, 8), 128)
    save_animation((red, red, grey, grey.convert("RGBA")), path, seconds=0.1, last=0.5)
    shown, times = played(path)
    assert sum(times) == 800
    assert np.abs(np.asarray(shown[0]).astype(int) - RED).max() <= 3
    assert np.abs(np.asarray(shown[-1]).astype(int) - 128).max() <= 3


def test_frames_of_a_gif_have_palettes_of_their_own(tmp_path):
    """And dithering halves the error of the mean of 8 x 8 pixels of a smooth image (1.3 and 0.9 without)."""
    first = np.asarray(steps(1, (96, 64))[0]).astype(float)
    frames = [first, first[::-1] * 0.3, 255 - first[:, :, ::-1] * 0.4]
    save_animation([Image.fromarray(frame.astype(np.uint8)) for frame in frames], tmp_path / "film.gif")
    for frame, image in zip(frames, played(tmp_path / "film.gif")[0], strict=True):
        difference = np.floor(frame) - np.asarray(image)
        assert np.abs(difference).max() < 24
        assert np.abs(difference.reshape(8, 8, 12, 8, 3).mean((1, 3))).mean() < 0.7


@pytest.mark.parametrize(
    "name, frames, times, text",
    [
        (
            "a.mp4", [STRIPES], {},
            r"a\.mp4: got the suffix '\.mp4' for an animation, expected one of \['\.webp', '\.gif', '\.png'\]$",
        ),
        ("a", [STRIPES], {}, r"a: got the suffix '' for an animation"),
        ("a.gif", [], {}, r"a\.gif: got frames of the sizes \[\], expected at least one frame and a single size"),
        ("a.gif", [STRIPES, RAMP], {}, r"a\.gif: got frames of the sizes \[\(6, 1\), \(52, 1\)\], expected at least"),
        ("a.gif", [STRIPES], {"seconds": 0}, r"a\.gif: got 0 and 1\.5 seconds for a frame, expected 0\.01 to 60"),
        ("a.gif", [STRIPES], {"last": float("nan")}, r"a\.gif: got 0\.2 and nan seconds"),
        ("a.gif", [STRIPES], {"last": 1e9}, r"a\.gif: got 0\.2 and 1000000000\.0 seconds"),
    ],
)  # fmt: skip
def test_animations_that_cannot_be(tmp_path, name, frames, times, text):
    with pytest.raises(ValueError, match=text) as error:
        save_animation(frames, tmp_path / name, **times)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("default")
def test_masks_with_colours_are_noticed(tmp_path):
    for colours, warned in (((200, 30, 30), True), ((120, 100, 80), False), ((255, 255, 255), False)):
        Image.new("RGB", (20, 20), colours).save(tmp_path / "mask.png")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read_mask(tmp_path / "mask.png")
            flatten_mask(Image.new("RGB", (20, 20), colours))
        assert [str(w.message) for w in told] == 2 * warned * [
            "the mask has colours, and only their brightness is used: is it the right file?"
        ]
        assert all(w.filename == __file__ for w in told)
    strokes = Image.new("RGBA", (20, 20))
    strokes.paste((255, 0, 0, 255), (5, 5, 9, 9))  # of one colour on nothing: their alpha is the mask
    assert np.asarray(flatten_mask(strokes)).sum() == 16 * 255
