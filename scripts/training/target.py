"""What a run of train.py trains: a whole model, or adapters of an unchanged one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from sd.pipeline import StableDiffusion

from .data import Source
from .dataset import TrainingData


class Target(Protocol):
    """What is trained, and its files. `weights` are those of an `Objective`, by the names of its parameters."""

    modules: nn.ModuleDict  # what is trained beside the networks of the model
    trains_text: bool  # whether what the text encoders say changes
    is_random: bool  # whether it draws random numbers (dropout)
    caption: str | None  # of images without one; None: that is an error

    def told(self, source: Source) -> Source:
        """The source, with the captions that this training needs."""

    def set_trainable(self) -> None:
        """Let what is trained have gradients, and freeze the rest."""

    def attach(self) -> None:
        """Let the networks compute with the modules."""

    def prepare(self, data: TrainingData) -> None:
        """Look at the data before the training begins: what the model does not know of it, what files say about it."""

    def rates(self, lr: float) -> dict[str, float]:
        """The learning rates of parts that have their own, relative to `lr`, by the beginning of parameters' names."""

    def describe(self) -> str:
        """What is trained, for the line about the run."""

    def sampling(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[StableDiffusion]:
        """A model with these weights, to generate samples with."""

    def write(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the files. Raises ArithmeticError if weights are not finite."""

    def written(self) -> str:
        """What was written and how to use it, in a line."""
