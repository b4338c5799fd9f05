"""Second prompts of SDXL: what they may say, the LoRAs they name, and the files they come from."""

from __future__ import annotations

import pytest
import torch
from common import TINY_XL, tiny_state
from conftest import loaded
from sdxl_common import PROMPT, guide_of, params

from scripts.common.checks import check_prompts
from scripts.common.prompt_loras import PromptLoras, all_texts, without_lora_tags
from sd import StableDiffusion
from sd.params import TextToImage


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))


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
