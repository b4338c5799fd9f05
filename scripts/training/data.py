"""Training data: examples of images with captions, of a folder or drawn, read in parallel; and the options about them.

    FOLDER          images with captions: see folders.py and caption_files.py
    world           scenes of scripts/toy_world, with several captions each

What is computed of them once is in latents.py and texts.py, the batches of a step in batches.py.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .. import toy_world
from .buckets import Placement, place
from .processes import Processes
from .state import save_tensors

CHUNK = 64  # images per batch of a reading worker
FEW = 500  # below this number of images, starting workers is not worth it
NAMED = 5  # unreadable images that are named; the others are counted


class Example(NamedTuple):
    """One item: pixels (H, W, 3), uint8, and captions; or the problem that prevents reading."""

    pixels: np.ndarray | None
    captions: Sequence[str]
    problem: str = ""
    hint: np.ndarray | None = None  # (H, W) or (H, W, 3), uint8, of a control network: see hints.py
    mask: np.ndarray | None = None  # (H, W), uint8: 255 where the image is to be learned
    place: Placement | None = None


class Record(NamedTuple):
    """What is known of an item before it is read."""

    name: str
    captions: Sequence[str] | None = None  # None: they come with the pixels
    repeats: int = 1  # per epoch
    regular: bool = False  # an image of the class (DreamBooth), not one to learn


class Source(Protocol):
    """A data set of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...

    def record(self, i: int) -> Record:
        """What is known of item i without reading its image."""

    def key(self, i: int) -> str:
        """A SHA-256 of all that the pixels, mask and hint of item i depend on: the contents of files, not names."""


def fingerprint(source: Source) -> str:
    """A digest that changes whenever an image of the source changes."""
    return digest([source.key(i) for i in range(len(source))])


@dataclass(frozen=True)
class World:
    """Drawn scenes `first` to `first + n - 1` of a split, with `phrasings` captions each.

    With `pairs`, every second scene is the counterpart of the previous one, in the same landscape. `regular`: they are
    images of the class, not those to learn.
    """

    n: int
    size: int
    phrasings: int = 1
    first: int = 0
    split: str = "train"
    pairs: bool = False
    regular: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.phrasings < 1:
            raise ValueError(f"at least one scene with one caption is needed, got {self.n} with {self.phrasings}")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Example:
        scene, of_drawing, of_captions = self.scene(i)
        image = toy_world.draw(scene, of_drawing, self.size)
        captions = [toy_world.caption(scene, of_captions) for _ in range(self.phrasings)]
        return Example(np.asarray(image), captions, place=place((self.size, self.size), [(self.size, self.size)]))

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

    def record(self, i: int) -> Record:
        """The number of the scene; its captions are told after it was drawn."""
        return Record(f"scene {self.first + i}", regular=self.regular)

    def key(self, i: int) -> str:
        """A digest of the settings, the scene's number and the drawing code."""
        return digest([repr(replace(self, n=1)), str(i), self._code])

    @cached_property
    def _code(self) -> str:
        return digest([path.read_text("utf-8") for path in sorted(Path(toy_world.__file__).parent.glob("*.py"))])


def digest(parts: Sequence[str]) -> str:
    """A digest of a list of texts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def examples(
    source: Source, workers: int, progress: bool, chosen: Sequence[int] | None = None
) -> Iterator[tuple[list[int], list[Example]]]:
    """Chunks of the readable items in order, with their indices; unreadable items are skipped with a warning.

    chosen   the items to read; None: all
    """
    chosen = range(len(source)) if chosen is None else chosen
    few = len(chosen) < FEW
    items = Subset(cast("Dataset[Example]", source), chosen)  # it has the methods that a loader uses
    loader: DataLoader[Example] = DataLoader(
        items, batch_size=CHUNK, num_workers=0 if few else workers, collate_fn=list
    )
    number, broken = 0, 0
    with tqdm(total=len(chosen), desc="reading images", disable=None if progress else True, leave=False) as bar:
        for chunk in loader:
            good = [(chosen[number + k], example) for k, example in enumerate(chunk) if example.pixels is not None]
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


def generator(device: torch.device | str, seed: int, *what: object) -> torch.Generator:
    """A generator of random numbers for a named purpose, the same on every start."""
    number = int(digest([str(seed), *map(str, what)])[:15], 16)
    return torch.Generator(device).manual_seed(number)
