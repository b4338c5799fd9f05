"""The hyperparameters of a training run, and the options of all training programs."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from sd.runtime.device import best_dtype
from sd.training import SCHEDULES, learning_rate

from ..common.cli import Parser

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def option(default: Any, text: str) -> Any:
    """A field of `Recipe` with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of training; each field is an option of the programs."""

    steps: int = option(1000, "optimisation steps")
    batch: int = option(8, "images per process and accumulation step")
    accumulate: int = option(1, "batches whose gradients are summed before a step")
    lr: float = option(1e-4, "peak learning rate")
    schedule: str = option("cosine", "after the warm-up: cosine or linear decay to 0, or constant")
    warmup: int = option(100, "steps of linear warm-up, at most a tenth of all steps")
    clip: float = option(1.0, "maximum norm of the gradient")
    weight_decay: float = option(0.01, "weight decay of matrices and kernels, in AdamW")
    beta2: float = option(0.999, "AdamW's decay of squared gradients")
    optimizer: str = option(
        "adamw",
        "for matrices and kernels between the first and last layers: adamw, adamw8bit (a quarter of its memory; needs "
        "bitsandbytes) or muon; AdamW trains the rest",
    )
    ema: float = option(0.999, "decay of the averaged weights, which are saved; 0 for none")
    seed: int = option(0, "seed of all random numbers")
    log_every: int = option(10, "steps between log lines")
    save_every: int = option(500, "steps between saved states, samples and models")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "save_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("warmup", self.warmup >= 0, "at least 0")
        self._check("lr", 0 < self.lr < math.inf, "above 0")
        self._check("clip", self.clip > 0, "above 0")
        self._check("schedule", self.schedule in SCHEDULES, "cosine, linear or constant")
        self._check("weight_decay", self.weight_decay >= 0, "at least 0")
        self._check("beta2", 0 <= self.beta2 < 1, "from 0 to below 1")
        self._check("ema", 0 <= self.ema < 1, "from 0 to below 1")
        self._check("optimizer", self.optimizer in OPTIMIZERS, "adamw, adamw8bit or muon")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.steps, self.lr, min(self.warmup, self.steps // 10), self.schedule)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Recipe:
        """The recipe of the arguments. Raises ValueError for invalid values."""
        new, with_ckpt = args.recipes
        given = {each.name: getattr(args, each.name) for each in fields(cls)}
        return replace(with_ckpt if args.ckpt else new, **{name: v for name, v in given.items() if v is not None})


def add_loop_arguments(parser: Parser, recipe: Recipe, with_ckpt: Recipe | None = None) -> None:
    """Add the options of a run; defaults are those of `recipe`, or of `with_ckpt` when fine-tuning a checkpoint."""
    add = parser.add_argument_group("training").add_argument
    other = with_ckpt or recipe
    for each in fields(recipe):
        name, default, fine = each.name, getattr(recipe, each.name), getattr(other, each.name)
        text = f"{each.metadata['help']} (default: {default}{f', with --ckpt {fine}' if fine != default else ''})"
        add(
            f"--{name.replace('_', '-')}",
            type=type(default),
            metavar="NAME" if isinstance(default, str) else "N",
            help=text,
        )
    parser.set_defaults(recipes=(recipe, other))
    add(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="precision of the computation; what is trained stays float32 (default: auto)",
    )
    add("--checkpointing", action="store_true", help="gradient checkpointing: recompute activations to save memory")
    add("--compile", action="store_true", help="compile the networks with torch.compile")
    add(
        "--shard",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="several processes: divide weights, gradients and optimizer among them (FSDP2), instead of a copy in each",
    )
    add("--device", help='"cuda", "cpu", ... (default: the best available)')
    add("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: PyTorch's default")
    add("--resume", action="store_true", help="resume the run in --out, with its options")


def defaults_help(new: Recipe, with_ckpt: Recipe) -> str:
    """The main values of two recipes, for the help of an option that has recipes of its own."""
    first, second = (f"--steps {each.steps} --batch {each.batch} --lr {each.lr:g}" for each in (new, with_ckpt))
    return f"Defaults: {first}; for a checkpoint {second}"


def find_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32. "auto" prefers bfloat16, which needs no loss scaling."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        has_bfloat16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.bfloat16 if best_dtype(device) == torch.bfloat16 else None
