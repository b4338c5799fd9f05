"""How much memory a training step takes on a GPU, found without one: the step runs on tensors without contents.

    memory = step_memory(objective, batch, optimizers, torch.bfloat16)      inside of `without_contents()`
    memory.peak, memory.weights, ...                                        bytes

torch's fake tensors have shapes, types and storages of a size, but no memory. Each operation of the forward pass, the
backward pass and the optimizer is watched: what it returns counts until nothing refers to its storage any more. What
cannot be seen are the workspaces of libraries and the allocator's fragments, for which `overhead` adds an allowance.

Networks run as under autocast on a GPU: norms compute in float32 there, and attention is a fused kernel that stores no
matrix of all pairs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd.pipeline import StableDiffusion

from .batches import Batch
from .objective import Objective
from .optimizers import make_optimizers
from .recipe import Recipe
from .target import Target

CONTEXT = 0.5e9  # bytes of a CUDA context with cuDNN's and cuBLAS's workspaces
FRAGMENTS = 1.05  # times the peak: blocks that the allocator cannot use
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step: at its peak, and of what stays between steps."""

    peak: int
    frozen: int
    trained: int
    optimizer: int

    @property
    def needed(self) -> int:
        """With allowances for libraries and fragments."""
        return round(FRAGMENTS * self.peak + CONTEXT)

    def lines(self) -> list[str]:
        """A table of the parts, in GB."""
        rest = self.peak - self.frozen - self.trained - self.optimizer
        parts = {
            "frozen weights": self.frozen,
            "trained weights": self.trained,
            "optimizer": self.optimizer,
            "activations and gradients at the peak": rest,
            "total": self.peak,
            "total with libraries and the allocator": self.needed,
        }
        return [f"{name:44}{size / 1e9:7.2f} GB" for name, size in parts.items()]


@contextlib.contextmanager
def without_contents() -> Iterator[None]:
    """Inside the block, tensors are made without memory."""
    with FakeTensorMode():
        yield


def empty(network: Network) -> Network:
    """The network with weights of the same shapes and types on the CPU: inside of `without_contents`, without memory.

    It may have been on the meta device. Hooks that hold its weights are to be registered afterwards.
    """
    for module in network.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            bare = torch.empty(weight.shape, dtype=weight.dtype)
            module.register_parameter(name, nn.Parameter(bare, requires_grad=weight.requires_grad))
        for name, value in [*module.named_buffers(recurse=False)]:
            module.register_buffer(name, torch.empty(value.shape, dtype=value.dtype))
    return network


class Watch(TorchDispatchMode):
    """Adds up the storages that are alive among those that operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _as_on_gpu(network: nn.Module) -> None:
    """Let norms compute in float32, as under autocast on CUDA."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            vars(module)["forward"] = partial(_in_float32, module)


def _in_float32(module: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = module.weight.float(), module.bias.float()
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x.float(), module.num_groups, weight, bias, module.eps)
    return F.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)


def estimate(
    objective: Objective,
    target: Target,
    recipe: Recipe,
    precision: torch.dtype | None,
    batch: Batch,
    beside: int = 0,
) -> StepMemory:
    """The memory of a step of a run; its networks have no contents afterwards.

    objective   with what is trained not attached yet, see `Target.set_trainable`
    batch       of tensors on any device
    beside      bytes of other networks that stay in memory
    """
    with without_contents():
        empty(objective)
        objective.captions.empty = torch.empty(objective.captions.empty.shape, dtype=torch.long)
        target.attach()
        trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        count = sum(p.numel() for p in trained.values())
        small = recipe.optimizer == "adamw8bit"  # its kernels need tensors with contents
        optimizers = [] if small else make_optimizers(trained, recipe, torch.device("cpu"), {})
        values = [None if value is None else torch.empty(value.shape, dtype=value.dtype) for value in batch]
        found = step_memory(objective, Batch(*values), optimizers, precision)  # type: ignore[arg-type]
    more = (2 * count if small else 0) + (4 * count if recipe.ema else 0)
    return replace(
        found, peak=found.peak + more + beside, frozen=found.frozen + beside, optimizer=found.optimizer + more
    )


def blank_batch(model: StableDiffusion, size: int, count: int, encoded: bool) -> Batch:
    """A batch of `count` images of size x size pixels; `encoded` text or token ids."""
    config = model.config
    x0 = torch.zeros(count, *model.latent_shape(size, size))
    t, weight = torch.zeros(count, dtype=torch.long), torch.ones(count)
    batch = Batch(x0, x0, t, weight, torch.zeros(count, config.text[0].length, dtype=torch.long))
    if encoded:
        pooled = config.text[-1].pooled_width
        context = torch.zeros(count, config.text[0].length, config.unet.context)
        batch = batch._replace(context=context, pooled=torch.zeros(count, pooled) if pooled else None)
    if config.sizes:
        batch = batch._replace(sizes=torch.zeros(count, len(config.sizes)))
    if config.is_inpainting:
        batch = batch._replace(concat=torch.zeros(count, config.unet.in_channels - x0.shape[1], *x0.shape[2:]))
    return batch


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """The size of the storages of some tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def step_memory(
    objective: nn.Module,
    batch: Batch,
    optimizers: Sequence[torch.optim.Optimizer],
    precision: torch.dtype | None,
) -> StepMemory:
    """Run two training steps on tensors without contents; the first one makes the optimizer's state.

    objective   on the CPU, made inside of `without_contents`, without the networks that are not in memory then
    """
    watch = Watch()
    weights = [*objective.parameters(), *objective.buffers()]
    trained = [p for p in objective.parameters() if p.requires_grad]
    for tensor in (*weights, *(value for value in batch if value is not None)):
        watch.add(tensor)
    if precision is not None:
        _as_on_gpu(objective)
    with watch, torch.enable_grad():
        for _ in range(2):
            with torch.autocast("cpu", precision, enabled=precision is not None):
                loss = objective(batch)
            loss.backward()
            del loss
            nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    state = [v for o in optimizers for kept in o.state.values() for v in kept.values() if isinstance(v, Tensor)]
    own = bytes_of(trained)
    return StepMemory(watch.peak, bytes_of(weights) - own, own, bytes_of(state))
