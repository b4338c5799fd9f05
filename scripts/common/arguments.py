"""The arguments of txt2img, img2img and inpaint, and checks of their values before a model is loaded."""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path
from typing import Any

from PIL import ImageColor

import sd
from sd.checkpoints.convert import WEIGHTS
from sd.config import PREDICTIONS, SHORT_PRECISIONS
from sd.imaging.files import SUFFIXES, ImageFile, read_image
from sd.params import FITS, OPTIONS, POSTERIORS, RNGS, UPSCALERS, HighRes, SamplingParams
from sd.runtime.device import DTYPES
from sd.samplers import SAMPLERS
from sd.schedule import SPACINGS

from .cli import TEXT, Parser, file_path, home, readable
from .xl_args import xl_params

# other names of precisions; "autocast" in the original's scripts is the best for the device
NICKNAMES = {**SHORT_PRECISIONS, "full": "float32", "autocast": None}
OLD_OPTIONS = {"eta": ("--ddim_eta",)}  # names in the original's scripts
ANIMATIONS = ("webp", "gif")
STEP_MODES = ("decoded", "linear")


def add_prompt_arguments(parser: Parser, *files: str) -> None:
    """The positional arguments PROMPT and `files`; --prompt, --negative, --from-file."""
    parser.usage = " ".join(["%(prog)s [PROMPT]", *(f"[{name}]" for name in files), "[options]"])
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--prompt", metavar=TEXT, help="what to generate; may be empty")
    parser.add_argument("--negative", "--negative-prompt", default="", metavar=TEXT, help="what to steer away from")
    parser.add_argument(
        "--from-file",
        type=file_path,
        metavar="FILE",
        help='one prompt per line, UTF-8; "-" reads standard input; .jsonl: {"prompt": "a cat", "seed": 7} per line',
    )


def place_words(args: argparse.Namespace, *names: str) -> argparse.Namespace:
    """Assign the positional arguments to --prompt and then to the options `names`, in this order.

    Those that are given as options are skipped, and so is the prompt if there is a file of prompts.
    """
    given = {name: f"--{name.replace('_', '-')}" for name in ("prompt", *names) if getattr(args, name) is not None}
    if args.from_file is not None:
        given["prompt"] = "--from-file"
    free = [name for name in ("prompt", *names) if name not in given]
    if len(args.words) > len(free):
        why = f" beside {', '.join(given.values())}" if given else ""
        hint = "" if given or names else ": a prompt of several words needs quotes"
        if names == ("init_img",) and os.path.isfile(home(args.words[len(free)])):
            hint = ": for several images, give their folder"
        raise ValueError(f"{args.words[len(free)]!r} is one word too many{why}{hint}")
    for name, word in zip(free, args.words, strict=False):
        setattr(args, name, word if name == "prompt" else home(word))
    args.prompt = args.prompt and readable(args.prompt)
    prompt = Path(args.prompt or "")
    if "prompt" in free and prompt.suffix.lower() in SUFFIXES and os.path.isfile(prompt):  # it may be long
        raise ValueError(f"{prompt} is an image: the prompt comes first, then the files")
    if "prompt" in free and len(args.words) > 1 and os.path.isdir(prompt) and not _is_image(args.words[1]):
        raise ValueError(f"{prompt} is a folder: the prompt comes first, then the files")
    return args


def _is_image(word: str) -> bool:
    """Whether a word names a file that is there, or by its ending an image that is not."""
    return Path(word).suffix.lower() in SUFFIXES or os.path.lexists(home(word))


def add_image_arguments(parser: Parser, strength: float) -> argparse._ArgumentGroup:
    """--init-img, --strength, --posterior, --background; returns their group, to which more can be added."""
    group = parser.add_argument_group("image")
    group.add_argument("--init-img", "--init_img", "--image", type=home, metavar="FILE", help="the image to start from")
    group.add_argument(
        "--strength", "--denoising-strength", type=float, default=strength, metavar="S",
        help="0 keeps the image, 1 starts from pure noise; this share of the steps is taken, with --spacing "
        "lcm all of them (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--posterior", choices=POSTERIORS, default=POSTERIORS[0],
        help="latents of the image: a random sample, as in the original code, or the mean (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--background", type=colour, default="white", metavar="COLOUR",
        help="colour behind transparent pixels: a name or #rrggbb (default: %(default)s)",
    )  # fmt: skip
    return group


