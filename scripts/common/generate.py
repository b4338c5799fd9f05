"""What txt2img, img2img and inpaint share: arguments, loading with progress, and painting picture after picture."""

from __future__ import annotations

import argparse
import secrets
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageColor
from tqdm import tqdm

import sd
from sd.checkpoints.convert import WEIGHTS
from sd.imaging.files import ImageFile, parameters, read_image
from sd.imaging.previews import LinearDecoder
from sd.imaging.tensors import grid
from sd.params import FITS, MAX_SEED, POSTERIORS, SamplingParams, TextToImage
from sd.pipeline import EMBEDDED, Run
from sd.resources import resource
from sd.runtime.device import DTYPES, dtype_name
from sd.samplers import SAMPLERS, Option
from sd.schedule import SPACINGS
from sd.text.prompt_syntax import chunks

from .adapter_args import AddOns
from .cli import Parser, keep_freed_memory, said
from .output import ModelHash, Output

# precisions by other names; the original's "autocast" is the best for the device
NICKNAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "full": "float32", "autocast": None}
OLD_OPTIONS = {"eta": ("--ddim_eta",)}  # of the original's scripts
PROMPT_FILE_LIMIT = 16 << 20  # bytes
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ANIMATIONS = ("webp", "gif")
STEP_MODES = ("decoded", "linear")
FRAMES = 100  # at most: of a longer run some steps are left out

# makes the request of one prompt: make(prompt, params, negative=..., weighted_prompts=..., long_prompts=...)
Make = Callable[..., TextToImage]


def add_prompt_arguments(parser: Parser, *files: str) -> None:
    """PROMPT and the names of `files` in their places, --prompt, --negative, --from-file."""
    parser.usage = " ".join(["%(prog)s [PROMPT]", *(f"[{name}]" for name in files), "[options]"])
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--prompt", metavar="TEXT", help="what to paint; may be empty")
    parser.add_argument("--negative", "--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument(
        "--from-file", type=Path, metavar="FILE", help='one prompt a line, UTF-8; "-" reads standard input'
    )


def place_words(args: argparse.Namespace, *names: str) -> argparse.Namespace:
    """Give the words that stand without an option to --prompt and then to the options `names`, in their order.

    What is given as an option, and the prompt if there is a file of prompts, has no place of its own.
    """
    given = {name: f"--{name.replace('_', '-')}" for name in ("prompt", *names) if getattr(args, name) is not None}
    if args.from_file is not None:
        given["prompt"] = "--from-file"
    free = [name for name in ("prompt", *names) if name not in given]
    if len(args.words) > len(free):
        why = f" beside {', '.join(given.values())}" if given else ""
        hint = "" if given or names else ": a prompt of several words needs quotes"
        raise ValueError(f"{args.words[len(free)]!r} is one word too many{why}{hint}")
    for name, word in zip(free, args.words, strict=False):
        setattr(args, name, word)
    prompt = Path(args.prompt or "")
    if "prompt" in free and prompt.suffix.lower() in PICTURES and prompt.is_file():
        raise ValueError(f"{prompt} is a picture: the prompt comes first, then the files")
    return args


def add_picture_arguments(parser: Parser, strength: float) -> argparse._ArgumentGroup:
    """--init-img, --strength, --posterior, --background; returns their group, for more."""
    group = parser.add_argument_group("picture")
    group.add_argument("--init-img", "--init_img", "--image", metavar="FILE", help="the picture to start from")
    group.add_argument(
        "--strength", "--denoising-strength", type=float, default=strength, metavar="S",
        help="0 keeps it, 1 starts from noise alone; S of the steps are taken (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--posterior", choices=POSTERIORS, default=POSTERIORS[0],
        help="the encoder's answer: a random sample, as the original takes, or its mean (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--background", type=colour, default="white", metavar="COLOUR",
        help="what is behind transparent pixels: a name or #rrggbb (default: %(default)s)",
    )  # fmt: skip
    return group


