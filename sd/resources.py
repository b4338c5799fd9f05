"""Where the files that travel with the package lie: the tokenizer's table of merges, and the embedded model's files.

In a checkout they stand beside the package (`data/`, `weights/`); a built wheel carries them inside of it
(`sd/data/`, `sd/weights/`). Nothing else needs to know.

>>> resource(EMBEDDED).is_file() and resource(EMBEDDED_LORA).is_file()
True
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
EMBEDDED = "weights/pocket.safetensors"  # the model that comes with the project, ...
EMBEDDED_LORA = "weights/pocket-lcm.safetensors"  # ... and the LoRA with which it needs few steps (few_step.py)
EMBEDDED_CONTROLS = {"edges": "weights/pocket-edges.safetensors"}  # its control networks (controls.py)


def resource(name: str) -> Path:
    """The path of a bundled file or folder, for example `resource("data/bpe_simple_vocab_16e6.txt.gz")`.

    A file that is not there gives the path it would have in a checkout, so that a message can name it.
    """
    installed = PACKAGE / name
    return installed if installed.exists() else PACKAGE.parent / name
