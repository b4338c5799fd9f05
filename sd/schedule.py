"""The noise schedule: how much signal and how much noise there is at each timestep.

Ho et al. 2020, "Denoising diffusion probabilistic models". Everything here uses the coordinates

    x_t = alpha x0 + sigma eps,    alpha² + sigma² = 1,    alpha² = alpha-bar_t = prod_{s <= t} (1 - beta_s)

This is the only place for step grids, for the conversion of predictions (eps, v) to x0, and for the training target.
Levels are Python floats, computed in float64, so that no sampling loop waits for a device.

    alpha    share of the signal. DDIM writes alpha_t for our alpha-bar_t
    sigma    share of the noise; sigma / alpha is the "sigma" of Karras et al. 2022 and of k-diffusion
    t        timestep, 0 (nearly clean) to steps - 1 (nearly noise); fractional between them
    eps      the noise;  v = alpha eps - sigma x0, the velocity (Salimans and Ho 2022)

>>> schedule = Schedule()
>>> level = schedule.level(999)
>>> round(level.alpha, 3), round(level.sigma, 3)
(0.068, 0.998)
>>> [level.t for level in schedule.levels(4, "trailing")]
[999.0, 749.0, 499.0, 249.0, -1.0]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex, overload

import numpy as np

from .config import ScheduleConfig

if TYPE_CHECKING:
    from torch import Tensor


class Level(NamedTuple):
    """One noise level: timestep, signal and noise."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha: k-diffusion's sigma."""
        return self.sigma / self.alpha


class Levels(list[Level]):
    """A grid: levels from noisy to clean, and `between`, for samplers that evaluate inside a step."""

    def __init__(self, levels: Iterable[Level], schedule: Schedule) -> None:
        super().__init__(levels)
        self.schedule = schedule

    @overload
    def __getitem__(self, index: SupportsIndex) -> Level: ...

    @overload
    def __getitem__(self, index: slice) -> Levels: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Level | Levels:
        """One level, or a slice of the grid."""
        if isinstance(index, slice):
            return Levels(super().__getitem__(index), self.schedule)
        return super().__getitem__(index)

    def between(self, high: float, low: float) -> Level:
        """The level halfway between two positive ratios, in ln(sigma / alpha)."""
        return self.schedule.level_of_ratio(math.sqrt(high * low))


CLEAN = Level(t=-1.0, alpha=1.0, sigma=0.0)  # one step before timestep 0, as in the original's alphas_cumprod_prev

SPACINGS = ("leading", "trailing", "linspace", "sgm", "karras", "exponential", "lcm")
ALL_STEPS = ("lcm",)  # spacings of which `strength` limits the timesteps, and all steps are taken among these
LCM_TIMESTEPS = 50  # on the grid that LCMs are distilled on: Luo et al. 2023, whose skipping step k is 20
# Samplers divide by alpha, so a schedule that ends in pure noise is clamped here, at sigma / alpha = 4519, as in other
# tools.
MIN_ALPHA_BAR = 4.8973451890853435e-08
KARRAS_RHO = 7.0  # Karras et al. 2022, "Elucidating the design space", eq. 5 and table 1


def ratios(n: int, low: float, high: float, rho: float) -> list[float]:
    """n values of sigma / alpha from high to low, evenly spaced in ratio^(1/rho), or in ln(ratio) if rho is infinite.

    Karras et al. 2022, eq. 5; rho 7 there.
    """
    parts = [i / (n - 1) for i in range(n)] if n > 1 else [0.0]
    if math.isinf(rho):
        return [high ** (1 - part) * low**part for part in parts]
    return [(high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))) ** rho for part in parts]


def to_zero_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """Rescale a schedule (steps,) so that it ends in pure noise: Lin et al. 2024, algorithm 1.

    "Common diffusion noise schedules and sample steps are flawed": alpha is shifted to end at 0 and scaled to
    keep its first value.
    """
    alpha = np.sqrt(alpha_bar)
    if len(alpha) < 2:
        return alpha_bar
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


