"""Class images for DreamBooth: the model generates them before training, so as not to forget the class.

Ruiz et al. 2023, "DreamBooth: fine tuning text-to-image diffusion models for subject-driven generation"
(arXiv:2208.12242), section 3.2: besides the images of a subject, "a photo of sks dog", the model is trained on images
of the class, "a photo of a dog", that it generated itself. Without them it draws all dogs like that one.

They are generated once, into a folder with their captions. Existing ones are kept, so an interrupted run generates only
the missing ones. Other images may be put into the folder, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sd.files import replaced_file
from sd.imaging.files import SUFFIXES
from sd.pipeline import StableDiffusion

from ..common.cli import Parser, file_path
from . import adapters
from .processes import Processes
from .samples import prompts_in

FOLDER, COUNT = "class", 200  # in the folder of the run; how many, as in the paper


def add_class_arguments(parser: Parser) -> None:
    """Add --class-prompt and its related options."""
    add = parser.add_argument_group("DreamBooth").add_argument
    add(
        "--class-prompt", metavar="TEXT",
        help='such as "a photo of a dog": generate class images before training, and train on them too',
    )  # fmt: skip
    add(
        "--class-prompts", type=file_path, metavar="FILE",
        help="file with one prompt per line, in place of --class-prompt: for several kinds of class images",
    )  # fmt: skip
    add(
        "--class-images", type=int, default=COUNT, metavar="N",
        help="number of class images, with those that are in the folder already (default: %(default)s)",
    )  # fmt: skip


def wanted(args: argparse.Namespace) -> bool:
    """Whether the options ask for class images."""
    return args.class_prompt is not None or args.class_prompts is not None


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if not wanted(args):
        if args.class_images != COUNT:
            raise ValueError("--class-images goes with --class-prompt or --class-prompts: what shall they show?")
        return
    if not (args.ckpt or args.control or adapters.wanted(args)):
        raise ValueError("--class-prompt does not go with a new model, which knows no class yet: give --ckpt or --lora")
    if args.class_prompt is not None and args.class_prompts is not None:
        raise ValueError("--class-prompt and --class-prompts cannot be used together: give one")
    if args.class_prompt is not None and not args.class_prompt.strip():
        raise ValueError('--class-prompt is empty: describe the class, as in "a photo of a dog"')
    if args.class_prompts is not None:
        prompts_in("--class-prompts", args.class_prompts)
    if args.reg == "world":
        raise ValueError("--reg world is drawn: class images are generated into a folder of your own (--reg FOLDER)")
    if args.class_images < 1:
        raise ValueError(f"--class-images must be at least 1, got {args.class_images}")


def find(args: argparse.Namespace, size: int, model: StableDiffusion, processes: Processes) -> Path:
    """The folder of the class images, after the main process generated those that are missing.

    model   as it is before training
    """
    folder = Path(args.reg) if args.reg else args.out / FOLDER
    prompts = [args.class_prompt] if args.class_prompts is None else prompts_in("--class-prompts", args.class_prompts)
    settings = {"steps": args.sample_steps, "guidance": args.sample_guidance, "height": size, "width": size}
    if processes.main:
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
        names = (f"class-{number:05d}" for number in range(args.class_images + there))
        free = [name for name in names if not (folder / f"{name}.png").exists()]
        for name in tqdm(free[: max(args.class_images - there, 0)], "class images", disable=None):
            seed = int(name.removeprefix("class-"))
            prompt = prompts[seed % len(prompts)]
            (image,) = model.txt2img(prompt, seed=seed, **settings)
            _write(image, prompt, folder / name)
    processes.wait()
    return folder


def _write(image: Image.Image, caption: str, stem: Path) -> None:
    """Write the caption, then the image: an image is never there without its caption."""
    with replaced_file(stem.with_name(f"{stem.name}.txt")) as partial:
        partial.write_text(f"{caption}\n", encoding="utf-8")
    with replaced_file(stem.with_name(f"{stem.name}.png")) as partial:
        image.save(partial, "PNG")
