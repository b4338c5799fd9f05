"""Few-step models: U-Nets that are told their guidance, how models and LoRAs are recognised, and their defaults."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY, error, tiny_state
from conftest import loaded
from PIL import Image
from safetensors.torch import load_file, save_file

import sd
from scripts import convert as convert_script
from scripts import txt2img
from sd.checkpoints.checkpoint import load_checkpoint
from sd.checkpoints.detect import CONFIG_KEY, identify
from sd.checkpoints.diffusers_export import to_diffusers_configs, unet_to_diffusers
from sd.checkpoints.export import to_original, to_own
from sd.checkpoints.few_step_files import notes_on_scheduler, own_defaults, scheduler_to_diffusers, with_defaults
from sd.checkpoints.inspect import inspect
from sd.checkpoints.key_maps import diffusers_sources
from sd.checkpoints.prediction import probe
from sd.conditioning import Composition, Conditioning
from sd.config import SD1, SD2, Config, ScheduleConfig
from sd.denoiser import concatenate, one_by_one
from sd.few_step import HYPER, LCM, LCM_GUIDED, SETTINGS, TCD, TURBO, named, of_config, unsuited
from sd.models.layers import guidance_embedding
from sd.models.unet import UNet
from sd.params import SamplingParams, TextToImage
from sd.runtime.cuda_graphs import Recorded
from sd.runtime.deep_cache import DeepCache
from sd.study.network import trace

TOLD = replace(TINY, name="tiny told", guidance=8.0, unet=replace(TINY.unet, guidance=16))
LORA = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 64),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(256, 2),
}


def told_state() -> dict[str, torch.Tensor]:
    """The tiny model in the original layout, whose U-Net has an embedding of the guidance scale."""
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return tiny_state() | {"model.diffusion_model.time_embed.cond_proj.weight": weight}


@pytest.fixture(scope="module")
def told() -> sd.StableDiffusion:
    return sd.StableDiffusion(TOLD, **loaded(told_state(), TOLD))


# ------------------------------------------------------------------------------------------------- the network


def test_guidance_embedding():
    """sin, then cos, of 1000 (guidance - 1) w_i with w_i from 1 to exactly 1/10000; in float64, from the definition."""
    scales = np.array([1.0, 7.3, 14.0])
    angles = 1000 * (scales[:, None] - 1) * 10000.0 ** (-np.arange(8) / 7)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    found = guidance_embedding(torch.tensor(scales, dtype=torch.float32), 16)
    # 7.3 is rounded by 2e-7, which 1000 turns into 2e-4 of an angle, and angles of 13,000 to 5e-4
    assert found.dtype == torch.float32 and np.abs(found.numpy() - expected).max() < 2e-3
    assert found[0].tolist() == [0.0] * 8 + [1.0] * 8  # without guidance


def test_the_network_as_in_diffusers():
    diffusers = pytest.importorskip("diffusers")
    config = replace(TINY, unet=replace(TINY.unet, guidance=256))
    theirs, ours = diffusers.UNet2DConditionModel(**unet_to_diffusers(config)).eval(), UNet(config.unet).eval()
    state, shapes = theirs.state_dict(), ours.state_dict()
    sources = diffusers_sources(config, {"unet": shapes})["unet"]
    assert len(sources) == len(state) and sources["guidance.weight"].key == "time_embedding.cond_proj.weight"
    ours.load_state_dict({key: state[source.key].reshape(shapes[key].shape) for key, source in sources.items()})
    rng = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 16, 16, generator=rng), torch.randn(2, 77, 64, generator=rng)
    t, scale = torch.tensor([999.0, 259.0]), torch.tensor([8.0, 7.3])
    embedding = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, 256)
    expected = theirs(x, t, context, timestep_cond=embedding).sample
    assert error(ours(x, t, Conditioning(context, guidance=scale)), expected) < 1e-5
    assert error(ours(x, t, Conditioning(context, guidance=scale + 0.1)), expected) > 1e-2


def test_a_conditioning_carries_the_guidance():
    one = Conditioning(torch.zeros(2, 3, 4)).with_guidance(7.3)
    assert one.guidance.tolist() == pytest.approx([7.3, 7.3])
    half = one.to(dtype=torch.bfloat16)
    assert half.context.dtype == torch.bfloat16 and half.guidance.equal(one.guidance)
    other = Conditioning(torch.ones(1, 3, 4)).with_guidance(2.0)
    joined = concatenate([one, other], 2)
    assert joined.guidance.tolist() == pytest.approx([7.3, 7.3, 2.0, 2.0])
    assert joined.of_images(slice(1, None, 2)).guidance.tolist() == pytest.approx([7.3, 2.0])
    assert other.repeat(3).guidance.shape == (3,)
    with pytest.raises(ValueError, match="1 of 2 conditionings have a guidance"):
        concatenate([one, Conditioning(torch.ones(2, 3, 4))])
    parts = Composition((other, other), torch.ones(2, 1)).with_guidance(3.0)
    assert [part.guidance.item() for part in parts.parts] == [3.0, 3.0]


def test_a_network_says_what_it_needs(told, tiny_sd):
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 77, 64)
    with pytest.raises(ValueError, match="this U-Net needs a guidance as conditioning"):
        told.unet(x, t, context)
    with pytest.raises(ValueError, match="this U-Net takes no guidance as conditioning"):
        tiny_sd.unet(x, t, Conditioning(context).with_guidance(8.0))
    assert trace(told.unet, 8, 8)  # drawn and counted as others are
    assert probe(told.unet, TOLD, x) in ("eps", "v")


def test_wrappers_carry_the_guidance(told):
    """Recorded, cached, one by one: each is the network itself."""
    rng = torch.Generator().manual_seed(1)
    x, t, context = torch.randn(2, 4, 16, 16, generator=rng), torch.tensor([500.0] * 2), torch.randn(2, 77, 64)
    given = Conditioning(context, guidance=torch.tensor([8.0, 4.0]))
    expected = told.unet(x, t, given)
    assert error(told.unet(x, t, given._replace(guidance=given.guidance.flip(0))), expected) > 1e-3

    def record(run, device):
        out = run()
        return lambda: out.copy_(run()), out

    recorded = Recorded(told.unet, record)
    assert error(recorded(x, t, given), expected) < 1e-6
    other = given._replace(guidance=torch.tensor([2.0, 3.0]))  # replayed with other numbers
    assert error(recorded(x, t, other), told.unet(x, t, other)) < 1e-6
    cached = DeepCache(lambda *inputs, wrap: wrap(told.unet)(*inputs), interval=2)
    assert error(cached(x, t, given), expected) < 1e-6
    assert error(one_by_one([told.unet, told.unet])(x, t, given), expected) < 1e-5


# ------------------------------------------------------------------------------------------- guidance in the network


def test_one_evaluation_has_the_guidance(told):
    """At guidance 8, a batch of one for an image, and the scale in it; the negative prompt is not even encoded."""
    seen = []

    def network(x, t, conditioning):
        seen.append((x.shape[0], conditioning.guidance.tolist()))
        return told.predict(x, t, conditioning)

    context = told.encode_prompt(["a cat"])
    denoise = told.denoiser(context, told.encode_prompt(["a dog"]), network=network)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoise(x, told.schedule.level(500))
    told.denoiser(context, guidance=3.0, network=network)(x, told.schedule.level(500))
    assert seen == [(1, [8.0]), (1, [3.0])]  # 8: the model's default


def test_settings_without_effect_are_noted(told):
    settings = {"height": 64, "width": 64, "steps": 2, "sampler": "ddim"}
    plain = told.prepare(TextToImage.of("a cat", **settings)).result()
    assert plain.notes == []
    other = {"negative": "a dog", "guidance_until": 0.5, "guidance_rescale": 0.7}
    run = told.prepare(TextToImage.of("a cat", **settings, **other))
    assert all(guide.uncond is None for guide in run.guides) and not run.is_guided
    found = run.result()
    where = "has no effect with this model, whose U-Net takes the guidance scale as an input"
    assert sorted(found.notes) == [
        f"guidance_rescale {where}", f"guidance_until {where}", f"the negative prompt {where}",
    ]  # fmt: skip
    assert found.images[0].tobytes() == plain.images[0].tobytes()
    stronger = told.prepare(TextToImage.of("a cat", **settings, guidance=14.0)).result()
    assert stronger.images[0].tobytes() != plain.images[0].tobytes()
    assert stronger.notes == [
        "this model (an LCM model) is made for 1 to 8 steps and guidance 3 to 13, not for 2 steps and guidance 14: "
        "the image may be worse"
    ]


def test_parts_joined_by_and_are_told_it_too(told):
    run = told.prepare(
        TextToImage.of("a cat AND a dog", web_ui_prompts=True, height=64, width=64, steps=1, sampler="ddim")
    )
    assert run.result().images and run.guides[0].uncond is not None


# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.exhaustive
def test_there_and_back_in_every_layout(tmp_path, told):
    """Our file -> the original layout -> our file, and through a diffusers folder: tensor by tensor."""
    states = {name: network.state_dict() for name, network in told._networks.items()}
    states = {name: {k: x.contiguous() for k, x in state.items()} for name, state in states.items()}
    config = LCM_GUIDED.applied(TOLD)
    own = to_own(states)
    save_file(own, tmp_path / "own.safetensors", {CONFIG_KEY: config.to_json()})
    convert = convert_script.main
    assert convert([str(tmp_path / "own.safetensors"), str(tmp_path / "folder"), "--layout", "diffusers"]) == 0
    assert convert([str(tmp_path / "folder"), str(tmp_path / "b.safetensors")]) == 0
    unet = load_file(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors")
    settings = json.loads((tmp_path / "folder/unet/config.json").read_text())
    scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert unet["time_embedding.cond_proj.weight"].shape == (64, 16) and settings["time_cond_proj_dim"] == 16
    assert scheduler["_class_name"] == "LCMScheduler"
    save_file(to_original(states, config), tmp_path / "original.safetensors")  # without metadata
    with load_checkpoint(tmp_path / "original.safetensors") as file:
        found = identify(file, TINY)
        assert found.config.unet.guidance == 16
        assert "model.diffusion_model.time_embed.cond_proj.weight" in file
        again = {name: dict(state) for name, state in sd.convert(file, found.config).items()}
    for back in (load_file(tmp_path / "b.safetensors"), to_own(again)):
        assert back.keys() == own.keys() and all(back[key].equal(own[key]) for key in own)
    for path in ("folder", "b.safetensors"):
        with load_checkpoint(tmp_path / path) as file:
            found = identify(file)
            report = inspect(file)
        assert found.config == replace(config, name="diffusers model")
        assert found.few_step in report.notes and found.few_step.endswith(": 4 steps, sampler lcm, guidance 8")
        assert not report.missing and not report.unknown


def test_a_layer_that_is_missing_or_of_another_shape_is_an_error(tmp_path):
    for weight, words in ((None, "time_embed.cond_proj.weight"), (torch.ones(32, 16), "is 32x16, expected 64x16")):
        state = told_state()
        del state["model.diffusion_model.time_embed.cond_proj.weight"]
        more = {} if weight is None else {"model.diffusion_model.time_embed.cond_proj.weight": weight}
        save_file(state | more, tmp_path / "damaged.safetensors", {CONFIG_KEY: TOLD.to_json()})
        with load_checkpoint(tmp_path / "damaged.safetensors") as file, pytest.raises(ValueError, match=words):
            sd.convert(file, identify(file).config)


def test_configs_as_json():
    few = replace(TOLD, steps=4, spacing="trailing")
    assert Config.from_json(few.to_json()) == few
    for config in (SD1, TINY):  # versions before this one know no such entries
        raw = json.loads(config.to_json())
        assert "guidance" not in raw["unet"] and not {"steps", "spacing"} & raw.keys()
        assert Config.from_json(config.to_json()) == config
    for wrong in ({"steps": 0}, {"steps": 1001}, {"steps": 2.0}, {"spacing": 3}, {"spacing": "x" * 101}):
        with pytest.raises(ValueError, match=f"Config.{next(iter(wrong))}: "):
            replace(SD1, **wrong)
    for wrong in (0, 2, 15, 16.0):
        with pytest.raises(ValueError, match=r"UNetConfig\.guidance: got"):
            replace(SD1.unet, guidance=wrong)


def test_defaults_of_a_config_are_used():
    few = replace(SD1, sampler="ddim", steps=3, spacing="trailing", guidance=1.5)
    found = SamplingParams().resolved(few)
    assert (found.sampler, found.steps, found.spacing, found.guidance) == ("ddim", 3, "trailing", 1.5)
    found = SamplingParams(sampler="DPM++ 2M Karras", steps=9, guidance=4).resolved(few)
    assert (found.sampler, found.steps, found.spacing, found.guidance) == ("dpmpp_2m", 9, "karras", 4)
    assert SamplingParams(sampler="euler").resolved(few).spacing == "trailing"
    assert SamplingParams(sampler="euler").resolved(SD1).spacing == "linspace"


# --------------------------------------------------------------------------------------------------- recognition

NAMES = [
    ("lcm-lora-sdv1-5", "an LCM LoRA", "4 steps, sampler lcm, guidance 1"),
    ("LCM_LoRA_Weights_SD15", "an LCM LoRA", "4 steps, sampler lcm, guidance 1"),
    ("dreamshaper_8LCM", "an LCM LoRA", "4 steps, sampler lcm, guidance 1"),
    ("TCD-SD15-LoRA", "a TCD LoRA", "4 steps, sampler tcd, guidance 1"),
    ("Hyper-SD15-1step-lora", "a Hyper-SD LoRA", "1 step, sampler tcd, guidance 1"),
    ("Hyper-SD15-2steps-lora", "a Hyper-SD LoRA", "2 steps, sampler ddim, guidance 1"),
    ("hypersd15_8steps", "a Hyper-SD LoRA", "8 steps, sampler ddim, guidance 1"),
    ("Hyper-SD15-12steps-CFG-lora", "a Hyper-SD LoRA", "12 steps, sampler ddim, guidance 5"),
    ("sd_turbo", "an SD-Turbo LoRA", "1 step, sampler euler, guidance 1"),
    ("lcm-lora-sdxl", "an LCM LoRA", "4 steps, sampler lcm, guidance 1"),
    ("sdxl_lcm_lora", "an LCM LoRA", "4 steps, sampler lcm, guidance 1"),
    ("TCD-SDXL-LoRA", "a TCD LoRA", "4 steps, sampler tcd, guidance 1"),
    ("Hyper-SDXL-1step-lora", "a Hyper-SD LoRA", "1 step, sampler tcd, guidance 1"),
    ("Hyper-SDXL-8steps-lora", "a Hyper-SD LoRA", "8 steps, sampler ddim, guidance 1"),
    ("sdxl_hyper_sd_4step_lora", "a Hyper-SD LoRA", "4 steps, sampler ddim, guidance 1"),
    ("Hyper-SDXL-8steps-CFG-lora", "a Hyper-SD LoRA", "8 steps, sampler ddim, guidance 5"),
    ("sdxl_lightning_2step_lora", "an SDXL-Lightning LoRA", "2 steps, sampler euler, guidance 1"),
    ("sdxl_lightning_8step_lora", "an SDXL-Lightning LoRA", "8 steps, sampler euler, guidance 1"),
    ("SDXL-Lightning", "an SDXL-Lightning LoRA", "4 steps, sampler euler, guidance 1"),
    ("Lightning-4steps", "an SDXL-Lightning LoRA", "4 steps, sampler euler, guidance 1"),
    ("dmd2_sdxl_4step_lora_fp16", "a DMD2 LoRA", "4 steps, sampler lcm, guidance 1"),
    ("sd_xl_turbo_lora_v1", "an SDXL-Turbo LoRA", "1 step, sampler euler, guidance 1"),
]


@pytest.mark.parametrize("name, what, settings", NAMES)
def test_names(name, what, settings):
    kind = named(name)
    assert (kind.described("LoRA"), kind.settings()) == (what, settings)
    assert kind.range[0] <= kind.steps <= kind.range[1]


@pytest.mark.parametrize("name", ["calcmap", "film-lcmx", "turbo", "hyper-realism", "style-4steps", "tcdd", "",
                                  "lightning", "xl_lightning_bolts", "dmd", "dmd20"])  # fmt: skip
def test_other_names(name):
    assert named(name) is None


class Given(dict):
    """What recognition looks at of a checkpoint: its path, metadata and JSON files."""

    def __init__(self, path="model.safetensors", metadata=None, **configs) -> None:
        self.path, self.metadata, self.configs = Path(path), metadata or {}, configs


def scheduler(name: str, **more) -> Given:
    return Given("folder", scheduler={"_class_name": name, **more})


EULER, EULER_A, TRAILING = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}
ZERO = replace(SD2, schedule=ScheduleConfig(prediction="v", zero_snr=True))
V = replace(SD2, schedule=ScheduleConfig(prediction="v"))
RECOGNISED = [
    (Given(), replace(SD1, unet=replace(SD1.unet, guidance=256)), ("lcm", 4, "lcm", 8.0), "takes the guidance scale"),
    (scheduler("LCMScheduler"), SD1, ("lcm", 4, "lcm", 1.0), "its scheduler_config.json says so"),
    (scheduler("TCDScheduler"), SD1, ("tcd", 4, "lcm", 1.0), "a TCD model (its scheduler_config.json says so)"),
    (scheduler(EULER, **TRAILING), SD2, ("euler", 1, "trailing", 1.0), "an SD-Turbo model (its scheduler_config.json"),
    (scheduler(EULER_A, **TRAILING), SD2, ("euler_a", 1, "trailing", 1.0), "1 step, sampler euler_a, guidance 1"),
    (scheduler(EULER, **TRAILING), SD1, ("euler", None, "trailing", 7.5), "euler with trailing timesteps"),
    (scheduler("DDIMScheduler", **TRAILING), SD2, ("ddim", None, "trailing", 7.5), "ddim with trailing timesteps"),
    (scheduler(EULER, **TRAILING), V, ("euler", None, "trailing", 7.5), "euler with trailing timesteps"),
    (Given("models/sd_turbo.safetensors"), SD2, ("euler", 1, "trailing", 1.0), "(its name says so)"),
    (Given("models--stabilityai--sd-turbo/snapshots/1a"), SD2, ("euler", 1, "trailing", 1.0), "its repository says"),
    (Given(metadata={"modelspec.title": "My LCM"}), SD1, ("lcm", 4, "lcm", 1.0), "metadata (modelspec.title) says so"),
    (Given(unet={"_name_or_path": "stabilityai/sd-turbo"}), SD2, ("euler", 1, "trailing", 1.0), "unet settings says"),
    (Given("Hyper-SD15-4steps.ckpt"), SD1, ("ddim", 4, "trailing", 1.0), "a Hyper-SD model (its name says so)"),
]  # fmt: skip


@pytest.mark.parametrize("given, config, expected, words", RECOGNISED)
def test_models_are_recognised(given, config, expected, words):
    found, line = with_defaults(given, config)
    assert (found.sampler, found.steps, found.spacing, found.guidance) == expected and words in line
    assert replace(found, sampler=config.sampler, steps=None, spacing=None, guidance=config.guidance) == config


@pytest.mark.parametrize(
    "given, config",
    [
        (scheduler("PNDMScheduler", **TRAILING), SD1),
        (scheduler(EULER, timestep_spacing="leading"), SD2),
        (scheduler("DDIMScheduler", **TRAILING), ZERO),  # trailing because it starts from pure noise
        (Given("models/sd_turbo.safetensors"), SD1),
        (Given("models/sd_turbo.safetensors"), V),
        (Given("v1-5-pruned.ckpt"), SD1),
        ({}, SD1),
    ],
)
def test_ordinary_models_stay_as_they_are(given, config):
    assert with_defaults(given, config) == (config, "")


@pytest.mark.parametrize("config", [LCM.applied(SD1), TCD.applied(SD1), TURBO.applied(SD2), SD1, SD2, ZERO])
def test_defaults_go_through_a_folder(config):
    written = to_diffusers_configs(config)
    given = Given("folder", scheduler=written["scheduler/scheduler_config.json"])
    plain = replace(config, sampler=SD1.sampler, steps=None, spacing=None, guidance=SD1.guidance)
    assert with_defaults(given, plain)[0] == config
    name = written["scheduler/scheduler_config.json"]["_class_name"]
    assert written["model_index.json"]["scheduler"] == ["diffusers", name]
    assert (name == "DDIMScheduler") == (not scheduler_to_diffusers(config))


def test_schedulers_that_are_unknown_are_said():
    (line,) = notes_on_scheduler({"scheduler": {"_class_name": "NewScheduler"}})
    assert (
        line
        == "scheduler/scheduler_config.json names 'NewScheduler', which is unknown: using the model's default sampler"
    )
    (line,) = notes_on_scheduler({"scheduler": {"_class_name": "LCMScheduler", "original_inference_steps": 100}})
    assert "original_inference_steps 100, which is not supported: using 50" in line
    assert list(notes_on_scheduler({"scheduler": {"_class_name": "PNDMScheduler"}})) == []
    assert list(notes_on_scheduler({})) == []


def test_diffusers_has_no_other_schedulers():
    """Of those that go with a noise schedule like Stable Diffusion's; the rest is refused or another kind of model."""
    diffusers = pytest.importorskip("diffusers")
    for name in ("DDIMScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"):
        known = {kind.__name__ for kind in getattr(diffusers, name)().compatibles}
        known -= {"SCMScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"}
        assert not [name for name in sorted(known) if [*notes_on_scheduler({"scheduler": {"_class_name": name}})]]


