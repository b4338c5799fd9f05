"""Output files: numbered images that never replace other files, with the images of their steps beside them."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from PIL import Image

from sd.files import check_writable, exists, new_file
from sd.imaging.animation import save_animation
from sd.imaging.files import OTHER_SUFFIXES, SUFFIXES, png_bytes, save_png

NUMBERS = 10**9  # numbers in names are below this
OTHER_FORMATS = {*SUFFIXES, *OTHER_SUFFIXES, ".apng", ".psd", ".svg"} - {".png"}
PROBE = 1 << 16  # bytes, as a small image has
LONG_SUFFIX = len("-grid-999999999.png")


class Output:
    """Numbered files in a folder, or one name with numbers appended; no file is ever replaced.

    An image that cannot be saved where it should be is saved in another folder, with a warning: it may have taken
    hours. `save` raises only where there is no such folder either.
    """

    def __init__(self, path: Path) -> None:
        """Make the folder and check what can be known before the work. Raises OSError or ValueError."""
        suffix = path.suffix.lower()
        if suffix in OTHER_FORMATS and not os.path.isdir(path):
            raise ValueError(f"--out {path}: images are saved as .png, which is lossless")
        if path.name == "-" or path.name.lower() == ".png":
            raise ValueError(f"--out {path}: give a folder, or a file name such as cat.png")
        named = suffix == ".png" and not os.path.isdir(path)  # `path.is_dir` raises for names that are too long
        self.name = path.stem if named else None
        self.folder = path.parent if named else path
        self._next: dict[str, int] = {}  # name -> the number to append next
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"--out {path}: {self.folder} cannot be created: part of its path is a file or a broken link; choose "
                "another folder"
            ) from None
        check_writable(self.folder, PROBE)  # raises for an unwritable folder or a full disk
        if named:
            limit = longest_name(self.folder)
            if (size := len(os.fsencode(path.name))) > limit:
                raise ValueError(
                    f"--out: the file name has {size} bytes, but this file system allows {limit}: choose a shorter"
                )
            if os.path.lexists(path):
                raise exists(path)

    def _names(self, name: str | None, kind: str) -> Iterable[Path]:
        """Names for a file, in order; some may be taken. `name` overrides the numbers of a folder."""
        if name is None:
            used = {int(found[1]) for entry in os.listdir(self.folder) if (found := re.match(r"(\d{1,9})\D", entry))}
            after = range(max(used, default=0) + 1, NUMBERS)
            free = (number for number in range(1, NUMBERS) if number not in used)  # the highest number is taken
            yield from (self.folder / f"{number:05d}{kind}.png" for number in chain(after, free))
            return
        limit, key = longest_name(self.folder), name + kind
        if key not in self._next:
            self._next[key] = 2
            if len(os.fsencode(f"{key}.png")) <= limit:
                yield self.folder / f"{key}.png"
        stem = shortened(name, limit - LONG_SUFFIX)
        while self._next[key] < NUMBERS:
            self._next[key] += 1
            yield self.folder / f"{stem}{kind}-{self._next[key] - 1}.png"

    def save(self, image: Image.Image, text: str | None = None, kind: str = "", name: str | None = None) -> Path:
        """Save an image under the next free name; returns the path. It is encoded once, however many names are taken.

        text   for the "parameters" chunk
        kind   appended to the name
        name   instead of a number, unless all images have one name
        """
        data = png_bytes(image, text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            return self._place(data, kind, name)
        except OSError as error:
            folder = self.folder
            try:
                self.folder = Path(tempfile.mkdtemp(prefix="sd-images-"))
                path = self._place(data, kind, name)
            except OSError:  # no place left anywhere
                raise error from None
            reason = error.strerror or str(error)
            warnings.warn(f"{folder}: {reason}: images are saved in {self.folder} from now on", stacklevel=2)
            return path

    def _place(self, data: bytes, kind: str, name: str | None) -> Path:
        for path in self._names(self.name or name, kind):
            if os.path.lexists(path):
                continue
            try:
                with new_file(path) as partial:
                    partial.write_bytes(data)
                return path
            except FileExistsError:  # another program took the name
                continue
        raise OSError(f"{self.folder}: no free name left")

    def save_beside(self, image: Image.Image, other: Path, kind: str) -> Path:
        """Save an image under the name of another, with `kind` appended, and a number if there is such a file."""
        data = png_bytes(image)
        stem = shortened(other.stem, longest_name(other.parent) - len(f"{kind}-999999999.png"))
        for number in range(1, NUMBERS):
            path = other.with_name(f"{stem}{kind}" + (f"-{number}" if number > 1 else "") + ".png")
            with contextlib.suppress(FileExistsError), new_file(path) as partial:
                partial.write_bytes(data)
                return path
        raise OSError(f"{other.parent}: no free name left")

    def save_steps(self, frames: Sequence[Image.Image], image: Path, kind: str) -> Path:
        """Save the steps of an image beside it: a folder of numbered frames, and an animation (.webp or .gif)."""
        stem = shortened(image.stem, longest_name(image.parent) - len("-steps-999999999.webp"))
        for number in range(1, NUMBERS):
            name = f"{stem}-steps" + (f"-{number}" if number > 1 else "")
            folder, film = image.with_name(name), image.with_name(f"{name}.{kind}")
            if film.exists():
                continue
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        for number, frame in enumerate(frames, start=1):
            save_png(frame, folder / f"{number:03d}.png")
        try:
            save_animation(frames, film)
        except ValueError as error:  # the format does not support this size
            warnings.warn(f"no animation, only its frames: {error}", stacklevel=2)
            return folder
        return film


def longest_name(folder: Path) -> int:
    """The longest name of a file in a folder, in bytes."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has no such function, and 255 characters
        return 255


def shortened(name: str, size: int) -> str:
    """The beginning of a name, of at most `size` bytes and of whole characters."""
    while len(os.fsencode(name)) > size:
        name = name[:-1]
    return name
