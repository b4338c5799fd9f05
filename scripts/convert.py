"""Convert a checkpoint, or show what is in it.

    python scripts/convert.py v1-5-pruned-emaonly.ckpt weights/v1-5.safetensors --dtype float16
    python scripts/convert.py v1-5.safetensors original.safetensors --layout original
    python scripts/convert.py v1-5.safetensors v1-5-folder --layout diffusers
    python scripts/convert.py v1-5-folder v1-5.safetensors
    python scripts/convert.py v1-5.safetensors merged.safetensors --lora style.safetensors:0.8
    python scripts/convert.py v2-1_768-ema-pruned.ckpt --info

The input is a file in the original layout or in ours, or a diffusers folder. The output has this project's names and
carries its config, so it loads without flags; `--layout original` writes the names of the original code, for other
tools, `--layout diffusers` a folder. Weights are copied bit for bit unless --dtype changes their precision. A tiny
autoencoder (TAESD) can be converted alone; its original layout is a folder with taesd_encoder and taesd_decoder.
A control network (ControlNet) is converted in the same way.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

from safetensors import SafetensorError
from tqdm import tqdm

import sd
from sd.checkpoints.checkpoint import Checkpoint, naming
from sd.checkpoints.control_detect import check_fits, control_state, family, has_control, identify_control
from sd.checkpoints.control_export import WEIGHTS as CONTROL_WEIGHTS
from sd.checkpoints.control_export import check_control_writable, control_files, control_texts
from sd.checkpoints.convert import WEIGHTS, StateDict
from sd.checkpoints.detect import identify
from sd.checkpoints.inspect import inspect
from sd.checkpoints.layouts import AVERAGE, find_layouts
from sd.checkpoints.tiny_files import check_writable, tiny_files, tiny_texts
from sd.checkpoints.tiny_vae import describe_tiny, is_tiny
from sd.config import PRECISIONS, PREDICTIONS, SHORT_PRECISIONS, TinyVAEConfig
from sd.files import exists, new_file, new_folder
from sd.messages import printable

from .common import cli

if TYPE_CHECKING:  # torch is slow to import: functions that need it do so, and --help does not
    import torch
    from torch import Tensor

LAYOUTS = ("sd", "original", "diffusers")
COPIED = (
    "{} not in the input, which other programs expect and never use: the text encoder's last layer is a copy of the "
    "one before it"
)
PARTS = ("vae", "text_encoder", "text_encoder_2")  # options that take a network from another file


def parser() -> cli.Parser:
    """The arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=cli.file_path, help="checkpoint: .ckpt, .safetensors or a diffusers folder")
    parser.add_argument(
        "output", type=cli.file_path, nargs="?", help="a new .safetensors file; with --layout diffusers a folder"
    )
    parser.add_argument("--info", action="store_true", help="show what is in the input, without reading its weights")
    parser.add_argument("--sha256", action="store_true", help="with --info: compute the SHA-256 of large files, too")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="sd", help="names to write (default: %(default)s, ours, in one file)"
    )
    parser.add_argument(
        "--dtype", choices=(*PRECISIONS, *SHORT_PRECISIONS), metavar="{" + ",".join(PRECISIONS) + "}",
        help="precision to write (default: unchanged)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="auto",
        help="which U-Net of a training checkpoint (default: raw if present; of a folder, its main one)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-ema", action="store_true", help="write both: the U-Net as trained and its moving average"
    )
    parser.add_argument("--model", choices=("auto", *sd.MODELS), default="auto", help="the model (default: detected)")
    parser.add_argument("--prediction", choices=PREDICTIONS, help="what the U-Net predicts (default: detected)")
    parser.add_argument(
        "--vae", type=cli.file_path, metavar="FILE", help="take the VAE from this file or folder; also TAESD"
    )
    parser.add_argument("--text-encoder", type=cli.file_path, metavar="FILE", help="the same for the text encoder")
    parser.add_argument(
        "--text-encoder-2", type=cli.file_path, metavar="FILE", help="the same for SDXL's second text encoder"
    )
    parser.add_argument(
        "--lora", type=cli.home, action="append", default=[], metavar="FILE[:WEIGHT]",
        help="merge a LoRA or LyCORIS file into the model; can be given several times (default weight: 1)",
    )  # fmt: skip
    parser.add_argument("--variant", metavar="NAME", help="of a diffusers folder: which files to read, fp16, ...")
    return parser


