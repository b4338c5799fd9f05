"""The page in a real browser: it generates the library's images, and nothing of a prompt becomes HTML."""

from __future__ import annotations

import base64
import io

import pytest
from page_common import FEW, HTML, generated, shown
from PIL import Image
from server_browser import opened

from sd import read_request
from sd.params import TextToImage

pytestmark = pytest.mark.browser


def test_images_are_the_librarys(ready, few_steps, tmp_path):
    generated(ready, "a red house in the snow", 2, seed=41, n=2)
    expected = few_steps.prepare(TextToImage.of("a red house in the snow", seed=41, n=2, **FEW)).result().images
    found = [shown(ready, f"#result button:nth-child({i}) img") for i in (1, 2)]
    assert [image.convert("RGB").tobytes() for image in found] == [image.tobytes() for image in expected]
    assert ready.inner_text("#caption").startswith("2 images · 4 steps · LCM · pocket")
    ready.click("#gallery button")  # the newest: the second
    assert ready.inner_text("#viewer .words") == "a red house in the snow"
    with ready.expect_download() as download:
        ready.click("#viewer [data-does=download]")
    assert download.value.suggested_filename == "a-red-house-in-the-snow-42.png"
    download.value.save_as(tmp_path / "a.png")
    recipe = read_request(tmp_path / "a.png")
    assert recipe.request.params.seed == 41 and recipe.position == 1  # the second of the two
    assert recipe.request.prompt == ("a red house in the snow",)
    assert Image.open(tmp_path / "a.png").convert("RGB").tobytes() == expected[1].tobytes()


@pytest.mark.exhaustive
def test_a_locked_seed_stays_and_another_does_not(ready):
    generated(ready, "a tree", seed="18446744073709551615")  # more than a number of JavaScript
    assert ready.get_attribute("#lock", "aria-pressed") == "true"
    generated(ready, "a tree", 2)
    first, second = (shown(ready, f"#gallery li:nth-child({i}) img").tobytes() for i in (1, 2))
    assert first == second and "Seed 18446744073709551615" in ready.inner_text("#caption")
    ready.click("#lock")
    generated(ready, "a tree", 3)
    assert shown(ready).tobytes() != first and ready.input_value("#seed") != "18446744073709551615"


@pytest.mark.exhaustive
def test_previews_while_it_denoises_then_stop_and_cancel(ready):
    ready.click("#fast-row")
    assert ready.input_value("#sampler") != "lcm"
    ready.fill("#prompt", "a castle")
    ready.fill("#steps", "150")
    ready.fill("#n", "4")
    ready.click("#go")
    ready.wait_for_selector("#result img.preview")
    first = ready.get_attribute("#result img.preview", "src")
    assert first.startswith("data:image/jpeg") and "of 150" in ready.inner_text("#progress-text")
    ready.wait_for_function("(first) => document.querySelector('#result img').src !== first", arg=first)
    ready.wait_for_selector("#go", state="hidden")
    ready.click("#stop")
    ready.wait_for_selector("#result img.result")
    assert "stopped early" in ready.inner_text("#caption")

    ready.keyboard.press("Control+Enter")
    ready.wait_for_selector("#result img.preview")
    ready.keyboard.press("Escape")
    ready.wait_for_selector("#result img.result")  # that before it
    assert ready.is_visible("#go") and ready.locator("#gallery li").count() == 4
    ready.wait_for_function("async () => (await (await fetch('/api/jobs')).json()).length === 0")


