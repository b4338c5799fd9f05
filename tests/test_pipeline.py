"""The pipeline: prompt to image as the original does it, seeds, sizes, precision, and what is refused."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import TINY, TINY_V2, Golden, error, tiny_state
from conftest import loaded
from PIL import Image

import sd
from sd.conditioning import Conditioning
from sd.config import Config
from sd.noise import draw, generators
from sd.params import CONTENTS, MAX_SEED
from sd.pipeline import StableDiffusion
from sd.runtime.device import best_dtype
from sd.samplers import SAMPLERS


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_prompt_to_image_of_the_original(tiny_sd):
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


def test_prompt_to_image_like_the_original_2():
    """Stable Diffusion 2.x in small, with v: OpenCLIP's padding, penultimate layer and v in one run."""
    golden = Golden("tiny_v2_txt2img_ddim_s15")
    case = golden.case
    model = StableDiffusion(TINY_V2, **loaded(tiny_state("tiny-v2-v"), TINY_V2))
    assert torch.equal(model.tokenizer(case["prompts"]), golden["ids"].long())
    assert torch.equal(model.tokenizer([case["negative"]] * 2), golden["ids_uncond"].long())
    context, uncond = model.encode_prompt(case["prompts"]), model.encode_prompt([case["negative"]] * 2)
    # the original takes 16 steps where 15 are asked for
    levels = [model.schedule.level(t) for t in (*case["t_calls"], 0)]
    *_, last = model.sample(model.denoiser(context, uncond, case["scale"]), golden["x_T"], levels, "ddim")
    assert error(last.x, golden["out"]) < 1e-4
    ours = np.stack([pixels(image) for image in model.decode(last.x)])
    truncated = golden["image_u8"].numpy().astype(int)
    assert (ours - truncated >= 0).mean() > 0.999 and np.abs(ours - truncated).max() <= 1


def test_text_to_image_is_these_parts(tiny_sd):
    (image,) = tiny_sd.txt2img(
        "a red cube", "blue", height=96, width=64, steps=3, guidance=4.0, seed=11, sampler="ddim"
    )
    noise = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(11))[None]
    denoise = tiny_sd.denoiser(tiny_sd.encode_prompt(["a red cube"]), tiny_sd.encode_prompt(["blue"]), 4.0)
    *_, last = tiny_sd.sample(denoise, noise, tiny_sd.schedule.levels(3, "leading"), "ddim")
    assert image.size == (64, 96) and image.mode == "RGB"
    assert np.abs(pixels(image) - pixels(tiny_sd.decode(last.x)[0])).max() <= 1


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}, {"guidance": 1.0}, {"height": 72}]
)
def test_image_depends_on_its_seed_only(tiny_sd, options):
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


def test_noise_is_each_image_s_own():
    rngs = generators(MAX_SEED, 2)  # seeds wrap around
    first = draw(rngs, (4, 9, 13), torch.device("cpu"))
    again = draw(generators(0, 1), (4, 9, 13), torch.device("cpu"))
    assert torch.equal(first[1], again[0]) and first.dtype == torch.float32
    assert not torch.equal(draw(rngs, (4, 9, 13), torch.device("cpu"))[0], first[0])


def test_default_type_and_device_of_torch_do_not_matter(either):
    settings = {"height": 64, "width": 64, "steps": 2, "seed": 9}

    def generate():
        (free,) = either.txt2img("a", **settings)
        (made,) = either.inpaint("a", photo(64, 64), a_mask(64, 64), strength=0.6, content="fill", **settings)
        return np.stack([pixels(free), pixels(made)])

    expected = generate()
    try:
        torch.set_default_dtype(torch.float64)
        wide = generate()
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        nowhere = generate()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert np.array_equal(wide, expected) and np.array_equal(nowhere, expected)


def test_numbers_of_numpy_are_numbers(tiny_sd):
    settings = {"height": np.int64(64), "width": np.int32(64), "steps": np.int64(1), "seed": np.uint8(3)}
    assert tiny_sd.txt2img("a", **settings)[0].size == (64, 64)


