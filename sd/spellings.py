"""What settings are called in other programs, so that messages can suggest ours.

The names are those of AUTOMATIC1111's web UI and its HTTP interface, diffusers, stable-diffusion.cpp and the original
scripts. They are not accepted, only explained in a message: their meanings differ in details.

>>> nearest("guidanceScale", ["guidance", "steps"]), nearest("step", ["guidance", "steps"]), nearest("x", ["steps"])
('guidance', 'steps', None)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

SETTINGS = {  # ours -> those of others
    "prompt": ("text",),
    "negative": ("negative_prompt", "uc"),
    "n": ("batch_count", "num_images", "num_images_per_prompt", "num_samples", "n_samples", "n_iter", "batch_size"),
    "steps": ("sampling_steps", "num_inference_steps", "sample_steps", "inference_steps", "ddim_steps"),
    "sampler": ("sampling_method", "sampler_name", "sampler_index", "plms", "dpm_solver"),
    "spacing": ("scheduler", "schedule_type", "noise_schedule", "schedule", "timestep_spacing"),
    "guidance": ("guidance_scale", "cfg", "cfg_scale", "scale", "unconditional_guidance_scale"),
    "guidance_rescale": ("cfg_rescale", "rescale_cfg"),
    "guidance_until": ("cfg_end", "cfg_stop", "guidance_end", "cfg_cutoff", "guidance_cutoff", "stop_cfg_at"),
    "cache_interval": ("deepcache", "deep_cache", "deepcache_interval", "deepcache_cache_interval"),
    "eta": ("ddim_eta",),
    "seed": ("manual_seed", "noise_seed"),
    "noise_seed_delta": ("ensd", "eta_noise_seed_delta"),
    "rng": ("randn_source", "generator"),
    "variation_seed": ("subseed", "variation"),
    "variation_strength": ("subseed_strength",),
    "tileable": ("tiling", "tile", "seamless"),
    "hires": ("enable_hr", "hr_scale", "hires_fix", "highres_fix", "hires_scale"),
    "hires_strength": ("hr_denoising_strength",),
    "hires_steps": ("hr_second_pass_steps",),
    "hires_upscaler": ("hr_upscaler",),
    "clip_skip": ("clip_stop_at_last_layers",),
    "image": ("init_img", "init_image", "init_images", "input_image"),
    "strength": ("denoising_strength", "denoising", "denoise"),
    "mask": ("mask_image", "mask_img"),
    "blur": ("mask_blur",),
    "margin": ("only_masked", "inpaint_full_res", "inpaint_full_res_padding", "only_masked_padding"),
    "content": ("inpainting_fill", "masked_content"),
    "fit": ("resize_mode",),
}
OURS = {other: ours for ours, others in SETTINGS.items() for other in others}


def snake_case(name: str) -> str:
    """A name as ours are written: `cfgScale`, `CFG scale` and `cfg-scale` are `cfg_scale`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[ -]", "_", name[:100]).lower()


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known setting that another name most likely means; None if there is none."""
    if (ours := OURS.get(snake_case(name))) is not None:
        return ours if ours in known else None
    near = difflib.get_close_matches(snake_case(name), sorted(known), n=1)
    return near[0] if near else None
