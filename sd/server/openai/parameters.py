"""From the parameters of OpenAI's interface, and settings of ours beside them, to work for the queue.

theirs     prompt, model, n, size, response_format, output_format, output_compression, stream, partial_images
no effect  quality, style, background and others: they choose what a Stable Diffusion has no choice of
ours       the settings of params.py by their names: steps, seed, guidance, negative, strength, web_ui_prompts, ...;
           loras ({"name": weight}, or as in /api/generate) and vae
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from PIL import Image, ImageChops

from ...messages import one_line
from ...params import OPTIONS, HighRes, ImageToImage, Inpaint, SamplingParams, TextToImage
from ...request_json import hint_for
from ...settings import number
from ..catalogue import Kind, UnknownName
from ..engine import Engine
from ..incoming import image_of
from ..jobs import Work
from ..limits import MOST_LORAS
from ..native.models import loaded_model
from ..native.requests import controls_of
from .bodies import Body
from .errors import Invalid

MOST_IMAGES = 10
MOST_PARTIALS = 3
FORMATS = ("png", "jpeg", "webp")
THEIRS = (
    "prompt", "model", "n", "size", "response_format", "output_format", "output_compression", "stream",
    "partial_images",
)  # fmt: skip
NO_EFFECT = (
    "quality", "style", "background", "moderation", "user", "safety_identifier", "input_fidelity", "complexity",
)  # fmt: skip
ELSEWHERE = ("svg", "frame_count", "frame_duration_ms", "markup")  # for what this server does not make
APART = {"params", "options", "prompt", "n", "image", "mask"}
THEIR_MODELS = re.compile(r"dall-e-\d|(?:chat)?gpt-image-[\w.-]*")  # sent by clients that offer no choice of model
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
NEARLY = 20  # of 255: an alpha of 235 and more is opaque
USUAL_STEPS = 20  # to space partial images by, if the model is not loaded yet
SEEDS = 2**32  # random ones are below: JavaScript has no exact integers above 2^53


class Asked(NamedTuple):
    """What a client asks for."""

    works: list[Work]
    prompt: str
    size_in: tuple[int, int] | None  # of the image sent
    output_format: str = "png"
    quality: int = 100  # of JPEG and WebP
    as_url: bool = False
    stream: bool = False
    partials: int = 0


def generation(body: Body, engine: Engine) -> Asked:
    """POST /v1/images/generations. As all of these: not to be called in the event loop."""
    if body.images:
        raise Invalid("generations take no image: use /v1/images/edits", next(iter(body.images)))
    cls = HighRes if "hires" in body.values else TextToImage
    return _asked(body.values, cls, {}, engine)


def edit(body: Body, engine: Engine) -> Asked:
    """POST /v1/images/edits: the transparent pixels of the mask are painted anew, or else those of the image; without
    any, the whole image is."""
    image, mask = _image(body, engine), None
    if given := body.images.get("mask"):
        mask = image_of(given[0], engine.settings.max_image_pixels, "mask")
        if mask.size != image.size:
            sizes = f"the mask has {mask.width}x{mask.height} pixels, the image {image.width}x{image.height}"
            raise Invalid(f"{sizes}: they must be the same", "mask")
    masked = image if mask is None else mask
    hole = None
    if masked.mode == "RGBA":
        hole = ImageChops.invert(masked.getchannel("A")).point([0] * NEARLY + [*range(NEARLY, 256)])
    if mask is not None and (hole is None or hole.getbbox() is None):
        raise Invalid("the mask has no transparent pixels: make transparent what is to be painted anew", "mask")
    if hole is None or hole.getbbox() is None:
        return _asked(body.values, ImageToImage, {"image": image}, engine)
    return _asked(body.values, Inpaint, {"image": image.convert("RGB"), "mask": hole}, engine)


def variation(body: Body, engine: Engine) -> Asked:
    """POST /v1/images/variations: image to image without a prompt."""
    for name in ("prompt", "mask", "stream", "partial_images"):
        if name in body.values or name in body.images:
            raise Invalid(f"variations have no {name}: use /v1/images/edits", name)
    return _asked({**body.values, "prompt": ""}, ImageToImage, {"image": _image(body, engine)}, engine)


def _image(body: Body, engine: Engine) -> Image.Image:
    given = body.images.get("image", [])
    if not given:
        raise Invalid("image is missing: the image to start from", "image")
    if len(given) > 1:
        raise Invalid(f"{len(given)} images: this server starts from one", "image")
    return image_of(given[0], engine.settings.max_image_pixels)


def _asked(values: Mapping[str, Any], cls: type[TextToImage], images: dict[str, Image.Image], engine: Engine) -> Asked:
    """The work for one kind of request."""
    _check_names(values, cls)
    prompt = values.get("prompt")
    if not isinstance(prompt, str):
        raise Invalid("prompt is missing: a text that describes the image", "prompt")
    n = _whole(values, "n", 1, 1, min(MOST_IMAGES, engine.settings.max_images))
    ours = {name: value for name, value in values.items() if name not in (*THEIRS, *NO_EFFECT, "loras", "vae")}
    width, height = _size(values.get("size"))
    if width is not None:
        if {"width", "height"} & ours.keys():
            raise Invalid("size and width or height exclude each other", "size")
        ours |= {"width": width, "height": height}
    ours.setdefault("seed", secrets.randbelow(SEEDS))
    if "controls" in ours:
        ours["controls"] = controls_of(ours["controls"], engine.settings)
    try:
        request = cls.of(prompt, ours.pop("negative", ""), **images, **ours)
    except TypeError as error:
        raise Invalid(one_line(error, 300)) from None
    partials = _whole(values, "partial_images", 0, 0, MOST_PARTIALS)
    stream = _one_of(values, "stream", (False, True))
    work = Work(
        request,
        _model(values.get("model"), engine),
        _loras(values.get("loras", {}), engine),
        None if values.get("vae") is None else _found(engine, "vae", values["vae"], "vae"),
        _interval(request, partials, engine) if stream and partials else 0,
    )
    most = engine.settings.max_batch
    parts = [request.params.batch(first, min(most, n - first)) for first in range(0, n, most)]
    return Asked(
        [replace(work, request=replace(request, params=params)) for params in parts],
        prompt,
        images["image"].size if images else None,
        _one_of(values, "output_format", FORMATS),
        _whole(values, "output_compression", 100, 0, 100),
        _one_of(values, "response_format", ("b64_json", "url")) == "url",
        stream,
        partials,
    )


def ours(cls: type[TextToImage]) -> set[str]:
    """The names of our settings for a kind of request."""
    return {f.name for f in (*fields(cls), *fields(SamplingParams))} - APART | {*OPTIONS, "loras", "vae"}


def _check_names(values: Mapping[str, Any], cls: type[TextToImage]) -> None:
    """Raise Invalid for a parameter that there is not, with the nearest that there is."""
    known = ours(cls) | {*THEIRS}
    for name in values:
        if name in ELSEWHERE:
            raise Invalid(f"{name} is not supported: this server generates PNG, JPEG and WebP", name)
        if name not in known and name not in NO_EFFECT:
            with_image = any(name in each.__dataclass_fields__ for each in (ImageToImage, Inpaint))
            hint = "it goes with an image: use /v1/images/edits" if with_image else hint_for(name, known)
            raise Invalid(f"unknown parameter {one_line(name, 60)!r}: {hint}", name, "unknown_parameter")


def _whole(values: Mapping[str, Any], name: str, usual: int, low: int, high: int) -> int:
    value = values.get(name, usual)
    if type(value) is not int or not low <= value <= high:
        raise Invalid(f"{name} must be a whole number from {low} to {high}, got {value!r:.50}", name)
    return value


def _one_of(values: Mapping[str, Any], name: str, known: tuple[Any, ...]) -> Any:
    """The value of a parameter; the first of those that are known is the default."""
    value = values.get(name, known[0])
    if not any(value == each and type(value) is type(each) for each in known):
        names = " or ".join(str(each).lower() if isinstance(each, bool) else str(each) for each in known)
        raise Invalid(f"{name} must be {names}, got {value!r:.50}", name)
    return value


def _size(value: object) -> tuple[int | None, int | None]:
    """Width and height; None for "auto", which is the model's size or that of the image."""
    if value is None or value == "auto":
        return None, None
    found = SIZE.fullmatch(value) if isinstance(value, str) else None
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if 0 in sides or sides[0] % 8 or sides[1] % 8:
        raise Invalid(
            f'size must be "auto" or WIDTHxHEIGHT in multiples of 8, such as 512x512, got {value!r:.50}', "size"
        )
    return sides


