"""Settings in the text of the web UI (infotext.py): what its keys mean here, and in Forge, SD.Next and others.

What a key does not say is the default of the program that wrote it: which random numbers, which grid, whether brackets
are weights. Sources: AUTOMATIC1111/stable-diffusion-webui modules/processing.py (create_infotext), infotext_utils.py,
sd_samplers_kdiffusion.py, sd_schedulers.py; vladmandic/sdnext modules/processing_info.py; and the texts of
stable-diffusion.cpp, which have the same form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from ..messages import one_line
from ..params import MAX_SEED, OPTIONS, REQUESTS, SamplingParams
from .control_entries import read_controls
from .fields import keys_read, settings_of
from .infotext import digests, loras_in, parse
from .recipe import MAX_BATCH, PARAMS, WEIGHTED, Addon, Draft, Recipe, file_name, short_list
from .refiner_switch import BY_STEPS, read_switch

# the grids of samplers if "Schedule type" is "Automatic" (from 1.9 on), and if there is none, as in earlier versions
LINEAR = dict.fromkeys(("lms", "euler", "euler_a", "heun", "unipc", "ddpm"), "linspace") | dict.fromkeys(
    ("ddim", "plms"), "leading"
)
KARRAS = ("dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_2m", "dpmpp_sde")
AUTOMATIC = MappingProxyType({**LINEAR, **dict.fromkeys(KARRAS, "karras"), "dpmpp_2m_sde": "exponential"})
UNIFORM = MappingProxyType({**LINEAR, **dict.fromkeys((*KARRAS, "dpmpp_2m_sde"), "linspace")})
RANDOM = {"cpu": "torch-cpu", "gpu": "nv", "nv": "nv", "cuda": "nv", "comfy": "comfy"}
TIMESTEPS = ("ddim", "plms", "unipc")  # samplers of the web UI with a grid of their own, whatever "Schedule type" says
CONTENTS = {"latent noise": "noise"}  # the web UI's names -> ours
# settings that need more than their key (`fields.KEYS`): the functions below
APART = {
    "sampler",
    "spacing",
    "rng",
    "blur",
    "content",
    "margin",
    "web_ui_prompts",
    "hires",
    "hires_steps",
    "hires_upscaler",
}
UPSCALERS = {"latent": "latent", "lanczos": "lanczos"}
# keys that say nothing about the pixels, or are treated below
HARMLESS = {
    "app", "backend", "background", "batch", "batch pos", "batch size", "civitai metadata", "civitai resources",
    "comment", "created date", "embeddings", "emphasis", "first pass size", "generated size", "hashes", "index",
    "init image hash", "init image size", "inpaint area", "long prompts", "lora hashes", "lora networks",
    "lora tags", "lora weights", "loras",
    "mask", "mask hash", "mask mode", "model", "model hash", "negative", "operations", "pad conds", "parser",
    "pipeline", "precision", "prediction", "prompt", "refine", "refiner",
    BY_STEPS, "rng", "sampler", "sampler sigma",
    "sampler spacing", "schedule", "schedule type", "scheduler", "sd_model", "size", "source identifier", "styles",
    "te", "text encoder",
    "ti", "ti hashes", "unet", "used embeddings", "user", "vae", "vae decoder", "vae encoder", "vae hash", "version",
    "web ui prompts", "weights",
}  # fmt: skip
SIZE = re.compile(r"(\d{1,6}) *[xX×] *(\d{1,6})", re.ASCII)
FIRST_PASS = 512 * 512  # pixels of a first pass whose size the web UI of 2022 chose by itself, "0x0"
HIRES = (
    "hires size",
    "hires upscale",
    "hires upscaler",
    "hires resize",
    "hires scale",
    "hires steps",
    "first pass size",
    "second pass",
)
MASKS = ("mask", "mask blur", "mask mode", "masked content", "inpaint area", "masked area padding")


def program_of(pairs: Mapping[str, str], fallback: str = "the web UI") -> str:
    """The program that wrote these settings (keys in lower case)."""
    version, app = pairs.get("version", ""), pairs.get("app", "")
    if version.startswith("sd "):
        return version
    if app:
        return app
    if "operations" in pairs and "pipeline" in pairs:
        return "SD.Next"
    if re.match(r"f\d|neo|forge", version):
        return f"Forge {version}"
    if re.match(r"v?\d", version):
        return f"the web UI {version}"
    return version or fallback


def read_parameters(text: str, fallback: str = "the web UI") -> Recipe:
    """The recipe in such a text; `fallback` names the program if the text does not.

    Raises ValueError if it has no settings at all, only a prompt or nothing.
    """
    parsed = parse(text)
    pairs = {name.lower(): value for name, value in parsed.pairs.items()}
    if not pairs:
        raise ValueError("its text has no settings: a line that begins with 'Steps: ' is missing")
    draft = Draft(program_of(pairs, fallback), info=dict(parsed.pairs))
    ours = draft.program.startswith("sd ")
    draft.kind = _kind(pairs, ours)
    used = set[str]()

    def value(setting: str) -> str | None:
        found = next((name for name in keys_read(setting) if name in pairs), None)
        if found is None or not (pairs[found] or (ours and setting in ("prompt_2", "negative_2"))):
            return None  # apart from second prompts, an empty value is none
        used.add(found)
        return pairs[found]

    strength = {"img2img": "strength", "inpaint": "strength", "hires": "hires_strength"}.get(draft.kind)
    names = set(settings_of(SamplingParams)).union(*map(settings_of, REQUESTS.values()), OPTIONS) - APART
    for name in sorted(names):
        if name != strength and name.endswith("strength") and name not in PARAMS:
            continue
        given = value(name)
        if name == "clip_skip" and not ours and given and re.fullmatch(r"0|-\d{1,3}", given):
            continue  # these mean the default
        if given is not None:
            draft.put(name, given)
    _sampling(draft, pairs, ours)
    read_switch(draft, pairs)
    _prompt_syntax(draft, pairs, parsed.prompt + parsed.negative, ours)
    _size(draft, pairs, ours)
    if draft.kind == "inpaint":
        used |= _mask(draft, pairs, ours)
    if draft.kind == "hires":
        used |= _hires(draft, pairs)
    if draft.kind == "txt2img":
        used.add("denoising strength")  # it is 0: see `_kind`
    _files(draft, pairs)
    used |= read_controls(draft, pairs)
    left = [name for name in parsed.pairs if name.lower() not in used | HARMLESS]
    if left:
        draft.note(f"not reproduced: {short_list(_families(left))}")
    if draft.program.startswith("Fooocus") and pairs.get("styles", "[]") != "[]":
        draft.note(f"not reproduced: the styles {one_line(pairs['styles'])}, which Fooocus adds to the prompt")
    counted = pairs.get("lora tags", "")
    most = int(counted) if ours and re.fullmatch(r"\d{1,6}", counted, re.ASCII) else None
    prompt, draft.loras, notes = loras_in(parsed.prompt, ours, most)
    negative, _, more = loras_in(parsed.negative, ours, 0)  # we write no tags there
    for note in (*notes, *more):
        draft.note(note)
    _resources(draft, pairs.get("civitai resources", ""))
    hashes = _json_hashes(pairs.get("hashes", ""))
    hashes = {file_name(name[5:]): digits for name, digits in hashes.items() if name.startswith("lora:")}
    hashes |= {file_name(name): digits for name, digits in digests(pairs.get("lora hashes", "")).items()}
    known = {lora.name for lora in draft.loras}
    for name, weight in digests(pairs.get("lora weights", "")).items():  # Fooocus
        if file_name(name) not in known:
            draft.lora(name, weight)
            known.add(file_name(name))
    draft.loras = [lora._replace(digest=_hash(hashes.get(lora.name, ""))) for lora in draft.loras]
    # of the prompts of other passes and extensions, or of a site that removes tags
    known = {lora.name for lora in draft.loras}
    if others := [name for name in hashes if name not in known]:
        draft.note(f"not reproduced: the LoRAs {short_list(others)}, which no tag in the prompt names")
    return draft.recipe(prompt, negative)


def _kind(pairs: Mapping[str, str], ours: bool) -> str:
    if any(name in pairs for name in MASKS):
        return "inpaint"
    if any(name in pairs for name in HIRES):
        return "hires"
    operations = pairs.get("operations", "").lower()
    no_image = not ours and "init image hash" not in pairs and "img2img" not in operations
    if no_image and re.fullmatch(r"0(\.0*)?", pairs.get("denoising strength", "")):
        return "txt2img"  # of the web UI's API, where 0 is the default
    if pairs.keys() & {"init image hash", "denoising strength"} or (
        "img2img" in operations and "txt2img" not in operations
    ):
        return "img2img"
    return "txt2img"


def _sampling(draft: Draft, pairs: Mapping[str, str], ours: bool) -> None:
    """Sampler, grid and random numbers."""
    schedule = (
        pairs.get("schedule type")
        or pairs.get("scheduler")
        or pairs.get("sampler sigma")
        or pairs.get("sampler spacing")
        or ""
    )
    next_ = draft.program == "SD.Next"
    if "sampler" in pairs:
        automatic = schedule.lower() == "automatic"
        draft.sampler(pairs["sampler"], {} if ours or next_ else AUTOMATIC if automatic else UNIFORM)
        if draft.settings.get("sampler") == "lcm" and (automatic or not schedule):
            _grid_of_lcm(draft)
    if draft.program.startswith(("the web UI", "Forge")) and draft.settings.get("sampler") in TIMESTEPS:
        schedule = ""
    if schedule and schedule.lower() not in ("automatic", "default", "use same scheduler"):
        draft.grid(schedule, draft.settings.get("steps"))
    rng = pairs.get("rng", "").lower()
    if rng in RANDOM:
        draft.settings["rng"] = RANDOM[rng]
    elif rng:
        draft.note(f"random numbers {one_line(pairs['rng'])} are not available: the image will differ")
    elif ours:  # of a version without this key
        draft.settings["rng"] = "torch-cpu"
    elif draft.program.lower().startswith(("comfyui", "fooocus")):
        draft.settings["rng"] = "comfy"
    else:
        draft.settings["rng"] = "nv"
        if next_:
            draft.note("SD.Next writes no RNG if it is its default, the GPU's: that is assumed")
    if "batch size" in pairs and (ours or draft.settings.get("rng") == "comfy"):
        _batch(draft, pairs)


def _grid_of_lcm(draft: Draft) -> None:
    """The web UI's own grid for LCM is even from timestep 999 to 19 (its sd_samplers_lcm.py)."""
    if draft.program.startswith(("the web UI", "Forge")) and "spacing" not in draft.settings:
        draft.settings["spacing"] = "linspace"
        draft.note("the web UI's grid for LCM ends at timestep 19: linspace is close, but not the same")


