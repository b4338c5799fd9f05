"""The images of a folder with their captions and masks, read as examples; and two folders as one source.

    FOLDER/**/name.png                        captions: see caption_files.py
    FOLDER/**/10_dog/name.png                 shown 10 times per epoch; "dog" is its caption where it has no other
    FOLDER/**/name.mask.png, masks/name.png   with --masked: white where the image is to be learned. Without such a
                                              file the image's own alpha channel is the mask, and else all is learned

Links to folders are followed. Unreadable images are skipped and counted. An image without a caption is an error,
because the name of its caption file is probably misspelt (unless --caption gives a default).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sd.imaging.files import OTHER_SUFFIXES, SUFFIXES, ImageFileError, read_image, read_mask
from sd.imaging.tensors import fit, resize
from sd.messages import counted

from .buckets import Shape, bucket_shapes, place
from .caption_files import METADATA, beside, listed_captions, of_folder_name
from .data import Example, Record, Source, digest

MASK, MASKS = ".mask", "masks"  # what comes after the name of a mask beside its image, and the folder of masks
SAME_SHAPE = 0.02  # how far the aspect ratios of an image and its mask may differ


@dataclass(frozen=True)
class DataOptions:
    """How the images of folders are read.

    size      in pixels: the side of the square whose area the images have
    step      of the sides of buckets; None: all images are cropped to their central square
    caption   for images without one; None: that is an error
    flip      images are seen mirrored half of the time
    masked    images have masks of what is to be learned
    """

    size: int
    step: int | None = None
    caption: str | None = None
    flip: bool = False
    masked: bool = False

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The sizes (height, width) that images may get."""
        return ((self.size, self.size),) if self.step is None else bucket_shapes(self.size, self.step)


class Item(NamedTuple):
    """An image file."""

    path: Path
    captions: list[str]
    repeats: int = 1  # per epoch
    mask: Path | None = None


@dataclass(frozen=True)
class Folder:
    """The images of a folder, each resized to cover the best of the sizes and cropped evenly.

    outside   folders to ignore: where a run writes its samples
    regular   whether these are images of the class, not those to learn
    """

    folder: Path
    options: DataOptions
    outside: tuple[Path, ...] = ()
    regular: bool = False
    items: list[Item] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.options.shapes  # noqa: B018  # raises ValueError for a size that cannot be
        option = "--reg" if self.regular else "--data"
        items = captioned(self.folder, self.options.caption, self.outside, self._is_other, option)
        object.__setattr__(self, "items", items)
        if not self.options.masked and (unused := sum(item.mask is not None for item in items)):
            warnings.warn(f"{self.folder}: {counted(unused, 'mask')} not used: --masked uses them", stacklevel=2)

    def _is_other(self, path: Path) -> bool:
        """Whether an image file is something else than an image to learn."""
        return False

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Example:
        path, captions, _, masked = self.items[i]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as those for animations, whose first frame is used
                image, alpha, _ = read_image(path)
                mask = self._mask(image, alpha, masked) if self.options.masked else None
        except (ValueError, OSError) as error:
            return Example(None, captions, str(error))
        where = place(image.size, self._shapes)
        size = where.width, where.height
        cropped = None if mask is None else np.asarray(fit(mask, *size))
        if cropped is not None and not cropped.any():
            return Example(None, captions, f"{masked or path}: the mask is black everywhere, so nothing is learned")
        return Example(np.asarray(fit(image, *size)), captions, mask=cropped, place=where)

    def _mask(self, image: Image.Image, alpha: Image.Image | None, path: Path | None) -> Image.Image:
        """The mask of an image, of its size, mode L."""
        if path is None:
            return alpha or Image.new("L", image.size, 255)
        mask = read_mask(path)
        ratio = (image.width * mask.height) / (image.height * mask.width)
        if not 1 - SAME_SHAPE < ratio < 1 + SAME_SHAPE:
            sizes = f"{mask.width}x{mask.height}, and the image {image.width}x{image.height}"
            raise ImageFileError(f"{path}: another aspect ratio than its image ({sizes})")
        return resize(mask, *image.size)

    def record(self, i: int) -> Record:
        """Name, captions and repeats of an image."""
        item = self.items[i]
        return Record(item.path.relative_to(self.folder).as_posix(), item.captions, item.repeats, self.regular)

    def key(self, i: int) -> str:
        """A digest of the contents of image and mask, and of the sizes that it may get."""
        path, _, _, mask = self.items[i]
        masked = [str(self.options.masked), sha256(mask)] if self.options.masked else []
        return digest([sha256(path), repr(self._shapes), *masked])

    @cached_property
    def _shapes(self) -> tuple[Shape, ...]:
        return self.options.shapes


