"""Control networks: what they add to the U-Net, what that does to an image, and how it began in training.

A control network adds a residual r_i to each skip connection s_i of the U-Net, and one to its middle (Zhang et al.
2023; models/controlnet.py). Here are the norms of residuals, in total and at each position:

    share_i = |r_i| / |s_i|                 map_i (h, w) = |r_i (., h, w)|, the norm over the channels

Residuals are the outputs of the zero convolutions. The log of a training has the mean absolute weight of each: zero
when it begins, so that the U-Net works as before.

>>> log = read_log_text('{"step": 50, "loss": 0.3, "zero": [0.0, 0.1]}')
>>> log.steps, log.zero
([50], [[0.0, 0.1]])
>>> residual_names(UNetConfig(channels=(32, 64), heads=(2, 2), depth=(0, 1), blocks=1, context=16))
['first convolution', 'level 0', 'level 0, halved', 'level 1', 'middle']
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..config import UNetConfig
from ..control_params import Control
from ..controls import at_size, hint_at
from ..imaging.tensors import to_tensor
from ..params import SamplingParams, TextToImage
from ..pipeline import StableDiffusion
from ..schedule import Level
from .denoising import spread
from .drawing import Axes, Curve, above, beside, captioned, figure, heat, plot, scaled, strip
from .runs import SETTINGS

SCALES = (0.2, 0.5, 1.0)
SPANS = ((0.0, 0.3), (0.0, 0.6), (0.0, 1.0))  # fractions of the steps
MODES = ("balanced", "prompt", "control")
POINTS = 3  # steps whose residuals are shown
AVERAGED = 10  # lines of a log over which its loss is averaged for the curve


# ------------------------------------------------------------------------------------------ training


class TrainingLog(NamedTuple):
    """At each of `steps`: the loss, and the mean absolute weight of the zero convolution of each residual."""

    steps: list[int]
    loss: list[float]
    zero: list[list[float]]


def read_log(path: Path) -> TrainingLog:
    """The train.jsonl of a training, or a file of JSON with its lines as a list, or with its columns.

    Raises ValueError for anything else.
    """
    try:
        return read_log_text(path.read_text(encoding="utf-8"))
    except ValueError:  # of the JSON, of the encoding
        raise ValueError(f"{path}: not the log of the training of a control network (train.jsonl)") from None


def read_log_text(text: str) -> TrainingLog:
    """The same from the text of a file."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        found: Any = json.loads(text)
        found = [found] if isinstance(found, dict) and "step" in found else found  # a log of one line
    except ValueError:
        found = [json.loads(line) for line in lines]
    try:
        if isinstance(found, dict):  # columns
            rows = list(zip(found["steps"], found["loss"], found["zero"], strict=True))
        else:
            rows = [(row["step"], row["loss"], row["zero"]) for row in found]
        log = TrainingLog(
            [int(step) for step, _, _ in rows],
            [float(loss) for _, loss, _ in rows],
            [[float(value) for value in zero] for _, _, zero in rows],
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a log: {error}") from None
    if not log.steps or len(set(map(len, log.zero))) != 1:
        raise ValueError("not a log: no lines, or lines of different networks")
    return log


def residual_names(config: UNetConfig) -> list[str]:
    """What each residual of a control network is added to, in their order."""
    names = ["first convolution"]
    for level in range(len(config.channels)):
        each = [f", block {block + 1}" for block in range(config.blocks)] if config.blocks > 1 else [""]
        names += [f"level {level}{block}" for block in each]
        if level < len(config.channels) - 1:
            names.append(f"level {level}, halved")
    return [*names, "middle"]


def averaged(values: Sequence[float], n: int) -> list[float]:
    """The mean of each value and up to n - 1 before it."""
    return [sum(part) / len(part) for part in (values[max(i - n + 1, 0) : i + 1] for i in range(len(values)))]


def draw_zero_convolutions(log: TrainingLog, names: Sequence[str] | None = None) -> Image.Image:
    """Two plots over the steps of training: the zero convolutions, and the loss.

    names   of the residuals. Raises ValueError if the log has another number of them
    """
    count = len(log.zero[0])
    if names is not None and len(names) != count:
        raise ValueError(f"the log is of a network with {count} zero convolutions, and this one has {len(names)}")
    names = names or [f"residual {i + 1}" for i in range(count)]
    steps = [0, *log.steps]
    curves = [Curve(name, steps, [0.0, *(row[i] for row in log.zero)]) for i, name in enumerate(names)]
    size = 520, 250
    weights = plot(curves, size, Axes(x_label="step", y_label="mean |weight|", title="Zero convolutions"))
    loss = plot(
        [Curve("", log.steps, averaged(log.loss, AVERAGED))], size, Axes(x_label="step", y_label="loss", title="Loss")
    )
    return figure(
        "The zero convolutions open",
        above([weights, loss]),
        "They begin at zero, where the control network changes nothing. The loss is a running mean.",
    )


# ------------------------------------------------------------------------------------------ images


class ControlledImages(NamedTuple):
    """Images of one prompt and one noise: uncontrolled, and under each heading by what the setting is."""

    hint: Image.Image
    plain: Image.Image
    rows: dict[str, dict[str, Image.Image]]


def placed_hint(model: StableDiffusion, control: Control) -> Image.Image:
    """The hint as the control network sees it: RGB, at the model's size."""
    size = model.config.size
    return hint_at(control, at_size(size, size))


def request(model: StableDiffusion, prompt: str, settings: SamplingParams, control: Control | None) -> TextToImage:
    """The request for one image at the model's size."""
    size = model.config.size
    params = replace(settings, height=size, width=size, n=1)
    return TextToImage(prompt, params, controls=() if control is None else (control,))


def controlled_images(
    model: StableDiffusion,
    prompt: str,
    control: Control,
    settings: SamplingParams = SETTINGS,
    *,
    scales: Sequence[float] = SCALES,
    spans: Sequence[tuple[float, float]] = SPANS,
) -> ControlledImages:
    """Images at several scales, with control in several parts of the steps, and in each mode; else as `control` says.

    control   names a control network that the model has (`StableDiffusion.add_control`)
    """
    seen: dict[object, Image.Image] = {}

    def image(asked: Control | None) -> Image.Image:
        key = asked and (asked.scale, asked.start, asked.end, asked.mode)
        if key not in seen:
            run = model.prepare(request(model, prompt, settings, asked))
            for _ in run:
                pass
            seen[key] = run.result().images[0]
        return seen[key]

    rows = {
        "scale": {f"{scale:g}": image(replace(control, scale=scale)) for scale in scales},
        "steps": {f"{start:g} to {end:g}": image(replace(control, start=start, end=end)) for start, end in spans},
        "mode": {mode: image(replace(control, mode=mode)) for mode in MODES},
    }
    return ControlledImages(placed_hint(model, control), image(None), rows)


def draw_controlled(seen: ControlledImages, prompt: str, width: int = 128) -> Image.Image:
    """The hint and the image without control on the left, a row for each setting on the right."""
    left = above([captioned(scaled(seen.hint, width), "hint"), captioned(scaled(seen.plain, width), "scale 0")])
    rows = []
    for name, images in seen.rows.items():
        cells = [captioned(scaled(image, width), f"{name} {value}") for value, image in images.items()]
        rows.append(beside(cells, gap=6))
    return figure(
        f'Control: "{prompt}"',
        beside([left, above(rows, gap=8)], gap=20),
        "All images begin with the same noise. Unless the caption says otherwise, the scale is 1, all steps are "
        "controlled, and the mode is balanced. Scale 0 is no control.",
    )


# ------------------------------------------------------------------------------------------ residuals


class ResidualNorms(NamedTuple):
    """Of a controlled run, at some levels: the norms of all residuals, and the predicted clean latents."""

    levels: list[Level]
    names: list[str]
    maps: list[list[Tensor]]  # [level][residual] (h, w): the norm over the channels, at each position
    shares: list[list[float]]  # [level][residual] the norm of the residual, as a part of what it is added to
    x0: list[Tensor]  # [level] (1, C, h, w)


def residual_norms(
    model: StableDiffusion,
    prompt: str,
    control: Control,
    settings: SamplingParams = SETTINGS,
    *,
    points: int = POINTS,
) -> ResidualNorms:
    """The residuals for the prompt in some steps of a controlled run, evenly spaced from the first to the last."""
    network, unet = model.control_network(control.name).network, model.unet
    pixels = ((to_tensor(placed_hint(model, control)) + 1) / 2).to(model.device)
    run = model.prepare(request(model, prompt, settings, control))
    cond = model.conditioning([prompt])
    if model.is_inpainting:
        cond = cond._replace(concat=model.blank_concat(model.latent_shape()))
    cond = cond.to(model.device, model.dtype)
    found = ResidualNorms([], residual_names(unet.config), [], [], [])
    with torch.no_grad():
        features = network.embed(pixels)
        chosen = spread(len(run), points)
        for i in range(len(run)):
            if i in chosen:
                level = run.levels[i]
                x, t = run.x.to(model.dtype), torch.tensor([level.t], device=model.device)
                first, time, context = unet.begin(x, t, cond)
                skips = unet.contract(first, time, context)
                skips.append(unet.bottom(skips[-1], time, context))
                down, middle = network(x, t, cond, features)
                pairs = [(r.float().expand_as(s), s) for r, s in zip((*down, middle), skips, strict=True)]
                found.levels.append(level)
                found.maps.append([r[0].norm(dim=0).cpu() for r, _ in pairs])
                found.shares.append([float(r.norm() / s.float().norm()) for r, s in pairs])
            step = next(run)
            if i in chosen:
                found.x0.append(step.x0[:1])
    return found


def draw_residuals(model: StableDiffusion, seen: ResidualNorms, width: int = 104) -> Image.Image:
    """A row for each level: the predicted clean image, and the map of each residual with its share."""
    rows = []
    for x0, maps, shares in zip(seen.x0, seen.maps, seen.shares, strict=True):
        cells = [captioned(scaled(model.decode(x0)[0], width), " ")]
        for each, share in zip(maps, shares, strict=True):
            cells.append(captioned(heat(each, width, low=0.0), f"{share:.0%}"))
        rows.append(cells)
    columns = ["predicted x_{0}", *seen.names]
    return figure(
        "What a control network adds",
        strip(rows, columns, [f"t = {level.t:.0f}" for level in seen.levels], width),
        "The norm of each residual at each position, dark for zero, and in percent of the norm of the features that it "
        "is added to.",
    )
