"""SDXL files as people have them: few-step and v models, other families, VAEs, text encoders, and every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY_XL, manifest, tiny_state
from conftest import loaded
from safetensors.torch import load_file, save_file
from test_few_step_models import TRAILING, Given, scheduler
from test_inspect import info, sparse_file

from scripts import convert as convert_script
from sd import StableDiffusion, latents
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import CONFIG_KEY, identify
from sd.checkpoints.diffusers_config import from_diffusers
from sd.checkpoints.diffusers_export import unet_to_diffusers
from sd.checkpoints.export import to_diffusers, to_original, to_own
from sd.checkpoints.few_step_files import with_defaults
from sd.checkpoints.inspect import inspect
from sd.checkpoints.layouts import SECOND
from sd.checkpoints.loading import LoadOptions, ModelFiles, with_part
from sd.checkpoints.prediction import probe
from sd.checkpoints.tiny_vae import notes_on_tiny
from sd.checkpoints.vae_files import notes_on_vae, overflows, whose_vae
from sd.checkpoints.xl_few_step import xl_named
from sd.config import MODELS, REFINER_SIZES, SD1, SD2, SDXL, SDXL_INPAINT, SDXL_REFINER, Config, VAEConfig
from sd.few_step import of_config
from sd.models.build import weight_shapes
from sd.params import SamplingParams, TextToImage
from sd.runtime.vae_tiling import decode_in_strips

TINY_XL_INPAINT = replace(TINY_XL, name="tiny sdxl inpainting", unet=replace(TINY_XL.unet, in_channels=9))
TINY_REFINER = replace(
    TINY_XL,
    name="tiny refiner",
    text=TINY_XL.text[1:],
    unet=replace(
        TINY_XL.unet, channels=(64, 128, 192, 192), heads=(2, 4, 6, 6), depth=(0, 1, 1, 0), middle_depth=1, context=96,
        vector=96 + 256 * len(REFINER_SIZES),
    ),
    sizes=REFINER_SIZES,
    zero_empty=False,
)  # fmt: skip
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
LABEL = "model.diffusion_model.label_emb.0.0.weight"
COND = "model.diffusion_model.time_embed.cond_proj.weight"
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


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


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The tiny models, as if they had names of their own."""
    for name, config in (("tiny-xl", TINY_XL), ("tiny-xl-inpaint", TINY_XL_INPAINT), ("tiny-refiner", TINY_REFINER)):
        monkeypatch.setitem(MODELS, name, config)


# ----------------------------------------------------------------------------------------------- few-step models

