"""Control networks in the text of the web UI: the entries of its ControlNet extension, written and read.

    ControlNet 0: "Module: canny, Model: control_sd15_canny [fef5e48e], Weight: 1, Resize Mode: Crop and Resize, ..."

"Module" is what made the hint of an image, "none" if it was ready. Earlier versions wrote other forms, and programs
that use the extension write numbers for its modes; they are read, too:

    ControlNet 0: "preprocessor: canny, model: ..., weight: 1, starting/ending: (0, 1), control mode: Balanced, ..."
    ControlNet Module: canny, ControlNet Model: control_canny [e3fe7712], ControlNet Weight: 1, ...
    ControlNet-1 Module: canny, ...

The extension writes no hint. Our entry "Control hints" has the file name of each, and the first digits of its SHA-256.
Source of the form: Mikubill/sd-webui-controlnet scripts/infotext.py; of what its modes and steps do: scripts/hook.py.

>>> use = ControlUse("canny", "fef5e48e", scale=0.8, hint=Addon("house.png", digest="0123456789"))
>>> entries = written_controls([use])
>>> entries["ControlNet 0"][:50], entries["Control hints"]
('Module: none, Model: canny [fef5e48e], Weight: 0.8', 'house.png [0123456789]')
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from PIL import Image

from ..control_params import MAX_CONTROLS, MODES, Control
from ..messages import one_line
from .fields import number, text_of
from .recipe import Addon, ControlUse, Draft, file_name

HINTS = "Control hints"  # our entry; one that began with "ControlNet" would be read by the extension
FITS = {"crop": "Crop and Resize", "pad": "Resize and Fill"}
MODE_TEXTS = dict(zip(MODES, ("Balanced", "My prompt is more important", "ControlNet is more important"), strict=True))
PROCESSOR = 512  # pixels; of no effect with "Pixel Perfect", where maps are made at the size of the image
FIELDS = "enabled|module|model|weight|guidance (?:strength|start|end)|(?:control|resize) mode|low ?vram|pixel perfect"
FIELDS += "|processor res|threshold [ab]|hr option"
ENTRY = re.compile(rf"controlnet(?:[- ](\d{{1,2}})| ({FIELDS})|-(\d) ({FIELDS}))")
PARTS = re.compile(r",\s*(?![^()]{0,200}\))")  # commas that are not in brackets
HASH = re.compile(r"\s*[\[(](\w{4,64})[\])]\s*\Z")  # after the name of a network
HINT = re.compile(r"(.*) \[(\w{1,64})\]", re.DOTALL)
NO_NETWORK = re.compile(r"ip[-_]?adapter|t2i[-_]?adapter|instant[-_]?id|pulid", re.IGNORECASE)
NONE = ("", "none")
SDXL = re.compile(r"xl(?![a-z])", re.IGNORECASE)  # in the name of a model or network: nothing else says the family
# The web UI's modes scale residual i by 0.825^(12 - i), as if there were 13; those of SDXL are 10.
SDXL_SCALE = 0.825**3


def written_controls(uses: Sequence[ControlUse]) -> dict[str, str]:
    """The entries of the metadata: one for each use, and one for all hints."""
    found = {f"ControlNet {i}": _written(use) for i, use in enumerate(uses)}
    if uses:
        found[HINTS] = ", ".join(f"{plain_name(use.hint.name)} [{use.hint.digest}]" for use in uses)
    return found


def plain_name(name: str) -> str:
    """A name without the letters that separate entries and their parts."""
    return re.sub(r"[,:\[\]()]", "", name)


def _written(use: ControlUse) -> str:
    values: dict[str, object] = {
        "Module": use.module,
        "Model": plain_name(use.name) + (f" [{use.digest}]" if use.digest else ""),
        "Weight": use.scale,
        "Resize Mode": FITS[use.fit],
        "Low Vram": False,
    }
    if use.module != "none":
        values |= {"Processor Res": PROCESSOR, "Threshold A": use.low, "Threshold B": use.high}
    values |= {
        "Guidance Start": use.start,
        "Guidance End": use.end,
        "Pixel Perfect": use.module != "none",
        "Control Mode": MODE_TEXTS[use.mode],
        "Hr Option": "Both",
    }
    return ", ".join(f"{name}: {text_of(value)}" for name, value in values.items())


def read_controls(draft: Draft, pairs: Mapping[str, str]) -> set[str]:
    """Add the control networks in pairs, whose keys are in lower case, to a draft; returns the keys used.

    What is none, or cannot be reproduced, becomes a note.
    """
    units: dict[int, dict[str, str]] = {}
    used = {HINTS.lower()}
    for name, value in pairs.items():
        if (found := ENTRY.fullmatch(name)) is None:
            continue
        used.add(name)
        field = found[2] or found[4]
        parts = {field: value} if field else _parts(value)
        unit = units.setdefault(int(found[1] or found[3] or 0), {})
        unit.update({part.replace("_", " "): text for part, text in parts.items()})
    hints = [HINT.fullmatch(part.strip()) for part in pairs.get(HINTS.lower(), "")[:20_000].split(",")]
    for number_, unit in sorted(units.items())[:MAX_CONTROLS]:
        if unit.get("enabled", "true").lower() != "false":
            hint = hints[number_] if number_ < len(hints) else None
            _read_unit(draft, f"ControlNet {number_}", unit, hint)
    if len(units) > MAX_CONTROLS:
        draft.note(f"only the first {MAX_CONTROLS} of its {len(units)} control networks are read")
    return used


def _parts(text: str) -> dict[str, str]:
    """ "Module: canny, Weight: 1" -> name in lower case -> value."""
    pairs = (part.partition(":") for part in PARTS.split(text[:5000]))
    return {name.strip().lower(): value.strip() for name, colon, value in pairs if colon}


def _read_unit(draft: Draft, label: str, unit: Mapping[str, str], hint: re.Match[str] | None) -> None:
    ours = draft.program.startswith("sd ")
    module = one_line(unit.get("module", unit.get("preprocessor", "none")).lower() or "none", 80)
    model = unit.get("model", "")
    if model.lower() in NONE or NO_NETWORK.search(model):
        draft.note(f"not reproduced: {label}, {one_line(model if model.lower() not in NONE else module)}")
        return
    digits = HASH.search(model)
    use = ControlUse(
        file_name(HASH.sub("", model)) or "unknown",
        digits[1].lower() if digits else "",
        mode=_mode(unit.get("control mode", "")),
        fit=_fit(draft, label, unit.get("resize mode", "")),
        module=module,
        hint=Addon(one_line(hint[1]), digest=hint[2]) if hint else Addon(""),
    )
    span = re.fullmatch(r"\(([^,()]{1,40}),([^,()]{1,40})\)", unit.get("starting/ending", ""))
    given = {
        "scale": unit.get("weight"),
        "start": span[1] if span else unit.get("guidance start"),
        "end": span[2] if span else unit.get("guidance end", unit.get("guidance strength")),
    }
    if module == "canny":
        params = re.fullmatch(r"\(([^,()]{1,40}),([^,()]{1,40}),([^,()]{1,40})\)", unit.get("preprocessor params", ""))
        given |= {
            "low": params[2] if params else unit.get("threshold a"),
            "high": params[3] if params else unit.get("threshold b"),
        }
    use = _checked(draft, label, use, given)
    draft.controls.append(use)
    if not ours and use.mode != "balanced" and (SDXL.search(use.name) or SDXL.search(draft.model.name)):
        draft.note(
            f"{label}: for SDXL, the web UI's residuals are all weaker in this mode: a scale of "
            f"{use.scale * SDXL_SCALE:.3g} is the same here"
        )
    if module == "canny" and not ours:
        draft.note(f"{label}: the edges that canny finds here differ a little from the web UI's")
    elif module not in ("none", "canny"):
        draft.note(f"not reproduced: {label}'s preprocessor {module}: give the map that it makes as the hint")
    if draft.kind == "hires" and (passes := unit.get("hr option", "both").lower()) not in (
        "both",
        "hiresfixoption.both",
    ):
        draft.note(f"not reproduced: {label}'s Hr Option {one_line(passes)}: both passes are controlled")


def _checked(draft: Draft, label: str, use: ControlUse, given: Mapping[str, str | None]) -> ControlUse:
    """The use with these numbers; those that are wrong become notes, and take along what they are compared with."""
    for group in (("scale",), ("start", "end"), ("low", "high")):
        try:
            values = {
                name: number(text.strip())
                for name in group
                if (text := given.get(name)) and text.strip() != "None"
            }  # fmt: skip
            if group[0] == "low":  # -1 stands for the default
                values = {name: value for name, value in values.items() if value != -1}
            if "end" in values and not draft.program.startswith("sd "):
                values["end"] = _end(draft, label, values.get("start", 0.0), values["end"])
            checked = Control("x", Image.new("L", (1, 1)), **values)
        except ValueError as error:
            why = re.sub("^control x: ", "", str(error))
            draft.note(f"{label}: its numbers are left out: {one_line(why, 200)}")
        else:
            use = use._replace(**{name: getattr(checked, name) for name in values})
    return use


def _end(draft: Draft, label: str, start: float, end: float) -> float:
    """What stands here for the end of the web UI, which leaves out step i of n, counted from 0, if i / n is above it.

    Here the whole of a step has to come before the end. Of a hires image, n is that of the first pass.
    """
    if not start <= end < 1:
        return end
    share = draft.settings.get("strength") if draft.kind in ("img2img", "inpaint") else 1.0
    steps = draft.settings.get("steps")
    n = int(steps * share) if steps and share is not None else 0
    if not n:
        draft.note(f"{label}: the web UI controls one step more than this fraction of the steps, {end:g}")
        return end
    return min((math.floor(end * n + 1e-9) + 1) / n, 1.0)


def _mode(text: str) -> str:
    """The mode of a text: that of the user interface, its number, or its name in the source."""
    text = text.lower()
    if text == "1" or "prompt" in text:
        return "prompt"
    return "control" if text == "2" or text.startswith("controlnet is") or text.endswith(".control") else "balanced"


def _fit(draft: Draft, label: str, text: str) -> str:
    text = text.lower()
    if text in ("0", "just resize", "resizemode.resize"):
        draft.note(f"{label}: its hint is stretched to the shape of the image; here it is cropped")
    return "pad" if text in ("2", "resize and fill", "envelope (outer fit)", "resizemode.outer_fit") else "crop"
