"""Where the files that travel with the package lie: the merges table of the tokenizer, the embedded model.

In a checkout they stand beside the package (`data/`, `weights/`); a built wheel carries them inside of it
(`sd/data/`, `sd/weights/`). Nothing else needs to know.

>>> resource("weights/pocket.safetensors").is_file()
True
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The path of a bundled file or folder, for example `resource("data/bpe_simple_vocab_16e6.txt.gz")`.

    A file that is not there gives the path it would have in a checkout, so that a message can name it.
    """
    installed = PACKAGE / name
    return installed if installed.exists() else PACKAGE.parent / name
