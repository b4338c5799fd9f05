"""Controlled runs are those of diffusers' pipelines: one control network, several, a share of the steps, SDXL."""

from __future__ import annotations

import copy

import pytest
import torch
from common import TINY, TINY_XL, error, tiny_state
from conftest import loaded
from control_common import control_network, lines
from sdxl_common import as_ours, finish
from torch import nn

from scripts import convert as convert_script
from sd import StableDiffusion
from sd.checkpoints.control_export import WEIGHTS, control_files, control_texts
from sd.checkpoints.convert import convert
from sd.config import Config
from sd.control_config import ControlConfig
from sd.control_params import Control
from sd.models.controlnet import ControlNet
from sd.params import ImageToImage, SamplingParams, TextToImage

diffusers = pytest.importorskip("diffusers")
from safetensors.torch import save_file  # noqa: E402

SETTINGS = {"sampler": "ddim", "spacing": "trailing", "steps": 8, "guidance": 5.0, "height": 64, "width": 64, "seed": 3}
THEIRS = {"height": 64, "width": 64, "num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent"}
PROMPT = "a photograph of an astronaut"


def random_control(config: Config, seed: int) -> ControlNet:
    """A control network with random weights, of a size at which it does something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        control = ControlNet(ControlConfig.of(config.unet, name=f"number {seed}"))
        for layer in (*control.zero, control.zero_mid):
            nn.init.normal_(layer.weight, std=0.05)
    return control.requires_grad_(False).eval()


def theirs(control: ControlNet, folder):
    """The same as diffusers' ControlNetModel, through a folder that we write."""
    folder.mkdir()
    tensors, metadata = control_files("diffusers", control.state_dict(), control.control_config)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, metadata)
    for name, text in control_texts(control.control_config).items():
        (folder / name).write_text(text)
    return diffusers.ControlNetModel.from_pretrained(folder)


def both(kind: str, manifest: str, config: Config, controls: list[ControlNet], folder):
    """Our model with these control networks, and diffusers' pipeline of a class."""
    state = tiny_state(manifest)
    model = StableDiffusion(config, **loaded(state, config))
    for number, control in enumerate(controls):
        model.add_control(copy.deepcopy(control), f"control {number}")
    convert_script.save("diffusers", folder / "model", convert(state, config), config, {})
    nets = [theirs(control, folder / f"control {number}") for number, control in enumerate(controls)]
    more = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, kind).from_pretrained(folder / "model", controlnet=nets[0], **more)
    return model, as_ours(pipe), nets


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    (folder / "model").mkdir()
    controls = [control_network(), random_control(TINY, 1)]
    return both("StableDiffusionControlNetPipeline", "tiny-v1", TINY, controls, folder)


def latents_of_both(model, pipe, controls, **more):
    """Final latents of our run and of diffusers', from the same noise."""
    run = model.prepare(TextToImage(PROMPT, SamplingParams(**SETTINGS), "blurry", controls=controls))
    noise = run.start.x.clone()
    hints = [control.image for control in controls]
    scales = [control.scale for control in controls]
    if len(controls) == 1:
        hints, scales = hints[0], scales[0]
    found = pipe(
        PROMPT, negative_prompt="blurry", image=hints, controlnet_conditioning_scale=scales, latents=noise,
        **THEIRS, **more,
    ).images  # fmt: skip
    return finish(run), found


@pytest.mark.parametrize("start, end", [(0.0, 1.0), (0.2, 0.7)])
def test_one_control_network(small, start, end):
    model, pipe, nets = small
    pipe.controlnet = nets[0]
    control = Control("control 0", lines(), 0.8, start, end)
    share = {"control_guidance_start": start, "control_guidance_end": end}
    ours, found = latents_of_both(model, pipe, [control], **share)
    assert error(ours, found) < 1e-4
    plain = finish(model.prepare(TextToImage(PROMPT, SamplingParams(**SETTINGS), "blurry")))
    assert error(plain, found) > 0.05


def test_several_control_networks(small):
    """diffusers' MultiControlNet, each with a scale and a share of the steps of its own."""
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    model, pipe, nets = small
    pipe.controlnet = MultiControlNetModel(nets)
    controls = [Control("control 0", lines(), 0.7, 0.0, 0.5), Control("control 1", lines(invert=True), 1.2, 0.25, 1.0)]
    share = {"control_guidance_start": [0.0, 0.25], "control_guidance_end": [0.5, 1.0]}
    ours, found = latents_of_both(model, pipe, controls, **share)
    assert error(ours, found) < 1e-4
    alone = finish(model.prepare(TextToImage(PROMPT, SamplingParams(**SETTINGS), "blurry", controls=controls[:1])))
    assert error(alone, found) > 0.01


def test_image_to_image(small):
    """The last half of the steps, from the same noised latents."""
    model, pipe, nets = small
    parts = dict(pipe.components) | {"controlnet": nets[0]}
    other = as_ours(diffusers.StableDiffusionControlNetImg2ImgPipeline(**parts, requires_safety_checker=False))
    photo, control = lines(64, 64, invert=True), Control("control 0", lines(), 0.9)
    request = ImageToImage(
        PROMPT, SamplingParams(**SETTINGS), "blurry", image=photo, strength=0.5, posterior="mode", controls=[control]
    )
    run = model.prepare(request)
    noised = run.start.x.clone()
    ours = finish(run)
    other.prepare_latents = lambda *args, **kwargs: noised
    more = {name: value for name, value in THEIRS.items() if name not in ("height", "width")}
    found = other(
        PROMPT, negative_prompt="blurry", image=photo, control_image=lines(), strength=0.5, height=64, width=64,
        controlnet_conditioning_scale=0.9, **more,
    ).images  # fmt: skip
    assert error(ours, found) < 1e-4


@pytest.mark.exhaustive
def test_sdxl(tmp_path):
    (tmp_path / "model").mkdir()
    control = random_control(TINY_XL, 2)
    model, pipe, _ = both("StableDiffusionXLControlNetPipeline", "tiny-sdxl", TINY_XL, [control], tmp_path)
    ours, found = latents_of_both(model, pipe, [Control("control 0", lines(), 0.9)])
    assert error(ours, found) < 1e-4
    plain = finish(model.prepare(TextToImage(PROMPT, SamplingParams(**SETTINGS), "blurry")))
    assert error(plain, found) > 0.01
