"""Recipes in forms of their own: NovelAI, InvokeAI, Easy Diffusion, Draw Things, SwarmUI; and texts in the pixels."""

from __future__ import annotations

import gzip
import html
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_recipe_programs import BOTH, GRAPH, check, web

from sd import read_request
from sd.imaging.files import ImageFileError
from sd.params import TextToImage

NOVEL = {"steps": 28, "sampler": "k_euler_ancestral", "seed": 5, "strength": 0.69, "scale": 11.0, "uc": "dog"}
EASY = {"prompt": "a cat", "negative_prompt": "dog", "seed": "5", "num_inference_steps": "25", "width": "64"}
EASY |= {"guidance_scale": "7.5", "height": "128", "sampler_name": "euler_a", "use_stable_diffusion_model": "m.ckpt"}
EASY |= {"use_lora_model": "['a', 'b']", "lora_alpha": "[0.5, 0.25]"}
DRAW = {"c": "a cat", "uc": "dog", "seed": 5, "steps": 25, "scale": 7.5, "sampler": "DPM++ 2M Karras", "size": "64x128"}
DRAW |= {"model": "m.ckpt", "strength": 1, "seed_mode": "Nvidia GPU Compatible", "v2": {"clipSkip": 2}}
DRAW |= {"lora": [{"model": "a.ckpt", "weight": 0.5}]}
XMP = f'<exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">{html.escape(json.dumps(DRAW))}</rdf:li></rdf:Alt>'
SWARM = {"prompt": "a cat", "negativeprompt": "dog", "model": "m.pt", "seed": 5, "steps": 25, "cfgscale": 7.5}
SWARM |= {"width": 64, "height": 128, "sampler": "dpmpp_2m", "scheduler": "karras", "clipstopatlayer": "-2"}
SWARM |= {"loras": ["a"], "loraweights": ["0.5"]}
LINES = "Prompt: a cat\nSeed: 5\nSteps: 25\nWidth: 64\nHeight: 128\nGuidance Scale: 7.5\nSampler: euler_a\n"
INVOKE = {"app_version": "4.2.0", "positive_prompt": "a cat", "width": 64, "height": 128, "steps": 5, "cfg_scale": 4}
INVOKE |= {"scheduler": "kdpm_2_a", "seed": 5, "rand_device": "cpu", "vae": {"key": "x", "name": "vae-mse"}}
ALL = {"prompt": "a cat", "seed": 5, "steps": 25, "guidance": 7.5, "width": 64, "height": 128, "kind": "txt2img"}
ONE = BOTH | ALL | {"model": "m", "loras": [("a", 0.5, "")], "clip_skip": 2, "spacing": "karras"}
# fmt: off
PROGRAMS = {
    "NovelAI": (
        {"Software": "NovelAI", "Description": "{a} cat", "Source": "Stable Diffusion 81274D13",
         "Comment": json.dumps(NOVEL)},
        {"prompt": "{a} cat", "negative": "dog", "sampler": "euler_a", "guidance": 11.0, "kind": "txt2img", "rng": "nv",
         "noise_seed_delta": 31337, "clip_skip": 2}, "{ } and [ ]",
    ),
    "Easy Diffusion": (EASY, BOTH | ALL | {"loras": [("a", 0.5, ""), ("b", 0.25, "")], "sampler": "euler_a"}, ""),
    "Easy Diffusion, one LoRA": (
        EASY | {"use_lora_model": "cat's eyes [v2]", "lora_alpha": "0.5"},
        {"loras": [("cat's eyes [v2]", 0.5, "")]}, "",
    ),
    "Easy Diffusion, JSON": (
        {"prompt": json.dumps(EASY | {"use_lora_model": ["None", "ink [v2]"], "lora_alpha": [0.5, 0.7]})},
        {"loras": [("ink [v2]", 0.7, "")]}, "",
    ),
    "Easy Diffusion, a list in Python's form": (
        EASY | {"use_lora_model": "[None, \"cat's, eyes\", 'a\\\\b\\'s']", "lora_alpha": "[0.5, 0.7]"},
        {"loras": [("cat's, eyes", 0.7, ""), ("b's", 1.0, "")]}, "",
    ),
    "Easy Diffusion, a bracket": (EASY | {"prompt": "{a|b} cat"}, {"prompt": "{a|b} cat", "seed": 5}, ""),
    "Easy Diffusion, lines": ({"parameters": LINES}, ALL | {"negative": "", "sampler": "euler_a"}, ""),
    "Draw Things, EXIF": ({"parameters": json.dumps(DRAW)}, ONE | {"rng": "nv"}, ""),
    "TCD in Draw Things": (
        {"parameters": json.dumps(DRAW | {"sampler": "TCD", "v2": {"stochasticSamplingGamma": 0.5}})},
        {"sampler": "tcd", "options": {"gamma": 0.5}}, "",
    ),
    "Draw Things, XMP": ({"XML:com.adobe.xmp": XMP}, ONE | {"rng": "nv"}, ""),
    "InvokeAI": ({"invokeai_metadata": json.dumps(INVOKE)}, {"sampler": "dpm2_a", "kind": "txt2img"}, ""),
    "SwarmUI, no name": (
        {"parameters": json.dumps({"sui_image_params": SWARM | {"loras": ["", "ink"], "loraweights": ["0.2", "0.9"]}})},
        {"loras": [("ink", 0.9, "")]}, "",
    ),
    "SwarmUI, names in a text": (
        {"parameters": json.dumps({"sui_image_params": SWARM | {"loras": ",ink", "loraweights": "0.2,0.9"}})},
        {"loras": [("ink", 0.9, "")]}, "",
    ),
    "SwarmUI, a prompt with settings": (
        {"parameters": json.dumps({"sui_image_params": SWARM | {"prompt": "Steps: 3, Seed: 2"}})},
        {"prompt": "Steps: 3, Seed: 2", "seed": 5}, "",
    ),
    "the web UI, a bracket": ({"parameters": web(prompt="{a cat}")}, {"prompt": "{a cat}", "seed": 5}, ""),
    "many LoRAs": (
        {"parameters": json.dumps(DRAW | {"lora": [{"model": "a"}] * 120})}, {"seed": 5}, "first 100 of its 120 LoRAs",
    ),
    "SwarmUI": ({"parameters": json.dumps({"sui_image_params": SWARM})}, ONE | {"rng": "comfy"}, ""),
}
# fmt: on


