"""From a request as JSON to the request of the library: every mistake in it becomes one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from PIL import Image

from ...control_params import Control
from ...messages import one_line
from ...params import REQUESTS, SamplingParams, TextToImage
from ...request_json import from_dict, hint_for
from ...spellings import nearest
from ..incoming import image_of
from ..jobs import Work
from ..settings import ServerSettings
from .bodies import GenerateBody


def work_of(body: GenerateBody, settings: ServerSettings) -> Work:
    """What a body asks for. It decodes images: not to be called in the event loop. Raises ValueError, one line."""
    return Work(
        request_of(body.request, settings),
        body.model,
        tuple((lora.name, lora.weight) for lora in body.loras),
        body.vae,
        body.previews,
    )


def request_of(values: Mapping[str, Any], settings: ServerSettings) -> TextToImage:
    """The request in JSON values. Absent settings have the defaults of the library.

    Raises ValueError for settings that there are not, with the nearest that there is, for values that are out of
    range, and for images that are none or too large.
    """
    kind = values.get("kind", TextToImage.kind)
    if not isinstance(kind, str) or kind not in REQUESTS:
        raise ValueError(f"kind must be one of {', '.join(REQUESTS)}, got {kind!r:.100}")
    cls = REQUESTS[kind]
    shared = {f.name for f in fields(SamplingParams)}
    known = {f.name for f in fields(cls)}
    for name in values.keys() - known - {"kind"}:
        if name in shared:
            raise ValueError(f"{name} is a setting of params: write it there")
        raise ValueError(f"{kind} has no setting {one_line(name, 60)!r}: {_hint(name, known, shared)}")
    params = _object("params", values.get("params", {}))
    for name in params.keys() - shared:
        if name in known:
            raise ValueError(f"{name} is a setting of the request, not of params: write it beside params")
        raise ValueError(f"params has no setting {one_line(name, 60)!r}: {hint_for(name, shared)}")
    given = {**values, "kind": kind, "params": {**params, "options": _object("options", params.get("options", {}))}}
    if "image" in known and values.get("image") is None:
        raise ValueError(f"{kind} needs an image: send it as base64")
    given["controls"] = _controls(values.get("controls"))

    return from_dict(given, _reader(settings))


def controls_of(value: object, settings: ServerSettings) -> list[Control]:
    """The hints in JSON values. Raises ValueError, as `request_of`."""
    given = {"kind": TextToImage.kind, "controls": _controls(value)}
    return list(from_dict(given, _reader(settings)).controls)


def _reader(settings: ServerSettings) -> Callable[[Any, str], Image.Image]:
    def read(text: Any, name: str) -> Image.Image:
        return image_of(text if isinstance(text, str) else "", settings.max_image_pixels, name)

    return read


def _hint(name: str, known: set[str], shared: set[str]) -> str:
    near = nearest(name, known | shared)
    of_other_kinds = any(name in cls.__dataclass_fields__ for cls in REQUESTS.values())
    if near in shared and near not in known and not of_other_kinds:
        return f"did you mean {near!r} of params?"
    return hint_for(name, known)


def _object(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {value!r:.100}")
    return value


def _controls(value: object) -> list[Mapping[str, Any]]:
    """The hints, as objects that have only what a `Control` has."""
    if not isinstance(value, list | tuple | None):
        raise ValueError(f"controls must be a list, got {value!r:.100}")
    known = {f.name for f in fields(Control)}
    for control in value or ():
        for name in _object("a control", control).keys() - known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(sorted(known))}"
            raise ValueError(f"a control has no setting {one_line(name, 60)!r}: {hint}")
        if control.get("image") is None:
            raise ValueError("a control needs an image, the hint: send it as base64")
    return list(value or ())
