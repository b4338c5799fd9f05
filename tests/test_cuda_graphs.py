"""Recorded steps: what is played back is what the network would have given, and nobody who looks inside is misled.

On CPUs a stand-in records; for the CUDA graphs themselves see test_gpu.py.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from common import TINY, TINY_INPAINT, error, tiny_state
from conftest import loaded
from PIL import Image
from test_lora import SCHEMES, lora_file, saved
from torch.utils._python_dispatch import TorchDispatchMode

from sd.conditioning import Conditioning
from sd.config import UNetConfig
from sd.models.unet import UNet
from sd.pipeline import StableDiffusion
from sd.runtime import packing
from sd.runtime.cuda_graphs import KINDS, SIZES, Compiled, Recorded, cuda_graph
from sd.runtime.optimize import optimize
from sd.samplers import SAMPLERS


@pytest.fixture(autouse=True)
def weights_stay_plain(monkeypatch):
    """As on a GPU: no layouts of oneDNN, which have no address."""
    monkeypatch.setattr(packing, "onednn_dtypes", frozenset)


class Tape:
    """Stands in for CUDA graphs: plays a run back into the memory that holds its result."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, run, device):
        self.recorded += 1
        out = run()

        def replay():
            self.played += 1
            out.copy_(run())

        out_of_date = out.clone().fill_(torch.nan)
        out.copy_(out_of_date)  # a recording does not compute anything
        return replay, out


@pytest.fixture(scope="module")
def models() -> list[StableDiffusion]:
    """Models of 4 and of 9 channels, of this module: other tests leave hooks in the shared ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "onednn_dtypes", frozenset)  # this comes before `weights_stay_plain`
        return [
            StableDiffusion(config, **loaded(tiny_state(name), config))
            for name, config in (("tiny-v1", TINY), ("tiny-v1-inpainting", TINY_INPAINT))
        ]


@pytest.fixture
def unet(models) -> UNet:
    """A network that a test may change."""
    return copy.deepcopy(models[0].unet)


def inputs(seed: int, size: int = 8, B: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    rng = torch.Generator().manual_seed(seed)
    x, context = torch.randn(B, 4, size, size, generator=rng), torch.randn(B, 77, 64, generator=rng)
    return x, torch.full((B,), 100.0 * seed), Conditioning(context)


def test_played_back_is_what_the_network_gives(unet):
    tape = Tape()
    steps = Recorded(unet, tape)
    found = [steps(*inputs(seed)) for seed in range(4)]
    for seed, out in enumerate(found):  # none has been written over by those after it
        assert torch.equal(out, unet(*inputs(seed)))
    assert (tape.recorded, tape.played) == (1, 4)


def test_a_few_sizes_are_kept(unet):
    tape = Tape()
    steps = Recorded(unet, tape)
    for size in (8, 9, 8, 9, 8):
        assert torch.equal(steps(*inputs(1, size)), unet(*inputs(1, size)))
    assert tape.recorded == 2 == SIZES
    steps(*inputs(1, 10))  # in the place of 9, which was longest ago
    steps(*inputs(1, 8))
    assert tape.recorded == 3
    steps(*inputs(1, 9))
    assert tape.recorded == 4 and len(steps._recordings) == SIZES


def test_all_kinds_of_steps_of_a_size_are_kept(unet):
    """With guidance and without, with residuals and without: a second image records none of them anew."""
    tape = Tape()
    steps = Recorded(unet, tape)
    for _ in range(2):
        for batch in (2, 1):
            given = inputs(1, B=batch)
            down = [torch.ones_like(skip) for skip in unet.contract(*unet.begin(*given))]
            middle = torch.ones_like(down[-1])
            assert torch.equal(steps(*given), unet(*given))
            assert torch.equal(steps(*given, down, middle), unet(*given, down, middle))
    assert tape.recorded == KINDS == len(steps._recordings)


def test_other_batches_and_precisions_are_other_recordings(unet):
    tape = Tape()
    steps = Recorded(unet, tape)
    steps(*inputs(1, B=2))
    assert steps(*inputs(1, B=1)).shape[0] == 1
    x, t, context = inputs(1)
    unet.double()
    assert steps(x.double(), t, context.to(dtype=torch.float64)).dtype == torch.float64
    assert tape.recorded == 3


def test_weights_that_lie_elsewhere_are_recorded_anew(tmp_path):
    tape = Tape()
    sd = StableDiffusion(TINY, **loaded(tiny_state(), TINY))
    steps = Recorded(sd.unet, tape)
    before = steps(*inputs(1))
    with torch.no_grad():  # in place: the recording reads what is there now
        sd.unet.conv_out.bias.add_(1)
    assert torch.equal(steps(*inputs(1)), sd.unet(*inputs(1))) and tape.recorded == 1
    with torch.no_grad():
        sd.unet.conv_out.bias.sub_(1)
    sd.add_lora(saved(tmp_path, lora_file(next(iter(SCHEMES)))[0]), 0.1)
    changed = steps(*inputs(1))
    assert torch.equal(changed, sd.unet(*inputs(1))) and error(changed, before) > 1e-3
    assert tape.recorded == 2
    sd.remove_lora()
    assert error(steps(*inputs(1)), before) < 1e-6 and tape.recorded == 3
    sd.unet.mid.res[0] = copy.deepcopy(sd.unet.mid.res[0])
    steps(*inputs(1))
    assert tape.recorded == 4


@pytest.mark.parametrize("kind", ["hook", "hook before", "hook of all modules", "forward"])
def test_whoever_looks_inside_sees_every_step(unet, kind):
    tape, seen = Tape(), []
    steps = Recorded(unet, tape)
    steps(*inputs(1))
    block = unet.mid.attn
    look = {
        "hook": lambda: block.register_forward_hook(lambda *_: seen.append(1)),
        "hook before": lambda: block.register_forward_pre_hook(lambda *_: seen.append(1)),
        "hook of all modules": lambda: torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(1) if module is block else None
        ),
    }
    if kind == "forward":
        block.forward = lambda x, context: seen.append(1) or type(block).forward(block, x, context)
    else:
        handle = look[kind]()
    for _ in range(3):
        steps(*inputs(1))
    assert len(seen) == 3 and not steps._recordings
    if kind == "forward":
        del block.forward
    else:
        handle.remove()
    steps(*inputs(1))
    assert len(seen) == 3 and tape.recorded == 2


def test_everything_of_a_conditioning_is_played_back():
    """Maps behind x's channels are copied into the recording as the context is; with and without are two recordings."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=(32,), heads=(1,), depth=(1,), blocks=1, context=8, in_channels=9, vector=12))
    tape = Tape()
    steps = Recorded(unet.requires_grad_(False), tape)
    for seed in range(3):
        x, t, _ = inputs(seed)
        cond = Conditioning(torch.randn(2, 7, 8), torch.randn(2, 12), torch.randn(2, 5, 8, 8))
        assert torch.equal(steps(x, t, cond), unet(x, t, cond))
        whole, plain = torch.cat([x, cond.concat], 1), cond._replace(concat=None)
        assert torch.equal(steps(whole, t, plain), unet(whole, t, plain))
    assert tape.recorded == 2


