"""Probes of a model of the painted world, beside its scores: negative prompts, seeds, unknown words, changed pictures.

Each probe is given a painter, a judge, the guidance and captions; it returns a sentence and figures, of which a pair is
so many right of so many.
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

SEEDS = 4  # pictures of a prompt whose distances are measured
NEGATIVE_STYLES = {"flat": "flat illustration", "watercolour": "watercolour", "pixel": "pixel art"}
NONSENSE = ("blorptang", "qwyzzle", "snorfblat", "vexundrial")


class Painter:
    """Paints prompts in batches, all with the same sampler and steps; picture i of a call has the seed `seed` + i."""

    def __init__(self, model: StableDiffusion, sampler: str, steps: int | None, seed: int, batch: int) -> None:
        self._model, self._sampler, self._steps, self._seed, self._batch = model, sampler, steps, seed, batch

    def __call__(
        self, texts: Sequence[str], guidance: float, label: str, negatives: Sequence[str] = ()
    ) -> list[Image.Image]:
        """A picture of each text, with its negative prompt if there are any, and a progress bar of this label."""
        painted: list[Image.Image] = []
        size = 1 if negatives else self._batch  # a batch has one negative prompt
        with tqdm(total=len(texts), desc=label, unit="picture", disable=None, leave=False, file=sys.stderr) as bar:
            for start in range(0, len(texts), size):
                batch = list(texts[start : start + size])
                painted += self._model.txt2img(
                    batch,
                    negatives[start] if negatives else "",
                    steps=self._steps,
                    guidance=guidance,
                    sampler=self._sampler,
                    seed=self._seed + start,
                )
                bar.update(len(batch))
        return painted

    def each(
        self,
        label: str,
        guidance: float,
        texts: Sequence[str],
        pictures: Sequence[Image.Image],
        masks: Sequence[Image.Image] = (),
    ) -> list[Image.Image]:
        """Each picture changed by its text: where its mask is, or without masks all of it."""
        painted = []
        bar = tqdm(texts, desc=label, unit="picture", disable=None, leave=False, file=sys.stderr)
        for i, text in enumerate(bar):
            settings: dict[str, Any] = {
                "steps": self._steps,
                "guidance": guidance,
                "sampler": self._sampler,
                "seed": self._seed + i,
            }
            if masks:
                painted += self._model.inpaint(text, pictures[i], masks[i], **settings)
            else:
                painted += self._model.img2img(text, pictures[i], **settings)
        return painted


def negative(paint: Painter, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """What a prompt leaves open and is then painted, as the negative prompt with the same seed: does it go?

    A thing: of the pictures that are painted without any prompt; beside it, how often it goes when the negative prompt
    is of another thing, as any negative prompt changes the picture. A style: of prompts that say none; do the things
    that they say stay? (What the prompt itself says is not open: a prompt's own words outweigh a negative prompt.)
    """
    rng = Random("probes: negative")
    before = judge.look(paint([""] * len(told), guidance, "negative prompts: no prompt"))
    unwanted = [scene.things[0].kind if scene.things else "" for scene in before]
    others = [rng.choice([k for k in KINDS if k not in {t.kind for t in scene.things}]) for scene in before]

    def gone(negatives: Sequence[str], label: str) -> Rate:
        nouns = [f"a {kind}" if kind else "" for kind in negatives]
        after = judge.look(paint([""] * len(told), guidance, f"negative prompts: {label}", nouns))
        went = [kind not in {t.kind for t in scene.things} for kind, scene in zip(unwanted, after, strict=True) if kind]
        return Rate(sum(went), len(went))

    thing, control = gone(unwanted, "a thing"), gone(others, "another thing")

    open_ones = [each for each in told if not each.said.style and each.said.things]
    texts = [each.text for each in open_ones]
    before = judge.look(paint(texts, guidance, "negative prompts: open style"))
    nouns = [NEGATIVE_STYLES[scene.style] for scene in before]
    after = judge.look(paint(texts, guidance, "negative prompts: a style", nouns))
    went = [one.style != two.style for one, two in zip(before, after, strict=True)]
    style, stay = Rate(sum(went), len(went)), tally(open_ones, after)["object"]
    text = (
        f"Negative prompts. A thing that is painted without any prompt ({thing.of} pictures): gone in {thing}; with "
        f"another thing as the negative prompt in {control}. The style of prompts that leave it open ({style.of} "
        f"pictures): gone in {style}, and what they say is there in {stay}."
    )
    return text, {"thing": thing, "another thing": control, "style": style, "things stay": stay}


def seeds(paint: Painter, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """How much pictures of one prompt differ from seed to seed, and how much those of different prompts."""
    texts = [each.text for each in told[: max(2, len(told) // SEEDS)]]
    painted = paint([text for text in texts for _ in range(SEEDS)], guidance, "seeds")
    x = to_tensor([resize(picture, SIZE, SIZE) for picture in painted]).unflatten(0, (len(texts), SEEDS)) / 2

    def distance(a: Tensor, b: Tensor) -> float:
        return (a - b).square().mean().sqrt().item()

    same = [distance(one, two) for each in x for one, two in combinations(each, 2)]
    others = [distance(one, two) for one, two in combinations(x[:, 0], 2)]
    figures = {
        "mean": sum(same) / len(same),
        "least": min(same),
        "different prompts": sum(others) / max(1, len(others)),
    }
    text = "Distance between pictures (RMS, of a range of 1): {mean:.3f} from seed to seed, at least {least:.3f}; "
    return (text + "{different prompts:.3f} from prompt to prompt.").format_map(figures), figures


def nonsense(paint: Painter, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """Prompts as they are, and with a word that does not exist, in front or behind: are they painted as well?"""
    rng, odd = Random("probes: nonsense"), []
    for each in told:
        words = [each.text, rng.choice(NONSENSE)]
        odd.append(" ".join(rng.sample(words, 2)))
    plain = tally(told, judge.look(paint([each.text for each in told], guidance, "nonsense: without")))["all"]
    mixed = tally(told, judge.look(paint(odd, guidance, "nonsense: with")))["all"]
    text = f"A word that does not exist in the prompt: all right in {mixed}, without it in {plain}."
    return text, {"with": mixed, "without": plain}


def swap(paint: Painter, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """Inpainting: in drawn scenes with one thing it is masked, and the prompt has another thing in its place.

    What stands is exchanged for what stands, of the same size; right is the whole of what the prompt says, and that
    nothing of the old thing is left.
    """
    rng = Random("probes: swap")
    texts: list[Told] = []
    images: list[Image.Image] = []
    masks: list[Image.Image] = []
    while len(texts) < len(told):
        scene = random_scene(rng, "train")
        if len(scene.things) != 1 or scene.things[0].kind in SWIMMING:  # an island would have to go, or to come
            continue
        old = scene.things[0]
        kinds = [kind for kind in (FLOATING if old.floats else STANDING) if kind != old.kind and kind not in SWIMMING]
        new = scene._replace(things=(old._replace(kind=rng.choice(kinds), colour=rng.choice(COLOURS)),))
        texts.append(tell(new, rng))
        images.append(draw(scene, rng))
        mask = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(mask).rectangle([round(SIZE * side) for side in box(old)], fill=255)
        masks.append(mask)
    seen = judge.look(paint.each("swapping a thing", guidance, [each.text for each in texts], images, masks))
    rates = tally(texts, seen)
    text = f"Inpainting, one thing for another ({len(texts)} drawn scenes): the new one is there in {rates['object']}, "
    return f"{text}all right in {rates['all']}, nothing more in {rates['no more']}.", rates


def restyle(paint: Painter, judge: Judge, guidance: float, told: Sequence[Told]) -> tuple[str, dict[str, Any]]:
    """Image to image at its default strength: drawn scenes, and a caption that has them in another style."""
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
    seen = judge.look(paint.each("changing the style", guidance, [each.text for each in texts], images))
    rates = tally(texts, seen)
    text = f"Image to image, another style ({len(texts)} drawn scenes): the style is right in {rates['style']}, "
    return f"{text}the things are there in {rates['object']}, all right in {rates['all']}.", rates


PROBES = {"negative": negative, "seeds": seeds, "nonsense": nonsense, "swap": swap, "restyle": restyle}
