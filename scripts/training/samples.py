"""Sample sheets of a training run: images for the same prompts and seeds each time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd.files import replaced_file
from sd.imaging.tensors import grid
from sd.pipeline import StableDiffusion

from ..common.cli import Parser, file_path
from .caption_files import read_lines
from .dataset import TrainingData


def add_sample_arguments(parser: Parser, steps: int) -> None:
    """Add --samples and its related options."""
    add = parser.add_argument_group("samples").add_argument
    add(
        "--samples",
        type=int,
        default=12,
        metavar="N",
        help="images in a sample sheet; 0 for none (default: %(default)s)",
    )
    add(
        "--sample-prompts",
        type=file_path,
        metavar="FILE",
        help="file with one prompt per line (default: captions of the data)",
    )
    add("--sample-steps", type=int, default=steps, metavar="N", help="steps of each sample (default: %(default)s)")


def sample_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --sample-prompts, one per line; none without the option."""
    return prompts_in("--sample-prompts", args.sample_prompts) if args.sample_prompts and args.samples else []


def prompts_in(option: str, path: Path) -> list[str]:
    """The prompts in the file of an option, one per line. Raises ValueError if there are none."""
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    prompts = [line.strip() for line in read_lines(path) if line.strip()]
    if not prompts:
        raise ValueError(f"{option} {path}: no prompts in it")
    return prompts


def some_captions(n: int, model: StableDiffusion, data: TrainingData) -> list[str]:
    """n captions spread over the data, or as many as there are images."""
    n = min(n, len(data))
    chosen = [i * len(data) // n for i in range(n)]
    return [model.tokenizer.decode(data.ids[data.choices[i][0]]) for i in chosen]


def write_sheet(path: Path, model: StableDiffusion, prompts: Sequence[str], size: int, **settings: Any) -> None:
    """Write one image for each prompt, of seeds 0, 1, ..., as a sheet. `settings` are those of `txt2img`."""
    images = [  # one at a time, because training needs the memory
        model.txt2img(prompt, height=size, width=size, seed=seed, **settings)[0] for seed, prompt in enumerate(prompts)
    ]
    with replaced_file(path) as partial:
        grid(images).save(partial, "PNG")
