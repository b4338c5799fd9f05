"""Networks that are replaced, wrapped, exported, counted or quantised; and LoRAs and words of a model changed so."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from common import TINY
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from sd.models import layers
from sd.pipeline import StableDiffusion
from sd.runtime import kernel_choice, packing
from sd.runtime.optimize import optimize, restore

SETTINGS = {"height": 64, "width": 64, "steps": 1, "seed": 3}
needs_packing = pytest.mark.skipif(not packing.onednn_dtypes(), reason="needs an x86 CPU and a torch that has oneDNN")


@pytest.fixture
def model(tiny) -> StableDiffusion:
    return StableDiffusion(TINY, **copy.deepcopy(tiny))


@pytest.fixture
def packed() -> nn.Module:
    """Two layers with packed weights."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.Flatten(2), nn.Linear(64, 32)).requires_grad_(False)
    with kernel_choice.prefer("fast"):
        optimize(net)
    net(torch.ones(1, 4, 8, 8))
    assert all("_packed" in net[i].__dict__ for i in (0, 2))
    return net


def image(model: StableDiffusion, prompt: str = "a cat") -> np.ndarray:
    return np.asarray(model.txt2img(prompt, **SETTINGS)[0]).astype(int)


@needs_packing
def test_packed_layers_are_exported(packed):
    x = torch.linspace(-1, 1, 256).view(1, 4, 8, 8)
    assert torch.allclose(torch.export.export(packed, (x,)).module()(x), packed(x), atol=1e-5)


@needs_packing
def test_operations_of_packed_layers_are_counted(packed):
    """Modes that look at each operation know none of oneDNN's: the count was 0."""
    with FlopCounterMode(display=False) as counter:
        packed(torch.ones(1, 4, 8, 8))
    assert counter.get_total_flops() == 2 * 64 * (32 * 4 * 9) + 2 * 32 * 64 * 32


@needs_packing
def test_quantisation_does_not_pass_over_packed_layers(packed):
    """It takes layers by their exact class, and would leave these as they are without a word."""
    pytest.importorskip("torch.ao.quantization")  # torch is moving it to torchao
    dynamic = {"qconfig_spec": {nn.Linear}, "dtype": torch.qint8}
    with pytest.raises(TypeError, match=r"call sd\.runtime\.optimize\.restore\(network\) first"):
        torch.ao.quantization.quantize_dynamic(packed, **dynamic)
    quantised = torch.ao.quantization.quantize_dynamic(restore(packed), **dynamic)
    assert "quantized" in type(quantised[2]).__module__


@needs_packing
@pytest.mark.parametrize("way", ["padding_mode", "_conv_forward"])
def test_a_convolution_after_an_upsampling_that_is_no_longer_usual(way):
    x = torch.linspace(-1, 1, 512).view(1, 8, 8, 8)
    torch.manual_seed(1)
    plain = layers.Upsample(8).requires_grad_(False)
    with kernel_choice.prefer("fast"):
        fast = optimize(copy.deepcopy(plain))
    before = fast(x)
    for net in (plain, fast):
        changed = lambda x, w, b: nn.functional.conv2d(x, -w, b, padding=1)  # noqa: E731
        setattr(net.conv, way, "circular" if way == "padding_mode" else changed)
    assert torch.allclose(fast(x), plain(x), atol=1e-5) and not torch.allclose(fast(x), before, atol=1e-2)


@needs_packing
def test_hooks_of_all_modules_see_the_convolution_after_an_upsampling():
    with kernel_choice.prefer("fast"):
        net = optimize(layers.Upsample(8).requires_grad_(False))
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: seen.append(module))
    try:
        net(torch.ones(1, 8, 8, 8))
    finally:
        handle.remove()
    assert seen == [net.conv, net]


@pytest.mark.parametrize("value", [None, "vae.safetensors", {}], ids=str)
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_what_is_no_network_is_refused(name, value, tiny_sd):
    with pytest.raises(TypeError, match=rf"^model.{name} must be a network .*, got {type(value).__name__}: .*low_mem"):
        setattr(tiny_sd, name, value)


