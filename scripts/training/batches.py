"""The batches of each step of training a U-Net: a function of seed and step.

Each part of a step has a number, counted over the whole run, and random numbers of its own. All processes draw them for
all items of the part, and each uses its share: so two processes with a batch of 2 compute what one does with a batch of
4. Where the items of a part do not suffice, shares are filled up with items of weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd.config import BASE_SIZES
from sd.imaging.masks import latent_mask, mask_channels, masked_image
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion
from sd.training import random_masks

from .data import generator, to_floats
from .dataset import FLIPPED, TrainingData
from .epochs import Epochs
from .loop import Recipe
from .models import fitting
from .processes import Processes


class Batch(NamedTuple):
    """The items of a part that one process computes: B of them, all of one size.

    The loss of a part is the mean over processes of mean(weight * loss).
    """

    x0: Tensor  # (B, C, h, w), sampled from the VAE's Gaussian
    noise: Tensor  # (B, C, h, w)
    t: Tensor  # (B,) integer timesteps
    weight: Tensor  # (B,): 0 for an item that fills up, the prior weight for an image of the class, else 1
    ids: Tensor  # (B, M) token ids of the first tokenizer
    context: Tensor | None = None  # (B, M, D) text that was encoded before (texts.py)
    pooled: Tensor | None = None  # (B, P) the same, SDXL
    sizes: Tensor | None = None  # (B, 6) the numbers of `Config.sizes`, SDXL
    mask: Tensor | None = None  # (B, 1, h, w) in [0, 1]: where the loss counts
    concat: Tensor | None = None  # (B, 5, h, w) beside x, of inpainting models
    hint: Tensor | None = None  # (B, 1 or 3, H, W) uint8, of control networks


@dataclass(frozen=True)
class Tags:
    """How captions that are comma-separated tags are changed each time they are used.

    shuffle   whether the tags are shuffled
    keep      number of first tags that keep their place and are never dropped
    drop      share of the other tags that are left out
    """

    shuffle: bool = False
    keep: int = 0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.keep < 0 or not 0 <= self.drop <= 1:
            raise ValueError(f"--keep-tags must be at least 0, --drop-tags from 0 to 1; got {self.keep}, {self.drop}")
        if self.keep and not self.change:
            raise ValueError("--keep-tags goes with --shuffle-tags or --drop-tags")

    @property
    def change(self) -> bool:
        """Whether captions change at all; if not, their text can be encoded once."""
        return self.shuffle or self.drop > 0

    def __call__(self, caption: str, rng: Random) -> str:
        """The caption as it is used this time."""
        tags = [tag.strip() for tag in caption.split(",")]
        kept, others = tags[: self.keep], [tag for tag in tags[self.keep :] if rng.random() >= self.drop]
        if self.shuffle:
            rng.shuffle(others)
        return ", ".join(kept + others)


@dataclass(frozen=True)
class BatchOptions:
    """How the batches are made.

    drop           share of captions that are replaced by the empty prompt, for guidance
    tags           how captions made of tags are changed
    prior_weight   loss weight of the class images
    inpaint        whether batches have random masks, for U-Nets with 9 channels; the VAE encodes what they leave
    noise          changes the noise (m, C, h, w) of a part, with the generator of the part
    timesteps      t is in [low, high); None: all of the schedule
    group          consecutive items that stay together
    trained        number of trained parameters, which need memory
    """

    drop: float = 0.0
    tags: Tags = field(default_factory=Tags)
    prior_weight: float = 1.0
    inpaint: bool = False
    noise: Callable[[Tensor, torch.Generator], Tensor] | None = None
    timesteps: tuple[int, int] | None = None
    group: int = 1
    trained: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ValueError(f"--drop must be from 0 to 1, got {self.drop}")
        if not 0 <= self.prior_weight < float("inf"):
            raise ValueError(f"--prior-weight must be at least 0, got {self.prior_weight}")


class Batches:
    """`batches(step)` are the parts of a step for this process."""

    def __init__(
        self,
        data: TrainingData,
        model: StableDiffusion,
        recipe: Recipe,
        processes: Processes,
        options: BatchOptions = BatchOptions(),  # frozen
    ) -> None:
        self.recipe, self.processes, self.options = recipe, processes, options
        self.tokenizer, self.factor, self.steps = model.tokenizer, model.config.vae.factor, model.schedule.steps
        self.vae = model.vae if options.inpaint else None
        device = processes.device
        self.names_of, self.texts, self.choices = data.names, data.texts, data.choices
        self.bucket, self.row = data.bucket, data.row
        self.regular = data.regular
        stored = fitting(data.flat, device, options.trained)
        self.ids, self.buckets = stored.pop("ids"), data.nested(stored)
        self.text = data.text and type(data.text)(stored["text.context"], stored.get("text.pooled"))
        self.sizes = _sizes(model.config.sizes, data.sizes)
        self.empty = model.tokenizer([""])[0].to(device)
        most = recipe.batch * processes.count
        self.epochs = Epochs(data.bucket, data.repeats, data.regular, most, options.group, recipe.seed)

    def names(self, step: int) -> list[str]:
        """The names of all images of a step."""
        parts = range(step * self.recipe.accumulate, (step + 1) * self.recipe.accumulate)
        return list(dict.fromkeys(self.names_of[i] for number in parts for i in self.epochs(number).tolist()))

    def __call__(self, step: int) -> Iterator[dict[str, Any]]:
        """The parts of a step for this process, as arguments of an objective: {"batch": Batch}."""
        for k in range(self.recipe.accumulate):
            number = step * self.recipe.accumulate + k
            yield {"batch": self.make(self.epochs(number), number)}

    def share(self, count: int) -> tuple[Tensor, Tensor]:
        """Of the `count` items of a part those of this process (B,), on the CPU, and their weights (B,).

        The weights make the mean over all processes that over the `count` items.
        """
        processes = self.processes
        size = -(-count // processes.count)
        mine = processes.rank * size + torch.arange(size)
        weight = (mine < count).float() * (size * processes.count / count)
        return mine.where(mine < count, 0), weight

    def draw(self, number: int, what: str, rows: int) -> Tensor:
        """Uniform random numbers in [0, 1) for the items of this process in a part, (rows, B), for a named purpose."""
        count, device = len(self.epochs(number)), self.processes.device
        uniform = torch.rand(rows, count, generator=generator(device, self.recipe.seed, what, number), device=device)
        return uniform[:, self._moved(self.share(count)[0])]

    def generators(self, number: int, what: str) -> list[torch.Generator]:
        """A generator for each item of this process in a part, for a named purpose."""
        mine, _ = self.share(len(self.epochs(number)))
        return [generator(self.processes.device, self.recipe.seed, what, number, i) for i in mine.tolist()]

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.processes.device, non_blocking=True)

    def _take(self, stored: Tensor, index: Tensor) -> Tensor:
        """Rows of the data, on the device of this process."""
        index = index.to(stored.device, non_blocking=stored.is_cuda)  # copies to the CPU must block
        return self._moved(stored[index])

    @torch.no_grad()
    def make(self, items: Tensor, number: int) -> Batch:
        """The batch of this process out of these items (m,) of one bucket, with the random numbers of a part."""
        options, seed, device, count = self.options, self.recipe.seed, self.processes.device, len(items)
        bucket = self.buckets[int(self.bucket[items[0]])]
        mine, weight = self.share(count)
        there = self._moved(mine)
        rng = generator(device, seed, "part", number)
        noise, sampled = torch.randn(2, count, *bucket["mean"].shape[1:], generator=rng, device=device)
        low, high = options.timesteps or (0, self.steps)
        t = torch.randint(low, high, (count,), generator=rng, device=device)
        noise = options.noise(noise, rng) if options.noise else noise

        # what is chosen, not computed with, is drawn on the CPU, which never waits for the device
        phrasing, dropped, flips = torch.rand(3, count, generator=generator("cpu", seed, "choices", number))
        chosen, flipped = items[mine], flips[mine] < 0.5
        rows = self.row[chosen]
        mean, std = (self._latents(bucket, name, rows, flipped) for name in ("mean", "std"))
        weight = weight * torch.where(self.regular[chosen], options.prior_weight, 1.0)
        batch = Batch(mean + std * sampled[there], noise[there], t[there], self._moved(weight), self.empty)
        batch = self._with_text(batch, chosen, phrasing[mine], dropped[mine] < options.drop, (number, mine))
        if self.sizes is not None:
            batch = batch._replace(sizes=self._moved(self.sizes[chosen]))
        if "mask" in bucket:
            batch = batch._replace(mask=self._mirrored(bucket, self._take(bucket["mask"], rows).float(), flipped))
        if "hint" in bucket:
            batch = batch._replace(hint=self._mirrored(bucket, self._take(bucket["hint"], rows), flipped))
        if self.vae is not None:
            images = self._mirrored(bucket, to_floats(self._take(bucket["pixels"], rows)), flipped)
            rngs = [generator(device, seed, "mask", number, i) for i in mine.tolist()]
            masks = torch.cat([random_masks(1, images.shape[2], images.shape[3], each) for each in rngs])
            masked = self.vae.encode(masked_image(images, masks)).mode()
            batch = batch._replace(concat=mask_channels(latent_mask(masks, self.factor), masked))
        return batch

    def _latents(self, bucket: Mapping[str, Tensor], name: str, rows: Tensor, flipped: Tensor) -> Tensor:
        """Rows (B, C, h, w) of means or deviations, some of mirrored images, whose latents are not mirrored ones."""
        found = self._take(bucket[name], rows).float()
        if FLIPPED + name not in bucket:
            return found
        other = self._take(bucket[FLIPPED + name], rows).float()
        return torch.where(self._moved(flipped)[:, None, None, None], other, found)

    def _mirrored(self, bucket: Mapping[str, Tensor], images: Tensor, flipped: Tensor) -> Tensor:
        """Images (B, C, H, W), of which some are mirrored where the data has latents of both."""
        if FLIPPED + "mean" not in bucket:
            return images
        return torch.where(self._moved(flipped)[:, None, None, None], images.flip(-1), images)

    def _with_text(
        self, batch: Batch, chosen: Tensor, phrasing: Tensor, dropped: Tensor, place: tuple[int, Tensor]
    ) -> Batch:
        """The batch with the captions of the items, and with their encoded text if there is any.

        phrasing (B,) in [0, 1) chooses a caption, dropped (B,) says which are empty. `place` is the part, and the
        items' places in it.
        """
        texts = [self.choices[i] for i in chosen.tolist()]
        captions = torch.tensor([each[int(u * len(each))] for each, u in zip(texts, phrasing.tolist(), strict=True)])
        if self.options.tags.change:
            ids = self._tagged(captions.tolist(), place)
        else:
            ids = self._take(self.ids, captions).long()
        ids = torch.where(self._moved(dropped)[:, None], self.empty, ids)
        if self.text is None or self.options.tags.change:
            return batch._replace(ids=ids)
        row = torch.where(dropped, len(self.texts), captions)  # the last one is the empty prompt
        pooled = None if self.text.pooled is None else self._take(self.text.pooled, row)
        return batch._replace(ids=ids, context=self._take(self.text.context, row), pooled=pooled)

    def _tagged(self, captions: Sequence[int], place: tuple[int, Tensor]) -> Tensor:
        number, mine = place
        rngs = [Random(f"{self.recipe.seed} tags {number} {i}") for i in mine.tolist()]
        texts = [self.options.tags(self.texts[i], rng) for i, rng in zip(captions, rngs, strict=True)]
        return self._moved(self.tokenizer(texts, lambda note: None).long())


def _sizes(names: Sequence[str], sizes: Tensor) -> Tensor | None:
    """The numbers of `Config.sizes` for all images, (n, S), out of those of `BASE_SIZES`, (n, 6); None for no names."""
    if not names:
        return None
    columns = [
        sizes[:, BASE_SIZES.index(name)]
        if name in BASE_SIZES
        else torch.full((len(sizes),), float(getattr(SamplingParams, name)))
        for name in names
    ]
    return torch.stack(columns, dim=1)
