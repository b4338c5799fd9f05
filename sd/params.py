"""How to sample: what text to image, image to image and inpainting have in common, checked before any work is done.

>>> settings = Settings.of(sampler="DPM++ 2M Karras")
>>> settings.sampler.label, settings.steps, settings.spacing
('DPM++ 2M', 25, 'karras')
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from .samplers import Sampler, sampler
from .schedule import SPACINGS

SAMPLER = "ddim"  # the default
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Settings:
    """Sampling settings that any model can run with; `Settings.of` makes them of what a user says."""

    sampler: Sampler
    steps: int  # of the whole grid, of which strength below 1 takes the last part
    spacing: str  # one of `schedule.SPACINGS`
    guidance: float | None  # 0 ignores the prompt, 1 is plain, above 1 exaggerates it; None: the model's own
    eta: float | None  # DDIM's share of fresh noise, 0 to 1
    seed: int  # 0 to 2^64 - 1
    n: int  # pictures of each prompt
    strength: float  # how much of the way to start from noise: 0 keeps the picture, 1 keeps nothing

    @classmethod
    def of(
        cls,
        *,
        sampler: str | Sampler = SAMPLER,
        steps: int | None = None,
        spacing: str | None = None,
        guidance: float | None = None,
        eta: float | None = None,
        seed: int = 0,
        n: int = 1,
        strength: float = 1.0,
    ) -> Settings:
        """Fill in what is customary for the sampler; ValueError, in one line, for values that cannot be.

        Whether a model has as many timesteps as `steps` is for its schedule to say.
        """
        chosen = find_sampler(sampler)
        seed, n = whole("seed", seed), whole("n", n)
        steps = chosen.steps if steps is None else whole("steps", steps)
        spacing = chosen.spacing if spacing is None else spacing
        if guidance is not None:
            number("guidance", guidance)
        number("strength", strength)
        if eta is not None:
            number("eta", eta)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        one_of("spacing", spacing, SPACINGS)
        if guidance is not None and not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}")
        if eta is not None and chosen.stochastic != "eta":
            raise ValueError(f"eta is a setting of ddim, not of {chosen.label}")
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, got {seed}")
        if n < 1:
            raise ValueError(f"the number of pictures must be at least 1, got {n}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        return cls(chosen, steps, spacing, guidance, eta, seed, n, strength)


def find_sampler(name: str | Sampler) -> Sampler:
    """A sampler itself, or the one of this name."""
    return name if isinstance(name, Sampler) else sampler(name)


def whole(name: str, value: int) -> int:
    """Whole numbers of any kind (numpy's too) as int; ValueError, with the name, for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def number(name: str, value: float) -> float:
    """ValueError, with the name, for anything that is not a real number."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r:.100}")
    return float(value)


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """ValueError that lists what is known, if `value` is something else."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")
