"""Masks and known parts: the original's masked runs and its 9-channel model, and what is done with pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import Golden, error, images
from PIL import Image, ImageFilter
from torch import Tensor

from sd.denoiser import keep_known
from sd.imaging.masks import (
    Canvas,
    fill,
    latent_mask,
    mask_channels,
    masked_image,
    prepare_mask,
    surroundings,
    widened,
)
from sd.imaging.tensors import Box, to_pil
from sd.samplers import SAMPLERS, Denoise, Noise, Step, ddim, plms
from sd.schedule import Level, Schedule

schedule = Schedule()


def check(golden: Golden, steps: list) -> None:
    """Every recorded state of a run."""
    for key, recorded in golden.tensors.items():
        kind, _, number = key.rpartition("_")
        if kind == "mid.after_step":
            assert error(steps[int(number) - 1].x, recorded) < 1e-4, key
        if kind == "mid.pred_x0_step":
            assert error(steps[int(number) - 1].x0, recorded) < 1e-4, key
    assert error(steps[-1].x, golden["out"]) < 1e-4


# --- runs of the original ---


def renoised(
    sampler: Callable[..., Iterator[Step]], schedule: Schedule, known: Tensor, mask: Tensor, noise: Noise
) -> Callable[..., Iterator[Step]]:
    """The sampler as the original masks it: before every step the known part is replaced, noised anew.

        x <- mask x + (1 - mask) add_noise(known, fresh noise, level)

    known (B, C, h, w) clean latents, mask (B, 1, h, w). `keep_known` needs no random numbers and also holds within a
    step. In the original (ddim.py and plms.py) the mask is 1 minus ours.
    """

    def keep(x: Tensor, level: Level) -> Tensor:
        return torch.lerp(schedule.add_noise(known, noise(x), level), x, mask)

    def run(denoise: Denoise, x: Tensor, levels: Sequence[Level], **options: object) -> Iterator[Step]:
        for step in sampler(denoise, keep(x, levels[0]), levels, **options):
            yield step
            if step.i < len(levels) - 2:
                step.x.copy_(keep(step.x, step.level))  # the sampler goes on from here

    return run


@pytest.mark.parametrize("name, sampler", [("ddim_s12_mask", ddim), ("plms_s8_mask", plms)])
def test_masked_sampling_of_the_original(tiny_sd, name, sampler):
    golden = Golden(name)
    contexts = Golden(golden.case["contexts"])
    denoise = tiny_sd.denoiser(contexts["cond"], contexts["uncond"], golden.case["scale"])
    calls = golden.case["t_calls"]
    levels = [schedule.level(t) for t in sorted(set(calls), reverse=True)] + [schedule.level(0)]
    mask = 1 - golden["mask"]  # theirs is 1 where the image stays
    run = renoised(sampler, schedule, golden["x0"], mask, golden.noise("blend"))
    check(golden, [step._replace(x=step.x.clone()) for step in run(denoise, golden["x_T"], levels)])


@pytest.mark.parametrize("name", ["inpaint9_ddim_s15", "inpaint9_ddim_s10_eta1"])
def test_inpainting_model_of_the_original(tiny_inpaint, name):
    """From image and mask on."""
    golden = Golden(name)
    contexts = Golden(golden.case["contexts"])
    image, mask = images(golden["image_u8"]), golden["mask"]
    seen = latent_mask(mask, 8)
    assert torch.equal(seen, golden["mask_latent"])
    assert error(torch.cat(tiny_inpaint.vae.moments(masked_image(image, mask)), dim=1), golden["masked_moments"]) < 2e-5
    hidden = tiny_inpaint.encode(masked_image(image, mask)).sample(golden.normal("posterior", (2, 4, 16, 24)))
    assert error(hidden, golden["masked_latent"]) < 2e-5
    concat = torch.cat([seen, hidden], dim=1)
    denoise = tiny_inpaint.denoiser(contexts["cond"], contexts["uncond"], golden.case["scale"], concat)
    levels = [schedule.level(t) for t in golden.case["t_calls"]] + [schedule.level(0)]
    steps = tiny_inpaint.sample(denoise, golden["x_T"], levels, "ddim", eta=golden.case["eta"], noise=golden.noise())
    check(golden, list(steps))


# --- a known part ---


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_part_is_reached_by_every_sampler(name):
    """And the other part is what it is without any mask, as long as the denoiser looks at each latent by itself."""
    known, x = reference.normal("known", (2, 4, 8, 8)), reference.normal("x", (2, 4, 8, 8))
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :5] = 1
    mask[..., 5] = 0.5

    def denoise(x, level):
        return torch.tanh(x) * level.alpha

    entry = SAMPLERS[name]
    levels = schedule.levels(30, "lcm" if entry.spacing == "lcm" else "karras")
    options = {}

    def final(denoise):
        noise = {"noise": reference_noise()} if entry.stochastic else {}
        *_, last = entry.run(denoise, x, levels, **options, **noise)
        # tcd ends with the noise of timestep 0
        return last.x0 if name == "tcd" else last.x

    plain, masked = final(denoise), final(keep_known(denoise, known, mask))
    assert error(masked[..., 6:], known[..., 6:]) < 1e-4
    assert error(masked[..., :5], plain[..., :5]) < 1e-6
    assert error(masked[..., 5], plain[..., 5]) > 0.1


def reference_noise():
    count = iter(range(10**6))
    return lambda x: reference.normal(f"noise/{next(count)}", tuple(x.shape))


# --- pixels ---


def mask_of(rows: slice, columns: slice, size=(64, 48)) -> Image.Image:
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[rows, columns] = 255
    return Image.fromarray(pixels)


def test_masks_are_brought_to_the_image():
    mask = mask_of(slice(10, 20), slice(30, 40))
    assert prepare_mask(mask, (64, 48)).tobytes() == mask.tobytes()
    twice = np.asarray(prepare_mask(mask, (128, 96)))
    assert twice[20:40, 60:80].mean() > 240 and twice[:16].max() == twice[44:].max() == 0
    assert prepare_mask(mask.convert("RGB"), (64, 48)).mode == "L"
    with pytest.warns(UserWarning, match="the mask is 64x48 and the image 48x48: it is stretched"):
        assert prepare_mask(mask, (48, 48)).size == (48, 48)


def test_masks_that_were_saved_as_jpeg_are_black_where_they_look_black():
    noisy = np.full((48, 64), 15, np.uint8)
    noisy[20:30] = 250
    noisy[40] = 100
    clean = np.asarray(prepare_mask(Image.fromarray(noisy), (64, 48)))
    assert set(np.unique(clean)) == {0, 100, 255} and (clean[20:30] == 255).all()


def test_blur_reaches_outwards_and_leaves_the_rest_black():
    mask = np.asarray(prepare_mask(mask_of(slice(20, 30), slice(20, 40)), (64, 48), blur=2))
    assert (mask[20:30, 20:40] > 240).all() and 0 < mask[25, 17] < 128 < mask[25, 19]
    assert mask[:10].max() == 0
    soft = Image.fromarray(np.full((48, 64), 80, np.uint8))
    assert prepare_mask(soft, (64, 48), blur=2).getextrema() == (80, 80)
    with pytest.raises(ValueError, match="blur"):
        prepare_mask(mask_of(slice(0, 1), slice(0, 1)), (64, 48), blur=-1)


def test_surroundings_of_a_mask():
    mask = mask_of(slice(10, 20), slice(30, 40))
    assert surroundings(mask, 0) == Box(30, 10, 40, 20)
    assert surroundings(mask, 15) == Box(15, 0, 55, 35)
    assert surroundings(mask, 1000) == Box(0, 0, 64, 48)
    assert surroundings(mask_of(slice(10, 11), slice(0, 40)), 0).size == (40, 20)
    assert surroundings(mask_of(slice(0, 0), slice(0, 0)), 5) is None


def test_latent_masks():
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 8:16, 16:32] = 1
    expected = torch.zeros(1, 1, 4, 6)
    expected[..., 1, 2:4] = 1
    assert torch.equal(latent_mask(mask, 8), expected)
    both = expected.repeat_interleave(8, 2).repeat_interleave(8, 3)
    both[..., 29:31, :] = 1  # a scratch far from the rest
    assert torch.equal(latent_mask(both, 8)[..., :3, :], expected[..., :3, :]) and latent_mask(both, 8)[..., 3, :].all()
    thin = torch.zeros(1, 1, 32, 48)
    thin[..., 9:11, :] = 1  # between the pixels that count
    assert torch.equal(latent_mask(thin, 8)[0, 0, :, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert latent_mask(torch.zeros(1, 1, 16, 16), 8).sum() == 0


def test_holes_are_filled_with_the_colours_around_them():
    image = torch.zeros(1, 3, 33, 47)
    image[..., :24] = 0.5
    mask = torch.zeros(1, 1, 33, 47)
    mask[..., 8:20, 4:40] = 1
    inside = mask.bool().expand_as(image)
    hidden = torch.where(inside, torch.full_like(image, 9.0), image)
    filled = fill(hidden, mask)
    assert torch.equal(filled[~inside], image[~inside])
    assert filled[inside].min() > -0.01 and filled[inside].max() < 0.51
    assert (filled[0, 0, 14, 5] - 0.5).abs() < 0.05 and filled[0, 0, 14, 38].abs() < 0.05
    assert torch.equal(fill(hidden, torch.zeros_like(mask)), hidden)
    wide, gap = torch.full((1, 3, 16, 256), 0.8), torch.zeros(1, 1, 16, 256)
    gap[..., 64:192] = 1
    assert error(fill(wide * (1 - gap), gap), wide) < 1e-5
    assert fill(hidden, torch.ones_like(mask)).abs().max() == 0  # nothing is known: grey


def test_pasting_changes_nothing_outside_of_the_mask():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    mask = mask_of(slice(10, 20), slice(30, 40)).filter(ImageFilter.GaussianBlur(1))
    for region, size in ((Box(0, 0, 64, 48), (64, 48)), (Box(25, 5, 45, 25), (64, 64)), (Box(25, 5, 45, 25), (24, 24))):
        canvas = Canvas.of(image, mask, region, *size)
        assert canvas.pixels.shape == (1, 3, *size[::-1]) and canvas.hole.shape == (1, 1, *size[::-1])
        result = np.asarray(canvas.paste(Image.new("RGB", size, (1, 2, 3))))
        kept = np.asarray(mask) == 0
        assert (result[kept] == np.asarray(image)[kept]).all()
        assert result[15, 35].tolist() == [1, 2, 3]
        assert result.shape == (48, 64, 3)


def test_a_canvas_holds_the_part_in_its_place():
    image = Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 64, 3))
    canvas = Canvas.of(image, mask_of(slice(10, 20), slice(30, 40)), Box(25, 5, 45, 25), 24, 24)
    assert canvas.inside == Box(2, 2, 22, 22)
    assert np.array_equal(np.asarray(to_pil(canvas.pixels)[0].crop(canvas.inside)), np.asarray(image)[5:25, 25:45])
    assert canvas.hole[0, 0].nonzero().amin(0).tolist() == [7, 7] and canvas.hole.sum() == 100
    assert canvas.filled().shape == canvas.pixels.shape


def test_no_hole_is_too_small_for_its_canvas():
    image = Image.new("RGB", (2048, 1024))
    mask = mask_of(slice(501, 502), slice(1003, 1004), (2048, 1024))
    canvas = Canvas.of(image, mask, Box(0, 0, 2048, 1024), 128, 64)
    assert canvas.hole.sum() == 1 and canvas.hole[0, 0, 501 // 16, 1003 // 16] == 1
    enlarged = Canvas.of(
        image.crop((0, 0, 20, 20)), mask_of(slice(5, 6), slice(4, 5), (20, 20)), Box(0, 0, 20, 20), 80, 80
    )
    assert 16 <= enlarged.hole.sum() <= 36


@pytest.mark.parametrize(
    "box, aspect, expected",
    [
        (Box(40, 20, 50, 40), 1.0, (20, 20)),
        (Box(40, 20, 50, 40), 2.0, (40, 20)),
        (Box(0, 0, 50, 10), 1.0, (50, 48)),  # as far as there is image
        (Box(50, 40, 64, 48), 1.0, (14, 14)),
        (Box(0, 0, 64, 48), 3.0, (64, 48)),
    ],
)
def test_boxes_grow_within_the_image(box, aspect, expected):
    grown = widened(box, aspect, (64, 48))
    assert grown.size == expected
    assert grown.left <= box.left and grown.right >= box.right and grown.top <= box.top and grown.bottom >= box.bottom
    assert grown.left >= 0 and grown.top >= 0 and grown.right <= 64 and grown.bottom <= 48


def test_conditioning_is_mask_then_image():
    hidden = reference.normal("h", (2, 4, 3, 5))
    concat = mask_channels(torch.ones(1, 1, 3, 5), hidden)
    assert concat.shape == (2, 5, 3, 5) and concat[:, 0].eq(1).all() and torch.equal(concat[:, 1:], hidden)


def test_masks_of_labels():
    assert prepare_mask(Image.fromarray(np.eye(32, dtype=np.uint8)), (32, 32)).getextrema() == (0, 255)
