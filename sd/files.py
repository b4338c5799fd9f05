"""Writing a new file whole or not at all, and never over another one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end of the `with` block its file gets the name `path`.

    Raises FileExistsError if there is a file of that name by then. If the block fails, nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(partial, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield partial
        os.chmod(partial, mode)  # some libraries put a file in its place that only its owner may read
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # unlike a rename, refuses to replace a file
        except FileExistsError:
            raise exists(path) from None
        except OSError:  # a file system without hard links
            if path.exists():
                raise exists(path) from None
            os.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def exists(path: Path) -> FileExistsError:
    """The error of a name that is taken."""
    return FileExistsError(17, "there is such a file already: choose another name or remove it", str(path))
