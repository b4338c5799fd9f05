"""SDXL's own settings: second prompts, sizes, refiner; in requests, on the command line and in files of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY_XL, error, tiny_state
from conftest import loaded
from PIL import Image
from safetensors.torch import save_file
from sdxl_common import TINY_REFINER, finish, guide_of, model_of, params, random_weights
from test_sdxl_adapters import two

from scripts import convert as convert_script
from scripts import img2img, txt2img
from scripts.common.xl_args import pair
from sd import StableDiffusion, read_request
from sd.checkpoints.convert import convert
from sd.config import BASE_SIZES
from sd.params import TextToImage, from_dict
from sd.recipes.comfyui import read_graph
from sd.recipes.json_texts import read_fooocus
from sd.recipes.webui import read_parameters
from sd.runtime.offload import Offload


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))


@pytest.fixture(scope="module")
def refiner() -> StableDiffusion:
    return model_of(random_weights(TINY_REFINER), TINY_REFINER)


# -------------------------------------------------------------------------------------------------- second prompts


def test_second_prompts(base):
    """Each text encoder reads its own text, and both have as many chunks."""
    first, second = (guide_of(base, TextToImage(text, params())) for text in ("a cat", "a dog"))
    both = guide_of(base, TextToImage("a cat", params(), prompt_2="a dog")).cond
    assert torch.equal(both.context[..., :64], first.cond.context[..., :64])
    assert torch.equal(both.context[..., 64:], second.cond.context[..., 64:])
    assert torch.equal(both.vector, second.cond.vector)
    several = guide_of(base, TextToImage(["a cat", "a cow"], params(), prompt_2=["a dog", "a hen"]))
    assert error(several.cond.context[:1], both.context) < 1e-6
    exact = guide_of(base, TextToImage(["a cat", "a cow"], params(exact=True), prompt_2=["a dog", "a hen"]))
    assert torch.equal(exact.cond.context[:1], both.context)
    long = TextToImage("a cat", params(), web_ui_prompts=True, prompt_2="a (dog:1.3), " * 30)
    guide = guide_of(base, long)
    assert guide.cond.context.shape == guide.uncond.context.shape == (1, 2 * 77, 160)
    padded = guide_of(base, TextToImage("a cat", params(), web_ui_prompts=True)).cond.context
    assert error(guide.cond.context[:, :77, :64], padded[..., :64]) < 1e-6
    assert from_dict(long.to_dict()) == long


def test_an_empty_negative_prompt_with_a_second_one_is_not_zeros(base):
    assert not guide_of(base, TextToImage("a cat", params())).uncond.context.any()
    uncond = guide_of(base, TextToImage("a cat", params(), negative_2="fog")).uncond
    assert torch.equal(uncond.vector, guide_of(base, TextToImage("a cat", params(), "fog")).uncond.vector)
    assert uncond.context[..., :64].any()  # the first encoder reads the empty text
    each = guide_of(base, TextToImage(["a cat", "a cow"], params(), negative_2=["fog", ""])).uncond
    assert each.context[0].any() and not each.context[1].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_2": ["a", "b", "c"]}, "prompt_2 must be one text for all prompts, .* got 3 texts for 1 prompt"),
        ({"prompt_2": 3}, "prompt_2 must be"),
        ({"negative_2": torch.zeros(1, 77, 160)}, "negative_2 must be a text or a list of texts, got a tensor"),
        ({"prompt_2": "a [b:c:0.5]", "web_ui_prompts": True}, "prompt_2 cannot have AND, "),
        ({"negative_2": "a [b|c]", "web_ui_prompts": True}, "negative_2 cannot have "),
        ({"prompt": "a AND b", "prompt_2": "c", "web_ui_prompts": True}, "prompt_2 cannot be combined with AND"),
    ],
)
def test_second_prompts_that_cannot_be(settings, message, base):
    with pytest.raises(ValueError, match=message):
        base.prepare(TextToImage(**({"prompt": "a cat", "params": params()} | settings)))


def test_second_prompts_of_models_with_one_text_encoder(tiny_sd, base, refiner):
    for model in (tiny_sd, refiner):
        with pytest.raises(
            ValueError, match=f"prompt_2 is for a second text encoder, but {model.config.name} has only one"
        ):
            model.prepare(TextToImage("a cat", params(), prompt_2="a dog"))
    # beside a base, the refiner's encoder reads what the second one of the base does
    with_two = base.prepare(TextToImage(["a cat", "a cow"], params(), prompt_2="a dog", negative_2="fog"), refiner)
    other = TextToImage(["a cat", "a cow"], params(refiner_from=0), prompt_2="a dog", negative_2="fog")
    alone = refiner.prepare(TextToImage(["a dog", "a dog"], params(), "fog"))
    assert torch.equal(finish(base.prepare(other, refiner)), finish(alone))
    assert torch.isfinite(finish(with_two)).all()


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"original_width": 9, "crop_top": 3}, "original_width, crop_top have no effect: tiny v1 is not told them"),
        ({"negative_aesthetic_score": 3}, "negative_aesthetic_score has no effect: tiny v1 is not told it"),
        ({}, None),
    ],
)
def test_sizes_that_a_model_is_not_told(settings, note, tiny_sd, base):
    run = tiny_sd.prepare(TextToImage("a cat", params(**settings)))
    assert run.notes == ([] if note is None else [note])
    unheard = [name for name in settings if "score" in name]
    assert len(base.prepare(TextToImage("a cat", params(**settings))).notes) == len(unheard)


def test_sizes_change_the_image(base):
    plain = finish(base.prepare(TextToImage("a cat", params(steps=2))))
    for name in BASE_SIZES:
        assert error(finish(base.prepare(TextToImage("a cat", params(steps=2, **{name: 300})))), plain) > 1e-4
    own = params(steps=2, original_height=64, original_width=64, target_height=64, target_width=64)
    assert torch.equal(finish(base.prepare(TextToImage("a cat", own))), plain)


# ---------------------------------------------------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The two models as files of our layout."""
    folder = tmp_path_factory.mktemp("models")
    base = convert(tiny_state("tiny-sdxl"), TINY_XL)
    states = {"base": (base, TINY_XL), "refiner": (random_weights(TINY_REFINER), TINY_REFINER)}
    for name, (weights, config) in states.items():
        convert_script.save("sd", folder / f"{name}.safetensors", weights, config, {})
    return {name: folder / f"{name}.safetensors" for name in states}