def add_fit_argument(group: argparse._ArgumentGroup) -> None:
    """--fit."""
    group.add_argument(
        "--fit", choices=FITS, default=FITS[0],
        help="to the size painted at: cut the picture, or repeat its edges around it (default: %(default)s)",
    )  # fmt: skip


def colour(text: str) -> tuple[int, int, int]:
    """A colour's name or #rrggbb -> (red, green, blue)."""
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour: give a name or #rrggbb") from None


def add_model_arguments(parser: Parser) -> None:
    """--ckpt, --model, --weights, --device, --dtype, --low-memory, --compile."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt",
        type=Path,
        metavar="FILE",
        help="checkpoint: .ckpt, .safetensors or a diffusers folder (default: the embedded model)",
    )
    group.add_argument(
        "--model",
        choices=("auto", *sd.MODELS),
        default="auto",
        help="which model the checkpoint is (default: found out from it)",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="the U-Net as trained (raw) or its moving average (ema) (default: raw if there; of a folder: main)",
    )
    group.add_argument(
        "--prediction", choices=("eps", "v"), help="what the U-Net predicts: noise or velocity (default: found out)"
    )
    group.add_argument("--vae", type=Path, metavar="FILE", help="take the VAE from this file or folder")
    group.add_argument("--text-encoder", type=Path, metavar="FILE", help="take the text encoder from this one")
    group.add_argument("--variant", metavar="NAME", help="of a diffusers folder: fp16, ...")
    group.add_argument("--device", help="cuda, cpu, mps (default: the best there is)")
    group.add_argument(
        "--dtype", "--precision", choices=(*DTYPES, *NICKNAMES), metavar="{" + ",".join(DTYPES) + "}",
        help="precision (default: float16 on CUDA, bfloat16 on CPUs that have it, else float32)",
    )  # fmt: skip
    group.add_argument(
        "--low-memory", action="store_true",
        help="text encoder, U-Net and VAE take turns in the device's memory: the same pictures, a little slower",
    )  # fmt: skip
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the U-Net, for many pictures of one size on a GPU: minutes at first",
    )


def sampler_options() -> dict[str, tuple[Option, list[str]]]:
    """Every option that a sampler has: its declaration, and the samplers that have it."""
    names = dict.fromkeys(name for entry in SAMPLERS.values() for name in entry.options)
    having = {name: [key for key, entry in SAMPLERS.items() if name in entry.options] for name in names}
    return {name: (SAMPLERS[keys[0]].options[name], keys) for name, keys in having.items()}


def add_sampling_arguments(parser: Parser, size: str = "the model's own") -> None:
    """--steps, --guidance, --sampler and its options, --spacing, --seed, --height, --width."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sampler", metavar="NAME",
        help=f"{', '.join(SAMPLERS)}; other tools' names work too, and a grid behind them (default: the model's own: "
        f"{sd.SD1.sampler} for Stable Diffusion, {sd.MODELS['pocket'].sampler} for the embedded model)",
    )  # fmt: skip
    for name in ("plms", "dpm_solver"):  # switches of the original's scripts
        group.add_argument(f"--{name}", dest="sampler", action="store_const", const=name, help=argparse.SUPPRESS)
    usual = ", ".join(f"{name} {entry.steps}" for name, entry in SAMPLERS.items())
    group.add_argument("--steps", "--ddim_steps", type=int, metavar="N", help=f"default: {usual}")
    group.add_argument(
        "--guidance", "--scale", "--cfg-scale", type=float, metavar="G",
        help="how strongly to follow the prompt; 1 is plain, and twice as fast (default: the model's own: 7.5 "
        f"for Stable Diffusion, {sd.MODELS['pocket'].guidance:g} for the embedded model)",
    )  # fmt: skip
    group.add_argument("--spacing", choices=SPACINGS, help="grid of the noise levels (default: the sampler's own)")
    for name, (option, having) in sampler_options().items():
        group.add_argument(
            f"--{name}", *OLD_OPTIONS.get(name, ()), type=type(option.default), metavar=name[0].upper(),
            help=f"{', '.join(having)}: {option.help} (default: {option.default:g})",
        )  # fmt: skip
    group.add_argument(
        "--seed",
        type=int,
        default=-1,
        metavar="S",
        help="picture k has seed S + k (default: -1, a random one, reported)",
    )
    group.add_argument("--height", "--H", type=int, metavar="PIXELS", help=f"a multiple of 8 (default: {size})")
    group.add_argument("--width", "--W", type=int, metavar="PIXELS", help=f"a multiple of 8 (default: {size})")


