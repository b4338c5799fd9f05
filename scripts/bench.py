"""Benchmark time and memory, and compare with diffusers and OpenVINO with the same weights if they are installed.

    python scripts/bench.py
    python scripts/bench.py --dtype bfloat16 float32 --parts unet vae --peers openvino
    python scripts/bench.py --parts vae taesd lcm lcm-taesd
    python scripts/bench.py --model sdxl --dtype bfloat16
    python scripts/bench.py --ckpt v1-5-pruned-emaonly.safetensors --json bench.json
    python scripts/bench.py --compare bench.json
    python scripts/bench.py --kernels
    python scripts/bench.py --server

    unet       one step: the network on a batch of two, which is one image with guidance
    control    the same with a control network, and without it again, which gives the cost of control
    vae        latents of one image to pixels
    taesd      the same with a tiny autoencoder
    text       two prompts, encoded by all text encoders of the model
    picture    prompt to image, with --steps steps of DDIM and guidance
    lcm        prompt to image, with --steps steps of LCM without guidance, as few-step models need it
    lcm-taesd  the same with a tiny autoencoder
    start      a new interpreter, imports, weights (ours with and without the cache), and the first step

Each implementation runs in its own process. After a warm-up, whose results are compared, ours and one peer alternate.
Ratios are ours / theirs, of the medians. Peers: diffusers; diffusers with torch.compile ("compiled", without the start
and other sizes, because compiling takes minutes for each shape); diffusers' networks in OpenVINO. Memory is the peak of
a run, weights included. GFLOP/s are compared with the rate of large matrix products and convolutions in the same
precision.

At full size this needs 18 GB of memory and 12 GB of disk in the folder for temporary files (TMPDIR); for SDXL in
bfloat16 20 GB of memory and 28 GB of disk, 7 without --parts start.

    python scripts/bench.py --device cuda --check

checks in at most 7 minutes what works on a GPU, and measures how fast it is: 50 steps, ours and those of diffusers. It
writes the results to gpu.json, or to --json; the exit status is 1 if a check fails. With --tiny it tries the program
itself, also on a CPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

import torch
from tqdm import tqdm

from sd.checkpoints.checkpoint import load_checkpoint, naming
from sd.checkpoints.detect import identify
from sd.config import MODELS, POCKET, SD1, Config
from sd.files import check_writable, exists
from sd.runtime.device import DTYPES, best_dtype, dtype_name, find_device
from sd.runtime.kernel_choice import Measurement
from sd.schedule import LCM_TIMESTEPS

from .benchmark import kernels, report, server
from .benchmark.cases import (
    FEW_STEPS,
    IMAGES,
    LARGE_PARTS,
    LARGE_STEPS,
    PARTS,
    STEPS,
    TINY_VAE,
    Case,
    all_cases,
    config_of,
    usual_case,
)
from .benchmark.gpu import results
from .benchmark.gpu.results import CHECK_FORMAT, MINUTES
from .benchmark.interleave import measure
from .benchmark.sides import PEERS, able_peers, takes_part
from .benchmark.start import TAKING_PART, UNCACHED, is_cached, measure_start, measure_uncached
from .benchmark.weights import Setup
from .common import cli

UNUSED = ("parts", "peers", "steps", "runs", "sizes", "batches", "compare", "show")  # by --check and --kernels
UNUSED_BY_CHECK = (*UNUSED, "ckpt", "model", "dtype", "kernels")
UNUSED_BY_KERNELS = (*UNUSED, "json", "markdown")


def parser() -> cli.Parser:
    """The arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to time (default: all; for SDXL without LCM)"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="implementations to compare with (default: all that can run; none: --peers alone)",
    )
    parser.add_argument(
        "--ckpt",
        type=cli.file_path,
        metavar="FILE",
        help="checkpoint (default: Stable Diffusion 1.x with random weights)",
    )
    parser.add_argument("--model", choices=tuple(MODELS), help="this model, with random weights")
    parser.add_argument("--tiny", action="store_true", help="a small network with random weights, to try this program")
    parser.add_argument("--device", help="cuda, cpu, mps (default: the best available)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="precisions (default: the device's best)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"steps of an image (default: {STEPS}; for SDXL {LARGE_STEPS})"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="measured runs (default: %(default)s)")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[], metavar="N", help="also images of N x N pixels: U-Net and VAE"
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[], metavar="N", help="also batches of N images: the U-Net"
    )
    parser.add_argument(
        "--json", type=cli.file_path, metavar="FILE", help="write machine, versions and all figures to a new file"
    )
    parser.add_argument("--compare", type=cli.file_path, metavar="FILE", help="print the change since such a file")
    parser.add_argument(
        "--show", type=cli.file_path, metavar="FILE", help="print the tables of such a file; measure nothing"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="measure which kernels are the fastest on this CPU, and print their times; nothing else",
    )
    parser.add_argument(
        "--check", action="store_true", help="check what works on a GPU, and how fast it is; --tiny tries the program"
    )
    parser.add_argument("--server", action="store_true", help="measure the server under the load of many clients")
    parser.add_argument("--minutes", type=float, metavar="N", help=f"time limit of --check (default: {MINUTES:g})")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def bench(args: argparse.Namespace) -> int | None:
    """Print the tables of new measurements, or of --show. Returns the exit status of --check."""
    if args.minutes is not None and not args.check:
        raise ValueError("--minutes is for --check only")
    if args.check:
        return check_gpu(args)
    if args.server:
        refuse(args, (*UNUSED_BY_CHECK, "json", "tiny", "device", "threads"), "--server")
        server.measure(partial(print, flush=True))
        return None
    if args.kernels:
        print(kernel_table(args))
        return None
    if args.show and args.json:
        raise ValueError("--json has no effect with --show: leave it out")
    earlier = report.read(args.compare, CHECK_FORMAT) if args.compare else None
    if earlier and earlier["format"] == CHECK_FORMAT:
        raise ValueError(f"--compare {args.compare}: a file of --check; give one that was written without --check")
    if earlier and not args.show:  # before hours of measuring
        check(args)
        check_model(args, earlier, find_config(args).name)
    record = report.read(args.show, CHECK_FORMAT) if args.show else measured(args)
    if record["format"] == CHECK_FORMAT:
        if earlier:
            raise ValueError(f"--compare cannot be used with {args.show}, a file of --check")
        print(results.text(record, args.markdown))
    else:
        check_model(args, earlier, record["machine"]["model"])
        print(report.text(record, args.markdown, earlier))
        if args.json:
            report.write(args.json, record)  # after the tables, as the disk may be full
    return None


def check_gpu(args: argparse.Namespace) -> int:
    """--check: print each result as it comes, then the tables, and write them to a file. Returns the exit status."""
    from .benchmark.gpu import plan  # imports the checks

    start = perf_counter()
    refuse(args, UNUSED_BY_CHECK, "--check")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise ValueError(f"--minutes must be above 0, got {args.minutes:g}")
    check(args)
    device = find_device(args.device)
    if device.type != "cuda" and not args.tiny:
        raise ValueError(
            f"--check needs a GPU, and the device is {device.type}: give --device cuda; "
            "to try the program itself without one, add --tiny"
        )
    file = args.json or free_name("gpu.json")
    check_writable(file.parent)
    with tempfile.TemporaryDirectory(prefix="sd-check-", ignore_cleanup_errors=True) as folder:
        place = plan.Place(str(device), args.tiny, args.threads or torch.get_num_threads(), Path(folder))
        setup = Setup(POCKET if args.tiny else SD1, None, device, "float16", place.threads, Path(folder))
        record = plan.new_record(place, setup)
        running = plan.Running(
            record,
            place.folder,
            60 * (args.minutes or MINUTES) - (perf_counter() - start),
            partial(print, flush=True),
            lambda: report.save(file, record, cli.say),
        )
        try:
            running.all(plan.all_parts(place))
        except KeyboardInterrupt:
            print(f"\n{results.text(record, args.markdown)}\n")
            if file.exists():
                print(f"the results so far are in {file}", flush=True)
            raise
    print(f"\n{results.text(record, args.markdown)}\n")
    report.write(file, record)
    print(f"written to {file}")
    return 1 if results.count(record, "failed") else 0


def refuse(args: argparse.Namespace, names: Sequence[str], mode: str) -> None:
    """Raise ValueError if one of these options was given, which have no effect in this mode."""
    for name in names:
        if getattr(args, name) != parser().get_default(name):
            raise ValueError(f"--{name} has no effect with {mode}: leave it out")


def free_name(name: str) -> Path:
    """The name of a new file in the current folder; with a number if the name is taken."""
    path, number = Path(name), 1
    while path.exists():
        number += 1
        path = Path(name).with_stem(f"{Path(name).stem}-{number}")
    return path


def check_model(args: argparse.Namespace, earlier: report.Row | None, model: str) -> None:
    """Raise ValueError if --compare is a file of another model: equal rows would be of other networks."""
    if earlier and earlier["machine"]["model"] != model:
        then = earlier["machine"]["model"]
        raise ValueError(f"--compare {args.compare}: measured with {then}, not {model}: give one of the same model")


def measured(args: argparse.Namespace) -> report.Row:
    """Measure all figures; they are written to --json after each part."""
    check(args)
    device = find_device(args.device)
    peers, lines = able_peers(args.peers, device)
    for line in lines:
        print(line, flush=True)
    names = args.dtype or [name for name, dtype in DTYPES.items() if dtype == best_dtype(device)]
    config = find_config(args)
    with tempfile.TemporaryDirectory(prefix="sd-bench-", ignore_cleanup_errors=True) as folder:
        setup = Setup(config, args.ckpt, device, names[0], args.threads or torch.get_num_threads(), Path(folder))
        record = {"format": report.FORMAT, "machine": report.machine(setup), "notes": lines, "figures": []}
        setups = [replace(setup, dtype=name) for name in names]
        with tqdm(total=count(args, setups, peers), unit="run", disable=None, leave=False, file=sys.stderr) as bar:
            for setup in setups:
                measure_precision(args, setup, peers, record, bar)
    return record


def kernel_table(args: argparse.Namespace) -> str:
    """The kernels for a model in the given precisions, as text."""
    refuse(args, UNUSED_BY_KERNELS, "--kernels")
    check(args)
    device = find_device(args.device or "cpu")
    if device.type != "cpu":
        raise ValueError(f"--kernels is for CPUs, and the device is {device.type}: leave out --device")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = find_config(args)
    table: dict[str, Measurement] = {}
    for name in args.dtype or [dtype_name(best_dtype(device))]:
        table |= kernels.measure_kernels(config, DTYPES[name])
    return kernels.text(table)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError or OSError for arguments that would fail later."""
    for name in ("steps", "runs", "threads", "sizes", "batches"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ValueError(f"--{name} must be at least 1, got {number}")
    if (args.tiny and args.ckpt) or (args.model and (args.tiny or args.ckpt)):
        raise ValueError("give only one of --ckpt, --model and --tiny")
    if args.json:
        if args.json.is_dir():
            raise ValueError(f"--json {args.json}: a folder; give the name of a new file")
        if args.json.exists():
            raise exists(args.json)
        check_writable(args.json.parent)


def find_config(args: argparse.Namespace) -> Config:
    """The config of the model to measure; its default parts and steps are filled in."""
    if args.ckpt:
        with load_checkpoint(args.ckpt) as checkpoint, naming(args.ckpt):
            config = identify(checkpoint).config
    else:
        config = POCKET if args.tiny else MODELS[args.model or "sd1"]
    large = config.unet.vector is not None  # like SDXL
    if large and args.parts == PARTS:
        args.parts = [part for part in LARGE_PARTS if part not in impossible(config)]
    if args.steps is None:
        args.steps = LARGE_STEPS if large else STEPS
    if not args.kernels:
        check_parts(args, config)
    whole = config.vae.factor * 2 ** (len(config.unet.channels) - 1)  # divisible on all levels of both networks
    for size in args.sizes:
        if size % whole:
            raise ValueError(f"--sizes must be multiples of {whole}, got {size}")
    return config


def check_parts(args: argparse.Namespace, config: Config) -> None:
    """Raise ValueError for parts that this model, or this number of steps, cannot have."""

    def refuse_any(parts: Sequence[str], reason: str) -> None:
        if those := [part for part in parts if part in args.parts]:
            raise ValueError(f"{reason}: leave {', '.join(those)} out of --parts")

    if config.unet.guidance is not None:
        raise ValueError(f"{config.name} takes the guidance as an input, which is not measured: give a model without")
    reason = "only finishes images of another model" if config.is_refiner else "cannot generate from text alone"
    refuse_any(impossible(config), f"{config.name} {reason}")
    if config.vae.factor != config_of("taesd", config).vae.factor:
        refuse_any(TINY_VAE, f"the tiny autoencoder does not fit {config.name}, whose latents have another size")
    if args.steps > LCM_TIMESTEPS:
        refuse_any(FEW_STEPS, f"LCM takes at most {LCM_TIMESTEPS} steps, and --steps is {args.steps}")


def impossible(config: Config) -> tuple[str, ...]:
    """The parts that a model cannot have because it does not make images of a prompt."""
    if config.is_refiner:
        return (*IMAGES, "start")
    return IMAGES if config.is_inpainting else ()


def cases(args: argparse.Namespace, config: Config, part: str) -> list[Case]:
    """The cases of a part other than start."""
    return all_cases(part, config, args.steps, args.sizes, args.batches)


def count(args: argparse.Namespace, setups: list[Setup], peers: list[str]) -> int:
    """The total number of runs."""
    sides = 0
    for setup in setups:
        for part in args.parts:
            if part == "start":
                sides += (2 * len([peer for peer in peers if peer in TAKING_PART]) or 1) + is_cached(setup)
                continue
            for case in cases(args, setup.config, part):
                sides += 2 * len([peer for peer in peers if takes_part(peer, case, setup)]) or 1
    return sides * (args.runs + 1)


def measure_precision(args: argparse.Namespace, setup: Setup, peers: list[str], record: report.Row, bar: tqdm) -> None:
    """Add the rows of one precision to the record."""
    rows: list[report.Row] = []
    peak = 0.0

    def note(line: str) -> None:
        tqdm.write(line)
        record["notes"].append(line)

    done = list(record["figures"])
    for part in [part for part in PARTS if part in args.parts]:
        if part == "start":
            comparison = measure_start(setup, peers, args.runs, bar, note)
            case = usual_case("start", setup.config)
            rows.append(report.row(case, setup, comparison))
            if is_cached(setup):
                alone = measure_uncached(setup, args.runs, bar)
                rows.append({**report.row(case, setup, alone), "label": UNCACHED})
        else:
            those = cases(args, setup.config, part)
            its = setup.of_part(part)
            by_case, reached = measure(its, part, those, peers, args.runs, bar, note)
            rows += [report.row(case, its, comparison) for case, comparison in by_case.items()]
            peak = max(peak, reached)  # of several, as other programs may use the machine
        report.hold_against(rows, peak)
        record["figures"] = done + rows
        if args.json:
            report.save(args.json, record, cli.say)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(bench, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
