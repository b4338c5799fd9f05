"""The networks of a checkpoint on their device: read once, or again each time that it is their turn (low memory)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..runtime.offload import Offload
from .loading import Source, build

SHARED_MEMORY = ("cpu", "mps")  # devices that share the memory of the CPU


def place(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    low_memory: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Mapping[str, nn.Module], Mapping[str, nn.Module]]:
    """Build the networks of a source and read their weights: (all networks, the same through which they are used).

    low_memory   the second of both is an `Offload`. On CPU and MPS nothing is read yet, and the source stays open: the
                 networks are read at each turn
    progress     called with (parameters in this weight, parameters in total) after each weight

    What the U-Net predicts is asked of itself if the files do not say it. The source is closed if an error is raised.
    """
    reread = low_memory and device.type in SHARED_MEMORY
    home = torch.device("cpu") if low_memory and not reread else device
    try:
        networks = build(source.config)
        total = sum(math.prod(w.shape) for net in networks.values() for w in net.state_dict().values())

        def report(count: int) -> None:
            if progress is not None and not reread:
                progress(count, total)

        def read(name: str, network: nn.Module) -> None:
            source.read(name, network, home, dtype, report, own=reread)

        if not reread:
            for name, network in networks.items():
                read(name, network)
        used = Offload(networks, device, read if reread else None) if low_memory else networks
        if not source.decided:
            source.probe(used["unet"])
    except BaseException:
        source.close()
        raise
    if not reread:
        source.close()
    return networks, used
