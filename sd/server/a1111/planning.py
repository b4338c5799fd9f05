"""From the fields of a request to the work that it means: requests of the library, with one prompt each.

Where a field is absent, the model's own default is used, and not the web UI's (512x512, 50 steps, CFG scale 7), which
suits few models. Prompts are read with the web UI's syntax. Random numbers are those of torch's CPU generator unless
the option randn_source says NV or GPU, which both stand for an NVIDIA card's.

Seeds as in the web UI: image k of all batches has seed + k, or, with a variation, subseed + k and one seed. Batches
(n_iter) are jobs of their own, which may be computed side by side.

Sources: AUTOMATIC1111/stable-diffusion-webui modules/processing.py (`process_images_inner`, hires fix),
modules/sd_samplers_common.py (`setup_img2img_steps`).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from PIL import Image

from ...params import MAX_SEED, HighRes, ImageToImage, Inpaint, SamplingParams, TextToImage
from ...recipes.recipe import Draft
from ...recipes.webui import AUTOMATIC
from ...samplers import SAMPLERS
from ..catalogue import Entry
from ..engine import Engine
from ..http import ApiError
from ..jobs import Work
from .controlnet import Canvas, control_of, take_units
from .errors import field_error
from .fields import MOST_NAMED, Given
from .images import Budget, Note, initial_images, masked, resize_mode, to_size
from .options import OWN_VAE, RNGS, Options

RANDOM_SEEDS = 2**32 - 2  # the web UI's range of random seeds
# the grids that the web UI chooses where a sampler's default is another one here
AUTOMATIC_GRIDS = {key: grid for key, grid in AUTOMATIC.items() if SAMPLERS[key].spacing != grid}
CHOSEN = ("", "automatic", "default", "use same scheduler", "none")  # schedulers that say nothing
FACTOR = 8  # sides are multiples of it
LATENT = "latent"


class Plan(NamedTuple):
    """The work of a request, and what the answer says about it.

    override   values of options for this request, checked
    seed       of the first image, as is `subseed`, which is chosen even without a variation
    batch      images of a batch: one job, or several with an initial image each
    """

    works: list[Work]
    given: Given
    override: dict[str, Any]
    seed: int
    subseed: int
    batch: int
    ignored: list[str]
    notes: list[str]


def plan(given: Given, options: Options, engine: Engine) -> Plan:
    """The work that a request of txt2img or img2img means. Not to be called in the event loop: it decodes images.

    Raises ApiError and ValueError for what cannot be done; what is not supported is ignored and named.
    """
    notes = dict[str, None]()

    def note(text: str) -> None:
        notes[text] = None

    override, others = options.checked(given["override_settings"])
    ignored = [*given.ignored, *(f"override_settings.{name}" for name in others)]
    settings = options.with_(override)
    budget = Budget(engine.settings.max_image_pixels)
    images: list[Image.Image | None] = [None]
    if "init_images" in given.values:
        images = [*initial_images(given, budget)]
    seed, subseed = (random_if_negative(given[name]) for name in ("seed", "subseed"))
    params = _sampling(given, settings, (seed, subseed), ignored, note)
    units, scripts = take_units(given["alwayson_scripts"], note)
    ignored += scripts
    ignored += [name for name in ("hr_checkpoint_name",) if _asks_for_hires(given) and is_named(given[name])]
    requests = []
    for image in images:
        canvas = Canvas(params.width, params.height, image, budget)
        found = [control_of(unit, i, canvas, engine.catalogue) for i, unit in enumerate(units)]
        ignored += [name for _, names in found for name in names]
        request = TextToImage(
            given["prompt"],
            params,
            given["negative_prompt"],
            web_ui_prompts=True,
            clip_skip=_clip_skip(given, settings),
            controls=[control for control, _ in found if control is not None],
        )
        if image is not None:
            request = _from_image(request, given, image, settings, budget, note)
        elif _asks_for_hires(given):
            request = _high_res(request, given, ignored, note)
        requests.append(request)
    model, vae = override.get("sd_model_checkpoint"), str(settings["sd_vae"])
    batch = params.n if len(images) == 1 else len(images)
    works = [
        Work(request, model.name if isinstance(model, Entry) else None, vae=None if vae.lower() in OWN_VAE else vae)
        for request in _batches(requests, given["n_iter"], batch)
    ]
    names = list(dict.fromkeys(ignored))[:MOST_NAMED]
    return Plan(works, given, override, seed, subseed, batch, names, list(notes))


def check_count(given: Given, most: int) -> None:
    """Raise ApiError if a request is for no images, or more than `most`."""
    for name in ("batch_size", "n_iter"):
        if not 1 <= given[name] <= most:
            raise field_error(name, f"expected 1 to {most}, got {given[name]}")
    if (count := given["batch_size"] * given["n_iter"]) > most:
        raise field_error("n_iter", f"{count} images are too many: this server generates at most {most} for a request")


def random_if_negative(seed: int) -> int:
    """A seed; below 0 it is a random one."""
    return secrets.randbelow(RANDOM_SEEDS) if seed < 0 else seed


def is_named(value: str | None) -> bool:
    """Whether a field names something other than what the first pass has."""
    return bool(value) and not str(value).lower().startswith(("use same", "none"))


def _batches(requests: list[TextToImage], count: int, batch: int) -> Iterator[TextToImage]:
    """The requests of all batches: one for each, or one for each initial image."""
    each = batch // len(requests)
    for i in range(count):
        for k, request in enumerate(requests):
            yield replace(request, params=request.params.batch(i * batch + k, each))


def _sampling(
    given: Given, settings: Mapping[str, Any], seeds: tuple[int, int], ignored: list[str], note: Note
) -> SamplingParams:
    draft = Draft("the web UI")
    name = given["sampler_name"] or given["sampler_index"]
    if name:
        draft.sampler(name, AUTOMATIC_GRIDS)
        if "sampler" not in draft.settings:
            raise ApiError(404, f"Sampler not found: {name!r:.100}; /sdapi/v1/samplers has those that are there")
    sampler = draft.settings.get("sampler")
    if (scheduler := given["scheduler"] or "").strip().lower() not in CHOSEN:
        draft.grid(scheduler, given["steps"], lcm=sampler == "lcm")
    for text in draft.notes:
        note(text)
    options = {}
    if (eta := given["eta"]) is not None and sampler is not None:
        if "eta" in SAMPLERS[sampler].options:
            options = {"eta": eta}
        elif SAMPLERS[sampler].stochastic and eta != 1:
            ignored.append("eta")
    strength = given["subseed_strength"]
    return SamplingParams(
        sampler=sampler,
        steps=given["steps"],
        spacing=draft.settings.get("spacing"),
        guidance=given["cfg_scale"],
        seed=seeds[0],
        n=given["batch_size"],
        height=_side(given, "height", note),
        width=_side(given, "width", note),
        rng=RNGS[settings["randn_source"].upper()],
        noise_seed_delta=settings["eta_noise_seed_delta"],
        variation_seed=seeds[1] % (MAX_SEED + 1) if strength > 0 else None,
        variation_strength=strength,
        tileable=settings["tiling"] if given["tiling"] is None else given["tiling"],
        options=options,
    )


def _side(given: Given, name: str, note: Note) -> int | None:
    """A side of the image, rounded down to a multiple of 8 as in the web UI; a first pass may have its own."""
    side = given[name]
    if _asks_for_hires(given) and given[f"firstphase_{name}"] > 0:
        side = given[f"firstphase_{name}"]
    if side is None:
        return None
    if side < FACTOR:
        raise field_error(name, f"expected at least {FACTOR}, got {side}")
    if side % FACTOR:
        note(f"{name} {side} is not a multiple of {FACTOR}: {side - side % FACTOR} is used")
    return int(side - side % FACTOR)


def _clip_skip(given: Given, settings: Mapping[str, Any]) -> int | None:
    layer = settings["CLIP_stop_at_last_layers"] if given["clip_skip"] is None else given["clip_skip"]
    return int(layer) if layer > 1 else None


def _asks_for_hires(given: Given) -> bool:
    return bool(given.values.get("enable_hr"))


def _high_res(request: TextToImage, given: Given, ignored: list[str], note: Note) -> HighRes:
    """The request with a second pass, of as many steps as the first unless it says how many, as in the web UI."""
    first = {"hr_prompt": "prompt", "hr_negative_prompt": "negative_prompt", "hr_sampler_name": "sampler_name"}
    first["hr_scheduler"] = "scheduler"
    ignored += [name for name, same in first.items() if is_named(given[name]) and given[name] != given[same]]
    name = (given["hr_upscaler"] or LATENT).strip()
    upscaler = LATENT if name.lower().startswith(LATENT) else "lanczos"
    if name.lower() != upscaler:
        note(f"upscaler {name:.60} is not available: {upscaler} is used")
    steps = given["hr_second_pass_steps"] if given["hr_second_pass_steps"] > 0 else given["steps"]
    strength = 0.75 if given["denoising_strength"] is None else given["denoising_strength"]
    return HighRes(
        **_fields(request),
        hires=_scale(request.params, given, note),
        hires_strength=strength,
        hires_steps=steps if strength > 0 else None,
        hires_upscaler=upscaler,
    )


def _scale(params: SamplingParams, given: Given, note: Note) -> float:
    """By how much the second pass is larger: the factor, or what the size wanted needs at least."""
    if given["firstphase_width"] > 0 and given["firstphase_height"] > 0:
        wanted = given["width"] or 0, given["height"] or 0
    else:
        wanted = given["hr_resize_x"], given["hr_resize_y"]
    sides = params.width, params.height
    scales = [target / side for target, side in zip(wanted, sides, strict=True) if target > 0 and side]
    if max(wanted) <= 0:
        return float(given["hr_scale"])
    if not scales:
        raise field_error("hr_resize_x", "it needs width and height of the first pass")
    if len(set(scales)) > 1:
        note(f"the second pass has another shape, {wanted[0]}x{wanted[1]}: it is enlarged {max(scales):g} times here")
    return float(max(scales))


def _from_image(
    request: TextToImage, given: Given, image: Image.Image, settings: Mapping[str, Any], budget: Budget, note: Note
) -> TextToImage:
    """The request of image to image, or of inpainting if there is a mask."""
    params, mode = request.params, resize_mode(given, note)
    strength = given["denoising_strength"]
    mask = masked(given, budget, note)
    if mask is None:
        image = to_size(image, params.width, params.height, mode)
        return ImageToImage(
            **_fields(request), image=image, strength=strength, match_colours=settings["img2img_color_correction"]
        )
    if mask.settings["margin"] is None:  # the whole picture
        part = mask.mask.resize(image.size) if mask.mask.size != image.size else mask.mask
        mask = mask._replace(mask=to_size(part, params.width, params.height, mode))
        image = to_size(image, params.width, params.height, mode)
    return Inpaint(**_fields(request), image=image, strength=strength, mask=mask.mask, **mask.settings)


def _fields(request: TextToImage) -> dict[str, Any]:
    return {each.name: getattr(request, each.name) for each in fields(TextToImage)}
