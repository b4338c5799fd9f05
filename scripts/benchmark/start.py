"""Start-up time: a new interpreter, imports, weights from a float16 file, one step of the U-Net.

Each implementation reads its usual files: ours in our layout, diffusers a folder, OpenVINO converted networks. All
networks are loaded. Memory is that of the whole process. Where the cache of weights has an effect, ours loads
them from it, as the programs do from their second start on; the warm-up writes it. A second row is without the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import sd
from sd.checkpoints import weights_cache
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_own

from .cases import inputs_of, usual_case, weight_bytes
from .interleave import Comparison, alternate
from .openvino_networks import PRECISIONS, Conversion, model_file, options
from .references import peers, pipeline
from .runner import Run
from .weights import Setup, load_networks
from .workers import Failed, Worker, last_words

LABEL = "start to first step"
UNCACHED = "start, no cache"
TAKING_PART = ("diffusers", "openvino")  # torch.compile needs minutes for its first step

# The program of the new interpreter. It measures its own memory, because the parent's measurement of a child includes
# memory of the parent.
CHILD = """
import json, sys
args = json.loads(sys.argv[1])
{steps}
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
TORCH = """
import torch
torch.set_num_threads(args["threads"])
dtype, device = getattr(torch, args["dtype"]), args["device"]
{load}
x, t, *told = (torch.randn(shape).to(device, dtype) for shape in args["shapes"]["unet"])
with torch.no_grad():
    out = step(x, t.float(), *told)
out = out if torch.is_tensor(out) else out.sample
out.float().cpu()
"""
OURS = """
sys.path.insert(0, args["root"])
import sd
from sd.conditioning import Conditioning
from sd.runtime import kernel_choice
kernels = args["cache"] and args["cache"] + "/kernels.json"
if kernels:
    kernel_choice.load(kernels)
model = sd.StableDiffusion.load(args["ours"], device=device, dtype=dtype, cache=args["cache"])
unet = model.unet
step = lambda x, t, *told: unet(x, t, Conditioning(*told))
"""
FILL = """
if args["fill"]:
    if model.save_cache():
        kernel_choice.save(kernels)
"""
DIFFUSERS = """
import diffusers
pipe = getattr(diffusers, args["pipeline"]).from_pretrained(
    args["diffusers"], torch_dtype=dtype, local_files_only=True, **dict.fromkeys(args["absent"])
).to(device)
unet = pipe.unet.to(memory_format=torch.channels_last)
def step(x, t, context, vector=None):
    added = None
    if vector is not None:
        sizes = torch.zeros(len(x), args["sizes"], device=device, dtype=dtype)
        added = {"text_embeds": vector[:, : args["pooled"]], "time_ids": sizes}
    return unet(x, t, context, added_cond_kwargs=added)
"""
OPENVINO = """
sys.modules["openvino_telemetry"] = None
import numpy, openvino
core, networks = openvino.Core(), {}
for name, shapes in args["shapes"].items():
    model = core.read_model(args["openvino"][name])
    model.reshape(dict(zip(model.inputs, shapes)))
    networks[name] = core.compile_model(model, "CPU", args["options"])
given = [numpy.random.default_rng(0).standard_normal(shape, numpy.float32) for shape in args["shapes"]["unet"]]
networks["unet"].create_infer_request().infer(given)
"""
STEPS = {
    "ours": TORCH.replace("{load}", OURS) + FILL,
    "diffusers": TORCH.replace("{load}", DIFFUSERS),
    "openvino": OPENVINO,
}


class Files:
    """Writes the files; run in its own process, because it needs the memory of a model."""

    def write(self, setup: Setup, others: Sequence[str]) -> None:
        """Write the same weights in float16 as our file, and as a diffusers folder if it is among the others."""
        setup = replace(setup, dtype="float16", device=torch.device("cpu"))
        networks = load_networks(setup, setup.config.networks)
        tensors = to_own({name: network.state_dict() for name, network in networks.items()})
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, setup.folder / "ours.safetensors", {CONFIG_KEY: setup.config.to_json()})
        if "diffusers" in others:
            built = peers(networks, setup.config, torch.float16, "default")
            pipeline(built, setup.config).save_pretrained(setup.folder / "diffusers")
        if hasattr(os, "sync"):
            os.sync()  # otherwise the disk is still writing them while they are read


