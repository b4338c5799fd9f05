"""The U-Net with fewer kernel launches: recorded once and replayed (CUDA graphs), or compiled.

A step of Stable Diffusion launches about 2,000 small kernels, and a fast GPU finishes most of them before Python can
launch the next. So on CUDA the first step at each shape is recorded: the driver stores every kernel with the addresses
of its memory, and from then on one call replays them all. That needs no compiler and takes about a second (not measured
yet, like everything here that concerns GPUs).

A replay works on the addresses that were recorded. So the inputs are copied into fixed buffers and the result is copied
out of one; and before each step the network is checked for changes: merging a LoRA moves its weights to other
addresses, and a hook would not be called.

>>> def record(run, device):  # stands in for `cuda_graph`
...     out = run()
...     return lambda: out.copy_(run()), out
>>> class Halved(nn.Module):
...     def forward(self, x, t, conditioning):
...         return x + conditioning.context.mean()
>>> network, given = Halved(), (torch.randn(2, 4), torch.ones(2), Conditioning(torch.randn(2, 77, 16)))
>>> steps = Recorded(network, record)
>>> with torch.no_grad():
...     steps(*given).equal(network(*given))
True
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..conditioning import Conditioning
from . import packing
from .circular import is_circular
from .optimize import restore

SHAPES = 2  # recordings that are kept: each holds the memory of a step
WARM_UP = 2  # runs before a recording, in which libraries choose their kernels and allocate their memory

Replay = Callable[[], object]
Part = Callable[[Any], nn.Module]  # makes a module of a part of a network
Record = Callable[[Callable[[], Any], torch.device], tuple[Replay, Any]]  # as `cuda_graph`


def cuda_graph(run: Callable[[], Any], device: torch.device) -> tuple[Replay, Any]:
    """Record a run on a CUDA device; returns the function that replays it, and the tensors that hold its result.

    Everything that the run reads must stay at its address. Raises RuntimeError if the run cannot be recorded.
    """
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # a recording must not wait for other streams
            for _ in range(WARM_UP):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device, as torch's default may belong to another; other threads may go on working.
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            out = run()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, out


def each_tensor(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Inputs or outputs of a network with every tensor in them changed: tensors and tuples of them, as deep as they go.

    A list becomes a tuple, a named tuple stays one, and anything else stays what it is.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        changed = [each_tensor(x, change) for x in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors in inputs or outputs of a network."""
    found: list[Tensor] = []
    each_tensor(value, found.append)
    return found


class Recording(NamedTuple):
    """A step at one shape: after `replay`, `out` is the output of the network for `inputs`."""

    inputs: tuple[Any, ...]
    replay: Replay
    out: Any

    @classmethod
    def of(cls, network: nn.Module, inputs: tuple[Any, ...], record: Record) -> Recording:
        """Record the network on buffers of its own, which can be written to inside and outside of `inference_mode`."""
        with torch.inference_mode(False), torch.no_grad():
            own = each_tensor(inputs, Tensor.clone)
            return cls(own, *record(lambda: network(*own), own[0].device))

    def __call__(self, inputs: tuple[Any, ...]) -> Any:
        """The output of the network, in new tensors."""
        for own, x in zip(tensors(self.inputs), tensors(inputs), strict=True):
            own.copy_(x)
        self.replay()
        return each_tensor(self.out, Tensor.clone)


_one_at_a_time = threading.Lock()  # the buffers of a recording serve one call at a time


