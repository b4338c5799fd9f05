"""The editor of the page in a real browser: what is painted, dragged and drawn is what a request contains."""

from __future__ import annotations

import base64
import contextlib
import io

import numpy as np
import pytest
from editor_common import SIZE, decoded, grey, noise, painted, same
from PIL import Image
from server_browser import opened

pytestmark = pytest.mark.browser


def test_mouse_paints_the_mask(mount_editor):
    desk = mount_editor()
    desk.brush(11)
    line = desk.drag((20, 20), (60, 20), (60, 45))
    first = desk.mask()
    assert same(first, painted(SIZE, *line, width=11))
    assert first[20, 40] == 255 and first[50, 20] == 0
    value = desk.value()
    assert (decoded(value["image"]) == np.asarray(noise())).all()
    assert {name: value[name] for name in ("kind", "content", "blur", "margin")} == {
        "kind": "inpaint",
        "content": "original",
        "blur": 0,
        "margin": None,
    }
    desk.brush(30, 1)
    soft = np.maximum(first, painted(SIZE, *desk.drag((30, 40)), width=30, softness=1))
    assert same(desk.mask(), soft) and 100 < desk.mask()[40, 38] < 200
    desk.page.keyboard.press("x")
    desk.brush(15)
    erased = np.minimum(soft, 255 - painted(SIZE, *desk.drag((60, 30)), width=15))
    assert same(desk.mask(), erased) and desk.mask()[30, 60] == 0
    changes = desk.page.evaluate("changes")
    desk.page.keyboard.press("Control+z")
    assert same(desk.mask(), soft)
    desk.page.keyboard.press("Control+z")
    assert (desk.mask() == first).all() and desk.page.evaluate("changes") == changes + 2
    desk.click("Undo")
    assert not desk.mask().any() and desk.off("Undo")
    for keys in ("Control+Shift+z", "Control+y", "Control+Shift+Z"):
        desk.page.keyboard.press(keys)
    assert same(desk.mask(), erased) and desk.off("Redo")
    before = desk.mask()
    desk.click("Invert")
    assert (desk.mask() == 255 - before).all()
    desk.click("Fill")
    assert (desk.mask() == 255).all()
    desk.click("Clear")
    assert not desk.mask().any()
    desk.click("Undo")
    desk.click("Undo")
    assert (desk.mask() == 255 - before).all()


@pytest.mark.exhaustive
def test_zoom_and_pan_keep_the_place(mount_editor):
    desk = mount_editor()
    desk.brush(4)
    spot = 71.5, 22.5
    x, y = desk.at(*spot)
    desk.page.mouse.move(x, y)
    for _ in range(3):
        desk.page.mouse.wheel(0, -240)
    desk.page.mouse.down()
    desk.page.mouse.up()
    expected = painted(SIZE, desk.spot(*spot), width=4)
    assert same(desk.mask(), expected)
    desk.page.keyboard.down("Space")  # pans: nothing is painted
    desk.page.mouse.down()
    desk.page.mouse.move(x - 130, y + 57, steps=4)
    desk.page.mouse.up()
    desk.page.keyboard.up("Space")
    assert same(desk.mask(), expected)
    desk.click("Clear")
    desk.page.mouse.click(x - 130, y + 57)
    assert same(desk.mask(), expected)
    desk.page.keyboard.press("0")  # all of it again
    desk.click("Clear")
    desk.drag(spot)
    assert same(desk.mask(), expected)
    desk.page.mouse.move(x, y)
    desk.page.mouse.down(button="middle")
    desk.page.mouse.move(x + 40, y, steps=2)
    desk.page.mouse.up(button="middle")
    desk.page.mouse.click(*desk.at(40, 32))
    moved = desk.spot(40, 32)[0] - 40 / desk.scale, desk.spot(40, 32)[1]
    assert same(desk.mask(), np.maximum(expected, painted(SIZE, moved, width=4)))


