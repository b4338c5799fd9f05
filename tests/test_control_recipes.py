"""Control networks in metadata: the entries of the web UI's extension in each of their forms, and our own."""

from __future__ import annotations

import pytest
from PIL import Image

from sd import Control
from sd.recipes import Addon, ControlUse, read_parameters, written_controls

NEW = "Module: none, Model: qrCodeMonster_v20 [5e5778cb], Weight: 1.34, Resize Mode: Just Resize, Low Vram: False, "
NEW += "Guidance Start: 0.23, Guidance End: 0.5, Pixel Perfect: True, Control Mode: ControlNet is more important"
CANNY = "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 0.8, Resize Mode: Crop and Resize, "
CANNY += (
    "Low Vram: False, Processor Res: 512, Threshold A: 50, Threshold B: 120.5, Guidance Start: 0, Guidance End: 1, "
)
CANNY += "Pixel Perfect: False, Control Mode: My prompt is more important, Hr Option: Both, Save Detected Map: True"
API = "Module: depth_leres++, Model: control_v11f1p_sd15_depth [cfd03158], Weight: 0.4, Resize Mode: 2, "
API += "Guidance Start: 0.0, Guidance End: 0.4, Control Mode: 1"
OLD = "preprocessor: canny, model: control_v11p_sd15_canny [d14c016b], weight: 0.7, starting/ending: (0.23, 0.76), "
OLD += "resize mode: Crop and Resize, pixel perfect: True, control mode: Balanced, preprocessor params: (512, 30, 90)"


def read(more: str, version: str = "v1.9.4", steps: int = 20):
    return read_parameters(
        f"a cat\nSteps: {steps}, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768{more}, Version: {version}"
    )


FORMS = [
    (
        f', ControlNet 0: "{NEW}"',
        ControlUse("qrCodeMonster_v20", "5e5778cb", 1.34, 0.23, 0.55, "control"),
        ["ControlNet 0: its hint is stretched to the shape of the image; here it is cropped"],
    ),
    (
        f', ControlNet 0: "{CANNY}"',
        ControlUse("control_v11p_sd15_canny", "d14c016b", 0.8, 0, 1, "prompt", "crop", "canny", 50, 120.5),
        ["ControlNet 0: the edges that canny finds here differ a little from the web UI's"],
    ),
    (
        f', ControlNet 0: "{API}"',
        ControlUse("control_v11f1p_sd15_depth", "cfd03158", 0.4, 0, 0.45, "prompt", "pad", "depth_leres++"),
        [
            "not reproduced: ControlNet 0's preprocessor depth_leres++: give the map that it makes as the hint",
        ],
    ),
    (
        f', Controlnet 1: "{OLD}"',
        ControlUse("control_v11p_sd15_canny", "d14c016b", 0.7, 0.23, 0.8, "balanced", "crop", "canny", 30, 90),
        ["ControlNet 1: the edges that canny finds here differ a little from the web UI's"],
    ),
    (
        ", ControlNet Enabled: True, ControlNet Module: none, ControlNet Model: control_canny-fp16 [e3fe7712], "
        "ControlNet Weight: 0.9, ControlNet Guidance Strength: 0.6",
        ControlUse("control_canny-fp16", "e3fe7712", 0.9, 0, 0.65),
        [],
    ),
    (
        ", ControlNet-1 Enabled: True, ControlNet-1 Module: none, ControlNet-1 Model: control_sd15_canny(fef5e48e), "
        "ControlNet-1 Weight: 1, ControlNet-1 Guidance Start: 0.1, ControlNet-1 Guidance End: 1",
        ControlUse("control_sd15_canny", "fef5e48e", 1, 0.1, 1),
        [],
    ),
]


@pytest.mark.parametrize(("text", "use", "notes"), FORMS, ids=range(len(FORMS)))
def test_forms_of_the_web_ui(text, use, notes):
    recipe = read(text)
    assert recipe.controls == (use,) and list(recipe.notes) == notes
    assert recipe.request.controls == ()  # the hint is not in the file


def test_several_and_what_is_none_of_ours():
    recipe = read(f', ControlNet 0: "{CANNY}", ControlNet 2: "{NEW}"')
    assert [use.scale for use in recipe.controls] == [0.8, 1.34]
    for text in ("Module: reference_only, Model: None", "Module: x, Model: ip-adapter_sd15_plus [32cd8f7f]"):
        recipe = read(f', ControlNet 0: "{text}, Weight: 1"')
        assert recipe.controls == () and recipe.notes[0].startswith("not reproduced: ControlNet 0, ")
    recipe = read(", ControlNet Version: 1.1.455, ControlNet-1 Other: 2")
    assert recipe.controls == () and recipe.notes == ("not reproduced: ControlNet Version, ControlNet-1 Other",)
    many = "".join(f', ControlNet {i}: "{NEW}"' for i in range(25))
    recipe = read(many)
    assert len(recipe.controls) == 20 and "only the first 20 of its 25 control networks are read" in recipe.notes
    assert read(', ControlNet 0: "Enabled: False, Module: none, Model: x"').controls == ()
    hires = ", Hires upscale: 2, Denoising strength: 0.5"
    (note,) = [
        note for note in read(f', ControlNet 0: "Module: none, Model: x, Hr Option: Low res only"{hires}').notes
        if "Hr" in note
    ]  # fmt: skip
    assert note == "not reproduced: ControlNet 0's Hr Option low res only: both passes are controlled"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ("Weight: a lot", "'a lot' is not a number"),
        ("Weight: 1e999", "'1e999' is not a number"),
        ("Guidance Start: 0.8, Guidance End: 0.2", "it begins at 0.8 of the steps and ends at 0.2"),
        ("Guidance End: 7", "end must be in [0, 1], got 7"),
    ],
)
def test_wrong_numbers_become_notes(values, why):
    recipe = read(f', ControlNet 0: "Module: none, Model: x, {values}"')
    assert recipe.controls == (ControlUse("x"),)
    assert recipe.notes[0].startswith("ControlNet 0: its numbers are left out: ") and why in recipe.notes[0]


