"""Augmentation: drop prompts for guidance, mask images for inpainting, erase parts of hints for control networks.

guidance     some prompts are replaced by the empty one, so that one network learns both predictions
                                                                                Ho and Salimans 2022
inpainting   a random part of the image is masked; the mask is an input         Rombach et al. 2022, section 4.5
control      some hints lose a part, so that the network also understands unfinished ones, such as scribbles
"""

from __future__ import annotations

import torch
from torch import Tensor


def drop_prompts(ids: Tensor, empty: Tensor, rate: float, rng: torch.Generator) -> Tensor:
    """Replace each prompt's ids (B, M) by those of the empty prompt (M,) with probability `rate`.

    Ho and Salimans 2022, algorithm 1. `rng` must be on the device of `ids`.
    """
    dropped = torch.rand(len(ids), generator=rng, device=ids.device) < rate
    return torch.where(dropped[:, None], empty, ids)


def random_masks(n: int, height: int, width: int, rng: torch.Generator, whole: float = 0.25) -> Tensor:
    """n masks (n, 1, height, width) for inpainting: 1 where the model generates, 0 where the image is kept.

    Each has one to four rectangles and thick strokes of random position and size (after Suvorov et al. 2022, "LaMa",
    section 2.3). With probability `whole` it covers the whole image, so that the model still learns text to image (the
    card of the inpainting checkpoints: "in 25% mask everything"). On the device of the generator.
    """
    shapes = 4

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, shapes, 1, 1, generator=rng, device=rng.device)

    y = (torch.arange(height, device=rng.device).view(1, 1, -1, 1) + 0.5) / height
    x = (torch.arange(width, device=rng.device).view(1, 1, 1, -1) + 0.5) / width
    rectangle = ((x - uniform(0, 1)).abs() < uniform(0.05, 0.3)) & ((y - uniform(0, 1)).abs() < uniform(0.05, 0.3))
    # a stroke: all points near the line from (x0, y0) to (x1, y1)
    x0, y0, x1, y1 = uniform(0, 1), uniform(0, 1), uniform(0, 1), uniform(0, 1)
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2 + 1e-6)).clamp(0, 1)
    stroke = (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2 < uniform(0.03, 0.12) ** 2
    index = torch.arange(shapes, device=rng.device).view(1, -1, 1, 1)
    used = index <= uniform(0, shapes)[:, :1]  # always the first
    masks = (torch.where(uniform(0, 1) < 0.5, rectangle, stroke) & used).any(dim=1, keepdim=True)
    everything = torch.rand(n, 1, 1, 1, generator=rng, device=rng.device) < whole
    return (masks | everything).float()


def erase_parts(hints: Tensor, rate: float, rng: torch.Generator) -> Tensor:
    """Hints (B, C, H, W), each with probability `rate` zero in two rectangles of random position and size.

    A rectangle covers 4 to 36 % of the image, less at its border. `rng` must be on the device of the hints.
    """
    B, _, height, width = hints.shape
    numbers = torch.rand(B, 2, 4, 1, 1, generator=rng, device=hints.device)
    erased = torch.rand(B, 1, 1, 1, generator=rng, device=hints.device) < rate
    y = (torch.arange(height, device=hints.device)[:, None] + 0.5) / height
    x = (torch.arange(width, device=hints.device) + 0.5) / width
    middle_y, middle_x, half_y, half_x = numbers.unbind(2)  # (B, 2, 1, 1) each
    inside = ((y - middle_y).abs() < 0.1 + 0.2 * half_y) & ((x - middle_x).abs() < 0.1 + 0.2 * half_x)
    return hints.masked_fill(inside.any(1, keepdim=True) & erased, 0)
