"""SDXL with parts of other files: whose VAE a file holds, text encoders in all namings, and the VAE in float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY, TINY_XL, manifest, tiny_state
from conftest import loaded
from safetensors.torch import save_file
from sdxl_common import DEEP_REFINER, Header, random_state
from test_few_step_models import Given
from test_inspect import sparse_file

from sd import StableDiffusion, latents
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_diffusers, to_own
from sd.checkpoints.layouts import SECOND
from sd.checkpoints.loading import LoadOptions, ModelFiles, with_part
from sd.checkpoints.tiny_vae import notes_on_tiny
from sd.checkpoints.vae_files import notes_on_vae, overflows, whose_vae
from sd.config import SD1, SD2, SDXL, SDXL_REFINER, VAEConfig
from sd.params import SamplingParams, TextToImage
from sd.runtime.vae_tiling import decode_in_strips

TEXT_2 = "conditioner.embedders.1.model."


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
    (vae_header("models/ponyXLVae.safetensors"), (True, False)),
    (vae_header("stable-diffusion-v1-5/vae.safetensors"), (False, False)),
    (vae_header("stable-diffusion-2-1/vae.safetensors"), (False, False)),
    (vae_header("v1-5-pruned-emaonly.safetensors"), (False, False)),
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
                CheckpointError, match=r"^the VAE of an? .*, whose latents differ from those of .* with --vae$"
            ):
                with_part(config, "vae", file)
            continue
        if "vae" not in file.configs:  # which says its scale
            assert with_part(config, "vae", file).vae.scale == config.vae.scale  # kept, whatever the file is called
        notes = list(notes_on_vae(file, config))
        assert len(notes) == int(expected is None or not fits)
        assert all(("nothing shows" if expected is None else "expect wrong colours") in note for note in notes)


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
        ("plain", tmp_path, "nothing shows whether"),
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
    refiner = random_state(DEEP_REFINER)
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
@pytest.mark.sampled(3)
def test_text_encoders_from_other_files(files, second):
    """A U-Net alone with all its parts from elsewhere: the same weights as in the whole file."""
    first = FIRSTS[SECONDS.index(second) % len(FIRSTS)]
    given = {"text_encoder": first, SECOND: second, "vae": "vae"}
    options = LoadOptions(TINY_XL, **{name: files / f"{file}.safetensors" for name, file in given.items()})
    expected = convert(tiny_state("tiny-sdxl"), TINY_XL)
    with ModelFiles(files / "unet.safetensors", options) as found:
        assert found.config.vae.scale == 0.13025
        same_states(found.states, expected, TINY_XL.networks)


@pytest.mark.exhaustive
def test_the_refiner_takes_the_second_of_two(files):
    for name in ("whole", "comfy_pair", "own", "hf_g", "openclip_g"):
        options = LoadOptions(DEEP_REFINER, text_encoder=files / f"{name}.safetensors")
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
    options = LoadOptions(DEEP_REFINER, text_encoder=files / "hf_l.safetensors")
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
    assert overflows(vae_header("m/sd_xl_base_1.0.safetensors"), SDXL) == "going by the name sd_xl_base_1.0"
    assert overflows(vae_header("m/sd_xl_refiner_1.0.safetensors"), SDXL_REFINER)
    assert overflows(vae_header(vae={"force_upcast": True}), SDXL) == "force_upcast in its vae/config.json"
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
    """One decode in vain for a model, not for an image; later ones say so; the images are those of float32."""
    model = StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL, torch.float16))
    with torch.no_grad():  # beyond float16 inside of the decoder, not at its ends
        model.vae.decoder.conv_in.weight.mul_(3e4)
    z, runs, notes = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), counted(model), []
    first = model.decode(z, notes.append)
    assert runs == [torch.float16, torch.float32, torch.float32]
    assert notes == ["the image is not finite in float16: computing it again in float32"]
    again = model.decode(z, notes.append)
    assert runs[3:] == [torch.float32] * 2
    assert notes[1:] == ["the image is computed in float32: an earlier one was not finite in float16"]
    assert [image.tobytes() for image in again] == [image.tobytes() for image in first]
    assert next(model.vae.parameters()).dtype == torch.float16 and model.vae.overflows == {"image"}
    # latents that are not finite say nothing about the VAE
    model.vae.overflows.clear()
    with pytest.raises(ArithmeticError):
        model.decode(torch.full_like(z, float("nan")), notes.append)
    assert not model.vae.overflows


def test_an_overflow_of_stable_diffusions_vae_is_one_of_the_image():
    """It is tried in float16 again."""
    model = StableDiffusion(TINY, **loaded(tiny_state(), TINY, torch.float16))
    weight = model.vae.decoder.conv_in.weight.clone()
    with torch.no_grad():
        model.vae.decoder.conv_in.weight.mul_(3e4)
    z, runs, notes = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), counted(model), []
    model.decode(z, notes.append)
    assert runs == [torch.float16, torch.float32] and not model.vae.overflows
    with torch.no_grad():
        model.vae.decoder.conv_in.weight.copy_(weight)
    model.decode(z, notes.append)
    assert runs[2:] == [torch.float16] and len(notes) == 1


def test_in_float32_it_works_in_strips_sooner(monkeypatch):
    """As its maps are twice as large: an image as large as fits at once in float16 does not in float32."""
    model = StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL, torch.float16))
    model.vae.overflows = {"image"}
    z, in_strips = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    (whole,) = model.decode(z)
    monkeypatch.setattr(latents, "LARGE_ON_CPU", 64 * 64)
    monkeypatch.setitem(
        latents.DECODE_IN_STRIPS, VAEConfig, lambda vae, x: in_strips.append(x.dtype) or decode_in_strips(vae, x)
    )
    (strips,) = model.decode(z)
    model.vae.overflows = set()
    model.decode(z)
    assert in_strips == [torch.float32] and np.abs(np.asarray(whole, int) - np.asarray(strips, int)).max() <= 1


@pytest.mark.exhaustive
def test_the_original_vae_is_not_even_tried(tmp_path, files):
    """It is known by the file's name; only float16 is concerned."""
    path = tmp_path / "sd_xl_base_1.0.safetensors"
    path.write_bytes((files / "whole.safetensors").read_bytes())
    options = {"config": TINY_XL, "device": "cpu"}
    model = StableDiffusion.load(path, dtype="float16", **options)
    line = (
        "VAE: computed in float32, because SDXL's original one overflows in float16 (going by the name sd_xl_base_1.0)"
    )
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


def test_a_run_with_parts_of_other_files(files):
    """From the U-Net alone to an image, the same as with the whole file."""
    options = {"config": TINY_XL, "device": "cpu", "dtype": "float32"}
    parts = {"text_encoder": "comfy_pair", SECOND: "comfy_pair", "vae": "vae"}
    parts = {name: files / f"{file}.safetensors" for name, file in parts.items()}
    request = TextToImage("a house", SamplingParams(steps=2, height=64, width=64, seed=1))
    one = StableDiffusion.load(files / "whole.safetensors", **options).prepare(request).result()
    two = StableDiffusion.load(files / "unet.safetensors", **options, **parts).prepare(request).result()
    assert one.images[0].tobytes() == two.images[0].tobytes()
