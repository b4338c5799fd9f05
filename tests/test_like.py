"""--like: our images come back to the bit, whatever they were made with; other programs' as far as it goes."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from common import TINY
from PIL import Image
from safetensors.torch import save_file

from scripts import img2img, inpaint, txt2img
from scripts.common import generate, like
from scripts.common.like import find_lora
from scripts.common.prompt_loras import LoraFolder
from sd import StableDiffusion, read_request
from sd.checkpoints.export import CONFIG_KEY, to_own
from sd.imaging.files import save_png
from sd.params import TextToImage
from sd.recipes import Addon, read_parameters

NAME = "lora_te_text_model_encoder_layers_0_mlp_fc1"
BASE = ("--steps", "2", "--seed", "7", "--height", "64", "--width", "64", "--dtype", "float32")
WEB = "Steps: 3, Sampler: DDIM, CFG scale: 4, Seed: 5, Size: 64x72"


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """A model, a LoRA, an embedding, a photo with transparency and a mask."""
    folder = tmp_path_factory.mktemp("files")
    own = to_own({name: network.state_dict() for name, network in tiny.items()})
    save_file(
        {key: tensor.contiguous() for key, tensor in own.items()},
        folder / "tiny.safetensors",
        {CONFIG_KEY: TINY.to_json()},
    )
    for i, name in enumerate(("ink", "oil"), start=1):
        lora = {f"{NAME}.lora_down.weight": torch.ones(2, 64) * i, f"{NAME}.lora_up.weight": torch.ones(256, 2) * 0.1}
        save_file(lora, folder / f"{name}.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(3, 64)}, "name": "x"}, folder / "toy.pt")
    photo = Image.radial_gradient("L").resize((88, 72)).convert("RGBA")
    photo.putalpha(Image.linear_gradient("L").resize((88, 72)))
    photo.save(folder / "photo.png")
    mask = Image.new("L", (88, 72))
    mask.paste(255, (20, 20, 50, 50))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def load():
    """Loading that keeps the small model for the next call, unless something is merged into it."""
    kept = {}

    def loaded(args, real):
        key = (args.ckpt, args.dtype)
        if args.lora or args.embedding or args.vae or key not in kept:
            model = real(args)
            if args.lora or args.embedding or args.vae:
                return model
            kept[key] = model
        return kept[key]

    return loaded


@pytest.fixture
def run(files, load, tmp_path, capsys, monkeypatch):
    """Runs a program beside those files; gives status, stdout, stderr, and the paths of the images made."""
    monkeypatch.chdir(files)
    real = generate.load
    monkeypatch.setattr(generate, "load", lambda args: load(args, real))

    def call(program, *args, model="tiny.safetensors"):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        given = ["--ckpt", model] if model else []
        with warnings.catch_warnings():
            status = program.main([*map(str, args), *given, "--device", "cpu", "--out", str(out)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err, sorted(out.glob("*.png")) if out.is_dir() else []

    return call


def same(first, second) -> bool:
    a, b = Image.open(first), Image.open(second)
    return a.size == b.size and a.tobytes() == b.tobytes() and a.text == b.text


# fmt: off
TEXT = (
    ("--sampler", "euler_a", "--spacing", "exponential", "--guidance", "3.3000000000000003"),
    ("--sampler", "ddim", "--eta", "0.1", "--web-ui-prompts", "--negative", "Steps: 1, Sampler: x, Seed: 2"),
    (
        "--web-ui-prompts", "--clip-skip", "2", "--rng", "nv", "--ensd", "31337", "--sampler", "euler_a",
        "--guidance-rescale", "0.7000000000000001", "--variation", "9:0.30000000000000004",
        "--negative", "[x|y] (b:1.2)", "--guidance-until", "0.6000000000000001",
    ),
    ("--tileable", "--exact", "--rng", "comfy", "--sampler", "dpmpp_2s_a", "--cache-interval", "2"),
    (
        "--hires", "1.5", "--hires-strength", "0.6000000000000001", "--hires-steps", "2", "--hires-upscaler", "latent",
        "--rng", "nv",
    ),
    ("--sampler", "lms", "--order", "2", "--guidance", "1"),
)
# fmt: on
IMAGE = (("--strength", "0.7", "--fit", "pad", "--posterior", "mode", "--background", "#102030"), ("--sampler", "heun"))
IMAGE += (("--match-colours", "--rng", "nv", "--tileable", "--strength", "0.6"),)
MASK = (
    ("--mask", "mask.png", "--mask-blur", "1.7", "--content", "noise", "--strength", "0.9", "--invert-mask"),
    ("--only-masked", "--margin", "9", "--content", "fill", "--strength", "0.6", "--background", "red"),
)
CASES = [(txt2img, options, ()) for options in TEXT]
CASES += [(img2img, options, ("photo.png",)) for options in IMAGE]
CASES += [(inpaint, options, ("photo.png", *(("mask.png",) if "--mask" in options else ()))) for options in MASK]


@pytest.mark.parametrize(
    ("program", "options", "images"), CASES, ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else ""
)
@pytest.mark.sampled(3)
def test_our_images_come_back_to_the_bit(run, program, options, images):
    words = ["a (cat:1.5),\nred ", *images[:1]]
    status, _, _, (made,) = run(program, *words, *BASE, *options)
    assert status == 0
    status, out, err, (again,) = run(program, *images, "--like", made)
    assert status == 0 and same(made, again)
    assert out.startswith(f"like {made.name} by sd ") and "00001.png" not in err


def test_adapters_come_back_to_the_bit(run):
    options = ("--lora", "oil.safetensors:-0.30000000000000004", "--lora", "ink.safetensors", "--embedding", "toy.pt")
    _, _, _, (made,) = run(txt2img, "a toy", *BASE, *options)
    _, _, err, (other,) = run(txt2img, "--like", made)
    assert "LoRA oil, weight -0.30000000000000004: give its file with --lora" in err and not same(made, other)
    assert "embedding toy: give its file with --embedding" in err
    given = ("--lora", "oil.safetensors", "--lora", "ink.safetensors", "--embedding", "toy.pt")
    status, _, err, (again,) = run(txt2img, "--like", made, *given)
    assert (status, err) == (0, "") and same(made, again)


def test_a_batch_comes_back_from_python_to_the_bit(run):
    _, _, _, made = run(txt2img, "a cat", *BASE, "--n", "3", "--batch-size", "3")
    recipe = read_request(made[2])
    assert (recipe.request.params.n, recipe.request.params.seed, recipe.position) == (3, 7, 2)
    model = StableDiffusion.load("tiny.safetensors", device="cpu", dtype=torch.float32)
    images = model.prepare(recipe.request).result().images
    assert images[recipe.position].tobytes() == Image.open(made[2]).tobytes()
    _, out, err, again = run(txt2img, "--like", made[2])
    assert len(again) == 1 and "seed 9" in out and err == ""


def test_the_embedded_model_and_odd_prompts(run):
    prompt = 'Negative prompt: "x"\nSteps: 3, Sampler: y, Seed: 2\n'
    _, _, _, (made,) = run(txt2img, prompt, "--steps", "1", "--seed", "3", model=None)
    status, _, _, (again,) = run(txt2img, "--like", made, model=None)
    assert status == 0 and same(made, again) and read_request(made).request.prompt == (prompt,)


def test_what_is_given_overrides_also_with_the_default(run):
    _, _, _, (made,) = run(
        txt2img, "a cat", *BASE, "--sampler", "ddim", "--eta", "0.5", "--negative", "x", "--guidance", "3"
    )
    _, _, _, (again,) = run(
        txt2img, "a dog", "--like", made, "--sampler", "euler", "--negative", "", "--width", "72", "--guidance", "7.5"
    )
    text = Image.open(again).text["parameters"]
    head = "a dog\nSteps: 2, Sampler: Euler, Schedule type: Linspace, CFG scale: 7.5, Seed: 7, Size: 72x64, "
    assert text.startswith(head)


def test_a_recipe_of_another_program(run, tmp_path):
    image = tmp_path / "web.png"
    save_png(
        Image.new("RGB", (8, 8)),
        image,
        f"a cat <lora:ink:0.5>\nNegative prompt: b\n{WEB}, Denoising strength: 0.5, Model: other, "
        "Model hash: 0123456789, ADetailer model: x, Version: v1.9.0",
    )
    status, out, err, (made,) = run(txt2img, "--like", image)
    assert status == 0 and Image.open(made).size == (64, 72)
    assert "by the web UI v1.9.0" in out and 'prompt "a cat"' in out and "seed 5" in out
    for words in (
        "not reproduced: ADetailer",
        "another model, other (0123456789), than tiny.safetensors",
        "LoRA ink, weight 0.5",
        "made by img2img, and txt2img will give a different image",
    ):
        assert words in err
    text = Image.open(made).text["parameters"]
    assert "Sampler: DDIM, Schedule type: Leading, CFG scale: 4, Seed: 5" in text and "\nNegative prompt: b\n" in text


@pytest.mark.parametrize("tags", [[], ["<lora:oil:0.5>"]])
def test_what_looks_like_a_tag_in_our_prompts_is_text(tags, tiny):
    """Only the LoRAs that were merged are read back from the metadata."""
    request = TextToImage.of("a <lora:ink:1>", "b <lora:ink:1>", steps=2, sampler="ddim", spacing="leading", guidance=3)
    params = request.params.resolved(TINY)
    model, digest = StableDiffusion(TINY, **tiny), SimpleNamespace(digits=lambda: "")
    source = SimpleNamespace(variation_seeds=())
    run = SimpleNamespace(model=model, request=request, params=params, is_guided=True, guides=[], source=source)
    addons = SimpleNamespace(tags=lambda: tags, about=lambda model, request: {})
    args = txt2img.parser().parse_args(["a cat"])
    result = SimpleNamespace(images=[Image.new("RGB", (64, 64))], seeds=[5])
    recipe = read_parameters(generate.Metadata(args, model, addons, digest, {}).describe(run, result, 0))
    assert (recipe.request.prompt, recipe.request.negative) == (("a <lora:ink:1>",), "b <lora:ink:1>")
    assert [lora.name for lora in recipe.loras] == ["oil"][: len(tags)]


def test_loras_of_a_recipe_are_found_in_a_folder_whatever_their_case(run, files, tmp_path):
    """Upper and lower case, and signs that a tag cannot have."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for name, copy in (("ink", "Ink"), ("oil", "oil, thick")):
        (folder / f"{copy}.safetensors").write_bytes((files / f"{name}.safetensors").read_bytes())
    nodes = {"model": ["2", 0], "positive": ["3", 0], "latent_image": ["5", 0]}
    entries = {
        f"lora_{i}": {"on": True, "lora": f"{n}.pt", "strength": 0.5} for i, n in enumerate(("ink", "Oil, thick"))
    }
    graph = {
        "1": {"class_type": "KSampler", "inputs": {"steps": 1, "cfg": 2, "sampler_name": "euler", "seed": 1, **nodes}},
        "2": {"class_type": "Power Lora Loader (rgthree)", "inputs": entries},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat <lora:none:1>", "clip": ["2", 1]}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    }
    (tmp_path / "a.json").write_text(json.dumps(graph))
    status, _, err, (made,) = run(txt2img, "--like", tmp_path / "a.json", "--lora-dir", folder)
    assert status == 0 and "give its file" not in err
    assert "<lora:Ink:0.5> <lora:oil thick:0.5>" in Image.open(made).text["parameters"]
    status, _, err, _ = run(txt2img, "--like", made, "--lora-dir", folder)
    assert status == 0 and "give its file" not in err


def test_another_initial_image_is_said(run, files, tmp_path):
    _, _, _, (made,) = run(img2img, "a cat", "photo.png", *BASE)
    _, _, err, _ = run(img2img, "mask.png", "--like", made)
    assert "the initial image is not the same file as that of 00001.png" in err
    assert "made by img2img" not in err
    status, _, err, made = run(img2img, "--like", tmp_path / "none.png", "photo.png")
    assert status == 1 and made == [] and "none.png: no such file" in err
    _, _, _, (bare,) = run(txt2img, "a", *BASE, "--no-metadata")
    status, _, err, made = run(txt2img, "--like", bare)
    assert status == 1 and made == [] and "--no-metadata" in err and err.count("\n") == 1


def test_paths_do_not_leak_into_metadata(run, files):
    full = ("--lora", files / "ink.safetensors", "--embedding", files / "toy.pt", "--vae", files / "tiny.safetensors")
    _, _, _, (made,) = run(
        inpaint, "toy", files / "photo.png", files / "mask.png", *BASE, *full, model=str(files / "tiny.safetensors")
    )
    assert str(files) not in Image.open(made).text["parameters"] and "/" not in Image.open(made).text["parameters"]


def test_a_lora_in_a_folder(files, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ink.safetensors").write_bytes((files / "ink.safetensors").read_bytes())
    folder = LoraFolder(tmp_path)
    assert find_lora(folder, Addon("ink")) == find_lora(folder, Addon("Ink")) == tmp_path / "sub" / "ink.safetensors"
    assert find_lora(folder, Addon("../sub/ink")) is None


def test_a_folder_of_a_lora_is_its_file(tmp_path):
    """The weight of the recipe is for the file in the folder, and the VAE's name is one whatever it begins with."""
    (tmp_path / "mine").mkdir()
    save_file({"a.lora_up.weight": torch.ones(1, 1)}, tmp_path / "mine" / "ink.safetensors")
    (tmp_path / "r.txt").write_text("a cat <lora:ink:0.5>\nSteps: 5, Sampler: Euler, VAE: default_anime.safetensors")
    args = txt2img.parser().parse_words(["--like", str(tmp_path / "r.txt"), "--lora", str(tmp_path / "mine")])
    args.named = {"like", "lora"}
    with pytest.warns(UserWarning, match="VAE default_anime: give its file with --vae"):
        like.take(args, TextToImage)
    assert args.lora == [f"{tmp_path / 'mine'}:0.5"]
