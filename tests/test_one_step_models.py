"""Models that were distilled to one step from another timestep than the last: DMD2's and Hyper-SD's for SDXL."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from common import TINY_XL, error, tiny_state
from conftest import loaded
from PIL import Image
from safetensors.torch import save_file
from sdxl_common import PROMPT, finish, half_mask, photo
from test_few_step_models import Given

from scripts import convert, txt2img
from sd import StableDiffusion, read_request
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_own
from sd.checkpoints.few_step_files import own_defaults, with_defaults
from sd.config import SDXL, Config
from sd.few_step import DMD_ONE, LCM, LORA, XL, named, of_config, unsuited
from sd.params import ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.schedule import CLEAN, SPACINGS, Schedule
from sd.study.runs import levels

ONE = DMD_ONE.applied(TINY_XL)
SIZE = {"height": 64, "width": 64, "seed": 3}


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return StableDiffusion(ONE, **loaded(tiny_state("tiny-sdxl"), ONE))


def timesteps(run) -> list[float]:
    return [level.t for level in run.levels]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_single_step_has_its_own_timestep(spacing):
    schedule = Schedule()
    assert schedule.levels(1, spacing, one_step_at=399) == [schedule.level(399), CLEAN]
    assert schedule.levels(2, spacing, one_step_at=399) == schedule.levels(2, spacing)
    # a part of the grid, as image to image takes, is that of the spacing
    assert schedule.levels(1, spacing, 0.5, one_step_at=399) == schedule.levels(1, spacing, 0.5)


@pytest.mark.parametrize(
    ("name", "of", "start"),
    [
        ("dmd2_sdxl_1step_unet_fp16", XL, 399),
        ("dmd2_sdxl_1step_lora", LORA, 399),
        ("dmd2_sdxl_4step_unet_fp16", XL, None),
        ("Hyper-SDXL-1step-Unet", XL, 800),
        ("Hyper-SDXL-1step-lora", LORA, None),  # the LoRA is used with TCD, from the last timestep
        ("Hyper-SDXL-8steps", XL, None),
    ],
)
def test_which_models_have_one(name, of, start):
    kind = named(name, of)
    assert kind.one_step_at == start and (f" at timestep {start}," in kind.settings()) == (start is not None)
    if of == XL:
        assert with_defaults(Given(f"{name}.safetensors"), SDXL)[0].one_step_at == start


def test_a_name_has_the_timestep_that_a_scheduler_cannot_have():
    """A folder with LCM's scheduler, as the model cards of the one-step models say."""
    folder = Given("dmd2_sdxl_1step")
    folder.configs = {"scheduler": {"_class_name": "LCMScheduler"}}
    config, line = with_defaults(folder, SDXL)
    assert (config.one_step_at, config.steps, config.sampler) == (399, 1, "lcm") and "DMD2" in line
    other = Given("dmd2_sdxl_4step")
    other.configs = folder.configs
    assert with_defaults(other, SDXL)[0].one_step_at is None


def test_the_step_is_that_of_diffusers(model):
    """LCMScheduler with `timesteps=[399]`, as the model card of DMD2 says; the initial latents are the noise itself."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    scheduler.set_timesteps(timesteps=[399], device="cpu")
    run = model.prepare(TextToImage(PROMPT, SamplingParams(**SIZE)))
    noise = run.x.clone()
    assert noise.std() == pytest.approx(1, abs=0.1) and scheduler.init_noise_sigma == 1
    with torch.no_grad():
        eps = model.predict(noise, torch.tensor([399.0]), run.guides[0].cond)
    expected = scheduler.step(eps, scheduler.timesteps[0], noise).prev_sample
    found = finish(run)
    assert error(found, expected) < 1e-5
    assert error(found, finish(plain(model).prepare(TextToImage(PROMPT, run.params)))) > 1e-2


def plain(model: StableDiffusion) -> StableDiffusion:
    """The same networks, which start at the last timestep."""
    return StableDiffusion(replace(model.config, one_step_at=None), **model._networks)


def test_every_task_and_other_settings(model):
    """With any sampler and spacing; with more steps the grid is the usual one, and a note says what is customary."""
    request = TextToImage(PROMPT, SamplingParams(**SIZE))
    assert timesteps(model.prepare(request)) == [399, -1] and timesteps(plain(model).prepare(request)) == [999, -1]
    params = SamplingParams(**SIZE, sampler="euler", spacing="sgm", steps=1)
    assert timesteps(model.prepare(replace(request, params=params))) == [399, -1]
    for whole in (
        ImageToImage(PROMPT, SamplingParams(**SIZE), image=photo(), strength=1),
        Inpaint(PROMPT, SamplingParams(**SIZE), image=photo(), mask=half_mask(), strength=1),
    ):
        assert timesteps(model.prepare(whole)) == [399, -1]
    several = model.prepare(replace(request, params=SamplingParams(**SIZE, steps=4)))
    assert timesteps(several) == [999, 749, 499, 249, -1]
    assert [level.t for level in levels(model, SamplingParams(steps=1, spacing="trailing"))] == [399, -1]  # in studies
    assert several.notes == [
        "this model (an LCM model) is made for 1 step and guidance 1 to 2, not for 4 steps and guidance 1: the "
        "image may be worse"
    ]


def test_a_refiner_after_it_shares_its_levels(model):
    """It is left no step, as the only one is the base's, which has the noise."""
    run = model.prepare(TextToImage(PROMPT, SamplingParams(**SIZE)), plain(model))
    assert timesteps(run) == [399, -1] and "leaves no steps to the refiner" in run.notes[-1]


