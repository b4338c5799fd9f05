"""The captions of the images in a folder, in the usual formats.

    metadata.jsonl                             {"file_name": "a.png", "text": "a caption"}, as Hugging Face has it
    meta*.json                                 {"a": {"caption": "a caption", "tags": "one, two"}}, as kohya's scripts
                                               write it: keys are paths or names, with or without a suffix
    name.txt or name.caption beside name.png   one caption per line; a random one is used each time
    10_name/a.png                              the name of the folder, as kohya's scripts use it

The first of these that an image has is used.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sd.imaging.files import SUFFIXES
from sd.messages import one_line

from ..common.prompts import utf8_text

CAPTIONS, METADATA = (".txt", ".caption"), "metadata.jsonl"
KOHYA = re.compile(r"meta.*\.json", re.IGNORECASE)  # meta_cap.json, meta_clean.json, meta_lat.json, metadata.json
# Up to three digits: a folder 2024_summer is not one whose images are to be shown 2024 times
REPEATED = re.compile(r"(\d{1,3})_(.+)")


def read_lines(path: Path) -> list[str]:
    """All lines of a text file; none if the file is missing. Raises ValueError if it is not UTF-8."""
    # not splitlines: captions may contain the other separators of Unicode
    text = utf8_text(path.read_bytes(), path) if path.is_file() else ""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if text else []


def beside(image: Path) -> list[str]:
    """The captions in the text file beside an image."""
    for suffix in CAPTIONS:
        if found := [line.strip() for line in read_lines(image.with_suffix(suffix)) if line.strip()]:
            return found
    return []


def of_folder_name(image: Path, root: Path) -> tuple[int, str] | None:
    """Repeats and caption that the name of a folder between `root` and the image gives, the nearest one; or None."""
    for folder in image.parents:
        if found := REPEATED.fullmatch(folder.name):
            return int(found[1]), found[2].strip()
        if folder == root:
            break
    return None


def listed_captions(files: Sequence[Path], images: Sequence[Path]) -> dict[Path, list[str]]:
    """The captions in the metadata files among `files`, by the resolved path of the image.

    Raises ValueError for a file that cannot be understood, and for images of metadata.jsonl that do not exist.
    """
    found: dict[Path, list[str]] = {}
    for path in files:
        if path.name == METADATA:
            for image, entry in metadata_entries(path):
                captions = found.setdefault(image, [])
                captions += [text] if (text := entry["text"].strip()) else []
    known = {path.resolve() for path in images}
    gone = [image for image in found if image not in known]
    if gone:
        folder = next(path.parent for path in files if path.name == METADATA)
        raise ValueError(f"{folder}: {len(gone)} images of {METADATA} are missing, first {gone[0]}")
    return _kohya(files, images) | {image: captions for image, captions in found.items() if captions}


def metadata_entries(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The images of a metadata.jsonl with their entries. Raises ValueError for a line without file_name and text."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str) or "\0" in name:
            raise ValueError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}, got {line:.80}')
        yield (path.parent / name).resolve(), entry


def _kohya(files: Sequence[Path], images: Sequence[Path]) -> dict[Path, list[str]]:
    """The captions in kohya's metadata. Of several files for an image, the later ones by name have the last word.

    Its tools write meta_cap.json, meta_cap_dd.json, meta_clean.json and meta_lat.json one after the other.
    """
    merged: dict[Path, dict[str, str]] = {}
    for path in files:
        if not KOHYA.fullmatch(path.name):
            continue
        names = _names(path.parent, images)
        entries = _kohya_entries(path)
        lost = []
        for key, entry in entries.items():
            image = names.get(key) or names.get(Path(key).name) or names.get(_stem(Path(key).name))
            if image is None:
                lost.append(key)
            else:
                merged.setdefault(image, {}).update(entry)
        if lost:
            first = one_line(lost[0])
            warnings.warn(f"{path}: {len(lost)} of {len(entries)} images are missing, first {first}", stacklevel=4)
    captions = {image: [", ".join(entry[key] for key in sorted(entry))] for image, entry in merged.items()}
    return {image: found for image, found in captions.items() if found[0]}


def _kohya_entries(path: Path) -> dict[str, dict[str, str]]:
    """Name -> its caption and tags, those that are not empty; both are used, first the caption, as kohya does."""
    try:
        stored = json.loads(utf8_text(path.read_bytes(), path))
    except RecursionError:
        stored = None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {one_line(error)}") from None
    stored = stored if isinstance(stored, dict) else {}
    entries = {
        name: {key: text.strip() for key in ("caption", "tags") if isinstance(text := entry.get(key), str)}
        for name, entry in stored.items()
        if isinstance(entry, dict) and ("caption" in entry or "tags" in entry)
    }
    if not entries:
        warnings.warn(f'{path}: not used: no captions in it ({{"name": {{"caption": "..."}}}})', stacklevel=5)
    return {name: {key: text for key, text in entry.items() if text} for name, entry in entries.items()}


def _names(folder: Path, images: Sequence[Path]) -> dict[str, Path]:
    """What an image below a folder may be called: its path from there or its name alone, both with or without suffix.

    The path comes first; a name that several images have is left out.
    """
    paths, names = dict[str, Path](), dict[str, list[Path]]()
    for image in images:
        resolved = image.resolve()
        paths[str(image)] = resolved
        if image.is_relative_to(folder):
            below = image.relative_to(folder).as_posix()
            paths |= {below: resolved, _stem(below): resolved}
            for name in {image.name, image.stem}:
                names.setdefault(name, []).append(resolved)
    return {name: found[0] for name, found in names.items() if len(found) == 1} | paths


def _stem(name: str) -> str:
    """A name without the suffix of an image."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name
