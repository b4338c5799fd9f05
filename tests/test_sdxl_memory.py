"""Memory of SDXL: what float16 on a GPU adds up to, low memory through the programs, and too little of it."""

from __future__ import annotations

import argparse
import gc
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY_XL, tiny_state
from PIL import Image
from sdxl_common import TINY_REFINER, half_mask, photo, random_weights
from simulated_device import SimulatedGpu
from test_simulated_gpu import check, networks, phases, rounded_size
from torch import nn

from scripts import convert as convert_script
from scripts import img2img, inpaint, txt2img
from scripts.common import enough_memory
from sd import StableDiffusion
from sd.checkpoints.convert import convert
from sd.checkpoints.placement import SAFE
from sd.conditioning import Conditioning
from sd.config import SD1, SDXL, SDXL_REFINER, Config
from sd.models.build import build
from sd.params import HighRes, ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.runtime import memory
from sd.runtime.cuda_graphs import Recorded
from sd.runtime.memory import ALL, ONE, WITHOUT_TEXT, Job, available, needed, step_bytes, weight_bytes
from sd.runtime.offload import Offload
from sd.runtime.optimize import optimize

LARGE = SamplingParams(height=1024, width=1024, steps=2)
HALF = torch.float16


# ---------------------------------------------------------------------------------- float16 on a GPU, by live tensors


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    gc.collect()  # what other tests have left: its end would be a warning here
    with SimulatedGpu() as device, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield device


def at_home(config: Config) -> dict[str, nn.Module]:
    """Networks in the memory of the CPU, of which they take none."""
    home = build(config)
    for network in home.values():
        for module in network.modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                number = torch.zeros(1, dtype=HALF, device="cpu").expand(weight.shape)
                setattr(module, key, nn.Parameter(number, requires_grad=False))
        optimize(network.eval(), torch.device("cuda", 0))
    return home


def model_on(config: Config, kept: str) -> StableDiffusion:
    """A model in half precision of which so much stays on the simulated device."""
    device = torch.device("cuda", 0)
    if kept == ALL:
        return StableDiffusion(config, **networks(config))
    home, resident = at_home(config), ()
    if kept == WITHOUT_TEXT:
        resident = ("unet", "vae")
        own = networks(config)
        home |= {name: own[name] for name in resident}
    model = StableDiffusion(config, **home)
    model.__dict__.update(_networks=Offload(home, device, resident=resident), device=device)
    model._fast_unet = Recorded(home["unet"]) if resident else None
    return model


REQUESTS = {
    "text": TextToImage("a", LARGE),
    "image": ImageToImage("a", LARGE, image=photo(1024), strength=0.99),
    "mask": Inpaint("a", LARGE, image=photo(1024), mask=half_mask(1024)),
}
EXACT = [pytest.param(set(), id="fixed VAE"), pytest.param({"image", "latent"}, id="original VAE")]


@pytest.mark.parametrize("overflows", EXACT)
def test_with_low_memory_5_5_gb_are_enough(gpu, overflows):
    """1024x1024 with guidance: the U-Net has 5.13 GB, and a step takes 0.28. The original VAE works in float32."""
    model = model_on(SDXL, ONE)
    model.vae.overflows |= overflows
    for name in ["mask"] if overflows else ["text"]:
        found = phases(gpu, model, REQUESTS[name])
        assert found["images"] < 5.3 < found["step 1"] <= max(found.values()) < 5.5


def test_with_low_memory_a_refiner_takes_no_more(gpu):
    base, refiner = model_on(SDXL, ONE), model_on(SDXL_REFINER, ONE)
    run = base.prepare(TextToImage("a", replace(LARGE, steps=4)), refiner)
    run.result()
    assert run.params.refiner_from < 1 and 5.3e9 < gpu.peak < 5.5e9


@pytest.mark.parametrize("overflows", EXACT)
def test_without_the_text_encoders_7_5_gb_are_enough(gpu, overflows):
    """Also with what the recording of a step keeps. The encoders come and go: 5.3 GB of weights stay."""
    model = model_on(SDXL, WITHOUT_TEXT)
    model.vae.overflows |= overflows
    weights = weight_bytes(SDXL, HALF)
    stay = (weights["unet"] + weights["vae"]) / 1e9
    for name, request in REQUESTS.items():
        found = phases(gpu, model, request)
        assert max(found.values()) < 7.5
        if name == "text":
            assert found["prompts"] > stay + weights["text_encoder_2"] / 1e9 and found["step 2"] < stay + 0.28
    encoders = [model._networks._networks[name] for name in SDXL.text_names]
    assert all(weight.device.type == "cpu" for network in encoders for weight in network.parameters())


