"""How a setting is declared: a field of a dataclass with its default, its meaning, and the check of its values.

>>> @dataclass(frozen=True)
... class Sharpen:
...     radius: float = setting(1.0, "in pixels", Range(number, 0))
...     __post_init__ = check_settings
>>> Sharpen(2)
Sharpen(radius=2.0)
>>> Sharpen(-1)
Traceback (most recent call last):
ValueError: radius must be at least 0, got -1
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, SupportsIndex, cast

# (name, value) -> the value as it is kept; raises ValueError, with the name, for one that is not accepted
Check = Callable[[str, Any], Any]


LARGE = 10**30  # Python does not write integers of thousands of digits


def setting(default: Any, help: str, check: Check | None = None, image: bool = False) -> Any:
    """A field with its default, its help text and the check of other values; `image` if its values are images."""
    return field(default=default, metadata={"help": help, "check": check, "image": image})


def with_default(cls: type, name: str, default: Any) -> Any:
    """The setting of a dataclass with another default, for one that inherits it."""
    return field(default=default, metadata=cls.__dataclass_fields__[name].metadata)  # type: ignore[attr-defined]


def check_settings(settings: Any) -> None:
    """Check the settings of a frozen dataclass that are not left at their defaults, and keep what the checks return."""
    for f in fields(settings):
        value, check = getattr(settings, f.name), f.metadata.get("check")
        if check is not None and value is not f.default:
            object.__setattr__(settings, f.name, check(f.name, value))


def whole(name: str, value: object) -> int:
    """An integer of any type (numpy's too) as int; raises ValueError, with the name, for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r:.100}") from None


def number(name: str, value: object) -> float:
    """A finite real number of any type as float; raises ValueError, with the name, for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r:.100}")
    try:
        found = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number, got one of about {_digits(cast(int, value))} digits") from None
    if not math.isfinite(found):
        raise ValueError(f"{name} must be a finite number, got {found}")
    return found


def _digits(value: float) -> int:
    return round(int(abs(value)).bit_length() * math.log10(2)) or 1


@dataclass(frozen=True)
class Range:
    """The check of a number: `whole` or `number`, from low to high."""

    kind: Callable[[str, object], float]
    low: float
    high: float = math.inf
    words: str = ""  # how the range is written; empty for the usual way

    def __call__(self, name: str, value: object) -> float:
        """The value as int or float."""
        found = self.kind(name, value)
        if not self.low <= found <= self.high:
            usual = f"in [{self.low:g}, {self.high:g}]" if self.high < math.inf else f"at least {self.low:g}"
            shown = value if abs(found) < LARGE else f"a number of about {_digits(found)} digits"
            raise ValueError(f"{name} must be {self.words or usual}, got {shown}")
        return found


@dataclass(frozen=True)
class OneOf:
    """The check of a name: one of those that are known."""

    known: Sequence[str]

    def __call__(self, name: str, value: object) -> object:
        """The value; a ValueError lists the known ones."""
        if value not in self.known:
            raise ValueError(f"unknown {name} {value!r:.100}, expected one of {', '.join(self.known)}")
        return value


def flag(name: str, value: object) -> bool:
    """True or False; raises ValueError, with the name, for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r:.100}")
    return value
