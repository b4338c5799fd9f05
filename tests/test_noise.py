"""Random numbers: our own, those of CUDA, of the web UI and of ComfyUI; variations; what a run draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from sd.noise import WORD, NoiseSource, Philox, draw, generators, philox4x32, slerp
from sd.params import MAX_SEED, ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.pipeline import StableDiffusion

SHAPE, CPU = (4, 8, 8), torch.device("cpu")
PHOTO = Image.effect_noise((64, 64), 60).convert("RGB")
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))

# tests/kat_vectors of Random123, "philox4x32 10": counter, key, random words
KNOWN_WORDS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.load(device="cpu", dtype="float32")


def params(**settings) -> SamplingParams:
    return SamplingParams(**{"seed": 7, "steps": 3, "height": 64, "width": 64, **settings})


def source(n: int = 1, **settings) -> NoiseSource:
    return NoiseSource(params(n=n, **settings), n)


def torch_cpu(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """What torch's CPU generator gives after this seed, draw by draw."""
    rng = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


# --- CUDA's generator ---


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_WORDS)
def test_philox_gives_the_known_words(counter, key, words):
    several = np.array(counter, dtype=np.uint64)[:, None].repeat(3, axis=1)
    assert philox4x32(several, key).tolist() == [[word] * 3 for word in words]


def test_numbers_of_a_gpu():
    """torch.randn on GPUs, reported with four digits: pytorch#79496 (seed 10), pytorch#158398 (seed 42)."""
    assert (Philox(10)((3,)) - torch.tensor([-0.1029, 1.6810, -0.2708])).abs().max() <= 5.1e-5
    x = Philox(42)((1, 64, 2048))[0]
    first = torch.tensor([[0.1940, 2.1614, -0.1721], [-0.4574, 0.8063, 0.1580], [1.1346, -0.6329, -0.9147]])
    last = torch.tensor([[1.4540, -2.7733, -0.8932], [0.1124, 0.2769, -1.2535], [-1.0001, -1.1552, -0.6955]])
    assert (x[:3, :3] - first).abs().max() <= 5.1e-5 and (x[:3, -3:] - last).abs().max() <= 5.1e-5


def test_numbers_that_the_web_ui_lists():
    """For seed 0, in modules/rng_philox.py."""
    listed = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    assert (Philox(0)((3, 4)) - torch.tensor(listed)).abs().max() < 1e-6


def test_each_call_of_philox_is_the_next_counter():
    """cuRAND's counter of 128 bits: the offset in its lower half, the thread in the upper one; the seed is the key."""
    stream = Philox(2**40 + 5)
    stream(SHAPE)
    second = stream(SHAPE).flatten()
    word = philox4x32(np.array([[1], [0], [200], [0]]), (5, 2**8))[:, 0].tolist()
    u, v = ((w + 0.5) / 2**32 for w in word[:2])
    assert abs(second[200] - math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v)) < 1e-6
    assert not torch.equal(second, Philox(2**40 + 5)(SHAPE).flatten())
    assert torch.equal(Philox(-1)(SHAPE), Philox(MAX_SEED)(SHAPE))  # seeds wrap around


def test_philox_is_unit_normal_noise():
    x = Philox(3)((4, 128, 128)).double()
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1 and x.isfinite().all()


# --- which generator draws what ---


def test_the_default_is_one_cpu_generator_per_image():
    noise = source(2)
    first, second = torch_cpu(7, SHAPE, SHAPE), torch_cpu(8, SHAPE, SHAPE)
    assert noise.seeds == [7, 8] and noise.variation_seeds is None
    assert torch.equal(noise.initial(SHAPE), torch.stack([first[0], second[0]]))
    assert torch.equal(noise.step(SHAPE), torch.stack([first[1], second[1]]))
    noise = source(2)  # the posterior sample comes first, as in the original code
    assert torch.equal(noise.posterior(SHAPE), torch.stack([first[0], second[0]]))
    assert torch.equal(noise.initial(SHAPE), torch.stack([first[1], second[1]]))