def test_with_everything_on_the_device(gpu):
    """What docs/performance.md says of it."""
    model = model_on(SDXL, ALL)
    found = phases(gpu, model, REQUESTS["text"])
    assert found["prompts"] == pytest.approx(6.93, abs=0.01) and found["step 1"] == pytest.approx(7.20, abs=0.01)
    assert found["images"] == pytest.approx(8.54, abs=0.01)
    model.vae.overflows |= {"image"}
    assert phases(gpu, model, REQUESTS["text"])["images"] == pytest.approx(8.95, abs=0.01)


@pytest.mark.parametrize(("kept", "exact"), [(ALL, False), (WITHOUT_TEXT, False), (WITHOUT_TEXT, True), (ONE, True)])
def test_what_is_needed_is_what_the_tensors_add_up_to(gpu, kept, exact):
    model = model_on(SDXL, kept)
    model.vae.overflows |= {"image"} if exact else set()
    for height, width in ((832, 1216), (1536, 1536)):
        request = TextToImage("a", replace(LARGE, height=height, width=width))
        if model._fast_unet is not None:
            model._fast_unet = Recorded(model.unet)
        found = max(phases(gpu, model, request).values()) * 1e9
        job = Job(height, width, exact=exact, recorded=kept != ONE)
        assert 0.95 * found < needed(SDXL, HALF, job, kept) < 1.02 * found


@pytest.mark.parametrize("config", [SD1, SDXL, SDXL_REFINER], ids=lambda config: config.name)
def test_what_a_step_needs_is_what_the_tensors_add_up_to(gpu, config):
    unet = networks(config)["unet"]
    for batch, height, width in ((1, 64, 64), (2, 128, 128), (2, 104, 152), (8, 96, 96)):
        x, t = torch.empty(batch, 4, height, width, device="cuda").half(), torch.full((batch,), 5.0, device="cuda")
        vector = torch.empty(batch, config.unet.vector, device="cuda").half() if config.unet.vector else None
        context = torch.empty(batch, 77, config.unet.context, device="cuda").half()
        before = gpu.live
        with gpu.phase() as peak:
            unet(x, t, Conditioning(context, vector))
        assert 0.9 < step_bytes(config.unet, HALF, batch, height, width) / (peak() - before) < 1.02


# ---------------------------------------------------------------------------------- a GPU that is a bit too small


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Base and refiner in small."""
    folder = tmp_path_factory.mktemp("models")
    states = {
        "base": (convert(tiny_state("tiny-sdxl"), TINY_XL), TINY_XL),
        "refiner": (random_weights(TINY_REFINER), TINY_REFINER),
    }
    for name, (weights, config) in states.items():
        convert_script.save("sd", folder / f"{name}.safetensors", weights, config, {})
    return {name: folder / f"{name}.safetensors" for name in states}


def test_on_a_small_gpu_the_text_encoders_leave(gpu, files):
    """By themselves, which is said; steps are still recorded and wait for nothing, and networks can be replaced."""
    large = StableDiffusion.load(files["base"], device="cuda")
    assert not isinstance(large._networks, Offload) and not any("leave" in line for line in large.about)
    gpu.size = gpu.reserved + needed(TINY_XL, HALF, Job(TINY_XL.size, TINY_XL.size, exact=True, recorded=True)) - 1
    model = StableDiffusion.load(files["base"], device="cuda")
    line = "the text encoders leave cuda:0 once prompts are encoded"
    assert line in model.about
    assert isinstance(model._fast_unet, Recorded)
    run = model.prepare(TextToImage("a", SamplingParams(height=64, width=64, steps=3)))
    check(gpu, run, waiting=0)  # until the text encoders have left
    assert len(model._fast_unet._recordings) == 1
    places = {
        name: {weight.device.type for weight in network.parameters()}
        for name, network in model._networks._networks.items()
    }
    assert places == {"text_encoder": {"cpu"}, "text_encoder_2": {"cpu"}, "unet": {"cuda"}, "vae": {"cuda"}}
    assert run.result().images[0].size == (64, 64)
    model.unet = model.unet
    with pytest.raises(
        ValueError, match="the text_encoder cannot be replaced: it leaves cuda:0 once prompts are encoded"
    ):
        model.text_encoder = model.text_encoder
    kept = StableDiffusion.load(files["base"], device="cuda", text_encoders_leave=False)  # as for training
    assert line not in kept.about and not isinstance(kept._networks, Offload)
    gpu.size = 10**11
    asked = StableDiffusion.load(files["base"], device="cuda", text_encoders_leave=True)
    assert line in asked.about and asked._networks.resident == {"unet", "vae"}
    with pytest.raises(ValueError, match="text_encoders_leave must be True, False or None, got 'no'"):
        StableDiffusion.load(files["base"], text_encoders_leave="no")
    low = StableDiffusion.load(files["base"], device="cuda", low_memory=True)
    assert low._networks.resident == frozenset() and not any("leave" in line for line in low.about)


class Device(Offload):
    """Whose "device" is float64, so that it can be told from the CPU's memory."""

    def _to_device(self, tensor):
        return tensor.double()

    def _from_device(self, tensor):
        return tensor.float()


