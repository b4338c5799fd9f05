"""train.py without --lora and --train-word: the U-Net as a whole, and with --train-text the text encoders."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.pipeline import StableDiffusion
from sd.runtime.device import find_dtype

from . import models
from .captions import text_encoders
from .data import Source
from .dataset import TrainingData


class WholeModel:
    """The networks of a model to train, and the file of the trained model."""

    def __init__(self, args: argparse.Namespace, model: StableDiffusion) -> None:
        self.args, self.model = args, model
        self.modules = nn.ModuleDict()  # beside the networks
        self.trains_text: bool = args.train_text or not args.ckpt
        self.is_random = False
        self.caption: str | None = None
        self.path: Path = args.out / "model.safetensors"

    def told(self, source: Source) -> Source:
        """The source as it is."""
        return source

    def prepare(self, data: TrainingData) -> None:
        """Make the networks trainable; of a new model, with the tokens of the captions only."""
        args, model = self.args, self.model
        if args.ckpt and not args.train_text and (unknown := models.unknown_words(model, data.ids)):
            warnings.warn(f"the model does not know these words: {unknown} (--train-text learns them)", stacklevel=1)
        model.unet.requires_grad_(True)
        if self.trains_text:
            for encoder in text_encoders(model).values():
                encoder.requires_grad_(True)
                if not (encoder.config.hidden_norm or encoder.config.pooled):  # nothing uses it: SDXL's first encoder
                    encoder.norm.requires_grad_(False)
        if not args.ckpt:
            if args.text:
                model.text_encoder.load_state_dict(models.load_text_encoder(args.text, model).state_dict())
            models.forget_unused(model.text_encoder, torch.cat([data.ids.long(), model.tokenizer([""])]))

    def rates(self, lr: float) -> dict[str, float]:
        """Learning rates of parts of their own, relative to `lr`."""
        return {} if self.args.text_lr is None else {"text_encoder": self.args.text_lr / lr}

    def describe(self) -> str:
        """What is trained, for the line about the run."""
        return self.model.config.name

    @contextlib.contextmanager
    def sampling(self, weights: Mapping[str, Tensor]) -> Iterator[StableDiffusion]:
        """A model with these weights of the objective."""
        yield models.averaged(self.model, weights)

    def write(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the model. Raises ArithmeticError if weights are not finite."""
        trained = models.averaged(self.model, weights)
        models.write_model(trained, self.path, find_dtype(self.args.export_dtype))

    def written(self) -> str:
        """What was written and how to use it, in a line."""
        return f"{self.path}: {self.model.config.name}, for --ckpt of every program"