@dataclass(frozen=True)
class Joined:
    """Two sources as one: what is to be learned, and images of its class (see `Folder.regular`)."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def _find(self, i: int) -> tuple[Source, int]:
        return (self.first, i) if i < len(self.first) else (self.second, i - len(self.first))

    def __getitem__(self, i: int) -> Example:
        source, number = self._find(i)
        return source[number]

    def record(self, i: int) -> Record:
        """That of the source which has the item."""
        source, number = self._find(i)
        return source.record(number)

    def key(self, i: int) -> str:
        """That of the source which has the item."""
        source, number = self._find(i)
        return source.key(number)


def sha256(path: Path | None) -> str:
    """The SHA-256 of a file's contents; of a file that cannot be read, its name."""
    found = hashlib.sha256()
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                found.update(data)
    except OSError:
        return f"unreadable {path}"
    return found.hexdigest()


def captioned(
    folder: Path,
    caption: str | None = None,
    outside: Sequence[Path] = (),
    no_image: Callable[[Path], bool] | None = None,
    option: str = "--data",
) -> list[Item]:
    """The images of a folder and their captions. Raises ValueError for anything that is missing or unreadable.

    no_image   says which images are something else, such as hints
    option     by which the user named the folder
    """
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: {'a file, not a folder' if folder.is_file() else 'no such folder'}")
    files = _without(files_below(folder), folder, outside)
    images = [path for path in files if path.suffix.lower() in SUFFIXES and not (no_image and no_image(path))]
    masks = find_masks(images)
    images = [path for path in images if path not in masks.values()]
    if not images:
        raise ValueError(f"{option} {folder}: no images in it ({', '.join(SUFFIXES)})")
    if others := [path for path in files if path.suffix.lower() in OTHER_SUFFIXES]:
        warnings.warn(
            f"skipped: {others[0]}: this format is not supported ({counted(len(others), 'file')}): save as PNG or JPEG",
            stacklevel=2,
        )
    listed = listed_captions(files, images)
    items, bare = [], []
    for path in images:
        repeats, name = of_folder_name(path, folder) or (1, caption)
        captions = listed.get(path.resolve()) or beside(path)
        if not captions and name is None:
            bare.append(path)
        items.append(Item(path, captions or [name or ""], repeats, masks.get(path)))
    if bare:
        name = bare[0].with_suffix(".txt").name
        default = 'give a default (--caption "...")' if option == "--data" else 'call their folder "1_" and the class'
        raise ValueError(
            f"{bare[0]}: no caption ({len(bare)} of {len(images)} images have none): write it to {name} in the same "
            f"folder or to {METADATA}, or {default}"
        )
    if unused := [item for item in items if not item.repeats]:
        warnings.warn(f"skipped: {unused[0].path.parent}: its name says 0 times per epoch", stacklevel=2)
    if len(unused) == len(items):
        raise ValueError(f"{option} {folder}: the names of its folders say that no image is to be shown (0_...)")
    return [item for item in items if item.repeats]


def _without(files: list[Path], folder: Path, outside: Sequence[Path]) -> list[Path]:
    """The files that are not in one of the folders `outside`, unless that is the folder itself or around it."""
    root = folder.resolve()
    others = {path.resolve() for path in outside} - {root, *root.parents}
    return [path for path in files if not others.intersection(path.resolve().parents)] if others else files


def find_masks(images: Sequence[Path]) -> dict[Path, Path]:
    """The masks among the images of a folder: image -> its mask."""
    named = {(path.parent, path.stem): path for path in images}
    found: dict[Path, Path] = {}
    for path in images:
        image = named.get((path.parent, path.stem.removesuffix(MASK))) if path.stem.endswith(MASK) else None
        if image is None and path.parent.name == MASKS:
            image = named.get((path.parent.parent, path.stem))
        if image is not None:
            found.setdefault(image, path)
    return found


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
