"""What an adapter file does to one weight: the formula of each kind of adapter, from the tensors in the file.

W (out x in, or out x in x h x w) is the model's weight, s the scale, alpha / r with the rank r; all in float32.

    LowRank      LoRA, LoCon   s B A                             Hu et al. 2021 (arXiv:2106.09685); B "up", A "down"
                               s B M A                           a convolution whose kernel is in the "mid" M
    Hadamard     LoHa          s (A1 B1) * (A2 B2)               Hyeon-Woo et al. 2022, FedPara (arXiv:2108.06098)
    Kronecker    LoKr          s C (x) D                         Edalati et al. 2022 (arXiv:2212.10650)
    Generalized  GLoRA         s (W A1 A2 + B1 B2)               Chavan et al. 2023 (arXiv:2306.07967)
    Rescaling    (IA)3         l * W, by rows or columns         Liu et al. 2022 (arXiv:2205.05638)
    Rotation     OFT, BOFT     R W - W, R orthogonal             Qiu et al. 2023 (arXiv:2306.07280), Liu et al. 2023
    Full         full, norms   D                                 the difference itself, of weights, biases and norms
    Decomposed   DoRA          m (W + D) / |W + D| - W           Liu et al. 2024 (arXiv:2402.09353), around one of these

The formulas are those of LyCORIS (Yeh et al. 2023, arXiv:2309.14859) at its multiplier 1; with another weight w of the
adapter the change is w times that at 1, for every kind. So weight 0 changes nothing, and several adapters, each
computed from the original W, do not depend on their order.

>>> pair = LowRank({"down": torch.ones(1, 3), "up": torch.tensor([[1.0], [2.0]])}, scale=0.5)
>>> pair.delta(torch.zeros(2, 3))
tensor([[0.5000, 0.5000, 0.5000],
        [1.0000, 1.0000, 1.0000]])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.convert import squeezed

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # of the tensors of one change, by part


class Change:
    """The change of one weight: the tensors of a file, by part, and what computes the change from them.

    forms   the sets of parts that make a change of this kind complete
    scaled  whether the kind has a scale; otherwise it is 1
    inputs  number of input channels that the change is for, if the weight has more
    """

    forms: ClassVar[tuple[frozenset[str], ...]]
    scaled: ClassVar[bool] = True

    def __init__(self, tensors: Mapping[str, Tensor], scale: float = 1.0, inputs: int | None = None) -> None:
        self.tensors, self.scale, self.inputs = tensors, scale, inputs

    @staticmethod
    def shape(shapes: Shapes, weight: Shape) -> Shape | None:
        """The shape of the weight that the tensors are for, given that of the model's; None if they do not fit."""
        raise NotImplementedError

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        """The rank, by which alpha is divided; None if the scale is 1 whatever alpha is."""
        return None

    @classmethod
    def scale_of(cls, shapes: Shapes, alpha: float | None, root: bool = False) -> float:
        """alpha / r, or alpha / sqrt(r) if `root`. Without alpha, or with 0, it is the rank, as trainers read it."""
        rank = cls.rank(shapes)
        return 1.0 if rank is None else (alpha or rank) / (math.sqrt(rank) if root else rank)

    def delta(self, weight: Tensor) -> Tensor:
        """The change of this weight, which is in float32, with as many numbers, on its device."""
        raise NotImplementedError

    def delta_of(self, weight: Tensor) -> Tensor:
        """The change of a weight of any precision: in float32, with its shape, on its device."""
        part = weight if self.inputs is None else weight[:, : self.inputs]  # mask channels of inpainting are left
        delta = self.delta(part.float()).view(part.shape)
        more = weight.shape[1] - delta.shape[1] if self.inputs is not None else 0
        return F.pad(delta, (0, 0) * (weight.dim() - 2) + (0, more)) if more else delta

    def _on(self, weight: Tensor, *parts: str) -> list[Tensor]:
        return [self.tensors[part].to(weight.device, torch.float32) for part in parts]