SMALL_ARGS = ("--steps", "5", "--height", "64", "--width", "64", "--seed", "3", "--dtype", "float32", "--device", "cpu")


def text_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.info["parameters"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


ALL = (
    "--exact", "--refiner-from", "0.6", "--negative", "fog", "--prompt-2", "a watercolour, of a cat", "--negative-2",
    "red", "--original-size", "200x300", "--crop", "5x6", "--target-size", "70x80", "--aesthetic-score", "7.5",
    "--negative-aesthetic-score", "1.5",
)  # fmt: skip


def test_all_settings_and_their_metadata(files, base, refiner, tmp_path, capsys):
    """On the command line, in the file of the image, and read back: the same image each time."""
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    models = ("--ckpt", str(files["base"]), "--refiner", str(files["refiner"]))
    assert txt2img.main(["a cat", *models, *SMALL_ARGS, *ALL, "--out", str(first)]) == 0, capsys.readouterr().err
    settings = {
        "steps": 5, "seed": 3, "original_width": 200, "original_height": 300, "crop_left": 5, "crop_top": 6,
        "target_width": 70, "target_height": 80, "aesthetic_score": 7.5, "negative_aesthetic_score": 1.5,
        "refiner_from": 0.6,
    }  # fmt: skip
    request = TextToImage.of(
        "a cat", "fog", height=64, width=64, prompt_2="a watercolour, of a cat", negative_2="red", **settings
    )
    image = base.prepare(request, refiner).result().images[0]
    assert np.abs(pixels(first).astype(int) - np.asarray(image)).max() <= 1  # by other kernels

    recipe = read_request(first)
    found = {name: getattr(recipe.request.params, name) for name in settings}
    assert found == settings and recipe.notes == ()
    assert (recipe.request.prompt_2, recipe.request.negative_2) == ("a watercolour, of a cat", "red")
    assert recipe.info["Refiner"].startswith("refiner [") and recipe.info["Refiner switch at"] == "0.6"

    assert txt2img.main(["--like", str(first), *models, "--dtype", "float32", "--out", str(again)]) == 0
    assert np.array_equal(pixels(first), pixels(again))
    assert text_of(first) == text_of(again)
    capsys.readouterr()
    assert (
        txt2img.main(["--like", str(first), "--ckpt", models[1], "--crop", "0x0", "--out", str(tmp_path / "x.png")])
        == 0
    )
    assert "Refiner refiner: give its file with --refiner" in capsys.readouterr().err
    other = read_request(tmp_path / "x.png").request
    assert (other.params.crop_left, other.params.crop_top, other.params.original_width) == (0, 0, 200)


def test_a_refiner_is_loaded_as_the_model_is(files, tmp_path, capsys, monkeypatch):
    """With the same progress bar and copy in the cache folder; what was detected is said, and what it cannot read."""
    options, load = [], StableDiffusion.load

    def seen(path, **given):
        options.append(given)
        return load(path, **given)

    monkeypatch.setattr(StableDiffusion, "load", seen)
    save_file(two(2), tmp_path / "style.safetensors")
    models = ("--ckpt", str(files["base"]), "--refiner", str(files["refiner"]))
    words = ("--embedding", str(tmp_path / "style.safetensors"))
    assert txt2img.main(["a style cat", *models, *words, *SMALL_ARGS, "--out", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr()
    assert all(given.keys() >= {"progress", "cache", "low_memory", "compile"} for given in options)
    assert options[0]["cache"] == options[1]["cache"] and "variant" not in options[1]  # it is a file
    assert "refiner: an empty negative prompt is encoded like any text" in said.out
    assert "the refiner reads style as plain text: embeddings are added to the model alone" in said.err
    assert txt2img.main(["a cat", *models, *words, *SMALL_ARGS, "--out", str(tmp_path / "b.png")]) == 0
    assert "the refiner reads" not in capsys.readouterr().err


def test_another_prompt_is_not_given_the_second_one_of_a_recipe(files, tmp_path):
    out = ("--out", str(tmp_path / "a.png"))
    assert txt2img.main(["a cat", "--ckpt", str(files["base"]), *SMALL_ARGS, "--prompt-2", "a dog", *out]) == 0
    like = ("--like", str(tmp_path / "a.png"), "--ckpt", str(files["base"]), "--out", str(tmp_path / "b.png"))
    assert txt2img.main(["a cow", *like]) == 0
    request = read_request(tmp_path / "b.png").request
    assert (request.prompt, request.prompt_2) == (("a cow",), None)


def test_another_negative_prompt_is_not_given_the_second_one_of_a_recipe(files, tmp_path):
    """As for the prompt; a second one that is given stays."""
    model = ("--ckpt", str(files["base"]))
    first = ("a cat", "--negative", "fog", "--negative-2", "red", *model, *SMALL_ARGS)
    assert txt2img.main([*first, "--out", str(tmp_path / "a.png")]) == 0
    like = ("--like", str(tmp_path / "a.png"), *model)
    for i, (more, wanted) in enumerate(
        (
            ((), ("fog", "red")),
            (("--negative", "mist"), ("mist", None)),
            (("--negative", "mist", "--negative-2", "blue"), ("mist", "blue")),
        )
    ):
        assert txt2img.main([*like, *more, "--out", str(tmp_path / f"{i}.png")]) == 0
        request = read_request(tmp_path / f"{i}.png").request
        assert (request.negative, request.negative_2) == wanted


def test_second_prompts_that_are_empty_are_kept(files, tmp_path):
    """They say that the second text encoder reads nothing."""
    model, first, again = ("--ckpt", str(files["base"])), tmp_path / "a.png", tmp_path / "b.png"
    arguments = ("a cat", "--negative", "fog", "--prompt-2", "", "--negative-2", "", *model, *SMALL_ARGS)
    assert txt2img.main([*arguments, "--out", str(first)]) == 0
    request = read_request(first).request
    assert (request.prompt_2, request.negative_2) == ("", "")
    assert txt2img.main(["--like", str(first), *model, "--out", str(again)]) == 0
    assert np.array_equal(pixels(first), pixels(again))


def test_lines_of_settings(files, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    line = {"prompt": "a cat", "prompt_2": "a dog", "crop_left": 9, "refiner_from": 0.5}
    lines.write_text(json.dumps(line) + "\n")
    arguments = ("--from-file", str(lines), "--ckpt", str(files["base"]), "--refiner", str(files["refiner"]))
    assert txt2img.main([*arguments, *SMALL_ARGS, "--out", str(tmp_path / "a.png")]) == 0
    request = read_request(tmp_path / "a.png").request
    assert (request.prompt_2, request.params.crop_left, request.params.refiner_from) == ("a dog", 9, 0.5)


def test_a_refiner_is_an_image_to_image_model(files, tmp_path):
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(photo)
    arguments = ("a cat", str(photo), "--ckpt", str(files["refiner"]), "--strength", "0.4")
    assert img2img.main([*arguments, *SMALL_ARGS, "--out", str(tmp_path / "a.png")]) == 0
    both = ("--ckpt", str(files["base"]), "--refiner", str(files["refiner"]), "--strength", "0.6")
    assert img2img.main(["a cat", str(photo), *both, *SMALL_ARGS, "--out", str(tmp_path / "b.png")]) == 0
    assert "Refiner switch at: 0.6" in text_of(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--refiner", "REFINER"), "a refiner continues a run of an SDXL model, but the model is pocket: leave it out"),
        (
            ("--ckpt", "BASE", "--refiner", "POCKET"),
            "a refiner continues a run of an SDXL model, but the refiner is pocket",
        ),
        (("--ckpt", "BASE", "--refiner", "nowhere.safetensors"), "nowhere.safetensors"),
        (
            ("--ckpt", "BASE", "--refiner", "REFINER", "--refiner-from", "1.5"),
            r"refiner_from must be in [0, 1], got 1.5",
        ),
        (("--ckpt", "REFINER", "--prompt-2", "x"), "prompt_2 is for a second text encoder"),
        (("--crop", "5"), "'5' is not two numbers of pixels, x before y, such as 1024x768"),
        (("--original-size", "1024x-3"), "is not two numbers"),
        (("--original-size", "999999x8"), "original_width must be in [0, 100000], got 999999"),
    ],
)
def test_wrong_arguments(arguments, message, files, tmp_path, capsys, monkeypatch):
    """One line, before a model is loaded where that can be known."""
    from sd.resources import resource

    monkeypatch.setattr(StableDiffusion, "load", no_loading if "--prompt-2" not in arguments else StableDiffusion.load)
    paths = {"BASE": files["base"], "REFINER": files["refiner"], "POCKET": resource("weights/pocket.safetensors")}
    try:
        status = txt2img.main(["a cat", *(str(paths.get(a, a)) for a in arguments), "--out", str(tmp_path / "a.png")])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert status != 0 and message in said and len(said.strip().split("\n")) == 1, said


def no_loading(*arguments, **options):
    raise AssertionError("a model is loaded")


def test_pairs():
    assert pair("1024x768") == (1024, 768) and pair(" 0X64") == (0, 64)


# ----------------------------------------------------------------------------------------------------------- memory


def on_device(model: StableDiffusion) -> list[str]:
    """The networks of a model of low memory that have weights."""
    assert isinstance(model._networks, Offload)
    networks = model._networks._networks
    return [
        name for name, network in networks.items() if not any(p.is_meta or p.numel() == 0 for p in network.parameters())
    ]


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


def test_what_an_empty_negative_prompt_is_is_said(files):
    lines = {name: StableDiffusion.load(path, device="cpu").about for name, path in files.items()}
    zeros = "an empty negative prompt is zeros, not the encoded empty text, as in its training and in the web UI"
    assert lines["base"].count(zeros) == 1
    assert (
        lines["refiner"].count("an empty negative prompt is encoded like any text, not zeros, as in its training") == 1
    )


# ---------------------------------------------------------------------------------------------------------- recipes


def test_refiner_of_the_web_ui():
    text = (
        "a cat\nNegative prompt: fog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 1024x1024, "
        "Model: sd_xl_base_1.0, Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.75, Version: v1.6.0"
    )
    recipe = read_parameters(text)
    assert recipe.request.params.refiner_from == 0.75 and "refiner_from" in recipe.given
    assert recipe.info["Refiner"] == "sd_xl_refiner_1.0 [7440042bbd]" and recipe.notes == ()


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ("Schedule type: Karras, Refiner switch at: 0.8, Version: v1.8.0", 0.8),
        ("Schedule type: Karras, Refiner switch at: 0.8, Version: v1.10.1", 0.6),
        ("Schedule type: Uniform, Refiner switch at: 0.8, Version: v1.9.0", 0.8),
        (
            "Schedule type: Karras, Refiner switch at: 0.8, Refiner switch by sampling steps: True, Version: v1.10.1",
            0.8,
        ),
        ("Schedule type: Karras, Refiner switch at: 0.8, Version: sd 0.2.0", 0.8),
    ],
)
def test_what_the_web_ui_switches_by(more, wanted):
    """From 1.9 on by a timestep, before by steps."""
    recipe = read_parameters(
        f"a cat\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1, Size: 64x64, Refiner: x, {more}"
    )
    assert recipe.request.params.refiner_from == wanted and recipe.notes == ()


def test_refiner_of_fooocus():
    recipe = read_fooocus(
        {"prompt": "a cat", "steps": 30, "refiner_model": "sd_xl_refiner_1.0.safetensors", "refiner_switch": 0.6}
    )
    assert recipe.request.params.refiner_from == 0.6 and recipe.info["Refiner"] == "sd_xl_refiner_1.0"
    assert not any("refiner" in note or "SDXL" in note for note in recipe.notes)


def comfy(**changed) -> dict:
    """ComfyUI's example of base and refiner."""
    size = {"width": 1024, "height": 1024}
    sizes = {**size, "crop_w": 0, "crop_h": 0, "target_width": 1024, "target_height": 1024}
    sampler = {"steps": 25, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "noise_seed": 7}
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        "2": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_refiner_1.0.safetensors"}),
        "3": ("CLIPTextEncodeSDXL", {**sizes, "text_l": "ink", "text_g": "a cat", "clip": ["1", 1]}),
        "4": ("CLIPTextEncodeSDXL", {**sizes, "text_l": "fog", "text_g": "fog", "clip": ["1", 1]}),
        "5": ("CLIPTextEncodeSDXLRefiner", {**size, "ascore": 7.0, "text": "a cat", "clip": ["2", 1]}),
        "6": ("CLIPTextEncodeSDXLRefiner", {**size, "ascore": 2.0, "text": "fog", "clip": ["2", 1]}),
        "7": ("EmptyLatentImage", {**size, "batch_size": 1}),
        "8": ("KSamplerAdvanced", {
            **sampler, "add_noise": "enable", "start_at_step": 0, "end_at_step": 20, "model": ["1", 0],
            "return_with_leftover_noise": "enable",
            "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["7", 0],
        }),
        "9": ("KSamplerAdvanced", {
            **sampler, "add_noise": "disable", "start_at_step": 20, "end_at_step": 10000, "model": ["2", 0],
            "positive": ["5", 0], "negative": ["6", 0], "latent_image": ["8", 0],
        }),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": ["2", 2]}),
        "11": ("SaveImage", {"images": ["10", 0]}),
    }  # fmt: skip
    graph = {key: {"class_type": kind, "inputs": dict(inputs)} for key, (kind, inputs) in nodes.items()}
    for key, inputs in changed.items():
        graph[key[1:]]["inputs"] |= inputs
    return graph


