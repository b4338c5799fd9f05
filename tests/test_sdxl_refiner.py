"""Base and refiner as one run, in small: who takes which steps of which task, and models that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY, TINY_XL, error
from sdxl_common import (
    PROMPT,
    TINY_REFINER,
    TINY_XL_INPAINT,
    finish,
    half_mask,
    model_files,
    params,
    photo,
    tiny_refiner,
    tiny_xl,
)
from torch import Tensor

from sd import StableDiffusion
from sd.conditioning import Conditioning
from sd.config import SDXL, SDXL_REFINER, TinyVAEConfig
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage
from sd.refiner import check_fit
from sd.runtime.offload import Offload
from sd.size_conditioning import size_embedding


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return tiny_xl()


@pytest.fixture(scope="module")
def refiner() -> StableDiffusion:
    return tiny_refiner()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Base and refiner as files of our layout."""
    return model_files(tmp_path_factory.mktemp("models"))


def timesteps(model: StableDiffusion, monkeypatch) -> list[float]:
    """A list to which every call of the model's U-Net adds its timestep."""
    found: list[float] = []
    predict = model.predict

    def looking(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        found.append(float(t[0]))
        return predict(x, t, conditioning)

    monkeypatch.setattr(model, "predict", looking)
    return found


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


@pytest.mark.exhaustive
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc", "lms", "euler_a", "dpmpp_2m_sde", "dpmpp_sde", "heun"])
@pytest.mark.sampled(3)
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.sampled(3)
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


@pytest.mark.exhaustive
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


# ---------------------------------------------------------------------------------------------------------- low memory


def on_device(model: StableDiffusion) -> list[str]:
    """The networks of a model of low memory that have weights."""
    assert isinstance(model._networks, Offload)
    networks = model._networks._networks
    return [
        name for name, network in networks.items() if not any(p.is_meta or p.numel() == 0 for p in network.parameters())
    ]


@pytest.mark.exhaustive
def test_with_low_memory_the_models_take_turns(files):
    """One network of both has its weights, whichever is used; the image is the same."""
    options = {"device": "cpu", "dtype": "float32"}
    base, refiner = (StableDiffusion.load(files[name], low_memory=True, **options) for name in ("base", "refiner"))
    run = base.prepare(TextToImage("a cat", params(steps=5)), refiner)
    held = []
    for _ in run:
        held.append((on_device(base), on_device(refiner)))
    assert held == [(["unet"], [])] * 4 + [([], ["unet"])]
    images = run.result().images
    assert (on_device(base), on_device(refiner)) == (["vae"], [])
    whole, other = (StableDiffusion.load(files[name], **options) for name in ("base", "refiner"))
    wanted = whole.prepare(TextToImage("a cat", params(steps=5)), other).result().images
    assert np.abs(np.asarray(images[0]).astype(int) - np.asarray(wanted[0])).max() <= 1
