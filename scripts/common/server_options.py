"""The settings of the server from arguments, the environment and a file; the first that has one counts, in this order.

All of them are made of the fields of `ServerSettings`: `queue_per_client` is `--queue-per-client`,
SD_SERVER_QUEUE_PER_CLIENT, and "queue_per_client" in a file.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from sd.server.settings import ServerSettings

from .cli import Parser, file_path, say

PREFIX = "SD_SERVER_"
FILE = f"{PREFIX}SETTINGS"  # names the file
FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(ServerSettings)}
WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}
LARGEST_FILE = 1 << 20  # bytes of a file of settings


def kind_of(name: str) -> type:
    """bool, int, float, str, Path, or tuple for several texts: what the values of a setting are."""
    hint = typing.get_type_hints(ServerSettings)[name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return tuple if typing.get_origin(hint) is not None and len(typing.get_args(hint)) == 1 else kinds[0]


def help_of(name: str) -> str:
    """The help text of a setting, with its default."""
    default: Any = FIELDS[name].default
    text: str = FIELDS[name].metadata["help"]
    if default is None or default == () or kind_of(name) is bool:
        return re.sub(r"[;,] None(:| is) ", "; by default ", text)
    shown = f"{default:,}" if kind_of(name) is int and default > 99_999 else default
    return f"{text} (default: {shown})"


def add_server_arguments(parser: Parser) -> None:
    """An option for each setting. Its value is None unless it is given."""
    metavars = {int: "N", float: "SECONDS", str: "TEXT", tuple: "NAMES", Path: "PATH"}
    for name in FIELDS:
        option, kind, words = f"--{name.replace('_', '-')}", kind_of(name), help_of(name)
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=words)
        elif kind is tuple:
            parser.add_argument(option, metavar="A,B,...", help=words)
        elif kind is Path:
            parser.add_argument(option, type=file_path, metavar=metavars[kind], help=words)
        else:
            parser.add_argument(option, type=kind, metavar=metavars[kind], help=words)


def read_settings(
    args: argparse.Namespace, environment: Mapping[str, str], defaults: Mapping[str, Any]
) -> ServerSettings:
    """The settings of arguments, environment, a file, and else `defaults`.

    The file is that of `args.settings`, or of the variable SD_SERVER_SETTINGS. Raises ValueError, one line that says
    where the value comes from, and OSError for a file that cannot be read.
    """
    found = dict(defaults)
    file = args.settings or (file_path(text) if (text := environment.get(FILE)) else None)
    if file is not None:
        found |= from_file(file)
    found |= from_environment(environment)
    for name in FIELDS:
        if (value := getattr(args, name)) is not None:
            found[name] = checked(name, value, f"--{name.replace('_', '-')}")
    return ServerSettings(**found)


def checked(name: str, value: Any, source: str) -> Any:
    """A value as the setting keeps it. Raises ValueError, with the source, if the setting does not accept it."""
    kind, check = kind_of(name), FIELDS[name].metadata["check"]
    if kind is str and not isinstance(value, str):
        raise ValueError(f"{source}: expected a text, got {type(value).__name__}")
    try:
        return value if check is None else check(name, value)
    except (ValueError, TypeError) as error:
        message = str(error) if isinstance(error, ValueError) else f"{name} has a value of a wrong type"
        raise ValueError(f"{source}: {message}") from None


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings in the variables SD_SERVER_... that are not empty. One that is no setting is a warning: services
    set such variables, too."""
    found: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable == FILE or not text:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in FIELDS:
            say(f"{variable} is no setting of the server{nearest(name, PREFIX, upper=True)}")
            continue
        found[name] = checked(name, from_text(name, text, variable), variable)
    return found


def from_text(name: str, text: str, source: str) -> Any:
    """The value of a setting that is written as a text."""
    kind = kind_of(name)
    if kind is bool:
        if text.lower() not in WORDS:
            raise ValueError(f"{source}: expected true or false, got {text[:50]!r}")
        return WORDS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(
                f"{source}: expected a {'whole ' if kind is int else ''}number, got {text[:50]!r}"
            ) from None
    return text


def from_file(path: Path) -> dict[str, Any]:
    """The settings in a JSON or TOML file. Relative paths in it start from its folder."""
    with path.open("rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path}: too large for a file of settings")
    given = _parsed(path, data)
    if not isinstance(given, dict):
        raise ValueError(f'{path}: expected an object of settings, such as {{"port": 7860}}')
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in FIELDS:
            raise ValueError(f"{path}: {key[:50]!r} is no setting of the server{nearest(name, '')}")
        if value is None:
            continue
        value = checked(name, value, str(path))
        found[name] = path.parent / value if isinstance(value, Path) else value
    return found


def _parsed(path: Path, data: bytes) -> Any:
    """The content of the file. Raises ValueError if it is neither JSON nor, by its ending, TOML."""
    try:
        text = data.decode("utf-8-sig")
        if path.suffix.lower() != ".toml":
            return json.loads(text)
        try:
            import tomllib
        except ModuleNotFoundError:
            raise ValueError("TOML needs Python 3.11 or newer: write the settings as JSON") from None
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def nearest(name: str, prefix: str, upper: bool = False) -> str:
    """What was meant, as the end of a message; empty if nothing is close."""
    near = difflib.get_close_matches(name, FIELDS, 1, 0.6)
    return f": did you mean {prefix}{near[0].upper() if upper else near[0]}?" if near else ""
