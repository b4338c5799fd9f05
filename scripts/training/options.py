"""The options of the training programs about their data."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sd.config import Config

from ..common.cli import Parser, home
from .batches import BatchOptions, Tags
from .buckets import bucket_step
from .data import Source, World
from .folders import DataOptions, Folder, Joined

# options of programs that train on captioned images of any shape, with their values where they are not given
BUCKETED = {"square": False, "flip": False}
# those of fine-tuning
FINE_TUNING = {
    "reg": None, "prior_weight": None, "masked": False, "shuffle_tags": False, "keep_tags": None, "drop_tags": None,
}  # fmt: skip


def add_data_arguments(parser: Parser, scenes: int, bucketed: bool = False, fine_tuning: bool = False) -> None:
    """Add --data and its related options.

    bucketed      also those of programs whose images may have any shape
    fine_tuning   also those about captions, masks and images of the class
    """
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=home,
        metavar="FOLDER",
        help="folder of images with captions, or world: drawn scenes (default without --ckpt)",
    )
    add("--caption", metavar="TEXT", help="caption for images that have none (default: a missing caption is an error)")
    add("--scenes", type=int, default=scenes, metavar="N", help="number of drawn scenes (default: %(default)s)")
    area = (
        "images are resized to the area of a square with this side" if bucketed else "side of the central square crop"
    )
    add("--size", type=int, metavar="PIXELS", help=f"{area} (default: the model's native size)")
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    add("--workers", type=int, default=workers, metavar="N", help="processes that read images (default: %(default)s)")
    if bucketed:
        add("--square", action="store_true", help="crop images to the central square (default: keep about their shape)")
        add("--flip", action="store_true", help="mirror images at random, half of the time; not for drawn scenes")
    if fine_tuning:
        add(
            "--reg",
            type=home,
            metavar="FOLDER",
            help="folder of class images (DreamBooth), shown as often as those of --data; or world: drawn scenes",
        )
        add("--prior-weight", type=float, metavar="W", help="loss weight of the class images (default: 1)")
        add(
            "--masked", action="store_true",
            help="learn only where masks are white: name.mask.png, masks/name.png or the image's alpha channel. The "
            "loss is the mean over the white area, so images with small masks count as much as others",
        )  # fmt: skip
        add("--shuffle-tags", action="store_true", help="shuffle the comma-separated tags of captions each time")
        add(
            "--keep-tags",
            type=int,
            metavar="N",
            help="number of first tags that keep their place and are never dropped",
        )
        add("--drop-tags", type=float, metavar="P", help="leave out this share of the tags, chosen anew each time")


def data_options(args: argparse.Namespace, config: Config, caption: str | None = None) -> DataOptions:
    """How images are read for a model. `caption` is the default for images without one, unless --caption overrides it.

    Programs without --square crop to squares. Raises ValueError for options that do not go together.
    """
    world = args.data in (None, "world")
    flip, masked = getattr(args, "flip", False), getattr(args, "masked", False)
    if world:
        for name, value in (("flip", flip), ("masked", masked)):
            if value:
                raise ValueError(f"--{name} is for a folder of images, not for drawn scenes: give a folder (--data)")
    classes = [getattr(args, name, None) for name in ("reg", "class_prompt", "class_prompts")]
    if getattr(args, "prior_weight", None) is not None and not any(classes):
        raise ValueError("--prior-weight is the weight of class images: give their folder (--reg) or --class-prompt")
    step = None if world or getattr(args, "square", True) else bucket_step(config)
    given = caption if args.caption is None else args.caption
    return DataOptions(args.size or config.size, step, given, flip, masked)


def batch_options(args: argparse.Namespace) -> BatchOptions:
    """How batches are made, of the options --drop, --shuffle-tags, --prior-weight, ..."""
    weight = getattr(args, "prior_weight", None)
    return BatchOptions(
        drop=args.drop,
        tags=Tags(args.shuffle_tags, args.keep_tags or 0, args.drop_tags or 0.0),
        prior_weight=1.0 if weight is None else weight,
    )


def find_source(
    args: argparse.Namespace, options: DataOptions, pairs: bool = False, reg: Path | str | None = None
) -> Source:
    """The data of --data, together with the class images in the folder `reg` if it is given.

    "world" in place of a folder is the toy world, as for --data. Raises ValueError for missing or unsuitable folders.
    """
    check_data(args)
    scenes = World(args.scenes, options.size, getattr(args, "phrasings", 1), pairs=pairs)
    if args.data in (None, "world"):
        source: Source = scenes
        data: tuple[Path, ...] = ()
    else:
        data = (Path(args.data),)
        classes = () if reg in (None, "world") else (Path(reg),)
        if any(folder.resolve() == data[0].resolve() for folder in classes):
            raise ValueError(f"--reg {reg}: the folder of --data: images of the class are others than those to learn")
        source = Folder(data[0], options, (args.out, *classes))
    if reg is None:
        return source
    if reg == "world":
        return Joined(source, replace(scenes, regular=True))
    return with_class_images(source, Path(reg), options, (args.out, *data), args.class_prompt)


def with_class_images(
    source: Source, folder: Path, options: DataOptions, outside: Sequence[Path] = (), caption: str | None = None
) -> Joined:
    """A source with the images of a folder as those of its class; `caption` is that of images without one.

    outside   folders to ignore: those of the images to learn, and where a run writes its samples
    """
    own = DataOptions(options.size, options.step, caption, options.flip, options.masked)
    return Joined(source, Folder(folder, own, tuple(outside), regular=True))


def check_data(args: argparse.Namespace) -> None:
    """Raise ValueError without --data where it has no default."""
    if args.data is None and args.ckpt:
        raise ValueError("--ckpt needs --data: a folder with images, or world for drawn scenes")
