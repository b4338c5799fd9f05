"""Control networks in recorded steps: the residuals are inputs of the U-Net's recording, whatever changes in between.

On CPUs a stand-in records. That the checks of scripts/benchmark/gpu/controls.py find what they are for is tested with
recordings that forget something. Whole controlled runs are tested on the simulated device.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from common import TINY, tiny_state
from conftest import loaded
from PIL import Image
from simulated_device import SimulatedGpu
from test_simulated_gpu import networks

from scripts.benchmark.gpu import controls
from scripts.benchmark.gpu.items import CHECKS, Wrong
from scripts.benchmark.gpu.models import Models, Place
from sd.conditioning import Conditioning
from sd.control import AppliedControl, controlled, with_control
from sd.control_params import Control
from sd.models.controlnet import ControlConfig, ControlNet
from sd.models.unet import UNet
from sd.params import SamplingParams, TextToImage
from sd.pipeline import StableDiffusion
from sd.runtime import packing
from sd.runtime.cuda_graphs import Recorded, Recording, tensors
from sd.samplers import SAMPLERS


class Tape:
    """Stands in for CUDA graphs; a `stale` one gives the first result for ever."""

    def __init__(self, stale: bool = False) -> None:
        self.recorded, self.stale = 0, stale

    def __call__(self, run, device):
        self.recorded += 1
        out = run()

        def replay():
            for buffer, new in zip(tensors(out), [] if self.stale else tensors(run()), strict=not self.stale):
                buffer.copy_(new)

        return replay, out


@pytest.fixture(autouse=True)
def weights_stay_plain(monkeypatch):
    """As on a GPU: no layouts of oneDNN, which have no address."""
    monkeypatch.setattr(packing, "onednn_dtypes", frozenset)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unet() -> UNet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "onednn_dtypes", frozenset)
        return loaded(tiny_state(), TINY)["unet"]


def control_network(seed: int) -> ControlNet:
    """One whose zero convolutions are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ControlNet(ControlConfig.of(TINY.unet)).requires_grad_(False).eval()


