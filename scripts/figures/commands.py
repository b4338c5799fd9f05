"""One function per figure: it runs a study on the model and yields files. FIGURES has them by name.

The docstring of a function is its line in `study.py --help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import torch
from PIL import Image

from sd import StableDiffusion
from sd.config import SD1, SDXL
from sd.control_params import Control
from sd.imaging.files import read_image
from sd.imaging.tensors import fit
from sd.models.unet import UNet
from sd.params import SamplingParams
from sd.resources import resource
from sd.study import (
    attention,
    attention_figures,
    consistency,
    control,
    convergence,
    denoising,
    editing,
    grids,
    guidance,
    influence,
    latent,
    mixing,
    network,
    noising,
    steering,
    text,
)

from ..toy_world import Scene, draw
from .hint import LOG, load_control
from .student import load_student
from .world import CASTLE, CASTLE_MORE, EDITS, EXCHANGED, LONG, OPEN, OTHER, PROMPT, THINGS, boxes_of_words

AXES = ("steps=2,4,8,16,32", "sampler=ddim,euler_a,heun,dpmpp_2m")  # x and y of a grid by default
CURVES = 4  # whose mean distances `consistency` shows
WITH_CONTROL = ("control",)  # figures that need a control network: see hint.py
WITH_STUDENT = ("consistency", "few-steps")  # figures that need a few-step model: see student.py


@dataclass(frozen=True)
class Job:
    """The inputs of a figure: model, sampling settings and command-line arguments."""

    model: StableDiffusion
    settings: SamplingParams
    args: argparse.Namespace

    def prompt(self, default: str = PROMPT) -> str:
        """--prompt, or the default of the figure."""
        return default if self.args.prompt is None else str(self.args.prompt)

    @cached_property
    def student(self) -> StableDiffusion:
        """The model with the few-step LoRA, loaded when a figure first needs it."""
        return load_student(self.args, self.model)

    @cached_property
    def control(self) -> Control:
        """The hint for a control network, which is added to the model when a figure first needs it."""
        return load_control(self.args, self.model)

    def image(self) -> Image.Image:
        """--image at the model's size, or a drawn scene."""
        side = self.model.config.size
        if self.args.image is not None:
            return fit(read_image(self.args.image).image, side, side)
        scene = Scene("flat", "day", "meadow", tuple(THINGS.values()))
        return draw(scene, Random(1), side)


Figures = Iterator[tuple[str, Image.Image | list[Image.Image]]]  # file names, each with an image or animation frames
FIGURES: dict[str, Callable[[Job], Figures]] = {}


def named(name: str) -> Callable[[Callable[[Job], Figures]], Callable[[Job], Figures]]:
    """Decorator that adds a function to FIGURES."""

    def register(make: Callable[[Job], Figures]) -> Callable[[Job], Figures]:
        FIGURES[name] = make
        return make

    return register


def encoders(job: Job, file: str, of_second: str) -> Iterator[tuple[str, str, int]]:
    """For each text encoder of the model: the file's name, words for its title, and the number of the encoder."""
    yield file, "", 0
    if len(job.model.config.text) > 1:
        yield file.replace(".", "-2."), of_second, 1


@named("tokens")
def tokens(job: Job) -> Figures:
    """the tokens of the prompt: ids, padding, truncation"""
    for file, of, i in encoders(job, "tokens.webp", " for the second text encoder"):
        yield file, text.draw_tokens(job.model.tokenizers[i], [job.prompt(), LONG], of=of)


