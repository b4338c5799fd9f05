"""Layers whose weight stays in oneDNN's own layout ("packed") between calls, and that look plain to all other code.

On x86 CPUs, PyTorch reorders the weights of linear layers and convolutions for the processor at every call. oneDNN can
do so once. Its operators for packed weights are those of PyTorch's compiler, and also run without it.

A layer packs its weight at its first call without gradients and drops the plain one, so memory holds one copy. The
packed tensor is private. Any access to the layer's parameters (`weight`, `parameters`, `state_dict`, `to`, copying)
first restores the plain weight, equal to the bit; the next call packs it again. While somebody else holds the plain
weight, or a view of its memory, it is not packed. So changes in place always take effect.

The layout that is fastest can depend on the shape of the inputs, and another one may take twenty times as long, so
small kernels are packed again when the size of the maps changes. Results are the same in any layout.
"""

from __future__ import annotations

import threading
import weakref
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .device import give_back_memory

Option = tuple[int, ...] | str  # as `nn.Conv2d` has its padding
InputSize = tuple[int, int, int]  # B, H, W
ANY_SIZE: InputSize = (2, 64, 64)  # stands for all sizes, where the layout does not depend on it

# Attributes of a layer that the packed one does not look at; people set them to make images tileable, for example
STRUCTURE = frozenset({
    "_conv_forward", "dilation", "groups", "in_channels", "kernel_size", "out_channels", "padding", "padding_mode",
    "stride",
})  # fmt: skip
LANES = 16  # float32 numbers in a vector register of AVX-512
ROWS = 256  # rows of input that linear layers are packed for; the layout does not depend on it
# Kernels are packed for the size of their input maps, except where the layout does not depend on it:
LARGE_MAP = 64 * 64  # pixels: for maps of at least this many
LARGE_KERNEL = 2**17  # input x output channels: for kernels of at least this many, which are slow to pack again
GIVE_BACK_AFTER = 2**27  # bytes: after packing this many, free memory is returned to the system

# ------------------------------------------------------------------------------------- oneDNN's operators


@cache
def onednn_dtypes() -> frozenset[torch.dtype]:
    """The precisions in which oneDNN's operators for packed weights can be used: none but on x86 CPUs."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return frozenset()
    try:
        half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        _try_operators()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return frozenset()  # a torch that was built without them, or where their arguments are different
    return frozenset({torch.float32, torch.bfloat16} if half else {torch.float32})


def _try_operators() -> None:
    """Use each operator once: they are internal to torch, and may change with any version."""
    with torch.no_grad():
        x = torch.ones(1, LANES, 2, 2, device="cpu", dtype=torch.float32)
        weight, usual = torch.ones(LANES, LANES, device="cpu", dtype=torch.float32), ((0, 0), (1, 1), (1, 1), 1)
        linear(x[..., 0, 0], pack_linear(weight), None)
        convolution(x, pack_kernel(weight[..., None, None], *usual, (1, 2, 2)), None, *usual)
        if _shared(weight) or not _shared(weight[:1]):
            raise RuntimeError("torch counts the uses of memory differently")


def pack_linear(weight: Tensor) -> Tensor:
    """Pack the weight (D_out, D_in) of a linear layer."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack_kernel(
    kernel: Tensor, padding: Option, stride: Option, dilation: Option, groups: int, size: InputSize
) -> Tensor:
    """Pack the kernel (C_out, C_in / groups, k, k) of a convolution, for inputs of this size."""
    shape = (size[0], kernel.shape[1] * groups, *size[1:])
    pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # torch's own annotation is wrong
    return pack(kernel if kernel.is_mkldnn else kernel.to_mkldnn(), padding, stride, dilation, groups, shape)


def convolution(
    x: Tensor, kernel: Tensor, bias: Tensor | None, padding: Option, stride: Option, dilation: Option, groups: int
) -> Tensor:
    """F.conv2d with a packed kernel."""
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, padding, stride, dilation, groups, "none", [], "")