class Recorded:
    """A network that is recorded at the first call with a shape, and replayed at the following ones.

    It is called directly if gradients are enabled, within autocast and circular padding, if one of its modules has a
    hook or a patched `forward`, and always after a recording has failed. Recordings are dropped when the address of a
    weight changes.
    """

    def __init__(self, network: nn.Module, record: Record = cuda_graph) -> None:
        self._network, self._record = network, record
        self._recordings: dict[tuple, Recording] = {}  # by shapes and types, the most recent last
        self._weights: list[int] = []  # the addresses in the recordings
        self._failed = False
        self._parts: dict[Part, Recorded] = {}
        self._done: torch.cuda.Event | None = None  # the last replay, whose buffers another stream must not touch

    def __getstate__(self) -> dict[str, Any]:  # for copying: the weights of a copy have other addresses
        return self.__dict__ | {"_recordings": {}, "_weights": [], "_parts": {}, "_done": None}

    @property
    def plain(self) -> nn.Module:
        """The network itself."""
        return self._network

    def part(self, part: Part) -> Recorded:
        """`part(network)`, recorded in the same way; the same object for the same `part`."""
        found = self._parts.get(part)
        return found or self._parts.setdefault(part, Recorded(part(self._network), self._record))

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, *more: Any) -> Any:
        """The output of the network; `more` are further inputs, such as the residuals of a control network."""
        inputs = (x, t, conditioning, *more)
        if self._failed or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or is_circular():
            return self._network(*inputs)
        with _one_at_a_time:
            out = self._replayed(inputs)
        return self._network(*inputs) if out is None else out

    def _replayed(self, inputs: tuple[Any, ...]) -> Any:
        """The output from a recording; None if the network cannot be recorded."""
        watched, weights = _look(self._network)
        if watched or weights != self._weights:
            self._drop(0)
            self._weights = weights
        if watched:
            return None
        key = each_tensor(inputs, lambda x: (x.shape, x.dtype, x.device))
        recording = self._recordings.pop(key, None)
        if recording is None:
            self._drop(SHAPES - 1)
            try:
                recording = Recording.of(self._network, inputs, self._record)
            except RuntimeError as error:
                self._drop(0)
                self._failed = True
                reason = str(error).partition("\n")[0]
                warnings.warn(f"the U-Net cannot be recorded, so its steps take longer: {reason}", stacklevel=3)
                return None
        self._recordings[key] = recording
        device = inputs[0].device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if stream is not None and self._done is not None:  # the lock orders calls, not what the device does
            stream.wait_event(self._done)
        out = recording(inputs)
        self._done = None if stream is None else stream.record_event()
        return out

    def _drop(self, keep: int) -> None:
        """Drop all but the latest `keep` recordings, once no replay on any stream uses their memory."""
        if len(self._recordings) > keep and self._done is not None:
            self._done.synchronize()
        while len(self._recordings) > keep:
            del self._recordings[next(iter(self._recordings))]


def _look(network: nn.Module) -> tuple[bool, list[int]]:
    """Whether a network has hooks or patched modules, and the addresses of its weights."""
    watched = bool(all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks)
    weights = []
    for module in network.modules():
        watched |= bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        weights += [x.data_ptr() for x in module._parameters.values() if x is not None]
        weights += [x.data_ptr() for x in module._buffers.values() if x is not None]
    return watched, weights


class Compiled:
    """The network through `torch.compile`, once per shape, which takes minutes; by default "max-autotune" on CUDA.

    Needs a C++ compiler, and triton on CUDA: without them, the first call raises ValueError. The network itself can
    still be called directly, as happens here within circular padding. On CPUs where its own kernels are faster, a
    UserWarning says so.
    """

    def __init__(self, network: nn.Module, mode: str | None = None) -> None:
        """`mode` is that of `torch.compile`."""
        weight = next(network.parameters())
        if weight.device.type == "cpu" and weight.dtype in packing.onednn_dtypes():
            warnings.warn("the compiled U-Net is slower on this processor than the plain one", stacklevel=3)
        self._network = restore(network)
        self._mode = mode or ("max-autotune" if weight.device.type == "cuda" else None)
        self._fast: Callable[..., Any] | None = None  # compiled at the first call
        self._parts: dict[Part, Compiled] = {}

    def __getstate__(self) -> dict[str, Any]:  # for copying: a copy compiles its own network
        return self.__dict__ | {"_fast": None, "_parts": {}}

    @property
    def plain(self) -> nn.Module:
        """The network itself."""
        return self._network

    def part(self, part: Part) -> Compiled:
        """`part(network)`, compiled in the same way; the same object for the same `part`."""
        found = self._parts.get(part)
        if found is None:
            compiled = copy.copy(self)  # without the warning of `__init__`
            compiled._network = part(self._network)
            found = self._parts.setdefault(part, compiled)  # another thread may have been faster
        return found

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, *more: Any) -> Any:
        """The output of the network; `more` as for `Recorded`."""
        if is_circular():
            return self._network(x, t, conditioning, *more)
        if self._fast is None:
            self._fast = torch.compile(self._network, dynamic=False, mode=self._mode)
        try:
            # compiled networks may replay CUDA graphs, too, and the next replay overwrites the memory of the result
            return each_tensor(self._fast(x, t, conditioning, *more), Tensor.clone)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
            hint = "load it without compiling (no --compile)"
            raise ValueError(f"the U-Net cannot be compiled here: {reason}; {hint}") from None
