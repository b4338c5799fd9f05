"""The networks of a config without their weights: what to fill from a file, and the shapes that the file must have.

>>> from sd.config import POCKET
>>> sorted(build(POCKET))
['text_encoder', 'unet', 'vae']
>>> weight_shapes(POCKET)["unet"]["conv_in.weight"]
(96, 4, 3, 3)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..config import Config, TinyVAEConfig, VAEConfig
from ..control_config import ControlConfig
from .controlnet import ControlNet
from .taesd import TinyVAE
from .text_encoder import TextEncoder
from .unet import UNet
from .vae import VAE

Autoencoder = VAE | TinyVAE
AUTOENCODERS: Mapping[type, Callable[[Any], Autoencoder]] = {VAEConfig: VAE, TinyVAEConfig: TinyVAE}
Shapes = Mapping[str, tuple[int, ...]]  # name of a weight -> its shape, in the order of the network


class _SkipInit(TorchFunctionMode):
    """Leaves out the initialisers of `torch.nn.init`: the weights come from a file."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(config: Config) -> dict[str, nn.Module]:
    """The networks of a config on the meta device: shapes without memory, nothing initialised.

    They are "text_encoder" (a second one is "text_encoder_2", and so on), "vae" and "unet".
    """
    with torch.device("meta"), _SkipInit():
        texts = {name: TextEncoder(text) for name, text in zip(config.text_names, config.text, strict=True)}
        return {**texts, "vae": AUTOENCODERS[type(config.vae)](config.vae), "unet": UNet(config.unet)}


@lru_cache(maxsize=16)
def weight_shapes(config: Config) -> Mapping[str, Shapes]:
    """The name and shape of every weight of every network of a config."""
    return {
        name: {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
        for name, network in build(config).items()
    }


def build_control(config: ControlConfig) -> ControlNet:
    """The control network of a config on the meta device."""
    with torch.device("meta"), _SkipInit():
        return ControlNet(config)


@lru_cache(maxsize=16)
def control_shapes(config: ControlConfig) -> Shapes:
    """The name and shape of every weight of a control network."""
    return {key: tuple(weight.shape) for key, weight in build_control(config).state_dict().items()}
