"""SDXL models that were distilled to few steps: by name, folder and U-Net."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sdxl_common import (
    COND,
    header,
)
from test_few_step_models import TRAILING, Given, scheduler

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import identify
from sd.checkpoints.few_step_files import with_defaults
from sd.config import SD1, SDXL, SDXL_REFINER
from sd.few_step import XL, named, of_config
from sd.models.build import weight_shapes

NAMED = [
    ("sd_xl_turbo_1.0_fp16", ("euler", 1, "trailing", 1.0, 512), "an SDXL-Turbo model (its name says so): 1 step"),
    ("sdxl-turbo", ("euler", 1, "trailing", 1.0, 512), "an SDXL-Turbo model"),
    ("sdxl_lightning_2step_unet", ("euler", 2, "trailing", 1.0, 1024), "an SDXL-Lightning model"),
    ("sdxl_lightning_4step", ("euler", 4, "trailing", 1.0, 1024), "4 steps, sampler euler, guidance 1"),
    ("SDXL-Lightning", ("euler", 4, "trailing", 1.0, 1024), "an SDXL-Lightning model"),
    ("Hyper-SDXL-8steps", ("ddim", 8, "trailing", 1.0, 1024), "a Hyper-SD model"),
    ("Hyper-SDXL-1step-Unet", ("lcm", 1, "lcm", 1.0, 1024), "1 step at timestep 800, sampler lcm"),
    ("dmd2_sdxl_4step_unet_fp16", ("lcm", 4, "trailing", 1.0, 1024), "a DMD2 model"),
    ("dmd2_sdxl_1step_unet_fp16", ("lcm", 1, "trailing", 1.0, 1024), "(its name says so): 1 step at timestep 399"),
    ("mixXL_dmd2_lcm_8steps", ("lcm", 8, "trailing", 1.0, 1024), "a DMD2 model"),
    ("my_lcm_sdxl", ("lcm", 4, "lcm", 1.0, 1024), "an LCM model"),
    ("juggernautXL_v9Rdphoto2Lightning", ("dpmpp_sde", 8, "karras", 2.0, 1024), "a Turbo or Lightning model"),
    ("Stable Diffusion XL Turbo", ("euler", 1, "trailing", 1.0, 512), "an SDXL-Turbo model"),
    ("stable-diffusion-xl-1.0-turbo", ("euler", 1, "trailing", 1.0, 512), "an SDXL-Turbo model"),
    ("Juggernaut_RunDiffusionPhoto2_Lightning_4Steps", ("dpmpp_sde", 4, "karras", 2.0, 1024), "4 steps"),
    ("dreamshaperXL_v21TurboDPMSDE", ("dpmpp_sde", 8, "karras", 2.0, 1024), "sampler dpmpp_sde, guidance 2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected", "words"), NAMED, ids=[name for name, *_ in NAMED])
def test_few_step_models_by_their_names(name, expected, words):
    for given in (Given(f"{name}.safetensors"), Given(metadata={"modelspec.title": name})):
        found, line = with_defaults(given, SDXL)
        assert (found.sampler, found.steps, found.spacing, found.guidance, found.size) == expected
        assert words.replace("its name", "its metadata (modelspec.title)" if given.metadata else "its name") in line
        # the settings suit the kind that the config then is
        assert of_config(found).far(found.steps, found.guidance) is None


@pytest.mark.parametrize(
    "given, config",
    [
        (Given("sd_xl_base_1.0.safetensors"), SDXL),
        (Given("turbotastic.safetensors"), SDXL),
        (Given("thunderlightningstorm.safetensors"), SDXL),
        (Given("sd_xl_turbo_1.0.safetensors"), SD1),
        (Given("sd_xl_turbo_1.0.safetensors"), SDXL_REFINER),
        (scheduler("EulerDiscreteScheduler", timestep_spacing="leading"), SDXL),
    ],
)
def test_others_are_no_few_step_models(given, config):
    assert with_defaults(given, config) == (config, "")


def test_lightning_that_predicts_x0_is_refused():
    with pytest.raises(CheckpointError, match=r"SDXL-Lightning model that predicts x0 .* take the one for 2, 4 or 8"):
        with_defaults(Given("sdxl_lightning_1step_x0.safetensors"), SDXL)
    assert named("some_x0_model", XL) is None


def test_turbo_by_its_folder():
    """Trailing timesteps and a native size of 512; at 1024 pixels they are a choice for any model."""
    given = scheduler("EulerAncestralDiscreteScheduler", **TRAILING)
    found, line = with_defaults(given, replace(SDXL, size=512))
    assert (found.sampler, found.steps, found.guidance, found.size) == ("euler_a", 1, 1.0, 512)
    assert line == "an SDXL-Turbo model (its scheduler_config.json says so): 1 step, sampler euler_a, guidance 1"
    assert with_defaults(given, SDXL)[0] == replace(SDXL, sampler="euler_a", spacing="trailing")


@pytest.mark.exhaustive
def test_the_guidance_of_an_lcm_u_net():
    found = identify(header(**{COND: (320, 256)}))
    assert found.config.unet == replace(SDXL.unet, guidance=256) and found.config.guidance == 8.0
    assert found.few_step.startswith("an LCM model (its U-Net takes the guidance scale as an input): 4 steps")
    assert {name: len(state) for name, state in convert(header(**{COND: (320, 256)}), found.config).items()}[
        "unet"
    ] == (len(weight_shapes(SDXL)["unet"]) + 1)
