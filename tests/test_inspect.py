"""What --info says about a file: all of it right, none of the weights read, in no time."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import TINY, manifest, tiny_state
from safetensors.torch import save_file
from test_layouts import only, without

from scripts import convert
from sd.checkpoints.checkpoint import load_checkpoint
from sd.checkpoints.export import metadata
from sd.checkpoints.inspect import SMALL, inspect, short_hash
from sd.checkpoints.key_maps import CLIP, UNET, VAE
from sd.config import MODELS, SD1
from sd.runtime.device import DTYPES

ROOT = Path(__file__).resolve().parents[1]
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32"}


def sparse_file(path: Path, name: str, half: bool = False, data: dict[str, str] | None = None, **drop: str) -> Path:
    """A file of a manifest's names and shapes, as large as the real one, of zeros that take no room on the disk."""
    header, end = {}, 0
    for key, (shape, dtype) in manifest(name).items():
        dtype = torch.float16 if half and dtype == torch.float32 else dtype
        if key == "alphas_cumprod" or any(key.startswith(prefix) for prefix in drop.values()):
            continue
        size = dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": data or {}, **header}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def info(path: Path, *options: str, capsys) -> dict[str, str]:
    assert convert.main([str(path), "--info", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) < 1500 and line.isprintable() for line in lines)
    return {line[:14].strip().rstrip(":"): line[14:] for line in lines}


def run_program(*arguments: object) -> tuple[str, float]:
    """What a program of Python prints, and the CPU time that it takes: the machine may be busy."""
    start = os.times()
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True)
    end = os.times()
    return done.stdout, end.children_user + end.children_system - start.children_user - start.children_system


@pytest.mark.exhaustive
def test_a_large_file_within_a_second(tmp_path):
    """4.3 GB; the whole program, as a user calls it, beyond the time to import torch."""
    path = sparse_file(tmp_path / "v1-5.safetensors", "sd-v1")
    assert path.stat().st_size > 4_200_000_000
    alone = min(run_program("-c", "import torch")[1] for _ in range(2))
    program = ROOT / "scripts" / "convert.py"
    printed, seconds = zip(*(run_program(program, path, "--info") for _ in range(2)), strict=True)
    assert "Stable Diffusion 1.x, 512x512" in printed[0]
    assert min(seconds) < alone + 1, (seconds, alone)


def test_what_is_said_of_a_whole_model(tmp_path, capsys):
    path = sparse_file(tmp_path / "a.safetensors", "sd-v1", half=True, data={"modelspec.title": "Mine", "format": "pt"})
    said = info(path, capsys=capsys)
    assert said["model"] == "Stable Diffusion 1.x, 512x512"
    assert said["predicts"].startswith("eps: as Stable Diffusion 1.x does")
    assert said["channels"] == "4 (text to image)"
    assert said["text encoder"] == "196 weights, 123.1 M, float16"
    assert said["vae"] == "248 weights, 83.7 M, float16" and said["U-Net"] == "686 weights, 859.5 M, float16"
    assert (said["EMA"], said["missing"], said["unknown"]) == ("no", "nothing", "nothing")
    assert said["metadata"] == "modelspec.title: Mine, format: pt"
    assert f"{path.stat().st_size:,} bytes" in said["file"] and "safetensors" in said["file"]
    assert said["SHA-256"].startswith("not computed")


@pytest.mark.parametrize(
    "name, model, predicts",
    [
        ("sd-v1-inpainting", "Stable Diffusion 1.x inpainting", "eps: as inpainting models do"),
        ("sd-v1-full-ema", "Stable Diffusion 1.x, ", "eps: as Stable"),
        ("sd-v2-base", "Stable Diffusion 2.x base", "eps or v: nothing says"),
        ("sd-v2-inpainting", "Stable Diffusion 2.x inpainting", "eps: as inpainting models do"),
    ],
)
def test_families(tmp_path, capsys, name, model, predicts):
    said = info(sparse_file(tmp_path / "a.safetensors", name), capsys=capsys)
    assert said["model"].startswith(model) and said["predicts"].startswith(predicts)
    assert said["missing"] == "nothing" and said["unknown"] == "nothing"
    assert said["EMA"] == ("686 weights, 859.5 M, float32" if "ema" in name else "no")
    assert said["channels"].startswith("9" if "inpainting" in name else "4")


def test_a_sidecar_and_a_model_that_is_said(tmp_path, capsys):
    path = sparse_file(tmp_path / "a.safetensors", "sd-v2-base")
    assert info(path, "--model", "sd2-v", capsys=capsys)["predicts"] == "v: as given"
    (tmp_path / "a.yaml").write_text("parameterization: v")
    said = info(path, capsys=capsys)
    assert said["predicts"] == "v: a.yaml beside it says so" and said["model"] == "Stable Diffusion 2.x 768-v, 768x768"


def test_what_is_missing(tmp_path, capsys):
    said = info(sparse_file(tmp_path / "a.safetensors", "sd-v1", vae=VAE, one=f"{UNET}out.2.b"), capsys=capsys)
    assert (
        said["missing"]
        == "the vae (--vae gives it); of the U-Net 1 of 686 weights: 1: model.diffusion_model.out.2.bias"
    )
    said = info(sparse_file(tmp_path / "b.safetensors", "kl-f8-vae"), capsys=capsys)
    assert "a VAE alone: give it with --vae" in said["model"] and said["vae"].startswith("248 weights, 83.7 M")
    assert said["missing"].startswith("the text encoder (--text-encoder gives it); the U-Net")


