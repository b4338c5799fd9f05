"""Checks of whole images: what saves time or memory must not change them.

The reference model at full size runs in float16, as users run it. The embedded model is compared with the CPU.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sd.conditioning import Conditioning
from sd.noise import Philox
from sd.params import SamplingParams, TextToImage
from sd.pipeline import StableDiffusion
from sd.runtime.cuda_graphs import Compiled, Recorded
from sd.samplers import SAMPLERS

from ..sides import no_compiler
from .items import check, require
from .models import Models, error, no_goldens, said
from .networks import exact

PROMPT, NEGATIVE = "a red house on a meadow", "grey"
LEVELS = 2  # of 256, by which a pixel may differ from the CPU's in float32: rounding at most
HALF_LEVELS = 4.0  # on average in float16, where rounding adds up over the steps
ROUNDING = 2e-3  # relative, between two ways of running one network in float16
BATCH = 5e-2  # relative, of latents after some guided steps: in a batch, kernels split their sums differently
PEAK = 2.6e9  # bytes for an image of 512x512, of which the weights are 2.13e9
SIDES, TRIAL_SIDES = (64, 48), (8, 6)  # of latents: the native size and a smaller one


def sides(models: Models) -> tuple[int, int]:
    """Two sizes of square latents, in latent pixels."""
    return TRIAL_SIDES if models.place.trial else SIDES


def inputs(models: Models, seed: int, B: int, side: int) -> tuple[Tensor, Tensor, Conditioning]:
    """Inputs of the U-Net of the reference model, in the precision of images."""
    rng, config = torch.Generator().manual_seed(seed), models.config
    x = torch.randn(B, config.unet.in_channels, side, side, generator=rng)
    context = torch.randn(B, 77, config.unet.context, generator=rng)
    t = torch.full((B,), 100.0 * (seed % 9) + 1)
    device, dtype = models.device, models.place.dtype
    return x.to(device, dtype), t.to(device), Conditioning(context).to(device, dtype)


def latents(
    models: Models, model: StableDiffusion, seed: int, n: int = 1, steps: int = 4, exact: bool = False
) -> Tensor:
    """The latents (n, 4, h, w) after some guided steps."""
    size = sides(models)[0] * model.config.vae.factor
    params = SamplingParams(steps=steps, seed=seed, n=n, height=size, width=size, sampler="ddim", exact=exact)
    run = model.prepare(TextToImage(PROMPT, params, NEGATIVE))
    for _ in run:
        pass
    return run.x


@contextmanager
def no_warnings() -> Iterator[None]:
    """Turn warnings into errors, for example that the U-Net cannot be recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    """(B, H, W, 3) levels."""
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def tasks(model: StableDiffusion) -> dict[str, np.ndarray]:
    """An image of each of the three tasks."""
    size = model.config.size
    photo = Image.linear_gradient("L").convert("RGB").resize((size, size))
    mask = Image.new("L", (size, size), 255)
    mask.paste(0, (0, 0, size // 2, size))
    settings: dict[str, Any] = {"steps": 5, "seed": 3, "height": size, "width": size}
    return {
        "text to image": pixels(model.txt2img(PROMPT, NEGATIVE, n=2, sampler="ddim", eta=1.0, **settings)),
        "image to image": pixels(model.img2img(PROMPT, photo, NEGATIVE, strength=0.8, **settings)),
        "inpainting": pixels(model.inpaint(PROMPT, photo, mask, NEGATIVE, **settings)),
    }


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By task, how many levels each pixel differs."""
    return {task: np.abs(a[task] - b[task]) for task in a}


@check("images", "the same images as on the CPU, float32 without TF32")
def same_as_on_the_cpu(models: Models) -> str:
    """With noise in each step. Covers guidance, encoder, decoder and masks."""
    with exact():
        found = differences(tasks(models.embedded()), tasks(models.embedded("cpu")))
    worst = max(found, key=lambda task: found[task].max())
    require(
        found[worst].max() <= LEVELS,
        f"{worst}: up to {found[worst].max()} levels of 256, {found[worst].mean():.2f} on average",
    )
    return f"at most {found[worst].max()} levels of 256"


@check("images", "nearly the same images as on the CPU with the default precision")
def close_to_the_cpu(models: Models) -> str:
    """Compares the mean difference, since edges can move in half precision."""
    model = models.embedded(dtype=models.place.dtype)
    found = differences(tasks(model), tasks(models.embedded("cpu")))
    worst = max(found, key=lambda task: found[task].mean())
    require(bool(found[worst].mean() <= HALF_LEVELS), f"{worst}: {found[worst].mean():.2f} levels of 256 on average")
    return f"at most {found[worst].mean():.2f} levels of 256 on average"


@check("images", "an image of a batch is the image alone", needs=no_goldens)
def batch_is_single(models: Models) -> str:
    """Bit-identical if the request is exact; otherwise up to rounding."""
    model = models.reference(models.place.dtype)
    batch, one = latents(models, model, 7, n=3), latents(models, model, 9)
    found = error(batch[2:], one)
    require(found < BATCH, f"error {found:.1e} of the latents, expected below {BATCH:.0e}")
    exact_batch, exact_one = latents(models, model, 7, n=2, exact=True), latents(models, model, 8, exact=True)
    require(
        exact_batch[1:].equal(exact_one),
        f"exact: not bit-identical, error {error(exact_batch[1:], exact_one):.1e} of the latents",
    )
    return f"{said(found, model.dtype)}; exact: bit-identical"


@check("images", "recorded steps give what the network gives", cuda=True, needs=no_goldens)
def recorded_is_plain(models: Models) -> str:
    """Two alternating shapes, and no warning."""
    model = models.reference(models.place.dtype)
    recording, worst = Recorded(model.unet), 0.0
    with no_warnings():
        for seed in range(4):
            given = inputs(models, seed, 2, sides(models)[seed % 2])
            worst = max(worst, error(recording(*given), model.unet(*given)))
    require(worst < ROUNDING, f"error {worst:.1e}, expected below {ROUNDING:.0e}")
    return said(worst, model.dtype)


def lora(models: Models, model: StableDiffusion) -> str:
    """A LoRA for the first self-attention of the middle; returns its path."""
    weight = model.unet.get_submodule("mid.attn.blocks.0.attn1.q").weight
    rng, rank = torch.Generator().manual_seed(1), 4
    assert isinstance(weight, Tensor)
    out, width = weight.shape
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    tensors = {}
    for letter in "qkv":
        tensors[f"{key}{letter}.lora_down.weight"] = torch.randn(rank, width, generator=rng) / width**0.5
        tensors[f"{key}{letter}.lora_up.weight"] = torch.randn(out, rank, generator=rng) / rank**0.5
    path = models.place.folder / "style.safetensors"
    save_file(tensors, path)
    return str(path)


@check("images", "a LoRA that is merged after recording takes effect, and can be removed", needs=no_goldens)
def lora_after_recording(models: Models) -> str:
    """Merging moves weights to other addresses than the recorded ones."""
    model = models.reference(models.place.dtype)
    given = inputs(models, 1, 2, sides(models)[0])
    network = Recorded(model.unet) if models.place.cuda else model.unet
    with no_warnings():
        before = network(*given)
        model.add_lora(lora(models, model), 1.0)
        try:
            merged, plain = network(*given), model.unet(*given)
        finally:
            model.remove_lora()
        after = network(*given)
    effect = error(merged, before)
    require(effect > ROUNDING, f"the LoRA has no effect (error {effect:.1e})")
    require(error(merged, plain) < ROUNDING, f"error {error(merged, plain):.1e} of the recorded step with the LoRA")
    require(error(after, before) < ROUNDING, f"error {error(after, before):.1e} after the LoRA was removed")
    return f"effect {effect:.1e}; recorded is plain: {said(error(merged, plain), model.dtype)}"


@check("images", "low memory: the same images, and one network on the device")
def low_memory(models: Models) -> str:
    """Each of the three tasks; networks move in both directions."""
    expected = tasks(models.embedded(dtype=models.place.dtype))
    low = models.embedded(dtype=models.place.dtype, low_memory=True)
    found = differences(tasks(low), expected)
    worst = max(found, key=lambda task: found[task].mean())
    require(bool(found[worst].mean() <= HALF_LEVELS), f"{worst}: {found[worst].mean():.2f} levels on average")
    here = [name for name, network in low._networks._networks.items() if next(network.parameters()).is_cuda]  # type: ignore[attr-defined]
    require(not models.place.cuda or here == ["vae"], f"on the device are: {', '.join(here) or 'no networks'}")
    return f"at most {found[worst].mean():.2f} levels of 256 on average"


@check("images", "two threads, each on its own stream, give the same images as one", needs=no_goldens)
def threads(models: Models) -> str:
    """The threads share a model and its recording."""
    model = models.reference(models.place.dtype)
    alone = [latents(models, model, seed, steps=6) for seed in range(4)]
    found: dict[int, Tensor] = {}
    failures: list[BaseException] = []

    def work(seeds: Sequence[int]) -> None:
        try:
            stream = torch.cuda.Stream(models.device) if models.place.cuda else None
            with torch.no_grad(), torch.cuda.stream(stream) if stream else nullcontext():
                for seed in seeds:
                    found[seed] = latents(models, model, seed, steps=6)
                if stream:
                    stream.synchronize()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seeds,), daemon=True) for seeds in ((0, 1), (2, 3))]
    if models.place.cuda:
        torch.cuda.synchronize(models.device)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    worst = max(error(found[seed], alone[seed]) for seed in found)
    require(worst < ROUNDING, f"error {worst:.1e} of the latents, expected below {ROUNDING:.0e}")
    return said(worst, model.dtype)


@check("images", "nothing between two steps waits for the GPU, with every sampler", cuda=True)
def no_waiting(models: Models) -> str:
    """CUDA raises an error where the CPU would wait. The first step may wait: it does the set-up."""
    model, waiting = models.embedded(dtype=models.place.dtype), []
    for sampler in SAMPLERS:
        run = model.prepare(TextToImage(PROMPT, SamplingParams(steps=4, sampler=sampler, seed=1), NEGATIVE))
        try:
            for _ in run:
                torch.cuda.set_sync_debug_mode("error")
        except RuntimeError as failure:
            waiting.append(f"{sampler} ({str(failure).partition(chr(10))[0]})")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    require(not waiting, f"these wait: {'; '.join(waiting)}")
    return f"{len(SAMPLERS)} samplers"


@check("images", "peak memory of an image of 512x512 in float16 is at most 2.6 GB", cuda=True, needs=no_goldens)
def peak_memory(models: Models) -> str:
    """Checks the memory of tensors and reports what the allocator reserved; the CUDA context comes on top."""
    model = models.reference(models.place.dtype)
    model.unet = model.unet  # without the recordings of other checks
    models.free()
    model.txt2img(PROMPT, NEGATIVE, steps=2)
    tensors, reserved = torch.cuda.max_memory_allocated(models.device), torch.cuda.max_memory_reserved(models.device)
    require(tensors < PEAK, f"{tensors / 1e9:.2f} GB of tensors, {reserved / 1e9:.2f} GB reserved")
    return f"{tensors / 1e9:.2f} GB of tensors, {reserved / 1e9:.2f} GB reserved"


@check("images", "rng nv computes the same random numbers as CUDA", cuda=True)
def random_numbers(models: Models) -> str:
    """As many numbers as a 512x512 image needs."""
    torch.cuda.manual_seed(42)
    philox, worst = Philox(42), 0.0
    for _ in range(2):
        theirs = torch.randn((4, 64, 64), device=models.device).cpu()
        worst = max(worst, float((philox((4, 64, 64)) - theirs).abs().max()))
    require(worst < 1e-5, f"they differ by up to {worst:.1e}")
    return f"difference at most {worst:.0e}"


@check(
    "compiled", "compiled steps give what the network gives", limit=120, cuda=True,
    needs=lambda: no_compiler(torch.device("cuda")),
)  # fmt: skip
def compiled_is_plain(models: Models) -> str:
    """The embedded model, as compiling the full size takes minutes; results are kept, the last in another thread."""
    model = models.embedded(dtype=models.place.dtype)
    compiled, context = Compiled(model.unet), model.encode_prompt([PROMPT, NEGATIVE])
    x = torch.randn(3, 2, *model.latent_shape(), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([500.0, 500.0], device=models.device)

    def call(z: Tensor) -> Tensor:
        with torch.no_grad():
            out = compiled(z.to(models.device, model.dtype), t, Conditioning(context))
            if models.place.cuda:
                torch.cuda.synchronize(models.device)
        return out

    with ThreadPoolExecutor(1) as other:
        kept = [call(x[0]), call(x[1]), other.submit(call, x[2]).result()]
    expected = [model.unet(z.to(models.device, model.dtype), t, Conditioning(context)) for z in x]
    worst = max(error(a, b) for a, b in zip(kept, expected, strict=True))
    require(worst < 5 * ROUNDING, f"error {worst:.1e}, expected below {5 * ROUNDING:.0e}")
    return said(worst, model.dtype)
