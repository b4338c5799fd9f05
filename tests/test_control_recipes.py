"""Control networks in metadata: the entries of the web UI's extension in each of their forms, and our own."""

from __future__ import annotations

import pytest

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


def read(more: str, version: str = "v1.9.4"):
    return read_parameters(
        f"a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768{more}, Version: {version}"
    )


FORMS = [
    (
        f', ControlNet 0: "{NEW}"',
        ControlUse("qrCodeMonster_v20", "5e5778cb", 1.34, 0.23, 0.5, "control"),
        ["ControlNet 0: its hint is stretched to the shape of the image; here it is cropped"],
    ),
    (
        f', ControlNet 0: "{CANNY}"',
        ControlUse("control_v11p_sd15_canny", "d14c016b", 0.8, 0, 1, "prompt", "crop", "canny", 50, 120.5),
        ["ControlNet 0: the edges that canny finds here differ a little from the web UI's"],
    ),
    (
        f', ControlNet 0: "{API}"',
        ControlUse("control_v11f1p_sd15_depth", "cfd03158", 0.4, 0, 0.4, "prompt", "pad", "depth_leres++"),
        [
            "not reproduced: ControlNet 0's preprocessor depth_leres++: give the map that it makes as the hint",
        ],
    ),
    (
        f', Controlnet 1: "{OLD}"',
        ControlUse("control_v11p_sd15_canny", "d14c016b", 0.7, 0.23, 0.76, "balanced", "crop", "canny", 30, 90),
        ["ControlNet 1: the edges that canny finds here differ a little from the web UI's"],
    ),
    (
        ", ControlNet Enabled: True, ControlNet Module: none, ControlNet Model: control_canny-fp16 [e3fe7712], "
        "ControlNet Weight: 0.9, ControlNet Guidance Strength: 0.6",
        ControlUse("control_canny-fp16", "e3fe7712", 0.9, 0, 0.6),
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