class Schedule:
    """Noise levels of one `ScheduleConfig`."""

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        self.config = config or ScheduleConfig()
        self.steps = self.config.steps  # number of training timesteps (1000)
        # "scaled linear" of diffusers, which the original calls "linear": the square roots are evenly spaced
        roots = np.linspace(self.config.beta_start**0.5, self.config.beta_end**0.5, self.config.steps)
        alpha_bar = np.cumprod(1.0 - roots**2)
        if self.config.alpha_bar is not None:
            alpha_bar = np.array(self.config.alpha_bar)
        elif self.config.zero_snr:
            alpha_bar = to_zero_snr(alpha_bar)
        self.alpha_bar = np.maximum(alpha_bar, MIN_ALPHA_BAR)
        self.betas = 1.0 - self.alpha_bar / np.append(1.0, self.alpha_bar[:-1])
        self._log_ratio = 0.5 * np.log((1.0 - self.alpha_bar) / self.alpha_bar)  # ln(sigma / alpha), rising with t

    def level(self, t: float) -> Level:
        """The level of timestep t in [0, steps - 1]; -1 is clean data.

        Between whole timesteps ln(sigma / alpha) is interpolated linearly, as in k-diffusion (external.py).
        """
        if t == -1:
            return CLEAN
        if not 0 <= t <= self.steps - 1:
            raise ValueError(f"timestep must be -1 (clean) or in [0, {self.steps - 1}], got {t}")
        below = int(t)
        if t == below:
            alpha_bar = float(self.alpha_bar[below])
            return Level(float(t), math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar))
        ratio = math.exp(float(np.interp(t, np.arange(self.steps), self._log_ratio)))
        return self._from_ratio(float(t), ratio)

    def level_of_ratio(self, ratio: float) -> Level:
        """The level with this sigma / alpha (k-diffusion's sigma); t stays in the schedule's range; 0 is clean."""
        if ratio == 0:
            return CLEAN
        t = float(np.interp(math.log(ratio), self._log_ratio, np.arange(self.steps)))
        return self._from_ratio(t, ratio)

    @staticmethod
    def _from_ratio(t: float, ratio: float) -> Level:
        alpha = 1.0 / math.hypot(1.0, ratio)
        return Level(t, alpha, ratio * alpha)

    def levels(self, n: int, spacing: str = "leading", strength: float = 1.0, one_step_at: int | None = None) -> Levels:
        """The grid of an n-step run: n levels to evaluate, noisiest first, and the final level.

        n in 1..steps. `strength` in [0, 1] keeps the last int(n * strength) steps, for image to image; 0 leaves only
        the final level. With lcm it limits the timesteps, and all n steps are taken among these. Spacings:

        leading      ..., 1 + steps/n, 1, then timestep 0, which is not quite clean: as in the original DDIM if n
                     divides 1000. If not, it takes too many steps or reads past the end; here strides stay even.
        trailing     steps - 1 downwards in even strides, to clean (Lin et al. 2024, "Common diffusion noise schedules")
        linspace     steps - 1 to 0 inclusive, with fractional timesteps (k-diffusion's get_sigmas), to clean
        sgm          steps - 1 downwards in even strides that would end at 0 after n steps, rounded down to whole
                     timesteps, to clean: generative-models, with which SDXL was made
        karras       evenly spaced in ratio^(1/7) over the range of the schedule, to clean (Karras et al. 2022)
        exponential  evenly spaced in ln(ratio) over the same range, to clean
        lcm          n of the 50 timesteps that latent consistency models are distilled on (19, 39, ..., 999), to clean.
                     `strength` keeps the lowest int(50 * strength) of these, as LCMScheduler of diffusers does (Luo et
                     al. 2023). Raises ValueError if they are fewer than n

        one_step_at is the timestep at which a single step at strength 1 starts, with every spacing, for a model that
        was distilled to one step from there (few_step.py).
        """
        if not isinstance(n, (int, np.integer)) or not 1 <= n <= self.steps:
            raise ValueError(f"steps must be a whole number from 1 to {self.steps}, got {n}")
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        if spacing not in SPACINGS:
            raise ValueError(f"unknown spacing {spacing!r}, expected one of {', '.join(SPACINGS)}")
        if n == 1 and strength == 1 and one_step_at is not None:
            return Levels([self.level(one_step_at), CLEAN], self)
        if spacing == "lcm":
            return Levels([*map(self.level, self._lcm_timesteps(n, strength)), CLEAN], self)
        end = CLEAN
        if spacing == "leading":
            # timesteps 1, 1 + steps/n, ..., ending at 0, one below the first; all one lower if n = steps, because
            # there is no timestep `steps`
            offset = 1 if n < self.steps else 0
            levels = [self.level(i * self.steps // n + offset) for i in reversed(range(n))]
            end = self.level(offset - 1)
        elif spacing == "trailing":
            levels = [self.level(t) for t in self._trailing(n)]
        elif spacing == "linspace":
            levels = [self.level(t) for t in np.linspace(self.steps - 1, 0, n).tolist()]
        elif spacing == "sgm":
            levels = [self.level(int(t)) for t in np.linspace(self.steps - 1, 0, n, endpoint=False)]
        else:
            low, high = math.exp(self._log_ratio[0]), math.exp(self._log_ratio[-1])
            rho = KARRAS_RHO if spacing == "karras" else math.inf
            levels = [self.level_of_ratio(ratio) for ratio in ratios(n, low, high, rho)]
        kept = int(n * strength + 1e-9)  # 0.7 * 10 is 6.999...
        return Levels([*levels[n - kept :], end], self)

    def _trailing(self, n: int) -> list[int]:
        """n timesteps in even strides, from the last one downwards."""
        return [round(i * self.steps / n) - 1 for i in range(n, 0, -1)]

    def _lcm_timesteps(self, n: int, strength: float) -> list[int]:
        """n timesteps of the grid of LCMs, evenly spaced in it, from its part up to this strength."""
        grid = self._trailing(min(LCM_TIMESTEPS, self.steps))
        kept = int(len(grid) * strength + 1e-9)  # as in `levels`
        if n > (kept if strength > 0 else len(grid)):
            part = f", of which strength {strength:g} leaves {kept}" if 0 < strength < 1 else ""
            more = "more strength, " if part else ""
            raise ValueError(
                f"the spacing lcm has {len(grid)} timesteps{part}, too few for {n} step{'s' * (n > 1)}: use fewer "
                f"steps, {more}or the spacing trailing"
            )
        return [grid[len(grid) - kept + i * kept // n] for i in range(n)] if kept else []

    def add_noise(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """x_t of clean x0 and unit normal noise of the same shape: alpha x0 + sigma noise."""
        return level.alpha * x0 + level.sigma * noise

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        """The clean data x0 that the output `out` of the network implies at x = x_t; all of the same shape."""
        if self.config.prediction == "v":
            return level.alpha * x - level.sigma * out
        return (x - level.sigma * out) / level.alpha

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The training target of the network at x_t = add_noise(x0, noise, level): the noise or the velocity."""
        if self.config.prediction == "v":
            return level.alpha * noise - level.sigma * x0
        return noise
