"""The pipeline: prompt to picture as the original does it, seeds, sizes, precision, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import TINY, Golden, error, tiny_state
from conftest import loaded
from PIL import Image

from sd.pipeline import MAX_SEED, StableDiffusion, best_dtype, draw, generators


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_prompt_to_picture_of_the_original(tiny_sd):
    golden = Golden("tiny_v1_txt2img_ddim_s20")
    case = golden.case
    assert torch.equal(tiny_sd.tokenizer(case["prompts"]), golden["ids"].long())
    context, uncond = tiny_sd.encode_prompt(case["prompts"]), tiny_sd.encode_prompt([case["negative"]] * 2)
    denoise = tiny_sd.denoiser(context, uncond, case["scale"])
    levels = tiny_sd.schedule.levels(case["steps"], "leading")
    assert [level.t for level in levels[:-1]] == case["t_calls"]
    steps = tiny_sd.sample(denoise, golden["x_T"], levels, "ddim")
    assert len(steps) == 20
    *_, last = steps
    assert error(last.x, golden["out"]) < 1e-4
    ours = np.stack([pixels(image) for image in tiny_sd.decode(last.x)])
    truncated = golden["image_u8"].numpy().astype(int)
    assert (ours - truncated >= 0).mean() > 0.999 and np.abs(ours - truncated).max() <= 1  # we round, it truncates


def test_text_to_image_is_these_parts(tiny_sd):
    (image,) = tiny_sd.txt2img("a red cube", "blue", height=96, width=64, steps=3, guidance=4.0, seed=11)
    noise = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(11))[None]
    denoise = tiny_sd.denoiser(tiny_sd.encode_prompt(["a red cube"]), tiny_sd.encode_prompt(["blue"]), 4.0)
    *_, last = tiny_sd.sample(denoise, noise, tiny_sd.schedule.levels(3, "leading"), "ddim")
    assert image.size == (64, 96) and image.mode == "RGB"
    assert np.abs(pixels(image) - pixels(tiny_sd.decode(last.x)[0])).max() <= 1


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"sampler": "ddpm"}, {"guidance": 1.0}, {"height": 72}])
def test_picture_depends_on_its_seed_only(tiny_sd, options):
    """Not on the batch, nor on the place in it; also where the latent's size is no multiple of 16."""
    settings = {"height": 64, "width": 40, "steps": 4} | options
    batch = tiny_sd.txt2img("a cat", seed=5, n=3, **settings)
    for i in range(3):
        (alone,) = tiny_sd.txt2img("a cat", seed=5 + i, **settings)
        assert np.abs(pixels(batch[i]) - pixels(alone)).max() <= 1
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).mean() > 5


def test_several_prompts_and_mixed_contexts(tiny_sd):
    settings = {"height": 64, "width": 64, "steps": 2}
    a, b = tiny_sd.txt2img(["a cat", "a dog"], seed=7, **settings)
    assert pixels(a).shape == (64, 64, 3)
    (alone,) = tiny_sd.txt2img("a dog", seed=8, **settings)
    assert np.abs(pixels(b) - pixels(alone)).max() <= 1
    contexts = tiny_sd.encode_prompt(["a cat", "a dog"])
    (same,) = tiny_sd.txt2img(contexts[1:], seed=8, **settings)
    (mixed,) = tiny_sd.txt2img(contexts.mean(dim=0, keepdim=True), seed=8, **settings)
    assert np.abs(pixels(same) - pixels(alone)).max() <= 1 and np.abs(pixels(mixed) - pixels(alone)).max() > 1


def test_progress_wraps_the_steps(tiny_sd):
    seen = []

    def progress(steps):
        assert len(steps) == 3
        for step in steps:
            seen.append((step.i, step.x.shape, step.x0.shape))
            yield step

    tiny_sd.txt2img("x", height=64, width=64, steps=3, progress=progress)
    assert seen == [(i, (1, 4, 8, 8), (1, 4, 8, 8)) for i in range(3)]


def test_noise_is_each_picture_s_own():
    rngs = generators(MAX_SEED, 2)  # seeds wrap around
    first = draw(rngs, (4, 9, 13), torch.device("cpu"))
    again = draw(generators(0, 1), (4, 9, 13), torch.device("cpu"))
    assert torch.equal(first[1], again[0]) and first.dtype == torch.float32
    assert not torch.equal(draw(rngs, (4, 9, 13), torch.device("cpu"))[0], first[0])


def test_default_type_and_device_of_torch_do_not_matter(tiny_sd):
    settings = {"height": 64, "width": 64, "steps": 2, "seed": 9}
    (expected,) = tiny_sd.txt2img("a", **settings)
    try:
        torch.set_default_dtype(torch.float64)
        (image,) = tiny_sd.txt2img("a", **settings)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        (again,) = tiny_sd.txt2img("a", **settings)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert np.array_equal(pixels(image), pixels(expected)) and np.array_equal(pixels(again), pixels(expected))


def test_numbers_of_numpy_are_numbers(tiny_sd):
    settings = {"height": np.int64(64), "width": np.int32(64), "steps": np.int64(1), "seed": np.uint8(3)}
    assert tiny_sd.txt2img("a", **settings)[0].size == (64, 64)


def test_samplers_are_given_what_they_need(tiny_sd):
    denoise, x, levels = (lambda x, level: x), torch.zeros(1, 4, 8, 8), tiny_sd.schedule.levels(2)
    with pytest.raises(ValueError, match="noise"):
        tiny_sd.sample(denoise, x, levels, "ddpm")
    with pytest.raises(ValueError, match="eta"):
        tiny_sd.sample(denoise, x, levels, "ddpm", eta=0.5, noise=torch.randn_like)


