"""The loss of held-out images, always with the same noise and timesteps: it shows overfitting.

Each held-out image is noised at ten timesteps, one in each tenth of the schedule. The mean error of each tenth is
logged, and so is their mean, weighted by min-SNR (Hang et al. 2023) so that all tenths matter. If it rises while the
training loss falls, the model learns the images by heart. Only the trend matters: the
training loss is weighted differently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sd.training import EMA, min_snr_weight

from .batches import Batch, Batches
from .data import generator
from .objective import Objective

DECILES = 10
MOST = 32  # held-out images that are used: each costs ten evaluations at every save


class Validation:
    """Measures an objective on held-out images.

    batches     of the held-out images, one in each step of one process
    images      number of the steps that are used, the same ones each time
    precision   of autocast; None: float32
    average     of the weights, which are measured if there are any
    """

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        images: int,
        precision: torch.dtype | None,
        average: EMA | None = None,
    ) -> None:
        self.objective, self.batches, self.images = objective, batches, min(images, MOST)
        self.precision, self.average = precision, average

    @torch.no_grad()
    def __call__(self) -> Mapping[str, float | list[float]]:
        """ "loss": the weighted mean; "deciles": the mean error in each tenth of the timesteps, clean to noisy."""
        with self.average.swapped() if self.average is not None else contextlib.nullcontext():
            return self._measured()

    def _measured(self) -> Mapping[str, float | list[float]]:
        errors, weights = [], []
        was_training = self.objective.training
        self.objective.eval()
        for step in range(self.images):
            (part,) = self.batches(step)
            batch = self._noised(part["batch"], step)
            device = batch.x0.device.type
            with torch.autocast(device, self.precision, enabled=self.precision is not None):
                errors.append(self.objective.errors(batch).float())
            weights.append(min_snr_weight(self.objective.schedule, batch.t))
        self.objective.train(was_training)
        error, weight = torch.stack(errors), torch.stack(weights)
        deciles = [round(value, 6) for value in error.mean(0).tolist()]
        return {"loss": round((error * weight).mean().item(), 6), "deciles": deciles}

    def _noised(self, item: Batch, number: int) -> Batch:
        """One item at ten timesteps, with noise of its own."""
        device = item.x0.device
        rng = generator(device, number, "validation")
        steps = self.objective.schedule.steps
        uniform = torch.rand(DECILES, generator=rng, device=device)
        t = ((torch.arange(DECILES, device=device) + uniform) * steps / DECILES).long().clamp(max=steps - 1)
        noise = torch.randn(DECILES, *item.x0.shape[1:], generator=rng, device=device)

        def repeated(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.expand(DECILES, *value.shape[1:])

        same = Batch(*map(repeated, item))  # type: ignore[arg-type]  # those that a batch must have are tensors
        return same._replace(noise=noise, t=t, weight=torch.ones(DECILES, device=device))
