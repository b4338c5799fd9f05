"""Control networks with the reference weights, and hints, for the tests of control networks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import reference_weights as reference
import torch
from common import TINY, Golden, manifest
from PIL import Image, ImageDraw
from torch import Tensor

from sd.checkpoints.block_names import unet_blocks
from sd.config import Config
from sd.control_config import ControlConfig
from sd.models.controlnet import ControlNet


def control_names(control: ControlNet, base: Config) -> dict[str, str]:
    """Our name of every weight -> its name in an original file, after `control_model.`"""
    layers = {
        f"{ours}.{a}".rstrip("."): f"{theirs}.{b}".rstrip(".")
        for ours, theirs, rules in unet_blocks(base)
        for a, b in rules.items()
    }
    layers |= {f"hint.convs.{i}": f"input_hint_block.{2 * i}" for i in range(len(control.hint.convs))}
    layers |= {f"zero.{i}": f"zero_convs.{i}.0" for i in range(len(control.zero))}
    layers["zero_mid"] = "middle_block_out.0"
    split = [key.rpartition(".") for key in control.state_dict()]
    return {f"{layer}.{leaf}": f"{layers[layer]}.{leaf}" for layer, _, leaf in split}


@lru_cache
def control_network(name: str = "tiny-control-v1", base: Config = TINY) -> ControlNet:
    """The control network of a manifest, for a model, with the reference weights. It is shared: do not change it."""
    state = reference.make_state_dict(manifest(name), "control_model.", strip=True)
    control = ControlNet(ControlConfig.of(base.unet, name=name))
    shapes = control.state_dict()
    names = control_names(control, base)
    assert sorted(names.values()) == sorted(state)
    control.load_state_dict({ours: state[theirs].reshape(shapes[ours].shape) for ours, theirs in names.items()})
    return control.requires_grad_(False).eval()


def hint_of(golden: Golden, shape: tuple[int, ...]) -> Tensor:
    """The hint of a golden: 8-bit values in [0, 1]."""
    u8 = (256 * reference.uniform(f"{golden.name}/hint", shape)).floor()
    return u8 / 255


def pil(hint: Tensor) -> Image.Image:
    """A hint (1, 3, H, W) in [0, 1] as an image."""
    return Image.fromarray((hint[0].permute(1, 2, 0) * 255).round().byte().numpy())


def lines(width: int = 64, height: int = 64, invert: bool = False) -> Image.Image:
    """White lines on black, or the other way round."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 8, height // 4, width // 2, 3 * height // 4), outline="white")
    draw.ellipse((width // 2, 2, width - 3, height // 2), outline="white")
    return Image.fromarray(255 - np.asarray(image)) if invert else image


def silent(control: ControlNet) -> ControlNet:
    """A copy whose zero convolutions are zero, as before training."""
    other = ControlNet(control.control_config)
    other.load_state_dict(control.state_dict())
    for layer in (*other.zero, other.zero_mid):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return other.requires_grad_(False).eval()
