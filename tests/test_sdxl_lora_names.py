"""LoRA files for SDXL in every naming: which layer of which text encoder or U-Net a name means, and who reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from common import TINY, TINY_XL, error, manifest
from safetensors.torch import save_file
from sdxl_common import (
    FC1,
    TINY_REFINER,
    cleared,
    pipeline,
    tiny_xl,
    write_models,
)
from test_lora import factors, saved
from torch import Tensor

from sd import StableDiffusion
from sd.adapters.lora_formats import layers_of
from sd.adapters.lora_names import LayerNames
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.key_maps import UNET, diffusers_sources, original_sources
from sd.config import SDXL
from sd.models.build import build, weight_shapes
from sd.training import LoraParams, TrainableLora, lora_layers, lora_tensors


@pytest.fixture(scope="module")
def shared() -> StableDiffusion:
    return tiny_xl()


@pytest.fixture
def model(shared) -> Iterator[StableDiffusion]:
    yield from cleared(shared)


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("tiny-sdxl"), shared)


@pytest.fixture
def pipe(folder):
    return pipeline(folder / "folder")


NETWORKS = ("unet", "text_encoder", "text_encoder_2")
TEXTS = ("text_encoder", "text_encoder_2")
PLACES = {
    (network, key): shape
    for network in NETWORKS
    for key, shape in weight_shapes(TINY_XL)[network].items()
    if len(shape) > 1 and key not in ("token.weight", "position.weight")
}
KEYS = {network: [key for of, key in PLACES if of == network] for network in NETWORKS}
DIFFUSERS = diffusers_sources(TINY_XL, KEYS)
ORIGINAL = original_sources(TINY_XL, KEYS)
Place = tuple[str, str]


def path(place: Place) -> str:
    return DIFFUSERS[place[0]][place[1]].key.removesuffix(".weight")


def original(place: Place) -> str:
    return ORIGINAL[place[0]][place[1]].key.removesuffix(".weight").removeprefix(UNET)


def in_text_model(place: Place) -> str:
    """transformers 4 has its `text_model` in every path but the projection's."""
    own = path(place)
    return own if own == "text_projection" else f"text_model.{own}"


def kohya(place: Place) -> str:
    if place[0] == "unet":
        return "lora_unet_" + original(place).replace(".", "_")
    return f"lora_te{TEXTS.index(place[0]) + 1}_" + in_text_model(place).replace(".", "_")


def kohya_diffusers(place: Place) -> str:
    return "lora_unet_" + path(place).replace(".", "_") if place[0] == "unet" else kohya(place)


def dotted(place: Place) -> str:
    return f"{place[0]}.{path(place) if place[0] == 'unet' else in_text_model(place)}"


def onetrainer(place: Place) -> str:
    if place[0] == "unet":
        return f"lora_unet.{path(place)}"
    return f"lora_te{TEXTS.index(place[0]) + 1}.{in_text_model(place)}"


def comfyui(place: Place) -> str:
    if place[0] == "unet":
        return f"diffusion_model.{original(place)}"
    return f"text_encoders.{('clip_l', 'clip_g')[TEXTS.index(place[0])]}.transformer.{in_text_model(place)}"


def processor(place: Place) -> str:
    """diffusers before PEFT."""
    own = dotted(place)
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        if place[0] == "unet" and own.endswith(f".{layer}"):
            return f"{own.removesuffix(layer)}processor.{layer.removesuffix('.0')}_lora"
    return own + (".lora" if place[0] == "unet" else ".lora_linear_layer")


KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
SCHEMES: dict[str, tuple[Callable[[Place], str], tuple[str, str]]] = {
    "kohya": (kohya, KOHYA),
    "kohya, diffusers' names": (kohya_diffusers, KOHYA),
    "diffusers": (dotted, PEFT),
    "diffusers, transformers 5": (lambda place: f"{place[0]}.{path(place)}", PEFT),
    "diffusers before PEFT": (processor, ("down.weight", "up.weight")),
    "diffusers, kohya's ends": (dotted, KOHYA),
    "OneTrainer": (onetrainer, KOHYA),
    "ComfyUI": (comfyui, PEFT),
    "PEFT": (lambda place: f"base_model.model.{dotted(place)}", ("lora_A.default.weight", "lora_B.default.weight")),
}