def _batch(draft: Draft, pairs: Mapping[str, str]) -> None:
    """The whole batch: ComfyUI's random numbers depend on it, and with others the last bit may."""
    size, at = (draft.number(pairs.get(name, "0"), name.capitalize(), True) for name in ("batch size", "batch pos"))
    if size and size <= MAX_BATCH and at is not None and 0 <= at < size and "seed" in draft.settings:
        draft.put("n", size, "Batch size")
        # image k has seed + k, or variation_seed + k; ComfyUI's share one generator
        counted = "variation_seed" if draft.settings.get("variation_strength", 0.0) > 0 else "seed"
        if draft.settings.get("rng") != "comfy" and counted in draft.settings:
            draft.settings[counted] = (draft.settings[counted] - at) % (MAX_SEED + 1)
        draft.position = at
        if draft.settings.get("rng") == "comfy":
            draft.note(f"the image is number {at + 1} in a batch of {size}, which is generated as a whole")


def _prompt_syntax(draft: Draft, pairs: Mapping[str, str], prompts: str, ours: bool) -> None:
    """Whether brackets are weights, and long prompts are split."""
    emphasis = pairs.get("emphasis", "").lower()
    if ours:
        # images of earlier versions have one of the other two
        syntax = pairs.get("web ui prompts", "").lower() == "true" or emphasis == "original" or "long prompts" in pairs
        draft.settings |= WEIGHTED if syntax else {}
        return
    fixed = pairs.get("parser", "").lower().startswith("fixed")  # SD.Next: brackets are text
    draft.settings |= {} if emphasis == "none" or fixed else WEIGHTED
    if pairs.get("parser", "").lower().startswith("compel"):
        draft.note("SD.Next's parser Compel (word++, .and()) is not available: its syntax stays in the prompt as text")
    if emphasis not in ("", "original", "none"):
        draft.note(f"emphasis {one_line(pairs['emphasis'])} is not available: weights rescale the mean as by default")
    if draft.program.lower().startswith("comfyui") and re.search(r"[(\[]", prompts):
        draft.note("ComfyUI weights words differently: the image will differ")


