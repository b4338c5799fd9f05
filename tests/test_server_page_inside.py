"""See inside, in a real browser: maps of words, the film, and sliders that answer with the library's images."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image
from server_browser import browser, opened, server  # noqa: F401

from sd import StableDiffusion
from sd.params import TextToImage

pytestmark = pytest.mark.browser
PROMPT = "a red house, a blue ball"
STEPS = 6


@pytest.fixture(scope="module")
def page(browser, server):  # noqa: F811
    """The view, with a run of a few steps without the few-step LoRA."""
    with opened(browser, server, viewport={"width": 1280, "height": 900}) as page:
        page.wait_for_selector("body[data-models]")
        page.locator("#fast-row").click()
        page.fill("#steps", str(STEPS))
        start(page)
        assert stills(page).count() == STEPS + 1
        yield page


@pytest.fixture(autouse=True)
def afresh(page):
    """Each test begins with the whole run, and no word that is kept."""
    yield
    page.mouse.move(0, 0)
    if page.get_by_role("button", name="Release words").is_visible():
        page.get_by_role("button", name="Release words").click()
    page.evaluate("document.activeElement.blur()")


def start(page, prompt=PROMPT, seed=3):
    page.wait_for_selector("body[data-models]")
    page.click("#tab-inside")
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.get_by_role("button", name="Look inside").click()
    done(page)


def done(page, steps=r"\d+"):
    """Wait for the end of a run of so many steps."""
    page.wait_for_selector('#inside[aria-busy="false"]')
    page.get_by_text(re.compile(rf"^{steps} steps? in \d+\.\d s$")).wait_for()


def slide(page, name, value):
    page.locator(f"#inside-{name}").fill(str(value))


def stills(page):
    return page.locator(".inside-still")


def selected(page):
    return page.locator('.inside-still[aria-selected="true"]').get_attribute("aria-label")


def shown(page, i=0):
    """The address of the large image."""
    return page.locator(".inside-frame img").nth(i).get_attribute("src")


def overlay(page, i=0):
    """What is drawn over the image; None for nothing."""
    found = page.locator(".inside-heat").nth(i).evaluate("canvas => canvas.toDataURL()")
    pixels = Image.open(io.BytesIO(base64.b64decode(found.split(",")[1])))
    return pixels.tobytes() if pixels.getbbox() else None


def word(page, text, which=0):
    return page.locator(".inside-word", has_text=re.compile(rf"^{text}\s*[\d<]")).nth(which)


def title(page, i=0):
    return page.locator(".inside-legend").nth(i).inner_text()


def test_pointing_at_words_lays_their_maps_over_the_image(page):
    assert overlay(page) is None
    word(page, "house").hover()
    house = overlay(page)
    assert house is not None and "house" in title(page) and re.search(r"\d+\.\d %", title(page))
    word(page, "ball").hover()
    ball = overlay(page)
    assert ball is not None and ball != house
    page.locator("#inside-opacity").fill("20")
    assert overlay(page) not in (ball, house)
    page.locator("#inside-opacity").fill("80")
    page.mouse.move(0, 0)
    assert overlay(page) is None
    shares = page.locator(".inside-share").all_inner_texts()
    total = sum(float(text.split()[-2]) for text in shares)
    words = re.search(r"words (\d+\.\d) %", page.locator(".inside-key").inner_text())
    assert total == pytest.approx(float(words.group(1)), abs=0.5)


@pytest.mark.exhaustive
def test_words_are_kept_and_compared(page):
    word(page, "house").click()
    page.mouse.move(0, 0)
    house = overlay(page)
    assert house is not None and page.locator(".inside-figure:visible").count() == 1
    word(page, "ball").click()
    page.mouse.move(0, 0)
    assert page.locator(".inside-figure:visible").count() == 2
    assert "house" in title(page, 0) and "ball" in title(page, 1) and overlay(page, 0) == house
    before = overlay(page, 1)
    page.get_by_role("button", name="Same scale").click()
    assert overlay(page, 1) != before
    page.get_by_role("button", name="Same scale").click()
    page.locator(".inside-frame").first.hover()
    assert "here" in title(page, 0) and "here" in title(page, 1)  # the same place on both
    word(page, "red").click()  # the oldest goes
    assert word(page, "house").get_attribute("aria-pressed") == "false"
    assert word(page, "red").get_attribute("aria-pressed") == "true"


@pytest.mark.exhaustive
def test_film_by_pointer_keys_and_playing(page):
    assert stills(page).count() == STEPS + 1 and selected(page).startswith("Result")
    result = shown(page)
    stills(page).nth(1).click()
    second = shown(page)
    assert selected(page) == f"Step 2 of {STEPS}" and second != result
    page.keyboard.press("ArrowRight")
    assert selected(page) == f"Step 3 of {STEPS}" and shown(page) != second
    assert f"3 of {STEPS}" in page.locator(".inside-facts").inner_text()
    assert f"Step 3 of {STEPS}" in page.locator(".inside-curve").get_attribute("aria-label")
    word(page, "house").click()
    page.mouse.move(0, 0)
    third = overlay(page)
    page.keyboard.press("Home")
    assert selected(page) == f"Step 1 of {STEPS}" and overlay(page) != third  # each step has maps of its own
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Noisy latent").click()
    noisy = shown(page)
    page.get_by_role("button", name="Noisy latent").click()
    assert shown(page) != noisy
    page.get_by_role("button", name="Play").click()
    page.locator('.inside-still[aria-selected="true"]', has_text="Result").wait_for()
    page.get_by_role("button", name="Play").wait_for()  # it has stopped
    assert shown(page) == result


@pytest.mark.exhaustive
def test_guidance_map(page):
    button = page.get_by_role("button", name="Guidance")
    button.click()
    whole = overlay(page)
    assert whole is not None and "Guidance" in title(page)
    page.locator(".inside-curve circle").nth(2).click()
    assert selected(page) == f"Step 3 of {STEPS}" and overlay(page) != whole
    page.keyboard.press("End")
    button.click()
    assert overlay(page) is None


def test_sliders_answer_with_the_librarys_images(page):
    asked = []
    page.on("request", lambda request: request.url.endswith("/api/inside") and asked.append(request))
    before = shown(page)
    for value in (5, 6.5, 8):  # only the last is answered
        slide(page, "guidance", value)
    page.wait_for_function("old => document.querySelector('.inside-frame img').src !== old", arg=before)
    done(page, STEPS)
    assert len(asked) == 1
    pixels = Image.open(io.BytesIO(base64.b64decode(shown(page).split(",")[1])))
    wanted = TextToImage.of(PROMPT, steps=STEPS, seed=3, guidance=8, width=128, height=128)
    assert pixels.tobytes() == StableDiffusion.load().prepare(wanted).result().images[0].tobytes()
    slide(page, "guidance", 4)  # as before: known
    page.wait_for_function("old => document.querySelector('.inside-frame img').src === old", arg=before)
    assert len(asked) == 1
    stills(page).nth(1).click()  # a step that was chosen stays
    second = shown(page)
    slide(page, "guidance", 8)
    page.wait_for_function("old => document.querySelector('.inside-frame img').src !== old", arg=second)
    assert selected(page) == f"Step 2 of {STEPS}" and len(asked) == 1
    slide(page, "guidance", 4)
    page.wait_for_function("old => document.querySelector('.inside-frame img').src === old", arg=second)
    stills(page).last.click()
    page.get_by_role("button", name="Use in the form").click()
    assert page.input_value("#steps") == str(STEPS) and page.input_value("#guidance") == "4"
    assert not page.locator("#fast").is_checked()


@pytest.mark.exhaustive
def test_keyboard_alone(page):
    word(page, "red").focus()
    page.keyboard.press("Tab")
    assert overlay(page) is not None and "house" in title(page)  # the next word
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator(".inside-figure:visible").count() == 2
    page.keyboard.press("ArrowLeft")
    assert selected(page) == f"Step {STEPS} of {STEPS}"
    page.keyboard.press("End")


@pytest.mark.exhaustive
def test_few_step_lora_and_cancelling_by_escape(page):
    few = page.locator("label:has(#inside-few)")
    few.click()
    done(page, 4)
    assert stills(page).count() == 5 and page.get_by_role("button", name="Guidance").is_disabled()
    few.click()
    slide(page, "steps", 50)
    page.get_by_role("button", name="Cancel").wait_for()
    page.get_by_text(re.compile("^Step ")).first.wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector('#inside[aria-busy="false"]')
    page.get_by_role("button", name="Cancel").wait_for(state="hidden")
    slide(page, "steps", STEPS)
    done(page, STEPS)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_phone(browser, server, scheme, tmp_path):  # noqa: F811
    size = {"width": 360, "height": 740}
    with opened(browser, server, viewport=size, color_scheme=scheme, has_touch=True, reduced_motion="reduce") as page:
        start(page, "a <b>red</b> house <img src=x onerror=alert(1)>")
        words = page.locator(".inside-word").all_inner_texts()
        assert (
            any(text.startswith("<") for text in words) and page.locator("#inside b, #inside img[src=x]").count() == 0
        )
        word(page, "house").tap()
        assert overlay(page) is not None and word(page, "house").get_attribute("aria-pressed") == "true"
        page.locator(".inside-facts").scroll_into_view_if_needed()
        box = page.locator(".inside-frame").first.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] < 740  # still in view
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.screenshot(path=tmp_path / f"{scheme}.png")
        assert word(page, "house").bounding_box()["height"] >= 40


@pytest.mark.exhaustive
def test_errors_are_shown(browser, server):  # noqa: F811
    with opened(browser, server, viewport={"width": 1280, "height": 900}) as page:
        page.expected_errors.append("503")
        page.wait_for_selector("body[data-models]")
        page.click("#tab-inside")
        page.route("**/api/inside", lambda route: route.fulfill(status=503, json={"status": 503, "message": "not now"}))
        page.get_by_role("button", name="Look inside").click()
        page.locator("#inside .alert", has_text="not now").wait_for()
        assert page.locator(".inside-results").is_hidden()