def test_what_is_resident_stays_and_the_others_leave():
    made = {name: nn.Linear(2, 2).requires_grad_(False) for name in ("text_encoder", "unet")}
    first = Device(made, torch.device("cpu"), resident=["unet"])
    second = Device({"text_encoder": nn.Linear(2, 2)}, torch.device("cpu"))
    first.take_turns_with(second)
    where = lambda offload: offload._networks["text_encoder"].weight.dtype  # noqa: E731
    assert first["text_encoder"].weight.dtype == torch.float64 and made["unet"].weight.dtype == torch.float32
    _ = first["unet"]
    assert where(first) == torch.float32 and first["unet"] is made["unet"]
    _ = second["text_encoder"]
    assert where(second) == torch.float64
    _ = first["unet"]
    assert where(second) == torch.float32


# ------------------------------------------------------------------------------------ low memory through the programs


SMALL = ("--steps", "5", "--height", "64", "--width", "64", "--seed", "3", "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def turns(monkeypatch) -> list[str]:
    """Fills with the network that holds weights whenever a layer of a loaded model of low memory runs.

    It fails where two of them do, of one model or of two. The second model's are "refiner ...".
    """
    found: list[str] = []
    loaded: dict[str, list[nn.Module]] = {}  # their first and last layer with a bias, which is never packed
    load = StableDiffusion.load

    def look(*_) -> None:
        (name,) = [name for name, layers in loaded.items() if any(not layer.bias.is_meta for layer in layers)]
        if found[-1:] != [name]:
            found.append(name)

    def watching(path, **options):
        model = load(path, **options)
        if options["low_memory"]:
            prefix = "refiner " if loaded else ""
            for name, network in model._networks._networks.items():
                layers = [layer for layer in network.modules() if getattr(layer, "bias", None) is not None]
                loaded[prefix + name] = [layers[0], layers[-1]]
                for place, layer in network.named_modules():
                    if not place.endswith("up.conv"):  # an upsampling with a hook inside takes the plain kernel
                        layer.register_forward_pre_hook(look)
        return model

    monkeypatch.setattr(StableDiffusion, "load", watching)
    return found


TEXTS = ["text_encoder", "text_encoder_2"]
PROGRAMS = {"txt2img": txt2img, "img2img": img2img, "inpaint": inpaint}


@pytest.mark.parametrize(
    ("name", "refined"),
    [
        *(pytest.param(name, True, id=f"{name}, refined") for name in PROGRAMS),
        pytest.param("txt2img", False, id="txt2img"),
        *(pytest.param(name, False, id=name, marks=pytest.mark.exhaustive) for name in ("img2img", "inpaint")),
    ],
)
def test_low_memory_through_the_programs(name, refined, files, turns, tmp_path):
    """The same images, and never two networks in memory, refiner included."""
    photo(64).save(tmp_path / "photo.png")
    half_mask(64).save(tmp_path / "mask.png")
    given = {"txt2img": [], "img2img": ["photo.png"], "inpaint": ["photo.png", "mask.png"]}[name]
    args = ["a cat", *(str(tmp_path / file) for file in given), "--ckpt", str(files["base"]), *SMALL]
    args += ["--negative", "fog"]
    args += ["--refiner", str(files["refiner"])] if refined else []
    images = []
    for option in ([], ["--low-memory"]):
        out = tmp_path / f"out{len(option)}"
        assert PROGRAMS[name].main([*args, *option, "--out", str(out)]) == 0
        images.append([np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))])
        assert bool(turns) == bool(option)
    assert len(images[0]) == 1 and all(map(np.array_equal, *images))
    encoded = TEXTS if name == "txt2img" else [*TEXTS, "vae"]
    encoded = [*encoded, "refiner text_encoder"] if refined else encoded
    steps = ["unet", "refiner unet"] if refined else ["unet"]
    assert turns[-len(encoded + steps) - 1 :] == [*encoded, *steps, "vae"]


