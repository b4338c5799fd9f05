"""Animations: the steps of an image, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, features

from ..files import new_file

ANIMATIONS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG"}


def save_animation(frames: Sequence[Image.Image], path: Path, seconds: float = 0.2, last: float = 1.5) -> None:
    """Write a new looping animation (.webp, .gif or .png) atomically: each frame for `seconds`, the last for `last`.

    A GIF file has 256 dithered colours per frame, and durations in hundredths of a second. Raises ValueError for
    another suffix, no frames, frames of different sizes, and times outside of 0.01 to 60 seconds; FileExistsError if
    the file exists, OSError if it cannot be written.
    """
    kind = ANIMATIONS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: got the suffix {path.suffix!r} for an animation, expected one of {[*ANIMATIONS]}")
    if kind == "WEBP" and not features.check("webp"):
        raise ValueError(f"{path}: this Pillow was built without WebP; use .gif")
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) != 1:
        raise ValueError(f"{path}: got frames of the sizes {sizes}, expected at least one frame and a single size")
    if not (0.01 <= seconds <= 60 and 0.01 <= last <= 60):
        raise ValueError(f"{path}: got {seconds} and {last} seconds for a frame, expected 0.01 to 60")
    images = [frame.convert("RGB") for frame in frames]
    if kind == "GIF":
        images = [p.quantize(palette=p.quantize(256), dither=Image.Dither.FLOYDSTEINBERG) for p in images]
    times = [round(1000 * seconds)] * (len(images) - 1) + [round(1000 * last)]
    options: dict[str, Any] = {"quality": 90} if kind == "WEBP" else {}
    with new_file(path) as partial:
        images[0].save(partial, kind, save_all=True, append_images=images[1:], duration=times, loop=0, **options)
