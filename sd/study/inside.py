"""A run, seen from inside: what the network was given and predicted in each step, and what it attended to.

    with watched(model) as watch:
        run = watch.model.prepare(TextToImage.of("a red house", steps=20, seed=7))
        watch.begin(run)
        for step in run:
            seen = watch.see(step)          # maps of each word, the share of each, where guidance acted
    run.result()                            # the same images as without, to the bit

study/attention.py keeps every map of every head and layer. A large model would need gigabytes for that, so here the
maps are averaged as they come: over heads, layers and evaluations of the network. What is left is a map for each word
and step. The mean over all steps is that of `AttentionMaps.mean`.

>>> model = StableDiffusion.load()
>>> seen, watch = look(model, TextToImage.of("a red house", steps=2, seed=7))
>>> [word.text for word in watch.words.words], seen[0].maps.shape, seen[0].guidance.shape
(['a', 'red', 'house'], torch.Size([3, 16, 16]), torch.Size([16, 16]))
>>> total = seen[0].maps.sum(0) + seen[0].special.sum(0)  # of all positions of the context
>>> torch.allclose(total, torch.ones(16, 16), atol=1e-4)
True
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning import Conditioning
from ..params import TextToImage
from ..pipeline import StableDiffusion
from ..run import Run
from ..samplers import Step
from ..schedule import Level
from .attention import Call, watching
from .prompt_words import SPECIAL, PromptWords


class Seen(NamedTuple):
    """One step. Maps have the size of the latent; K is the number of words that the prompt has in any step."""

    step: int  # counted from 0
    level: Level  # of x
    x: Tensor  # (1, C, h, w), the noisy latent that the network was given
    x0: Tensor  # (1, C, h, w), the clean latent that was predicted from it
    present: list[int]  # the words that the prompt has in this step
    maps: Tensor | None  # (K, h, w), where each word is attended to; None if no attention was computed
    special: Tensor | None  # (3, h, w), the same for what is no word: `SPECIAL`
    guidance: Tensor | None  # (h, w), |x0 with the prompt - x0 without| over the channels; None without guidance


class Watch:
    """Looks at one run of one image. See `watched`.

    model   to prepare the run with
    words   of the prompt, once the run has begun
    """

    words: PromptWords

    def __init__(self, model: StableDiffusion) -> None:
        self.model = model
        self._run: Run | None = None
        self._step = 0
        self._groups: list[Tensor] = []  # of this step, on the device
        self._sums: dict[tuple[int, int], Tensor] = {}  # of this step, by (height, width): (K + 3, N)
        self._count = 0  # of the maps in these sums
        self._x: Tensor | None = None  # what the network was given first in this step, and when
        self._t = 0.0
        self._guidance: Tensor | None = None
        self._total: Tensor | None = None  # of all steps
        self._total_count = 0

    def begin(self, run: Run) -> None:
        """Look at this run from now on. Raises ValueError for one of several images."""
        if len(run.seeds) != 1:
            raise ValueError(f"a run of one image can be looked at, not one of {len(run.seeds)}")
        self._run, self.words = run, PromptWords(run)

    def see(self, step: Step) -> Seen:
        """What happened in the step that was just taken."""
        x = step.x if self._x is None else self._x  # a step without an evaluation
        h, w = x.shape[-2:]
        maps = special = None
        if self._count:
            both = sum(_resized(total, size, (h, w)) for size, total in self._sums.items())
            assert isinstance(both, Tensor)
            if self._total is not None and self._total.shape[-2:] != both.shape[-2:]:  # the second pass of `HighRes`
                self._total = F.interpolate(self._total[None], (h, w), mode="bilinear", align_corners=False)[0]
            self._total = both if self._total is None else self._total + both
            self._total_count += self._count
            maps, special = (both / self._count).split([len(self.words.words), len(SPECIAL)])
        present = self.words.present(self._step)
        seen = Seen(self._step, self._level(step), x, step.x0, present, maps, special, self._guidance)
        self._step, self._sums, self._count, self._groups = self._step + 1, {}, 0, []
        self._x = self._guidance = None
        return seen

    def mean(self) -> tuple[Tensor, Tensor] | None:
        """The mean maps of the words (K, h, w) over all steps, and of `SPECIAL` (3, h, w); None if there are none."""
        if self._total is None:
            return None
        maps, special = (self._total / self._total_count).split([len(self.words.words), len(SPECIAL)])
        return maps, special

    def _level(self, step: Step) -> Level:
        return step.level if self._x is None else self.model.schedule.level(max(self._t, 0.0))

    def attended(self, call: Call) -> None:
        """Called by each layer of cross-attention, after it: add up its maps."""
        if self._run is None or self._x is None:
            return
        h, w = (-(-side // 2**call.site.level) for side in self._x.shape[-2:])  # halving rounds up
        with torch.no_grad():
            if not self._groups:
                found = self.words.groups(self._step, call.context.shape[1])
                self._groups = [table.to(call.x.device) for table in found]
            parts = len(self._groups)  # with guidance the batch is [uncond, cond, ...]
            weights = call._replace(x=call.x[-parts:], context=call.context[-parts:]).weights().mean(1)  # (parts, N, M)
            total = torch.stack([own @ table for own, table in zip(weights, self._groups, strict=True)])
            total[..., -len(SPECIAL) :] /= parts
            maps = total.sum(0).T
            self._sums[h, w] = self._sums[h, w] + maps if (h, w) in self._sums else maps
            self._count += 1

    def predicted(self, x: Tensor, t: Tensor, out: Tensor) -> None:
        """Called with the output of each evaluation: how far apart it is with and without the prompt."""
        parts = len(self.words.weights)
        if self._guidance is not None or out.shape != x.shape or len(out) <= parts:
            return
        out, schedule = out.float(), self.model.schedule
        uncond, conds = out[:1], out[-parts:]
        weights = torch.tensor(self.words.weights, device=out.device)[:, None, None, None]
        cond = uncond + (weights * (conds - uncond)).sum(0, keepdim=True)
        level = schedule.level(float(t[-1]))
        x0, without = (schedule.to_x0(each, x[:1].float(), level) for each in (cond, uncond))
        self._guidance = (x0 - without)[0].norm(dim=0).cpu()

    def given(self, x: Tensor, t: Tensor) -> None:
        """Called with the input of each evaluation."""
        if self._run is not None and self._x is None:
            self._x, self._t = x[-1:].float().clone(), float(t[-1])


def _resized(total: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Sums (K, N) at positions of this (height, width) -> (K, h, w) of another one, on the CPU."""
    maps = total.unflatten(-1, size).cpu()
    return F.interpolate(maps[None], to, mode="bilinear", align_corners=False)[0]


@contextmanager
def watched(model: StableDiffusion) -> Iterator[Watch]:
    """Inside a `with` block, look at a run of a model. Runs of others must not use it meanwhile: they would be seen.

    Raises ValueError for a compiled network, which cannot be looked at.
    """
    watch = Watch(copy.copy(model))

    def predict(x: Tensor, t: Tensor, conditioning: Conditioning, *wrap: Any, **named: Any) -> Tensor:
        watch.given(x, t)
        out = model.predict(x, t, conditioning, *wrap, **named)
        watch.predicted(x, t, out)
        return out

    watch.model.predict = predict  # type: ignore[method-assign]
    with watching(model.unet, watch.attended, ("cross",)):
        yield watch


def look(model: StableDiffusion, request: TextToImage) -> tuple[list[Seen], Watch]:
    """Take the steps of a request for one image, and return what was seen in each, and the `Watch` with the means."""
    with watched(model) as watch:
        run = watch.model.prepare(request)
        watch.begin(run)
        return [watch.see(step) for step in run], watch
