"""How well two sets of edges agree.

>>> found = np.zeros((32, 32), bool); found[:, 16] = True
>>> agreement(found, np.roll(found, 2, axis=1)), agreement(found, np.roll(found, 4, axis=1))
(1.0, 0.0)
"""

from __future__ import annotations

import numpy as np

REACH = 2  # pixels at which two edges agree


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
