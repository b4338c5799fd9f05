"""Lets `python scripts/NAME.py` run from a bare checkout, installed or not, from any folder.

A file that is run by its path belongs to no package, so its relative imports would fail. Each program therefore begins

    if not __package__:
        import bootstrap

        __package__ = bootstrap.PACKAGE

which finds this file beside it, puts the checkout on the path, names the package that relative imports start from
(PEP 366), and prepares the process (common/streams.py) before the slow imports. Installed programs start in
installed.py instead.
"""

import sys
from importlib import import_module
from pathlib import Path

PACKAGE = "scripts"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import_module(f"{PACKAGE}.common.streams").start()
