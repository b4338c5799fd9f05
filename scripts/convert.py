"""Rewrite a checkpoint, or say what is in it.

    python scripts/convert.py v1-5-pruned-emaonly.ckpt weights/v1-5.safetensors --dtype float16
    python scripts/convert.py v1-5.safetensors original.safetensors --layout original
    python scripts/convert.py v1-5.safetensors v1-5-folder --layout diffusers
    python scripts/convert.py v1-5-folder v1-5.safetensors
    python scripts/convert.py v2-1_768-ema-pruned.ckpt --info

The input is a file in the original layout or ours, or a diffusers folder. The output has this project's names and
carries its config, so it loads with no flags; `--layout original` writes the names of the original code, for other
tools, `--layout diffusers` a folder. Weights are copied bit for bit unless --dtype changes their precision.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

import sd
from sd.checkpoints.checkpoint import naming
from sd.checkpoints.convert import WEIGHTS
from sd.checkpoints.inspect import census

from .common import cli

LAYOUTS = ("sd", "original", "diffusers")
PRECISIONS = ("float32", "float16", "bfloat16")


def parser() -> cli.Parser:
    """The arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="checkpoint: .ckpt, .safetensors or a diffusers folder")
    parser.add_argument(
        "output", type=Path, nargs="?", help="a new .safetensors file; with --layout diffusers a folder"
    )
    parser.add_argument("--info", action="store_true", help="say what is in the input, without reading its weights")
    parser.add_argument("--sha256", action="store_true", help="with --info: of large files, too")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="sd", help="names to write (default: %(default)s, ours, in one file)"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, help="precision to write (default: as it is)")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="auto",
        help="which U-Net of a training checkpoint (default: raw if there; of a folder, its main one)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-ema", action="store_true", help="write both: the U-Net as trained and its moving average"
    )
    parser.add_argument(
        "--model", choices=("auto", *sd.MODELS), default="auto", help="which model it is (default: found out)"
    )
    parser.add_argument("--prediction", choices=("eps", "v"), help="what its U-Net predicts (default: found out)")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="take the VAE from this file or folder")
    parser.add_argument("--text-encoder", type=Path, metavar="FILE", help="take the text encoder from this one")
    parser.add_argument("--variant", metavar="NAME", help="of a diffusers folder: fp16, ...")
    return parser


def work(args: argparse.Namespace) -> None:
    """--info or rewrite."""
    if args.info:
        if args.output is not None:
            raise ValueError("--info writes nothing: leave out the output")
        others = ("dtype", "keep_ema", "prediction", "vae", "text_encoder")
        if given := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]:
            raise ValueError(f"--info says what is in the input, as it is: leave out {', '.join(given)}")
        with sd.load_checkpoint(args.input, args.variant) as checkpoint, naming(args.input):
            config = None if args.model == "auto" else sd.MODELS[args.model]
            print("\n".join(census(checkpoint, config, sha256=args.sha256 or None).lines()))
        return
    if args.sha256:
        raise ValueError("--sha256 goes with --info: leave it out")
    if args.output is None:
        raise ValueError("give the name of the file to write behind the input, or --info")
    # here, as it imports torch, which takes longer than --info
    from .rewriting import rewrite

    rewrite(args)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(work, parser(), argv, "out of memory: the weights are held once while they are rewritten")


if __name__ == "__main__":
    sys.exit(main())