def _size(draft: Draft, pairs: Mapping[str, str], ours: bool) -> None:
    size = pairs.get("size", "")
    if ours and draft.kind in ("img2img", "inpaint"):  # there it is the size of the result; this is what was asked for
        size = pairs.get("generated size", "autoxauto")
        for name, side in zip(("width", "height"), (size + "x").split("x"), strict=False):
            if side != "auto":
                draft.put(name, side, "Generated size")
        return
    if "first pass size" in pairs:  # of the web UI before hires upscale
        size = _first_pass(pairs)
    if found := SIZE.fullmatch(size):
        draft.size(found[1], found[2])
    elif size:
        draft.note(f"Size is left out: {one_line(size)} is not like 512x512")


def _first_pass(pairs: Mapping[str, str]) -> str:
    """The size of the first pass in the web UI of 2022, whose "Size" is that of the result.

    "0x0" means that it chose a size of the same shape and about 512x512 pixels, of whole multiples of 64.
    """
    size = pairs["first pass size"]
    whole = SIZE.fullmatch(pairs.get("size", ""))
    if size != "0x0" or whole is None:
        return size if size != "0x0" else pairs.get("size", "")
    width, height = int(whole[1]), int(whole[2])
    scale = math.sqrt(FIRST_PASS / max(width * height, 1))
    return "x".join(str(64 * math.ceil(scale * side / 64)) for side in (width, height))


