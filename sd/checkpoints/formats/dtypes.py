"""The data types of tensors in files, and decoding of small tables with numpy, without torch.

Importing torch takes longer than looking at a file. Names, shapes, types and small tables are read without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class NumberType:
    """A data type: its name in torch, its size in bytes, and its relative precision (0 for integers)."""

    name: str
    itemsize: int
    eps: float = 0.0

    @property
    def torch(self) -> torch.dtype:
        """The same in torch."""
        import torch

        return getattr(torch, self.name)

    def decode(self, data: bytes) -> np.ndarray:
        """Little-endian numbers of this type as float64. ValueError for 8-bit floats, which numpy does not have."""
        if self.name == "bfloat16":  # the upper half of a float32
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(float)
        if self.name.startswith("float8"):
            raise ValueError(f"{self.name} is not read without torch")
        name = "?" if self.name == "bool" else np.dtype(self.name).newbyteorder("<")
        return np.frombuffer(data, name).astype(float)


TYPES = {
    kind.name: kind
    for kind in (
        NumberType("float64", 8, 2.0**-52), NumberType("float32", 4, 2.0**-23), NumberType("float16", 2, 2.0**-10),
        NumberType("bfloat16", 2, 2.0**-7),
        NumberType("float8_e4m3fn", 1, 2.0**-3), NumberType("float8_e5m2", 1, 2.0**-2),
        NumberType("int64", 8), NumberType("int32", 4), NumberType("int16", 2), NumberType("int8", 1),
        NumberType("uint8", 1), NumberType("bool", 1),
    )
}  # fmt: skip
