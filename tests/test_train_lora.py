"""LoRA to train: changes nothing at first, is what it says, and other programs read its files."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from common import TINY, TINY_V2
from torch import nn

from scripts import convert
from scripts.training.state import save_tensors
from sd import StableDiffusion
from sd.conditioning import Conditioning
from sd.config import Config
from sd.denoiser import Denoiser
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.models.vae import VAE
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource
from sd.samplers import lcm
from sd.training import LoraParams, TrainableLora, lora_layers, lora_metadata, lora_tensors

SMALL = {"tiny": TINY, "tiny v2": TINY_V2}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(network: nn.Module, rank: int = 4, alpha: float | None = None, which: str = "all") -> TrainableLora:
    """A LoRA as after training: B is not zero."""
    lora = TrainableLora(network, lora_layers(network, which), LoraParams(rank, alpha))
    with torch.no_grad():
        for layer in lora.layers:
            layer.up.copy_(0.2 * torch.randn(layer.up.shape, generator=rng(1)) * rank**-0.5)
    return lora


def model_of(config: Config) -> StableDiffusion:
    torch.manual_seed(0)
    parts = TextEncoder(config.text[0]), VAE(config.vae), UNet(config.unet)
    return StableDiffusion(config, *(part.requires_grad_(False).eval() for part in parts))


def inputs(config: Config) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    x = torch.randn(2, 4, 8, 8, generator=rng(2))
    return x, torch.tensor([10.0, 700.0]), Conditioning(torch.randn(2, 7, config.unet.context, generator=rng(3)))


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(TINY.unet).requires_grad_(False)


def test_nothing_changes_at_first_nor_while_disabled_nor_after(unet):
    x = inputs(TINY)
    before = unet(*x)
    lora = TrainableLora(unet, lora_layers(unet), LoraParams(2))
    lora.attach(unet)
    assert torch.equal(unet(*x), before)
    with torch.no_grad():
        lora.layers[0].up.fill_(0.1)
    changed = unet(*x)
    assert not torch.allclose(changed, before, atol=1e-3)
    with lora.disabled():
        assert torch.equal(unet(*x), before)
    assert torch.equal(unet(*x), changed)
    with pytest.raises(ValueError, match="detach it first"):
        lora.attach(unet)
    lora.detach()
    assert torch.equal(unet(*x), before)


@pytest.mark.parametrize("which", ["all", "transformer", "attention"])
def test_the_network_computes_with_the_merged_weights(unet, which):
    """Linear layers, convolutions of stride 1 and 2, and a scale: W + (alpha / r) B A."""
    lora = trained(unet, rank=4, alpha=2.0, which=which)
    lora.attach(unet)
    found = unet(*inputs(TINY))
    lora.detach()
    other = UNet(TINY.unet)
    other.load_state_dict(lora.merged(unet.state_dict()))
    expected = other(*inputs(TINY))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (expected - unet(*inputs(TINY))).abs().max() > 0.01
    name, layer = "down.0.attn.0.blocks.0.attn2.k", lora.layers[lora.names.index("down.0.attn.0.blocks.0.attn2.k")]
    change = other.get_submodule(name).weight - unet.get_submodule(name).weight
    torch.testing.assert_close(change, 2 / 4 * layer.up @ layer.down, atol=1e-6, rtol=1e-4)


def test_which_layers(unet):
    """All linear layers and convolutions, but for the ends and the embedding of the timestep."""
    every = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert every - set(lora_layers(unet)) == {"conv_in", "conv_out", "time.0", "time.2"}
    few = lora_layers(unet, "transformer")
    assert all(".attn" in name for name in few)
    assert len(few) == sum(".attn" in name for name in every)
    least = lora_layers(unet, "attention")
    assert set(few) - set(least) == {name for name in few if ".ff." in name or ".proj_" in name}
    with pytest.raises(ValueError, match="choose attention, transformer, all"):
        lora_layers(unet, "some")
    text = TextEncoder(TINY.text[0])
    linear = [name for name, module in text.named_modules() if isinstance(module, nn.Linear)]
    assert lora_layers(text) == linear == lora_layers(text, "transformer") and len(linear) == 3 * 6
    assert lora_layers(text, "attention") == [name for name in linear if ".attn." in name]


def test_only_the_lora_gets_gradients(unet):
    lora = TrainableLora(unet, lora_layers(unet), LoraParams(2), seed=5)
    lora.attach(unet)
    with torch.enable_grad():
        unet(*inputs(TINY)).square().mean().backward()
    lora.detach()
    assert all(p.grad is None for p in unet.parameters())
    assert all(layer.up.grad.abs().sum() > 0 for layer in lora.layers)
    assert all(layer.down.grad.abs().sum() == 0 for layer in lora.layers)  # as B is zero
    same, other = (TrainableLora(unet, lora.names, LoraParams(2), seed=seed) for seed in (5, 6))
    assert torch.equal(same.layers[3].down, lora.layers[3].down)
    assert not torch.equal(other.layers[3].down, lora.layers[3].down)


@pytest.mark.parametrize(
    ("names", "params", "words"),
    [
        (["conv_in"], {"rank": 0}, "the rank of a LoRA must be at least 1, got 0"),
        (["conv_in"], {"conv_rank": 0}, "the conv_rank of a LoRA must be at least 1"),
        (["conv_in"], {"alpha": 0.0}, "the alpha of a LoRA must be a number above 0"),
        (["conv_in"], {"conv_alpha": float("nan")}, "the conv_alpha of a LoRA must be a number above 0"),
        (["conv_in"], {"dropout": 1.0}, "the dropout of a LoRA must be from 0 to below 1"),
        ([], {}, "needs layers"),
        (["norm_out"], {}, "norm_out is a GroupNorm: a LoRA changes linear layers and convolutions"),
        (
            ["conv_in", "time.0"],
            {"rank": 65},
            r"above that of every layer: the largest that has an effect is 64 \(time",
        ),
    ],
)
def test_what_cannot_be_is_refused(unet, names, params, words):
    with pytest.raises(ValueError, match=words):
        TrainableLora(unet, names, LoraParams(**params))


def test_small_layers_have_a_smaller_rank_and_the_same_scale(unet):
    """conv_in has 4 * 9 inputs for 64 outputs."""
    lora = TrainableLora(unet, ["conv_in", "time.0", "time.2"], LoraParams(64, 32.0))
    assert [(layer.rank, layer.alpha, layer.scale) for layer in lora.layers] == [
        (36, 18.0, 0.5), (64, 32.0, 0.5), (64, 32.0, 0.5),
    ]  # fmt: skip
    assert lora.limited == 1
    assert lora.layers[0].down.shape == (36, 4, 3, 3)


def test_convolutions_have_a_rank_of_their_own(unet):
    """Those with kernels above 1x1; by default with the scale of the others."""
    names = ["down.0.res.0.conv1", "down.1.res.0.skip", "time.0"]

    def of(*params) -> list[tuple[int, float]]:
        return [(layer.rank, layer.alpha) for layer in TrainableLora(unet, names, LoraParams(*params)).layers]

    assert of(8, 4.0, 2) == [(2, 1.0), (8, 4.0), (8, 4.0)]
    assert of(8, 4.0, 2, 0.5) == [(2, 0.5), (8, 4.0), (8, 4.0)]
    assert of(8, 4.0, None, 2.0) == [(8, 2.0), (8, 4.0), (8, 4.0)]


@pytest.mark.parametrize("name", SMALL)
def test_our_adapters_read_what_is_written(name, tmp_path):
    """Of U-Net and text encoder, every layer is known, and the merged weights are W + (alpha / r) B A."""
    model = model_of(SMALL[name])
    networks = {"unet": model.unet, "text_encoder": model.text_encoder}
    loras = {network: trained(module, 4, 3.0) for network, module in networks.items()}
    expected = {network: loras[network].merged(module.state_dict()) for network, module in networks.items()}
    before = {network: {k: v.clone() for k, v in module.state_dict().items()} for network, module in networks.items()}
    path = tmp_path / "style.safetensors"
    tensors = lora_tensors(loras, model.config)
    save_tensors(tensors, path, lora_metadata(loras, model.config, "a style"))
    assert len(tensors) == 3 * sum(len(lora.names) for lora in loras.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.add_lora(path) == "style"
    for network, module in networks.items():
        changed = 0
        for key, weight in module.state_dict().items():
            torch.testing.assert_close(weight, expected[network][key], atol=1e-5, rtol=1e-4)
            changed += not torch.equal(weight, before[network][key])
        assert changed == len(loras[network].names)


def test_names_and_shapes_are_kohyas(unet):
    """Where the files of a model have 1x1 convolutions, so has the LoRA; SD 2 has linear layers there."""
    tensors = lora_tensors({"unet": trained(unet)}, TINY, torch.float16)
    name = "lora_unet_down_blocks_0_attentions_0_"
    assert tensors[name + "proj_in.lora_down.weight"].shape == (4, 64, 1, 1)
    assert tensors[name + "transformer_blocks_0_attn1_to_out_0.lora_up.weight"].shape == (64, 4)
    assert tensors["lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight"].shape == (4, 64, 3, 3)
    assert tensors["lora_unet_down_blocks_0_downsamplers_0_conv.lora_up.weight"].shape == (64, 4, 1, 1)
    assert tensors[name + "proj_in.alpha"].item() == 4 and tensors[name + "proj_in.alpha"].dtype == torch.float32
    assert tensors[name + "proj_in.lora_up.weight"].dtype == torch.float16
    two = UNet(TINY_V2.unet)
    tensors = lora_tensors({"unet": trained(two)}, TINY_V2)
    assert tensors["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"].shape == (4, 128)


@pytest.mark.parametrize("shipped", [False, True], ids=["trained here", "shipped"])
def test_diffusers_reads_the_lora_and_makes_the_same_latents(shipped, tmp_path):
    """The embedded model with a LoRA, four steps of LCM on both sides from the same noise."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = StableDiffusion.load(device="cpu", dtype="float32")
    path = tmp_path / "lcm.safetensors"
    if shipped:
        shutil.copy(resource(EMBEDDED_LORA), path)
    else:
        lora = trained(model.unet, rank=4)
        save_tensors(
            lora_tensors({"unet": lora}, model.config),
            path,
            lora_metadata({"unet": lora}, model.config, "pocket LCM LoRA"),
        )
    assert convert.main([str(resource(EMBEDDED)), str(tmp_path / "folder"), "--layout", "diffusers"]) == 0
    options = {"local_files_only": True, "torch_dtype": torch.float32}
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", **options)
    scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    cond = Conditioning(model.encode_prompt("a red house in the snow"))
    noise = torch.randn(1, 4, 16, 16, generator=rng(4))

    def ours() -> torch.Tensor:
        draw = rng(5)
        denoise, levels = Denoiser(model.unet, model.schedule, cond), model.schedule.levels(4, "lcm")
        *_, last = lcm(denoise, noise, levels, noise=lambda x: torch.randn(x.shape, generator=draw))
        return last.x

    plain = ours()
    with pytest.warns(UserWarning, match="lcm is an LCM LoRA"):
        model.add_lora(path)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    draw, x = rng(5), noise
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t, cond.context).sample, t, x, generator=draw).prev_sample
    torch.testing.assert_close(ours(), x, atol=2e-3, rtol=1e-3)
    assert (plain - x).abs().max() > 0.1  # the LoRA has an effect
