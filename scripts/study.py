"""Pictures of what happens inside: noise, attention, guidance, samplers, ...

python scripts/study.py attention --prompt "a pink cat to the left of a white duck on the beach"
python scripts/study.py grid --x steps=4,8,16 --y sampler=ddim,heun,dpmpp_2m
python scripts/study.py all --out docs/figures
python scripts/study.py reverse --ckpt v1-5-pruned-emaonly.ckpt --prompt "a photograph of an astronaut riding a horse"

docs/ explains each of them. Computed in float32, if no --dtype is given. Files of the same name in --out are replaced.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from PIL import Image
from tqdm import tqdm

if not __package__:  # run as a file: see bootstrap.py
    from bootstrap import PACKAGE as __package__  # noqa: F401

from sd import StableDiffusion
from sd.config import POCKET
from sd.files import replaced_file
from sd.imaging.files import read_picture, save_animation
from sd.imaging.tensors import fit
from sd.params import SamplingParams
from sd.runtime.device import dtype_name
from sd.samplers import SAMPLERS
from sd.study import (
    attention,
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
    runs,
    steering,
    text,
)

from .common import arguments, cli, generate
from .toy_world import Scene, Thing, box, draw

OUT = Path("outputs/study")
# Sentences of the embedded model's world; any checkpoint that knows houses can do them. PROMPT says all that there is,
# so that it is known where its things are; OTHER leaves some things to the noise, and OPEN nearly all.
PROMPT = "watercolour of a big red house to the left of a big blue tree on a meadow at sunset"
THINGS = {"house": Thing("house", "red", "big", "left"), "tree": Thing("tree", "blue", "big", "right")}
OTHER = "a pink cat to the left of a white duck on the beach"
OPEN = "a house and a tree"
EXCHANGED = (
    "watercolour of a red house and a blue tree at sunset",
    "watercolour of a blue house and a red tree at sunset",
)
EDITS = {  # source, target, what is added to the seed, factors of words; here the target alone moves what is there
    "a duck for the boat": ("a boat on the sea", "a duck on the sea", 1, {}),
    "a cat for the house": ("a red house on a meadow", "a red cat on a meadow", 1, {}),
    "a red house": ("a house and a tree on a meadow", "a red house and a tree on a meadow", 2, {}),
    "less of the duck": (OTHER, OTHER, 0, {"duck": 0.2}),
}
LONG = "a red triceratops in the snow, " + ", ".join(["a small blue boat on the sea at night under the stars"] * 8)
FILM_SECONDS = 0.15  # a frame
LINGER = 8  # times that an MP4 shows its last frame once more
QUALITY = 90  # of WebP
AXES = ("steps=2,4,8,16,32", "sampler=ddim,euler_a,heun,dpmpp_2m")  # of a grid where none are given: x, y
OUT_OF_MEMORY = "out of memory: try a smaller --size, --dtype float16 or bfloat16, --low-memory, or --device cpu"


@dataclass(frozen=True)
class Desk:
    """What a figure is made with."""

    model: StableDiffusion
    settings: SamplingParams
    args: argparse.Namespace

    def prompt(self, default: str = PROMPT) -> str:
        """The user's, or one that suits the figure."""
        return default if self.args.prompt is None else self.args.prompt

    def picture(self) -> Image.Image:
        """--image at the model's size, or a scene of the drawn world."""
        side = self.model.config.size
        if self.args.image is not None:
            return fit(read_picture(self.args.image).image, side, side)
        scene = Scene("flat", "day", "meadow", tuple(THINGS.values()))
        return draw(scene, Random(1), side)


Drawn = Iterator[tuple[str, Image.Image | list[Image.Image]]]  # names of files and what is in them, lists being films
FIGURES: dict[str, Callable[[Desk], Drawn]] = {}


def named(name: str) -> Callable[[Callable[[Desk], Drawn]], Callable[[Desk], Drawn]]:
    """Puts a figure into FIGURES; its docstring is its line in --help."""

    def register(make: Callable[[Desk], Drawn]) -> Callable[[Desk], Drawn]:
        FIGURES[name] = make
        return make

    return register


@named("tokens")
def tokens(desk: Desk) -> Drawn:
    """the prompt as tokens with ids, padding and what is cut"""
    yield "tokens.png", text.draw_tokens(desk.model.tokenizer, [desk.prompt(), LONG])


