"""Generate the masked part of an image anew.

python scripts/inpaint.py "a red balloon" photo.png mask.png
python scripts/inpaint.py "a cat on the bench" bench.png --ckpt sd-v1-5-inpainting.ckpt

White in the mask is generated, black is kept bit for bit; if no mask is given, the transparent part of the image is the
mask. Inpainting checkpoints (9 channels) are made for this, but any other works, too. The result has the size of the
image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

from PIL import ImageOps

from sd.imaging.files import ImageFile, read_mask
from sd.imaging.mask_forms import NEARLY
from sd.params import CONTENTS, Inpaint, TextToImage

from .common import adapter_args, arguments, cli, control_args, like, xl_args
from .common.generate import Source, about_init, generate

MARGIN = 32  # pixels around the mask with --only-masked, as in other tools


def parser() -> cli.Parser:
    """The arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_prompt_arguments(parser, "IMAGE", "MASK")
    like.add_like_argument(parser)
    group = arguments.add_image_arguments(parser, strength=1.0)
    group.add_argument(
        "--mask", type=cli.home, metavar="FILE", help="white is generated (default: the transparent part of the image)"
    )
    group.add_argument("--invert-mask", action="store_true", help="generate what the mask keeps, and keep the rest")
    group.add_argument(
        "--mask-blur", type=float, default=0.0, metavar="PIXELS", help="soften the mask's edge (default: %(default)s)"
    )
    group.add_argument(
        "--content", choices=CONTENTS, default=CONTENTS[0],
        help="initial content of the masked part, if strength is below 1 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--only-masked", action="store_true",
        help="generate only the region around the mask, at the native size of the model: for small details",
    )  # fmt: skip
    group.add_argument(
        "--margin", type=int, default=MARGIN, metavar="PIXELS",
        help="size of the margin around the mask for --only-masked (default: %(default)s)",
    )  # fmt: skip
    arguments.add_sampling_arguments(parser, size="from the image")
    xl_args.add_xl_arguments(parser)
    arguments.add_output_arguments(parser)
    arguments.add_model_arguments(parser)
    adapter_args.add_addon_arguments(parser)
    control_args.add_control_arguments(parser)
    return parser


def generate_images(args: argparse.Namespace) -> None:
    """Check, read image and mask, load, generate, save."""
    like.take(args, Inpaint)
    args = arguments.place_words(args, "init_img", "mask")
    params = arguments.sampling_params(args)
    init = arguments.read_init(args, args.background if args.mask is not None else None)
    if args.mask is not None:
        mask = read_mask(args.mask)
    elif init.alpha is not None:
        mask = ImageOps.invert(init.alpha)
    else:
        raise ValueError(f"{args.init_img}: no part of it is transparent: give a mask with --mask")
    if args.invert_mask:
        mask = ImageOps.invert(mask)
    if not any(mask.histogram()[NEARLY + 1 :]):
        raise ValueError("the mask is empty (all black): nothing would be generated; --invert-mask?")

    make = partial(
        Inpaint,
        image=init.image,
        mask=mask,
        strength=args.strength,
        content=args.content,
        blur=args.mask_blur,
        margin=args.margin if args.only_masked else None,
        posterior=args.posterior,
    )
    digest = {} if args.mask is None else {"Mask hash": sha256(Path(args.mask).read_bytes()).hexdigest()[:10]}
    generate(args, params, [lambda: Source(make, partial(about, args, init, digest))])


def about(
    args: argparse.Namespace, init: ImageFile, digest: Mapping[str, object], request: TextToImage
) -> dict[str, object]:
    """The entries about image and mask in the metadata."""
    assert isinstance(request, Inpaint)
    return {
        **about_init(args, init, request),
        "Mask": "alpha" if args.mask is None else Path(args.mask).name,
        **digest,
        **({"Mask mode": "Inpaint not masked"} if args.invert_mask else {}),
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(generate_images, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
