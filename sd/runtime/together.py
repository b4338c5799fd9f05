"""One evaluation of a network for several batches, each with the output that it has alone, to the bit.

A network is faster for one large batch than for several small ones. But kernels split their sums by the size of their
input, so the same image is rounded differently in another batch, and after twenty steps in bfloat16 that is visible.
Nearly all layers do not care, though: of the 130 of a U-Net, four or five give other bits. `Together` finds them by
comparing, and evaluates only them batch by batch:

    first evaluation of a shape    each batch alone, and all together; the layers whose outputs differ are remembered
    all others                     together, with those layers batch by batch

Which layers differ depends on shapes, precision, processor and number of threads. It does not depend on the values, as
the order in which a kernel adds does not. In bfloat16, though, another order changes only one result in 50,000. So
linear layers and convolutions are compared on values that show it: large ones, which cancel out exactly, between small
ones, whose sum then has the rounding errors of the large ones. If the outputs of the whole network differ in spite of
all this, or if there is too little memory, batches of that shape are evaluated in halves, and at last alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..messages import is_out_of_memory
from ..models.layers import Attention, FeedForward, Upsample

UNITS = (Attention, FeedForward, Upsample)  # whose forward need not call the layers in them: kernels may fuse them
MOST_SHAPES = 1000  # that are remembered
LARGE = 2.0**16  # of the values that cancel out: float32 then keeps 8 bits of the others, as many as bfloat16 has


class Batch(NamedTuple):
    """The inputs of one evaluation of a U-Net: x (B, C, h, w), t (B,) and the conditioning of as many."""

    x: Tensor
    t: Tensor
    conditioning: Conditioning

    def shape(self) -> tuple[object, ...]:
        """What batches that are evaluated together have in common."""
        parts = (self.x, self.t, *self.conditioning)
        return tuple(None if part is None else (*part.shape, part.dtype) for part in parts)


class Key(NamedTuple):
    """What the layers that differ depend on: number and shape of the batches, threads."""

    batches: int
    shape: object
    threads: int


class Together:
    """Evaluates batches of one shape together.

    unet       whose layers are looked at
    evaluate   calls it: (x, t, conditioning) -> output of the shape of x
    """

    def __init__(self, unet: nn.Module, evaluate: Callable[[Tensor, Tensor, Conditioning], Tensor]) -> None:
        self.unet, self._evaluate = unet, evaluate
        # by shape and number of batches: the layers to evaluate batch by batch; None if that is not enough
        self._known: dict[Key, tuple[nn.Module, ...] | None] = {}
        self._seconds: dict[tuple[object, int], float] = {}  # by shape and number of batches: of the fastest evaluation

    def __call__(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The output of the network for each batch; all have the same `shape`."""
        shape = batches[0].shape()
        if len(batches) == 1:
            return self._timed(shape, 1, partial(self._alone, batches))
        key = Key(len(batches), shape, torch.get_num_threads())
        try:
            if key not in self._known:
                if len(self._known) >= MOST_SHAPES:
                    self._known.clear()
                return self._compare(key, batches)
            if (layers := self._known[key]) is not None:
                return self._timed(shape, len(batches), partial(self._joined, batches, layers))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._known[key] = None  # so many do not fit
        half = len(batches) // 2
        return self(batches[:half]) + self(batches[half:])

    def gain(self, shape: object) -> float | None:
        """How many times as fast batches of this shape are together, at best; None if that is not known yet.

        Always None where evaluations are not done when they return, as on GPUs.
        """
        alone = self._seconds.get((shape, 1))
        together = [
            count * alone / each for (s, count), each in self._seconds.items() if s == shape and count > 1 and alone
        ]
        known = [layers for key, layers in self._known.items() if key.shape == shape]
        return max(together) if together else 1.0 if known and None in known else None

    def _timed(self, shape: object, count: int, evaluate: Callable[[], list[Tensor]]) -> list[Tensor]:
        begun = perf_counter()
        outputs = evaluate()
        if outputs[0].device.type == "cpu":
            self._note_time(shape, count, perf_counter() - begun)
        return outputs

    def _note_time(self, shape: object, count: int, seconds: float) -> None:
        if len(self._seconds) >= MOST_SHAPES:
            self._seconds.clear()
        self._seconds[shape, count] = min(seconds, self._seconds.get((shape, count), seconds))

    def layers(self) -> dict[str, list[str]]:
        """What was found, for each shape as text: the names of the layers that are evaluated batch by batch."""
        names = {module: name for name, module in self.unet.named_modules()}
        return {
            str(key): ["(whole network)"] if found is None else [names[layer] for layer in found]
            for key, found in self._known.items()
        }

    def _alone(self, batches: Sequence[Batch]) -> list[Tensor]:
        return [self._evaluate(*batch) for batch in batches]

    def _joined(self, batches: Sequence[Batch], layers: Sequence[nn.Module]) -> list[Tensor]:
        """All batches as one, with some layers batch by batch."""
        x, t, conditioning = (list(column) for column in zip(*batches, strict=True))
        with split(layers, len(batches)):
            out = self._evaluate(torch.cat(x), torch.cat(t), Conditioning.joined(conditioning))
        return list(out.chunk(len(batches)))

    def _compare(self, key: Key, batches: Sequence[Batch]) -> list[Tensor]:
        """Evaluate alone, and find out what differs together."""
        expected = self._timed(batches[0].shape(), 1, partial(self._alone, batches[:1])) + self._alone(batches[1:])

        if not all(bool(out.isfinite().all()) for out in expected):
            return expected  # numbers that are not finite differ from themselves: that says nothing about the layers

        def is_enough(layers: Sequence[nn.Module]) -> bool:
            return all(map(torch.equal, expected, self._joined(batches, layers)))

        differing = self._differing(batches)
        leaves = [layer for layer in differing if not isinstance(layer, UNITS)]
        self._known[key] = next((tuple(layers) for layers in (leaves, differing) if is_enough(layers)), None)
        return expected

    def _differing(self, batches: Sequence[Batch]) -> list[nn.Module]:
        """The layers whose output for the whole batch differs from those for its parts, given the same inputs."""
        found: dict[nn.Module, None] = {}
        with ExitStack() as stack:
            for module in self.unet.modules():
                if isinstance(module, UNITS) or not any(True for _ in module.children()):
                    stack.enter_context(_compared(module, len(batches), found))
            self._joined(batches, ())
        return list(found)


