"""Maps and images as JSON values, small enough to be sent after each step.

A map is sent as one byte for each position, from 0 to its largest value:

    {"width": 16, "height": 16, "max": 0.21, "mean": 0.08, "data": base64 of the rows}
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MOST = 256  # pixels of the longer side of an image
QUALITY = 82  # of JPEG


def picture(image: Image.Image, most: int = MOST) -> str:
    """An image as the data: URL of a JPEG file, reduced to at most so many pixels on its longer side."""
    image = image.convert("RGB")
    if max(image.size) > most:
        image = image.copy()
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def heat_map(values: Tensor, most: int) -> dict[str, Any]:
    """A map (h, w) of values >= 0 as JSON values, reduced to at most `most` positions on its longer side."""
    values = reduced(values.float().cpu(), most).nan_to_num()  # JSON has no infinity
    top = float(values.max())
    levels = (values / top * 255).round() if top > 0 else values * 0
    data = levels.numpy().astype(np.uint8).tobytes()
    height, width = values.shape
    return {
        "width": width,
        "height": height,
        "max": top,
        "mean": float(values.mean()),
        "data": base64.b64encode(data).decode("ascii"),
    }


def reduced(values: Tensor, most: int) -> Tensor:
    """A map (h, w) with at most `most` positions on its longer side, each the mean of the area that it stands for."""
    height, width = values.shape
    if max(height, width) <= most:
        return values
    share = most / max(height, width)
    size = max(1, round(height * share)), max(1, round(width * share))
    return F.adaptive_avg_pool2d(values[None], size)[0]


def side_for(words: int, steps: int, budget: int = 4_000_000) -> int:
    """Positions on the longer side of the maps of each step, 8 to 32: so that all of them are about `budget` bytes.

    >>> side_for(5, 20), side_for(75, 50), side_for(150, 150)
    (32, 32, 13)
    """
    return min(32, max(8, math.isqrt(budget // max(words * steps, 1))))
