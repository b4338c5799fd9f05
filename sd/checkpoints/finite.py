"""Weights that hold NaN, infinite or too large numbers: found before they are used, counted and named.

A single NaN makes every image black, after all steps; in conversion it would be passed on.

>>> check = FiniteCheck(torch.float16)
>>> check.look("a.weight", torch.tensor([1.0, torch.nan, torch.inf]))
>>> try:
...     check.finish()
... except CheckpointError as error:
...     print(error)
1 weight with NaN or infinite numbers: a.weight (2 of 3); the file is damaged: download it again, or use another one
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..messages import counted, listed
from .checkpoint import CheckpointError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # of which torch compares no numbers


class FiniteCheck:
    """Looks at weights, one by one, and reports all at the end. Several threads may use it."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """`dtype` is the precision that the weights will have; by default, their own."""
        self._dtype = dtype
        self._max = math.inf if dtype is None else torch.finfo(dtype).max
        self._broken: dict[str, str] = {}
        self._large: dict[str, str] = {}

    def look(self, name: str, weight: Tensor) -> None:
        """Check one weight.

        Its least and largest number tell everything: both are NaN if any number is. That takes 0.15 s for 10^9 numbers
        on one core, a fortieth of `isfinite`, and cannot overflow as a sum can.
        """
        if not weight.numel() or not weight.is_floating_point():
            return
        values = weight.float() if weight.dtype in FLOAT8 else weight
        low, high = map(float, torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~values.isfinite()).sum())
            self._broken[name] = f"{name} ({count} of {weight.numel()})"
        elif (largest := max(high, -low)) > self._max:
            rounded = torch.tensor(largest, dtype=torch.float64).to(self._dtype)  # down, maybe
            if not rounded.isfinite():
                self._large[name] = f"{name} (up to {largest:.4g})"

    def finish(self) -> None:
        """Raise CheckpointError for what was found."""
        if self._broken:
            what = (
                f"{counted(len(self._broken), 'weight')} with NaN or infinite numbers: {listed(self._broken.values())}"
            )
            raise CheckpointError(f"{what}; the file is damaged: download it again, or use another one")
        if self._large:
            kind = str(self._dtype).removeprefix("torch.")
            what = f"{counted(len(self._large), 'weight')} with values too large for {kind}"
            raise CheckpointError(
                f"{what}: {listed(self._large.values())}; "
                f"use {'float32' if kind == 'bfloat16' else 'bfloat16 or float32'} (--dtype)"
            )


def check_numbers(key: str, numbers: Tensor) -> None:
    """Raise CheckpointError unless all numbers of a tensor are floats and finite."""
    if not numbers.is_floating_point():
        kind = str(numbers.dtype).removeprefix("torch.")
        what = f"{key} holds whole numbers ({kind}), not weights"
        raise CheckpointError(f"{what}: a quantised file, which is not supported, or a damaged one")
    # in pieces, because 8-bit floats have to be converted
    if not all(bool(piece.float().isfinite().all()) for piece in numbers.flatten().split(1 << 20)):
        raise CheckpointError(
            f"{key} holds numbers that are not finite (NaN or infinite): the file is damaged; download it again"
        )
