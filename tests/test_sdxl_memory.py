"""Memory of SDXL: what float16 on a GPU adds up to, and low memory through the programs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY_XL
from PIL import Image
from sdxl_common import half_mask, model_files, photo
from simulated_device import SimulatedGpu
from test_simulated_gpu import check, networks, phases
from torch import nn

from scripts import img2img, inpaint, txt2img
from sd import StableDiffusion
from sd.conditioning import Conditioning
from sd.config import SD1, SDXL, SDXL_REFINER, Config
from sd.models.build import build
from sd.params import ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.runtime.cuda_graphs import Recorded
from sd.runtime.memory import ALL, ONE, WITHOUT_TEXT, Job, needed, step_bytes, weight_bytes
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("overflows", [pytest.param(set(), id="fixed VAE", marks=pytest.mark.exhaustive), EXACT[1]])
def test_with_low_memory_5_5_gb_are_enough(gpu, overflows):
    """1024x1024 with guidance: the U-Net has 5.13 GB, and a step takes 0.28. The original VAE works in float32."""
    model = model_on(SDXL, ONE)
    model.vae.overflows |= overflows
    for name in ["mask"] if overflows else ["text"]:
        found = phases(gpu, model, REQUESTS[name])
        assert found["images"] < 5.3 < found["step 1"] <= max(found.values()) < 5.5


@pytest.mark.exhaustive
def test_with_low_memory_a_refiner_takes_no_more(gpu):
    base, refiner = model_on(SDXL, ONE), model_on(SDXL_REFINER, ONE)
    run = base.prepare(TextToImage("a", replace(LARGE, steps=4)), refiner)
    run.result()
    assert run.params.refiner_from < 1 and 5.3e9 < gpu.peak < 5.5e9


@pytest.mark.exhaustive
@pytest.mark.parametrize("overflows", EXACT)
@pytest.mark.sampled(3)
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


@pytest.mark.exhaustive
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
    return model_files(tmp_path_factory.mktemp("models"))


@pytest.mark.exhaustive
def test_on_a_small_gpu_the_text_encoders_are_offloaded(gpu, files):
    """By themselves, which is said; steps are still recorded and wait for nothing, and networks can be replaced."""
    large = StableDiffusion.load(files["base"], device="cuda")
    assert not isinstance(large._networks, Offload) and not any("leave" in line for line in large.about)
    gpu.size = gpu.reserved + needed(TINY_XL, HALF, Job(TINY_XL.size, TINY_XL.size, exact=True, recorded=True)) - 1
    model = StableDiffusion.load(files["base"], device="cuda")
    line = "the text encoders are offloaded from cuda:0 once prompts are encoded"
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
        ValueError, match="the text_encoder cannot be replaced: it is offloaded from cuda:0 once prompts"
    ):
        model.text_encoder = model.text_encoder
    kept = StableDiffusion.load(files["base"], device="cuda", offload_text_encoders=False)  # as for training
    assert line not in kept.about and not isinstance(kept._networks, Offload)
    gpu.size = 10**11
    asked = StableDiffusion.load(files["base"], device="cuda", offload_text_encoders=True)
    assert line in asked.about and asked._networks.resident == {"unet", "vae"}
    with pytest.raises(ValueError, match="offload_text_encoders must be True, False or None, got 'no'"):
        StableDiffusion.load(files["base"], offload_text_encoders="no")
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
@pytest.mark.sampled(4)
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
