"""What the tests of SDXL's runs share: a small refiner with random weights, small settings, and images."""

from __future__ import annotations

from dataclasses import replace

import torch
from common import TINY_XL
from PIL import Image
from torch import Tensor

from sd import StableDiffusion
from sd.conditioning import Guide
from sd.config import REFINER_SIZES, Config
from sd.models.build import build, weight_shapes
from sd.params import SamplingParams, TextToImage
from sd.run import Run

TINY_REFINER = replace(
    TINY_XL,
    name="tiny sdxl refiner",
    text=TINY_XL.text[1:],
    unet=replace(TINY_XL.unet, depth=(0, 1, 1), middle_depth=1, context=96, vector=96 + 5 * 256),
    sizes=REFINER_SIZES,
    zero_empty=False,
)
TINY_XL_INPAINT = replace(TINY_XL, name="tiny sdxl inpainting", unet=replace(TINY_XL.unet, in_channels=9))
PROMPT = "a photograph of an astronaut riding a horse"


def random_weights(config: Config) -> dict[str, dict[str, Tensor]]:
    """Weights of every network under our names, of a size at which the network does something."""
    generator = torch.Generator().manual_seed(5)

    def weight(key: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(tuple(shape), generator=generator)
        if len(shape) < 2:
            return 0.05 * noise + ("norm" in key and key.endswith("weight"))
        return noise * (0.7 / shape[1:].numel() ** 0.5)

    return {
        name: {key: weight(key, torch.Size(shape)) for key, shape in shapes.items()}
        for name, shapes in weight_shapes(config).items()
    }


def model_of(states: dict[str, dict[str, Tensor]], config: Config) -> StableDiffusion:
    networks = build(config)
    for name, network in networks.items():
        network.load_state_dict(states[name], strict=True, assign=True)
        network.requires_grad_(False).eval()
    return StableDiffusion(config, **networks)


def params(**settings) -> SamplingParams:
    return SamplingParams(**(SMALL | settings))


SMALL = {
    "sampler": "ddim", "spacing": "trailing", "steps": 10, "guidance": 5.0, "height": 64, "width": 64, "seed": 3,
}  # fmt: skip


def photo(size: int = 64) -> Image.Image:
    """An image with a gradient."""
    return Image.linear_gradient("L").resize((size, size)).convert("RGB")


def half_mask(size: int = 64) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (0, 0, size // 2, size))
    return mask


def finish(run: Run) -> Tensor:
    """The final latents of a run."""
    for _ in run:
        pass
    return run.x


def guide_of(model: StableDiffusion, request: TextToImage) -> Guide:
    return model.prepare(request).guides[0]
