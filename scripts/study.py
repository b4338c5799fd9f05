"""Figures of what happens inside the model: noise, attention, guidance, samplers, ...

python scripts/study.py attention --prompt "a pink cat to the left of a white duck on the beach"
python scripts/study.py grid --x steps=4,8,16 --y sampler=ddim,heun,dpmpp_2m
python scripts/study.py all --out docs/figures
python scripts/study.py reverse --ckpt v1-5-pruned-emaonly.ckpt --prompt "a photograph of an astronaut riding a horse"
python scripts/study.py few-steps --ckpt v1-5-pruned-emaonly.ckpt --lora lcm-lora-sdv1-5.safetensors
python scripts/study.py control --ckpt v1-5-pruned-emaonly.ckpt --control control_sd15_canny.pth --hint edges.png

docs/ explains each figure. The default --dtype is float32. Existing files of the same name in --out are overwritten.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

from sd.files import replaced_file
from sd.imaging.animation import save_animation
from sd.params import SamplingParams
from sd.runtime.device import dtype_name
from sd.samplers import SAMPLERS
from sd.study import runs, text
from sd.study.drawing import matplotlib_module

from .common import arguments, cli, generate
from .figures.commands import AXES, FIGURES, WITH_CONTROL, WITH_STUDENT, Job, axes
from .figures.hint import NEEDED as CONTROL_NEEDED
from .figures.hint import find_control
from .figures.student import NEEDED, find_lora
from .figures.world import OTHER

OUT = Path("outputs/study")
FRAME_SECONDS = 0.15
LAST_FRAME_REPEATS = 8  # of an MP4
QUALITY = 90  # of WebP
FEW_COLOURS = 4096  # a figure with more shows images
OUT_OF_MEMORY = "out of memory: try a smaller --size, --dtype float16 or bfloat16, --low-memory, or --device cpu"


def parser() -> cli.Parser:
    """The arguments."""
    lines = "\n".join(f"  {name:18}{make.__doc__}" for name, make in FIGURES.items())
    parser = cli.Parser(
        description=f"{__doc__}\nfigures:\n{lines}\n  {'all':18}all of them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s FIGURE [options]",
    )
    parser.add_argument("figure", choices=[*FIGURES, "all"], metavar="FIGURE", help="one of the above")
    parser.add_argument(
        "--out", type=cli.file_path, default=OUT, metavar="FOLDER", help="output folder (default: %(default)s)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt (default: depends on the figure)")
    parser.add_argument(
        "--other", default=OTHER, metavar="TEXT", help='words, mixing, editing: another prompt (default: "%(default)s")'
    )
    parser.add_argument("--word", metavar="WORD", help="attention, editing: a word of the prompt")
    parser.add_argument("--image", type=cli.file_path, metavar="FILE", help="latent, forward, grid: the input image")
    parser.add_argument(
        "--point", type=point, action="append", metavar="X,Y",
        help="self-attention: a point, 0,0 (top left) to 1,1 (bottom right); repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--t", type=float, action="append", metavar="T",
        help="forward: a timestep, 0 to 999, or -1 for clean; repeatable",
    )  # fmt: skip
    for name, usual in zip(("--x", "--y"), AXES, strict=True):
        parser.add_argument(name, metavar="NAME=A,B", help=f'grid: an axis; prompt="A|B" (default: {usual})')
    parser.add_argument(
        "--film",
        choices=("webp", "gif", "mp4"),
        default="webp",
        help="reverse: format of the animation; mp4 needs ffmpeg",
    )
    parser.add_argument(
        "--lora", type=cli.home, metavar="[NAME=]FILE[:WEIGHT]",
        help="consistency, few-steps: a few-step LoRA for --ckpt (default: that of the embedded model)",
    )  # fmt: skip
    parser.add_argument(
        "--control", type=cli.home, metavar="FILE",
        help="control: a control network for --ckpt (default: that of the embedded model)",
    )  # fmt: skip
    parser.add_argument("--hint", type=cli.file_path, metavar="FILE", help="control: the hint for the control network")
    parser.add_argument(
        "--log", type=cli.file_path, metavar="FILE", help="zero-convolutions: train.jsonl of train.py --control"
    )
    settings = runs.SETTINGS
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=int, default=settings.steps, metavar="N", help="default: %(default)s")
    group.add_argument("--guidance", type=float, metavar="G", help="default: the model's own")
    group.add_argument(
        "--sampler", default="ddim", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=settings.seed, metavar="S", help="default: %(default)s")
    group.add_argument("--size", type=int, metavar="PIXELS", help="width and height (default: the model's own)")
    arguments.add_model_arguments(parser)
    return parser


def point(text: str) -> tuple[float, float]:
    """Parse "0.5,0.25" -> (0.5, 0.25)."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a point X,Y, got {text!r}") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"expected a point from 0,0 to 1,1, got {text!r}")
    return x, y


