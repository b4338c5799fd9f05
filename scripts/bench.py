"""How fast this is, beside diffusers with the same weights where it is installed.

    python scripts/bench.py
    python scripts/bench.py --dtype bfloat16 float32 --parts unet vae --markdown
    python scripts/bench.py --ckpt v1-5-pruned-emaonly.safetensors --json bench.json

    unet     one step: the network on a batch of two, which is one picture with guidance
    vae      latents of one picture to pixels
    text     two prompts
    picture  prompt to picture, with --steps steps of DDIM and guidance
    start    a new interpreter, imports, a float16 file of weights, and the first step

Each part runs once unmeasured; then ours and theirs take turns, and the medians are compared. GFLOP/s are held against
what the machine reaches in the same precision: the better of a large matrix product and a large convolution, as torch
computes the two with different libraries, of which one may be far from the best on a given processor.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

if not __package__:  # run as a file, from any folder, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sd
from sd.checkpoints.export import to_own
from sd.checkpoints.identity import CONFIG_KEY
from sd.config import POCKET, SD1, Config
from sd.device import DTYPES, best_dtype, find_device
from sd.loading import build, load_weights
from sd.pipeline import StableDiffusion

if __package__:
    from . import cli
    from .peers import LAYOUTS, REQUIRED, missing, peers, pipeline
else:
    from scripts import cli
    from scripts.peers import LAYOUTS, REQUIRED, missing, peers, pipeline

PARTS = ("unet", "vae", "text", "picture", "start")
PROMPTS = ("a photograph of an astronaut riding a horse", "")
GUIDANCE = 7.5
WEIGHT_STD = 0.7  # of random weights, times the root of the fan-in: below 1, so that half precision never overflows
MAX_DIFFERENCE = 0.2  # relative, between two bfloat16 runs of a deep network; more is another network
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product may be the machine's best
PEAK_CHANNELS, PEAK_SIDE = 512, 64  # of the convolution that may be: the VAE's and the U-Net's are like it

# What a new interpreter runs: from nothing to the first step. It says itself how much memory it took, as what the
# parent is told of a child includes the parent's own memory.
CHILD = """
import json, sys
args = json.loads(sys.argv[1])
import torch
if args["threads"]:
    torch.set_num_threads(args["threads"])
dtype, device = getattr(torch, args["dtype"]), args["device"]
{load}
x = torch.randn(args["x"]).to(device, dtype)
context = torch.randn(args["context"]).to(device, dtype)
with torch.no_grad():
    out = unet(x, torch.full((len(x),), 999.0, device=device), context)
out = out if torch.is_tensor(out) else out.sample
out.float().cpu()
try:
    lines = open("/proc/self/status").read().splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
except (OSError, StopIteration):
    try:
        import resource
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        memory = 0
print("ready", memory, flush=True)
"""
LOAD_OURS = """
sys.path.insert(0, args["root"])
import sd
unet = sd.StableDiffusion.load(args["ours"], device=device, dtype=dtype).unet
"""
LOAD_PEER = """
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(
    args["peer"], torch_dtype=dtype, local_files_only=True, tokenizer=None, safety_checker=None
).to(device)
unet = pipe.unet
if args["layout"] == "channels_last":
    unet = unet.to(memory_format=torch.channels_last)
"""


class Case(NamedTuple):
    """One thing to time: ours, the peer's if there is one, and how much arithmetic it is."""

    label: str
    ours: Callable[[], Any]
    peer: Callable[[], Any] | None
    flop: float | None


class Run(NamedTuple):
    """One measurement: seconds, and bytes at the peak where they are known."""

    seconds: float
    memory: int | None