def lora_file(scheme: str, places: list[Place], scale: float = 1.0) -> tuple[dict[str, Tensor], dict[Place, Tensor]]:
    """The tensors of a file for some weights, and what it adds to each; alpha is the rank."""
    name, (down, up) = SCHEMES[scheme]
    tensors, deltas = {}, {}
    for place in places:
        a, b, _, delta = factors(place, PLACES[place], None)
        tensors |= {f"{name(place)}.{down}": a * scale, f"{name(place)}.{up}": b}
        deltas[place] = delta * scale
    return tensors, deltas


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.sampled(3)
def test_every_naming_changes_every_layer(scheme, model, tmp_path):
    """All layers of the U-Net (label_emb and time_embed too) and of both text encoders, with the projection."""
    before = texts_and_unet(model)
    tensors, deltas = lora_file(scheme, [*PLACES])
    notes: list[str] = []
    model.add_lora(saved(tmp_path, tensors), 0.5, note=notes.append)
    after = texts_and_unet(model)
    assert notes == []
    for place, delta in deltas.items():
        assert torch.allclose(after[place].double(), before[place].double() + 0.5 * delta, atol=1e-5), place
    model.remove_lora()
    again = texts_and_unet(model)
    assert all(torch.equal(again[place], x) for place, x in before.items())


def texts_and_unet(model: StableDiffusion) -> dict[Place, Tensor]:
    networks = {name: getattr(model, name) for name in NETWORKS}
    return {(name, key): x.clone() for name, net in networks.items() for key, x in net.named_parameters()}


