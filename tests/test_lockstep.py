"""Runs side by side: each gives the images that it gives alone, to the bit."""

from __future__ import annotations

import pytest
import torch
from common import TINY
from PIL import Image
from torch import nn

from sd import StableDiffusion
from sd.conditioning import Conditioning
from sd.lockstep import PAYS, Lockstep, Stopped
from sd.params import ImageToImage, Inpaint, TextToImage
from sd.runtime import together
from sd.runtime.together import Batch, Together, split

REQUESTS = [
    TextToImage.of("a house", steps=4, sampler="ddim", seed=1, guidance=5),
    TextToImage.of("a boat on the sea", "fog", steps=7, sampler="euler_a", seed=2, guidance=3),
    TextToImage.of("", steps=3, sampler="heun", seed=3, guidance=7),
    TextToImage.of("a tree", steps=3, sampler="dpmpp_2m", seed=4, guidance=1),
    TextToImage.of("a tree", steps=3, sampler="ddim", seed=5, guidance=2, n=2),
    TextToImage.of("a tree", steps=3, seed=6, guidance=2, cache_interval=2),
    TextToImage.of("a (red:1.3) tree AND a house", steps=3, seed=7, guidance=2, web_ui_prompts=True),
    TextToImage.of("a tree", steps=2, seed=8, tileable=True, guidance=2),
    ImageToImage.of("a hill", image=Image.new("RGB", (128, 128), "green"), steps=6, strength=0.6, seed=9, guidance=3),
    Inpaint.of(
        "a hill", image=Image.new("RGB", (128, 128), "blue"), mask=Image.linear_gradient("L").resize((128, 128)),
        steps=4, seed=10, guidance=3,
    ),
]  # fmt: skip


def images(model, request):
    return model.prepare(request).result().images


@pytest.fixture(
    scope="module",
    params=[pytest.param(torch.float32, marks=pytest.mark.exhaustive), torch.bfloat16],
    ids=["float32", "bfloat16"],
)
def model(request):
    return StableDiffusion.load(dtype=request.param)


@pytest.mark.parametrize("width", [5, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 10))])
def test_images_are_those_of_each_alone(model, width):
    """Whatever runs beside them, and whenever it begins and ends."""
    alone = [images(model, request) for request in REQUESTS]
    for _ in range(2):  # the second time, with what was found in the first
        lockstep, left, turns = Lockstep(model), list(REQUESTS), []
        while left or len(lockstep):
            while left and len(lockstep) < width:
                request = left.pop(0)
                turns.append(lockstep.start(lambda shared, request=request: images(shared, request)))
            lockstep.advance()
        for expected, turn in zip(alone, turns, strict=True):
            assert turn.failure is None
            assert [image.tobytes() for image in turn.result] == [image.tobytes() for image in expected]


def test_equal_shapes_are_evaluated_in_one_batch(tiny):
    model = StableDiffusion(TINY, **tiny)
    sizes = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        lockstep = Lockstep(model)
        for round in range(2):
            sizes.clear()
            for seed in range(3):
                lockstep.start(lambda shared, seed=seed: shared.txt2img("a", steps=2, seed=seed, guidance=3))
            while lockstep.advance():
                pass
            joined = [size for size in sizes if size == 6]
            assert joined if round == 0 else sizes == [6, 6] or sizes == [2] * 6  # the last if nothing could be joined
    finally:
        hook.remove()


def test_a_failure_stays_that_of_its_task(tiny_sd):
    lockstep = Lockstep(tiny_sd)

    def fails(model):
        raise KeyError("mine")

    def fails_later(model):
        run = model.prepare(TextToImage.of("b", steps=3, seed=3))
        next(run)
        raise KeyError("later")

    turns = [
        lockstep.start(lambda model: images(model, TextToImage.of("a", steps=3, seed=1))),
        lockstep.start(fails),
        lockstep.start(fails_later),
    ]
    while lockstep.advance():
        pass
    assert turns[0].failure is None and len(turns[0].result) == 1
    assert isinstance(turns[1].failure, KeyError) and isinstance(turns[2].failure, KeyError)


def test_an_error_of_the_network_reaches_only_those_that_have_it_alone(tiny):
    """A batch that is too large for the memory is evaluated one by one."""
    model = StableDiffusion(TINY, **tiny)

    def check(module, args):
        if len(args[0]) > 2:
            raise RuntimeError("out of memory")
        if float(args[0].abs().max()) > 100:
            raise RuntimeError("too large")

    hook = model.unet.register_forward_pre_hook(check)
    try:
        lockstep = Lockstep(model)

        def large(shared):
            run = shared.prepare(TextToImage.of("a", steps=2, seed=2, guidance=3))
            run.start.x.mul_(1000)
            return run.result()

        turns = [
            lockstep.start(lambda shared: images(shared, TextToImage.of("a", steps=2, seed=1, guidance=3))),
            lockstep.start(large),
        ]
        while lockstep.advance():
            pass
        assert turns[0].failure is None
        assert "too large" in str(turns[1].failure)
    finally:
        hook.remove()


