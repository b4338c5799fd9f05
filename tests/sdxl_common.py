"""What the tests of SDXL share: small models with random weights, settings, images, and files in every form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY_XL, manifest, tiny_state
from conftest import loaded
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from scripts import convert as convert_script
from sd import StableDiffusion
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_original, to_own
from sd.conditioning import Guide
from sd.config import MODELS, REFINER_SIZES, Config
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
# as the published one, with four levels
DEEP_REFINER = replace(
    TINY_REFINER,
    name="tiny refiner",
    unet=replace(
        TINY_REFINER.unet, channels=(64, 128, 192, 192), heads=(2, 4, 6, 6), depth=(0, 1, 1, 0), middle_depth=1
    ),
)
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


# -------------------------------------------------------------------------------------------------------------- models


def tiny_xl() -> StableDiffusion:
    return StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))


def tiny_refiner() -> StableDiffusion:
    return model_of(random_weights(TINY_REFINER), TINY_REFINER)


def model_files(folder: Path) -> dict[str, Path]:
    """Base and refiner as files of our layout."""
    base = convert(tiny_state("tiny-sdxl"), TINY_XL)
    states = {"base": (base, TINY_XL), "refiner": (random_weights(TINY_REFINER), TINY_REFINER)}
    for name, (weights, config) in states.items():
        convert_script.save("sd", folder / f"{name}.safetensors", weights, config, {})
    return {name: folder / f"{name}.safetensors" for name in states}


def write_models(path: Path, shared: StableDiffusion) -> Path:
    """The tiny model as a folder of diffusers, `folder`, and as `tiny.safetensors` of ours."""
    own = to_own({name: network.state_dict() for name, network in shared._networks.items()})
    save_file({k: x.contiguous() for k, x in own.items()}, path / "tiny.safetensors", {CONFIG_KEY: TINY_XL.to_json()})
    save_file(tiny_state("tiny-sdxl"), path / "original.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny-sdxl", TINY_XL)
        arguments = (path / "original.safetensors", path / "folder", "--layout", "diffusers", "--model", "tiny-sdxl")
        assert convert_script.main([*map(str, arguments)]) == 0
    return path


def pipeline(folder: Path):
    """diffusers' pipeline of a folder."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    return diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def as_ours(pipe):
    """With the last steps of our grid "trailing", which end at clean latents."""
    import diffusers

    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.scheduler.register_to_config(set_alpha_to_one=True)
    pipe.scheduler.final_alpha_cumprod = torch.tensor(1.0)
    return pipe


def cleared(model: StableDiffusion) -> Iterator[StableDiffusion]:
    """One model for all tests, which leave nothing behind."""
    yield model
    model.remove_lora()
    model.remove_embedding()
    assert not model.loras and not model.words
    assert not any(tokenizer.added for tokenizer in model.tokenizers)


# for scripts, on those files
SMALL_ARGS = ("--steps", "5", "--height", "64", "--width", "64", "--seed", "3", "--dtype", "float32", "--device", "cpu")


def text_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.info["parameters"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# --------------------------------------------------------------------------------------------------------------- files

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
LABEL = "model.diffusion_model.label_emb.0.0.weight"
COND = "model.diffusion_model.time_embed.cond_proj.weight"


class Header(dict):
    """Names and shapes of a file, without memory, and what else is known of it."""

    def __init__(self, names, path="model.safetensors", metadata=None, **configs) -> None:
        super().__init__({key: torch.empty(shape, device="meta") for key, shape in names.items()})
        self.path, self.metadata, self.configs = Path(path), metadata or {}, configs


def header(name="sdxl-base", path="model.safetensors", metadata=None, **changed) -> Header:
    shapes = {key: shape for key, (shape, _) in manifest(name).items()}
    return Header(shapes | changed, path, metadata)


def random_state(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """An original state dict of a config with random weights, and what original files have besides."""
    rng = torch.Generator().manual_seed(seed)
    states = {
        name: {key: 0.1 * torch.randn(shape, generator=rng) for key, shape in weights.items()}
        for name, weights in weight_shapes(config).items()
    }
    state = to_original(states, config)
    if len(config.text) == 1:
        return state | {"conditioner.embedders.0.model.logit_scale": torch.tensor(4.6)}
    # besides the scale, the last layer of the first encoder, which is never run
    usual = tiny_state("tiny-sdxl")
    return state | {key: x for key, x in usual.items() if key.startswith("conditioner.") and key not in state}


# ------------------------------------------------------------------------------------------- LoRA files and embeddings

FC1 = "encoder_layers_1_mlp_fc1"


def pair(name: str, into: int, out: int) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.zeros(2, into), f"{name}.lora_up.weight": torch.zeros(out, 2)}


def vectors(n: int, width: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(100 * n + width))


def two(n: int, names: tuple[str, str] = ("clip_l", "clip_g")) -> dict[str, Tensor]:
    return {names[0]: vectors(n, 64), names[1]: vectors(n, 96)}