def test_kinds_of_configs():
    assert of_config(SD1) is None and own_defaults(SD1) == "" and of_config(replace(SD1, steps=25)) is None
    distilled = replace(SD1, sampler="lcm", steps=2, spacing="lcm", guidance=1.0)
    assert own_defaults(distilled) == "an LCM model: 2 steps, sampler lcm, guidance 1"
    some = of_config(replace(SD1, sampler="euler", steps=4))  # how much guidance it takes is not known
    assert some.described("model") == "a few-step model" and some.far(4, 99.0) is None
    assert some.far(20, 7.5) == "1 to 4 steps and guidance 7.5 or more"
    assert of_config(replace(SD1, sampler="euler", steps=1, guidance=1.0)).guidances == (1.0, 1.0)
    assert of_config(replace(TOLD, sampler="tcd", steps=4)).described("model") == "a TCD model"
    kind = of_config(replace(SD1, unet=replace(SD1.unet, guidance=256)))
    assert (kind.label, kind.guidances) == ("LCM", (3.0, 13.0))
    kind = of_config(replace(TOLD, guidance=2.0, sampler="lcm", steps=3))
    assert (kind.settings(), kind.guidances) == ("3 steps, sampler lcm, guidance 2", (2.0, 13.0))


def test_what_is_said_of_settings():
    found = ("lcm-lora (an LCM LoRA)", LCM)
    assert unsuited(found, "lcm", 4, 1.0) is None and unsuited(found, "lcm", 8, 2.0) is None
    assert unsuited(found, "lcm", 50, 7.5) == (
        "lcm-lora (an LCM LoRA) is made for 2 to 8 steps and guidance 1 to 2, not for 50 steps and guidance 7.5: the "
        "image may be worse"
    )
    assert (
        unsuited(("x", HYPER), "ddim", 20, 1.0)
        == "x is made for 2 to 8 steps and guidance 1, not for 20 steps and guidance 1: the image may be worse"
    )
    assert unsuited(None, "ddim", 50, 7.5) is None
    for name in ("lcm", "tcd"):
        assert f"the sampler {name} needs a few-step model" in unsuited(None, name, 4, 1.0)
        assert unsuited(found, name, 4, 1.0) is None


