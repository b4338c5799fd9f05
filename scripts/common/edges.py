"""Edges of an image, and how well two sets of edges agree.

`canny` is the detector of Canny 1986, "A computational approach to edge detection", in NumPy: smooth, take the
gradient, keep its ridges, and of the weak ones those that are connected to strong ones. Of a colour image, each pixel
has the gradient of the channel where it is largest, as in OpenCV; thresholds are those of scikit-image.

>>> image = np.zeros((32, 32)); image[:, 16:] = 1
>>> found = canny(image)
>>> agreement(found, np.roll(found, 2, axis=1)), agreement(found, np.roll(found, 4, axis=1))
(1.0, 0.0)
"""

from __future__ import annotations

import numpy as np

LOW, HIGH = 0.1, 0.2  # of the gradient by Sobel's kernels of an image in [0, 1]: at most 4 in each direction
REACH = 2  # pixels at which two edges agree


def canny(image: np.ndarray, low: float = LOW, high: float = HIGH, sigma: float = 1.0) -> np.ndarray:
    """The edges (H, W), bool, of an image (H, W) or (H, W, C) in [0, 1].

    low, high   thresholds of the gradient: edges begin above `high` and go on above `low`
    sigma       of the Gaussian that smooths the image before, in pixels
    """
    x = _smooth(np.atleast_3d(image).astype(np.float32), sigma)
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = x[:-2] + 2 * x[1:-1] + x[2:]
    along = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    dx, dy = across[:, 2:] - across[:, :-2], along[2:] - along[:-2]
    size = np.hypot(dx, dy)
    strongest = size.argmax(2)[..., None]
    dx, dy, size = (np.take_along_axis(part, strongest, 2)[..., 0] for part in (dx, dy, size))
    ridge = _ridges(dx, dy, size)
    weak, found = ridge & (size > low), ridge & (size > high)
    while True:
        grown = grow(found, 1) & weak
        if (grown == found).all():
            return found
        found = grown


def agreement(found: np.ndarray, hint: np.ndarray, reach: int = REACH) -> float:
    """F1, from 0 to 1, of edges (H, W) against those of a hint (H, W); pixels agree within `reach` of each other.

    It is the harmonic mean of the share of found edges that are near the hint's, and of the hint's that are near found
    ones. Without any edges in both it is 1, in one of them 0.
    """
    if not found.any() or not hint.any():
        return float(found.any() == hint.any())
    precision, recall = grow(hint, reach)[found].mean(), grow(found, reach)[hint].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def grow(marked: np.ndarray, reach: int) -> np.ndarray:
    """What is at most `reach` pixels from a marked one along each axis: (H, W) -> (H, W), bool."""
    for axis in (0, 1):
        length = marked.shape[axis]
        padded = np.pad(marked, [(reach, reach) if axis == i else (0, 0) for i in (0, 1)])
        shifted = [np.take(padded, range(k, k + length), axis) for k in range(2 * reach + 1)]
        marked = np.logical_or.reduce(shifted)
    return marked


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """Convolve (H, W, C) with a Gaussian of this standard deviation."""
    if not sigma:
        return x
    reach = max(1, round(4 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(x, [(reach, reach) if axis == i else (0, 0) for i in range(3)], mode="edge")
        length = x.shape[axis]
        x = sum(weight * np.take(padded, range(k, k + length), axis) for k, weight in enumerate(kernel))
    return x


def _ridges(dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Where the gradient is at least as large as at both neighbours in its direction, of eight: (H, W), bool."""
    direction = np.rint(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    padded = np.pad(size, 1)
    height, width = size.shape
    ridge = np.zeros(size.shape, bool)
    for i, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = padded[1 - down : 1 - down + height, 1 - right : 1 - right + width]
        ridge |= (direction == i) & (size >= ahead) & (size > behind)  # of two equal ones, one
    return ridge & (size > 0)
