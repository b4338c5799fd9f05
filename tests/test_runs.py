"""Runs of requests on one model: in several threads, interrupted, with their notes; requests as JSON."""

from __future__ import annotations

import copy
import json
import random
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_lora import SCHEMES, lora_file, saved

import sd
from sd.config import SD1
from sd.params import ImageToImage, Inpaint, SamplingParams, TextToImage, from_dict
from sd.pipeline import StableDiffusion
from sd.samplers import SAMPLERS

PHOTO = Image.effect_noise((64, 64), 60).convert("RGB")
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))
MODES = ("plain", "low memory", "LoRA", "float16, VAE retried")


def params(**settings) -> SamplingParams:
    return SamplingParams(**{"steps": 3, "height": 64, "width": 64, "sampler": "euler_a", **settings})


def requests(n: int) -> list[TextToImage]:
    """Different tasks, prompts, seeds and samplers."""
    each = [
        TextToImage("a red house", params(seed=1)),
        ImageToImage("a blue boat", params(seed=2, n=2), image=PHOTO, strength=0.7),
        Inpaint("a tree", params(seed=3, sampler="dpmpp_2m"), image=PHOTO, mask=MASK),
        TextToImage(["a duck", "a castle"], params(seed=4, sampler="heun", guidance=1.0), negative="a tree"),
    ]
    return [each[i % len(each)] for i in range(n)]


def pixels(model: StableDiffusion, request: TextToImage) -> list[np.ndarray]:
    return [np.asarray(image) for image in model.prepare(request).result().images]


def made(mode: str, tmp_path) -> StableDiffusion:
    if mode == "float16, VAE retried":
        model = StableDiffusion.load(device="cpu", dtype="float16")
        with torch.no_grad():
            model.vae.decoder.conv_in.weight.mul_(3e4)
        return model
    model = StableDiffusion.load(device="cpu", dtype="float32", low_memory=mode == "low memory")
    if mode == "LoRA":
        key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        rng = torch.Generator().manual_seed(1)
        tensors = {
            f"{key}.lora_down.weight": torch.randn(4, 160, generator=rng),
            f"{key}.lora_up.weight": torch.randn(160, 4, generator=rng),
        }
        model.add_lora(saved(tmp_path, tensors), 0.2)
    return model


