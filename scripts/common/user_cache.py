"""The user's cache folder, where the programs keep what takes time to compute.

It holds converted and packed weights (sd/checkpoints/weights_cache.py), and the choice of the fastest kernels on this
machine (sd/runtime/kernel_choice.py), so that rounding does not change from run to run.

Linux     $XDG_CACHE_HOME/sd-from-scratch, by default ~/.cache/sd-from-scratch
macOS     ~/Library/Caches/sd-from-scratch
Windows   %LOCALAPPDATA%\\sd-from-scratch
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import sd
from sd.runtime import kernel_choice
from sd.runtime.device import find_device

NAME = "sd-from-scratch"


def user_cache(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path | None:
    """The folder, which need not exist; None if the user has no home folder."""
    windows = platform == "win32"
    given = environment.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME", "")
    if os.path.isabs(given) and platform != "darwin":  # the XDG specification: relative paths are ignored
        return Path(given) / NAME
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        return None
    return Path(home) / ("Library/Caches" if platform == "darwin" else "AppData/Local" if windows else ".cache") / NAME


def cache_folder(args: argparse.Namespace) -> Path | None:
    """The folder for the cache of weights; None with --no-cache, or where it would have no effect."""
    if args.no_cache or args.low_memory or args.ckpt is None or find_device(args.device).type != "cpu":
        return None
    return user_cache()


def kernel_file(args: argparse.Namespace) -> Path | None:
    """The file in the folder with the choice of kernels on this machine; None with --no-cache."""
    folder = None if args.no_cache else user_cache()
    if folder is None:
        return None
    return folder / f"kernels-{hashlib.sha256(kernel_choice.machine().encode()).hexdigest()[:16]}.json"


def recall_kernels(args: argparse.Namespace) -> None:
    """Use the kernels that were chosen in earlier runs."""
    if (file := kernel_file(args)) is not None:
        kernel_choice.load(file)


def keep_kernels(args: argparse.Namespace) -> None:
    """Write the choice of kernels for `recall_kernels`. Never an error."""
    file = kernel_file(args)
    if file is not None and kernel_choice.table() and kernel_choice.preferred() is None:
        with suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            kernel_choice.save(file)


def keep_weights(model: sd.StableDiffusion) -> None:
    """Write the weights of a model to its cache folder unless they come from there; prints its name."""
    size = model.save_cache(note=lambda text: warnings.warn(text, stacklevel=1))
    if size:
        print(
            f"for a faster start the next time, {size / 1e9:.1f} GB were written to {model.cache_file}: remove it at "
            "any time; --no-cache turns this off",
            file=sys.stderr,
            flush=True,
        )
