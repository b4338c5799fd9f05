"""The simulated device refuses what a GPU refuses, and counts what a GPU would: each fault is planted here."""

from __future__ import annotations

import gc
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from simulated_device import SimulatedGpu, Waited

from sd.noise import to_device


@pytest.fixture
def gpu():
    with SimulatedGpu() as gpu:
        yield gpu


def here(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_tensors_say_where_they_are(gpu):
    x, nowhere, cpu = here(2, 3), torch.empty(2, 3, device="meta"), torch.ones(2, 3)
    assert x.device == torch.device("cuda", 0) and x.is_cuda and not x.is_meta
    assert nowhere.device.type == "meta" and nowhere.is_meta and not nowhere.is_cuda
    assert cpu.device.type == "cpu" and torch.equal(cpu + 1, torch.full((2, 3), 2.0))
    for made in (x + 1, x[0], x.T.contiguous(), torch.zeros_like(x), x.half()):
        assert made.device == x.device
    assert torch.empty_like(nowhere, device="cuda").is_cuda and (nowhere + 1).is_meta
    assert cpu.to("cuda").is_cuda and cpu.cuda().is_cuda and torch.arange(3, device=x.device).is_cuda


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + torch.ones(2, 3),
        lambda x: torch.cat([x, torch.ones(2, 3)]),
        lambda x: F.linear(x, torch.ones(4, 3)),
        lambda x: x.add_(torch.ones(3)),
        lambda x: torch.lerp(torch.ones(2, 3), x, 0.5),
        lambda x: x + torch.empty(2, 3, device="meta"),  # a weight that was never loaded
        lambda x: F.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 2, 3)),
        lambda x: torch.randn(2, 3, generator=torch.Generator("cpu"), device="cuda"),
        lambda x: x.pin_memory(),
    ],
)
def test_other_devices_are_refused(gpu, fault):
    with pytest.raises(RuntimeError, match=r"same device|on one device|generator|pin"):
        fault(here(2, 3))


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x @ x.half().T,
        lambda x: F.linear(x, here(4, 3).half()),
        lambda x: F.linear(x.half(), here(4, 3).half(), here(4)),
        lambda x: F.layer_norm(x.half(), (3,), here(3), here(3)),
        lambda x: F.conv2d(here(1, 4, 8, 8).half(), here(4, 4, 3, 3)),
        lambda x: F.group_norm(here(1, 4, 8, 8).half(), 2, here(4), here(4)),
        lambda x: F.scaled_dot_product_attention(here(1, 1, 2, 8), here(1, 1, 2, 8).half(), here(1, 1, 2, 8)),
    ],
)
def test_mixed_precisions_are_refused(gpu, fault):
    with pytest.raises(RuntimeError, match=r"one precision|dtype|same"):
        fault(here(2, 3))


WAITS = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if x.isfinite().all() else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu", non_blocking=True),
    "copied to the CPU": lambda x: torch.empty(2, 3).copy_(x),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "masked": lambda x: x[x > 0],
    "masked, written": lambda x: x.__setitem__(x > 0, 1.0),
    "indices of Python": lambda x: x[[0, 1]],
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "numbers of Python": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "as_tensor": lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
    "from the CPU": lambda x: torch.ones(2, 3).to("cuda"),
    "from the CPU, not pinned": lambda x: torch.ones(2, 3).to("cuda", non_blocking=True),
    "pinned, but blocking": lambda x: torch.ones(2, 3).pin_memory().to("cuda"),
    "copied from the CPU": lambda x: x.copy_(torch.ones(2, 3)),
    "where": lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_listed_and_refused_within_a_loop(gpu, name):
    x = here(2, 3)
    with gpu.no_waiting(), pytest.raises(Waited):
        WAITS[name](x)
    assert not gpu.waits
    with suppress(NotImplementedError):  # where a shape depends on data
        WAITS[name](x)
    assert gpu.waits


def test_what_does_not_wait_is_allowed(gpu):
    x = here(2, 3)
    with gpu.no_waiting():
        for made in (
            x * 0.5 + torch.tensor(2.0),  # a number of the CPU is an argument of the kernel
            torch.where(x > 0, x, 1.0),
            torch.full((2,), 3.0, device=x.device),
            torch.arange(2, device=x.device),
            x.masked_fill(x > 0, 0.0),
            x[:, 1:][0],
            x[torch.arange(2, device=x.device)],
            to_device(torch.ones(2, 3), x.device),
        ):
            assert made.is_cuda
    assert (gpu.scalars, gpu.uploads, gpu.waits) == (1, 1, [])