def inputs(number: int, B: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    rng = torch.Generator().manual_seed(number)
    x, context = torch.randn(B, 4, 8, 6, generator=rng), torch.randn(B, 77, TINY.unet.context, generator=rng)
    return x, torch.full((B,), 100.0 * number + 1), Conditioning(context)


def hint(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(seed))


def changing_steps(unet, called: list, networks: list[ControlNet]) -> Iterator[torch.Tensor]:
    """Steps in which scale, mode, hints, x and t change; a control network is called by `called`."""
    changes = [
        ((0,), {}), ((0,), {"scale": 0.5}), ((0, 1), {}), ((1,), {"soft": True}), ((0,), {"soft": True, "guess": True}),
        ((), {}), ((0,), {"scale": 0.0}), ((1, 0), {"scale": 2.0}),
    ]  # fmt: skip
    hints = [hint(0), hint(1)]
    with torch.no_grad():
        for number, (chosen, how) in enumerate(changes, start=1):
            applied = [AppliedControl(called[i], networks[i].embed, hints[i], images=1, **how) for i in chosen]
            yield controlled(unet, applied)(*inputs(number))


def test_recorded_steps_follow_the_hints(unet):
    """Bit-identical to the plain networks; the U-Net is recorded with and without residuals, control for each batch."""
    plain = [control_network(0), control_network(1)]
    tapes = [Tape(), Tape(), Tape()]
    fast = [Recorded(network, tape) for network, tape in zip(plain, tapes, strict=False)]
    expected = list(changing_steps(unet, plain, plain))
    for out, right in zip(changing_steps(Recorded(unet, tapes[2]), fast, plain), expected, strict=True):
        assert torch.equal(out, right)
    assert [tape.recorded for tape in tapes] == [2, 1, 2]  # the first network also for one item, in guess mode
    for one, other in pairwise(expected):
        assert not torch.allclose(one, other)


@pytest.mark.parametrize("forgotten", ["residuals", "middle", "features"])
def test_a_recording_that_forgets_something_gives_something_else(unet, monkeypatch, forgotten):
    """What the test above and the check are for: each fails if what changes is not copied into the buffers."""
    plain = [control_network(0), control_network(1)]
    expected = list(changing_steps(unet, plain, plain))
    call = Recording.__call__

    def forgetful(self, given):
        x, t, conditioning, *more = given
        if forgotten == "features" and len(more) == 1:  # of a control network
            more = self.inputs[3:]
        if forgotten != "features" and len(more) == 2:  # of the U-Net
            more = self.inputs[3:] if forgotten == "residuals" else [more[0], self.inputs[4]]
        return call(self, (x, t, conditioning, *more))

    monkeypatch.setattr(Recording, "__call__", forgetful)
    fast = [Recorded(plain[0], Tape())] * 2  # one recording, called with the features of both hints
    called = [fast[0], fast[0]] if forgotten == "features" else plain
    expected = list(changing_steps(unet, [plain[0]] * 2, plain)) if forgotten == "features" else expected
    found = list(changing_steps(Recorded(unet, Tape()), called, plain))
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def trial(tmp_path) -> Models:
    return Models(Place("cpu", True, 1, tmp_path))


@pytest.mark.exhaustive
@torch.no_grad()
def test_the_check_of_recorded_steps(trial, monkeypatch):
    """It passes with right recordings, and finds stale ones and those that forget the residuals."""
    monkeypatch.setattr(controls, "Recorded", lambda network: Recorded(network, Tape()))
    assert CHECKS["controlled_is_plain"].function(trial) == "float32: bit-identical"

    monkeypatch.setattr(controls, "Recorded", lambda network: Recorded(network, Tape(stale=True)))
    with pytest.raises(Wrong, match=r"error .*, expected below"):
        CHECKS["controlled_is_plain"].function(trial)

    class WithoutResiduals(Recorded):
        def __call__(self, x, t, conditioning, *more):
            return super().__call__(x, t, conditioning, *(more if isinstance(self.plain, ControlNet) else ()))

    monkeypatch.setattr(controls, "Recorded", lambda network: WithoutResiduals(network, Tape()))
    with pytest.raises(Wrong, match=r"error .*, expected below"):
        CHECKS["controlled_is_plain"].function(trial)


@torch.no_grad()
def test_numbers_that_are_not_finite_are_found(trial, monkeypatch):
    monkeypatch.setattr(controls, "Recorded", lambda network: Recorded(network, Tape()))
    trial.reference(torch.float32).unet.norm_out.weight.fill_(torch.nan)
    with pytest.raises(Wrong, match="not finite"):
        CHECKS["controlled_is_plain"].function(trial)


@pytest.mark.exhaustive
@torch.no_grad()
def test_control_without_effect_is_found(trial, monkeypatch):
    """Checks that compare two equal things must not pass because neither is controlled."""
    make = controls.control_network

    def closed(*given):
        network = make(*given)
        for layer in (*network.zero, network.zero_mid):
            layer.weight.zero_()
        return network

    monkeypatch.setattr(controls, "control_network", closed)
    monkeypatch.setattr(controls, "Recorded", lambda network: Recorded(network, Tape()))
    with pytest.raises(Wrong, match="nothing is checked"):
        CHECKS["controlled_is_plain"].function(trial)
    with pytest.raises(Wrong, match=r"balanced: control changes 0\.00 levels"):
        CHECKS["controlled_close_to_the_cpu"].function(trial)


@torch.no_grad()
def test_controlled_images_that_differ_are_found(trial, monkeypatch):
    seen = []

    def images(models, device, dtype):
        seen.append(device)
        level = 9 if len(seen) % 2 else 0  # what is on the device differs
        return {
            kind: torch.full((1, 8, 8, 3), value + level).numpy() for kind, value in (("no control", 0), ("prompt", 50))
        }

    monkeypatch.setattr(controls, "images", images)
    for name, message in (("controlled_as_on_the_cpu", "up to 9 levels"), ("controlled_close_to_the_cpu", "9.00")):
        with pytest.raises(Wrong, match=message):
            CHECKS[name].function(trial)


# ------------------------------------------------------------------------------------------ the layout in memory


@pytest.mark.parametrize("guess", [False, True])
@torch.no_grad()
def test_residuals_keep_the_layout_of_the_network(guess):
    """Channels-last, in which convolutions are fastest, also with the zeros of guess mode and several hints."""
    network = control_network(0).to(memory_format=torch.channels_last)
    applied = AppliedControl(network, network.embed, torch.cat([hint(0), hint(1)]), soft=guess, guess=guess, images=2)
    x, t, conditioning = inputs(1, B=4)
    down, middle = applied(x.contiguous(memory_format=torch.channels_last), t, conditioning)
    assert all(residual.is_contiguous(memory_format=torch.channels_last) for residual in (*down, middle))
    assert all(residual.shape[0] == 4 for residual in down)
    assert not guess or not any(residual[:2].any() for residual in (*down, middle))
    assert applied._features.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_each_image_follows_its_own_hint():
    """Of two images with guidance, [uncond, uncond, cond, cond], each has the residuals of its hint alone."""
    network = control_network(0)
    x, t, conditioning = inputs(1, B=4)
    both = AppliedControl(network, network.embed, torch.cat([hint(0), hint(1)]), images=2)(x, t, conditioning)
    for image in range(2):
        rows = [image, 2 + image]
        alone = AppliedControl(network, network.embed, hint(image))(x[rows], t[rows], conditioning.of_images(rows))
        for residual, its in zip((*both.down, both.middle), (*alone.down, alone.middle), strict=True):
            assert torch.allclose(residual[rows], its, atol=1e-5)


# ------------------------------------------------------------------------------------------ the simulated device


@pytest.fixture(scope="module")
def device() -> SimulatedGpu:
    gc.collect()
    return SimulatedGpu()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm2"])
def test_no_controlled_step_waits(device, sampler):
    """Nor the first: the hint goes to the device before it. In each mode, and with hints that begin and end."""
    with device, warnings.catch_warnings():
        warnings.simplefilter("error")
        model = StableDiffusion(TINY, **networks(TINY))
        model._fast_unet = None  # every operation of every step is looked at
        with torch.device("meta"):
            control = ControlNet(ControlConfig.of(TINY.unet, name="lines"))
        for module in control.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                weight = torch.empty(parameter.shape, dtype=torch.float16, device="cuda")
                setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        model.add_control(control)
        lines = Image.new("L", (40, 72), 255)
        for how in ({}, {"mode": "prompt"}, {"mode": "control"}, {"start": 0.5}, {"end": 0.5}):
            request = TextToImage(
                ["a house", "a cat"],
                SamplingParams(height=72, width=40, steps=4, seed=3, sampler=sampler),
                controls=[Control("lines", lines, **how)],
            )
            run = model.prepare(request)
            draws = SAMPLERS[sampler].draws(run.params.options)
            for i in range(len(run)):
                uploads = device.uploads
                with device.no_waiting():
                    next(run)
                assert device.uploads - uploads <= int(draws), (how, i)


@torch.no_grad()
def test_nested_controls_add_up(unet):
    """Two controls around a recording, one within the other, are their sum in one step."""
    plain = [control_network(0), control_network(1)]
    recorded = Recorded(unet, Tape())
    given = inputs(1)
    nested = with_control(with_control(recorded, plain[0], hint(0), 0.5), plain[1], hint(1))(*given)
    first = AppliedControl(plain[0], plain[0].embed, hint(0), 0.5)(*given)
    second = AppliedControl(plain[1], plain[1].embed, hint(1))(*given)
    down = [a + b for a, b in zip(first.down, second.down, strict=True)]
    assert torch.allclose(nested, unet(*given, down, first.middle + second.middle), atol=1e-5)
