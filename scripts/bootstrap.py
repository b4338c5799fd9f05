"""Lets `python scripts/NAME.py` run from a bare checkout, installed or not, from any folder.

A file that runs by its path belongs to no package, so its relative imports would fail. Each program therefore begins

    if not __package__:
        from bootstrap import PACKAGE

        __package__ = PACKAGE

which finds this file in the same folder, adds the checkout to the path, and sets the package that relative imports
start from (PEP 366). Installed programs run as modules and skip it.
"""

import sys
from importlib import import_module
from pathlib import Path

PACKAGE = "scripts"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import_module(PACKAGE)
