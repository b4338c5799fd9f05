"""The files that requests may name: models, LoRAs, embeddings, control networks and VAEs, each found in a folder.

A name in a request is only compared with those that are there. It is never used as a path, so no request opens a file
outside of the folders.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..checkpoints.folders import ENDINGS, model_name
from ..checkpoints.hashes import FileHash
from ..files import folders_below
from ..messages import one_line
from ..resources import EMBEDDED, EMBEDDED_CONTROLS, EMBEDDED_LORA, resource
from .settings import ServerSettings

Kind = Literal["model", "lora", "embedding", "control", "vae"]
WORDS = {"model": "model", "lora": "LoRA", "embedding": "embedding", "control": "control network", "vae": "VAE"}
MOST_FILES = 20_000  # in a folder: more is not a folder of models


class UnknownName(ValueError):
    """A name that no file has."""


@dataclass(frozen=True)
class Entry:
    """A file, and the names by which requests may call it."""

    kind: Kind
    name: str  # of the file without its suffix; after its folder's, if two files have the same
    path: Path
    embedded: bool = False  # whether it comes with the package
    stamp: tuple[int, int] = (0, 0)  # size and time of its last change
    _hash: FileHash = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        only = self.kind == "lora" and self.path.suffix == ".safetensors"
        object.__setattr__(self, "_hash", FileHash(self.path, tensors_only=only))

    def sha256(self) -> str:
        """The SHA-256 of the file; empty if it cannot be read. The first call reads the whole file."""
        return self._hash.digits() or ""

    @property
    def hash(self) -> str:
        """The first ten digits of it, as other programs show them; empty until `sha256` was called."""
        return self.sha256()[:10] if self._hash.is_known else ""

    @property
    def title(self) -> str:
        """The name with the suffix, and the hash once it is known, as the web UI shows models."""
        return f"{self.name}{self.path.suffix} [{self.hash}]" if self.hash else f"{self.name}{self.path.suffix}"


class Catalogue:
    """All entries, found again by `refresh`. Reading it is safe in any thread."""

    def __init__(self, settings: ServerSettings) -> None:
        """Raises ValueError for a folder that is not there, and OSError for one that cannot be read."""
        self._settings, self._lock = settings, threading.Lock()
        for name in ("models", "loras", "embeddings", "controls", "vaes"):
            folder = getattr(settings, name)
            if folder is not None and not folder.is_dir():
                raise ValueError(f"{name} {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
        self._hashing: threading.Thread | None = None
        self._entries: dict[Kind, dict[str, Entry]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look into the folders again. Entries whose file has not changed keep their hash."""
        own = self._settings.ckpt
        last = [("", resource(EMBEDDED))] if own is not None else []
        bundled = {name: resource(path) for name, path in EMBEDDED_CONTROLS.items()}
        found = {
            "model": _named([("", own or resource(EMBEDDED)), *_files(self._settings.models), *last]),
            "lora": {**_named(_files(self._settings.loras)), resource(EMBEDDED_LORA).stem: resource(EMBEDDED_LORA)},
            "embedding": _named(_files(self._settings.embeddings)),
            "control": {**_named(_files(self._settings.controls)), **bundled},
            "vae": _named(_files(self._settings.vaes)),
        }
        embedded = {resource(EMBEDDED), resource(EMBEDDED_LORA), *bundled.values()}
        with self._lock:
            for kind, paths in found.items():
                before = self._entries.get(kind, {})  # type: ignore[call-overload]
                self._entries[kind] = {  # type: ignore[index]
                    name: before[name]
                    if name in before and (before[name].path, before[name].stamp) == (path, _stamp(path))
                    else Entry(kind, name, path, path in embedded, _stamp(path))  # type: ignore[arg-type]
                    for name, path in paths.items()
                }

    def _compute_hashes(self, entries: list[Entry]) -> None:
        """Compute hashes in the background, one file after another."""
        if self._hashing is None or not self._hashing.is_alive():
            self._hashing = threading.Thread(target=lambda: [entry.sha256() for entry in entries], daemon=True)
            self._hashing.start()

    def entries(self, kind: Kind) -> list[Entry]:
        """Those of a kind, the one that is used by default first."""
        with self._lock:
            return list(self._entries[kind].values())

    @property
    def default(self) -> Entry:
        """The model that is loaded first."""
        return self.entries("model")[0]

    def find(self, kind: Kind, name: str) -> Entry:
        """The entry of this name: with or without a suffix, in upper or lower case; of models also title and hash.

        Hashes that are not known yet are computed in the background once one is asked for. Raises UnknownName, which
        lists the known names.
        """
        wanted = name.strip().casefold()
        entries = self.entries(kind)
        for entry in entries:
            plain = entry.name.casefold()
            if wanted in (plain, f"{plain}{entry.path.suffix.casefold()}"):
                return entry
        for entry in entries if kind in ("model", "vae") and wanted else ():
            plain = f"{entry.name}{entry.path.suffix}".casefold()
            if wanted.startswith(f"{plain} ["):
                return entry
        if kind == "model" and len(wanted) in (10, 64) and set(wanted) <= set("0123456789abcdef"):
            for entry in entries:
                if entry.hash and entry.sha256().startswith(wanted):
                    return entry
            if unknown := [entry for entry in entries if not entry.hash]:
                self._compute_hashes(unknown)
                raise UnknownName(
                    f"no model has the hash {wanted}, as far as is known: those of {len(unknown)} files are being "
                    "computed; try again later, or give a name"
                )
        known = ", ".join(entry.name for entry in entries[:10]) + (", ..." if len(entries) > 10 else "")
        raise UnknownName(f"no {WORDS[kind]} is called {one_line(name, 100)!r}; this server has {known or 'none'}")


def _files(folder: Path | None) -> Iterable[tuple[str, Path]]:
    """(folder within `folder`, file) of each weight file, and each diffusers folder, sorted by name."""
    found: list[tuple[str, Path]] = []
    if folder is None:
        return found
    for path, folders, files in folders_below(folder):
        within = path.relative_to(folder).as_posix()
        if "model_index.json" in files:
            found.append(("" if within == "." else within.rpartition("/")[0], path))
            folders.clear()
            continue
        for file in map(path.joinpath, files):
            if file.suffix.lower() in ENDINGS:
                found.append(("" if within == "." else within, file))
        if len(found) > MOST_FILES:
            raise ValueError(f"{folder}: more than {MOST_FILES:,} files in it")
    return found


def _stamp(path: Path) -> tuple[int, int]:
    """Size of a file and the time of its last change, in nanoseconds; zeros if there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _named(found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """The files by name; one whose name is taken has that of its folder before it, or a number."""
    named: dict[str, Path] = {}
    for folder, path in found:
        plain = name = model_name(path)
        if name in named and folder:
            plain = name = f"{folder}/{plain}"
        number = 2
        while name in named:
            name, number = f"{plain}-{number}", number + 1
        named[name] = path
    return named
