"""The answers to txt2img and img2img: images, an echo of the request, and "info", a text with JSON.

Source of the form: AUTOMATIC1111/stable-diffusion-webui modules/processing.py (`Processed.js`) and modules/api/api.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ... import __version__
from ...imaging.files import png_bytes
from ...params import MAX_SEED
from ...recipes.infotext import parse
from ..jobs import Finished
from .options import OWN_VAE
from .planning import Plan

IMAGES = ("image", "input_image", "mask", "mask_image")  # fields of ControlNet units, which are not echoed
# entries of the text that "info" has under another name
NAMED = {
    "Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Model hash", "VAE", "Denoising strength", "Clip skip",
    "Variation seed", "Variation seed strength", "Version", "Batch size", "Batch pos",
}  # fmt: skip


def answer(plan: Plan, finished: Sequence[Finished], stamp: str, inpainting: bool) -> bytes:
    """The body of the answer, in ASCII. Takes a while: not to be called in the event loop.

    stamp        when the request came
    inpainting   whether the model receives the mask as input
    """
    images = [
        encoded(image, text)
        for each in finished
        for image, text in zip(each.images, each.texts, strict=True)
        if plan.given["send_images"]
    ]
    body = {
        "images": images,
        "parameters": echo(plan),
        "info": json.dumps(info(plan, finished, stamp, inpainting)),
    }
    return json.dumps(body).encode("ascii")


def encoded(image: Image.Image, text: str | None = None) -> str:
    """An image as PNG in base64, with its parameters."""
    return base64.b64encode(png_bytes(image, text)).decode("ascii")


def echo(plan: Plan) -> dict[str, Any]:
    """The fields of the request with the defaults of those absent, without images."""
    values = dict(plan.given.values)
    if "init_images" in values and not values["include_init_images"]:
        values["init_images"] = values["mask"] = None
    values.pop("include_init_images", None)
    values["alwayson_scripts"] = _without_images(values["alwayson_scripts"])
    return values


def _without_images(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: None if name in IMAGES else _without_images(each) for name, each in value.items()}
    return [_without_images(each) for each in value] if isinstance(value, list) else value


def info(plan: Plan, finished: Sequence[Finished], stamp: str, inpainting: bool) -> dict[str, Any]:
    """What the web UI says about the images of a request; `ignored` and `notes` are ours."""
    given, first = plan.given, finished[0]
    count = plan.batch * given["n_iter"]
    varied = given["subseed_strength"] > 0
    seeds = [(plan.seed + (0 if varied else k)) % (MAX_SEED + 1) for k in range(count)]
    texts = [text for each in finished for text in each.texts]
    pairs = parse(texts[0]).pairs
    notes = dict.fromkeys([*plan.notes, *(note for each in finished for note in each.notes)])
    vae = plan.works[0].vae or ""
    width, _, height = pairs.get("Size", "0x0").partition("x")
    return {
        "prompt": given["prompt"],
        "all_prompts": [given["prompt"]] * count,
        "negative_prompt": given["negative_prompt"],
        "all_negative_prompts": [given["negative_prompt"]] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": plan.subseed,
        "all_subseeds": [(plan.subseed + k) % (MAX_SEED + 1) for k in range(count)],
        "subseed_strength": given["subseed_strength"],
        "width": int(width),
        "height": int(height),
        "sampler_name": pairs.get("Sampler", ""),
        "cfg_scale": float(pairs.get("CFG scale", 0)),
        "steps": int(pairs.get("Steps", 0)),
        "batch_size": plan.batch,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": pairs.get("Model", first.model),
        "sd_model_hash": first.model_hash,
        "sd_vae_name": None if vae.lower() in OWN_VAE else vae,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": given["denoising_strength"],
        "extra_generation_params": {name: value for name, value in pairs.items() if name not in NAMED},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": stamp,
        "clip_skip": plan.works[0].request.clip_skip or 1,
        "is_using_inpainting_conditioning": inpainting,
        "version": f"sd {__version__}",
        "interrupted": any(each.interrupted for each in finished),
        "ignored": plan.ignored,
        "notes": list(notes),
    }
