"""Where the images of the editor come from and go to: files, drops, pastes, the model, results to compare with."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from editor_common import SIZE, Desk, decoded, grey, noise, url
from PIL import Image

pytestmark = pytest.mark.browser
GIVE = """([name, type, text, kind]) => {
    const data = new DataTransfer();
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    data.items.add(new File([bytes], name, { type }));
    const target = kind === "paste" ? document.body : document.querySelector("#editor .ed-stage");
    const own = kind === "paste" ? { clipboardData: data } : { dataTransfer: data };
    const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
    target.dispatchEvent(new Kind(kind, { bubbles: true, cancelable: true, ...own }));
}"""


@pytest.mark.exhaustive
def test_images_come_by_drop_paste_and_picker(mount_editor, tmp_path):
    desk = mount_editor("img2img", False)
    for i, kind in enumerate(("drop", "paste", "pick")):
        image = noise((40 + 8 * i, 32))
        if kind == "pick":
            image.save(tmp_path / "a.png")
            desk.root.locator("input[type=file]").first.set_input_files(tmp_path / "a.png")
        else:
            desk.page.evaluate(GIVE, ["a.png", "image/png", url(image).split(",")[1], kind])
        desk.root.get_by_text(f"{image.width}×32 pixels").wait_for()
        value = desk.value()
        assert value["kind"] == "img2img" and (decoded(value["image"]) == np.asarray(image)).all()
        assert "mask" not in value
    desk.page.evaluate(GIVE, ["<b>a</b>.png", "image/png", base64.b64encode(b"no image").decode(), "drop"])
    desk.root.get_by_text("not an image that the browser can read").wait_for()
    assert decoded(desk.value()["image"]).shape == (32, 56, 3)  # the last one stays
    with pytest.raises(Exception, match="Images of other sites are not loaded"):
        desk.page.evaluate("editor.setImage('https://example.org/a.png')")
    desk.click("Remove")
    assert desk.value() is None


@pytest.mark.exhaustive
def test_transparent_part_is_the_mask(mount_editor):
    image = noise(channels=4)
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:, :10] = 0
    alpha[5, 50] = 100
    image.putalpha(Image.fromarray(alpha))
    desk = mount_editor("inpaint", image)
    assert (desk.mask() == 255 - alpha).all()
    assert (decoded(desk.value()["image"])[:, :10] == 255).all()  # white, as in the library
    assert (decoded(desk.value()["image"])[alpha == 255] == np.asarray(image)[..., :3][alpha == 255]).all()
    rotated = noise((40, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    buffer = io.BytesIO()
    rotated.save(buffer, "jpeg", exif=exif)
    desk.page.evaluate(GIVE, ["a.jpg", "image/jpeg", base64.b64encode(buffer.getvalue()).decode(), "drop"])
    desk.root.get_by_text("24×40 pixels").wait_for()


@pytest.mark.exhaustive
def test_before_and_after(mount_editor):
    desk = mount_editor()
    buttons = [desk.root.get_by_role("button", name=name, exact=True) for name in ("Before", "After")]
    assert not buttons[0].is_visible()
    centre = """() => {
        const canvas = document.querySelector("#editor canvas");
        return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(
            [...canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data]))));
    }"""
    result = url(Image.new("RGB", SIZE, (1, 200, 3)))
    desk.page.evaluate("url => editor.setResult(url, {...editor.value(), image: 'of another one'})", result)
    assert not buttons[0].is_visible()
    desk.page.evaluate("url => editor.setResult(url, editor.value())", result)
    desk.click("After")
    assert desk.page.evaluate(centre)[:3] == [1, 200, 3]
    assert buttons[1].get_attribute("aria-pressed") == "true"
    desk.drag((20, 20), (60, 20))  # moves the view: nobody paints on a result
    assert not desk.mask().any()
    desk.canvas.focus()
    desk.page.keyboard.press("b")
    assert desk.page.evaluate(centre)[:3] != [1, 200, 3]
    assert buttons[0].get_attribute("aria-pressed") == "true"
    assert (decoded(desk.value()["image"]) == np.asarray(noise())).all()
    desk.drag((20, 20), (60, 20))
    mask = desk.mask()
    desk.click("Edit the result")
    assert (decoded(desk.value()["image"]) == [1, 200, 3]).all() and mask.any() and (desk.mask() == mask).all()
    assert not buttons[0].is_visible()
    desk.page.keyboard.press("Control+z")
    assert (decoded(desk.value()["image"]) == np.asarray(noise())).all() and (desk.mask() == mask).all()


PIXELS = """() => {
    const image = document.querySelector("#result img");
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""


def generated(page):
    """Press Generate; the request, and the pixels of the result."""
    page.evaluate("document.querySelectorAll('#result img').forEach((image) => image.remove())")
    with page.expect_request("**/api/generate") as sent:
        page.click("#go")
    page.wait_for_selector("#result img.result")
    page.evaluate("document.querySelector('#result img.result').decode()")
    return sent.value.post_data_json["request"], decoded(page.evaluate(PIXELS))


def test_inpaint_outpaint_and_sketch_with_the_model(page, tmp_path):
    page.click("#tab-edit")
    page.wait_for_selector("body[data-models]")
    page.fill("#prompt", "a red house")
    page.fill("#seed", "1")
    image = noise((64, 64))
    image.save(tmp_path / "noise.png")
    page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "noise.png")
    page.locator("#editor").get_by_label("Inpaint").check(force=True)
    desk = Desk(page, image.size)
    desk.brush(24, 0.5)
    desk.drag((24, 24), (40, 40))
    request, result = generated(page)
    mask, pixels = grey(request["mask"]), np.asarray(image).astype(int)
    assert request["kind"] == "inpaint" and mask.shape == (64, 64) and (decoded(request["image"]) == pixels).all()
    assert 0 < (mask == 255).sum() < (mask > 0).sum() < 64 * 64 // 2
    assert (result[mask == 0] == pixels[mask == 0]).all()
    assert np.abs(result - pixels)[mask == 255].mean() > 10
    page.locator("#editor").get_by_label("Outpaint").check(force=True)
    right = desk.root.get_by_label("Right")
    right.fill("16")
    right.press("Enter")
    request, result = generated(page)
    mask = grey(request["mask"])
    assert result.shape == (64, 80, 3) and mask.shape == (64, 80)
    assert (result[:, :64][mask[:, :64] == 0] == pixels[mask[:, :64] == 0]).all()
    desk.click("After")
    desk.click("Edit the result")
    desk.root.get_by_text("80×64 pixels").wait_for()
    desk.click("Remove")
    page.locator("#editor").get_by_label("Sketch").check(force=True)
    desk.root.get_by_label("Network").wait_for()
    assert desk.root.get_by_label("Network").input_value() == "edges"
    desk.fitted((128, 128))  # the size of the model's images
    desk.brush(3)
    desk.drag((32, 80), (64, 40), (96, 80))
    request, drawn = generated(page)
    (hint,) = request["controls"]
    assert request["kind"] == "txt2img" and grey(hint["image"]).shape == (128, 128) and grey(hint["image"]).any()
    desk.root.get_by_label("Strength").press("Home")
    request, without = generated(page)
    assert request["controls"][0]["scale"] == 0 and np.abs(drawn - without).mean() > 1
    page.get_by_label("Live").check(force=True)
    with page.expect_request("**/api/generate") as sent:  # at once, for each stroke
        desk.drag((64, 80), (64, 100))
    lines = grey(sent.value.post_data_json["request"]["controls"][0]["image"])
    assert lines[90, 64] == 255 and not grey(hint["image"])[90, 64]


