"""--like: the control networks of a recipe. They and their hints are not in the file, so they have to be given.

When they are, with --control, their scale, steps, mode and thresholds are those of the recipe unless given.
"""

from __future__ import annotations

import argparse
import warnings
from hashlib import sha256
from pathlib import Path

from sd.checkpoints.hashes import file_hash
from sd.imaging.files import ImageFileError, read_bytes
from sd.messages import counted, one_line
from sd.recipes import ControlUse, Recipe
from sd.recipes.control_entries import plain_name
from sd.recipes.fields import text_of
from sd.recipes.recipe import MAX_SHOWN, file_name

from .control_args import Given, network_name, split_control


def take_controls(args: argparse.Namespace, recipe: Recipe) -> list[str]:
    """Set `args.control_uses`: of each --control, what the recipe says of it, or None. Returns notes on the others.

    Networks are compared by name, upper or lower case, or by hash; of several uses of one, the first is first.
    """
    left, found, notes = list(recipe.controls), list[ControlUse | None](), list[str]()
    for given in map(split_control, args.control):
        use = next((use for use in left if is_network(given.file, use)), None)
        if use is not None:
            left.remove(use)
        found.append(use)
    args.control_uses = found
    for use in left[:MAX_SHOWN]:
        notes.append(f"control network {described(use)}: give both with --control")
    if len(left) > MAX_SHOWN:
        notes.append(f"{counted(len(left) - MAX_SHOWN, 'more control network')}: give them with --control")
    return notes


def is_network(file: Path, use: ControlUse) -> bool:
    """Whether a file is the control network of a recipe."""
    ours, theirs = (file_name(plain_name(name)).casefold() for name in (network_name(file), use.name))
    return ours == theirs or (bool(use.digest) and file_hash(file) == use.digest)


def settings_of(use: ControlUse) -> str:
    """The name of a control network and the settings of its use."""
    steps = "" if (use.start, use.end) == (0, 1) else f" steps {text_of(use.start)}-{text_of(use.end)}"
    mode = "" if use.mode == ControlUse("").mode else f" mode {use.mode}"
    return f"{use.name} {text_of(use.scale)}{steps}{mode}"


def described(use: ControlUse) -> str:
    """A use of a control network and its hint, for a message."""
    name = use.name + (f" [{use.digest}]" if use.digest else "")
    hint = f"the hint {one_line(use.hint.name)} ({use.hint.digest})" if use.hint.name else "a hint"
    module = "" if use.module == "none" else f", made by {use.module}"
    return f"{name} with {hint}{module}"


def compare_controls(args: argparse.Namespace) -> None:
    """Warn of hints and networks that are other files than the recipe's."""
    for each, use in zip(map(split_control, args.control), args.control_uses or [], strict=False):
        if use is None:
            continue
        where = one_line(args.like.name)
        digits = _digits(each)
        if use.hint.digest and digits and not digits.startswith(use.hint.digest):
            warnings.warn(f"the hint of control {use.name} is not the same file as that of {where}", stacklevel=1)
        ours = file_hash(each.file)
        if use.digest and ours and ours != use.digest:
            warnings.warn(
                f"control {use.name}: {one_line(each.file.name)} is not the same file as that of {where} "
                f"({use.digest})",
                stacklevel=1,
            )


def _digits(given: Given) -> str:
    """The SHA-256 of a hint; "" if it cannot be read, which is said elsewhere."""
    try:
        return sha256(read_bytes(given.image)).hexdigest()
    except (OSError, ImageFileError):
        return ""
