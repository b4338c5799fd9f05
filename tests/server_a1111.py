"""A server for the tests of the web UI's interface: in this process, at a port of its own."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time

import uvicorn
from PIL import Image

from sd.server.app import create_app
from sd.server.settings import ServerSettings


@contextlib.contextmanager
def running(settings: ServerSettings):
    """A server with these settings; yields (address, engine)."""
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not (server.started and app.state.engine.is_ready):
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", app.state.engine
    finally:
        server.should_exit = True
        thread.join(30)


def base64_of(image: Image.Image) -> str:
    """An image as PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def image_in(text: str) -> Image.Image:
    """The image in a text in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(images):
    """The pixels of images, to be compared."""
    return [image.convert("RGB").tobytes() for image in images]