@pytest.mark.exhaustive
def test_keyboard_paints(mount_editor):
    desk = mount_editor()
    desk.brush(8)
    desk.root.get_by_role("button", name="Clear").focus()
    desk.page.keyboard.press("Tab")  # the canvas
    desk.page.keyboard.down("Space")
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowDown"):
        desk.page.keyboard.press(key)
    desk.page.keyboard.up("Space")
    middle = 48.5, 32.5  # a quarter of the brush is 2 pixels
    assert same(desk.mask(), painted(SIZE, middle, (52.5, 32.5), (52.5, 33.5), width=8), 1)
    desk.page.keyboard.press("ArrowUp")
    desk.page.keyboard.press("]")
    desk.page.keyboard.press("Space")
    assert same(desk.mask()[:, 60:], np.zeros((64, 36)), 0)
    dab = painted(SIZE, (52.5, 31.5), width=9)
    assert (desk.mask() >= np.round(dab) - 1).all()
    desk.page.keyboard.press("Control+z")
    desk.page.keyboard.press("Control+z")
    assert not desk.mask().any()
    assert "x 52, y 31" in desk.root.locator(".ed-foot").inner_text()


@pytest.mark.exhaustive
def test_pen_pressure(mount_editor):
    desk = mount_editor()
    desk.brush(20)
    session = desk.page.context.new_cdp_session(desk.page)

    def pen(kind, point, force, button="left", buttons=1):
        x, y = desk.at(*point)
        send = {"type": kind, "x": x, "y": y, "button": button, "buttons": buttons, "force": force, "clickCount": 1}
        session.send("Input.dispatchMouseEvent", {**send, "pointerType": "pen"})

    def dab(point, force):
        pen("mousePressed", point, force)
        pen("mouseReleased", point, 0, buttons=0)

    dab((25.5, 32.5), 1)
    dab((70.5, 32.5), 0.25)
    strong, weak = (part > 127 for part in np.split(desk.mask(), 2, axis=1))
    assert strong[32].sum() in (19, 20, 21)
    assert 5 <= weak[32].sum() <= 9  # 0.15 of the size, and a quarter of the rest


@contextlib.contextmanager
def phone(browser, server, **options):
    size = {"width": 360, "height": 740}
    with opened(browser, server, viewport=size, has_touch=True, device_scale_factor=3, **options) as page:
        page.click("#tab-edit")
        yield page


@pytest.mark.exhaustive
def test_fingers(browser, server, mount_editor):
    with phone(browser, server) as page:
        desk = mount_editor("inpaint", noise(), page)
        desk.brush(8)
        desk.fitted(SIZE)
        session = page.context.new_cdp_session(page)

        def touch(kind, *points):
            at = [dict(zip("xy", desk.at(*point), strict=True), id=i) for i, point in enumerate(points)]
            session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": at})

        line = (20, 20), (40, 50)
        touch("Start", line[0])
        touch("Move", line[1])
        touch("End")
        drawn = desk.mask()
        assert same(drawn, painted(SIZE, *(desk.spot(*point) for point in line), width=8))
        touch("Start", (40, 32))  # two fingers zoom by 2 about (48, 32): nothing is painted
        touch("Start", (40, 32), (56, 32))
        touch("Move", (36, 32), (56, 32))
        touch("Move", (32, 32), (64, 32))
        touch("End", (32, 32))
        touch("Move", (20, 20))
        touch("End")
        assert (desk.mask() == drawn).all()
        desk.click("Clear")
        touch("Start", (64, 40))  # twice as far from (48, 32) as (56, 36)
        touch("End")
        # up to half a CSS pixel of each finger, and the edge of the brush is one pixel of the image
        assert same(desk.mask(), painted(SIZE, (56, 36), width=8), 60)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("document.querySelector('#editor canvas').width") == round(
            3 * desk.canvas.bounding_box()["width"]
        )
        assert desk.canvas.evaluate("e => getComputedStyle(e).touchAction") == "none"
        assert desk.root.evaluate("e => getComputedStyle(e).touchAction") == "auto"