# --------------------------------------------------------------------------------------------- memory that does not do


def test_free_memory_of_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "MEMINFO")
    monkeypatch.setattr(memory, "LIMITS", tmp_path)
    cpu = torch.device("cpu")
    assert available(cpu) is None
    (tmp_path / "MEMINFO").write_text(
        "MemTotal:  9 kB\nMemAvailable:     3000 kB\nSwapFree:  1000 kB\nHugePages_Free: 0\n"
    )
    assert available(cpu) == 4000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
    assert available(cpu) == 4000 * 1024
    (tmp_path / "memory.max").write_text("50000\n")
    assert available(cpu) == 49000 + 1000 * 1024  # of a container, which may use the swap of the system
    (tmp_path / "memory.swap.max").write_text("max\n")
    (tmp_path / "memory.swap.current").write_text("100\n")
    assert available(cpu) == 49000 + 1000 * 1024
    (tmp_path / "memory.swap.max").write_text("600\n")
    assert available(cpu) == 49000 + 500
    assert available(torch.device("mps")) is None


def test_free_memory_of_a_gpu(gpu, monkeypatch, tmp_path):
    gpu.size = 10_000
    x = torch.empty(1000, device="cuda")
    assert available(torch.device("cuda", 0)) == 10_000 - rounded_size(x)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gpu.reserved - 300)  # PyTorch keeps the rest
    assert available(torch.device("cuda", 0)) == 10_000 - rounded_size(x) + 300
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: argparse.Namespace(is_integrated=1))
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "MEMINFO")  # of which such a GPU is a part
    (tmp_path / "MEMINFO").write_text("MemAvailable:     3000 kB\n")
    monkeypatch.setattr(memory, "LIMITS", tmp_path)
    assert available(torch.device("cuda", 0)) == 3000 * 1024


@pytest.fixture
def packing(monkeypatch) -> None:
    """Weights in float32 are packed, as on x86."""
    monkeypatch.setattr(enough_memory, "onednn_dtypes", lambda: frozenset([torch.float32]))


def no_loading(*args: object, **options: object) -> None:
    raise AssertionError("a model is loaded")


