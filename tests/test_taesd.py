"""The tiny autoencoder (TAESD): against the original's outputs and diffusers; its files, the programs, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import TINY, Golden, error, manifest, tiny_state
from PIL import Image
from safetensors.torch import load_file, save_file
from test_editing_scripts import MASK, SAMPLE, edit, made  # noqa: F401
from test_scripts import ckpt  # noqa: F401
from torch import nn

from scripts import convert, img2img, inpaint, txt2img
from sd import SD1, HighRes, ImageToImage, Inpaint, SamplingParams, StableDiffusion, TextToImage
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.export import to_diffusers, to_original
from sd.checkpoints.loading import LoadOptions, ModelFiles
from sd.checkpoints.tiny_files import tiny_to_diffusers
from sd.checkpoints.tiny_loading import load_tiny_vae
from sd.checkpoints.tiny_vae import notes_on_tiny, tiny_config
from sd.config import Config, TinyVAEConfig, VAEConfig
from sd.latents import decode, encode
from sd.models.taesd import TinyVAE, from_bytes, to_bytes
from sd.models.vae import VAE
from sd.runtime import tiny_vae_tiling
from sd.runtime.circular import CircularPadding
from sd.runtime.optimize import optimize
from sd.runtime.tiny_vae_tiling import decode_tiny_in_strips, encode_tiny_in_strips

State = dict[str, torch.Tensor]
PREFIX = "first_stage_model."


@lru_cache
def halves() -> tuple[State, State]:
    """The original's encoder and decoder files, with the reference weights."""
    encoder, decoder = (reference.make_state_dict(manifest(f"taesd-{half}")) for half in ("encoder", "decoder"))
    return encoder, decoder


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def lowered(state: State) -> State:
    """The decoder in diffusers' numbers, which leave out the clamp."""
    return {f"{int(key.partition('.')[0]) - 1}.{key.partition('.')[2]}": tensor for key, tensor in state.items()}


def both(encoder: str = "encoder.", decoder: str = "decoder.") -> State:
    return prefixed(encoder, halves()[0]) | prefixed(decoder, halves()[1])


def as_diffusers() -> State:
    return prefixed("encoder.layers.", halves()[0]) | prefixed("decoder.layers.", lowered(halves()[1]))


def folder_of(path: Path, **halves: State) -> Path:
    path.mkdir()
    for name, state in halves.items():
        save_file(state, path / f"{name}.safetensors")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """TAESD in all of its forms: name -> file or folder."""
    root = tmp_path_factory.mktemp("taesd")
    encoder, decoder = halves()
    torch.save(decoder, root / "taesd_decoder.pth")
    save_file(decoder, root / "decoder.safetensors")
    save_file(both(), root / "one.safetensors")
    torch.save(both("taesd_encoder.", "taesd_decoder.") | {"vae_scale": torch.tensor(0.18215)}, root / "combined.pth")
    save_file(both(f"{PREFIX}taesd_encoder.", f"{PREFIX}taesd_decoder."), root / "comfy.safetensors")
    save_file(prefixed("tae.", as_diffusers()), root / "prefixed.safetensors")
    save_file(as_diffusers(), root / "diffusers.safetensors")
    folder_of(root / "two", taesd_decoder=decoder, taesdxl_decoder=decoder, taesdxl_encoder=encoder)
    torch.save(encoder, root / "two/taesd_encoder.pth")
    folder_of(root / "taesd", diffusion_pytorch_model=as_diffusers())
    config = {"_class_name": "AutoencoderTiny", **tiny_to_diffusers(TinyVAEConfig()), "upsample_fn": "nearest"}
    (root / "taesd/config.json").write_text(json.dumps(config))
    save_file(tiny_state(), root / "model.safetensors")
    names = [path for path in root.iterdir() if path.stem != "model"]
    assert len(names) == 9
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def tiny_vae(files) -> TinyVAE:
    return load_tiny_vae(files["two"], TINY, torch.device("cpu"), torch.float32)


