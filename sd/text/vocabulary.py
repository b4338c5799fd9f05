"""CLIP's table of 49,408 tokens, and the files that it comes in. What they are for: tokenizer.py.

By id:

    0 .. 255        one byte inside a word: the 188 printable ones of Latin-1 first, then the other 68
    256 .. 511      the same bytes at the end of a word
    512 .. 49405    the 48,894 merges in their order, so that the id of a merge is also its rank
    49406, 49407    <|startoftext|>, <|endoftext|>

The table writes every byte as a visible character: a printable one as itself, the n-th of the others as U+0100 + n.

>>> SYMBOLS[0], SYMBOLS[-1], "".join(SYMBOLS[BYTE_IDS[byte]] for byte in "café".encode())
('!', 'Ń', 'cafÃ©')
"""

from __future__ import annotations

import gzip
import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

MERGES = 48894
MERGES_CRC32 = 0x3FC60DFD  # of the merges' lines, joined by "\n": the same in OpenAI's and in Hugging Face's file
END_OF_WORD = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = bytes(PRINTABLE + sorted(set(range(256)) - set(PRINTABLE)))  # id -> byte
BYTE_IDS = bytes(BYTES.index(byte) for byte in range(256))  # byte -> id, in the form bytes.translate takes
SYMBOLS = [chr(byte) if i < len(PRINTABLE) else chr(0x100 + i - len(PRINTABLE)) for i, byte in enumerate(BYTES)]
BYTE_OF_SYMBOL = dict(zip(SYMBOLS, BYTES, strict=True))

MAX_FILE = 1 << 21  # bytes read of a file: vocab.json has 1 MB, and CLIP's merges end after 0.5 MB of OpenAI's 3.2


class Tables(NamedTuple):
    """The vocabulary as a tokenizer uses it."""

    tokens: list[str]  # by id, as the table writes them; 49,408 entries
    vocab: dict[str, int]  # token -> id, in the order of the ids
    merges: dict[int, int]  # left id << 16 | right id -> id of the two together


def read_tables(path: Path) -> Tables:
    """The tables of a merges file, or of a folder with vocab.json and merges.txt. Raises as `read_merges` does."""
    left, right = read_merges(path / "merges.txt" if path.is_dir() else path)
    tokens = [*SYMBOLS, *(s + END_OF_WORD for s in SYMBOLS), *map(str.__add__, left, right), *SPECIAL]
    vocab = {token: i for i, token in enumerate(tokens)}
    if path.is_dir():
        check_vocab(path / "vocab.json", vocab)
    # A pair is one integer: this many tuples would trigger a full garbage collection, which takes longest of all.
    merges = {vocab[a] << 16 | vocab[b]: 512 + i for i, (a, b) in enumerate(zip(left, right, strict=True))}
    return Tables(tokens, vocab, merges)


@lru_cache(maxsize=1)
def bundled_tables(path: Path) -> Tables:
    """`read_tables`, once: for the file that comes with the package. Callers share the tables and leave them alone."""
    return read_tables(path)


def read_merges(path: Path) -> tuple[list[str], list[str]]:
    """The left and the right halves of the merges in a file, plain or .gz.

    Both OpenAI's file, which continues after the merges, and Hugging Face's start with a version line, followed by
    "left right" on each line. Raises FileNotFoundError if there is no file, ValueError if it does not hold CLIP's.
    """
    lines = _read(path, "merges").replace(b"\r\n", b"\n").split(b"\n", 1 + MERGES)[1 : 1 + MERGES]
    table = b"\n".join(lines)
    if zlib.crc32(table) != MERGES_CRC32:
        found = f"{len(lines):,} merges" if len(lines) < MERGES else "other merges"
        raise ValueError(f"{path} is not CLIP's table: it holds {found}, expected CLIP's {MERGES:,} after a first line")
    symbols = table.decode().replace("\n", " ").split(" ")
    return symbols[::2], symbols[1::2]


def check_vocab(path: Path, vocab: dict[str, int]) -> None:
    """Raise ValueError if a vocab.json is not this table, FileNotFoundError if there is none."""
    try:
        found = json.loads(_read(path, "vocabulary"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not CLIP's vocabulary: it cannot be read as JSON") from None
    if found == vocab:
        return
    if not isinstance(found, dict) or len(found) != len(vocab):
        size = f"{len(found):,} entries" if isinstance(found, dict) else "no table"
        raise ValueError(f"{path} is not CLIP's vocabulary: it holds {size}, expected {len(vocab):,}")
    token = next(token for token in vocab if found.get(token) != vocab[token])
    raise ValueError(
        f"{path} does not fit merges.txt: token {token!r} has id {found.get(token)}, expected {vocab[token]}"
    )


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return (gzip.GzipFile(fileobj=file) if zipped else file).read(MAX_FILE)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no {what} file at {path}: expected CLIP's bpe_simple_vocab_16e6.txt.gz (see data/README.md), "
            "or a folder with vocab.json and merges.txt"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read the {what} file {path}: {error}") from None
