"""Weights that are changed after an image: the next image is that of a model that was changed before its first one.

In every way that people change them, with layers that pack their weights; in float32 and bfloat16.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from common import TINY
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from sd.pipeline import StableDiffusion
from sd.runtime import kernel_choice, packing
from sd.runtime.optimize import optimize

DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = {"height": 64, "width": 64, "steps": 1, "seed": 3}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


class Network(nn.Module):
    """A few layers of each kind that is packed, in the layout of loaded weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.pixel = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.linear, self.norm = nn.Linear(32, 32), nn.GroupNorm(32, 32)
        self.rest = nn.Sequential(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.Linear(8, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pixel(self.conv_in(x)))
        return self.rest(self.linear(x.movedim(1, -1)).movedim(-1, 1))


@pytest.fixture(autouse=True)
def fast_kernels():
    with kernel_choice.prefer("fast"):
        yield


def network(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Network()
    return optimize(made.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False).eval())


def layers(net: nn.Module) -> list[nn.Module]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def each_layer(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def changed(net: nn.Module) -> None:
        for layer in layers(net):
            change(layer)

    return changed


def each_convolution(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], object]:
    """Those of stride 1."""
    return lambda net: [change(conv) for conv in (net.conv_in, net.pixel)]


def each_parameter(change: Callable[[nn.Parameter], object]) -> Callable[[nn.Module], None]:
    def changed(net: nn.Module) -> None:
        for parameter in net.parameters():
            change(parameter)

    return changed


def halve(net: nn.Module) -> None:
    each_parameter(lambda p: p.mul_(0.5))(net)


def optimizer_step(net: nn.Module) -> None:
    net.requires_grad_(True)
    for parameter in net.parameters():
        parameter.grad = parameter.detach().clone()
    torch.optim.SGD(net.parameters(), lr=0.5).step()


def spectral_norm(function: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def changed(net: nn.Module) -> None:
        torch.manual_seed(5)
        each_layer(function)(net)
        net.eval()

    return changed


def numpy_views(layer: nn.Module) -> None:
    weight = layer.weight
    (weight if weight.dtype == torch.float32 else weight.view(torch.int16)).numpy()[:1] = 0


def plain_layout(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    """torch flattens weights with `view` there, which channels-last kernels do not allow."""

    def changed(net: nn.Module) -> None:
        change(net.to(memory_format=torch.contiguous_format))

    return changed


def by_vector(net: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, net.parameters())


def average(net: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(net)
    halve(net)
    averaged.update_parameters(net)
    for own, other in zip(net.parameters(), averaged.module.parameters(), strict=True):
        own.copy_(other * 0.7)


def from_meta(net: nn.Module) -> None:
    state = {key: tensor * 0.5 for key, tensor in net.state_dict().items()}
    net.to("meta").to_empty(device="cpu").load_state_dict(state)


def replaced(net: nn.Module) -> None:
    net.conv_in = nn.Conv2d(4, 32, 3, padding=1, dtype=net.norm.weight.dtype)
    nn.init.constant_(net.conv_in.weight, 0.1)
    nn.init.constant_(net.conv_in.bias, 0.2)


def set_plainly(layer: nn.Module) -> None:
    weight = layer.weight.detach() * 0.5
    del layer._parameters["weight"]
    layer.weight = weight


def no_longer_normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.mul_(0.5)
    parametrize.remove_parametrizations(layer, "weight")


def seen(net: nn.Module) -> None:
    """Looks that change nothing, and then a change."""
    for layer in layers(net):
        layer.weight.mean(), layer.weight.float().numpy(), layer.weight.abs().max().item(), repr(layer)
    halve(net)


def shrink(layer: nn.Module, given: object) -> None:
    layer.weight.mul_(0.9)


HALF = each_layer(lambda layer: parametrize.register_parametrization(layer, "weight", Halved()))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "mul_": halve,
    "zero_": each_layer(lambda layer: layer.weight[1:].zero_()),
    "copy_": each_parameter(lambda p: p.copy_(p * 0.5)),
    "data =": each_parameter(lambda p: setattr(p, "data", p.data * 0.5)),
    "data.copy_": each_parameter(lambda p: p.data.copy_(p.data * 0.5)),
    "set_": each_parameter(lambda p: p.set_(p.detach() * 0.5)),
    "resize of views": each_layer(lambda layer: layer.weight.view(-1, *layer.weight.shape[1:])[::2].mul_(0.1)),
    "state_dict": lambda net: [tensor.mul_(0.5) for tensor in net.state_dict().values()],
    "load_state_dict": lambda net: net.load_state_dict({k: v * 0.5 for k, v in net.state_dict().items()}),
    "assign": lambda net: net.load_state_dict({k: v * 0.5 for k, v in net.state_dict().items()}, assign=True),
    "foreach": lambda net: torch._foreach_mul_(list(net.parameters()), 0.5),
    "foreach lerp": lambda net: torch._foreach_lerp_(
        list(net.parameters()), [torch.zeros_like(p) for p in net.parameters()], 0.5
    ),
    "vector": plain_layout(by_vector),
    "moving average": average,
    "optimizer": optimizer_step,
    "optimizer, then inference": lambda net: (optimizer_step(net), net.zero_grad(), net.requires_grad_(False)),
    "swap_tensors": each_layer(
        lambda layer: torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight * 0.5, requires_grad=False))
    ),
    "numpy": each_layer(numpy_views),
    "dlpack": each_layer(lambda layer: torch.utils.dlpack.from_dlpack(layer.weight.detach()).mul_(0.5)),
    "share_memory": lambda net: halve(net.share_memory()),
    "init": each_layer(lambda layer: nn.init.constant_(layer.weight, 0.01)),
    "apply": lambda net: net.apply(lambda m: m.weight.mul_(0.5) if isinstance(m, nn.Linear) else None),
    "prune": plain_layout(each_layer(lambda layer: prune.l1_unstructured(layer, "weight", 0.5))),
    "pruned for good": plain_layout(
        each_layer(lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight"))
    ),
    "weight_norm": each_layer(
        lambda layer: parametrizations.weight_norm(layer).parametrizations.weight.original0.mul_(0.5)
    ),
    "weight_norm, removed": each_layer(no_longer_normed),
    "old weight_norm": each_layer(lambda layer: nn.utils.weight_norm(layer).weight_g.mul_(0.5)),
    "spectral_norm": spectral_norm(parametrizations.spectral_norm),
    "parametrization": HALF,
    "parametrization, removed": lambda net: (
        HALF(net),
        [parametrize.remove_parametrizations(layer, "weight") for layer in layers(net)],
    ),
    "another layer": replaced,
    "another parameter": each_layer(lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 0.5))),
    "register_parameter": each_layer(
        lambda layer: layer.register_parameter("weight", nn.Parameter(layer.weight * 0.5, requires_grad=False))
    ),
    "_parameters": each_layer(lambda layer: layer._parameters.update(weight=nn.Parameter(layer.weight * 0.5))),
    "no parameter": each_layer(set_plainly),
    "bias": each_layer(lambda layer: None if layer.bias is None else layer.bias.add_(0.3)),
    "no bias": each_layer(lambda layer: setattr(layer, "bias", None)),
    "forward hook": each_layer(lambda layer: layer.register_forward_hook(lambda m, given, out: out * 0.5)),
    "hook on the weight": each_layer(lambda layer: layer.register_forward_pre_hook(shrink)),
    "another forward": each_layer(
        lambda layer: setattr(layer, "forward", lambda *x, before=layer.forward: before(*x) * 0.5)
    ),
    "circular padding": each_convolution(lambda layer: setattr(layer, "padding_mode", "circular")),
    "another _conv_forward": each_convolution(
        lambda layer: setattr(layer, "_conv_forward", lambda x, w, b: torch.conv2d(x, w.flip(0), b, padding="same"))
    ),
    "dilation": lambda net: (setattr(net.conv_in, "dilation", (2, 2)), setattr(net.conv_in, "padding", (2, 2))),
    "there and back": lambda net: (dtype := net.norm.weight.dtype, halve(net.double()), net.to(dtype)),
    "meta and back": from_meta,
    "training mode": lambda net: halve(net.train()),
    "looked at": seen,
}  # fmt: skip