def work(args: argparse.Namespace) -> None:
    """Run the program: --info, or convert."""
    if args.info:
        if args.output is not None:
            raise ValueError("--info writes nothing: leave out the output")
        others = ("dtype", "keep_ema", "prediction", "lora", *PARTS)
        if given := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]:
            raise ValueError(f"--info says what is in the input, as it is: leave out {', '.join(given)}")
        with sd.load_checkpoint(args.input, args.variant) as checkpoint, naming(args.input):
            config = None if args.model == "auto" else sd.MODELS[args.model]
            print("\n".join(inspect(checkpoint, config, sha256=args.sha256 or None).lines()))
        return
    if args.sha256:
        raise ValueError("--sha256 goes with --info: leave it out")
    if args.output is None:
        raise ValueError("give the name of the file to write after the input, or --info")
    rewrite(args)


def rewrite(args: argparse.Namespace) -> None:
    """Convert the input; the output is written completely or not at all."""
    alone = {"control": write_control, "tiny": write_tiny}.get(kind := kind_alone(args), write)
    tiny = kind == "tiny"
    folder = args.layout == "diffusers" or (tiny and args.layout == "original")
    if folder and args.output.suffix in (".safetensors", ".ckpt"):
        raise ValueError(
            f"{args.output}: --layout {args.layout} writes a folder here; give a name without {args.output.suffix}"
        )
    if not folder and args.output.suffix != ".safetensors":
        raise ValueError(f"{args.output}: only .safetensors files are written, as they cannot run code")
    if args.output.exists():
        raise exists(args.output)
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    # an unwritable folder is an error before the work
    with (new_folder if folder else new_file)(args.output) as partial:
        count, name = alone(args, partial)
    files = [file for file in args.output.rglob("*") if file.is_file()] if folder else [args.output]
    size = sum(file.stat().st_size for file in files)
    print(f"{args.output}: {name}, {count} weights, {size / 1e9:.2f} GB")


def kind_alone(args: argparse.Namespace) -> str:
    """What the input is if it is no model: "tiny", a tiny autoencoder (TAESD) and nothing else, or "control"; or ""."""
    with sd.load_checkpoint(args.input, args.variant) as checkpoint:
        layouts = find_layouts(checkpoint)
        if has_control(checkpoint):
            return "control"
    return "tiny" if layouts.keys() == {"vae"} and is_tiny(layouts["vae"].name) else ""


def refuse_options(args: argparse.Namespace, what: str, *more: str) -> None:
    """Raise ValueError if options are given that only concern whole models."""
    given = [name for name in ("keep_ema", "prediction", "lora", *PARTS) if getattr(args, name)]
    given += [name for name in ("weights", *more) if getattr(args, name) != "auto"]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{args.input} is {what}: leave out {options}")


