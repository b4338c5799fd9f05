"""The configuration of a control network: the half of a U-Net that it copies, and the widths of its hint block.

>>> from sd.config import SD1
>>> config = ControlConfig.of(SD1.unet)
>>> config.fits(SD1.unet), config.factor
(True, 8)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .config import UNetConfig, tuples


@dataclass(frozen=True)
class ControlConfig:
    """A control network for a U-Net.

    unet     its own half of a U-Net. Channels, blocks and vector are those of the U-Net that it controls; it may have
             fewer transformers (the small networks for SDXL have none), and takes no mask and no guidance scale
    hint     channels of the hint block, from the image's resolution to that of the latents: each level halves it
    bgr      whether it was trained on hints with blue first
    pooled   whether its residuals are averaged over all positions: networks that pass on colours, not places (shuffle)
    bare     levels whose transformers have no blocks, only a norm and two projections; after the last one, the middle.
             Small networks for SDXL are made so, by leaving out the blocks alone
    name     what the network is called in messages
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    hint: tuple[int, ...] = (16, 32, 96, 256)
    bgr: bool = False
    pooled: bool = False
    bare: tuple[int, ...] = ()
    name: str = "control network"

    def __post_init__(self) -> None:
        widths = isinstance(self.hint, tuple) and all(type(n) is int and 1 <= n <= 4096 for n in self.hint)
        if not widths or not 1 <= len(self.hint) <= 8:
            raise ValueError(f"ControlConfig.hint: got {self.hint!r:.100}, expected one to eight widths")
        if type(self.bgr) is not bool or type(self.pooled) is not bool:
            raise ValueError("ControlConfig: bgr and pooled must be true or false")
        depths = dict(enumerate((*self.unet.depth, self.unet.middle_depth)))
        known = isinstance(self.bare, tuple) and all(type(level) is int for level in self.bare)
        if not known or len({*self.bare}) < len(self.bare) or any(depths.get(level) != 0 for level in self.bare):
            raise ValueError(f"ControlConfig.bare: got {self.bare!r:.100}, expected levels of depth 0, each once")
        if not (isinstance(self.name, str) and 0 < len(self.name) <= 100 and self.name.isprintable()):
            raise ValueError("ControlConfig.name: expected at most 100 printable characters")

    @classmethod
    def of(cls, unet: UNetConfig, **values: Any) -> ControlConfig:
        """The config of a control network for a U-Net, which copies all of its first half."""
        return cls(own_half(unet), **values)

    @property
    def factor(self) -> int:
        """Pixels of the hint per position of the latents, along each side."""
        return 2 ** (len(self.hint) - 1)

    @property
    def attends(self) -> bool:
        """Whether the network has any transformer, which reads the prompt."""
        return any(self.unet.depth) or bool(self.unet.middle_depth)

    def fits(self, unet: UNetConfig) -> bool:
        """Whether the network can control a U-Net: the same channels, blocks and vector, and a context of its width."""
        own, base = self.unet, own_half(unet)
        same = (own.channels, own.blocks, own.in_channels, own.vector) == (
            base.channels, base.blocks, base.in_channels, base.vector,
        )  # fmt: skip
        return same and (own.context == base.context or not self.attends)

    def to_json(self) -> str:
        """One line of JSON from which `from_json` makes an equal config."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ControlConfig:
        """The config written by `to_json`. Raises ValueError for anything that is not one."""
        try:
            raw = json.loads(text)
            unet = UNetConfig(**{name: tuples(value) for name, value in raw.pop("unet").items()})
            return cls(unet, **{name: tuples(value) for name, value in raw.items()})
        except (TypeError, AttributeError, KeyError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"not the config of a control network: {error!s:.200}") from None


def own_half(unet: UNetConfig) -> UNetConfig:
    """What a control network has of a U-Net: without the channels of a mask, the guidance scale and the way up."""
    return replace(unet, in_channels=unet.out_channels, guidance=None, up_depth=None)
