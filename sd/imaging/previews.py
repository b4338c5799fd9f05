"""Fast previews of latents: a linear map from latent to colour, instead of the VAE's decoder.

The mean colour of 8x8 pixels is nearly a linear function of their latent, 4 numbers. The map is fitted to a latent
whose image is known, so it works for any VAE.

>>> latents = torch.randn(1, 4, 16, 16)
>>> LinearDecoder.fit(latents, [Image.new("RGB", (128, 128), "orange")])(latents)[0].size
(128, 128)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .tensors import to_pil, to_tensor


class LinearDecoder(NamedTuple):
    """colour = matrix · (z, 1): matrix (C + 1, 3), for colours in [-1, 1]."""

    matrix: Tensor
    factor: int  # pixels per latent, in each direction

    @classmethod
    def fit(cls, z: Tensor, images: Sequence[Image.Image]) -> LinearDecoder:
        """Fit the map to latents z (B, C, h, w) and their images by least squares."""
        h, w = z.shape[-2:]
        small = torch.cat([to_tensor(image.resize((w, h), Image.Resampling.BOX)) for image in images])
        colours = small.permute(0, 2, 3, 1).reshape(-1, 3)
        # "gelsd" gives the minimum-norm solution if there are fewer latents than unknowns
        matrix = torch.linalg.lstsq(_rows(z.float().cpu()), colours, driver="gelsd").solution
        return cls(matrix, images[0].width // w)

    def __call__(self, z: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) -> images, enlarged to the size of decoded images."""
        B, _, h, w = z.shape
        colours = (_rows(z.float().cpu()) @ self.matrix).reshape(B, h, w, 3).permute(0, 3, 1, 2)
        return [image.resize((self.factor * w, self.factor * h), Image.Resampling.BICUBIC) for image in to_pil(colours)]


def _rows(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C + 1), with ones in the last column."""
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
