"""A CUDA device without one: tensors of the meta device that say "cuda:0": code for GPUs runs on any machine.

Nothing is computed on the device; shapes, types, layouts and addresses are those of the real one. In the block of a
`SimulatedGpu`, in its thread, the device "cuda" can be named as usual, and

    - tensors on different devices in one operation are refused, but for a number (a CPU tensor without dimensions)
    - so are mixed precisions where CUDA's kernels want one: products, convolutions, normalisations, attention
    - whatever makes the program wait for the device is listed in `waits`, and refused within `no_waiting`: asking for
      a number of a tensor, copies to the CPU, copies to the device that are not from pinned memory or not
      `non_blocking`, operations whose shape depends on data, and lists of Python numbers that become tensors
    - memory is counted: `live` and `peak`, the bytes of all storages that exist, each rounded up to 512 as CUDA's
      allocator does. Views are not counted twice
    - CUDA graphs can be recorded and replayed, with the rules of a real recording (`Graph`)

What comes back from the device is zeros, and True for questions: that all is finite, that two tensors are equal.

What kernels allocate for themselves and free again is counted where it is as large as their input: group norm makes a
plain copy of channels-last maps (aten/src/ATen/native/group_norm.cpp), cuDNN a channels-last one of plain maps if the
kernel is channels-last. Attention is counted as the fused kernels do it, which never have the matrix of scores. Not
seen: the workspaces of cuDNN and cuBLAS, and what the allocator keeps of what was freed.

>>> with SimulatedGpu() as gpu:
...     x = torch.ones(2, 3).to("cuda") + 1
...     x.device, gpu.live, gpu.waits
(device(type='cuda', index=0), 512, ['copy to the device: (2, 3)'])
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
BLOCK = 512  # bytes, the smallest block of CUDA's allocator

# operations that end only when the device has finished: their result or its shape is data
WAITING = {
    aten._local_scalar_dense, aten.equal, aten.allclose, aten.is_nonzero, aten.nonzero, aten.masked_select,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
    aten._linalg_solve_ex, aten.linalg_lstsq,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# of one precision on CUDA, where the meta device accepts any
ONE_PRECISION = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.native_layer_norm, aten.native_group_norm,
    aten.addmv, aten.dot, aten.mv,
}  # fmt: skip
RANDOM = {aten.randn, aten.rand, aten.normal_, aten.uniform_, aten.bernoulli_, aten.native_dropout, aten.randint}
LARGEST_HEAD = 128  # width above which fused attention keeps its sums in memory, in float32


class Waited(AssertionError):
    """The program waited for the device where it must not."""


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists of them."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _signature(x: Any) -> Any:
    """What the shape, layout and type of a result depend on."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, (list, tuple)):
        return tuple(map(_signature, x))
    return float if isinstance(x, float) else (type(x), x)


def rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Made(NamedTuple):
    """A storage on the device: its bytes, the tensor that it was made for, and the recording that it belongs to."""

    size: int
    numbers: int
    dtype: torch.dtype
    graph: Graph | None


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`. What it has read from outside must still be there when it is replayed."""

    def __init__(self) -> None:
        self.gpu: SimulatedGpu | None = None
        self.own: set[int] = set()  # the storages that were made in the recording
        self.outside: dict[int, weakref.ref] = {}  # those that it read or wrote and did not make
        self.live = self.pool = 0  # bytes in use while recording, and the most of them: kept as long as the graph
        self.operations: list[str] = []  # with their shapes
        self.random = 0

    def replay(self) -> None:
        assert self.gpu is not None, "nothing has been recorded"
        if not all(storage() is not None for storage in self.outside.values()):
            raise RuntimeError("CUDA error: an illegal memory access: a tensor that was recorded has been freed")
        self.gpu.replays += 1


class Stream:
    """Stands in for `torch.cuda.Stream`; `log` of the device has what waits for what."""

    def __init__(self, gpu: SimulatedGpu, name: str) -> None:
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: Stream) -> None:
        self.gpu.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.gpu.log.append(f"{self.name} waits for an event of {event.stream.name}")

    def record_event(self) -> Event:
        return Event(self)


class Event(NamedTuple):
    """Stands in for `torch.cuda.Event`: a point in the work of a stream."""

    stream: Stream

    def synchronize(self) -> None:
        self.stream.gpu.wait(f"for an event of {self.stream.name}")


class SimulatedGpu:
    """The simulated device, within a `with` block."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.uploads = 0  # copies to the device that nothing waits for
        self.scalars = 0  # operations with a number that is a tensor of the CPU
        self.operations = 0
        self.log: list[str] = []
        self.replays = 0
        self.recorded: list[weakref.ref[Graph]] = []
        self.answer: Callable[[], bool] = lambda: True  # to the next question
        self.live = self.peak = 0  # bytes
        self.size = 80 * 10**9  # bytes of its memory
        self._sizes: dict[int, Made] = {}  # by storage
        self._pinned: set[int] = set()
        self._references: dict[int, weakref.ref] = {}
        self._refusing = False
        self._asked: torch.device | None = None  # in the call of a function of torch that names this or the meta device
        self._stream = Stream(self, "default")
        self._capturing: Graph | None = None
        self._exits = ExitStack()
        self._kinds: dict[Any, str] = {}
        self._outcomes: dict[Any, tuple] = {}

    def __enter__(self) -> SimulatedGpu:
        """Can be entered again: what is on the device stays there."""
        for name, stand_in in {
            "is_available": lambda: True,
            "device": self._nothing,
            "mem_get_info": lambda device=None: (self.size - self.reserved, self.size),
            "memory_reserved": lambda device=None: self.reserved,
            "memory_allocated": lambda device=None: self.reserved,
            "get_device_properties": lambda device=None: SimpleNamespace(is_integrated=0),
            "current_stream": lambda device=None: self._stream,
            "Stream": lambda *_: Stream(self, f"stream {len(self.log)}"),
            "stream": self._on,
            "CUDAGraph": Graph,
            "graph": self._record,
        }.items():
            self._exits.enter_context(patch.object(torch.cuda, name, stand_in))
        self._exits.enter_context(_Dispatch(self))
        self._exits.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.close()

    # ------------------------------------------------------------------------------------------------- memory

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is on the device. (Not within a `__torch_function__`, as x.device lies outside.)"""
        return x.device.type == "meta" and x.untyped_storage()._cdata in self._sizes

    def count(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        """The storages outside of recordings that were made for tensors of so many numbers of this type."""
        wanted = math.prod(shape), dtype, None
        return sum(made[1:] == wanted for made in self._sizes.values())

    @property
    def pools(self) -> int:
        """Bytes that recordings keep."""
        return sum(graph.pool for reference in self.recorded if (graph := reference()) is not None)

    @property
    def reserved(self) -> int:
        """Bytes of live tensors and recordings."""
        return self.live + self.pools

    @contextmanager
    def phase(self) -> Iterator[Callable[[], int]]:
        """Measure a block: gives a function that returns the most bytes that were in use in it at any time."""
        before, self.peak = self.peak, self.reserved
        most = [0]
        try:
            yield lambda: most[0] or self.peak
        finally:
            most[0], self.peak = self.peak, max(before, self.peak)

    def _made(self, x: Tensor) -> None:
        """Count the storage of a tensor, if it is new."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size, graph = rounded(storage.nbytes()), self._capturing
        self._sizes[key] = Made(size, x.numel(), x.dtype, graph)
        self._references[key] = weakref.ref(storage, lambda _: self._freed(key))
        if graph is None:
            self.live += size
        else:
            graph.live += size
            graph.pool = max(graph.pool, graph.live)
            graph.own.add(key)

    def _freed(self, key: int) -> None:
        size, _, _, graph = self._sizes.pop(key)
        del self._references[key]
        if graph is None:
            self.live -= size
        elif self._capturing is graph:  # its memory is used again within the recording
            graph.live -= size

    def _used(self, temporary: int = 0) -> None:
        """Update the peak, with what a kernel needs for a moment."""
        if self._capturing is not None:
            self._capturing.pool = max(self._capturing.pool, self._capturing.live + temporary)
            temporary = 0
        self.peak = max(self.peak, self.reserved + temporary)

    # ------------------------------------------------------------------------------------------------- waiting

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Refuse, within the block, whatever waits for the device."""
        before, self._refusing = self._refusing, True
        try:
            yield
        finally:
            self._refusing = before

    def wait(self, what: str) -> None:
        if self._capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")
        if self._refusing:
            raise Waited(what)
        self.waits.append(what)

    def upload(self, x: Tensor, non_blocking: bool) -> None:
        """A copy of a CPU tensor to the device."""
        if non_blocking and x.untyped_storage()._cdata in self._pinned:
            self.uploads += 1
        else:
            self.wait(f"copy to the device: {tuple(x.shape)}")

    def pinned(self, x: Tensor) -> Tensor:
        """A copy of a CPU tensor in pinned memory."""
        if x.device.type != "cpu":
            raise RuntimeError("cannot pin a tensor of the device, only dense CPU tensors can be pinned")
        if self._capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing: pinning memory")
        copy = torch.empty_like(x)  # its values are not needed: nothing comes back from the device
        storage = copy.untyped_storage()
        key = storage._cdata
        self._pinned.add(key)
        weakref.finalize(storage, self._pinned.discard, key)
        return copy

    # ------------------------------------------------------------------------------------------------- recordings

    @contextmanager
    def _nothing(self, *_: Any) -> Iterator[None]:
        yield

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    @contextmanager
    def _record(
        self, graph: Graph, pool: object = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        if self._capturing is not None:
            raise RuntimeError("another recording is under way")
        if stream is None or stream.name == "default":
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        graph.gpu = self
        self.log.append(f"recording on {stream.name}, {capture_error_mode}")
        self.recorded.append(weakref.ref(graph))
        with self._on(stream):
            self._capturing = graph
            try:
                yield
            finally:
                self._capturing = None
        self._used()

    # ------------------------------------------------------------------------------------------------- operations

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One operation, as the device would do it."""
        tensors = list(_tensors((*args, *kwargs.values())))
        here = [x for x in tensors if self.holds(x)]
        packet = func.overloadpacket
        if not here:
            return self._from_outside(func, tensors, args, kwargs)
        self.operations += 1
        target = kwargs.get("device")
        if self._capturing is not None:
            self._capturing.operations.append(f"{packet} {[tuple(x.shape) for x in here]}")
            self._capturing.random += packet in RANDOM
            for storage in (x.untyped_storage() for x in here):
                if storage._cdata not in self._capturing.own:
                    self._capturing.outside[storage._cdata] = weakref.ref(storage)
        if packet is aten._to_copy and target is not None and target.type == "cpu":
            self.wait(f"copy to the CPU: {tuple(args[0].shape)}")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
        if packet is aten.copy_:
            return self._copied(func, args, kwargs)
        self._check_devices(packet, tensors, here, args)
        if packet in WAITING:
            self.wait(f"{packet}: {tuple(here[0].shape)}")
            return self._answered(packet, args)
        if packet in RANDOM and self._capturing is not None and kwargs.get("generator") is not None:
            raise RuntimeError("a generator that was not registered with the graph")
        if packet in ONE_PRECISION and len(kinds := {x.dtype for x in tensors if x.is_floating_point()}) > 1:
            raise RuntimeError(f"{packet}: expected one precision, got {' and '.join(sorted(map(str, kinds)))}")
        temporary = 0
        if packet is aten.native_group_norm:
            out, temporary = _group_norm(*args)
        else:
            out = self._outcome(func, args, kwargs)
            if packet is aten.convolution:
                out, temporary = _layout_of_cudnn(out, *args[:2])
        for x in _tensors([out]):
            if x.device.type == "meta":
                self._made(x)
        self._used(temporary)
        return out

    def _from_outside(self, func: Any, tensors: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """An operation on no tensor of the device: one of the CPU, or one that makes tensors or copies them there."""
        packet, target = func.overloadpacket, kwargs.get("device")
        if self._capturing is not None and (tensors or target is None or target.type == "cpu"):
            raise RuntimeError(f"{packet}: work of the CPU is not recorded")
        if packet is aten._to_copy and target is not None and target.type == "meta" and self._asked != META:
            self.upload(args[0], bool(kwargs.get("non_blocking")))
        if packet in RANDOM and kwargs.get("generator") is not None and target is not None and target.type == "meta":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found {kwargs['generator'].device}")
        out = func(*args, **kwargs)
        if self._asked == CUDA or (self._asked is None and not any(x.device.type == "meta" for x in tensors)):
            for x in _tensors([out]):
                if x.device.type == "meta":
                    self.operations += 1
                    self._made(x)
                    self._used()
        return out

    def _outcome(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of the meta device, which is slow, so it is remembered, but for views."""
        if func not in self._kinds:
            schema = func._schema
            writes = [x.alias_info.is_write for x in (*schema.arguments, *schema.returns) if x.alias_info]
            in_place = schema.name.endswith("_") and all(writes)
            self._kinds[func] = "in place" if in_place else "view" if writes else "new"
        if self._kinds[func] == "view":
            return func(*args, **kwargs)
        key = func, _signature(args), _signature(tuple(kwargs.items()))
        if key not in self._outcomes:
            out = func(*args, **kwargs)
            made = [out] if isinstance(out, Tensor) else out
            self._outcomes[key] = isinstance(out, Tensor), [(x.shape, x.stride(), x.dtype) for x in made]
            return out
        if self._kinds[func] == "in place":
            return args[0]
        single, made = self._outcomes[key]
        new = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in made]
        return new[0] if single else tuple(new)

    def _copied(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """target.copy_(source), of which at least one is on the device."""
        target, source = args[:2]
        if not self.holds(target):
            self.wait(f"copy to the CPU: {tuple(source.shape)}")
            return target.zero_()
        if source.device.type == "cpu":
            self.upload(source, kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return func(*args, **kwargs)

    def _check_devices(self, packet: Any, tensors: list[Tensor], here: list[Tensor], args: tuple) -> None:
        for x in tensors:
            if any(x is other for other in here):
                continue
            if packet in INDEXING and x is not args[0]:  # indices may be on the CPU: they are copied, one by one
                self.wait(f"{packet}: an index on the CPU")
            elif x.device.type != "cpu" or x.dim() > 0:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                    f"{x.device}! ({packet}, {tuple(x.shape)})"
                )
            elif self._capturing is not None:
                raise RuntimeError(f"{packet}: a number of the CPU would be the same in each replay")
            elif packet is aten.where or packet is aten.cat:  # copied first
                self.wait(f"{packet}: a number on the CPU")
            else:
                self.scalars += 1
        if packet in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1])):
            self.wait(f"{packet}: a mask as index")

    def _answered(self, packet: Any, args: tuple) -> Any:
        if packet in (aten.equal, aten.allclose, aten.is_nonzero):
            return self.answer()
        if packet is aten._local_scalar_dense:
            kind = args[0].dtype
            return self.answer() if kind == torch.bool else 0.0 if kind.is_floating_point else 0
        raise NotImplementedError(f"{packet}: its shape depends on data")


def _group_norm(x: Tensor, weight: Any, bias: Any, N: int, C: int, HxW: int, groups: int, eps: float) -> Any:
    """As on CUDA: plain maps from a plain copy."""
    stats = torch.empty(2, N, groups, dtype=x.dtype, device="meta")
    out = torch.empty(x.shape, dtype=x.dtype, device="meta")
    return (out, stats[0], stats[1].clone()), 0 if x.is_contiguous() else rounded(size_of(x))


def _layout_of_cudnn(out: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """The output of a convolution: channels-last if one of the two is, of which the other becomes a copy."""
    if not any(suggest_memory_format(y) == torch.channels_last for y in (x, weight)):
        return out, 0
    copied = sum(rounded(size_of(y)) for y in (x, weight) if not y.is_contiguous(memory_format=torch.channels_last))
    return torch.empty(out.shape, dtype=out.dtype, device="meta", memory_format=torch.channels_last), copied


class _Dispatch(TorchDispatchMode):
    """Gives each operation to the device."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What Python sees of tensors: their device, and the name of the device in arguments."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self._replaced: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda x: CUDA if gpu.holds(x) else x.device,
            Tensor.is_cuda.__get__: gpu.holds,
            Tensor.is_meta.__get__: lambda x: x.device.type == "meta" and not gpu.holds(x),
            Tensor.data.__set__: _set_data,
            Tensor.pin_memory: lambda x, *_: gpu.pinned(x),
            Tensor.is_pinned: lambda x, *_: x.untyped_storage()._cdata in gpu._pinned,
            Tensor.data_ptr: lambda x: (
                x.untyped_storage()._cdata + x.storage_offset() if gpu.holds(x) else x.data_ptr()
            ),
            Tensor.tolist: lambda x: x.cpu().tolist(),
            Tensor.numpy: self._numpy,
            Tensor.cuda: lambda x, *_, **options: x.to("meta", **options),
            torch.tensor: self._from_numbers,
            torch.as_tensor: self._from_numbers,
            F.scaled_dot_product_attention: self._attention,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        devices = [x for x in (*args, *kwargs.values()) if isinstance(x, (str, torch.device))]
        before = self.gpu._asked
        try:
            if any(str(x) == "meta" for x in devices):
                self.gpu._asked = META
            if any(_is_cuda(x) for x in devices):
                self.gpu._asked = CUDA
                args = tuple(META if _is_cuda(x) else x for x in args)
                kwargs = {name: META if _is_cuda(x) else x for name, x in kwargs.items()}
            return self._replaced.get(func, func)(*args, **kwargs)
        finally:
            self.gpu._asked = before

    def _numpy(self, x: Tensor, *_: Any, **options: Any) -> Any:
        if self.gpu.holds(x):
            raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")
        return x.numpy(**options)

    def _from_numbers(self, data: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Numbers of Python become a tensor of the CPU first."""
        device = kwargs.pop("device", None)
        made = torch.tensor(data, *args, device="cpu" if device == META else device, **kwargs)
        return made.to(META) if device == META else made

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the fused kernels: the result in the order (B, N, heads, d), and a sum for each of its rows."""
        gpu = self.gpu
        if not gpu.holds(q):
            return F.scaled_dot_product_attention(q, k, v, *args, **kwargs)
        if not all(gpu.holds(x) for x in (k, v)) or len({x.dtype for x in (q, k, v)}) > 1:
            raise RuntimeError("expected q, k and v of one precision on one device")
        (B, heads, N, _), d = q.shape, v.shape[-1]
        if q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
            raise RuntimeError("the shapes of q, k and v do not fit")
        if gpu._capturing is not None:
            gpu._capturing.operations.append(f"attention {tuple(q.shape)} {tuple(k.shape)}")
        out = torch.empty(B, N, heads, d, dtype=q.dtype, device="meta").transpose(1, 2)
        sums = rounded(4 * B * heads * N) + (rounded(4 * out.numel()) if d > LARGEST_HEAD else 0)
        gpu._used(sums)
        return out


def _set_data(x: Tensor, value: Tensor) -> None:
    """x.data = value, which torch allows between the CPU and CUDA, and not between the CPU and the meta device."""
    if x.device == value.device:
        x.data = value
    else:
        torch._C._swap_tensor_impl(x, value.detach())


def _is_cuda(x: Any) -> bool:
    return isinstance(x, (str, torch.device)) and str(x).partition(":")[0] == "cuda"
