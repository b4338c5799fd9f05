"""Activation checkpointing: less memory in training for more computation."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..models.layers import ResBlock
from ..models.text_encoder import TextBlock
from ..models.unet import SpatialTransformer


def checkpoint_activations(network: nn.Module) -> None:
    """Let residual blocks and transformers forget what they computed and compute it again on the way back.

    Chen et al. 2016, "Training deep nets with sublinear memory cost": about a third more work for a fraction of the
    memory, and the same gradients. The classes stay as they are; the blocks of this network are wrapped.
    """
    for module in network.modules():
        if isinstance(module, (ResBlock, SpatialTransformer, TextBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
