"""Training data of control networks: images with captions and hints, from a folder or drawn.

    FOLDER/**/name.png + name.hint.png        or FOLDER/**/hints/name.png; any kind of image
    FOLDER/**/metadata.jsonl                  {"file_name": "a.png", "text": "a caption", "hint": "maps/a.png"}, or
                                              "conditioning_image" in place of "hint"
    world                                     the outlines or the depth of the drawn scenes (toy_world/hints.py)

The hint of an image is cropped and resized like the image, whose aspect ratio it must have.

Outlines are drawn from the shapes, but what people give are edges that a detector found in a picture, or a sketch. So
the drawn scenes have three kinds: all outlines; those that Canny's detector finds in the picture, with random
thresholds; and the outlines of the things alone. Lines are one to three pixels wide.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from sd.imaging import annotate
from sd.imaging.files import SUFFIXES, ImageFileError, read_image
from sd.imaging.hints import BLACK
from sd.imaging.tensors import fit

from ..common import edges
from ..toy_world.hints import HINTS, depth, outlines
from .caption_files import METADATA, metadata_entries
from .data import Example, Record, World, digest
from .folders import DataOptions, Folder, files_below, sha256
from .options import check_data

HINT, FOLDER = ".hint", "hints"  # what comes after the name of a hint beside its image, and the folder of hints
KEYS = ("hint", "conditioning_image", "conditioning_image_file_name")  # in metadata.jsonl; the first one is ours
SAME_SHAPE = 0.02  # how far the aspect ratios of an image and its hint may differ
KINDS = {"outlines": 45, "detected": 35, "things": 20}  # of drawn edges, with their weights
THICK = 0.3  # the share of outlines whose lines are wider


@dataclass(frozen=True)
class HintedWorld:
    """Drawn scenes with hints of a kind of `HINTS`."""

    world: World
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in HINTS:
            raise ValueError(f"the hint of a drawn scene is {' or '.join(HINTS)}, got {self.kind}")
        if self.kind == "edges":
            annotate.check_installed()

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, i: int) -> Example:
        example = self.world[i]
        scene, rng, _ = self.world.scene(i)
        assert example.pixels is not None
        if self.kind == "depth":
            return example._replace(hint=np.asarray(depth(scene, rng, self.world.size)))
        choice = Random(f"hint {self.world.first + i}")
        kind = choice.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        if kind == "detected":
            return example._replace(hint=detected(example.pixels, choice))
        drawn = np.asarray(outlines(scene, rng, self.world.size, landscape=kind == "outlines"))
        thick = choice.random() < THICK
        return example._replace(hint=_white(edges.grow(drawn > 0, 1)) if thick else drawn)

    def record(self, i: int) -> Record:
        """That of the scene."""
        return self.world.record(i)

    def key(self, i: int) -> str:
        """A digest of the scene, the kind and the drawing code."""
        return digest([self.world.key(i), self.kind, self._code])

    @cached_property
    def _code(self) -> str:
        return digest([Path(file).read_text("utf-8") for file in (__file__, edges.__file__, annotate.__file__)])


def detected(pixels: np.ndarray, rng: Random) -> np.ndarray:
    """The edges (H, W) that Canny's detector finds in a picture (H, W, 3), grey or in colour, at random thresholds."""
    image: np.ndarray = pixels / 255
    if rng.random() < 0.5:
        image = np.asarray(Image.fromarray(pixels).convert("L")) / 255
    low = rng.uniform(0.08, 0.25)
    return _white(annotate.edges(image, low, rng.uniform(1.5, 2.5) * low, rng.choice((0.7, 1.0, 1.4))))


def _white(lines: np.ndarray) -> np.ndarray:
    """(H, W) of bool -> uint8, white lines on black."""
    return np.where(lines, np.uint8(255), np.uint8(0))