def measure_start(
    setup: Setup, peers: Sequence[str], runs: int, bar: tqdm, note: Callable[[str], object]
) -> dict[str, Comparison]:
    """By peer ("" alone) as `interleave.measure`; the files are written first."""
    others = [peer for peer in TAKING_PART if peer in peers and (peer != "openvino" or setup.dtype in PRECISIONS)]
    bar.set_postfix_str("writing files")
    if not (setup.folder / "ours.safetensors").exists():
        with Worker("ours", setup.folder / "ours.log", Files) as files:
            files.ask("write", setup, others)
    measured = {}
    for peer in others:
        try:
            if peer == "openvino":
                with Worker(peer, setup.folder / "openvino.log", Conversion) as conversion:
                    conversion.ask("write_models", replace(setup, dtype="float16"), "start")
            calls = {
                name: partial(child, name, STEPS[name], arguments(setup, is_cached(setup))) for name in ("ours", peer)
            }
            measured[peer] = alternate(calls, runs, LABEL, bar)
        except Failed as failure:
            if failure.who == "ours":
                raise
            note(f"start, {setup.dtype}: {failure}")
    if not measured:
        calls = {"ours": partial(child, "ours", STEPS["ours"], arguments(setup, is_cached(setup)))}
        measured[""] = alternate(calls, runs, LABEL, bar)
    return measured


def measure_uncached(setup: Setup, runs: int, bar: tqdm) -> dict[str, Comparison]:
    """Measure only ours, without the cache, from the files that `measure_start` has written."""
    calls = {"ours": partial(child, "ours", STEPS["ours"], arguments(setup, cached=False))}
    return {"": alternate(calls, runs, UNCACHED, bar)}


def is_cached(setup: Setup) -> bool:
    """Whether the cache of weights has an effect on this device in this precision."""
    large = weight_bytes("start", setup.config, setup.torch_dtype) >= weights_cache.SMALLEST
    return large and not weights_cache.unusable(setup.device, setup.torch_dtype, low_memory=False)


def arguments(setup: Setup, cached: bool) -> dict[str, Any]:
    """The arguments of the new interpreter."""
    files, config = replace(setup, dtype="float16"), setup.config
    shapes = {}
    for part in ("text", "vae", "unet"):
        for name, given in inputs_of(usual_case(part, config), config).items():
            shapes[name] = [list(tensor.shape) for tensor in given]
    large = len(config.text) > 1
    return {
        "root": str(Path(sd.__file__).resolve().parents[1]),
        "ours": str(setup.folder / "ours.safetensors"),
        "cache": str(setup.folder / "cache") if cached else None,
        "diffusers": str(setup.folder / "diffusers"),
        "pipeline": "StableDiffusionXLPipeline" if large else "StableDiffusionPipeline",
        "absent": ["tokenizer", "tokenizer_2" if large else "safety_checker"],
        "pooled": config.text[-1].pooled_width,
        "sizes": len(config.sizes),
        "openvino": {name: str(model_file(files, name)) for name in config.networks},
        "options": options(setup) if setup.dtype in PRECISIONS else None,
        "device": str(setup.device),
        "dtype": setup.dtype,
        "threads": setup.threads,
        "shapes": shapes,
    }


def child(who: str, steps: str, options: dict[str, Any], keep: bool) -> Run:
    """Run a new interpreter and time it until it prints that it is ready; the result is not kept.

    keep   whether it is the warm-up, which also writes the cache
    """
    command = [sys.executable, "-c", CHILD.replace("{steps}", steps), json.dumps({**options, "fill": keep})]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        start = perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            assert process.stdout is not None  # stdout=PIPE
            line = process.stdout.readline()
            seconds = perf_counter() - start
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if not line.startswith("ready"):
        raise Failed(who, last_words(process.returncode, said))
    return Run(seconds, int(line.split()[1]) or None)
