"""Matching the colours of one image to those of another, against the drift of repeated image to image.

The linear map of Pitié and Kokaram 2007, "The linear Monge-Kantorovitch linear colour mapping for example-based colour
transfer": of all maps that give the colours the mean and the covariance of the other image, the one that moves them
least. With the means m, m' and covariances S, S' of the image and of the other one,

    x -> T (x - m) + m',    T = S^-1/2 (S^1/2 S' S^1/2)^1/2 S^-1/2

>>> image, other = Image.new("RGB", (8, 8), (90, 100, 110)), Image.new("RGB", (8, 8), (100, 100, 100))
>>> match_colours(image, other).getpixel((0, 0))
(100, 100, 100)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEAST = 1.0  # variance added to both, in levels of 256 squared: flat images have none
MOST = 4.0  # contrast is raised by this factor at most, so that the noise of a flat image is not blown up
SHIFTS = 20  # values beyond 0 to 255 are clipped, which moves the mean: shifts bring it back

Floats = NDArray[np.floating[Any]]


def match_colours(image: Image.Image, other: Image.Image) -> Image.Image:
    """The RGB image with the mean and covariance of the colours of another RGB image, of any size."""
    pixels = np.asarray(image, dtype=np.float32)
    mean, covariance = _moments(pixels)
    goal, goal_covariance = _moments(np.asarray(other, dtype=np.float32))
    root, inverse = _power(covariance, 0.5), _power(covariance, -0.5)
    transfer = _power(inverse @ _power(root @ goal_covariance @ root, 0.5) @ inverse, 1.0, MOST)
    matched = (pixels - mean) @ transfer.astype(np.float32) + goal
    for _ in range(SHIFTS):
        matched = matched + goal - matched.clip(0, 255).mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return Image.fromarray(np.rint(matched.clip(0, 255)).astype(np.uint8))


def _moments(pixels: Floats) -> tuple[Floats, Floats]:
    """The mean (3,) and covariance (3, 3) of the colours of pixels (H, W, 3)."""
    flat = pixels.reshape(-1, 3).astype(np.float64)
    mean = flat.mean(axis=0)
    return mean.astype(np.float32), (flat - mean).T @ (flat - mean) / len(flat) + LEAST * np.eye(3)


def _power(matrix: Floats, exponent: float, most: float | None = None) -> Floats:
    """A power of a symmetric positive matrix, whose eigenvalues are first limited to `most`."""
    values, vectors = np.linalg.eigh(matrix)
    power: Floats = (vectors * values.clip(1e-12, most) ** exponent) @ vectors.T
    return power
