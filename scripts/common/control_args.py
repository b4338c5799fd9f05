"""Control networks and their hints as arguments: --control FILE=IMAGE[:SCALE[:FROM-TO]] and its settings.

Everything that can be wrong is found before the model is loaded: the values, the images, and, by the names and shapes
of their weights, whether the files are control networks for this model.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import warnings
from collections.abc import Collection
from functools import cache
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

import sd
from sd.checkpoints.control_detect import control_name, family
from sd.checkpoints.folders import has_variant
from sd.checkpoints.hashes import file_hash
from sd.control_params import ANNOTATORS, FITS, MAX_CONTROLS, MODES, Control
from sd.controls import at_size, hint_at
from sd.imaging.annotate import check_installed
from sd.imaging.files import ImageFile, read_image
from sd.recipes import Addon, ControlUse, written_controls
from sd.resources import EMBEDDED, EMBEDDED_CONTROLS, resource
from sd.run import Run

from .cli import Parser, PathError, describe, file_path, home
from .output import Output
from .xl_args import base_options

FORM = "FILE=IMAGE, FILE=IMAGE:SCALE or FILE=IMAGE:SCALE:FROM-TO"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
SHARES = re.compile(rf"({NUMBER})-({NUMBER})")
VALUES = re.compile(rf"{NUMBER}|[-+]?(?:nan|inf|infinity)", re.IGNORECASE)  # what stands for a number, right or wrong
BLACK = (0, 0, 0)  # behind transparent parts of hints: nothing is asked for there


class Given(NamedTuple):
    """One value of --control. What it does not say is None."""

    file: Path  # of the control network
    image: Path
    scale: float | None = None
    start: float | None = None
    end: float | None = None


def add_control_arguments(parser: Parser, fit: bool = False) -> None:
    """--control, --control-mode, --annotate, --canny; and --control-fit where no image says how hints are placed."""
    group = parser.add_argument_group("control networks")
    names = " or ".join(f'"{name}"' for name in EMBEDDED_CONTROLS)
    group.add_argument(
        "--control", type=home, action="append", default=[], metavar="FILE=IMAGE[:SCALE[:FROM-TO]]",
        help="follow a hint (an edge map, a depth map, ...) with a control network: its file or folder, or "
        f"{names} for that of the embedded model; can be given several times (default: scale 1, all steps, 0-1)",
    )  # fmt: skip
    group.add_argument(
        "--control-mode", choices=MODES,
        help=f"what counts more where hint and prompt contradict each other (default: {MODES[0]})",
    )  # fmt: skip
    if fit:
        group.add_argument(
            "--control-fit", choices=FITS,
            help=f"how hints reach the size of the image: crop, or pad with black (default: {FITS[0]})",
        )  # fmt: skip
    group.add_argument(
        "--annotate", choices=ANNOTATORS,
        help="canny: the images of --control are ordinary pictures, whose edges are the hints; invert: they are black "
        "lines on white (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--canny", type=thresholds, metavar="LOW-HIGH",
        help=f"thresholds of --annotate canny, 0 to 255 (default: {Control.low:g}-{Control.high:g})",
    )  # fmt: skip


def thresholds(text: str) -> tuple[float, float]:
    """LOW-HIGH -> both."""
    found = SHARES.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW-HIGH, such as 100-200")
    low, high = float(found[1]), float(found[2])
    if not 0 <= low <= high <= 255:
        raise argparse.ArgumentTypeError(f"{text!r}: thresholds are from 0 to 255, the lower one first")
    return low, high


def split_control(text: str) -> Given:
    """FILE=IMAGE[:SCALE[:FROM-TO]] -> its parts. Names with "=" and ":" that exist take precedence.

    Raises ValueError for what has not this form, and for numbers out of range.
    """
    places = [i for i, letter in enumerate(text) if letter == "="]
    if not places:
        raise ValueError(f"--control {text}: expected {FORM}")
    found = [(text[:i], text[i + 1 :]) for i in places]
    named = [(file, rest) for file, rest in found if _exists(file) or file in EMBEDDED_CONTROLS]
    drawn = [(file, rest) for file, rest in named or found if any(map(_exists, _heads(rest)))]
    file, rest = (drawn or named or found)[0]
    if not file or not rest:
        what = "control network before" if not file else "image after"
        raise ValueError(f'--control {text}: no {what} the "=": expected {FORM}')
    image, *values = _split_image(rest)
    try:
        scale = _number(values[0], "the scale") if values and values[0] else None
        start, end = _shares(values[1]) if values[1:] else (None, None)
    except ValueError as error:
        raise ValueError(f"--control {text}: {error}") from None
    path = resource(EMBEDDED_CONTROLS[file]) if file in EMBEDDED_CONTROLS else file_path(file)
    return Given(path, file_path(image), scale, start, end)


def _exists(text: str) -> bool:
    """Whether a text is the name of a file or folder."""
    try:
        return bool(text) and os.path.exists(file_path(text))
    except PathError:
        return False


def _heads(text: str) -> list[str]:
    """What may be the name of the image in IMAGE:SCALE:FROM-TO: the longest first."""
    return [text, *(text.rsplit(":", count)[0] for count in (1, 2) if text.count(":") >= count)]


def _split_image(text: str) -> list[str]:
    """IMAGE[:SCALE[:FROM-TO]] -> the image, and the values that are given."""
    for values, head in enumerate(_heads(text)):
        if _exists(head):
            return text.rsplit(":", values) if values else [text]
    # there is no such image: what looks like values is no part of its name
    image, *both = text.rsplit(":", 2)
    if len(both) == 2 and VALUES.fullmatch(both[0] or "1") and SHARES.fullmatch(both[1]):
        return [image, *both]
    image, *scale = text.rsplit(":", 1)
    return [image, *scale] if scale and VALUES.fullmatch(scale[0]) else [text]


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{what} {text!r} is not a number: expected {FORM}") from None
    if not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {text}")
    return value


def _shares(text: str) -> tuple[float, float]:
    """FROM-TO -> both, fractions of the steps."""
    found = SHARES.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not FROM-TO, fractions of the steps such as 0-0.5")
    start, end = _number(found[1], "the start"), _number(found[2], "the end")
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(f"FROM and TO are fractions of the steps, from 0 to 1, got {text}")
    if start >= end:
        raise ValueError(f"FROM must be smaller than TO, got {text}")
    return start, end


def network_name(path: Path) -> str:
    """The name of the control network in a file or folder; of one that comes with the embedded model, its own."""
    bundled = {resource(file): name for name, file in EMBEDDED_CONTROLS.items()}
    return bundled.get(path) or control_name(path)


class Controls:
    """The control networks and hints of a call, checked. `requested` is what each request asks for.

    Uses of one file share its network; files of the same name get different ones, "canny" and "canny-2".
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the images, and the headers of the files. Raises ValueError for the first thing that is wrong."""
        self._args = args
        given = [split_control(text) for text in args.control]
        if len(given) > MAX_CONTROLS:
            raise ValueError(f"--control: given {len(given)} times, at most {MAX_CONTROLS} are allowed")
        self.files: dict[str, Path] = {}  # name of a network -> its file
        names: dict[str, str] = {}  # real path of a file -> name of its network
        for each in given:
            if (key := os.path.realpath(each.file)) not in names:
                names[key] = _free(network_name(each.file), self.files)
                self.files[names[key]] = each.file
        uses = args.control_uses or [None] * len(given)  # of a recipe: see like_controls.py
        read = cache(read_hint)
        annotators = [args.annotate or (use.module if use is not None else "none") for use in uses]
        images = [read(each.image, kind in ANNOTATORS[1:]) for each, kind in zip(given, annotators, strict=True)]
        self._images = [(each.image.name, image) for each, image in zip(given, images, strict=True)]
        self.requested = tuple(
            control_of(args, names[os.path.realpath(each.file)], image.image, each, use)
            for each, image, use in zip(given, images, uses, strict=True)
        )
        self._check_options()
        self.weights = self._check_files()
        self._saved: set[bytes] = set()  # digests of maps that were made of pictures and saved

    def _check_options(self) -> None:
        """Raise ValueError for options without effect, and if what finds edges is not installed."""
        for name in ("control_mode", "control_fit", "annotate", "canny"):
            if not self.requested and getattr(self._args, name, None) is not None:
                raise ValueError(f"--{name.replace('_', '-')} has no effect without --control")
        annotated = any(control.annotate == "canny" for control in self.requested)
        if self._args.canny is not None and not annotated:
            raise ValueError("--canny has no effect without --annotate canny")
        if annotated:
            check_installed()

    def _check_files(self) -> dict[str, int]:
        """How many weights each network has. Raises CheckpointError for files of something else, or of another family.

        Only the headers of the files are read, the model's too.
        """
        if not self.files:
            return {}
        from sd.checkpoints.control_files import open_control
        from sd.checkpoints.loading import LoadOptions, ModelFiles
        from sd.models.build import control_shapes

        with ModelFiles(self._args.ckpt or resource(EMBEDDED), LoadOptions(**base_options(self._args))) as files:
            base = files.config
        found: dict[str, int] = {}
        for name, file in self.files.items():
            if file in map(resource, EMBEDDED_CONTROLS.values()) and base.unet != sd.MODELS["pocket"].unet:
                raise ValueError(
                    f"--control {name} is for the embedded model, not for {base.name}: give a control network that was "
                    "made for it, or leave out --ckpt"
                )
            with open_control(file, base, self._variant(file)) as (network, _, _):
                found[name] = sum(map(math.prod, control_shapes(network.config).values()))
        return found

    def _variant(self, file: Path) -> str | None:
        """--variant, which is that of the model, for a folder that has files of it as well."""
        from sd.checkpoints.control_files import control_path

        variant = self._args.variant
        return variant if variant and has_variant(control_path(file), variant) else None

    def give(self, model: sd.StableDiffusion) -> None:
        """Load the networks, with a progress bar, and print what was found."""
        from sd.checkpoints.control_files import load_control

        for name, file in self.files.items():
            with tqdm(
                desc=f"loading {name}", total=self.weights[name], unit=" weights", unit_scale=True, disable=None,
                leave=False, file=sys.stderr,
            ) as bar:  # fmt: skip
                network, notes = load_control(
                    file, model.config, model.device, model.dtype, lambda: model.unet.state_dict(),
                    variant=self._variant(file), progress=bar.update,
                )  # fmt: skip
            model.add_control(network, name)
            config = network.control_config
            made_for = f"{known}, " if (known := family(config.unet, config.attends)) else ""
            print(f"control {name}: {made_for}{self.weights[name] / 1e6:.1f} M weights", flush=True)
            for note in notes:
                print(f"control {name}: {note}", flush=True)

    def about(self) -> dict[str, str]:
        """The entries about control networks in the metadata, as the web UI's extension writes them."""
        uses = []
        for control, (image, file) in zip(self.requested, self._images, strict=True):
            values = {name: getattr(control, name) for name in ("scale", "start", "end", "mode", "fit", "low", "high")}
            path = self.files[control.name]
            digest, hint = file_hash(path) or "", Addon(image, digest=file.digest[:10])
            uses.append(ControlUse(network_name(path), digest, module=control.annotate, hint=hint, **values))
        return written_controls(uses)

    def save_maps(self, run: Run, output: Output, image: Path, size: tuple[int, int]) -> None:
        """Save the maps that were made of pictures beside an image of this (width, height); each once in a call."""
        place = getattr(getattr(run, "second", run), "place", None) or at_size(*size)
        several = len(run.request.controls) > 1
        for number, control in enumerate(run.request.controls, start=1):
            if control.annotate == "none":
                continue
            found = hint_at(control, place)
            if (digest := sha256(repr(found.size).encode() + found.tobytes()).digest()) in self._saved:
                continue
            self._saved.add(digest)
            try:
                path = output.save_beside(found, image, f"-control-{number}" if several else "-control")
            except OSError as error:  # the image is not lost for it
                warnings.warn(f"the map of {control.name} is not saved: {describe(error)}", stacklevel=1)
            else:
                print(f"{path}  {control.annotate} of {self._images[number - 1][0]}", flush=True)