# ------------------------------------------------------------------------------------------------------- LoRAs


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A folder with the tiny model and LoRAs."""
    folder = tmp_path_factory.mktemp("few")
    own = to_own({name: network.state_dict() for name, network in tiny.items()})
    save_file({k: x.contiguous() for k, x in own.items()}, folder / "tiny.safetensors", {CONFIG_KEY: TINY.to_json()})
    save_file(LORA, folder / "Hyper-SD15-2steps-lora.safetensors")
    save_file(LORA, folder / "lcm-lora-sdv1-5.safetensors")
    save_file(LORA, folder / "mine.safetensors", {"ss_output_name": "tcd-mine"})
    return folder


SIZE = {"height": 64, "width": 64}


def test_a_lora_brings_its_defaults(adaptable, folder):
    notes = []
    name = adaptable.add_lora(folder / "Hyper-SD15-2steps-lora.safetensors", note=notes.append)
    assert notes == ["Hyper-SD15-2steps-lora is a Hyper-SD LoRA: 2 steps, sampler ddim, guidance 1"]
    run = adaptable.prepare(TextToImage.of("a cat", **SIZE))
    params = run.params
    assert (params.steps, params.sampler, params.spacing, params.guidance) == (2, "ddim", "trailing", 1.0)
    assert run.notes == []
    run = adaptable.prepare(TextToImage.of("a cat", negative="a dog", steps=20, **SIZE))
    assert run.notes == [
        "Hyper-SD15-2steps-lora (a Hyper-SD LoRA) is made for 2 to 8 steps and guidance 1, not for 20 steps and "
        "guidance 1: the image may be worse",
        "the negative prompt has no effect at guidance 1",
    ]
    assert adaptable.denoiser(adaptable.encode_prompt("a cat")).guidance == 1.0
    adaptable.remove_lora(name)
    assert adaptable.defaults is adaptable.config and adaptable.few_step is None
    params = adaptable.prepare(TextToImage.of("a cat", **SIZE)).params
    assert (params.steps, params.sampler, params.guidance) == (25, "dpmpp_2m", 7.5)


def test_settings_in_the_metadata_of_a_lora_come_first(adaptable, tmp_path):
    """Those that training wrote, also where the name means others: a LoRA can be trained on another grid than LCM's."""
    path = tmp_path / "lcm.safetensors"
    written = replace(LCM, spacing="trailing", steps=2)
    save_file(LORA, path, {SETTINGS: written.to_json(), "modelspec.title": "a TCD LoRA"})
    notes = []
    adaptable.add_lora(path, note=notes.append)
    assert notes == ["lcm is an LCM LoRA: 2 steps, sampler lcm, guidance 1"]
    params = adaptable.prepare(TextToImage.of("a cat", **SIZE)).params
    assert (params.steps, params.sampler, params.spacing, params.guidance) == (2, "lcm", "trailing", 1.0)
    adaptable.remove_lora()


