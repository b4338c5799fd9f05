"""Files of trained LoRAs: diffusers, PEFT, LyCORIS and this project read them alike, in both namings."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import TINY, TINY_V2, TINY_XL, error, tiny_state
from conftest import loaded
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scripts import convert as convert_script
from scripts.training.state import save_tensors
from sd import StableDiffusion
from sd.adapters.lora_formats import read_lora
from sd.checkpoints.convert import convert
from sd.checkpoints.key_maps import diffusers_sources
from sd.config import SD1, SD2_V, SDXL, Config
from sd.training import LoraParams, TrainableLora, lora_hash, lora_layers, lora_metadata, lora_tensors

MANIFESTS = {TINY: "tiny-v1", TINY_V2: "tiny-v2-v", TINY_XL: "tiny-sdxl"}
CONFIGS = pytest.mark.parametrize("config", MANIFESTS, ids=["SD 1", "SD 2", "SDXL"])
# a rank above that of the smallest layers, ranks and alphas of convolutions
PARAMS = LoraParams(rank=80, alpha=40.0, conv_rank=3, conv_alpha=2.0)


@pytest.fixture(scope="module")
def shared() -> dict[Config, StableDiffusion]:
    return {config: StableDiffusion(config, **loaded(tiny_state(name), config)) for config, name in MANIFESTS.items()}


@pytest.fixture
def models(shared) -> Iterator[dict[Config, StableDiffusion]]:
    """Models that tests share, as they were."""
    yield shared
    for model in shared.values():
        model.remove_lora()


def trained(network: nn.Module, seed: int, params: LoraParams = PARAMS) -> TrainableLora:
    rng = torch.Generator().manual_seed(seed)
    lora = TrainableLora(network, lora_layers(network), params, seed)
    with torch.no_grad():
        for layer in lora.layers:
            layer.up.copy_(0.2 * torch.randn(layer.up.shape, generator=rng))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.2 * torch.rand(layer.magnitude.shape, generator=rng))
    return lora


def loras_of(model: StableDiffusion, dora: bool, text: bool = True) -> dict[str, TrainableLora]:
    loras = {"unet": trained(model.unet, 0, replace(PARAMS, dora=dora))}
    for seed, name in enumerate(model.config.text_names if text else (), start=1):
        loras[name] = trained(getattr(model, name), seed, LoraParams(4 * seed, 3.0, dora=dora))
    return loras


def merged_of(model: StableDiffusion, loras: dict[str, TrainableLora]) -> dict[str, dict[str, Tensor]]:
    return {name: lora.merged(getattr(model, name).state_dict()) for name, lora in loras.items()}


def written(loras, config: Config, folder: Path, naming: str) -> Path:
    path = folder / "style.safetensors"
    metadata = lora_metadata(loras, config, "a style", naming=naming)
    save_tensors(lora_tensors(loras, config, naming=naming), path, metadata)
    return path


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("naming", ["kohya", "peft"])
@CONFIGS
def test_our_adapters_read_them(config, naming, dora, models, tmp_path):
    """Each layer of U-Net and text encoders, with its own alpha, to rounding; nothing is left over."""
    model = models[config]
    loras = loras_of(model, dora)
    assert 0 < loras["unet"].limited < len(loras["unet"].names)
    expected = merged_of(model, loras)
    before = {name: copy.deepcopy(getattr(model, name).state_dict()) for name in loras}
    notes: list[str] = []
    model.add_lora(written(loras, config, tmp_path, naming), note=notes.append)
    assert notes == []
    for name, state in expected.items():
        for key, weight in getattr(model, name).state_dict().items():
            torch.testing.assert_close(weight, state[key], atol=1e-5, rtol=1e-5)
        assert sum(not torch.equal(before[name][key], state[key]) for key in state) == len(loras[name].names)
    model.remove_lora()


@pytest.fixture(scope="module")
def pipes(tmp_path_factory) -> dict[Config, Path]:
    """Folders of the models for diffusers."""
    folders = {}
    for config, name in MANIFESTS.items():
        folder = folders[config] = tmp_path_factory.mktemp("folder")
        convert_script.save("diffusers", folder, convert(tiny_state(name), config), config, {})
    return folders


@pytest.mark.sampled(20)
@pytest.mark.parametrize(
    "naming, dora, text",
    [("kohya", False, True), ("peft", False, True), ("peft", True, True), ("kohya", False, False)],
    ids=["kohya", "PEFT", "PEFT DoRA", "kohya U-Net"],
)
@CONFIGS
@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_them(config, naming, dora, text, models, pipes, tmp_path):
    """`load_lora_weights`, and what its networks compute with it is what ours do with the merged weights."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    more = {"add_watermarker": False} if config.sizes else {"safety_checker": None, "requires_safety_checker": False}
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipes[config], **more)
    model = models[config]
    loras = loras_of(model, dora, text)
    path = written(loras, config, tmp_path, naming)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    model.add_lora(path, note=lambda note: None)
    rng = torch.Generator().manual_seed(1)
    x, t = torch.randn(1, 4, 8, 8, generator=rng), torch.tensor([500.0])
    told = model.encode_texts("a photograph of an astronaut")
    theirs = pipe.encode_prompt(
        "a photograph of an astronaut", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = {}
    if config.sizes:
        cond = model.with_sizes(told, (64, 64, 0, 0, 64, 64))
        added = {"text_embeds": theirs[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    else:
        cond = model.with_sizes(told, None)
    assert error(told.hidden, theirs[0]) < 1e-4
    found = pipe.unet(x, t, theirs[0], added_cond_kwargs=added).sample
    ours = model.unet(x, t, cond)
    model.remove_lora()
    assert error(ours, found) < 1e-4
    assert error(model.unet(x, t, cond), found) > 0.1


@pytest.mark.sampled(3)
@CONFIGS
@pytest.mark.filterwarnings("ignore")
def test_pefts_names_are_those_that_diffusers_writes(config, models, pipes, tmp_path):
    """Keys and shapes are those of `save_lora_weights` with the same layers."""
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    more = {"add_watermarker": False} if config.sizes else {"safety_checker": None, "requires_safety_checker": False}
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipes[config], **more)
    loras = loras_of(models[config], dora=True, text=False)
    path = written(loras, config, tmp_path, "peft")
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    own = {key.removeprefix("unet."): value for key, value in settings.items()}
    pipe.unet.add_adapter(peft.LoraConfig(**own))
    layers = peft.get_peft_model_state_dict(pipe.unet)
    type(pipe).save_lora_weights(tmp_path / "theirs", unet_lora_layers=layers)
    theirs = load_file(tmp_path / "theirs" / "pytorch_lora_weights.safetensors")
    ours = load_file(path)
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_lycoris_merges_them_alike(dora, models, tmp_path):
    """lycoris-lora on diffusers' modules of the same shapes; a DoRA by its norms of outputs."""
    pytest.importorskip("lycoris")
    from lycoris.modules import LoConModule

    model = models[TINY]
    loras = loras_of(model, dora)
    tensors = load_file(written(loras, TINY, tmp_path, "kohya"))
    expected = merged_of(model, loras)
    for network, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        state, names = getattr(model, network).state_dict(), loras[network].names
        sources = diffusers_sources(TINY, {network: [f"{name}.weight" for name in names]})[network]
        for key, source in list(sources.items())[::5]:
            name = prefix + source.key.removesuffix(".weight").replace(".", "_")
            weight = state[key].reshape(state[key].shape + (1,) * source.ones)
            layer: nn.Module = nn.Linear(*weight.shape[::-1]) if weight.dim() == 2 else stride_1(weight)
            layer.weight.data = weight.clone()
            parts = [tensors.get(f"{name}.{end}") for end in ("lora_up.weight", "lora_down.weight")]
            rest = [tensors[f"{name}.alpha"], tensors.get(f"{name}.dora_scale")]
            module = LoConModule.make_module_from_state_dict(name, layer, *parts, None, *rest)
            made, _ = module.get_merged_weight(1.0, weight.shape)
            assert error(made.detach().view(state[key].shape), expected[network][key]) < 1e-6, name


def stride_1(weight: Tensor) -> nn.Conv2d:
    return nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), padding=weight.shape[2] // 2)


# ------------------------------------------------------------------------------------------------------------ metadata


def test_kohyas_metadata(models, tmp_path):
    model = models[TINY]
    lora = {"unet": trained(model.unet, 0, LoraParams(8, 4.0, 2, 1.0, dropout=0.1))}
    facts = {"learning_rate": 1e-4, "steps": 500, "tag_frequency": {"10_toy": {"a toy": 3}}, "noise_offset": None}
    metadata = lora_metadata(lora, model.config, "a style", facts)
    assert metadata == {
        "format": "pt",
        "modelspec.title": "a style",
        "modelspec.prediction_type": "epsilon",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1.0"}',
        "ss_network_dropout": "0.1",
        "ss_v2": "False",
        "ss_learning_rate": "0.0001",
        "ss_steps": "500",
        "ss_tag_frequency": '{"10_toy": {"a toy": 3}}',
    }
    other = {**lora, "text_encoder": trained(model.text_encoder, 0, LoraParams(2))}
    assert lora_metadata(other, model.config, "x")["ss_network_dim"] == "Dynamic"
    dora = {"unet": trained(model.unet, 0, LoraParams(2, dora=True))}
    assert lora_metadata(dora, model.config, "x")["ss_network_module"] == "lycoris.kohya"
    with pytest.raises(ValueError, match=r"no facts of a training .*: learning_rat$"):
        lora_metadata(lora, model.config, "x", {"learning_rat": 1})
    with pytest.raises(ValueError, match="'diffusers' is no naming of LoRA files: choose kohya or peft"):
        lora_metadata(lora, model.config, "x", naming="diffusers")
    with pytest.raises(ValueError, match="choose kohya or peft"):
        lora_tensors(lora, model.config, naming="diffusers")
    tensors = lora_tensors(lora, model.config, torch.float16)
    save_tensors(tensors, tmp_path / "a.safetensors", metadata | (found := lora_hash(tensors)))
    raw = (tmp_path / "a.safetensors").read_bytes()
    digits = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert found == {"sshs_model_hash": digits}


@pytest.mark.parametrize(
    "config, version, architecture, prediction",
    [
        (SD1, "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        (SD2_V, "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
        (SDXL, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_the_base_model_is_called(config, version, architecture, prediction):
    network = nn.ModuleDict({"q": nn.Linear(8, 8)})
    lora = {"unet": TrainableLora(network, ["q"], LoraParams(2))}
    metadata = lora_metadata(lora, config, "a style")
    assert metadata["ss_base_model_version"] == version and metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == prediction
    assert metadata["ss_v2"] == str(config is SD2_V)


def test_the_embedding_of_a_file_in_half_precision_is_read(models, tmp_path):
    """A, B and m in float16, alpha in float32."""
    loras = loras_of(models[TINY], dora=True, text=False)
    tensors = lora_tensors(loras, TINY, torch.float16)
    kinds = {key.rpartition(".")[2]: x.dtype for key, x in tensors.items()}
    assert kinds == {"weight": torch.float16, "dora_scale": torch.float16, "alpha": torch.float32}
    save_tensors(tensors, tmp_path / "a.safetensors", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_lora(tmp_path / "a.safetensors", TINY, {n: getattr(models[TINY], n) for n in TINY.networks})
    assert len(read.changes) == len(loras["unet"].names)
