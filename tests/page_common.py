"""What the tests of the page share: filling its form, and reading what it shows."""

from __future__ import annotations

import base64
import io
import json

from PIL import Image
from PIL.PngImagePlugin import PngInfo

FEW = {"steps": 4, "guidance": 1, "sampler": "lcm", "spacing": "trailing", "web_ui_prompts": True}
HTML = '<img src="/x" onerror="document.title=1"><b>red</b> house'
# the file of an image of the gallery, from its store: the policy of the page lets nobody fetch blobs
READ_FILE = """async (image) => {
    const shown = [...document.querySelectorAll("#gallery img")].find((each) => each.src === image.src);
    const wait = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
    const database = await wait(indexedDB.open("sd-gallery"));
    const item = await wait(database.transaction("images").objectStore("images").get(shown.parentElement.dataset.id));
    const bytes = new Uint8Array(await item.blob.arrayBuffer());
    return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
}"""
DROP = """([target, name, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
    for (const type of ["dragenter", "dragover", "drop"])
        document.querySelector(target).dispatchEvent(
            new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


def generated(page, prompt, count=1, **fields):
    """Fill the form, press the button, and wait for so many images in the gallery."""
    for name, value in {"prompt": prompt, **fields}.items():
        page.fill(f"#{name}", str(value))
    page.click("#go")
    page.wait_for_selector(f"#gallery li:nth-child({count})")
    page.wait_for_selector("#result img.result")


def shown(page, selector="#result img.result"):
    """The image that is shown, from its bytes in the browser."""
    return Image.open(io.BytesIO(base64.b64decode(page.eval_on_selector(selector, READ_FILE))))


def png(text):
    """A PNG file with this text as its "parameters", in base64."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG", pnginfo=info)
    return base64.b64encode(buffer.getvalue()).decode()


def stored(page):
    """The settings that a reload keeps."""
    return json.loads(page.evaluate("localStorage.getItem('sd-settings')"))
