"""Two passes: generated, enlarged, refined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sd.hires import resize_periodic
from sd.imaging.tensors import to_tensor
from sd.noise import NoiseSource
from sd.params import HighRes, SamplingParams, TextToImage, from_dict


def params(**settings) -> SamplingParams:
    return SamplingParams(**{"seed": 7, "steps": 4, "height": 32, "width": 16, "sampler": "euler_a", **settings})


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("upscaler", "rng"), [("lanczos", "nv"), ("latent", "torch-cpu"), ("latent", "comfy")])
def test_it_is_the_two_passes_by_hand(tiny_sd, upscaler, rng):
    """txt2img, enlarged; the noise that the seed gives at the larger size; the last steps of img2img."""
    given = {"n": 2, "rng": rng, "noise_seed_delta": 3, "variation_seed": 1, "variation_strength": 0.3}
    request = HighRes("a house", params(**given), hires=1.5, hires_strength=0.5, hires_upscaler=upscaler)
    run = tiny_sd.prepare(request)
    steps = list(run)

    plain = tiny_sd.prepare(TextToImage("a house", params(**given)))
    result = plain.result()
    if upscaler == "lanczos":
        larger = [image.resize((24, 48), Image.Resampling.LANCZOS) for image in result.images]
        z = torch.cat([tiny_sd.encode(to_tensor(image)).mode() for image in larger])
    else:
        z = F.interpolate(plain.x, size=(6, 3), mode="bilinear")
    source = NoiseSource(params(**given), 2)
    levels = tiny_sd.schedule.levels(4, run.params.spacing, 0.5)
    x = tiny_sd.schedule.add_noise(z, source.initial((4, 6, 3)), levels[0])
    context, uncond = tiny_sd.encode_prompt("a house").repeat(2, 1, 1), tiny_sd.encode_prompt("")
    denoise = tiny_sd.denoiser(context, uncond)
    *_, last = tiny_sd.sample(denoise, x, levels, "euler_a", noise=lambda x: source.step(x.shape[1:]))

    assert len(run) == 6 and [step.i for step in steps] == list(range(6))
    assert all(step.x.shape == (2, 4, 4, 2) for step in steps[:4])
    assert torch.allclose(steps[-1].x, last.x, atol=1e-4)
    refined = run.result()
    assert refined.seeds == result.seeds
    expected = tiny_sd.decode(last.x)
    assert all(abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(refined.images, expected, strict=True))


def test_as_a_keyword_and_as_json(tiny_sd):
    request = HighRes("a house", params(), hires=2, hires_strength=0.4, hires_steps=3, hires_upscaler="latent")
    assert from_dict(request.to_dict()) == request and request.to_dict()["kind"] == "hires"
    given = {"seed": 7, "steps": 4, "height": 32, "width": 16, "sampler": "euler_a", "hires_upscaler": "latent"}
    (image,) = tiny_sd.txt2img("a house", hires=2, hires_strength=0.4, hires_steps=3, **given)
    assert image.size == (32, 64)
    assert np.array_equal(pixels(image), pixels(tiny_sd.prepare(request).result().images[0]))
    with pytest.raises(TypeError, match="txt2img has no setting 'hires_strength'"):
        tiny_sd.txt2img("a house", hires_strength=0.4)
    assert tiny_sd.txt2img("a house", hires=None, height=64, width=64, steps=1)[0].size == (64, 64)


@pytest.mark.parametrize(
    ("strength", "steps", "taken"), [(0.55, None, 2), (0.55, 20, 20), (0.3, 1, 1), (1.0, 6, 6), (1.0, None, 4)]
)
def test_steps_of_the_second_pass(tiny_sd, strength, steps, taken):
    """Those of the web UI, which takes "Hires steps" as they are: the last ones of int(steps / strength)."""
    run = tiny_sd.prepare(HighRes("a", params(), hires_strength=strength, hires_steps=steps))
    assert len(run) == 4 + taken
    if steps is not None:
        grid = tiny_sd.schedule.levels(int(steps / strength), run.params.spacing)
        assert run.levels[4 + 1 :] == grid[len(grid) - steps :]


def test_a_second_pass_without_steps_only_enlarges(tiny_sd):
    run = tiny_sd.prepare(HighRes("a", params(), hires_strength=0.2))
    images, _, notes = run.result()
    assert notes == ["hires_strength 0.2 of 4 steps is less than one step: the image is only enlarged"]
    (plain,) = tiny_sd.prepare(TextToImage("a", params())).result().images
    z = tiny_sd.encode(to_tensor(plain.resize((32, 64), Image.Resampling.LANCZOS))).mode()
    assert len(run) == 4 and abs(pixels(images[0]) - pixels(tiny_sd.decode(z)[0])).max() <= 1


def test_previews_have_the_size_of_the_result(tiny_sd):
    run = tiny_sd.prepare(HighRes("a", params(n=2), hires=1.5))
    assert {image.size for step in run for image in run.preview(step.x0)} == {(24, 48)}


def test_the_caller_may_change_a_step(tiny_sd):
    """In either pass."""

    def final(changed: int) -> torch.Tensor:
        run = tiny_sd.prepare(HighRes("a", params(), hires_upscaler="latent"))
        for step in run:
            if step.i == changed:
                step.x.add_(0.1)
        return run.x

    assert not torch.equal(final(1), final(-1)) and not torch.equal(final(4), final(-1))


@pytest.mark.parametrize("where", [2, 5, "enlarging"])
def test_a_failure_is_said(tiny_sd, monkeypatch, where):
    run = tiny_sd.prepare(HighRes("a", params(), hires_strength=0.1 if where == "enlarging" else 0.5))
    if where == "enlarging":
        monkeypatch.setattr(tiny_sd.vae, "encode", lambda x: (_ for _ in ()).throw(MemoryError))
    calls, predict = [], tiny_sd.unet.forward

    def forward(*args):
        calls.append(1)
        if len(calls) == where:
            raise MemoryError
        return predict(*args)

    monkeypatch.setattr(tiny_sd.unet, "forward", forward)
    with pytest.raises(MemoryError):
        run.result()
    with pytest.raises(RuntimeError, match="failed: prepare the request again"):
        run.result()


def test_sizes_and_notes(tiny_sd):
    """Rounded down to multiples of 8; the notes of both passes, once."""
    run = tiny_sd.prepare(HighRes("a house " * 80, params(steps=1), hires=1.3))
    images, _, notes = run.result()
    assert images[0].size == (16, 40) and len(notes) == 2 and "are ignored" in notes[0]


def test_with_an_inpainting_model(tiny_inpaint):
    run = tiny_inpaint.prepare(HighRes("a", params(steps=2), hires=1.5))
    assert run.result().images[0].size == (24, 48)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hires": 1.0}, "hires must be above 1 and at most 4, got 1"),
        ({"hires": 5}, "hires must be above 1 and at most 4, got 5"),
        ({"hires": float("nan")}, "hires must be a finite number, got nan"),
        ({"hires": "2"}, "hires must be a number"),
        ({"hires_strength": 1.5}, "hires_strength must be in [0, 1], got 1.5"),
        ({"hires_steps": 0}, "hires_steps must be at least 1"),
        ({"hires_steps": 2.5}, "hires_steps must be a whole number"),
        ({"hires_upscaler": "esrgan"}, "unknown hires_upscaler 'esrgan', expected one of lanczos, latent"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(ValueError) as raised:
        HighRes("a", params(), **settings)
    assert words in str(raised.value)


def test_what_no_schedule_has_is_refused_before_the_first_step(tiny_sd):
    with pytest.raises(ValueError, match=r"need a grid of 1800 steps, and there are at most 1000"):
        tiny_sd.prepare(HighRes("a", params(), hires_steps=90, hires_strength=0.05))
    with pytest.raises(ValueError, match="must be at most 16384"):
        tiny_sd.prepare(HighRes("a", params(width=8200)))


def test_a_tile_is_enlarged_as_a_tile():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 16, 3), dtype=np.uint8))
    rolled = Image.fromarray(np.roll(np.asarray(image), (4, 8), axis=(0, 1)))
    larger, other = pixels(resize_periodic(image, 24, 36)), pixels(resize_periodic(rolled, 24, 36))
    assert abs(np.roll(larger, (6, 12), axis=(0, 1)) - other).max() <= 1
    inner = pixels(image.resize((24, 36), Image.Resampling.LANCZOS))
    assert abs(larger - inner)[6:-6, 6:-6].max() <= 1