def _shared(tensor: Tensor) -> bool:
    """Whether another tensor, or an array, uses the memory of this one."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor, and the storage's Python object


def for_inference(*tensors: Tensor | None) -> bool:
    """Whether only the result is wanted: no gradients for any of these, no other transform, no graph for a compiler.

    oneDNN's operators support none of these: derivatives would silently be zero.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack():  # a mode that looks at each operation, such as FlopCounterMode
        return False
    return forward_ad._current_level < 0  # else some may have tangents


def watched(*modules: nn.Module) -> bool:
    """Whether somebody follows the calls of these modules, by hooks or in place of their `forward`."""
    return _has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in modules
    )


@_disable_dynamo
def eagerly(layer: nn.Module, *inputs: Any) -> Tensor:
    """Call a layer eagerly within `torch.compile`: the graph breaks here.

    Compilers cannot look into packed weights. `torch.compiler.disable` would do the same, but it imports the compiler:
    one second and 70 MB for everybody.
    """
    return layer.forward(*inputs)


# ------------------------------------------------------------------------------------- layers

_lock = threading.RLock()  # one thread at a time packs or restores a weight
_packed_bytes = 0  # since memory was last given back


class PackedWeight(NamedTuple):
    """A weight in oneDNN's layout, and what it takes to restore the plain one."""

    weight: Tensor
    size: InputSize  # of the inputs that it is packed for
    shape: torch.Size  # the plain weight's
    stride: tuple[int, ...]
    plain: Tensor | None = None  # itself, where it cannot be computed from the packed one
    memory: Tensor | None = None  # kept for as long as the packed weight lies in it, where that does not own its memory

    def restored(self) -> Tensor:
        """The plain weight, equal to the bit and with its strides."""
        if self.plain is not None:
            return self.plain
        plain = self.weight.to_dense().view(self.shape)
        if plain.stride() == self.stride:
            return plain
        return torch.empty_strided(self.shape, self.stride, dtype=plain.dtype, device="cpu").copy_(plain)