class LowRank(Change):
    """LoRA: B A, or B M A. LoCon's A has the kernel of the convolution, B is 1x1; with M, A and B are 1x1."""

    forms = (frozenset({"down", "up"}), frozenset({"down", "up", "mid"}))

    @staticmethod
    def shape(shapes: Shapes, weight: Shape) -> Shape | None:
        """Shape (out, in, ...) of B A."""
        down, up, mid = shapes["down"], squeezed(shapes["up"], 2), shapes.get("mid")
        if len(down) < 2 or len(up) != 2 or up[1] != down[0]:
            return None
        if mid is None:
            return (up[0], *down[1:])
        fits = len(mid) == 4 and mid[:2] == (down[0], down[0]) and len(squeezed(down, 2)) == 2
        return (up[0], down[1], *mid[2:]) if fits else None

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        """Rows of A."""
        return shapes["down"][0]

    def delta(self, weight: Tensor) -> Tensor:
        """B A or B M A."""
        down, up = (x.flatten(1) for x in self._on(weight, "down", "up"))
        up = up * self.scale  # the smallest of the tensors
        if "mid" not in self.tensors:
            return up @ down
        return torch.einsum("oa,abhw,bi->oihw", up, *self._on(weight, "mid"), down)


class Hadamard(Change):
    """LoHa: the product by elements of two low-rank matrices, or of two kernels in Tucker form."""

    forms = (
        frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
    )

    @staticmethod
    def shape(shapes: Shapes, weight: Shape) -> Shape | None:
        """Shape (out, in h w), or (out, in, h, w)."""
        made = [_factored(*(shapes.get(f"hada_{part}") for part in (f"w{i}_a", f"w{i}_b", f"t{i}"))) for i in "12"]
        return made[0] if made[0] == made[1] else None

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        """Rows of B1."""
        return shapes["hada_w1_b"][0]

    def delta(self, weight: Tensor) -> Tensor:
        """(A1 B1) * (A2 B2)."""
        one, two = (self._product(weight, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in "12")
        return one * two * self.scale

    def _product(self, weight: Tensor, a: str, b: str, core: str) -> Tensor:
        return _matrix_or_tucker(*self._on(weight, a, b, *([core] if core in self.tensors else [])))


class Kronecker(Change):
    """LoKr: the Kronecker product of a small matrix C and a larger one D; either may be a product of two, D Tucker's.

    If both are whole the scale is 1.
    """

    forms = tuple(
        frozenset({*small, *large})
        for small, large in product(
            (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
            (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2")),
        )
    )

    @staticmethod
    def shape(shapes: Shapes, weight: Shape) -> Shape | None:
        """Shape (out, in h w), or (out, in, h, w)."""
        small, large = (
            shapes.get(f"lokr_{w}") or _factored(*(shapes.get(f"lokr_{part}") for part in (f"{w}_a", f"{w}_b", core)))
            for w, core in (("w1", ""), ("w2", "t2"))
        )
        if small is None or large is None or len(small) != 2 or len(large) < 2:
            return None
        return (small[0] * large[0], small[1] * large[1], *large[2:])

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        """Rows of the second factor of C, or of D."""
        factor = shapes.get("lokr_w1_b") or shapes.get("lokr_w2_b")
        return factor[0] if factor else None

    def delta(self, weight: Tensor) -> Tensor:
        """C (x) D, kernels as a part of the columns."""
        small, large = (self._factor(weight, w, t).flatten(1) for w, t in (("w1", ""), ("w2", "t2")))
        return torch.kron(small, large) * self.scale

    def _factor(self, weight: Tensor, name: str, core: str) -> Tensor:
        if f"lokr_{name}" in self.tensors:
            return self._on(weight, f"lokr_{name}")[0]
        parts = [f"lokr_{part}" for part in (f"{name}_a", f"{name}_b", core)]
        return _matrix_or_tucker(*self._on(weight, *(part for part in parts if part in self.tensors)))


class Generalized(Change):
    """GLoRA: W A1 A2 + B1 B2. In the first version of the format "1" and "2" are exchanged, which shapes show."""

    forms = (frozenset({"a1", "a2", "b1", "b2"}), frozenset({"a1", "a2", "b1", "b2", "bm"}))

    @staticmethod
    def shape(shapes: Shapes, weight: Shape) -> Shape | None:
        """Shape of B1 B2, if that of A1 A2 is (in, in)."""
        for one, two in ("12", "21"):
            a = LowRank.shape({"up": shapes[f"a{one}"], "down": shapes[f"a{two}"]}, weight)
            mid = {"mid": shapes["bm"]} if "bm" in shapes else {}
            b = LowRank.shape({"up": shapes[f"b{one}"], "down": shapes[f"b{two}"], **mid}, weight)
            if a is not None and b is not None and squeezed(a, 2) == (b[1], b[1]) and b[0] == weight[0]:
                return b
        return None

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        """The smaller side of A1."""
        return min(shapes["a1"][:2])

    def delta(self, weight: Tensor) -> Tensor:
        """W A1 A2 + B1 B2."""
        a1, b1 = self.tensors["a1"], self.tensors["b1"]
        one, two = "12" if (len(a1), len(b1)) == (weight.shape[1], weight.shape[0]) else "21"
        a1, a2 = (x.flatten(1) for x in self._on(weight, f"a{one}", f"a{two}"))
        mid = {"mid": self.tensors["bm"]} if "bm" in self.tensors else {}
        b = LowRank({"up": self.tensors[f"b{one}"], "down": self.tensors[f"b{two}"], **mid}).delta(weight)
        return (torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + b.view(weight.shape)) * self.scale


class Rescaling(Change):
    """(IA)3: a factor for every output, or for every input if `on_input`; the file has the factors minus 1."""

    forms = (frozenset({"weight", "on_input"}),)
    scaled = False

    @staticmethod
    def shape(shapes: Shapes, weight: Shape) -> Shape | None:
        """That of the weight, if there are as many factors as outputs or inputs."""
        return weight if math.prod(shapes["weight"]) in weight[:2] and math.prod(shapes["on_input"]) == 1 else None

    def delta(self, weight: Tensor) -> Tensor:
        """l * W."""
        (factors,) = self._on(weight, "weight")
        axis = int(bool(self.tensors["on_input"].flatten()[0]))
        axis = axis if factors.numel() == weight.shape[axis] else 1 - axis
        return weight * factors.reshape([-1 if i == axis else 1 for i in range(weight.dim())])


class Rotation(Change):
    """OFT: blocks of outputs are rotated by R = (I + Q) (I - Q)^-1 with Q = B - B^T (Cayley). `scale` limits |Q|.

    With four dimensions, blocks are of BOFT's m butterfly stages. `rescale` multiplies the outputs afterwards.
    """

    forms = (frozenset({"oft_blocks"}), frozenset({"oft_blocks", "rescale"}))
    scaled = False

    @staticmethod
    def shape(shapes: Shapes, weight: Shape) -> Shape | None:
        """That of the weight, if the blocks cover its outputs."""
        *stages, count, rows, columns = blocks = shapes["oft_blocks"] if len(shapes["oft_blocks"]) > 2 else (0, 0, 1)
        fits = rows == columns and count * rows == weight[0] and len(blocks) in (3, 4)
        # stage i mixes outputs at a distance of 2^i rows / 2
        fits = fits and (not stages or (rows % 2 == 0 and weight[0] % (2 ** stages[0] * rows // 2) == 0))
        return weight if fits and math.prod(shapes.get("rescale", weight[:1])) == weight[0] else None

    @classmethod
    def scale_of(cls, shapes: Shapes, alpha: float | None, root: bool = False) -> float:
        """alpha, the largest norm of Q per output; 0 is no limit."""
        return alpha or 0.0

    def delta(self, weight: Tensor) -> Tensor:
        """R W - W."""
        (blocks,) = self._on(weight, "oft_blocks")
        skew = blocks - blocks.transpose(-1, -2)
        limit, norm = self.scale * len(weight), float(skew.norm()) + 1e-8
        if 0 < limit < norm:
            skew = skew * (limit / norm)
        eye = torch.eye(skew.shape[-1], device=weight.device)
        rotations = (eye + skew) @ torch.linalg.inv_ex(eye - skew)[0]
        if blocks.dim() == 3:
            rows = weight.reshape(*rotations.shape[:2], -1)
            rotated = torch.einsum("knm,knx->kmx", rotations, rows).reshape(weight.shape)
        else:
            rotated = self._butterfly(rotations, weight.flatten(1)).view(weight.shape)
        if "rescale" in self.tensors:
            rotated = rotated * self._on(weight, "rescale")[0].reshape([-1] + [1] * (weight.dim() - 1))
        return rotated - weight

    @staticmethod
    def _butterfly(rotations: Tensor, rows: Tensor) -> Tensor:
        """(m, k, b, b) applied one stage after the other to (out, n), each to other groups of b outputs."""
        size = rotations.shape[-1]
        for i, stage in enumerate(rotations):
            distance = 2**i * size // 2
            grouped = rows.unflatten(0, (-1, 2, distance)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            mixed = torch.einsum("kij,kjx->kix", stage, grouped).flatten(0, 1)
            rows = mixed.unflatten(0, (-1, distance, 2)).transpose(1, 2).flatten(0, 2)
        return rows


class Full(Change):
    """The whole difference, as it stands in the file: of a weight, of a norm's weight, or of a bias."""

    forms = (frozenset({"diff"}), frozenset({"w_norm"}))

    @staticmethod
    def shape(shapes: Shapes, weight: Shape) -> Shape | None:
        """That of the difference."""
        (shape,) = shapes.values()
        return shape

    def delta(self, weight: Tensor) -> Tensor:
        """D."""
        (part,) = self.tensors
        return self._on(weight, part)[0] * self.scale


class Decomposed(Change):
    """DoRA: the direction of W + D, with trained norms m of its rows, (out, 1, ...), or its columns, (1, in, ...)."""

    forms = ()

    def __init__(self, change: Change, magnitudes: Tensor, per_input: bool) -> None:
        super().__init__(change.tensors, change.scale, change.inputs)
        self._change, self._magnitudes, self._per_input = change, magnitudes, per_input

    @staticmethod
    def per_input(magnitudes: Shape, weight: Shape) -> bool | None:
        """Whether norms of this shape are those of the columns of a weight; None if they do not fit it."""
        count = math.prod(magnitudes)
        if len(magnitudes) > 1 and magnitudes[:2] == (1, count) and count == weight[1]:
            return True
        return False if count == weight[0] else None

    def delta(self, weight: Tensor) -> Tensor:
        """m (W + D) / |W + D| - W."""
        merged = weight + self._change.delta(weight).view(weight.shape)
        axis = int(self._per_input)
        norms = merged.transpose(0, axis).flatten(1).norm(dim=1) + torch.finfo(torch.float32).eps
        factors = self._magnitudes.to(weight.device, torch.float32).flatten() / norms
        return merged * factors.reshape([-1 if i == axis else 1 for i in range(weight.dim())]) - weight


def _factored(a: Shape | None, b: Shape | None, core: Shape | None) -> Shape | None:
    """The shape of `_matrix_or_tucker`."""
    if a is None or b is None or len(a) != 2 or len(b) < 2:
        return None
    if core is None:
        return (a[0], *b[1:]) if a[1] == b[0] else None
    fits = len(core) == 4 and core[:2] == (a[0], b[0]) and len(b) == 2
    return (a[1], b[1], *core[2:]) if fits else None


def _matrix_or_tucker(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """A B of (out, r) and (r, in h w); or of (r, out), (r, in) and the core (r, r, h, w) the kernel (out, in, h, w)."""
    return a @ b.flatten(1) if core is None else torch.einsum("ijhw,io,jc->ochw", core, a, b)


KINDS: tuple[type[Change], ...] = (LowRank, Hadamard, Kronecker, Generalized, Rescaling, Rotation, Full)