@pytest.mark.exhaustive
def test_frame_is_dragged(mount_editor):
    desk, (wide, high) = mount_editor("outpaint"), SIZE
    pixels = np.asarray(noise())
    desk.drag((wide, 32), (wide + 19, 30))  # the right side: 16 or 24, the nearer one
    value = desk.value()
    image, mask = decoded(value["image"]), grey(value["mask"])
    assert image.shape == (high, wide + 16, 3) and mask.shape == (high, wide + 16)
    assert (image[:, :wide] == pixels).all() and (image[:, wide:] == pixels[:, -1:]).all()
    overlap = 8  # an eighth of the smaller side
    ramp = np.round(255 * (1 - (np.arange(overlap) + 0.5) / overlap))
    assert (mask[:, wide:] == 255).all() and not mask[:, : wide - overlap].any()
    assert (np.abs(mask[:, wide - overlap : wide] - ramp[::-1]) <= 1).all()
    desk.click("Fit")
    desk.fitted((wide + 16, high))
    desk.drag((0, 0), (-8, -13))  # the corner
    image = decoded(desk.value()["image"])
    assert image.shape == (high + 16, wide + 24, 3) and (image[16:, 8 : 8 + wide] == pixels).all()
    assert (image[:16, :8] == pixels[0, 0]).all() and (image[:16, 8 : 8 + wide] == pixels[0]).all()
    assert [desk.root.get_by_label(side).input_value() for side in ("Left", "Top", "Right", "Bottom")] == [
        "8",
        "16",
        "16",
        "0",
    ]
    desk.page.keyboard.press("Control+z")
    assert decoded(desk.value()["image"]).shape == (high, wide + 16, 3)
    bottom = desk.root.get_by_label("Bottom")
    bottom.fill("29")
    bottom.press("Enter")
    assert bottom.input_value() == "32" and desk.mask().shape == (high + 32, wide + 16)
    desk.root.get_by_label("The new part is").select_option("transparent")
    transparent = Image.open(io.BytesIO(base64.b64decode(desk.value()["image"].split(",")[1])))
    alpha = np.asarray(transparent.getchannel("A"))
    assert (alpha[:high, :wide] == 255).all() and not alpha[high:].any() and not alpha[:, wide:].any()
    desk.click("No frame")
    assert decoded(desk.value()["image"]).shape == (high, wide, 3) and not desk.mask().any()


def test_sketches_are_hints(mount_editor):
    desk = mount_editor("sketch")
    desk.brush(3)
    assert desk.hints() == []  # nothing is drawn
    line = desk.drag((10, 10), (80, 50))
    (hint,) = desk.hints()
    drawn = grey(hint.pop("image"))
    assert same(drawn, painted(SIZE, *line, width=3))
    assert hint == {"name": "edges", "scale": 1, "start": 0, "end": 1, "annotate": "none"}
    desk.root.get_by_label("Black lines on white").check()
    (hint,) = desk.hints()
    assert hint["annotate"] == "invert" and (grey(hint["image"]) == 255 - drawn).all()
    desk.root.get_by_role("button", name="Add a hint").click()
    desk.root.get_by_label("Network").select_option("depth")
    desk.root.locator("input[value=picture]").check(force=True)
    assert len(desk.hints()) == 1
    desk.click("Use the image")
    assert desk.hints()[1]["annotate"] == "none"  # a depth map; for "edges", it is a picture whose edges count
    desk.root.get_by_label("It is").select_option("canny")
    for label, value in (("Strength", 0.5), ("From", 0.6), ("Until", 0.4), ("Weakest edge", 220)):
        slider = desk.root.get_by_label(label, exact=True)
        slider.evaluate("(e, value) => { e.value = value; e.dispatchEvent(new Event('input')) }", value)
    second = desk.hints()[1]
    assert (decoded(second.pop("image")) == np.asarray(noise())).all()
    limits = {"low": 220, "high": 220, "start": 0.35, "end": 0.4}  # one moves the other along
    assert second == {"name": "depth", "scale": 0.5, "annotate": "canny", **limits}
    desk.click("Remove this hint")
    assert [hint["name"] for hint in desk.hints()] == ["edges"]
    desk.page.evaluate("editor.setControls([])")
    assert desk.hints() == [] and desk.root.get_by_text("no control networks").is_visible()


@pytest.mark.exhaustive
def test_sketch_without_an_image(mount_editor):
    desk = mount_editor("img2img", False)
    assert desk.value() is None
    desk.page.evaluate("editor.setSize(64, 96)")
    desk.root.get_by_label("Sketch").check(force=True)
    desk.fitted((64, 96))
    desk.brush(5)
    line = desk.drag((32, 48))
    assert same(grey(desk.hints()[0]["image"]), painted((64, 96), *line, width=5))
    desk.page.evaluate("editor.setSize(128, 128)")  # what is drawn keeps its size
    assert grey(desk.hints()[0]["image"]).shape == (96, 64)