def test_gradients_are_as_ever(unet):
    tape = Tape()
    steps = Recorded(unet, tape)
    x, t, context = inputs(1)
    with torch.enable_grad():
        steps(x.requires_grad_(), t, context).sum().backward()
    assert x.grad is not None and tape.recorded == 0
    with torch.autocast("cpu", torch.bfloat16):
        steps(x, t, context)
    assert tape.recorded == 0


def test_where_nothing_can_be_recorded_it_is_said_once(unet):
    tried = []

    def broken(run, device):
        tried.append(1)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    steps = Recorded(unet, broken)
    with pytest.warns(UserWarning, match="cannot be recorded, so .*: CUDA error: operation .* capturing$"):
        first = steps(*inputs(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(steps(*inputs(1)), first)
    assert torch.equal(first, unet(*inputs(1))) and len(tried) == 1


def test_recordings_go_with_their_owner(unet):
    steps = Recorded(unet, Tape())
    steps(*inputs(1))
    (recording,) = steps._recordings.values()
    memory = weakref.ref(recording.inputs[0])
    del steps, recording
    gc.collect()
    assert memory() is None


def test_a_copy_records_for_itself(unet):
    steps = Recorded(unet, Tape())
    steps(*inputs(1))
    other = copy.deepcopy(steps)
    assert other._network is not unet and not other._recordings
    other._network.conv_out.bias.add_(1)
    assert torch.equal(steps(*inputs(1)), unet(*inputs(1)))
    assert error(other(*inputs(1)), unet(*inputs(1)) + 1) < 1e-5


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_within_inference_mode_and_without(unet, first):
    """Tensors that are made within it could not be written to afterwards."""
    tape, expected = Tape(), [unet(*inputs(seed)) for seed in range(4)]
    steps = Recorded(unet, tape)
    for seed, mode in enumerate((first, torch.no_grad, torch.inference_mode, torch.no_grad)):
        with mode():
            assert torch.equal(steps(*inputs(seed)), expected[seed])
    assert tape.recorded == 1


def test_threads_take_turns(unet):
    """One must not write its inputs while another plays back."""
    expected = [unet(*inputs(seed)) for seed in range(8)]

    class Slow(Tape):
        def __call__(self, run, device):
            replay, out = super().__call__(run, device)
            return lambda: time.sleep(0.01) or replay(), out

    steps = torch.no_grad()(Recorded(unet, Slow()))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda seed: steps(*inputs(seed)), range(8))
        assert all(torch.equal(out, other) for out, other in zip(found, expected, strict=True))


def test_a_graph_is_recorded_on_a_stream_of_its_device(monkeypatch):
    """(By stand-ins, as there may be no GPU.) Two runs before on the same stream; whoever plays it back, there."""
    log = []

    class Place:
        """A context that is written down; streams wait for each other."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self):
            log.append(f"into {self.name}")

        def __exit__(self, *_):
            log.append(f"out of {self.name}")

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    here, aside = Place("here"), Place("aside")
    for name, stand_in in {
        "device": lambda device: Place(str(device)),
        "current_stream": lambda: here,
        "Stream": lambda: aside,
        "stream": lambda stream: stream,
        "CUDAGraph": Graph,
        "graph": lambda graph, stream, capture_error_mode: Place(f"recording on {stream.name}, {capture_error_mode}"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    out = torch.ones(1)
    replay, found = cuda_graph(lambda: log.append("run") or out, torch.device("cuda", 1))
    assert found is out
    assert log == [
        *["into cuda:1", "aside waits for here", "into aside", "run", "run", "out of aside", "here waits for aside"],
        *["into recording on aside, thread_local", "run", "out of recording on aside, thread_local", "out of cuda:1"],
    ]
    log.clear()
    replay()
    assert log == ["into cuda:1", "replay", "out of cuda:1"]


def task(sd, name):
    settings = {"height": 64, "width": 64, "steps": 2, "seed": 3, "sampler": "heun"}
    photo, mask = Image.linear_gradient("L").convert("RGB").resize((64, 64)), Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 30, 64))
    return {
        "txt2img": lambda: sd.txt2img("a cat", n=2, **settings),
        "img2img": lambda: sd.img2img("a cat", photo, strength=0.9, **settings),
        "inpaint": lambda: sd.inpaint("a cat", photo, mask, **settings),
    }[name]()


@pytest.mark.parametrize("name", ["txt2img", "img2img", "inpaint"])
@pytest.mark.parametrize(
    "config", [TINY, pytest.param(TINY_INPAINT, marks=pytest.mark.exhaustive)], ids=lambda config: config.name
)
def test_tasks_play_back_and_so_do_loops_of_your_own(config, name):
    state = tiny_state("tiny-v1" if config is TINY else "tiny-v1-inpainting")
    sd, tape = StableDiffusion(config, **loaded(state, config)), Tape()
    assert sd._fast_unet is None  # on a CPU nothing is recorded
    expected = [image.tobytes() for image in task(sd, name)]
    sd._fast_unet = Recorded(sd.unet, tape)
    assert [image.tobytes() for image in task(sd, name)] == expected
    assert tape.recorded == 1 and tape.played >= 1
    before = tape.recorded + tape.played
    context = sd.encode_prompt(["a"])
    concat = sd.blank_concat((4, 8, 8)) if sd.is_inpainting else None
    sd.denoiser(context, context, 2.0, concat)(inputs(1, B=1)[0], sd.schedule.level(500))
    assert tape.recorded + tape.played > before


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would make the program wait for the device: a number of a tensor, asked for by Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        assert func.overloadpacket not in waits, func
        return func(*args, **(kwargs or {}))


# one of each kind: without and with memory, with a corrector, with noise between two levels
USUAL = {"ddim", "dpmpp_2m", "unipc", "dpmpp_sde"}
assert set(SAMPLERS) > USUAL


@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive) for name in SAMPLERS]
)
def test_no_step_waits_for_the_device(models, sampler):
    """With guidance, noise, a mask: nothing between the first step and the last asks for a result."""
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        bool(torch.ones(1) > 0)

    def watching(steps):
        with NoWaiting():
            yield from steps

    settings = {"height": 64, "width": 64, "steps": 3, "seed": 3, "sampler": sampler, "progress": watching}
    photo, mask = Image.new("RGB", (64, 64)), Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 30, 64))
    models[0].txt2img("a cat", n=2, **settings)
    for sd in models:
        sd.inpaint("a cat", photo, mask, strength=0.9, **settings)


@pytest.mark.exhaustive
def test_compiled_is_one_graph(monkeypatch):
    """Whatever Python decides is decided in compiling. (Backend "eager": what is tested needs no compiler.)"""
    options = []
    plain = torch.compile

    def compile(network, **chosen):
        options.append(chosen)
        return plain(network, backend="eager", fullgraph=True)

    sd = StableDiffusion(TINY, **loaded(tiny_state(), TINY))
    optimize(sd.unet)
    expected, images = sd.unet(*inputs(1, 24)), task(sd, "img2img")
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(packing, "onednn_dtypes", lambda: frozenset({torch.float32}))  # but not for this network
    sd._fast_unet = Compiled(sd.unet)
    assert type(sd.unet.conv_in) is torch.nn.Conv2d
    assert error(sd._fast_unet(*inputs(1, 24)), expected) < 1e-5
    assert [image.size for image in task(sd, "img2img")] == [image.size for image in images]
    assert options == [{"dynamic": False, "mode": None}]


@pytest.mark.exhaustive
def test_a_copy_compiles_its_own_network(unet, monkeypatch):
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: plain(network, backend="eager"))
    steps = Compiled(unet)
    expected = steps(*inputs(1))
    other = copy.deepcopy(steps)
    with torch.no_grad():
        other._network.conv_out.bias.add_(1)
    assert error(other(*inputs(1)), expected + 1) < 1e-5 and error(steps(*inputs(1)), expected) < 1e-5


def test_results_of_compiled_steps_are_kept(unet, monkeypatch):
    """Where the compiled network replays CUDA graphs, all its results are in one memory."""
    memory = torch.empty(2, 4, 8, 8)
    monkeypatch.setattr(torch, "compile", lambda network, **_: lambda *given: memory.copy_(network(*given)))
    steps = Compiled(unet)
    found = [steps(*inputs(seed)) for seed in range(2)]
    assert all(torch.equal(out, unet(*inputs(seed))) for seed, out in enumerate(found))


def test_memory_of_a_recording_is_freed_when_no_replay_uses_it(unet):
    """Another stream may still be replaying the one that is dropped."""
    log = []

    class Event:
        def synchronize(self):
            log.append(len(steps._recordings))

    steps = Recorded(unet, Tape())
    for size in (8, 9):
        steps(*inputs(1, size))
    assert log == []
    steps._done = Event()
    steps(*inputs(1, 8))
    assert log == []
    steps._done = Event()
    steps(*inputs(1, 10))
    assert log == [2]
    steps._done = Event()
    unet.conv_out.weight.data = unet.conv_out.weight.data.clone()
    steps(*inputs(1, 10))
    assert log == [2, 2]

    def broken(run, device):
        raise RuntimeError("out of memory")

    steps._done, steps._record = Event(), broken
    with pytest.warns(UserWarning, match="cannot be recorded"):
        steps(*inputs(1, 8))
    assert log == [2, 2, 1] and not steps._recordings


def test_a_part_is_seen_when_it_is_complete(unet):
    """Several threads may ask for it: none may get the whole network in its place."""
    for steps in (Recorded(unet, Tape()), Compiled(unet)):
        seen = []

        def part(network, steps=steps, seen=seen):
            seen.append(list(steps._parts))
            return network.conv_in

        assert steps.part(part).plain is unet.conv_in and steps.part(part) is steps.part(part)
        assert seen == [[]]


@pytest.mark.exhaustive
def test_what_cannot_be_compiled_is_said_in_a_line(unet, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no compiler\nfound")

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: plain(network, backend=no_compiler))
    with pytest.raises(ValueError, match=r"^the U-Net cannot be compiled here: .*no compiler; load it without .*$"):
        Compiled(unet)(*inputs(1))


def test_compiling_is_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr("sd.pipeline.Compiled", lambda unet: made.append(unet) or unet)
    sd = StableDiffusion.load(device="cpu", compile=True)
    sd.txt2img("a house", steps=1)
    assert made == [sd.unet] and sd._fast_unet is sd.unet
    with pytest.raises(ValueError, match="do not go together"):
        StableDiffusion.load(device="cpu", compile=True, low_memory=True)


def test_compiling_for_a_cpu_whose_own_kernels_are_faster_is_advised_against(monkeypatch):
    monkeypatch.setattr(packing, "onednn_dtypes", lambda: frozenset({torch.float32}))
    with pytest.warns(UserWarning, match="slower on this processor"):
        StableDiffusion.load(device="cpu", dtype="float32", compile=True)
