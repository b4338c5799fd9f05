"""The checks of `bench.py --check`, each as a test: on a GPU at full size, on a CPU as a trial with small networks.

That each check finds what it is for is tested with what it checks broken; stand-ins record and compile.
"""

from __future__ import annotations

import pytest
import torch

from scripts.benchmark.gpu import controls, images, networks, others, plan  # noqa: F401 (they register their checks)
from scripts.benchmark.gpu.items import CHECKS, Wrong
from scripts.benchmark.gpu.models import Models, Place, error
from scripts.benchmark.gpu.table import PROGRAMS, Row, without_peer
from sd.noise import Philox
from sd.runtime import packing
from sd.runtime.cuda_graphs import Recorded

BY_PYTEST = "others"  # the part that runs the tests of the suite themselves
SLOW = {  # seconds on a CPU, where each compares it with itself
    "low_memory", "same_as_on_the_cpu", "close_to_the_cpu", "controlled_as_on_the_cpu", "controlled_close_to_the_cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def models(request, tmp_path_factory) -> Models:
    return Models(Place(request.param, request.param == "cpu", 1, tmp_path_factory.mktemp("checks")))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name in SLOW else ()) for name in CHECKS]
)
def test_checks(models, name):
    check = CHECKS[name]
    reason = check.needs() or ("needs CUDA" if check.cuda and not models.place.cuda else None)
    if reason or check.part == BY_PYTEST:
        pytest.skip(reason or "runs pytest")
    assert check.function(models)


@pytest.fixture
def trial(tmp_path, monkeypatch) -> Models:
    """As on a GPU, weights are plain."""
    monkeypatch.setattr(packing, "onednn_dtypes", frozenset)
    return Models(Place("cpu", True, 1, tmp_path))


def test_all_the_parts_of_a_gpu_are_in_the_plan(tmp_path):
    """Each check once, in one of the parts."""
    parts = plan.all_parts(Place("cuda", False, 1, tmp_path))
    asked = [item.ask for part in parts for item in part.items if item.row is None]
    assert sorted(asked) == sorted(CHECKS)
    rows = [item.row for part in parts for item in part.items if item.row is not None]
    assert len(set(rows)) == len(rows)
    assert {(row.program, row.images) for row in rows if row.what == "steps"} == {
        (program, images) for program in ("ours", "diffusers") for images in (1, 4, 16)
    }


@pytest.mark.parametrize("network", ["text_encoder", "vae", "unet"])
def test_a_network_that_computes_something_else_is_found(trial, network):
    model = trial.reference(torch.float32)
    layer = {
        "text_encoder": lambda: model.text_encoder.norm,
        "vae": lambda: model.vae.decoder.norm_out,
        "unet": lambda: model.unet.norm_out,
    }[network]()
    layer.weight.mul_(1.001)
    with pytest.raises(Wrong, match=r"error .* in float32, expected below 1e-04"):
        CHECKS["parity_float32"].function(trial)


def test_a_tiny_autoencoder_that_computes_something_else_is_found(trial, monkeypatch):
    tiny_vae = trial.tiny_vae

    def other(dtype):
        vae = tiny_vae(dtype)
        vae.decoder.conv_out.weight.mul_(1.001)
        return vae

    monkeypatch.setattr(trial, "tiny_vae", other)
    with pytest.raises(Wrong, match=r"decoder: error .* in float32, expected below 1e-04"):
        CHECKS["parity_taesd"].function(trial)


@pytest.mark.parametrize("program", ["ours", pytest.param("diffusers", marks=pytest.mark.exhaustive)])
@torch.no_grad()
def test_images_of_few_steps_are_measured(tmp_path, program):
    """Each decodes with its own autoencoder; the warm-up has fewer steps."""
    if program == "diffusers" and (reason := without_peer()):
        pytest.skip(reason)
    timer = PROGRAMS[program](Place("cpu", True, 1, tmp_path))
    calls = {"vae": 0, "tiny": 0, "unet": 0}
    watched = {"vae": timer.networks["vae"], "tiny": timer.tiny["vae"], "unet": timer.networks["unet"]}
    for name, network in watched.items():
        plain = getattr(network, "model", network)
        counted = plain if name == "unet" else plain.decoder
        counted.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    expected = {"image, LCM": (2, 0, 2 + 4), "image, LCM and TAESD": (0, 2, 2 + 4), "TAESD decoder": (0, 2, 0)}
    for what, counts in expected.items():
        calls.update(dict.fromkeys(calls, 0))
        assert timer.do(Row(what, 1, program, "eager"))["seconds"] > 0
        assert tuple(calls.values()) == counts, what


def test_numbers_that_are_not_finite_are_found(trial):
    trial.reference(torch.float16).vae.decoder.norm_out.weight.fill_(torch.inf)
    with pytest.raises(Wrong, match="decoder: not finite in float16"):
        CHECKS["parity_float16"].function(trial)


def test_steps_that_go_elsewhere_are_found(trial):
    trial.reference(torch.float32).unet.conv_out.weight.mul_(1.1)
    with pytest.raises(Wrong, match=r"error .*, expected below 5e-02"):
        CHECKS["default_steps"].function(trial)


def test_an_image_that_depends_on_its_batch_is_found(trial):
    model = trial.reference(torch.float32)
    plain = model.unet.forward
    model.unet.forward = lambda x, t, c: plain(x, t, c) + (0.1 * len(x) if len(x) > 4 else 0)
    with pytest.raises(Wrong, match="of the latents"):
        CHECKS["batch_is_single"].function(trial)
    model.unet.forward = lambda x, t, c: plain(x, t, c) + 1e-6 * torch.rand(1)
    with pytest.raises(Wrong, match="exact: not bit-identical"):
        CHECKS["batch_is_single"].function(trial)


