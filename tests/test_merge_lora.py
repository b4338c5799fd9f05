"""convert.py --lora: the weights are those of a model with the LoRAs, and the file says what was merged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from common import TINY, TINY_V2
from safetensors import safe_open
from safetensors.torch import save_file

from scripts import convert
from scripts.training.state import save_tensors
from sd import StableDiffusion
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_own
from sd.models.build import build
from sd.training import LoraParams, TrainableLora, bundled_tensors, lora_layers, lora_metadata, lora_tensors


def trained(network: torch.nn.Module, seed: int, dora: bool) -> TrainableLora:
    rng = torch.Generator().manual_seed(seed)
    lora = TrainableLora(network, lora_layers(network), LoraParams(2, dora=dora), seed)
    with torch.no_grad():
        for layer in lora.layers:
            layer.up.copy_(0.2 * torch.randn(layer.up.shape, generator=rng))
    return lora


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A checkpoint, a LoRA of U-Net and text encoder, a DoRA of the U-Net in PEFT's names, and a few-step one."""
    folder = tmp_path_factory.mktemp("merge")
    own = to_own({name: network.state_dict() for name, network in tiny.items()})
    save_file({k: x.contiguous() for k, x in own.items()}, folder / "tiny.safetensors", {CONFIG_KEY: TINY.to_json()})
    loras = {name: trained(tiny[name], 0, False) for name in ("unet", "text_encoder")}
    words = bundled_tensors({"<toy>": [torch.ones(2, 64)]}, TINY)
    save_tensors(lora_tensors(loras, TINY) | words, folder / "one.safetensors", {})
    dora = {"unet": trained(tiny["unet"], 1, True)}
    metadata = lora_metadata(dora, TINY, "two", naming="peft")
    save_tensors(lora_tensors(dora, TINY, naming="peft"), folder / "two.safetensors", metadata)
    save_tensors(lora_tensors(dora, TINY), folder / "lcm-lora.safetensors", {})
    return folder


def merged(folder: Path, *loras: tuple[str, float]) -> dict[str, torch.Tensor]:
    """The weights of the model with LoRAs, by our names."""
    model = StableDiffusion.load(folder / "tiny.safetensors", device="cpu", dtype="float32")
    model.add_loras([(folder / name, weight) for name, weight in loras], note=lambda note: None)
    networks = {name: getattr(model, name) for name in model.config.networks}
    return to_own({name: network.state_dict() for name, network in networks.items()})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", convert.LAYOUTS)
def test_every_layout(layout, folder, tmp_path, capsys):
    """Two LoRAs, their changes computed from the plain weights; the file says what was merged."""
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    given = ["--lora", str(folder / "one.safetensors:0.5"), "--lora", str(folder / "two.safetensors:-0.25")]
    arguments = [str(folder / "tiny.safetensors"), str(out), "--layout", layout, *given]
    assert convert.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "LoRA one, weight 0.5" in printed and "LoRA two, weight -0.25" in printed
    assert "one: its words are not merged, as a checkpoint has none: <toy>" in printed
    config = None if layout == "sd" else TINY
    model = StableDiffusion.load(out, config=config, device="cpu", dtype="float32")
    expected = merged(folder, ("one.safetensors", 0.5), ("two.safetensors", -0.25))
    plain = merged(folder)
    changed = {key.partition(".")[0] for key in plain if not torch.equal(plain[key], expected[key])}
    assert changed == {"unet", "text_encoder"}
    for name in TINY.networks:
        for key, weight in getattr(model, name).state_dict().items():
            assert torch.equal(weight, expected[f"{name}.{key}"]), key
    file = out / "unet" / "diffusion_pytorch_model.safetensors" if layout == "diffusers" else out
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["merged_loras"])
    raw = (folder / "one.safetensors").read_bytes()
    digits = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()[:12]
    assert said[0] == {"name": "one", "weight": 0.5, "hash": digits}
    assert [each["name"] for each in said] == ["one", "two"]


def test_the_sum_is_rounded_once_and_earlier_merges_are_kept_in_mind(folder, tmp_path):
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    given = ["--dtype", "float16", "--lora", str(folder / "two.safetensors")]
    assert convert.main([str(folder / "tiny.safetensors"), str(once), *given]) == 0
    expected = merged(folder, ("two.safetensors", 1.0))
    with safe_open(once, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(key), expected[key].half()), key
    assert convert.main([str(once), str(twice), "--lora", str(folder / "one.safetensors:2")]) == 0
    with safe_open(twice, "pt") as file:
        assert [each["name"] for each in json.loads(file.metadata()["merged_loras"])] == ["two", "one"]


def test_a_few_step_lora_makes_a_few_step_model(folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    given = ["--lora", str(folder / "lcm-lora.safetensors")]
    assert convert.main([str(folder / "tiny.safetensors"), str(out), *given]) == 0
    assert "lcm-lora is an LCM LoRA: 4 steps, sampler lcm, guidance 1" in capsys.readouterr().out
    config = StableDiffusion.load(out, device="cpu").config
    assert (config.sampler, config.steps, config.guidance) == ("lcm", 4, 1.0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lora", "none.safetensors"], "none.safetensors"),
        (["--lora", "tiny.safetensors"], "not a LoRA"),
        (["--lora", "one.safetensors:x"], "the weight 'x' is not a number"),
        (["--lora", "other.safetensors"], "other.safetensors: made for another model"),
        (["--lora", "one.safetensors:1e30", "--dtype", "float16"], "has numbers beyond torch.float16"),
        (["--lora", "one.safetensors", "--keep-ema"], "--lora is merged into one U-Net: leave out --keep-ema"),
        (["--lora", "one.safetensors", "--info"], "leave out"),
    ],
)
def test_what_is_refused(more, words, folder, tmp_path, capsys, monkeypatch):
    """In one line, and nothing is written."""
    monkeypatch.chdir(folder)
    if "other.safetensors" in more:
        network = build(TINY_V2)["unet"].to_empty(device="cpu")
        other = {"unet": trained(network, 0, False)}
        save_tensors(lora_tensors(other, TINY_V2), folder / "other.safetensors", {})
    output = [] if "--info" in more else [str(tmp_path / "out.safetensors")]
    assert convert.main(["tiny.safetensors", *output, *more]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not any(tmp_path.iterdir())
