"""Images that repeat without seams. The property behind it: moving the noise around a torus moves the image."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import TINY, error
from PIL import Image
from torch import nn

from sd import latents
from sd.conditioning import Conditioning
from sd.params import ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.pipeline import StableDiffusion
from sd.runtime import kernel_choice, packing, vae_tiling
from sd.runtime.circular import CircularPadding, circular, is_circular, wrapped
from sd.runtime.cuda_graphs import Compiled, Recorded
from sd.runtime.optimize import optimize, restore

EVEN = 2 ** (len(TINY.unet.channels) - 1)  # shifts of the latents that the U-Net's strides allow
PHOTO = Image.effect_noise((128, 128), 60).convert("RGB")


def params(**settings) -> SamplingParams:
    return SamplingParams(**{"seed": 7, "steps": 2, "height": 64, "width": 64, "tileable": True, **settings})


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def rolled(x: torch.Tensor, by: int) -> torch.Tensor:
    return x.roll((by, -2 * by), dims=(-2, -1))


def by_padding_mode(network: nn.Module) -> nn.Module:
    """The same network with torch's own circular convolutions."""
    network = restore(copy.deepcopy(network))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and max(module.padding):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [module.padding[1]] * 2 + [module.padding[0]] * 2
    return network


def test_wrapping():
    x = torch.arange(4.0)[None, None, None]
    assert wrapped(x, -1, 1, 2).tolist() == [[[[3, 0, 1, 2, 3, 0, 1]]]]
    assert wrapped(x, -2, 1, 0).shape == (1, 1, 2, 4)
    maps = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert wrapped(maps, -2, 1, 1).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="a map of 4 pixels cannot wrap around 5 of them"):
        wrapped(x, -1, 5, 0)


@pytest.mark.parametrize("kernels", ["plain", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unet_is_that_with_circular_convolutions(tiny, kernels, dtype):
    """In plain layers, and in those with packed weights, which stay packed."""
    if kernels == "fast" and dtype not in packing.onednn_dtypes():
        pytest.skip("no packed weights on this processor")
    x, t, context = torch.randn(2, 4, 8, 16), torch.tensor([500.0, 20.0]), torch.randn(2, 77, 64)
    expected = by_padding_mode(tiny["unet"])(x, t, Conditioning(context))
    with kernel_choice.prefer(kernels):
        unet = optimize(restore(copy.deepcopy(tiny["unet"])).to(dtype))
    given = x.to(dtype), t, Conditioning(context.to(dtype))
    for _ in range(2):
        out = circular(unet)(*given)
        assert error(out.float(), expected) < (1e-5 if dtype == torch.float32 else 5e-2)
        assert error(unet(*given).float(), tiny["unet"](x, t, Conditioning(context))) < 5e-2  # the plain one in between
    assert any("_packed" in module.__dict__ for module in unet.modules()) == (kernels == "fast")


def test_vae_is_the_same_all_around(tiny, monkeypatch):
    """Whole and in strips: moved latents give a moved image, and a moved image gives moved latents."""
    vae, z = tiny["vae"], torch.randn(1, 4, 7, 6)
    with CircularPadding():
        image, mean = vae.decode(z), vae.encode(vae.decode(z)).mean
        assert error(vae.decode(rolled(z, 1)), rolled(image, 8)) < 1e-5
        assert error(vae.encode(rolled(image, 8)).mean, rolled(mean, 1)) < 1e-4
        monkeypatch.setattr(vae_tiling, "NUMBERS", 1)
        for least in (1, 3, 40):
            monkeypatch.setattr(vae_tiling, "LEAST", least)
            assert error(vae_tiling.decode_in_strips(vae, z), image) < 1e-5
            assert error(vae_tiling.encode_in_strips(vae, image).mean, mean) < 1e-4
        low = z[:, :, :1]
        assert error(vae_tiling.decode_in_strips(vae, low), vae.decode(low)) < 1e-5
    assert error(vae.decode(rolled(z, 1)), rolled(image, 8)) > 1e-2 and error(vae.decode(z), image) > 1e-2


@pytest.mark.parametrize(("large", "low_memory"), [(False, False), (True, True)])
def test_moving_the_noise_moves_the_image(large, low_memory, monkeypatch):
    """The whole run, of the embedded model; with `large`, its VAE works in strips."""
    model = StableDiffusion.load(device="cpu", dtype="float32", low_memory=low_memory)
    if large:
        monkeypatch.setattr(latents, "LARGE_ON_CPU", 1)
    request = TextToImage("a meadow", params(sampler="dpmpp_2m"))
    run, moved = model.prepare(request), model.prepare(request)
    moved.begin(moved.start._replace(x=rolled(run.x, 4)))
    (image,), (other,) = run.result().images, moved.result().images
    assert abs(np.roll(pixels(image), (32, -64), axis=(0, 1)) - pixels(other)).max() <= 1
    assert run.notes == []


def test_no_seam_is_seen():
    """The step from the last column to the first is like any other; without the setting it is not."""
    model = StableDiffusion.load(device="cpu", dtype="float32")

    def seam(tileable: bool) -> float:
        image = pixels(model.txt2img("a red house on a meadow", seed=1, steps=8, tileable=tileable)[0])
        steps = [abs(np.diff(image, axis=axis)).mean() for axis in (0, 1)]
        ends = [abs(image[0] - image[-1]).mean(), abs(image[:, 0] - image[:, -1]).mean()]
        return max(end / step for end, step in zip(ends, steps, strict=True))

    assert seam(True) < 3 and seam(False) > 10


def test_other_threads_do_not_notice(tiny_sd):
    requests = [TextToImage("a cat", params(steps=3, tileable=tileable)) for tileable in (True, False)] * 2
    alone = [pixels(tiny_sd.prepare(request).result().images[0]) for request in requests]
    assert abs(alone[0] - alone[1]).max() > 5
    with ThreadPoolExecutor(4) as pool:
        images = pool.map(lambda request: tiny_sd.prepare(request).result().images[0], requests)
    assert all(abs(pixels(image) - one).max() <= 1 for image, one in zip(images, alone, strict=True))
    with CircularPadding():
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(is_circular()))
        thread.start()
        thread.join()
        assert seen == [False] and is_circular()
    assert not is_circular()
    with pytest.raises(MemoryError), CircularPadding():
        raise MemoryError
    assert not is_circular()


def test_nothing_is_recorded_or_compiled(tiny):
    """A recording holds the convolutions that it was made with."""
    given = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), Conditioning(torch.randn(1, 77, 64))
    expected = circular(tiny["unet"])(*given)

    def record(run, device):
        raise AssertionError("recorded")

    compiled = Compiled.__new__(Compiled)
    compiled._network, compiled._fast = tiny["unet"], record
    for network in (Recorded(tiny["unet"], record), compiled):
        assert torch.equal(circular(network)(*given), expected)


