"""The inputs of a network besides x and t, as one value.

    context    encoded prompt: the vectors that cross-attention attends to
    vector     added to the embedding of the timestep: SDXL's pooled text and sizes (prompts.py)
    concat     channels concatenated to x: mask and masked latent of inpainting models
    guidance   the guidance scale, for networks that are told it: U-Nets of latent consistency models. One evaluation of
               them is what takes others two (Meng et al. 2023, "On distillation of guided diffusion models")

Everything is batch first, so that a conditioning is moved, cast and repeated as one; denoiser.py concatenates several.

>>> Conditioning(torch.ones(1, 77, 16)).repeat(2).context.shape
torch.Size([2, 77, 16])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class TextOutput(NamedTuple):
    """What text encoders say about a batch of texts."""

    hidden: Tensor  # (B, M, D), one vector per token
    pooled: Tensor | None = None  # (B, P), or (B, D) where nothing projects it: one vector per text

    @classmethod
    def joined(cls, outputs: Sequence[TextOutput]) -> TextOutput:
        """Those of several text encoders for the same texts: hidden states side by side, pooled of the last one."""
        return cls(torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled)


class Conditioning(NamedTuple):
    """Context (B, M, D), vector (B, V), concat (B, E, h, w) and guidance (B,) for a batch of B.

    All but the context are None where the model takes none.
    """

    context: Tensor
    vector: Tensor | None = None
    concat: Tensor | None = None
    guidance: Tensor | None = None

    @property
    def batch(self) -> int:
        """The number of images."""
        return self.context.shape[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply a function to every tensor that is not None."""
        changed: Any = (None if x is None else change(x) for x in self)
        return Conditioning(*changed)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move to a device, cast to a precision; None leaves it unchanged.

        The guidance stays in float32, like a timestep: in bfloat16, 7.3 would be 7.3125.
        """
        guidance = None if self.guidance is None else self.guidance.to(device)
        return self.each(lambda x: x.to(device=device, dtype=dtype))._replace(guidance=guidance)

    def of_images(self, chosen: slice) -> Conditioning:
        """That of some images of the batch."""
        return self.each(lambda x: x[chosen])

    def with_concat(self, concat: Tensor) -> Conditioning:
        """The same with these channels."""
        return self._replace(concat=concat)

    def with_guidance(self, scale: float) -> Conditioning:
        """The same with this guidance scale for every image."""
        return self._replace(guidance=torch.full((self.batch,), scale, device=self.context.device, dtype=torch.float32))

    def repeat(self, times: int) -> Conditioning:
        """Repeat the whole batch."""
        return self.each(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def repeat_each(self, times: int) -> Conditioning:
        """Repeat every image of the batch."""
        return self.each(lambda x: x.repeat_interleave(times, dim=0))

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Several batches joined into one; all have the same kinds of tensors, and contexts of one length."""
        columns = zip(*parts, strict=True)
        joined: Any = (None if column[0] is None else torch.cat(column) for column in columns)
        return cls(*joined)


class Composition(NamedTuple):
    """Several conditionings at once, each with a weight for every image."""

    parts: tuple[Conditioning, ...]  # K, each for B images
    weights: Tensor  # (K, B)

    @property
    def concat(self) -> Tensor | None:
        """The channels that all parts have."""
        return self.parts[0].concat

    def with_concat(self, concat: Tensor) -> Composition:
        """The same with these channels for every part."""
        return self._replace(parts=tuple(part.with_concat(concat) for part in self.parts))

    def with_guidance(self, scale: float) -> Composition:
        """The same with this guidance scale for every part."""
        return self._replace(parts=tuple(part.with_guidance(scale) for part in self.parts))


class Guide(NamedTuple):
    """What a denoiser is guided by: the prompts, each one or a composition of several, and the negative ones."""

    cond: Conditioning | Composition  # for B images
    uncond: Conditioning | None  # for B images, or one for all; None if the guidance needs none


Network = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x (B, C, h, w), t (B,), conditioning) -> (B, C, h, w)
Wrapper = Callable[[Network], Network]  # such as `DeepCache`: a network that calls another one


class Predict(Protocol):
    """`StableDiffusion.predict`: the output of the network, or of what `wrap` makes of it."""

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, wrap: Wrapper = ...) -> Tensor: ...