def test_nv_is_one_generator_of_cuda_per_image():
    noise, streams = source(2, rng="nv"), [Philox(7), Philox(8)]
    noise.posterior(SHAPE)  # from generators of its own
    for drawn in (noise.initial, noise.step, noise.step):
        assert torch.equal(drawn(SHAPE), torch.stack([stream(SHAPE) for stream in streams]))
    assert torch.equal(source(1, rng="nv", seed=8).initial(SHAPE), source(2, rng="nv").initial(SHAPE)[1:])


def test_comfy_is_one_generator_for_the_batch():
    """ComfyUI on a GPU: torch.manual_seed(seed), torch.randn(batch) on the CPU; then a generator of the GPU."""
    noise, steps = source(3, rng="comfy"), Philox(7)
    assert noise.seeds == [7, 7, 7]
    assert noise.posterior(SHAPE).shape == (3, *SHAPE)
    assert torch.equal(noise.initial(SHAPE), torch_cpu(7, (3, *SHAPE))[0])
    assert torch.equal(noise.step(SHAPE), steps((3, *SHAPE))) and torch.equal(noise.step(SHAPE), steps((3, *SHAPE)))


@pytest.mark.parametrize("rng", ["nv", "comfy"])
def test_noise_of_the_posterior_is_not_that_of_the_start(rng):
    noise = source(2, rng=rng)
    z, x = noise.posterior(SHAPE), noise.initial(SHAPE)
    assert not torch.isclose(z, x).any(dim=(1, 2, 3)).all() and not torch.equal(z[0], z[1])
    assert torch.equal(z, source(2, rng=rng).posterior(SHAPE))


@pytest.mark.parametrize("rng", ["torch-cpu", "nv"])
def test_noise_seed_delta_is_for_the_steps_only(rng):
    """As in the web UI: new generators, from their beginning, of seed + delta; 0 is no new generator."""
    noise, other = source(2, rng=rng, noise_seed_delta=31337), source(2, rng=rng, seed=7 + 31337)
    assert torch.equal(noise.initial(SHAPE), source(2, rng=rng).initial(SHAPE))
    assert torch.equal(noise.step(SHAPE), other.initial(SHAPE)) and torch.equal(noise.step(SHAPE), other.step(SHAPE))
    below = source(1, rng=rng, noise_seed_delta=-8)  # seed -1 is the largest
    assert torch.equal(below.step(SHAPE), source(1, rng=rng, seed=MAX_SEED).initial(SHAPE))


# --- variations ---


def test_slerp_by_hand():
    """Halfway between (2, 0) and (0, 1), in each column: sin(45°) / sin(90°) of both. Rows are not vectors."""
    a, b = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    a[:, 0], b[:, 1] = 2, 1
    half = math.sqrt(0.5)
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([2 * half, half])[None, :, None].expand(1, 2, 3))
    third = slerp(a, b, 1 / 3)
    assert torch.allclose(third[0, :, 0], torch.tensor([2 * math.sin(math.pi / 3), math.sin(math.pi / 6)]))


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 1, 8), (4, 2, 2)])
def test_slerp_stays_noise_and_ends_where_it_should(shape):
    a, b = torch_cpu(1, shape)[0], torch_cpu(2, shape)[0]
    for share, end in ((0.0, a), (1.0, b)):
        assert torch.allclose(slerp(a, b, share), end, atol=1e-6)
    middle = slerp(a, b, 0.3)
    assert middle.isfinite().all() and torch.equal(slerp(a, a, 0.3), a)
    if shape[1] == 64:
        assert abs(middle.std() - 1) < 0.02


