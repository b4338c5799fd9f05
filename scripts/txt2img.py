"""Pictures of a text.

python scripts/txt2img.py "a red house in the snow"
python scripts/txt2img.py "a photograph of an astronaut riding a horse" --ckpt v1-5-pruned-emaonly.ckpt --n 4 --grid
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any folder, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd import StableDiffusion

if __package__:
    from . import addons, cli, painting
else:
    from scripts import addons, cli, painting


def parser() -> cli.Parser:
    """The arguments; names of the original's scripts work too."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    painting.add_prompt_arguments(parser)
    painting.add_sampling_arguments(parser)
    painting.add_output_arguments(parser)
    painting.add_model_arguments(parser)
    addons.add_addon_arguments(parser)
    return parser


def paint(args: argparse.Namespace) -> None:
    """Check, load, paint, save."""
    args = painting.place_words(args)
    painting.paint(args, painting.checked(args), StableDiffusion.txt2img)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(paint, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
