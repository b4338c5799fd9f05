"""What a request asks of a control network: a hint, and how strongly and how long it is followed.

>>> Control("edges", Image.new("L", (64, 64)), scale=0.8, end=0.5).mode
'balanced'
>>> Control("edges", Image.new("L", (64, 64)), start=0.8, end=0.5)
Traceback (most recent call last):
ValueError: control edges: it begins at 0.8 of the steps and ends at 0.5: the first must be smaller
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from .settings import OneOf, Range, check_settings, number, setting

MODES = ("balanced", "prompt", "control")
FITS = ("crop", "pad")
ANNOTATORS = ("none", "canny", "invert")
THRESHOLD = Range(number, 0, 255)
SHARE = Range(number, 0, 1)
MAX_CONTROLS = 20  # of a request


@dataclass(frozen=True)
class Control:
    """A hint for one of the model's control networks (`StableDiffusion.add_control`)."""

    name: str = setting("", "of the control network")
    # required; it has a default only because `setting` gives one
    image: Image.Image = setting(
        None, "the hint, of any size and mode: white lines on black, a depth map, ...", image=True
    )
    scale: float = setting(1.0, "how strongly the hint is followed: 0 ignores it, 1 is as in training", number)
    start: float = setting(0.0, "fraction of the steps before the first one that is controlled", SHARE)
    end: float = setting(1.0, "fraction of the steps after which none is controlled", SHARE)
    mode: str = setting(
        "balanced",
        "what counts more where hint and prompt contradict each other: balanced; prompt, in which the hint decides "
        "less about details; or control, which also leaves the prediction with the negative prompt uncontrolled",
        OneOf(MODES),
    )
    fit: str = setting("crop", "how the hint reaches the size of a txt2img image: crop, or pad with black", OneOf(FITS))

    annotate: str = setting(
        "none",
        "what the image is: none, the hint itself; canny, an ordinary picture, whose edges are the hint, found at the "
        "size generated; invert, black lines on white",
        OneOf(ANNOTATORS),
    )
    low: float = setting(100.0, "canny: an edge continues while the gradient is above this, 0 to 255", THRESHOLD)
    high: float = setting(200.0, "canny: an edge starts where the gradient is above this, 0 to 255", THRESHOLD)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a control needs the name of a control network, got {self.name!r:.100}")
        try:
            check_settings(self)
        except ValueError as error:
            raise ValueError(f"control {self.name}: {error}") from None
        if not isinstance(self.image, Image.Image):
            what = type(self.image).__name__
            raise ValueError(f"control {self.name}: the hint must be a PIL image, got {what}")
        if 0 in self.image.size:
            raise ValueError(f"control {self.name}: the hint has no pixels")
        if self.start >= self.end:
            raise ValueError(
                f"control {self.name}: it begins at {self.start:g} of the steps and ends at {self.end:g}: the first "
                "must be smaller"
            )
        if self.low > self.high:
            raise ValueError(
                f"control {self.name}: the low threshold, {self.low:g}, must not be above the high one, {self.high:g}"
            )

    def is_active(self, step: int, steps: int) -> bool:
        """Whether a step (counted from 0) out of so many is controlled: if all of it lies within `start` and `end`."""
        slack = 1e-9 * steps
        return step >= self.start * steps - slack and step + 1 <= self.end * steps + slack


def controls(name: str, value: object) -> tuple[Control, ...]:
    """One control or several, as a tuple: the check of the setting `controls` of requests."""
    found = (value,) if isinstance(value, Control) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(control, Control) for control in found) or isinstance(value, str):
        raise ValueError(f"{name} must be a Control or a list of them, got {value!r:.100}")
    if len(found) > MAX_CONTROLS:
        raise ValueError(f"{name}: {len(found)} are more than {MAX_CONTROLS}")
    return found
