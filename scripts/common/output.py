"""Where pictures go: numbered files that never replace others, and pictures of the steps beside them."""

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
    """First digits of a file's SHA-256, as other tools name models; computed while the model paints.

    tensors_only   what lies behind the header of a .safetensors file, which tools change: their name of LoRA files
    """

    def __init__(self, path: Path, digits: int = 10, tensors_only: bool = False) -> None:
        self._path, self._count, self._tensors_only = path, digits, tensors_only
        self._digits: str | None = None
        self._thread = threading.Thread(target=self._compute, daemon=True)  # nobody waits for it who stops the program
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
        """The digits, as soon as they are known; None if the file has become unreadable."""
        self._thread.join()
        return self._digits


class Output:
    """Where pictures go: numbered files in a folder, or one name with numbers behind it; no file is ever replaced."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem if path.suffix.lower() == ".png" else None
        if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif"):
            raise ValueError(f"--out {path}: pictures are written as .png, which keeps them unchanged")
        self.folder = path.parent if self.name else path
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".{secrets.token_hex(8)}"  # an unwritable folder should say so before the work
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
        """Write a picture under the next free name; returns that name."""
        for path in self._names(kind):
            try:
                save_png(image, path, text)
                return path
            except FileExistsError:  # another program took the number
                continue
        raise OSError(f"{self.folder}: no free name left")

    def save_steps(self, frames: Sequence[Image.Image], picture: Path, kind: str) -> Path:
        """Write a picture's steps beside it: a folder of numbered frames, and an animation of them (.webp or .gif)."""
        for number in range(1, 10**9):
            name = f"{picture.stem}-steps" + (f"-{number}" if number > 1 else "")
            folder, film = picture.with_name(name), picture.with_name(f"{name}.{kind}")
            if film.exists():
                continue
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        for number, frame in enumerate(frames, start=1):
            save_png(frame, folder / f"{number:03d}.png")
        try:
            save_animation(frames, film)
        except ValueError as error:  # a size that the format cannot hold
            warnings.warn(f"no animation, only its frames: {error}", stacklevel=2)
            return folder
        return film