def test_base_and_refiner_of_comfyui():
    recipe = read_graph(comfy())
    request = recipe.request
    assert (request.prompt, request.prompt_2, request.negative, request.negative_2) == (("ink",), "a cat", "fog", None)
    assert (request.params.refiner_from, recipe.info["Refiner"]) == (0.8, "sd_xl_refiner_1.0")
    assert (request.params.aesthetic_score, request.params.negative_aesthetic_score) == (7.0, 2.0)
    assert request.params.original_width is None  # the image's own
    assert recipe.notes == ()


@pytest.mark.parametrize(
    ("changed", "settings", "note"),
    [
        (
            {
                **{node: {"width": 4096, "crop_w": 9, "crop_h": 8, "target_height": 512} for node in ("n3", "n4")},
                **{node: {"width": 4096} for node in ("n5", "n6")},
            },
            {"original_width": 4096, "crop_left": 9, "crop_top": 8, "target_height": 512, "original_height": None},
            "",
        ),
        ({"n4": {"height": 300}}, {"original_height": None}, "not reproduced: height 300 of the negative prompt alone"),
        ({"n5": {"height": 768}}, {"original_height": None}, "not reproduced: height 768 of the refiner alone"),
        ({"n8": {"return_with_leftover_noise": "disable"}}, {"refiner_from": None}, "only steps 0 to 20 of 25"),
        ({"n9": {"cfg": 5.0}}, {"refiner_from": 0.8}, "not reproduced: cfg 5.0 of the second sampler alone"),
        ({"n6": {"text": "mist"}}, {"refiner_from": 0.8}, "the negative prompt of the second sampler, 'mist'"),
        ({"n2": {"ckpt_name": "sd_xl_base_1.0.safetensors"}}, {"refiner_from": None, "steps": 25}, ""),
        ({"n2": {"ckpt_name": ""}}, {"refiner_from": None}, "a later pass is not reproduced"),
        ({"n8": {"end_at_step": 10}, "n9": {"start_at_step": 10}}, {"refiner_from": 0.4}, ""),
        ({"n9": {"start_at_step": 15}}, {"refiner_from": None}, "a later pass is not reproduced"),
        ({"n9": {"add_noise": "enable"}}, {"aesthetic_score": 6.0}, "the sampler runs only steps 0 to 20 of 25"),
    ],
)
def test_graphs_of_comfyui(changed, settings, note):
    recipe = read_graph(comfy(**changed))
    assert {name: getattr(recipe.request.params, name) for name in settings} == settings
    assert (note in " ".join(recipe.notes)) if note else recipe.notes == ()


