"""The U-Net's steps in fewer calls: recorded once and played back (CUDA graphs), or compiled.

A step of Stable Diffusion is some 2,000 small operations. A fast GPU is done with most of them sooner than Python can
ask for the next. So on CUDA the first step at each shape is recorded: the driver notes every kernel with the memory it
works on, and from then on one call plays them all back. That needs no compiler, and about a second (unmeasured so far,
as everything here that concerns GPUs).

What is played back is what was recorded, at the same addresses. Hence inputs are copied into memory that stays, and the
result is copied out of it; and hence, before each step, a look at whether the network is still the one that was
recorded: a LoRA that was merged since has put its weights elsewhere, and a hook wants to be called.

>>> def record(run, device):  # stands in for `cuda_graph`
...     out = run()
...     return lambda: out.copy_(run()), out
>>> class Network(nn.Module):
...     def forward(self, x, t, conditioning):
...         return x + conditioning.context.mean()
>>> network, given = Network(), (torch.randn(2, 4), torch.ones(2), Conditioning(torch.randn(2, 77, 16)))
>>> steps = Recorded(network, record)
>>> with torch.no_grad():
...     steps(*given).equal(network(*given))
True
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..conditioning import Conditioning
from . import packing
from .optimize import restore

SHAPES = 2  # recordings that are kept: each holds the memory of a step
WARM_UP = 2  # runs before a recording, in which libraries choose their kernels and take their memory

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]  # as in denoiser.py
Inputs = tuple[Tensor | None, ...]  # x, t, and what a conditioning has, or None
Replay = Callable[[], object]
Record = Callable[[Callable[[], Tensor], torch.device], tuple[Replay, Tensor]]  # as `cuda_graph`


def cuda_graph(run: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
    """Record a run on a CUDA device: what plays it back, and the tensor that then holds the result.

    Everything that the run reads has to stay where it is. Raises RuntimeError where it cannot be recorded.
    """
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # a recording must not wait for what others do
            for _ in range(WARM_UP):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device, as torch's own may be another device's; and whatever other threads do meanwhile.
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            out = run()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, out


class Recording(NamedTuple):
    """A step at one shape: play it back, and `out` is what the network makes of `inputs`."""

    inputs: Inputs
    replay: Replay
    out: Tensor

    @classmethod
    def of(cls, network: nn.Module, inputs: Inputs, record: Record) -> Recording:
        """Record the network on memory of its own, which can be written to within `inference_mode` and without."""
        with torch.inference_mode(False), torch.no_grad():
            own = tuple(None if x is None else x.clone() for x in inputs)
            x, t, context, vector, concat = own
            assert x is not None and context is not None
            conditioning = Conditioning(context, vector, concat)
            return cls(own, *record(lambda: network(x, t, conditioning), x.device))

    def __call__(self, inputs: Inputs) -> Tensor:
        """The network's result, which nobody will write over."""
        for own, x in zip(self.inputs, inputs, strict=True):
            if own is not None and x is not None:
                own.copy_(x)
        self.replay()
        return self.out.clone()


_one_at_a_time = threading.Lock()  # a recording's memory is written and read in turns


class Recorded:
    """A network that is recorded the first time it meets a shape, and played back the next times.

    It is called as it is where gradients are wanted, within autocast, where a module of it has a hook or a `forward` of
    its own, and for good once a recording has failed. Recordings end where weights lie elsewhere than before.
    """

    def __init__(self, network: nn.Module, record: Record = cuda_graph) -> None:
        self._network, self._record = network, record
        self._recordings: dict[tuple, Recording] = {}  # by shapes and types, the one used last at the end
        self._weights: list[int] = []  # the addresses in the recordings
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:  # for copying: a copy's weights lie elsewhere
        return self.__dict__ | {"_recordings": {}, "_weights": []}

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What the network makes of them."""
        if self._failed or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return self._network(x, t, conditioning)
        with _one_at_a_time:
            out = self._played((x, t, *conditioning))
        return self._network(x, t, conditioning) if out is None else out

    def _played(self, inputs: Inputs) -> Tensor | None:
        """From a recording; None where there can be none."""
        watched, weights = _look(self._network)
        if watched or weights != self._weights:
            self._recordings.clear()
            self._weights = weights
        if watched:
            return None
        key = tuple(None if x is None else (x.shape, x.dtype, x.device) for x in inputs)
        recording = self._recordings.pop(key, None)
        if recording is None:
            while len(self._recordings) >= SHAPES:
                del self._recordings[next(iter(self._recordings))]
            try:
                recording = Recording.of(self._network, inputs, self._record)
            except RuntimeError as error:
                self._recordings.clear()
                self._failed = True
                reason = str(error).partition("\n")[0]
                warnings.warn(f"the U-Net's steps cannot be recorded, and take longer: {reason}", stacklevel=3)
                return None
        self._recordings[key] = recording
        return recording(inputs)


def _look(network: nn.Module) -> tuple[bool, list[int]]:
    """Whether anybody wants to know what happens inside of a network, and where its weights are."""
    watched = bool(all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks)
    weights = []
    for module in network.modules():
        watched |= bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        weights += [x.data_ptr() for x in module._parameters.values() if x is not None]
        weights += [x.data_ptr() for x in module._buffers.values() if x is not None]
    return watched, weights


class Compiled:
    """The network through `torch.compile`, each shape for itself: minutes the first time, on CUDA for the last bit.

    Needs a C++ compiler, on CUDA triton: without them, the first call raises ValueError. The network itself can still
    be called as it is. Where its own kernels are faster, a UserWarning says so.
    """

    def __init__(self, network: nn.Module) -> None:
        weight = next(network.parameters())
        if weight.device.type == "cpu" and weight.dtype in packing.onednn_dtypes():
            warnings.warn("compiled, the U-Net is slower on this processor than as it is", stacklevel=3)
        self._network = restore(network)
        self._fast: Network | None = None  # when it is first called

    def __getstate__(self) -> dict[str, Any]:  # for copying: a copy has another network
        return self.__dict__ | {"_fast": None}

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What the network makes of them."""
        if self._fast is None:
            mode = "max-autotune" if next(self._network.parameters()).is_cuda else None
            self._fast = torch.compile(self._network, dynamic=False, mode=mode)
        try:
            return self._fast(x, t, conditioning)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
            raise ValueError(f"the U-Net cannot be compiled here: {reason}; leave it as it is (no --compile)") from None