@pytest.mark.parametrize("rng", ["torch-cpu", "nv"])
def test_a_variation_counts_the_other_seed(rng):
    """As in the web UI: all images have the seed, and image k has variation_seed + k; steps have the seed's noise."""
    noise = source(2, rng=rng, variation_seed=MAX_SEED, variation_strength=0.25)
    assert noise.seeds == [7, 7] and noise.variation_seeds == [MAX_SEED, 0]
    (first,) = source(1, rng=rng).initial(SHAPE)
    others = source(2, rng=rng, seed=MAX_SEED).initial(SHAPE)
    assert torch.equal(noise.initial(SHAPE), torch.stack([slerp(first, other, 0.25) for other in others]))
    plain = source(1, rng=rng)
    plain.initial(SHAPE)
    assert torch.equal(noise.step(SHAPE)[1:], plain.step(SHAPE))


def test_parts_of_a_request_have_its_seeds():
    assert params(n=9).batch(4, 2) == params(seed=11, n=2)
    varied = {"variation_seed": MAX_SEED, "variation_strength": 0.5}
    assert params(n=9, **varied).batch(4, 2) == params(n=2, variation_seed=3, variation_strength=0.5)


# --- runs ---


@pytest.mark.parametrize("rng", ["torch-cpu", "nv", "comfy"])
@pytest.mark.parametrize("kind", ["txt2img", "img2img", "inpaint"])
def test_runs_start_from_this_noise(model, kind, rng):
    """The state at the first level is the noise, or the image with this noise added."""
    settings = params(n=2, rng=rng, sampler="euler_a", variation_seed=3, variation_strength=0.4)
    expected = NoiseSource(settings, 2)
    if rng == "torch-cpu" and kind != "txt2img":
        expected.posterior((4, 8, 8))
    request = {
        "txt2img": lambda: TextToImage("a house", settings),
        "img2img": lambda: ImageToImage("a house", settings, image=PHOTO, strength=0.7),
        "inpaint": lambda: Inpaint("a house", settings, image=PHOTO, mask=MASK, strength=0.7),
    }[kind]()
    run, noise = model.prepare(request), expected.initial((4, 8, 8))
    if kind == "txt2img":
        assert torch.equal(run.x, noise)
    else:
        level, z = run.levels[0], model.encode(PHOTO).mode()
        left = (run.x - level.alpha * z) / level.sigma - noise  # the posterior's noise, which is small
        assert left.std() < 0.3 * noise.std()
    assert torch.equal(run.noise(run.x), expected.step((4, 8, 8)))
    assert run.seeds == [7, 7]


@pytest.mark.parametrize("rng", ["torch-cpu", "nv"])
def test_an_image_does_not_depend_on_its_batch(model, rng):
    given = {"rng": rng, "noise_seed_delta": 5, "sampler": "euler_a"}
    together = model.prepare(TextToImage("a house", params(n=2, **given)))
    alone = model.prepare(TextToImage("a house", params(n=2, **given).batch(1, 1)))
    for step, other in zip(together, alone, strict=True):
        assert torch.allclose(step.x[1:], other.x, atol=1e-4)
    assert together.seeds[1:] == alone.seeds


def test_what_may_surprise_is_noted(model):
    def notes(**settings):
        return model.prepare(TextToImage("a house", params(**settings))).notes

    assert notes() == notes(sampler="euler_a", noise_seed_delta=3) == notes(rng="nv", sampler="dpmpp_2m") == []
    assert notes(sampler="ddim", options={"eta": 0.5}, noise_seed_delta=3) == []
    (note,) = notes(sampler="dpmpp_2m", noise_seed_delta=3)
    assert note == "noise_seed_delta has no effect: DPM++ 2M draws no noise in its steps"
    (note,) = notes(rng="comfy", n=2)
    assert "the 2 images of this batch share the generator of seed 7" in note
    assert notes(rng="comfy") == []
    (note,) = notes(rng="nv", sampler="dpmpp_sde")
    assert note.startswith("DPM++ SDE: other programs draw its step noise differently")
    (note,) = notes(guidance=1.0, guidance_rescale=0.5)
    assert note == "guidance_rescale has no effect at guidance 1"


def test_default_noise_is_that_of_the_functions_used_one_by_one():
    assert torch.equal(source(3).initial(SHAPE), draw(generators(7, 3), SHAPE, CPU))
