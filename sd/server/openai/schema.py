"""The JSON Schema of this interface: OpenAI's parameters, and ours from params.py."""

from __future__ import annotations

from typing import Any

from ...params import HighRes, ImageToImage, Inpaint, TextToImage
from ..native.schema import request_schema
from .parameters import FORMATS, MOST_IMAGES, MOST_PARTIALS, NO_EFFECT

Schema = dict[str, Any]
KINDS: dict[str, tuple[type[TextToImage], ...]] = {
    "generation": (HighRes,),
    "edit": (ImageToImage, Inpaint),
    "variation": (ImageToImage,),
}
FILE: Schema = {"type": "string", "format": "binary"}
REFERENCE: Schema = {"type": "object", "properties": {"image_url": {"type": "string", "description": "a data: URL"}}}
THEIRS: Schema = {
    "prompt": {"type": "string"},
    "model": {"type": "string", "description": "a name of GET /v1/models; OpenAI's names mean the current one"},
    "n": {"type": "integer", "minimum": 1, "maximum": MOST_IMAGES},
    "size": {"type": "string", "description": 'WIDTHxHEIGHT in multiples of 8, or "auto"', "examples": ["512x512"]},
    "response_format": {"enum": ["b64_json", "url"], "description": "url: a data: URL"},
    "output_format": {"enum": list(FORMATS)},
    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
    "stream": {"type": "boolean"},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": MOST_PARTIALS},
    **{name: {"type": "string", "description": "no effect"} for name in NO_EFFECT},
}


def body_schema(task: str, media_type: str) -> Schema:
    """The schema of the body of "generation", "edit" or "variation"."""
    found = dict(THEIRS)
    if task == "variation":
        for name in ("prompt", "stream", "partial_images"):
            del found[name]
    for kind in KINDS[task]:
        properties = request_schema(kind)["properties"]
        params = properties["params"]["properties"]
        more = {**properties, **params, **params["options"]["properties"]}
        for name in ("kind", "params", "options", "prompt", "n", "image", "mask"):
            more.pop(name, None)
        found |= more
    found["loras"] = {"type": "object", "additionalProperties": {"type": "number"}}
    found["vae"] = {"type": "string"}
    required = [] if task == "variation" else ["prompt"]
    if task != "generation" and media_type == "application/json":
        found |= {"images": {"type": "array", "items": REFERENCE, "minItems": 1, "maxItems": 1}, "mask": REFERENCE}
        required.append("images")
    elif task != "generation":
        found |= {"image": FILE, **({"mask": FILE} if task == "edit" else {})}
        required.append("image")
    return {"type": "object", "properties": found, "required": required, "additionalProperties": False}


def images_schema() -> Schema:
    """The schema of an answer."""
    texts = {name: {"type": "string"} for name in ("b64_json", "url")}
    image = {"type": "object", "properties": {**texts, "seed": {"type": "integer"}}}
    return {
        "type": "object",
        "properties": {
            "created": {"type": "integer"},
            "data": {"type": "array", "items": image},
            "size": {"type": "string"},
            "output_format": {"enum": list(FORMATS)},
            "background": {"const": "opaque"},
            "usage": {"type": "object"},
            "model": {"type": "string"},
            "notes": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["created", "data"],
    }
