"""The linear decoder: a map from latents to colours."""

from __future__ import annotations

import numpy as np
import reference_weights as reference
import torch
from common import error
from PIL import Image

from sd.imaging.previews import LinearDecoder
from sd.imaging.tensors import to_pil, to_tensor


def test_a_linear_vae_is_found_out():
    z, matrix = reference.normal("z", (2, 4, 6, 9)), 0.15 * reference.normal("m", (5, 3))
    colours = (torch.cat([z, torch.ones(2, 1, 6, 9)], 1).permute(0, 2, 3, 1) @ matrix).permute(0, 3, 1, 2)
    images = [image.resize((72, 48), Image.Resampling.NEAREST) for image in to_pil(colours)]
    decoder = LinearDecoder.fit(z, images)
    assert error(decoder.matrix, matrix) < 0.02  # colours come in 256 steps
    previews = decoder(z)
    assert [image.size for image in previews] == [(72, 48)] * 2
    small = to_tensor(previews[0].resize((9, 6), Image.Resampling.BOX))
    assert (small - colours[:1]).abs().mean() < 0.1


def test_one_latent_is_enough():
    decoder = LinearDecoder.fit(torch.full((1, 4, 1, 1), 2.0), [Image.new("RGB", (8, 8), (200, 100, 0))])
    (preview,) = decoder(torch.full((1, 4, 1, 1), 2.0))
    assert np.abs(np.asarray(preview).astype(int) - (200, 100, 0)).max() <= 1
