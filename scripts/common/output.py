"""Output files: numbered images that never replace other files, with the images of their steps beside them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from sd.files import exists
from sd.imaging.files import save_animation, save_png


class ModelHash:
    """The first digits of the SHA-256 of a file, which identify models in other tools; computed in the background.

    tensors_only   skip the header of a .safetensors file, which tools may change: the hash of LoRA files
    """

    def __init__(self, path: Path, digits: int = 10, tensors_only: bool = False) -> None:
        self._path, self._count, self._tensors_only = path, digits, tensors_only
        self._digits: str | None = None
        self._thread = threading.Thread(target=self._compute, daemon=True)  # does not delay the exit of the program
        self._thread.start()

    def _compute(self) -> None:
        digest = hashlib.sha256()
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            if self._tensors_only:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
            while block := file.read(1 << 20):
                digest.update(block)
            self._digits = digest.hexdigest()[: self._count]

    def digits(self) -> str | None:
        """Wait for the digits; None if the file could not be read."""
        self._thread.join()
        return self._digits


class Output:
    """Numbered files in a folder, or one name with numbers appended; no file is ever replaced."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem if path.suffix.lower() == ".png" else None
        if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif"):
            raise ValueError(f"--out {path}: images are saved as .png, which is lossless")
        self.folder = path.parent if self.name else path
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".{secrets.token_hex(8)}"  # raises for an unwritable folder before the work
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
        if self.name and path.exists():
            raise exists(path)

    def _names(self, kind: str) -> Iterable[Path]:
        if self.name:
            yield self.folder / f"{self.name}{kind}.png"
            numbers = range(2, 10**9)
            yield from (self.folder / f"{self.name}{kind}-{number}.png" for number in numbers)
        used = [int(found[1]) for name in os.listdir(self.folder) if (found := re.match(r"(\d{1,9})\D", name))]
        yield from (self.folder / f"{number:05d}{kind}.png" for number in range(max(used, default=0) + 1, 10**9 + 1))

    def save(self, image: Image.Image, text: str | None = None, kind: str = "") -> Path:
        """Save an image under the next free name; returns the path."""
        for path in self._names(kind):
            try:
                save_png(image, path, text)
                return path
            except FileExistsError:  # another program took the number
                continue
        raise OSError(f"{self.folder}: no free name left")

    def save_steps(self, frames: Sequence[Image.Image], image: Path, kind: str) -> Path:
        """Save the steps of an image beside it: a folder of numbered frames, and an animation (.webp or .gif)."""
        for number in range(1, 10**9):
            name = f"{image.stem}-steps" + (f"-{number}" if number > 1 else "")
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