def test_another_noise_schedule_is_said(tmp_path):
    """Silently wrong pictures are the worst kind: zero-terminal-SNR fine-tunes keep their schedule in the file."""
    from sd.pipeline import check_schedule

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_schedule(tiny_state(), TINY)
        check_schedule({key: tensor.half() for key, tensor in tiny_state().items()}, TINY)
        check_schedule({}, TINY)
    with pytest.warns(UserWarning, match="another noise schedule"):
        check_schedule({"alphas_cumprod": torch.linspace(1, 0, 1000)}, TINY)


@pytest.mark.gpu
def test_peak_memory_of_a_picture_on_the_gpu():
    """float16 at 512x512: at most 2.6 GB, the weights being 2.13 of them."""
    from sd.config import SD1
    from sd.convert import build

    networks = {name: net.to_empty(device="cuda").half() for name, net in build(SD1).items()}
    for network in networks.values():
        for parameter in network.parameters():
            parameter.normal_(0, 0.01)
        network.to(memory_format=torch.channels_last)
    sd = StableDiffusion(SD1, **networks)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    sd.txt2img("a", steps=2)
    assert torch.cuda.max_memory_allocated() < 2.6e9


def test_global_random_numbers_are_left_alone(tiny_sd):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tiny_sd.txt2img("x", height=64, width=64, steps=2, eta=1.0)
    assert torch.equal(torch.rand(3), expected)


def test_native_size(tiny_sd):
    assert tiny_sd.latent_shape() == (4, 16, 16) and tiny_sd.latent_shape(8, 24) == (4, 1, 3)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"height": 500}, "height must be a multiple of 8, got 500: try 496 or 504"),
        ({"width": 4}, "width must be a multiple of 8, got 4: try 8"),
        ({"width": 0}, "width"),
        ({"height": -64}, "height"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1001}, "1000"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"guidance": float("inf")}, "guidance"),
        ({"eta": 2.0}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta"),
        ({"sampler": "eulr"}, "unknown sampler 'eulr'"),
        ({"spacing": "even"}, "unknown spacing"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "number of pictures"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": torch.zeros(77, 64)}, r"a context must be \(B, 77, 64\), got \(77, 64\)"),
        ({"prompt": torch.zeros(0, 77, 64)}, "a context must be"),
        ({"prompt": torch.zeros(1, 76, 64)}, "a context must be"),
        ({"negative": None}, "prompt must be"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"n": 2.0}, "n must be a whole number"),
        ({"height": 64.0}, "height must be a whole number"),
        ({"width": 10**9}, "at most 16384"),
    ],
    ids=str,
)
def test_refusals(tiny_sd, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        tiny_sd.txt2img(**{"prompt": "x", "height": 64, "width": 64, "steps": 2} | settings)
    assert "\n" not in str(caught.value)


def test_inpainting_models_say_that_they_need_a_picture():
    from dataclasses import replace

    config = replace(TINY, unet=replace(TINY.unet, in_channels=9))
    with torch.device("cpu"):
        from sd.convert import build

        networks = {name: network.to_empty(device="cpu") for name, network in build(config).items()}
    with pytest.raises(ValueError, match="9 channels"):
        StableDiffusion(config, **networks).txt2img("x")


@pytest.mark.parametrize("prompt", ["", " ", "word " * 500, "naïve 東京 🎨"])
def test_any_prompt(tiny_sd, prompt):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (image,) = tiny_sd.txt2img(prompt, height=64, width=64, steps=1)
    assert image.size == (64, 64)
    assert [str(w.message) for w in caught if "500" in str(w.message) or "tokens" in str(w.message)] or len(prompt) < 99


def test_half_precision_that_overflows_is_decoded_again():
    networks = loaded(tiny_state(), TINY, torch.float16)
    sd = StableDiffusion(TINY, **networks)
    z = reference.normal("z", (2, 4, 8, 8))
    with torch.no_grad():  # beyond float16 inside of the decoder, not at its ends
        sd.vae.decoder.conv_in.weight.mul_(3e4)
    with pytest.warns(UserWarning, match="not finite when decoded in float16: decoding it again in float32"):
        images = sd.decode(z)
    assert len(images) == 2 and all(pixels(image).std() > 1 for image in images)
    assert next(sd.vae.parameters()).dtype == torch.float16
    with pytest.raises(ArithmeticError, match="NaN"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.decode(torch.full_like(z, float("nan")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_run_in_half_precision(tiny_sd, dtype):
    sd = StableDiffusion(TINY, **loaded(tiny_state(), TINY, dtype))
    settings = {"height": 64, "width": 64, "steps": 4, "guidance": 2.0, "seed": 3}
    (low,), (full,) = sd.txt2img("a cat", **settings), tiny_sd.txt2img("a cat", **settings)
    assert np.abs(pixels(low) - pixels(full)).mean() < (3 if dtype == torch.float16 else 15)


def test_device_and_precision_are_checked(tmp_path):
    assert best_dtype(torch.device("cuda")) == torch.float16
    assert best_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert best_dtype(torch.device("mps")) == torch.float32
    with pytest.raises(ValueError, match="not available here"):
        StableDiffusion.load(tmp_path, device="vulcan")
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        StableDiffusion.load(tmp_path, dtype="float8")


@pytest.mark.gpu
def test_same_picture_on_the_gpu(tiny_sd):
    sd = StableDiffusion(TINY, **{k: v.cuda() for k, v in loaded(tiny_state(), TINY).items()})
    settings = {"height": 64, "width": 64, "steps": 4, "eta": 1.0, "seed": 3}
    (gpu,), (cpu,) = sd.txt2img("a cat", **settings), tiny_sd.txt2img("a cat", **settings)
    assert np.abs(pixels(gpu) - pixels(cpu)).max() <= 2