class Tape:
    """Stands in for CUDA graphs; `stale` ones give the first result for ever."""

    def __init__(self, stale: bool = False, refuses: bool = False) -> None:
        self.stale, self.refuses = stale, refuses

    def __call__(self, run, device):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = run()
        return (lambda: None if self.stale else out.copy_(run())), out


def test_recordings_that_are_stale_or_refused_are_found(trial, monkeypatch):
    for tape, message in ((Tape(), None), (Tape(stale=True), "error "), (Tape(refuses=True), "cannot be recorded")):
        monkeypatch.setattr(images, "Recorded", lambda unet, tape=tape: Recorded(unet, tape))
        if message is None:
            assert CHECKS["recorded_is_plain"].function(trial) == "float32: bit-identical"
            continue
        with pytest.raises((Wrong, UserWarning), match=message):
            CHECKS["recorded_is_plain"].function(trial)


@pytest.mark.parametrize("broken", ["add_lora", "remove_lora"])
def test_a_lora_without_effect_or_that_stays_is_found(trial, monkeypatch, broken):
    monkeypatch.setattr(type(trial.reference(torch.float32)), broken, lambda *_: None)
    with pytest.raises(Wrong, match="no effect" if broken == "add_lora" else "after the LoRA was removed"):
        CHECKS["lora_after_recording"].function(trial)


def test_a_recording_that_does_not_see_the_lora_is_found(trial, monkeypatch):
    monkeypatch.setattr("sd.runtime.cuda_graphs._look", lambda network: (False, []))
    monkeypatch.setattr(Place, "cuda", True)
    monkeypatch.setattr(images, "Recorded", lambda unet: Recorded(unet, Tape(stale=True)))
    with pytest.raises(Wrong, match="the LoRA has no effect"):
        CHECKS["lora_after_recording"].function(trial)


def test_threads_that_disturb_each_other_are_found(trial):
    """A network with a buffer that all calls share."""
    model = trial.reference(torch.float32)
    plain, calls = model.unet.forward, []

    def shared(x, t, conditioning):
        calls.append(1)
        return plain(x, t, conditioning) + (0.1 if len(calls) > 30 else 0)

    model.unet.forward = shared
    with pytest.raises(Wrong, match="of the latents"):
        CHECKS["threads"].function(trial)


def test_compiled_steps_whose_result_is_overwritten_are_found(trial, monkeypatch):
    class Overwriting:
        """As CUDA graphs do: one memory for all results."""

        def __init__(self, network):
            self.network, self.out = network, None

        def __call__(self, *given):
            out = self.network(*given)
            self.out = out if self.out is None else self.out.copy_(out)
            return self.out

    monkeypatch.setattr(images, "Compiled", Overwriting)
    with pytest.raises(Wrong, match="error"):
        CHECKS["compiled_is_plain"].function(trial)
    monkeypatch.setattr(images, "Compiled", lambda network: network)
    assert CHECKS["compiled_is_plain"].function(trial) == "float32: bit-identical"


def test_waiting_is_found(trial, monkeypatch):
    """The stand-in raises an error in the step after that in which waiting became one."""
    watched = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", watched.append)
    monkeypatch.setattr(images, "SAMPLERS", {"ddim": None})
    assert CHECKS["no_waiting"].function(trial) == "1 samplers"
    assert watched == ["error"] * 4 + ["default"]
    predict = type(trial.embedded()).predict

    def waits(model, *given):
        if watched and watched[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return predict(model, *given)

    monkeypatch.setattr(type(trial.embedded()), "predict", waits)
    with pytest.raises(Wrong, match=r"these wait: ddim \(called a synchronizing"):
        CHECKS["no_waiting"].function(trial)
    assert watched[-1] == "default"


@pytest.mark.parametrize("peak", [2.5e9, 2.7e9])
def test_too_much_memory_is_found(trial, monkeypatch, peak):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * peak)
    if peak > images.PEAK:
        with pytest.raises(Wrong, match=r"2\.70 GB of tensors, 5\.40 GB reserved"):
            CHECKS["peak_memory"].function(trial)
    else:
        assert CHECKS["peak_memory"].function(trial) == "2.50 GB of tensors, 5.00 GB reserved"


@pytest.mark.parametrize("right", [True, False])
def test_other_random_numbers_are_found(trial, monkeypatch, right):
    theirs = Philox(42 if right else 43)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: None)
    monkeypatch.setattr(torch, "randn", lambda shape, device: theirs(shape))
    if right:
        assert CHECKS["random_numbers"].function(trial)
    else:
        with pytest.raises(Wrong, match="they differ"):
            CHECKS["random_numbers"].function(trial)


def test_images_that_differ_are_found(trial, monkeypatch):
    """A model on the device that is another one than the CPU's."""
    monkeypatch.setattr(images, "tasks", lambda model: {"text to image": images.pixels([model])})
    one, other = torch.zeros(8, 8, 3).byte().numpy(), torch.full((8, 8, 3), 9).byte().numpy()
    monkeypatch.setattr(Models, "embedded", lambda self, device=None, **_: one if device == "cpu" else other)
    for name in ("same_as_on_the_cpu", "close_to_the_cpu"):
        with pytest.raises(Wrong, match="9"):
            CHECKS[name].function(trial)


def test_the_error_is_relative():
    assert error(torch.ones(2), torch.ones(2)) == 0
    assert error(torch.full((2,), 3.0), torch.full((2,), 2.0)) == pytest.approx(0.5)