@pytest.mark.parametrize("threads", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled(2)
def test_threads_on_one_model_give_the_images_they_give_alone(mode, threads, tmp_path):
    model, given = made(mode, tmp_path), requests(threads)
    alone = [pixels(model, request) for request in given]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(lambda request: pixels(model, request), given))
    for one, other in zip(alone, together, strict=True):
        # a matrix product may add up in another order when cores are shared: a step of a pixel at most
        assert all(abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(one, other, strict=True))
    assert next(model.vae.parameters()).dtype == model.dtype


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_run_that_is_interrupted_leaves_the_model_as_it_was(error, low_memory):
    """At every step, and while it is decoded; then the same image comes as from a fresh model."""
    model = StableDiffusion.load(device="cpu", dtype="float32", low_memory=low_memory)
    request = requests(1)[0]
    fresh = pixels(StableDiffusion.load(device="cpu", dtype="float32"), request)
    for stop in range(3):
        with pytest.raises(error):
            for step in model.prepare(request):
                if step.i == stop:
                    raise error
    broken = model.prepare(request)
    broken.start = broken.start._replace(finish=lambda image: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        broken.result()
    assert all(map(np.array_equal, pixels(model, request), fresh))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_anywhere_with_low_memory(error):
    """At any call of a function of the project, where Ctrl-C comes: within a move of weights, too."""
    model = StableDiffusion.load(device="cpu", dtype="float32", low_memory=True)
    request = TextToImage("a red house", params(steps=1))
    fresh = pixels(model, request)
    folder, calls, stop = str(Path(sd.__file__).parent), 0, -1

    def trace(frame, event, _):  # for calls only: a line may be the end of a `with` block, where no interrupt comes
        nonlocal calls
        calls += frame.f_code.co_filename.startswith(folder)
        if calls == stop:
            raise error

    def traced():
        nonlocal calls
        calls = 0
        sys.settrace(trace)
        try:
            model.prepare(request).result()
        finally:
            sys.settrace(None)

    traced()
    total, rng = calls, random.Random(5)
    for _ in range(6):
        stop = rng.randrange(1, total)
        with suppress(error, RuntimeError):  # torch makes a RuntimeError of a MemoryError in load_state_dict
            traced()
    assert all(map(np.array_equal, pixels(model, request), fresh))


def test_two_runs_can_be_stepped_in_turn():
    model = StableDiffusion.load(device="cpu", dtype="float32")
    given = requests(2)
    alone = [pixels(model, request) for request in given]
    runs = [model.prepare(request) for request in given]
    for _ in zip(*runs, strict=False):  # a step of each
        pass
    for run, images in zip(runs, alone, strict=True):
        assert all(map(np.array_equal, map(np.asarray, run.result().images), images))


def test_notes_come_with_the_result_and_no_warning_does():
    model = StableDiffusion.load(device="cpu", dtype="float32")
    request = ImageToImage("a house " * 80, params(seed=9, n=2), image=PHOTO.resize((64, 128)), strength=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.prepare(request).result()
    assert result.seeds == [9, 10] and len(result.images) == 2
    text = "\n".join(result.notes)
    assert "are ignored" in text and "50 % of the image is cut off" in text and len(result.notes) == 2


def test_notes_on_an_empty_mask_are_not_the_only_ones():
    model = StableDiffusion.load(device="cpu", dtype="float32")
    request = Inpaint("a", params(seed=9, n=2), image=PHOTO, mask=Image.new("L", (9, 18)))
    images, seeds, notes = model.prepare(request).result()
    assert seeds == [9, 10] and [image.tobytes() for image in images] == [PHOTO.convert("RGB").tobytes()] * 2
    assert len(notes) == 2 and "it is stretched" in notes[0] and "the mask is empty" in notes[1]


@pytest.mark.parametrize("request_", requests(4), ids=lambda request: request.kind)
def test_requests_are_values_that_can_be_written(request_):
    """Through JSON and back: an equal request, and the same image."""
    again = from_dict(json.loads(json.dumps(request_.to_dict())))
    assert again == request_ and type(again) is type(request_)


@pytest.mark.parametrize(
    "values",
    [{}, {"kind": "paint"}, {"kind": "txt2img", "prompt": 3}, {"kind": "txt2img", "prompt": "a", "more": 1},
     {"kind": "img2img", "prompt": "a", "image": "no base64"}, {"kind": "txt2img", "prompt": "a", "params": {"n": 0}},
     {"kind": "txt2img", "prompt": "a", "params": {"options": {"eta": 7}}}],
)  # fmt: skip
def test_what_is_no_request_is_refused(values):
    with pytest.raises(ValueError):
        from_dict(values)


def test_a_setting_that_is_not_there_is_named():
    with pytest.raises(TypeError, match=r"txt2img has no setting 'frobnicate': it has .*guidance.*steps"):
        TextToImage.of("a", frobnicate=0.5)
    for name, words in (
        ("num_inference_steps", "did you mean 'steps'"),
        ("cfg_scale", "did you mean 'guidance'"),
        ("strength", "it is a setting of img2img and inpaint"),
        ("hires_strength", "it goes with hires"),
    ):
        with pytest.raises(TypeError, match=f"txt2img has no setting '{name}': {words}"):
            TextToImage.of("a", **{name: 1})
    with pytest.raises(TypeError, match="inpaint has no setting 'only_masked': did you mean 'margin'"):
        Inpaint.of("a", image=Image.new("RGB", (8, 8)), only_masked=True)
    with pytest.raises(ValueError, match="eta is a setting of ddim, not of DPM"):
        SamplingParams(sampler="dpmpp_2m", options={"eta": 0.5})


def test_the_default_sampler_is_the_models():
    model = StableDiffusion.load(device="cpu")
    chosen = TextToImage("a").params.resolved(model.config)
    assert (chosen.sampler, chosen.steps, chosen.spacing, chosen.guidance) == ("ddim", 50, "leading", 4.0)
    from sd.config import SD1

    chosen = SamplingParams().resolved(SD1)
    assert (chosen.sampler, chosen.steps, chosen.spacing, chosen.guidance) == ("dpmpp_2m", 25, "karras", 7.5)


def test_a_run_whose_step_failed_has_no_result(monkeypatch):
    """Its latents are half noise: an image of them would look like a result."""
    model = StableDiffusion.load()
    run = model.prepare(TextToImage("a house", params(steps=4)))
    next(run)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.unet), "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(run)
    with pytest.raises(RuntimeError, match=r"^step 2 of 4 failed: prepare the request again$"):
        run.result()


def test_requests_of_any_numbers_and_images_become_json():
    image = Image.new("CMYK", (16, 16))
    request = ImageToImage("a", image=image, strength=np.float32(0.5), params=SamplingParams(guidance=np.float64(2)))
    again = from_dict(json.loads(json.dumps(request.to_dict())))
    assert again.strength == 0.5 and again.image.mode == "RGB" and again.params == request.params
    assert hash(request.params) == hash(again.params)
    mask = Inpaint("a", image=image, blur=np.float32(1.5), margin=np.int64(3))
    assert json.loads(json.dumps(mask.to_dict()))["blur"] == 1.5


@pytest.mark.parametrize("settings", [{"guidance": 10**400}, {"sampler": 5}])
def test_settings_of_no_use_are_one_line(settings):
    with pytest.raises(ValueError, match=r"^(guidance|sampler) must be a "):
        SamplingParams(**settings)


def test_no_negative_is_the_empty_one():
    assert TextToImage("a", negative=None) == TextToImage("a") == TextToImage.of("a", None)


@pytest.mark.parametrize(
    "kind", ["txt2img", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("img2img", "inpaint"))]
)
def test_each_prompt_has_its_negative(kind, tiny_sd):
    """As lists or as contexts, with n images of each prompt; the image of a prompt alone with its negative."""
    given = {"txt2img": (), "img2img": (PHOTO,), "inpaint": (PHOTO, MASK)}[kind]
    settings = {"steps": 1, "height": 64, "width": 64, "sampler": "euler", "guidance": 3.0}
    settings |= {"strength": 1.0} if kind == "img2img" else {}
    prompts, negatives = ["a red house", "a boat"], ["a tree", "snow"]
    cond, uncond = tiny_sd.encode_prompt(prompts), tiny_sd.encode_prompt(negatives)

    def images(prompt, negative, **more):
        made = getattr(tiny_sd, kind)(prompt, *given, negative, **settings, **more)
        return [np.asarray(image).astype(int) for image in made]

    both = images(prompts, negatives, n=2, seed=3)
    alone = {k: images(prompts[k // 2], negatives[k // 2], seed=3 + k)[0] for k in (1, 2)}
    swapped = images(prompts, negatives[::-1], n=2, seed=3)
    assert len(both) == 4 and all(abs(both[k] - image).max() <= 1 for k, image in alone.items())
    assert all((a != b).any() for a, b in zip(both, swapped, strict=True))
    for prompt, negative in ((prompts, uncond), (cond, tuple(negatives))):
        assert all(map(np.array_equal, images(prompt, negative, n=2, seed=3), both))
    shared = images(prompts, "snow", n=2, seed=3)
    assert all(map(np.array_equal, images(prompts, uncond[1:], n=2, seed=3), shared))


def test_a_negative_of_another_length_is_padded(tiny_sd):
    settings = {"steps": 1, "height": 64, "width": 64, "guidance": 3.0}
    long = tiny_sd.encode_prompt(["word " * 80], web_ui_prompts=True)
    image = tiny_sd.txt2img("a", long, **settings)[0]
    assert image.tobytes() == tiny_sd.txt2img("a", "word " * 80, web_ui_prompts=True, **settings)[0].tobytes()
    assert tiny_sd.txt2img(["a"], ["b"], **settings | {"guidance": 1.0})


@pytest.mark.parametrize(
    "prompt, negative, message",
    [
        ("a", 3, "negative must be a text, a list of texts or a context, got 3"),
        ("a", [], r"negative must be a text, a list of texts or a context, got \[\]"),
        ("a", [None], "negative must be .*, got a list with None"),
        (["a", torch.zeros(1, 77, 64)], "", r"prompt must be .*, got a list with a tensor \(1, 77, 64\)"),
        ("a", b"b", "negative must be a text"),
        (None, "", "prompt must be a text, a list of texts or a context, got None"),
        (["a", "b"], ["c"], r"negative must be one text for all prompts, or .*: got 1 text for 2 prompts"),
        ("a", ("c", "d"), r"negative must be one text for all prompts, or .*: got 2 texts for 1 prompt"),
        (["a", "b"], torch.zeros(3, 77, 64), "negative must be .*: got 3 contexts for 2 prompts"),
        (torch.zeros(2, 77, 64), ["c"] * 3, "negative must be .*: got 3 texts for 2 prompts"),
        ("a", torch.zeros(()), "negative must be .*: got 0 contexts for 1 prompt"),
        ("a", torch.zeros(1, 77, 63), r"negative must be a context \(B, k x 77, 64\) .*, got \(1, 77, 63\) in float32"),
        ("a", torch.zeros(1, 77, 64).long(), r"negative must be a context .*, got \(1, 77, 64\) in int64"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_or_negative_is_named(prompt, negative, message, tiny_sd):
    """At guidance 1, too, where the negative has no effect; no tensor is printed."""
    for guidance in (1.0, 3.0):
        with pytest.raises(ValueError, match=f"^{message}") as refused:
            tiny_sd.txt2img(prompt, negative, guidance=guidance)
        assert "\n" not in str(refused.value) and "tensor([" not in str(refused.value)


def test_negatives_are_written_with_the_request():
    for negative in (None, "b", ["b", "c"]):
        request = TextToImage(["a", "d"], negative=negative)
        again = from_dict(json.loads(json.dumps(request.to_dict())))
        assert again == request and hash(again) == hash(request)
    with pytest.raises(ValueError, match=r"^a request cannot be serialised if its negative is a context"):
        TextToImage("a", negative=torch.zeros(1, 77, 64)).to_dict()


@pytest.mark.parametrize("name, value", [("params", SamplingParams()), ("options", {"eta": 0.5})])
def test_the_short_way_takes_settings_one_by_one(name, value):
    with pytest.raises(TypeError, match=f"^txt2img has no setting '{name}'"):
        TextToImage.of("a", **{name: value})


def test_a_grid_in_the_samplers_name_of_a_config_counts():
    config = replace(SD1, sampler="Euler Karras")
    assert SamplingParams().resolved(config).spacing == "karras"
    assert SamplingParams(spacing="trailing").resolved(config).spacing == "trailing"
    assert SamplingParams(options={"eta": 1.0}).resolved(config).spacing == SAMPLERS["ddim"].spacing


def test_another_vae_beside_a_lora(tmp_path, tiny_sd):
    """The VAE has nothing of a LoRA; of the other networks, each names what is in the way."""
    model = copy.deepcopy(tiny_sd)
    model.add_lora(saved(tmp_path, lora_file(next(iter(SCHEMES)))[0]))
    model.vae = copy.deepcopy(model.vae)
    with pytest.raises(ValueError, match=r"^remove LoRAs and embeddings before"):
        model.unet = copy.deepcopy(model.unet)
    model.remove_lora()
    model.unet = copy.deepcopy(model.unet)


def test_a_retry_in_float32_is_noted_once_and_copies_once(tmp_path, monkeypatch):
    model, copies = made("float16, VAE retried", tmp_path), []
    counting = SimpleNamespace(deepcopy=lambda vae: copies.append(vae) or copy.deepcopy(vae))
    monkeypatch.setattr("sd.latents.copy", counting)
    result = model.prepare(TextToImage("a house", params(n=3, steps=1))).result()
    assert len(result.images) == 3 and len(copies) == 1
    assert result.notes == ["the image is not finite in float16: computing it again in float32"]


@pytest.mark.parametrize("kind", ["txt2img", "inpaint"])
def test_exact_batches_are_images_alone(tiny_sd, tiny_inpaint, monkeypatch, kind):
    """To the bit, and because the network sees one image at a time, with and without its prompt."""
    model = tiny_inpaint if kind == "inpaint" else tiny_sd
    given = [PHOTO, MASK] if kind == "inpaint" else []
    settings = {"steps": 2, "height": 64, "width": 64, "sampler": "euler_a"}
    seen = set()
    unet = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, *args, **more: seen.add(len(x)) or unet(x, *args, **more))
    batch = getattr(model, kind)(["a", "a red cube"], *given, seed=5, n=2, exact=True, **settings)
    assert seen == {2}
    for prompt, start in (("a", 5), ("a red cube", 7)):
        for i in range(2):
            alone = getattr(model, kind)(prompt, *given, seed=start + i, **settings)[0]
            assert alone.tobytes() == batch[start - 5 + i].tobytes()
    seen.clear()
    getattr(model, kind)("a", *given, n=2, guidance=1, exact=True, **settings)
    assert seen == {1}


def test_resolved_parameters_are_checked_as_well(tiny_sd):
    params = SamplingParams().resolved(tiny_sd.config)
    for name, value in (("steps", 0), ("spacing", "nonsense"), ("guidance", float("nan"))):
        with pytest.raises(ValueError, match=name):
            replace(params, **{name: value})