def add_fit_argument(group: argparse._ArgumentGroup) -> None:
    """--fit."""
    group.add_argument(
        "--fit", choices=FITS, default=FITS[0],
        help="how to reach the generated size: crop the image, or repeat its edge pixels (default: %(default)s)",
    )  # fmt: skip


def colour(text: str) -> tuple[int, int, int]:
    """The name of a colour or #rrggbb -> (red, green, blue)."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour: give a name or #rrggbb") from None
    return red, green, blue


def add_model_arguments(parser: Parser) -> None:
    """--ckpt, --model, --weights, --device, --dtype, --low-memory, --compile, --no-cache."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt",
        type=file_path,
        metavar="FILE",
        help="checkpoint: .ckpt, .safetensors or a diffusers folder (default: the embedded model)",
    )
    group.add_argument(
        "--model",
        choices=("auto", *sd.MODELS),
        default="auto",
        help="which model the checkpoint is (default: detected)",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="the U-Net as trained (raw) or its moving average (ema) (default: raw if present; main for a folder)",
    )
    group.add_argument(
        "--prediction", choices=PREDICTIONS, help="what the U-Net predicts: noise or velocity (default: detected)"
    )
    group.add_argument(
        "--vae", type=file_path, metavar="FILE", help="take the VAE from this file or folder; also TAESD"
    )
    group.add_argument("--text-encoder", type=file_path, metavar="FILE", help="text encoder from this file or folder")
    group.add_argument(
        "--text-encoder-2", type=file_path, metavar="FILE", help="the same for SDXL's second text encoder"
    )
    group.add_argument("--variant", metavar="NAME", help="variant of a diffusers folder: fp16, ...")
    group.add_argument("--device", help="cuda, cpu, mps (default: the best available)")
    group.add_argument(
        "--dtype", "--precision", choices=(*DTYPES, *NICKNAMES), metavar="{" + ",".join(DTYPES) + "}",
        help="precision (default: float16 on CUDA, bfloat16 on CPUs that support it, else float32)",
    )  # fmt: skip
    group.add_argument(
        "--low-memory", action="store_true",
        help="keep only one of text encoder, U-Net and VAE in device memory: the same images, a little slower",
    )  # fmt: skip
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the U-Net, for many images of one size on a GPU; takes minutes at first",
    )
    group.add_argument(
        "--no-cache", action="store_true",
        help="do not use the user's cache folder, which keeps converted and packed weights (on x86 CPUs) and the "
        "choice of kernels for a faster start",
    )  # fmt: skip