@pytest.mark.exhaustive
def test_the_place_in_the_queue_and_a_connection_that_breaks(ready):
    events = 'event: queued\r\ndata: {"id": "0",\r\ndata: "position": 3}\r\n\r\n: nothing\r\n\r\nevent: step\r\n'
    ready.route("**/api/generate", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    ready.click("#go")
    ready.wait_for_selector("#error", state="visible")
    assert ready.text_content("#progress-text") == "3 before it in the queue"
    assert "broke before the image was ready" in ready.inner_text("#error")
    assert ready.is_visible("#go") and ready.is_visible("#empty")
    ready.unroute("**/api/generate")
    generated(ready, "a duck")
    assert not ready.is_visible("#error")


def test_html_stays_text(ready):
    title = ready.title()
    generated(ready, HTML)
    ready.wait_for_selector("#prompt-tokens b")
    ready.click("#gallery button")
    assert ready.inner_text("#viewer .words") == HTML
    assert not ready.locator("img[onerror]").count() and ready.title() == title
    ready.keyboard.press("Escape")
    ready.reload()  # and from the gallery's store
    ready.wait_for_selector("#result img.result")
    assert ready.get_attribute("#gallery button", "title").startswith(HTML)
    assert not ready.locator("img[onerror]").count() and ready.title() == title


@pytest.mark.exhaustive
def test_tokens_that_are_cut_and_words_that_are_unknown(ready):
    ready.fill("#prompt", "a red blurgh house")
    ready.wait_for_selector("#prompt-tokens b")
    assert "of 75 tokens" in ready.inner_text("#prompt-tokens")
    assert ready.inner_text("#prompt-tokens b") == "blurgh"
    ready.click("#more-details summary")
    ready.uncheck("#web-ui")
    ready.fill("#prompt", "house " * 75 + "tree duck")
    ready.wait_for_selector("#prompt-tokens del")
    assert ready.inner_text("#prompt-tokens del").split() == ["tree", "duck"]
    ready.check("#web-ui")
    ready.wait_for_selector("#prompt-tokens:has-text('77 tokens in 2 parts of 75')")


@pytest.mark.exhaustive
def test_live_answers_a_slider_and_settings_survive_a_reload(ready):
    generated(ready, "a duck", seed=3)
    first = shown(ready).tobytes()
    ready.click("label:has(#live)")
    for steps in (2, 6):
        ready.locator("#steps-range").fill(str(steps))
        ready.wait_for_selector(f"#caption:has-text('{steps} step')")
    assert shown(ready).tobytes() != first
    assert ready.locator("#gallery li").count() == 2  # only the last answer of the slider is kept
    ready.reload()
    ready.wait_for_selector("body[data-models]")
    assert ready.input_value("#prompt") == "a duck" and ready.input_value("#seed") == "3"
    assert ready.input_value("#steps") == "6" and ready.is_checked("#live")
    assert ready.locator("#gallery li").count() == 2 and ready.is_visible("#result img.result")


def test_by_keyboard_alone(ready):
    for _ in range(30):  # to the prompt
        ready.keyboard.press("Tab")
        if ready.evaluate("document.activeElement.id") == "prompt":
            break
    ready.keyboard.type("a boat")
    for count in (1, 2):
        ready.keyboard.press("Control+Enter")
        ready.wait_for_selector(f"#gallery li:nth-child({count})")
    for _ in range(60):  # to the gallery
        ready.keyboard.press("Tab")
        if ready.evaluate("document.activeElement.closest('#gallery') !== null"):
            break
    focused = "document.activeElement.getAttribute('aria-label')"
    first = ready.evaluate(focused)
    ready.keyboard.press("ArrowRight")
    assert ready.evaluate(focused) != first and ready.evaluate(focused).startswith("a boat, seed ")
    ready.keyboard.press("Enter")
    ready.wait_for_selector("#viewer[open]")
    second = ready.get_attribute("#viewer img", "src")
    ready.keyboard.press("ArrowLeft")
    assert ready.get_attribute("#viewer img", "src") != second
    ready.keyboard.press("c")
    ready.wait_for_selector("#comparing:not([hidden])")
    ready.keyboard.press("Enter")
    ready.wait_for_selector("#compare[open]")
    for key, part in {"ArrowRight": "52", "End": "100", "Home": "0", "PageUp": "10"}.items():
        ready.keyboard.press(key)
        assert ready.get_attribute("#compare [role=slider]", "aria-valuenow") == part
    ready.keyboard.press("Escape")
    assert not ready.locator("dialog[open]").count()


@pytest.mark.exhaustive
def test_compare_by_pointer_use_settings_and_delete(ready):
    for count, prompt in enumerate(("a house", "a car"), 1):
        generated(ready, prompt, count)
    ready.click("#gallery li:nth-child(2) button")
    ready.click("#viewer [data-does=compare]")
    ready.click("#gallery li:nth-child(1) button")
    box = ready.locator("#compare [role=slider]").bounding_box()
    y = box["y"] + box["height"] / 2
    ready.mouse.move(box["x"] + box["width"] / 2, y)
    ready.mouse.down()
    ready.mouse.move(box["x"] + box["width"] / 4, y)
    ready.mouse.up()
    assert ready.get_attribute("#compare [role=slider]", "aria-valuenow") == "25"
    assert "inset(0px 75% 0px 0px)" in ready.eval_on_selector("#compare .over", "e => getComputedStyle(e).clipPath")
    ready.keyboard.press("Escape")

    ready.fill("#seed", "no seed")
    assert ready.get_attribute("#seed", "aria-invalid") == "true"
    ready.fill("#prompt", "other")
    assert ready.input_value("#seed").isdigit()
    ready.fill("#steps", "7")
    ready.click("#gallery li:nth-child(2) button")
    ready.click("#viewer [data-does=use]")
    ready.wait_for_selector("#toast:has-text('the seed locked')")
    assert ready.input_value("#prompt") == "a house" and ready.input_value("#steps") == "4"
    assert ready.get_attribute("#lock", "aria-pressed") == "true"
    ready.click("#toast button:has-text('Undo')")
    assert ready.input_value("#prompt") == "other"
    ready.focus("#gallery li:nth-child(1) button")
    ready.keyboard.press("Delete")
    ready.wait_for_selector("#gallery li:nth-child(2)", state="detached")
    assert ready.get_attribute("#gallery button", "title").startswith("a house")
    ready.click("#toast button:has-text('Undo')")
    ready.wait_for_selector("#gallery li:nth-child(2)")
    ready.click("#gallery-clear")
    ready.click("#ask-yes")
    ready.wait_for_selector("#empty", state="visible")
    assert not ready.is_visible("#gallery-section")


@pytest.mark.exhaustive
def test_high_resolution_and_errors_as_text(ready):
    ready.click("#hires-details summary")
    ready.click("label:has(#hires-on)")
    ready.fill("#hires", "1.5")
    generated(ready, "a moon")
    assert shown(ready).size == (192, 192)
    ready.expected_errors.append("422")
    ready.fill("#width", "4096")
    ready.fill("#height", "4096")
    ready.click("#go")
    ready.wait_for_selector("#error", state="visible")
    assert "pixels are too many" in ready.inner_text("#error") and ready.is_visible("#go")
    ready.fill("#width", "60")  # not a multiple of 8, and too few
    ready.focus("#prompt")
    assert ready.input_value("#width") == "64"


@pytest.mark.exhaustive
def test_an_image_of_the_gallery_is_edited(ready):
    generated(ready, "a red house", seed=5)
    before = shown(ready).convert("RGB")
    assert not ready.is_visible("#strength-field")
    ready.click("#caption button:has-text('Edit')")
    ready.wait_for_selector("#strength-field", state="visible")
    ready.fill("#prompt", "a blue house")
    ready.fill("#strength", "0")  # keeps the image
    with ready.expect_request("**/api/generate") as sent:
        ready.click("#go")
    ready.wait_for_selector("#gallery li:nth-child(2)")
    request = sent.value.post_data_json["request"]
    assert request["kind"] == "img2img" and request["strength"] == 0 and "width" not in request["params"]
    start = Image.open(io.BytesIO(base64.b64decode(request["image"].partition(",")[2])))
    assert start.convert("RGB").tobytes() == before.tobytes()
    ready.click("#tab-generate")
    assert not ready.is_visible("#strength-field")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("width", [1280, 768, 360])
def test_looks(browser, server, tmp_path, width):
    size = {"width": width, "height": 800}
    with opened(browser, server, viewport=size, color_scheme="light", has_touch=width < 500) as page:
        page.wait_for_selector("body[data-models]")
        page.click("#examples button")
        page.wait_for_selector("#result img.result")
        for name in ("loras", "hires", "more"):
            page.click(f"#{name}-details summary")
        backgrounds = set()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for view in ("edit", "inside", "generate"):
                page.click(f"#tab-{view}")
                page.screenshot(path=tmp_path / f"{width}-{scheme}-{view}.png", full_page=width < 1000)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, view
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
        page.click("#gallery button")
        page.screenshot(path=tmp_path / f"{width}-viewer.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.keyboard.press("Escape")
        page.click("#theme")  # from that of the system to light
        assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_all_fields_have_names(page):
    fields = "button, input:not([type=file]):not([aria-hidden]), select, textarea"
    unnamed = page.eval_on_selector_all(
        fields, "all => all.filter(e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map(e => e.id)"
    )
    assert unnamed == ["ask-yes"]  # which is named when it is shown
