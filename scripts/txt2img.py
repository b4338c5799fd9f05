"""Generate images from text.

python scripts/txt2img.py "a red house in the snow"
python scripts/txt2img.py "a photograph of an astronaut riding a horse" --ckpt v1-5-pruned-emaonly.ckpt --n 4 --grid
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

from sd.params import HighRes, TextToImage

from .common import adapter_args, arguments, cli, control_args, like, xl_args
from .common.generate import Source, generate


def parser() -> cli.Parser:
    """The arguments; names in the original's scripts work, too."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_prompt_arguments(parser)
    like.add_like_argument(parser)
    arguments.add_sampling_arguments(parser)
    arguments.add_hires_arguments(parser)
    xl_args.add_xl_arguments(parser)
    arguments.add_output_arguments(parser)
    arguments.add_model_arguments(parser)
    adapter_args.add_addon_arguments(parser)
    control_args.add_control_arguments(parser, fit=True)
    return parser


def generate_images(args: argparse.Namespace) -> None:
    """Check, load, generate, save."""
    like.take(args, TextToImage)
    args = arguments.place_words(args)
    hires = arguments.hires_settings(args)
    make = partial(HighRes, **hires) if hires else TextToImage
    generate(args, arguments.sampling_params(args), [lambda: Source(make)])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(generate_images, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
