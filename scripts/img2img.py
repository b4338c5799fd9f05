"""Generate images from text and an initial image.

python scripts/img2img.py "a green house in the snow" house.png --strength 0.6
python scripts/img2img.py "an oil painting of a harbour" photo.jpg --ckpt v1-5-pruned-emaonly.ckpt --n 4

The image is cropped to multiples of 8 pixels. If it has less than half or more than twice as many pixels as the native
size of the model, it is resized to about that. --height, --width and --fit pad change this.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

from sd.params import ImageToImage

from .common import adapter_args, arguments, cli, like
from .common.generate import about_init, generate


def parser() -> cli.Parser:
    """The arguments; names in the original's scripts work, too."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_prompt_arguments(parser, "IMAGE")
    like.add_like_argument(parser)
    arguments.add_fit_argument(arguments.add_image_arguments(parser, ImageToImage.strength))
    arguments.add_sampling_arguments(parser, size="from the image")
    arguments.add_output_arguments(parser)
    arguments.add_model_arguments(parser)
    adapter_args.add_addon_arguments(parser)
    return parser


def generate_images(args: argparse.Namespace) -> None:
    """Check, read the image, load, generate, save."""
    like.take(args, ImageToImage)
    args = arguments.place_words(args, "init_img")
    params = arguments.sampling_params(args)
    init = arguments.read_init(args, args.background)

    make = partial(ImageToImage, image=init.image, strength=args.strength, fit=args.fit, posterior=args.posterior)
    generate(args, params, make, about_init(args, init))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(generate_images, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