def opened(files, vae: Path) -> tuple[Config, State, tuple[str, ...]]:
    """The config, the VAE's weights and the notes of the tiny model with another VAE."""
    with ModelFiles(files["model.safetensors"], LoadOptions(config=TINY, vae=vae)) as found:
        return found.config, dict(found.states["vae"]), found.about()


# ----------------------------------------------------------------------------------------------------- the network


def test_the_original_s_outputs(tiny_vae):
    golden = Golden("taesd_128x72")
    assert error(tiny_vae.encode(golden["image_u8"].float() / 127.5 - 1).mean, golden["encoded"]) < 1e-5
    z = 2 * golden.normal("latent", (1, 4, 16, 9))  # far enough from zero that the clamp shows
    assert error((tiny_vae.decode(z) + 1) / 2, golden["decoded"]) < 1e-5
    numbers = to_bytes(golden["encoded"])
    assert numbers.dtype == torch.uint8 and numbers.equal(golden["latent_u8"])
    assert to_bytes(z).equal((255 * golden["latent_scaled"]).round().to(torch.uint8))
    assert error((tiny_vae.decode(from_bytes(numbers)) + 1) / 2, golden["roundtrip"]) < 1e-5


def test_diffusers_has_the_same_network(tiny_vae):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderTiny(**tiny_to_diffusers(TinyVAEConfig()))
    theirs.load_state_dict(as_diffusers(), assign=True)
    image = reference.normal("image", (2, 3, 24, 40)).clamp(-1, 1)
    z = 2 * reference.normal("z", (2, 4, 3, 5))
    assert error(tiny_vae.encode(image).mode(), theirs.encode(image).latents) < 1e-5
    assert error(tiny_vae.decode(z), theirs.decode(z).sample) < 1e-5
    assert theirs.config.scaling_factor == TinyVAEConfig().scale


def test_its_latents_have_no_spread_and_its_images_sides_of_8(tiny_vae):
    gaussian = tiny_vae.encode(torch.zeros(1, 3, 16, 8))
    assert gaussian.sample(torch.ones_like(gaussian.mean)).equal(gaussian.mean)
    with pytest.raises(ValueError, match="multiples of 8, got 16x12"):
        tiny_vae.encode(torch.zeros(1, 3, 16, 12))


def test_gradients_pass_through(tiny_vae):
    z = reference.normal("z", (1, 4, 3, 2))
    with torch.enable_grad():
        z.requires_grad_(True)
        tiny_vae.decode(z)[0, 0, 5, 5].backward()
    step = 1e-2 * torch.sign(z.grad)
    rise = tiny_vae.decode(z.detach() + step) - tiny_vae.decode(z.detach() - step)
    assert rise[0, 0, 5, 5] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("around", [False, True])
def test_strips_give_the_same_image(tiny_vae, monkeypatch, dtype, around):
    """Strips of the fewest rows, with edges that wrap around and with others."""
    monkeypatch.setattr(tiny_vae_tiling, "NUMBERS", 1)
    vae = optimize(TinyVAE(TinyVAEConfig()).requires_grad_(False).to(dtype))
    vae.load_state_dict(tiny_vae.state_dict())
    z, image = (2 * reference.normal("z", (2, 4, 9, 4))).to(dtype), reference.normal("i", (2, 3, 72, 32)).to(dtype)
    with CircularPadding() if around else torch.no_grad():
        limit = 1e-5 if dtype == torch.float32 else 3e-2
        assert error(decode_tiny_in_strips(vae, z), vae.decode(z)) < limit
        assert error(encode_tiny_in_strips(vae, image).mean, vae.encode(image).mean) < limit


def test_large_images_pass_in_strips(tiny_vae, monkeypatch):
    passed = []
    monkeypatch.setattr("sd.latents.LARGE", 100)
    monkeypatch.setattr("sd.latents.ENCODE_IN_STRIPS", {TinyVAEConfig: lambda v, x: passed.append("e") or v.encode(x)})
    monkeypatch.setattr("sd.latents.DECODE_IN_STRIPS", {TinyVAEConfig: lambda v, z: passed.append("d") or v.decode(z)})
    z = encode(tiny_vae, torch.zeros(1, 3, 16, 16), print).mode()
    assert decode(tiny_vae, z, print)[0].size == (16, 16) and passed == ["e", "d"]


