"""Recipes: the texts of every program are read right, and our own images come back to the bit."""

from __future__ import annotations

import json
import struct
import time
import zlib
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sd import read_request
from sd.imaging.files import ImageFileError, save_png
from sd.messages import one_line
from sd.params import HighRes, Inpaint, SamplingParams, TextToImage
from sd.recipes import describe, read_parameters, written
from sd.recipes import fields as table
from sd.recipes.comfyui import read_graph
from sd.recipes.containers import MAX_TEXT, user_comment
from sd.recipes.infotext import parse
from sd.recipes.json_texts import read_dream, read_invokeai, read_sd_metadata
from sd.recipes.other_programs import xmp_json
from sd.recipes.recipe import clean

SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, after: bool = False) -> bytes:
    """A PNG file of one pixel with these chunks before or after it."""
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0))
    pixels, end = chunk(b"IDAT", zlib.compress(b"\0\0")), chunk(b"IEND", b"")
    return b"".join([head, *((pixels, *chunks) if after else (*chunks, pixels)), end])


# ------------------------------------------------------------------------------------------------ the web UI's text

TEXTS = {
    "plain": (f"a house\nNegative prompt: a tree\n{SETTINGS}", "a house", "a tree", {"Seed": "5"}),
    "no negative": (f"a house\n{SETTINGS}", "a house", "", {"Size": "512x768"}),
    "empty prompt": (SETTINGS, "", "", {"Steps": "20"}),
    "lines": (f"a\nb, c\n\nNegative prompt: d\ne\n{SETTINGS}", "a\nb, c", "d\ne", {}),
    "looks like settings": (
        f"Steps: 3, Sampler: x, Seed: 9\nmore\n{SETTINGS}",
        "Steps: 3, Sampler: x, Seed: 9\nmore",
        "",
        {"Seed": "5"},
    ),
    "steps in a prompt": (f"wide Steps: 20 stairs\n{SETTINGS}", "wide Steps: 20 stairs", "", {"Steps": "20"}),
    "unicode": (f"東京 🎨, naïve\nNegative prompt: Ω\n{SETTINGS}", "東京 🎨, naïve", "Ω", {}),
    "quoted": (
        f'a\n{SETTINGS}, ADetailer prompt: "face: \\"x\\",\\nsecond", Version: v1.10.1',
        "a",
        "",
        {"ADetailer prompt": 'face: "x",\nsecond', "Version": "v1.10.1"},
    ),
    "a line break in quotes": (f'a\n{SETTINGS}, X: "b,\nc: d", Y: 1', "a", "", {"X": "b,\nc: d", "Y": "1"}),
    "json": (
        f'a\n{SETTINGS}, Hashes: {{"model": "abc", "lora:x": "d"}}, Civitai resources: [{{"a": 1, "b": 2}}], Z: 2',
        "a",
        "",
        {"Hashes": '{"model": "abc", "lora:x": "d"}', "Civitai resources": '[{"a": 1, "b": 2}]', "Z": "2"},
    ),
    "broken json": (f'a\n{SETTINGS}, Hashes: {{"model": "abc, Z: 2', "a", "", {"Z": "2"}),
    "template": (
        f"a cat\n{SETTINGS}\nTemplate: a {{cat|dog}}, Seed: 3\nNegative Template: x",
        "a cat",
        "",
        {"Seed": "5"},
    ),
    "two lines of settings": (
        f"a\n{SETTINGS},\nDenoising strength: 0.4,\nHires upscale: 2",
        "a",
        "",
        {"Denoising strength": "0.4", "Hires upscale": "2"},
    ),
    "one line": ("a house, Steps: 20, Sampler: Euler, Seed: 4", "a house,", "", {"Seed": "4"}),
    "another order": ("a\nSampler: Euler, Seed: 4, Size: 64x64", "a", "", {"Seed": "4"}),
    "windows": (f"a\r\nNegative prompt: b\r\n{SETTINGS}\r\n", "a", "b", {"Size": "512x768"}),
    "used embeddings": (f"a\n{SETTINGS}\nUsed embeddings:  b [1], c", "a", "", {"Used embeddings": "b [1], c"}),
    "only a prompt": ("a house, a tree: green", "a house, a tree: green", "", {}),
    "nothing": ("", "", "", {}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_parts_of_a_text(name):
    text, prompt, negative, pairs = TEXTS[name]
    found = parse(text)
    assert (found.prompt, found.negative) == (prompt, negative)
    assert found.pairs | pairs == found.pairs and bool(found.pairs) == ("Steps" in text or "Sampler" in text)


def read(more: str = "", sampler: str = "Euler a", head: str = "a cat"):
    return read_parameters(f"{head}\nSteps: 20, Sampler: {sampler}, CFG scale: 7, Seed: 5, Size: 512x768{more}")


# (more settings, sampler) -> settings of the request, words of the notes
VALUES = [
    (
        ("", "Euler a"),
        {
            "sampler": "euler_a",
            "spacing": "linspace",
            "steps": 20,
            "guidance": 7.0,
            "seed": 5,
            "width": 512,
            "height": 768,
            "rng": "nv",
        },
        "",
    ),
    (("", "DPM++ 2M Karras"), {"sampler": "dpmpp_2m", "spacing": "karras"}, ""),
    (("", "DPM++ 2M"), {"sampler": "dpmpp_2m", "spacing": "linspace"}, ""),
    ((", Schedule type: Automatic", "DPM++ 2M"), {"spacing": "karras"}, ""),
    ((", Schedule type: Automatic", "DPM++ 2M SDE"), {"spacing": "exponential"}, "Brownian"),
    ((", Schedule type: Exponential", "DPM++ 2M"), {"spacing": "exponential"}, ""),
    ((", Schedule type: Simple", "Euler"), {"spacing": "trailing"}, ""),
    ((", Schedule type: SGM Uniform", "Euler"), {"spacing": "sgm"}, "close"),
    ((", Schedule type: Align Your Steps", "Euler"), {"spacing": "linspace"}, "grid Align Your Steps is not available"),
    (("", "DPM++ 3M SDE"), {"sampler": None}, "sampler DPM++ 3M SDE is not available"),
    (("", "PLMS"), {"sampler": "plms", "spacing": "leading"}, ""),
    ((", RNG: CPU", "Euler"), {"rng": "torch-cpu"}, ""),
    ((", RNG: NV", "Euler"), {"rng": "nv"}, ""),
    ((", RNG: dice", "Euler"), {"rng": "torch-cpu"}, "random numbers dice"),
    ((", Clip skip: 2, ENSD: 31337", "Euler"), {"clip_skip": 2, "noise_seed_delta": 31337}, ""),
    (
        (", Variation seed: 9, Variation seed strength: 0.25", "Euler"),
        {"variation_seed": 9, "variation_strength": 0.25},
        "",
    ),
    ((", Variation seed strength: 0.25", "Euler"), {"variation_strength": 0.0}, "its seed is missing"),
    ((", CFG Rescale: 0.7, Tiling: True", "Euler"), {"guidance_rescale": 0.7, "tileable": True}, ""),
    ((", Eta DDIM: 0.5", "DDIM"), {"options": {"eta": 0.5}}, ""),
    ((", Eta: 0.5", "Euler a"), {"options": {}}, "has no such setting"),
    (
        (", Gamma: 0.5, Schedule type: Lcm, Version: sd 1.0", "TCD"),
        {"sampler": "tcd", "spacing": "lcm", "options": {"gamma": 0.5}},
        "",
    ),
    ((", Gamma: 1.5", "TCD"), {"options": {}}, "Gamma is left out: gamma must be in [0, 1], got 1.5"),
    ((", Gamma: 0.5", "LCM"), {"options": {}}, "Gamma 0.5 is left out: LCM has no such setting"),
    (
        (", Version: f2.0.1v1.10.1-previous-224-g90019688, Module 1: vae", "Euler"),
        {"rng": "nv"},
        "not reproduced: Module 1",
    ),
    (
        (
            ", App: SD.Next, Version: 8b73cb6, Pipeline: StableDiffusionPipeline, CFG rescale: 0.5",
            "Euler",
        ),
        {"guidance_rescale": 0.5, "rng": "nv", "spacing": None},
        "SD.Next writes no RNG",
    ),
    ((", Version: ComfyUI", "dpmpp_2m_sde_gpu"), {"rng": "comfy", "sampler": "dpmpp_2m_sde"}, "Brownian"),
    (
        (", ADetailer model: face.pt, ADetailer confidence: 0.3, NGMS: 3", "Euler"),
        {},
        "not reproduced: ADetailer, NGMS",
    ),
    ((', ControlNet 0: "Module: x, Model: y"', "Euler"), {}, "not reproduced: ControlNet 0"),
    (
        (", Face restoration: CodeFormer, Refiner: xl", "Euler"),
        {"refiner_from": None},
        "not reproduced: Face restoration",
    ),
    (
        (", Denoising strength: 0.4, Hires upscale: 1, Hires steps: 3", "Euler"),
        {"width": 512},
        "second pass is left out",
    ),
    ((", Steps: 9999", "Euler"), {"steps": None}, "9999 is not from 1 to 1000"),
    ((", CFG scale: 1e999", "Euler"), {"guidance": None}, "CFG scale is left out"),
    ((", CFG scale: nan", "Euler"), {"guidance": None}, "CFG scale is left out"),
    ((", Seed: 18446744073709551616", "Euler"), {"seed": 0}, "from 0 to 2^64"),
    ((", Seed: ١٢", "Euler"), {"seed": 0}, "not a number"),
    ((", Size: 513x768", "Euler"), {"width": 512}, "not a multiple of 8"),
    ((", Size: 99999x64", "Euler"), {"width": None, "height": 64}, "not from 8 to"),
    ((", Clip skip: two", "Euler"), {"clip_skip": None}, "Clip skip is left out"),
]


@pytest.mark.parametrize(("given", "wanted", "note"), VALUES, ids=lambda value: str(value)[:40])
def test_values_of_the_web_ui(given, wanted, note):
    recipe = read(*given)
    both = {f.name: getattr(recipe.request.params, f.name) for f in fields(SamplingParams)}
    both |= {f.name: getattr(recipe.request, f.name) for f in fields(TextToImage)}
    assert both | wanted == both
    assert recipe.kind == "txt2img" and recipe.request.prompt == ("a cat",)
    assert (note in " ".join(recipe.notes)) if note else recipe.notes == ()
    assert all(line.isprintable() for line in recipe.notes)


def test_loras_embeddings_and_hashes():
    more = ', Model hash: 45DEE52B, Model: "my, model", Lora hashes: "ink: aa11bb22cc33, more details: ff00ff00ff00"'
    recipe = read(more + ', TI hashes: "bad-hands: 5e40d722fc3d"', head="a <lora:ink:0.5>cat <lora:more details:-1.25>")
    assert recipe.request.prompt == ("a cat",)
    assert recipe.loras == (("ink", 0.5, "aa11bb22cc33"), ("more details", -1.25, "ff00ff00ff00"))
    assert recipe.embeddings == (("bad-hands", 1.0, "5e40d722fc3d"),)
    assert recipe.model == ("my, model", 1.0, "45dee52b")
    two = read(head="a cat <lora:x:0.5:0.7> <lora:y>, <hypernet:z:1> <lora:../../etc/w:1>")
    assert [lora[:2] for lora in two.loras] == [("x", 0.5), ("y", 1.0), ("w", 1.0)]
    assert "several weights" in two.notes[0] and "hypernetwork z" in two.notes[1]


def test_kinds_of_the_web_ui():
    recipe = read(
        ", Denoising strength: 0.6, Init image hash: abc, Mask blur: 4, Masked content: latent noise, "
        "Inpaint area: Only masked, Masked area padding: 16"
    )
    assert recipe.kind == "inpaint"
    assert dict(recipe.task) == {"strength": 0.6, "blur": 4.0, "content": "noise", "margin": 16}
    image = Image.new("RGB", (8, 8))
    request = recipe.with_image(image, image.convert("L"))
    assert isinstance(request, Inpaint) and (request.strength, request.margin, request.content) == (0.6, 16, "noise")
    plain = read(", Denoising strength: 0.6")
    assert plain.kind == "img2img" and plain.with_image(image).strength == 0.6


def test_a_second_pass():
    web = ", Denoising strength: 0.4, Hires upscale: 1.5, Hires steps: 9, Hires upscaler: Latent, Hires sampler: DDIM"
    recipe, request = read(web), read(web).request
    assert (
        isinstance(request, HighRes) and recipe.kind == "hires" and (request.params.width, request.hires) == (512, 1.5)
    )
    assert (request.hires_strength, request.hires_steps, request.hires_upscaler) == (0.4, 9, "latent")
    assert recipe.notes == ("not reproduced: hires sampler",)
    recipe = read(", Denoising strength: 0.4, Hires resize: 1024x1536, Hires upscaler: R-ESRGAN 4x+, Hires steps: 0")
    assert (recipe.request.hires, recipe.request.hires_steps, recipe.request.hires_upscaler) == (2.0, None, "lanczos")
    assert "R-ESRGAN 4x+ is not available" in recipe.notes[0]
    old = read_parameters(
        "a\nSteps: 20, Sampler: Euler, Seed: 1, Size: 1024x1024, Denoising strength: 0.7, First pass size: 512x512"
    )
    assert (old.request.params.width, old.request.hires) == (512, 2.0)
    pairs = describe(request, replace(request.params, spacing="karras"), (512, 768)) | {"Version": "sd 1"}
    assert read_parameters(written("a cat", "", pairs)).request == replace(
        request, params=replace(request.params, spacing="karras")
    )


# ------------------------------------------------------------------------------------------------------- the files


def test_texts_in_png_files(tmp_path):
    text = f"a naïve cat\n{SETTINGS}"
    latin, utf8 = text.encode("latin-1"), text.encode()
    for i, data in enumerate(
        (
            png(chunk(b"tEXt", b"parameters\0" + latin)),
            png(chunk(b"tEXt", b"parameters\0" + utf8)),
            png(chunk(b"tEXt", b"parameters\0" + latin), after=True),
            png(chunk(b"zTXt", b"parameters\0\0" + zlib.compress(latin)), after=True),
            png(chunk(b"iTXt", b"parameters\0\0\0en\0x\0" + utf8)),
            png(chunk(b"tEXt", b"Software\0x"), chunk(b"tEXt", b"UserComment\0" + utf8)),
            png(chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(utf8))),
            png(chunk(b"tEXt", b"parameters\0" + latin), after=True)[:-20],  # the end is missing
            png(chunk(b"tEXt", b"workflow\0" + b"x" * (2 << 20)), chunk(b"tEXt", b"parameters\0" + latin)),
        )
    ):
        path = tmp_path / f"{i}.png"
        path.write_bytes(data)
        assert read_request(path).request.prompt == ("a naïve cat",), i


def test_texts_in_exif(tmp_path):
    text = f"a naïve cat\n{SETTINGS}"
    for i, (comment, kind) in enumerate(
        (
            (b"UNICODE\0" + text.encode("utf-16-be"), "JPEG"),
            (b"UNICODE\0" + text.encode("utf-16-le"), "WEBP"),
            (b"UNICODE\0" + text.encode("utf-16"), "JPEG"),
            (b"ASCII\0\0\0" + text.encode(), "WEBP"),
            (text.encode(), "JPEG"),
        )
    ):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        path = tmp_path / f"{i}.{kind.lower()}"
        Image.new("RGB", (8, 8)).save(path, kind, exif=exif)
        recipe = read_request(path)
        assert recipe.request.prompt == ("a naïve cat",) and recipe.request.params.steps == 20
    assert user_comment(b"UNICODE\0" + "東京".encode("utf-16-be"), big=True) == "東京"
    for comment in (b"UNICODE\0" + text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be")):
        assert user_comment(comment) == text
    exif = Image.Exif()
    exif[0x010E] = text.encode()  # ImageDescription, which Pillow reads as Latin-1
    Image.new("RGB", (8, 8)).save(tmp_path / "description.jpg", exif=exif)
    assert read_request(tmp_path / "description.jpg").request.prompt == ("a naïve cat",)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + json.dumps({"prompt": GRAPH}).encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / "graph.jpg", exif=exif)
    assert read_request(tmp_path / "graph.jpg").request.params.seed == 7
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(GRAPH)
    Image.new("RGB", (8, 8)).save(tmp_path / "comfy.webp", exif=exif)
    assert read_request(tmp_path / "comfy.webp").request.params.seed == 7


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text(f"\ufeffa cat\n{SETTINGS}", encoding="utf-8")
    assert read_request(tmp_path / "a.txt").request.params.sampler == "euler_a"
    (tmp_path / "a.json").write_text(json.dumps(GRAPH))
    assert read_request(str(tmp_path / "a.json")).request.params.seed == 7


BOMB = zlib.compress(b"a" * (8 << 20))
REFUSED = {
    "nothing.png": (png(), "no generation settings found"),
    "prompt.png": (png(chunk(b"tEXt", b"parameters\0a cat")), "'Steps: ' is missing"),
    "bomb.png": (png(chunk(b"zTXt", b"parameters\0\0" + BOMB)), "no generation settings"),
    "deep.png": (png(chunk(b"tEXt", b"prompt\0" + b'{"a":' * 50_000)), "nested too deeply"),
    "other.png": (png(chunk(b"tEXt", b'parameters\0{"a\x1b[31m": 1}')), "JSON"),
    "node.png": (png(chunk(b"tEXt", b'prompt\0{"1": {"class_type": "SaveImage", "inputs": {}}}')), "no sampler"),
    "novel.png": (png(chunk(b"tEXt", b"Software\0NovelAI")), "no generation settings found"),
    "broken.jpg": (b"\xff\xd8\xff\xe1\0\x10Exif\0\0MM\0*", "damaged"),
    "big.txt": (b"a" * (MAX_TEXT + 1), "too large"),
    "\x1b[31m.png": (png(), "no generation settings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_without_a_recipe_are_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(REFUSED[name][0])
    with pytest.raises(ImageFileError, match=REFUSED[name][1]) as caught:
        read_request(tmp_path / name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    with pytest.raises(ImageFileError, match="no such file"):
        read_request(tmp_path / "missing.png")


def test_nothing_that_is_shown_controls_the_terminal():
    recipe = read(', Model: "x\x1b[2J", \x9bKey\x07: 1, \u202eX: 2', head="a\x1b[31m cat\x00")
    assert recipe.request.prompt == ("a[31m cat",)
    assert all(text.isprintable() for text in (*recipe.notes, recipe.model.name, *recipe.info, recipe.program))
    assert one_line("a\u202eb\n" * 100, 20).isprintable() and len(one_line("x" * 1000)) == 80


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "part", ['a:"', "a:{", 'x:{"a":', "\n", " ", "Steps: 1,", "<lora:", "a:[1,", "Negative prompt:", '"', "\\"]
)
def test_texts_are_read_in_linear_time(part, tmp_path):
    """A megabyte of anything; a quadratic reader would take hours."""
    parse(part * (MAX_TEXT // len(part)))
    parse("Steps: 1, a: " + part * (MAX_TEXT // len(part)))


def many_prompts(count):
    """A graph with many prompts that are combined, whose text encoder has many LoRAs."""
    chain = {f"a{i}": node("LoraLoader", clip=[f"a{i + 1}", 1], lora_name="a") for i in range(count)}
    texts = {f"b{i}": node("CLIPTextEncode", text="a", clip=["a0", 1]) for i in range(count)}
    both = node("ConditioningCombine", **{f"conditioning_{i}": [f"b{i}", 0] for i in range(count)})
    return graph(n6=both) | chain | texts


OURS = "a <lora:a:1>{}\nSteps: 1, Version: sd 1.0"
LONG = {
    "tags of our own": lambda: read_parameters(OURS.format(" <lora:a:1>" * 15_000 + "x")),
    "embeddings of a JSON text": lambda: read_parameters(
        f"a\nSteps: 1, Hashes: {json.dumps({f'embed:{i}': '' for i in range(15_000)})}"
    ),
    "blanks before a quote": lambda: parse(f'a\nSteps: 1\nUsed embeddings:{" " * 40_000}"'),
    "embeddings of a graph": lambda: read_graph(
        graph(n6={"text": " ".join(f"embedding:{i}" for i in range(15_000))})
    ),
    "tags of XML": lambda: xmp_json("<exif:UserComment><rdf:li>{" * 1600),
    "prompts with the same nodes above": lambda: read_graph(many_prompts(800)),
}  # fmt: skip


@pytest.mark.exhaustive
def test_a_graph_whose_samplers_follow_each_other_in_circles_is_refused():
    """The way from each image to each sampler is 4600 nodes long: the limit is on the nodes that are visited."""
    way = {f"a{i}": node("X", image=[f"a{i + 1}", 0]) for i in range(4600)}
    way["a4600"] = node("X", **{f"image_{i}": [f"b{i}", 0] for i in range(20)})
    samplers = {f"b{i}": node("KSampler", latent_image=["a0", 0]) for i in range(20)}
    with pytest.raises(ValueError, match="too many samplers"):
        read_graph(way | samplers | {f"c{i}": node("SaveImage", images=["a0", 0]) for i in range(50)})


@pytest.mark.parametrize("name", LONG)
def test_settings_are_read_in_linear_time(name):
    start = time.process_time()
    LONG[name]()
    assert time.process_time() - start < 1.2  # a quadratic reader takes at least two


# ------------------------------------------------------------------------------------------------------- ComfyUI

GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 7,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "euler_ancestral",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd\\v1-5.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat\n", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
}


def graph(**changed):
    """The graph with other inputs of its nodes ("3": {...}), or other nodes."""
    nodes = {name: {**node, "inputs": dict(node["inputs"])} for name, node in GRAPH.items()}
    for name, node in changed.items():
        name = name.removeprefix("n")
        if "class_type" in node:
            nodes[name] = node
        else:
            nodes[name]["inputs"] |= node
    return nodes


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def test_a_simple_graph():
    recipe = read_graph(GRAPH)
    params = recipe.request.params
    assert (recipe.request.prompt, recipe.request.negative, recipe.model.name) == (("a cat",), "text", "v1-5")
    assert (params.seed, params.steps, params.guidance, params.width, params.height) == (7, 20, 8.0, 512, 640)
    assert (params.sampler, params.spacing, params.rng, params.n) == ("euler_a", "linspace", "comfy", 1)
    assert recipe.notes == () and recipe.kind == "txt2img"


def test_loras_clip_skip_and_values_from_other_nodes():
    recipe = read_graph(
        graph(
            n3={"model": ["11", 0], "seed": ["20", 0]},
            n6={"clip": ["12", 0], "text": ["21", 0]},
            n5={"batch_size": 3},
            n10=node(
                "LoraLoader",
                lora_name="a/ink.safetensors",
                strength_model=0.5,
                strength_clip=0.5,
                model=["4", 0],
                clip=["4", 1],
            ),
            n11=node(
                "LoraLoader",
                lora_name="oil.safetensors",
                strength_model=1.0,
                strength_clip=0.2,
                model=["10", 0],
                clip=["10", 1],
            ),
            n12=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["11", 1]),
            n20=node("PrimitiveInt", value=99),
            n21=node("PrimitiveString", value="a (dog:1.2) embedding:bad-hands"),
        )
    )
    assert [lora[:2] for lora in recipe.loras] == [("ink", 0.5), ("oil", 1.0)]
    assert recipe.request.clip_skip == 2 and recipe.request.params.seed == 99 and recipe.request.params.n == 3
    assert recipe.embeddings[0].name == "bad-hands" and recipe.request.prompt == ("a (dog:1.2) embedding:bad-hands",)
    assert [
        word for word in ("oil has weight 0.2", "batch of 3", "weights words") if word in " ".join(recipe.notes)
    ].__len__() == 3


def test_custom_samplers():
    recipe = read_graph(
        graph(
            n3=node(
                "SamplerCustomAdvanced",
                noise=["30", 0],
                guider=["31", 0],
                sampler=["32", 0],
                sigmas=["33", 0],
                latent_image=["5", 0],
            ),
            n30=node("RandomNoise", noise_seed=12),
            n31=node("CFGGuider", model=["34", 0], positive=["6", 0], negative=["7", 0], cfg=4.5),
            n32=node("KSamplerSelect", sampler_name="dpmpp_2m"),
            n33=node("KarrasScheduler", steps=9, sigma_max=14.6, sigma_min=0.03, rho=7),
            n34=node("RescaleCFG", multiplier=0.7, model=["4", 0]),
        )
    )
    params = recipe.request.params
    assert (params.seed, params.guidance, params.sampler, params.spacing, params.steps) == (
        12,
        4.5,
        "dpmpp_2m",
        "karras",
        9,
    )
    assert (params.guidance_rescale, recipe.request.prompt, recipe.model.name) == (0.7, ("a cat",), "v1-5")


def test_later_passes_and_unknown_nodes_are_named():
    second = dict(GRAPH["3"]["inputs"]) | {
        "seed": 8,
        "steps": 10,
        "denoise": 0.5,
        "latent_image": ["40", 0],
        "model": ["41", 0],
    }
    recipe = read_graph(
        graph(
            n8={"samples": ["42", 0]},
            n42=node("KSampler", **second),
            n41=node("IPAdapter", model=["4", 0]),
            n40=node("LatentUpscale", samples=["3", 0], width=1024, height=1280),
            n3={"positive": ["43", 0]},
            n43=node("ControlNetApply", conditioning=["6", 0], strength=1.0),
        )
    )
    assert (recipe.request.params.seed, recipe.request.params.width, recipe.request.prompt) == (7, 512, ("a cat",))
    assert "steps 10, denoise 0.5, seed 8, LatentUpscale to 1024x1280" in " ".join(recipe.notes)
    assert "the nodes ControlNetApply" in " ".join(recipe.notes)


def test_graphs_from_an_image_of_two_images_and_with_cycles():
    recipe = read_graph(
        graph(
            n3={"latent_image": ["50", 0], "denoise": 0.5},
            n50=node("VAEEncode", pixels=["51", 0], vae=["4", 2]),
            n51=node("LoadImage", image="a.png"),
        )
    )
    assert (recipe.kind, dict(recipe.task), recipe.request.params.steps) == ("img2img", {"strength": 0.5}, 20)
    assert "--steps 40" in recipe.notes[0]
    cyclic = read_graph(
        graph(
            n4=node("LoraLoader", lora_name="x", strength_model=1.0, model=["4", 0], clip=["3", 0]),
            n6={"text": ["6", 0]},
        )
    )
    assert cyclic.request.params.seed == 7
    with pytest.raises(ValueError, match="nodes"):
        read_graph({str(i): node("A") for i in range(10_000)})


# ------------------------------------------------------------------------------------------------ InvokeAI, Fooocus


def test_invokeai(tmp_path):
    recipe = read_dream('"a cat [dog, x], (red)" -s 50 -S 2980747362 -W 512 -H 768 -C 5.5 -A k_lms -G 0.9 -U 4 0.95')
    params = recipe.request.params
    assert (recipe.request.prompt, recipe.request.negative) == (("a cat, (red)",), "dog, x")
    assert (params.seed, params.sampler, params.guidance, params.height, params.rng) == (
        2980747362,
        "lms",
        5.5,
        768,
        "nv",
    )
    assert recipe.notes == ("not reproduced: face restoration, upscaling",)
    recipe = read_invokeai(
        {
            "app_version": "3.0",
            "positive_prompt": "a cat",
            "negative_prompt": "dog",
            "scheduler": "dpmpp_2m_k",
            "seed": 3,
            "steps": 9,
            "cfg_scale": 6.5,
            "cfg_rescale_multiplier": 0.25,
            "width": 64,
            "height": 128,
            "rand_device": "cpu",
            "clip_skip": 1,
            "seamless_x": True,
            "seamless_y": True,
            "controlnets": [1],
            "model": {"model_name": "m"},
            "loras": [{"lora": {"model_name": "ink"}, "weight": 0.8}],
        }
    )
    params = recipe.request.params
    assert (params.sampler, params.spacing, params.guidance_rescale, params.rng) == (
        "dpmpp_2m",
        "karras",
        0.25,
        "torch-cpu",
    )
    assert (recipe.request.clip_skip, params.tileable, recipe.loras[0][:2], recipe.model.name) == (
        2,
        True,
        ("ink", 0.8),
        "m",
    )
    assert recipe.notes == ("not reproduced: controlnets",)
    image = {
        "prompt": [{"prompt": "a cat [dog]", "weight": 1.0}],
        "steps": 5,
        "cfg_scale": 7,
        "seed": 4,
        "sampler": "ddim",
        "width": 64,
        "height": 64,
    }
    recipe = read_sd_metadata(
        {"app_version": "2.2", "model_weights": "sd-1.5", "model_hash": "ab" * 32, "image": image}
    )
    assert (recipe.request.prompt, recipe.request.negative, recipe.request.params.sampler) == (
        ("a cat",),
        "dog",
        "ddim",
    )
    assert recipe.model == ("sd-1.5", 1.0, "ab" * 32)


def test_fooocus(tmp_path):
    values = {
        "prompt": "a cat",
        "negative_prompt": "dog",
        "steps": 30,
        "guidance_scale": 4,
        "sampler": "dpmpp_2m_sde_gpu",
        "scheduler": "karras",
        "seed": "6952411511246973023",
        "resolution": "(768, 1280)",
        "loras": [["ink.safetensors", 0.1, "abcdef"]],
        "base_model": "m",
        "base_model_hash": "aeb7e9e689",
        "version": "Fooocus v2.4.3",
    }
    data = png(
        chunk(b"tEXt", b"parameters\0" + json.dumps(values).encode()), chunk(b"tEXt", b"fooocus_scheme\0fooocus")
    )
    (tmp_path / "a.png").write_bytes(data)
    recipe = read_request(tmp_path / "a.png")
    params = recipe.request.params
    assert (params.seed, params.width, params.height, params.sampler) == (
        6952411511246973023,
        768,
        1280,
        "dpmpp_2m_sde",
    )
    assert (recipe.loras, recipe.program) == ((("ink", 0.1, "abcdef"),), "Fooocus v2.4.3")


# ------------------------------------------------------------------------------------------------------- our own texts

words = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n"), max_size=40)
odd = st.sampled_from(
    ["Negative prompt: x", "Steps: 3, Sampler: y, Seed: 2", " ", "\n", '"', "Template: z", "<lora:a:1>", ","]
)
prompts = st.lists(st.one_of(words, odd), max_size=4).map("\n".join)
PAIRS = {"Steps": 20, "Sampler": "DDIM", "Seed": 5, "Version": "sd 1"}


@settings(max_examples=150, deadline=None, database=None)
@given(prompts, prompts, words)
def test_any_prompt_is_read_back(prompt, negative, model):
    found = parse(text := written(prompt, negative, PAIRS | {"Model": model, "Version": "sd 1"}))
    assert (found.prompt, found.negative) == (clean(prompt), clean(negative))
    found.pairs.pop("Lora tags", None)
    assert found.pairs == {name: str(value) for name, value in (PAIRS | {"Model": model}).items()}
    for tags in ([], ["<lora:ink:0.5>"]):
        text = written(prompt, negative, PAIRS, tags)
        recipe = read_parameters(text)
        wanted = clean(prompt.rstrip()) if tags else clean(prompt)
        assert (recipe.request.prompt, recipe.request.negative) == ((wanted,), clean(negative))
        assert len(recipe.loras) == len(tags)


ENDS = ["a cat", "a <lora:x:2> cat", "a cat <lora:ink:1>", " <lora:x:1>  <lora:y:2>", "Steps: 3, Seed: 2 <lora:x:1>"]


@pytest.mark.parametrize("prompt", ENDS)
@pytest.mark.parametrize("loras", [(), (("ink", 0.5),), (("ink", 0.5), ("oil", -1.0))])
def test_tags_in_our_prompts_are_text(prompt, loras):
    """From Python, a prompt without web_ui_prompts may have them; only what was merged is read as LoRAs."""
    pairs = PAIRS | {"Lora hashes": ", ".join(f"{name}: aabbccddeeff" for name, _ in loras)}
    tags = [f"<lora:{name}:{weight}>" for name, weight in loras]
    text = written(prompt, "blurry <lora:ink:1>", pairs, tags)
    recipe = read_parameters(text)
    assert (recipe.request.prompt, recipe.request.negative) == ((prompt,), "blurry <lora:ink:1>")
    assert recipe.loras == tuple((*lora, "aabbccddeeff") for lora in loras) and recipe.notes == ()
    assert ("Lora tags" in text) == prompt.endswith(">")  # only where it is needed


def test_blanks_around_our_prompts_are_read_back_from_a_file(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", written(" a cat ", "", PAIRS))
    assert read_request(tmp_path / "a.png").request.prompt == (" a cat ",)


OTHER = {"int": 3, "float": 0.1 + 0.2, "bool": True}
CHOICES = {
    "sampler": "lms",
    "spacing": "exponential",
    "rng": "comfy",
    "posterior": "mode",
    "content": "noise",
    "fit": "pad",
}


def test_every_field_of_every_request_is_written_and_read(tmp_path):
    """A new field needs no line anywhere: it is written under its own name."""
    image = Image.new("RGB", (8, 8))
    inpaint = {"image": image, "mask": image.convert("L")}
    for cls, more in ((TextToImage, {}), (Inpaint, inpaint)):
        names = table.settings_of(cls) | table.settings_of(SamplingParams)
        chosen = {name: CHOICES.get(name, OTHER.get(kind)) for name, kind in names.items()}
        request = cls.of("a cat", "", **more, **{n: v for n, v in chosen.items() if v is not None}, order=3)
        params = replace(request.params, seed=2**64 - 1)
        pairs = describe(request, params, (512, 768)) | {"Version": "sd 1"}
        if more:
            pairs |= {"Mask": "x", "Generated size": "autoxauto"}
        recipe = read_parameters(written("a cat", "", pairs))
        assert recipe.notes == ()
        back = recipe.with_image(image, more["mask"]) if more else recipe.request
        for name in names:
            if name != "seed":
                assert getattr(back if hasattr(back, name) else back.params, name) == chosen[name], name
        assert back.params.options == {"order": 3} and back.params.seed == 2**64 - 1


def test_texts_agree_with_sd_parsers(tmp_path):
    """The package reads our images and those forms of others that it knows, and finds what we find."""
    sd_parsers = pytest.importorskip("sd_parsers")
    texts = [
        f"a house\nNegative prompt: a tree\n{SETTINGS}, Model hash: abc123, Model: m",
        f"a\nb\n{SETTINGS}, Model: m",
    ]
    request = TextToImage.of("a house", "a tree", seed=7, steps=9, guidance=3.25, sampler="DPM++ 2M Karras", rng="nv")
    texts.append(
        written("a house", "a tree", describe(request, request.params, (64, 64)) | {"Model": "m", "Version": "sd 1"})
    )
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.png"
        save_png(Image.new("RGB", (8, 8)), path, text)
        (theirs,), ours = sd_parsers.ParserManager().parse(path).samplers, read_request(path)
        params = ours.request.params
        assert [prompt.value for prompt in theirs.prompts] == list(ours.request.prompt)
        assert [prompt.value for prompt in theirs.negative_prompts] == [ours.request.negative][
            : bool(ours.request.negative)
        ]
        assert int(theirs.parameters["seed"]) == params.seed and int(theirs.parameters["steps"]) == params.steps
        assert float(theirs.parameters["cfg_scale"]) == params.guidance and theirs.model.name == ours.model.name
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    links = [
        [1, 4, 0, 3, 0, "MODEL"],
        [2, 6, 0, 3, 1, "CONDITIONING"],
        [3, 7, 0, 3, 2, "CONDITIONING"],
        [4, 5, 0, 3, 3, "LATENT"],
    ]
    info.add_text("workflow", json.dumps({"links": links}))
    Image.new("RGB", (8, 8)).save(tmp_path / "comfy.png", pnginfo=info)
    (theirs,), ours = (
        sd_parsers.ParserManager().parse(tmp_path / "comfy.png").samplers,
        read_request(tmp_path / "comfy.png"),
    )
    assert theirs.prompts[0].value == ours.request.prompt[0] and theirs.parameters["seed"] == ours.request.params.seed
