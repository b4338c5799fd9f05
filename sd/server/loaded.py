"""A model in memory, with what was added to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.added import LoraFile
from ..control_params import Control
from ..imaging.previews import LinearDecoder
from ..lockstep import Lockstep
from ..messages import one_line
from ..pipeline import StableDiffusion
from ..run import Run
from ..samplers import Step
from .catalogue import Catalogue, Entry
from .settings import ServerSettings

if TYPE_CHECKING:
    from .engine import Setup

log = logging.getLogger("sd.server")
SMALL = 32 * 32  # pixels of latents that are decoded for a preview as they are for the result


@dataclass(eq=False)
class Loaded:
    """A model, and the adapters that it has at the moment."""

    entry: Entry
    model: StableDiffusion
    lockstep: Lockstep
    loras: tuple[tuple[Entry, float], ...] = ()
    words: dict[Entry, list[str]] = field(default_factory=dict)  # of the embeddings that fit
    _names: list[str] = field(default_factory=list)  # of the LoRAs in the model
    _tried: set[Entry] = field(default_factory=set)
    _linear: LinearDecoder | None = None

    def merge(self, loras: tuple[tuple[Entry, float], ...]) -> None:
        """Merge these LoRAs in place of those that are merged. Raises CheckpointError for one that does not fit."""
        if loras == self.loras:
            return
        if self._names:
            self.model.remove_lora(*self._names)
        self._names, self.loras = [], ()
        files = [LoraFile(entry.path, weight) for entry, weight in loras]
        self._names = self.model.add_loras(files, note=lambda text: None)
        self.loras = loras

    def add_embeddings(self, entries: Sequence[Entry]) -> None:
        """Add the words of those that are new. One for another family of models is left out."""
        for entry in entries:
            if entry in self._tried:
                continue
            self._tried.add(entry)
            try:
                self.words[entry] = self.model.add_embedding(entry.path)
            except ValueError as error:
                log.info("the embedding %s is not added: %s", entry.name, one_line(str(error), 300))

    def add_controls(self, controls: Sequence[Control], catalogue: Catalogue) -> None:
        """Add the control networks that hints are for. Raises CheckpointError for one that does not fit."""
        for control in controls:
            if control.name not in self.model.controls:
                entry = catalogue.find("control", control.name)
                self.model.add_control(entry.path, control.name, note=lambda text: None)

    def previews(self, run: Run, step: Step) -> list[Image.Image]:
        """What the model expects after a step, finished like the result."""
        return [run.start.finish(image) for image in self.decoded(run, step.x0)]

    def decoded(self, run: Run, z: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) as images: decoded if that is quick, else by a linear map, which is coarse.

        The map is fitted to the first latents that it is needed for, which must be those of images, not of noise.
        """
        if z[0, 0].numel() <= SMALL:
            return run.decode(z)
        if self._linear is None:
            self._linear = LinearDecoder.fit(z[:1], run.decode(z[:1]))
        return self._linear(z)


def load(setup: Setup, settings: ServerSettings, device: torch.device) -> Loaded:
    """Load the model of a setup, and compute the hash of its file."""
    path = None if setup.model.embedded else setup.model.path
    options: dict[str, Any] = {} if setup.vae is None else {"vae": setup.vae.path}
    model = StableDiffusion.load(
        path,
        device=device,
        dtype=settings.dtype,
        low_memory=settings.low_memory,
        cache=settings.cache if path is not None and device.type == "cpu" and not settings.low_memory else None,
        **options,
    )
    setup.model.sha256()
    for line in model.about:
        log.info("%s: %s", setup.model.name, line)
    return Loaded(setup.model, model, Lockstep(model))
