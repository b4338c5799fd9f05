"""Training data: images with captions, from a folder or drawn; read once, in parallel, and cached.

    FOLDER/**/name.png + name.txt         one caption per line; a random one is used each time
    FOLDER/**/metadata.jsonl              {"file_name": "a.png", "text": "a caption"}, as in Hugging Face datasets
    world                                 scenes of scripts/toy_world, with several captions each

Links to folders are followed. Unreadable images are skipped and counted. An image without a caption is an error,
because the name of its caption file is probably misspelt (unless --caption gives a default).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sd.imaging.files import OTHER_SUFFIXES, SUFFIXES, ImageFileError, read_image
from sd.imaging.tensors import fit
from sd.messages import counted

from .. import toy_world
from ..common.cli import Parser, home
from ..common.prompts import utf8_text
from .processes import Processes
from .state import save_tensors

CAPTIONS, METADATA = (".txt", ".caption"), "metadata.jsonl"
CHUNK = 64  # images per batch of a reading worker
FEW = 500  # below this number of images, starting workers is not worth it
NAMED = 5  # unreadable images that are named; the others are counted


class Example(NamedTuple):
    """One item: pixels (H, W, 3), uint8, and captions; or the problem that prevents reading.

    For a control network it has a hint, (H, W) or (H, W, 3), uint8, as well: see hints.py.
    """

    pixels: np.ndarray | None
    captions: Sequence[str]
    problem: str = ""
    hint: np.ndarray | None = None


class Source(Protocol):
    """A data set of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...

    def fingerprint(self) -> str:
        """A digest that changes whenever an item changes."""


