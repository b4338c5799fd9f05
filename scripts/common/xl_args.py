"""The arguments that only SDXL models have: second prompts, size conditioning, and the refiner."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from sd.params import SamplingParams

from .cli import TEXT, Parser, file_path

if TYPE_CHECKING:
    import sd

PAIR = re.compile(r"(\d{1,6})[xX](\d{1,6})", re.ASCII)
# argument -> the settings that it sets, in the order of its numbers: x before y, as in "Size: 1024x768"
PAIRS = {
    "original_size": ("original_width", "original_height"),
    "crop": ("crop_left", "crop_top"),
    "target_size": ("target_width", "target_height"),
}
SCORES = ("aesthetic_score", "negative_aesthetic_score")


def add_xl_arguments(parser: Parser) -> None:
    """--prompt-2, --negative-2, --original-size, --crop, --target-size, the aesthetic scores, and --refiner."""
    group = parser.add_argument_group("SDXL")
    group.add_argument(
        "--refiner", type=file_path, metavar="FILE",
        help="SDXL's refiner, or another SDXL model: takes the last steps (file or folder, as for --ckpt)",
    )  # fmt: skip
    group.add_argument(
        "--refiner-from", type=float, metavar="FRACTION",
        help="fraction of the steps after which the refiner takes over; 1: never (default: at the timesteps below 200 "
        "that SDXL's refiner was trained on, 0.8 for other models)",
    )  # fmt: skip
    group.add_argument(
        "--prompt-2", metavar=TEXT, help="what the second text encoder reads (default: the same as the first)"
    )
    group.add_argument("--negative-2", metavar=TEXT, help="the same for the negative prompt")
    group.add_argument(
        "--original-size", type=pair, metavar="WIDTHxHEIGHT",
        help="size of the original that the model is told; a small one gives an enlarged look (default: the image's)",
    )  # fmt: skip
    group.add_argument(
        "--crop", type=pair, metavar="LEFTxTOP",
        help="crop that the model is told, in pixels (default: 0x0)",
    )  # fmt: skip
    group.add_argument(
        "--target-size", type=pair, metavar="WIDTHxHEIGHT",
        help="target size that the model is told (default: the image's)",
    )  # fmt: skip
    group.add_argument(
        "--aesthetic-score", type=float, default=SamplingParams.aesthetic_score, metavar="SCORE",
        help="aesthetic score that the refiner is told, about 2 to 7 (default: %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--negative-aesthetic-score", type=float, default=SamplingParams.negative_aesthetic_score, metavar="SCORE",
        help="the same for the negative prompt (default: %(default)g)",
    )  # fmt: skip


def pair(text: str) -> tuple[int, int]:
    """Two numbers of pixels, "1024x768" -> both."""
    found = PAIR.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers of pixels, x before y, such as 1024x768")
    return int(found[1]), int(found[2])


def xl_params(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `SamplingParams` that were given."""
    found: dict[str, Any] = {name: getattr(args, name) for name in (*SCORES, "refiner_from")}
    for argument, names in PAIRS.items():
        if (given := getattr(args, argument)) is not None:
            found |= dict(zip(names, given, strict=True))
    return found


def check_refiner(args: argparse.Namespace) -> None:
    """Raise ValueError if base and refiner do not fit together, going by the headers of their files alone."""
    if args.refiner is None:
        return
    from sd.checkpoints.loading import LoadOptions, ModelFiles
    from sd.refiner import check_fit
    from sd.resources import EMBEDDED, resource

    configs = []
    for path, options in ((args.ckpt or resource(EMBEDDED), base_options(args)), (args.refiner, refiner_options(args))):
        with ModelFiles(path, LoadOptions(**options)) as files:
            configs.append(files.config)
    check_fit(*configs)


def base_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the base that decide its config."""
    from sd.config import MODELS

    names = ("weights", "prediction", "vae", "text_encoder", "text_encoder_2", "variant")
    config = None if args.model == "auto" else MODELS[args.model]
    return {"config": config, **{name: getattr(args, name) for name in names}}


def load_refiner(args: argparse.Namespace, model: sd.StableDiffusion) -> sd.StableDiffusion | None:
    """The model of --refiner on the device of the base, in its precision; None without that argument."""
    if args.refiner is None:
        return None
    from .loading import load_model

    options = {"device": model.device, "dtype": model.dtype, **refiner_options(args)}
    refiner = load_model(args, args.refiner, "loading the refiner", **options)
    print(f"refiner: {refiner.config.name}, {args.refiner.name}", flush=True)
    for text in refiner.about:
        print(f"refiner: {text}", flush=True)
    return refiner


def refiner_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the refiner: --variant says which files of a folder to read."""
    return {"variant": args.variant} if args.refiner.is_dir() else {}
