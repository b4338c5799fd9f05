"""Routes that list what there is, and those about options and models.

Paths of this machine are not told: where the web UI has one, there is the name of the file.
Source of the forms: AUTOMATIC1111/stable-diffusion-webui modules/api/models.py and modules/sd_schedulers.py.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import torch
from fastapi import APIRouter, Request

from ...runtime.memory import available
from ...samplers import ALIASES, SAMPLERS
from .controlnet import SCRIPT, UNIT
from .errors import PROBLEMS
from .fields import body_of
from .session import session_of

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"], responses=PROBLEMS)
# the web UI's grids that are here: name, label, and what it is here
SCHEDULERS = {
    "automatic": ("Automatic", ""),
    "uniform": ("Uniform", "linspace"),
    "karras": ("Karras", "karras"),
    "exponential": ("Exponential", "exponential"),
    "sgm_uniform": ("SGM Uniform", "sgm"),
    "simple": ("Simple", "trailing"),
    "normal": ("Normal", "linspace"),
    "ddim": ("DDIM", "leading"),
    "lcm": ("LCM", "lcm"),  # ours: the timesteps on which LCMs are distilled
}
LATENT_MODES = ("Latent",)
UPSCALERS = ("None", "Lanczos", "Nearest")
FACTOR = 4  # that the web UI shows of upscalers


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    """The samplers."""
    return [
        {"name": entry.label, "aliases": [f"k_{key}", key, *ALIASES.get(key, ())], "options": {}}
        for key, entry in SAMPLERS.items()
    ]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """The grids of noise levels."""
    return [
        {
            "name": name,
            "label": label,
            "aliases": [ours] if ours not in ("", name) else None,
            "default_rho": 7.0 if name == "karras" else -1.0,
            "need_inner_model": name not in ("automatic", "karras", "exponential"),
        }
        for name, (label, ours) in SCHEDULERS.items()
    ]


@router.get("/sd-models")
async def sd_models(request: Request) -> list[dict[str, Any]]:
    """The models; a hash is null until the model was loaded."""
    return [
        {
            "title": entry.title,
            "model_name": entry.name,
            "hash": entry.hash or None,
            "sha256": entry.sha256() if entry.hash else None,
            "filename": entry.path.name,
            "config": None,
        }
        for entry in session_of(request).engine.catalogue.entries("model")
    ]


@router.get("/sd-vae")
async def sd_vae(request: Request) -> list[dict[str, Any]]:
    """VAEs that replace the model's."""
    entries = session_of(request).engine.catalogue.entries("vae")
    return [{"model_name": entry.path.name, "filename": entry.path.name} for entry in entries]


@router.get("/loras")
async def loras(request: Request) -> list[dict[str, Any]]:
    """LoRAs: <lora:NAME:WEIGHT> in a prompt adds one."""
    entries = session_of(request).engine.catalogue.entries("lora")
    return [{"name": e.name, "alias": e.name, "path": e.path.name, "metadata": {}} for e in entries]


@router.get("/embeddings")
async def embeddings(request: Request) -> dict[str, Any]:
    """Textual inversions: those that the model in memory has, and those that do not fit it."""
    engine = session_of(request).engine
    models = [loaded for worker in engine.workers for loaded in worker.models]
    loaded = next((each for each in reversed(models) if each.entry == engine.current), None)
    words = dict(loaded.words) if loaded else {}
    found: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for entry in engine.catalogue.entries("embedding"):
        known = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 0, "vectors": 0}
        for word in words.get(entry, ())[:1]:
            assert loaded is not None
            known["shape"] = loaded.model.config.text[0].width
            known["vectors"] = len(loaded.model.tokenizer.added[word])
        found["loaded" if entry in words else "skipped"][entry.name] = known
    return found


@router.get("/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    """What enlarges images."""
    unknown = {"model_name": None, "model_path": None, "model_url": None}
    return [{"name": name, **unknown, "scale": 1 if name == "None" else FACTOR} for name in UPSCALERS]


@router.get("/latent-upscale-modes")
async def latent_upscale_modes() -> list[dict[str, str]]:
    """What enlarges latents."""
    return [{"name": name} for name in LATENT_MODES]


@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/prompt-styles")
@router.get("/extensions")
async def nothing() -> list[Any]:
    """There are none."""
    return []


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """The scripts that `alwayson_scripts` may have."""
    return {"txt2img": [SCRIPT], "img2img": [SCRIPT]}


@router.get("/script-info")
async def script_info() -> list[dict[str, Any]]:
    """Their arguments: each is an object with these fields."""
    unit = {name: field.default for name, field in UNIT.items() if field.neutral is None and field.kind != "any"}
    arg = {"label": "ControlNet unit", "value": unit, "minimum": None, "maximum": None, "step": None, "choices": None}
    return [
        {"name": SCRIPT, "is_alwayson": True, "is_img2img": image, "args": [arg]}
        for image in (False, True)
    ]  # fmt: skip


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """The options."""
    return session_of(request).options.shown()


@router.post("/options")
async def set_options(request: Request) -> dict[str, list[str]] | None:
    """Change options; the answer names those that have no effect. A model is loaded by the next request."""
    session = session_of(request)
    values, ignored = await asyncio.to_thread(session.options.checked, await body_of(request))
    session.options.update(values)
    return {"ignored": ignored} if ignored else None


@router.get("/cmd-flags")
async def cmd_flags(request: Request) -> dict[str, Any]:
    """Some of the flags with which the web UI would have been started."""
    settings = session_of(request).engine.settings
    return {
        "api": True,
        "nowebui": False,
        "port": (request.scope.get("server") or (None, settings.port))[1],
        "listen": not settings.is_local,
        "api_auth": None,
        "lowvram": settings.low_memory,
        "medvram": False,
        "no_half": settings.dtype == "float32",
        "no_half_vae": False,
    }


@router.get("/memory")
async def memory(request: Request) -> dict[str, Any]:
    """Memory in bytes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = available(torch.device("cpu"))
    ram = {"error": "unavailable"} if free is None else {"free": free, "used": total - free, "total": total}
    devices = [worker.device for worker in session_of(request).engine.workers if worker.device.type == "cuda"]
    cuda: dict[str, Any] = {"error": "unavailable"}
    if devices:
        free, total = torch.cuda.mem_get_info(devices[0])
        current, peak = torch.cuda.memory_allocated(devices[0]), torch.cuda.max_memory_allocated(devices[0])
        cuda = {
            "system": {"free": free, "used": total - free, "total": total},
            "allocated": {"current": current, "peak": peak},
        }
    return {"ram": ram, "cuda": cuda}


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
@router.post("/refresh-vae")
@router.post("/refresh-embeddings")
async def refresh(request: Request) -> None:
    """Look into the folders again."""
    await asyncio.to_thread(session_of(request).engine.catalogue.refresh)


@router.post("/unload-checkpoint")
async def unload(request: Request) -> dict[str, Any]:
    """Give back the memory of the models, as soon as nothing is generated."""
    for worker in session_of(request).engine.workers:
        worker.unload()
    return {}


@router.post("/reload-checkpoint")
async def reload(request: Request) -> dict[str, Any]:
    """Load the current model, as soon as nothing is generated."""
    for worker in session_of(request).engine.workers:
        worker.reload()
    return {}