def read_hint(path: Path, is_picture: bool) -> ImageFile:
    """A hint, or a picture of which one is made. Colour profiles apply to pictures only: a hint's values are data."""
    return read_image(path, BLACK, managed=is_picture)


def control_of(
    args: argparse.Namespace, name: str, image: Image.Image, given: Given, use: ControlUse | None
) -> Control:
    """What a value of --control asks for; what neither it nor another option says is that of a recipe, `use`."""
    found = {
        "scale": given.scale,
        "start": given.start,
        "end": given.end,
        "mode": args.control_mode,
        "fit": getattr(args, "control_fit", None),
        "annotate": args.annotate,
        **(dict(zip(("low", "high"), args.canny, strict=True)) if args.canny else {}),
    }
    if use is not None:
        theirs = {field: getattr(use, field) for field in ("scale", "start", "end", "mode", "fit", "low", "high")}
        theirs["annotate"] = use.module if use.module in ANNOTATORS else None
        found = {field: value if (value := found.get(field)) is not None else theirs[field] for field in theirs}
    return Control(name, image, **{field: value for field, value in found.items() if value is not None})


def _free(name: str, taken: Collection[str]) -> str:
    """A name, with a number if it is taken."""
    return name if name not in taken else next(f"{name}-{i}" for i in count(2) if f"{name}-{i}" not in taken)