NAMED = [
    ("sd_xl_turbo_1.0_fp16", ("euler", 1, "trailing", 1.0, 512), "an SDXL-Turbo model (its name says so): 1 step"),
    ("sdxl-turbo", ("euler", 1, "trailing", 1.0, 512), "an SDXL-Turbo model"),
    ("sdxl_lightning_2step_unet", ("euler", 2, "trailing", 1.0, 1024), "an SDXL-Lightning model"),
    ("sdxl_lightning_4step", ("euler", 4, "trailing", 1.0, 1024), "4 steps, sampler euler, guidance 1"),
    ("SDXL-Lightning", ("euler", 4, "trailing", 1.0, 1024), "an SDXL-Lightning model"),
    ("Hyper-SDXL-8steps", ("ddim", 8, "trailing", 1.0, 1024), "a Hyper-SD model"),
    ("Hyper-SDXL-1step-Unet", ("tcd", 1, "lcm", 1.0, 1024), "made for timestep 800, and here it starts at 999"),
    ("dmd2_sdxl_4step_unet_fp16", ("lcm", 4, "trailing", 1.0, 1024), "a DMD2 model"),
    ("dmd2_sdxl_1step_unet_fp16", ("lcm", 1, "trailing", 1.0, 1024), "made for timestep 399"),
    ("my_lcm_sdxl", ("lcm", 4, "lcm", 1.0, 1024), "an LCM model"),
    ("juggernautXL_v9Rdphoto2Lightning", ("dpmpp_sde", 8, "karras", 2.0, 1024), "a Turbo or Lightning model"),
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
    assert xl_named("some_x0_model") is None


def test_turbo_by_its_folder():
    """Trailing timesteps and a native size of 512; at 1024 pixels they are a choice for any model."""
    given = scheduler("EulerAncestralDiscreteScheduler", **TRAILING)
    found, line = with_defaults(given, replace(SDXL, size=512))
    assert (found.sampler, found.steps, found.guidance, found.size) == ("euler_a", 1, 1.0, 512)
    assert line == "an SDXL-Turbo model (its scheduler_config.json says so): 1 step, sampler euler_a, guidance 1"
    assert with_defaults(given, SDXL)[0] == replace(SDXL, sampler="euler_a", spacing="trailing")


def test_the_guidance_of_an_lcm_u_net():
    found = identify(header(**{COND: (320, 256)}))
    assert found.config.unet == replace(SDXL.unet, guidance=256) and found.config.guidance == 8.0
    assert found.few_step.startswith("an LCM model (its U-Net takes the guidance scale as an input): 4 steps")
    assert {name: len(state) for name, state in convert(header(**{COND: (320, 256)}), found.config).items()}[
        "unet"
    ] == (len(weight_shapes(SDXL)["unet"]) + 1)


def test_a_u_net_s_folder_alone_has_sdxl_s_vae():
    """As latent-consistency/lcm-sdxl is. Its model has SDXL's latents, not Stable Diffusion's."""
    raw = unet_to_diffusers(replace(SDXL, unet=replace(SDXL.unet, guidance=256)))
    config = from_diffusers({"unet": raw})
    assert config == replace(SDXL, unet=replace(SDXL.unet, guidance=256)) and config.vae.scale == 0.13025
    assert from_diffusers({"unet": unet_to_diffusers(SD1)}).vae == SD1.vae


# ---------------------------------------------------------------------------------------------------- predictions

V_SAYS = [
    ({"v_pred": (0,)}, {}, (False, 'it has the key "v_pred"')),
    ({"v_pred": (0,), "ztsnr": (0,)}, {}, (True, 'it has the key "v_pred"')),
    ({"ztsnr": (0,)}, {}, (True, "zero terminal SNR")),
    ({}, {"modelspec.prediction_type": "v"}, (False, "its metadata says so (modelspec.prediction_type)")),
    ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (True, "ss_v_parameterization")),
    ({}, {"modelspec.title": "NoobAI-XL-Vpred-1.0"}, (False, "its metadata (modelspec.title) says so (--prediction")),
]


@pytest.mark.parametrize("keys, metadata, expected", V_SAYS)
def test_v_is_said(keys, metadata, expected):
    for name, config in (("sdxl-base", SDXL), ("sdxl-refiner", SDXL_REFINER)):
        found = identify(header(name, metadata=metadata, **keys))
        assert (found.config.schedule.prediction, found.config.schedule.zero_snr, found.decided) == (
            "v",
            expected[0],
            True,
        )
        assert expected[1] in found.reason
        assert replace(found.config, schedule=config.schedule) == config  # everything else is as it was


def test_eps_without_any_sign_and_where_it_is_said():
    found = identify(header())
    assert found.decided and found.reason == "as SDXL does, and nothing about this one says otherwise"
    assert identify(header(**{FIRST: (320, 9, 3, 3)})).reason.startswith("as inpainting models do")
    # of no use with eps, which the trainer writes all the same; and what is said inside counts more than a name
    metadata = {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "True"}
    found = identify(header(path="my_vpred.safetensors", metadata=metadata))
    assert found.config == SDXL and found.reason == "its metadata says so (modelspec.prediction_type)"
    assert identify(header(path="my-v-pred.safetensors")).config.schedule.prediction == "v"
    assert identify(header(path="my-v-pred.safetensors"), prediction="eps").config == SDXL
    assert identify(header("sd-v1", path="my-v-pred.safetensors")).config.schedule.prediction == "eps"


def test_files_beside_it_and_folders(tmp_path):
    path = tmp_path / "a.safetensors"
    (tmp_path / "a.yaml").write_text("parameterization: v\nzero_terminal_snr: true\n")
    found = identify(header(path=path)).config.schedule
    assert (found.prediction, found.zero_snr) == ("v", True)
    raw = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    found = from_diffusers(
        {"unet": unet_to_diffusers(SDXL), "scheduler": {"_class_name": "EulerDiscreteScheduler", **raw}}
    )
    assert (found.schedule.prediction, found.schedule.zero_snr, found.name) == ("v", True, "SDXL base")


