"""Probes of a model of the toy world, in addition to its scores: negative prompts, seeds, unknown words, editing.

Each probe takes a generator, a judge, the guidance and captions. It returns a sentence and figures; a pair in the
figures is (right, total).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations
from random import Random
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from sd.imaging.tensors import resize
from sd.pipeline import StableDiffusion

from ..toy_world import SIZE, Told, box, draw, random_scene, tell
from ..toy_world.scenes import COLOURS, FLOATING, KINDS, STANDING, STYLES, SWIMMING
from .judge import Judge, to_tensor
from .scoring import Rate, tally

SEEDS = 4  # images per prompt whose distances are measured
NEGATIVE_STYLES = {"flat": "flat illustration", "watercolour": "watercolour", "pixel": "pixel art"}
NONSENSE = ("blorptang", "qwyzzle", "snorfblat", "vexundrial")


class Generator:
    """Generates images in batches with the same sampler and steps; image i of a call has the seed `seed` + i."""

    def __init__(self, model: StableDiffusion, sampler: str, steps: int | None, seed: int, batch: int) -> None:
        self._model, self._sampler, self._steps, self._seed, self._batch = model, sampler, steps, seed, batch

    def __call__(
        self, texts: Sequence[str], guidance: float, label: str, negatives: Sequence[str] = ()
    ) -> list[Image.Image]:
        """An image of each text, with its negative prompt if given, and a progress bar with this label."""
        generated: list[Image.Image] = []
        size = 1 if negatives else self._batch  # a batch shares one negative prompt
        with tqdm(total=len(texts), desc=label, unit="image", disable=None, leave=False, file=sys.stderr) as bar:
            for start in range(0, len(texts), size):
                batch = list(texts[start : start + size])
                generated += self._model.txt2img(
                    batch,
                    negatives[start] if negatives else "",
                    steps=self._steps,
                    guidance=guidance,
                    sampler=self._sampler,
                    seed=self._seed + start,
                )
                bar.update(len(batch))
        return generated

    def each(
        self,
        label: str,
        guidance: float,
        texts: Sequence[str],
        images: Sequence[Image.Image],
        masks: Sequence[Image.Image] = (),
    ) -> list[Image.Image]:
        """Edit each image by its text: inpaint the mask if given, else image to image."""
        generated = []
        bar = tqdm(texts, desc=label, unit="image", disable=None, leave=False, file=sys.stderr)
        for i, text in enumerate(bar):
            settings: dict[str, Any] = {
                "steps": self._steps,
                "guidance": guidance,
                "sampler": self._sampler,
                "seed": self._seed + i,
            }
            if masks:
                generated += self._model.inpaint(text, images[i], masks[i], **settings)
            else:
                generated += self._model.img2img(text, images[i], **settings)
        return generated


def negative(generate: Generator, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """Does content disappear when it becomes the negative prompt, with the same seed?

    A thing: in images without a prompt; as a control, how often the thing disappears with another thing as the negative
    prompt, because any negative prompt changes the image. A style: of prompts without a style; also, whether the things
    in the prompt stay. (Content that the prompt names is not tested: a prompt outweighs a negative prompt.)
    """
    rng = Random("probes: negative")
    before = judge.look(generate([""] * len(told), guidance, "negative prompts: no prompt"))
    unwanted = [scene.things[0].kind if scene.things else "" for scene in before]
    others = [rng.choice([k for k in KINDS if k not in {t.kind for t in scene.things}]) for scene in before]

    def gone(negatives: Sequence[str], label: str) -> Rate:
        nouns = [f"a {kind}" if kind else "" for kind in negatives]
        after = judge.look(generate([""] * len(told), guidance, f"negative prompts: {label}", nouns))
        went = [kind not in {t.kind for t in scene.things} for kind, scene in zip(unwanted, after, strict=True) if kind]
        return Rate(sum(went), len(went))

    thing, control = gone(unwanted, "a thing"), gone(others, "another thing")

    open_ones = [each for each in told if not each.said.style and each.said.things]
    texts = [each.text for each in open_ones]
    before = judge.look(generate(texts, guidance, "negative prompts: open style"))
    nouns = [NEGATIVE_STYLES[scene.style] for scene in before]
    after = judge.look(generate(texts, guidance, "negative prompts: a style", nouns))
    went = [one.style != two.style for one, two in zip(before, after, strict=True)]
    style, stay = Rate(sum(went), len(went)), tally(open_ones, after)["object"]
    text = (
        f"Negative prompts. A thing in images without a prompt ({thing.of} images): gone in {thing}; with another "
        f"thing as the negative prompt in {control}. The style of prompts without one ({style.of} images): gone in "
        f"{style}, while the things of the prompt are present in {stay}."
    )
    return text, {"thing": thing, "another thing": control, "style": style, "things stay": stay}


def seeds(generate: Generator, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """How much do images of one prompt differ between seeds, and images of different prompts?"""
    texts = [each.text for each in told[: max(2, len(told) // SEEDS)]]
    generated = generate([text for text in texts for _ in range(SEEDS)], guidance, "seeds")
    x = to_tensor([resize(image, SIZE, SIZE) for image in generated]).unflatten(0, (len(texts), SEEDS)) / 2

    def distance(a: Tensor, b: Tensor) -> float:
        return (a - b).square().mean().sqrt().item()

    same = [distance(one, two) for each in x for one, two in combinations(each, 2)]
    others = [distance(one, two) for one, two in combinations(x[:, 0], 2)]
    figures = {
        "mean": sum(same) / len(same),
        "least": min(same),
        "different prompts": sum(others) / max(1, len(others)),
    }
    text = "Distance between images (RMS, of a range of 1): {mean:.3f} between seeds, at least {least:.3f}; "
    return (text + "{different prompts:.3f} between prompts.").format_map(figures), figures


def nonsense(generate: Generator, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """Does an unknown word before or after a prompt make the image worse?"""
    rng, odd = Random("probes: nonsense"), []
    for each in told:
        words = [each.text, rng.choice(NONSENSE)]
        odd.append(" ".join(rng.sample(words, 2)))
    plain = tally(told, judge.look(generate([each.text for each in told], guidance, "nonsense: without")))["all"]
    mixed = tally(told, judge.look(generate(odd, guidance, "nonsense: with")))["all"]
    text = f"An unknown word in the prompt: all right in {mixed}, without it in {plain}."
    return text, {"with": mixed, "without": plain}


def swap(generate: Generator, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """Inpainting: the only thing of a drawn scene is masked, and the prompt names another thing.

    Things on the ground are replaced by things on the ground, of the same size. An image is right if everything in the
    prompt is present and nothing of the old thing remains.
    """
    rng = Random("probes: swap")
    texts: list[Told] = []
    images: list[Image.Image] = []
    masks: list[Image.Image] = []
    while len(texts) < len(told):
        scene = random_scene(rng, "train")
        if len(scene.things) != 1 or scene.things[0].kind in SWIMMING:  # others stand on an island in the sea
            continue
        old = scene.things[0]
        kinds = [kind for kind in (FLOATING if old.floats else STANDING) if kind != old.kind and kind not in SWIMMING]
        new = scene._replace(things=(old._replace(kind=rng.choice(kinds), colour=rng.choice(COLOURS)),))
        texts.append(tell(new, rng))
        images.append(draw(scene, rng))
        mask = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(mask).rectangle([round(SIZE * side) for side in box(old)], fill=255)
        masks.append(mask)
    seen = judge.look(generate.each("swapping a thing", guidance, [each.text for each in texts], images, masks))
    rates = tally(texts, seen)
    text = f"Inpainting, one thing for another ({len(texts)} drawn scenes): the new thing in {rates['object']}, "
    return f"{text}all right in {rates['all']}, nothing more in {rates['no more']}.", rates


def restyle(generate: Generator, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """Image to image at the default strength: a drawn scene, and its caption with another style."""
    rng = Random("probes: restyle")
    texts: list[Told] = []
    images: list[Image.Image] = []
    while len(texts) < len(told):
        scene = random_scene(rng, "train")
        new = scene._replace(style=rng.choice([style for style in STYLES if style != scene.style]))
        each = tell(new, rng)
        if each.said.style:
            texts.append(each)
            images.append(draw(scene, rng))
    seen = judge.look(generate.each("changing the style", guidance, [each.text for each in texts], images))
    rates = tally(texts, seen)
    text = f"Image to image, another style ({len(texts)} drawn scenes): the style is right in {rates['style']}, "
    return f"{text}the things in {rates['object']}, all right in {rates['all']}.", rates


PROBES = {"negative": negative, "seeds": seeds, "nonsense": nonsense, "swap": swap, "restyle": restyle}
