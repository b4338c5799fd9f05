"""Second prompts of SDXL: what they may say, the LoRAs they name, and the files they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from common import error
from sdxl_common import (
    PROMPT,
    SMALL_ARGS,
    finish,
    guide_of,
    model_files,
    params,
    pixels,
    tiny_refiner,
    tiny_xl,
)

from scripts import txt2img
from scripts.common.checks import check_prompts
from scripts.common.prompt_loras import PromptLoras
from sd import StableDiffusion, read_request
from sd.params import TextToImage, from_dict
from sd.request_texts import all_texts, without_lora_tags


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


@pytest.mark.exhaustive
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


def test_a_second_negative_prompt_has_the_rules_of_the_negative_one(base):
    """AND is a word in it, and a number at its end is text; not so in a prompt."""
    text = "fog AND mist :2"
    request = TextToImage("a cat", params(), "fog", web_ui_prompts=True, negative_2=text)
    check_prompts(request)
    wanted = base.encode_weighted(["fog"], second=[text])
    assert torch.equal(guide_of(base, request).uncond.context, wanted.hidden)
    for more in ({"negative_2": "[fog:mist:0.5]"}, {"prompt_2": text}):
        with pytest.raises(ValueError, match=f"{next(iter(more))} cannot have"):
            base.prepare(TextToImage("a cat", params(), "fog", web_ui_prompts=True, **more))


def test_loras_that_second_prompts_name(tmp_path):
    """They are found as those of the first ones, and taken out; without the web UI's syntax they are refused."""
    (tmp_path / "ink.safetensors").touch()
    texts = {"prompt_2": "a dog <lora:ink:0.5>", "negative_2": "red <lora:ink:1>"}
    request = TextToImage("a cat", params(), "fog", web_ui_prompts=True, **texts)
    loras = PromptLoras(tmp_path)
    with pytest.warns(UserWarning, match="<lora:ink:1> in the negative prompt is left out"):
        loras.look_up(request)
    assert [(lora.name, lora.weight) for lora in loras.of(request)] == [("ink", 0.5)]
    plain = without_lora_tags(request)
    assert (plain.prompt_2, plain.negative_2) == ("a dog ", "red ")
    assert all_texts(plain) == (("a cat", "a dog "), ("fog", "red "))
    assert all_texts(TextToImage("a cat", params(), prompt_2="")) == (("a cat", ""), ("",))
    with pytest.raises(ValueError, match=r"<lora:ink:0\.5> in the prompt: give the file instead"):
        loras.look_up(TextToImage("a cat", params(), prompt_2=texts["prompt_2"]))
    with pytest.raises(ValueError, match="give the folder of the file with --lora-dir"):
        PromptLoras(None).look_up(request)


def test_as_many_second_texts_as_texts(base):
    for encode in (base.encode_texts, base.encode_weighted):
        with pytest.raises(ValueError, match=r"second must be .*: got 1 text for 2 prompts"):
            encode(["a cat", "a dog"], second=["a cow"])


def test_a_conditioning_is_no_prompt(base):
    """Its context alone would not do either."""
    with pytest.raises(ValueError, match=r"or a list of texts, got a Conditioning: give the text$"):
        base.txt2img(base.conditioning(PROMPT))


# ------------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.exhaustive
def test_another_prompt_is_not_given_the_second_one_of_a_recipe(files, tmp_path):
    out = ("--out", str(tmp_path / "a.png"))
    assert txt2img.main(["a cat", "--ckpt", str(files["base"]), *SMALL_ARGS, "--prompt-2", "a dog", *out]) == 0
    like = ("--like", str(tmp_path / "a.png"), "--ckpt", str(files["base"]), "--out", str(tmp_path / "b.png"))
    assert txt2img.main(["a cow", *like]) == 0
    request = read_request(tmp_path / "b.png").request
    assert (request.prompt, request.prompt_2) == (("a cow",), None)


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
def test_second_prompts_that_are_empty_are_kept(files, tmp_path):
    """They say that the second text encoder reads nothing."""
    model, first, again = ("--ckpt", str(files["base"])), tmp_path / "a.png", tmp_path / "b.png"
    arguments = ("a cat", "--negative", "fog", "--prompt-2", "", "--negative-2", "", *model, *SMALL_ARGS)
    assert txt2img.main([*arguments, "--out", str(first)]) == 0
    request = read_request(first).request
    assert (request.prompt_2, request.negative_2) == ("", "")
    assert txt2img.main(["--like", str(first), *model, "--out", str(again)]) == 0
    assert np.array_equal(pixels(first), pixels(again))


LIKE_LINE = "like a.png by sd "


def said_of(args, capsys) -> tuple[str, list[str]]:
    """The line on what --like takes over, and the lines of warnings; the program succeeds."""
    capsys.readouterr()
    assert txt2img.main([*map(str, args)]) == 0
    printed = capsys.readouterr()
    (line,) = (line for line in printed.out.splitlines() if line.startswith(LIKE_LINE))
    return line, printed.err.splitlines()


@pytest.mark.exhaustive
def test_the_line_of_like_lists_what_is_taken(files, tmp_path, capsys):
    """Not the second prompts of a recipe that another prompt or negative prompt replaces."""
    model, image = ("--ckpt", files["base"]), tmp_path / "a.png"
    texts = ("--negative", "fog", "--prompt-2", "a dog", "--negative-2", "red")
    assert txt2img.main([*map(str, ("a cat", *texts, *model, *SMALL_ARGS, "--out", image))]) == 0
    like = ("--like", image, *model, "--out", tmp_path / "again")
    for more, listed in (
        ((), {"prompt_2 a dog", "negative fog", "negative_2 red"}),
        (("--prompt", "a cow"), {"negative fog", "negative_2 red"}),
        (("--negative", "mist"), {"prompt_2 a dog"}),
        (("--negative", "mist", "--negative-2", "blue"), {"prompt_2 a dog"}),
        (("--prompt", "a cow", "--negative", "mist"), set()),
    ):
        line, _ = said_of([*like, *more], capsys)
        parts = {part for part in line.split(", ") if part.startswith(("prompt_2", "negative"))}
        assert parts == listed, more


@pytest.mark.exhaustive
def test_second_prompts_of_a_recipe_are_left_out_where_there_is_one_text_encoder(files, tmp_path, capsys):
    """With a warning; one that is given is refused."""
    image, again = tmp_path / "a.png", tmp_path / "b.png"
    texts = ("--negative", "fog", "--prompt-2", "a dog", "--negative-2", "red", "--web-ui-prompts")
    assert txt2img.main([*map(str, ("a cat", *texts, "--ckpt", files["base"], *SMALL_ARGS, "--out", image))]) == 0
    like = ("--like", image, "--ckpt", files["refiner"], "--out", again)
    _, warned = said_of(like, capsys)
    left_out = "warning: a.png: prompt_2 and negative_2 left out, as tiny sdxl refiner has only one text encoder"
    assert warned.count(left_out) == 1
    request = read_request(again).request
    assert (request.prompt, request.negative) == (("a cat",), "fog")
    assert (request.prompt_2, request.negative_2) == (None, None)
    assert txt2img.main([*map(str, (*like[:4], "--prompt-2", "a cow", "--out", tmp_path / "c.png"))]) == 1
    assert "prompt_2 is for a second text encoder" in capsys.readouterr().err