def test_what_is_unknown_damaged_or_added(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    tokens = f"{CLIP}embeddings.token_embedding.weight"
    state = {
        **tiny_state(), "mystery.weight": torch.ones(3), "model_ema.decay": torch.ones(()),
        f"{CLIP}embeddings.position_ids": torch.linspace(0, 44, 77)[None],
        tokens: torch.cat([tiny_state()[tokens], torch.ones(3, 64)]),
    }  # fmt: skip
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "a.safetensors")
    with load_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        found = inspect(checkpoint, TINY)
    assert found.unknown == ["mystery.weight"] and found.missing == [] and found.ema == "no, only its counters"
    assert any("position_ids is damaged" in note for note in found.notes)
    assert any(note.startswith("3 vectors of the text encoder have no word") for note in found.notes)
    assert found.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert info(tmp_path / "a.safetensors", "--model", "tiny", capsys=capsys)["unknown"] == "1: mystery.weight"


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_pickles_and_mixed_precisions(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    state = {k: t.half() if k.startswith((UNET, "alphas_")) else t for k, t in tiny_state().items()}
    state[f"{VAE}quant_conv.bias"] = state[f"{VAE}quant_conv.bias"].bfloat16()
    torch.save({"state_dict": state}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=kind == "zip")
    said = info(tmp_path / "a.ckpt", "--model", "tiny", capsys=capsys)
    assert said["U-Net"] == "324 weights, 5.8 M, float16"
    assert said["vae"].endswith("float32 (179) and bfloat16 (1)")


def test_files_of_ours_and_folders(tmp_path, capsys):
    path = tmp_path / "ours.safetensors"
    save_file({"a": torch.ones(1)}, tmp_path / "nothing.safetensors")
    assert "no Stable Diffusion U-Net" in info(tmp_path / "nothing.safetensors", capsys=capsys)["model"]
    save_file(tiny_state(), path, metadata(TINY))
    said = info(path, capsys=capsys)
    assert said["model"] == "tiny v1, 128x128" and said["predicts"] == "eps: its own config says so"
    assert "sd.config" not in said["metadata"]
    assert convert.main([str(path), str(tmp_path / "folder"), "--layout", "diffusers"]) == 0
    capsys.readouterr()
    said = info(tmp_path / "folder", capsys=capsys)
    assert said["predicts"] == "eps: scheduler_config.json says so" and "SHA-256" not in said
    assert said["U-Net"] == "324 weights, 5.8 M, float32, diffusers names with the prefix 'unet.'"
    (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "a text encoder and a VAE, but no U-Net" in info(tmp_path / "folder", capsys=capsys)["model"]


def test_refused_models_are_named(tmp_path, capsys):
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    assert "a LoRA" in info(tmp_path / "a.safetensors", capsys=capsys)["model"]
    (tmp_path / "b.safetensors").write_bytes(b"<html>")
    assert convert.main([str(tmp_path / "b.safetensors"), "--info"]) == 1
    assert "a web page" in capsys.readouterr().err


def test_hashes(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    save_file(tiny_state(), path, metadata(TINY))
    data = path.read_bytes()
    assert short_hash(path) == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    large = sparse_file(tmp_path / "b.safetensors", "kl-f8-vae")
    assert large.stat().st_size > SMALL
    assert info(large, capsys=capsys)["SHA-256"].startswith("not computed")
    assert info(large, "--sha256", capsys=capsys)["SHA-256"] == hashlib.sha256(large.read_bytes()).hexdigest()


def test_metadata_cannot_speak_to_the_terminal(tmp_path, capsys):
    save_file(tiny_state(), tmp_path / "a.safetensors", {"title": "x\x1b[31m\n" + "y" * 500, **metadata(TINY)})
    said = info(tmp_path / "a.safetensors", capsys=capsys)["metadata"]
    assert "\x1b" not in said and "yyy..." in said


def test_nothing_but_two_tables_is_read(tmp_path, monkeypatch):
    save_file(tiny_state(), tmp_path / "a.safetensors", metadata(TINY))
    monkeypatch.setattr(
        "sd.checkpoints.checkpoint.Checkpoint.__getitem__", lambda self, key: pytest.fail(f"read {key}")
    )
    asked = []
    monkeypatch.setattr(
        "sd.checkpoints.checkpoint.Checkpoint.table", lambda self, key: asked.append(key) or torch.arange(77).numpy()
    )
    with load_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        inspect(checkpoint, sha256=False)
    assert asked == [f"{CLIP}embeddings.position_ids"]


def test_precisions_are_those_of_the_devices():
    assert tuple(DTYPES) == convert.PRECISIONS


def test_helpers_make_what_they_say(tmp_path):
    path = sparse_file(tmp_path / "a.safetensors", "sd-v1", vae=VAE)
    with load_checkpoint(path) as checkpoint:
        assert not only(dict.fromkeys(checkpoint), VAE) and len(without(dict.fromkeys(checkpoint), UNET)) == 197 + 11
    assert os.stat(path).st_blocks * 512 < 2_000_000 and SD1.unet.in_channels == 4
