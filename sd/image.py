"""Pictures: tensors in [-1, 1] <-> PIL images, grids, and PNG files with their recipe written into them.

The "parameters" text chunk has the form of AUTOMATIC1111's web interface, which most tools of the field read: the
prompt, a line "Negative prompt: ...", then a line of "Name: value" pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from .files import new_file


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], what lies outside being cut off -> RGB pictures.

    Rounded to the nearest of 256 values; the original truncates, which darkens by half a step.
    """
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of all of them, row by row, as nearly square as can be unless `columns` is given."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for n, image in enumerate(images):
        sheet.paste(image, (n % columns * width, n // columns * height))
    return sheet


def parameters(prompt: str, negative: str, settings: Mapping[str, object]) -> str:
    """The text of the "parameters" chunk; values with a comma, colon or line break are quoted, as readers expect."""
    pairs = []
    for name, value in settings.items():
        text = str(value)
        if any(c in text for c in ",:\n"):
            text = '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        pairs.append(f"{name}: {text}")
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else []), ", ".join(pairs)]
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path, text: str | None = None) -> None:
    """Write a new PNG file, whole or not at all; `text` goes into its "parameters" chunk.

    Raises FileExistsError if there is a file of that name already, OSError if it cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_text("parameters", text.encode("utf-8", "replace").decode("utf-8"))  # half a surrogate pair -> "?"
    with new_file(path) as partial:
        image.save(partial, "PNG", pnginfo=info)
