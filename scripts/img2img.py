"""Pictures of a text that start from a picture.

python scripts/img2img.py "a green house in the snow" house.png --strength 0.6
python scripts/img2img.py "an oil painting of a harbour" photo.jpg --ckpt v1-5-pruned-emaonly.ckpt --n 4

The picture is cut to multiples of 8 pixels, and brought to about as many pixels as the model paints best if it is less
than half or more than twice as large; --height and --width, and --fit pad, say otherwise.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

from sd.params import FITS, ImageToImage

from .common import adapter_args, cli, generate


def parser() -> cli.Parser:
    """The arguments; names of the original's scripts work too."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generate.add_prompt_arguments(parser, "PICTURE")
    generate.add_fit_argument(generate.add_picture_arguments(parser, ImageToImage.strength))
    generate.add_sampling_arguments(parser, size="from the picture")
    generate.add_output_arguments(parser)
    generate.add_model_arguments(parser)
    adapter_args.add_addon_arguments(parser)
    return parser


def generate_images(args: argparse.Namespace) -> None:
    """Check, read the image, load, generate, save."""
    args = generate.place_words(args, "init_img")
    params = generate.checked(args)
    init = generate.read_init(args, args.background)

    make = partial(ImageToImage, image=init.image, strength=args.strength, fit=args.fit, posterior=args.posterior)

    fitted = {"Fit": args.fit} if args.fit != FITS[0] else {}
    generate.generate(args, params, make, {**generate.about_init(args, init), **fitted})


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(generate_images, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