def test_what_is_not_finite_in_float16_is_decoded_again(tiny_vae):
    half, notes = TinyVAE(TinyVAEConfig()).half(), []
    half.load_state_dict(tiny_vae.state_dict())
    half.decoder.conv_in.weight.mul_(2e5)
    image = decode(half, torch.ones(1, 4, 2, 2), notes.append)[0]
    assert image.size == (16, 16) and notes == ["the image is not finite in float16: computing it again in float32"]


def test_its_config_is_a_value():
    config = replace(SD1, vae=TinyVAEConfig(encoder=False))
    assert Config.from_json(config.to_json()) == config and config.vae.factor == 8
    for changes, words in (
        ({"width": 0}, "width"), ({"blocks": [1] * 9}, "blocks"), ({"blocks": 3}, "blocks"),
        ({"encoder": 1}, "encoder"),
        ({"image_channels": 4}, "images have 3"), ({"scale": 1.0}, "scale"), ({"latent_channels": 16}, "16"),
    ):  # fmt: skip
        raw = json.loads(config.to_json())
        raw["vae"] |= changes
        with pytest.raises(ValueError, match=words):
            Config.from_json(json.dumps(raw))


# ----------------------------------------------------------------------------------------------------- files

ALL = (
    "taesd_decoder.pth", "decoder.safetensors", "one.safetensors", "combined.pth", "comfy.safetensors",
    "prefixed.safetensors", "diffusers.safetensors", "two", "taesd",
)  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_form_of_file(files, tiny_vae, name):
    config, state, about = opened(files, files[name])
    only_decoder = "decoder" in name
    assert config == replace(TINY, vae=TinyVAEConfig(encoder=not only_decoder))
    assert f"VAE: a tiny autoencoder (TAESD){', only its decoder' if only_decoder else ''}" in about
    expected = {key: w for key, w in tiny_vae.state_dict().items() if not only_decoder or key.startswith("decoder.")}
    assert state.keys() == expected.keys() and all(state[key].equal(expected[key]) for key in expected)


def test_a_vae_of_a_model_again(files):
    """A whole VAE in place of the tiny one that a model has."""
    config, state, _ = opened(files, files["model.safetensors"])
    assert config == TINY and "quant.weight" in state


def test_a_whole_vae_for_a_model_with_a_tiny_one():
    tiny, half = TinyVAEConfig(), TinyVAEConfig(encoder=False)
    assert tiny_config(tiny, "original", PREFIX, {}) == VAEConfig()
    assert tiny_config(TINY.vae, "diffusers", "", {}) == TINY.vae
    assert tiny_config(half, "taesd", "", {"encoder.0.weight"}) == tiny_config(TINY.vae, "taesd-own", "vae.", {
        "vae.encoder.conv_in.weight"
    }) == tiny  # fmt: skip
    assert tiny_config(tiny, "taesd", "vae.", {"encoder.0.weight"}) == half


def test_a_checkpoint_with_a_tiny_autoencoder_inside(files, tmp_path):
    """As ComfyUI saves one."""
    model = {key: w for key, w in tiny_state().items() if not key.startswith(PREFIX)}
    save_file(model | load_file(files["comfy.safetensors"]), tmp_path / "model.safetensors")
    with ModelFiles(tmp_path / "model.safetensors", LoadOptions(config=TINY)) as found:
        assert found.config.vae == TinyVAEConfig() and len(found.states["vae"]) == 134


def test_names_that_say_sdxl_and_models_with_other_latents(files, tmp_path):
    folder = folder_of(tmp_path / "xl", taesdxl_decoder=halves()[1])
    _, _, about = opened(files, folder)
    assert any("taesdxl_decoder.safetensors: its name says that it is for SDXL" in line for line in about)
    assert any("this model has another one" in line for line in about)  # tiny v1's VAE is not Stable Diffusion's
    assert not any("SDXL" in line for line in opened(files, files["two"])[2])


