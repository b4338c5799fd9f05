"""The web UI's "Refiner switch at" as a fraction of the steps, which is what `refiner_from` is.

Up to version 1.8 it is such a fraction. Since 1.9 the refiner takes over at the first step whose timestep t has
(999 - t) / 1000 of at least this value, unless "Refiner switch by sampling steps" is set
(modules/sd_samplers_common.py). On grids that are even in timesteps this is the same; on that of Karras, 0.8 means 0.6
of the steps.

>>> by_steps(0.8, 20, "karras"), by_steps(0.8, 20, "trailing"), by_steps(0.8, 20, "linspace")
(0.6, 0.8, 0.8)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..schedule import Schedule
from .recipe import Draft

BY_STEPS = "refiner switch by sampling steps"


def by_steps(switch: float, steps: int, spacing: str) -> float:
    """The fraction of the steps that come before the first one at this timestep."""
    levels = Schedule().levels(steps, spacing)[:-1]
    return sum((999 - level.t) / 1000 < switch for level in levels) / len(levels)


def read_switch(draft: Draft, pairs: Mapping[str, str]) -> None:
    """Convert the recorded value if it stands for a timestep; `pairs` have keys in lower case."""
    version = re.match(r"the web UI v?(\d+)\.(\d+)", draft.program)
    if version is None or (int(version[1]), int(version[2])) < (1, 9) or BY_STEPS in pairs:
        return
    switch, steps = draft.settings.get("refiner_from"), draft.settings.get("steps")
    spacing = draft.settings.get("spacing")
    if switch is not None and steps is not None and spacing is not None:
        draft.settings["refiner_from"] = by_steps(switch, steps, spacing)