def add_output_arguments(parser: Parser) -> None:
    """--n, --batch-size, --out, --grid, --save-steps, --no-metadata."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--n", "--n_samples", type=int, default=1, metavar="N", help="pictures for each prompt (default: 1)"
    )
    group.add_argument("--n_iter", type=int, default=1, metavar="N", help="repeat: N times as many pictures")
    group.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="pictures made at once: more memory, faster on GPUs (default: 1)",
    )
    group.add_argument(
        "--out", "--outdir", type=Path, default=Path("outputs"), metavar="PATH",
        help="folder for numbered files, or a name ending in .png (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--grid", action="store_true", help="also save all pictures as one sheet")
    group.add_argument("--skip_grid", dest="grid", action="store_false", help=argparse.SUPPRESS)  # the original's
    group.add_argument(
        "--columns", "--n_rows", type=int, metavar="N", help="columns of the sheet (default: nearly square)"
    )
    group.add_argument(
        "--save-steps", action="store_true", help="also save what each step shows, as pictures and as an animation"
    )
    group.add_argument(
        "--preview", choices=STEP_MODES, default=STEP_MODES[0],
        help="how to make them: by the decoder, or by a linear map, quick and coarse (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--animation", choices=ANIMATIONS, default=ANIMATIONS[0], help="its format (default: %(default)s)"
    )
    group.add_argument("--no-metadata", action="store_true", help="do not write prompt and settings into the PNG files")


def checked(args: argparse.Namespace) -> SamplingParams:
    """Settle the random seed and refuse impossible settings, before a large model is loaded."""
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
        seed=args.seed,
        n=args.n,
        height=args.height,
        width=args.width,
        options={name: getattr(args, name) for name in sampler_options() if getattr(args, name) is not None},
    )


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or the lines of a UTF-8 file ("-" is standard input) that are not blank."""
    if (prompt is None) == (file is None):
        raise ValueError(
            "give either a prompt or --from-file" if prompt is None else "give a prompt or --from-file, not both"
        )
    if file is None:
        return [prompt]
    if str(file) == "-":
        raw = sys.stdin.buffer.read(PROMPT_FILE_LIMIT + 1)
    else:
        with open(file, "rb") as stream:
            raw = stream.read(PROMPT_FILE_LIMIT + 1)
    if len(raw) > PROMPT_FILE_LIMIT:
        raise ValueError(f"{file}: larger than {PROMPT_FILE_LIMIT >> 20} MB, which no list of prompts is")
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: no prompts in it")
    return prompts


def read_init(args: argparse.Namespace, background: tuple[int, int, int] | None) -> ImageFile:
    """The picture that --init-img names; None shows the colours under what is transparent."""
    if args.init_img is None:
        raise ValueError("give the picture to start from, behind the prompt or with --init-img")
    if "://" in args.init_img:
        raise ValueError(f"{args.init_img}: addresses are not fetched; download the picture first")
    return read_image(args.init_img, background)