def controlled_steps(use: ControlUse, steps: int) -> list[int]:
    control = Control("x", Image.new("L", (1, 1)), start=use.start, end=use.end)
    return [i for i in range(steps) if control.is_active(i, steps)]


@pytest.mark.parametrize("steps", [1, 7, 20, 23, 30])
@pytest.mark.parametrize("span", [(0, 0.5), (0.5, 0.5), (0, 0), (0.23, 0.76), (0.1, 0.3), (0, 0.99), (0.2, 1)])
def test_the_same_steps_are_controlled_as_in_the_web_ui(steps, span):
    """There, step i of n, counted from 0, is left out if i / n < start or i / n > end."""
    start, end = span
    unit = f', ControlNet 0: "Module: none, Model: x, Guidance Start: {start}, Guidance End: {end}"'
    expected = [i for i in range(steps) if start <= i / steps <= end]
    recipe = read(unit, steps=steps)
    if expected:
        (use,) = recipe.controls
        assert controlled_steps(use, steps) == expected and recipe.notes == () and use.end <= 1


def test_the_end_of_image_to_image_and_of_unknown_steps():
    """Image to image runs a part of the steps, 15 of 20, and these count. Our own images say what we mean by it."""
    unit = ', ControlNet 0: "Module: none, Model: x, Guidance End: 0.5"'
    recipe = read(f", Denoising strength: 0.75{unit}")
    assert recipe.kind == "img2img" and controlled_steps(recipe.controls[0], 15) == [*range(8)]
    recipe = read_parameters(f"a cat\nSampler: Euler a, Seed: 5, Size: 512x768{unit}, Version: v1.9.4")
    assert recipe.controls[0].end == 0.5
    assert recipe.notes == ("ControlNet 0: the web UI controls one step more than this fraction of the steps, 0.5",)
    assert read(unit, "sd 0.2.0").controls[0].end == 0.5


def test_numbers_are_left_out_apart_from_each_other():
    """A bad one only takes along those that are compared with it; -1 is the preprocessor's own threshold."""

    def use(values: str) -> tuple[ControlUse, list[str]]:
        recipe = read(f', ControlNet 0: "Module: canny, Model: x, {values}"')
        return recipe.controls[0], [note for note in recipe.notes if "left out" in note]

    canny = ControlUse("x", module="canny")
    assert use("Weight: 0.8, Guidance End: 0.5, Threshold A: -1, Threshold B: -1") == (
        canny._replace(scale=0.8, end=0.55), []
    )  # fmt: skip
    assert use("Threshold A: -1.0, Threshold B: 150") == (canny._replace(high=150.0), [])
    found, notes = use("Weight: 0.8, Guidance Start: 0.2, Guidance End: 3, Threshold A: 50, Threshold B: 90")
    assert found == canny._replace(scale=0.8, low=50.0, high=90.0)
    assert notes == ["ControlNet 0: its numbers are left out: end must be in [0, 1], got 3.0"]
    found, notes = use("Weight: lots, Guidance Start: 0.2, Threshold A: 300, Threshold B: 90")
    assert found == canny._replace(start=0.2)
    assert notes == [
        "ControlNet 0: its numbers are left out: 'lots' is not a number",
        "ControlNet 0: its numbers are left out: low must be in [0, 255], got 300.0",
    ]


def test_modes_are_weaker_in_the_web_ui_for_sdxl():
    """Its scales are those of the 13 residuals of SD 1.x, of which SDXL has the first 10."""
    unit = ', ControlNet 0: "Module: none, Model: {}, Weight: 0.8, Control Mode: {}"'
    for model, checkpoint, mode, weaker in (
        ("diffusers_xl_canny_full [1234abcd]", "", "My prompt is more important", True),
        ("canny [1234abcd]", ", Model: juggernautXL_v9", "ControlNet is more important", True),
        ("canny-sdxl-1.0", "", "2", True),
        ("diffusers_xl_canny_full", "", "Balanced", False),
        ("control_v11p_sd15_canny", ", Model: v1-5-pruned", "My prompt is more important", False),
    ):
        notes = read(checkpoint + unit.format(model, mode)).notes
        expected = "ControlNet 0: for SDXL, the web UI's residuals are all weaker in this mode: a scale of "
        assert notes == ((f"{expected}0.449 is the same here",) if weaker else ())
    ours = read(unit.format("canny-sdxl-1.0", "My prompt is more important"), "sd 0.2.0")
    assert ours.notes == ()


def test_our_entries_there_and_back():
    uses = [
        ControlUse(
            "a net", "0123abcd", 0.1 + 0.2, 1 / 3, 0.9, "control", "pad", "canny", 1.5, 254.0,
            Addon("a [1] (b): c,d.png", digest="0123456789"),
        ),
        ControlUse("folder", "", -2.0, hint=Addon("bild ü.png", digest="abcdef0123")),
    ]  # fmt: skip
    entries = written_controls(uses)
    text = "".join(f', {key}: "{value}"' for key, value in entries.items())
    recipe = read(text, "sd 0.2.0")
    first = uses[0]._replace(hint=Addon("a 1 b cd.png", digest="0123456789"))  # without the signs that separate
    assert recipe.controls == (first, uses[1]) and recipe.notes == ()
    assert list(entries) == ["ControlNet 0", "ControlNet 1", "Control hints"] and written_controls([]) == {}