def test_from_an_image(tiny_sd, tiny_inpaint):
    mask = Image.new("L", PHOTO.size, 255)
    mask.paste(0, (16, 16, 96, 96))
    for request in (
        ImageToImage("a cat", params(height=None, width=None), image=PHOTO, strength=0.5),
        Inpaint("a cat", params(height=None, width=None), image=PHOTO, mask=mask),
    ):
        for model in (tiny_sd, tiny_inpaint):
            (image,) = model.prepare(request).result().images
            other = replace(request, params=replace(request.params, tileable=False))
            assert image.size == PHOTO.size and not np.array_equal(image, model.prepare(other).result().images[0])


def test_encoding_and_blank_images_wrap_around(tiny_inpaint):
    """What an inpainting model is told of a grey image is the same everywhere."""
    run = tiny_inpaint.prepare(TextToImage("a cat", params()))
    concat = run.start.denoise.parts[0].concat
    assert (concat - concat[:, :, :1, :1]).abs().max() < 1e-4
    flat = tiny_inpaint.prepare(TextToImage("a cat", params(tileable=False))).start.denoise.parts[0].concat
    assert (flat - flat[:, :, :1, :1]).abs().max() > 1e-2


def test_what_cannot_be_a_tile(tiny_sd):
    mask = Image.new("L", (124, 128))
    mask.paste(255, (16, 16, 48, 48))
    photo = PHOTO.crop((0, 0, 124, 128))
    free = params(height=None, width=None)
    with pytest.raises(ValueError, match="tileable: the image would be padded to 128x128"):
        tiny_sd.prepare(ImageToImage("a", free, image=photo, fit="pad"))
    with pytest.raises(ValueError, match="tileable: the image would be padded to 128x128"):
        tiny_sd.prepare(Inpaint("a", free, image=photo, mask=mask))
    with pytest.raises(ValueError, match="tileable cannot be combined with margin"):
        tiny_sd.prepare(Inpaint("a", free, image=photo, mask=mask, margin=0))
    run = tiny_sd.prepare(TextToImage("a", params(width=72)))
    assert run.notes == [f"tileable: the image repeats most evenly if its sides are multiples of {8 * EVEN}"]