@pytest.mark.parametrize("name", PROGRAMS)
def test_other_programs(monkeypatch, name):
    texts, wanted, note = PROGRAMS[name]
    monkeypatch.setattr("sd.recipes.read_texts", lambda path: texts)
    check(read_request("a.png"), wanted, note)
    damaged = {key: text[: len(text) // 2] for key, text in texts.items()}
    monkeypatch.setattr("sd.recipes.read_texts", lambda path: damaged)
    try:
        assert isinstance(read_request("a.png").request, TextToImage)
    except ValueError as error:
        assert str(error).startswith("a.png: ") and str(error).isprintable()


FOOOCUS = {"prompt": "a cat", "guidance_scale": 4, "base_model": "m", "seed": "5", "steps": 9}


@pytest.mark.parametrize("values", [{"sui_image_params": SWARM}, DRAW, FOOOCUS, EASY, GRAPH], ids=lambda v: str(v)[:20])
def test_json_is_read_the_same_wherever_it_stands(values, tmp_path, monkeypatch):
    text = json.dumps(values)
    for name in ("s.txt", "s.json"):
        (tmp_path / name).write_text(text)
    recipes = [read_request(tmp_path / name) for name in ("s.txt", "s.json")]
    for keyword in ("parameters", "prompt", "workflow"):
        monkeypatch.setattr("sd.recipes.read_texts", lambda path, keyword=keyword: {keyword: text})
        recipes.append(read_request("a.png"))
    assert recipes[0].request.prompt == ("a cat",) and all(recipe == recipes[0] for recipe in recipes)
    (tmp_path / "s.json").write_text('{"a": 1}')
    monkeypatch.undo()
    with pytest.raises(ImageFileError, match=r"nor the settings of a known program \(its keys: a\)"):
        read_request(tmp_path / "s.json")


def test_the_vae_of_invokeai_is_named(monkeypatch):
    monkeypatch.setattr("sd.recipes.read_texts", lambda path: {"invokeai_metadata": json.dumps(INVOKE)})
    assert read_request("a.png").info["VAE"] == "vae-mse"


def hide(signature, body):
    """An image whose alpha channel has a text in its lowest bits, column by column."""
    bits = np.unpackbits(np.frombuffer(signature + (8 * len(body)).to_bytes(4, "big") + body, np.uint8))
    height = 40
    alpha = np.full((-(-len(bits) // height), height), 254, np.uint8)
    alpha.reshape(-1)[: len(bits)] += bits
    image = Image.new("RGBA", alpha.shape, (9, 9, 9, 255))
    image.putalpha(Image.fromarray(alpha.T.copy()))
    return image


def test_texts_in_the_pixels(tmp_path):
    text = web().encode()
    novel = json.dumps({"Software": "NovelAI", "Description": "a cat", "Comment": json.dumps(NOVEL)}).encode()
    plain, compressed = b"stealth_pnginfo", b"stealth_pngcomp"
    for signature, body in ((plain, text), (compressed, gzip.compress(text)), (compressed, gzip.compress(novel))):
        hide(signature, body).save(tmp_path / "a.png")
        recipe = read_request(tmp_path / "a.png")
        assert (recipe.request.prompt, recipe.request.params.seed) == (("a cat",), 5)
    info = PngImagePlugin.PngInfo()  # saved again by another program
    info.add_text("Comment", "Created with GIMP")
    info.add_text("prompt", "{}")
    hide(plain, text).save(tmp_path / "a.png", pnginfo=info)
    assert read_request(tmp_path / "a.png").request.params.seed == 5
    for body in (text, gzip.compress(b"a" * (8 << 20))):  # damaged; one that would become large
        hide(compressed, body).save(tmp_path / "a.png")
        with pytest.raises(ImageFileError, match=r"no generation settings|is missing"):
            read_request(tmp_path / "a.png")