@pytest.mark.parametrize("text", [
    "", "[]", "{", "[" * 100_000, '{"sampler": "lcm", "steps": 4}', '"lcm"', "null",
    TCD.to_json().replace('"tcd"', "[1]"), TCD.to_json().replace('"tcd"', '"tcd", "noise": 1'),
    TCD.to_json().replace(": 4", ": 0"), TCD.to_json().replace("1.0", "NaN"), HYPER.to_json().replace(": 4", ": 50"),
    HYPER.to_json().replace(": 4", ': "4"'),
])  # fmt: skip
def test_settings_that_cannot_be_read_are_said_and_the_name_counts(adaptable, tmp_path, text):
    path = tmp_path / "Hyper-SD15-2steps-lora.safetensors"
    save_file(LORA, path, {SETTINGS: text})
    notes = []
    adaptable.add_lora(path, note=notes.append)
    adaptable.remove_lora()
    assert len(notes) == 2 and notes[1] == LINE
    assert notes[0].startswith("the LoRA Hyper-SD15-2steps-lora: sd.few_step in its metadata ")
    assert len(notes[0]) < 400 and notes[0].isprintable()


@pytest.mark.parametrize("entry", ["sampler", "spacing"])
def test_an_unknown_sampler_or_spacing_of_a_lora_is_said_to_be_its_own(adaptable, tmp_path, entry):
    path = tmp_path / "lcm.safetensors"
    save_file(LORA, path, {SETTINGS: replace(LCM, **{entry: "magic"}).to_json()})
    adaptable.add_lora(path, note=[].append)
    message = f"^this model's default, or its few-step LoRA's: unknown {entry} 'magic', expected one of .*Choose one"
    with pytest.raises(ValueError, match=message):
        adaptable.prepare(TextToImage.of("a cat", **SIZE))
    adaptable.prepare(TextToImage.of("a cat", **SIZE, **{entry: "lcm"}))
    adaptable.remove_lora()


