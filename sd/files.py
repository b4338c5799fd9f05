"""Writing a file whole or not at all: a new one, never over another (`new_file`), or in the place of an old one.

`user_path` is how the Python API takes paths.

>>> from tempfile import TemporaryDirectory
>>> with TemporaryDirectory() as folder:
...     with new_file(Path(folder) / "a.txt") as partial:
...         _ = partial.write_text("whole or not at all")
...     (Path(folder) / "a.txt").read_text()
'whole or not at all'
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAMED = 30  # characters of a file's name in that of its temporary file: 120 bytes at most


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path with a leading "~" or "~user" expanded to that home folder, as shells do; unchanged if there is none.

    Raises ValueError for an empty text, which would be the current folder.
    """
    text = os.fsdecode(path)
    if not text:
        raise ValueError("the path is empty: give the name of a file or folder")
    return Path(os.path.expanduser(text))


def folders_below(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and those in it, sorted, each once, as links may lead in a circle: (path, names of folders, of files).

    The list of folders can be changed, as in `os.walk`: those that are taken out are not entered.
    """
    seen: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield Path(path), folders, sorted(files)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end of the `with` block its file gets the name `path`.

    Raises FileExistsError if there is a file of that name by then. If the block fails, nothing is left behind.
    """
    with _beside(path) as (partial, mode):
        yield partial
        _to_disk(partial, mode)
        try:
            os.link(partial, path)  # unlike a rename, refuses to replace a file
        except FileExistsError:
            raise exists(path) from None
        except OSError:  # a file system without hard links
            if path.exists():
                raise exists(path) from None
            os.rename(partial, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; at the end of the `with` block it gets the name `path`.

    Raises FileExistsError if there is something of that name. If the block fails, nothing is left behind.
    """
    if path.exists():
        raise exists(path)
    partial = _partial_name(path)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _to_disk(file, 0o666 & ~_umask(partial))
        if path.exists():  # a rename would put an empty folder aside
            raise exists(path)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask(folder: Path) -> int:
    """Which rights new files do not get, seen on a folder that was just made."""
    return 0o777 & ~stat.S_IMODE(os.stat(folder).st_mode)


@contextmanager
def replaced_file(path: Path, private: bool = False) -> Iterator[Path]:
    """A temporary path to write to; at the end of the `with` block its file takes the place of `path`.

    private   whether only its owner may read the file
    If the block fails, the program is killed or the disk fills up, the old file is as it was.
    """
    with _beside(path) as (partial, mode):
        yield partial
        _to_disk(partial, 0o600 if private else mode)
        os.replace(partial, path)
        if os.name == "posix":  # the change of names is on the disk too, not only the bytes
            folder = os.open(path.parent, os.O_RDONLY)
            with suppress(OSError):  # some network file systems know no such thing
                os.fsync(folder)
            os.close(folder)


def check_regular(path: Path) -> None:
    """Raise OSError unless this is a regular file: opening a pipe waits for its writer, and some devices never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def check_writable(folder: Path, size: int = 1) -> None:
    """Raise OSError, with the name of the folder, if a file of `size` bytes cannot be written there."""
    probe = _partial_name(folder / "probe")
    try:
        probe.write_bytes(bytes(size))
    except OSError as error:  # writing does not tell the name
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from None
    finally:
        with suppress(OSError):
            probe.unlink()


def remove_partial(folder: Path) -> None:
    """Remove what programs that were killed while they wrote have left in a folder that nobody writes to now."""
    for partial in list(folder.rglob(".*.????????.part")):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _partial_name(path: Path) -> Path:
    """A hidden name beside a path. It is never too long for the file system where the path itself is not."""
    return path.with_name(f".{path.name[:NAMED]}.{secrets.token_hex(4)}.part")


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, int]]:
    partial = _partial_name(path)
    try:
        with open(partial, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield partial, mode
    finally:
        partial.unlink(missing_ok=True)


def _to_disk(partial: Path, mode: int) -> None:
    os.chmod(partial, mode)  # some libraries put a file in its place that only its owner may read
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())


def exists(path: Path) -> FileExistsError:
    """The error of a name that is taken."""
    return FileExistsError(17, "there is such a file already: choose another name or remove it", str(path))