def test_configs():
    assert Config.from_json(ONE.to_json()) == ONE
    assert "one_step_at" not in json.loads(SDXL.to_json())
    assert own_defaults(ONE) == "an LCM model: 1 step at timestep 399, sampler lcm, guidance 1"
    found = ("x", of_config(ONE))
    assert unsuited(found, "lcm", 1, 1.0) is None and "is made for 1 step and" in unsuited(found, "lcm", 2, 1.0)
    assert of_config(LCM.applied(ONE)).one_step_at is None
    for wrong in (0, 1000, -1, 399.0, True):
        with pytest.raises(ValueError, match=r"Config\.one_step_at: got"):
            replace(ONE, one_step_at=wrong)


def test_a_lora_brings_it_and_takes_it_away(tmp_path):
    name = "lora_unet_time_embed_0"
    lora = {f"{name}.lora_down.weight": torch.ones(2, 64), f"{name}.lora_up.weight": torch.ones(256, 2)}
    model = StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))
    for file in ("dmd2_sdxl_1step_lora", "lcm-lora-sdxl"):
        save_file(lora, tmp_path / f"{file}.safetensors")
    request = TextToImage(PROMPT, SamplingParams(**SIZE, steps=1))
    notes: list[str] = []
    added = model.add_lora(tmp_path / "dmd2_sdxl_1step_lora.safetensors", note=notes.append)
    assert notes == ["dmd2_sdxl_1step_lora is a DMD2 LoRA: 1 step at timestep 399, sampler lcm, guidance 1"]
    assert timesteps(model.prepare(request)) == [399, -1]
    model.remove_lora(added)
    assert timesteps(model.prepare(request)) == timesteps(plain(model).prepare(request))
    one = StableDiffusion(ONE, **model._networks)
    one.add_lora(tmp_path / "lcm-lora-sdxl.safetensors", note=notes.append)  # has its own grid, on any model
    assert timesteps(one.prepare(request)) == [999, -1]


@pytest.mark.exhaustive
def test_an_image_comes_back_by_its_file(tmp_path, capsys):
    """From the file's name to the image, and again with --like: the same file says it again."""
    model = StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))
    own = to_own({name: network.state_dict() for name, network in model._networks.items()})
    save_file({k: x.contiguous() for k, x in own.items()}, tmp_path / "a.safetensors", {CONFIG_KEY: TINY_XL.to_json()})
    path = tmp_path / "dmd2_sdxl_1step"
    assert convert.main([str(tmp_path / "a.safetensors"), str(path), "--layout", "diffusers"]) == 0
    common = ["--ckpt", str(path), "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert txt2img.main(["a cat", "--seed", "3", "--height", "64", "--width", "64", *common]) == 0
    assert "a DMD2 model (its name says so): 1 step at timestep 399, sampler lcm, guidance 1" in capsys.readouterr().out
    (first,) = (tmp_path / "out").glob("*.png")
    assert read_request(first).request.params.steps == 1
    assert txt2img.main(["--like", str(first), *common]) == 0
    images = sorted((tmp_path / "out").glob("*.png"))
    assert len(images) == 2 and images[0].read_bytes() == images[1].read_bytes()
    common[1] = str(tmp_path / "own.safetensors")  # converted, the config says it
    assert convert.main([str(path), common[1]]) == 0
    assert txt2img.main(["--like", str(first), *common]) == 0
    assert "an LCM model: 1 step at timestep 399" in capsys.readouterr().out
    third = sorted((tmp_path / "out").glob("*.png"))[2]
    assert Image.open(third).tobytes() == Image.open(first).tobytes()
