"""What the programs share: arguments, loading with progress, one-line errors, numbered files never replaced."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import os
import re
import secrets
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import sd
from sd.convert import WEIGHTS
from sd.files import exists
from sd.image import parameters, save_png
from sd.pipeline import DTYPES, GUIDANCE, SAMPLER, Steps, check_settings
from sd.samplers import SAMPLERS, sampler
from sd.schedule import SPACINGS

PROMPT_FILE_LIMIT = 16 << 20  # bytes


class Parser(argparse.ArgumentParser):
    """Answers a wrong call with one line instead of the whole usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see --help)\n")


OUT_OF_MEMORY = (
    "out of memory: try --batch-size 1, a smaller --height and --width, --dtype float16 or bfloat16, or --device cpu"
)


def run(
    work: Callable[[argparse.Namespace], None],
    parser: Parser,
    argv: list[str] | None = None,
    out_of_memory: str = OUT_OF_MEMORY,
) -> int:
    """Parse, work, and turn whatever goes wrong through no fault of the program into one line and an exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # a file name that the terminal cannot show is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        try:
            work(args)
        except KeyboardInterrupt:
            tqdm.write("stopped", file=sys.stderr)
            return 130
        except (ValueError, OSError, ArithmeticError) as error:
            return fail(describe(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            return fail(out_of_memory)
    return 0


def fail(message: str, status: int = 1) -> int:
    """Say what is wrong, in one line."""
    tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def describe(error: Exception) -> str:
    """The message of an error; the operating system's say which file and why."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a RuntimeError is the device's or the CPU allocator's "no memory"."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return bool(
        re.search("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", str(error), re.IGNORECASE)
    )


