"""The JSON Schema of requests, made from the fields of the dataclasses in params.py: names, types, ranges, meanings.

>>> schema = request_schema(TextToImage)
>>> schema["properties"]["params"]["properties"]["steps"]["minimum"], schema["additionalProperties"]
(1, False)
>>> [each["properties"]["kind"]["const"] for each in any_request()["anyOf"]]
['txt2img', 'hires', 'img2img', 'inpaint']
"""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, fields
from typing import Any

from ...control_params import MAX_CONTROLS, Control
from ...params import OPTIONS, REQUESTS, SamplingParams, TextToImage
from ...samplers import SAMPLERS
from ...settings import OneOf, Range, whole

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TYPES = {"int": "integer", "float": "number", "bool": "boolean"}  # of Python -> of JSON; all others are texts
IMAGE = "PNG, JPEG, WebP, GIF, BMP or TIFF, as base64 or as a data: URL"
TEXTS = {  # what may be several texts or contexts in Python
    "prompt": "what the image shows",
    "negative": "what to steer away from. No effect at guidance 1, except with AND",
    "prompt_2": "SDXL: what its second text encoder reads in place of the prompt",
}
Schema = dict[str, Any]


def request_schema(kind: type[TextToImage]) -> Schema:
    """The schema of one kind of request."""
    properties: dict[str, Schema] = {"kind": {"type": "string", "const": kind.kind}}
    required = []
    for f in fields(kind):
        if f.name == "params":
            properties[f.name] = _object(_own(SamplingParams) | {"options": _options()})
        elif f.name == "controls":
            hints = _object(_own(Control), required=["name", "image"])
            properties[f.name] = {"type": "array", "items": hints, "maxItems": MAX_CONTROLS} | _help(f)
        elif f.metadata.get("image"):
            properties[f.name] = _of(f)
            if not str(f.type).endswith("None"):
                required.append(f.name)
        else:
            properties[f.name] = _of(f)
    if kind is not TextToImage:
        required.insert(0, "kind")
    return _object(properties, required) | {"title": kind.kind, "description": (kind.__doc__ or "").split("\n")[0]}


def any_request() -> Schema:
    """The schema of a request of any kind."""
    return {"anyOf": [request_schema(kind) for kind in REQUESTS.values()]}


def document() -> Schema:
    """The same as a document of its own."""
    return {"$schema": DIALECT, "title": "A request of sd", **any_request()}


def _own(cls: type) -> dict[str, Schema]:
    """The properties for the settings of a dataclass."""
    return {f.name: _of(f) for f in fields(cls) if f.name != "options"}


def _options() -> Schema:
    """The options of samplers."""
    found = {
        name: {
            "type": "integer" if isinstance(option.default, int) else "number",
            "minimum": option.low,
            "maximum": option.high,
            "description": f"{option.help}; of {', '.join(k for k, s in SAMPLERS.items() if name in s.options)}",
        }
        for name, option in OPTIONS.items()
    }
    return _object(found) | {"description": "of the sampler"}


def _of(f: Field[Any]) -> Schema:
    """The schema of one setting."""
    check = f.metadata.get("check")
    names = str(f.type).split(" | ")
    found: Schema = {"type": next((TYPES[name] for name in names if name in TYPES), "string")}
    if isinstance(check, Range):
        found["type"] = "integer" if check.kind is whole else "number"
        found["minimum"] = check.low
        if check.high < math.inf:
            found["maximum"] = check.high
    elif isinstance(check, OneOf):
        found["enum"] = list(check.known)
    elif f.metadata.get("image"):
        found |= {"contentEncoding": "base64", "minLength": 1}
    if "None" in names:
        found["type"] = [found["type"], "null"]
        if "enum" in found:
            found["enum"].append(None)
    if not f.metadata.get("image") and isinstance(f.default, str | int | float | None) and f.default is not MISSING:
        found["default"] = f.default
    help = _help(f)
    if f.metadata.get("image"):
        help["description"] = f"{help.get('description', '')}; {IMAGE}".lstrip("; ")
    return found | help


def _help(f: Field[Any]) -> Schema:
    if f.name in TEXTS:
        return {"description": TEXTS[f.name]}
    return {"description": f.metadata["help"]} if "help" in f.metadata else {}


def _object(properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})