def _mask(draft: Draft, pairs: Mapping[str, str], ours: bool) -> set[str]:
    """The settings of inpainting; returns the keys used."""
    if "mask blur" in pairs:
        draft.put("blur", pairs["mask blur"])
        if not ours and draft.settings.get("blur"):
            draft.note("the web UI blurs a mask in both directions, here only its outside is softened")
    if content := pairs.get("masked content"):
        draft.put("content", CONTENTS.get(content.lower(), content.lower()))
    if pairs.get("inpaint area", "").lower() == "only masked":
        draft.put("margin", pairs.get("masked area padding", "32"))
    return {"mask blur", "masked content", "masked area padding"}


def _hires(draft: Draft, pairs: Mapping[str, str]) -> set[str]:
    """The second pass: enlarged, then image to image; returns the keys used."""
    used = {name for name in pairs if name.startswith("hires ")} | {"denoising strength", "second pass"}
    whole, first = pairs.get("hires resize", ""), (draft.settings.get("width"), draft.settings.get("height"))
    if "first pass size" in pairs:
        whole = pairs.get("size", "")
    by = pairs.get("hires upscale") or pairs.get("hires scale")
    if by is None and (found := SIZE.fullmatch(whole)) and None not in first:
        # a side of 0 follows from the other
        scales = [
            int(side) / before for side, before in zip(found.groups(), first, strict=True) if before and int(side)
        ]
        by = repr(max(scales, default=0.0))
        if len(set(scales)) > 1:
            draft.note(f"the second pass has another shape, {whole}: it is enlarged {float(by):g} times here")
    if by is not None:
        draft.put("hires", by)
    if (steps := pairs.get("hires steps", "0")) != "0":
        draft.put("hires_steps", steps)
    if upscaler := pairs.get("hires upscaler"):
        name = next((ours for theirs, ours in UPSCALERS.items() if upscaler.lower().startswith(theirs)), None)
        draft.settings["hires_upscaler"] = name or "lanczos"
        if name is None or upscaler.lower() not in UPSCALERS:
            draft.note(f"upscaler {one_line(upscaler)} is not available: {name or 'lanczos'} is used")
    others = [name for name in used if pairs.get(name) and name not in HIRES and name != "denoising strength"]
    others = [name for name in others if not pairs[name].lower().startswith("use same")]
    # what is written there, and is the same as in the first pass
    if others := [name for name in others if pairs[name] != pairs.get(name.removeprefix("hires "), "")]:
        draft.note(f"not reproduced: {short_list(sorted(others))}")
    return used