@pytest.mark.skipif(not packing.onednn_dtypes(), reason="needs an x86 CPU with AVX and a torch that has oneDNN")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_the_output_is_that_of_a_network_changed_before(way, dtype):
    if dtype not in packing.onednn_dtypes():
        pytest.skip(f"{dtype} has no fast path on this CPU")
    x = torch.linspace(-1, 1, 4 * 8 * 16, dtype=dtype).view(1, 4, 8, 16)
    fresh, used = network(dtype), network(dtype)
    before = used(x)
    assert all("_packed" in layer.__dict__ for layer in layers(used))
    for net in (fresh, used):
        WAYS[way](net)
    for _ in range(2 if "hook on" not in way else 1):  # packed again, where it can be
        expected, found = fresh(x), used(x)
        assert (found - expected).float().norm() <= TOLERANCE[dtype] * expected.float().norm()
        assert (expected - before).float().norm() > 0.05 * before.float().norm()


def rolled(layer: nn.Module) -> nn.Module:
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(layer.weight.roll(1, 0), requires_grad=False)
    return other


CHANGES: dict[str, Callable[[StableDiffusion], object]] = {
    "text encoder": lambda model: model.text_encoder.blocks[0].fc1.weight.data.mul_(0.1),
    "U-Net": lambda model: [parameter.mul_(0.9) for parameter in model.unet.parameters()],
    "VAE": lambda model: setattr(model.vae.decoder, "conv_out", rolled(model.vae.decoder.conv_out)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_of_a_model_that_was_changed_between_them(dtype):
    """With low memory, where networks are read again: one that was changed stays."""
    fresh, used = (StableDiffusion.load(device="cpu", dtype=dtype, low_memory=low) for low in (False, True))

    def image(model: StableDiffusion) -> np.ndarray:
        return np.asarray(model.txt2img("a cat", **SETTINGS)[0]).astype(int)

    image(used)
    for change in CHANGES.values():
        change(fresh)
        change(used)
    expected = image(fresh)
    assert all(abs(image(used) - expected).max() <= 1 for _ in range(2))
    assert used._networks._kept == {"text_encoder", "unet"}  # the VAE needs not: all others stay


def test_with_low_memory_a_look_keeps_no_network(tmp_path):
    model = StableDiffusion.load(device="cpu", dtype="float32", low_memory=True)
    model.txt2img("a cat", **SETTINGS)
    assert model.unet.conv_in.weight.abs().sum() > 0 and model.text_encoder.token.weight.shape[1] == 64
    assert next(iter(model._networks._networks["unet"].parameters())).is_meta


@pytest.mark.parametrize(
    "part, cast",
    [("unet", "half"), ("unet", "bfloat16"), ("unet", "double"), ("vae", "half"), ("text_encoder", "double")],
)
def test_a_network_in_another_precision(part, cast, tiny, tiny_sd):
    """It computes in that of its weights."""
    model = StableDiffusion(TINY, **tiny | {part: copy.deepcopy(tiny[part])})
    getattr(getattr(model, part), cast)()
    image, before = (np.asarray(m.txt2img("a cat", **SETTINGS)[0]).astype(int) for m in (model, tiny_sd))
    difference = abs(image - before)  # processors round products of bfloat16 differently
    assert difference.mean() < (4 if cast == "bfloat16" else 1) and difference.max() <= (
        32 if cast == "bfloat16" else 2
    )


def test_a_network_in_two_precisions_or_nowhere(tiny):
    model = StableDiffusion(TINY, **copy.deepcopy(tiny))
    model.unet.down[0].half()
    with pytest.raises(
        RuntimeError,
        match=r"^model.unet cannot be used: its weights are float16 and float32: give all of them one precision, as "
        r".to\(torch.float32\)$",
    ):
        model.txt2img("a", **SETTINGS)
    model.unet.float()
    model.vae.to("meta")
    with pytest.raises(
        RuntimeError,
        match=r"^model.vae cannot be used: some of its weights are on meta, the model is on cpu: load the mod",
    ):
        model.txt2img("a", **SETTINGS)


def test_an_error_of_the_callers_own_stays_itself(tiny):
    model = StableDiffusion(TINY, **copy.deepcopy(tiny))
    error = RuntimeError("mine")

    def hook(*_: object) -> None:
        raise error

    model.unet.conv_in.register_forward_hook(hook)
    with pytest.raises(RuntimeError) as raised:
        model.txt2img("a", **SETTINGS)
    assert raised.value is error


@pytest.mark.parametrize(
    "name, words",
    [("to", "StableDiffusion.load"), ("half", "dtype="), ("parameters", "model.unet"), ("scheduler", "sampler="),
     ("nothing_known", "has no 'nothing_known'$")],
)  # fmt: skip
def test_what_others_call_is_answered(name, words, tiny_sd):
    assert not hasattr(tiny_sd, name)
    with pytest.raises(AttributeError, match=words):
        getattr(tiny_sd, name)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: saved_and_loaded(net)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_a_network_of_its_own(copied):
    x = torch.linspace(-1, 1, 4 * 8 * 16).view(1, 4, 8, 16)
    net = network(torch.float32)
    before = net(x)
    other = copied(net)
    halve(other)
    assert torch.equal(net(x), before)
    halve(net)
    assert torch.equal(net(x), other(x)) and not torch.equal(net(x), before)


def saved_and_loaded(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