@named("embeddings")
def embeddings(desk: Desk) -> Drawn:
    """how alike token and position embeddings are"""
    names = [
        *("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
        *("house", "castle", "tree", "flower", "car", "boat", "cat", "duck", "balloon", "kite"),
        *("meadow", "beach", "desert", "snow", "sea", "day", "sunset", "night"),
    ]
    text_encoder = desk.model.text_encoder
    similar = text.token_similarity(text_encoder, desk.model.tokenizer, names)
    yield "embeddings.png", text.draw_embeddings(similar, names, text.position_similarity(text_encoder))


@named("words")
def words(desk: Desk) -> Drawn:
    """two prompts place by place, as the same words in another order; yours and --other"""
    prompts = EXCHANGED if desk.args.prompt is None else (desk.args.prompt, desk.args.other)
    yield "words.webp", text.draw_word_order(text.word_order(desk.model, *prompts, desk.settings))


@named("latent")
def latents(desk: Desk) -> Drawn:
    """a picture's latent, channel by channel, and its way back"""
    yield "latent.webp", latent.draw_round_trip(latent.round_trip(desk.model, desk.picture()))


@named("schedule")
def schedule(desk: Desk) -> Drawn:
    """alpha, sigma, alpha-bar and the signal-to-noise ratio over t"""
    yield "schedule.png", noising.draw_curves(noising.curves(desk.model.schedule))


@named("forward")
def forward(desk: Desk) -> Drawn:
    """a picture with more and more noise, or as much as at each --t"""
    timesteps = desk.args.t or noising.TIMESTEPS
    noised = noising.forward_process(desk.model, desk.picture(), timesteps, seed=desk.settings.seed)
    yield "forward.webp", noising.draw_forward(noised)


@named("unet")
def unet(desk: Desk) -> Drawn:
    """the U-Net's levels and parts: shapes, parameters, FLOPs"""
    model = desk.model
    _, height, width = model.latent_shape()
    parts = network.trace(model.unet, height, width, model.config.text[0].length)
    yield "unet.png", network.draw_network(parts, model.unet, model.config.name)
    yield "unet-parts.png", network.draw_table(parts, len(model.config.unet.channels))


@named("attention")
def cross_attention(desk: Desk) -> Drawn:
    """where each word is listened to; one word by step, level and head"""
    prompt = desk.prompt()
    if desk.args.word is not None:
        text.find_word(desk.model.tokenizer, prompt, desk.args.word)  # one that is not there is said before painting
    seen = attention.word_maps(desk.model, prompt, desk.settings)
    maps = [seen.of(i) for i in range(len(seen.words))]
    yield (
        "attention.webp",
        attention.draw_word_maps(seen, prompt, *in_boxes(desk, "attention", seen.words, maps)),
    )
    word = desk.args.word
    if word is None:
        word = next((w.text for w in seen.words if w.text in THINGS), seen.words[-1].text)
    positions = text.find_word(desk.model.tokenizer, prompt, word)
    number = next(i for i, each in enumerate(seen.words) if each.positions == positions)
    yield "attention-word.webp", attention.draw_breakdown(seen, number)


@named("influence")
def influences(desk: Desk) -> Drawn:
    """what changes where a word of the prompt is left out"""
    prompt = desk.prompt()
    seen = influence.influence(desk.model, prompt, desk.settings)
    yield (
        "influence.webp",
        influence.draw_influence(seen, prompt, *in_boxes(desk, "influence", seen.words, seen.maps)),
    )


Box = tuple[float, float, float, float]


def in_boxes(
    desk: Desk, what: str, found: list[text.Word], maps: list[torch.Tensor]
) -> tuple[dict[int, str], dict[int, Box]]:
    """Notes and boxes for the words that name a thing or its colour: how much of the map is inside of the thing's box.

    Only for the default prompt and the world in which it is known where its things are.
    """
    notes: dict[int, str] = {}
    boxes: dict[int, Box] = {}
    known = desk.prompt() == PROMPT and desk.model.config.name == POCKET.name
    for number, thing in object_words(found) if known else ():
        mass = attention.mass_inside(maps[number], box(thing))
        area = attention.mass_inside(torch.ones(64, 64), box(thing))
        notes[number], boxes[number] = f"{mass:.0%} in its box\n({area:.0%} of the area)", box(thing)
        tqdm.write(f"{what}: {mass:.0%} of {found[number].text!r} is in the box of the {thing.kind}, {area:.0%} of the "
                   "picture")  # fmt: skip
    return notes, boxes


def object_words(found: list[text.Word]) -> Iterator[tuple[int, Thing]]:
    """The numbers of the words that name one of THINGS or its colour."""
    for number, word in enumerate(found):
        for thing in THINGS.values():
            if word.text in (thing.kind, thing.colour):
                yield number, thing


@named("self-attention")
def self_attention(desk: Desk) -> Drawn:
    """where some places of the picture look"""
    points = desk.args.point or [(0.3, 0.7), (0.73, 0.55), (0.5, 0.12), (0.5, 0.93)]
    yield (
        "self-attention.webp",
        attention.draw_self_maps(*attention.self_maps(desk.model, desk.prompt(), points, desk.settings), points),
    )


@named("reverse")
def reverse(desk: Desk) -> Drawn:
    """x_t and the predicted x0 step by step, as a strip and as a film"""
    steps = denoising.trajectory(desk.model, desk.prompt(), desk.settings)
    yield "reverse.webp", denoising.draw_trajectory(desk.model, steps)
    yield f"reverse-film.{desk.args.film}", denoising.frames(desk.model, steps)


@named("convergence")
def converging(desk: Desk) -> Drawn:
    """samplers' distance to a 1000-step solution over evaluations"""
    results = convergence.convergence(
        desk.model,
        desk.prompt(),
        replace(desk.settings, guidance=1.0),
        steps=convergence.STEPS,
        reference_steps=convergence.SOLUTION_STEPS,
    )
    yield "convergence.png", convergence.draw_convergence(results)


@named("guidance")
def guiding(desk: Desk) -> Drawn:
    """the same picture at rising guidance; both predictions and the guided one"""
    prompt = desk.prompt(OTHER)
    pictures = guidance.sweep(desk.model, prompt, settings=desk.settings)
    yield "guidance.webp", guidance.draw_sweep(pictures, guidance.GUIDANCES, prompt)
    seen = guidance.predictions(desk.model, prompt, desk.settings)
    yield "predictions.webp", guidance.draw_predictions(desk.model, seen)


def axes(args: argparse.Namespace) -> tuple[grids.Axis, grids.Axis]:
    """--x and --y; for one that is not given what is usual there, unless the other one varies that."""
    given = [None if axis is None else grids.Axis.of(axis) for axis in (args.x, args.y)]
    for i in range(2):
        if given[i] is None:
            other = given[1 - i]
            usual = [grids.Axis.of(axis) for axis in (AXES[i], AXES[1 - i])]
            given[i] = next(axis for axis in usual if other is None or axis.name != other.name)
    return given[0], given[1]


@named("grid")
def grid(desk: Desk) -> Drawn:
    """pictures over two settings, --x and --y: sampler, steps, guidance, seed, strength, prompt"""
    prompt = desk.prompt(OTHER)
    x, y = axes(desk.args)
    image = desk.picture() if "strength" in (x.name, y.name) else None
    sheet = grids.grid(desk.model, prompt, x, y, desk.settings, image)
    told = "" if "prompt" in (x.name, y.name) else f': "{prompt}"'
    yield "grid.webp", grids.draw_grid(sheet, f"{y.name} and {x.name}{told}")


@named("mixing")
def mix(desk: Desk) -> Drawn:
    """from one prompt to --other, and from one noise to another"""
    prompt = desk.prompt()
    seed = (desk.settings.seed + 1) % 2**64
    mixed = mixing.mixing(desk.model, prompt, desk.args.other, settings=desk.settings, seed=seed)
    yield "mixing.webp", mixing.draw_mixing(mixed, prompt, desk.args.other)


@named("editing")
def edit(desk: Desk) -> Drawn:
    """prompt-to-prompt: other words, the same layout"""
    if desk.args.prompt is None and desk.args.word is None:
        changes = EDITS
    else:
        prompt = desk.prompt(OTHER)
        word = text.words(desk.model.tokenizer, prompt)[-1].text if desk.args.word is None else desk.args.word
        changes = {
            "the other prompt": (prompt, desk.args.other, 0, {}),
            f'less of "{word}"': (prompt, prompt, 0, {word: 0.2}),
            f'more of "{word}"': (prompt, prompt, 0, {word: 3.0}),
        }
    edits = {}
    for name, (source, target, more, factors) in changes.items():
        settings = replace(desk.settings, seed=(desk.settings.seed + more) % 2**64)
        edits[name] = editing.prompt_to_prompt(desk.model, source, target, settings, factors=factors)
    yield "editing.webp", editing.draw_edits(edits)


@named("steering")
def steer(desk: Desk) -> Drawn:
    """a loss on the picture, "make it blue", as guidance"""
    prompt = desk.prompt(OPEN)
    result = steering.steering(
        desk.model, prompt, steering.colour_loss(-1.0, -1.0, 1.0), (0.0, 3.0, 10.0, 30.0, 100.0), desk.settings
    )
    yield "steering.webp", steering.draw_steering(result, prompt, "make it blue")


def parser() -> cli.Parser:
    """The arguments."""
    lines = "\n".join(f"  {name:16}{make.__doc__}" for name, make in FIGURES.items())
    parser = cli.Parser(
        description=f"{__doc__}\nfigures:\n{lines}\n  {'all':16}all of them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s FIGURE [options]",
    )
    parser.add_argument("figure", choices=[*FIGURES, "all"], metavar="FIGURE", help="one of the above")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where to (default: %(default)s)")
    parser.add_argument("--prompt", metavar="TEXT", help="what to paint (default: what suits the figure)")
    parser.add_argument(
        "--other", default=OTHER, metavar="TEXT", help='words, mixing, editing: another prompt (default: "%(default)s")'
    )
    parser.add_argument("--word", metavar="WORD", help="attention, editing: the word to look at")
    parser.add_argument("--image", type=Path, metavar="FILE", help="latent, forward, grid: a picture to work on")
    parser.add_argument(
        "--point", type=point, action="append", metavar="X,Y",
        help="self-attention: a place, in parts of the picture's sides; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--t", type=float, action="append", metavar="T",
        help="forward: a timestep, 0 to 999, or -1 for none; may be given several times",
    )  # fmt: skip
    for name, usual in zip(("--x", "--y"), AXES, strict=True):
        parser.add_argument(name, metavar="NAME=A,B", help=f'grid; prompts as prompt="A|B" (default: {usual})')
    parser.add_argument("--film", choices=("webp", "gif", "mp4"), default="webp", help="mp4 needs ffmpeg")
    usual = runs.SETTINGS
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=int, default=usual.steps, metavar="N", help="default: %(default)s")
    group.add_argument("--guidance", type=float, metavar="G", help="default: the model's own")
    group.add_argument(
        "--sampler", default="ddim", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=usual.seed, metavar="S", help="default: %(default)s")
    group.add_argument("--size", type=int, metavar="PIXELS", help="side of the pictures (default: the model's own)")
    arguments.add_model_arguments(parser)
    return parser


