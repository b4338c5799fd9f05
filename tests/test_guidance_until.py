"""Guidance in the first steps only: which steps have it, what they cost, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sd.params import HighRes, ImageToImage, Inpaint, TextToImage, from_dict

SIZE = {"height": 64, "width": 64, "seed": 3}
PHOTO = Image.effect_noise((64, 64), 60).convert("RGB")
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))


@pytest.fixture
def batches(monkeypatch):
    """Runs a request; gives the rows of each call of the network, and the result."""

    def run(model, request):
        seen, unet = [], model.unet.forward
        with monkeypatch.context() as patch:
            patch.setattr(model.unet, "forward", lambda x, *more: seen.append(len(x)) or unet(x, *more))
            result = model.prepare(request).result()
        return seen, result

    return run


def latents(model, **settings) -> torch.Tensor:
    run = model.prepare(TextToImage.of("a red cube", "a tree", **SIZE | settings))
    for _ in run:
        pass
    return run.x


@pytest.mark.parametrize(
    ("until", "steps", "guided"),
    [(1, 5, 5), (0.6, 5, 3), (0.59, 5, 2), (0.7, 10, 7), (0.2, 5, 1), (0.5, 1, 0), (0, 5, 0)],
)
def test_steps_with_guidance_come_first_and_are_rounded_down(tiny_sd, batches, until, steps, guided):
    request = TextToImage.of("a", "b", guidance_until=until, steps=steps, sampler="euler", n=2, **SIZE)
    assert batches(tiny_sd, request)[0] == [4] * guided + [2] * (steps - guided)


def test_shares_that_floats_cannot_hold(tiny_sd):
    """0.58 * 50 is 28.999999999999996."""
    run = tiny_sd.prepare(TextToImage.of("a", guidance_until=0.58, steps=50, sampler="euler", **SIZE))
    assert run._guided() == 29


def test_all_steps_or_none_are_the_runs_that_there_were(tiny_sd):
    """To the bit: with guidance, and without."""
    for more in ({"sampler": "heun", "steps": 2}, {"sampler": "dpmpp_2m", "steps": 3, "guidance_rescale": 0.7}):
        plain, cut = latents(tiny_sd, **more), latents(tiny_sd, guidance_until=0.5, **more)
        assert torch.equal(latents(tiny_sd, guidance_until=1.0, **more), plain)
        none = latents(tiny_sd, guidance_until=0.0, **more)
        assert torch.equal(none, latents(tiny_sd, guidance=1.0, **more))
        assert not cut.equal(plain) and not cut.equal(none)


def test_no_guidance_needs_no_negative_prompt(tiny_sd):
    """Nor is the context padded to the length of one."""
    long = "a tree and a house " * 40
    none, one = (
        tiny_sd.prepare(TextToImage.of("a", long, web_ui_prompts=True, steps=2, **SIZE, **settings))
        for settings in ({"guidance_until": 0}, {"guidance": 1})
    )
    assert none.guides[0].uncond is None and none.guides[0].cond.context.equal(one.guides[0].cond.context)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_a", "dpmpp_sde", "plms"])
def test_the_noise_level_decides_where_a_sampler_evaluates_twice(tiny_sd, sampler):
    """A step of guidance ends where the next begins, also for the evaluations inside of and after a step."""
    run = tiny_sd.prepare(TextToImage.of("a", "b", guidance_until=0.5, steps=4, sampler=sampler, **SIZE))
    (guide,) = {id(guide): guide for guide in run.guides}.values()
    denoise, seen = run.start.denoise, []
    each = [tiny_sd.denoiser(guide.cond, guide.uncond, guidance) for guidance in (7.5, 1.0)]

    def looking(x, level):
        out = denoise(x, level)
        seen.append(level.ratio)
        assert torch.equal(out, each[level.ratio <= run.levels[2].ratio](x, level))
        return out

    for _ in run.begin(run.start._replace(denoise=looking)):
        pass
    assert len(seen) > 4 and min(seen) <= run.levels[2].ratio < max(seen)


def test_image_to_image_counts_the_steps_that_it_takes(tiny_sd, batches):
    settings = {"guidance_until": 0.6, "steps": 10, "sampler": "euler", **SIZE}
    assert batches(tiny_sd, ImageToImage.of("a", image=PHOTO, strength=0.5, **settings))[0] == [2, 2, 2, 1, 1]
    seen, result = batches(tiny_sd, ImageToImage.of("a", image=PHOTO, strength=0.1, **settings))
    assert seen == [1]
    assert result.notes == ["guidance_until 0.6 of 1 step is less than one: none is guided"]
    assert batches(tiny_sd, ImageToImage.of("a", image=PHOTO, strength=0, **settings))[0] == []


def test_each_pass_of_high_resolution_counts_its_own_steps(tiny_sd, batches):
    request = HighRes.of("a", hires=1.25, hires_steps=2, guidance_until=0.5, steps=4, sampler="euler", **SIZE)
    assert batches(tiny_sd, request)[0] == [2, 2, 1, 1, 2, 1]


def test_inpainting_with_either_model(tiny_sd, tiny_inpaint, batches):
    for model in (tiny_sd, tiny_inpaint):
        request = Inpaint.of("a", image=PHOTO, mask=MASK, guidance_until=0.5, steps=2, sampler="euler", **SIZE)
        assert batches(model, request)[0] == [2, 1]


def test_exact_batches_are_images_alone(tiny_sd, batches):
    settings = {"guidance_until": 0.5, "steps": 2, "sampler": "euler_a", **SIZE}
    seen, result = batches(tiny_sd, TextToImage.of("a", n=2, exact=True, **settings))
    assert seen == [2, 2, 1, 1]
    for i, image in enumerate(result.images):
        (alone,) = tiny_sd.txt2img("a", **settings | {"seed": 3 + i})
        assert alone.tobytes() == image.tobytes()


def test_prompts_that_change_keep_their_steps(tiny_sd, batches):
    settings = {"web_ui_prompts": True, "steps": 4, "sampler": "euler", **SIZE}
    run = tiny_sd.prepare(TextToImage.of("[a:b:1]", guidance_until=0.75, **settings))
    assert run.guides[0] is run.guides[1] is not run.guides[2] is run.guides[3]
    for guide, guidance, level in zip(run.guides, (7.5, 7.5, 7.5, 1.0), run.levels, strict=False):
        wanted = tiny_sd.denoiser(guide.cond, guide.uncond, guidance)(run.x, level)
        assert torch.equal(run.start.denoise(run.x, level), wanted)
    assert batches(tiny_sd, run.request)[0] == [2, 2, 2, 1]


def test_prompts_joined_by_and_are_as_at_guidance_1(tiny_sd, batches):
    """They need the prediction without a prompt in any case; a note says that no time is saved."""
    settings = {"web_ui_prompts": True, "steps": 2, "sampler": "euler", **SIZE}
    seen, result = batches(tiny_sd, TextToImage.of("a AND b :0.5", guidance_until=0.5, **settings))
    assert seen == [3, 3] and "guidance_until saves no time" in result.notes[0]
    none, one = (
        batches(tiny_sd, TextToImage.of("a AND b :0.5", **more, **settings))[1].images[0].tobytes()
        for more in ({"guidance_until": 0}, {"guidance": 1})
    )
    assert none == one != result.images[0].tobytes()


def test_what_may_surprise_is_noted(tiny_sd):
    def notes(**settings):
        return tiny_sd.prepare(TextToImage.of("a", steps=4, **SIZE, **settings)).notes

    assert notes(guidance_until=0.5) == notes(guidance_until=0) == notes() == []
    assert notes(guidance_until=0.5, guidance=1) == ["guidance_until has no effect at guidance 1"]
    assert notes(guidance_until=0.2) == ["guidance_until 0.2 of 4 steps is less than one: none is guided"]


def test_requests_keep_it_and_refuse_what_is_no_share():
    request = TextToImage.of("a", guidance_until=0.1 + 0.2)
    assert from_dict(request.to_dict()) == request and request.params.guidance_until == 0.1 + 0.2
    for value, message in ((1.5, r"must be in \[0, 1\], got 1.5"), (-0.1, r"must be in \[0, 1\]"), ("x", "a number")):
        with pytest.raises(ValueError, match=f"^guidance_until must be .*{message}" if value == "x" else message):
            TextToImage.of("a", guidance_until=value)
    with pytest.raises(TypeError, match="did you mean 'guidance_until'"):
        TextToImage.of("a", cfg_end=0.5)