def test_what_comes_back(gpu):
    x = here(2, 3)
    assert torch.equal(x.cpu(), torch.zeros(2, 3)) and x.sum().item() == 0 and x.tolist() == [[0.0] * 3] * 2
    assert bool(x.isfinite().all()) and torch.equal(x, x + 1)
    gpu.answer = lambda: False
    assert not x.isfinite().all()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert x.cpu().numpy().shape == (2, 3)


def test_memory_is_that_of_live_storages(gpu):
    with gpu.phase() as peak:
        x = here(1000)  # 4,000 bytes
        assert gpu.live == 4096
        views = x[:10], x.view(10, 100), x.detach(), x.expand(5, 1000)
        x += 1
        assert gpu.live == 4096
        y = x + 1
        assert gpu.live == 2 * 4096 and gpu.count((1000,)) == 2 and gpu.count((1000,), torch.float16) == 0
        del x, y
        assert gpu.live == 4096 and views[0].is_cuda  # a view holds it
        del views
    assert gpu.live == 0 and peak() == gpu.peak == 2 * 4096
    with gpu.phase() as peak:
        torch.ones(1)
        assert peak() == 0
        here(100).sum()
    assert peak() == 512 + 512 and gpu.peak == 2 * 4096


def test_memory_that_kernels_use_for_a_moment(gpu):
    """Copies from one layout into the other, and no matrix of scores."""
    plain, size = here(1, 32, 64, 64), 4 * 32 * 64 * 64
    kernel = here(32, 32, 3, 3).contiguous(memory_format=torch.channels_last)
    before = gpu.live
    with gpu.phase() as peak:
        last = F.conv2d(plain, kernel, padding=1)
    assert last.is_contiguous(memory_format=torch.channels_last) and peak() == before + 2 * size
    before = gpu.live
    with gpu.phase() as peak:
        F.conv2d(last, kernel, padding=1)
    assert peak() == before + size
    with gpu.phase() as peak:
        normed = F.group_norm(last, 4)
    assert normed.is_contiguous() and before + 2 * size <= peak() < before + 2 * size + 10_000
    del plain, kernel, last, normed
    q = here(2, 8, 4096, 40, dtype=torch.float16)
    with gpu.phase() as peak:
        out = F.scaled_dot_product_attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous() and peak() < 2.5 * gpu.live / 2


def capture(gpu, run):
    """Record a run on a stream of its own, as torch.cuda.graph does."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = run()
    return graph, out


@pytest.mark.parametrize(
    "name", [name for name in WAITS if name != "where"] + ["number", "work", "made", "random", "pinning"]
)
def test_a_recording_refuses_what_it_cannot_hold(gpu, name):
    x, rng = here(2, 3), torch.Generator("cpu")
    faults = WAITS | {
        "number": lambda x: x + torch.tensor(1.0),  # would be the same in each replay
        "work": lambda x: torch.ones(3) + 1,  # is left out of the replay
        "made": lambda x: torch.zeros(3),
        "random": lambda x: x.normal_(generator=rng),
        "pinning": lambda x: torch.ones(3).pin_memory(),
    }
    with pytest.raises(RuntimeError):
        capture(gpu, lambda: faults[name](x))
    graph, _ = capture(gpu, lambda: x + 1)  # and another one can be made
    assert graph.operations == ["aten.add [(2, 3)]"]


def test_a_recording_is_made_on_a_stream_of_its_own_and_alone(gpu):
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="non-default"), torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        pass
    with pytest.raises(RuntimeError, match="another"):
        capture(gpu, lambda: capture(gpu, lambda: here(1)))


def test_a_recording_keeps_its_memory_and_needs_that_of_others(gpu):
    x = here(1000)
    graph, out = capture(gpu, lambda x=x: ((x + 1) * 2) + here(1000))
    assert gpu.live == 4096 and 3 * 4096 <= gpu.pools <= 4 * 4096 and gpu.reserved == gpu.live + gpu.pools
    graph.replay()
    del out
    assert gpu.live == 4096 and gpu.pools >= 3 * 4096
    del x
    with pytest.raises(RuntimeError, match="illegal memory access"):
        graph.replay()
    del graph
    gc.collect()  # the error held it
    assert gpu.reserved == 0
