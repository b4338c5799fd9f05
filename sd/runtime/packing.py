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

from .device import give_back_memory

Option = tuple[int, ...] | str  # as `nn.Conv2d` has its padding
InputSize = tuple[int, int, int]  # B, H, W
ANY_SIZE: InputSize = (2, 64, 64)

LANES = 16  # float32 numbers in a vector register of AVX-512
ROWS = 256  # that linear layers are packed for: their layout is the same for any number
# Kernels are packed for the size of their input maps, except where the size makes no difference:
LARGE_MAP = 64 * 64  # pixels from which all maps have the same layout
# input times output channels from which all maps have the same: multiples of 64 there, and slow to pack
LARGE_KERNEL = 2**17
GIVE_BACK_AFTER = 2**27  # bytes of weights that are packed between two times that free memory is given back

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
        _shared(weight)


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
    return forward_ad._current_level < 0  # else some may have tangents


@_disable_dynamo
def eagerly(layer: nn.Module, *inputs: Any) -> Tensor:
    """Call a layer eagerly within `torch.compile`: the graph breaks here.

    Compilers cannot look into packed weights. `torch.compiler.disable` would do the same, but it imports the compiler:
    one second and 70 MB for everybody.
    """
    return layer.forward(*inputs)


# ------------------------------------------------------------------------------------- layers

_packing = threading.RLock()  # one thread at a time packs or restores a weight
_packed_bytes = 0  # since memory was last given back


class Packed(NamedTuple):
    """A weight in oneDNN's layout, and what it takes to restore the plain one."""

    weight: Tensor
    size: InputSize  # of the inputs that it is packed for
    shape: torch.Size  # the plain weight's
    stride: tuple[int, ...]
    plain: Tensor | None = None  # itself, where it cannot be computed from the packed one

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
        with _packing:
            self._unpack()
            return self.__dict__["_parameters"]

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        with _packing:
            self.__dict__.pop("_packed", None)
            self.__dict__["_parameters"] = parameters

    def __getattr__(self, name: str) -> Any:
        if name != "weight":
            return super().__getattr__(name)
        with _packing:
            self._unpack()
            return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:  # for copying and pickling
        with _packing:
            return self.__dict__ | {"_parameters": dict(self._parameters)}

    def _unpack(self) -> None:
        """Restore the plain weight, and drop the packed one."""
        packed = self.__dict__.get("_packed")
        if packed is not None:
            # Whatever mode the caller is in, weights are ordinary tensors; functorch cannot look into oneDNN's.
            with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
                self.__dict__["_parameters"]["weight"] = nn.Parameter(packed.restored(), requires_grad=False)
            del self.__dict__["_packed"]  # last: an error on the way loses nothing

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _packing:  # else another thread might pack the weight meanwhile
            super()._save_to_state_dict(*args, **kwargs)

    def packed(self, x: Tensor) -> Packed | None:
        """The weight packed for inputs like x; None where the plain layer has to be used for it."""
        state = self.__dict__
        if (
            type(x) is not Tensor  # but computed from others, or a tensor without numbers
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
        packed: Packed | None = state.get("_packed")
        if packed is None or packed.size != size:
            packed = self._pack(size)
        return packed if packed is not None and packed.weight.dtype == x.dtype else None

    def pack(self, weight: Tensor, size: InputSize) -> Packed:
        """Pack the weight, for inputs of this size."""
        raise NotImplementedError

    def _pack(self, size: InputSize) -> Packed | None:
        """Pack the weight and drop the plain one; None, with nothing changed, if other code holds it."""
        with _packing, torch.inference_mode(False), torch.no_grad():
            packed: Packed | None = self.__dict__.get("_packed")
            if packed is not None:
                if packed.size != size:  # else another thread has just packed it
                    packed = self.__dict__["_packed"] = self.pack(packed.restored(), size)
                return packed
            parameters = self.__dict__["_parameters"]
            weight = parameters.get("weight")
            if (
                type(weight) is not nn.Parameter  # but None, or computed from others
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
            _tidy(data.nbytes)
            return packed


def _tidy(size: int) -> None:
    """Give free memory back now and then: copies made in packing leave holes, 0.1 GB in Stable Diffusion 1.x."""
    global _packed_bytes
    _packed_bytes += size
    if _packed_bytes > GIVE_BACK_AFTER:
        _packed_bytes = 0
        give_back_memory()
