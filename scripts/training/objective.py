"""The objective of train.py: text encoders and U-Net with the diffusion loss, its weighting, and the noise.

--weighting    none, min-snr, debiased, velocity      sd/training/losses.py
--huber C      pseudo-Huber in place of the square
--noise-offset, --pyramid-noise                       sd/training/noise.py
--zero-snr     the schedule ends in pure noise        sd/schedule.py
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sd.config import PREDICTIONS, Config
from sd.pipeline import StableDiffusion
from sd.schedule import Schedule
from sd.training import (
    debiased_weight,
    huber,
    huber_scale,
    masked,
    min_snr_weight,
    offset_noise,
    pyramid_noise,
    sample_losses,
    squared_error,
    velocity_weight,
)
from sd.training.losses import Distance

from ..common.cli import Parser
from .batches import Batch
from .captions import Captions, text_encoders

WEIGHTINGS = ("none", "min-snr", "debiased", "velocity")
# the options of the objective, with their values where they are not given
USUAL = {
    "prediction": None, "zero_snr": False, "weighting": "none", "min_snr_gamma": 5.0, "huber": None,
    "noise_offset": None, "pyramid_noise": None, "timesteps": None,
}  # fmt: skip
NoiseShape = Callable[[Tensor, torch.Generator], Tensor]  # white noise (B, C, h, w) -> that of training


@dataclass(frozen=True)
class LossParams:
    """The distance and the weighting of the loss.

    weighting   of the timesteps, one of WEIGHTINGS
    gamma       of min-SNR
    huber       scale of the pseudo-Huber distance at high noise; None: the squared error
    """

    weighting: str = "none"
    gamma: float = 5.0
    huber: float | None = None

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"--weighting must be one of {', '.join(WEIGHTINGS)}, got {self.weighting}")
        if not self.gamma > 0:
            raise ValueError(f"--min-snr-gamma must be above 0, got {self.gamma}")
        if self.huber is not None and not 0 < self.huber <= 1:
            raise ValueError(f"--huber must be above 0 and at most 1, got {self.huber}")

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor | None:
        """The weights (B,) of timesteps t (B,); None if all count alike."""
        if self.weighting == "min-snr":
            return min_snr_weight(schedule, t, self.gamma)
        weights = {"debiased": debiased_weight, "velocity": velocity_weight}
        return weights[self.weighting](schedule, t) if self.weighting in weights else None

    def distance(self, schedule: Schedule, t: Tensor, mask: Tensor | None) -> Distance:
        """The distance for a batch, whose mean is over the mask (B, 1, h, w) if there is one."""
        distance = squared_error if self.huber is None else huber(huber_scale(schedule, t, self.huber))
        return distance if mask is None else masked(distance, mask)


class Objective(nn.Module):
    """Text encoders and U-Net with the diffusion loss, as one module for DistributedDataParallel.

    adapters    what is trained beside the networks, and attached to them: modules whose names begin those of their
                parameters
    with_text   whether captions are encoded here; if not, batches have encoded text
    """

    def __init__(
        self, model: StableDiffusion, params: LossParams, adapters: nn.ModuleDict | None = None, with_text: bool = True
    ) -> None:
        super().__init__()
        for name, encoder in text_encoders(model).items() if with_text else ():
            self.add_module(name, encoder)
        self.unet, self.captions = model.unet, Captions(model)
        self.schedule, self.params = model.schedule, params
        for name, module in (adapters or {}).items():
            self.add_module(name, module)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        weight = self.params.weight(self.schedule, batch.t)
        return (self.errors(batch) * (batch.weight if weight is None else batch.weight * weight)).mean()

    def errors(self, batch: Batch) -> Tensor:
        """The error of each item (B,), without weights of timesteps or items."""
        distance = self.params.distance(self.schedule, batch.t, batch.mask)
        return sample_losses(self.unet, self.schedule, batch.x0, self.captions(batch), batch.t, batch.noise, distance)


def add_objective_arguments(parser: Parser) -> None:
    """Add the options of the objective."""
    add = parser.add_argument_group("objective").add_argument
    add("--prediction", choices=PREDICTIONS, help="predict the noise or the velocity (default: as the model does)")
    add("--zero-snr", action="store_true", help="let the schedule end in pure noise; for --prediction v")
    add("--weighting", choices=WEIGHTINGS, default="none", help="loss weight of timesteps (default: none)")
    add(
        "--min-snr-gamma",
        type=float,
        default=5.0,
        metavar="G",
        help="gamma of --weighting min-snr (default: %(default)s)",
    )
    add("--huber", type=float, metavar="C", help="pseudo-Huber loss with scale C, such as 0.1 (default: squared error)")
    add(
        "--timesteps", metavar="LOW-HIGH",
        help="train at these timesteps only, such as 300-1000: high ones decide what is where, low ones the details "
        "(default: all)",
    )  # fmt: skip
    add(
        "--noise-offset",
        type=float,
        metavar="S",
        help="add a random offset to the noise of each channel; S is its standard deviation, such as 0.05",
    )
    add(
        "--pyramid-noise",
        type=float,
        metavar="D",
        help="add noise of lower resolutions, each weighted by D relative to the next higher one, such as 0.6",
    )


def loss_params(args: argparse.Namespace) -> LossParams:
    """The losses that the options ask for. Raises ValueError for options that do not go together."""
    if args.min_snr_gamma != USUAL["min_snr_gamma"] and args.weighting != "min-snr":
        raise ValueError("--min-snr-gamma goes with --weighting min-snr")
    return LossParams(args.weighting, args.min_snr_gamma, args.huber)


def noise_shape(args: argparse.Namespace) -> NoiseShape | None:
    """The noise that the options ask for; None for white noise."""
    if args.noise_offset is not None and not 0 < args.noise_offset <= 1:
        raise ValueError(f"--noise-offset must be above 0 and at most 1, got {args.noise_offset}")
    if args.pyramid_noise is not None and not 0 < args.pyramid_noise < 1:
        raise ValueError(f"--pyramid-noise must be above 0 and below 1, got {args.pyramid_noise}")
    if args.noise_offset and args.pyramid_noise:
        raise ValueError("--noise-offset and --pyramid-noise cannot be used together: give one")
    if args.noise_offset:
        return lambda noise, rng: offset_noise(noise, args.noise_offset, rng)
    if args.pyramid_noise:
        return lambda noise, rng: pyramid_noise(noise, args.pyramid_noise, rng)
    return None


def timesteps(args: argparse.Namespace, config: Config, schedule: Schedule) -> tuple[int, int] | None:
    """The timesteps of --timesteps, from the first to below the second; None for all.

    Without the option those of SDXL's refiner are the lowest fifth, on which it was trained.
    """
    if args.timesteps is None:
        return (0, schedule.steps // 5) if config.is_refiner else None
    found = re.fullmatch(r"(\d{1,6})-(\d{1,6})", args.timesteps)
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 <= low < high <= schedule.steps:
        expected = f"two whole numbers from 0 to {schedule.steps}, as in 300-{schedule.steps}"
        raise ValueError(f"--timesteps must be {expected}, got {args.timesteps}")
    return low, high


def retargeted(config: Config, args: argparse.Namespace) -> Config:
    """The config with another prediction or schedule, if the options ask for one; a checkpoint has to learn it."""
    schedule = config.schedule
    if args.prediction:
        schedule = replace(schedule, prediction=args.prediction)
    if args.zero_snr:
        if schedule.prediction != "v":
            raise ValueError(
                "--zero-snr needs --prediction v: a model that predicts eps learns nothing from pure noise"
            )
        if schedule.alpha_bar is not None and not schedule.to_noise:
            raise ValueError(f"--zero-snr: {config.name} has a schedule of its own, which cannot be rescaled")
        schedule = replace(schedule, zero_snr=schedule.alpha_bar is None)
    return replace(config, schedule=schedule)