def test_an_empty_negative_prompt_of_comfyui_is_encoded(files, tmp_path, capsys):
    """Which is said of a model for which it is zeros, unless they are zeros in the graph as well."""
    empty = {"n3": {"text_l": "a cat"}, "n4": {"text_l": "", "text_g": ""}, "n6": {"text": ""}}
    zeros = {"12": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["4", 0]}}}
    for i, (graph, model, said) in enumerate(
        (
            (comfy(**empty), "base", True),
            (comfy(**empty), "refiner", False),
            (comfy(**empty, n8={"negative": ["12", 0]}) | zeros, "base", False),
            (comfy(), "base", False),
        )
    ):
        (tmp_path / f"{i}.json").write_text(json.dumps(graph))
        like = ("--like", str(tmp_path / f"{i}.json"), "--ckpt", str(files[model]), "--spacing", "trailing")
        assert txt2img.main([*like, *SMALL_ARGS, "--out", str(tmp_path / f"{i}.png")]) == 0
        assert ("ComfyUI encodes the empty negative prompt" in capsys.readouterr().err) is said


def test_the_grid_of_sgm_has_a_name_everywhere():
    """Ours in our files; sgm_uniform of others is the same before its timesteps are rounded."""
    ours = "a cat\nSteps: 5, Sampler: Euler, Schedule type: Sgm, CFG scale: 7, Seed: 1, Size: 64x64, Version: sd 0.2.0"
    recipe = read_parameters(ours)
    assert recipe.request.params.spacing == "sgm" and recipe.notes == ()
    other = read_graph(comfy(n8={"scheduler": "sgm_uniform"}, n9={"scheduler": "sgm_uniform"}))
    assert other.request.params.spacing == "sgm" and "sgm is close, but not the same" in " ".join(other.notes)