def read_state(state: StateDict, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All weights of a network, finite, in this precision or their own."""
    from sd.checkpoints.finite import FiniteCheck

    check, read = FiniteCheck(dtype), dict[str, "Tensor"]()
    for key, tensor in state.items():
        check.look(state.origin(key), tensor)
        read[key] = cast(key, tensor, dtype)
    check.finish()
    return read


def write_tiny(args: argparse.Namespace, path: Path) -> tuple[int, str]:
    """Convert a tiny autoencoder alone; returns the number of its weights and what it is."""
    from safetensors.torch import save_file

    from sd.checkpoints.loading import with_part
    from sd.runtime.device import find_dtype

    refuse_options(args, "a tiny autoencoder (TAESD) alone, without a model", "model")
    dtype = find_dtype(args.dtype) if args.dtype else None
    with sd.load_checkpoint(args.input, args.variant) as checkpoint, naming(args.input):
        config = with_part(sd.SD1, "vae", checkpoint).vae
        assert isinstance(config, TinyVAEConfig)
        check_writable(config, args.layout, alone=True)
        state = sd.convert(checkpoint, replace(sd.SD1, vae=config), parts=["vae"])["vae"]
        read, notes = read_state(state, dtype), [*checkpoint.notes, *state.notes]
    for line in notes:
        print(printable(line))
    try:
        for name, tensors in tiny_files(args.layout, read, config).items():
            save_file(contiguous(tensors), path / name if name else path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{args.output}: cannot be written: {error}") from None
    for name, text in (tiny_texts(config) if args.layout == "diffusers" else {}).items():
        (path / name).write_text(text, encoding="utf-8")
    return len(read), describe_tiny(config)


def write_control(args: argparse.Namespace, path: Path) -> tuple[int, str]:
    """Convert a control network; returns the number of its weights and what it is.

    --model says which model it is for where a file does not show the number of heads.
    """
    from safetensors.torch import save_file

    from sd.runtime.device import find_dtype

    refuse_options(args, "a control network (ControlNet), not a model")
    dtype = find_dtype(args.dtype) if args.dtype else None
    base = None if args.model == "auto" else sd.MODELS[args.model]
    with sd.load_checkpoint(args.input, args.variant) as checkpoint, naming(args.input):
        found = identify_control(checkpoint, base.unet if base else None)
        if base is not None:
            check_fits(found.config, base.unet, base.name)
        check_control_writable(found, args.layout, args.output.name)
        state = control_state(checkpoint, found)
        read = read_state(state, dtype)
    for line in state.notes:
        print(printable(line))
    tensors, metadata = control_files(args.layout, read, found.config)
    texts = control_texts(found.config) if args.layout == "diffusers" else {}
    try:
        save_file(contiguous(tensors), path / CONTROL_WEIGHTS if texts else path, metadata)
    except SafetensorError as error:
        raise OSError(f"{args.output}: cannot be written: {error}") from None
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    model = family(found.config.unet, found.config.attends) or "a model of unknown sizes"
    return len(read), f"control network for {model}"


def write(args: argparse.Namespace, path: Path) -> tuple[int, str]:
    """Convert all weights and write them to `path`; returns their number and the name of the model."""
    from sd.checkpoints.finite import FiniteCheck
    from sd.runtime.device import find_dtype

    from .common.adapter_args import lora_file
    from .common.merging import read_merging

    if args.lora and args.keep_ema:
        raise ValueError("--lora is merged into one U-Net: leave out --keep-ema")
    loras = [lora_file(text) for text in args.lora]  # raises for a wrong name before the checkpoint is read
    dtype = find_dtype(args.dtype) if args.dtype else None
    with ExitStack() as files:
        opened = open_all(args, files)
        config, states = find_all(args, opened)
        check_writable(config.vae, args.layout)
        merging = read_merging(loras, config)
        print("\n".join(merging.about), end="\n" if merging.about else "")
        about = merging.metadata(opened["unet"].metadata)
        count = sum(map(len, states.values()))
        with tqdm(total=count, desc="reading", unit="weight", disable=None, leave=False) as bar, naming(args.input):
            read: dict[str, dict[str, Tensor]] = {}
            for network, state in states.items():
                read[network] = {}
                check = FiniteCheck(dtype)
                for key, tensor in state.items():
                    check.look(state.origin(key), tensor)
                    read[network][key] = cast(key, merging.weight(network, key, tensor, dtype), dtype)
                    bar.update()
                with naming(opened[network.removesuffix("_ema")].path):
                    check.finish()
            more = {key: cast(key, tensor, dtype) for key, tensor in read_extras(opened, config).items()}
    try:
        save(args.layout, path, read, merging.config, more, about)
    except SafetensorError as error:
        raise OSError(f"{args.output}: cannot be written: {error}") from None
    return count, config.name


def open_all(args: argparse.Namespace, files: ExitStack) -> dict[str, Checkpoint]:
    """Network -> the opened file or folder that it comes from."""
    given = {"unet": args.input, **{name: getattr(args, name) or args.input for name in PARTS}}
    paths = {
        path: files.enter_context(sd.load_checkpoint(path, args.variant)) for path in dict.fromkeys(given.values())
    }
    return {name: paths[path] for name, path in given.items()}


def find_all(args: argparse.Namespace, opened: Mapping[str, Checkpoint]) -> tuple[sd.Config, dict[str, StateDict]]:
    """The model and its networks under our names; prints what was detected and chosen."""
    import torch

    from sd.checkpoints.loading import describe, like, load_weights, probed, with_part
    from sd.models.build import build
    from sd.runtime.device import best_dtype

    main, weights = opened["unet"], args.weights
    with naming(main.path):
        found = identify(main, None if args.model == "auto" else sd.MODELS[args.model], args.prediction)
        networks = found.config.networks
        if "text_encoder_2" not in networks and args.text_encoder_2:
            raise ValueError(f"{found.config.name} has only one text encoder: leave out --text-encoder-2")
        parts = [name for name in networks if opened[name] is main]
        if args.keep_ema:
            if weights != "auto":
                raise ValueError("--keep-ema writes both U-Nets: leave out --weights")
            if not {"unet", AVERAGE} <= find_layouts(main).keys():
                raise ValueError(
                    "there are no two U-Nets, as trained and as moving average (EMA): leave out --keep-ema"
                )
            parts, weights = [*parts, AVERAGE], "raw"
        states = sd.convert(main, found.config, weights, parts)
    config = found.config
    for name in networks:
        if name not in states:
            with naming(opened[name].path):
                config = with_part(config, name, opened[name])
                states |= sd.convert(opened[name], config, parts=[name])
    if not found.decided:
        with naming(main.path):
            # a copy in the precision that is fastest on this CPU
            cpu = torch.device("cpu")
            found = probed(found, load_weights(build(config)["unet"], states["unet"], cpu, best_dtype(cpu)))
        config = like(found.config, config)
    lines = [*main.notes, *describe(main, found, weights, config, opened["vae"])]
    for file in {id(file): file for file in opened.values() if file is not main}.values():
        lines += [printable(f"{file.path}: {note}") for note in file.notes]
    lines += [printable(note) for state in states.values() for note in state.notes]
    print("\n".join(lines), end="\n" if lines else "")
    return config, {name: states[name] for name in (*networks, AVERAGE) if name in states}


def read_extras(opened: Mapping[str, Checkpoint], config: sd.Config) -> dict[str, Tensor]:
    """The tensors beside the networks that are kept, by their original names."""
    from sd.checkpoints.export import extras
    from sd.checkpoints.key_maps import original_text

    read = {}
    prefixes = {name: original_text(config, name)[1] for name in config.text_names}
    for name in ("unet", *config.text_names):
        for key, original in extras(opened[name], config):
            owner = next((text for text, prefix in prefixes.items() if original.startswith(prefix)), "unet")
            if owner == name:
                read[original] = opened[name][key]
    return read


def save(
    layout: str,
    path: Path,
    read: Mapping[str, Mapping[str, Tensor]],
    config: sd.Config,
    more: Mapping[str, Tensor],
    about: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the networks in a layout, to a file or a folder; `about` is further metadata."""
    from safetensors.torch import save_file

    from sd.checkpoints.export import (
        diffusers_texts,
        lacks_last_layer,
        metadata,
        to_diffusers,
        to_original,
        to_own,
        unrun_layer,
    )

    if layout == "diffusers":
        for name, text in diffusers_texts(config).items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(text, encoding="utf-8")
        for name, tensors in to_diffusers(read, config, more).items():
            save_file(contiguous(tensors), path / name, {"format": "pt", **about})
        if lacks_last_layer(config, more):
            warnings.warn(COPIED.format("the text encoder's last layer was"), stacklevel=1)
        return
    tensors = to_own(read, more) if layout == "sd" else to_original(read, config, more)
    if layout == "original" and (made := unrun_layer(tensors, config)):
        tensors |= made
        warnings.warn(COPIED.format(f"{len(made)} weights were"), stacklevel=1)
    save_file(contiguous(tensors), path, metadata(config) | dict(about))


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in contiguous memory, as the format requires."""
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in another precision; tables and counters are unchanged."""
    if dtype is None or not tensor.is_floating_point() or key == "alphas_cumprod" or key.startswith("model_ema."):
        return tensor
    return tensor.to(dtype)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(work, parser(), argv, "out of memory: the weights are held once while they are rewritten")


if __name__ == "__main__":
    sys.exit(main())
