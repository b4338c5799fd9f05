"""Requests as JSON, and hints for settings that a request does not have.

>>> from sd.params import TextToImage
>>> from_dict(to_dict(TextToImage("a house"))) == TextToImage("a house")
True
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from PIL import Image
from torch import Tensor

from .control_params import Control
from .params import OPTIONS, REQUESTS, HighRes, SamplingParams, TextToImage
from .spellings import OURS, nearest, snake_case


def to_dict(request: TextToImage) -> dict[str, Any]:
    """The request as JSON values, images as PNG in base64. Raises ValueError if a prompt is not text."""
    for name in ("prompt", "negative"):
        if isinstance(getattr(request, name), Tensor):
            raise ValueError(f"a request cannot be serialised if its {name} is a context and not a text")
    found: dict[str, Any] = {"kind": request.kind}
    for f in fields(request):
        value = getattr(request, f.name)
        if isinstance(value, SamplingParams):
            value = {g.name: getattr(value, g.name) for g in fields(SamplingParams)}
        elif isinstance(value, Image.Image):
            value = _png(value)
        elif f.name == "controls":
            value = [
                {**{g.name: getattr(each, g.name) for g in fields(each)}, "image": _png(each.image)} for each in value
            ]
        elif isinstance(value, tuple):
            value = list(value)
        found[f.name] = value
    return found


def _png(image: Image.Image) -> str:
    """An image as PNG in base64."""
    buffer = io.BytesIO()
    in_png = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
    (image if in_png else image.convert("RGB")).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _image(text: str, name: str) -> Image.Image:
    """The image that `_png` serialised."""
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]).copy()


def hint_for(name: str, known: Collection[str]) -> str:
    """A hint for a setting that a request does not have: what to write in its place."""
    usual = OURS.get(snake_case(name), snake_case(name))
    if usual.startswith("hires_") and usual in HighRes.__dataclass_fields__:
        return "it goes with hires"
    kinds = [kind for kind, cls in REQUESTS.items() if usual in cls.__dataclass_fields__]
    if kinds and usual not in {"params", *known}:
        return f"it is a setting of {'txt2img' if kinds == [HighRes.kind] else ' and '.join(kinds)}"
    if near := nearest(name, {"prompt", *known, *OPTIONS}):
        return f"did you mean {near!r}?"
    return f"it has {', '.join(sorted({*known, *OPTIONS}))}"


def from_dict(values: Mapping[str, Any], read: Callable[[str, str], Image.Image] = _image) -> TextToImage:
    """The request that `to_dict` serialised. Raises ValueError for anything else: it may come from a file.

    read   (what stands for an image, name of its setting) -> the image
    """
    try:
        kind = REQUESTS[values["kind"]]
        given = {name: value for name, value in values.items() if name != "kind"}
        given["params"] = SamplingParams(**given.get("params", {}))
        for name in (f.name for f in fields(kind) if f.metadata.get("image")):
            if given.get(name) is not None:
                given[name] = read(given[name], name)
        if given.get("controls"):
            given["controls"] = [
                Control(**{**each, "image": read(each["image"], "image of a control")}) for each in given["controls"]
            ]
        return kind(**given)
    except (TypeError, KeyError, AttributeError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a request: {error!s:.200}") from None