BAD = {
    "encoder": (halves()[0], "this is the encoder of a tiny autoencoder (TAESD), which cannot decode: give its"),
    "sd3": (halves()[1] | {"1.weight": torch.zeros(64, 16, 3, 3)}, "(SD3 or FLUX.1: 16 latent channels), not of"),
    "flux2": (
        halves()[1] | {"1.weight": torch.zeros(64, 32, 3, 3), "3.pool.1.weight": torch.zeros(256)},
        "of another family (FLUX.2: 32 latent channels), not of Stable Diffusion: give taesd (1.x, 2.x)",
    ),
    "missing": ({k: w for k, w in halves()[1].items() if not k.startswith("5.")}, "6 weights of 67 missing from the"),
    "shape": (halves()[1] | {"7.weight": torch.zeros(64, 32, 3, 3)}, "1 weight of the wrong shape: 7.weight is 64x32"),
    "unknown": (halves()[1] | {"5.pool.1.weight": torch.zeros(256)}, "1 weight in the file that tiny v1 does not"),
    "cut": ({k: w for k, w in both().items() if k != "encoder.9.conv.4.bias"}, "1 weight of 134 missing from the file"),
    "empty": ({"1.weight": halves()[1]["1.weight"]}, "with most of its weights missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(files, tmp_path, name):
    state, words = BAD[name]
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as caught:
        opened(files, tmp_path / "bad.safetensors")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'bad.safetensors'}: ") and words in message and "\n" not in message


def test_damaged_numbers_are_named(tmp_path):
    save_file(halves()[1] | {"19.bias": torch.tensor([0, torch.nan, 0])}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a.safetensors: 1 weight with NaN or infinite numbers: 19.bias"):
        load_tiny_vae(tmp_path / "a.safetensors", TINY, torch.device("cpu"), torch.float32)


def test_folders_that_cannot_be_used(files, tmp_path):
    several = folder_of(tmp_path / "several", taesdxl_decoder=halves()[1], taesd3_decoder=halves()[1])
    with pytest.raises(
        CheckpointError, match=r"several tiny autoencoders \(taesd3, taesdxl\); give the decoder's file"
    ):
        opened(files, several)
    with pytest.raises(CheckpointError, match="cannot decode"):
        opened(files, folder_of(tmp_path / "half", taesd_encoder=halves()[0]))
    for changes, words in (
        ({"scaling_factor": 0.5}, "scaling_factor 0.5, which is not supported: expected 1"),
        ({"num_decoder_blocks": [1, 3, 3, 3]}, "are not the encoder's in reverse"),
        ({"decoder_block_out_channels": [64, 64, 64, 32]}, "has decoder_block_out_channels"),
        ({"latent_channels": 16}, "of another family (16 latent channels; this model has 4)"),
        ({"encoder_block_out_channels": 5}, "describe no model"),
    ):
        config = json.loads((files["taesd"] / "config.json").read_text()) | changes
        folder = tmp_path / words.replace("/", "")[:20]
        folder_of(folder, diffusion_pytorch_model=as_diffusers())
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError) as caught:
            opened(files, folder)
        assert words in str(caught.value)


def test_a_preview_decoder_has_to_fit(files):
    where = (torch.device("cpu"), torch.float32)
    with pytest.raises(CheckpointError, match="this is a whole VAE, expected a tiny autoencoder"):
        load_tiny_vae(files["model.safetensors"], TINY, *where)
    coarse = replace(TINY, name="coarse", vae=VAEConfig(channels=(32, 32), blocks=1))
    with pytest.raises(CheckpointError, match="stand for 8 x 8 pixels, those of coarse for 2 x 2"):
        load_tiny_vae(files["two"], coarse, *where)


# ----------------------------------------------------------------------------------------------------- models, programs


def test_a_model_with_only_a_decoder(files, ckpt):  # noqa: F811
    """It makes images of text; those to start from it refuses before the first step. As previews: the same decoder."""
    model = StableDiffusion.load(ckpt, device="cpu", dtype="float32", vae=files["taesd_decoder.pth"])
    params = SamplingParams(height=64, width=64, steps=2, seed=7)
    image = model.prepare(TextToImage("a", params)).result().images[0]
    assert len(model.prepare(HighRes("a", params, hires=1.5, hires_upscaler="latent"))) == 3  # needs no encoder
    own = StableDiffusion.load(ckpt, device="cpu", dtype="float32")
    run = own.prepare(TextToImage("a", params))
    last = list(run)[-1].x
    tiny = load_tiny_vae(files["taesd_decoder.pth"], own.config, own.device, own.dtype)
    assert np.abs(pixels(run.preview(last, tiny)[0]) - pixels(image)).max() <= 1
    assert np.abs(pixels(run.preview(last)[0]) - pixels(image)).max() > 20
    for refused in (
        lambda: model.prepare(ImageToImage("a", params, image=image, strength=0.5)),
        lambda: model.prepare(Inpaint("a", params, image=image, mask=Image.new("L", (64, 64), 255), strength=0.5)),
        lambda: model.prepare(HighRes("a", params, hires=1.5)),
    ):
        with pytest.raises(ValueError, match="has no encoder, which images to start from and inpainting need: give"):
            refused()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_programs_with_a_tiny_autoencoder(edit, files, tmp_path):  # noqa: F811
    vae = ("--vae", files["two"])
    for program, given in ((txt2img, ()), (img2img, (SAMPLE,)), (inpaint, (SAMPLE, MASK))):
        status, out, err, _ = edit(program, "a", *given, *vae)
        assert (status, err) == (0, []) and "VAE: a tiny autoencoder (TAESD)" in out
    assert edit(txt2img, "a", *vae, "--low-memory")[0] == 0
    first, last = made(tmp_path), made(tmp_path, "00004.png")
    assert first.tobytes() == last.tobytes() and "VAE: two, " in first.text["parameters"]
    status, _, err, _ = edit(img2img, "a", SAMPLE, "--vae", files["decoder.safetensors"])
    assert status == 1 and len(err) == 1 and err[0].startswith("error: the tiny autoencoder has no encoder, which")


def test_a_model_with_a_tiny_autoencoder_has_no_original_layout():
    config = replace(SD1, vae=TinyVAEConfig())
    with pytest.raises(ValueError, match="original"):
        to_original({"vae": {}}, config)
    with pytest.raises(ValueError, match="encoder"):
        to_diffusers({"vae": {}}, replace(SD1, vae=TinyVAEConfig(encoder=False)))


def test_the_name_of_a_folder_counts():
    for path in ("taesdxl/diffusion_pytorch_model.safetensors", "a/taesdxl_decoder.pth"):
        assert "it is for SDXL" in notes_on_tiny(VAEConfig(), [Path(path)])[0]
    assert notes_on_tiny(VAEConfig(), [Path("taesd/diffusion_pytorch_model.safetensors")]) == []


def test_previews_leave_the_image_as_it_is(edit, files, tmp_path):  # noqa: F811
    args = ("--save-steps", "--no-metadata")
    assert edit(txt2img, "a", *args)[0] == 0
    status, _, err, _ = edit(txt2img, "a", *args, "--preview-vae", files["taesd_decoder.pth"])
    assert status == 0 and len(err) == 1 and "this model has another one: expect wrong images" in err[0]
    plain, previewed = ((tmp_path / f"out/0000{i}.png").read_bytes() for i in (1, 2))
    assert plain == previewed
    steps = [pixels(made(tmp_path, f"0000{i}-steps/002.png")) for i in (1, 2)]
    assert np.abs(steps[0] - steps[1]).mean() > 5
    for more, words in (
        (("--preview", "linear"), "--preview linear uses no VAE"),
        (("--preview-vae", files["model.safetensors"]), "this is a whole VAE"),
    ):
        status, _, err, _ = edit(txt2img, "a", *args, "--preview-vae", files["two"], *more)
        assert status == 1 and len(err) == 1 and words in err[0]
    status, _, err, made_files = edit(txt2img, "a", "--preview-vae", files["two"])
    assert status == 1 and "--preview-vae decodes the steps that --save-steps saves" in err[0]
    assert sum(name.endswith(".png") and "steps" not in name for name in made_files) == 2


def converted(*args: object, status: int = 0) -> None:
    assert convert.main([str(arg) for arg in args]) == status


def test_conversion_there_and_back(files, tmp_path, capsys):
    """Bit for bit, from every layout into every other one."""
    converted(files["taesd"], tmp_path / "own.safetensors")
    converted(tmp_path / "own.safetensors", tmp_path / "original", "--layout", "original")
    assert {file.name for file in (tmp_path / "original").iterdir()} == {
        "taesd_encoder.safetensors", "taesd_decoder.safetensors",
    }  # fmt: skip
    for half, expected in zip(("encoder", "decoder"), halves(), strict=True):
        found = load_file(tmp_path / f"original/taesd_{half}.safetensors")
        assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)
    converted(tmp_path / "original", tmp_path / "again", "--layout", "diffusers")
    found = load_file(tmp_path / "again/diffusion_pytorch_model.safetensors")
    assert found.keys() == as_diffusers().keys() and all(found[key].equal(w) for key, w in as_diffusers().items())
    assert opened(files, tmp_path / "again")[0].vae == TinyVAEConfig()
    converted(files["taesd_decoder.pth"], tmp_path / "half", "--layout", "original", "--dtype", "float16")
    (name,) = (tmp_path / "half").iterdir()
    assert name.name == "taesd_decoder.safetensors" and load_file(name)["1.bias"].dtype == torch.float16
    assert "a tiny autoencoder (TAESD), 134 weights" in capsys.readouterr().out
    for args, words in (
        ((files["decoder.safetensors"], tmp_path / "x", "--layout", "diffusers"), "without an encoder: give a folder"),
        ((files["two"], tmp_path / "x.safetensors", "--layout", "original"), "writes a folder here; give a name"),
        ((files["two"], tmp_path / "x.safetensors", "--model", "sd1"), "without a model: leave out --model"),
    ):
        converted(*args, status=1)
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not list(tmp_path.glob("x*"))