def add_sampling_arguments(parser: Parser, size: str = "the model's own") -> None:
    """--steps, --guidance, --sampler and its options, --spacing, --seed and other random numbers, --height, --width."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sampler", metavar="NAME",
        help=f"{', '.join(SAMPLERS)}; other tools' names work too, optionally ending in a grid (default: by model: "
        f"{sd.SD1.sampler} for Stable Diffusion; the embedded model: lcm with its LoRA for few steps, else "
        f"{sd.MODELS['pocket'].sampler})",
    )  # fmt: skip
    for name in ("plms", "dpm_solver"):  # switches of the original's scripts
        group.add_argument(f"--{name}", dest="sampler", action="store_const", const=name, help=argparse.SUPPRESS)
    defaults = ", ".join(f"{name} {entry.steps}" for name, entry in SAMPLERS.items())
    group.add_argument(
        "--steps", "--ddim_steps", type=int, metavar="N",
        help=f"default: that of a model or LoRA for few steps, or by sampler: {defaults}",
    )  # fmt: skip
    group.add_argument(
        "--guidance", "--scale", "--cfg-scale", type=float, metavar="G",
        help="how strongly to follow the prompt; 1 is no guidance, and twice as fast (default: by model: 7.5 "
        "for Stable Diffusion; the embedded model: 1 with its LoRA for few steps, else "
        f"{sd.MODELS['pocket'].guidance:g})",
    )  # fmt: skip
    group.add_argument(
        "--guidance-rescale", type=float, default=SamplingParams.guidance_rescale, metavar="PHI",
        help="how far to rescale the guided prediction to its contrast without guidance, 0 to 1; 0.7 for models with "
        "zero terminal SNR (default: %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--guidance-until", type=float, default=SamplingParams.guidance_until, metavar="FRACTION",
        help="fraction of the steps that use guidance, starting with the noisiest; the others take half the time, so "
        "0.6 saves a fifth (default: %(default)g, all)",
    )  # fmt: skip
    group.add_argument(
        "--cache-interval", type=int, default=SamplingParams.cache_interval, metavar="K",
        help="DeepCache: run the whole U-Net only in every Kth evaluation, and in between only its last block; "
        "faster, but the image changes (default: %(default)d, which caches nothing)",
    )  # fmt: skip
    group.add_argument("--spacing", choices=SPACINGS, help="timestep spacing (default: by model or sampler)")
    for name, option in OPTIONS.items():
        having = [key for key, entry in SAMPLERS.items() if name in entry.options]
        group.add_argument(
            f"--{name}", *OLD_OPTIONS.get(name, ()), type=type(option.default), metavar=name[0].upper(),
            help=f"{', '.join(having)}: {option.help} (default: {option.default:g})",
        )  # fmt: skip
    group.add_argument(
        "--seed",
        type=int,
        default=-1,
        metavar="S",
        help="image k has seed S + k (default: -1, a random seed, which is printed)",
    )
    group.add_argument(
        "--rng", choices=RNGS, default=SamplingParams.rng,
        help="random number generator: torch-cpu, nv (as the web UI on NVIDIA GPUs) or comfy (as ComfyUI) "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--noise-seed-delta", "--ensd", type=int, default=SamplingParams.noise_seed_delta, metavar="N",
        help="added to the seed for the step noise of stochastic samplers: the web UI's ENSD (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--variation", type=variation, metavar="SEED:STRENGTH",
        help="mix the noise of another seed into the initial one, 0 to 1: similar images; image k has SEED + k; "
        "without SEED it is random, and printed",
    )  # fmt: skip
    group.add_argument("--tileable", action="store_true", help="the image repeats without seams")
    group.add_argument("--height", "--H", type=int, metavar="PIXELS", help=f"a multiple of 8 (default: {size})")
    group.add_argument("--width", "--W", type=int, metavar="PIXELS", help=f"a multiple of 8 (default: {size})")


def variation(text: str) -> tuple[int, float]:
    """SEED:STRENGTH -> both; a seed that is -1 or left out is random."""
    seed, _, strength = text.partition(":")
    try:
        return secrets.randbelow(2**32) if seed in ("", "-1") else int(seed), float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not SEED:STRENGTH, such as 7:0.2") from None


def add_hires_arguments(parser: Parser) -> None:
    """--hires, --hires-strength, --hires-steps, --hires-upscaler."""
    group = parser.add_argument_group("high resolution")
    group.add_argument(
        "--hires", type=float, metavar="S",
        help="generate at --height and --width, enlarge S times (above 1, up to 4), and refine the result",
    )  # fmt: skip
    group.add_argument(
        "--hires-strength", type=float, metavar="S",
        help="strength of the refinement: 0 only enlarges, 1 keeps next to nothing of the image (default: "
        f"{HighRes.hires_strength:g})",
    )  # fmt: skip
    group.add_argument(
        "--hires-steps",
        type=int,
        metavar="N",
        help="steps of the refinement (default: its strength times --steps; with --spacing lcm all --steps)",
    )
    group.add_argument(
        "--hires-upscaler", choices=UPSCALERS,
        help="enlarge the pixels (lanczos), or the latents (latent): faster, but blurred below a strength of 0.5 "
        f"(default: {UPSCALERS[0]})",
    )  # fmt: skip


def hires_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `HighRes` that were given; none without --hires."""
    names = ("hires", "hires_strength", "hires_steps", "hires_upscaler")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and "hires" not in given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} needs --hires, such as --hires 2")
    return given


