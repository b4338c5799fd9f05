"""Files and folders of something else are named for what they are, with what to do; and the cache of downloads."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from common import TINY, tiny_state
from safetensors.torch import save_file
from test_folders import assert_same, refusal, weights, write_folder

from sd import StableDiffusion
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.detect import identify
from sd.checkpoints.key_maps import CLIP, UNET


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model", tiny_state(), TINY)


# ---------------------------------------------------------------------------------------- folders of something else

OTHER_FOLDERS = {
    "ONNX": ("model_index.json", "unet/model.onnx", "unet/weights.pb", "text_encoder/model.onnx"),
    "ONNX, one network": ("model.onnx", "model.onnx_data"),
    "Flax": ("model_index.json", "unet/config.json", "unet/diffusion_flax_model.msgpack"),
    "Flax, one network": ("config.json", "flax_model.msgpack"),
    "OpenVINO": ("model_index.json", "unet/openvino_model.xml", "unet/openvino_model.bin"),
    "TensorRT": ("unet.engine",),
    "Core ML": ("Unet.mlmodelc/coremldata.bin", "TextEncoder.mlmodelc/coremldata.bin"),
    "TensorFlow": ("tf_model.h5",),
    "GGUF": ("model-q8_0.gguf",),
    "unpacked": ("archive/data.pkl", "archive/data/0", "archive/version"),
    "unpacked, itself": ("data.pkl", "data/0"),
    "LoRA": ("pytorch_lora_weights.safetensors",),
    "textual inversion": ("learned_embeds.bin", "tokenizer/vocab.json"),
    "training run": ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
    "sharded training checkpoint": ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "tokenizer": ("merges.txt", "vocab.json", "tokenizer_config.json"),
    "noise schedule": ("scheduler_config.json",),
    "image processor": ("preprocessor_config.json",),
}


@pytest.mark.parametrize("name", OTHER_FOLDERS)
def test_folders_of_something_else_are_named(tmp_path, name):
    for file in OTHER_FOLDERS[name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}" if file.endswith("json") else "\x01\x02\x03")
    message = refusal(tmp_path)
    assert (
        "this folder holds " in message
        and name.partition(",")[0] in message
        and ("give" in message or "merge" in message)
    )


def test_a_folder_that_has_more_than_what_is_read(folder):
    """As published ones have: files of other programs, a state of training, a LoRA beside the weights."""
    expected = weights(folder)
    for name in ("unet/diffusion_flax_model.msgpack", "vae/model.onnx", "optimizer.bin", "pytorch_lora_weights.bin"):
        (folder / name).write_bytes(b"\1")
    assert_same(weights(folder), expected)


@pytest.mark.parametrize(
    "name, words",
    [
        ("model.onnx", "an ONNX model"), ("flax_model.msgpack", "weights of Flax"), ("unet.plan", "a TensorRT engine"),
        ("openvino_model.xml", "an OpenVINO model"), ("openvino_model.bin", "an OpenVINO model"),
        ("Unet.mlmodel", "a Core ML model"), ("a.ggml", "quantised for other programs"), ("a.npy", "arrays of NumPy"),
        ("a.safetensors.part", "an unfinished download"), ("a.ckpt.crdownload", "an unfinished download"),
        ("data.pkl", "a checkpoint that was unpacked"), ("model_index.json", "give the folder"),
        ("tokenizer.json", "a tokenizer"), ("config.json", "settings of a part of a model"),
        ("v1.yaml", "a text about"),
    ],
)  # fmt: skip
def test_files_of_something_else_are_named(tmp_path, name, words):
    for content in (b"<?xml version='1.0'?>", b"\x08\x08\x12\x07pytorch", b'{"a": 1}'):
        (tmp_path / name).write_bytes(content)
        assert words in refusal(tmp_path / name)


def test_a_name_is_no_proof(tmp_path):
    save_file(tiny_state(), tmp_path / "a.onnx")
    assert len(load_checkpoint(tmp_path / "a.onnx")) == len(tiny_state())
    assert "no such file" in refusal(tmp_path / "b.onnx")


def test_a_checkpoint_that_is_packed_again(tmp_path):
    """As `zip -0` does: the folders are members too. The advice that is given has to work."""
    torch.save({"state_dict": {"a": torch.arange(4.0)}}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        archive.extractall(tmp_path / "out")
    assert "unpacked" in refusal(tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_STORED) as archive:
        for file in sorted((tmp_path / "out").rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
    with load_checkpoint(tmp_path / "b.ckpt") as checkpoint:
        assert checkpoint["a"].tolist() == [0, 1, 2, 3]


# ----------------------------------------------------------------------------------- the cache of downloaded models


def cached(folder: Path, root: Path, commit: str) -> Path:
    """The folder as a snapshot in a cache: links to files named by their hash."""
    place = root / "snapshots" / commit
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        blob = root / "blobs" / f"{commit}{i:04x}"
        shutil.copy(file, blob)
        (place / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (place / file.relative_to(folder)).symlink_to(blob)
    return place


def test_the_cache_of_a_model_is_its_snapshot(folder, tmp_path):
    root = tmp_path / "models--owner--name"
    cached(folder, root, "a1" * 20)
    assert_same(weights(root), weights(folder))
    with load_checkpoint(root) as checkpoint:
        assert checkpoint.notes == (f"the snapshot {'a1' * 20} of the cache is read",)
    cached(folder, root, "b2" * 20)
    message = refusal(root)
    assert "a cache of 2 versions" in message and "a1" * 20 in message and "b2" * 20 in message
    (root / "refs").mkdir()
    (root / "refs/main").write_text("b2" * 20)
    with load_checkpoint(root) as checkpoint:
        assert checkpoint.notes == (f"the snapshot {'b2' * 20} of the cache is read",)
    assert "the cache of 1 models; give one of the folders in it (models--owner--name)" in refusal(tmp_path)
    for hostile in ("../../model", "\x1b[31m", "", "x" * 500):
        (root / "refs/main").write_text(hostile)
        assert "refs/main names none" in refusal(root)


def test_an_unfinished_download_in_the_cache(folder, tmp_path):
    root = tmp_path / "models--owner--name"
    place = cached(folder, root, "c3" * 20)
    for file in place.rglob("*.safetensors"):
        file.resolve().unlink()
    assert "unet/: links to files that are not there (diffusion_pytorch_model.safetensors)" in refusal(root)
    shutil.rmtree(root / "snapshots")
    (root / "snapshots").mkdir()
    assert "without a snapshot" in refusal(root)


# ------------------------------------------------------------------------------------- weights of something else

SPATIAL = "down_blocks.0.attentions.0.transformer_blocks.0"
OTHER_WEIGHTS = [
    ("248 positions (Long-CLIP)", {"text_model.embeddings.position_embedding.weight": (248, 768)}),
    ("248 positions (Long-CLIP)", {"positional_embedding": (77, 768), "positional_embedding_res": (248, 768)}),
    ("quantised", {"down_blocks.0.resnets.0.conv1.weight": (8, 8), f"{SPATIAL}.attn1.to_q.SCB": (320,)}),
    ("quantised", {f"{UNET}out.2.weight": (4, 320, 3, 3), f"{UNET}out.2.scale_weight": ()}),
    ("quantised", {"conv_in.weight._data": (320, 4, 3, 3), "conv_in.weight._scale": (320, 1, 1, 1)}),
    ("a T2I-Adapter", {"body.0.block1.weight": (320, 320, 3, 3), "conv_in.weight": (320, 64, 3, 3)}),
    ("a T2I-Adapter", {"adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)}),
    ("a ControlNet", {"control_model.time_embed.0.weight": (1280, 320)}),
    ("a ControlNet-LLLite", {"lllite_unet_input_blocks_1_1_x.down.0.weight": (4, 320)}),
    ("an IP-Adapter", {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)}),
    ("a motion module (AnimateDiff)", {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)}),
    ("a GLIGEN model", {f"{UNET}input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn": ()}),
    ("a video model", {"down_blocks.0.temp_convs.0.conv1.0.weight": (320,)}),
    ("a diffusion transformer", {"model.diffusion_model.cap_embedder.0.weight": (2304,)}),
    ("16 latent channels", {"decoder.conv_in.weight": (512, 16, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}),
    ("32 latent channels", {"decoder.conv_in.weight": (512, 32, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}),
    ("a VQ autoencoder", {"quantize.embedding.weight": (8192, 3), "decoder.conv_in.weight": (512, 3, 3, 3)}),
    ("this is a tiny autoencoder (TAESD): give it with --vae", {"18.conv.0.weight": (64, 64, 3, 3)}),
    ("a tiny autoencoder (TAESD) with most of its weights missing", {
        "decoder.layers.0.weight": (64, 4, 3, 3), "encoder.layers.0.weight": (64, 3, 3, 3),
    }),
    ("another family (SD3 or FLUX.1: 16", {"1.weight": (64, 16, 3, 3)}),
    ("another family (FLUX.2: 32 latent channels)", {"1.weight": (64, 32, 3, 3), "3.pool.1.weight": (256,)}),
    ("another family (Sana: 32 latent channels", {"1.weight": (256, 32, 3, 3)}),
    ("another family (not 4 latent channels)", {"taesd_decoder.1.weight": (64, 12, 3, 3)}),
    ("the encoder of a tiny autoencoder (TAESD)", {"0.weight": (64, 3, 3, 3), "1.conv.0.weight": (64, 64, 3, 3)}),
    ("a safety checker", {"concept_embeds": (17, 768), "vision_model.patch_embedding.weight": (8, 3, 14, 14)}),
    ("an image encoder (CLIP vision)", {f"vision_model.{i}": (1280,) for i in range(9)}),
    ("a T5 text encoder", {"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}),
    ("a language model", {"model.layers.0.self_attn.q_proj.weight": (2048, 2048)}),
    ("an image upscaler", {"layers.0.residual_group.blocks.0.norm1.weight": (180,)}),
    ("an image upscaler", {"body.0.rdb1.conv1.weight": (32, 64, 3, 3)}),
    ("an image upscaler (ESRGAN)", {"params_ema.conv_first.weight": (64, 3, 3, 3)}),
    ("restores faces", {"stylegan_decoder.style_mlp.1.weight": (512, 512)}),
    ("segments images", {"image_encoder.patch_embed.proj.weight": (1280, 3, 16, 16)}),
    ("a textual inversion embedding", {"emp_params": (2, 768)}),
]  # fmt: skip


@pytest.mark.parametrize("words, shapes", OTHER_WEIGHTS)
def test_weights_of_something_else_are_named(words, shapes):
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with pytest.raises(CheckpointError) as caught:
        identify(tensors)
    assert words in str(caught.value) and str(caught.value).startswith("this ") and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "option, words, shapes",
    [
        ("vae", "of another family (FLUX.2: 32 latent channels), not of Stable", {"1.weight": (64, 32, 3, 3)}),
        ("vae", "16 latent channels", {
            "decoder.mid.block_1.norm1.weight": (512,), "decoder.conv_in.weight": (512, 16, 3, 3),
        }),
        ("text_encoder", "Long-CLIP", {"text_model.embeddings.position_embedding.weight": (248, 768)}),
        ("text_encoder", "a T5 text encoder", {"encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64)}),
    ],
)  # fmt: skip
def test_a_part_from_another_family_is_named(tmp_path, option, words, shapes):
    """For a file of something else given as the VAE or the text encoder of a model."""
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "part.safetensors")
    save_file(tiny_state(), tmp_path / "model.safetensors")
    given = {option: tmp_path / "part.safetensors"}
    with pytest.raises(CheckpointError) as caught:
        StableDiffusion.load(tmp_path / "model.safetensors", config=TINY, device="cpu", dtype="float32", **given)
    assert words in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'part.safetensors'}: ")


def test_a_text_encoder_with_more_positions_beside_a_u_net(tmp_path):
    """As a whole checkpoint, and with its own names for the text encoder."""
    state = tiny_state() | {f"{CLIP}embeddings.position_embedding.weight": torch.zeros(248, 64)}
    with pytest.raises(CheckpointError, match="Long-CLIP"):
        identify(state)


def linear() -> dict[str, torch.Tensor]:
    return {"linear1.weight": torch.ones(4, 2)}


def trained() -> torch.optim.Optimizer:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    with torch.enable_grad():
        layer(torch.ones(2)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda: {768: (linear(), linear()), 320: (linear(), linear()), "step": 5, "name": "a"}, "a hypernetwork"),
        (lambda: {"layer_structure": [1, 2, 1], "step": 5}, "a hypernetwork"),
        (lambda: torch.ones(1, 768), "a single one, as an aesthetic embedding"),
        (lambda: trained().state_dict(), "the state of an optimizer"),
        (lambda: {"hash": "x", "optimizer_state_dict": trained().state_dict()}, "the state of an optimizer"),
        (lambda: torch.optim.lr_scheduler.StepLR(trained(), 3).state_dict(), "the state of a training run"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_something_else_are_named(tmp_path, content, words, zipped):
    torch.save(content(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert words in refusal(tmp_path / "a.pt")
