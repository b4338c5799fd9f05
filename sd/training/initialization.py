"""How the weights of the networks start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import UNetConfig
from ..models.layers import ResBlock
from ..models.text_encoder import TextEncoder
from ..models.unet import SpatialTransformer, UNet
from ..models.vae import VAE


def initialise_text_encoder(text_encoder: TextEncoder) -> None:
    """CLIP's start (Radford et al. 2021, `initialize_parameters` of model.py): normal weights, biases zero.

    What a layer puts out keeps about the size of what goes in; what is added to the residual stream is smaller, the
    more layers there are. In a narrow encoder, one small deviation for all layers would hide the words.
    """
    config = text_encoder.config
    nn.init.normal_(text_encoder.token.weight, std=0.02)
    nn.init.normal_(text_encoder.position.weight, std=0.01)
    width = config.width**-0.5
    added = width * (2 * config.layers) ** -0.5
    for block in text_encoder.blocks:
        layers = {block.attn.q: width, block.attn.k: width, block.attn.v: width, block.attn.out: added}
        for layer, std in (layers | {block.fc1: width * 2**-0.5, block.fc2: added}).items():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


def initialise_unet(unet: UNet) -> None:
    """Every residual branch starts at zero, and so does the output (Ho et al. 2020; Dhariwal and Nichol 2021).

    All other layers keep PyTorch's start.
    """
    last = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResBlock):
            last.append(module.conv2)
        elif isinstance(module, SpatialTransformer):
            last.append(module.proj_out)
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def initialise_vae(vae: VAE, branch: float = 0.1) -> None:
    """Residual branches start small, so that a deep network begins near a shallow one (Zhang et al. 2019, "Fixup").

    At zero, as in the U-Net, they would take longer to wake up. All other layers keep PyTorch's start.
    """
    for module in vae.modules():
        if isinstance(module, ResBlock):
            with torch.no_grad():
                module.conv2.weight.mul_(branch)
            nn.init.zeros_(module.conv2.bias)


def widen_input(unet: UNet, config: UNetConfig) -> UNet:
    """The U-Net with more input channels, which it does not listen to yet: their kernels are zero.

    So an inpainting model begins as the model that it is made of (Rombach et al.'s inpainting checkpoints began so).
    """
    known = unet.conv_in.weight
    if config.in_channels < known.shape[1]:
        raise ValueError(f"a U-Net of {known.shape[1]} input channels cannot be given {config.in_channels}")
    with torch.device("meta"):
        wider = UNet(config)
    state = unet.state_dict()
    state["conv_in.weight"] = F.pad(known, (0, 0, 0, 0, 0, config.in_channels - known.shape[1]))
    wider.load_state_dict(state, assign=True)
    return wider