def test_samplers_are_given_what_they_need(tiny_sd):
    denoise, x, levels = (lambda x, level: x), torch.zeros(1, 4, 8, 8), tiny_sd.schedule.levels(2)
    with pytest.raises(ValueError, match="noise"):
        tiny_sd.sample(denoise, x, levels, "ddpm")
    with pytest.raises(ValueError, match="eta"):
        tiny_sd.sample(denoise, x, levels, "ddpm", eta=0.5, noise=torch.randn_like)


def test_global_random_numbers_are_left_alone(tiny_sd):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tiny_sd.txt2img("x", height=64, width=64, steps=2, sampler="ddim", eta=1.0)
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
        ({"n": 0}, "n must be from 1 to 1000000, got 0"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        (
            {"prompt": torch.zeros(77, 64)},
            r"^prompt must be a context \(B, k x 77, 64\) of this model, got \(77, 64\) in float32$",
        ),
        ({"prompt": torch.zeros(0, 77, 64)}, "prompt must be a context"),
        ({"prompt": torch.zeros(1, 76, 64)}, "prompt must be a context"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"n": 2.0}, "n must be a whole number"),
        ({"n": None}, "n must be a whole number, got None"),
        ({"height": 64.0}, "height must be a whole number"),
        ({"width": 10**9}, "at most 16384"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"n": None}, "n must be a whole number, got None"),
        ({"guidance": True}, "guidance must be a number, got True"),
        ({"n": 10**7}, "n must be from 1 to 1000000, got 10000000"),
        pytest.param({"n": 10**5000}, "n must be from 1 to 1000000, got a number of about 500", id="digits"),
        ({"prompt": [torch.zeros(1, 77, 64)]}, r"a list with a tensor \(1, 77, 64\); join contexts with torch.cat"),
        (
            {"negative": Conditioning(torch.zeros(1, 77, 64))},
            r"^negative must be .* got a Conditioning: give its \.context \(1, 77, 64\)$",
        ),
    ],
    ids=str,
)
def test_refusals(tiny_sd, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        tiny_sd.txt2img(**{"prompt": "x", "height": 64, "width": 64, "steps": 2} | settings)
    assert "\n" not in str(caught.value)


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
    with pytest.warns(UserWarning, match="the image is not finite in float16: computing it again in float32"):
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


def test_hot_path_is_short(tiny_sd):
    """How many functions of the package one image crosses, in how many files: printed, and bounded.

    The networks' own functions, and the kernels that take their place on this processor, are printed only.
    """
    settings = {"height": 64, "width": 64, "steps": 3, "sampler": "ddim"}
    tiny_sd.txt2img("a red cube", **settings)  # words that the tokenizer has not seen cross more
    root, crossed = str(Path(sd.__file__).parent), set()

    def profile(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and "<" not in code.co_name:
            crossed.add((code.co_filename[len(root) + 1 :], code.co_name, code.co_firstlineno))

    sys.setprofile(profile)
    try:
        tiny_sd.txt2img("a red cube", **settings)
    finally:
        sys.setprofile(None)
    for file in sorted({file for file, *_ in crossed}):
        print(file, *sorted(name for other, name, _ in crossed if other == file))
    files = {file for file, *_ in crossed}
    print(f"{len(crossed)} functions in {len(files)} files")
    own = {entry for entry in crossed if not entry[0].startswith(("models", "runtime"))}
    assert len(own) <= 64 and len({file for file, *_ in own}) <= 15


@pytest.mark.exhaustive
def test_networks_can_be_replaced():
    """By a compiled one, as people do it, which is used from then on; LoRAs still find the weights inside."""
    model = StableDiffusion(TINY, **loaded(tiny_state(), TINY))
    settings = {"height": 64, "width": 64, "steps": 2, "seed": 3}
    (expected,) = model.txt2img("a cat", **settings)
    context, given = model.encode_prompt("a cat"), (torch.ones(1, 4, 8, 8), torch.ones(1))
    assert torch.equal(model.unet(*given, context), model.unet(*given, Conditioning(context)))  # a context alone
    plain, calls = model.unet, []
    model.unet = torch.compile(model.unet, backend=lambda graph, _: calls.append(1) or graph)
    (image,) = model.txt2img("a cat", **settings)
    assert calls and np.abs(pixels(image) - pixels(expected)).max() <= 1
    assert model._adapters.merged.networks["unet"] is plain
    other = loaded(tiny_state(), TINY)["unet"]
    with torch.no_grad():
        other.conv_out.weight.zero_()
    model.unet = other
    assert model.unet is other and model._adapters.merged.networks["unet"] is other
    assert np.abs(pixels(model.txt2img("a cat", **settings)[0]) - pixels(expected)).max() > 1
    with pytest.raises(ValueError, match="take turns, and cannot be replaced"):
        low = StableDiffusion.load(device="cpu", low_memory=True)
        low.vae = model.vae


# --- image to image ---


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_images_without_pixels_are_refused(tiny_sd, size):
    empty, image = Image.new("RGB", size), Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match=f"^image has no pixels: its size is {size[0]}x{size[1]}$"):
        tiny_sd.img2img("a", empty)
    with pytest.raises(ValueError, match="mask has no pixels"):
        tiny_sd.inpaint("a", image, empty)


def test_options_of_loading_are_checked():
    with pytest.raises(ValueError, match=r"^config must be a Config, such as sd\.MODELS\['sd1'\], got 'sd1'$"):
        StableDiffusion.load(config="sd1")
    with pytest.raises(TypeError, match=r"^load has no option 'torch_dtype'; it has device, dtype, .*variant"):
        StableDiffusion.load(torch_dtype=torch.float16)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with a sharp edge."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 255 * (x > width / 2)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("name", ["img2img_s20_075", "img2img_s15_06_eta1"])
def test_image_to_image_of_the_original(tiny_sd, name):
    """It adds the noise of one level above the first that it denoises at; otherwise its parts are these."""
    golden = Golden(name)
    case, schedule = golden.case, tiny_sd.schedule
    contexts = Golden(case["contexts"])
    grid = sorted(range(1, 1000, 1000 // case["steps"]))
    encoded = schedule.add_noise(golden["x_T"], golden["encode_noise"], schedule.level(grid[case["t_enc"]]))
    assert error(encoded, golden["mid.encoded"]) < 1e-5
    levels = [schedule.level(t) for t in (*case["t_calls"], 0)]
    if 1000 % case["steps"] == 0:
        assert levels == schedule.levels(case["steps"], "leading", case["strength"])
    denoise = tiny_sd.denoiser(contexts["cond"], contexts["uncond"], case["scale"])
    *_, last = tiny_sd.sample(denoise, encoded, levels, "ddim", eta=case["eta"], noise=golden.noise())
    assert error(last.x, golden["out"]) < 1e-4


def test_image_to_image_is_these_parts(tiny_sd):
    picture = photo(64, 96)
    (image,) = tiny_sd.img2img(
        "a red cube", picture, "blue", strength=0.5, steps=4, height=96, width=64, seed=11, sampler="ddim"
    )
    rng = torch.Generator().manual_seed(11)
    posterior, noise = torch.randn(1, 4, 12, 8, generator=rng), torch.randn(1, 4, 12, 8, generator=rng)
    pixels_in = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    levels = tiny_sd.schedule.levels(4, "leading")[2:]
    x = tiny_sd.schedule.add_noise(tiny_sd.vae.encode(pixels_in).sample(posterior), noise, levels[0])
    denoise = tiny_sd.denoiser(tiny_sd.encode_prompt(["a red cube"]), tiny_sd.encode_prompt(["blue"]), 7.5)
    *_, last = tiny_sd.sample(denoise, x, levels, "ddim")
    assert np.abs(pixels(image) - pixels(tiny_sd.decode(last.x)[0])).max() <= 1


def test_strength_zero_is_the_vae_and_one_is_text_to_image(tiny_sd):
    picture = photo(64, 64)
    size = {"height": 64, "width": 64, "seed": 3}
    (kept,) = tiny_sd.img2img("a cat", picture, strength=0, posterior="mode", **size)
    assert np.array_equal(pixels(kept), pixels(tiny_sd.decode(tiny_sd.encode(picture).mode())[0]))
    (free,) = tiny_sd.img2img("a cat", picture, strength=1, steps=3, **size)
    assert np.array_equal(pixels(free), pixels(tiny_sd.txt2img("a cat", steps=3, **size)[0]))


def test_a_note_says_that_the_strength_is_less_than_a_step(tiny_sd):
    with pytest.warns(UserWarning, match=r"strength 0\.1 of 5 steps is less than one step: nothing is generated"):
        tiny_sd.img2img("a", photo(64, 64), strength=0.1, steps=5, height=64, width=64)


@pytest.mark.parametrize(
    "sampler, posterior",
    [
        ("ddim", "mode"), ("euler_a", "sample"),
        *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in (("ddim", "sample"), ("euler_a", "mode"))),
    ],
)  # fmt: skip
def test_changed_image_depends_on_its_seed_only(tiny_sd, posterior, sampler):
    settings = {"strength": 0.6, "steps": 5, "sampler": sampler, "posterior": posterior, "height": 64, "width": 72}
    batch = tiny_sd.img2img("a cat", photo(72, 64), seed=5, n=3, **settings)
    for i in range(3):
        (alone,) = tiny_sd.img2img("a cat", photo(72, 64), seed=5 + i, **settings)
        assert np.abs(pixels(batch[i]) - pixels(alone)).max() <= 1
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).mean() > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_starts_anywhere(tiny_sd, name):
    for strength in (0, 0.4, 1):
        (image,) = tiny_sd.img2img("a", photo(16, 16), strength=strength, sampler=name, steps=3, height=16, width=16)
        assert image.size == (16, 16)


@pytest.mark.parametrize(
    "size, given, up, expected",
    [
        ((128, 128), {}, False, (128, 128)),  # the tiny model's own
        ((131, 127), {}, False, (120, 128)),
        ((131, 127), {}, True, (128, 136)),
        ((64, 64), {}, False, (128, 128)),
        ((4000, 3000), {}, False, (104, 144)),
        ((1, 1), {}, False, (128, 128)),
        ((8000, 20), {}, False, (8, 2560)),
        ((100, 200), {"width": 64}, False, (128, 64)),
        ((100, 200), {"height": 64}, False, (64, 32)),
        ((100, 200), {"height": 64, "width": 64}, True, (64, 64)),
    ],
)
def test_sizes_from_images(tiny_sd, size, given, up, expected):
    assert tiny_sd.image_size(size, **given, up=up) == expected


def test_images_are_cropped_or_padded(tiny_sd):
    for fit, size in (("crop", (64, 64)), ("pad", (64, 32))):
        (image,) = tiny_sd.img2img("a", photo(200, 100), strength=0, height=64, width=64, fit=fit)
        assert image.size == size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_any_mode(tiny_sd, mode):
    picture = photo(16, 16, "L").convert(mode) if mode in ("1", "I;16", "F") else photo(16, 16, mode)
    (image,) = tiny_sd.img2img("a", picture, strength=0, height=16, width=16)
    assert image.mode == "RGB"


def test_a_note_says_what_is_cropped(tiny_sd):
    with pytest.warns(UserWarning, match="50 % of the image is cut off"):
        tiny_sd.img2img("a", photo(200, 100), strength=0, height=64, width=64)


# --- inpainting ---


def a_mask(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 4, width // 2 + 1, height // 2 + 1))
    return mask


@pytest.fixture(params=["tiny_sd", "tiny_inpaint"], ids=["4 channels", "9 channels"])
def either(request) -> StableDiffusion:
    return request.getfixturevalue(request.param)


SIZES = [(64, 64), (65, 71), (96, 64), (8, 8), (300, 40), (200, 333)]
MASKED = [
    pytest.param(name, size, more, id=f"{name}, {size}, {more}", marks=() if usual else pytest.mark.exhaustive)
    for name in ("tiny_sd", "tiny_inpaint")
    for size in SIZES
    for more in ({}, {"margin": 4}, {"strength": 0.5, "content": "fill"})
    # how the image is cut to size and put back does not depend on the model, nor on what fills the mask
    for usual in [(name == "tiny_sd" and not more) or size == (65, 71) or (size == (300, 40) and "margin" in more)]
]


@pytest.mark.parametrize("either, size, options", MASKED, indirect=["either"])
def test_outside_of_the_mask_no_pixel_changes(either, size, options):
    picture, mask = photo(*size), a_mask(*size)
    (image,) = either.inpaint("a cat", picture, mask, steps=2, seed=1, height=64, width=64, **options)
    changed = (pixels(image) != pixels(picture)).any(axis=-1)
    hole = np.asarray(mask) > 0
    assert image.size == size and not changed[~hole].any() and changed[hole].mean() > 0.9


def test_inpainting_with_4_channels_is_these_parts(tiny_sd):
    picture, mask = photo(64, 64), a_mask(64, 64)
    (image,) = tiny_sd.inpaint("a cat", picture, mask, steps=3, seed=11, height=64, width=64, sampler="ddim")
    rng = torch.Generator().manual_seed(11)
    posterior, x = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 4, 8, 8, generator=rng)
    z = tiny_sd.encode(picture).sample(posterior)
    hole = torch.zeros(1, 1, 8, 8)
    hole[..., 2:5, 2:5] = 1
    levels = tiny_sd.schedule.levels(3, "leading")
    x = torch.where(hole > 0, x, tiny_sd.schedule.add_noise(z, x, levels[0]))
    denoise = tiny_sd.denoiser(tiny_sd.encode_prompt(["a cat"]), tiny_sd.encode_prompt([""]), 7.5)

    def held(x, level):
        return torch.where(hole > 0, denoise(x, level), z)

    *_, last = tiny_sd.sample(held, x, levels, "ddim")
    expected = pixels(tiny_sd.decode(torch.where(hole > 0, last.x, z))[0])
    inside = np.asarray(mask) > 0
    assert np.abs(pixels(image)[inside] - expected[inside]).max() <= 1


def test_inpainting_with_9_channels_is_these_parts(tiny_inpaint):
    sd, picture, mask = tiny_inpaint, photo(64, 64), a_mask(64, 64)
    (image,) = sd.inpaint("a cat", picture, mask, steps=3, seed=11, sampler="ddim", eta=1.0, height=64, width=64)
    rng = torch.Generator().manual_seed(11)

    def randn(_=None):
        return torch.randn(1, 4, 8, 8, generator=rng)

    hole = torch.from_numpy(np.asarray(mask) / np.float32(255))[None, None]
    grey = (torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1) * (1 - hole)
    masked = sd.vae.encode(grey).sample(randn())
    concat = torch.cat([hole[..., ::8, ::8], masked], dim=1)
    denoise = sd.denoiser(sd.encode_prompt(["a cat"]), sd.encode_prompt([""]), 7.5, concat)
    *_, last = sd.sample(denoise, randn(), sd.schedule.levels(3, "leading"), "ddim", eta=1.0, noise=randn)
    expected, inside = pixels(sd.decode(last.x)[0]), np.asarray(mask) > 0
    assert np.abs(pixels(image)[inside] - expected[inside]).max() <= 1


@pytest.mark.parametrize(
    "either, content",
    [
        *(("tiny_sd", content) for content in CONTENTS), ("tiny_inpaint", "fill"),
        *(pytest.param("tiny_inpaint", content, marks=pytest.mark.exhaustive) for content in ("original", "noise")),
    ],
    indirect=["either"],
)  # fmt: skip
def test_inpainted_part_depends_on_its_seed_only(either, content):
    settings = {"strength": 0.7, "content": content, "steps": 4, "sampler": "dpmpp_2m_sde", "height": 64, "width": 64}
    picture, mask = photo(64, 64), a_mask(64, 64)
    batch = either.inpaint("a cat", picture, mask, seed=5, n=2, **settings)
    (alone,) = either.inpaint("a cat", picture, mask, seed=6, **settings)
    assert np.abs(pixels(batch[1]) - pixels(alone)).max() <= 1
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).max() > 5