def about_init(args: argparse.Namespace, init: ImageFile) -> dict[str, object]:
    """What a picture's metadata say about the picture that it was made from."""
    return {
        "Denoising strength": f"{args.strength:g}",
        **({"Posterior": args.posterior} if args.posterior != POSTERIORS[0] else {}),
        **({"Painted size": f"{args.width or 'auto'}x{args.height or 'auto'}"} if args.width or args.height else {}),
        **({"Background": "#{:02x}{:02x}{:02x}".format(*args.background)} if init.alpha is not None else {}),
        "Init image hash": init.digest[:10],
    }


def load(args: argparse.Namespace) -> sd.StableDiffusion:
    """The model that the arguments name, with a progress bar."""
    dtype = NICKNAMES.get(args.dtype, args.dtype)
    if args.ckpt is None and args.model not in ("auto", "pocket"):
        raise ValueError(f"--model {args.model} says what the file is: give it with --ckpt")
    config = None if args.model == "auto" else sd.MODELS[args.model]
    with tqdm(desc="loading", unit=" weights", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:

        def progress(numbers: int, total: int) -> None:
            bar.total = total
            bar.update(numbers)

        model = sd.StableDiffusion.load(
            args.ckpt,
            config=config,
            device=args.device,
            dtype=dtype,
            weights=args.weights,
            prediction=args.prediction,
            vae=args.vae,
            text_encoder=args.text_encoder,
            variant=args.variant,
            low_memory=args.low_memory,
            compile=args.compile,
            progress=progress,
        )
    if model.device.type == "cpu" and not args.low_memory:
        keep_freed_memory()
    return model


class StepRecorder:
    """The progress bar of one run, which keeps what the image seemed to be in each of its steps."""

    def __init__(self, label: str, run: Run, keep: bool) -> None:
        self._label, self._run, self._keep = label, run, keep
        self._x0: list[torch.Tensor] = []  # of each step, if wanted

    def take_steps(self) -> None:
        """Take all steps."""
        every = -(-len(self._run) // FRAMES)
        count = len(self._run)
        for step in tqdm(self._run, desc=self._label, unit="step", disable=None, leave=False, file=sys.stderr):
            if self._keep and ((step.i + 1) % every == 0 or step.i + 1 == count):
                self._x0.append(step.x0.cpu())

    def frames(self, i: int, mode: str) -> list[Image.Image]:
        """The steps of the batch's i-th image: decoded, or mapped to colours linearly, which is quick and coarse."""
        model, finish = self._run.model, self._run.start.finish
        x0 = [step[i : i + 1].to(model.device) for step in self._x0]
        if not x0:
            return []
        decode = model.decode if mode == "decoded" else LinearDecoder.fit(x0[-1], model.decode(x0[-1]))
        bar = tqdm(x0, desc="steps", unit="image", disable=None, leave=False, file=sys.stderr)
        return [finish(decode(z)[0]) for z in bar]


def generate(
    args: argparse.Namespace, params: SamplingParams, make: Make, more: Mapping[str, object] | None = None
) -> None:
    """Make the images of all prompts, saving each as soon as it is there; `more` goes into their metadata."""
    prompts = read_prompts(args.prompt, args.from_file)
    how = {"weighted_prompts": args.weighted_prompts, "long_prompts": args.long_prompts}
    for prompt in prompts:
        make(prompt, params, negative=args.negative, **how)  # refuses what cannot be before a large model is loaded
    addons = AddOns(args, prompts)
    output = Output(args.out)
    model = load(args)
    params = params.resolved(model.config)
    digest = None if args.no_metadata else ModelHash(args.ckpt or resource(EMBEDDED))
    print(f"{model.config.name} on {model.device}, {dtype_name(model.dtype)}, first seed {args.seed}", flush=True)
    for line in model.about:
        print(line, flush=True)
    if model.config.schedule.to_noise and params.spacing not in ("trailing", "linspace"):
        warnings.warn(
            "this model is trained to begin at noise alone (zero terminal SNR), where this grid does not begin: "
            "--spacing trailing",
            stacklevel=1,
        )
    addons.give(model, hashes=not args.no_metadata)

    count = args.n * args.n_iter
    total = count * len(prompts)
    done, kept = 0, []
    for prompt in prompts:
        said.clear()  # what is wrong with one prompt is said once, not for each of its images
        if unknown := unknown_words(model, prompt, args.weighted_prompts, args.long_prompts):
            who = "this model" if args.ckpt else "the embedded model"
            hint = "" if args.ckpt else " (its words: weights/README.md; another model: --ckpt)"
            warnings.warn(f"{who} does not know: {unknown}{hint}", stacklevel=1)
        for first in range(0, count, args.batch_size):
            seed = (args.seed + done) % (MAX_SEED + 1)
            batch = replace(params, seed=seed, n=min(args.batch_size, count - first))
            run = model.prepare(make(prompt, batch, negative=args.negative, **how))
            recorder = StepRecorder(f"image {done + 1} of {total}", run, args.save_steps)
            recorder.take_steps()
            result = run.result()
            for note in result.notes:
                warnings.warn(note, stacklevel=1)
            for i, (image, own_seed) in enumerate(zip(result.images, result.seeds, strict=True)):
                text = None
                if not args.no_metadata:
                    text = describe(args, run, image, replace(batch, seed=own_seed), more, digest, addons)
                path = output.save(image, text)
                print(f"{path}  seed {own_seed}", flush=True)
                if frames := recorder.frames(i, args.preview):
                    print(output.save_steps(frames, path, args.animation), flush=True)
            done += len(result.images)
            kept += result.images if args.grid else []
    if args.grid:
        print(output.save(grid(kept, args.columns), kind="-grid"), flush=True)


def describe(
    args: argparse.Namespace,
    run: Run,
    image: Image.Image,
    params: SamplingParams,
    more: Mapping[str, object] | None,
    digest: ModelHash | None,
    addons: AddOns,
) -> str:
    """The "parameters" text of an image."""
    model = run.model
    assert not isinstance(run.request.prompt, torch.Tensor) and params.sampler and params.spacing
    (prompt,) = run.request.prompt
    digits = digest.digits() if digest else None
    negative = args.negative if params.guidance != 1 else ""  # without effect at 1
    values = {
        "Steps": params.steps,
        "Sampler": SAMPLERS[params.sampler].label,
        "Schedule type": params.spacing.capitalize(),
        "CFG scale": f"{params.guidance:g}",
        "Seed": params.seed,
        "Size": f"{image.width}x{image.height}",
        **(more or {}),
        **{name.capitalize(): f"{value:g}" for name, value in params.options.items()},
        **({"Model hash": digits} if digits else {}),
        "Model": name_of(args.ckpt) if args.ckpt else "pocket",
        **({"Weights": args.weights} if args.weights != "auto" else {}),
        **({"VAE": name_of(args.vae)} if args.vae else {}),
        **addons.about(model, prompt, negative),
        "Precision": dtype_name(model.dtype),
        "Version": f"sd {sd.__version__}",
    }
    return parameters(addons.prompt(prompt), negative, values)


def name_of(path: Path) -> str:
    """What a file or folder is called: a file's name without its ending, a folder's whole name, dots and all."""
    path = path.expanduser().resolve() if path.name in ("", ".", "..") else path
    return path.name if path.is_dir() else path.stem


def unknown_words(model: sd.StableDiffusion, prompt: str, weighted: bool = False, long: bool = False) -> str:
    """The part of a prompt whose tokens have no vector: words that training never met were set to zero."""
    ids = [i for chunk in chunks(model.tokenizer, prompt, weighted, long) for i in chunk.ids]
    ids = torch.tensor(ids, device=model.device, dtype=torch.long)
    known = model.text_encoder.token(ids).abs().sum(dim=-1) > 0
    return model.tokenizer.decode([i for i, is_known in zip(ids.tolist(), known.tolist(), strict=True) if not is_known])
