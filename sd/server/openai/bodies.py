"""Reading the body of a request: JSON, or a form with files, as parameters and images.

A form has texts for all values. Lists and objects are written as JSON, or as the SDK writes them: `loras[style]=0.8`
is {"loras": {"style": "0.8"}}, and `a[]=1` with `a[]=2` is {"a": ["1", "2"]}.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from ...params import OPTIONS, SamplingParams
from ...recipes.fields import value_of
from ..http import Gone, engine_of
from .errors import KINDS, Invalid

MOST_FILES, MOST_FIELDS = 17, 300  # OpenAI's models take 16 images and a mask
FILES = ("image", "mask")
WHOLE = ("n", "output_compression", "partial_images")
NAME = re.compile(r"([^][]{1,100})((?:\[[^][]{0,100}\]){0,3})")
JSON = "application/json"
FORM = "multipart/form-data"


class Body(NamedTuple):
    """What was sent: parameters as JSON values, and images as bytes or as texts in base64, by name."""

    values: dict[str, Any]
    images: dict[str, list[bytes | str]]


async def read(request: Request, *types: str) -> Body:
    """The body of a request of one of these media types.

    Raises Invalid for another type and for what cannot be read, and Gone if the client went away meanwhile.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in types:
        raise Invalid(f"the Content-Type must be {' or '.join(types)}, got {given[:100]!r}", status=415)
    try:
        return await (_form(request) if given == FORM else _json(request))
    except ClientDisconnect:
        raise Gone from None


async def _json(request: Request) -> Body:
    data = await request.body()
    try:
        values = await asyncio.to_thread(json.loads, data)
    except (ValueError, RecursionError):
        raise Invalid("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        raise Invalid("the body must be a JSON object")
    images = _listed("images", values.pop("images", None)) + _listed("image", values.pop("image", None))
    mask = _listed("mask", values.pop("mask", None))
    found = {"image": images, "mask": mask}
    return Body(
        {name: value for name, value in values.items() if value is not None},
        {name: given for name, given in found.items() if given},
    )


def _listed(name: str, value: Any) -> list[bytes | str]:
    """References to images in JSON, {"image_url": "data:..."}, or the images in base64."""
    found: list[bytes | str] = []
    for each in [] if value is None else value if isinstance(value, list) else [value]:
        if isinstance(each, Mapping) and each.get("file_id") is not None:
            raise Invalid("this server keeps no files: send the image as image_url with a data: URL", name)
        text = each.get("image_url") if isinstance(each, Mapping) else each
        if not isinstance(text, str):
            raise Invalid(f'{name} must be {{"image_url": "data:image/png;base64,..."}}', name)
        found.append(text)
    return found


async def _form(request: Request) -> Body:
    limit = engine_of(request).settings.max_body
    images: dict[str, list[bytes | str]] = {}
    texts: list[tuple[str, str]] = []
    async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=limit) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if name in FILES:
                images.setdefault(name, []).append(await value.read() if isinstance(value, UploadFile) else value)
            elif isinstance(value, UploadFile):
                raise Invalid(f"{name[:60]!r} is no parameter for a file: there are image and mask", name[:60])
            else:
                texts.append((key, value))
    return Body({name: typed(name, value) for name, value in nested(texts).items()}, images)


def nested(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The values of a form: lists and objects from the brackets in their names. Empty ones are left out.

    >>> nested([("n", "2"), ("loras[style]", "0.8"), ("a[]", "1"), ("a[]", "2"), ("b[][x]", "1"), ("b[][x]", "2")])
    {'n': '2', 'loras': {'style': '0.8'}, 'a': ['1', '2'], 'b': [{'x': '1'}, {'x': '2'}]}
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if value in ("", "null") and key not in ("prompt", "negative"):
            continue
        match = NAME.fullmatch(key)
        if match is None:
            raise Invalid(f"the name {key[:60]!r} cannot be read")
        path = re.findall(r"\[([^][]*)\]", match[2])
        _put(found, match[1], path, value, key)
    return found


def _put(found: dict[str, Any], name: str, path: list[str], value: str, key: str) -> None:
    """Put a value at a[path][path] of an object."""
    if not path:
        found[name] = value
        return
    first, rest = path[0], path[1:]
    inner: Any = found.setdefault(name, [])
    if first and inner == []:
        inner = found[name] = {}
    wanted: type[Any] = dict if first else list
    if not isinstance(inner, wanted):
        raise Invalid(f"{key[:60]!r} is both a list and an object, or a value", name[:60])
    if first:
        _put(inner, first, rest, value, key)
    elif not rest:
        inner.append(value)
    else:
        if not inner or not isinstance(inner[-1], dict) or rest[0] in inner[-1]:
            inner.append({})
        _put(inner[-1], rest[0], rest[1:], value, key)


def typed(name: str, value: Any) -> Any:
    """The value of a form as JSON has it. Raises Invalid for one of another type."""
    if not isinstance(value, str):
        return value
    if name in ("loras", "controls", "options") or (value[:1] in "[{" and name not in ("prompt", "negative")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise Invalid(f"{name} is not valid JSON", name) from None
    if name == "stream":
        if value.lower() not in ("true", "false"):
            raise Invalid(f"stream must be true or false, got {value[:50]!r}", name)
        return value.lower() == "true"
    kind = next((kind for kind in KINDS if name in {f.name for f in fields(kind)}), SamplingParams)
    try:
        if name in WHOLE:
            return value_of(SamplingParams, "n", value)
        if name in OPTIONS or name in {f.name for f in fields(kind)}:
            return value_of(kind, name, value)
    except ValueError as error:
        raise Invalid(f"{name}: {error}", name) from None
    return value
