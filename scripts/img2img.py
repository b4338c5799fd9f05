"""Generate images from text and an initial image, or each image of a folder.

python scripts/img2img.py "a green house in the snow" house.png --strength 0.6
python scripts/img2img.py "an oil painting of a harbour" photo.jpg --ckpt v1-5-pruned-emaonly.ckpt --n 4
python scripts/img2img.py "a watercolour" photos --out painted

Of a folder, every image in it is changed, and the results have the names of their images. An image is cropped to
multiples of 8 pixels. If it has less than half or more than twice as many pixels as the native size of the model, it is
resized to about that. --height, --width and --fit pad change this.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

from sd.imaging.files import OTHER_SUFFIXES, SUFFIXES, read_image
from sd.params import ImageToImage

from .common import adapter_args, arguments, cli, control_args, like, xl_args
from .common.generate import Source, about_init, generate


def parser() -> cli.Parser:
    """The arguments; names in the original's scripts work, too."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_prompt_arguments(parser, "IMAGE")
    like.add_like_argument(parser)
    group = arguments.add_image_arguments(parser, ImageToImage.strength)
    arguments.add_fit_argument(group)
    group.add_argument(
        "--loopback", type=int, default=1, metavar="N",
        help="N rounds, each from the result of the one before; all are saved (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--match-colours", "--match-colors", action="store_true",
        help="give the result the colours (mean and covariance) of the initial image",
    )  # fmt: skip
    arguments.add_sampling_arguments(parser, size="from the image")
    xl_args.add_xl_arguments(parser)
    arguments.add_output_arguments(parser)
    arguments.add_model_arguments(parser)
    adapter_args.add_addon_arguments(parser)
    control_args.add_control_arguments(parser)
    return parser


def generate_images(args: argparse.Namespace) -> None:
    """Check, read the images, load, generate, save."""
    like.take(args, ImageToImage)
    args = arguments.place_words(args, "init_img")
    params = arguments.sampling_params(args)
    if args.loopback < 1:
        raise ValueError(f"--loopback must be at least 1, got {args.loopback}")
    place = arguments.init_path(args)
    generate(args, params, [partial(read, args, path, path.stem if place.is_dir() else None) for path in images(place)])


def images(place: Path) -> list[Path]:
    """The image itself, or the images of a folder but not of its subfolders. Raises ValueError if it has none.

    Photos in formats that are not read are among them: they are skipped with a warning, not silently.
    """
    if not place.is_dir():
        return [place]
    files = (path for path in place.iterdir() if not path.name.startswith(".") and not path.is_dir())
    found = sorted(path for path in files if path.suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES))
    if not found:
        raise ValueError(f"{place}: no images in this folder ({', '.join(SUFFIXES)})")
    return found


def read(args: argparse.Namespace, path: Path, name: str | None) -> Source:
    """Read one image; the output files get this name."""
    init = read_image(path, args.background)
    make = partial(
        ImageToImage,
        image=init.image,
        strength=args.strength,
        fit=args.fit,
        posterior=args.posterior,
        match_colours=args.match_colours,
    )
    return Source(make, partial(about_init, args, init), name)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(generate_images, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