@named("embeddings")
def embeddings(job: Job) -> Figures:
    """similarity of token embeddings and of position embeddings"""
    names = [
        *("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
        *("house", "castle", "tree", "flower", "car", "boat", "cat", "duck", "balloon", "kite"),
        *("meadow", "beach", "desert", "snow", "sea", "day", "sunset", "night"),
    ]
    for file, which, i in encoders(job, "embeddings.webp", "second "):
        text_encoder = job.model.text_encoder_2 if i else job.model.text_encoder
        similar = text.token_similarity(text_encoder, job.model.tokenizers[i], names)
        yield file, text.draw_embeddings(similar, names, text.position_similarity(text_encoder), which)


@named("words")
def words(job: Job) -> Figures:
    """two prompts compared token by token: --prompt and --other"""
    one, other = EXCHANGED if job.args.prompt is None else (job.args.prompt, job.args.other)
    yield "words.webp", text.draw_word_order(text.word_order(job.model, one, other, job.settings))


@named("latent")
def latents(job: Job) -> Figures:
    """the channels of an image's latent, and the decoded image"""
    yield "latent.webp", latent.draw_round_trip(latent.round_trip(job.model, job.image()))


@named("schedule")
def schedule(job: Job) -> Figures:
    """alpha, sigma, alpha-bar and signal-to-noise ratio over t"""
    yield "schedule.png", noising.draw_curves(noising.curves(job.model.schedule))


@named("forward")
def forward(job: Job) -> Figures:
    """an image with increasing noise, at each --t"""
    timesteps = job.args.t or noising.TIMESTEPS
    noised = noising.forward_process(job.model, job.image(), timesteps, seed=job.settings.seed)
    yield "forward.webp", noising.draw_forward(noised)


@named("unet")
def unet(job: Job) -> Figures:
    """levels and parts of the U-Net: shapes, parameters, FLOPs"""
    model = job.model
    _, height, width = model.latent_shape()
    parts = network.trace(model.unet, height, width, model.config.text[0].length)
    yield "unet.png", network.draw_network(parts, model.unet, model.config.name)
    yield "unet-parts.png", network.draw_table(parts, len(model.config.unet.channels))


@named("unets")
def unets(job: Job) -> Figures:
    """the U-Nets of Stable Diffusion 1.x and SDXL compared, whatever the model"""
    seen = {}
    for config in (SD1, SDXL):
        with torch.device("meta"):  # shapes without numbers
            unet = UNet(config.unet)
        side = config.size // config.vae.factor
        seen[config.name] = network.trace(unet, side, side, config.text[0].length), unet
    yield "unets.webp", network.draw_networks(seen)


@named("attention")
def cross_attention(job: Job) -> Figures:
    """cross-attention map of each word; one word by step, level and head"""
    prompt = job.prompt()
    if job.args.word is not None:
        text.find_word(job.model.tokenizer, prompt, job.args.word)  # fail before generating
    seen = attention.word_maps(job.model, prompt, job.settings)
    maps = [seen.of(i) for i in range(len(seen.words))]
    yield (
        "attention.webp",
        attention_figures.draw_word_maps(
            seen, prompt, *boxes_of_words(prompt, job.model.config, "attention", seen.words, maps)
        ),
    )
    word = job.args.word
    if word is None:
        word = next((w.text for w in seen.words if w.text in THINGS), seen.words[-1].text)
    positions = text.find_word(job.model.tokenizer, prompt, word)
    number = next(i for i, each in enumerate(seen.words) if each.positions == positions)
    yield "attention-word.webp", attention_figures.draw_breakdown(seen, number)


@named("influence")
def influences(job: Job) -> Figures:
    """where the image changes without each word of the prompt"""
    prompt = job.prompt()
    seen = influence.influence(job.model, prompt, job.settings)
    yield (
        "influence.webp",
        influence.draw_influence(
            seen, prompt, *boxes_of_words(prompt, job.model.config, "influence", seen.words, seen.maps)
        ),
    )


@named("self-attention")
def self_attention(job: Job) -> Figures:
    """self-attention maps of some points of the image"""
    points = job.args.point or [(0.3, 0.7), (0.73, 0.55), (0.5, 0.12), (0.5, 0.93)]
    yield (
        "self-attention.webp",
        attention_figures.draw_self_maps(*attention.self_maps(job.model, job.prompt(), points, job.settings), points),
    )


@named("reverse")
def reverse(job: Job) -> Figures:
    """x_t and the predicted x0 step by step, as a strip and as an animation"""
    steps = denoising.trajectory(job.model, job.prompt(), job.settings)
    yield "reverse.webp", denoising.draw_trajectory(job.model, steps)
    yield f"reverse-film.{job.args.film}", denoising.frames(job.model, steps)


@named("convergence")
def converging(job: Job) -> Figures:
    """distance of samplers to a 1000-step solution over network evaluations"""
    reference = replace(convergence.REFERENCE, seed=job.settings.seed)
    results = convergence.convergence(job.model, job.prompt(), reference, steps=convergence.STEPS)
    yield "convergence.png", convergence.draw_convergence(results)


@named("guidance")
def guiding(job: Job) -> Figures:
    """one image at rising guidance; the predictions that guidance combines"""
    prompt = job.prompt(OTHER)
    images = guidance.sweep(job.model, prompt, settings=job.settings)
    yield "guidance.webp", guidance.draw_sweep(images, guidance.GUIDANCES, prompt)
    seen = guidance.predictions(job.model, prompt, job.settings)
    yield "predictions.webp", guidance.draw_predictions(job.model, seen)


def axes(args: argparse.Namespace) -> tuple[grids.Axis, grids.Axis]:
    """--x and --y; a missing one has its default in AXES, or the other default if the given one varies that setting."""
    x, y = (None if axis is None else grids.Axis.of(axis) for axis in (args.x, args.y))
    x_usual, y_usual = map(grids.Axis.of, AXES)
    if x is None:
        x = y_usual if y is not None and y.name == x_usual.name else x_usual
    if y is None:
        y = x_usual if x.name == y_usual.name else y_usual
    return x, y


@named("grid")
def grid(job: Job) -> Figures:
    """images over two settings, --x and --y: sampler, steps, guidance, seed, strength, prompt"""
    prompt = job.prompt(OTHER)
    x, y = axes(job.args)
    image = job.image() if "strength" in (x.name, y.name) else None
    sheet = grids.grid(job.model, prompt, x, y, job.settings, image)
    suffix = "" if "prompt" in (x.name, y.name) else f': "{prompt}"'
    yield "grid.webp", grids.draw_grid(sheet, f"{y.name} and {x.name}{suffix}")


@named("mixing")
def mix(job: Job) -> Figures:
    """interpolation from the prompt to --other, and from one noise to another"""
    prompt = job.prompt()
    seed = (job.settings.seed + 1) % 2**64
    mixed = mixing.mixing(job.model, prompt, job.args.other, settings=job.settings, seed=seed)
    yield "mixing.webp", mixing.draw_mixing(mixed, prompt, job.args.other)


@named("editing")
def edit(job: Job) -> Figures:
    """prompt-to-prompt: different words, same layout"""
    if job.args.prompt is None and job.args.word is None:
        changes = EDITS
    else:
        prompt = job.prompt(OTHER)
        word = text.words(job.model.tokenizer, prompt)[-1].text if job.args.word is None else job.args.word
        changes = {
            "the other prompt": (prompt, job.args.other, 0, {}),
            f'less of "{word}"': (prompt, prompt, 0, {word: 0.2}),
            f'more of "{word}"': (prompt, prompt, 0, {word: 3.0}),
        }
    edits = {}
    for name, (source, target, more, factors) in changes.items():
        settings = replace(job.settings, seed=(job.settings.seed + more) % 2**64)
        edits[name] = editing.prompt_to_prompt(job.model, source, target, settings, factors=factors)
    yield "editing.webp", editing.draw_edits(edits)


@named("steering")
def steer(job: Job) -> Figures:
    """guidance by a loss on the image: "make it blue\""""
    prompt = job.prompt(OPEN)
    result = steering.steering(
        job.model, prompt, steering.colour_loss(-1.0, -1.0, 1.0), (0.0, 3.0, 10.0, 30.0, 100.0), job.settings
    )
    yield "steering.webp", steering.draw_steering(result, prompt, "make it blue")


@named("consistency")
def consistent(job: Job) -> Figures:
    """what a few-step model (--lora) predicts along a curve of the ordinary one"""
    prompt = job.prompt(OPEN)
    curve = replace(consistency.CURVE, guidance=job.settings.guidance)
    seeds = [(job.settings.seed + i) % 2**64 for i in range(CURVES)]
    seen = [consistency.consistency(job.model, job.student, prompt, replace(curve, seed=seed)) for seed in seeds]
    yield "consistency.webp", consistency.draw_consistency(job.model, seen[0])
    yield "consistency-distances.png", consistency.draw_distances(seen)


@named("few-steps")
def few_steps(job: Job) -> Figures:
    """images of the ordinary model and of a few-step model (--lora) in 1 to 8 steps"""
    prompt = job.prompt(OTHER)
    steps, many = consistency.STEPS, consistency.MANY
    seen = consistency.few_steps(job.model, job.student, prompt, job.settings, steps=steps, many=many)
    yield "few-steps.webp", consistency.draw_few_steps(seen, prompt)


@named("control")
def controlled(job: Job) -> Figures:
    """a hint obeyed: by scale, steps and mode; the residuals of the control network (--control, --hint)"""
    prompt, settings = job.prompt(CASTLE), job.settings
    if job.args.prompt is None and job.args.hint is None:
        settings = replace(settings, seed=(settings.seed + CASTLE_MORE) % 2**64)
    seen = control.controlled_images(job.model, prompt, job.control, settings)
    yield "control.webp", control.draw_controlled(seen, prompt)
    norms = control.residual_norms(job.model, prompt, job.control, settings)
    yield "residuals.webp", control.draw_residuals(job.model, norms)


@named("zero-convolutions")
def zero_convolutions(job: Job) -> Figures:
    """how the zero convolutions of a control network open in training (--log)"""
    log = control.read_log(resource(LOG) if job.args.log is None else job.args.log)
    names = control.residual_names(job.model.config.unet)
    fits = len(names) == len(log.zero[0])  # the log of another model's control network has other names
    yield "zero-convolutions.webp", control.draw_zero_convolutions(log, names if fits else None)
