"""The VAE in strips: the same as the whole but for rounding, whatever the size, and within its memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference_weights as reference
import torch
from common import TINY, TINY_V2, error, tiny_state
from conftest import loaded

from sd import latents as models
from sd.config import TinyVAEConfig, VAEConfig
from sd.models.layers import ResBlock
from sd.runtime import vae_tiling as strips
from sd.runtime.vae_tiling import decode_in_strips, encode_in_strips

ROOT = Path(__file__).resolve().parents[1]
# (rows of the latent, columns): odd ones, narrow ones, ones that strips do not divide
SIZES = [(8, 8), (5, 7), (13, 3), (1, 1), (2, 9)]


@pytest.fixture
def few_rows(monkeypatch):
    """Strips of a single row or a few, where a large map has many."""
    monkeypatch.setattr(strips, "NUMBERS", 1)
    monkeypatch.setattr(strips, "LEAST", 3)


def latents(h: int, w: int, B: int = 1) -> torch.Tensor:
    return reference.normal("strips", (B, 4, h, w))


@pytest.fixture(scope="module")
def vaes():
    """Of both tiny models: one and two blocks a level, with levels that change the number of channels or keep it."""
    both = (("tiny-v1", TINY), ("tiny-v2-v", TINY_V2))
    return [loaded(tiny_state(name), config)["vae"] for name, config in both]


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kept", [0, 2**27])
@pytest.mark.sampled(3)
def test_decoding_in_strips_is_decoding(vaes, size, kept, monkeypatch):
    """Whether upsampled maps are kept, or computed where they are read."""
    monkeypatch.setattr(strips, "KEPT", kept)
    for vae in vaes:
        z = latents(*size, B=2)
        assert error(decode_in_strips(vae, z), vae.decode(z)) < 1e-5


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("size", SIZES)
def test_encoding_in_strips_is_encoding(vaes, size):
    picture = reference.normal("picture", (2, 3, 8 * size[0], 8 * size[1])).clamp(-1, 1)
    for vae in vaes:
        ours, whole = encode_in_strips(vae, picture), vae.encode(picture)
        assert error(ours.mean, whole.mean) < 1e-5 and error(ours.std, whole.std) < 1e-5


@pytest.mark.parametrize("least", [1, 2, 3, 5, 8])
def test_strips_of_any_height(vaes, monkeypatch, least):
    monkeypatch.setattr(strips, "NUMBERS", 1)
    monkeypatch.setattr(strips, "LEAST", least)
    z = latents(6, 5)
    assert error(decode_in_strips(vaes[0], z), vaes[0].decode(z)) < 1e-5


@pytest.mark.usefixtures("few_rows")
def test_in_half_precision_the_difference_is_no_step_of_a_pixel():
    vae = loaded(tiny_state(), TINY, torch.bfloat16)["vae"]
    z = latents(12, 10).bfloat16()
    ours, whole = decode_in_strips(vae, z).float(), vae.decode(z).float()
    assert (ours - whole).abs().mean() < 2 / 255  # of the range from -1 to 1
    exact = loaded(tiny_state(), TINY)["vae"].decode(z.float())
    assert (ours - exact).abs().mean() <= 1.1 * (whole - exact).abs().mean()  # and no worse than the whole
    picture = reference.normal("picture", (1, 3, 48, 40)).clamp(-1, 1).bfloat16()
    assert error(encode_in_strips(vae, picture).mean.float(), vae.encode(picture).mean.float()) < 0.02


def test_the_variance_of_a_flat_map_is_not_negative():
    """Squares of large numbers are rounded: the difference of two may fall below zero."""
    norm = torch.nn.GroupNorm(32, 64, 1e-6)
    flat = torch.full((1, 64, 9, 9), 3000.1)
    assert strips.activated(norm, strips.stored(flat))(flat).isfinite().all()


def test_memory_is_that_of_strips(vaes, monkeypatch):
    """No convolution is given more than a strip, but in the coarsest level and the first layer."""
    monkeypatch.setattr(strips, "NUMBERS", 1)
    monkeypatch.setattr(strips, "LEAST", 4)
    seen = []
    for module in vaes[0].decoder.up.modules():
        if isinstance(module, ResBlock):
            module.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    decode_in_strips(vaes[0], latents(16, 4))
    assert max(seen) == 6  # 4 and one on each side
    assert len(seen) > 100


def test_only_upsampled_maps_that_are_not_too_large_are_kept(vaes, monkeypatch):
    made, whole = [], strips.in_memory
    monkeypatch.setattr(strips, "in_memory", lambda x, conv: made.append(x.shape) or whole(x, conv))
    decode_in_strips(vaes[0], latents(8, 8))
    assert len(made) == 3  # all levels but the coarsest
    largest = torch.Size(made[-1]).numel()
    for kept, count in ((largest, 3), (largest - 1, 2)):
        made.clear()
        monkeypatch.setattr(strips, "KEPT", kept)
        decode_in_strips(vaes[0], latents(8, 8))
        assert len(made) == count


def test_from_which_size_on_it_works_in_strips():
    """On the CPU at the size of SDXL, whatever its shape, and not at those of 1.x and 2.x; elsewhere later."""
    cpu, gpu, vae = torch.device("cpu"), torch.device("cuda"), TINY.vae
    assert 768 * 768 < models.most_at_once(vae, cpu) < 640 * 1536 < 1024 * 1024 == models.most_at_once(vae, gpu)
    assert models.most_at_once(vae, gpu, exact=True) == 1024 * 512 < 768 * 768
    assert models.most_at_once(TinyVAEConfig(), cpu) == 1024 * 1024


def test_the_model_takes_strips_for_large_pictures(tiny_sd, monkeypatch):
    """Above a megapixel, in both directions; what is painted is the same."""
    used = []
    for table in (models.DECODE_IN_STRIPS, models.ENCODE_IN_STRIPS):
        function = table[VAEConfig]
        monkeypatch.setitem(table, VAEConfig, lambda *a, f=function: used.append(f.__name__) or f(*a))
    z = latents(8, 8)
    picture = reference.normal("picture", (1, 3, 64, 64)).clamp(-1, 1)
    (whole,), latent = tiny_sd.decode(z), tiny_sd.encode(picture)
    assert not used
    monkeypatch.setattr(models, "LARGE_ON_CPU", 64 * 64 - 1)
    (image,), again = tiny_sd.decode(z), tiny_sd.encode(picture)
    assert used == ["decode_in_strips", "encode_in_strips"]
    assert error(torch.tensor(list(image.tobytes())), torch.tensor(list(whole.tobytes()))) < 1e-3
    assert error(again.mean, latent.mean) < 1e-5


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says how much memory a process had at most")
def test_large_images_within_4_gb():
    """2048x2048 by the decoder of Stable Diffusion 1.x in bfloat16: torch, weights and all.

    Processors without bfloat16 would take hours: they decode 1024x2048 in float32, whose maps take as many bytes.
    The weights are random, as the memory does not depend on them.
    """
    code = """
import torch
from sd.config import SD1
from sd.models.vae import VAE
from sd.runtime.device import best_dtype
from sd.runtime.optimize import optimize
from sd.runtime.vae_tiling import decode_in_strips

dtype = best_dtype(torch.device("cpu"))
rows = 256 if dtype == torch.bfloat16 else 128
vae = optimize(VAE(SD1.vae).to(dtype).requires_grad_(False))
z = torch.randn((1, 4, rows, 256), generator=torch.Generator().manual_seed(0)).to(dtype)
with torch.no_grad():
    out = decode_in_strips(vae, z)
assert out.shape == (1, 3, 8 * rows, 2048) and out.isfinite().all()
print(open("/proc/self/status").read())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024
    assert peak < 4e9