def test_pure_parts(edit_view):
    found = edit_view.evaluate(
        """async () => {
        const { History } = await import("/page/editor/history.js");
        const { Surface } = await import("/page/editor/surface.js");
        const { View, snapped, dragged, sidesAt, NO_FRAME } = await import("/page/editor/geometry.js");
        const history = new History(250);
        let state = 0;
        for (let i = 1; i <= 4; i++) {
            let kept = state;
            state = i;
            history.add({ bytes: 100, swap() { [state, kept] = [kept, state]; } });
        }
        const undone = [history.undo(), history.undo(), history.undo(), state];  // two fit into 250 bytes
        history.redo();
        history.add({ bytes: 1000, swap() {} });
        const view = new View();
        view.fit({ x: 0, y: 0, width: 100, height: 50 }, 220, 200, 10);
        const at = view.toImage(30, 70);
        view.zoomAt(30, 70, 3);
        const zoomed = view.toImage(30, 70);
        for (let i = 0; i < 100; i++) view.zoomAt(30, 70, 3);
        const surface = new Surface(50, 50);
        const corner = { x: -10, y: -10, radius: 5 };
        return {
            undone, state, redo: history.canRedo, kept: history.done.length, at, zoomed, most: view.scale,
            frame: snapped({ left: 5000, top: -3, right: 12, bottom: "x" }, 1000, 1000),
            inwards: dragged({ left: 8, top: 0, right: 0, bottom: 0 }, ["left"], 100, 0, 64, 64),
            sides: sidesAt(NO_FRAME, 10, 10, new View(), 9, 1, 3),
            none: sidesAt(NO_FRAME, 10, 10, new View(), 30, 5, 3),
            outside: surface.paint(corner, corner, 0, false), version: surface.version,
        };
    }"""
    )
    assert found["undone"] == [True, True, False, 2] and found["state"] == 3
    assert not found["redo"] and found["kept"] == 1
    assert found["at"] == pytest.approx({"x": 10, "y": 10}) and found["zoomed"] == pytest.approx(found["at"])
    assert found["most"] == 64
    assert found["frame"] == {"left": 3096, "top": 0, "right": 0, "bottom": 0}
    assert found["inwards"] == {"left": 0, "top": 0, "right": 0, "bottom": 0}
    assert sorted(found["sides"]) == ["right", "top"] and found["none"] == []
    assert found["outside"] is None and found["version"] == 0