def test_the_last_of_several_counts_and_those_without_weight_do_not(adaptable, folder):
    files = [folder / f"{name}.safetensors" for name in ("lcm-lora-sdv1-5", "Hyper-SD15-2steps-lora", "mine")]
    first, _, third = adaptable.add_loras([(files[0], 1.0), (files[1], 0.0), (files[2], 0.5)], note=[].append)
    assert list(adaptable.few_step_loras) == [first, third]
    assert adaptable.defaults.sampler == "tcd"  # by its metadata
    adaptable.remove_lora(third)
    assert adaptable.defaults.sampler == "lcm" and adaptable.defaults.steps == 4
    adaptable.remove_lora()
    assert adaptable.few_step_loras == {}
    with pytest.warns(UserWarning, match="fast is an LCM LoRA: 4 steps"):
        adaptable.add_lora(files[0], name="fast")
    adaptable.remove_lora()
    adaptable.add_lora(files[1], -1.0, note=[].append)
    assert adaptable.few_step is None
    adaptable.remove_lora()


def test_a_model_that_is_told_its_guidance_keeps_it(folder):
    model = sd.StableDiffusion(TOLD, **loaded(told_state(), TOLD))
    model.add_loras([folder / "lcm-lora-sdv1-5.safetensors"], removable=False, note=[].append)
    assert model.defaults is TOLD and model.few_step[0] == "this model (an LCM model)"