@pytest.fixture
def short(monkeypatch, capsys, files, tmp_path, packing):
    """Runs txt2img with so much free memory that a model of this config has too little; gives the line it ends with."""

    def run(*args: str, free: float, program=txt2img) -> str:
        monkeypatch.setattr(enough_memory, "available", lambda device: int(free))
        monkeypatch.setattr(StableDiffusion, "load", no_loading)
        assert program.main([*args, "--ckpt", str(files["base"]), *SMALL, "--out", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_too_little_memory_is_said_before_anything_is_loaded(short, files):
    weights = 0.9 * sum(weight_bytes(TINY_XL, torch.float32).values())
    line = short("a cat", free=weights)
    assert line.startswith("error: tiny sdxl needs about ")
    wanted = (
        r"GB for an image of 64x64 in float32, and cpu has [\d.]+ GB of free memory: try --low-memory \([\d.]+ GB\)"
    )
    wanted += ", --dtype bfloat16, a smaller --height and --width, or --no-memory-check to try all the same$"
    assert re.search(wanted, line)
    line = short("a cat", "--refiner", str(files["refiner"]), "--batch-size", "4", "--n", "3", free=1.5 * weights)
    assert "GB for 3 images of 64x64" in line
    assert "leaving out --refiner" in line and "--batch-size 1" in line
    assert "--low-memory (" not in short("a cat", "--low-memory", free=weights / 4)
    assert "--low-memory (" not in short("a cat", free=weights / 4)  # which would not do either
    photo(64).save(files["base"].parent / "photo.png")
    image = str(files["base"].parent / "photo.png")
    assert "64x64" in short("a cat", image, free=weights, program=img2img)
    assert "128x128" in short("a cat", "--hires", "2", free=weights)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("refined", [False, True])
def test_with_as_much_as_is_estimated_it_is_tried(low, refined, files, tmp_path, monkeypatch, packing):
    args = ["a cat", "--ckpt", str(files["base"]), *SMALL, "--out", str(tmp_path / "out")]
    args += ["--low-memory"] if low else []
    args += ["--refiner", str(files["refiner"])] if refined else []
    job = Job(64, 64, guided=False, whole=768 * 1024)
    kept, refiner = ONE if low else ALL, TINY_REFINER if refined else None
    enough = needed(TINY_XL, torch.float32, job, kept, refiner)
    assert enough < needed(TINY_XL, torch.float32, job, ALL, TINY_REFINER) or not low
    monkeypatch.setattr(enough_memory, "available", lambda device: enough)
    assert txt2img.main(args) == 0
    monkeypatch.setattr(enough_memory, "available", lambda device: int(0.94 * enough))
    assert txt2img.main(args) == 1
    assert txt2img.main([*args, "--no-memory-check"]) == 0


def test_a_plenty_of_memory_needs_no_look_at_the_files(files, monkeypatch):
    monkeypatch.setattr(enough_memory, "available", lambda device: 10**12)
    monkeypatch.setattr(enough_memory, "ModelFiles", no_loading)
    args = txt2img.parser().parse_args(["a", "--ckpt", str(files["base"]), *SMALL])
    requests = [TextToImage("a", SamplingParams()), HighRes("a", SamplingParams(), hires=2)]
    enough_memory.check_memory(args, requests)
    monkeypatch.setattr(enough_memory, "available", lambda device: 10**8)
    with pytest.raises(AssertionError, match="a model is loaded"):
        enough_memory.check_memory(args, requests)


def test_weights_in_the_cache_folder_need_not_be_free(files, monkeypatch, packing):
    """The system reads the pages of a mapped file again when it has taken them back."""
    args = txt2img.parser().parse_args(["a", "--ckpt", str(files["base"]), *SMALL])
    weights = sum(weight_bytes(TINY_XL, torch.float32).values())
    monkeypatch.setattr(enough_memory, "available", lambda device: int(0.9 * weights))
    kept = argparse.Namespace(file=files["base"].with_suffix(".none"))
    monkeypatch.setattr(enough_memory.WeightsCache, "of", lambda files, dtype: kept)
    requests = [TextToImage("a", SamplingParams(height=64, width=64))]
    with pytest.raises(ValueError, match="needs about"):
        enough_memory.check_memory(args, requests)
    kept.file = files["base"]
    enough_memory.check_memory(args, requests)


def test_weights_that_are_used_as_they_are_need_not_be_free(files, monkeypatch):
    """Where nothing is cast or packed, the checkpoint itself is mapped into memory."""
    weights = sum(weight_bytes(TINY_XL, torch.float32).values())
    monkeypatch.setattr(enough_memory, "available", lambda device: int(0.9 * weights))
    args = txt2img.parser().parse_args(["a", "--ckpt", str(files["base"]), "--no-cache", *SMALL])
    requests = [TextToImage("a", SamplingParams(height=64, width=64))]
    monkeypatch.setattr(enough_memory, "onednn_dtypes", frozenset)
    enough_memory.check_memory(args, requests)
    monkeypatch.setattr(enough_memory, "onednn_dtypes", lambda: frozenset([torch.float32]))
    with pytest.raises(ValueError, match="needs about"):
        enough_memory.check_memory(args, requests)


def test_a_batch_that_is_too_large_for_all_networks_lets_the_text_encoders_leave(gpu, files, monkeypatch):
    """Though an image of the native size would fit beside them."""
    args = txt2img.parser().parse_args(["a", "--ckpt", str(files["base"]), "--device", "cuda", "--batch-size", "8"])
    monkeypatch.setattr(enough_memory, "PER_PIXEL", 10**9)
    requests = [TextToImage("a", SamplingParams(n=count)) for count in (1, 8)]
    exact = TINY_XL.vae.scale == SDXL.vae.scale
    job = Job(TINY_XL.size, TINY_XL.size, exact=exact, recorded=True)
    one, all_of_them = (needed(TINY_XL, HALF, job._replace(batch=count)) for count in (1, 8))
    monkeypatch.setattr(enough_memory, "available", lambda device: int(SAFE * (one + all_of_them) / 2))
    assert [enough_memory.check_memory(args, [request]) for request in requests] == [None, True]
