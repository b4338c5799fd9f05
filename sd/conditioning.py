"""What a network is given beside x and t, as one value.

    context   tokens that the network attends to: the text's vectors
    vector    one vector an image, added to the timestep's embedding: SDXL's pooled text and sizes
    concat    feature maps behind the channels of x: mask and masked latent of inpainting models

All of it is batch first, so that it is moved, cast, repeated and concatenated together.

>>> cond, uncond = Conditioning(torch.ones(1, 77, 16)), Conditioning(torch.zeros(1, 77, 16))
>>> concatenate([uncond.expand(2), cond.expand(2)]).context.shape
torch.Size([4, 77, 16])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """Context (B, M, D), vector (B, V) and concat (B, E, h, w) for a batch of B; what is None is not given."""

    context: Tensor
    vector: Tensor | None = None
    concat: Tensor | None = None

    @property
    def batch(self) -> int:
        """For how many images it is."""
        return self.context.shape[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same change of every tensor that is given."""
        return Conditioning(*(None if x is None else change(x) for x in self))

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """On a device, in a precision; what is not given stays."""
        return self.each(lambda x: x.to(device=device, dtype=dtype))

    def expand(self, batch: int) -> Conditioning:
        """For `batch` images: what is there for one serves all, without a copy.

        Raises ValueError for what is there for another number of them.
        """
        for name, x in zip(self._fields, self, strict=True):
            if x is not None and x.shape[0] not in (1, batch):
                raise ValueError(f"a {name} for {x.shape[0]} images, but there are {batch}")
        return self.each(lambda x: x.expand(batch, *x.shape[1:]))

    def repeat(self, times: int) -> Conditioning:
        """The whole batch so many times in a row."""
        return self.each(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Several batches as one, in their order.

    Raises ValueError in one line where their contexts have different lengths, or only some have a vector or maps.
    """
    lengths = [part.context.shape[1] for part in parts]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"contexts must be of one length, got {' and '.join(map(str, lengths))}: fill up the shorter ones with the "
            "empty prompt's (StableDiffusion.same_length)"
        )
    fields = []
    for name, values in zip(Conditioning._fields, zip(*parts, strict=True), strict=True):
        given = [x for x in values if x is not None]
        if given and len(given) < len(parts):
            raise ValueError(f"{len(given)} of {len(parts)} conditionings have a {name}: give it to all or none")
        if len({x.shape[1:] for x in given}) > 1:
            shapes = " and ".join(str(tuple(x.shape)) for x in given)
            raise ValueError(f"the conditionings' {name}s must be of one shape, got {shapes}")
        fields.append(torch.cat(given) if given else None)
    return Conditioning(*fields)