# ---------------------------------------------------------------------------------------------------- programs


@pytest.fixture
def generate(folder, tmp_path, capsys, monkeypatch):
    """Runs txt2img beside those files; gives status, stdout, stderr and the image's file."""
    monkeypatch.chdir(folder)

    def run(*args: str):
        size = ["--height", "64", "--width", "64", "--seed", "1", "--dtype", "float32", "--device", "cpu"]
        status = txt2img.main([*args, *size, "--ckpt", "tiny.safetensors", "--out", str(tmp_path / "out")])
        printed = capsys.readouterr()
        made = sorted((tmp_path / "out").glob("*.png")) or [None]
        return status, printed.out.splitlines(), printed.err.splitlines(), made[-1]

    return run


def test_the_last_added_counts_even_if_one_of_its_name_stayed(adaptable, folder):
    files = [folder / f"{name}.safetensors" for name in ("lcm-lora-sdv1-5", "mine")]
    model = sd.StableDiffusion(
        TINY, *(copy.deepcopy(getattr(adaptable, name)) for name in ("text_encoder", "vae", "unet"))
    )
    model.add_loras([(files[0], 1.0)], note=[].append)
    model.forget_loras()
    model.add_loras([(files[1], 0.5)], note=[].append)
    assert model.defaults.sampler == "tcd"
    model.add_lora(files[0], 0.5, note=[].append)
    assert model.defaults.sampler == "lcm"
    model.remove_lora()
    assert model.defaults.sampler == "lcm"  # the first one stays for good


