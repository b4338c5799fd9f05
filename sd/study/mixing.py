"""Interpolation between two prompts and between two noises.

Linear interpolation

    lerp(a, b, p) = (1 - p) a + p b

works for the contexts of prompts, and for SDXL's pooled text. Gaussian noise in many dimensions lies close to a sphere
of radius sqrt(dimensions), and halfway on the line its length is only 0.7 times that: the network was never trained on
such noise. Spherical interpolation stays on the sphere (Shoemake 1985, "Animating rotation with quaternion curves"):

    slerp(a, b, p) = (sin((1 - p) w) a + sin(p w) b) / sin(w),   w the angle between a and b
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..conditioning import Conditioning
from ..params import SamplingParams
from ..pipeline import StableDiffusion
from .drawing import figure, strip
from .runs import SETTINGS, generate, noise

PARALLEL = 1e-4  # sin(w) below which slerp falls back to lerp
Mix = Callable[[Tensor, Tensor, float], Tensor]


def lerp(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Linear interpolation: the point at `part`, 0 to 1, on the line from a to b.

    >>> lerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.5000, 0.5000])
    """
    return torch.lerp(a, b, part)


def slerp(a: Tensor, b: Tensor, part: float, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Spherical interpolation: the point at `part`, 0 to 1, on the arc from a to b; vectors run along `dim`.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.7071, 0.7071])
    """
    dims = (dim,) if isinstance(dim, int) else dim
    lengths = [torch.linalg.vector_norm(x.double(), dim=dims, keepdim=True) for x in (a, b)]
    cos = (a.double() * b.double()).sum(dims, keepdim=True) / (lengths[0] * lengths[1]).clamp(min=1e-12)
    angle = cos.clamp(-1, 1).acos()
    sin = angle.sin()
    parallel = sin < PARALLEL
    sin = sin.masked_fill(parallel, 1.0)
    of_a = torch.where(parallel, 1 - part, ((1 - part) * angle).sin() / sin)
    of_b = torch.where(parallel, part, (part * angle).sin() / sin)
    return (of_a * a + of_b * b).to(a.dtype)


class Mixed(NamedTuple):
    """Rows of interpolated images, keyed by what they interpolate and how."""

    parts: list[float]  # from 0 to 1
    rows: dict[str, list[Image.Image]]
    lengths: dict[str, list[float]]  # |noise| / sqrt(dimensions), of the rows that interpolate noise


def parts(n: int) -> list[float]:
    """n evenly spaced numbers from 0 to 1.

    >>> parts(3)
    [0.0, 0.5, 1.0]
    """
    if n < 2:
        raise ValueError(f"an interpolation needs at least 2 points, got {n}")
    return [i / (n - 1) for i in range(n)]


def mix_prompts(
    model: StableDiffusion, one: str, other: str, n: int = 7, settings: SamplingParams = SETTINGS, how: Mix = lerp
) -> list[Image.Image]:
    """n images from one prompt to another, from the same noise."""
    a, b = model.conditioning([one]), model.conditioning([other])
    pooled = model.config.text[-1].pooled_width
    return generate(
        model, Conditioning.joined([between_prompts(a, b, part, pooled, how) for part in parts(n)]), settings
    )


def between_prompts(a: Conditioning, b: Conditioning, part: float, pooled: int = 0, how: Mix = lerp) -> Conditioning:
    """The conditioning at `part`, 0 to 1, of the way from a to b; each token's vector and the pooled text interpolated.

    pooled   width of the pooled text, with which the vectors begin (`TextConfig.pooled_width`). The sizes after it are
             not of the text and stay those of a
    """
    vector = a.vector
    if vector is not None and b.vector is not None:
        vector = torch.cat([how(vector[:, :pooled], b.vector[:, :pooled], part), vector[:, pooled:]], dim=-1)
    return a._replace(context=how(a.context, b.context, part), vector=vector)


def between_noises(a: Tensor, b: Tensor, n: int, how: Mix = slerp) -> Tensor:
    """n noises (n, C, h, w) from a to b, both (1, C, h, w), each treated as one vector."""
    flat = [how(a.flatten(1), b.flatten(1), part) for part in parts(n)]
    return torch.cat(flat).view(n, *a.shape[1:])


def mixing(
    model: StableDiffusion, one: str, other: str, n: int = 7, settings: SamplingParams = SETTINGS, seed: int = 2
) -> Mixed:
    """Four rows: prompt `one` to prompt `other` with lerp and slerp, from the noise of the settings' seed; then, with
    prompt `other`, from that noise to the noise of `seed` with lerp and slerp.
    """
    rows: dict[str, list[Image.Image]] = {}
    lengths: dict[str, list[float]] = {}
    for name, how in (("line", lerp), ("arc", slerp)):
        rows[f"prompts, {name}"] = mix_prompts(model, one, other, n, settings, how)
    a = noise(model, settings)
    b = noise(model, SamplingParams(seed=seed))
    cond = model.conditioning([other]).repeat(n)
    for name, how in (("line", lerp), ("arc", slerp)):
        x = between_noises(a, b, n, how)
        rows[f"noise, {name}"] = generate(model, cond, settings, x)
        lengths[f"noise, {name}"] = (x.flatten(1).norm(dim=1) / x[0].numel() ** 0.5).tolist()
    return Mixed(parts(n), rows, lengths)


def draw_mixing(mixed: Mixed, one: str, other: str, width: int = 132) -> Image.Image:
    """The rows, labelled with the interpolation parameter and the length of the noise."""
    names = []
    for name in mixed.rows:
        middle = mixed.lengths.get(name)
        names.append(name + (f"\nlength in the middle {middle[len(middle) // 2]:.2f}" if middle else ""))
    columns: Sequence[str] = [f"{part:.0%}" for part in mixed.parts]
    return figure(
        f'Interpolation: "{one}" to "{other}"',
        strip(list(mixed.rows.values()), columns, names, width),
        "Top: from the first prompt to the second, from the same noise. Bottom: the second prompt, from that noise to "
        "another one. Halfway on the line the noise is too weak and details are lost; the arc keeps its length.",
    )
