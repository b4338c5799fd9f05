"""Files and names that a program has of its own: prefixes, names of files in a folder, tensors that are left out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from common import TINY, tiny_state
from safetensors.torch import load_file, save_file
from test_folders import TEXT_FILE, UNET_FILE, VAE_FILE, assert_same, split, write_folder

from sd import StableDiffusion
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.convert import convert, describe_weights
from sd.checkpoints.detect import identify
from sd.checkpoints.export import to_own
from sd.checkpoints.folders import _unused
from sd.checkpoints.layouts import own_prefix
from sd.checkpoints.loading import LoadOptions, ModelFiles
from sd.checkpoints.prediction import stored_schedule

VAE = "first_stage_model."


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model", tiny_state(), TINY)


def weights(path: Path) -> dict[str, torch.Tensor]:
    with load_checkpoint(path) as checkpoint:
        return dict(to_own(convert(checkpoint, identify(checkpoint).config)))


def rewrite(path: Path, prefix: str) -> None:
    tensors = load_file(path)
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path)


# ------------------------------------------------------------------------------------------------ prefixes


@pytest.mark.parametrize("prefix", ["model.", "state_dict.", "pl_module.wrapped."])
def test_a_prefix_of_a_whole_file_is_read_and_said(prefix, tmp_path):
    """Networks that are found without it only: a checkpoint of a wrapper class."""
    state = {prefix + key: tensor for key, tensor in tiny_state().items()} | {"global_step": torch.tensor(3)}
    save_file(state, tmp_path / "model.safetensors")
    with load_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert checkpoint.notes == (f"all names in the file begin with {prefix!r}: this prefix is ignored",)
        assert_same(dict(to_own(convert(checkpoint, TINY))), dict(to_own(convert(tiny_state(), TINY))))


def test_a_prefix_of_a_file_of_one_network(tmp_path):
    vae = {key.removeprefix(VAE): x for key, x in tiny_state().items() if key.startswith(VAE)}
    save_file({f"autoencoder.{key}": x for key, x in vae.items()}, tmp_path / "vae.safetensors")
    save_file(tiny_state(), tmp_path / "model.safetensors")
    options = LoadOptions(config=TINY, vae=tmp_path / "vae.safetensors")
    with ModelFiles(tmp_path / "model.safetensors", options) as files:
        assert any("begin with 'autoencoder.'" in line for line in files.about())


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, TEXT_FILE])
def test_a_prefix_in_a_part_of_a_folder(file, folder):
    expected = weights(folder)
    for prefix in ("model.", "unet."):
        rewrite(folder / file, prefix)
        assert_same(weights(folder), expected)


@pytest.mark.parametrize("prefix", ["control_model.", "image_encoder.", "text_encoder_2.", "prior."])
def test_prefixes_of_other_networks_stay(prefix):
    unet = ["input_blocks.2.0.in_layers.0.weight", "out.2.bias"]
    assert own_prefix([f"{prefix}{key}" for key in unet]) == ""
    assert own_prefix([f"student.{key}" for key in unet]) == "student."
    assert own_prefix([f"model.{key}" for key in unet]) == "", "which is known"
    assert own_prefix([]) == own_prefix(["a.b", "c.d"]) == own_prefix(["conv_in"]) == ""


# ------------------------------------------------------------------------------------------------ names of files


@pytest.mark.parametrize(
    "file, name",
    [
        (UNET_FILE, "diffusion_pytorch_model.fp16.non_ema.safetensors"),
        (UNET_FILE, "model.safetensors"),
        (VAE_FILE, "kl-f8.safetensors"),
        (TEXT_FILE, "diffusion_pytorch_model.safetensors"),
    ],
)
def test_the_only_file_of_a_part_is_read_whatever_its_name(file, name, folder):
    expected = weights(folder)
    (folder / file).rename((folder / file).with_name(name))
    with load_checkpoint(folder) as checkpoint:
        part, _, usual = file.partition("/")
        said = f"{part}/{name} is read, as there is no {usual.removesuffix('.safetensors')} beside it"
        assert said in checkpoint.notes
    assert_same(weights(folder), expected)


def test_parts_without_a_file_that_can_be_chosen(folder):
    """The message is about the folder unet/, not that of a model without a U-Net."""
    unet = folder / UNET_FILE
    shutil.copy(unet, unet.with_name("a.safetensors"))
    unet.rename(unet.with_name("b.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"unet/: 2 files of weights with unusual names \(a.safe.*, b.safetensors"
    ):
        load_checkpoint(folder)
    (unet.with_name("a.safetensors")).unlink()
    split(unet.with_name("b.safetensors").rename(unet)).unlink()
    with pytest.raises(CheckpointError, match=r"unet/: parts of a split file without their index .*index.json as well"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/a/b/resolve/main/x.safetensors", "urn:air:sd1:checkpoint:1"]
)
def test_an_address_is_no_file(address):
    with pytest.raises(CheckpointError, match="an address, not a file; nothing is downloaded here: download it first"):
        load_checkpoint(address)


def test_a_model_one_folder_down(folder):
    with pytest.raises(CheckpointError, match=r"a folder with a diffusers model in it; give .* \(model\)"):
        load_checkpoint(folder.parent)


def test_weights_in_a_folder_that_are_not_used_are_said(folder):
    for name in ("unet_ema/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"never opened")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"the same")
    with load_checkpoint(folder) as checkpoint:
        assert checkpoint.notes == ("in the folder, but not used: unet_ema/, pytorch_lora_weights.safetensors",)


# ------------------------------------------------------------------------------------------------ what is left out


def test_tensors_without_numbers_are_left_out_and_said():
    found = convert(tiny_state() | {"marker": torch.empty(0), "x.weight": torch.empty(0, 3)}, TINY)
    assert found["text_encoder"].notes == ("left out, because they are empty: marker, x.weight",)
    with pytest.raises(CheckpointError, match=r"1 weight in the file .* does not have: marker"):
        convert(tiny_state() | {"marker": torch.ones(1)}, TINY)


def test_a_moving_average_that_is_not_whole_is_said():
    """In other names, or with weights missing: it used to be dropped without a word."""
    unet = {key: x for key, x in tiny_state().items() if key.startswith("model.diffusion_model.")}
    dotted = {f"model_ema.{key.removeprefix('model.')}": x for key, x in unet.items()}
    said = describe_weights(tiny_state() | dotted)
    assert said.startswith(
        f"U-Net: no complete moving average (EMA); left out: {len(unet)} weights of one (model_ema.diff"
    )
    assert describe_weights(tiny_state() | {"model_ema.decay": torch.tensor(0.9)}) == ""


def test_a_schedule_in_8_bits_is_called_so():
    table = {"alphas_cumprod": tiny_state()["alphas_cumprod"].to(torch.float8_e4m3fn)}
    changes, said = stored_schedule(table, TINY.schedule)
    assert not changes and "is in float8_e4m3fn, which is too coarse" in said


def test_whole_numbers_are_named_as_in_the_file(tmp_path):
    key = "model.diffusion_model.out.2.weight"
    save_file(tiny_state() | {key: tiny_state()[key].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{key} holds whole numbers"):
        StableDiffusion.load(tmp_path / "model.safetensors", config=TINY, device="cpu", dtype="float32")


def test_a_folder_that_may_not_be_looked_into_does_not_stop_a_load(tmp_path, monkeypatch):
    listed = Path.iterdir

    def forbidden(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    (tmp_path / "lost+found").mkdir()
    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert _unused(tmp_path, ()) == []
