"""Gradients of a LoRA: those of the merged weights, of PEFT's layers, and the same under checkpointing and autocast."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import TINY, error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scripts.benchmark.references import peers
from sd.checkpoints.key_maps import diffusers_sources
from sd.conditioning import Conditioning
from sd.models.layers import ResBlock
from sd.models.unet import SpatialTransformer, UNet
from sd.training import LoraParams, TrainableLora, lora_layers
from sd.training.lora import LoraLayer

KINDS = {
    "linear": lambda: nn.Linear(12, 20),
    "without bias": lambda: nn.Linear(12, 20, bias=False),
    "3x3": lambda: nn.Conv2d(12, 20, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1),
    "1x1": lambda: nn.Conv2d(12, 20, 1),
}
PARAMS = {
    "LoRA": LoraParams(4, 2.0),
    "LoCon": LoraParams(4, 2.0, conv_rank=3, conv_alpha=5.0),
    "DoRA": LoraParams(4, 2.0, dora=True),
}


@pytest.fixture(autouse=True)
def with_gradients():
    """Other tests run without."""
    with torch.enable_grad():
        yield


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(network: nn.Module, names: list[str], params: LoraParams) -> TrainableLora:
    """A LoRA as in the middle of training: B is not zero, and the lengths of rows have changed."""
    lora = TrainableLora(network, names, params)
    with torch.no_grad():
        for i, layer in enumerate(lora.layers):
            layer.up.copy_(0.3 * torch.randn(layer.up.shape, generator=rng(i)))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.2 * torch.randn(layer.magnitude.shape, generator=rng(i)))
    return lora


def with_weight(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """A layer with another weight."""
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def merged(layer: LoraLayer, weight: Tensor) -> Tensor:
    """The weight with the change by the formulas of the papers, with gradients; DoRA's norm is a constant."""
    change = torch.einsum("or,ri->oi", layer.up.flatten(1), layer.down.flatten(1))
    whole = weight + layer.alpha / layer.rank * change.view(weight.shape)
    if layer.magnitude is None:
        return whole
    norms = whole.detach().flatten(1).square().sum(1).sqrt()
    return whole * (layer.magnitude / norms).view(-1, *[1] * (weight.dim() - 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_merged_weight(kind, params, dtype):
    """Of the input as well: 1e-6 in float32, and to rounding in float64."""
    torch.manual_seed(0)
    network = nn.Sequential(KINDS[kind]()).requires_grad_(False)
    lora = trained(network, ["0"], PARAMS[params]).to(dtype)
    network.to(dtype)
    shape = (3, 12, 8, 8) if isinstance(network[0], nn.Conv2d) else (3, 7, 12)
    x = torch.randn(shape, generator=rng(5)).to(dtype).requires_grad_()
    layer = lora.layers[0]
    expected = with_weight(network[0], x, merged(layer, network[0].weight))
    back = torch.randn(expected.shape, generator=rng(6)).to(dtype)
    wanted = torch.autograd.grad((expected * back).sum(), [x, *lora.parameters()])
    lora.attach(network)
    found = network(x)
    got = torch.autograd.grad((found * back).sum(), [x, *lora.parameters()])
    limit = 1e-6 if dtype == torch.float32 else 1e-13
    assert error(found, expected) < limit and len(got) == (4 if layer.magnitude is not None else 3)
    for ours, theirs in zip(got, wanted, strict=True):
        assert theirs.any() and error(ours, theirs) < limit
    assert error(layer.merged(network[0].weight), merged(layer, network[0].weight).detach()) < limit
    assert layer.rank == (3 if params == "LoCon" and kind in ("3x3", "stride 2") else 4)


def test_a_dora_changes_nothing_at_first_to_the_bit():
    torch.manual_seed(0)
    unet = UNet(TINY.unet).requires_grad_(False)
    nn.init.zeros_(unet.down[0].res[0].conv2.weight)  # rows without a direction
    inputs = unet_inputs()
    before = unet(*inputs)
    lora = TrainableLora(unet, lora_layers(unet), LoraParams(4, dora=True))
    lora.attach(unet)
    found = unet(*inputs)
    assert torch.equal(found, before)
    unet(*inputs).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in lora.parameters())
    still = {name for name, layer in zip(lora.names, lora.layers, strict=True) if not layer.magnitude.grad.any()}
    assert still == {f"down.0.res.0.{name}" for name in ("conv1", "time", "conv2")}


# ------------------------------------------------------------------------------------------------------------ networks


def unet_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Conditioning]:
    x, context = torch.randn(2, 4, 8, 8, generator=rng(2)), torch.randn(2, 7, 64, generator=rng(3))
    return x.to(dtype), torch.tensor([10.0, 700.0], dtype=dtype), Conditioning(context.to(dtype))