def add_model_arguments(parser: Parser) -> None:
    """--ckpt, --model, --weights, --device, --dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt", type=Path, metavar="FILE", help="checkpoint, .ckpt or .safetensors (default: the embedded model)"
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
        help="the U-Net as trained (raw) or its moving average (ema) (default: raw if there)",
    )
    group.add_argument("--device", help="cuda, cpu, mps (default: the best there is)")
    group.add_argument(
        "--dtype", "--precision", choices=(*DTYPES, "full", "autocast"),
        help="precision (default: float16 on CUDA, bfloat16 on CPUs that have it, else float32)",
    )  # fmt: skip


def add_sampling_arguments(parser: Parser) -> None:
    """--steps, --guidance, --sampler, --spacing, --eta, --seed, --height, --width."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sampler", default=SAMPLER, metavar="NAME",
        help=f"{', '.join(SAMPLERS)}; other tools' names work too, and a grid behind them (default: %(default)s)",
    )  # fmt: skip
    for name in ("plms", "dpm_solver"):  # switches of the original's scripts
        group.add_argument(f"--{name}", dest="sampler", action="store_const", const=name, help=argparse.SUPPRESS)
    usual = ", ".join(f"{name} {entry.steps}" for name, entry in SAMPLERS.items())
    group.add_argument("--steps", "--ddim_steps", type=int, metavar="N", help=f"default: {usual}")
    group.add_argument(
        "--guidance", "--scale", "--cfg-scale", type=float, default=GUIDANCE, metavar="G",
        help="how strongly to follow the prompt; 1 is plain, and twice as fast (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--spacing", choices=SPACINGS, help="grid of the noise levels (default: the sampler's own)")
    group.add_argument(
        "--eta", "--ddim_eta", type=float, metavar="E", help="ddim: share of fresh noise, 0 to 1 (default: 0)"
    )
    group.add_argument(
        "--seed", type=int, default=-1, metavar="S", help="picture k has seed S + k (default: a random one, reported)"
    )
    group.add_argument("--height", "--H", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    group.add_argument("--width", "--W", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")


def add_output_arguments(parser: Parser) -> None:
    """--n, --batch-size, --out, --grid, --no-metadata."""
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
    group.add_argument("--no-metadata", action="store_true", help="do not write prompt and settings into the PNG files")


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Settle the random seed and refuse impossible settings, before a large model is loaded."""
    if args.seed == -1:
        args.seed = secrets.randbelow(2**32)
    for name in ("n", "n_iter", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('batch_', 'batch-')} must be at least 1, got {getattr(args, name)}")
    if args.columns is not None and args.columns < 1:
        raise ValueError(f"--columns must be at least 1, got {args.columns}")
    check_settings(
        sampler(args.sampler), guidance=args.guidance, eta=args.eta, seed=args.seed, n=args.n, steps=args.steps
    )
    return args


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


def load(args: argparse.Namespace) -> sd.StableDiffusion:
    """The model that the arguments name, with a progress bar."""
    dtype = {"full": "float32", "autocast": None}.get(args.dtype, args.dtype)
    config = None if args.model == "auto" else sd.MODELS[args.model]
    with tqdm(desc="loading", unit=" weights", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:

        def progress(numbers: int, total: int) -> None:
            bar.total = total
            bar.update(numbers)

        model = sd.StableDiffusion.load(
            args.ckpt, config=config, device=args.device, dtype=dtype, weights=args.weights, progress=progress
        )
    if model.device.type == "cpu":
        keep_freed_memory()
    return model


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, for the next ones: the next step asks for the same sizes again.

    By default it gives them back to the system, which clears every page of them when they are asked for again. Worth
    2 to 11 % of a U-Net step on the CPU and 17 to 28 % of the VAE, for a few hundred MB that the process keeps.
    Elsewhere than on Linux with glibc this does nothing.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)


def steps_bar(label: str) -> Callable[[Steps], Iterable]:
    """A progress bar for a sampling run."""
    return lambda steps: tqdm(steps, desc=label, unit="step", disable=None, leave=False, file=sys.stderr)


class ModelHash:
    """First ten digits of a checkpoint's SHA-256, as other tools name models; computed while the model paints."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digits: str | None = None
        self._thread = threading.Thread(target=self._compute, daemon=True)  # nobody waits for it who stops the program
        self._thread.start()

    def _compute(self) -> None:
        digest = hashlib.sha256()
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            self._digits = digest.hexdigest()[:10]

    def digits(self) -> str | None:
        """The ten digits, as soon as they are known; None if the file has become unreadable."""
        self._thread.join()
        return self._digits


class Output:
    """Where pictures go: numbered files in a folder, or one name with numbers behind it; no file is ever replaced."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem if path.suffix.lower() == ".png" else None
        if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif"):
            raise ValueError(f"--out {path}: pictures are written as .png, which keeps them unchanged")
        self.folder = path.parent if self.name else path
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".{secrets.token_hex(8)}"  # an unwritable folder should say so before the work
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
        if self.name and path.exists():
            raise exists(path)

    def _names(self, kind: str) -> Iterable[Path]:
        if self.name:
            yield self.folder / f"{self.name}{kind}.png"
            numbers = range(2, 10**9)
            yield from (self.folder / f"{self.name}{kind}-{number}.png" for number in numbers)
        used = [int(found[1]) for name in os.listdir(self.folder) if (found := re.match(r"(\d{1,9})\D", name))]
        yield from (self.folder / f"{number:05d}{kind}.png" for number in range(max(used, default=0) + 1, 10**9 + 1))

    def save(self, image: Image.Image, text: str | None = None, kind: str = "") -> Path:
        """Write a picture under the next free name; returns that name."""
        for path in self._names(kind):
            try:
                save_png(image, path, text)
                return path
            except FileExistsError:  # another program took the number
                continue
        raise OSError(f"{self.folder}: no free name left")


def settings(
    args: argparse.Namespace, prompt: str, image: Image.Image, seed: int, precision: str, digest: ModelHash | None
) -> str | None:
    """The "parameters" text for a picture; None if it is not wanted."""
    if args.no_metadata:
        return None
    chosen = sampler(args.sampler)
    digits = digest.digits() if digest else None
    values = {
        "Steps": args.steps if args.steps is not None else chosen.steps,
        "Sampler": chosen.label,
        "Schedule type": (args.spacing or chosen.spacing).capitalize(),
        "CFG scale": f"{args.guidance:g}",
        "Seed": seed,
        "Size": f"{image.width}x{image.height}",
        **({"Eta": f"{args.eta:g}"} if args.eta is not None else {}),
        **({"Model hash": digits} if digits else {}),
        "Model": args.ckpt.stem if args.ckpt else "pocket",
        **({"Weights": args.weights} if args.weights != "auto" else {}),
        "Precision": precision,
        "Version": f"sd {sd.__version__}",
    }
    return parameters(prompt, args.negative if args.guidance != 1 else "", values)  # without effect at 1
