"""JSON texts of a file, read with limits; and the recipes of Fooocus and InvokeAI, which are such texts.

Fooocus     "parameters": {"prompt", "negative_prompt", "steps", "guidance_scale", "sampler", "scheduler", "loras", ...}
InvokeAI    "invokeai_metadata" since version 3, "sd-metadata" of version 2, and the command line in "Dream" before

Both programs are also used with other models, whose settings do not exist here: they become notes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..messages import one_line
from .containers import MAX_TEXT
from .recipe import WEIGHTED, Addon, Draft, Recipe, clean, file_name, short_list

# InvokeAI's names of samplers end in "_k" for Karras' grid; all others have the grid of diffusers' models
INVOKE_GRID = {"lms": "leading", "euler": "leading", "euler_a": "leading", "heun": "leading", "dpm2": "leading"}
INVOKE_GRID |= dict.fromkeys(("dpm2_a", "dpmpp_2s_a", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "unipc"), "leading")
INVOKE_GRID |= dict.fromkeys(("ddim", "ddpm", "plms"), "leading") | dict.fromkeys(("lcm", "tcd"), "lcm")
INVOKE_HARMLESS = {
    "app_version", "generation_mode", "positive_prompt", "negative_prompt", "width", "height", "seed", "rand_device",
    "cfg_scale", "cfg_rescale_multiplier", "steps", "scheduler", "seamless_x", "seamless_y", "clip_skip", "model",
    "strength", "init_image", "loras", "vae", "positive_style_prompt", "negative_style_prompt", "_canvas_objects",
    "canvas_v2_metadata", "ref_images", "regions",
}  # fmt: skip
DREAM = re.compile(r'\s*"(.*)"((?:\s+--?[A-Za-z].*)?)\s*', re.DOTALL)
DREAM_OPTION = re.compile(r"\s--?([A-Za-z][\w-]*)(?:[ =](?!-[A-Za-z])(\S+))?")
NESTED_DIGITS = 400  # of a number in JSON; Python's own limit is ten times that


def load_json(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, and for one that is too large or too deeply nested."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"its JSON is larger than {MAX_TEXT >> 20} MB")
    try:
        found = json.loads(text, parse_int=_int, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"its JSON is damaged ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError("its JSON is not an object")
    return found


def _int(digits: str) -> int:
    if len(digits) > NESTED_DIGITS:
        raise ValueError("a number has too many digits")
    return int(digits)


def _no_constant(name: str) -> float | None:
    return None  # ComfyUI writes NaN into its graphs ("is_changed": [NaN])


def text_in(values: Mapping[str, Any], *names: str) -> str:
    """The first of these values that is a text and not empty, or ""."""
    return next((value for name in names if isinstance(value := values.get(name), str) and value), "")


def put(draft: Draft, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Put down settings: our name -> theirs."""
    for ours, theirs in names.items():
        if isinstance(value := values.get(theirs), str | int | float) and value != "":
            draft.put(ours, value, theirs)


