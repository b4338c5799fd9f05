"""The page and files: recipes of images, LoRAs, embeddings and models, the key, and the files of the page itself."""

from __future__ import annotations

import base64
import io
import shutil
import urllib.error
import urllib.request

import pytest
import torch
from page_common import DROP, FEW, HTML, READ_FILE, generated, png, shown, stored
from PIL import Image
from safetensors.torch import save_file
from server_browser import opened, serving, wait_until_loaded

from sd.config import POCKET
from sd.params import TextToImage
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource
from sd.server.settings import ServerSettings

pytestmark = pytest.mark.browser
KEY = "correct horse battery"


def test_a_dropped_image_fills_the_form(ready):
    ready.fill("#prompt", "mine")
    text = (
        f"{HTML} <lora:pocket-lcm:0.5> <lora:far:1>\nNegative prompt: fog\nSteps: 12, Sampler: Euler a, Schedule type: "
        "Karras, CFG scale: 5.5, Seed: 9007199254740993, Size: 96x64, Model: dreams, Variation seed: 7, Variation seed "
        "strength: 0.25, ENSD: 31337, Clip skip: 2, Hires upscale: 1.5, Hires upscaler: Lanczos, "
        "Denoising strength: 0.4"
    )
    ready.evaluate(DROP, ["#stage", "<b>old</b>.png", png(text)])
    ready.wait_for_selector("#recipe li")
    values = {
        "prompt": HTML, "negative": "fog", "steps": "12", "guidance": "5.5", "seed": "9007199254740993", "width": "96",
        "height": "64", "sampler": "euler_a", "spacing": "karras", "variation-seed": "7", "clip-skip": "2",
        "variation-strength": "0.25", "hires": "1.5", "hires-strength": "0.4",
    }  # fmt: skip
    found = {name: ready.input_value(f"#{name}") for name in values}
    assert found | {"prompt": found["prompt"].strip()} == values
    assert ready.is_checked("#hires-on") and not ready.is_checked("#fast") and ready.is_checked("#web-ui")
    said = ready.inner_text("#recipe")
    assert "<b>old</b>.png" in said and "does not have the LoRA far" in said and "the model dreams" in said
    assert "noise_seed_delta" in ready.text_content("#extra") and "31337" in ready.text_content("#extra")
    assert stored(ready)["loras"] == [{"name": "pocket-lcm", "weight": 0.5}]
    ready.click("#recipe button:has-text('Undo')")
    assert ready.input_value("#prompt") == "mine" and ready.is_checked("#fast")

    ready.expected_errors.append("422")
    ready.set_input_files("#recipe-file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no image"})
    ready.wait_for_selector("#recipe:has-text('Nothing was read from no.png')")
    assert ready.input_value("#prompt") == "mine"


@pytest.mark.exhaustive
def test_settings_of_a_recipe_give_its_image_again(ready, few_steps):
    request = TextToImage.of("two cats", seed=2**53 + 1, **{**FEW, "steps": 3})
    generated(ready, "two cats", seed=2**53 + 1, steps=3)
    data = ready.eval_on_selector("#result img.result", READ_FILE)
    (expected,) = few_steps.prepare(request).result().images
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == expected.tobytes()
    ready.click("#reset")
    ready.fill("#prompt", "")
    ready.evaluate(DROP, ["#form", "a.png", data])
    ready.wait_for_selector("#recipe:not([hidden])")
    assert ready.is_checked("#fast") and ready.input_value("#prompt").strip() == "two cats"
    ready.click("#go")
    ready.wait_for_selector("#gallery li:nth-child(2)")
    first, second = (shown(ready, f"#gallery li:nth-child({i}) img").tobytes() for i in (1, 2))
    assert first == second


@pytest.fixture(scope="module")
def well_stocked(tmp_path_factory):
    """A server with a key, two models, LoRAs and an embedding."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("models", "loras", "embeddings"):
        (folder / name).mkdir()
    shutil.copy(resource(EMBEDDED), folder / "models/second.safetensors")
    for name in ("ink", "<i>wash</i>".replace("/", "-")):
        shutil.copy(resource(EMBEDDED_LORA), folder / f"loras/{name}.safetensors")
    vectors = torch.ones(2, POCKET.text[0].width) / 8
    save_file({"emb_params": vectors}, folder / "embeddings/mood.safetensors")
    with serving(ServerSettings(port=0, api_key=KEY, **{path.name: path for path in folder.iterdir()})) as address:
        wait_until_loaded(address, KEY)
        yield address


@pytest.mark.exhaustive
def test_the_key_is_asked_for_and_never_stored(browser, well_stocked):
    with opened(browser, well_stocked) as page:
        page.expected_errors.append("401")
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#empty-about:has-text('needs its key')")
        page.reload()
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong horse")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-wrong", state="visible")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-models]")
        generated(page, "a kite")
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.body.innerHTML")


@pytest.mark.exhaustive
def test_loras_words_and_models_are_picked(browser, well_stocked):
    with opened(browser, well_stocked) as page:
        page.expected_errors += ["401", "503"]  # 503: tokens, while one model is being replaced by the other
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-models]")
        page.click("#fast-row")
        page.click("#loras-details summary")
        page.focus("#lora-search")
        assert page.locator("#lora-list li").count() == 2 and not page.locator("#lora-list i").count()
        page.keyboard.type("in")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.get_by_label("Weight of ink").fill("0.6")
        page.fill("#prompt", "a house")
        page.click("#embeddings button")
        assert page.input_value("#prompt") == "a house mood"
        page.wait_for_selector("#prompt-tokens:has-text('4 of 75 tokens')")  # it has two vectors
        page.fill("#steps", "3")
        with page.expect_request("**/api/generate") as sent:
            page.keyboard.press("Control+Enter")
        assert sent.value.post_data_json["loras"] == [{"name": "ink", "weight": 0.6}]
        page.wait_for_selector("#gallery li")
        page.get_by_label("Remove ink").click()
        assert stored(page)["loras"] == []

        page.select_option("#model", "second")
        page.wait_for_selector("#toast:has-text('second')")
        page.fill("#steps", "2")
        with page.expect_request("**/api/generate") as sent:
            page.keyboard.press("Control+Enter")
        assert sent.value.post_data_json["model"] == "second"
        page.wait_for_selector("#caption:has-text('second')")
        page.wait_for_selector("#embeddings button:not([disabled])")  # the word fits it as well
        assert not page.is_visible("#fast-row")  # its LoRA is for the embedded model


def test_files(server):
    with urllib.request.urlopen(f"{server}/") as answer:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        tag = answer.headers["ETag"]
        assert b"style=" not in answer.read()  # which the policy would refuse
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(urllib.request.Request(f"{server}/", headers={"If-None-Match": tag}))
    with urllib.request.urlopen(f"{server}/page/editor/editor.js") as answer:
        assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    for path in ("__init__.py", "../settings.py", "%2e%2e/settings.py", "editor", ""):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server}/page/{path}")
