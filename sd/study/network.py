"""The parts of the U-Net: shapes, parameters and operations, traced in a forward pass.

A multiplication and an addition count as two floating point operations (FLOPs). Only matrix products count, as is
customary; normalisations, activations and the softmax do not:

    convolution   2 k² C_in C_out H W          linear   2 D_in D_out N          attention   4 N M D

These are the operations of the formulas; runtime/cpu_kernels.py computes some convolutions with fewer.

>>> from sd.config import UNetConfig
>>> parts = trace(UNet(UNetConfig(channels=(32, 64), heads=(2, 2), depth=(0, 1), blocks=1)), 16, 16)
>>> parts[1].name, parts[1].shape, parts[1].flops == 2 * 3 * 3 * 4 * 32 * 16 * 16
('conv_in', (1, 32, 16, 16), True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..models.layers import Attention
from ..models.unet import SpatialTransformer, UNet
from .attention import check_plain
from .drawing import INK, MUTED, PAPER, SIZE, SMALL, above, figure, paragraph, table, text_width, write


class Part(NamedTuple):
    """One block of the U-Net, traced in a forward pass."""

    name: str  # as in the state dict: "down.0.res.1"
    kind: str  # its class
    shape: tuple[int, ...]  # of its output, (B, C, H, W)
    parameters: int
    flops: int
    depth: int = 0  # transformer blocks in it, one after another


def _flops(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> int:
    """FLOPs of one call of a layer, without its children."""
    if isinstance(module, nn.Conv2d):
        return 2 * math.prod(module.kernel_size) * module.in_channels // module.groups * out.numel()
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * out.numel()
    if isinstance(module, Attention):
        context = args[1] if len(args) > 1 else args[0]
        return 4 * context.shape[1] * out.numel()
    return 0


def blocks(unet: UNet) -> list[str]:
    """Names of the blocks, in the order of the forward pass."""
    names = ["time", *["vector"] * (unet.vector is not None), "conv_in"]
    stages = [("down", i) for i in range(len(unet.down))] + [("mid", 0)] * (unet.mid is not None)
    stages += [("up", i) for i in reversed(range(len(unet.up)))]
    for part, i in stages:
        if part == "mid":
            attends = unet.config.middle_depth != 0
            names += ["mid.res.0", "mid.attn", "mid.res.1"] if attends else ["mid.res.0"]
            continue
        stage: Any = unet.get_submodule(f"{part}.{i}")
        for k in range(len(stage.res)):
            names.append(f"{part}.{i}.res.{k}")
            if stage.attn:
                names.append(f"{part}.{i}.attn.{k}")
        names += [f"{part}.{i}.{step}" for step in ("down", "up") if getattr(stage, step) is not None]
    return [*names, "norm_out", "conv_out"]


def trace(unet: UNet, height: int, width: int, tokens: int = 77) -> list[Part]:
    """Run the network once on latents (1, C, height, width) and record shape and FLOPs of each block.

    This is a real forward pass; for a network on the "meta" device it takes neither time nor memory.
    """
    check_plain(unet)
    names = blocks(unet)
    shapes: dict[str, tuple[int, ...]] = {}
    flops = dict.fromkeys(names, 0)
    handles = []

    def shape_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            shapes[name] = tuple(out.shape)

        return hook

    def flops_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            flops[name] += _flops(module, args, out)

        return hook

    for name in names:
        part = unet.get_submodule(name)
        handles.append(part.register_forward_hook(shape_of(name)))
        handles += [module.register_forward_hook(flops_of(name)) for module in part.modules()]
    weight = unet.norm_out.weight

    try:
        with torch.no_grad():
            x = weight.new_zeros(1, unet.config.in_channels, height, width)
            told = None if unet.guidance is None else torch.ones(1, device=weight.device)
            vector = None if unet.config.vector is None else weight.new_zeros(1, unet.config.vector)
            conditioning = Conditioning(weight.new_zeros(1, tokens, unet.config.context), vector, guidance=told)
            unet(x, torch.zeros(1, device=weight.device), conditioning)
    finally:
        for handle in handles:
            handle.remove()
    parts = []
    for name in names:
        part = unet.get_submodule(name)
        kind = "MLP" if name in ("time", "vector") else type(part).__name__
        depth = len(part.blocks) if isinstance(part, SpatialTransformer) else 0
        parts.append(Part(name, kind, shapes[name], sum(p.numel() for p in part.parameters()), flops[name], depth))
    return parts


def level_of(name: str, levels: int) -> int:
    """The level of a block, 0 the finest. Down- and upsampling belong to the level of their input.

    >>> level_of("up.1.res.0", 4), level_of("mid.attn", 4), level_of("conv_in", 4)
    (1, 3, 0)
    """
    if name.startswith("mid"):
        return levels - 1
    return int(name.split(".")[1]) if name.startswith(("down", "up")) else 0


def count(number: float) -> str:
    """A number with three digits and a unit: 859520964 -> "860 M".

    >>> count(859520964), count(9810)
    ('860 M', '9.81 k')
    """
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def _class(part: Part) -> str:
    """The class of a part, and the number of blocks of a transformer with several."""
    return f"{part.kind}, {part.depth} blocks" if part.depth > 1 else part.kind


def rows(parts: Sequence[Part], levels: int) -> list[list[str]]:
    """The parts as rows of a table, with the total in the last row."""
    body = [
        [part.name, _class(part), " x ".join(map(str, part.shape[1:])), count(part.parameters), count(part.flops)]
        for part in parts
    ]
    total = ["all", "", "", count(sum(part.parameters for part in parts)), count(sum(part.flops for part in parts))]
    return [*body, total]


# ------------------------------------------------------------------------------------- drawing

KINDS = {  # colour of a box and its description
    "ResBlock": ((205, 225, 244), "residual block"),
    "SpatialTransformer": ((255, 226, 179), "transformer: self-, cross-attention, feed-forward"),
    "Conv2d": ((223, 227, 232), "convolution"),
    "Upsample": ((223, 227, 232), "up- or downsampling"),
}


def draw_u(parts: Sequence[Part], unet: UNet) -> Image.Image:
    """The U: a row of boxes for each level, encoder on the left, decoder on the right, skip connections in between."""
    levels = len(unet.config.channels)
    box, gap, row = (46, 46), 8, 118
    down = {i: [p for p in parts if p.name.startswith(f"down.{i}.")] for i in range(levels)}
    up = {i: [p for p in parts if p.name.startswith(f"up.{i}.")] for i in range(levels)}
    middle = [p for p in parts if p.name.startswith("mid")]
    head, tail = [p for p in parts if p.name == "conv_in"], [p for p in parts if p.name == "conv_out"]
    down[0], up[0] = head + down[0], up[0] + tail

    def wide(boxes: Sequence[Part]) -> int:
        return len(boxes) * (box[0] + gap)

    sizes = [next(p for p in down[i] if p.kind == "ResBlock").shape[1:] for i in range(levels)]
    names = [f"{h} x {w}, {c} channels" for c, h, w in sizes]
    label = max(150, *(text_width(name, SMALL) + 12 for name in names))
    indent = 36
    half = max(wide(down[i]) + i * indent for i in range(levels))
    other = max(wide(up[i]) + i * indent for i in range(levels))
    centre = wide(middle) + 30
    sheet = Image.new("RGB", (label + half + centre + other + 10, levels * row + (row - 20 if middle else 10)), PAPER)
    pen = ImageDraw.Draw(sheet)

    def place(boxes: Sequence[Part], x: int, y: int) -> None:
        for part in boxes:
            fill = KINDS.get(part.kind, ((235, 235, 235), ""))[0]
            pen.rounded_rectangle((x, y, x + box[0], y + box[1]), 6, fill, outline=(140, 148, 160))
            letters = {"ResBlock": "res", "SpatialTransformer": "attn", "Upsample": "up", "Conv2d": "conv"}[part.kind]
            if part.name.endswith(".down"):
                letters = "down"
            deep = part.depth > 1
            write(sheet, (x + box[0] / 2, y + box[1] / 2 - (8 if deep else 0)), letters, SMALL, INK, "middle")
            if deep:
                write(sheet, (x + box[0] / 2, y + box[1] / 2 + 9), f"x {part.depth}", SMALL, INK, "middle")
            write(sheet, (x + box[0] / 2, y + box[1] + 12), count(part.parameters), 11, MUTED, "middle")
            x += box[0] + gap

    starts, ends = [], []  # x where the boxes of each level begin, on the left and on the right
    for i in range(levels):
        y = i * row + 10
        left, right = label + i * indent, sheet.width - 10 - i * indent - wide(up[i])
        starts.append(left)
        ends.append(right)
        write(sheet, (0, y + box[1] / 2 - 10), f"level {i}", SMALL, INK, bold=True)
        write(sheet, (0, y + box[1] / 2 + 9), names[i], SMALL, MUTED)
        end = left + wide(down[i])
        for x in range(end + 6, right - 10, 12):  # the skips
            pen.line((x, y + box[1] / 2, x + 6, y + box[1] / 2), fill=(150, 156, 166), width=2)
        pen.polygon(
            [(right - 4, y + box[1] / 2), (right - 11, y + box[1] / 2 - 4), (right - 11, y + box[1] / 2 + 4)], MUTED
        )
        if i == 0:
            skips = "skip connections: outputs passed to the decoder"
            skips = skips if text_width(skips, SMALL) < right - end else "skip connections"
            write(sheet, ((end + right) / 2, y + box[1] / 2 - 12), skips, SMALL, MUTED, "middle")
        place(down[i], left, y)
        place(up[i], right, y)
    y = levels * row + 10
    if middle:
        c, h, w = middle[0].shape[1:]
        write(sheet, (0, y + box[1] / 2 - 10), "middle", SMALL, INK, bold=True)
        write(sheet, (0, y + box[1] / 2 + 9), f"{h} x {w}, {c} channels", SMALL, MUTED)
    x = (starts[-1] + wide(down[levels - 1]) + ends[-1]) // 2 - wide(middle) // 2
    place(middle, x, y)

    def arrow(*points: tuple[float, float]) -> None:
        pen.line(points, fill=MUTED, width=2, joint="curve")
        (x, before), (_, end) = points[-2:]
        back = 7 if end > before else -7
        pen.polygon([(x, end), (x - 4, end - back), (x + 4, end - back)], MUTED)

    def centre_of(start: int, number: int) -> float:
        return start + number * (box[0] + gap) + box[0] / 2

    below = box[1] + 22  # below the parameter counts
    lower = [*starts[1:], x]  # x where the boxes of the next lower level begin
    for i in range(levels):
        y, turn = i * row + 10, i * row + 10 + row - 22
        come, go = centre_of(starts[i], len(down[i]) - 1), centre_of(lower[i], 0)
        if i == levels - 1 and not middle:
            go = centre_of(ends[i], 0)
            arrow((come, y + below), (come, turn), (go, turn), (go, y + below))
            break
        arrow((come, y + below), (come, turn), (go, turn), (go, y + row - 3))
        boxes = up[i + 1] if i < levels - 1 else middle
        come = centre_of(ends[i + 1] if i < levels - 1 else x, len(boxes) - 1)
        go = centre_of(ends[i], 0)
        arrow((come, y + row - 3), (come, turn), (go, turn), (go, y + below))
    return sheet


DEEP = "; x 2, x 10: with so many blocks one after another"


def draw_network(parts: Sequence[Part], unet: UNet, name: str = "") -> Image.Image:
    """The U, and a table of the cost of each level."""
    return figure(
        f"The U-Net of {name or 'this model'}",
        above([draw_u(parts, unet), draw_costs(parts, unet)], gap=26),
        "One forward pass for one image. Parameter counts are below the boxes. res: residual block; attn: transformer "
        f"(self-attention, cross-attention to the text, feed-forward){DEEP if _is_deep(parts) else ''}.",
    )


def draw_networks(networks: Mapping[str, tuple[Sequence[Part], UNet]]) -> Image.Image:
    """Several U-Nets, each with the table of its costs, one below the other; the keys are their names."""
    sheets: list[Image.Image] = []
    for name, (parts, unet) in networks.items():
        sheets += [paragraph(name, None, SIZE, INK), draw_u(parts, unet), draw_costs(parts, unet)]
    return figure(
        " and ".join(networks),
        above(sheets, gap=22),
        "U-Nets, each for one image of its native size. Parameter counts are below the boxes. res: residual block; "
        f"attn: transformer (self-attention, cross-attention to the text, feed-forward){DEEP}.",
    )


def _is_deep(parts: Sequence[Part]) -> bool:
    return any(part.depth > 1 for part in parts)


def draw_costs(parts: Sequence[Part], unet: UNet) -> Image.Image:
    """A table of the cost of each level."""
    levels = len(unet.config.channels)
    total = sum(part.flops for part in parts)
    lines = []
    for level in range(levels):
        own = [part for part in parts if level_of(part.name, levels) == level]
        attends = sum(part.flops for part in own if part.kind == "SpatialTransformer")
        flops = sum(part.flops for part in own)
        lines.append(
            [
                f"level {level}" + (" and middle" if level == levels - 1 and unet.mid is not None else ""),
                count(sum(part.parameters for part in own)),
                count(flops),
                f"{flops / total:.0%}",
                f"{attends / max(flops, 1):.0%}",
            ]
        )
    lines.append(["all", count(sum(part.parameters for part in parts)), count(total), "100%", ""])
    return table(
        ["", "parameters", "FLOPs", "share", "of it in transformers"],
        lines,
        ["left", *["right"] * 4],
        shaded=[levels],
    )


def draw_table(parts: Sequence[Part], levels: int) -> Image.Image:
    """A table of all parts with shape, parameters and FLOPs."""
    body = rows(parts, levels)
    shaded = [i for i, part in enumerate(parts) if level_of(part.name, levels) % 2] + [len(body) - 1]
    return figure(
        "The U-Net, part by part",
        table(
            ["part", "class", "output", "parameters", "FLOPs"],
            body,
            ["left", "left", "right", "right", "right"],
            shaded,
        ),
    )