def read_fooocus(values: Mapping[str, Any]) -> Recipe:
    """The recipe in Fooocus' JSON."""
    draft = Draft(
        text_in(values, "version") or "Fooocus", info={name: str(value)[:2000] for name, value in values.items()}
    )
    names = {"steps": "steps", "guidance": "guidance_scale", "seed": "seed", "clip_skip": "clip_skip"}
    put(draft, values, names)
    if text_in(values, "sampler"):
        draft.sampler(values["sampler"])
    if text_in(values, "scheduler"):
        draft.grid(values["scheduler"], draft.settings.get("steps"))
    draft.settings |= {"rng": "comfy", **WEIGHTED}  # its back end is ComfyUI's
    resolution = re.findall(r"\d{1,6}", str(values.get("resolution", ""))[:100], re.ASCII)
    if len(resolution) == 2:
        draft.size(*resolution)
    for entry in draft.limited(values.get("loras")):
        if isinstance(entry, list) and len(entry) >= 2 and isinstance(entry[0], str):
            digest = entry[2] if len(entry) > 2 and isinstance(entry[2], str) else ""
            draft.lora(entry[0], entry[1], one_line(digest, 64))
    digest = one_line(text_in(values, "base_model_hash"), 64)
    draft.model = Addon(file_name(text_in(values, "base_model")), digest=digest)
    if text_in(values, "styles") not in ("", "[]"):
        draft.note(f"not reproduced: the styles {one_line(values['styles'])}, which Fooocus adds to the prompt")
    if text_in(values, "refiner_model") not in ("", "None"):
        draft.info["Refiner"] = file_name(values["refiner_model"])
        put(draft, values, {"refiner_from": "refiner_switch"})
    effects = [
        name for name in ("sharpness", "adm_guidance", "adaptive_cfg", "freeu", "inpaint_method") if values.get(name)
    ]
    if effects:
        draft.note(f"not reproduced: {short_list(effects)}")
    return draft.recipe(text_in(values, "prompt").strip(), text_in(values, "negative_prompt").strip())


def read_invokeai(values: Mapping[str, Any]) -> Recipe:
    """The recipe in "invokeai_metadata"."""
    draft = Draft(f"InvokeAI {text_in(values, 'app_version')}".strip(), info=info_of(values))
    names = {"steps": "steps", "guidance": "cfg_scale", "guidance_rescale": "cfg_rescale_multiplier", "seed": "seed"}
    put(draft, values, names)
    if isinstance(skip := values.get("clip_skip"), int) and not isinstance(skip, bool) and skip > 0:
        draft.put("clip_skip", skip + 1, "clip_skip")  # InvokeAI counts the layers that are left out
    _invoke_sampler(draft, text_in(values, "scheduler"))
    draft.size(values.get("width"), values.get("height"))
    draft.settings["rng"] = "torch-cpu" if values.get("rand_device", "cpu") == "cpu" else "nv"
    if values.get("seamless_x") is True and values.get("seamless_y") is True:
        draft.settings["tileable"] = True
    elif values.get("seamless_x") is True or values.get("seamless_y") is True:
        draft.note("not reproduced: tiling in one direction only")
    if "img2img" in text_in(values, "generation_mode") or "inpaint" in text_in(values, "generation_mode"):
        draft.kind = "inpaint" if "inpaint" in values["generation_mode"] else "img2img"
        put(draft, values, {"strength": "strength"})
    for entry in draft.limited(values.get("loras")):
        model = mapping(mapping(entry).get("model") or mapping(entry).get("lora"))
        draft.lora(text_in(model, "name", "model_name"), mapping(entry).get("weight", 1.0))
    model = mapping(values.get("model"))
    digest = text_in(model, "hash").rpartition(":")[2]  # "blake3:..." is another kind of hash
    draft.model = Addon(
        file_name(text_in(model, "name", "model_name")),
        digest=digest if text_in(model, "hash").startswith("sha256:") else "",
    )
    if vae := text_in(mapping(values.get("vae")), "name", "model_name"):
        draft.info["VAE"] = file_name(vae)
    if left := [
        name for name, value in values.items() if name not in INVOKE_HARMLESS and value not in (None, [], {}, 0, "")
    ]:
        draft.note(f"not reproduced: {short_list(left)}")
    prompt, negative = text_in(values, "positive_prompt"), text_in(values, "negative_prompt")
    _invoke_syntax(draft, prompt + negative)
    return draft.recipe(prompt.strip(), negative.strip())


