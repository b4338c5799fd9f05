"""The settings of a run: what --resume restores, what may change then, and what happens when torchrun restarts it.

OUT/settings.json        the arguments of the run
OUT/.restarts            the folder belongs to the torchrun that is at work: its restarts resume the run by themselves
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd.files import replaced_file

from ..common.cli import Parser
from .processes import Processes
from .state import STATE

SETTINGS, OWNED = "settings.json", ".restarts"
NOT_KEPT = ("out", "resume", "threads", "workers", "device", "recipes")  # may differ between starts
# what is trained, and how its state is kept: a run is always resumed with the same. Files may have moved, so of a path
# only the last part counts. A program has some of them
FIXED = {
    "ckpt", "model", "weights", "text", "vae", "prediction", "train_text", "inpaint", "decoder_only", "optimizer",
    "control", "hint", "small", "hint_widths", "method", "lora_rank", "lora_alpha", "lora", "lora_layers",
    "lora_names", "conv_rank", "conv_alpha", "dora", "train_word", "vectors", "word_format", "zero_snr",
}  # fmt: skip


def starting(
    parser: Parser, args: argparse.Namespace, argv: list[str] | None, processes: Processes
) -> argparse.Namespace:
    """The arguments of a run that starts, resumes, or was restarted by torchrun because a process had died.

    A restarted run goes on from its last state without --resume, or begins again if there is none yet. But a folder
    with a run that was there before is refused every time.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # set by torchrun only
    again = restart is not None and processes.any(restart != "0")  # other machines have restarts of their own
    if again and processes.any(processes.main and (args.out / OWNED).exists()):  # where the main process sees it
        args.resume = processes.any(processes.main and (args.out / STATE).exists())
        return continued(parser, args, argv)[0] if args.resume else args
    try:
        args, remark = continued(parser, args, argv)
    except ValueError:
        if processes.main:
            (args.out / OWNED).unlink(missing_ok=True)
        raise
    args.out.mkdir(parents=True, exist_ok=True)
    if processes.main:
        if restart is not None:
            (args.out / OWNED).touch()
        if remark:
            print(remark, flush=True)
    return args


def finished(out: Path) -> None:
    """The run in a folder ended: the next start is no restart."""
    (out / OWNED).unlink(missing_ok=True)


def continued(parser: Parser, args: argparse.Namespace, argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """The arguments of a resumed run (--resume): those of its start, overridden by those given now; and a remark.

    Raises ValueError for a run that is there without --resume, for none with it, for damaged settings, and for given
    options that differ and cannot change (`FIXED`). The remark names the others that differ.
    """
    if not args.resume:
        if (args.out / STATE).exists():
            raise ValueError(f"{args.out} already has a run: continue it (--resume) or choose another --out")
        return args, ""
    path = args.out / SETTINGS
    if not (args.out / STATE).exists():
        raise ValueError(f"{args.out}: no run to resume ({STATE}); start one without --resume")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in kept.items() if name in vars(args) and name not in NOT_KEPT}
        if wrong := [name for name, value in kept.items() if not parser.fits(name, value)]:
            raise ValueError(wrong)
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}: damaged; remove it and give all options again") from None
    except FileNotFoundError:
        return args, ""
    given = {name: plain(value) for name, value in vars(args).items()}
    named = parser.named()
    changed = [name for name in kept if name in named and not _same(name, kept[name], given[name])]
    for name in changed:
        if name in FIXED:
            started = "without it" if kept[name] in (None, False) else f"with {spelled(name, kept[name])}"
            raise ValueError(
                f"{spelled(name, given[name])}: the run in {args.out} was started {started}, which cannot change: "
                "leave the option out, or start another run with another --out"
            )
    parser.set_defaults(**kept)  # argparse parses string defaults like arguments
    args = parser.parse_words(argv)
    args.resume = True  # restarted by torchrun, it is not given
    told = [spelled(name, given[name]) + _instead(given[name], kept[name]) for name in changed]
    return args, f"resumed with {', '.join(told)}" if told else ""


def plain(value: Any) -> Any:
    """The value of an argument as JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def spelled(name: str, value: Any) -> str:
    """An option as it is given: --batch 4, --inpaint."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else f"--no-{option[2:]}"
    return f"{option} {_told(value)}"


def _told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value in (None, False) else str(value)


def _instead(given: Any, kept: Any) -> str:
    return "" if isinstance(given, bool) else f" in place of {_told(kept)}"


def _same(name: str, kept: Any, given: Any) -> bool:
    if name in FIXED and isinstance(kept, str) and isinstance(given, str):
        return Path(kept).name == Path(given).name
    return bool(kept == given)


def keep_settings(args: argparse.Namespace, recipe: Mapping[str, object]) -> None:
    """Save the arguments for `continued`, and the recipe, because a later version may have other defaults."""
    values = {name: plain(value) for name, value in vars(args).items() if name not in NOT_KEPT}
    with replaced_file(args.out / SETTINGS) as partial:
        partial.write_text(json.dumps(values | dict(recipe), indent=1), encoding="utf-8")
