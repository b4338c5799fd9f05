"""Recipes of programs that write settings in a form of their own: NovelAI, Easy Diffusion, Draw Things, SwarmUI.

NovelAI          PNG texts: "Description" is the prompt, "Comment" JSON {"steps", "sampler", "seed", "scale", "uc", ...}
Easy Diffusion   PNG texts of one setting each: "prompt", "seed", "num_inference_steps", ...; or JSON, or lines of text
Draw Things      EXIF or XMP with JSON {"c": prompt, "uc": negative prompt, "seed", "sampler", "v2": {...}, ...}
SwarmUI          "parameters": {"sui_image_params": {"prompt", "negativeprompt", "cfgscale", "loras", ...}}

What they do not write is their default, as far as it is known.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from ..messages import one_line
from .json_texts import info_of, load_json, mapping, put, text_in
from .recipe import WEIGHTED, Addon, Draft, Recipe, file_name, short_list
from .webui import UNIFORM

NOVELAI_EFFECTS = ("sm", "sm_dyn", "dynamic_thresholding", "reference_image", "v4_prompt", "uncond_scale")
DRAW_THINGS_SEEDS = {"torch cpu compatible": "torch-cpu", "1": "torch-cpu", "nvidia gpu compatible": "nv", "3": "nv"}
EASY = {  # lines of its text files -> names of its PNG texts
    "prompt": "prompt", "negative prompt": "negative_prompt", "seed": "seed", "steps": "num_inference_steps",
    "guidance scale": "guidance_scale", "width": "width", "height": "height", "sampler": "sampler_name",
    "stable diffusion model": "use_stable_diffusion_model", "lora model": "use_lora_model", "lora": "use_lora_model",
    "vae model": "use_vae_model", "prompt strength": "prompt_strength", "lora strength": "lora_alpha",
    "use face correction": "use_face_correction", "use upscaling": "use_upscale", "clip skip": "clip_skip",
}  # fmt: skip
# an entry of a list as Python writes it: ['a', "b's", None, 0.5]
ENTRY = re.compile(
    r"""\s*(?:'([^'\\]*(?:\\.[^'\\]*)*)'|"([^"\\]*(?:\\.[^"\\]*)*)"|([^'"\[\],]*))\s*(?:,|\]|\Z)""", re.DOTALL
)
COMMENT = "<exif:UserComment>"


def read_novelai(texts: Mapping[str, str]) -> Recipe:
    """The recipe in the texts of an image of NovelAI. Raises ValueError if there are no settings."""
    values = load_json(texts.get("Comment", ""))
    source = texts.get("Source", "")
    draft = Draft("NovelAI", info=info_of(values))
    put(draft, values, {"steps": "steps", "guidance": "scale", "seed": "seed", "guidance_rescale": "cfg_rescale"})
    if name := text_in(values, "sampler"):
        draft.sampler(name, UNIFORM)
    if (grid := text_in(values, "noise_schedule")) not in ("", "native"):
        draft.grid(grid, draft.settings.get("steps"))
    if "width" in values or "height" in values:
        draft.size(values.get("width"), values.get("height"))
    else:
        draft.note("the size is not among its settings: give it with --width and --height")
    draft.settings["rng"] = "nv"
    if re.fullmatch(r"Stable Diffusion [0-9A-F]{8}", source):  # its first models: of Stable Diffusion 1
        draft.settings |= {"noise_seed_delta": 31337, "clip_skip": 2}
    draft.model = Addon(f"{source}, of NovelAI" if source else "")  # its hash is of an unknown kind
    draft.info["Source"] = source
    if "img2img" in text_in(values, "request_type").lower():
        draft.kind = "img2img"
        put(draft, values, {"strength": "strength"})
    if left := [name for name in NOVELAI_EFFECTS if values.get(name)]:
        draft.note(f"not reproduced: {short_list(left)}")
    prompt = texts.get("Description") or text_in(values, "prompt")
    negative = text_in(values, "uc")
    if re.search(r"[{}\[\]]", prompt + negative):
        draft.note("NovelAI's weights, { } and [ ], are not read: they stay in the prompt as text")
    return draft.recipe(prompt.strip(), negative.strip())


def easy_lines(text: str) -> dict[str, str]:
    """The settings in a text file of Easy Diffusion, one in each line; none if it is another text."""
    if not text.startswith("Prompt: ") or "\nGuidance Scale: " not in text:
        return {}
    pairs = (line.partition(":") for line in text.split("\n"))
    return {EASY[name.lower()]: value.strip() for name, _, value in pairs if name.lower() in EASY}


def read_easy_diffusion(values: Mapping[str, Any]) -> Recipe:
    """The recipe in the settings of Easy Diffusion."""
    draft = Draft("Easy Diffusion", info=info_of(values))
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "seed": "seed"}
    put(draft, values, names)
    if name := text_in(values, "sampler_name"):
        draft.sampler(name, UNIFORM)
    draft.size(values.get("width", 512), values.get("height", 512))
    draft.settings["rng"] = "nv"
    if str(values.get("clip_skip")).lower() == "true":
        draft.settings["clip_skip"] = 2
    if str(values.get("tiling", "none")).lower() == "xy":
        draft.settings["tileable"] = True
    _loras(draft, *(_entries(values.get(key)) for key in ("use_lora_model", "lora_alpha")))
    draft.model = Addon(file_name(text_in(values, "use_stable_diffusion_model")))
    if (vae := text_in(values, "use_vae_model")) not in ("", "None"):
        draft.info["VAE"] = file_name(vae)
    if text_in(values, "init_image", "init_image_path"):
        draft.kind = "img2img"
        put(draft, values, {"strength": "prompt_strength"})
    effects = ("use_face_correction", "use_upscale", "use_hypernetwork_model", "use_controlnet_model")
    if left := [name for name in effects if str(values.get(name) or "None") not in ("None", "False")]:
        draft.note(f"not reproduced: {short_list(left)}")
    return draft.recipe(text_in(values, "prompt").strip(), text_in(values, "negative_prompt").strip())


def _entries(value: object) -> list[Any]:
    """A list in JSON, or as text in the form of JSON or of Python; any other value is the only entry."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.strip().startswith("["):
        return [value]
    text = value.strip()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        pass
    else:
        return found if isinstance(found, list) else [text]
    entries, at = list[Any](), 1
    while at < len(text) and (entry := ENTRY.match(text, at)):
        single, double, plain = entry.groups()
        quoted = double if single is None else single
        entries.append(plain.strip() if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL))
        at = entry.end()
    return entries


def _loras(draft: Draft, files: list[Any], weights: list[Any]) -> None:
    """Add LoRAs, each with the weight at the same place, 1 if there is none."""
    pairs = [(file, weights[i] if i < len(weights) else 1.0) for i, file in enumerate(files)]
    for file, weight in draft.limited([pair for pair in pairs if str(pair[0] or "").strip() not in ("", "None")]):
        draft.lora(str(file).strip(), 1.0 if weight in (None, "") else weight)


def xmp_json(text: str) -> str:
    """The JSON in an XMP packet of Draw Things, "" if there is none."""
    start = text.find(COMMENT)
    entry = text.find("<rdf:li", start, start + 500) if start >= 0 else -1
    body = text.find(">", entry, entry + 200) + 1 if entry >= 0 else 0
    end = text.find("</rdf:li>", body) if body else -1
    found = text[body:end].strip() if end >= 0 else ""
    return html.unescape(found) if found.startswith("{") and found.endswith("}") else ""


def read_draw_things(values: Mapping[str, Any]) -> Recipe:
    """The recipe in the JSON of Draw Things."""
    more = mapping(values.get("v2"))
    draft = Draft("Draw Things", info=info_of(values))
    put(draft, values, {"steps": "steps", "guidance": "scale", "seed": "seed"})
    if name := text_in(values, "sampler"):
        draft.sampler(name, UNIFORM)
    if draft.settings.get("sampler") == "tcd":
        put(draft, more, {"gamma": "stochasticSamplingGamma"})
    if found := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text_in(values, "size"), re.ASCII):
        draft.size(found[1], found[2])
    mode = str(values.get("seed_mode", more.get("seedMode", ""))).lower()
    if mode in DRAW_THINGS_SEEDS:
        draft.settings["rng"] = DRAW_THINGS_SEEDS[mode]
    else:
        draft.note(f"random numbers {one_line(mode) or 'of Draw Things'} are not available: the image will differ")
    if isinstance(skip := more.get("clipSkip"), int) and not isinstance(skip, bool) and skip > 1:
        draft.put("clip_skip", skip, "clipSkip")
    if isinstance(strength := values.get("strength"), int | float) and strength < 1:
        draft.kind = "img2img"
        draft.put("strength", strength, "strength")
    for entry in draft.limited(values.get("lora") or more.get("loras")):
        draft.lora(text_in(mapping(entry), "model", "file"), mapping(entry).get("weight", 1.0))
    draft.model = Addon(file_name(text_in(values, "model")))
    if left := [name for name in ("hiresFix", "controls", "refinerModel", "upscaler") if more.get(name)]:
        draft.note(f"not reproduced: {short_list(left)}")
    draft.settings |= WEIGHTED
    return draft.recipe(text_in(values, "c").strip(), text_in(values, "uc").strip())


def read_swarm(values: Mapping[str, Any]) -> Recipe:
    """The recipe in "sui_image_params" of SwarmUI, whose back end is ComfyUI."""
    draft = Draft(f"SwarmUI {text_in(values, 'swarm_version')}".strip(), info=info_of(values))
    put(draft, values, {"steps": "steps", "guidance": "cfgscale", "seed": "seed"})
    if name := text_in(values, "sampler"):
        draft.sampler(name)
    if name := text_in(values, "scheduler"):
        draft.grid(name, draft.settings.get("steps"))
    draft.size(values.get("width"), values.get("height"))
    draft.settings |= {"rng": "comfy", **WEIGHTED}
    if found := re.fullmatch(r"-(\d{1,2})", str(values.get("clipstopatlayer", "")), re.ASCII):
        draft.put("clip_skip", found[1], "clipstopatlayer")
    if "initimagecreativity" in values:
        draft.kind = "img2img"
        put(draft, values, {"strength": "initimagecreativity"})
    files, weights = (
        entry if isinstance(entry, list) else str(entry or "").split(",")
        for entry in (values.get("loras"), values.get("loraweights"))
    )
    _loras(draft, files, weights)
    draft.model = Addon(file_name(text_in(values, "model")))
    if left := [name for name in values if name.startswith(("refiner", "controlnet", "variationseed", "video"))]:
        draft.note(f"not reproduced: {short_list(left)}")
    return draft.recipe(text_in(values, "prompt").strip(), text_in(values, "negativeprompt").strip())