@pytest.mark.parametrize("word", ["x0", "flow", "edm"])
def test_other_predictions_are_refused(word):
    with pytest.raises(CheckpointError, match=f"says that it predicts '{word}': only eps and v are supported"):
        identify(header(metadata={"modelspec.prediction_type": word}))


def test_a_probe_passes_a_vector():
    unet = loaded(tiny_state("tiny-sdxl"), TINY_XL)["unet"]
    assert probe(unet, TINY_XL, torch.zeros(1)) in ("eps", "v")


# ------------------------------------------------------------------------------------------------- other families

EDM = "its noise levels are those of EDM"
REFUSED = [
    ({"edm_mean": (4,), "edm_std": (4,)}, f"a Playground v2.5 model (it has edm_mean), which is not supported: {EDM}"),
    ({"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}, "a CosXL model (it has edm_vpred.sigma_max)"),
    ({FIRST: (320, 8, 3, 3)}, "an instruct-pix2pix model"),
    ({LABEL: (1280, 5632)}, "a Kolors model (a vector of 5632), which is not supported"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "a ControlNet, an addition to a checkpoint"),
    ({"lora_controlnet": ()}, "a Control-LoRA"),
    ({"adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)}, "a T2I-Adapter"),
    ({"ip_adapter.1.to_k_ip.weight": (640, 2048)}, "an IP-Adapter"),
]


@pytest.mark.parametrize("changed, words", REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_other_models_are_refused_by_name(changed, words):
    """Also where the caller says that it is SDXL, as long as its shapes do not show it."""
    for config in (None, SDXL)[: 1 if changed.keys() & {FIRST, LABEL} else 2]:
        with pytest.raises(CheckpointError) as caught:
            identify(header(**changed), config)
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "configs, words",
    [
        ({"index": {"_class_name": "KolorsPipeline"}}, "a Kolors model (KolorsPipeline)"),
        ({"unet": {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}}, "(DeepFloyd, Kolors)"),
        ({"vae": {"latents_mean": [-1.6, 1.1, 2.8, 0.2]}}, "this is the VAE of Playground v2.5"),
        ({"scheduler": {"_class_name": "EDMDPMSolverMultistepScheduler"}}, "a model of the EDM noise schedule"),
        ({"index": {"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}}, "instruct-pix2pix"),
        ({"index": {"_class_name": "PixArtSigmaPipeline"}}, "this is another model (PixArtSigmaPipeline)"),
    ],
)
def test_other_folders_are_refused_by_name(configs, words):
    file = header()
    file.configs = {"unet": unet_to_diffusers(SDXL)} | configs
    if "index" in configs and "PixArt" in configs["index"]["_class_name"]:
        del file.configs["unet"]
    with pytest.raises(CheckpointError) as caught:
        identify(file)
    assert words in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- VAEs


def vae_header(path="a/b.safetensors", metadata=None, more=None, **configs) -> Header:
    file = Header(dict(weight_shapes_of_vae()) | (more or {}), path, metadata, **configs)
    file.files = [Given(path)]
    return file


def weight_shapes_of_vae():
    return {key: shape for key, (shape, _) in manifest("sd-v1").items() if key.startswith("first_stage_model.")}


WHOSE = [
    (vae_header("models/sdxl_vae.safetensors"), (True, False)),
    (vae_header("models/sdxl.vae.safetensors"), (True, False)),
    (vae_header("sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors"), (True, False)),
    (vae_header("models/xlVAEC_c1.safetensors"), (True, False)),
    (vae_header("some-sdxl/vae/diffusion_pytorch_model.safetensors"), (True, False)),
    (vae_header("hub/models--stabilityai--sdxl-vae/snapshots/1/a.safetensors"), (True, False)),
    (vae_header("models/vae-ft-mse-840000-ema-pruned.safetensors"), (False, False)),
    (vae_header("models/kl-f8-anime2.ckpt"), (False, False)),
    (vae_header("models/sd15_vae.pt"), (False, False)),
    (vae_header(metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}), (True, True)),
    (vae_header(metadata={"modelspec.architecture": "stable-diffusion-v1/vae"}), (False, True)),
    (vae_header(metadata={"ss_base_model_version": "sdxl_base_v1-0"}), (True, True)),
    (vae_header(metadata={CONFIG_KEY: SDXL.to_json()}), (True, True)),
    (vae_header(vae={"scaling_factor": 0.13025}), (True, False)),
    (vae_header("sdxl/vae.safetensors", vae={"scaling_factor": 0.18215}), (False, False)),
    (vae_header(index={"_class_name": "StableDiffusionXLPipeline"}), (True, True)),
    (vae_header(index={"_class_name": "StableDiffusionPipeline"}), (False, True)),
    (vae_header(more={key: shape for key, (shape, _) in manifest("sdxl-base").items()}), (True, True)),
    (vae_header(more={key: shape for key, (shape, _) in manifest("sdxl-refiner").items()}), (True, True)),
    (vae_header(more={key: shape for key, (shape, _) in manifest("sd-v1").items()}), (False, True)),
    (vae_header(more={key: shape for key, (shape, _) in manifest("sd-v2-base").items()}), (False, True)),
    (vae_header("models/vae.safetensors"), None),
    (vae_header("flux/ae.safetensors"), None),
]  # fmt: skip


@pytest.mark.parametrize("file, expected", WHOSE, ids=range(len(WHOSE)))
def test_whose_vae_it_is(file, expected):
    found = whose_vae(file)
    assert (found and (found.for_xl, found.certain)) == expected
    for config in (SD1, SD2, SDXL, SDXL_REFINER):
        fits = expected is None or expected[0] == bool(config.sizes)
        if expected is not None and expected[1] and not fits:
            with pytest.raises(
                CheckpointError, match=r"^the VAE of an? .*, which makes other latents than .* with --vae$"
            ):
                with_part(config, "vae", file)
            continue
        if "vae" not in file.configs:  # which says its scale
            assert with_part(config, "vae", file).vae.scale == config.vae.scale  # kept, whatever the file is called
        notes = list(notes_on_vae(file, config))
        assert len(notes) == int(expected is None or not fits)
        assert all(("nothing tells" if expected is None else "expect wrong colours") in note for note in notes)


def test_a_scale_that_a_folder_does_not_say_is_the_model_s():
    raw = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    raw |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    assert with_part(SDXL, "vae", vae_header(vae=raw)).vae == SDXL.vae
    assert with_part(SD1, "vae", vae_header(vae=raw)).vae == SD1.vae
    other = with_part(SDXL, "vae", vae_header(vae=raw | {"scaling_factor": 0.2}))
    assert other.vae.scale == 0.2  # of a VAE that someone has trained


def test_what_is_said_of_a_vae_from_another_file(tmp_path):
    """Full-size files without their numbers, and a VAE under three names."""
    main = {
        False: sparse_file(tmp_path / "sd.safetensors", "sd-v1"),
        True: sparse_file(tmp_path / "xl.safetensors", "sdxl-base"),
    }
    for name, place, words in (
        ("plain", tmp_path, "nothing tells whether"),
        ("sdxl_vae", tmp_path / "a", "an SDXL model"),
    ):
        place.mkdir(exist_ok=True)
        vae = sparse_file(place / f"{name}.safetensors", "kl-f8-vae")
        for for_xl, path in main.items():
            with ModelFiles(path, LoadOptions(vae=vae)) as found:
                said = [line for line in found.about() if line.startswith(str(vae))]
                assert found.config.vae == (SDXL if for_xl else SD1).vae
            assert len(said) == (1 if name == "plain" or not for_xl else 0)
            assert all(words in line for line in said)
    for for_xl, path in main.items():
        with pytest.raises(CheckpointError) as caught:
            ModelFiles(path, LoadOptions(vae=main[not for_xl]))
        assert str(caught.value).startswith(f"{main[not for_xl]}: the VAE of a{'' if for_xl else 'n'} S")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The tiny model whole, and its parts under all names."""
    folder = tmp_path_factory.mktemp("parts")
    state = tiny_state("tiny-sdxl")
    save_file(state, folder / "whole.safetensors")
    prefixes = {"vae": "first_stage_model.", "unet": "model.diffusion_model."}
    for name, prefix in prefixes.items():
        save_file(
            {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)},
            folder / f"{name}.safetensors",
        )
    converted = {name: dict(weights) for name, weights in convert(state, TINY_XL).items()}
    hf = to_diffusers(converted, TINY_XL)
    clip_l, clip_g = (hf[f"{name}/model.safetensors"] for name in ("text_encoder", SECOND))
    forms = {
        "hf": ("", ""), "comfy": ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
        "comfy2": ("clip_l.transformer.", "clip_g.transformer."), "cpp": ("te1.", "te2."),
        "cpp2": ("cond_stage_model.transformer.", "cond_stage_model.1.transformer."),
    }  # fmt: skip
    for form, (first, second) in forms.items():
        one = {first + key: x.contiguous() for key, x in clip_l.items()}
        two = {second + key: x.contiguous() for key, x in clip_g.items()}
        save_file(one, folder / f"{form}_l.safetensors")
        save_file(two, folder / f"{form}_g.safetensors")
        if first:
            save_file(one | two, folder / f"{form}_pair.safetensors")
    for form, before in (("openclip", ""), ("embedders", TEXT_2), ("openclip-comfy", "text_encoders.clip_g.")):
        two = {before + key.removeprefix(TEXT_2): x for key, x in state.items() if key.startswith(TEXT_2)}
        save_file(two, folder / f"{form}_g.safetensors")
    own = to_own(converted)
    save_file({k: x.contiguous() for k, x in own.items()}, folder / "own.safetensors", {CONFIG_KEY: TINY_XL.to_json()})
    refiner = random_state(TINY_REFINER)
    save_file(refiner, folder / "refiner.safetensors")
    return folder


FIRSTS = ("hf_l", "comfy_l", "comfy2_l", "cpp_l", "cpp2_l", "comfy_pair", "cpp_pair", "cpp2_pair", "whole", "own")
SECONDS = (
    "hf_g", "comfy_g", "comfy2_g", "cpp_g", "cpp2_g", "comfy_pair", "cpp_pair", "cpp2_pair", "openclip_g",
    "embedders_g", "openclip-comfy_g", "whole", "own",
)  # fmt: skip


def same_states(found, expected, names) -> None:
    for name in names:
        assert found[name].keys() == expected[name].keys()
        assert all(torch.equal(found[name][key], expected[name][key]) for key in expected[name])


@pytest.mark.parametrize("second", SECONDS)
def test_text_encoders_from_other_files(files, second):
    """A U-Net alone with all its parts from elsewhere: the same weights as in the whole file."""
    first = FIRSTS[SECONDS.index(second) % len(FIRSTS)]
    given = {"text_encoder": first, SECOND: second, "vae": "vae"}
    options = LoadOptions(TINY_XL, **{name: files / f"{file}.safetensors" for name, file in given.items()})
    expected = convert(tiny_state("tiny-sdxl"), TINY_XL)
    with ModelFiles(files / "unet.safetensors", options) as found:
        assert found.config.vae.scale == 0.13025
        same_states(found.states, expected, TINY_XL.networks)


def test_the_refiner_takes_the_second_of_two(files):
    for name in ("whole", "comfy_pair", "own", "hf_g", "openclip_g"):
        options = LoadOptions(TINY_REFINER, text_encoder=files / f"{name}.safetensors")
        with ModelFiles(files / "refiner.safetensors", options) as found:
            expected = convert(tiny_state("tiny-sdxl"), TINY_XL)[SECOND]
            same_states(found.states, {"text_encoder": expected}, ["text_encoder"])


def test_wrong_text_encoders_are_refused_in_one_line(files):
    for given, words in (
        ({"text_encoder": "hf_g"}, "the text encoder of tiny sdxl 64 wide: give it with --text-encoder-2"),
        ({SECOND: "hf_l"}, "it is 64 wide, the second text encoder of tiny sdxl 96 wide: give it with --text-encoder"),
        ({SECOND: "vae"}, "the file has no second text encoder"),
    ):
        options = LoadOptions(TINY_XL, **{name: files / f"{file}.safetensors" for name, file in given.items()})
        with pytest.raises(CheckpointError, match=words) as caught:
            ModelFiles(files / "whole.safetensors", options)
        assert str(caught.value).startswith(str(files / next(iter(given.values())))) and "\n" not in str(caught.value)
    options = LoadOptions(TINY_REFINER, text_encoder=files / "hf_l.safetensors")
    with pytest.raises(CheckpointError, match="64 wide, the text encoder of tiny refiner 96 wide: give another one"):
        ModelFiles(files / "refiner.safetensors", options)
    vit_h = {key: shape for key, (shape, _) in manifest("sd-v2-base").items() if key.startswith("cond_stage_model.")}
    with pytest.raises(
        CheckpointError, match=r"OpenCLIP ViT-H/14 \(1024 wide\), .* OpenCLIP ViT-bigG/14 \(1280 wide\)"
    ):
        with_part(SDXL, SECOND, Header(vit_h))


def test_a_u_net_alone_says_what_it_needs(files):
    words = (
        "no text encoder and no second text encoder and no vae: give it with --text-encoder and --text-encoder-2 and"
    )
    with pytest.raises(CheckpointError, match=words):
        ModelFiles(files / "unet.safetensors", LoadOptions(TINY_XL))


def test_tiny_autoencoders_of_both_families():
    xl, sd = [Path("m/taesdxl_decoder.safetensors")], [Path("m/taesd_decoder.safetensors")]
    assert notes_on_tiny(SDXL.vae, xl, True) == [] and notes_on_tiny(VAEConfig(), sd) == []
    (line,) = notes_on_tiny(SDXL.vae, sd, True)
    assert line.startswith("taesd_decoder.safetensors: its name says that it is for Stable Diffusion 1.x and 2.x")
    (line,) = notes_on_tiny(VAEConfig(), xl)
    assert "it is for SDXL" in line
    (line,) = notes_on_tiny(VAEConfig(channels=(64, 64, 64, 64), scale=0.13025), xl, True)
    assert "made for the latents of SDXL's VAE" in line


# -------------------------------------------------------------------------------------------------------- float16


def test_which_vaes_are_known_to_overflow():
    assert overflows(vae_header("m/sd_xl_base_1.0.safetensors"), SDXL) == "by the name sd_xl_base_1.0"
    assert overflows(vae_header("m/sd_xl_refiner_1.0.safetensors"), SDXL_REFINER)
    assert overflows(vae_header(vae={"force_upcast": True}), SDXL) == "vae/config.json says so (force_upcast)"
    for file in (
        vae_header("m/sdxl_vae.safetensors"),  # may be the fixed one
        vae_header("sdxl-vae-fp16-fix/sd_xl_base_1.0.safetensors"),
        vae_header("m/sdxl_vae_fp16fix.safetensors", vae={"force_upcast": True}),
        vae_header("m/sd_xl_base_1.0.safetensors", vae={"force_upcast": False}),
    ):
        assert overflows(file, SDXL) == ""
    assert overflows(vae_header(vae={"force_upcast": True}), SD1) == ""


def counted(model: StableDiffusion) -> list[torch.dtype]:
    """The precisions in which the VAE's decoder runs from now on; copies of it are counted, too."""
    runs: list[torch.dtype] = []
    model.vae.decoder.conv_in.register_forward_hook(lambda module, args, out: runs.append(args[0].dtype))
    return runs


def test_an_overflow_is_remembered():
    """One decode in vain for a model, not for an image; the note comes once; the images are those of float32."""
    model = StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL, torch.float16))
    with torch.no_grad():  # beyond float16 inside of the decoder, not at its ends
        model.vae.decoder.conv_in.weight.mul_(3e4)
    z, runs, notes = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), counted(model), []
    first = model.decode(z, notes.append)
    assert runs == [torch.float16, torch.float32, torch.float32]
    assert notes == ["the image is not finite in float16: computing it again in float32"]
    again = model.decode(z, notes.append)
    assert runs[3:] == [torch.float32] * 2 and len(notes) == 1
    assert [image.tobytes() for image in again] == [image.tobytes() for image in first]
    assert next(model.vae.parameters()).dtype == torch.float16 and model.vae.overflows == {"image"}
    # latents that are not finite say nothing about the VAE
    model.vae.overflows.clear()
    with pytest.raises(ArithmeticError):
        model.decode(torch.full_like(z, float("nan")), notes.append)
    assert not model.vae.overflows


def test_in_float32_it_works_in_strips_sooner(monkeypatch):
    """As its maps are twice as large: an image as large as fits at once in float16 does not in float32."""
    model = StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL, torch.float16))
    model.vae.overflows = {"image"}
    z, in_strips = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    (whole,) = model.decode(z)
    monkeypatch.setattr(latents, "LARGE", 64 * 64)
    monkeypatch.setitem(
        latents.DECODE_IN_STRIPS, VAEConfig, lambda vae, x: in_strips.append(x.dtype) or decode_in_strips(vae, x)
    )
    (strips,) = model.decode(z)
    model.vae.overflows = set()
    model.decode(z)
    assert in_strips == [torch.float32] and np.abs(np.asarray(whole, int) - np.asarray(strips, int)).max() <= 1


def test_the_original_vae_is_not_even_tried(tmp_path, files):
    """It is known by the file's name; only float16 is concerned."""
    path = tmp_path / "sd_xl_base_1.0.safetensors"
    path.write_bytes((files / "whole.safetensors").read_bytes())
    options = {"config": TINY_XL, "device": "cpu"}
    model = StableDiffusion.load(path, dtype="float16", **options)
    line = "VAE: computed in float32, as SDXL's original one overflows in float16 (by the name sd_xl_base_1.0)"
    assert line in model.about
    runs, notes = counted(model), []
    model.decode(torch.randn(1, 4, 8, 8), notes.append)
    assert runs == [torch.float32] and notes == []
    for other in (
        StableDiffusion.load(path, dtype="float32", **options),
        StableDiffusion.load(files / "whole.safetensors", dtype="float16", **options),
    ):
        assert line not in other.about and not other.vae.overflows
    low = StableDiffusion.load(path, dtype="float16", low_memory=True, **options)
    assert line in low.about and low.vae.overflows == {"image", "latent"}


# ----------------------------------------------------------------------------------------------------------- --info


def test_info_of_whole_models(tmp_path, capsys):
    path = sparse_file(tmp_path / "a.safetensors", "sdxl-base", half=True)
    said = info(path, capsys=capsys)
    assert said["model"] == "SDXL base, 1024x1024" and said["predicts"].startswith("eps: as SDXL does")
    assert said["U-Net"] == "1680 weights, 2567.5 M, float16" and said["vae"].startswith("248 weights, 83.7 M")
    with load_checkpoint(path) as file:
        lines = inspect(file).lines()
    assert "text encoder: 180 weights, 116.0 M, float16" in lines
    assert "second text encoder: 389 weights, 694.7 M, float16" in lines
    assert (said["missing"], said["unknown"], said["channels"]) == ("nothing", "nothing", "4 (text to image)")
    said = info(sparse_file(tmp_path / "b.safetensors", "sdxl-refiner", half=True), capsys=capsys)
    assert said["model"] == "SDXL refiner, 1024x1024" and said["missing"] == said["unknown"] == "nothing"
    with load_checkpoint(sparse_file(tmp_path / "sd_xl_turbo_1.0.safetensors", "sdxl-base", half=True)) as file:
        found = inspect(file)
    assert found.model == "SDXL base, 512x512"
    assert "an SDXL-Turbo model (its name says so): 1 step, sampler euler, guidance 1" in found.notes
    save_file({key: x.contiguous() for key, x in random_state(TINY_XL_INPAINT).items()}, tmp_path / "c.safetensors")
    said = info(tmp_path / "c.safetensors", "--model", "tiny-xl-inpaint", capsys=capsys)
    assert said["channels"] == "9 (inpainting)" and said["missing"] == said["unknown"] == "nothing"
    assert identify(header(**{FIRST: (320, 9, 3, 3)})).config == SDXL_INPAINT


def test_info_of_parts(tmp_path, capsys):
    unet, vae = "model.diffusion_model.", "first_stage_model."
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."

    def said(name: str, *dropped: str) -> dict[str, str]:
        path = sparse_file(tmp_path / name, "sdxl-base", **{str(i): prefix for i, prefix in enumerate(dropped)})
        return info(path, capsys=capsys)

    one = said("g.safetensors", unet, vae, first)
    assert one["model"].startswith(
        "this is SDXL's second text encoder (OpenCLIP ViT-bigG/14) alone: give it with --text"
    )
    assert one["unknown"] == "nothing" and "389 weights, 694.7 M, float32" in str(one)
    one = said("l.safetensors", unet, vae, second)
    assert one["model"].startswith("this is a text encoder alone: give it with --text-encoder, beside")
    one = said("pair.safetensors", unet, vae)
    assert one["model"].startswith("this is SDXL's two text encoders without the rest") and one["unknown"] == "nothing"
    one = said("texts and vae.safetensors", unet)
    assert one["model"].startswith("this is SDXL's text encoders and a VAE, but no U-Net")
    one = said("u.safetensors", vae, first, second)
    assert one["model"] == "SDXL base, 1024x1024" and one["missing"].count("gives it") == 3
    one = said("vae.safetensors", unet, first, second)
    assert "a VAE alone" in one["model"] and one["note"].startswith("nothing tells whether this is the VAE of an SDXL")
    one = said("sdxl_vae.safetensors", unet, first, second)
    assert one["note"] == "this is the VAE of an SDXL model (by the name sdxl_vae)"


# -------------------------------------------------------------------------------------------------- there and back

WAYS = (("original",), ("sd",), ("diffusers",), ("diffusers", "sd"))


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize("name", ["tiny-xl", "tiny-xl-inpaint", "tiny-refiner"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_there_and_back(tmp_path, name, way, dtype):
    """An original file through other layouts: every key and every bit; and its config at each stage."""
    config = MODELS[name]
    state = tiny_state("tiny-sdxl") if config is TINY_XL else random_state(config)
    state = {key: (x.to(dtype) if x.is_floating_point() else x).contiguous() for key, x in state.items()}
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    for i, layout in enumerate((*way, "original")):
        written = tmp_path / (f"{i}" if layout == "diffusers" else f"{i}.safetensors")
        more = ("--model", name) if i == 0 else ()
        assert convert_script.main([str(path), str(written), "--layout", layout, *more]) == 0
        path = written
        with load_checkpoint(path) as file:
            found = identify(file).config
        assert replace(found, name=config.name, guidance=config.guidance, sampler=config.sampler) == config
    back = load_file(path)
    assert back.keys() == state.keys()
    assert all(back[key].dtype == x.dtype and torch.equal(back[key], x) for key, x in state.items())


@pytest.mark.parametrize("config", [TINY_XL_INPAINT, TINY_REFINER], ids=lambda config: config.name)
def test_a_folder_of_ours_for_diffusers(tmp_path, config):
    """Its pipeline's class is one that diffusers has for such a model, and reads all of it."""
    diffusers = pytest.importorskip("diffusers")
    save_file({k: x.contiguous() for k, x in random_state(config).items()}, tmp_path / "a.safetensors")
    name = next(name for name, known in MODELS.items() if known is config)
    arguments = (tmp_path / "a.safetensors", tmp_path / "out", "--layout", "diffusers", "--model", name)
    assert convert_script.main([*map(str, arguments)]) == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    kind = getattr(diffusers, index["_class_name"])
    pipe = kind.from_pretrained(tmp_path / "out", add_watermarker=False)
    assert pipe.unet.config.in_channels == config.unet.in_channels
    assert (pipe.text_encoder is None) == (config is TINY_REFINER)


def test_a_run_with_parts_of_other_files(files):
    """From the U-Net alone to an image, the same as with the whole file."""
    options = {"config": TINY_XL, "device": "cpu", "dtype": "float32"}
    parts = {"text_encoder": "comfy_pair", SECOND: "comfy_pair", "vae": "vae"}
    parts = {name: files / f"{file}.safetensors" for name, file in parts.items()}
    request = TextToImage("a house", SamplingParams(steps=2, height=64, width=64, seed=1))
    one = StableDiffusion.load(files / "whole.safetensors", **options).prepare(request).result()
    two = StableDiffusion.load(files / "unet.safetensors", **options, **parts).prepare(request).result()
    assert one.images[0].tobytes() == two.images[0].tobytes()