class RandomWeights(Mapping[str, Tensor]):
    """Weights for a network whose state dict is `meta`: each a function of its name and shape, made when asked for."""

    def __init__(self, meta: Mapping[str, Tensor]) -> None:
        self._shapes = {key: tensor.shape for key, tensor in meta.items()}

    def __getitem__(self, key: str) -> Tensor:
        shape = self._shapes[key]
        if len(shape) == 1:
            return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
        rng = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        limit = WEIGHT_STD * math.sqrt(3 / math.prod(shape[1:]))  # a uniform draw has a third of its limit's square
        return torch.rand(shape, generator=rng).mul_(2 * limit).sub_(limit)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def parser() -> cli.Parser:
    """The arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to time (default: all)")
    parser.add_argument(
        "--ckpt", type=Path, metavar="FILE", help="checkpoint (default: Stable Diffusion 1.x with random weights)"
    )
    parser.add_argument("--tiny", action="store_true", help="a small network with random weights, to try this program")
    parser.add_argument("--device", help="cuda, cpu, mps (default: the best there is)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="precisions (default: the device's best)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of the picture (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="measured runs (default: %(default)s)")
    parser.add_argument("--no-peer", action="store_true", help="do not compare with diffusers")
    parser.add_argument(
        "--peer-layout", choices=LAYOUTS, default="channels_last",
        help="of diffusers' convolutions: channels_last is faster, default is how it loads them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all figures to a file")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def bench(args: argparse.Namespace) -> None:
    """Measure and print."""
    for name in ("steps", "runs", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.tiny and args.ckpt:
        raise ValueError("give --ckpt or --tiny, not both")
    if args.json and args.json.exists():
        raise FileExistsError(17, "there is such a file already: choose another name or remove it", str(args.json))
    args.parts = [part for part in PARTS if part in args.parts]
    if not args.no_peer and missing():
        print(f"not compared: {' and '.join(missing())} not installed (pip install {' '.join(REQUIRED)})", flush=True)
        args.no_peer = True
    if not args.no_peer:
        quiet()
    device = find_device(args.device)
    names = args.dtype or [name for name, dtype in DTYPES.items() if dtype == best_dtype(device)]
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        sides = 1 if args.no_peer else 2
        total = len(args.parts) * len(names) * (args.runs + 1) * sides
        with tqdm(total=total, desc="timing", unit="run", disable=None, leave=False, file=sys.stderr) as bar:
            figures = measure(args, device, names, bar)
        about = machine(device, args)
    finally:
        torch.set_num_threads(threads)
    print(f"{about['name']}, {about['cores']} cores, {about['threads']} threads, {about['date']}")
    print(", ".join(f"{name} {number}" for name, number in about["versions"].items()), end="\n\n")
    print(table(figures, args.markdown))
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "figures": figures}, indent=2) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace, device: torch.device, names: list[str], bar: tqdm) -> list[dict[str, Any]]:
    """All parts in all precisions: one row of figures each."""
    figures, peaks = [], {}
    if args.parts != ["start"]:
        for name in names:
            before = peak(device, DTYPES[name])
            figures += measure_networks(args, device, name, bar)
            free(device)
            peaks[name] = max(before, peak(device, DTYPES[name]))  # twice, as others may use the machine
    if "start" in args.parts:
        with tempfile.TemporaryDirectory(prefix="sd-bench-") as folder:
            config = write_files(args, Path(folder))
            free(device)
            for name in names:
                case = start_case(args, device, name, config, Path(folder))
                figures.append(figure("start", case, name, alternate(case, args.runs, None, bar)))
    for row in figures:
        row["of_peak"] = 1e9 * row["gflops"] / peaks[row["dtype"]] if row["gflops"] else None
    return sorted(figures, key=lambda row: (names.index(row["dtype"]), PARTS.index(row["part"])))


def measure_networks(args: argparse.Namespace, device: torch.device, name: str, bar: tqdm) -> list[dict[str, Any]]:
    """The parts within this process, in one precision; nothing of the networks is left when it returns."""
    dtype = DTYPES[name]
    model = load(args, device, dtype)
    if device.type == "cpu":
        cli.keep_freed_memory()  # as txt2img.py does; the peer gains as well
    others = None if args.no_peer else peers(networks(model), model.config, dtype, args.peer_layout)
    with torch.no_grad():
        cases = make_cases(model, others, args.steps)
        return [
            figure(part, cases[part], name, alternate(cases[part], args.runs, device, bar))
            for part in args.parts
            if part != "start"
        ]


def load(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """The checkpoint, or random weights that are the same every time."""
    if args.ckpt:
        model = StableDiffusion.load(args.ckpt, device=device, dtype=dtype)
    else:
        config = POCKET if args.tiny else SD1
        built = {
            name: load_weights(network, RandomWeights(network.state_dict()), device, dtype)
            for name, network in build(config).items()
        }
        model = StableDiffusion(config, **built)
    if "picture" in args.parts and model.config.unet.in_channels != model.config.vae.latent_channels:
        raise ValueError(f"{model.config.name} cannot paint from text alone: leave picture out of --parts")
    return model


def networks(model: StableDiffusion) -> dict[str, nn.Module]:
    """The three networks by name."""
    return {"text_encoder": model.text_encoder, "vae": model.vae, "unet": model.unet}


def make_cases(model: StableDiffusion, others: dict[str, nn.Module] | None, steps: int) -> dict[str, Case]:
    """Every part but the start, ours and theirs on the same inputs."""
    config, device, dtype = model.config, model.device, model.dtype
    rng = torch.Generator().manual_seed(0)
    _, h, w = model.latent_shape()
    x = torch.randn(2, config.unet.in_channels, h, w, generator=rng).to(device, dtype)
    z = torch.randn(1, config.vae.latent_channels, h, w, generator=rng).to(device, dtype)
    t = torch.full((2,), 500.0, device=device)
    ids = model.tokenizer(list(PROMPTS)).to(device)
    context = model.text_encoder(ids)
    flop = flops(config)
    inputs = {"unet": (x, t, context), "text": (ids,), "vae": (z,)}
    ours = {"unet": model.unet, "text": model.text_encoder, "vae": model.vae.decode}
    theirs = {}
    if others:
        theirs = {"unet": others["unet"], "text": others["text_encoder"], "vae": others["vae"].decode}
        pipe = pipeline(others, config)

    def call(functions: Mapping[str, Callable], part: str) -> Callable[[], Tensor] | None:
        return (lambda: functions[part](*inputs[part])) if functions else None

    def our_picture() -> Any:
        return model.txt2img(PROMPTS[0], PROMPTS[1], steps=steps, guidance=GUIDANCE, sampler="ddim")

    def their_picture() -> Any:
        cond, uncond = others["text_encoder"](ids).chunk(2)
        return pipe(
            prompt_embeds=cond, negative_prompt_embeds=uncond, num_inference_steps=steps, guidance_scale=GUIDANCE,
            height=config.size, width=config.size, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    labels = {"unet": f"U-Net step, 2 x {h}x{w}", "vae": f"VAE decode, {config.size}x{config.size}"}
    labels |= {"text": "text encoder, 2 prompts"}
    cases = {part: Case(labels[part], call(ours, part), call(theirs, part), flop[part]) for part in labels}
    whole = steps * flop["unet"] + flop["text"] + flop["vae"]
    label = f"picture, {steps} step{'s' if steps > 1 else ''}, {config.size}x{config.size}"
    cases["picture"] = Case(label, our_picture, their_picture if others else None, whole)
    return cases


def flops(config: Config) -> dict[str, float]:
    """Floating-point operations of one call of each network, counted without running it."""
    built = build(config)
    side = config.size // config.vae.factor
    with torch.device("meta"):
        x = torch.empty(2, config.unet.in_channels, side, side)
        z = torch.empty(1, config.vae.latent_channels, side, side)
        ids = torch.zeros(2, config.text.length, dtype=torch.long)
        context, t = torch.empty(2, config.text.length, config.text.width), torch.zeros(2)
    calls = {
        "unet": lambda: built["unet"](x, t, context),
        "vae": lambda: built["vae"].decode(z),
        "text": lambda: built["text_encoder"](ids),
    }
    counts = {}
    for name, call in calls.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counts[name] = float(counter.get_total_flops())
    return counts


def alternate(case: Case, runs: int, device: torch.device | None, bar: tqdm) -> dict[str, list[Run]]:
    """Ours and theirs in turns, after one unmeasured run of each whose results are compared.

    Without a device a call measures itself and returns a `Run`.
    """
    calls = {"ours": case.ours} | ({"peer": case.peer} if case.peer else {})
    results: dict[str, list[Run]] = {name: [] for name in calls}
    first = {}
    for i in range(runs + 1):
        for name, call in calls.items():
            bar.set_postfix_str(f"{case.label}: {name}")
            if device is None:
                run = call()
            else:
                run, out = timed(call, device)
                first |= {name: out} if i == 0 else {}
                del out
            if i > 0:
                results[name].append(run)
            bar.update()
        if i == 0:
            check(case.label, first)
            first.clear()
    return results


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Run, Any]:
    """Run something to its end: how long, how much of the GPU's memory at the peak, and what it gave."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    start = perf_counter()
    out = call()
    synchronize(device)
    seconds = perf_counter() - start
    return Run(seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None), out


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def check(label: str, results: Mapping[str, Any]) -> None:
    """Times mean nothing unless both sides computed the same numbers."""
    tensors = [out.float() for out in results.values() if isinstance(out, Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ArithmeticError(f"{label}: not finite in this precision: try --dtype bfloat16 or float32")
    if len(tensors) == 2:
        difference = float((tensors[0] - tensors[1]).norm() / tensors[1].norm())
        if difference > MAX_DIFFERENCE:
            raise ArithmeticError(f"{label}: ours and diffusers' differ by {difference:.2g}: not comparable")


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """What the machine reaches, in FLOP/s: the best of several large matrix products and convolutions."""
    size = PEAK_SIZE.get(device.type, 4096)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    x = torch.ones(1, PEAK_CHANNELS, PEAK_SIDE, PEAK_SIDE, device=device, dtype=dtype)
    kernel = torch.ones(PEAK_CHANNELS, PEAK_CHANNELS, 3, 3, device=device, dtype=dtype)
    x, kernel = (tensor.to(memory_format=torch.channels_last) for tensor in (x, kernel))
    products: dict[float, Callable[[], Tensor]] = {
        2 * size**3: lambda: a @ b,
        2 * PEAK_SIDE**2 * PEAK_CHANNELS**2 * 9: lambda: nn.functional.conv2d(x, kernel, padding=1),
    }
    return max(flop / min(timed(call, device)[0].seconds for _ in range(6)) for flop, call in products.items())


def write_files(args: argparse.Namespace, folder: Path) -> Config:
    """The same weights in float16 twice, as our file and as diffusers' folder; returns their config."""
    model = load(args, torch.device("cpu"), torch.float16)
    states = {name: network.state_dict() for name, network in networks(model).items()}
    tensors = {key: tensor.contiguous() for key, tensor in to_own(states).items()}
    save_file(tensors, folder / "ours.safetensors", {CONFIG_KEY: model.config.to_json()})
    if not args.no_peer:
        built = peers(networks(model), model.config, torch.float16, "default")
        pipeline(built, model.config).save_pretrained(folder / "peer")
    if hasattr(os, "sync"):
        os.sync()  # or the disk is still busy with them while they are read
    return model.config


def start_case(args: argparse.Namespace, device: torch.device, name: str, config: Config, folder: Path) -> Case:
    """From nothing to the first step."""
    side = config.size // config.vae.factor
    options = {
        "root": str(Path(sd.__file__).resolve().parents[1]),
        "ours": str(folder / "ours.safetensors"),
        "peer": str(folder / "peer"),
        "device": str(device),
        "dtype": name,
        "threads": args.threads,
        "layout": args.peer_layout,
        "x": [2, config.unet.in_channels, side, side],
        "context": [2, config.text.length, config.text.width],
    }
    ours = lambda: child("ours", LOAD_OURS, options)  # noqa: E731
    peer = lambda: child("diffusers", LOAD_PEER, options)  # noqa: E731
    return Case("start to first step", ours, None if args.no_peer else peer, None)


def child(who: str, load: str, options: Mapping[str, Any]) -> Run:
    """A new interpreter, timed from before it exists until it says that it is ready."""
    command = [sys.executable, "-c", CHILD.replace("{load}", load), json.dumps(options)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        start = perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            line = process.stdout.readline()
            seconds = perf_counter() - start
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if not line.startswith("ready"):
        raise OSError(f"the start of {who} failed: {said[-1] if said else f'exit status {process.returncode}'}")
    return Run(seconds, int(line.split()[1]) or None)


def figure(part: str, case: Case, dtype: str, runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    """One row: medians, and what follows from them. Seconds, bytes and plain numbers; None where there is nothing."""
    seconds = {name: median(run.seconds for run in series) for name, series in runs.items()}
    memory = {name: max((run.memory or 0) for run in series) or None for name, series in runs.items()}
    return {
        "part": part,
        "label": case.label,
        "dtype": dtype,
        "ours": seconds["ours"],
        "peer": seconds.get("peer"),
        "ratio": seconds["ours"] / seconds["peer"] if "peer" in seconds else None,
        "gflop": case.flop / 1e9 if case.flop else None,
        "gflops": case.flop / 1e9 / seconds["ours"] if case.flop else None,
        "memory_ours": memory["ours"],
        "memory_peer": memory.get("peer"),
        "runs": {name: [run.seconds for run in series] for name, series in runs.items()},
    }


def table(figures: list[dict[str, Any]], markdown: bool) -> str:
    """Rows of figures as text or Markdown."""
    formats: dict[str, tuple[str, Callable[[Any], str]]] = {
        "label": ("part", str),
        "dtype": ("precision", str),
        "ours": ("ours", time),
        "peer": ("diffusers", time),
        "ratio": ("ratio", "{:.2f}".format),
        "gflop": ("GFLOP", "{:,.0f}".format),
        "gflops": ("GFLOP/s", "{:,.0f}".format),
        "of_peak": ("of peak", "{:.0%}".format),
        "memory_ours": ("memory", gigabytes),
        "memory_peer": ("diffusers'", gigabytes),
    }
    rows = [[title for title, _ in formats.values()]]
    rows += [["-" if row[key] is None else form(row[key]) for key, (_, form) in formats.items()] for row in figures]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if markdown:
        rows.insert(1, ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    return "\n".join(lines)


def time(seconds: float) -> str:
    """Seconds, or milliseconds where they are few."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB"


def machine(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on, with what, and when."""
    packages = ("torch",) if args.no_peer else ("torch", *REQUIRED)
    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "versions": {"sd": sd.__version__, "Python": platform.python_version(), **{n: version(n) for n in packages}},
        "peer_layout": None if args.no_peer else args.peer_layout,
    }


def cpu_name() -> str:
    """The processor's name, and the best instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def quiet() -> None:
    """Let diffusers and transformers keep their advice to themselves: the table is what was asked for."""
    import diffusers
    import transformers

    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()


def free(device: torch.device) -> None:
    """Give back the memory of networks that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(bench, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