def test_closing_ends_all_tasks(tiny_sd):
    lockstep, cleaned = Lockstep(tiny_sd), []

    def task(model):
        try:
            return images(model, TextToImage.of("a", steps=5))
        finally:
            cleaned.append(True)

    turns = [lockstep.start(task), lockstep.start(task)]
    lockstep.advance()
    lockstep.close()
    assert len(lockstep) == 0 and cleaned == [True, True]
    assert all(turn.ended and isinstance(turn.failure, Stopped) for turn in turns)


class Uneven(nn.Module):
    """A layer that rounds differently in larger batches."""

    def forward(self, x):
        return x * (1 + 1e-6 * len(x))


class Network(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t, conditioning):
        return self.layers(x)


def batches(n, b=2):
    return [
        Batch(torch.full((b, 4), 1.0 + i), torch.zeros(b), Conditioning(torch.zeros(b, 3, 5))) for i in range(n)
    ]  # fmt: skip


def test_layers_that_depend_on_the_batch_are_found_and_evaluated_by_parts():
    network = Network(nn.Tanh(), Uneven(), nn.Tanh())
    found = Together(network, network)
    alone = [network(*batch) for batch in batches(3)]
    assert not torch.equal(torch.cat(alone), network(torch.cat([b.x for b in batches(3)]), None, None))
    for _ in range(2):
        assert all(map(torch.equal, found(batches(3)), alone))
    assert list(found.layers().values()) == [["layers.1"]]
    assert "forward" not in vars(network.layers[1])  # as it was


def test_a_network_that_depends_on_the_batch_itself_is_evaluated_alone():
    network = nn.Module()
    sizes = []

    def evaluate(x, t, conditioning):
        sizes.append(len(x))
        return x * (1 + 1e-6 * len(x))

    found = Together(network, evaluate)
    expected = [evaluate(*batch) for batch in batches(3)]
    for _ in range(3):  # two of the three are compared in the second round
        sizes.clear()
        assert all(map(torch.equal, found(batches(3)), expected))
    assert sizes == [2, 2, 2] and list(found.layers().values()) == [["(whole network)"]] * 2


def test_split_leaves_other_inputs_alone():
    layer = nn.Linear(4, 4)
    with split([layer], 2):
        assert torch.equal(layer(torch.ones(3, 4)), nn.functional.linear(torch.ones(3, 4), layer.weight, layer.bias))


def test_shapes_tell_batches_apart():
    (one,), (other,) = batches(1), batches(1)
    assert one.shape() == other.shape()
    assert one.shape() != replace_context(other).shape()


def replace_context(batch):
    return batch._replace(conditioning=Conditioning(torch.zeros(2, 6, 5)))


@pytest.mark.parametrize(
    ("cost", "pays"), [(lambda n: 0.01, True), (lambda n: 0.005 * n, False)], ids=["small", "large"]
)
def test_it_pays_only_while_together_is_faster(monkeypatch, cost, pays):
    """A large image keeps all cores busy: two of them take twice as long, and both end at the end."""
    network, clock = Network(nn.Tanh()), [0.0]
    monkeypatch.setattr(together, "perf_counter", lambda: clock[0])

    def evaluate(x, t, conditioning):
        clock[0] += cost(len(x))
        return network(x, t, conditioning)

    found = Together(network, evaluate)
    shape = batches(1)[0].shape()
    found(batches(1))
    assert found.gain(shape) is None
    for _ in range(2):
        found(batches(4))
    assert found.gain(shape) == pytest.approx(4 if pays else 1)
    assert (found.gain(shape) >= PAYS) == pays


def test_too_little_memory_for_all_is_remembered():
    network, sizes = Network(nn.Tanh()), []

    def evaluate(x, t, conditioning):
        sizes.append(len(x))
        if len(x) > 4:
            raise RuntimeError("out of memory")
        return network(x, t, conditioning)

    found = Together(network, evaluate)
    expected = [network(*batch) for batch in batches(4)]
    for _ in range(2):
        sizes.clear()
        assert all(map(torch.equal, found(batches(4)), expected))
    assert sizes == [4, 4]
