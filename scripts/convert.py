"""Rewrite a checkpoint.

    python scripts/convert.py v1-5-pruned-emaonly.ckpt weights/v1-5.safetensors --dtype float16

The output has this project's names and carries its config, so it loads with no flags; `--layout original` writes the
names of the original code, for other tools. Weights are copied bit for bit unless --dtype changes their precision.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any folder, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import sd
from sd.convert import CONFIG_KEY, WEIGHTS, to_original, to_own
from sd.device import DTYPES
from sd.files import exists, new_file
from sd.model import named

if __package__:
    from . import cli
else:
    from scripts import cli


def parser() -> cli.Parser:
    """The arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="checkpoint, .ckpt or .safetensors, in the original layout or ours")
    parser.add_argument("output", type=Path, help="a new .safetensors file")
    parser.add_argument(
        "--layout", choices=("sd", "original"), default="sd", help="names to write (default: %(default)s, ours)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision to write (default: as it is)")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="which U-Net of a training checkpoint (default: raw if there)",
    )
    parser.add_argument(
        "--model", choices=("auto", *sd.MODELS), default="auto", help="which model it is (default: found out)"
    )
    return parser


def rewrite(args: argparse.Namespace) -> None:
    """Read, rename, write: a whole file or none."""
    if args.output.suffix != ".safetensors":
        raise ValueError(f"{args.output}: only .safetensors files are written, as they cannot run code")
    if args.output.exists():
        raise exists(args.output)
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    with new_file(args.output) as partial:  # an unwritable folder says so before the work
        count, config = write(args, partial)
    print(f"{args.output}: {config.name}, {count} weights, {args.output.stat().st_size / 1e9:.2f} GB")


def write(args: argparse.Namespace, path: Path) -> tuple[int, sd.Config]:
    """Read and rename all weights and write them to `path`; returns their number and the model."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    with sd.load_checkpoint(args.input) as checkpoint:
        try:
            config = sd.MODELS[args.model] if args.model != "auto" else sd.detect(checkpoint)
            states = sd.convert(checkpoint, config, args.weights)
            count = sum(map(len, states.values()))
            with tqdm(total=count, desc="reading", unit="weight", disable=None, leave=False) as bar:
                read = {}
                for network, state in states.items():
                    read[network] = {}
                    for key, tensor in state.items():
                        read[network][key] = cast(key, tensor, dtype)
                        bar.update()
        except ValueError as error:
            raise named(args.input, error) from None
    tensors = to_original(read, config) if args.layout == "original" else to_own(read)
    metadata = {"format": "pt", CONFIG_KEY: config.to_json()} if args.layout == "sd" else {"format": "pt"}
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{args.output}: cannot be written: {error}") from None
    return count, config


def cast(key: str, tensor, dtype):
    """The tensor in another precision, refused where numbers would not fit."""
    if dtype is None:
        return tensor
    out = tensor.to(dtype)
    if not out.isfinite().all() and tensor.isfinite().all():
        raise ValueError(f"{key} has numbers beyond {str(dtype).removeprefix('torch.')}: use bfloat16 or float32")
    return out


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(rewrite, parser(), argv, "out of memory: the weights are held once while they are rewritten")


if __name__ == "__main__":
    sys.exit(main())
