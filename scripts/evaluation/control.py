"""How well images of the toy world obey edges: their own edges against those of the hint.

Hints are of two kinds: `outlines` are drawn from the shapes of a scene (toy_world/hints.py), `detected` are what
Canny's detector finds in its drawing. The edges of a result are what the same detector finds in it (scikit-image's, in
each colour, smoothed by 1 pixel, thresholds 0.1 and 0.2). The figure is F1, the harmonic mean of two shares: of the
result's edges that are within 2 pixels of the hint's, and of the hint's that are within 2 pixels of the result's.

    controlled   images of the captions with the hints
    without      the same captions and seeds at scale 0
    redrawn      the scenes drawn once more, with other clouds and hills: what knowing the scene alone gives
    chance       the controlled images, and the hints of other scenes
    drawn        the drawings after a round trip through the VAE: what a perfect network would reach

A caption says what is where, so `without` is above `chance`; it should not be above `redrawn`.
The detector also finds what outlines do not have, such as the margin of a watercolour, and misses faint outlines. So
`drawn` is below 1, and lower for outlines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd.imaging.annotate import edges as detect
from sd.imaging.tensors import to_pil
from sd.params import Control
from sd.pipeline import StableDiffusion

from ..common.edges import agreement
from ..toy_world import Told, draw, random_scene, tell
from ..toy_world.hints import outlines
from .judge import Judge, to_tensor
from .scoring import Rate, tally

KINDS = ("outlines", "detected")
LOW, HIGH, SIGMA = 0.1, 0.2, 1.0  # of Canny's detector, as scikit-image has them
FAR = 7  # of a case to the one whose hint is used for `chance`


class Case(NamedTuple):
    """A scene: its caption with its meaning, two drawings, and hints of the first by their kinds, (H, W), bool."""

    told: Told
    picture: Image.Image
    redrawn: Image.Image
    hints: Mapping[str, np.ndarray]


def cases(split: str, n: int) -> list[Case]:
    """n scenes of a split of toy_world.scenes, the same on every call. Training draws others."""
    rng = Random(f"evaluate: control {split}")
    found = []
    for _ in range(n):
        scene = random_scene(rng, split)
        told, seed = tell(scene, rng), rng.getrandbits(32)
        picture = draw(scene, Random(seed))
        hints = {"outlines": np.asarray(outlines(scene, Random(seed))) > 0, "detected": edges_of(picture)}
        found.append(Case(told, picture, draw(scene, Random(seed + 1)), hints))
    return found


def edges_of(image: Image.Image) -> np.ndarray:
    """The edges (H, W), bool, of an RGB image."""
    return detect(np.asarray(image) / 255, LOW, HIGH, SIGMA)


def mean_agreement(found: Sequence[np.ndarray], hints: Sequence[np.ndarray]) -> float:
    """The mean F1 of edges and hints."""
    return float(np.mean([agreement(one, hint) for one, hint in zip(found, hints, strict=True)]))


def measure(
    model: StableDiffusion,
    name: str,
    chosen: Sequence[Case],
    judged_by: Judge,
    through_vae: Callable[[StableDiffusion, Tensor], Tensor],
    **settings: Any,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Rate]]]:
    """The F1 of each kind of hint, and the rates of the captions with and without hints.

    name         of the control network, which the model has
    through_vae  encodes and decodes images in [-1, 1]
    settings     those of `txt2img`; the seed is that of the first image
    """
    told, seed = [case.told for case in chosen], settings.pop("seed", 0)

    def generate(kind: str, scale: float) -> list[Image.Image]:
        images = []
        label = f"hints: {kind}" if scale else "without hints"
        for i, case in enumerate(tqdm(chosen, label, unit="image", disable=None, leave=False, file=sys.stderr)):
            hint = Image.fromarray(case.hints[kind]).convert("RGB")
            images += model.txt2img(case.told.text, seed=seed + i, controls=Control(name, hint, scale), **settings)
        return images

    def edges(images: Sequence[Image.Image]) -> list[np.ndarray]:
        return [edges_of(image) for image in images]

    images = {kind: generate(kind, 1.0) for kind in KINDS}
    plain = generate(KINDS[0], 0.0)
    without = edges(plain)
    rebuilt = through_vae(model, to_tensor([case.picture for case in chosen]))
    drawn = edges(to_pil(rebuilt))
    redrawn = edges([case.redrawn for case in chosen])
    scores = {}
    for kind in KINDS:
        hints, found = [case.hints[kind] for case in chosen], edges(images[kind])
        far = FAR % len(hints) or len(hints) // 2
        scores[kind] = {
            "controlled": mean_agreement(found, hints),
            "without": mean_agreement(without, hints),
            "redrawn": mean_agreement(redrawn, hints),
            "chance": mean_agreement(found, hints[far:] + hints[:far]),
            "drawn": mean_agreement(drawn, hints),
        }
    rates = {"without": tally(told, judged_by.look(plain))}
    rates |= {kind: tally(told, judged_by.look(images[kind])) for kind in KINDS}
    return scores, rates


def describe(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The scores as a Markdown table: a row for each kind of hint."""
    columns = list(next(iter(scores.values())))
    rows = [f"| {kind} | {' | '.join(f'{of[column]:.3f}' for column in columns)} |" for kind, of in scores.items()]
    return "\n".join([f"| F1 of edges | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}", *rows])
