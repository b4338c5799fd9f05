"""The tensors that a LoRA file has for one layer -> the changes of its weight and its bias.

The end of a key says which part of an adapter a tensor is: `ENDINGS`. The parts that are there say which kind of
adapter it is (changes.py). To add a kind, add the endings of its keys here, and its class to `KINDS` there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, CheckpointError
from ..checkpoints.convert import shape_text, squeezed
from ..checkpoints.finite import check_numbers
from .changes import KINDS, Change, Decomposed, Full, Shape
from .lora_names import flat

# The end of a key, as `flat` writes it -> the part of an adapter.
ENDINGS = {
    "lora_down_weight": "down", "lora_up_weight": "up", "lora_mid_weight": "mid",
    "lora_linear_layer_down_weight": "down", "lora_linear_layer_up_weight": "up",
    "lora_A_weight": "down", "lora_B_weight": "up", "lora_A": "down", "lora_B": "up",
    "lora_B_bias": "up_bias", "lora_up_bias": "up_bias", "up": "up", "down": "down",
    "lora_magnitude_vector_weight": "magnitude", "lora_magnitude_vector": "magnitude", "dora_scale": "dora_scale",
    **{f"{name}_weight": name for name in ("a1", "a2", "b1", "b2", "bm")},
    **{
        name: name
        for name in (
            "alpha", "scale", "scalar", "weight", "on_input", "diff", "diff_b", "w_norm", "b_norm",
            "oft_blocks", "rescale", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        )
    },
}  # fmt: skip
LONGEST_FIRST = sorted(ENDINGS, key=len, reverse=True)
# the name of an adapter in PEFT
ADAPTER_NAME = re.compile(r"(lora_(?:A|B|magnitude_vector))\.(?!weight$|bias$|alpha$)[^.]+(?=\.(?:weight|bias)$|$)")
# a key of an adapter in any naming, whether or not all of it is known
ADAPTER_KEY = re.compile(r"(^|[._])(lora|hada|lokr|oft)(?=[._A-Z])|:(up|down)$")
ONE_NUMBER = ("alpha", "scale", "scalar")
OF_BIAS = ("diff_b", "b_norm")
LEFT_ALONE = "without the other parts of its adapter"
RANK_0 = "of rank 0"
NO_BIAS = "of biases that this model does not have"

Alpha = Callable[[int], tuple[float | None, bool]]  # rank -> alpha, and whether it is divided by the root of the rank


def split_key(key: str) -> tuple[str, str] | None:
    """A key -> the name of a layer and the part of an adapter; None if its end is not known.

    >>> split_key("unet.mid_block.attentions.0.proj_in.lora_A.default.weight")
    ('unet_mid_block_attentions_0_proj_in', 'down')
    """
    name = flat(ADAPTER_NAME.sub(r"\1", key))
    for ending in LONGEST_FIRST:
        if name.endswith(f"_{ending}"):
            return name.removesuffix(f"_{ending}"), ENDINGS[ending]
    return None


class Misfit(Exception):
    """The tensors are for a weight of another shape."""


class LayerParts(NamedTuple):
    """What a file has for one layer.

    keys      the key of each part
    weight    its shape in the model
    bias      the same, None for a layer without
    numbers   parts that are plain numbers beside the tensors, as pickles may have them
    """

    file: Checkpoint
    keys: dict[str, str]
    weight: Shape
    bias: Shape | None
    numbers: dict[str, float]

    def shape(self, part: str) -> Shape:
        """The shape of a part in the file."""
        return self.file.shape(self.keys[part])

    def kind(self) -> type[Change] | None:
        """The kind of the weight's change; None if no kind is complete.

        Raises CheckpointError if there are several.
        """
        found = [kind for kind in KINDS if self._of(kind) in kind.forms]
        if len(found) > 1:
            names = " and ".join(next(iter(self._of(kind))) for kind in found)
            raise CheckpointError(f"two adapters for one weight, {names} of {self.keys[min(self.keys)]}")
        return found[0] if found else None

    def _of(self, kind: type[Change]) -> frozenset[str]:
        """The parts of a kind that are there."""
        return frozenset(part for form in kind.forms for part in form if part in self.keys)

    def used(self) -> frozenset[str]:
        """The parts that have an effect; the others are left over."""
        kind = self.kind()
        parts = set(OF_BIAS) & set(self.keys) if self.bias is not None else set()
        if kind is not None:
            parts |= self._of(kind) | ({*ONE_NUMBER, "dora_scale", "magnitude"} & set(self.keys))
            parts |= {"up_bias"} & set(self.keys) if "up" in self.keys and self.bias is not None else set()
        return frozenset() if self._empty() else frozenset(parts)

    def _empty(self) -> bool:
        """Whether a matrix is without numbers. An alpha without one is not rank 0, but damage."""
        return any(0 in self.shape(part) for part in self.keys if part not in ONE_NUMBER)

    def left_over(self) -> Iterator[tuple[str, str]]:
        """The keys that have no effect, each with the reason."""
        used, empty = self.used(), self._empty()
        for part in self.keys.keys() - used:
            no_bias = self.bias is None and part in (*OF_BIAS, "up_bias")
            yield self.keys[part], RANK_0 if empty else NO_BIAS if no_bias else LEFT_ALONE

    def shape_made(self) -> Shape | None:
        """The shape of the weight that the parts are for; None if there are none, or if they do not fit each other."""
        kind = self.kind()
        if kind is None:
            return None
        return kind.shape({part: self.shape(part) for part in self._of(kind)}, self.weight)

    def alpha_is_zero(self) -> bool:
        """Whether alpha, where it is a factor, is 0: trainers then take the rank, other programs apply nothing."""
        kind = self.kind() if self.used() else None
        ranked = kind is not None and kind.rank({part: self.shape(part) for part in self._of(kind)}) is not None
        return ranked and self._number("alpha") == 0

    def changes(self, alpha: Alpha, narrow: int | None) -> Iterator[tuple[str, Change]]:
        """The changes of "weight" and "bias".

        alpha    alpha for a rank, if the layer has none of its own
        narrow   number of input channels that may be in the file instead of the weight's

        Raises Misfit for other shapes, CheckpointError for numbers that are not finite.
        """
        used, kind = self.used(), self.kind()
        scale = 1.0
        if kind is not None and used & self._of(kind):
            shapes = {part: self.shape(part) for part in self._of(kind)}
            inputs, made = None, kind.shape(shapes, self.weight)
            if narrow is not None and (made is None or not fits(made, self.weight)):
                inputs = narrow
                made = kind.shape(shapes, self._narrowed(narrow))
            if made is None or not fits(made, self.weight if inputs is None else self._narrowed(inputs)):
                listed = ", ".join(f"{part} {shape_text(shape)}" for part, shape in sorted(shapes.items()))
                what = (
                    f"is for {shape_text(made)}"
                    if made
                    else f"has parts whose shapes match neither each other nor the weight ({listed})"
                )
                raise Misfit(f"{self.name()} {what}, the model's is {shape_text(self.weight)}")
            scale = self._scale(kind, shapes, alpha)
            tensors = {part: self._tensor(part) for part in self._of(kind)}
            change = kind(tensors, scale, inputs)
            yield "weight", self._decomposed(change, self.weight if inputs is None else self._narrowed(inputs))
        for part in ("up_bias", *OF_BIAS):
            if part in used and self.bias is not None:
                if math.prod(self.shape(part)) != math.prod(self.bias):
                    raise Misfit(f"{self.keys[part]} is {shape_text(self.shape(part))}, not {shape_text(self.bias)}")
                yield "bias", Full({"diff": self._tensor(part)}, scale if part == "up_bias" else 1.0)

    def _narrowed(self, inputs: int) -> Shape:
        return (self.weight[0], inputs, *self.weight[2:])

    def name(self) -> str:
        """A key of the layer, which stands for it in messages."""
        return next(iter(self.keys.values()))

    def _decomposed(self, change: Change, weight: Shape) -> Change:
        """The change, or DoRA around it."""
        part = "magnitude" if "magnitude" in self.keys else "dora_scale"
        if part not in self.keys:
            return change
        shape = self.shape(part)
        by_rows = part == "magnitude" and math.prod(shape) == weight[0]  # PEFT's may look like columns
        per_input = False if by_rows else Decomposed.per_input(shape, weight)
        if per_input is None or len(weight) < 2:
            raise Misfit(f"{self.keys[part]} is {shape_text(shape)}, the weight {shape_text(weight)}")
        return Decomposed(change, self._tensor(part), per_input)

    def _scale(self, kind: type[Change], shapes: Mapping[str, Shape], alpha: Alpha) -> float:
        """alpha / r or the like, times LyCORIS's `scalar`."""
        own, root = self._number("alpha"), False
        if own is None:
            own, root = alpha(kind.rank(shapes) or 1)
        whole, factor = (self._number(part) if kind.scaled else None for part in ("scale", "scalar"))
        scale = kind.scale_of(shapes, own, root) if whole is None else whole
        scale *= 1.0 if factor is None else factor
        if not math.isfinite(scale):
            raise CheckpointError(f"the alpha of {self.name()} is not finite: the file is damaged")
        return scale

    def _number(self, part: str) -> float | None:
        """A part that is one number; None if the file does not have it."""
        return read_number(self.file, self.keys[part]) if part in self.keys else self.numbers.get(part)

    def _tensor(self, part: str) -> Tensor:
        tensor = self.file[self.keys[part]]
        if part != "on_input":
            check_numbers(self.keys[part], tensor)
        return tensor


def fits(made: Shape, weight: Shape) -> bool:
    """Whether a change is for a weight of this shape: without 1x1 kernels, or with kernels as a part of the columns."""
    same = made[:1] == weight[:1] and math.prod(made) == math.prod(weight)
    return same and (len(made) <= 2 or squeezed(made, 2) == squeezed(weight, 2))


def plain_number(key: str, text: str) -> float:
    """The number that stands in a file as text. CheckpointError if it is something else."""
    try:
        return float(text)
    except ValueError:
        raise CheckpointError(f"{key} is {text!r:.50}, expected one number") from None


def read_number(file: Checkpoint, key: str) -> float:
    """The only number of a tensor. CheckpointError if there are others."""
    if math.prod(file.shape(key)) != 1:
        raise CheckpointError(f"{key} is {shape_text(file.shape(key))}, expected one number")
    return float(file[key].to(torch.float64).flatten()[0])
