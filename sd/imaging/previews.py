"""A quick look at latents: one linear map from a latent to a colour, in place of the VAE's decoder.

Each latent of 4 numbers stands for 8x8 pixels, and their mean colour is nearly a linear function of it. The map is
fitted to one latent whose picture is known, so it holds for any VAE; a preview is as small as the latent.

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
    factor: int  # pixels to a latent, each way

    @classmethod
    def fit(cls, z: Tensor, images: Sequence[Image.Image]) -> LinearDecoder:
        """The map that suits latents z (B, C, h, w) and their pictures best (least squares)."""
        h, w = z.shape[-2:]
        small = torch.cat([to_tensor(image.resize((w, h), Image.Resampling.BOX)) for image in images])
        colours = small.permute(0, 2, 3, 1).reshape(-1, 3)
        # where there are fewer latents than unknowns, the smallest matrix that fits: hence "gelsd"
        matrix = torch.linalg.lstsq(_rows(z.float().cpu()), colours, driver="gelsd").solution
        return cls(matrix, images[0].width // w)

    def __call__(self, z: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) -> pictures, enlarged to the size of decoded ones."""
        B, _, h, w = z.shape
        colours = (_rows(z.float().cpu()) @ self.matrix).reshape(B, h, w, 3).permute(0, 3, 1, 2)
        return [image.resize((self.factor * w, self.factor * h), Image.Resampling.BICUBIC) for image in to_pil(colours)]


def _rows(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C + 1), the last column ones."""
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