def test_contents_differ(either):
    picture, mask = photo(64, 64), a_mask(64, 64)
    settings = {"strength": 0.5, "steps": 4, "height": 64, "width": 64}
    made = [either.inpaint("a", picture, mask, content=content, **settings)[0] for content in CONTENTS]
    assert len({image.tobytes() for image in made}) == 3
    with pytest.raises(ValueError, match="unknown content 'sky', expected one of original, fill, noise"):
        either.inpaint("a", picture, mask, content="sky")


@pytest.mark.parametrize("strength", [0, 0.01, 1])
def test_empty_and_full_masks(either, strength):
    picture = photo(64, 64)
    settings = {"strength": strength, "steps": 2, "height": 64, "width": 64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (full,) = either.inpaint("a", picture, Image.new("L", (64, 64), 255), **settings)
    assert (pixels(full) != pixels(picture)).any(axis=-1).mean() > 0.5
    for margin in (None, 8):
        with pytest.warns(UserWarning, match="the mask is empty"):
            same = either.inpaint("a", picture, Image.new("1", (9, 9)), n=2, margin=margin, **settings)
        assert [image.tobytes() for image in same] == [picture.tobytes()] * 2


def test_soft_masks_blend(either):
    """A grey mask shows so much of what a white one would."""
    picture = photo(64, 64)
    settings = {"steps": 2, "height": 64, "width": 64}

    def change(grey):
        (image,) = either.inpaint("a", picture, Image.new("L", (64, 64), grey), **settings)
        return pixels(image) - pixels(picture)

    full = change(255)
    for grey in (64, 128, 192):
        assert np.abs(change(grey) - grey / 255 * full).max() <= 2


def test_small_holes_in_large_images_are_generated(either):
    picture = photo(1024, 1024)
    mask = Image.new("L", picture.size)
    mask.paste(255, (500, 500, 506, 506))
    settings = {"height": 64, "width": 64, "seed": 1}
    (painted,) = either.inpaint("a", picture, mask, steps=2, **settings)
    (kept,) = either.inpaint("a", picture, mask, strength=0, **settings)
    assert np.abs(pixels(painted) - pixels(kept))[500:506, 500:506].mean() > 2


def test_half_transparent_edges_have_no_halo(either):
    """The colours beneath are blended with what is generated; no background comes in between."""
    picture = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    picture.paste((10, 20, 30, 128), (0, 32, 64, 40))
    picture.paste((10, 20, 30, 0), (0, 40, 64, 64))
    (image,) = either.inpaint("a", picture, steps=2, height=64, width=64)
    mask = Image.eval(picture.getchannel("A"), lambda v: 255 * (v < 255))
    (below,) = either.inpaint("a", picture.convert("RGB"), mask, steps=2, height=64, width=64)
    expected = 128 / 255 * np.array((10, 20, 30)) + 127 / 255 * pixels(below)[32:40]
    assert np.abs(pixels(image)[32:40] - expected).max() <= 2


def test_only_what_is_around_the_mask_is_looked_at(tiny_sd):
    """All of the canvas is image, as far as there is any."""
    seen = []

    def encode(pixels, note):
        seen.append(pixels)
        return StableDiffusion.encode(tiny_sd, pixels, note)

    picture, mask = photo(256, 256), Image.new("L", (256, 256))
    mask.paste(255, (120, 40, 126, 200))
    tiny_sd.encode = encode
    try:
        tiny_sd.inpaint("a", picture, mask, margin=8, steps=1, height=64, width=64)
        tiny_sd.inpaint("a", picture, mask, margin=8, steps=1)
    finally:
        del tiny_sd.encode
    whole, own = seen
    assert whole.shape == (1, 3, 64, 64) and own.shape[2] <= 2 * own.shape[3] + 8
    assert (whole[0, 0, 0].diff() > 0).all()  # the picture's ramp, nowhere a repeated edge


def test_transparent_part_is_the_mask(either):
    picture, mask = photo(64, 64), a_mask(64, 64)
    settings = {"steps": 2, "height": 64, "width": 64}
    clear = picture.copy()
    clear.putalpha(Image.eval(mask, lambda v: 255 - v))
    (image,) = either.inpaint("a", clear, **settings)
    kept = np.asarray(mask) == 0
    assert np.array_equal(pixels(image)[kept], pixels(picture)[kept])
    with pytest.raises(ValueError, match="give a mask, or an image with a transparent part"):
        either.inpaint("a", picture, **settings)


def test_inpainting_models_work_without_a_mask(tiny_inpaint):
    """All is hidden then: a mask of ones, and the latent of a grey image."""
    sd = tiny_inpaint
    (image,) = sd.txt2img("a cat", height=64, width=40, steps=2, seed=4, sampler="ddim")
    noise = torch.randn(1, 4, 8, 5, generator=torch.Generator().manual_seed(4))
    grey = sd.vae.encode(torch.zeros(1, 3, 64, 40)).mean
    denoise = sd.denoiser(
        sd.encode_prompt(["a cat"]), sd.encode_prompt([""]), 7.5, torch.cat([torch.ones(1, 1, 8, 5), grey], 1)
    )
    *_, last = sd.sample(denoise, noise, sd.schedule.levels(2, "leading"), "ddim")
    assert np.abs(pixels(image) - pixels(sd.decode(last.x)[0])).max() <= 1
    (changed,) = sd.img2img(
        "a cat", photo(40, 64), strength=0.5, height=64, width=40, steps=4, posterior="mode", seed=4, sampler="ddim"
    )
    levels = sd.schedule.levels(4, "leading", 0.5)
    x = sd.schedule.add_noise(sd.encode(photo(40, 64)).mode(), noise, levels[0])
    *_, last = sd.sample(denoise, x, levels, "ddim")
    assert np.abs(pixels(changed) - pixels(sd.decode(last.x)[0])).max() <= 1


def test_extra_channels_are_required_or_refused(tiny_sd, tiny_inpaint):
    context = tiny_sd.encode_prompt(["a"])
    with pytest.raises(ValueError, match="9 input channels needs `concat`"):
        tiny_inpaint.denoiser(context, guidance=1.0)
    with pytest.raises(ValueError, match="4 input channels takes no `concat`"):
        tiny_sd.denoiser(context, guidance=1.0, concat=torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"an RGB image or \(B, 3, H, W\), got \(1, 1, 64, 64\)"):
        tiny_sd.encode(Image.new("L", (64, 64)))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"strength": -0.1}, r"strength must be in \[0, 1\], got -0.1"),
        ({"strength": float("nan")}, "strength"),
        ({"posterior": "mean"}, "unknown posterior 'mean', expected one of sample, mode"),
        ({"blur": -1}, "blur"),
        ({"margin": -1}, "margin"),
        ({"margin": 1.5}, "margin must be a whole number"),
        ({"height": 65}, "height must be a multiple of 8, got 65: try 64 or 72"),
        ({"image": "photo.png"}, "image must be a PIL image .* got str"),
        ({"mask": "mask.png"}, "mask must be a PIL image .* got str"),
        ({"mask": np.zeros((64, 64))}, "mask must be a PIL image .* got ndarray"),
        ({"strength": "0.5"}, "strength must be a number, got '0.5'"),
        ({"guidance": "7"}, "guidance must be a number, got '7'"),
        ({"blur": "2"}, "blur must be a number"),
        ({"blur": float("inf")}, "blur must be a finite number, got inf"),
        ({"height": 64.0}, "height must be a whole number"),
    ],
    ids=str,
)
def test_inpainting_refuses(either, settings, words):
    given = {"image": photo(64, 64), "mask": a_mask(64, 64), "height": 64, "width": 64, "steps": 2} | settings
    with pytest.raises(ValueError, match=words):
        either.inpaint("a", **given)


