"""Prompts and their settings: one on the command line, or a file with one on each line.

    prompts.txt     a prompt per line
    prompts.jsonl   an object per line: {"prompt": "a house", "negative": "fog", "seed": 7, "steps": 20, "n": 4}

The keys of an object are the fields of the request and of `SamplingParams`, and the options of samplers. A key that is
missing, or null, has the value of the command line.

>>> lines("a house\\r\\n\\na\\u2028cat\\n")
[(1, 'a house'), (3, 'a\\u2028cat')]
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from sd.params import OPTIONS, HighRes, SamplingParams, TextToImage
from sd.request_json import hint_for

PROMPT_FILE_LIMIT = 16 << 20  # bytes
JSON_LINES = (".jsonl", ".ndjson")
# "--steps 20", and the short options with numbers of other tools: "-s 50"
OPTION = re.compile(r"(?:^|\s)(--[a-zA-Z][\w-]*|-[a-zA-Z](?=\s*-?\d))")

# builds the request of one prompt: make(prompt, params, negative=..., web_ui_prompts=..., clip_skip=...)
Make = Callable[..., TextToImage]


@dataclass(frozen=True)
class Line:
    """A prompt, its own settings, and where it is written: "file:line", or empty for one of the command line."""

    prompt: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def request(self, make: Make, params: SamplingParams, spacing: str | None = None) -> TextToImage:
        """The request of this line; `params` and `make` have the settings of the command line.

        spacing   as given on the command line, for lines with a sampler of their own

        Raises ValueError, with the place of the line, for unknown settings and values out of range.
        """
        kind: Any = make
        while hasattr(kind, "func"):  # functools.partial
            kind = kind.func
        if kind is TextToImage and "hires" in self.settings:
            kind, make = HighRes, partial(HighRes, **getattr(make, "keywords", {}))
        own = {f.name for f in fields(kind) if not f.metadata.get("image")} - {"prompt", "params"}
        shared = {f.name for f in fields(SamplingParams)} - {"options"}
        try:
            for name in self.settings:
                if name in ("image", "mask"):
                    raise ValueError(
                        f"{name!r} cannot be set in a line: give images as arguments of img2img or inpaint"
                    )
                if name == "controls":
                    raise ValueError("'controls' cannot be set in a line: give --control, for all lines")
                if name not in own | shared | OPTIONS.keys():
                    raise ValueError(f"{kind.kind} has no setting {name!r:.60}: {hint_for(name, own | shared)}")
            changed = {name: value for name, value in self.settings.items() if name in shared}
            if "sampler" in changed:  # the grid that came with the name of another sampler does not stay
                changed = {"spacing": spacing, **changed}
            options = {name: value for name, value in self.settings.items() if name in OPTIONS}
            params = replace(params, **changed, options={**params.options, **options})
            return make(self.prompt, params, **{n: value for n, value in self.settings.items() if n in own})
        except ValueError as error:
            raise self.at(error) from None

    def at(self, error: ValueError) -> ValueError:
        """The error with the place of this line in its message."""
        return ValueError(f"{self.where}: {error}") if self.where else error


def read_prompts(prompt: str | None, file: Path | None) -> list[Line]:
    """The prompt, or the lines of a UTF-8 file ("-" is standard input) that are not blank.

    Warns if a line of text contains what looks like options. Raises ValueError for a file that cannot be used.
    """
    if prompt is not None and file is not None:
        raise ValueError("give a prompt or --from-file, not both")
    if file is None:
        if prompt is None:
            raise ValueError("give a prompt, --from-file or --like")
        return [Line(prompt)]
    if str(file) == "-":
        if sys.stdin is None:
            raise ValueError("--from-file -: the standard input is closed: give the name of a file")
        raw = sys.stdin.buffer.read(PROMPT_FILE_LIMIT + 1)
    else:
        with open(file, "rb") as stream:
            raw = stream.read(PROMPT_FILE_LIMIT + 1)
    if len(raw) > PROMPT_FILE_LIMIT:
        raise ValueError(f"{file}: larger than {PROMPT_FILE_LIMIT >> 20} MB, too large for a list of prompts")
    found = lines(utf8_text(raw, file))
    if not found:
        raise ValueError(f"{file}: no prompts in it")
    if file.suffix.lower() in JSON_LINES:
        return [_json_line(text, f"{file}:{number}") for number, text in found]
    _warn_of_options(file, found)
    return [Line(text, where=f"{file}:{number}") for number, text in found]


def utf8_text(raw: bytes, name: Path) -> str:
    """The text of a file. Raises ValueError, with its name, if it is not UTF-8.

    Zero bytes are valid in UTF-8, but occur in UTF-16 and in files that are no text.
    """
    try:
        if b"\0" in raw:
            raise ValueError
        return raw.decode("utf-8-sig")
    except ValueError:  # UnicodeDecodeError is one
        raise ValueError(f"{name}: not UTF-8 text; save it as UTF-8") from None


def lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers, without spaces around them. Only LF and CRLF end a line.

    `str.splitlines` also splits at characters that occur within prompts: U+2028, vertical tabs, form feeds, NEL.
    """
    numbered = enumerate(text.split("\n"), start=1)
    return [(number, line.strip(" \t\r")) for number, line in numbered if line.strip()]


def _json_line(text: str, where: str) -> Line:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key {name!r:.60} occurs twice")
            found[name] = value
        return found

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at character {error.pos + 1}): {text:.60}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply: {text:.60}") from None
    except ValueError as error:
        long = "integer string conversion" in str(error)  # Python's limit
        raise ValueError(f"{where}: {'a number has too many digits' if long else error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise ValueError(
            f'{where}: expected an object with a prompt, {{"prompt": "a house", "seed": 7}}, got {text:.60}'
        )
    prompt = values.pop("prompt")
    return Line(prompt, {name: value for name, value in values.items() if value is not None}, where)


def _warn_of_options(file: Path, found: list[tuple[int, str]]) -> None:
    """Say that options in lines of text are text."""
    options = [(number, match[1]) for number, text in found if (match := OPTION.search(text))]
    objects = [number for number, text in found if re.match(r'(\[\s*)?\{\s*"|"[\w ]+"\s*:', text)]
    if options:
        number, option = options[0]
        more = f", and {len(options) - 1} more lines with options" if len(options) > 1 else ""
        warnings.warn(
            f"{file}:{number}: {option} is read as a part of the prompt{more}; settings for each line need a file that "
            'ends in .jsonl, with lines such as {"prompt": "a house", "steps": 20}',
            stacklevel=3,
        )
    elif objects:
        warnings.warn(f"{file}:{objects[0]}: JSON is read as text, unless the name ends in .jsonl", stacklevel=3)
