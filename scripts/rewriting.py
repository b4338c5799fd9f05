"""What convert.py does: the weights of a checkpoint into another layout or precision."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import sd
from sd.checkpoints.checkpoint import Checkpoint, naming
from sd.checkpoints.convert import StateDict
from sd.checkpoints.detect import identify
from sd.checkpoints.export import diffusers_texts, extras, metadata, to_diffusers, to_original, to_own, unrun_layer
from sd.checkpoints.layouts import AVERAGE, NETWORKS, find_layouts
from sd.checkpoints.loading import build, describe, like, load_weights, probed, with_part
from sd.files import exists, new_file, new_folder
from sd.runtime.device import DTYPES, best_dtype


def rewrite(args: argparse.Namespace) -> None:
    """Read, rename, write: a whole file or none."""
    folder = args.layout == "diffusers"
    if folder and args.output.suffix in (".safetensors", ".ckpt"):
        raise ValueError(f"{args.output}: --layout diffusers writes a folder; give a name without {args.output.suffix}")
    if not folder and args.output.suffix != ".safetensors":
        raise ValueError(f"{args.output}: only .safetensors files are written, as they cannot run code")
    if args.output.exists():
        raise exists(args.output)
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    # an unwritable folder says so before the work
    with (new_folder if folder else new_file)(args.output) as partial:
        count, config = write(args, partial)
    files = [file for file in args.output.rglob("*") if file.is_file()] if folder else [args.output]
    size = sum(file.stat().st_size for file in files)
    print(f"{args.output}: {config.name}, {count} weights, {size / 1e9:.2f} GB")


def write(args: argparse.Namespace, path: Path) -> tuple[int, sd.Config]:
    """Read and rename all weights and write them to `path`; returns their number and the model."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    with ExitStack() as files:
        opened = open_all(args, files)
        config, states = find_all(args, opened)
        count = sum(map(len, states.values()))
        with tqdm(total=count, desc="reading", unit="weight", disable=None, leave=False) as bar, naming(args.input):
            read: dict[str, dict[str, Tensor]] = {}
            for network, state in states.items():
                read[network] = {}
                for key, tensor in state.items():
                    read[network][key] = cast(key, tensor, dtype)
                    bar.update()
            more = {key: cast(key, tensor, dtype) for key, tensor in read_extras(opened, config).items()}
    try:
        save(args.layout, path, read, config, more)
    except SafetensorError as error:
        raise OSError(f"{args.output}: cannot be written: {error}") from None
    return count, config


def open_all(args: argparse.Namespace, files: ExitStack) -> dict[str, Checkpoint]:
    """The file or folder that each network comes from."""
    given = {"unet": args.input, "vae": args.vae or args.input, "text_encoder": args.text_encoder or args.input}
    paths = {
        path: files.enter_context(sd.load_checkpoint(path, args.variant)) for path in dict.fromkeys(given.values())
    }
    return {name: paths[path] for name, path in given.items()}


def find_all(args: argparse.Namespace, opened: Mapping[str, Checkpoint]) -> tuple[sd.Config, dict[str, StateDict]]:
    """Which model it is, and its networks under our names; prints what was found out and chosen."""
    main, weights = opened["unet"], args.weights
    with naming(main.path):
        found = identify(main, None if args.model == "auto" else sd.MODELS[args.model], args.prediction)
        parts = [name for name in NETWORKS if opened[name] is main]
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
    for name in NETWORKS:
        if name not in states:
            with naming(opened[name].path):
                config = with_part(config, name, opened[name])
                states |= sd.convert(opened[name], config, parts=[name])
    if not found.decided:
        with naming(main.path):
            # a copy in the precision that is fastest here
            cpu = torch.device("cpu")
            found = probed(found, load_weights(build(config)["unet"], states["unet"], cpu, best_dtype(cpu)))
        config = like(found.config, config)
    for line in (*main.notes, *describe(main, found, weights, config)):
        print(line)
    return config, {name: states[name] for name in (*NETWORKS, AVERAGE) if name in states}


def read_extras(opened: Mapping[str, Checkpoint], config: sd.Config) -> dict[str, Tensor]:
    """What the files hold beside the networks that is kept, by its original names."""
    read = {}
    for name in ("unet", "text_encoder"):
        for key, original in extras(opened[name], config):
            if original.startswith("cond_stage_model.") == (name == "text_encoder"):
                read[original] = opened[name][key]
    return read


def save(
    layout: str, path: Path, read: Mapping[str, Mapping[str, Tensor]], config: sd.Config, more: Mapping[str, Tensor]
) -> None:
    """Write the networks in a layout, to a file or into a folder."""
    if layout == "diffusers":
        for name, text in diffusers_texts(config).items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(text, encoding="utf-8")
        for name, tensors in to_diffusers(read, config, more).items():
            save_file(contiguous(tensors), path / name, {"format": "pt"})
        return
    tensors = to_own(read, more) if layout == "sd" else to_original(read, config, more)
    if layout == "original" and (made := unrun_layer(tensors, config)):
        tensors |= made
        warnings.warn(
            f"{len(made)} weights that other programs expect and never use were not in the input: the text encoder's "
            "last layer is a copy of the one before it",
            stacklevel=1,
        )
    save_file(contiguous(tensors), path, metadata(config))


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the format wants them: each in memory of its own."""
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in another precision, refused where numbers would not fit; tables and counters stay as they are."""
    if dtype is None or not tensor.is_floating_point() or key == "alphas_cumprod" or key.startswith("model_ema."):
        return tensor
    out = tensor.to(dtype)
    if not out.isfinite().all() and tensor.isfinite().all():
        raise ValueError(f"{key} has numbers beyond {str(dtype).removeprefix('torch.')}: use bfloat16 or float32")
    return out