LINE = "Hyper-SD15-2steps-lora is a Hyper-SD LoRA: 2 steps, sampler ddim, guidance 1"


def test_a_lora_on_the_command_line(generate):
    status, out, err, image = generate("a cat", "--lora", "Hyper-SD15-2steps-lora.safetensors")
    assert (status, err) == (0, []) and out[1:3] == ["LoRA Hyper-SD15-2steps-lora, weight 1", LINE]
    assert "Steps: 2, Sampler: DDIM" in Image.open(image).text["parameters"]
    recipe = sd.read_request(image)
    params = recipe.request.params
    assert (params.steps, params.sampler, params.spacing, params.guidance) == (2, "ddim", "trailing", 1.0)
    status, out, err, again = generate("--like", str(image), "--lora", "Hyper-SD15-2steps-lora.safetensors")
    assert status == 0 and Image.open(again).tobytes() == Image.open(image).tobytes()


def test_a_lora_in_a_prompt(generate):
    prompts = ["a cat <lora:Hyper-SD15-2steps-lora:1>", "--web-ui-prompts", "--lora-dir", "."]
    status, out, err, image = generate(*prompts)
    assert (status, err) == (0, []) and out[1:3] == ["LoRA Hyper-SD15-2steps-lora, weight 1", LINE]
    assert "Steps: 2, Sampler: DDIM" in Image.open(image).text["parameters"]


