"""The fields of requests, with their types and the web UI's defaults, and reading them.

Clients send dozens of fields with every request, most of them with values that change nothing. A field without effect
here is named in the answer only if its value would have had one in the web UI. Numbers may be texts, as there.

Source of the names and defaults: AUTOMATIC1111/stable-diffusion-webui modules/processing.py (the fields of the classes
`StableDiffusionProcessing...`) and modules/api/models.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi import Request

from ...messages import one_line
from ...recipes.fields import number
from ..http import ApiError
from .errors import field_error

DEEPEST = 20  # levels of objects and lists in a body
MOST_NAMED = 50  # names of ignored fields in an answer
FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
JSON_TYPES = {
    "text": "string", "whole": "integer", "number": "number", "flag": "boolean", "list": "array", "object": "object",
    "any": None,
}  # fmt: skip


class Field(NamedTuple):
    """A field of a request.

    kind      of its values: text, whole, number, flag, list, object; "any" if it has no effect
    default   None is that of the model, or nothing
    neutral   of a field without effect: the values with which it would have none in the web UI; None: all values
    """

    kind: str
    default: Any = None
    neutral: Sequence[Any] | None = None


NO_EFFECT = Field("any")


def without_effect(*neutral: object) -> Field:
    """A field that is not supported, and the values of it that change nothing."""
    return Field("any", neutral[0] if neutral else None, neutral)


COMMON: dict[str, Field] = {
    "prompt": Field("text", ""),
    "negative_prompt": Field("text", ""),
    "styles": without_effect([]),
    "seed": Field("whole", -1),
    "subseed": Field("whole", -1),
    "subseed_strength": Field("number", 0.0),
    "seed_resize_from_h": without_effect(-1, 0),
    "seed_resize_from_w": without_effect(-1, 0),
    "sampler_name": Field("text"),
    "sampler_index": Field("text"),
    "scheduler": Field("text"),
    "batch_size": Field("whole", 1),
    "n_iter": Field("whole", 1),
    "steps": Field("whole"),
    "cfg_scale": Field("number"),
    "width": Field("whole"),
    "height": Field("whole"),
    "restore_faces": without_effect(False),
    "tiling": Field("flag"),
    "do_not_save_samples": NO_EFFECT,
    "do_not_save_grid": NO_EFFECT,
    "eta": Field("number"),
    "denoising_strength": Field("number"),
    "s_min_uncond": without_effect(0),
    "s_churn": without_effect(0),
    "s_tmax": NO_EFFECT,  # limits of s_churn
    "s_tmin": NO_EFFECT,
    "s_noise": without_effect(1),
    "override_settings": Field("object", {}),
    "override_settings_restore_afterwards": Field("flag", True),
    "refiner_checkpoint": without_effect("", "None", "none"),
    "refiner_switch_at": NO_EFFECT,
    "disable_extra_networks": without_effect(False),
    "firstpass_image": without_effect(),
    "comments": NO_EFFECT,
    "script_name": without_effect("", "None"),
    "script_args": NO_EFFECT,
    "send_images": Field("flag", True),
    "save_images": without_effect(False),
    "alwayson_scripts": Field("object", {}),
    "force_task_id": NO_EFFECT,
    "infotext": without_effect(""),
    "clip_skip": Field("whole"),  # of SD.Next and stable-diffusion.cpp
}
TXT2IMG: dict[str, Field] = COMMON | {
    "enable_hr": Field("flag", False),
    "firstphase_width": Field("whole", 0),
    "firstphase_height": Field("whole", 0),
    "hr_scale": Field("number", 2.0),
    "hr_upscaler": Field("text"),
    "hr_second_pass_steps": Field("whole", 0),
    "hr_resize_x": Field("whole", 0),
    "hr_resize_y": Field("whole", 0),
    "hr_checkpoint_name": Field("text"),
    "hr_sampler_name": Field("text"),
    "hr_scheduler": Field("text"),
    "hr_prompt": Field("text", ""),
    "hr_negative_prompt": Field("text", ""),
}
IMG2IMG: dict[str, Field] = COMMON | {
    "denoising_strength": Field("number", 0.75),
    "init_images": Field("list"),
    "resize_mode": Field("whole", 0),
    "image_cfg_scale": NO_EFFECT,  # of models that take an instruction
    "mask": Field("text"),
    "mask_blur": Field("number"),
    "mask_blur_x": Field("number", 4.0),
    "mask_blur_y": Field("number", 4.0),
    "mask_round": without_effect(True),
    "inpainting_fill": Field("whole", 0),
    "inpaint_full_res": Field("flag", True),
    "inpaint_full_res_padding": Field("whole", 0),
    "inpainting_mask_invert": Field("flag", False),
    "initial_noise_multiplier": without_effect(1),
    "latent_mask": without_effect(""),
    "include_init_images": Field("flag", False),
}


@dataclass(frozen=True)
class Given:
    """The fields of a request: their values, those absent with their defaults; and the names of those ignored."""

    values: dict[str, Any]
    ignored: list[str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def value_of(name: str, kind: str, value: object) -> Any:
    """A value of a kind. Raises ApiError for one that is not."""
    try:
        if kind in ("whole", "number"):
            return number(value, kind == "whole")
    except ValueError as error:
        raise field_error(name, error) from None
    if kind == "flag" and isinstance(value, str | int | float) and str(value).lower() in FLAGS:
        return FLAGS[str(value).lower()]
    if kind == "text" and isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # JSON can have halves of surrogate pairs
    if {"list": list, "object": dict, "any": object}.get(kind) in (object, type(value)):
        return value
    words = {"flag": "true or false", "object": "an object"}.get(kind, f"a {kind}")
    raise field_error(name, f"expected {words}, got {one_line(repr(value)[:200])}")


def read(body: Mapping[str, Any], fields: Mapping[str, Field]) -> Given:
    """The fields of a body. Raises ApiError for a value of the wrong type; what is unknown is ignored."""
    given = {name: value for name, value in body.items() if value is not None}
    values = {
        name: value_of(name, field.kind, given[name]) if name in given else field.default
        for name, field in fields.items()
    }
    ignored = [one_line(name, 60) for name in given if name not in fields]
    for name, field in fields.items():
        if name in given and field.neutral is not None and given[name] not in field.neutral:
            ignored.append(name)
    return Given(values, ignored[:MOST_NAMED])


def schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON Schema of a body with these fields, for the OpenAPI document."""
    properties = {
        name: {
            **({"type": [JSON_TYPES[field.kind], "null"]} if JSON_TYPES[field.kind] else {}),
            **({} if field.default is None else {"default": field.default}),
        }
        for name, field in fields.items()
    }
    return {"type": "object", "properties": properties}


def openapi(fields: Mapping[str, Field]) -> dict[str, Any]:
    """What a route with such a body adds to the OpenAPI document."""
    content = {"application/json": {"schema": schema(fields)}}
    return {"requestBody": {"content": content, "required": True}}


def _no_constant(text: str) -> float:
    """JSON has no NaN and no Infinity, which Python reads."""
    raise ValueError(f"{text} is not a number in JSON")


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises ApiError for anything else."""
    data = await request.body()
    try:
        found = await asyncio.to_thread(json.loads, data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(422, f"the body is not JSON: {one_line(error, 100)}") from None
    if not isinstance(found, dict):
        raise ApiError(422, "the body must be a JSON object")
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        level = [each for value in level for each in (value.values() if isinstance(value, dict) else value)]
        level = [each for each in level if isinstance(each, dict | list)]
    if level:
        raise ApiError(422, f"the body is nested too deeply: at most {DEEPEST} levels")
    return found