# A name, as it may stand in a file, and the text encoder that it means
TEXT_NAMES = {
    f"lora_te1_text_model_{FC1}": 0, f"lora_te2_text_model_{FC1}": 1, f"lora_te_text_model_{FC1}": 0,
    f"lora_te2_{FC1}": 1, f"te1_text_model_{FC1}": 0, f"te2_text_model_{FC1}": 1,
    f"clip_l_text_model_{FC1}": 0, f"clip_g_text_model_{FC1}": 1, f"text_encoder_2_text_model_{FC1}": 1,
    f"text_encoders_clip_g_text_model_{FC1}": 1, f"lycoris_text_model_{FC1}": 0,
    "lora_te1_text_model_encoder_layers_3_mlp_fc1": None,  # the first one has 2
    "lora_te_text_model_encoder_layers_3_mlp_fc1": None,
    "lora_te2_text_model_encoder_layers_3_mlp_fc1": 1, "lora_te3_text_model_encoder_layers_1_mlp_fc1": None,
    f"lora_te1_te2_{FC1}": None, f"lora_unet_te2_{FC1}": None, "lora_te2_text_projection": 1,
    "lora_te1_text_projection": None,
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_the_text_encoder_that_a_name_means(name):
    number = TEXT_NAMES[name]
    layer = "projection" if "projection" in name else f"blocks.{3 if '_3_' in name else 1}.fc1"
    expected = None if number is None else (TEXTS[number], layer)
    assert LayerNames(TINY_XL, layers_of([*PLACES])).find(name) == expected


def test_the_refiner_has_the_second_text_encoder():
    shapes = weight_shapes(TINY_REFINER)
    layers = layers_of([(network, key) for network in ("unet", "text_encoder") for key in shapes[network]])
    names = LayerNames(TINY_REFINER, layers)
    for word in ("lora_te2_", "lora_te_", "text_encoder_2.", "text_encoder.", "clip_g."):
        assert names.find(f"{word}text_model_{FC1}") == ("text_encoder", "blocks.1.fc1"), word
    for word in ("lora_te1_", "clip_l."):
        assert names.find(f"{word}text_model_{FC1}") is None, word


def test_models_of_one_text_encoder_know_no_second():
    names = LayerNames(TINY, layers_of([("text_encoder", "blocks.1.fc1.weight")]))
    assert names.find(f"lora_te1_text_model_{FC1}") == ("text_encoder", "blocks.1.fc1")
    for word in ("lora_te2_", "text_encoder_2.", "clip_g."):
        assert names.find(f"{word}text_model_{FC1}") is None


def test_every_module_at_full_size():
    """What kohya's trainer makes for SDXL: 722 modules of the U-Net, 72 (of which 66 are run) and 192 of the texts'."""
    shapes = weight_shapes(SDXL)
    layers = layers_of([(network, key) for network in NETWORKS for key in shapes[network]])
    names = LayerNames(SDXL, layers)
    counts = {"transformers": 0, "others": 0}
    for key, (shape, _) in manifest("sdxl-base").items():
        if not key.startswith(UNET) or len(shape) < 2:
            continue
        flat = key.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
        network, layer = names.find(f"lora_unet_{flat}")
        assert network == "unet" and shapes["unet"][f"{layer}.weight"] == tuple(shape)
        counts["transformers" if re.search(r"transformer_blocks|_proj_(in|out)$", flat) else "others"] += 1
    assert counts["transformers"] == 722
    for number, network, depth in ((1, "text_encoder", 11), (2, "text_encoder_2", 32)):
        found = [
            names.find(f"lora_te{number}_text_model_encoder_layers_{i}_{layer}")
            for i in range(depth)
            for layer in (*(f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
        ]
        assert {layer[0] for layer in found if layer} == {network} and len({*found}) == 6 * depth


def test_lycoris_kinds_and_a_kernel(model, tmp_path):
    """A LoHa of a convolution and a difference of a norm, by the original's names; formulas: test_lycoris.py."""
    place = ("unet", "down.1.res.0.conv1.weight")
    out, width, *_ = PLACES[place]
    name = kohya(place)
    assert name == "lora_unet_input_blocks_4_0_in_layers_2"
    parts = {f"hada_w{i}_{x}": torch.randn(s) / 9 for i in "12" for x, s in (("a", (out, 2)), ("b", (2, width * 9)))}
    norm = torch.full((TINY_XL.text[1].width,), 0.25)
    before = texts_and_unet(model)
    tensors = {f"{name}.{part}": x for part, x in parts.items()}
    model.add_lora(saved(tmp_path, tensors | {"lora_te2_text_model_final_layer_norm.w_norm": norm}))
    one, two = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in "12")
    delta = (one * two).view(out, width, 3, 3)
    assert torch.allclose(model.unet.get_parameter(place[1]), before[place] + delta, atol=1e-6)
    assert torch.equal(model.text_encoder_2.norm.weight, before["text_encoder_2", "norm.weight"] + norm)


@pytest.mark.parametrize("scheme", ["kohya", "diffusers", "kohya, diffusers' names"])
@pytest.mark.sampled(3)
def test_merged_as_by_diffusers(scheme, model, pipe, tmp_path):
    """`load_lora_weights` and `fuse_lora`: the same weights, contexts and pooled output."""
    ends = tuple(f".{a}.{x}.weight" for a in ("attn1", "attn2") for x in ("q", "k", "v", "out"))
    ends += (".attn.q.weight", ".attn.k.weight", ".attn.v.weight", ".attn.out.weight", ".fc1.weight", ".ff.out.weight")
    tensors, deltas = lora_file(scheme, [place for place in PLACES if place[1].endswith(ends)], scale=0.02)
    assert {network for network, _ in deltas} == set(NETWORKS)
    if scheme != "diffusers":
        names = [name.removesuffix(f".{KOHYA[0]}") for name in tensors if name.endswith(KOHYA[0])]
        tensors |= {f"{name}.alpha": torch.tensor(1.5) for name in names}
    file = saved(tmp_path, tensors)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(lora_scale=0.75, components=[*NETWORKS])
    pipe.unload_lora_weights()
    before = texts_and_unet(model)
    model.add_lora(file, 0.75)
    for network in NETWORKS:
        state = {key.removeprefix("text_model."): x for key, x in getattr(pipe, network).state_dict().items()}
        for key, source in DIFFUSERS[network].items():
            ours = getattr(model, network).get_parameter(key)
            assert error(ours, state[source.key].view_as(ours)) < 1e-6, (network, key)
    changed = {place for place, x in texts_and_unet(model).items() if not torch.equal(x, before[place])}
    assert changed == set(deltas)
    text = model.encode_texts("a cat")
    theirs = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)
    assert error(text.hidden, theirs[0]) < 1e-5 and error(text.pooled, theirs[2]) < 1e-5


def test_alpha_in_settings_of_each_network(model, tmp_path):
    """As diffusers writes PEFT's settings: those of a network after its name."""
    places = [(network, "blocks.1.fc1.weight") for network in TEXTS]
    tensors, deltas = lora_file("diffusers", places)
    settings = {"text_encoder.lora_alpha": 3, "text_encoder_2.lora_alpha": 6, "text_encoder_2.r": 3}
    before = texts_and_unet(model)
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    model.add_lora(tmp_path / "a.safetensors")
    after = texts_and_unet(model)
    for place, times in zip(places, (1, 2), strict=True):
        assert torch.allclose(after[place].double(), before[place].double() + times * deltas[place], atol=1e-5)
    settings = {"text_encoder_2.init_lora_weights": "pissa"}
    save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(CheckpointError, match="init_lora_weights 'pissa'"):
        model.add_lora(tmp_path / "b.safetensors")


# ------------------------------------------------------------------------------------------------------------ training


def test_a_trained_lora_has_kohyas_names(model, pipe, tmp_path):
    """lora_te1_, lora_te2_ and the original's names of U-Net layers, which this project and diffusers read."""
    loras = {}
    for number, network in enumerate(NETWORKS):
        of = getattr(model, network)
        loras[network] = TrainableLora(of, lora_layers(of), LoraParams(2, 1.0), seed=number)
        for layer in loras[network].layers:
            torch.nn.init.normal_(layer.up, std=0.05)
    tensors = lora_tensors(loras, TINY_XL)
    assert {name.partition("_text_model")[0] for name in tensors if "text_model" in name} == {"lora_te1", "lora_te2"}
    unet = [name for name in tensors if name.startswith("lora_unet_")]
    assert all(re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_", name) for name in unet)
    expected = {
        (network, f"{name}.weight"): layer.delta()
        for network, lora in loras.items()
        for name, layer in zip(lora.names, lora.layers, strict=True)
    }
    before = texts_and_unet(model)
    file = saved(tmp_path, tensors)
    notes: list[str] = []
    model.add_lora(file, note=notes.append)
    assert notes == []
    for place, now in texts_and_unet(model).items():
        assert torch.allclose(now, before[place] + expected.get(place, torch.zeros(1)), atol=1e-5), place
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(components=[*NETWORKS])
    pipe.unload_lora_weights()
    theirs = pipe.unet.state_dict()
    for key, source in DIFFUSERS["unet"].items():
        ours = model.unet.get_parameter(key)
        assert error(ours, theirs[source.key].view_as(ours)) < 1e-6, key
    text = model.encode_texts("a cat")
    encoded = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)
    assert error(text.hidden, encoded[0]) < 1e-5 and error(text.pooled, encoded[2]) < 1e-5


def test_a_lora_of_the_refiner_names_the_second_encoder():
    network = build(TINY_REFINER)["text_encoder"].to_empty(device="cpu")
    tensors = lora_tensors({"text_encoder": TrainableLora(network, lora_layers(network), LoraParams(1))}, TINY_REFINER)
    assert all(name.startswith("lora_te2_text_model_encoder_layers_") for name in tensors)
