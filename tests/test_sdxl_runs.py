"""Runs of SDXL in small: base and refiner as one, against diffusers, and every task and setting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import TINY, TINY_XL, error, tiny_state
from conftest import loaded
from sdxl_common import (
    PROMPT,
    TINY_REFINER,
    TINY_XL_INPAINT,
    finish,
    guide_of,
    half_mask,
    model_of,
    params,
    photo,
    random_weights,
)
from torch import Tensor

from scripts import convert as convert_script
from sd import StableDiffusion
from sd.checkpoints.convert import convert
from sd.conditioning import Composition, Conditioning
from sd.config import SDXL, SDXL_REFINER, TinyVAEConfig
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage
from sd.refiner import check_fit
from sd.size_conditioning import size_embedding


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))


@pytest.fixture(scope="module")
def refiner_states() -> dict[str, dict[str, Tensor]]:
    return random_weights(TINY_REFINER)


@pytest.fixture(scope="module")
def refiner(refiner_states) -> StableDiffusion:
    return model_of(refiner_states, TINY_REFINER)


def timesteps(model: StableDiffusion, monkeypatch) -> list[float]:
    """A list to which every call of the model's U-Net adds its timestep."""
    found: list[float] = []
    predict = model.predict

    def looking(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        found.append(float(t[0]))
        return predict(x, t, conditioning)

    monkeypatch.setattr(model, "predict", looking)
    return found


# ------------------------------------------------------------------------------------------------ base and refiner


@pytest.mark.parametrize(
    ("settings", "counts", "note"),
    [
        ({}, (8, 2), ""),
        ({"steps": 4}, (3, 1), ""),
        ({"steps": 3, "refiner_from": 0.7}, (2, 1), ""),
        ({"refiner_from": 0.7}, (7, 3), ""),  # 0.7 * 10 is 7 also in floating point
        ({"refiner_from": 0}, (0, 10), "the refiner takes all 10 steps"),
        ({"refiner_from": 1}, (10, 0), "leaves no steps to the refiner"),
        ({"strength": 0.5}, (3, 2), ""),  # of the whole grid: the refiner sees the same noise levels
        ({"strength": 0.2}, (0, 2), "the refiner takes all 2 steps"),
    ],
)
def test_the_refiner_takes_the_last_steps(settings, counts, note, base, refiner, monkeypatch):
    first, last = timesteps(base, monkeypatch), timesteps(refiner, monkeypatch)
    settings = dict(settings)
    strength = settings.pop("strength", None)
    request = TextToImage(PROMPT, params(**settings))
    if strength is not None:
        request = ImageToImage(PROMPT, params(**settings), image=photo(), strength=strength)
    run = base.prepare(request, refiner)
    finish(run)
    assert (len(first), len(last)) == counts
    assert first + last == [level.t for level in run.levels[:-1]]
    assert note in " ".join(run.notes) if note else run.notes == []


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc", "lms", "euler_a", "dpmpp_2m_sde", "dpmpp_sde", "heun"])
def test_a_run_that_its_own_model_refines_is_the_same_run(sampler, base):
    """History and random numbers go on at the switch."""
    request = TextToImage(PROMPT, params(sampler=sampler, steps=6, n=2))
    alone, refined = (finish(base.prepare(request, model)) for model in (None, base))
    assert torch.equal(alone, refined)


TASKS = {
    "img2img": lambda p: ImageToImage(PROMPT, p, image=photo(), strength=0.7),
    "inpaint": lambda p: Inpaint(PROMPT, p, image=photo(), mask=half_mask(), strength=0.9),
    "hires": lambda p: HighRes(PROMPT, p, hires=1.5),
    "exact": lambda p: TextToImage([PROMPT, "a house"], replace(p, exact=True, n=2)),
    "tileable": lambda p: TextToImage(PROMPT, replace(p, tileable=True)),
    "guidance until": lambda p: TextToImage(PROMPT, replace(p, guidance_until=0.5)),
    "editing": lambda p: TextToImage("a [cat:dog:0.5] AND a tree", p, web_ui_prompts=True),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_refined(task, base, refiner):
    request = TASKS[task](params(steps=5))
    alone, same = base.prepare(request), base.prepare(request, base)
    assert torch.equal(finish(alone), finish(same))
    refined = base.prepare(request, refiner)
    assert error(finish(refined), alone.x) > 1e-3
    images = refined.result().images
    assert len(images) == len(refined.seeds) and images[0].size == ((96, 96) if task == "hires" else (64, 64))
    if task == "inpaint":
        known = (32, 0, 64, 64)
        assert images[0].crop(known).tobytes() == photo().crop(known).tobytes()


def test_a_switch_below_what_the_refiner_was_trained_on_is_said(base, refiner):
    """The fraction in the note gives it those timesteps."""
    settings = {"sampler": "dpmpp_2m", "spacing": "karras", "steps": 20}
    (note,) = base.prepare(TextToImage(PROMPT, params(**settings, refiner_from=0.8)), refiner).notes
    assert "only timesteps up to 15; it was trained on all below 200, for which refiner_from is 0.6" in note
    run = base.prepare(TextToImage(PROMPT, params(**settings, refiner_from=0.6)), refiner)
    assert run.notes == [] and run.levels[11].t >= 200 > run.levels[12].t
    assert base.prepare(TextToImage(PROMPT, params(**settings, refiner_from=0.8)), base).notes == []  # trained on all


def test_by_default_the_refiner_takes_what_it_was_trained_on(base, refiner, monkeypatch):
    """On the grid of Karras as well; the fraction is put into the parameters, and gives the same run."""
    first, last = timesteps(base, monkeypatch), timesteps(refiner, monkeypatch)
    settings = {"sampler": "dpmpp_2m", "spacing": "karras", "steps": 25}
    run = base.prepare(TextToImage(PROMPT, params(**settings)), refiner)
    assert run.notes == [] and run.params.refiner_from == 16 / 25
    x = finish(run)
    assert (len(first), len(last)) == (16, 9) and first[-1] >= 200 > last[0]
    again = base.prepare(TextToImage(PROMPT, params(**settings, refiner_from=run.params.refiner_from)), refiner)
    assert torch.equal(finish(again), x)
    assert base.prepare(TextToImage(PROMPT, params(**settings)), base).params.refiner_from == 0.8  # another model


def test_the_base_begins_where_there_is_noise_alone(base, refiner):
    """Unless the refiner is asked to, which is said to be none of its tasks."""
    run = base.prepare(TextToImage(PROMPT, params(steps=1, refiner_from=0.8)), refiner)
    assert run.notes == ["refiner_from 0.8 of 1 step leaves no steps to the refiner"]
    run = base.prepare(TextToImage(PROMPT, params(steps=3, refiner_from=0.3)), refiner)
    assert "all" not in " ".join(run.notes) and "low noise only" not in " ".join(run.notes)
    run = base.prepare(TextToImage(PROMPT, params(steps=3, refiner_from=0)), refiner)
    assert "tiny sdxl refiner was trained on low noise only" in run.notes[0]
    later = ImageToImage(PROMPT, params(refiner_from=0), image=photo(), strength=0.5)
    assert base.prepare(later, refiner).notes == ["the refiner takes all 5 steps"]


def test_what_is_no_refiner_is_said_before_anything_is_encoded(base, refiner, monkeypatch):
    monkeypatch.setattr(base, "_encode", None)
    with pytest.raises(ValueError, match=r"refiner must be a model, .* got 'refiner.safetensors'"):
        base.txt2img("a cat", refiner="refiner.safetensors")
    monkeypatch.setitem(refiner.__dict__, "device", torch.device("meta"))
    with pytest.raises(ValueError, match="the refiner is on meta, the model on cpu"):
        base.prepare(TextToImage("a cat"), refiner)


def test_a_tiny_vae_has_the_latents_of_the_unet():
    """Of a base with a tiny VAE, whose scale says nothing of its U-Net."""
    tiny = TinyVAEConfig()
    assert tiny.factor == SDXL.vae.factor and tiny.scale != SDXL.vae.scale
    check_fit(replace(SDXL, vae=tiny), SDXL_REFINER)
    check_fit(SDXL, replace(SDXL_REFINER, vae=tiny))


def test_in_high_resolution_the_second_pass_is_refined(base, refiner, monkeypatch):
    first, last = timesteps(base, monkeypatch), timesteps(refiner, monkeypatch)
    finish(base.prepare(HighRes(PROMPT, params(), hires=1.5, hires_strength=0.5), refiner))
    assert (len(first), len(last)) == (10 + 3, 2)


def test_each_model_is_told_its_own_sizes(base, refiner, monkeypatch):
    seen: list[Tensor] = []
    predict = refiner.predict
    monkeypatch.setattr(refiner, "predict", lambda x, t, cond: seen.append(cond.vector) or predict(x, t, cond))
    settings = params(original_height=300, crop_left=7, aesthetic_score=7, negative_aesthetic_score=1.5, target_width=9)
    run = base.prepare(TextToImage(PROMPT, settings), refiner)
    finish(run)
    assert run.notes == []  # each number is told to one of the two
    sizes = torch.tensor([[300, 64, 0, 7, 64, 9.0]])
    assert torch.equal(run.guides[0].cond.vector[:, 96:], size_embedding(sizes))
    scores = torch.tensor([[300, 64, 0, 7, 1.5], [300, 64, 0, 7, 7.0]])  # [uncond, cond]
    assert torch.equal(seen[0][:, 96:], size_embedding(scores))


@pytest.mark.parametrize(
    ("config", "other", "message"),
    [
        (TINY, TINY_REFINER, "the model is tiny v1"),
        (TINY_XL, TINY, "the refiner is tiny v1"),
        (TINY_XL, TINY_XL_INPAINT, "needs a mask in every step: use one with 4 input channels"),
        (TINY_XL, replace(TINY_REFINER, vae=replace(TINY_XL.vae, scale=0.18215)), "scale of its latents is 0.18215"),
        (
            TINY_XL, replace(TINY_REFINER, vae=replace(TINY_XL.vae, channels=(64, 64, 128))),
            "the reduction of its latents is 4",
        ),
        (
            TINY_XL, replace(TINY_REFINER, schedule=replace(SDXL.schedule, prediction="v", zero_snr=True)),
            "another noise schedule",
        ),
    ],
)  # fmt: skip
def test_a_refiner_that_does_not_fit_is_refused(config, other, message):
    check_fit(SDXL, SDXL_REFINER)
    check_fit(SDXL, SDXL)
    with pytest.raises(ValueError, match=message):
        check_fit(config, other)


def test_a_refiner_as_base(refiner):
    """Image to image is what it is for; of noise alone it makes something, with a note."""
    run = refiner.prepare(TextToImage(PROMPT, params(steps=2)))
    assert ["trained on low noise only" in note for note in run.notes] == [True]
    assert torch.isfinite(finish(run)).all()
    run = refiner.prepare(ImageToImage(PROMPT, params(steps=5), image=photo(), strength=0.3))
    assert run.notes == [] and torch.isfinite(finish(run)).all()
    assert run.guides[0].uncond.context.any()  # its empty negative prompt is no zeros


# --------------------------------------------------------------------------------------------------- as diffusers


@pytest.fixture(scope="module")
def pipes(refiner_states, tmp_path_factory):
    """diffusers' pipelines of the base and of the refiner, from folders written here."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("folders")
    base = convert(tiny_state("tiny-sdxl"), TINY_XL)
    for name, states, config in (("base", base, TINY_XL), ("refiner", refiner_states, TINY_REFINER)):
        (folder / name).mkdir()
        convert_script.save("diffusers", folder / name, states, config, {})
    made = (
        diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "base", add_watermarker=False),
        diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(folder / "refiner", add_watermarker=False),
    )
    return [as_ours(pipe) for pipe in made]


def as_ours(pipe):
    """With the last steps of our grid "trailing", which end at clean latents."""
    import diffusers

    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.scheduler.register_to_config(set_alpha_to_one=True)
    pipe.scheduler.final_alpha_cumprod = torch.tensor(1.0)
    return pipe


THEIRS = {"height": 64, "width": 64, "num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "latent"}


@pytest.mark.parametrize("fraction", [0.8, 0.5])
def test_base_and_refiner_as_diffusers(fraction, base, refiner, pipes):
    first, second = pipes
    request = TextToImage(PROMPT, params(refiner_from=fraction), negative="blurry")
    run = base.prepare(request, refiner)
    noise = run.start.x.clone()
    finish(run)
    more = THEIRS | {"prompt": PROMPT, "negative_prompt": "blurry"}
    latents = first(latents=noise, denoising_end=fraction, **more).images
    del more["height"], more["width"]
    latents = second(image=latents, denoising_start=fraction, **more).images
    assert error(run.x, latents) < 1e-4


def test_image_to_image_as_diffusers(base, refiner, refiner_states, pipes):
    """The last six of ten steps, from the same noised latents, by the base and by the refiner alone."""
    import diffusers

    first, second = pipes
    first = as_ours(diffusers.StableDiffusionXLImg2ImgPipeline(**first.components, add_watermarker=False))
    more = {name: value for name, value in THEIRS.items() if name not in ("height", "width")}
    for model, pipe in ((base, first), (refiner, second)):
        settings = params(aesthetic_score=7.0, negative_aesthetic_score=2.0)
        run = model.prepare(ImageToImage(PROMPT, settings, image=photo(), strength=0.6, negative="blurry"))
        noised = run.start.x.clone()
        finish(run)
        latents = pipe(
            PROMPT, negative_prompt="blurry", image=noised, denoising_start=0.4, aesthetic_score=7.0,
            negative_aesthetic_score=2.0, **more,
        ).images  # fmt: skip
        assert error(run.x, latents) < 1e-4


def test_inpainting_of_nine_channels_as_diffusers(pipes, refiner):
    import diffusers

    states = {name: dict(weights) for name, weights in convert(tiny_state("tiny-sdxl"), TINY_XL).items()}
    first = states["unet"]["conv_in.weight"]
    more = torch.randn(64, 5, 3, 3, generator=torch.Generator().manual_seed(8)) * 0.1
    states["unet"]["conv_in.weight"] = torch.cat([first, more], dim=1)
    model = model_of(states, TINY_XL_INPAINT)
    parts = dict(pipes[0].components)
    unet = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
    weights = parts["unet"].state_dict() | {"conv_in.weight": states["unet"]["conv_in.weight"]}
    unet.load_state_dict(weights)
    pipe = as_ours(diffusers.StableDiffusionXLInpaintPipeline(**(parts | {"unet": unet}), add_watermarker=False))
    scale = TINY_XL.vae.scale
    pipe._encode_vae_image = lambda image, generator: pipe.vae.encode(image).latent_dist.mode() * scale
    run = model.prepare(Inpaint(PROMPT, params(), image=photo(), mask=half_mask(), posterior="mode", negative="blurry"))
    noise = run.start.x.clone()
    finish(run)
    latents = pipe(
        PROMPT, negative_prompt="blurry", image=photo(), mask_image=half_mask(), strength=1.0, latents=noise, **THEIRS
    ).images
    assert error(run.x, latents) < 1e-4
    known = (32, 0, 64, 64)
    assert run.result().images[0].crop(known).tobytes() == photo().crop(known).tobytes()
    # a refiner of four channels continues it, and what is known is pasted
    refined = model.prepare(Inpaint(PROMPT, params(), image=photo(), mask=half_mask()), refiner)
    image = refined.result().images[0]
    assert refined.notes == [] and image.crop(known).tobytes() == photo().crop(known).tobytes()


def test_second_prompts_as_diffusers(base, pipes):
    texts = {"prompt_2": "a watercolour", "negative_prompt": "blurry", "negative_prompt_2": "red"}
    theirs = pipes[0].encode_prompt(PROMPT, device="cpu", **texts)
    guide = guide_of(base, TextToImage(PROMPT, params(), "blurry", prompt_2="a watercolour", negative_2="red"))
    for cond, context, pooled in zip((guide.cond, guide.uncond), theirs[:2], theirs[2:], strict=True):
        assert error(cond.context, context) < 1e-5
        assert error(cond.vector[:, :96], pooled) < 1e-5


# -------------------------------------------------------------------------------------------- settings of every run


def test_images_of_a_batch_are_those_alone(base):
    batch = finish(base.prepare(TextToImage("a cat", params(n=3, steps=4, exact=True))))
    for i in range(3):
        alone = finish(base.prepare(TextToImage("a cat", params(seed=3 + i, steps=4, exact=True))))
        assert torch.equal(batch[i : i + 1], alone)


def test_prompts_joined_by_and(base):
    """Two halves of one prompt are that prompt; the parts have vectors of their own."""
    one = finish(base.prepare(TextToImage("a cat", params(), web_ui_prompts=True)))
    run = base.prepare(TextToImage("a cat :0.5 AND a cat :0.5", params(), web_ui_prompts=True))
    assert error(finish(run), one) < 1e-4
    both = guide_of(base, TextToImage("a cat AND a dog", params(), web_ui_prompts=True))
    assert isinstance(both.cond, Composition) and not both.uncond.context.any()
    for part, text in zip(both.cond.parts, ("a cat", "a dog"), strict=True):
        assert torch.equal(part.vector, guide_of(base, TextToImage(text, params())).cond.vector)


def test_prompts_that_change(base):
    run = base.prepare(TextToImage("a [cat:dog:0.5]", params(), web_ui_prompts=True))
    for guide, text in ((run.guides[5], "a cat"), (run.guides[6], "a dog")):
        wanted = guide_of(base, TextToImage(text, params())).cond
        assert torch.equal(guide.cond.vector, wanted.vector) and error(guide.cond.context, wanted.context) < 1e-6
    assert torch.isfinite(finish(run)).all()


def test_weights_and_long_prompts(base):
    """Weights change the context and not the pooled text, which is that of the first chunk."""
    plain, weighted = (
        guide_of(base, TextToImage(text, params(), web_ui_prompts=True)).cond
        for text in ("a red cat", "a (red:1.4) cat")
    )
    assert torch.equal(plain.vector, weighted.vector) and error(weighted.context, plain.context) > 1e-3
    long = guide_of(base, TextToImage("a cat BREAK a dog", params(), web_ui_prompts=True))
    assert long.cond.context.shape == long.uncond.context.shape == (1, 2 * 77, 160)
    first, second = (guide_of(base, TextToImage(text, params())).cond for text in ("a cat", "a dog"))
    assert error(long.cond.context, torch.cat([first.context, second.context], dim=1)) < 1e-6
    assert torch.equal(long.cond.vector, first.vector) and not long.uncond.context.any()
    assert torch.isfinite(finish(base.prepare(TextToImage("a cat, " * 60, params(), web_ui_prompts=True)))).all()


def test_an_empty_negative_prompt_is_not_encoded(base):
    """It is zeros; with one that is not empty beside it, and one that becomes empty, only those are."""
    heard = []
    encoders = (base.text_encoder, base.text_encoder_2)
    hooks = [
        encoder.register_forward_hook(lambda module, args, out: heard.append(len(args[0]))) for encoder in encoders
    ]
    for request, counts in (
        (TextToImage("a cat", params()), [1, 1]),
        (TextToImage("a cat", params(), " ", web_ui_prompts=True), [1, 1]),
        (TextToImage(["a cat", "a dog"], params(exact=True), ["", ""]), [1, 1, 1, 1]),
        (TextToImage(["a cat", "a dog"], params(), ["", "fog"]), [2, 2, 2, 2]),
        (TextToImage("a [cat:dog:0.5]", params(), "[fog::0.5]", web_ui_prompts=True), [1] * 6),
        (TextToImage("a cat", params(), "", negative_2="fog"), [1] * 4),
    ):
        heard.clear()
        guides = base.prepare(request).guides
        assert heard == counts
        unconds = [guides[0].uncond, guides[-1].uncond]
        assert [bool(uncond.context[0].any()) for uncond in unconds] == {
            "[fog::0.5]": [True, False], "": [request.negative_2 is not None] * 2,
        }.get(request.negative, [False, False])  # fmt: skip
        assert unconds[-1].context.shape[1:] == (77, 160) and unconds[-1].vector[0, 96:].any()
    for hook in hooks:
        hook.remove()


def test_cached_features(base, refiner):
    """The first evaluation is whole, the second reuses it; both models of a run have their own cache."""
    whole, cached = (list(base.prepare(TextToImage("a cat", params(cache_interval=k)))) for k in (1, 2))
    assert torch.equal(whole[0].x0, cached[0].x0) and error(cached[1].x0, whole[1].x0) > 1e-6
    assert error(cached[-1].x, whole[-1].x) < 0.5
    deep = []  # whose lowest blocks run: they are what is reused
    hooks = [
        model.unet.mid.register_forward_hook(lambda *_, name=name: deep.append(name))
        for model, name in ((base, "base"), (refiner, "refiner"))
    ]
    # the base takes three steps; after the third, it would reuse its features
    finish(base.prepare(TextToImage("a cat", params(cache_interval=2, steps=5, refiner_from=0.6)), refiner))
    for hook in hooks:
        hook.remove()
    assert deep == ["base", "base", "refiner"]


def test_tiles(base):
    """A denoiser of a run that is to be tileable does not know where the edges are."""
    run = base.prepare(TextToImage("a cat", params(tileable=True)))
    x, level = run.start.x, run.levels[3]
    shifted = run.start.denoise(torch.roll(x, (4, 8), (2, 3)), level)
    assert error(shifted, torch.roll(run.start.denoise(x, level), (4, 8), (2, 3))) < 1e-5
    flat = base.prepare(TextToImage("a cat", params())).start.denoise
    assert error(flat(torch.roll(x, (4, 8), (2, 3)), level), torch.roll(flat(x, level), (4, 8), (2, 3))) > 1e-3


def test_high_resolution(base):
    run = base.prepare(HighRes("a cat", params(steps=4), hires=1.5, hires_upscaler="latent"))
    assert torch.isfinite(finish(run)).all() and run.result().images[0].size == (96, 96)
    larger = size_embedding(torch.tensor([[96.0, 96, 0, 0, 96, 96]]))
    assert torch.equal(run.second.guides[0].cond.vector[:, 96:], larger)


def test_inpainting_of_four_channels_keeps_what_is_known(base):
    for strength in (1.0, 0.6):
        run = base.prepare(Inpaint("a cat", params(), image=photo(), mask=half_mask(), strength=strength))
        images = run.result().images
        assert images[0].crop((32, 0, 64, 64)).tobytes() == photo().crop((32, 0, 64, 64)).tobytes()
        assert images[0].crop((0, 0, 32, 64)).tobytes() != photo().crop((0, 0, 32, 64)).tobytes()
