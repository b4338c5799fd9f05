"""The same weights for all sides: those of a checkpoint, or random weights that depend only on their names."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.checkpoints.checkpoint import load_checkpoint, naming
from sd.checkpoints.convert import convert
from sd.checkpoints.loading import load_weights
from sd.config import POCKET, Config, TinyVAEConfig
from sd.runtime.device import DTYPES

from .cases import config_of, networks_of

CPU = torch.device("cpu")
WEIGHT_STD = 0.7  # of random weights, times sqrt(fan-in): below 1, so that half precision never overflows


@dataclass(frozen=True)
class Setup:
    """The settings that all sides share: model, weights, device, precision, threads.

    ckpt     None for random weights
    dtype    its name
    folder   for temporary files; deleted at the end
    """

    config: Config
    ckpt: Path | None
    device: torch.device
    dtype: str
    threads: int
    folder: Path

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as a torch dtype."""
        return DTYPES[self.dtype]

    @property
    def trial(self) -> bool:
        """Whether this is a trial of the program (--tiny): a small network with random weights."""
        return self.ckpt is None and self.config.unet == POCKET.unet

    def of_part(self, part: str) -> Setup:
        """The same with the config of a part's networks, which may have a tiny autoencoder."""
        return replace(self, config=config_of(part, self.config))


class RandomWeights(Mapping[str, Tensor]):
    """Random weights for the state dict `meta`, each a function of its name and shape, generated on access.

    device   where they are generated: a billion numbers take 6 s on a CPU core. The values depend on its type
    """

    def __init__(self, meta: Mapping[str, Tensor], device: torch.device = CPU) -> None:
        self._shapes, self._device = {key: tensor.shape for key, tensor in meta.items()}, device

    def __getitem__(self, key: str) -> Tensor:
        shape = self._shapes[key]
        if len(shape) == 1:
            return torch.full(shape, float(key.endswith("weight")), device=self._device)
        rng = torch.Generator(self._device).manual_seed(zlib.crc32(key.encode()))
        limit = WEIGHT_STD * math.sqrt(3 / math.prod(shape[1:]))  # a uniform draw has a third of its limit's square
        return torch.rand(shape, generator=rng, device=self._device).mul_(2 * limit).sub_(limit)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def load_networks(setup: Setup, names: Collection[str]) -> dict[str, nn.Module]:
    """Our networks of these names with the shared weights; no others are read or generated.

    The weights of a tiny autoencoder or a control network are random: a checkpoint has none.
    """
    built = networks_of(names, setup.config)
    given = [] if setup.ckpt is None else [name for name in names if name != "control"]
    if "vae" in given and isinstance(setup.config.vae, TinyVAEConfig):
        given.remove("vae")
    device = setup.device if setup.device.type == "cuda" else CPU
    states: dict[str, Mapping[str, Tensor]] = {
        name: RandomWeights(built[name].state_dict(), device) for name in names if name not in given
    }
    with ExitStack() as files:
        if given and setup.ckpt is not None:
            files.enter_context(naming(setup.ckpt))
            states |= convert(files.enter_context(load_checkpoint(setup.ckpt)), setup.config, parts=given)
        return {name: load_weights(built[name], states[name], setup.device, setup.torch_dtype) for name in names}