@pytest.mark.parametrize(
    "name, words", [("dtype", "load.*dtype="), ("device", "device="), ("scheduler", "sampler="), ("half", "load")]
)
def test_what_would_have_no_effect_cannot_be_set(name, words, tiny_sd):
    with pytest.raises(AttributeError, match=f"^'{name}' of 'StableDiffusion' cannot be set: .*{words}"):
        setattr(tiny_sd, name, torch.float16)


@pytest.fixture
def lora(tmp_path):
    name, rng = "lora_te_text_model_encoder_layers_0_mlp_fc1", torch.Generator().manual_seed(1)
    up, down = torch.randn(256, 2, generator=rng), torch.randn(2, 64, generator=rng)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, lambda net: net])
@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_loras_find_the_network_within_wrappers(name, wrap, lora, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else DataParallel moves it there
    setattr(model, name, wrap(getattr(model, name)))
    before = image(model)
    model.add_lora(lora)
    changed = image(model)
    model.remove_lora()
    assert abs(changed - before).max() > 1 and not abs(image(model) - before).any()


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("way", COMPUTED)
def test_loras_need_weights_that_are_not_computed(way, lora, model):
    COMPUTED[way](model.text_encoder.blocks[0].fc1)
    with pytest.raises(ValueError, match=r"text_encoder\.blocks\.0\.fc1 computes its weight.*make the weight plain"):
        model.add_lora(lora)


def test_loras_and_words_need_networks_with_the_names_of_ours(lora, model, tmp_path):
    model.text_encoder = nn.Sequential(model.text_encoder)
    assert image(model).shape == (64, 64, 3)
    with pytest.raises(ValueError, match=r"a layer '0\.token' that does not belong to this model"):
        model.add_lora(lora)
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "zork.safetensors")
    with pytest.raises(ValueError, match="Embedding named `token`"):
        model.add_embedding(tmp_path / "zork.safetensors")


def new_table(model: StableDiffusion) -> None:
    old = model.text_encoder.token
    model.text_encoder.token = nn.Embedding(*old.weight.shape, _weight=old.weight * 0.5)


def assigned(model: StableDiffusion) -> None:
    model.text_encoder.load_state_dict({k: v * 0.5 for k, v in model.text_encoder.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change, when", [(new_table, "before"), (assigned, "before"), (assigned, "between")])
def test_a_changed_table_of_tokens_stays_when_words_come_and_go(change, when, model, tiny, tmp_path):
    """The table that was there at first came back, silently."""
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "zork.safetensors")
    other = StableDiffusion(TINY, **copy.deepcopy(tiny))
    change(other)
    expected = image(other)
    if when == "before":
        change(model)
    model.add_embedding(tmp_path / "zork.safetensors")
    if when == "between":
        change(model)
    assert not abs(image(model) - expected).any()
    model.remove_embedding()
    assert not abs(image(model) - expected).any()


def test_words_stay_when_the_table_of_tokens_is_replaced(model, tmp_path):
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "zork.safetensors")
    model.add_embedding(tmp_path / "zork.safetensors")
    new_table(model)
    assert model.encode_prompt("zork").shape == (1, 77, 64)  # it was "index out of range"
    assert model.text_encoder.token.more.equal(torch.ones(1, 64))
    model.text_encoder.token = nn.Embedding(10, 64)
    with pytest.raises(ValueError, match="the table of tokens has 10 rows, and had 49408 when words were added"):
        model.encode_prompt("a")


def test_vectors_changed_in_place_stay_when_another_word_is_added(model, tmp_path):
    for name in ("zork", "blorb"):
        save_file({"emb_params": torch.ones(1, 64)}, tmp_path / f"{name}.safetensors")
    model.add_embedding(tmp_path / "zork.safetensors")
    model.text_encoder.token.more.mul_(-3)
    before = image(model, "a zork")
    model.add_embedding(tmp_path / "blorb.safetensors")
    assert not abs(image(model, "a zork") - before).any() and abs(image(model, "a blorb") - before).any()