def recomputed(network: nn.Module) -> nn.Module:
    """The network with activation checkpointing that draws the same random numbers again."""
    for module in network.modules():
        if isinstance(module, ResBlock | SpatialTransformer):
            vars(module)["forward"] = partial(checkpoint, module.forward, use_reentrant=False)
    return network


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_and_activation_checkpointing(dora):
    """The same gradients as without checkpointing, other ones than without dropout, and none of it in eval mode."""
    torch.manual_seed(0)
    plain = UNet(TINY.unet).requires_grad_(False)
    saving = recomputed(copy.deepcopy(plain))
    names = lora_layers(plain)
    lora = trained(plain, names, LoraParams(4, dropout=0.3, dora=dora))

    def measured(network: nn.Module) -> tuple[Tensor, list[Tensor]]:
        lora.attach(network)
        torch.manual_seed(7)
        loss = network(*unet_inputs()).square().mean()
        gradients = torch.autograd.grad(loss, list(lora.parameters()))
        lora.detach()
        return loss.detach(), list(gradients)

    loss, gradients = measured(plain)
    again, same = measured(saving)
    assert again == loss and all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    lora.eval()
    other, _ = measured(plain)
    without = trained(plain, names, LoraParams(4, dora=dora))
    without.attach(plain)
    assert other != loss and other == plain(*unet_inputs()).square().mean()
    without.detach()


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_of_the_inputs(dora):
    """Of one layer: the change sees the input with a share of zeros, the layer itself sees all of it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 20)).requires_grad_(False)
    lora = trained(network, ["0"], LoraParams(4, 2.0, dropout=0.5, dora=dora))
    x, layer = torch.randn(5, 12, generator=rng(1)), lora.layers[0]
    plain = network(x)
    lora.attach(network)
    torch.manual_seed(3)
    found = network(x)
    torch.manual_seed(3)
    seen = F.dropout(x, 0.5)
    assert (seen == 0).any() and (seen != 0).any()
    expected = plain + seen @ (merged(layer, network[0].weight) - network[0].weight).T
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_half_precision(way, dora):
    """A bfloat16 network, or autocast: outputs are bfloat16, gradients float32, and near those of float32."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    lora = trained(network, ["0", "1"], LoraParams(4, dora=dora))
    x = torch.randn(32, 64, generator=rng(1))
    lora.attach(network)
    exact = torch.autograd.grad(network(x).square().mean(), list(lora.parameters()))
    if way == "weights":
        network.bfloat16()
        found = network(x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = network(x)
    gradients = torch.autograd.grad(found.float().square().mean(), list(lora.parameters()))
    assert found.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 and error(g, e) < 0.03 for g, e in zip(gradients, exact, strict=True))


# ---------------------------------------------------------------------------------------------------------------- PEFT


def peft_of(lora: TrainableLora, network: str, other: nn.Module) -> list[list[nn.Parameter]]:
    """Inject PEFT's layers with the same values into diffusers' network; returns A, B and m of each layer."""
    peft = pytest.importorskip("peft")
    keys = [f"{name}.weight" for name in lora.names]
    names = [s.key.removesuffix(".weight") for s in diffusers_sources(TINY, {network: keys})[network].values()]
    modules = dict(other.named_modules())
    names = [next(name for name in modules if name.endswith(ours)) for ours in names]
    params = lora.params
    config = peft.LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        rank_pattern={name: layer.rank for name, layer in zip(names, lora.layers, strict=True)},
        alpha_pattern={name: layer.alpha for name, layer in zip(names, lora.layers, strict=True)},
        target_modules=names,
        use_dora=params.dora,
    )
    peft.inject_adapter_in_model(config, other)
    found = []
    for name, layer in zip(names, lora.layers, strict=True):
        theirs = other.get_submodule(name)
        own = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
        own += [theirs.lora_magnitude_vector["default"].weight] if params.dora else []
        with torch.no_grad():
            for one, ours in zip(own, layer_parts(layer), strict=True):
                one.copy_(ours.view(one.shape))
        found.append(own)
    return found


def layer_parts(layer: LoraLayer) -> list[nn.Parameter]:
    return [layer.down, layer.up, *([] if layer.magnitude is None else [layer.magnitude])]


def compare_steps(lora: TrainableLora, others: list[list[nn.Parameter]], losses: tuple[Tensor, Tensor]) -> None:
    """One step of AdamW on both sides: equal gradients, and equal parameters afterwards."""
    ours = [p for layer in lora.layers for p in layer_parts(layer)]
    theirs = [p for layer in others for p in layer]
    assert abs(float(losses[0] / losses[1]) - 1) < 1e-9
    for loss, parameters in zip(losses, (ours, theirs), strict=True):
        optimizer = torch.optim.AdamW(parameters, 1e-3)
        loss.backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    for one, other in zip(ours, theirs, strict=True):
        assert error(one.grad, other.grad.view(one.shape)) < 1e-8
        assert error(one.detach(), other.detach().view(one.shape)) < 1e-8


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_step_is_that_of_peft_on_diffusers_unet(tiny, dora):
    """Attention, feed-forward, convolutions, the same noise, in float64. In float32 both round differently."""
    pytest.importorskip("diffusers")
    unet = copy.deepcopy(tiny["unet"]).double()
    theirs = peers({"unet": unet}, TINY, torch.float64)["unet"]
    lora = trained(unet, lora_layers(unet), LoraParams(4, 2.0, 3, dora=dora)).double()
    others = peft_of(lora, "unet", theirs)
    lora.attach(unet)
    inputs, noise = unet_inputs(torch.float64), torch.randn(2, 4, 8, 8, generator=rng(9)).double()
    compare_steps(lora, others, tuple(F.mse_loss(net(*inputs), noise) for net in (unet, theirs)))


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_step_is_that_of_peft_on_transformers_text_encoder(tiny, dora):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    encoder = copy.deepcopy(tiny["text_encoder"]).double()
    theirs = peers({"text_encoder": encoder}, TINY, torch.float64)["text_encoder"]
    lora = trained(encoder, lora_layers(encoder), LoraParams(4, 2.0, dora=dora)).double()
    others = peft_of(lora, "text_encoder", theirs)
    lora.attach(encoder)
    ids = torch.randint(0, 49406, (2, 77), generator=rng(1))
    goal = torch.randn(2, 77, 64, generator=rng(9)).double()
    compare_steps(lora, others, tuple(F.mse_loss(hidden, goal) for hidden in (encoder(ids).hidden, theirs(ids))))
