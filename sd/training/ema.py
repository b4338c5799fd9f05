"""The moving average of the weights: average = decay average + (1 - decay) weights (Ho et al. 2020, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class EMA:
    """Exponential moving average of the parameters that a module trains: decay average + (1 - decay) parameter.

    In the first updates the decay is (1 + n) / (10 + n), so that the start is soon forgotten (as in the original's
    LitEma).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """Everything that `load_state_dict` needs to go on."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state."""
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)
