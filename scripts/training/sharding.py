"""Weights, gradients and optimizer divided among processes: FSDP2 (Zhao et al. 2023, "PyTorch FSDP").

Each process keeps a part of each tensor (a DTensor). Before a block computes, its weights are gathered, and afterwards
they are forgotten. Optimizer and average work on the parts. Files hold whole tensors, so a run may resume with any
number of processes, sharded or not. Imports FSDP2 where it is used: that takes half a second.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sd.training import blocks

from .processes import Processes


@runtime_checkable
class Validated(Protocol):
    """An objective that is also computed otherwise than by its `forward`: see validation.py."""

    def errors(self, batch: Any) -> Tensor:
        """The error of each item of a batch."""


def shard(objective: nn.Module, processes: Processes, precision: torch.dtype | None) -> None:
    """Divide the parameters of an objective among the processes; each has the same values before.

    precision   of the gathered weights, None for float32; the parts and their gradients stay float32

    From now on the objective is to be called in all processes at once, and so is its `errors`, if it has that. Raises
    ValueError for parameters of several dtypes and where PyTorch is too old.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    except ImportError:
        raise ValueError(f"--shard needs PyTorch 2.6 or later, this is {torch.__version__}") from None
    if len(found := {p.dtype for p in objective.parameters()}) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ValueError(f"--shard is for training whole networks: these have weights in {names}")
    for p in objective.parameters():
        p.data = p.data.contiguous()  # FSDP2 refuses channels-last kernels
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    policy = MixedPrecisionPolicy(
        param_dtype=precision, reduce_dtype=torch.float32 if precision else None, cast_forward_inputs=False
    )
    for block in blocks(objective):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    if isinstance(objective, Validated):
        register_fsdp_forward_method(objective, "errors")


def sync_gradients(objective: nn.Module, together: bool) -> None:
    """Whether the next backward pass of a sharded objective ends with the mean over all processes."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(objective, FSDPModule)
    objective.set_requires_gradient_sync(together)


def forget_weights(objective: nn.Module) -> None:
    """Forget the whole weights that a computation without gradients has left."""
    from torch.distributed.fsdp import FSDPModule

    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(tree: Any, keep: bool, device: torch.device | None = None) -> Any:
    """Dictionaries and lists with whole tensors for divided ones, in all processes at once.

    device   where they are kept, by default where they were. A GPU that has room for its part of a model may have none
             for weights, moments and average of all of it

    A process that does not `keep` them has empty ones, so that it never holds more than one.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(tree, dict):
        return {key: gathered(value, keep, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value, keep, device) for value in tree)
    if isinstance(tree, DTensor):
        found = tree.full_tensor()
        return found.to(device or found.device) if keep else found.new_empty(0)
    return tree


def placed(value: Any, like: Tensor) -> Any:
    """A whole tensor divided like a parameter of the same shape; anything else as it is. Nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value
