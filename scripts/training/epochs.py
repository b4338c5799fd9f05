"""Which items are seen when: a function of the seed, so that a run goes on from any step without a saved state.

An epoch is a list of parts in random order. A part has items of one bucket, all of one size. In an epoch every item is
in one part, or in as many as it has repeats, and there are as many images of the class (DreamBooth) as others: these go
on in the next epoch where they stopped.
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from .data import generator


class Order:
    """An endless stream of item indices below n, each epoch shuffled; a function of the seed."""

    def __init__(self, n: int, seed: int, what: str = "epoch") -> None:
        self.n, self.seed, self.what = n, seed, what
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, start: int, count: int) -> Tensor:
        """Elements start to start + count - 1 of the stream, (count,)."""
        out = [torch.zeros(0, dtype=torch.long)]
        while count:
            epoch, at = divmod(start, self.n)
            taken = self._epoch(epoch)[at : at + count]
            out.append(taken)
            start, count = start + len(taken), count - len(taken)
        return torch.cat(out)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {epoch: torch.randperm(self.n, generator=generator("cpu", self.seed, self.what, epoch))}
        return self._epochs[epoch]


class Epochs:
    """The items of each part of a run. `epochs(number)` are those of part `number`, counted from 0 over all epochs."""

    def __init__(self, bucket: Tensor, repeats: Tensor, regular: Tensor, most: int, group: int = 1, seed: int = 0):
        """All (n,): the number of each item's bucket, its repeats per epoch, and whether it is an image of the class.

        most    items of a part
        group   consecutive items that stay together, all in one bucket; divides `most` and n
        """
        if most % group or len(bucket) % group:
            raise ValueError(f"groups of {group} items do not divide {most} items of a step or {len(bucket)} of all")
        self.seed, self.group, self.units = seed, group, most // group
        self.bucket = bucket[::group]  # of each group
        self.regular = regular[::group].nonzero().flatten()
        learned = (~regular[::group]).nonzero().flatten()
        times = repeats[::group][learned]
        self.learned = learned.repeat_interleave(times)
        first = (times.cumsum(0) - times).repeat_interleave(times)
        self.which = torch.arange(len(self.learned)) - first  # of the repeats of its image
        self.times = times.repeat_interleave(times)
        if not len(self.learned):
            raise ValueError("there are images of the class (--reg), but none to learn")
        self.order = Order(len(self.regular), seed, "class images")
        self._starts = [0]  # the number of the first part of each epoch
        self._kept: tuple[int, list[Tensor]] = (-1, [])

    def __call__(self, number: int) -> Tensor:
        """The items (m,) of a part; m is at most `most`, and less only in the last part of a bucket."""
        epoch, at = self.find(number)
        if self._kept[0] != epoch:
            self._kept = epoch, self._plan(epoch)
        return self._kept[1][at]

    def find(self, number: int) -> tuple[int, int]:
        """The epoch of a part, and its place in it."""
        if not len(self.regular):
            return divmod(number, self._count(0))
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + self._count(len(self._starts) - 1))
        epoch = bisect.bisect_right(self._starts, number) - 1
        return epoch, number - self._starts[epoch]

    def _groups(self, epoch: int) -> Tensor:
        """The groups of items of an epoch, in no order."""
        if not len(self.regular):
            return self.learned
        count = len(self.learned)
        return torch.cat([self.learned, self.regular[self.order(epoch * count, count)]])

    def _count(self, epoch: int) -> int:
        """The number of parts of an epoch."""
        counts = torch.bincount(self.bucket[self._groups(epoch)])
        return int((-(-counts // self.units)).sum())

    def _times(self, count: int, rng: torch.Generator) -> Tensor:
        """When in an epoch, from 0 to 1, each of `_groups` is to be seen: (count,).

        An image with r repeats is seen once in each r-th of the epoch, and those of the class evenly between the
        others: so a batch rarely has an image twice, and is as mixed as it can be.
        """
        u, n = torch.rand(count, generator=rng, dtype=torch.float64), len(self.learned)
        return torch.cat([(self.which + u[:n]) / self.times, (torch.arange(count - n) + u[n:]) / n])

    def _plan(self, epoch: int) -> list[Tensor]:
        rng = generator("cpu", self.seed, "epoch", epoch)
        groups = self._groups(epoch)
        groups = groups[torch.sort(self._times(len(groups), rng)).indices]
        parts = [
            part
            for bucket in self.bucket[groups].unique()
            for part in groups[self.bucket[groups] == bucket].split(self.units)
        ]
        within = torch.arange(self.group)
        chosen = torch.randperm(len(parts), generator=rng).tolist()
        return [(parts[i][:, None] * self.group + within).flatten() for i in chosen]
