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
from ..checkpoints.checkpoint import CheckpointError
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
MOST_CONTROLS = 3  # control networks that stay in memory while no job runs
SMALL = 32 * 32  # pixels of latents that are decoded for a preview as they are for the result


@dataclass(eq=False)
class Loaded:
    """A model, and the adapters that it has at the moment."""

    entry: Entry
    model: StableDiffusion
    lockstep: Lockstep
    loras: tuple[tuple[Entry, float], ...] | None = ()  # None while they are being changed, and if that failed
    words: dict[Entry, list[str]] = field(default_factory=dict)  # of the embeddings that fit
    _names: list[str] = field(default_factory=list)  # of the LoRAs in the model
    _controls: dict[str, None] = field(default_factory=dict)  # names of those in the model, the last one used last
    _tried: set[Entry] = field(default_factory=set)
    _linear: LinearDecoder | None = None

    def merge(self, loras: tuple[tuple[Entry, float], ...]) -> None:
        """Merge these LoRAs in place of those that are merged. Raises CheckpointError for one that does not fit."""
        if loras == self.loras:
            return
        self.loras = None
        if self._names:
            self.model.remove_lora(*self._names)
        self._names = []
        files = [LoraFile(entry.path, weight) for entry, weight in loras]
        try:
            self._names = self.model.add_loras(files, note=lambda text: None)
        except CheckpointError:  # seen before a weight was changed
            self.loras = ()
            raise
        self.loras = loras

    def add_embeddings(self, entries: Sequence[Entry]) -> None:
        """Add the words of those that are new. One for another family of models is left out."""
        for entry in entries:
            if entry in self._tried:
                continue
            try:
                self.words[entry] = self.model.add_embedding(entry.path)
                self._tried.add(entry)
            except ValueError as error:
                if isinstance(error, CheckpointError):  # else its word is taken, by that of a LoRA perhaps
                    self._tried.add(entry)
                log.info("the embedding %s is not added: %s", entry.name, one_line(str(error), 300))

    def add_controls(self, controls: Sequence[Control], catalogue: Catalogue) -> None:
        """Add the control networks that hints are for. Raises CheckpointError for one that does not fit."""
        for control in controls:
            if control.name not in self.model.controls:
                entry = catalogue.find("control", control.name)
                self.model.add_control(entry.path, control.name, note=lambda text: None)
            self._controls.pop(control.name, None)
            self._controls[control.name] = None

    def drop_controls(self) -> None:
        """Remove the control networks that were used least recently, but for a few. While no job runs."""
        for name in list(self._controls)[:-MOST_CONTROLS]:
            self.model.remove_control(name)
            del self._controls[name]

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