def read_sd_metadata(values: Mapping[str, Any]) -> Recipe:
    """The recipe in "sd-metadata"."""
    draft = Draft(f"InvokeAI {text_in(values, 'app_version')}".strip(), info=info_of(values))
    image = mapping(values.get("image"))
    put(draft, image, {"steps": "steps", "guidance": "cfg_scale", "seed": "seed"})
    _invoke_sampler(draft, text_in(image, "sampler"))
    draft.size(image.get("width"), image.get("height"))
    draft.settings["rng"] = "nv"
    draft.settings["tileable"] = image.get("seamless") is True
    if text_in(image, "type") == "img2img":
        draft.kind = "img2img"
        put(draft, image, {"strength": "strength"})
    digest = one_line(text_in(values, "model_hash"), 64)
    draft.model = Addon(file_name(text_in(values, "model_weights")), digest=digest)
    effects = ("threshold", "perlin", "hires_fix", "postprocessing", "variations", "facetool", "upscale")
    if left := [name for name in effects if image.get(name)]:
        draft.note(f"not reproduced: {short_list(left)}")
    parts = image.get("prompt")
    if isinstance(parts, list):
        texts = [text_in(mapping(part), "prompt") for part in draft.limited(parts, "parts of the prompt")]
        if len(texts) > 1:
            draft.note("the parts of the prompt and their weights are joined: they are not averaged here")
        return _with_brackets(draft, " ".join(texts))
    return _with_brackets(draft, parts if isinstance(parts, str) else "")


def read_dream(text: str) -> Recipe:
    """The recipe in "Dream": the prompt in quotes, then options of one letter.

    >>> recipe = read_dream('"a house [trees]" -s 50 -S 7 -W 512 -H 768 -C 5 -A k_lms')
    >>> recipe.request.prompt, recipe.request.negative, recipe.request.params.height
    (('a house',), 'trees', 768)
    """
    found = DREAM.fullmatch(text)
    if found is None:
        raise ValueError("its Dream command has no prompt in quotes")
    draft = Draft("InvokeAI", info={"Dream": text})
    options: dict[str, str] = dict(DREAM_OPTION.findall(found[2]))
    names = {"steps": "s", "guidance": "C", "seed": "S"}
    put(draft, options, names)
    _invoke_sampler(draft, options.get("A", ""))
    draft.size(options.get("W", "512"), options.get("H", "512"))
    draft.settings["rng"] = "nv"
    if "seamless" in options:
        draft.settings["tileable"] = True
    if "I" in options:
        draft.kind = "img2img"
        put(draft, options, {"strength": "f"})
    effects = {"G": "face restoration", "U": "upscaling", "V": "variations", "v": "variations", "cf": "", "ft": ""}
    others = [
        effects.get(name, f"-{name}")
        for name in options
        if name not in ("s", "C", "S", "A", "W", "H", "I", "f", "n", "seamless")
    ]
    if left := [name for name in others if name]:
        draft.note(f"not reproduced: {short_list(left)}")
    return _with_brackets(draft, found[1])


def _invoke_sampler(draft: Draft, name: str) -> None:
    if not name:
        return
    karras = name.endswith("_k")
    draft.sampler(name.removesuffix("_k"), INVOKE_GRID)
    if karras:
        draft.settings["spacing"] = "karras"


def _with_brackets(draft: Draft, text: str) -> Recipe:
    """Of versions 1 and 2: what is in square brackets is the negative prompt."""
    negative = [part.strip(" ,") for part in re.findall(r"\[([^\[\]]*)\]", text)]
    prompt = [part.strip(" ,") for part in re.split(r"\[[^\[\]]*\]", text)]
    _invoke_syntax(draft, text)
    return draft.recipe(*(clean(", ".join(filter(None, parts))) for parts in (prompt, negative)))


def _invoke_syntax(draft: Draft, text: str) -> None:
    if re.search(r"[\w)][+-]{1,5}(\s|,|$)|\)\d|\.(swap|blend|and)\(", text):
        draft.note(
            "InvokeAI's weights (word++, (words)1.2, .swap, .blend) are not read: they stay in the prompt as text"
        )


def info_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The values for `Recipe.info`: the first 200 of them, as texts of at most 2000 characters."""
    return {str(name): str(value)[:2000] for name, value in list(values.items())[:200]}


def mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, or an empty one in the place of anything else."""
    return value if isinstance(value, dict) else {}