@contextmanager
def split(layers: Sequence[nn.Module], parts: int) -> Iterator[None]:
    """Within this context, layers are called for each of so many parts of the batch in turn."""
    for layer in layers:
        layer.forward = _by_parts(layer.forward, parts)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # that of the class again


def _by_parts(forward: Callable[..., Any], parts: int) -> Callable[..., Any]:
    def run(*args: Any, **named: Any) -> Any:
        size = _batch(args, named)
        if size is None or size % parts:
            return forward(*args, **named)
        outputs = []
        for i in range(parts):
            own = slice(i * size // parts, (i + 1) * size // parts)
            outputs.append(
                forward(*(_part(arg, size, own) for arg in args), **{k: _part(v, size, own) for k, v in named.items()})
            )
        return torch.cat(outputs)

    return run


@contextmanager
def _compared(module: nn.Module, parts: int, found: dict[nn.Module, None]) -> Iterator[None]:
    """Within this context, each call of a layer is repeated part by part; it is added to `found` if that differs."""
    given: list[tuple[Any, Any]] = []

    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        # copies, as a layer may overwrite its input
        given.append((tuple(map(_copy, args)), {name: _copy(value) for name, value in named.items()}))

    def after(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
        inputs, more = given.pop()
        expected = _by_parts(module.forward, parts)(*inputs, **more)
        if isinstance(out, Tensor) and not torch.equal(out, expected):
            found[module] = None
            return expected  # so that only the layers that differ themselves are found
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in found and not _adds_alike(module, inputs, parts):
            found[module] = None
        return None

    hooks = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adds_alike(layer: nn.Linear | nn.Conv2d, inputs: tuple[Any, ...], parts: int) -> bool:
    """Whether a layer adds in the same order for a batch and its parts, seen on values that show it."""
    generator = torch.Generator().manual_seed(0)
    axis = 1 if isinstance(layer, nn.Conv2d) else -1  # of the channels of x and of the weight
    channels = layer.weight.shape[axis]
    pairs = torch.randperm(channels, generator=generator)[: channels // 4 * 2].reshape(2, -1)
    shape = [*inputs[0].shape]
    x = torch.randn(shape, generator=generator)
    large = torch.randn([*shape[:axis], pairs.shape[1], *shape[axis:][1:]], generator=generator) * LARGE
    x.index_copy_(axis, pairs[0], large).index_copy_(axis, pairs[1], -large)
    probe = copy.deepcopy(layer)
    weight = torch.randn(probe.weight.shape, generator=generator)
    weight.index_copy_(axis, pairs[1], weight.index_select(axis, pairs[0]))  # so that large values cancel out
    with torch.no_grad():
        probe.weight.copy_(weight)
    given = torch.empty_like(inputs[0]).copy_(x)
    rest = inputs[1:]
    return torch.equal(probe.forward(given.clone(), *rest), _by_parts(probe.forward, parts)(given, *rest))


def _batch(args: tuple[Any, ...], named: dict[str, Any]) -> int | None:
    """The size of the batch: that of the first tensor."""
    return next((len(value) for value in (*args, *named.values()) if isinstance(value, Tensor) and value.dim()), None)


def _part(value: Any, size: int, own: slice) -> Any:
    return value[own] if isinstance(value, Tensor) and value.dim() and len(value) == size else value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
