"""The editor of the page for its tests: mounted on its own, driven by the mouse, and what it should give."""

from __future__ import annotations

import base64
import io
import itertools

import numpy as np
import pytest
from PIL import Image
from server_browser import opened

SIZE = 96, 64
PADDING = 16  # CSS pixels around an image that fits its canvas
MOUNT = """async ([image, tab]) => {
    const { Editor } = await import("/page/editor/editor.js");
    const root = document.createElement("section");
    root.id = "editor";
    document.getElementById("editor").replaceWith(root);
    window.changes = 0;
    window.editor = new Editor(root);
    editor.addEventListener("change", () => changes++);
    editor.setControls(["edges", "depth"]);
    if (image) await editor.setImage(image);
    root.querySelector(`input[value=${tab}]`).click();
    await new Promise(requestAnimationFrame);
}"""


def noise(size=SIZE, channels=3):
    """An image without two equal neighbours, so that no shift goes unseen."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def url(image, kind="png"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def decoded(text):
    head, data = text.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def grey(text):
    pixels = decoded(text)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


class Desk:
    """An editor in a page, and where its image is as long as nobody zooms: fitted, in the middle."""

    def __init__(self, page, size):
        self.page, self.root = page, page.locator("#editor")
        self.canvas = self.root.locator("canvas")
        if size:
            self.fitted(size)

    def fitted(self, size, origin=(0, 0)):
        """The scene now has this size, with its top left corner at this point of the image."""
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        self.scale = min((box["width"] - 2 * PADDING) / size[0], (box["height"] - 2 * PADDING) / size[1])
        self.left = box["x"] + box["width"] / 2 - (origin[0] + size[0] / 2) * self.scale
        self.top = box["y"] + box["height"] / 2 - (origin[1] + size[1] / 2) * self.scale

    def at(self, x, y):
        """The whole CSS pixel in the window that is nearest to a point of the image: browsers round some positions."""
        return round(self.left + x * self.scale), round(self.top + y * self.scale)

    def spot(self, x, y):
        """The point of the image that this CSS pixel is at."""
        column, row = self.at(x, y)
        return (column - self.left) / self.scale, (row - self.top) / self.scale

    def drag(self, *points):
        """Draw with the mouse through points of the image; returns the spots where it was."""
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.at(*point))
        self.page.mouse.up()
        return [self.spot(*point) for point in points]

    def click(self, name):
        self.root.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def off(self, name):
        return self.root.get_by_role("button", name=name).get_attribute("aria-disabled") == "true"

    def brush(self, size, softness=0.0):
        for label, value in (("Size", size**0.5), ("Softness", softness)):
            slider = self.root.get_by_label(label, exact=True)
            slider.evaluate("(e, value) => { e.value = value; e.dispatchEvent(new Event('input')) }", value)

    def value(self):
        return self.page.evaluate("editor.value()")

    def mask(self):
        return grey(self.value()["mask"])

    def hints(self):
        return self.page.evaluate("editor.hints()")


def painted(size, *points, width, softness=0.0):
    """What a brush of this diameter leaves along a line of points: full within (1 - softness) of its radius."""
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    cover, radius = np.zeros_like(x), width / 2
    points = points if len(points) > 1 else points * 2
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        t = (((x - x0) * dx + (y - y0) * dy) / ((dx * dx + dy * dy) or 1)).clip(0, 1)
        distance = np.hypot(x - x0 - t * dx, y - y0 - t * dy)
        cover = np.maximum(cover, ((radius + 0.5 - distance) / max(radius * softness, 1)).clip(0, 1))
    return 255 * (cover**2 * (3 - 2 * cover) if softness else cover)


def same(found, expected, slack=2):
    """Equal, up to rounding."""
    return found.shape == expected.shape and np.abs(found - expected).max() <= slack


@pytest.fixture(scope="module")
def edit_view(browser, server):
    with opened(browser, server, viewport={"width": 1280, "height": 900}) as page:
        page.click("#tab-edit")
        yield page


@pytest.fixture
def mount_editor(edit_view):
    """mount_editor(tab, image) -> Desk, with an editor of its own."""

    def mounted(tab="inpaint", image=None, page=edit_view):
        image = noise() if image is None else image
        page.evaluate(MOUNT, [url(image) if image else None, tab])
        return Desk(page, image.size if image else None)

    return mounted
