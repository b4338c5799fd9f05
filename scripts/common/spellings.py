"""What to write in place of options of other programs, and of options that only other programs here have.

>>> instead_of("--enable-hr", ["--hires"]), instead_of("--stepps", ["--steps", "--seed"])
('use --hires', 'did you mean --steps?')
>>> instead_of("--mask", ["--prompt"])
'it is an option of inpaint'
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from sd.spellings import SETTINGS, plain

IMAGES = ("txt2img", "img2img", "inpaint")  # programs that share most of their options
POSITIONAL = {"--ckpt", "--out", "--init-img"}  # arguments without names in programs that have none of them
# names elsewhere of options that are not settings of a request, or have another form than those
ELSEWHERE = {
    "--batch-size": ("n_batch",),
    "--width and --height": ("size", "resolution", "image_size"),
    "--variation SEED:STRENGTH": ("subseed", "subseed_strength", "variation", "variation_seed", "variation_strength"),
    "--hires": SETTINGS["hires"],
    "--init-img": ("input", "input_image", "init_image", "init"),
    "--init-img FOLDER": ("input_dir", "init_dir", "batch_input_dir"),
    "--invert-mask": ("inpainting_mask_invert", "mask_mode"),
    "--mask-blur": ("blur", "mask_blur"),
    "--only-masked": ("inpaint_full_res", "inpaint_area", "whole_picture"),
    "--ckpt": ("checkpoint", "model_path", "diffusion_model", "pretrained_model_name_or_path", "sd_model"),
    "--vae": ("vae_path",),
    "--lora-dir": ("lora_model_dir",),
    "--embedding": ("embeddings_dir", "embd_dir", "ti"),
    "--out": ("output", "output_dir", "out_dir", "output_path", "save_dir"),
    "--low-memory": ("medvram", "lowvram", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "offload"),
    "--dtype float32": ("no_half", "no_half_vae", "full_precision", "fp32", "full"),
    "--dtype float16": ("half", "fp16", "half_precision"),
    "": ("xformers", "opt_sdp_attention", "opt_sdp_no_mem_attention", "opt_split_attention", "diffusion_fa"),
}
HERE = {name: f"--{ours.replace('_', '-')}" for ours, names in SETTINGS.items() for name in names} | {
    name: here for here, names in ELSEWHERE.items() for name in names
}


def instead_of(option: str, known: Sequence[str]) -> str | None:
    """What to write instead of an option, or None; `known` are the options that the program has."""
    name = plain(option.partition("=")[0].lstrip("-"))
    here = HERE.get(name)
    if here == "":
        return "leave it out: attention is always memory-efficient here"
    wanted = here.split()[0] if here else f"--{name.replace('_', '-')}"
    if here and wanted in known:
        return f"use {here}"
    if wanted in POSITIONAL and not POSITIONAL & {*known}:
        return "give the file on its own, without an option"
    if "--prompt" in known and (others := [other for other in IMAGES if wanted in _options(other)]):
        own = f", where it is called {here}" if here and wanted != f"--{name.replace('_', '-')}" else ""
        return f"it is an option of {' and '.join(others)}{own}"
    near = difflib.get_close_matches(wanted, known, n=1)
    return f"did you mean {near[0]}?" if near else None


def _options(program: str) -> list[str]:
    """The options of another program. It is imported only here: an error message may take its time."""
    parser = import_module(f"{__package__.rpartition('.')[0]}.{program}").parser()
    return [name for action in parser._actions for name in action.option_strings]