def _files(draft: Draft, pairs: Mapping[str, str]) -> None:
    """Checkpoint, VAE and embeddings, with their hashes."""
    hashes = _json_hashes(pairs.get("hashes", ""))
    digest = _hash(pairs.get("model hash", "")) or hashes.get("model", "")
    draft.model = Addon(file_name(pairs.get("model", "")), digest=digest)
    found = {file_name(name): _hash(digits) for name, digits in digests(pairs.get("ti hashes", "")).items()}
    for name, digits in hashes.items():
        if name.startswith("embed:"):
            found.setdefault(file_name(name[6:]), digits)
    plain = pairs.get("ti") or pairs.get("embeddings") or pairs.get("used embeddings") or ""
    for name in (re.sub(r"\[\w{1,64}\]\Z", "", part.strip()).rstrip() for part in plain[:20_000].split(",")):
        found.setdefault(file_name(name), "")
    draft.embeddings += [Addon(name, digest=digits) for name, digits in found.items() if name]


def _resources(draft: Draft, text: str) -> None:
    """The model and the LoRAs in "Civitai resources", a list of JSON objects: the site's own generator writes no tags.

    Where the prompt has LoRA tags, the list repeats the same LoRAs under other names.
    """
    try:
        found = json.loads(text) if text.startswith("[") else []
    except (ValueError, RecursionError):
        return
    tags = bool(draft.loras)
    for entry in draft.limited(found, "Civitai resources"):
        kind, name = (str(entry.get(key, "")) if isinstance(entry, dict) else "" for key in ("type", "modelName"))
        number = str(entry.get("modelVersionId", "")) if isinstance(entry, dict) else ""
        name = file_name(name) or (f"Civitai model version {number}" if re.fullmatch(r"\d{1,12}", number) else "")
        if kind == "checkpoint" and not draft.model.name:
            draft.model = draft.model._replace(name=name)
        elif kind in ("lora", "lycoris", "locon", "dora"):
            if not tags and name and name not in [lora.name for lora in draft.loras]:
                draft.lora(name, entry.get("weight", 1.0))
        elif kind in ("embed", "textualinversion") and name and name not in [e.name for e in draft.embeddings]:
            draft.embeddings.append(Addon(name))


def _json_hashes(text: str) -> dict[str, str]:
    try:
        found = json.loads(text) if text.startswith("{") else {}
    except (ValueError, RecursionError):
        return {}
    return {str(name): _hash(value) for name, value in found.items() if isinstance(value, str)}


def _hash(text: str) -> str:
    """The digits of a hash in lower case, "" for anything else."""
    digits = text.strip().lower().removeprefix("0x")
    return digits if re.fullmatch(r"[0-9a-f]{6,64}", digits) else ""


def _families(names: list[str]) -> list[str]:
    """Names without the many settings of one extension: "ADetailer model", "ADetailer prompt" -> "ADetailer"."""
    first = [name.split()[0] for name in names]
    return [word if first.count(word) > 1 else name for word, name in zip(first, names, strict=True)]
