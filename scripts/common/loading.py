"""Loading a model with a progress bar, from the files that the arguments name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

import sd

from .user_cache import cache_folder


def load_model(args: argparse.Namespace, path: Path | None, label: str, **options: Any) -> sd.StableDiffusion:
    """The model of a file, by the options that base and refiner share, and those that are given."""
    with tqdm(desc=label, unit=" weights", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:

        def progress(numbers: int, total: int) -> None:
            bar.total = total
            bar.update(numbers)

        return sd.StableDiffusion.load(
            path,
            low_memory=args.low_memory,
            compile=args.compile,
            progress=progress,
            cache=cache_folder(args),
            offload_text_encoders=getattr(args, "offload_text_encoders", None),  # of the image programs only
            **options,
        )
