"""Hashes of files, by which other programs know them."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path


class FileHash:
    """The SHA-256 of a file, computed when it is first asked for; None if the file cannot be read.

    tensors_only   skip the header of a .safetensors file, which tools may change: the hash of LoRA files
    """

    def __init__(self, path: Path, tensors_only: bool = False) -> None:
        self._path, self._tensors_only = path, tensors_only
        self._digits: str | None = None
        self._lock = threading.Lock()
        self.is_known = False

    def digits(self) -> str | None:
        """All 64 digits."""
        with self._lock:
            if not self.is_known:
                self._digits = self._computed()
                self.is_known = True
        return self._digits

    def _computed(self) -> str | None:
        digest = hashlib.sha256()
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            if self._tensors_only:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
        return None


class ModelHash:
    """The first digits of the SHA-256 of a file, which identify models in other tools; computed in the background.

    tensors_only   as for `FileHash`
    """

    def __init__(self, path: Path, digits: int = 10, tensors_only: bool = False) -> None:
        self._hash, self._count = FileHash(path, tensors_only), digits
        threading.Thread(target=self._hash.digits, daemon=True).start()  # does not delay the exit of the program

    def digits(self) -> str | None:
        """Wait for the digits; None if the file could not be read."""
        found = self._hash.digits()
        return None if found is None else found[: self._count]


def file_hash(path: Path) -> str | None:
    """The web UI's short hash of a file, 8 digits: of 64 KB at 1 MB. It is that of models before 2023, and still that
    of control networks. None for a folder, or a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(1 << 20)
            return hashlib.sha256(file.read(1 << 16)).hexdigest()[:8]
    except OSError:
        return None
