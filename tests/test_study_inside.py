"""A run seen from inside: the maps are those that study/attention.py records, and the run stays the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from sdxl_common import tiny_xl

from sd import StableDiffusion
from sd.params import HighRes, ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.study.attention import recording
from sd.study.guidance import predictions
from sd.study.inside import look, watched
from sd.study.prompt_words import PromptWords, words_of
from sd.study.text import words
from sd.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.load()


def request(prompt="a red triceratops, a house", **settings):
    return TextToImage.of(prompt, **{"steps": 3, "seed": 1, **settings})


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.unet.modules())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("settings", [{}, {"guidance": 1}, {"sampler": "heun"}, {"height": 128, "width": 192}], ids=str)
def test_maps_are_those_of_the_study(model, settings):
    wanted = request(**settings)
    with recording(model.unet) as maps:
        model.prepare(wanted).result()
    seen, watch = look(model, wanted)
    known = words(model.tokenizer, wanted.prompt[0])
    assert [word.text for word in watch.words.words] == [word.text for word in known]
    mean, special = watch.mean()
    each = [2, 2, 1] if "sampler" in settings else [1, 1, 1]  # evaluations; Heun's last step is one of Euler
    assert maps.calls == sum(each)
    for i, word in enumerate(known):
        assert torch.allclose(mean[i], maps.mean()[word.positions].sum(0), atol=1e-6)
        for step in seen:
            first = sum(each[: step.step])
            own = range(first, first + each[step.step])
            assert torch.allclose(step.maps[i], maps.mean(calls=own)[word.positions].sum(0), atol=1e-6)
    assert torch.allclose(special[0], maps.mean()[0], atol=1e-6)  # the start
    for step in seen:  # attention is shared out among all positions
        assert torch.allclose(step.maps.sum(0) + step.special.sum(0), torch.ones(mean.shape[1:]), atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["SD 1", "SDXL"])
def test_other_models(tiny_sd, name):
    """Attention at several levels, odd sides, two text encoders, several blocks one after another."""
    other = tiny_sd if name == "SD 1" else tiny_xl()
    wanted = TextToImage.of("a red house", steps=2, seed=1, height=72, width=104)
    with recording(other.unet) as maps:
        expected = other.prepare(wanted).result().images[0]
    with watched(other) as watch:
        run = watch.model.prepare(wanted)
        watch.begin(run)
        seen = [watch.see(step) for step in run]
    assert run.result().images[0].tobytes() == expected.tobytes()
    assert torch.allclose(watch.mean()[0], maps.mean()[1:4], atol=1e-6) and len({site.level for site in maps.sites}) > 1
    assert seen[0].guidance.shape == watch.mean()[0].shape[1:] == (9, 13)


def test_guidance_is_that_of_the_study(model):
    params = SamplingParams(steps=4, seed=1, sampler="ddim", spacing="trailing")
    seen, _ = look(model, request("a red house", sampler="ddim", spacing="trailing", steps=4))
    for expected, step in zip(predictions(model, "a red house", params), seen, strict=True):
        assert step.level == expected.level
        assert torch.allclose(step.guidance, (expected.cond - expected.uncond)[0].norm(dim=0), rtol=0.05, atol=0.02)
    unguided, _ = look(model, request(guidance=1))
    assert all(step.guidance is None for step in unguided)
    late, _ = look(model, request(steps=4, guidance_until=0.5))
    assert [step.guidance is not None for step in late] == [True, True, False, False]


def test_states_are_those_of_the_run(model):
    wanted = request(sampler="ddim")
    run = model.prepare(wanted)
    before = [run.x.clone()]
    predicted = []
    for step in run:
        before.append(step.x.clone())
        predicted.append(step.x0.clone())
    for step, x, x0 in zip(look(model, wanted)[0], before, predicted, strict=False):
        assert torch.equal(step.x0, x0) and torch.equal(step.x, x.to(model.dtype).float())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["AND", "hires", "exact", "inpaint", "img2img", "txt2img", "cache"])
def test_images_stay_the_same_and_hooks_go(model, kind):
    image, mask = Image.new("RGB", (128, 128), "orange"), Image.linear_gradient("L").resize((128, 128))
    own = {"steps": 4, "seed": 3}
    wanted = {
        "txt2img": request(sampler="euler_a"),
        "hires": HighRes.of("a red house", **own, hires=1.5),
        "img2img": ImageToImage.of("a red house", **own, image=image),
        "inpaint": Inpaint.of("a red house", **own, image=image, mask=mask),
        "cache": request(cache_interval=2),
        "exact": request(exact=True),
        "AND": request("a red house AND a blue ball :0.5", web_ui_prompts=True),
    }[kind]
    expected = model.prepare(wanted).result().images[0]
    with watched(model) as watch:
        run = watch.model.prepare(wanted)
        watch.begin(run)
        seen = [watch.see(step) for step in run]
    assert run.result().images[0].tobytes() == expected.tobytes()
    assert hooks(model) == 0 and "predict" not in vars(model)
    assert [step.step for step in seen] == list(range(len(run)))
    assert all(step.maps is not None for step in (seen if kind != "cache" else seen[::2]))
    mean, special = watch.mean()
    assert mean.shape[0] == len(watch.words.words) and float(mean.min()) >= 0 and special.shape[0] == 3


def test_hooks_go_when_a_run_fails(model):
    with pytest.raises(RuntimeError), watched(model) as watch:
        watch.begin(watch.model.prepare(request()))
        raise RuntimeError
    assert hooks(model) == 0


def test_words_of_prompts_that_change(model):
    run = model.prepare(request("a red [house:tree:1] AND (blue:1.3) sky :0.5", steps=4, web_ui_prompts=True))
    found = PromptWords(run)
    texts = {(word.text, word.part) for word in found.words}
    assert texts == {("a", 0), ("red", 0), ("house", 0), ("tree", 0), ("blue", 1), ("sky", 1)}
    assert found.weights == (1.0, 0.5)
    names = [[found.words[i].text for i in found.present(step)] for step in range(4)]
    assert names[0] == names[1] == ["a", "red", "house", "blue", "sky"]
    assert names[2] == names[3] == ["a", "red", "tree", "blue", "sky"]
    for step in range(4):
        tables = found.groups(step, 77)
        assert len(tables) == 2 and all(torch.equal(table.sum(1), torch.ones(77)) for table in tables)
    run = model.prepare(HighRes.of("a [house:tree:2]", steps=3, web_ui_prompts=True, hires_steps=2))
    found = PromptWords(run)
    assert [found.words[i].text for i in found.present(0)] == ["a", "house"]
    assert [found.words[i].text for i in found.present(len(run) - 1)] == ["a", "tree"]


def test_words_beyond_the_first_chunk():
    tokenizer = Tokenizer()
    ids = tokenizer.encode("fog " * 75)
    assert words_of(tokenizer, [ids, tokenizer.encode("red house")])[-1].positions == [77 + 2]
    tokenizer.add("<thing>", [49408, 49409])
    assert words_of(tokenizer, [tokenizer.encode("a <thing> here")])[1] == ("<thing>", [2, 3])
    cut = tokenizer.encode("fog " * 74 + "triceratops")[:75]  # plain prompts: what does not fit is cut
    assert words_of(tokenizer, [cut])[-1].positions == [75]


def test_words_need_one_prompt_and_one_image(model):
    with pytest.raises(ValueError, match="one image"):
        look(model, request(n=2))
    with pytest.raises(ValueError, match="one prompt"):
        PromptWords(model.prepare(TextToImage(("a", "b"), replace(request().params))))
