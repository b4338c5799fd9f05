"""Checks of control networks: a controlled step that is recorded, and images that are controlled.

A recorded step reads its inputs from buffers of its own, so residuals must reach the U-Net's recording as inputs: what
changes between steps (scale, mode, which hints are followed) must show in the prediction. The control networks have
random weights, which are generated on the CPU and so are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd.checkpoints.loading import load_weights
from sd.config import UNetConfig
from sd.control import AppliedControl, ControllableNetwork, controlled
from sd.control_config import ControlConfig
from sd.control_params import Control
from sd.models.controlnet import HINT_CHANNELS, ControlNet
from sd.pipeline import StableDiffusion
from sd.runtime.cuda_graphs import Recorded

from ..weights import RandomWeights
from .images import HALF_LEVELS, LEVELS, NEGATIVE, PROMPT, ROUNDING, inputs, no_warnings, pixels, sides
from .items import check, require
from .models import Models, error, no_goldens, said
from .networks import exact

EFFECT = 1e-2  # relative, by which each change of the control must at least change the prediction
SEEN = HALF_LEVELS  # on average, by which control must at least change an image
STRENGTH = 4.0  # scale of the random control network of images: a clear effect, far from chaos


class Change(NamedTuple):
    """How a step is controlled: which of the hints it follows, their scale and mode."""

    hints: tuple[int, ...]
    scale: float = 1.0
    soft: bool = False
    guess: bool = False


CHANGES = (
    Change((0,)),
    Change((0,), scale=0.5),
    Change((0, 1)),
    Change((1,)),
    Change((0,), soft=True),
    Change((0, 1), soft=True, guess=True),
    Change(()),
    Change((0,), scale=0.5),  # as the second
)


def control_network(models: Models, unet: UNetConfig, seed: int, device: str | torch.device, dtype: torch.dtype) -> Any:
    """A control network for a U-Net with random weights that depend on its shapes and the seed."""
    with torch.device("meta"):
        network = ControlNet(ControlConfig.of(unet, name=f"control {seed}"))
    weights = dict(RandomWeights(network.state_dict()))
    for name in ("hint.convs.0.weight", "conv_in.weight"):  # enough to tell the networks apart
        weights[name] = weights[name] * (-1) ** seed
    return load_weights(network, weights, torch.device(device), dtype)


def hint(seed: int, side: int) -> Tensor:
    """A hint (1, 3, side, side) in [0, 1] for `ControlNet.embed`."""
    return torch.rand(1, HINT_CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))


def step(
    unet: ControllableNetwork, called: Sequence[Callable[..., Any]], features: Sequence[Tensor], change: Change
) -> ControllableNetwork:
    """The U-Net, controlled by the networks as they are called, with hints that are embedded already."""
    applied = [
        AppliedControl(
            called[i], lambda given: given, features[i], change.scale, soft=change.soft, guess=change.guess, images=1
        )
        for i in change.hints
    ]
    return controlled(unet, applied)


@check("images", "recorded steps with control give what the networks give", cuda=True, needs=no_goldens)
def controlled_is_plain(models: Models) -> str:
    """In the precision of images. Scale, mode and hints change between steps; x and t too, in two shapes."""
    model, dtype = models.reference(models.place.dtype), models.place.dtype
    networks = [control_network(models, model.config.unet, seed, models.device, dtype) for seed in range(2)]
    recorded, fast = Recorded(model.unet), [Recorded(network) for network in networks]
    worst, least = 0.0, float("inf")
    with no_warnings():
        for side in sides(models):
            hints = [hint(i, side * model.config.vae.factor).to(models.device) for i in range(2)]
            features = [network.embed(given) for network, given in zip(networks, hints, strict=True)]
            x, t, conditioning = inputs(models, 1, 2, side)
            before: Tensor | None = None
            for number, change in enumerate(CHANGES):
                given = (x, t - number, conditioning)
                out = step(cast(ControllableNetwork, recorded), fast, features, change)(*given)
                plain = step(model.unet, networks, features, change)(*given)
                require(bool(out.isfinite().all() and plain.isfinite().all()), f"{change}: not finite")
                worst = max(worst, error(out, plain))
                same = plain if before is None else step(model.unet, networks, features, CHANGES[number - 1])(*given)
                least = least if before is None else min(least, error(plain, same))
                before = plain
    require(least > EFFECT, f"a change of the control has an effect of only {least:.1e}: nothing is checked")
    require(worst < ROUNDING, f"error {worst:.1e}, expected below {ROUNDING:.0e}")
    return said(worst, dtype)


def images(models: Models, device: str, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Images of the embedded model without control, with it in each mode, and with it in a part of the steps."""
    model: StableDiffusion = models.embedded(device, dtype)
    network = control_network(models, model.config.unet, 0, device, dtype)
    name = model.add_control(network, "random")
    size = model.config.size
    lines = Image.new("L", (size, size))
    lines.paste(255, (size // 4, size // 4, 3 * size // 4, size // 4 + 2))
    settings: dict[str, Any] = {"steps": 5, "seed": 3, "height": size, "width": size, "sampler": "ddim"}
    asked: dict[str, tuple[Control, ...]] = {"no control": ()}
    for mode in ("balanced", "prompt", "control"):
        asked[mode] = (Control(name, lines, scale=STRENGTH, mode=mode),)
    asked["the first steps"] = (Control(name, lines, scale=STRENGTH, end=0.6),)
    return {
        kind: pixels(model.txt2img(PROMPT, NEGATIVE, controls=controls, **settings)) for kind, controls in asked.items()
    }


def compared(models: Models, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """By kind of image, how many levels each pixel differs from the CPU's in float32. Raises `Wrong` if it shows no
    effect of control."""
    found, expected = images(models, models.place.device, dtype), images(models, "cpu", torch.float32)
    for kind, image in expected.items():
        effect = np.abs(image - expected["no control"]).mean()
        require(bool(kind == "no control" or effect > SEEN), f"{kind}: control changes {effect:.2f} levels: no effect")
    return {kind: np.abs(found[kind] - expected[kind]) for kind in expected}


@check("images", "controlled images as on the CPU, float32 without TF32")
def controlled_as_on_the_cpu(models: Models) -> str:
    """Text to image with the embedded model."""
    with exact():
        found = compared(models, torch.float32)
    worst = max(found, key=lambda kind: found[kind].max())
    require(bool(found[worst].max() <= LEVELS), f"{worst}: up to {found[worst].max()} levels of 256")
    return f"at most {found[worst].max()} levels of 256"


@check("images", "nearly the same controlled images as on the CPU with the default precision")
def controlled_close_to_the_cpu(models: Models) -> str:
    """Compares the mean difference, as `close_to_the_cpu` does."""
    found = compared(models, models.place.dtype)
    worst = max(found, key=lambda kind: found[kind].mean())
    require(bool(found[worst].mean() <= HALF_LEVELS), f"{worst}: {found[worst].mean():.2f} levels of 256 on average")
    return f"at most {found[worst].mean():.2f} levels of 256 on average"
