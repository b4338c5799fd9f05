"""The data of a run, encoded once: latents in buckets, captions and their encoded text; and a part held out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import generator

FLIPPED = "flipped_"  # what the names of tensors of mirrored images begin with


class EncodedTexts(NamedTuple):
    """The text encoders' output for U captions, and as the last row for the empty prompt."""

    context: Tensor  # (U + 1, M, D)
    pooled: Tensor | None  # (U + 1, P)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """n items, each a row of a bucket.

    names      (n) of the images
    images     (n) a number for each image: items of the same pixels have the same
    bucket     (n,) the number of the bucket that has the item, and `row` (n,) its row there
    repeats    (n,) per epoch
    regular    (n,) whether it is an image of the class
    sizes      (n, 6) what SDXL is told, in the order of `BASE_SIZES`
    choices    (n) the numbers of the item's captions in `texts`, which has each caption once
    ids        (U, M) token ids of `texts`
    buckets    each with rows of
                   mean, std (m, C, h, w)     float16; every use of an image samples its Gaussian again
                   flipped_mean, flipped_std  those of the mirrored images, if images are mirrored
                   mask (m, 1, h, w)          float16, if there are masks
                   pixels (m, 3, H, W)        uint8, for inpainting
                   hint (m, 1 or 3, H, W)     uint8, for a control network
    text       of `texts`, if it was encoded (texts.py)
    """

    names: Sequence[str]
    images: Sequence[int]
    bucket: Tensor
    row: Tensor
    repeats: Tensor
    regular: Tensor
    sizes: Tensor
    choices: Sequence[Sequence[int]]
    texts: Sequence[str]
    ids: Tensor
    buckets: Sequence[Mapping[str, Tensor]]
    text: EncodedTexts | None = None

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, chosen: Sequence[int]) -> TrainingData:
        """Some of the items; buckets and captions are shared, not copied."""
        index = torch.tensor(chosen, dtype=torch.long)
        tensors, lists = ("bucket", "row", "repeats", "regular", "sizes"), ("names", "images", "choices")
        own: dict[str, Any] = {name: getattr(self, name)[index] for name in tensors}
        own |= {name: [getattr(self, name)[i] for i in chosen] for name in lists}
        return replace(self, **own)

    def take(self, name: str, chosen: Sequence[int]) -> Tensor:
        """Rows of a tensor of the buckets for items of one bucket."""
        index = torch.tensor(chosen, dtype=torch.long)
        (number,) = self.bucket[index].unique().tolist()
        return self.buckets[number][name][self.row[index]]

    def captions(self, i: int) -> list[str]:
        """The captions of an item."""
        return [self.texts[k] for k in self.choices[i]]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The size (h, w) of the latents of each bucket."""
        shapes = [bucket["mean"].shape[-2:] for bucket in self.buckets]
        return [(height, width) for height, width in shapes]

    @property
    def flat(self) -> dict[str, Tensor]:
        """All large tensors under one name each, see `nested`."""
        found = {f"{i}.{name}": tensor for i, bucket in enumerate(self.buckets) for name, tensor in bucket.items()}
        if self.text is not None:
            found["text.context"] = self.text.context
            found |= {} if self.text.pooled is None else {"text.pooled": self.text.pooled}
        return found | {"ids": self.ids}

    @staticmethod
    def nested(flat: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The buckets of `flat`."""
        found: dict[int, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            number, _, name = key.partition(".")
            if number.isdigit():
                found.setdefault(int(number), {})[name] = tensor
        return [found[i] for i in sorted(found)]


def split(data: TrainingData, share: float, seed: int) -> tuple[TrainingData, TrainingData]:
    """Divide the data into one to train on and one to validate on, which has about `share` of the images.

    It is divided by images: none is in both, however often it occurs. At least one is held out, never all, and none of
    the class. Raises ValueError if there is only one image.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of images that are held out must be between 0 and 1, got {share}")
    candidates = sorted(
        {image for image, regular in zip(data.images, data.regular.tolist(), strict=True) if not regular}
    )
    if len(candidates) < 2:
        raise ValueError("with one image none can be held out for validation: add images, or leave validation out")
    count = min(max(round(share * len(candidates)), 1), len(candidates) - 1)
    mixed = torch.randperm(len(candidates), generator=generator("cpu", seed, "held out")).tolist()
    held = {candidates[i] for i in mixed[:count]}
    kept = [i for i, image in enumerate(data.images) if image not in held]
    others = [i for i, image in enumerate(data.images) if image in held and not data.regular[i]]
    return data.subset(kept), data.subset(others)