class PackedLayer(nn.Module):
    """A layer that keeps its weight packed between calls, and plain for all other code.

    While it is packed, `_parameters` has None in the weight's place, which keeps the order of the names. All access
    to a parameter goes through `_parameters` or `__getattr__`.
    """

    for_maps = False  # whether its input is a map (B, C, H, W), and the layout of its weight depends on the map's size

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        with _lock:
            self.unpack()
            return self.__dict__["_parameters"]

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        with _lock:
            self.__dict__.pop("_packed", None)
            self.__dict__["_parameters"] = parameters

    def __getattr__(self, name: str) -> Any:
        if name != "weight":
            return super().__getattr__(name)
        with _lock:
            self.unpack()
            return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":  # set in all layers by torch.ao.quantization, which then would leave out this one
            raise TypeError(
                "this layer cannot be quantised: torch.ao.quantization accepts only torch's own layer classes; call "
                "sd.runtime.optimize.restore(network) first"
            )
        if name in STRUCTURE:  # such as `conv.padding_mode = "circular"`: an ordinary layer from then on
            with _lock:
                self.unpack()
                plain: Any = next(kind for kind in type(self).__mro__ if not issubclass(kind, PackedLayer))
                self.__class__ = plain
        nn.Module.__setattr__(self, name, value)  # not `super`, as the class may just have changed

    def __getstate__(self) -> dict[str, Any]:  # for copying and pickling
        with _lock:
            return self.__dict__ | {"_parameters": dict(self._parameters)}

    def unpack(self) -> None:
        """Restore the plain weight, and drop the packed one."""
        packed = self.__dict__.get("_packed")
        if packed is not None:
            # Whatever mode the caller is in, weights are ordinary tensors; functorch cannot look into oneDNN's.
            with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
                self.__dict__["_parameters"]["weight"] = nn.Parameter(packed.restored(), requires_grad=False)
            del self.__dict__["_packed"]  # last: an error on the way loses nothing

    def adopt(self, packed: PackedWeight) -> None:
        """Take a weight that is packed already, in the place of the one that the layer has."""
        with _lock:
            self.__dict__["_parameters"]["weight"] = None
            self.__dict__["_packed"] = packed

    def size_to_pack_for(self) -> InputSize | None:
        """The size of the inputs that the weight is packed for, or will be; None if that is not known yet."""
        packed: PackedWeight | None = self.__dict__.get("_packed")
        if packed is not None:
            return packed.size
        return None if self.for_maps and self.in_channels * self.out_channels < LARGE_KERNEL else ANY_SIZE

    def drop(self) -> None:
        """Replace the packed weight with one on the meta device, without restoring the plain one."""
        with _lock:
            packed = self.__dict__.get("_packed")
            if packed is not None:
                plain = torch.empty_strided(packed.shape, packed.stride, dtype=packed.weight.dtype, device="meta")
                self.__dict__["_parameters"]["weight"] = nn.Parameter(plain, requires_grad=False)
                del self.__dict__["_packed"]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _lock:  # else another thread might pack the weight meanwhile
            super()._save_to_state_dict(*args, **kwargs)

    def packed_for(self, x: Tensor) -> PackedWeight | None:
        """The weight packed for inputs like x; None where the plain layer has to be used for it."""
        state = self.__dict__
        if (
            type(x) is not Tensor  # a subclass, such as a fake tensor, or functorch's
            or not x.is_cpu
            or x.numel() == 0
            or not for_inference(x, state["_parameters"].get("bias"))
            or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.enabled
        ):
            return None
        size = ANY_SIZE
        if self.for_maps:
            B, C, H, W = x.shape
            if C * self.out_channels < LARGE_KERNEL and H * W < LARGE_MAP:
                size = min(B, 2), H, W
        packed: PackedWeight | None = state.get("_packed")
        if packed is None or packed.size != size:
            packed = self._pack_and_drop(size)
        return packed if packed is not None and packed.weight.dtype == x.dtype else None

    def pack(self, weight: Tensor, size: InputSize) -> PackedWeight:
        """Pack the weight, for inputs of this size."""
        raise NotImplementedError

    def _pack_and_drop(self, size: InputSize) -> PackedWeight | None:
        """Pack the weight and drop the plain one; None, with nothing changed, if other code holds it."""
        with _lock, torch.inference_mode(False), torch.no_grad():
            packed: PackedWeight | None = self.__dict__.get("_packed")
            if packed is not None:
                if packed.size != size:  # else another thread has just packed it
                    packed = self.__dict__["_packed"] = self.pack(packed.restored(), size)
                return packed
            parameters = self.__dict__["_parameters"]
            weight = parameters.get("weight")
            if (
                type(weight) is not nn.Parameter  # absent, or computed by a parametrization
                or weight.device.type != "cpu"
                or weight.dtype not in onednn_dtypes()
                or weight.requires_grad
                or weight.grad is not None
                or weight.__dict__
                or weight._backward_hooks
                or torch.is_inference(weight)
                or weight.is_shared()  # other processes may change it
            ):
                return None
            data, reference = weight.data, weakref.ref(weight)
            try:
                parameters["weight"] = None
                del weight
                if reference() is None and not _shared(data):
                    self.__dict__["_packed"] = self.pack(data, size)
            finally:  # somebody holds the weight, or an error or an interrupt: all as before
                packed = self.__dict__.get("_packed")
                if packed is None:
                    held = reference()
                    parameters["weight"] = nn.Parameter(data, requires_grad=False) if held is None else held
            if packed is not None:
                _tidy(data.nbytes)
            return packed


def _tidy(size: int) -> None:
    """Return free memory to the system now and then: the copies that packing makes leave holes of 0.1 GB in all."""
    global _packed_bytes
    _packed_bytes += size
    if _packed_bytes > GIVE_BACK_AFTER:
        _packed_bytes = 0
        give_back_memory()


def drop_weights(network: nn.Module) -> None:
    """Move a network to the meta device; packed weights are not restored first, which would take time."""
    for module in network.modules():
        if isinstance(module, PackedLayer):
            module.drop()
    network.to("meta")