def add_output_arguments(parser: Parser) -> None:
    """--n, --batch-size, --out, --grid, --save-steps, --no-metadata."""
    group = parser.add_argument_group("output")
    group.add_argument("--n", "--n_samples", type=int, default=1, metavar="N", help="images per prompt (default: 1)")
    group.add_argument("--n_iter", type=int, default=1, metavar="N", help="repeat: N times as many images")
    group.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="images generated at once: more memory, faster on GPUs (default: 1)",
    )
    group.add_argument(
        "--no-memory-check", action="store_true", help="load the model even if free memory does not seem to suffice"
    )
    group.add_argument(
        "--exact", action="store_true",
        help="images are bit-identical in every run and for any --batch-size; slower on CPUs, and batches save no time",
    )  # fmt: skip
    group.add_argument(
        "--out", "--outdir", type=file_path, default=Path("outputs"), metavar="PATH",
        help="folder for numbered files, or a file name ending in .png (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--grid", action="store_true", help="also save all images as one grid")
    group.add_argument(
        "--skip_grid", dest="grid", action="store_false", help=argparse.SUPPRESS
    )  # in the original's scripts
    group.add_argument(
        "--columns", "--n_rows", type=int, metavar="N", help="columns of the grid (default: nearly square)"
    )
    group.add_argument(
        "--save-steps", action="store_true", help="also save the prediction of each step, as images and as an animation"
    )
    group.add_argument(
        "--preview", choices=STEP_MODES, default=STEP_MODES[0],
        help="how to preview steps: with the decoder, or with a linear map, fast and coarse (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--preview-vae", type=file_path, metavar="FILE",
        help="decode the steps of --save-steps with this tiny autoencoder (TAESD; file or folder): much faster, with "
        "less detail; the final image is unchanged",
    )  # fmt: skip
    group.add_argument(
        "--animation", choices=ANIMATIONS, default=ANIMATIONS[0], help="format of the animation (default: %(default)s)"
    )
    group.add_argument("--no-metadata", action="store_true", help="do not write prompt and settings into the PNG files")


def check_previews(args: argparse.Namespace) -> None:
    """Raise ValueError for options of previews that do not go together."""
    if args.preview_vae is not None and not args.save_steps:
        raise ValueError("--preview-vae decodes the steps that --save-steps saves: add --save-steps, or leave it out")
    if args.preview_vae is not None and args.preview != STEP_MODES[0]:
        raise ValueError(f"--preview {args.preview} uses no VAE: leave out --preview or --preview-vae")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters, checked before a large model is loaded. Sets a random `args.seed` if it is -1."""
    if args.seed == -1:
        args.seed = secrets.randbelow(2**32)
    for name in ("n", "n_iter", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('batch_', 'batch-')} must be at least 1, got {getattr(args, name)}")
    if args.columns is not None and args.columns < 1:
        raise ValueError(f"--columns must be at least 1, got {args.columns}")
    return SamplingParams(
        sampler=args.sampler,
        steps=args.steps,
        spacing=args.spacing,
        guidance=args.guidance,
        guidance_rescale=args.guidance_rescale,
        guidance_until=args.guidance_until,
        cache_interval=args.cache_interval,
        seed=args.seed,
        n=args.n,
        exact=args.exact,
        height=args.height,
        width=args.width,
        rng=args.rng,
        noise_seed_delta=args.noise_seed_delta,
        variation_seed=args.variation[0] if args.variation else None,
        variation_strength=args.variation[1] if args.variation else 0.0,
        tileable=args.tileable,
        **xl_params(args),
        options={name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None},
    )


def read_init(args: argparse.Namespace, background: tuple[int, int, int] | None) -> ImageFile:
    """The image given by --init-img. Without a background, the colours of transparent pixels are kept."""
    return read_image(init_path(args), background)


def init_path(args: argparse.Namespace) -> Path:
    """The path given by --init-img."""
    if args.init_img is None:
        raise ValueError("give the image to start from, after the prompt or with --init-img")
    return Path(args.init_img)