def save(figure: Image.Image | list[Image.Image], path: Path) -> None:
    """Write an image, or the frames of an animation; replaces an existing file."""
    if isinstance(figure, list):
        save_film(figure, path)
        return
    with replaced_file(path) as partial:
        if path.suffix == ".webp":  # without loss, a drawing takes less space than with it
            figure.save(partial, "WEBP", quality=QUALITY, method=6, lossless=bool(figure.getcolors(FEW_COLOURS)))
        else:
            figure.save(partial, "PNG", optimize=True)


def save_film(frames: list[Image.Image], path: Path) -> None:
    """Write a .webp or .gif animation, or an .mp4 with ffmpeg."""
    path.unlink(missing_ok=True)
    if path.suffix != ".mp4":
        save_animation(frames, path, FRAME_SECONDS)
        return
    even = [
        frame.crop((0, 0, frame.width // 2 * 2, frame.height // 2 * 2)) for frame in frames
    ]  # H.264 needs even sides
    width, height = even[0].size
    command = ["ffmpeg", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", f"{1 / FRAME_SECONDS:.3f}", "-i", "-", "-pix_fmt", "yuv420p", str(path)]
    pixels = b"".join(frame.tobytes() for frame in [*even, *even[-1:] * LAST_FRAME_REPEATS])
    done = subprocess.run(command, input=pixels, capture_output=True)
    if done.returncode:
        raise OSError(f"{path}: ffmpeg: {done.stderr.decode(errors='replace')[:200]}")


def chosen_figures(args: argparse.Namespace) -> list[str]:
    """The names of the figures to make; "all" leaves out those whose LoRA or control network is missing.

    Raises ValueError if it is missing for the only figure, and for one that cannot be used.
    """
    chosen = list(FIGURES) if args.figure == "all" else [args.figure]
    for option, users in (("lora", WITH_STUDENT), ("control", WITH_CONTROL), ("hint", WITH_CONTROL)):
        if getattr(args, option) is not None and not set(users) & set(chosen):
            raise ValueError(f"--{option} is for {', '.join(users)}: {args.figure} shows the model without it")
    if args.log is not None and not {"zero-convolutions", "all"} & {args.figure}:
        raise ValueError(f"--log is for zero-convolutions: it has no effect on {args.figure}")
    for users, find, needed in ((WITH_STUDENT, find_lora, NEEDED), (WITH_CONTROL, find_control, CONTROL_NEEDED)):
        missing = [name for name in chosen if name in users]
        if not missing or find(args) is not None:
            continue
        if args.figure != "all":
            raise ValueError(f"{args.figure}: {needed}")
        warnings.warn(f"left out: {', '.join(missing)}; for these, {needed}", stacklevel=1)
        chosen = [name for name in chosen if name not in missing]
    return chosen


def study(args: argparse.Namespace) -> None:
    """Check the arguments, load the model, generate and save the figures."""
    if args.film == "mp4" and shutil.which("ffmpeg") is None:
        raise ValueError("--film mp4 needs ffmpeg, which is not installed: try webp or gif")
    matplotlib_module("figure")  # fail before the computation, not after it
    settings = SamplingParams(
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        seed=args.seed,
        spacing=runs.spacing_of(args.sampler, runs.SETTINGS.spacing),
    )
    if args.compile:
        raise ValueError("--compile: a compiled U-Net skips the hooks of the studies; remove the option")
    axes(args)
    chosen = chosen_figures(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--out {args.out}: there is a file of this name, choose another folder") from None
    args.dtype = args.dtype or "float32"  # studies should not show rounding errors
    model = generate.load(args)
    if args.size is not None:
        model.config = replace(model.config, size=args.size)
        model.latent_shape()
    if args.prompt is not None and not text.words(model.tokenizer, args.prompt):
        raise ValueError("--prompt has no words")
    for t in args.t or ():
        model.schedule.level(t)
    print(
        f"{model.config.name} on {model.device}, {dtype_name(model.dtype)}, seed {settings.seed}, guidance "
        f"{runs.guidance_of(model, settings):g}",
        flush=True,
    )
    job = Job(model, settings, args)
    if args.lora is not None:
        _ = job.student  # raises for a LoRA that is not one for few steps, before any figure is made
    if args.control is not None:
        _ = job.control
    with tqdm(unit=" evaluations", disable=None, leave=False, file=sys.stderr) as bar:
        counting = model.unet.register_forward_hook(lambda *_: bar.update() and None)
        try:
            for number, name in enumerate(chosen, start=1):
                bar.set_description(f"{name} ({number} of {len(chosen)})")
                for file, figure in FIGURES[name](job):
                    save(figure, args.out / file)
                    tqdm.write(str(args.out / file))
        finally:
            counting.remove()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(study, parser(), argv, OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