def _model(value: object, engine: Engine) -> str | None:
    """The name of a model in the catalogue; None, the current one, also for the names of OpenAI's models."""
    if value is None:
        return None
    try:
        return _found(engine, "model", value, "model")
    except Invalid:
        if isinstance(value, str) and THEIR_MODELS.fullmatch(value):
            return None
        raise


def _found(engine: Engine, kind: Kind, name: object, param: str) -> str:
    """The name of an entry in the catalogue. Raises Invalid for any other name."""
    if not isinstance(name, str) or not name:
        raise Invalid(f"{param} must be a name, got {name!r:.50}", param)
    try:
        return engine.catalogue.find(kind, name).name
    except UnknownName as error:
        is_model = kind == "model"
        raise Invalid(str(error), param, "model_not_found" if is_model else None, 404 if is_model else 400) from None


def _loras(value: Any, engine: Engine) -> tuple[tuple[str, float], ...]:
    """LoRAs as {"name": weight}, or as a list of names or of {"name": ..., "weight": ...}."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        found = list(value.items())
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, Mapping) and each.keys() - {"name", "weight"}:
                raise Invalid("a LoRA has a name and a weight", "loras")
            found.append((each.get("name"), each.get("weight", 1.0)) if isinstance(each, Mapping) else (each, 1.0))
    else:
        raise Invalid('loras must be {"name": weight} or [{"name": ..., "weight": ...}]', "loras")
    if len(found) > MOST_LORAS:
        raise Invalid(f"{len(found)} LoRAs are too many: at most {MOST_LORAS}", "loras")
    try:
        weights = [number("the weight of a LoRA", _number(weight)) for _, weight in found]
    except ValueError as error:
        raise Invalid(str(error), "loras") from None
    return tuple(
        (_found(engine, "lora", name, "loras"), weight) for (name, _), weight in zip(found, weights, strict=True)
    )


def _number(weight: Any) -> Any:
    """A weight, which is a text in forms."""
    return float(weight) if isinstance(weight, str) else weight


def _interval(request: TextToImage, partials: int, engine: Engine) -> int:
    """The steps between the previews from which partial images come."""
    steps = request.params.steps
    if steps is None:
        try:
            steps = request.params.resolved(loaded_model(engine).model.config).steps
        except Exception:  # it is not loaded yet, or the settings are wrong for it, which is said later
            steps = USUAL_STEPS
    if isinstance(request, ImageToImage | Inpaint):
        steps = int(steps * request.strength)
    return max(1, steps // (partials + 1))
