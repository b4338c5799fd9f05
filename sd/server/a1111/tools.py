"""Routes that work on images without generating any: their settings, enlarging, and hints for control networks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image, ImageOps

from ...imaging.annotate import canny
from ...messages import one_line
from ...recipes.containers import image_texts
from ...recipes.infotext import parse
from ..http import ApiError
from ..incoming import bytes_of
from .answers import encoded
from .controlnet import MODULES, module_of, thresholds
from .errors import PROBLEMS, field_error
from .fields import NO_EFFECT, Field, Given, body_of, openapi, read, without_effect
from .images import Budget
from .lists import UPSCALERS
from .session import session_of

router = APIRouter(tags=["A1111"], responses=PROBLEMS)
MOST_IMAGES = 64  # in a request
UNITS = 3  # that the extension shows
VERSION = 2  # of the extension's interface
PNG_INFO = {"image": Field("text", "")}
EXTRAS: dict[str, Field] = {
    "resize_mode": Field("whole", 0),
    "show_extras_results": Field("flag", True),
    "gfpgan_visibility": without_effect(0),
    "codeformer_visibility": without_effect(0),
    "codeformer_weight": NO_EFFECT,
    "upscaling_resize": Field("number", 2.0),
    "upscaling_resize_w": Field("whole", 512),
    "upscaling_resize_h": Field("whole", 512),
    "upscaling_crop": Field("flag", True),
    "upscaler_1": Field("text", "None"),
    "upscaler_2": Field("text", "None"),
    "extras_upscaler_2_visibility": Field("number", 0.0),
    "upscale_first": NO_EFFECT,
}
SINGLE = EXTRAS | {"image": Field("text", "")}
SEVERAL = EXTRAS | {"imageList": Field("list")}
DETECT = {
    "controlnet_module": Field("text", "none"),
    "controlnet_input_images": Field("list"),
    "controlnet_images": Field("list"),  # as earlier versions, and some clients, call them
    "controlnet_threshold_a": Field("number", -1.0),
    "controlnet_threshold_b": Field("number", -1.0),
    "controlnet_processor_res": NO_EFFECT,
    "controlnet_masks": NO_EFFECT,
    "low_vram": NO_EFFECT,
}
FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}


@router.post("/sdapi/v1/png-info", openapi_extra=openapi(PNG_INFO))
async def png_info(request: Request) -> dict[str, Any]:
    """The settings in an image file."""
    given = read(await body_of(request), PNG_INFO)
    return await asyncio.to_thread(_settings_in, given["image"])


def _settings_in(text: str) -> dict[str, Any]:
    texts = image_texts(bytes_of(text), "image")
    found = texts.get("parameters", "")
    parsed = parse(found)
    parameters = {"Prompt": parsed.prompt, "Negative prompt": parsed.negative, **parsed.pairs} if found else {}
    width, _, height = parsed.pairs.get("Size", "").partition("x")
    if width.isdecimal() and height.isdecimal():
        parameters |= {"Size-1": width, "Size-2": height}
    return {"info": found, "items": texts, "parameters": parameters}


@router.post("/sdapi/v1/extra-single-image", openapi_extra=openapi(SINGLE))
async def extra_single_image(request: Request) -> dict[str, Any]:
    """Enlarge an image by plain resampling."""
    given, budget = read(await body_of(request), SINGLE), _budget(request)
    image = await _one_of_few(request, _enlarged, given, given["image"], "image", budget)
    return {"html_info": _said(given), "image": image}


@router.post("/sdapi/v1/extra-batch-images", openapi_extra=openapi(SEVERAL))
async def extra_batch_images(request: Request) -> dict[str, Any]:
    """Enlarge several images by plain resampling."""
    given, budget = read(await body_of(request), SEVERAL), _budget(request)
    images = _several(given["imageList"], "imageList")
    done = []
    for i, image in enumerate(images):
        data = image.get("data") if isinstance(image, Mapping) else image
        done.append(await _one_of_few(request, _enlarged, given, data, f"imageList[{i}]", budget))
    return {"html_info": _said(given), "images": done}


async def _one_of_few(request: Request, work: Callable[..., str], *arguments: Any) -> str:
    """What decodes an image, in a thread: few at once, as they take memory."""
    async with session_of(request).engine.intake:
        return await asyncio.to_thread(work, *arguments)


def _several(images: list[Any] | None, name: str) -> list[Any]:
    if not images or len(images) > MOST_IMAGES:
        raise field_error(name, f"expected 1 to {MOST_IMAGES} images, got {len(images or ())}")
    return images


def _said(given: Given) -> str:
    return f"ignored: {', '.join(given.ignored)}" if given.ignored else ""


def _budget(request: Request) -> Budget:
    most = session_of(request).engine.settings.max_image_pixels
    return Budget(most, most * MOST_IMAGES)  # they are decoded one by one


def _enlarged(given: Given, data: object, name: str, budget: Budget) -> str:
    """An enlarged image, in base64."""
    image, most = budget.decoded(data, name), budget.most
    for field in ("upscaler_1", "upscaler_2"):
        used = field == "upscaler_1" or given["extras_upscaler_2_visibility"] > 0
        if used and given[field] not in UPSCALERS:
            shown = one_line(given[field])
            raise field_error(field, f"{shown!r} is not available, only {', '.join(UPSCALERS)}")
    if given["upscaler_1"] == "None":
        return encoded(image)
    width, height, crops = given["upscaling_resize_w"], given["upscaling_resize_h"], given["upscaling_crop"]
    if given["resize_mode"] == 0:
        by = given["upscaling_resize"]
        if not 0 < by <= 100:
            raise field_error("upscaling_resize", f"expected more than 0, up to 100, got {by:g}")
        width, height, crops = max(round(image.width * by), 1), max(round(image.height * by), 1), False
    if width < 1 or height < 1 or width * height > most:
        raise ApiError(422, f"{width}x{height} pixels: expected at least 1x1, and at most {most:,} in all")
    resampling = FILTERS[given["upscaler_1"]]
    if crops:
        return encoded(ImageOps.fit(image, (width, height), resampling))
    scale = min(width / image.width, height / image.height)  # to lie within the size
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    return encoded(image.resize((width, height) if given["resize_mode"] == 0 else size, resampling))


@router.post("/sdapi/v1/interrogate")
async def interrogate() -> None:
    """Describing images needs a model that is not here."""
    raise ApiError(404, "Model not found: this server has no model that describes images")


@router.get("/controlnet/version")
async def controlnet_version() -> dict[str, int]:
    """Of the interface of the ControlNet extension."""
    return {"version": VERSION}


@router.get("/controlnet/settings")
async def controlnet_settings() -> dict[str, int]:
    """How many units a client may show."""
    return {"control_net_unit_count": UNITS}


@router.get("/controlnet/model_list")
async def model_list(request: Request) -> dict[str, list[str]]:
    """The control networks."""
    return {"model_list": _networks(request)}


@router.get("/controlnet/module_list")
async def module_list() -> dict[str, Any]:
    """What makes hints of images."""
    detail = {name: {"model_free": False, "sliders": []} for name in MODULES}
    return {"module_list": list(MODULES), "module_detail": detail}


@router.get("/controlnet/control_types")
async def control_types(request: Request) -> dict[str, Any]:
    """All networks are of one type: nothing tells them apart but their names."""
    names = ["None", *_networks(request)]
    kind = {"module_list": list(MODULES), "model_list": names, "default_option": "none", "default_model": names[-1]}
    return {"control_types": {"All": kind}}


def _networks(request: Request) -> list[str]:
    entries = session_of(request).engine.catalogue.entries("control")
    return [f"{entry.name} [{entry.hash[:8]}]" if entry.hash else entry.name for entry in entries]


@router.post("/controlnet/detect", openapi_extra=openapi(DETECT))
async def detect(request: Request) -> dict[str, Any]:
    """Make hints of images."""
    given, budget = read(await body_of(request), DETECT), _budget(request)
    images = _several(given["controlnet_input_images"] or given["controlnet_images"], "controlnet_input_images")
    annotate = module_of(given["controlnet_module"])
    limits = {"low": 100.0, "high": 200.0}
    limits |= thresholds(annotate, given["controlnet_threshold_a"], given["controlnet_threshold_b"])
    found = []
    for i, image in enumerate(images):
        found.append(
            await _one_of_few(request, _hint, image, f"controlnet_input_images[{i}]", annotate, limits, budget)
        )
    return {"images": found, "info": "Success"}


def _hint(data: object, name: str, annotate: str, limits: dict[str, float], budget: Budget) -> str:
    image = budget.decoded(data, name).convert("RGB")
    if annotate == "canny":
        image = canny(image, limits["low"], limits["high"])
    return encoded(ImageOps.invert(image) if annotate == "invert" else image)


@router.get("/internal/ping")
async def ping() -> dict[str, Any]:
    """That the server is there."""
    return {}


@router.get("/app_id")
async def app_id() -> dict[str, str]:
    """The same, for clients that ask for the web UI's user interface."""
    return {"app_id": "sd"}
