"""The cache in which the Hugging Face libraries keep downloaded models.

    hub/models--owner--name/    refs/main                 the commit that "main" was at the last download
                                snapshots/<commit>/...    the files, as links
                                blobs/<hash>              what they link to

A model's folder is found by its outermost name as well as by that of a snapshot.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..messages import listed
from .formats.pickles import RefusedFile

REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
COMMIT = re.compile(r"[0-9A-Za-z]{1,64}")
MAX_REF = 200  # bytes


def snapshot(folder: Path) -> Path | None:
    """The folder of the files of a model in the cache; None for a folder that is no such cache.

    It is the snapshot that refs/main names, or the only one. Raises RefusedFile for several, of which none is named,
    and for none.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or not ((folder / "refs").is_dir() or REPOSITORY.fullmatch(folder.name)):
        return None
    found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    current = _main(folder)
    named = [entry for entry in found if entry.name == current]
    if not found:
        raise RefusedFile("a model's cache without a snapshot, as an unfinished download leaves it; download it again")
    if len(named or found) > 1:
        names = listed((entry.name for entry in found), most=3)
        raise RefusedFile(f"a cache of {len(found)} versions of a model, and refs/main names none: give one of the "
                          f"folders in snapshots/ ({names})")  # fmt: skip
    return (named or found)[0]


def repository(path: Path) -> str | None:
    """The name of the repository, without its owner, of a file in the cache; None for a file elsewhere."""
    found = [part for part in path.parts if part.startswith("models--")]
    return found[-1].removeprefix("models--").rpartition("--")[2] or None if found else None


def cached_models(folder: Path) -> list[str]:
    """Names of the models in the cache; none for a folder that is no such cache."""
    return sorted(entry.name for entry in folder.iterdir() if REPOSITORY.fullmatch(entry.name) and entry.is_dir())


def _main(folder: Path) -> str | None:
    """The commit in refs/main."""
    file = folder / "refs" / "main"
    if not file.is_file():
        return None
    with open(file, "rb") as stream:
        commit = stream.read(MAX_REF).decode("ascii", "replace").strip()
    return commit if COMMIT.fullmatch(commit) else None


def dangling(folder: Path) -> list[str]:
    """Names of links in a folder, and in the folders in it, whose files are not there: of an unfinished download."""
    places = [folder, *(entry for entry in folder.iterdir() if entry.is_dir())]
    return sorted(
        str(entry.relative_to(folder))
        for place in places
        for entry in place.iterdir()
        if entry.is_symlink() and not entry.exists()
    )
