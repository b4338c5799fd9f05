"""What is sent about a run: its plan, then what was seen in each step, then the means over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...hires import HighResRun
from ...params import Inpaint
from ...pipeline import StableDiffusion
from ...run import Run
from ...samplers import SAMPLERS, Step
from ...schedule import Level, Schedule
from ...study.inside import Seen, Watch, watched
from ...study.prompt_words import SPECIAL
from ..loaded import Loaded
from .pictures import heat_map, picture, side_for

MOST_WORDS = 150  # of a prompt: each has a map in each step
SIDE = 64  # positions on the longer side of the maps of the whole run
CURVE = 48  # points of the noise curve


class InsideWatcher:
    """Looks at the run of a job, and keeps what is to be sent of it.

    events   (name, data) of each, in their order: "begin", then a "step" for each step. Only appended to, so that they
             can be read in another thread
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._watch: Watch | None = None
        self._run: Run | None = None
        self._loaded: Loaded | None = None
        self._image: Image.Image | None = None  # predicted in the last step
        self._side = 8

    @contextmanager
    def watching(self, model: StableDiffusion) -> Iterator[StableDiffusion]:
        """The model to generate with, until the job has ended."""
        with watched(model) as self._watch:
            yield self._watch.model

    def begin(self, run: Run, loaded: Loaded) -> None:
        """Before the first step. Raises ValueError for a run without steps, and a prompt of too many words."""
        assert self._watch is not None
        if not len(run):
            raise ValueError("there is nothing to see inside: no step is taken, so raise strength, or mask a part")
        self._watch.begin(run)
        self._run, self._loaded = run, loaded
        words = self._watch.words.words
        if len(words) > MOST_WORDS:
            raise ValueError(f"the prompt has {len(words)} words: at most {MOST_WORDS} can be looked at")
        self._side = side_for(len(words), len(run))
        config, params, schedule = run.model.config, run.params, run.model.schedule
        height, width = _size(run)
        about = {
            "words": [word._asdict() for word in words],
            "parts": list(self._watch.words.weights),
            "steps": len(run),
            "levels": [_level(level) for level in run.levels],
            "curve": _curve(schedule),
            "width": width * config.vae.factor,
            "height": height * config.vae.factor,
            "latent": [config.vae.latent_channels, height, width],
            "sampler": SAMPLERS[params.sampler].label,
            "evaluations": SAMPLERS[params.sampler].evaluations,
            "spacing": params.spacing,
            "guidance": params.guidance,
            "guided": run.is_guided,
            "seed": run.seeds[0],
            "prediction": config.schedule.prediction,
        }
        self.events.append(("begin", about))

    def see(self, step: Step) -> None:
        """After a step."""
        assert self._watch is not None and self._run is not None and self._loaded is not None
        seen = self._watch.see(step)
        (image,) = self._loaded.decoded(self._run, seen.x0)
        (noisy,) = self._loaded.decoded(self._run, seen.x)
        data = {
            "step": seen.step + 1,
            "steps": len(self._run),
            **_level(seen.level),
            "x0": picture(image),
            "x": picture(noisy),
            "change": None if self._image is None else difference(self._image, image),
            "maps": None if seen.maps is None else self._maps(seen, seen.maps),
            "special": None if seen.special is None else specials(seen.special),
            "guidance": None if seen.guidance is None else heat_map(seen.guidance, self._side),
        }
        self._image = image
        self.events.append(("step", data))

    def _maps(self, seen: Seen, maps: Tensor) -> list[dict[str, Any] | None]:
        """The map of each word; None for those that the prompt does not have in this step."""
        return [heat_map(values, self._side) if i in seen.present else None for i, values in enumerate(maps)]

    def summary(self, result: Image.Image) -> dict[str, Any]:
        """The means over all steps, once the job is done."""
        assert self._watch is not None and self._run is not None
        found, request = self._watch.mean(), self._run.request
        height, width = (side * self._run.model.config.vae.factor for side in _size(self._run))
        part = isinstance(request, Inpaint) and request.margin is not None
        return {
            "maps": None if found is None else [heat_map(values, SIDE) for values in found[0]],
            "special": None if found is None else specials(found[1]),
            # whether a position of a map is the same position of the result, which may be cropped or pasted
            "aligned": result.size == (width, height) and not part,
        }


def specials(maps: Tensor) -> dict[str, float]:
    """The share of attention of what is no word: of start, end and padding. (3, h, w) -> numbers in [0, 1]."""
    return {name: float(values.mean()) for name, values in zip(SPECIAL, maps, strict=True)}


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of the channels of two images, 0 to 1; images of the two passes are compared at one size.

    >>> difference(Image.new("RGB", (4, 4), "black"), Image.new("RGB", (8, 8), "white"))
    1.0
    """
    a, b = (np.asarray(image.convert("RGB").resize(other.size), dtype=np.float32) for image in (one, other))
    return float(np.abs(a - b).mean() / 255)


def _size(run: Run) -> tuple[int, int]:
    """(height, width) of the latents of the result."""
    _, height, width = run.shape if isinstance(run, HighResRun) else run.x.shape[1:]
    return height, width


def _level(level: Level) -> dict[str, float]:
    return {"t": level.t, "alpha": level.alpha, "sigma": level.sigma, "alpha_bar": level.alpha**2}


def _curve(schedule: Schedule) -> list[list[float]]:
    """[t, alpha-bar] of timesteps over the whole schedule, for its curve."""
    steps = [round(i * (schedule.steps - 1) / (CURVE - 1)) for i in range(CURVE)]
    return [[t, float(schedule.alpha_bar[t])] for t in dict.fromkeys(steps)]