@dataclass(frozen=True)
class World:
    """Drawn scenes `first` to `first + n - 1` of a split, with `phrasings` captions each.

    With `pairs`, every second scene is the counterpart of the previous one, in the same landscape.
    """

    n: int
    size: int
    phrasings: int = 1
    first: int = 0
    split: str = "train"
    pairs: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.phrasings < 1:
            raise ValueError(f"at least one scene with one caption is needed, got {self.n} with {self.phrasings}")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Example:
        scene, of_drawing, of_captions = self.scene(i)
        image = toy_world.draw(scene, of_drawing, self.size)
        return Example(np.asarray(image), [toy_world.caption(scene, of_captions) for _ in range(self.phrasings)])

    def scene(self, i: int) -> tuple[toy_world.Scene, Random, Random]:
        """Scene i, and the random numbers to draw it and to tell its captions, which come after the drawing."""
        if not 0 <= i < self.n:
            raise IndexError(i)
        seed = self.first + (i // 2 if self.pairs else i)
        rng = Random(seed)
        scene = toy_world.random_scene(rng, self.split)
        if not self.pairs:
            return scene, rng, rng
        scene = toy_world.counterpart(scene, rng) if i % 2 else scene
        return scene, Random(f"landscape {seed}"), rng

    def fingerprint(self) -> str:
        """A digest of the settings and of the drawing code."""
        code = [path.read_text(encoding="utf-8") for path in sorted(Path(toy_world.__file__).parent.glob("*.py"))]
        return digest([repr(self), *code])


@dataclass(frozen=True)
class Folder:
    """The images of a folder, each cropped to its central square and resized to `size` pixels."""

    folder: Path
    size: int
    caption: str | None = None  # for images without one; None: that is an error
    outside: Path | None = None  # a folder to ignore: where a run writes its samples
    items: list[tuple[Path, list[str]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", captioned(self.folder, self.caption, self.outside))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Example:
        path, captions = self.items[i]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as those for animations, whose first frame is used
                image = fit(read_image(path).image, self.size, self.size)
        except (ImageFileError, OSError) as error:
            return Example(None, captions, str(error))
        return Example(np.asarray(image), captions)

    def fingerprint(self) -> str:
        """A digest of names, sizes, dates and captions."""
        parts = [repr(self.size)]
        for path, captions in self.items:
            status = path.stat()
            parts += [str(path), str(status.st_size), str(status.st_mtime_ns), *captions]
        return digest(parts)


def digest(parts: Sequence[str]) -> str:
    """A digest of a list of texts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def captioned(
    folder: Path,
    caption: str | None = None,
    outside: Path | None = None,
    no_image: Callable[[Path], bool] | None = None,
) -> list[tuple[Path, list[str]]]:
    """The images of a folder and their captions. Raises ValueError for anything that is missing or unreadable.

    `no_image` says which images are something else, such as hints.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: {'a file, not a folder' if folder.is_file() else 'no such folder'}")
    files = files_below(folder)
    if outside:
        files = [path for path in files if outside.resolve() not in path.resolve().parents]
    images = [path for path in files if path.suffix.lower() in SUFFIXES and not (no_image and no_image(path))]
    if not images:
        raise ValueError(f"--data {folder}: no images in it ({', '.join(SUFFIXES)})")
    if others := [path for path in files if path.suffix.lower() in OTHER_SUFFIXES]:
        warnings.warn(
            f"skipped: {others[0]}: this format is not supported ({counted(len(others), 'file')}): save as PNG or JPEG",
            stacklevel=2,
        )
    listed: dict[Path, list[str]] = {}
    for path in files:
        if path.name == METADATA:
            listed |= _metadata(path)
    items, bare = [], []
    for path in images:
        captions = listed.pop(path.resolve(), None) or _beside(path)
        if not captions and caption is None:
            bare.append(path)
        items.append((path, captions or [caption or ""]))
    if listed:
        gone = next(iter(listed))
        raise ValueError(f"{folder}: {len(listed)} images of {METADATA} are missing, first {gone}")
    if bare:
        name = bare[0].with_suffix(".txt").name
        raise ValueError(
            f"{bare[0]}: no caption ({len(bare)} of {len(images)} images have none): write it to {name} in the same "
            f'folder or to {METADATA}, or give a default (--caption "...")'
        )
    return items


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and of its subfolders, sorted; links to folders are followed, hidden names are left out.

    Each folder is visited once, under its own name where it has one, so links in a circle end. Warns of links to
    nothing and of folders that cannot be read.
    """
    found: list[Path] = []
    lost: list[Path] = []
    seen: set[Path] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        if (place := current.resolve()) in seen:
            continue
        seen.add(place)
        try:
            entries = sorted(path for path in current.iterdir() if not path.name.startswith("."))
        except OSError:
            lost.append(current)
            continue
        for path in entries:
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                found.append(path)
            elif path.is_symlink():
                lost.append(path)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        warnings.warn(f"skipped: {lost[0]}{more}: a link to nothing, or a folder that cannot be read", stacklevel=3)
    return sorted(found)


def _beside(image: Path) -> list[str]:
    for suffix in CAPTIONS:
        if found := [line.strip() for line in read_lines(image.with_suffix(suffix)) if line.strip()]:
            return found
    return []


def read_lines(path: Path) -> list[str]:
    """All lines of a text file; none if the file is missing. Raises ValueError if it is not UTF-8."""
    # not splitlines: captions may contain the other separators of Unicode
    text = utf8_text(path.read_bytes(), path) if path.is_file() else ""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if text else []


def _metadata(path: Path) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for image, entry in metadata_entries(path):
        captions = found.setdefault(image, [])
        captions += [text] if (text := entry["text"].strip()) else []
    return found


def metadata_entries(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The images of a metadata.jsonl with their entries. Raises ValueError for a line without file_name and text."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str) or "\0" in name:
            raise ValueError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}, got {line:.80}')
        yield (path.parent / name).resolve(), entry


def examples(source: Source, workers: int, progress: bool) -> Iterator[tuple[list[int], list[Example]]]:
    """Chunks of the readable items in order, with their indices; unreadable items are skipped with a warning."""
    few = len(source) < FEW
    items = cast("Dataset[Example]", source)  # it has the methods that a loader uses
    loader: DataLoader[Example] = DataLoader(
        items, batch_size=CHUNK, num_workers=0 if few else workers, collate_fn=list
    )
    number, broken = 0, 0
    with tqdm(total=len(source), desc="reading images", disable=None if progress else True, leave=False) as bar:
        for chunk in loader:
            good = [(number + k, example) for k, example in enumerate(chunk) if example.pixels is not None]
            for example in chunk:
                if example.pixels is None:
                    broken += 1
                    if broken <= NAMED and progress:
                        warnings.warn(f"skipped: {example.problem}", stacklevel=2)
            number += len(chunk)
            bar.update(len(chunk))
            if good:
                yield [i for i, _ in good], [example for _, example in good]
    if broken == len(source):
        raise ValueError(f"none of the {broken} images can be read")
    if broken and progress:
        warnings.warn(f"{broken} of {len(source)} images cannot be read and are skipped", stacklevel=2)


def pixels(chunk: Sequence[Example]) -> Tensor:
    """The images of a chunk, (B, 3, H, W), uint8."""
    arrays = [example.pixels for example in chunk if example.pixels is not None]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def hints(chunk: Sequence[Example]) -> Tensor:
    """The hints of a chunk, (B, 1 or 3, H, W), uint8."""
    arrays = [np.atleast_3d(example.hint) for example in chunk if example.hint is not None]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def to_floats(images: Tensor) -> Tensor:
    """uint8 images -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def cached(
    path: Path, fingerprint: str, processes: Processes, make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The result of `make`, cached in a file for later runs and for the other processes on this machine."""
    if processes.local == 0 and not _valid(path, fingerprint):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(make(), path, {"fingerprint": fingerprint})
    processes.wait()
    return load_file(path)


def _valid(path: Path, fingerprint: str) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("fingerprint") == fingerprint
    except (OSError, SafetensorError):
        return False


def find_source(args: argparse.Namespace, size: int, caption: str | None = None, pairs: bool = False) -> World | Folder:
    """The data of --data; `caption` is the default for images without one, unless --caption overrides it."""
    check_data(args)
    if args.data in (None, "world"):
        return World(args.scenes, size, getattr(args, "phrasings", 1), pairs=pairs)
    return Folder(Path(args.data), size, caption if args.caption is None else args.caption, args.out)


def check_data(args: argparse.Namespace) -> None:
    """Raise ValueError without --data where it has no default."""
    if args.data is None and args.ckpt:
        raise ValueError("--ckpt needs --data: a folder with images, or world for drawn scenes")


def add_data_arguments(parser: Parser, scenes: int) -> None:
    """Add --data and its related options."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=home,
        metavar="FOLDER",
        help="images with captions, or world: drawn scenes (default of new models)",
    )
    add("--caption", metavar="TEXT", help="caption of images without one (default: that is an error)")
    add("--scenes", type=int, default=scenes, metavar="N", help="number of drawn scenes (default: %(default)s)")
    add("--size", type=int, metavar="PIXELS", help="side of the central square crop (default: native)")
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    add("--workers", type=int, default=workers, metavar="N", help="processes that read images (default: %(default)s)")


class Order:
    """An endless stream of item indices below n, each epoch shuffled; a function of the seed."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, start: int, count: int) -> Tensor:
        """Elements start to start + count - 1 of the stream, (count,)."""
        out = []
        while count:
            epoch, at = divmod(start, self.n)
            taken = self._epoch(epoch)[at : at + count]
            out.append(taken)
            start, count = start + len(taken), count - len(taken)
        return torch.cat(out)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {epoch: torch.randperm(self.n, generator=generator("cpu", self.seed, "epoch", epoch))}
        return self._epochs[epoch]


def generator(device: torch.device | str, seed: int, *what: object) -> torch.Generator:
    """A generator of random numbers for a named purpose, the same on every start."""
    number = int(digest([str(seed), *map(str, what)])[:15], 16)
    return torch.Generator(device).manual_seed(number)
