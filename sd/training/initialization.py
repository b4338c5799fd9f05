"""Initial weights of the networks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ..config import UNetConfig
from ..models.controlnet import ControlNet
from ..models.layers import ResBlock
from ..models.text_encoder import TextBlock, TextEncoder
from ..models.unet import SpatialTransformer, UNet
from ..models.vae import VAE


def initialise_text_encoder(text_encoder: TextEncoder) -> None:
    """Initialise like CLIP (Radford et al. 2021, `initialize_parameters` of model.py): normal weights, zero biases.

    A layer keeps about the scale of its input. Layers that add to the residual stream start smaller, the more layers
    there are. (A single small deviation for all layers would drown out the words in a narrow encoder.)
    """
    config = text_encoder.config
    nn.init.normal_(text_encoder.token.weight, std=0.02)
    nn.init.normal_(text_encoder.position.weight, std=0.01)
    width = config.width**-0.5
    added = width * (2 * config.layers) ** -0.5
    for block in text_encoder.modules():
        if not isinstance(block, TextBlock):
            continue
        layers = {block.attn.q: width, block.attn.k: width, block.attn.v: width, block.attn.out: added}
        for layer, std in (layers | {block.fc1: width * 2**-0.5, block.fc2: added}).items():
            nn.init.normal_(layer.weight, std=std)
            _zero_bias(layer)
    if text_encoder.projection is not None:
        nn.init.normal_(text_encoder.projection.weight, std=width)


def initialise_unet(unet: UNet) -> None:
    """Zero the last layer of every residual branch and of the network (Ho et al. 2020; Dhariwal and Nichol 2021).

    All other layers keep PyTorch's default initialisation.
    """
    last: list[nn.Conv2d | nn.Linear] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResBlock):
            last.append(module.conv2)
        elif isinstance(module, SpatialTransformer):
            last.append(module.proj_out)
    for layer in last:
        nn.init.zeros_(layer.weight)
        _zero_bias(layer)


def initialise_vae(vae: VAE, branch: float = 0.1) -> None:
    """Scale down residual branches, so that a deep network starts like a shallow one (Zhang et al. 2019, "Fixup").

    With branches of zero, as in the U-Net, the VAE would learn more slowly at first. All other layers keep PyTorch's
    default initialisation.
    """
    for module in vae.modules():
        if isinstance(module, ResBlock):
            with torch.no_grad():
                module.conv2.weight.mul_(branch)
            _zero_bias(module.conv2)


def _zero_bias(layer: nn.Conv2d | nn.Linear) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def widen_input(unet: UNet, config: UNetConfig) -> UNet:
    """A U-Net with more input channels, whose kernels are zero, so that they have no effect yet.

    An inpainting model starts this way from a text-to-image model (as the checkpoints of Rombach et al. did). Raises
    ValueError if `config` has fewer input channels than the U-Net.
    """
    known = unet.conv_in.weight
    if config.in_channels < known.shape[1]:
        raise ValueError(f"cannot reduce the U-Net's {known.shape[1]} input channels to {config.in_channels}")
    with torch.device("meta"):
        wider = UNet(config)
    state = unet.state_dict()
    state["conv_in.weight"] = F.pad(known, (0, 0, 0, 0, 0, config.in_channels - known.shape[1]))
    wider.load_state_dict(state, assign=True)
    return wider


def add_guidance_input(unet: UNet, width: int = 256) -> UNet:
    """A U-Net that is told the guidance scale as well, by an embedding of this width that has no effect yet.

    A latent consistency model starts this way from its teacher (Luo et al. 2023; 256 is their width). The other weights
    are copies.
    """
    with torch.device("meta"):
        told = UNet(replace(unet.config, guidance=width))
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    state["guidance.weight"] = unet.conv_in.weight.new_zeros(unet.config.channels[0], width)
    told.load_state_dict(state, assign=True)
    return told


@torch.no_grad()
def initialise_control(control: ControlNet, unet: UNet) -> None:
    """Copy the first half of a U-Net, with zero convolutions that are zero (Zhang et al. 2023, section 3.1).

    The last convolution of the hint block is zero as well, so the copy starts as the U-Net works, and changes nothing.
    What the control network leaves out, such as transformers, is not copied; the other convolutions of the hint block
    keep PyTorch's default initialisation. Raises ValueError if the control network is not one for this U-Net.
    """
    if not control.control_config.fits(unet.config):
        raise ValueError(
            f"{control.control_config.name} is not a control network for this U-Net: other channels or blocks"
        )
    given, own = unet.state_dict(), control.state_dict()
    for name, weight in own.items():
        if name.startswith(("hint.", "zero")):
            continue
        known = given[name]
        weight.copy_(known[:, : weight.shape[1]] if name == "conv_in.weight" else known)  # without a mask's channels
    for layer in (*control.zero, control.zero_mid, control.hint.convs[-1]):
        nn.init.zeros_(layer.weight)
        _zero_bias(layer)
