"""What to write in place of options of other programs, and of options that only other programs here have.

>>> instead_of("--enable-hr", ["--prompt", "--hires"]), instead_of("--stepps", ["--steps", "--seed"])
('use --hires', 'did you mean --steps?')
>>> instead_of("--mask", ["--prompt"]), instead_of("--threads", ["--hires"])
('it is an option of inpaint', None)
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from sd.spellings import SETTINGS, snake_case

IMAGES = ("txt2img", "img2img", "inpaint")  # programs that share most of their options
POSITIONAL = {"--ckpt", "--out", "--init-img"}  # arguments without names in programs that have none of them
ALIKE = 0.75  # of the letters of a misspelt option, at least
# where a program has no option of the first name, but one of the second
INSTEAD = {
    "--width": "--size", "--init-img": "--image", "--image": "--init-img", "--batch-size": "--batch",
    "--steps": "--sample-steps", "--guidance": "--sample-guidance", "--dtype": "--precision",
}  # fmt: skip
# names elsewhere of options that are not settings of a request, or have another form than those
ELSEWHERE = {
    "--n": ("iterations", "n_images"),
    "--batch-size": ("n_batch", "batch_size", "train_batch_size"),
    "--sampler or --spacing": ("scheduler",),
    "--spacing karras": ("karras",),
    "--width and --height": ("size", "resolution", "image_size"),
    "--variation SEED:STRENGTH": ("subseed", "subseed_strength", "variation", "variation_seed", "variation_strength"),
    "--hires": (*SETTINGS["hires"], "upscale", "upscale_by", "hr_resize_x", "hr_resize_y"),
    "--hires-upscaler": ("hires_upscale", "upscaler"),
    "--init-img": ("init_img", "input", "input_image", "init_image", "init"),
    "--init-img FOLDER": ("input_dir", "init_dir", "batch_input_dir"),
    "--invert-mask": ("inpainting_mask_invert", "mask_mode"),
    "--mask-blur": ("blur", "mask_blur"),
    "--only-masked": ("inpaint_full_res", "inpaint_area"),
    "--margin": ("padding_mask_crop", "mask_padding", *SETTINGS["margin"]),
    "--content": ("mask_content", *SETTINGS["content"]),
    "--ckpt": (
        "checkpoint", "checkpoint_path", "from_ckpt", "model_path", "diffusion_model", "pretrained_model_name_or_path",
        "sd_model",
    ),
    "--vae": ("vae_path", "taesd"),
    "--preview-vae": ("taesd_preview_only",),
    "--lora-dir": ("lora_model_dir",),
    "--embedding": ("embeddings_dir", "embd_dir", "ti"),
    "--out": ("output", "output_dir", "out_dir", "output_path", "save_dir", "dump_path"),
    "--low-memory": (
        "medvram", "lowvram", "low_vram", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "offload",
        "offload_to_cpu", "cpu_offload",
    ),
    "--device cpu": ("cpu", "use_cpu"),
    "--device cuda": ("cuda", "gpu"),
    "--dtype float32": ("no_half", "full_precision", "fp32", "full"),
    "--dtype float16": ("half", "fp16", "half_precision"),
    "--dtype bfloat16": ("bf16",),
    "--precision": ("mixed_precision",),
    "--lr": ("learning_rate",),
    "--data": ("train_data_dir", "instance_data_dir"),
}  # fmt: skip
NOT_NEEDED = {
    **dict.fromkeys(
        ("xformers", "opt_sdp_attention", "opt_sdp_no_mem_attention", "opt_split_attention", "diffusion_fa"),
        "attention is always memory-efficient here",
    ),
    "no_half_vae": "an image that is not finite in half precision is decoded again in float32",
    "whole_picture": "it is the default",
}
SHORT = {
    "-p": "--prompt", "-n": "--n", "-W": "--width", "-H": "--height", "-o": "--out", "-m": "--ckpt", "-C": "--guidance",
    "-i": "--init-img", "-S": "--seed", "-A": "--sampler", "-s": "--steps or --seed", "-b": "--batch-size",
}  # fmt: skip
HERE = {name: f"--{ours.replace('_', '-')}" for ours, names in SETTINGS.items() for name in names} | {
    name: here for here, names in ELSEWHERE.items() for name in names
}


def instead_of(option: str, known: Sequence[str]) -> str | None:
    """What to write instead of an option, or None; `known` are the options that the program has."""
    if len(option) == 2:
        return f"use {SHORT[option]}" if SHORT.get(option, "").split(" ")[0] in known else None
    name = snake_case(option.partition("=")[0].lstrip("-"))
    if name in NOT_NEEDED:
        return f"leave it out: {NOT_NEEDED[name]}"
    here, dashed = HERE.get(name), f"--{name.replace('_', '-')}"
    wanted = here.split()[0] if here else dashed
    samples = "--prompt" in known  # elsewhere, steps are those of training
    if here and wanted in known and (samples or wanted not in INSTEAD or wanted == "--dtype"):
        return f"use {here}"
    if (other := INSTEAD.get(wanted)) in known:
        return f"use {other}"
    if wanted in POSITIONAL and not POSITIONAL & {*known}:
        return "give the file on its own, without an option"
    if samples and (programs := [program for program in IMAGES if wanted in _options(program)]):
        called = f", where it is called {here}" if here and wanted != dashed else ""
        return f"it is an option of {' and '.join(programs)}{called}"
    near = [] if here else difflib.get_close_matches(name, [word.lstrip("-") for word in known], 1, ALIKE)
    return f"did you mean --{near[0]}?" if near else None


def _options(program: str) -> list[str]:
    """The options of another program. It is imported only here: an error message may take its time."""
    parser = import_module(f"{__package__.rpartition('.')[0]}.{program}").parser()
    return [name for action in parser._actions for name in action.option_strings]
