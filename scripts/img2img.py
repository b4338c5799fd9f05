"""Pictures of a text that start from a picture.

python scripts/img2img.py "a green house in the snow" house.png --strength 0.6
python scripts/img2img.py "an oil painting of a harbour" photo.jpg --ckpt v1-5-pruned-emaonly.ckpt --n 4

The picture is cut to multiples of 8 pixels, and brought to about as many pixels as the model paints best if it is less
than half or more than twice as large; --height and --width, and --fit pad, say otherwise.
"""

from __future__ import annotations

import argparse
import sys

if not __package__:  # run as a file: see bootstrap.py
    from bootstrap import PACKAGE as __package__  # noqa: F401

from sd import StableDiffusion
from sd.pipeline import FITS, STRENGTH

from .common import adapter_args, cli, generate


def parser() -> cli.Parser:
    """The arguments; names of the original's scripts work too."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generate.add_prompt_arguments(parser, "PICTURE")
    generate.add_fit_argument(generate.add_picture_arguments(parser, STRENGTH))
    generate.add_sampling_arguments(parser, size="from the picture")
    generate.add_output_arguments(parser)
    generate.add_model_arguments(parser)
    adapter_args.add_addon_arguments(parser)
    return parser


def paint(args: argparse.Namespace) -> None:
    """Check, read the picture, load, paint, save."""
    args = generate.place_words(args, "init_img")
    settings = generate.checked(args, args.strength)
    init = generate.read_init(args, args.background)

    def make(model: StableDiffusion, prompt: str, **shared: object) -> list:
        return model.img2img(
            prompt, init.image, strength=args.strength, fit_by=args.fit, posterior=args.posterior, **shared
        )

    fitted = {"Fit": args.fit} if args.fit != FITS[0] else {}
    generate.paint(args, settings, make, {**generate.about_init(args, init), **fitted})


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(paint, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
