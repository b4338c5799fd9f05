"""Units of the web UI's ControlNet extension, in `alwayson_scripts` -> the controls of a request.

Source of the fields: Mikubill/sd-webui-controlnet scripts/external_code.py and its wiki page "API".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ...control_params import MAX_CONTROLS, MODES, Control
from ...imaging.hints import hint_image
from ...imaging.tensors import resize
from ...messages import one_line
from ...recipes.control_entries import MODE_TEXTS
from ..catalogue import Catalogue, UnknownName
from ..http import ApiError
from .fields import Field, Given, read, without_effect
from .images import Budget, Note

SCRIPT = "controlnet"
INVERT = "invert (from white bg & black line)"
MODULES = {"none": "none", "canny": "canny", INVERT: "invert"}  # the extension's names of what can be done here
RESIZE = ("just resize", "crop and resize", "resize and fill")
OLD_RESIZE = {"inner fit": 1, "outer fit": 2, "envelope": 2, "scale to fit": 1}
NETWORK = re.compile(r"\s*\[\w*\]\s*\Z")  # the hash after its name
ANY = Field("any")
UNIT: dict[str, Field] = {
    "enabled": Field("flag", True),
    "module": Field("text", "none"),
    "model": Field("text", "None"),
    "weight": Field("number", 1.0),
    "image": ANY,
    "input_image": ANY,
    "mask": without_effect(""),
    "mask_image": without_effect(""),
    "effective_region_mask": without_effect(""),
    "resize_mode": Field("any", 1),
    "control_mode": Field("any", 0),
    "guidance": Field("number"),
    "guidance_start": Field("number", 0.0),
    "guidance_end": Field("number", 1.0),
    "threshold_a": Field("number", -1.0),
    "threshold_b": Field("number", -1.0),
    "guessmode": without_effect(False),
    "hr_option": without_effect("Both", "HiResFixOption.BOTH", 0),
    "low_vram": ANY,  # these change no pixel: maps are made at the size generated
    "lowvram": ANY,
    "pixel_perfect": ANY,
    "processor_res": ANY,
    "save_detected_map": ANY,
    "is_ui": ANY,
    "input_mode": ANY,
    "loopback": ANY,
    "batch_images": ANY,
    "batch_mask_gallery": ANY,
    "batch_image_dir": ANY,
    "batch_modifiers": ANY,
    "output_dir": ANY,
    "use_preview_as_input": ANY,
    "generated_image": ANY,
    "inpaint_crop_input_image": ANY,
    "union_control_type": ANY,
    "ipadapter_input": ANY,
    "animatediff_batch": ANY,
    "advanced_weighting": without_effect([]),
    "pulid_mode": ANY,
}


class Canvas(NamedTuple):
    """What a unit belongs to: the size generated, None where it is the model's; and the initial image."""

    width: int | None
    height: int | None
    image: Image.Image | None
    budget: Budget


def take_units(scripts: Mapping[str, Any], note: Note) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The units in `alwayson_scripts`, and the names of the other scripts in it, apart from those switched off.

    Raises ApiError for too many units.
    """
    units, ignored = list[Mapping[str, Any]](), list[str]()
    for name, script in scripts.items():
        args = script.get("args") if isinstance(script, Mapping) else script
        args = [args] if isinstance(args, Mapping) else args if isinstance(args, list) else []
        if name.lower().strip() == SCRIPT:
            units += [unit for unit in args if isinstance(unit, Mapping)]
            if others := [unit for unit in args if unit is not None and not isinstance(unit, Mapping | bool)]:
                note(f"{len(others)} of the ControlNet arguments are no objects and are left out")
        elif args and args[0] is not False:
            ignored.append(f"alwayson_scripts.{one_line(name, 60)}")
    if len(units) > MAX_CONTROLS:
        raise ApiError(422, f"{len(units)} ControlNet units are too many: at most {MAX_CONTROLS}")
    return units, ignored


def control_of(
    unit: Mapping[str, Any], number: int, canvas: Canvas, catalogue: Catalogue
) -> tuple[Control | None, list[str]]:
    """The control of a unit, None if it is off; and the names of the fields ignored.

    Raises ApiError for a network or preprocessor that is not there, and a wrong value.
    """
    label = f"ControlNet unit {number}"
    try:
        given = read({name.lower() if name in ("lowVram",) else name: value for name, value in unit.items()}, UNIT)
        if not given["enabled"] or given["model"].strip().lower() in ("", "none"):
            return None, []
        name = catalogue.find("control", NETWORK.sub("", given["model"])).name
        picture = _picture(given, unit, label, canvas)
        if _choice(given["resize_mode"], RESIZE, OLD_RESIZE, "resize_mode") == 0 and canvas.width and canvas.height:
            picture = resize(picture, canvas.width, canvas.height)
        annotate = module_of(given["module"])
        control = Control(
            name,
            picture,
            scale=given["weight"],
            start=given["guidance_start"],
            end=given["guidance_end"] if given["guidance"] is None else given["guidance"],
            mode=MODES[_choice(given["control_mode"], tuple(map(str.lower, MODE_TEXTS.values())), {}, "control_mode")],
            fit="pad" if _choice(given["resize_mode"], RESIZE, OLD_RESIZE, "resize_mode") == 2 else "crop",
            annotate=annotate,
            **thresholds(annotate, given["threshold_a"], given["threshold_b"]),
        )
    except UnknownName as error:
        raise ApiError(404, f"{label}: {error}") from None
    except ApiError as error:
        raise ApiError(error.status, f"{label}: {error.message.removeprefix(f'{label}: ')}") from None
    except ValueError as error:
        raise ApiError(422, f"{label}: {error}") from None
    return control, [f"{SCRIPT}.{name}" for name in given.ignored]


def module_of(name: str) -> str:
    """How a hint is made, by the extension's name of the preprocessor. Raises ValueError for one that is not there."""
    plain = name.strip().lower()
    if plain.startswith("invert"):
        return "invert"
    if plain not in MODULES:
        raise ValueError(
            f"the preprocessor {one_line(name)!r} is not available, only {', '.join(MODULES)}: send the map that it "
            "makes as the image, with the module none"
        )
    return MODULES[plain]


def thresholds(annotate: str, low: float, high: float) -> dict[str, float]:
    """The thresholds of a control; -1 stands for the default."""
    values = {"low": low, "high": high} if annotate == "canny" else {}
    return {name: value for name, value in values.items() if value != -1}


def _picture(given: Given, unit: Mapping[str, Any], label: str, canvas: Canvas) -> Image.Image:
    """The hint of a unit, or else the initial image."""
    found = given["image"] or given["input_image"]
    if isinstance(found, Mapping):
        found = found.get("image")
    if not found:
        if canvas.image is None:
            raise ValueError("it has no image")
        return canvas.image
    return hint_image(canvas.budget.decoded(found, f"{label}: image"))


def _choice(value: object, names: Sequence[str], others: Mapping[str, int], field: str) -> int:
    """The number of a choice that is given as number, as text, or as "Kind.TEXT"."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value in range(len(names)):
        return int(value)
    text = str(value).strip().lower().replace("_", " ").rpartition(".")[2]
    for i, name in enumerate(names):
        if text in (name, str(i), name.removeprefix("my ").replace("controlnet", "control").partition(" is ")[0]):
            return i
    for name, i in others.items():
        if name in text:
            return i
    if text == "resize":
        return 0
    raise ValueError(f"unknown {field} {one_line(value)!r}, expected one of {', '.join(names)}")