def test_settings_are_checked_with_the_defaults_of_the_lora(generate):
    """The model's own 25 steps would be too many for half of the grid: refused without the LoRA, fine with it."""
    half = ("--spacing", "lcm", "--hires", "1.5", "--hires-strength", "0.3")
    status, _, err, _ = generate("a cat", *half)
    assert status == 1 and "too few for 25 steps" in err[-1]
    status, _, err, _ = generate("a cat", "--lora", "lcm-lora-sdv1-5.safetensors", *half)
    assert status == 0, err


def test_settings_far_from_customary_are_said_and_done(generate):
    status, _, err, image = generate(
        "a cat", "--lora", "Hyper-SD15-2steps-lora.safetensors", "--steps", "12", "--guidance", "7.5"
    )
    assert status == 0 and err == [
        "warning: Hyper-SD15-2steps-lora (a Hyper-SD LoRA) is made for 2 to 8 steps and guidance 1, not for 12 steps "
        "and guidance 7.5: the image may be worse"
    ]
    text = Image.open(image).text["parameters"]
    assert "Steps: 12" in text and "CFG scale: 7.5" in text


def test_lcm_on_an_ordinary_model_is_said(generate):
    status, _, err, _ = generate("a cat", "--sampler", "lcm", "--guidance", "1")
    assert status == 0 and len(err) == 1
    assert err[0].startswith("warning: the sampler lcm needs a few-step model, and this model is not recognised as one")


def test_an_lcm_lora_from_end_to_end(generate, folder):
    status, out, err, image = generate("a cat", "--lora", "lcm-lora-sdv1-5.safetensors")
    assert (status, err) == (0, []) and out[2] == "lcm-lora-sdv1-5 is an LCM LoRA: 4 steps, sampler lcm, guidance 1"
    params = sd.read_request(image).request.params
    assert (params.steps, params.sampler, params.guidance) == (4, "lcm", 1.0)
    status, _, err, _ = generate("a cat", "--lora", "lcm-lora-sdv1-5.safetensors", "--steps", "60")
    assert status == 1 and len(err) == 1  # the grid has 50
