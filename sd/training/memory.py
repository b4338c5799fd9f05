"""Memory in training: activation checkpointing, and the memory format of convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..models.layers import ResBlock
from ..models.text_encoder import TextBlock
from ..models.unet import SpatialTransformer

Network = TypeVar("Network", bound=nn.Module)


def checkpoint_activations(network: nn.Module, dropout: bool = False) -> None:
    """Make residual blocks and transformers drop their activations and recompute them in the backward pass.

    Chen et al. 2016, "Training deep nets with sublinear memory cost": about a third more computation for a fraction of
    the memory, and the same gradients. Only the blocks of this network are wrapped; their classes do not change. A
    transformer of several blocks (SDXL has ten) is recomputed block by block; otherwise the activations of all
    its blocks would be in memory at once. Networks without trained parameters are good as well: gradients flow through
    them to what is attached to their layers, such as a LoRA.

    dropout   whether random numbers are drawn inside of the blocks: the second computation then draws the same
    """
    for block in blocks(network):
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=dropout)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of networks that are computed, and held in memory, one after the other: none is inside of another."""
    for module in network.modules():
        if isinstance(module, SpatialTransformer) and len(module.blocks) > 1:
            yield from module.blocks
        elif isinstance(module, (ResBlock, SpatialTransformer, TextBlock)):
            yield module


def channels_last(network: Network, device: torch.device) -> Network:
    """The network on a device, its kernels in channels-last layout, in which convolutions are fastest."""
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