def point(text: str) -> tuple[float, float]:
    """ "0.5,0.25" -> (0.5, 0.25)."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a place is X,Y in parts of the sides, got {text!r}") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"a place is from 0,0 to 1,1, got {text!r}")
    return x, y


def save(drawn: Image.Image | list[Image.Image], path: Path) -> None:
    """Write a picture or a film in the place of what was there."""
    if isinstance(drawn, list):
        save_film(drawn, path)
        return
    options = {"quality": QUALITY, "method": 6} if path.suffix == ".webp" else {"optimize": True}
    with replaced_file(path) as partial:
        drawn.save(partial, "WEBP" if path.suffix == ".webp" else "PNG", **options)


def save_film(frames: list[Image.Image], path: Path) -> None:
    """A .webp or .gif animation, or an .mp4 by ffmpeg."""
    path.unlink(missing_ok=True)
    if path.suffix != ".mp4":
        save_animation(frames, path, FILM_SECONDS)
        return
    even = [frame.crop((0, 0, frame.width // 2 * 2, frame.height // 2 * 2)) for frame in frames]  # as H.264 wants it
    width, height = even[0].size
    command = ["ffmpeg", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", f"{1 / FILM_SECONDS:.3f}", "-i", "-", "-pix_fmt", "yuv420p", str(path)]
    pixels = b"".join(frame.tobytes() for frame in [*even, *even[-1:] * LINGER])
    done = subprocess.run(command, input=pixels, capture_output=True)
    if done.returncode:
        raise OSError(f"{path}: ffmpeg: {done.stderr.decode(errors='replace')[:200]}")


def study(args: argparse.Namespace) -> None:
    """Check, load, draw, save."""
    if args.film == "mp4" and shutil.which("ffmpeg") is None:
        raise ValueError("--film mp4 needs ffmpeg, which is not installed: try webp or gif")
    settings = SamplingParams(
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        seed=args.seed,
        spacing=runs.spacing_of(args.sampler, runs.SETTINGS.spacing),
    )
    if args.compile:
        raise ValueError("--compile: nothing can be seen inside of a compiled U-Net; leave it out")
    axes(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--out {args.out}: there is a file where a folder should be, give another name") from None
    args.dtype = args.dtype or "float32"  # what is looked at closely should not be rounded
    model = generate.load(args)
    if args.size is not None:
        model.config = replace(model.config, size=args.size)
        model.latent_shape()
    if args.prompt is not None and not text.words(model.tokenizer, args.prompt):
        raise ValueError("--prompt has no words to look at")
    for t in args.t or ():
        model.schedule.level(t)
    print(
        f"{model.config.name} on {model.device}, {dtype_name(model.dtype)}, seed {settings.seed}, guidance "
        f"{runs.guidance_of(model, settings):g}",
        flush=True,
    )
    desk = Desk(model, settings, args)
    chosen = list(FIGURES) if args.figure == "all" else [args.figure]
    with tqdm(unit=" evaluations", disable=None, leave=False, file=sys.stderr) as bar:
        counting = model.unet.register_forward_hook(lambda *_: bar.update() and None)
        try:
            for number, name in enumerate(chosen, start=1):
                bar.set_description(f"{name} ({number} of {len(chosen)})")
                for file, drawn in FIGURES[name](desk):
                    save(drawn, args.out / file)
                    tqdm.write(str(args.out / file))
        finally:
            counting.remove()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(study, parser(), argv, OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
