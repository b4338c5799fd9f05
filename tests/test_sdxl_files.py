"""SDXL files as people have them: few-step and v models, other families, what --info says, and every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import TINY_XL, manifest, tiny_state
from conftest import loaded
from safetensors.torch import load_file, save_file
from test_few_step_models import TRAILING, Given, scheduler
from test_inspect import info, sparse_file
from test_sdxl import SMALLER, smaller

from scripts import convert as convert_script
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import identify
from sd.checkpoints.diffusers_config import from_diffusers
from sd.checkpoints.diffusers_export import unet_to_diffusers
from sd.checkpoints.export import metadata, to_original, to_own
from sd.checkpoints.few_step_files import with_defaults
from sd.checkpoints.inspect import inspect
from sd.checkpoints.key_maps import diffusers_sources, original_sources
from sd.checkpoints.prediction import probe
from sd.config import MODELS, REFINER_SIZES, SD1, SDXL, SDXL_INPAINT, SDXL_REFINER, Config
from sd.few_step import XL, named, of_config
from sd.models.build import weight_shapes

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
    ("Hyper-SDXL-1step-Unet", ("lcm", 1, "lcm", 1.0, 1024), "1 step at timestep 800, sampler lcm"),
    ("dmd2_sdxl_4step_unet_fp16", ("lcm", 4, "trailing", 1.0, 1024), "a DMD2 model"),
    ("dmd2_sdxl_1step_unet_fp16", ("lcm", 1, "trailing", 1.0, 1024), "(its name says so): 1 step at timestep 399"),
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


@pytest.mark.parametrize("config", [SDXL, SDXL_REFINER, SDXL_INPAINT], ids=lambda config: config.name)
@pytest.mark.parametrize("table", [diffusers_sources, original_sources], ids=["diffusers", "original"])
def test_a_u_net_alone_without_a_prefix(config, table):
    """As SDXL-Lightning's and LCM's U-Nets are published: which model it is for, and what else it needs."""
    shapes = weight_shapes(config)["unet"]
    sources = table(config, {"unet": shapes})["unet"].items()
    names = {source.key.removeprefix("model.diffusion_model."): shapes[key] for key, source in sources}
    file = Header(names, "sdxl_lightning_4step_unet.safetensors")
    found = identify(file)
    assert found.config.unet == config.unet and found.config.text == config.text and found.config.vae == config.vae
    assert bool(found.few_step) == (config is not SDXL_REFINER)
    with pytest.raises(
        CheckpointError, match=r"^the file has no text encoder and .*no vae: give it with --text-encoder"
    ):
        convert(file, found.config)


def test_smaller_ones_where_it_is_said_that_it_is_sdxl():
    """--model sdxl with a file of SSD-1B, say: the transformers are counted all the same."""
    state, config = smaller(*SMALLER["SSD-1B"])
    assert identify(state, SDXL).config == config and identify(header(), SDXL).config == SDXL


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
    assert "a VAE alone" in one["model"] and one["note"].startswith("nothing shows whether this is the VAE of an SDXL")
    one = said("sdxl_vae.safetensors", unet, first, second)
    assert one["note"] == "this is the VAE of an SDXL model (going by the name sdxl_vae)"


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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("illustrij_vPredV1", True), ("novaAnimeXL_vpredV10", True), ("obsessionIllustrious_vPredV11", True),
        ("someVpredModel", True), ("NoobAI-XL-v-prediction", True), ("vpredator", False), ("improvPredicate", False),
    ],
)  # fmt: skip
def test_v_prediction_in_a_name(name, said):
    found = identify(header(path=f"{name}.safetensors")).config.schedule.prediction
    assert found == ("v" if said else "eps")


def test_a_given_model_does_not_say_what_it_predicts():
    """There is one sdxl: the file's own marker decides, unless the caller gives the prediction."""
    file = header(v_pred=(0,))
    assert identify(file, SDXL).config.schedule.prediction == "v"
    assert identify(file, SDXL, "eps").config.schedule.prediction == "eps"


def test_a_projection_of_transformers_in_an_original_file():
    """As diffusers' converter writes it: a linear layer, whose rows and columns are not exchanged."""
    state = tiny_state("tiny-sdxl")
    key = "conditioner.embedders.1.model.text_projection"
    other = {k: x for k, x in state.items() if k != key} | {f"{key}.weight": state[key].T.contiguous()}
    ours, theirs = (convert(x, TINY_XL)["text_encoder_2"]["projection.weight"] for x in (state, other))
    assert torch.equal(ours, theirs)


def test_markers_of_v_prediction_are_written(tmp_path):
    """ComfyUI knows v-prediction of an SDXL file by these alone."""
    markers = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    state = {k: x.contiguous() for k, x in tiny_state("tiny-sdxl").items()} | markers
    save_file(state, tmp_path / "a.safetensors")
    for i, layout in enumerate(("diffusers", "original")):
        path = tmp_path / ("folder" if layout == "diffusers" else "b.safetensors")
        given = (tmp_path / "a.safetensors", path, "--layout", layout, "--model", "tiny-xl")
        given = given if i == 0 else (tmp_path / "folder", path, "--layout", layout)
        assert convert_script.main([*map(str, given)]) == 0
    back = load_file(tmp_path / "b.safetensors")
    assert back.keys() == state.keys()


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_layer_that_is_not_there_is_made_and_said(tmp_path, layout, capsys):
    """Of CLIP-L, as other programs load it; a file of ours that was trained here lacks it."""
    states = convert({k: x for k, x in tiny_state("tiny-sdxl").items() if ".layers.2." not in k}, TINY_XL)
    save_file(to_own({n: dict(state) for n, state in states.items()}), tmp_path / "a.safetensors", metadata(TINY_XL))
    path = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    assert convert_script.main([str(tmp_path / "a.safetensors"), str(path), "--layout", layout]) == 0
    assert "the text encoder's last layer is a copy of the one before it" in capsys.readouterr().err
    file, stem = path, "conditioner.embedders.0.transformer.text_model.encoder.layers."
    if layout == "diffusers":
        file, stem = path / "text_encoder" / "model.safetensors", "text_model.encoder.layers."
    found = load_file(file)
    assert torch.equal(found[f"{stem}2.mlp.fc1.weight"], found[f"{stem}1.mlp.fc1.weight"])


def test_a_second_text_encoder_that_the_model_does_not_have():
    """Weights of another network are unknown ones, not left out in silence."""
    sd1 = {key: shape for key, (shape, _) in manifest("sd-v1").items()}
    more = {key: shape for key, (shape, _) in manifest("sdxl-base").items() if "embedders.1" in key}
    state = {key: torch.empty(shape, device="meta") for key, shape in (sd1 | more).items()}
    with pytest.raises(CheckpointError, match=r"weights in the file that Stable Diffusion 1\.x does not have"):
        convert(state, SD1)