def test_a_file_says_what_it_is(files, capsys):
    converted(files["taesd_decoder.pth"], "--info")
    out = capsys.readouterr().out
    assert "this is a tiny autoencoder (TAESD): give it with --vae" in out and "67 weights, 1.2 M" in out
    assert txt2img.main(["a", "--ckpt", str(files["two"])]) == 1
    assert "two: this is a tiny autoencoder (TAESD): give it with --vae, beside" in capsys.readouterr().err


def test_a_whole_model_with_a_tiny_autoencoder(files, ckpt, tmp_path, capsys):  # noqa: F811
    converted(ckpt, tmp_path / "own.safetensors", "--vae", files["taesd"])
    converted(tmp_path / "own.safetensors", tmp_path / "folder", "--layout", "diffusers")
    index = json.loads((tmp_path / "folder/model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]
    converted(tmp_path / "folder", tmp_path / "back.safetensors")
    first, last = (load_file(tmp_path / f"{name}.safetensors") for name in ("own", "back"))
    assert first.keys() == last.keys() and all(first[key].equal(last[key]) for key in first)
    assert sum(key.startswith("vae.") for key in first) == 134
    capsys.readouterr()
    for layout, vae, words in (
        ("original", "two", "an original checkpoint has no place for a tiny autoencoder"),
        ("diffusers", "decoder.safetensors", "diffusers has no tiny autoencoder (TAESD) without an encoder"),
    ):
        name = tmp_path / ("x.safetensors" if layout == "original" else "x")
        converted(ckpt, name, "--layout", layout, "--vae", files[vae], status=1)
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not name.exists()


def test_decoding_is_a_small_part_of_the_vae_s_work():
    """Counted in the multiplications of the convolutions: less than a fifteenth."""
    counts = []
    with torch.device("meta"):
        for vae in (TinyVAE(TinyVAEConfig()), VAE(VAEConfig())):
            counts.append(0)
            for layer in vae.decoder.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.register_forward_hook(count_multiplications(counts))
            assert vae.decode(torch.empty(1, 4, 8, 8)).shape == (1, 3, 64, 64)
    assert 0 < counts[0] < counts[1] / 15


def count_multiplications(counts: list[int]):
    def hook(layer: nn.Module, args: object, out: torch.Tensor) -> None:
        counts[-1] += out.numel() * layer.weight[0].numel()

    return hook
