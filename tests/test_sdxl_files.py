"""SDXL files as people have them: U-Nets alone, other families, what --info says, and every layout."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from common import TINY_XL, manifest, tiny_state
from safetensors.torch import load_file, save_file
from sdxl_common import (
    DEEP_REFINER,
    FIRST,
    LABEL,
    TINY_XL_INPAINT,
    Header,
    header,
    random_state,
)
from test_inspect import info, sparse_file
from test_sdxl import SMALLER, smaller

from scripts import convert as convert_script
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import identify
from sd.checkpoints.diffusers_config import from_diffusers
from sd.checkpoints.diffusers_export import unet_to_diffusers
from sd.checkpoints.export import metadata, to_own
from sd.checkpoints.inspect import inspect
from sd.checkpoints.key_maps import diffusers_sources, original_sources
from sd.config import MODELS, SD1, SDXL, SDXL_INPAINT, SDXL_REFINER
from sd.models.build import weight_shapes


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The tiny models, as if they had names of their own."""
    for name, config in (("tiny-xl", TINY_XL), ("tiny-xl-inpaint", TINY_XL_INPAINT), ("tiny-refiner", DEEP_REFINER)):
        monkeypatch.setitem(MODELS, name, config)


def test_a_u_net_s_folder_alone_has_sdxl_s_vae():
    """As latent-consistency/lcm-sdxl is. Its model has SDXL's latents, not Stable Diffusion's."""
    raw = unet_to_diffusers(replace(SDXL, unet=replace(SDXL.unet, guidance=256)))
    config = from_diffusers({"unet": raw})
    assert config == replace(SDXL, unet=replace(SDXL.unet, guidance=256)) and config.vae.scale == 0.13025
    assert from_diffusers({"unet": unet_to_diffusers(SD1)}).vae == SD1.vae


@pytest.mark.sampled(5)
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


@pytest.mark.exhaustive
def test_smaller_ones_where_it_is_said_that_it_is_sdxl():
    """--model sdxl with a file of SSD-1B, say: the transformers are counted all the same."""
    state, config = smaller(*SMALLER["SSD-1B"])
    assert identify(state, SDXL).config == config and identify(header(), SDXL).config == SDXL


def test_a_projection_of_transformers_in_an_original_file():
    """As diffusers' converter writes it: a linear layer, whose rows and columns are not exchanged."""
    state = tiny_state("tiny-sdxl")
    key = "conditioner.embedders.1.model.text_projection"
    other = {k: x for k, x in state.items() if k != key} | {f"{key}.weight": state[key].T.contiguous()}
    ours, theirs = (convert(x, TINY_XL)["text_encoder_2"]["projection.weight"] for x in (state, other))
    assert torch.equal(ours, theirs)


@pytest.mark.exhaustive
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


# ------------------------------------------------------------------------------------------------------ other families


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


# -------------------------------------------------------------------------------------------------------------- --info


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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


# ------------------------------------------------------------------------------------------------------ there and back


WAYS = (("original",), ("sd",), ("diffusers",), ("diffusers", "sd"))


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize("name", ["tiny-xl", "tiny-xl-inpaint", "tiny-refiner"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.sampled(24)
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", [TINY_XL_INPAINT, DEEP_REFINER], ids=lambda config: config.name)
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
    assert (pipe.text_encoder is None) == (config is DEEP_REFINER)