@dataclass(frozen=True)
class HintedFolder(Folder):
    """The images of a folder and their hints, each cropped to its central square and resized to `size` pixels."""

    hints: dict[Path, Path] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hints", find_hints([item.path for item in self.items], self._named))

    @cached_property
    def _named(self) -> dict[Path, Path]:
        return _named(self.folder) if self.folder.is_dir() else {}

    def _is_other(self, path: Path) -> bool:
        below = path.parent.name == FOLDER and path.parent != self.folder
        return path.stem.endswith(HINT) or below or path.resolve() in self._others

    @cached_property
    def _others(self) -> set[Path]:
        return {path.resolve() for path in self._named.values()}

    def __getitem__(self, i: int) -> Example:
        example = super().__getitem__(i)
        if example.pixels is None:
            return example
        path, captions, *_ = self.items[i]
        hint = self.hints[path]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image, drawn = read_image(path).image, read_image(hint, BLACK, managed=False).image
        except (ImageFileError, OSError) as error:
            return Example(None, captions, str(error))
        ratio = (image.width * drawn.height) / (image.height * drawn.width)
        if not 1 - SAME_SHAPE < ratio < 1 + SAME_SHAPE:
            sizes = f"{drawn.width}x{drawn.height}, and the image {image.width}x{image.height}"
            return Example(None, captions, f"{hint}: another aspect ratio than its image ({sizes})")
        return example._replace(hint=np.asarray(fit(drawn, self.options.size, self.options.size)))

    def key(self, i: int) -> str:
        """A digest of the contents of image and hint, and of how hints are read."""
        return digest([super().key(i), sha256(self.hints[self.items[i].path]), self._code])

    @cached_property
    def _code(self) -> str:
        return digest([Path(__file__).read_text("utf-8")])


def _named(folder: Path) -> dict[Path, Path]:
    """The hints of images that the metadata.jsonl of a folder name."""
    found: dict[Path, Path] = {}
    for path in files_below(folder):
        if path.name != METADATA:
            continue
        for image, entry in metadata_entries(path):
            given = [entry[key] for key in KEYS if entry.get(key) is not None]
            if given and not (isinstance(given[0], str) and "\0" not in given[0]):
                raise ValueError(f"{path}: the hint of {image.name} must be the name of a file, got {given[0]!r:.80}")
            if given:
                found[image] = path.parent / given[0]
                if not found[image].is_file():
                    raise ValueError(f"{path}: the hint of {image.name} is missing: {found[image]}")
    return found


def find_hints(images: list[Path], named: Mapping[Path, Path]) -> dict[Path, Path]:
    """The hint of each image. Raises ValueError for an image without one."""
    found, bare = {}, []
    for image in images:
        suffixes = [*SUFFIXES, *map(str.upper, SUFFIXES)]
        beside = [image.with_name(f"{image.stem}{HINT}{suffix}") for suffix in suffixes]
        below = [image.parent / FOLDER / f"{image.stem}{suffix}" for suffix in suffixes]
        hint = named.get(image.resolve()) or next((path for path in (*beside, *below) if path.is_file()), None)
        if hint is None:
            bare.append(image)
        else:
            found[image] = hint
    if bare:
        name = bare[0].stem
        raise ValueError(
            f"{bare[0]}: no hint ({len(bare)} of {len(images)} images have none): save it as {name}{HINT}.png in the "
            f"same folder, as {FOLDER}/{name}.png, or name it in {METADATA}"
        )
    return found


def find_hinted(args: argparse.Namespace, size: int) -> HintedWorld | HintedFolder:
    """The data of --data with hints; --hint is the kind of drawn ones."""
    check_data(args)
    if args.data in (None, "world"):
        return HintedWorld(World(args.scenes, size, args.phrasings), args.hint or HINTS[0])
    if args.hint:
        raise ValueError("--hint is the kind of hints of drawn scenes (--data world); a folder has its own")
    return HintedFolder(Path(args.data), DataOptions(size, caption=args.caption), (args.out,))