def test_half_precision_that_overflows_is_encoded_again():
    sd = StableDiffusion(TINY, **loaded(tiny_state(), TINY, torch.float16))
    with torch.no_grad():
        sd.vae.encoder.conv_in.weight.mul_(3e4)
    with pytest.warns(UserWarning, match="the latent is not finite in float16: computing it again in float32"):
        assert sd.encode(photo(64, 64)).mean.isfinite().all()
    assert next(sd.vae.parameters()).dtype == torch.float16


def test_a_model_has_a_guidance_of_its_own(tiny_sd):
    """It is taken where none is given, and 1 is not mistaken for none."""
    options = {"steps": 2, "seed": 1, "height": 64, "width": 64}
    config = replace(tiny_sd.config, guidance=3.0)
    model = StableDiffusion(config, tiny_sd.text_encoder, tiny_sd.vae, tiny_sd.unet)
    plain, own = model.txt2img("a", **options)[0], model.txt2img("a", guidance=3.0, **options)[0]
    assert plain.tobytes() == own.tobytes()
    assert plain.tobytes() != tiny_sd.txt2img("a", **options)[0].tobytes()  # 7.5
    assert model.txt2img("a", guidance=1, **options)[0].tobytes() != own.tobytes()
    assert Config.from_json(config.to_json()).guidance == 3.0
    with pytest.raises(ValueError, match=r"Config\.guidance: got nan"):
        replace(config, guidance=float("nan"))
